"""Inverted dropout, element by element or with a mask shared over axes: `dropout` and `Dropout`.

With k the keep probability and m a mask whose elements are 1 with probability k, independently,

    y = x m / k        in training, so E[y] = x and Var[y] = x^2 (1 - k) / k
    y = x              in eval mode

The original formulation (``inverted=False``) has y = x m in training and y = k x in eval mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..core import sites
from ..core.formulations import Formulated, eval_form, masked
from ..core.inputs import check_input
from ..core.mask_shape import Axes, NoiseShape, mask_shape
from ..core.nested import is_jagged, of_values
from ..core.rate import DEFAULT_P, Probability, as_rate, formula_of, undrawn
from ..core.shard import Cut, Shards, cut_by, shards
from ..core.symbolic import called, recorded
from ..core.torch_state import is_compiling
from ..ops.fast_path import fast_dropout


def _cut_of_shards(
    shard: Shards, input: Tensor, shape: Sequence[int], shared_axes: Axes, noise_shape: NoiseShape
) -> Cut | None:
    """Returns the place of an input's mask, which has this shape, in that of the whole tensor; None without shards."""
    if shard is None:
        return None
    if noise_shape is not None:
        shared = {dim for dim, noise in enumerate(noise_shape) if noise == 1}
    else:
        axes = () if shared_axes is None else (shared_axes,) if isinstance(shared_axes, int) else shared_axes
        shared = {axis % input.dim() for axis in axes}
    return cut_by(shard, input, shape, shared)


def dropout(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Probability | None = None,
    shared_axes: Axes = None,
    noise_shape: NoiseShape = None,
    shard: Shards = None,
    generator: torch.Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """Keeps each element with probability k and divides it by k, so that the expectation of the output is the input.

    ``y = x m / k`` with m ~ Bernoulli(k), k = keep_prob = 1 - p. E[y] = x exactly, because the scale is the reciprocal
    of the probability that the mask really has (within 2**-32 of the nominal one); Var[y] = x**2 (1 - k) / k.
    With k = 1 and in eval mode the input itself is returned; with k = 0 the output is 0. A dropped element is exactly
    0, also where the input is infinite or NaN. The gradient is that of a multiplication by m / k with the same mask;
    the mask is not stored.

    A DTensor that is placed by Shard or Replicate keeps its placements. Its mask does not depend on them, provided that
    all ranks draw the same key, as they do within ``torchdrop.seeded(seed, rank=0)``.

    Args:
        input: float16, bfloat16, float32, float64, complex64 or complex128, of any shape, strides and memory format; a
            complex number is kept or dropped as one. Or a contiguous jagged nested tensor of these, without arguments
            that name dimensions. Tensors of integers and bools are taken where torch.nn takes them: with p = 0, p = 1
            and in eval mode.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        training: whether dropout is applied.
        inplace: whether the result is written into `input`.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        shared_axes: the axes over which the mask is the same, for example the time axis.
        noise_shape: the mask's shape, with 1 where it is shared (None means the input's size).
        shard: the input's place in a larger tensor, a `torchdrop.Shard` or several: the mask is then that part of the
            larger tensor's mask.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.
        inverted: False for the original formulation: no scaling in training, and k times the input in eval mode.

    Returns:
        A tensor of the input's shape, dtype and memory format; the input itself in eval mode, with k = 1 and in place.

    Raises:
        ValueError: a rate outside [0, 1], or axes, shapes or shards that do not fit.
        TypeError: both names of the rate, neither, or something that is no number.
        RuntimeError: an integer tensor, or one that must not be written to.
        NotImplementedError: shards along two dimensions, neither of which is the outermost one.

    References:
        Hinton et al., 2012; Srivastava et al., JMLR 15, 2014, sections 4 and 10.

    Example:
        >>> import torch, torchdrop
        >>> _ = torch.manual_seed(0)
        >>> y = torchdrop.functional.dropout(torch.ones(1000), keep_prob=0.8)
        >>> sorted(y.unique().tolist()), 0.7 < (y > 0).float().mean() < 0.9
        ([0.0, 1.25], tensor(True))
    """
    if isinstance(input, Proxy):
        return recorded(dropout, locals())
    rate: Any = as_rate(p, keep_prob, formula_of(inverted))
    if not (training or sites.is_on(training)):
        return eval_form(input, rate, inverted, inplace)
    plain = not inplace and generator is None and shared_axes is None and noise_shape is None and shard is None
    if plain and not is_compiling() and rate.params is not None:
        out = fast_dropout(input, rate.params)
        if out is not None:
            return out
    whole = undrawn(input, rate, inplace)
    if whole is not None:
        return whole
    if is_jagged(input):
        return of_values(
            lambda values: dropout(values, rate, generator=generator, inverted=inverted),
            input, "dropout", inplace, shared_axes, noise_shape, shard,
        )  # fmt: skip
    check_input(input, "dropout", complex_too=True)
    shape = mask_shape(input, shared_axes, noise_shape)
    cut = _cut_of_shards(shard, input, shape, shared_axes, noise_shape)
    return masked(input, rate, inverted, shape, inplace, generator, cut)


class Dropout(Formulated, nn.Dropout):
    """Module of `dropout`: y = x m / k in training, the input itself in eval mode. A drop-in for torch.nn.Dropout.

    Preserves the expectation exactly and keeps no mask for backward; see `dropout` for the definition.

    Args:
        p: probability of dropping an element, in [0, 1]. Default: 0.5.
        inplace: whether the result is written into the input.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        shared_axes: the axes over which the mask is the same.
        noise_shape: the mask's shape, with 1 where it is shared (None means the input's size).
        shard: the inputs' place in a larger tensor, a `torchdrop.Shard` or several.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.
        inverted: False for the original formulation: no scaling in training, k times the input in eval mode.

    Shape:
        Input and output: any shape. No parameters, no buffers, nothing in the state_dict.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: both names of the rate, neither, or something that is no number or no shard.

    References:
        Hinton et al., 2012; Srivastava et al., JMLR 15, 2014, sections 4 and 10.

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.Dropout(keep_prob=0.8)
        >>> layer
        Dropout(p=0.2, inplace=False)
        >>> layer.p = 0.5
        >>> layer(torch.ones(100)).unique()
        tensor([0., 2.])
        >>> x = torch.ones(100)
        >>> layer.eval()(x) is x
        True
    """

    shard: Shards = None  # for a layer that was pickled before there were shards

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        inplace: bool = False,
        *,
        keep_prob: Probability | None = None,
        shared_axes: Axes = None,
        noise_shape: NoiseShape = None,
        shard: Shards = None,
        generator: torch.Generator | None = None,
        inverted: bool = True,
    ) -> None:
        super().__init__(p, inplace, keep_prob=keep_prob, generator=generator, inverted=inverted)
        if shared_axes is not None and noise_shape is not None:
            raise TypeError("give shared_axes or noise_shape, not both")
        shards(shard)
        self.shared_axes = shared_axes
        self.noise_shape = noise_shape
        self.shard = shard

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training or sites.is_on(False)):
            if isinstance(input, Proxy):
                return called(Dropout, self, input)
            return input if self.inverted else eval_form(input, self.rate, False, self.inplace)
        if (
            not is_compiling()
            and (params := self.rate.params) is not None
            and not self.inplace
            and self.generator is None
            and self.shared_axes is None
            and self.noise_shape is None
            and self.shard is None
        ):
            out = fast_dropout(input, params)
            if out is not None:
                return out
        if isinstance(input, Proxy):
            return called(Dropout, self, input)
        return dropout(
            input, self.rate, True, self.inplace, shared_axes=self.shared_axes, noise_shape=self.noise_shape,
            shard=self.shard, generator=self.generator, inverted=self.inverted,
        )  # fmt: skip

    def extra_repr(self) -> str:
        given = {"shared_axes": self.shared_axes, "noise_shape": self.noise_shape, "shard": self.shard}
        return super().extra_repr() + "".join(f", {k}={v}" for k, v in given.items() if v is not None)

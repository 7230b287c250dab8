"""Inverted dropout and its shared-mask forms: `dropout`, `dropout1d`, `dropout2d`, `dropout3d` and their modules.

With k the keep probability and m a mask whose elements are 1 with probability k, independently,

    y = x m / k        in training, so E[y] = x and Var[y] = x^2 (1 - k) / k
    y = x              in eval mode

The original formulation (``inverted=False``) has y = x m in training and y = k x in eval mode. The channel forms are
the same map with a mask that is shared over the spatial axes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import operators
from ..kernels.law import Formula, Law, original
from ..kernels.law import inverted as inverted_formula
from ._rate import DEFAULT_P, Rate, Rated, apply, check_input, law_for, read_rate, realised
from ._short import short

_is_compiling = torch.compiler.is_compiling

Axes = int | Sequence[int] | None
NoiseShape = Sequence[int | None] | None


def drop(
    input: Tensor,
    law: Law | Tensor,
    shape: Sequence[int],
    inplace: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """A checked `input` under the law and a new mask of this shape. The input itself where nothing is dropped."""
    return apply(operators.masked, input, law, shape, inplace, generator)


def mask_shape(input: Tensor, shared_axes: Axes, noise_shape: NoiseShape) -> Sequence[int]:
    """The mask's shape: the input's, with ones on the axes over which it is shared.

    Raises:
        TypeError: both ways of saying it are used, or an axis is no integer.
        ValueError: an axis is out of range or named twice; a noise shape of another length, or with a size that is
            neither 1, None nor the input's.
    """
    if shared_axes is None and noise_shape is None:
        return input.shape
    if shared_axes is not None and noise_shape is not None:
        raise TypeError("give shared_axes or noise_shape, not both")
    sizes = list(input.shape)
    if shared_axes is not None:
        axes = (shared_axes,) if isinstance(shared_axes, int) else tuple(shared_axes)
        dims = input.dim()
        for axis in axes:
            if not isinstance(axis, int):
                raise TypeError(f"shared_axes must be integers, got {axis!r}")
            if not -dims <= axis < dims:
                raise ValueError(f"shared_axes must be in [{-dims}, {dims}) for a {dims}-D input, got {axis}")
            sizes[axis] = 1
        if len({axis % dims for axis in axes}) < len(axes):
            raise ValueError(f"shared_axes must name each axis once, got {axes}")
        return tuple(sizes)
    assert noise_shape is not None
    if len(noise_shape) != len(sizes):
        raise ValueError(
            f"noise_shape must have a size for each of the input's {len(sizes)} dimensions, got {tuple(noise_shape)}"
        )
    for noise, size in zip(noise_shape, sizes, strict=True):
        if noise not in (None, 1, size):
            raise ValueError(
                "noise_shape must hold 1, None or the input's size: "
                f"{tuple(noise_shape)} for an input of {tuple(sizes)}"
            )
    return tuple(size if noise is None else noise for noise, size in zip(noise_shape, sizes, strict=True))


def _formula(inverted: bool) -> Formula:
    return inverted_formula if inverted else original


def _eval(input: Tensor, keep_prob: Rate, inverted: bool, inplace: bool) -> Tensor:
    if inverted:
        return input
    k = realised(keep_prob)
    if isinstance(k, Tensor):
        k = k.to(input.device, torch.promote_types(input.dtype, torch.float32))
    if inplace:
        return input.mul_(k)
    return (input * k).to(input.dtype)


def dropout(
    input: Tensor,
    p: Any = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Any = None,
    shared_axes: Axes = None,
    noise_shape: NoiseShape = None,
    generator: torch.Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """Keeps each element with probability k and divides it by k, so that the expectation of the output is the input.

    ``y = x m / k`` with m ~ Bernoulli(k), k = keep_prob = 1 - p. E[y] = x exactly, because the scale is the reciprocal
    of the probability that the mask really has (within 2**-32 of the nominal one); Var[y] = x**2 (1 - k) / k.
    With k = 1 and in eval mode the input itself is returned; with k = 0 the output is 0. A dropped element is exactly
    0, also where the input is infinite or NaN. The gradient is that of a multiplication by m / k with the same mask;
    the mask is not stored.

    Args:
        input: float16, bfloat16, float32 or float64, of any shape, strides and memory format.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        training: whether dropout is applied.
        inplace: whether the result is written into `input`.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        shared_axes: the axes over which the mask is the same, for example the time axis.
        noise_shape: the mask's shape, with 1 where it is shared (None stands for the input's size).
        generator: where the mask's key is drawn from; PyTorch's default generator of the device if None.
        inverted: False for the original formulation: no scaling in training, and k times the input in eval mode.

    Returns:
        A tensor of the input's shape, dtype and memory format; the input itself in eval mode, with k = 1 and in place.

    Raises:
        ValueError: a rate outside [0, 1], or axes or shapes that do not fit.
        TypeError: both names of the rate, neither, or something that is no number.
        RuntimeError: an integer tensor, or one that must not be written to.

    References:
        Hinton et al., 2012; Srivastava et al., JMLR 15, 2014, sections 4 and 10.

    Example:
        >>> import torch, torchdrop
        >>> _ = torch.manual_seed(0)
        >>> y = torchdrop.functional.dropout(torch.ones(1000), keep_prob=0.8)
        >>> sorted(y.unique().tolist()), 0.7 < (y > 0).float().mean() < 0.9
        ([0.0, 1.25], tensor(True))
    """
    k, _ = read_rate(p, keep_prob)
    if not training:
        return _eval(input, k, inverted, inplace)
    check_input(input, "dropout")
    shape = mask_shape(input, shared_axes, noise_shape)
    return drop(input, law_for(k, _formula(inverted), shape), shape, inplace, generator)


def _shape1d(input: Tensor) -> tuple[int, ...]:
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input. Note that dropout1d drops whole "
            "channels of inputs with one spatial dimension, (C, L) or (N, C, L): use dropout with shared_axes else"
        )
    return (*input.shape[:-1], 1)


def _shape2d(input: Tensor) -> tuple[int, ...]:
    dims = input.dim()
    if dims not in (3, 4):
        _warn_dimensions("dropout2d", dims, "(N, C, H, W)")
    if dims == 3:
        warnings.warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout behavior is "
            "desired - input is interpreted as shape (N, C, L). torch.nn announces that this will become (C, H, W): "
            "use dropout1d to keep the present meaning, or dropout with shared_axes to be explicit",
            stacklevel=4,
        )
    return (*input.shape[:2], *[1] * (dims - 2))


def _shape3d(input: Tensor) -> tuple[int, ...]:
    dims = input.dim()
    if dims not in (4, 5):
        _warn_dimensions("dropout3d", dims, "(N, C, D, H, W) or (C, D, H, W)")
    channels = 2 if dims == 5 else 1
    return (*input.shape[:channels], *[1] * (dims - channels))


def _warn_dimensions(name: str, dims: int, usual: str) -> None:
    warnings.warn(
        f"{name}: Received a {dims}-D input to {name}, which is deprecated and will result in an error in a future "
        f"release of torch.nn. {name} drops whole channels of {usual}: use dropout with shared_axes for other shapes",
        stacklevel=5,
    )


def check_channels(input: Tensor, least: int = 2) -> None:
    """Raises RuntimeError, with torch.nn's text, if the input has too few dimensions for channels."""
    if input.dim() < least:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")


def _drop_channels(
    shape_of: Callable[[Tensor], tuple[int, ...]],
    input: Tensor,
    keep_prob: Rate,
    law_of: Callable[[tuple[int, ...]], Law | Tensor],
    training: bool,
    inplace: bool,
    generator: torch.Generator | None,
    inverted: bool,
) -> Tensor:
    """What the three channel forms share; they differ in how they read an input's shape."""
    name = f"dropout{shape_of.__name__[-2:]}"
    if training or not isinstance(input, Tensor):
        check_input(input, name)
    shape = shape_of(input)
    if not training:
        return _eval(input, keep_prob, inverted, inplace)
    check_channels(input, least=1 if shape_of is _shape3d else 2)
    return drop(input, law_of(shape), shape, inplace, generator)


def dropout1d(
    input: Tensor,
    p: Any = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Any = None,
    generator: torch.Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """`dropout` of whole channels of (N, C, L) or (C, L): one draw for each channel of each sample.

    The definition, what it preserves and the arguments are those of `dropout`.

    Raises:
        RuntimeError: the input has neither 2 nor 3 dimensions.

    References:
        Tompson et al., CVPR 2015 (arXiv:1411.4280), section 3.2.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.functional.dropout1d(torch.ones(4, 8, 16), 0.25)
        >>> torch.equal(y, y[:, :, :1].expand_as(y))
        True
    """
    return _channels(_shape1d, input, p, training, inplace, keep_prob, generator, inverted)


def dropout2d(
    input: Tensor,
    p: Any = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Any = None,
    generator: torch.Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """`dropout` of whole channels of (N, C, H, W): one draw for each channel of each sample.

    The definition, what it preserves and the arguments are those of `dropout`. Inputs of other ranks are taken as
    torch.nn.functional.dropout2d takes them, with its warnings: the first two dimensions are sample and channel.

    Raises:
        RuntimeError: the input has fewer than 2 dimensions.

    References:
        Tompson et al., CVPR 2015 (arXiv:1411.4280), section 3.2.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.functional.dropout2d(torch.ones(4, 8, 5, 5), 0.25)
        >>> torch.equal(y, y[:, :, :1, :1].expand_as(y))
        True
    """
    return _channels(_shape2d, input, p, training, inplace, keep_prob, generator, inverted)


def dropout3d(
    input: Tensor,
    p: Any = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Any = None,
    generator: torch.Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """`dropout` of whole channels of (N, C, D, H, W) or (C, D, H, W): one draw for each channel of each sample.

    The definition, what it preserves and the arguments are those of `dropout`. Inputs of other ranks are taken as
    torch.nn.functional.dropout3d takes them, with its warning: as one sample, whose first dimension is the channel.

    Raises:
        RuntimeError: the input is a scalar.

    References:
        Tompson et al., CVPR 2015 (arXiv:1411.4280), section 3.2.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.functional.dropout3d(torch.ones(4, 8, 3, 3, 3), 0.25)
        >>> torch.equal(y, y[:, :, :1, :1, :1].expand_as(y))
        True
    """
    return _channels(_shape3d, input, p, training, inplace, keep_prob, generator, inverted)


def _channels(
    shape_of: Callable[[Tensor], tuple[int, ...]],
    input: Tensor,
    p: Any,
    training: bool,
    inplace: bool,
    keep_prob: Any,
    generator: torch.Generator | None,
    inverted: bool,
) -> Tensor:
    k, _ = read_rate(p, keep_prob)
    return _drop_channels(
        shape_of, input, k, lambda shape: law_for(k, _formula(inverted), shape), training, inplace, generator, inverted
    )


class _Bernoulli(Rated):
    """A layer of this family; `inverted` tells the two formulations apart."""

    inverted: bool

    def __init__(
        self,
        p: Any = DEFAULT_P,
        inplace: bool = False,
        *,
        keep_prob: Any = None,
        generator: torch.Generator | None = None,
        inverted: bool = True,
    ) -> None:
        self._formula = _formula(inverted)
        super().__init__(p, inplace, keep_prob=keep_prob, generator=generator)
        self.inverted = inverted

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.inverted else ", inverted=False")


class Dropout(_Bernoulli, nn.Dropout):
    """Module of `dropout`: y = x m / k in training, the input itself in eval mode. A drop-in for torch.nn.Dropout.

    Preserves the expectation exactly and keeps no mask for backward; see `dropout` for the definition.

    Args:
        p: probability of dropping an element, in [0, 1]. Default: 0.5.
        inplace: whether the result is written into the input.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        shared_axes: the axes over which the mask is the same.
        noise_shape: the mask's shape, with 1 where it is shared (None stands for the input's size).
        generator: where the masks' keys are drawn from; PyTorch's default generator of the device if None.
        inverted: False for the original formulation: no scaling in training, k times the input in eval mode.

    Shape:
        Input and output: any shape. No parameters, no buffers, nothing in the state_dict.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: both names of the rate, neither, or something that is no number.

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

    def __init__(
        self,
        p: Any = DEFAULT_P,
        inplace: bool = False,
        *,
        keep_prob: Any = None,
        shared_axes: Axes = None,
        noise_shape: NoiseShape = None,
        generator: torch.Generator | None = None,
        inverted: bool = True,
    ) -> None:
        super().__init__(p, inplace, keep_prob=keep_prob, generator=generator, inverted=inverted)
        if shared_axes is not None and noise_shape is not None:
            raise TypeError("give shared_axes or noise_shape, not both")
        self.shared_axes = shared_axes
        self.noise_shape = noise_shape

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input if self.inverted else _eval(input, self._keep_prob, False, self.inplace)
        if (
            not _is_compiling()
            and self._law is not None
            and not self.inplace
            and self.generator is None
            and self.shared_axes is None
            and self.noise_shape is None
        ):
            out = short(input, self._law)
            if out is not None:
                return out
        check_input(input, "dropout")
        shape = mask_shape(input, self.shared_axes, self.noise_shape)
        return drop(input, self._law_for(shape), shape, self.inplace, self.generator)

    def extra_repr(self) -> str:
        shared = {"shared_axes": self.shared_axes, "noise_shape": self.noise_shape}
        return super().extra_repr() + "".join(f", {k}={v}" for k, v in shared.items() if v is not None)


class _ChannelDropout(_Bernoulli):
    _shape_of: Callable[[Tensor], tuple[int, ...]]

    def forward(self, input: Tensor) -> Tensor:
        return _drop_channels(
            self._shape_of, input, self._keep_prob, self._law_for, self.training, self.inplace, self.generator,
            self.inverted,
        )  # fmt: skip


class Dropout1d(_ChannelDropout, nn.Dropout1d):
    """Module of `dropout1d`: whole channels of (N, C, L) or (C, L). A drop-in for torch.nn.Dropout1d.

    See `Dropout` for the arguments and `dropout1d` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.Dropout1d(0.25)(torch.ones(4, 8, 16))
        >>> torch.equal(y, y[:, :, :1].expand_as(y))
        True
    """

    _shape_of = staticmethod(_shape1d)


class Dropout2d(_ChannelDropout, nn.Dropout2d):
    """Module of `dropout2d`: whole channels of (N, C, H, W). A drop-in for torch.nn.Dropout2d.

    See `Dropout` for the arguments and `dropout2d` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.Dropout2d(keep_prob=0.75)(torch.ones(4, 8, 5, 5))
        >>> torch.equal(y, y[:, :, :1, :1].expand_as(y))
        True
    """

    _shape_of = staticmethod(_shape2d)


class Dropout3d(_ChannelDropout, nn.Dropout3d):
    """Module of `dropout3d`: whole channels of (N, C, D, H, W) or (C, D, H, W). A drop-in for torch.nn.Dropout3d.

    See `Dropout` for the arguments and `dropout3d` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> y = torchdrop.Dropout3d(0.25)(torch.ones(4, 8, 3, 3, 3))
        >>> torch.equal(y, y[:, :, :1, :1, :1].expand_as(y))
        True
    """

    _shape_of = staticmethod(_shape3d)

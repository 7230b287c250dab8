"""Stochastic depth: `drop_path` as in timm, and `stochastic_depth` as in torchvision. They are the same map.

With k the keep probability and f a residual branch, a block computes

    x + (m / k) f(x)   in training, m ~ Bernoulli(k): one draw for each sample, or one for the whole batch
    x + f(x)           in eval mode, and in expectation (Huang et al., ECCV 2016)

The functions here are applied between f and the sum: y = x m / k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ..core import sites
from ..core.inputs import check_input
from ..core.mask_shape import row_shape
from ..core.rate import DEFAULT_P, Default, Probability, Rate, Rated, as_rate, formula_of, rate_named, shown
from ..core.symbolic import leaf, recorded
from ..kernels.mask_params import inverted
from ..ops import operators

NO_DROP = Default.NO_DROP
"""timm's default rate."""

MODES = ("batch", "row")


def _check_mode(mode: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode}")


def drop_path(
    x: Tensor,
    drop_prob: Probability = NO_DROP,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops the residual branch of each sample as a whole; timm's signature.

    ``y_b = x_b m_b / k`` with m_b ~ Bernoulli(k), one draw for each sample b, k = keep_prob = 1 - drop_prob. E[y] = x
    exactly, because the scale is the reciprocal of the probability that the mask really has. With k = 1 and in eval
    mode (the default, as in timm) the input itself is returned; with k = 0 the output is 0. A dropped sample is exactly
    0, also where it is infinite or NaN. No mask is stored.

    Args:
        x: the branch's output, (B, ...): float16, bfloat16, float32 or float64, of any strides and memory format.
        drop_prob: probability of dropping a sample, in [0, 1]. Default: 0.
        training: whether anything is dropped.
        scale_by_keep: False for y = x m, whose expectation is k x; in eval mode the output is still x.
        keep_prob: probability of keeping, in place of `drop_prob`: a number, or a tensor that broadcasts against
            (B, 1, ..., 1).
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of x's shape, dtype and memory format; x itself in eval mode and with k = 1.

    Raises:
        ValueError: a rate outside [0, 1], or an input without dimensions.
        TypeError: both names of the rate, or something that is no number.
        RuntimeError: an integer tensor.

    References:
        Huang et al., Deep networks with stochastic depth, ECCV 2016 (arXiv:1603.09382).

    Example:
        >>> import torch, torchdrop
        >>> _ = torch.manual_seed(0)
        >>> y = torchdrop.functional.drop_path(torch.ones(100, 3, 4), 0.2, training=True)
        >>> torch.equal(y, y[:, :1, :1].expand_as(y)), sorted(y.unique().tolist())
        (True, [0.0, 1.25])
    """
    if isinstance(x, Proxy):
        return recorded(drop_path, locals())
    rate = as_rate(rate_named("drop_prob", drop_prob, keep_prob), keep_prob, formula_of(scale_by_keep))
    if not (training or sites.is_on(training)):
        return x
    shape = row_shape(x, "drop_path")
    return sites.apply(operators.masked, x, rate.params_for(shape), shape, False, generator)


def stochastic_depth(
    input: Tensor,
    p: Probability = DEFAULT_P,
    mode: str = "row",
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops the residual branch of each sample, or of the whole batch; torchvision's signature.

    ``y = x m / k`` with m ~ Bernoulli(k) drawn once for each sample ("row") or once ("batch"): `drop_path`, whose
    definition and properties hold here, with its batchwise form.

    Args:
        input: the branch's output, (B, ...): float16, bfloat16, float32 or float64.
        p: probability of dropping, in [0, 1]. Default: 0.5.

        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the input's shape, dtype and memory format; the input itself in eval mode and with k = 1.

    Raises:
        ValueError: another mode; otherwise as `drop_path`.
        TypeError, RuntimeError: as `drop_path`.

    References:
        Huang et al., Deep networks with stochastic depth, ECCV 2016 (arXiv:1603.09382).

    Example:
        >>> import torch, torchdrop
        >>> _ = torch.manual_seed(0)
        >>> x = torch.ones(100, 3)
        >>> torchdrop.functional.stochastic_depth(x, 0.2, "row").unique().tolist()
        [0.0, 1.25]
        >>> torchdrop.functional.stochastic_depth(x, 0.2, "batch").unique().tolist()
        [1.25]
    """
    if isinstance(input, Proxy):
        return recorded(stochastic_depth, locals())
    rate = as_rate(rate_named("p", p, keep_prob), keep_prob)
    _check_mode(mode)
    if not (training or sites.is_on(training)):
        return input
    if mode == "row":
        shape = row_shape(input, "stochastic_depth")
    else:
        check_input(input, "stochastic_depth")
        shape = (1,) * input.dim()
    return sites.apply(operators.masked, input, rate.params_for(shape), shape, False, generator)


class DropPath(Rated):
    """Module of `drop_path`: y_b = x_b m_b / k in training, the input itself in eval mode. A drop-in for timm's.

    Args:
        drop_prob: probability of dropping a sample, in [0, 1]. Default: 0. Readable and settable, as p and keep_prob.
        scale_by_keep: False for y = x m in training.
        keep_prob: probability of keeping, in place of `drop_prob`: a number, or a tensor that broadcasts against
            (B, 1, ..., 1).
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        Input and output: (B, ...). No parameters, no buffers, nothing in the state_dict.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: both names of the rate, or something that is no number.

    References:
        Huang et al., Deep networks with stochastic depth, ECCV 2016 (arXiv:1603.09382).

    Example:
        Their linear rule k_l = 1 - l / L (1 - k_L):

        >>> import torch, torchdrop
        >>> model = torch.nn.ModuleDict({f"block{l}": torchdrop.DropPath() for l in range(1, 5)})
        >>> torchdrop.set_keep_prob(model, {"block*": torchdrop.rules.linear_in_depth(0.5)})
        >>> model["block1"], model["block4"].drop_prob
        (DropPath(drop_prob=0.125), 0.5)
    """

    def __init__(
        self,
        drop_prob: Probability = NO_DROP,
        scale_by_keep: bool = True,
        *,
        keep_prob: Probability | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._formula = formula_of(scale_by_keep)
        super().__init__(rate_named("drop_prob", drop_prob, keep_prob), keep_prob=keep_prob, generator=generator)

    @property
    def drop_prob(self) -> Probability:
        """The probability that a sample is dropped: another name of p."""
        return self.p

    @drop_prob.setter
    def drop_prob(self, value: Probability) -> None:
        self.p = rate_named("drop_prob", value, None)

    @property
    def scale_by_keep(self) -> bool:
        """Whether kept samples are divided by keep_prob."""
        return self._formula is inverted

    @scale_by_keep.setter
    def scale_by_keep(self, value: bool) -> None:
        self._formula = formula_of(value)
        self._set(Rate(self.keep_prob, self.p, self._formula), None)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.rate, self.training, self.scale_by_keep, generator=self.generator)

    def extra_repr(self) -> str:
        return f"drop_prob={shown(self.p)}" + ("" if self.scale_by_keep else ", scale_by_keep=False")


class StochasticDepth(Rated):
    """Module of `stochastic_depth`: y = x m / k in training, the input in eval mode. A drop-in for torchvision's.

    Args:
        p: probability of dropping, in [0, 1]. Default: 0.5.
        mode: "row", a draw for each sample, or "batch", one for all.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        Input and output: (B, ...). No parameters, no buffers, nothing in the state_dict.

    Raises:
        ValueError: a rate outside [0, 1], or another mode.
        TypeError: both names of the rate, or something that is no number.

    References:
        Huang et al., Deep networks with stochastic depth, ECCV 2016 (arXiv:1603.09382).

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.StochasticDepth(0.2, "row")
        >>> layer
        StochasticDepth(p=0.2, mode=row)
        >>> x = torch.randn(8, 3, 4, 4)
        >>> layer.eval()(x) is x
        True
    """

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        mode: str = "row",
        *,
        keep_prob: Probability | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rate_named("p", p, keep_prob), keep_prob=keep_prob, generator=generator)
        _check_mode(mode)
        self.mode = mode

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return stochastic_depth(input, self.rate, self.mode, self.training, generator=self.generator)

    def extra_repr(self) -> str:
        return f"p={shown(self.p)}, mode={self.mode}"

"""Stochastic depth: `drop_path`, as timm has it, and `stochastic_depth`, as torchvision has it. They are one map.

With k the keep probability and f a residual branch, a block computes

    x + (m / k) f(x)   in training, m ~ Bernoulli(k): one draw for each sample, or one for the whole batch
    x + f(x)           in eval mode, and in expectation (Huang et al., ECCV 2016)

The functions here are what stands between f and the sum: y = x m / k.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ..core import sites
from ..core.rate import DEFAULT_P, Default, Rate, Rated, apply, check_input, law_for, read_rate
from ..core.symbolic import leaf, recorded
from ..kernels.law import Law, inverted
from ..ops import operators
from .dropout import formula_of

NO_DROP = Default.NO_DROP
"""timm's default rate."""

MODES = ("batch", "row")

LawOf = Callable[[Sequence[int]], Law | Tensor]


def _given(name: str, p: Any, keep_prob: Any) -> Any:
    """What `read_rate` gets as p; the errors in which an argument of this name differs from its own.

    Raises:
        TypeError: both are given, or something that is no number.
        ValueError: a number outside [0, 1]; torchvision's class and leading text.
    """
    if keep_prob is not None:
        if p is not None and p is not NO_DROP and p is not DEFAULT_P:
            raise TypeError(
                f"give the rate as {name} or as keep_prob, not both: got {name}={p} and keep_prob={keep_prob}"
            )
        return None
    if not isinstance(p, numbers.Real | Tensor):
        raise TypeError(f"{name} must be a number or a tensor, got {type(p).__name__}")
    if isinstance(p, numbers.Real) and not 0.0 <= p <= 1.0:  # type: ignore[operator]
        raise ValueError(f"drop probability has to be between 0 and 1, but got {p}")
    return 0.0 if p is NO_DROP else p


def _check_mode(mode: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode}")


def _shown(p: Rate) -> str:
    return f"<tensor of shape {tuple(p.shape)}>" if isinstance(p, Tensor) else str(p)


def row_shape(input: Tensor, name: str) -> tuple[int, ...]:
    """(B, 1, ..., 1) for a checked input of shape (B, ...): the shape of a mask with a draw for each sample.

    Raises:
        ValueError: the input has no dimensions.
    """
    check_input(input, name)
    if input.dim() == 0:
        raise ValueError(f"{name}: input must have its samples in the first dimension, (B, ...), got a 0-d tensor")
    return (input.shape[0], *[1] * (input.dim() - 1))


def _drop(
    name: str, input: Tensor, mode: str, law_of: LawOf, training: bool, generator: torch.Generator | None
) -> Tensor:
    """The map behind both names."""
    if not sites.is_on(training):
        return input
    if mode == "row":
        shape = row_shape(input, name)
    else:
        check_input(input, name)
        shape = (1,) * input.dim()
    return apply(operators.masked, input, law_of(shape), shape, False, generator)


def drop_path(
    x: Tensor,
    drop_prob: Any = NO_DROP,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    keep_prob: Any = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops the residual branch of each sample as a whole; timm's signature.

    ``y_b = x_b m_b / k`` with m_b ~ Bernoulli(k), one draw for each sample b, k = keep_prob = 1 - drop_prob. E[y] = x
    exactly, because the scale is the reciprocal of the probability that the mask really has. With k = 1 and in eval
    mode (the default, as in timm) the input itself is returned; with k = 0 the output is 0. A dropped sample is exactly
    0, also where it is infinite or NaN. No mask is stored.

    Args:
        x: what the branch gives, (B, ...): float16, bfloat16, float32 or float64, of any strides and memory format.
        drop_prob: probability of dropping a sample, in [0, 1]. Default: 0.
        training: whether anything is dropped.
        scale_by_keep: False for y = x m, whose expectation is k x; in eval mode the output is x all the same.
        keep_prob: probability of keeping, in place of `drop_prob`: a number, or a tensor that broadcasts against
            (B, 1, ..., 1).
        generator: where the mask's key is drawn from; PyTorch's default generator of the device if None.

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
    k, _ = read_rate(_given("drop_prob", drop_prob, keep_prob), keep_prob)
    formula = formula_of(scale_by_keep)
    return _drop("drop_path", x, "row", lambda shape: law_for(k, formula, shape), training, generator)


def stochastic_depth(
    input: Tensor,
    p: Any = DEFAULT_P,
    mode: str = "row",
    training: bool = True,
    *,
    keep_prob: Any = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops the residual branch of each sample, or of the whole batch; torchvision's signature.

    ``y = x m / k`` with m ~ Bernoulli(k) drawn once for each sample ("row") or once ("batch"): `drop_path`, whose
    definition and properties hold here, with its batchwise form.

    Args:
        input: what the branch gives, (B, ...): float16, bfloat16, float32 or float64.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        mode: "row" or "batch".
        training: whether anything is dropped.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        generator: where the mask's key is drawn from; PyTorch's default generator of the device if None.

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
    k, _ = read_rate(_given("p", p, keep_prob), keep_prob)
    _check_mode(mode)
    return _drop("stochastic_depth", input, mode, lambda shape: law_for(k, inverted, shape), training, generator)


class DropPath(Rated):
    """Module of `drop_path`: y_b = x_b m_b / k in training, the input itself in eval mode. A drop-in for timm's.

    Args:
        drop_prob: probability of dropping a sample, in [0, 1]. Default: 0. Readable and settable, as p and keep_prob.
        scale_by_keep: False for y = x m in training.
        keep_prob: probability of keeping, in place of `drop_prob`: a number, or a tensor that broadcasts against
            (B, 1, ..., 1).
        generator: where the masks' keys are drawn from; PyTorch's default generator of the device if None.

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
        drop_prob: Any = NO_DROP,
        scale_by_keep: bool = True,
        *,
        keep_prob: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._formula = formula_of(scale_by_keep)
        super().__init__(_given("drop_prob", drop_prob, keep_prob), keep_prob=keep_prob, generator=generator)

    @property
    def drop_prob(self) -> Rate:
        """The probability that a sample is dropped: another name of p."""
        return self._p

    @drop_prob.setter
    def drop_prob(self, value: Any) -> None:
        self.p = _given("drop_prob", value, None)

    @property
    def scale_by_keep(self) -> bool:
        """Whether kept samples are divided by keep_prob."""
        return self._formula is inverted

    @scale_by_keep.setter
    def scale_by_keep(self, value: bool) -> None:
        self._formula = formula_of(value)
        self._hold(self._keep_prob, self._p)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        return _drop("drop_path", x, "row", self._law_for, self.training, self.generator)

    def extra_repr(self) -> str:
        return f"drop_prob={_shown(self._p)}" + ("" if self.scale_by_keep else ", scale_by_keep=False")


class StochasticDepth(Rated):
    """Module of `stochastic_depth`: y = x m / k in training, the input in eval mode. A drop-in for torchvision's.

    Args:
        p: probability of dropping, in [0, 1]. Default: 0.5.
        mode: "row", a draw for each sample, or "batch", one for all.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        generator: where the masks' keys are drawn from; PyTorch's default generator of the device if None.

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
        p: Any = DEFAULT_P,
        mode: str = "row",
        *,
        keep_prob: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(_given("p", p, keep_prob), keep_prob=keep_prob, generator=generator)
        _check_mode(mode)
        self.mode = mode

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        _check_mode(self.mode)
        return _drop("stochastic_depth", input, self.mode, self._law_for, self.training, self.generator)

    def extra_repr(self) -> str:
        return f"p={_shown(self._p)}, mode={self.mode}"

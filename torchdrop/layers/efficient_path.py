"""Efficient stochastic depth: the residual branch is computed only for the samples that keep it.

With k the keep probability, f a residual branch and B samples, a block computes

    x + (B / n) f(x)_S   in training, S a random subset of n = round(B k) samples, the only ones that f sees
    x + f(x)             in eval mode, and in expectation over the subsets (Oquab et al., 2023)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ..core import portable, sites
from ..core.choices import subset
from ..core.exported import warn_stays_on
from ..core.mask_shape import row_shape
from ..core.rate import DEFAULT_P, Probability, Rated, as_rate, check_count, realized
from ..core.symbolic import leaf, recorded
from ..kernels.masking import COMPUTE_DTYPE

Branch = Callable[[Tensor], Tensor]


def _check_rate(keep_prob: Probability) -> None:
    check_count(keep_prob, "efficient stochastic depth")


def _weighted_sum(input: Tensor, residual: Tensor, weight: Any) -> Tensor:
    dtype = torch.promote_types(input.dtype, residual.dtype)
    wide = COMPUTE_DTYPE.get(dtype, dtype)
    return (input.to(wide) + residual.to(wide) * weight).to(dtype)


def _residual(branch: Branch, part: Tensor) -> Tensor:
    residual = branch(part)
    if not isinstance(residual, Tensor):
        raise TypeError(f"branch must return a tensor, got {type(residual).__name__}")
    if residual.shape != part.shape:
        raise ValueError(
            f"branch must keep the shape of its input, got {tuple(residual.shape)} for {tuple(part.shape)}"
        )
    return residual


def efficient_stochastic_depth(
    input: Tensor,
    branch: Branch,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the residual sum x + f(x) with f computed only on a random subset of the samples, weighted by B / n.

    ``y_b = x_b + (B / n) f(x)_b`` for b in S, ``y_b = x_b`` for the others. S is a subset of exactly n samples, n =
    round(B k) (ties to the even number) but at least 1, all subsets equally likely: E[y] = x + f(x) exactly, over the
    subsets, if f treats samples independently. f sees n rows, so its cost, forward and backward, is n / B of the whole;
    its gradient comes only from the subset. With n = B and in eval mode the output is x + f(x); k = 0 is refused.

    Under Monte Carlo inference, in eval mode, each sample is kept on its own with probability k, as by `drop_path`, and
    f sees all of them: a row's output must not depend on the batch it is in. In compiled code a new n is a new shape,
    which compiles anew.

    Args:
        input: x, (B, ...): float16, bfloat16, float32 or float64.
        branch: f, from (n, ...) to the same shape: a module or function, with normalization and layer scale in it.
        p: probability of dropping a sample, in [0, 1), with k = 1 - p. Default: 0.5.
        training: whether anything is dropped.
        keep_prob: k, in place of `p`: a number.
        generator: the source of the subset's key; PyTorch's default generator of the device if None.

    Returns:
        A new tensor of the input's shape, and of the dtype of x + f(x).

    Raises:
        ValueError: a rate outside [0, 1], k = 0, an input without dimensions, or a branch that changes the shape.
        TypeError: a rate that is no number, both names of the rate, or neither; a branch that cannot be called, or
            that does not return a tensor.
        RuntimeError: an integer tensor.

    References:
        Oquab et al., DINOv2: learning robust visual features without supervision, 2023 (arXiv:2304.07193): efficient
        stochastic depth.

    Example:
        >>> import torch, torchdrop
        >>> seen = []
        >>> def branch(x):
        ...     seen.append(len(x))
        ...     return x
        >>> y = torchdrop.functional.efficient_stochastic_depth(torch.ones(10, 3), branch, 0.6)
        >>> seen, y[:, 0].sort().values.tolist()
        ([4], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.5, 3.5, 3.5, 3.5])
    """
    if isinstance(input, Proxy):
        return recorded(efficient_stochastic_depth, locals())
    rate = as_rate(p, keep_prob, check=_check_rate)
    if not callable(branch):
        raise TypeError(f"branch must be a module or function, got {type(branch).__name__}")
    if not sites.is_on(training):
        return input + _residual(branch, input)
    rows = row_shape(input, "efficient_stochastic_depth")
    if not training:  # Monte Carlo inference: a row's samples must not depend on the other rows
        kept = sites.keep_mask(input, rate.params_for(rows[:1]), rows[:1], generator)
        residual = _residual(branch, input)
        if kept is not None:
            residual = torch.where(kept.reshape(rows), residual, 0.0)
        return _weighted_sum(input, residual, 1.0 / realized(rate.keep_prob))
    rows = tuple(portable.numbered(rows))
    count = min(rows[0], max(1, round(rows[0] * rate.keep_prob)))  # type: ignore[arg-type]
    chosen = subset(sites.random_bits(input, rows[:1], generator), count)
    if count == rows[0]:
        return input + _residual(branch, input)
    warn_stays_on()
    part = input.index_select(0, chosen)
    total = _weighted_sum(part, _residual(branch, part), rows[0] / count)
    return input.to(total.dtype).index_put((chosen,), total)


class EfficientStochasticDepth(Rated):
    """Module of `efficient_stochastic_depth`, called with the input and the branch: ``x = self.drop(x, self.mlp)``.

    It replaces ``x = x + self.drop_path(self.mlp(x))``. The branch stays its owner's module, so nothing in the
    state_dict changes.

    Args:
        p: probability of dropping a sample, in [0, 1), with k = 1 - p. Default: 0.5.
        keep_prob: k, in place of `p`: a number.
        generator: the source of the subsets' keys; PyTorch's default generator of the device if None.

    Shape:
        Input and output: (B, ...). The branch: from (n, ...) to the same shape, n = round(B k) but at least 1.

    Raises:
        ValueError: a rate outside [0, 1], or k = 0.
        TypeError: a rate that is no number, or both names of the rate.

    Example:
        >>> import torch, torchdrop
        >>> mlp, drop = torch.nn.Linear(4, 4), torchdrop.EfficientStochasticDepth(0.25)
        >>> x = torch.randn(8, 4)
        >>> drop(x, mlp).shape, torch.equal(drop.eval()(x, mlp), x + mlp(x))
        (torch.Size([8, 4]), True)
    """

    def _check_rate(self, keep_prob: Probability) -> None:
        _check_rate(keep_prob)

    @leaf
    def forward(self, input: Tensor, branch: Branch) -> Tensor:
        return efficient_stochastic_depth(input, branch, self.rate, self.training, generator=self.generator)

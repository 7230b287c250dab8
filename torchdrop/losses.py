"""Losses of two forward passes with two masks: `r_drop`, `fraternal`, their modules, and `two_passes`.

With P1, P2 the distributions that the two passes predict and l1, l2 their logits,

    R-Drop      (CE(P1, y) + CE(P2, y)) / 2 + alpha (KL(P1 || P2) + KL(P2 || P1)) / 2
    fraternal   kappa |l1 - l2|^2

Both ask that a model predicts the same under any mask. The symmetric divergence is the sum over classes of the product
(P1 - P2) (log P1 - log P2), which is never negative, and 0 if and only if the two agree.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core.checks import check_integer, check_number
from .core.torch_state import is_compiling, transforms_active, tree_leaves, tree_map

_ALIKE = 1e-5
"""Two passes count as equal if no output differs by more than so much of the largest, or by two roundings of it."""


def r_drop(
    logits1: Tensor,
    logits2: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns the mean cross-entropy of two passes, plus alpha times the mean of the two divergences between them.

    ``(CE(P1, y) + CE(P2, y)) / 2 + alpha (KL(P1 || P2) + KL(P2 || P1)) / 2`` with P1 and P2 the softmax of the logits.
    It is symmetric in the two passes, both get a gradient, and without dropout (equal logits) the second part and its
    gradient are 0. The paper adds the two cross-entropies, which are averaged here, so its alpha is twice this one.
    Logarithms are taken in float32 for half types.

    Args:
        logits1: the first pass's, as torch.nn.functional.cross_entropy takes them: (C,), (N, C) or (N, C, d1, ...).
        logits2: the second pass's on the same data, of the same shape.
        target: class indices, or class probabilities of the logits' shape.
        alpha: the weight of the divergence, not negative. Default: 1.
        weight: (C,), the weights of the classes in the cross-entropy. The divergence is not weighted.
        ignore_index: positions with this target count neither in the cross-entropy nor in the divergence.
        reduction: "mean": over the positions that count (weighted by `weight` in the cross-entropy); "sum"; or "none":
            one value for each position, 0 where it does not count.
        label_smoothing: in [0, 1], the smoothing of the targets in the cross-entropy.
        mask: bools of the target's shape, True where a position counts, for padding that no index marks.

    Returns:
        A scalar, or the shape of the logits without C; float32 for half types.

    Raises:
        ValueError: logits of two shapes, a negative alpha, an unknown reduction, a mask that does not fit.
        TypeError: logits that are no floating-point tensors, another argument of a wrong type.

    References:
        Liang et al., "R-Drop: Regularized Dropout for Neural Networks", NeurIPS 2021 (arXiv:2106.14448), section 2.

    Example:
        >>> import torch
        >>> from torchdrop.losses import r_drop, two_passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3))
        >>> x, y = torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])
        >>> r_drop(*two_passes(model, x), y, alpha=0.5).backward()
        >>> logits = torch.randn(5, 3)
        >>> torch.allclose(r_drop(logits, logits, y), torch.nn.functional.cross_entropy(logits, y))
        True
    """
    _check_logits(logits1, logits2, classes=True)
    for name, value in (("target", target), ("weight", target if weight is None else weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    alpha = _coefficient("alpha", alpha)
    _check_reduction(reduction)
    classes = 0 if logits1.dim() == 1 else 1
    counts, target = _counted(target, mask, ignore_index)
    logs = [_in_float32(logits).log_softmax(classes) for logits in (logits1, logits2)]
    if target.is_floating_point():
        target = target.to(logs[0].dtype)
    weight = None if weight is None else weight.to(logs[0].dtype)
    entropies = [
        F.cross_entropy(
            log, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        for log in logs
    ]
    first, second = logs[0].exp(), logs[1].exp()
    excluded = (first == 0) & (second == 0)  # then 0 log 0 = 0, also if one of the logarithms is infinite
    divergence = ((first - second) * (logs[0] - logs[1]).masked_fill(excluded, 0.0)).sum(classes)
    return (entropies[0] + entropies[1]) / 2 + alpha / 2 * _reduced(divergence, counts, reduction)


def fraternal(
    logits1: Tensor,
    logits2: Tensor,
    kappa: float = 0.15,
    *,
    reduction: str = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    """Returns kappa times the mean squared difference of the logits of two passes: the penalty of fraternal dropout.

    ``kappa |l1 - l2|^2``, averaged over classes and positions. Over two independent masks its expectation is 2 kappa
    times the variance of a logit, so it penalizes the variance over masks. It is symmetric, both passes get a gradient,
    and without dropout it is 0. The published loss adds it to the mean of the two passes' own losses.
    Differences are taken in float32 for half types.

    Args:
        logits1: the first pass's, before the softmax: any shape.
        logits2: the second pass's on the same data, of the same shape.
        kappa: the weight, not negative. Default: 0.15.
        reduction: "mean": over all elements that count; "sum"; or "none": one value for each element.
        mask: bools that broadcast against the logits, True where an element counts: (N, T, 1) for padded (N, T, C).

    Returns:
        A scalar, or the shape of the logits; float32 for half types.

    Raises:
        ValueError: logits of two shapes, a negative kappa, an unknown reduction, a mask that does not broadcast.
        TypeError: logits that are no floating-point tensors, a kappa that is no number.

    References:
        Zolna et al., "Fraternal Dropout", ICLR 2018 (arXiv:1711.00066).

    Example:
        >>> import torch
        >>> from torchdrop.losses import fraternal
        >>> fraternal(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), kappa=0.5)
        tensor(1.)
    """
    _check_logits(logits1, logits2)
    kappa = _coefficient("kappa", kappa)
    _check_reduction(reduction)
    squared = (_in_float32(logits1) - _in_float32(logits2)).square()
    if mask is not None:
        _check_mask(mask)
        if mask.dim() > squared.dim() or any(
            have not in (1, full) for have, full in zip(mask.shape[::-1], squared.shape[::-1], strict=False)
        ):
            raise ValueError(
                f"mask must broadcast against the logits of shape {tuple(squared.shape)}, got {tuple(mask.shape)}"
            )
        mask = mask.expand_as(squared)
    return kappa * _reduced(squared, mask, reduction)


class RDropLoss(nn.Module):
    """Module of `r_drop`: ``(CE(P1, y) + CE(P2, y)) / 2 + alpha (KL(P1 || P2) + KL(P2 || P1)) / 2``.

    Args:
        alpha: the weight of the divergence, not negative. Default: 1.
        weight: (C,), the weights of the classes in the cross-entropy; a buffer, as in torch.nn.CrossEntropyLoss.
        ignore_index: the target of positions that do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].

    Shape:
        logits1, logits2, target and mask as `r_drop` has them.

    Raises:
        ValueError: a negative alpha, an unknown reduction.

    References:
        Liang et al., NeurIPS 2021 (arXiv:2106.14448).

    Example:
        >>> import torch
        >>> from torchdrop.losses import RDropLoss
        >>> loss = RDropLoss(alpha=2.0)
        >>> loss
        RDropLoss(alpha=2.0)
        >>> loss(torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self,
        alpha: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check_reduction(reduction)
        self.alpha: float = _coefficient("alpha", alpha)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, logits1: Tensor, logits2: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return r_drop(
            logits1, logits2, target, self.alpha, weight=self.weight, ignore_index=self.ignore_index,
            reduction=self.reduction, label_smoothing=self.label_smoothing, mask=mask,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class FraternalLoss(nn.Module):
    """Module of `fraternal`: ``kappa |l1 - l2|^2``, to be added to the mean of the two passes' own losses.

    Args:
        kappa: the weight, not negative. Default: 0.15.
        reduction: "mean", "sum" or "none".

    Shape:
        logits1, logits2 and mask as `fraternal` has them.

    Raises:
        ValueError: a negative kappa, an unknown reduction.

    References:
        Zolna et al., ICLR 2018 (arXiv:1711.00066).

    Example:
        >>> import torch
        >>> from torchdrop.losses import FraternalLoss
        >>> FraternalLoss(kappa=0.5)(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(1.)
    """

    def __init__(self, kappa: float = 0.15, reduction: str = "mean") -> None:
        super().__init__()
        _check_reduction(reduction)
        self.kappa: float = _coefficient("kappa", kappa)
        self.reduction = reduction

    def forward(self, logits1: Tensor, logits2: Tensor, mask: Tensor | None = None) -> Tensor:
        return fraternal(logits1, logits2, self.kappa, reduction=self.reduction, mask=mask)

    def extra_repr(self) -> str:
        return f"kappa={self.kappa}"


def two_passes(model: nn.Module, inputs: Any, *, batch_dim: int = 0, batched: bool = True) -> tuple[Any, Any]:
    """Returns a model's outputs for the same inputs under two masks, from one forward on two copies of the inputs.

    Every row is in the batch twice, and its two copies have masks of their own. The one forward has two consequences:
    normalization over the batch sees both copies, and a mask that the whole batch shares (of weights, of embeddings, of
    compact dropout) is the same in both passes. ``batched=False`` makes two forwards, one after the other.

    Args:
        model: the model, in train mode.
        inputs: a tensor, a tuple (positional arguments) or a mapping (named arguments), nested in any way. The first
            tensor's size in `batch_dim` is the number of rows; tensors with another size there are passed unchanged.
        batch_dim: the dimension that counts rows, of inputs and outputs.
        batched: whether one forward makes both passes.

    Returns:
        Two outputs of the model, each with the structure that one forward on the inputs has. An output without rows
        (for example a loss) is the same in both.

    Raises:
        ValueError: no tensor among the inputs, or one without that dimension; no output of one forward with the rows.
        TypeError: inputs of another kind, or a `batch_dim` that is no integer.

    Warns:
        UserWarning: both passes returned the same: without dropout, in eval mode, or as the batch shares its masks.

    Example:
        >>> import torch
        >>> from torchdrop.losses import two_passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.5))
        >>> first, second = two_passes(model, torch.randn(5, 8))
        >>> first.shape, torch.equal(first, second)
        (torch.Size([5, 64]), False)
    """
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    rows = _rows(inputs, batch_dim)
    if batched:
        both = _call(model, tree_map(lambda leaf: _twice(leaf, rows, batch_dim), inputs))
        if not any(_has(leaf, 2 * rows, batch_dim) for leaf in tree_leaves(both)):
            raise ValueError(
                f"model must give a tensor of {2 * rows} rows in dimension {batch_dim} for {rows} rows of the inputs "
                "put behind themselves, so that the passes can be told apart, got none: pass batched=False"
            )
        first, second = (tree_map(lambda leaf, n=n: _half(leaf, rows, batch_dim, n), both) for n in (0, 1))
    else:
        first, second = _call(model, inputs), _call(model, inputs)
    if not (is_compiling() or transforms_active()) and _are_equal(first, second):
        warnings.warn(
            "two_passes: both passes gave the same. Is the model in train mode, and has it dropout with a rate above "
            "0? Masks that the whole batch shares (of weights, embeddings, compact dropout) need batched=False",
            UserWarning,
            stacklevel=2,
        )
    return first, second


def _rows(inputs: Any, dim: int) -> int:
    if not isinstance(inputs, (Tensor, tuple, list, dict)):
        raise TypeError(f"inputs must be a tensor, a tuple or a mapping, got {type(inputs).__name__}")
    first = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    if first is None:
        raise ValueError("inputs must hold a tensor, got none")
    check_integer("batch_dim", dim)
    if not -first.dim() <= dim < first.dim():
        raise ValueError(f"batch_dim must be a dimension of the inputs, got {dim} for a tensor of {tuple(first.shape)}")
    return first.shape[dim]


def _has(leaf: Any, size: int, dim: int) -> bool:
    return isinstance(leaf, Tensor) and -leaf.dim() <= dim < leaf.dim() and leaf.shape[dim] == size


def _twice(leaf: Any, rows: int, dim: int) -> Any:
    return torch.cat([leaf, leaf], dim) if _has(leaf, rows, dim) else leaf


def _half(leaf: Any, rows: int, dim: int, number: int) -> Any:
    return leaf.narrow(dim, number * rows, rows) if _has(leaf, 2 * rows, dim) else leaf


def _call(model: nn.Module, inputs: Any) -> Any:
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _are_equal(first: Any, second: Any) -> bool:
    """Whether the first outputs that are numbers are equal up to rounding, which differs between rows of a product."""
    for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel() and a is not b:
            a, b = a.detach(), b.detach()
            return bool((a - b).abs().max() <= max(_ALIKE, 2 * torch.finfo(a.dtype).eps) * a.abs().max())
    return False


def _in_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_logits(logits1: Any, logits2: Any, classes: bool = False) -> None:
    for name, logits in (("logits1", logits1), ("logits2", logits2)):
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
        if logits.dim() == 0 and classes:
            raise ValueError(f"{name} must have classes, (C,), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    if logits1.shape != logits2.shape:
        raise ValueError(
            "logits1 and logits2 must have one shape, those of two passes on the same data, got "
            f"{tuple(logits1.shape)} and {tuple(logits2.shape)}"
        )


def _coefficient(name: str, value: Any) -> float:
    value = check_number(name, value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return value


def _check_reduction(reduction: Any) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction: it must be 'mean', 'sum' or 'none'")


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a tensor of bools, got {kind}")


def _counted(target: Tensor, mask: Tensor | None, ignore_index: int) -> tuple[Tensor | None, Tensor]:
    """Returns which positions count, as bools (None: all), and the target with `ignore_index` at the others."""
    if mask is None:
        return (None if target.is_floating_point() else target != ignore_index), target
    _check_mask(mask)
    if target.is_floating_point():
        raise ValueError("mask goes with class indices as target, got class probabilities: leave the positions out")
    if mask.shape != target.shape:
        raise ValueError(f"mask must have the target's shape {tuple(target.shape)}, got {tuple(mask.shape)}")
    indices = target.long() if target.dtype == torch.uint8 else target  # bytes have no negative index
    target = indices.masked_fill(~mask, ignore_index)
    return target != ignore_index, target


def _reduced(values: Tensor, counts: Tensor | None, reduction: str) -> Tensor:
    if counts is not None:
        values = torch.where(counts, values, torch.zeros_like(values))
    if reduction != "mean":
        return values.sum() if reduction == "sum" else values
    return values.mean() if counts is None else values.sum() / counts.sum()

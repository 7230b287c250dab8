"""The step that all split conformal predictions share: which score of the calibration set is the threshold.

If the n calibration rows and a new row are exchangeable, the new row's score is at most the k-th smallest of theirs,
``k = ceil((n + 1)(1 - alpha))``, with probability at least 1 - alpha, and at most ``1 - alpha + 1 / (n + 1)`` where no
two scores are equal. The probability is over the calibration set and the new row together.

References:
    Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005. Lei et al., "Distribution-Free Predictive
    Inference for Regression", JASA 113, 2018, theorem 2 (both bounds).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


def check_alpha(alpha: Any) -> float:
    """Returns alpha as a float.

    Raises:
        ValueError: it is not between 0 and 1.

    Example:
        >>> check_alpha(0.1)
        0.1
    """
    value = float(alpha)
    if not 0 < value < 1:
        raise ValueError(f"alpha must be between 0 and 1, both excluded, got {alpha}")
    return value


def least_rows(alpha: float) -> int:
    """Returns the smallest n with ``ceil((n + 1)(1 - alpha)) <= n``, the calibration rows that alpha needs.

    Example:
        >>> least_rows(0.1), least_rows(0.01)
        (9, 99)
    """
    share = _exact(alpha)
    return math.ceil((1 - share) / share)


def rank_of_threshold(n: int, alpha: float, what: str = "the calibration set") -> int:
    """Returns ``k = ceil((n + 1)(1 - alpha))``: the threshold is the k-th smallest score.

    alpha is taken as the decimal that is written: with floating-point numbers ``(n + 1)(1 - alpha)`` can come out above
    an integer, and k one too large.

    Args:
        n: the number of calibration rows.
        alpha: the probability of an error that is allowed.
        what: the name of the rows for the message.

    Raises:
        ValueError: k > n, so that no threshold exists.

    Example:
        >>> rank_of_threshold(99, 0.1)
        90
        >>> rank_of_threshold(8, 0.1)
        Traceback (most recent call last):
        ...
        ValueError: alpha=0.1 needs at least 9 rows in the calibration set, got 8: give more rows, or a larger alpha
    """
    k = math.ceil((n + 1) * (1 - _exact(alpha)))
    if k > n:
        raise ValueError(
            f"alpha={alpha} needs at least {least_rows(alpha)} rows in {what}, got {n}: give more rows, or a larger "
            "alpha"
        )
    return k


def coverage_bounds(n: int, alpha: float) -> tuple[float, float]:
    """Returns the least and the largest expected coverage: ``k / (n + 1)`` without equal scores, and 1 - alpha.

    Returns:
        ``1 - alpha``, which holds always, and ``k / (n + 1) <= 1 - alpha + 1 / (n + 1)``, the exact expectation where
        no two scores are equal.

    Example:
        >>> coverage_bounds(100, 0.1)
        (0.9, 0.900990099009901)
    """
    return 1 - alpha, rank_of_threshold(n, alpha) / (n + 1)


@dataclass(frozen=True, eq=False)
class Thresholds:
    """The threshold of each group of rows, or one for all.

    Args:
        values: the thresholds, of shape (groups, ...), or (1, ...) without groups.
        groups: the names of the groups, sorted integers of shape (groups,); None without groups.
        rows: the number of calibration rows of each group.
    """

    values: Tensor
    groups: Tensor | None
    rows: tuple[int, ...]

    def of(self, groups: Tensor | None, rows: int) -> Tensor:
        """Returns the threshold of each row, of shape (rows, ...), or (1, ...) without groups.

        Raises:
            ValueError: groups where there were none in the calibration set, or the reverse, or a group that was not in
                it.
        """
        if (groups is None) != (self.groups is None):
            had = "no groups" if self.groups is None else "groups"
            raise ValueError(f"groups must be given for both or neither: the calibration set had {had}")
        if groups is None or self.groups is None:
            return self.values
        groups = check_groups(groups, rows).to(self.groups.device)
        places = torch.searchsorted(self.groups, groups).clamp_max(len(self.groups) - 1)
        unknown = groups[self.groups[places] != groups]
        if len(unknown):
            raise ValueError(f"groups must be in the calibration set, which has no group {unknown[0].item()}")
        return self.values[places]


def thresholds(scores: Tensor, alpha: float, groups: Tensor | None = None) -> Thresholds:
    """Returns the thresholds of scores (N, ...), each place after the rows by itself.

    Args:
        scores: the scores of the calibration rows at their true targets.
        alpha: the probability of an error that is allowed.
        groups: integers (N,): each group gets its own threshold, and its own guarantee.

    Raises:
        ValueError: a score that is no number, or a group with too few rows.

    Example:
        >>> thresholds(torch.arange(99.0), alpha=0.1).values
        tensor([89.])
    """
    if scores.isnan().any():
        raise ValueError(f"scores of the calibration set must be numbers, got {int(scores.isnan().sum())} NaN")
    if groups is None:
        k = rank_of_threshold(len(scores), alpha)
        return Thresholds(scores.kthvalue(k, 0).values.unsqueeze(0), None, (len(scores),))
    groups = check_groups(groups, len(scores)).to(scores.device)
    names = groups.unique()
    found, rows = [], []
    for name in names:
        own = scores[groups == name]
        k = rank_of_threshold(len(own), alpha, f"group {name.item()} of the calibration set")
        found.append(own.kthvalue(k, 0).values)
        rows.append(len(own))
    return Thresholds(torch.stack(found), names, tuple(rows))


def check_groups(groups: Any, rows: int) -> Tensor:
    """Returns groups as integers.

    Raises:
        TypeError: they are no tensor.
        ValueError: they are no integers, or not one for each row.

    Example:
        >>> check_groups(torch.tensor([0, 1]), 2)
        tensor([0, 1])
    """
    if not isinstance(groups, Tensor):
        raise TypeError(f"groups must be a tensor with an integer for each row, got {type(groups).__name__}")
    if groups.is_floating_point() or groups.is_complex() or groups.shape != (rows,):
        raise ValueError(
            f"groups must be integers of shape ({rows},), one for each row, got {groups.dtype} of shape "
            f"{tuple(groups.shape)}"
        )
    return groups.long()


def _exact(alpha: float) -> Fraction:
    return Fraction(repr(float(alpha)))

"""Moments of values that come in chunks: counts, means and variances, updated in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """Returns the values in float64, or in float32 on a device that has no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def _unbiased(m2: Tensor, count: int) -> Tensor:
    """Returns the variance of so many values; NaN if there are fewer than two."""
    return m2 / (count - 1) if count > 1 else torch.full_like(m2, math.nan)


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of the values that were added, updated in one pass.

    Chunks are centered before they are squared and combined by the pairwise formula, in float64 if the device has it:
    the variance keeps its digits where E[x^2] - E[x]^2 loses all of them, and equal values give exactly 0. Adding
    writes into `mean` and `m2`, which are allocated by the first values.

    Args:
        count: the number of values along the first dimension.
        mean: their mean; NaN before there are any.
        m2: the sum of their squared deviations from the mean.

    References:
        Welford, Technometrics 4, 1962; Chan, Golub, LeVeque, The American Statistician 37, 1983.

    Example:
        >>> moments = Moments()
        >>> moments.add(torch.tensor([[1.0], [3.0]]))
        >>> moments.add(torch.tensor([[5.0]]))
        >>> moments.count, moments.mean.item(), moments.variance.item()
        (3, 3.0, 4.0)
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.tensor(math.nan, dtype=torch.float64))
    m2: Tensor = field(default_factory=lambda: torch.tensor(0.0, dtype=torch.float64))

    @property
    def variance(self) -> Tensor:
        """The unbiased variance ``m2 / (count - 1)``; NaN if there are fewer than two values."""
        return _unbiased(self.m2, self.count)

    def add(self, values: Tensor) -> None:
        """Adds values of shape (S, ...), S of them. An empty chunk changes nothing."""
        if len(values) == 0:
            return
        values = wide(values)
        if len(values) == 1:
            self._include(1, values[0], None)
            return
        first = values[0]
        centered = values - first
        shift = centered.mean(0)
        self._include(len(values), first + shift, centered.sub_(shift).square_().sum(0))

    def _include(self, count: int, mean: Tensor, m2: Tensor | None) -> None:
        """Combines these moments (m2 is 0 if None) with its own, in place."""
        if self.count == 0 and self.mean.shape != mean.shape:
            self.mean, self.m2 = mean.clone(), torch.zeros_like(mean) if m2 is None else m2
        elif self.count == 0:
            self.mean.copy_(mean)
            self.m2.zero_() if m2 is None else self.m2.copy_(m2)
        else:
            total = self.count + count
            delta = mean - self.mean
            self.mean.add_(delta, alpha=count / total)
            self.m2.addcmul_(delta, delta, value=self.count * count / total)
            if m2 is not None:
                self.m2.add_(m2)
        self.count += count

    def part(self, rows: slice, places: slice) -> Moments:
        """Returns the moments of some rows (first dimension) and places (last dimension), which share its memory."""
        return Moments(self.count, self.mean[rows, ..., places], self.m2[rows, ..., places])

    def to(self, device: torch.device | str | None) -> Moments:
        return Moments(self.count, self.mean.to(device), self.m2.to(device))

    def merged_with(self, other: Moments) -> Moments:
        """Returns the moments of the values of both, in memory of their own unless one of the two is empty."""
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        total = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean.add(delta, alpha=other.count / total)
        m2 = (self.m2 + other.m2).addcmul_(delta, delta, value=self.count * other.count / total)
        return Moments(total, mean, m2)

    @staticmethod
    def merged(several: Iterable[Moments]) -> Moments:
        """Returns the moments of all values that were added to several, combined in the order given."""
        total = Moments()
        for one in several:
            total = total.merged_with(one)
        return total


@dataclass
class Counts:
    """The moments of values that are true or false, kept as a count of those that are true.

    The mean is the share f of true values, and the sum of squared deviations is ``count f (1 - f)``, exactly 0 if all
    agree.

    Args:
        count: the number of values along the first dimension.
        yes: the number of them that are true, as int32.

    Example:
        >>> votes = Counts()
        >>> votes.add(torch.tensor([[True, False], [True, True]]))
        >>> votes.mean.tolist(), votes.variance.tolist()
        ([1.0, 0.5], [0.0, 0.5])
    """

    count: int = 0
    yes: Tensor = field(default_factory=lambda: torch.tensor(0, dtype=torch.int32))

    @property
    def mean(self) -> Tensor:
        return wide(self.yes) / self.count

    @property
    def m2(self) -> Tensor:
        share = self.mean
        return wide(self.yes) * (1 - share)

    @property
    def variance(self) -> Tensor:
        """The unbiased variance; NaN if there are fewer than two values."""
        return _unbiased(self.m2, self.count)

    def add(self, values: Tensor) -> None:
        """Adds boolean values of shape (S, ...), S of them. An empty chunk changes nothing."""
        if len(values) == 0:
            return
        yes = values[0] if len(values) == 1 else values.sum(0, dtype=torch.int32)
        if self.count == 0 and self.yes.shape != yes.shape:
            self.yes = yes.to(torch.int32, copy=True)
        else:
            self.yes.add_(yes)
        self.count += len(values)

    def part(self, rows: slice, places: slice) -> Counts:
        """Returns the counts of some rows (first dimension) and places (last dimension), which share its memory."""
        return Counts(self.count, self.yes[rows, ..., places])

    def to(self, device: torch.device | str | None) -> Counts:
        return Counts(self.count, self.yes.to(device))

    def merged_with(self, other: Counts) -> Counts:
        """Returns the counts of the values of both, in memory of their own."""
        return Counts(self.count + other.count, self.yes + other.yes)

"""Groups of samples, whose moments are kept apart: leaving out one at a time gives the Monte Carlo standard errors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .moments import Counts, Moments

Observed = Mapping[str, Any]
"""The moments of each observable, by name: `Moments` or `Counts`."""

Statistic = Callable[[Observed], Tensor]


@dataclass(frozen=True)
class Mean:
    """The statistic "mean of an observable". Its standard error needs no groups.

    Example:
        >>> moments = Moments()
        >>> moments.add(torch.tensor([[1.0], [3.0]]))
        >>> Mean("value")({"value": moments})
        tensor([2.], dtype=torch.float64)
    """

    observable: str

    def __call__(self, moments: Observed) -> Tensor:
        return moments[self.observable].mean


@dataclass(frozen=True)
class Derived:
    """A statistic that is no mean: any function of the moments of these observables.

    Example:
        >>> moments = Moments()
        >>> moments.add(torch.tensor([[1.0], [3.0]]))
        >>> Derived(lambda moments: moments["value"].variance, ("value",))({"value": moments})
        tensor([2.], dtype=torch.float64)
    """

    function: Statistic
    observables: tuple[str, ...]

    def __call__(self, moments: Observed) -> Tensor:
        return self.function(moments)


@dataclass
class Groups:
    """The moments of every observable, by groups of samples where standard errors need them.

    Args:
        rounds: the samples of a group belong together, and only groups are independent.
        sizes: the number of samples in each group that has any.
        moments: for each observable the moments of its groups, or of all of this process's samples under the number of
            its first group, if nothing needs them apart.
    """

    rounds: bool = False
    sizes: dict[int, int] = field(default_factory=dict)
    moments: dict[str, dict[int, Moments | Counts]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of samples."""
        return sum(self.sizes.values())

    def part(self, rows: slice, places: slice) -> Groups:
        """Returns the groups for some rows and places, which share their memory."""
        parts = {
            name: {group: one.part(rows, places) for group, one in several.items()}
            for name, several in self.moments.items()
        }
        return Groups(self.rounds, self.sizes, parts)

    def total(self) -> dict[str, Any]:
        """Returns the moments of every observable over all samples.

        Raises:
            ValueError: there are none.
        """
        if not self.sizes:
            raise ValueError("there are no samples yet")
        return {name: _merged(several[group] for group in sorted(several)) for name, several in self.moments.items()}

    def leave_one_out(self, names: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yields, for each group in turn, the moments over all samples but its own; needs two groups or more.

        Args:
            names: the observables, which must be kept by groups; all if None.
        """
        names, groups = list(self.moments if names is None else names), sorted(self.sizes)
        apart = [self.moments[name] for name in names]
        after = [[several[groups[-1]] for several in apart]]
        for group in reversed(groups[1:-1]):
            after.append(_joined([several[group] for several in apart], after[-1]))
        yield dict(zip(names, after.pop(), strict=True))
        before = [several[groups[0]] for several in apart]
        for group in groups[1:-1]:
            yield dict(zip(names, _joined(before, after.pop()), strict=True))
            before = _joined(before, [several[group] for several in apart])
        yield dict(zip(names, before, strict=True))

    def standard_errors(self, statistics: Mapping[str, Statistic]) -> dict[str, Tensor]:
        """Returns the Monte Carlo standard error of each statistic: its standard deviation over draws of the samples.

        For the `Mean` of an observable it is sd / sqrt(T). For any other statistic, and for a mean over rounds, it is
        the jackknife over the groups that hold samples: with theta_g the statistic without group g, m_g of n samples in
        it, h_g = n / m_g and d_g = (h_g - 1) (theta - theta_g),

            SE^2 = 1/G sum_g (d_g - dbar)^2 / (h_g - 1),    dbar = sum_g d_g / h_g,

        which for groups of equal size is (G - 1) / G sum_g (theta_g - mean theta_g)^2. For a mean, d_g is the group's
        mean less the total one, and E[SE^2] is the mean's variance. It is NaN if there are fewer than two groups (two
        samples for sd / sqrt(T)), and if a statistic needs more samples than are left. It does not include bias, and
        for the variation ratio, a maximum, it is only approximate if two classes are nearly tied.

        References:
            Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 11; for groups of unequal size Busing,
            Meijer, van der Leeden, "Delete-m Jackknife for Unequal m", Statistics and Computing 9, 1999.
        """
        total, groups = self.total(), sorted(self.sizes)
        inverse_shares = [self.count / self.sizes[group] for group in groups]
        whole = {name: one(total) for name, one in statistics.items() if self.rounds or not isinstance(one, Mean)}
        moves: dict[str, list[Tensor]] = {name: [] for name in whole}
        jackknifed = {name: one for name, one in statistics.items() if not isinstance(one, Mean)}
        if jackknifed and len(groups) > 1:
            for without, h in zip(self.leave_one_out(self._needed(jackknifed.values())), inverse_shares, strict=True):
                for name, statistic in jackknifed.items():
                    moves[name].append((h - 1) * (whole[name] - statistic(without)))
        errors = {}
        for name, statistic in statistics.items():
            if isinstance(statistic, Mean) and not self.rounds:
                errors[name] = (total[statistic.observable].variance / self.count).sqrt()
                continue
            if isinstance(statistic, Mean):
                means = self.moments[statistic.observable]
                moves[name] = [means[group].mean - whole[name] for group in groups]
            enough = len(groups) > 1
            errors[name] = _spread(moves[name], inverse_shares) if enough else torch.full_like(whole[name], math.nan)
        return errors

    def _needed(self, statistics: Iterable[Statistic]) -> list[str]:
        """Returns the observables of these statistics, in the order in which they are kept."""
        named: set[str] = set()
        for statistic in statistics:
            named |= set(statistic.observables if isinstance(statistic, Derived) else self.moments)
        return [name for name in self.moments if name in named]


def _merged(several: Iterable[Any]) -> Any:
    return functools.reduce(lambda one, other: one.merged_with(other), several)


def _joined(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    return [mine.merged_with(theirs) for mine, theirs in zip(one, other, strict=True)]


def _spread(moves: Sequence[Tensor], inverse_shares: Sequence[float]) -> Tensor:
    """Returns the jackknife's standard error from d_g and h_g: see `Groups.standard_errors`."""
    center = sum(move / h for move, h in zip(moves, inverse_shares, strict=True))
    squares = [(move - center).square_() / (h - 1) for move, h in zip(moves, inverse_shares, strict=True)]
    return torch.stack(squares).mean(0).sqrt_()

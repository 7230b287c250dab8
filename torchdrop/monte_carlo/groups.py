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

    def leave_one_out(self) -> Iterator[dict[str, Any]]:
        """Yields, for each group in turn, the moments over all samples but its own; needs two groups or more, and all
        observables by groups."""
        total = self.total()
        for group in sorted(self.sizes):
            yield {name: _without_each(total[name], [several[group]]) for name, several in self.moments.items()}

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
        total, errors = self.total(), dict[str, Tensor]()
        jackknifed = {name: one for name, one in statistics.items() if self.rounds or not isinstance(one, Mean)}
        for name, one in statistics.items():
            if isinstance(one, Mean) and not self.rounds:
                errors[name] = (total[one.observable].variance / self.count).sqrt()
        errors |= self._jackknifed(jackknifed, total)
        return {name: errors[name] for name in statistics}

    def _jackknifed(self, statistics: Mapping[str, Statistic], total: Observed) -> dict[str, Tensor]:
        whole = {name: one(total) for name, one in statistics.items()}
        if len(self.sizes) < 2:
            return {name: torch.full_like(value, math.nan) for name, value in whole.items()}
        moves: dict[str, list[Tensor]] = {name: [] for name in whole}
        inverse_shares: list[float] = []
        for size in sorted(set(self.sizes.values())):
            groups, h = [group for group in sorted(self.sizes) if self.sizes[group] == size], self.count / size
            inverse_shares += [h] * len(groups)
            without = {
                name: _without_each(total[name], [self.moments[name][group] for group in groups])
                for name in self._needed(statistics.values())
            }
            for name, statistic in statistics.items():
                value = whole[name].unsqueeze(-2)
                moves[name].append((h - 1) * (value - statistic(without).unflatten(-1, (len(groups), value.shape[-1]))))
        return {name: _spread(torch.cat(several, -2), inverse_shares) for name, several in moves.items()}

    def _needed(self, statistics: Iterable[Statistic]) -> list[str]:
        """Returns the observables of these statistics, in the order in which they are kept."""
        named: set[str] = set()
        for one in statistics:
            named |= {one.observable} if isinstance(one, Mean) else set(getattr(one, "observables", self.moments))
        return [name for name in self.moments if name in named]


def _merged(several: Iterable[Any]) -> Any:
    return functools.reduce(lambda one, other: one.merged_with(other), several)


def _without_each(total: Any, groups: Sequence[Any]) -> Any:
    """Returns the moments over all samples but those of one group, for each of some groups of one size: side by side in
    the last dimension, the places without the first, those without the second, ...

    With total moments (n, mean, M) and a group's (m, mean_g, M_g), d = mean_g - mean and r = n - m, they are

        mean - d m / r,    M - M_g - m d^2 n / r.

    What is lost to cancellation is small compared with the group's own share of M, and so with the standard error.
    """
    m = groups[0].count
    r = total.count - m
    if isinstance(total, Counts):
        return Counts(r, torch.cat([total.yes - one.yes for one in groups], -1))
    mean, m2 = total.mean.unsqueeze(-2), total.m2.unsqueeze(-2)
    move = torch.stack([one.mean for one in groups], -2).sub_(mean)
    rest = torch.stack([one.m2 for one in groups], -2).addcmul_(move, move, value=m * total.count / r)
    rest = (m2 - rest).clamp_(min=0.0)
    return Moments(r, (mean - move.mul_(m / r)).flatten(-2), rest.flatten(-2))


def _spread(moves: Tensor, inverse_shares: Sequence[float]) -> Tensor:
    """Returns the jackknife's standard error from d_g (..., groups, places) and h_g: see `Groups.standard_errors`."""
    alike = len(set(inverse_shares)) == 1
    h: Any = inverse_shares[0] if alike else moves.new_tensor(inverse_shares).unsqueeze(-1)
    return (moves - (moves / h).sum(-2, keepdim=True)).square_().div_(h - 1).mean(-2).sqrt_()

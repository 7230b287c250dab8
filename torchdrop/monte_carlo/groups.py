"""Groups of samples, whose moments are kept apart: leaving out one at a time gives the Monte Carlo standard errors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .stacks import Share, Stack

Observed = Mapping[str, Any]
"""The moments of each observable, by name: `Moments` or `Counts`."""

Statistic = Callable[[Observed], Tensor]

VALUE, ERROR = "value", "standard error"


@dataclass(frozen=True)
class Mean:
    """The statistic "mean of an observable". Its standard error needs no groups.

    Example:
        >>> from torchdrop.monte_carlo.moments import Moments
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
        >>> from torchdrop.monte_carlo.moments import Moments
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
        stacks: the moments of the observables that are kept by groups.
        whole: the moments of each other observable over all samples of a process, one process after another.
    """

    rounds: bool = False
    sizes: dict[int, int] = field(default_factory=dict)
    stacks: list[Stack] = field(default_factory=list)
    whole: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of samples."""
        return sum(self.sizes.values())

    def shares(self, members: Mapping[int, Sequence[int]]) -> list[Share]:
        """Returns the parts of stacks that samples go to. Groups that are new here, and get as many, make a stack.

        Args:
            members: the places in the chunk of each group's samples.
        """
        new = [group for group in members if group not in self.sizes]
        for size in sorted({len(members[group]) for group in new}):
            several = sorted(group for group in new if len(members[group]) == size)
            self.stacks.append(Stack(several, [0] * len(several)))
        return [share for stack in self.stacks for share in stack.shares(members)]

    def part(self, rows: slice, places: slice) -> Groups:
        """Returns the groups for some rows and places, which share their memory."""
        stacks = [one.part(rows, places) for one in self.stacks]
        whole = {name: [one.part(rows, places) for one in several] for name, several in self.whole.items()}
        return Groups(self.rounds, self.sizes, stacks, whole)

    def to(self, device: torch.device | str | None) -> Groups:
        whole = {name: [one.to(device) for one in several] for name, several in self.whole.items()}
        return Groups(self.rounds, dict(self.sizes), [one.to(device) for one in self.stacks], whole)

    @staticmethod
    def joined(several: Sequence[Groups]) -> Groups:
        """Returns the groups of several processes, each of them from one."""
        groups = Groups(several[0].rounds)
        for one in several:
            groups.sizes |= one.sizes
            groups.stacks += one.stacks
            for name, whole in one.whole.items():
                groups.whole.setdefault(name, []).extend(whole)
        return groups

    def total(self) -> dict[str, Any]:
        """Returns the moments of every observable over all samples.

        Raises:
            ValueError: there are none.
        """
        if not self.sizes:
            raise ValueError("there are no samples yet")
        total = {
            name: functools.reduce(lambda one, other: one.merged_with(other), several)
            for name, several in self.whole.items()
        }
        if self.stacks:
            stack = Stack.of_all(self.stacks)
            total |= {name: one.total(stack.counts) for name, one in stack.moments.items()}
        return total

    def results(
        self, statistics: Mapping[str, Statistic], chosen: Mapping[str, Statistic]
    ) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Yields statistics under (name, `VALUE`), and the standard errors of those that are chosen under (name,
        `ERROR`)."""
        total = self.total()
        for name, statistic in statistics.items():
            yield (name, VALUE), statistic(total)
        for name, error in self.standard_errors(chosen, total).items():
            yield (name, ERROR), error

    def leave_one_out(self) -> Iterator[dict[str, Any]]:
        """Yields, for each group in turn, the moments over all samples but its own; needs two groups or more, and all
        observables by groups."""
        total, stack = self.total(), Stack.of_all(self.stacks)
        for place, size in enumerate(stack.counts):
            group = slice(place, place + 1)
            yield {name: one.of_groups(group).left(total[name], size) for name, one in stack.moments.items()}

    def standard_errors(self, statistics: Mapping[str, Statistic], total: Observed | None = None) -> dict[str, Tensor]:
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
        total, errors = self.total() if total is None else total, dict[str, Tensor]()
        for name, one in statistics.items():
            if isinstance(one, Mean) and not self.rounds:
                errors[name] = (total[one.observable].variance / self.count).sqrt()
        errors |= self._jackknifed({name: one for name, one in statistics.items() if name not in errors}, total)
        return {name: errors[name] for name in statistics}

    def _jackknifed(self, statistics: Mapping[str, Statistic], total: Observed) -> dict[str, Tensor]:
        whole = {name: one(total) for name, one in statistics.items()}
        if len(self.sizes) < 2 or not whole:
            return {name: torch.full_like(value, math.nan) for name, value in whole.items()}
        moves: list[Tensor] = []
        inverse_shares: list[float] = []
        stack = Stack.of_all(self.stacks)
        needed = self._needed(statistics.values(), stack)
        for size, groups in stack.alike():
            h, number = self.count / size, groups.stop - groups.start
            inverse_shares += [h] * number
            left = {name: stack.moments[name].of_groups(groups).left(total[name], size) for name in needed}
            moved = (value.flatten() - statistics[name](left).reshape(number, -1) for name, value in whole.items())
            moves.append(torch.cat(list(moved), 1).mul_(h - 1))
        errors = _spread(moves[0] if len(moves) == 1 else torch.cat(moves), inverse_shares)
        several = errors.split([value.numel() for value in whole.values()])
        return {name: one.view_as(value) for one, (name, value) in zip(several, whole.items(), strict=True)}

    @staticmethod
    def _needed(statistics: Iterable[Statistic], stack: Stack) -> list[str]:
        """Returns the observables of these statistics, in the order in which they are kept."""
        named: set[str] = set()
        for one in statistics:
            named |= {one.observable} if isinstance(one, Mean) else set(getattr(one, "observables", stack.moments))
        return [name for name in stack.moments if name in named]


def _spread(moves: Tensor, inverse_shares: Sequence[float]) -> Tensor:
    """Returns the jackknife's standard error from d_g (G, ...) and h_g: see `Groups.standard_errors`."""
    h: Any = inverse_shares[0] if len(set(inverse_shares)) == 1 else moves.new_tensor(inverse_shares).unsqueeze(-1)
    return (moves - (moves / h).sum(0)).square_().div_(h - 1).mean(0).sqrt_()

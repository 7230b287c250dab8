"""Stacks: the moments of several groups of samples side by side in one tensor, so that one step is taken for all.

A group's numbers must not depend on the groups that happen to lie beside it, because processes that hold other groups
are to find the same bits. So sums over samples and over groups are made of additions of whole tensors, in an order that
follows from their number alone: torch.sum adds the columns that fill a vector in another order than the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .moments import Counts, Moments, wide


def added(values: Tensor) -> Tensor:
    """Returns the sum over the first dimension, one after another, in memory of its own.

    Example:
        >>> added(torch.tensor([[1.0], [2.0], [3.0]]))
        tensor([6.])
    """
    first, *others = values.unbind()
    if not others:
        return first.clone()
    total = first + others[0]
    for one in others[1:]:
        total.add_(one)
    return total


@dataclass
class StackedMoments:
    """Means and sums of squared deviations of several groups, of shape (G, rows, ..., places). See `Moments`."""

    mean: Tensor
    m2: Tensor

    def add(self, new: StackedMoments, size: int, count: int) -> None:
        """Combines these moments of `count` samples of each group with those of `size` others, in place."""
        if count == 0:
            self.mean.copy_(new.mean)
            self.m2.copy_(new.m2)
            return
        total = count + size
        delta = new.mean - self.mean
        self.mean.add_(delta * (size / total))
        self.m2.add_(delta.square_().mul_(count * size / total)).add_(new.m2)

    def of_groups(self, groups: slice) -> StackedMoments:
        return StackedMoments(self.mean[groups], self.m2[groups])

    def part(self, rows: slice, places: slice) -> StackedMoments:
        return StackedMoments(self.mean[:, rows, ..., places], self.m2[:, rows, ..., places])

    def to(self, device: torch.device | str | None) -> StackedMoments:
        return StackedMoments(self.mean.to(device), self.m2.to(device))

    @staticmethod
    def picked(several: Sequence[StackedMoments], order: Sequence[int]) -> StackedMoments:
        """Returns one after another the groups with these places among those of several."""
        mean, m2 = ([group for one in several for group in getattr(one, name)] for name in ("mean", "m2"))
        return StackedMoments(
            torch.stack([mean[place] for place in order]), torch.stack([m2[place] for place in order])
        )

    def total(self, counts: Sequence[int]) -> Moments:
        """Returns the moments of the samples of all groups, so many in each."""
        first, count = self.mean[0], sum(counts)
        moved = self.mean - first
        weights = self._weights(counts)
        shift = added(moved * weights).div_(count)
        m2 = added(moved.sub_(shift).square_().mul_(weights).add_(self.m2))
        return Moments(count, first + shift, m2)

    def _weights(self, counts: Sequence[int]) -> Any:
        if len(set(counts)) == 1:
            return float(counts[0])
        return self.mean.new_tensor(counts).reshape(-1, *[1] * (self.mean.dim() - 1))

    def left(self, total: Moments, size: int) -> Moments:
        """Returns the moments of all samples but those of one group, for each group in turn: (G rows, ..., places).

        With total moments (n, mean, M) and a group's (m, mean_g, M_g), d = mean_g - mean and r = n - m, they are

            mean - d m / r,    M - M_g - m d^2 n / r.

        What is lost to cancellation is small compared with the group's own share of M, and so with the standard error.
        """
        left = total.count - size
        move = self.mean - total.mean
        m2 = (self.m2 + move.square().mul_(size * total.count / left)).neg_().add_(total.m2).clamp_(min=0.0)
        return Moments(left, (total.mean - move.mul_(size / left)).flatten(0, 1), m2.flatten(0, 1))


@dataclass
class StackedCounts:
    """The numbers of true values of several groups, as int32 of shape (G, rows, ..., places). See `Counts`."""

    yes: Tensor

    def add(self, new: StackedCounts, size: int, count: int) -> None:
        """Adds the counts of others, in place."""
        self.yes.add_(new.yes) if count else self.yes.copy_(new.yes)

    def of_groups(self, groups: slice) -> StackedCounts:
        return StackedCounts(self.yes[groups])

    def part(self, rows: slice, places: slice) -> StackedCounts:
        return StackedCounts(self.yes[:, rows, ..., places])

    def to(self, device: torch.device | str | None) -> StackedCounts:
        return StackedCounts(self.yes.to(device))

    @staticmethod
    def picked(several: Sequence[StackedCounts], order: Sequence[int]) -> StackedCounts:
        """Returns one after another the groups with these places among those of several."""
        groups = [group for one in several for group in one.yes]
        return StackedCounts(torch.stack([groups[place] for place in order]))

    def total(self, counts: Sequence[int]) -> Counts:
        """Returns the counts over all groups, with so many samples in each."""
        return Counts(sum(counts), self.yes.sum(0, dtype=torch.int32))

    def left(self, total: Counts, size: int) -> Counts:
        """Returns the counts over all samples but those of one group, for each group in turn: (G rows, ..., places)."""
        return Counts(total.count - size, (total.yes - self.yes).flatten(0, 1))


Stacked = StackedMoments | StackedCounts


def stacked(values: Tensor) -> Stacked:
    """Returns the moments, or counts of booleans, of values (S, G, ...): S samples of each group."""
    if values.dtype == torch.bool:
        return StackedCounts(values.sum(0, dtype=torch.int32))
    values = wide(values)
    first, size = values[0], len(values)
    if size == 1:
        return StackedMoments(first.clone(), torch.zeros_like(first))
    centered = values[1:] - first
    shift = added(centered).div_(size)
    m2 = added(centered.sub_(shift).square_())
    return StackedMoments(first + shift, m2.add_(shift.square_()))


@dataclass
class Stack:
    """Several groups of samples, and the moments of their observables.

    Args:
        groups: the groups' numbers.
        counts: the number of samples of each.
        moments: the moments of each observable.
    """

    groups: list[int]
    counts: list[int]
    moments: dict[str, Any] = field(default_factory=dict)

    def part(self, rows: slice, places: slice) -> Stack:
        """Returns the stack for some rows and places, which shares its memory."""
        return Stack(self.groups, self.counts, {name: one.part(rows, places) for name, one in self.moments.items()})

    def to(self, device: torch.device | str | None) -> Stack:
        return Stack(self.groups, list(self.counts), {name: one.to(device) for name, one in self.moments.items()})

    def shares(self, members: Mapping[int, Sequence[int]]) -> Iterator[Share]:
        """Yields the parts of this stack that samples go to: all of it at once if each group gets as many."""
        present = [(place, group) for place, group in enumerate(self.groups) if group in members]
        sizes = {len(members[group]) for _, group in present}
        if len(present) == len(self.groups) and len(sizes) == 1 and len(set(self.counts)) == 1:
            several = zip(*(members[group] for group in self.groups), strict=True)
            yield Share(self, slice(0, len(self.groups)), [place for places in several for place in places], *sizes)
            return
        for place, group in present:
            yield Share(self, slice(place, place + 1), members[group], len(members[group]))

    @staticmethod
    def of_all(stacks: Sequence[Stack]) -> Stack:
        """Returns all groups of several stacks as one, in the order of their numbers. It shares memory if it can."""
        groups, counts = ([number for one in stacks for number in getattr(one, name)] for name in ("groups", "counts"))
        order = sorted(range(len(groups)), key=groups.__getitem__)
        if len(stacks) == 1 and order == list(range(len(groups))):
            return stacks[0]
        moments = {
            name: type(one).picked([stack.moments[name] for stack in stacks], order)
            for name, one in stacks[0].moments.items()
        }
        return Stack([groups[place] for place in order], [counts[place] for place in order], moments)

    def alike(self) -> Iterator[tuple[int, slice]]:
        """Yields the numbers of samples, and neighboring groups that have so many."""
        start = 0
        for end in range(1, len(self.counts) + 1):
            if end == len(self.counts) or self.counts[end] != self.counts[start]:
                yield self.counts[start], slice(start, end)
                start = end


@dataclass
class Share:
    """The samples of a chunk that go to some groups of a stack.

    Args:
        stack: the stack.
        groups: its groups.
        places: the places of the samples in the chunk: the first sample of each group, then the second of each, ...
        size: the number of samples of each group.
    """

    stack: Stack
    groups: slice
    places: Sequence[int]
    size: int

    def add(self, name: str, values: Tensor, rows: slice, places: slice) -> None:
        """Adds the samples' values (S, rows, ..., places) of one observable to its moments at these rows and places."""
        chosen = _chosen(values, self.places).unflatten(0, (self.size, -1))
        if name not in self.stack.moments:  # there is room where the values are not all of their rows and places
            self.stack.moments[name] = stacked(chosen)
            return
        target = self.stack.moments[name].of_groups(self.groups).part(rows, places)
        target.add(stacked(chosen), self.size, self.stack.counts[self.groups.start])

    def close(self) -> None:
        """Counts the samples, once all of their values have been added."""
        for place in range(self.groups.start, self.groups.stop):
            self.stack.counts[place] += self.size


def _chosen(values: Tensor, chosen: Sequence[int]) -> Tensor:
    """Returns the values at these places of the first dimension, without a copy if they are equally far apart."""
    step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
    if step > 0 and list(chosen) == list(range(chosen[0], chosen[-1] + 1, step)):
        return values[chosen[0] : chosen[-1] + 1 : step]
    return values.index_select(0, torch.tensor(chosen, device=values.device))

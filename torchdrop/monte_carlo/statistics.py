"""Statistics over Monte Carlo samples in one pass, in memory that does not grow with their number.

A task (see `tasks`) turns raw outputs of a model into observables, a `Collector` keeps the `Moments` of each, and
statistics are functions of these moments. Samples fall into groups whose moments are kept apart, so that leaving out
one group at a time gives the Monte Carlo standard error of any statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]
"""The output of a model: one tensor, or a pair (mean, log_variance)."""


def wide(values: Tensor) -> Tensor:
    """Returns the values in float64, or in float32 on a device that has no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of the values that were added, updated in one pass.

    Chunks are centered before they are squared and combined by the pairwise formula, in float64 if the device has it:
    the variance keeps its digits where E[x^2] - E[x]^2 loses all of them, and equal values give exactly 0.

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
        return self.m2 / (self.count - 1) if self.count > 1 else torch.full_like(self.mean, math.nan)

    def add(self, values: Tensor) -> None:
        """Adds values of shape (S, ...), S of them. An empty chunk changes nothing."""
        if len(values) == 0:
            return
        values = wide(values)
        first = values[0].clone()
        if len(values) == 1:
            self._combine(1, first, torch.zeros_like(first))
            return
        centered = values - first
        shift = centered.mean(0)
        self._combine(len(values), first + shift, (centered - shift).square_().sum(0))

    @staticmethod
    def merged(several: Iterable[Moments]) -> Moments:
        """Returns the moments of all values that were added to several, combined in the order given."""
        total = Moments()
        for one in several:
            total._combine(one.count, one.mean, one.m2)
        return total

    def _combine(self, count: int, mean: Tensor, m2: Tensor) -> None:
        if count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.m2 = count, mean, m2
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.count = total


Statistic = Callable[[Mapping[str, Moments]], Tensor]


@dataclass(frozen=True)
class Mean:
    """The statistic "mean of an observable". It is a class because its standard error needs no jackknife.

    Example:
        >>> moments = Moments()
        >>> moments.add(torch.tensor([[1.0], [3.0]]))
        >>> Mean("value")({"value": moments})
        tensor([2.], dtype=torch.float64)
    """

    observable: str

    def __call__(self, moments: Mapping[str, Moments]) -> Tensor:
        return moments[self.observable].mean


class Task(Protocol):
    """The observables of each sample, and the statistics that are reported. See `tasks`."""

    def settled(self, outputs: Outputs) -> Task:
        """Returns the task with all open questions decided by the first chunk of outputs."""

    def observe(self, outputs: Outputs) -> dict[str, Tensor]:
        """Returns observables of shape (S, B, ...) from raw outputs of shape (S, B, ...): S samples of B rows."""

    def statistics(self) -> dict[str, Statistic]:
        """Returns functions of the observables' moments, by name; "mean" is the first."""


def raw(outputs: Any) -> Outputs:
    """Returns outputs (S, B, ...) of a model, detached; a tuple or list of one tensor counts as the tensor.

    Raises:
        TypeError: something that is no tensor.
        ValueError: a tensor that has no dimension for the rows, or is not floating-point.
    """
    parts = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"outputs must be tensors, got {type(part).__name__}: pick them with select_output=")
        if part.dim() < 2:
            raise ValueError("outputs must have a first dimension for the rows of the data, got a number for each pass")
        if not part.is_floating_point():
            raise ValueError(
                f"outputs must be floating-point, got {part.dtype}: pick scores or floats with select_output="
            )
    return parts[0].detach() if len(parts) == 1 else tuple(part.detach() for part in parts)


class Collector:
    """Collects samples of one batch of rows, and keeps the moments that statistics and their standard errors need.

    It needs two wide numbers (16 bytes) for each group and each element of each observable, for any number of samples,
    unless samples are kept. A group's moments depend only on the order and chunks of its own samples, and groups are
    merged in their order: processes that hold whole groups, each added as a single process would have, merge to the
    same bits.

    Args:
        task: the task that observes. With the first chunk, `task` becomes the settled one; give that one to the
            collectors of further batches, so that no batch decides otherwise.
        groups: the number of groups. More make standard errors steadier, and cost memory.
        group_of: the group, in [0, groups), of a sample; its index modulo `groups` if None.
        rounds: the samples of a group belong together (Latin hypercube rounds) and only groups are independent. Then
            sd / sqrt(T) would overstate the mean's error, and it is taken from the spread between groups.
        keep_samples: whether every sample's observables are kept.

    Raises:
        ValueError: fewer than one group.

    Example:
        >>> from torchdrop.monte_carlo.tasks import Plain
        >>> collector = Collector(Plain(), groups=2)
        >>> collector.add(torch.tensor([[[1.0]], [[2.0]], [[3.0]], [[6.0]]]), range(4))
        >>> collector.total()["value"].mean.item(), collector.count, collector.identical
        (3.0, 4, False)
        >>> collector.standard_error(Mean("value")).item() == math.sqrt((14 / 3) / 4)
        True
    """

    def __init__(
        self,
        task: Task,
        groups: int = 10,
        *,
        group_of: Callable[[int], int] | None = None,
        rounds: bool = False,
        keep_samples: bool = False,
    ) -> None:
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.task: Task = task
        self.groups = groups
        self.rounds = rounds
        self.keep_samples = keep_samples
        self._group_of = group_of or (lambda sample: sample % groups)
        self._moments: dict[int, dict[str, Moments]] = {}
        self._kept: list[tuple[list[int], dict[str, Tensor]]] = []
        self._first: tuple[Tensor, ...] | None = None
        self._identical = True

    @property
    def count(self) -> int:
        """The number of samples."""
        return sum(self._size(group) for group in self._moments)

    @property
    def identical(self) -> bool:
        """Whether there are two samples or more and all raw outputs are equal."""
        return self._identical and self.count > 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results: that of the first chunk's outputs, or float32 for half types."""
        if self._first is None:
            raise ValueError("there are no samples yet")
        return torch.promote_types(self._first[0].dtype, torch.float32)

    def add(self, outputs: Outputs, samples: Sequence[int]) -> None:
        """Adds the outputs (S, B, ...), or a pair of such, of the S samples with these indices.

        Raises:
            ValueError: not S outputs, another shape than before, a group out of range, outputs that the task cannot
                take, or one that is not finite. Nothing is added then.
        """
        outputs = raw(outputs)
        parts = (outputs,) if isinstance(outputs, Tensor) else outputs
        if any(len(part) != len(samples) for part in parts):
            raise ValueError(f"outputs must hold {len(samples)} samples, got {[len(part) for part in parts]}")
        if len(samples) == 0:
            return
        first = self._first or tuple(part[0].clone() for part in parts)
        shapes, expected = [tuple(part.shape[1:]) for part in parts], [tuple(part.shape) for part in first]
        if shapes != expected:
            raise ValueError(f"outputs change their shape between samples: {shapes}, expected {expected}")
        places: dict[int, list[int]] = {}
        for place, sample in enumerate(samples):
            group = self._group_of(sample)
            if not 0 <= group < self.groups:
                raise ValueError(f"group_of must give a group in [0, {self.groups}), got {group} for sample {sample}")
            places.setdefault(group, []).append(place)
        _refuse([part.isnan() for part in parts], samples)
        task = self.task.settled(outputs)
        observed = task.observe(outputs)
        _refuse([~one.isfinite() for one in observed.values()], samples)

        self.task, self._first = task, first
        self._identical = self._identical and all(bool((p == f).all()) for p, f in zip(parts, first, strict=True))
        for group, chosen in places.items():
            moments = self._moments.setdefault(group, {name: Moments() for name in observed})
            index = torch.tensor(chosen, device=parts[0].device)
            for name, one in observed.items():
                moments[name].add(one.index_select(0, index))
        if self.keep_samples:
            self._kept.append((list(samples), {name: one.to(self.dtype, copy=True) for name, one in observed.items()}))

    def total(self) -> dict[str, Moments]:
        """Returns the moments of every observable over all samples."""
        return self._merged(sorted(self._moments))

    def samples(self, observable: str) -> Tensor | None:
        """Returns all samples (T, B, ...) of an observable in the order of their indices; None if they are not kept."""
        if not self._kept:
            return None
        order = torch.tensor([sample for samples, _ in self._kept for sample in samples]).argsort(stable=True)
        joined = torch.cat([kept[observable] for _, kept in self._kept])
        return joined[order.to(joined.device)]

    def standard_error(self, statistic: Statistic) -> Tensor:
        """Returns the Monte Carlo standard error of one statistic. See `standard_errors`."""
        return self.standard_errors({"it": statistic})["it"]

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
        total, groups = self.total(), sorted(self._moments)
        inverse_shares = [self.count / self._size(group) for group in groups]
        whole = {name: statistic(total) for name, statistic in statistics.items()}
        moves: dict[str, list[Tensor]] = {name: [] for name in statistics}
        jackknifed = {name: one for name, one in statistics.items() if not isinstance(one, Mean)}
        if jackknifed and len(groups) > 1:
            for without, h in zip(self.leave_one_out(), inverse_shares, strict=True):
                for name, statistic in jackknifed.items():
                    moves[name].append((h - 1) * (whole[name] - statistic(without)))
        errors = {}
        for name, statistic in statistics.items():
            if isinstance(statistic, Mean) and not self.rounds:
                errors[name] = (total[statistic.observable].variance / self.count).sqrt()
                continue
            if isinstance(statistic, Mean):
                moves[name] = [statistic(self._moments[group]) - whole[name] for group in groups]
            enough = len(groups) > 1
            errors[name] = _spread(moves[name], inverse_shares) if enough else torch.full_like(whole[name], math.nan)
        return errors

    def state(self) -> dict[str, Any]:
        """Returns all collected moments and samples, on the CPU, for processes to pickle and exchange. See `load`."""
        first = None if self._first is None else tuple(part.cpu() for part in self._first)
        groups = {
            group: {name: Moments(one.count, one.mean.cpu(), one.m2.cpu()) for name, one in moments.items()}
            for group, moments in self._moments.items()
        }
        kept = [(samples, {name: one.cpu() for name, one in kept.items()}) for samples, kept in self._kept]
        return {"task": self.task, "first": first, "identical": self._identical, "groups": groups, "kept": kept}

    def load(self, states: Iterable[Mapping[str, Any]], device: torch.device | str | None = None) -> None:
        """Replaces the collected moments and samples by the union of several processes' states, each group from one.

        Raises:
            ValueError: a group in two states, or states of other tasks or of outputs of other shapes.
        """
        filled = [state for state in states if state["first"] is not None]
        held = [group for state in filled for group in state["groups"]]
        if len(held) > len(set(held)):
            raise ValueError(f"states must hold different groups, got {held}")
        tasks = {state["task"] for state in filled}
        shapes = {tuple(tuple(part.shape) for part in state["first"]) for state in filled}
        if len(tasks) > 1 or len(shapes) > 1:
            raise ValueError(f"states must agree in task and shape, got {tasks} and {shapes}")
        if not filled:
            return
        firsts = [state["first"] for state in filled]
        self.task = filled[0]["task"]
        self._first = tuple(part.to(device) for part in firsts[0])
        self._identical = all(state["identical"] for state in filled) and all(
            torch.equal(mine, theirs) for first in firsts for mine, theirs in zip(firsts[0], first, strict=True)
        )
        self._moments = {
            group: {name: Moments(one.count, one.mean.to(device), one.m2.to(device)) for name, one in moments.items()}
            for state in filled
            for group, moments in state["groups"].items()
        }
        self._kept = [
            (samples, {name: one.to(device) for name, one in kept.items()})
            for state in filled
            for samples, kept in state["kept"]
        ]

    def leave_one_out(self) -> Iterator[dict[str, Moments]]:
        """Yields, for each group in turn, the moments over all samples but its own; needs two groups or more."""
        groups = sorted(self._moments)
        after = [self._merged(groups[-1:])]
        for group in reversed(groups[1:-1]):
            after.append(_joined(self._moments[group], after[-1]))
        yield after.pop()
        before = self._moments[groups[0]]
        for group in groups[1:-1]:
            yield _joined(before, after.pop())
            before = _joined(before, self._moments[group])
        yield before

    def _size(self, group: int) -> int:
        return next(iter(self._moments[group].values())).count

    def _merged(self, groups: Sequence[int]) -> dict[str, Moments]:
        if not groups:
            raise ValueError("there are no samples yet")
        several = [self._moments[group] for group in groups]
        return {name: Moments.merged(moments[name] for moments in several) for name in several[0]}


def _joined(one: Mapping[str, Moments], other: Mapping[str, Moments]) -> dict[str, Moments]:
    return {name: Moments.merged((moments, other[name])) for name, moments in one.items()}


def _spread(moves: Sequence[Tensor], inverse_shares: Sequence[float]) -> Tensor:
    """Returns the jackknife's standard error from d_g and h_g: see `Collector.standard_errors`."""
    center = sum(move / h for move, h in zip(moves, inverse_shares, strict=True))
    squares = [(move - center).square() / (h - 1) for move, h in zip(moves, inverse_shares, strict=True)]
    return torch.stack(squares).mean(0).sqrt()


def _refuse(bad: Sequence[Tensor], samples: Sequence[int]) -> None:
    """Raises if any is True, naming the first sample and row (the first two dimensions) at fault."""
    if not torch.stack([one.any() for one in bad]).any():
        return
    where = torch.stack([one.flatten(2).any(2) if one.dim() > 2 else one for one in bad]).any(0)
    place, row = where.nonzero()[0].tolist()
    raise ValueError(
        f"sample {samples[place]} is not finite in row {row} of its batch ({int(where.sum())} such in this chunk), "
        "so no statistic would be: run that sample within torchdrop.mc_dropout to see which layer it comes from"
    )

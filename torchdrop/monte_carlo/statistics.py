"""Statistics over Monte Carlo samples in one pass, in memory that does not grow with their number.

A task (see `tasks`) turns raw outputs of a model into observables, a `Collector` keeps the moments of each (see
`moments`), and statistics are functions of these moments. Where a standard error needs them, samples fall into groups
whose moments are kept apart (see `groups`). Outputs are taken a block of rows and places at a time, so that little
memory is needed besides the moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .blocks import Outputs, OutputShape, cut, flattened, joined, raw, refuse, refuse_nan
from .groups import ERROR, VALUE, Groups, Mean, Statistic
from .moments import Counts, Moments, wide
from .plain import Task
from .stacks import StackedCounts, StackedMoments
from .standard_errors import Errors, error_names, needs_groups

Name = TypeVar("Name")

Results = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]
"""Statistics by name, their standard errors, and whether `Collector.take` may be given them."""


class Collector:
    """Collects samples of one batch of rows, and keeps the moments that statistics and their standard errors need.

    It needs two wide numbers (16 bytes) for each element of each observable and for each group if groups are needed,
    and 4 bytes for observables that are true or false, for any number of samples, unless samples are kept. A group's
    moments depend only on the order and chunks of its own samples, and groups are merged in their order: processes that
    hold whole groups, each added as a single process would have, merge to the same bits.

    Args:
        task: the task that observes. With the first chunk, `task` becomes the settled one; give that one to the
            collectors of further batches, so that no batch decides otherwise.
        groups: the number of groups. More make standard errors steadier, and cost memory.
        group_of: the group, in [0, groups), of a sample; its index modulo `groups` if None.
        rounds: the samples of a group belong together (Latin hypercube rounds) and only groups are independent. Then
            sd / sqrt(T) would overstate the mean's error, and it is taken from the spread between groups.
        keep_samples: whether every sample is kept.
        errors: the statistics that get standard errors: see `error_names`. Only what they need is kept by groups.
        valid: whether a place is reported, of shape (B, ...), a beginning of the places' dimensions. Elsewhere outputs
            may be anything, and `results` and `samples` are NaN.

    Raises:
        ValueError: fewer than one group.

    Example:
        >>> from torchdrop.monte_carlo.plain import Plain
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
        errors: Errors = True,
        valid: Tensor | None = None,
    ) -> None:
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.task: Task = task
        self.groups = groups
        self.rounds = rounds
        self.keep_samples = keep_samples
        self._errors = errors
        self.valid = valid
        self._group_of = group_of or (lambda sample: sample % groups)
        self._moments = Groups(rounds)
        self._kept: list[tuple[list[int], dict[str, Tensor]]] = []
        self._shape: OutputShape | None = None
        self._first: tuple[Tensor, ...] | None = None
        self._results: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    @property
    def count(self) -> int:
        """The number of samples."""
        return self._moments.count

    @property
    def identical(self) -> bool:
        """Whether there are two samples or more and all raw outputs are equal."""
        return self._first is not None and self.count > 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results: that of the first chunk's outputs, or float32 for half types."""
        return torch.promote_types(self._known.dtype, torch.float32)

    @property
    def errors(self) -> tuple[str, ...]:
        """The names of the statistics that get standard errors."""
        return error_names(self._errors, self.task, math.prod(self._known.outputs[0][1:]))

    @property
    def _known(self) -> OutputShape:
        if self._shape is None:
            raise ValueError("there are no samples yet")
        return self._shape

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
        self._check_shapes(parts)
        members = self._members(samples)
        task = self.task.placed(outputs)
        shape, flat = self._filled(task, outputs)
        if self._shape is None:
            refuse_nan(flat, samples)  # which could decide what is open
        task = task.settled(joined(flat))
        if not task.finite(joined(flat)):
            refuse_nan(flat, samples)
            refuse([~one.isfinite() for one in task.observe(joined(flat)).values()], samples)

        same = self._same(flat)
        if self._results is not None:
            self._results, self._moments.sizes = None, {}
        self.task, self._shape = task, shape
        self._first = (self._first or tuple(part[0].clone() for part in flat)) if same else None
        self._observe(flat, members, samples)
        for group, chosen in members.items():
            self._moments.sizes[group] = self._moments.sizes.get(group, 0) + len(chosen)

    def results_of(self, outputs: Outputs, samples: Sequence[int]) -> Results:
        """Returns the `results` of samples that are added to no others, for a task that is settled, and as a tensor
        whether `take` may be given them: whether all outputs are finite, and some differ.

        It reads no values, so that it can be recorded.
        """
        alone = Collector(self.task, self.groups, group_of=self._group_of, rounds=self.rounds, errors=self._errors)
        outputs = raw(outputs)
        alone._shape, flat = alone._filled(self.task, outputs)
        members = alone._members(samples)
        alone._observe(flat, members, samples)
        alone._moments.sizes = {group: len(chosen) for group, chosen in members.items()}
        finite = torch.stack([one.isfinite().all() for one in flat]).all()
        return *alone.results(), finite & torch.stack([(one != one[0]).any() for one in flat]).any()

    def take(self, results: Results, count: int) -> bool:
        """Takes the results of so many samples in the place of their outputs. Returns whether it can."""
        *statistics, fine = results
        if self.task.takes_finite and bool(fine):
            self._results, self._moments.sizes = (statistics[0], statistics[1]), {0: count}
        return self._results is not None

    def _filled(self, task: Task, outputs: Outputs) -> tuple[OutputShape, list[Tensor]]:
        """Returns the outputs with one dimension of places, and a finite number at those that are not reported."""
        shape, flat = flattened(outputs, task.arranged(outputs), task.leading)
        if self.valid is not None:
            valid = shape.expanded(self.valid)
            valid, constant = valid if task.leading == 1 else valid.unsqueeze(1), 1 / math.prod(flat[0].shape[2:-1])
            flat = [one.where(valid, constant) for one in flat]  # equal probabilities, where they are classes
        return shape, flat

    def observed(self, outputs: Outputs) -> dict[str, Tensor]:
        """Returns the observables that are kept, of outputs (S, B, ...) that are not added, as `samples` would."""
        _, flat = self._filled(self.task, raw(outputs))
        if not self.task.finite(joined(flat)):
            refuse_nan(flat, range(len(flat[0])))
        found = self.task.observe(joined(flat))
        return {name: self._in_order(values.to(self.dtype)) for name, values in found.items() if name in self.task.kept}

    def _in_order(self, samples: Tensor) -> Tensor:
        """Returns samples (S, rows, ..., places) of an observable that is kept in the order of the outputs."""
        masked = self._masked(samples, self.task.leading == 2)
        return self.task.restored(masked.movedim(0, -1), self._dims + 1).movedim(-1, 0)

    def _check_shapes(self, parts: Sequence[Tensor]) -> None:
        shapes = [tuple(part.shape[1:]) for part in parts]
        expected = shapes if self._shape is None else list(self._shape.outputs)
        if shapes != expected:
            raise ValueError(f"outputs change their shape between samples: {shapes}, expected {expected}")

    def _members(self, samples: Sequence[int]) -> dict[int, list[int]]:
        """Returns the places of each group's samples among these."""
        members: dict[int, list[int]] = {}
        for place, sample in enumerate(samples):
            group = self._group_of(sample)
            if not 0 <= group < self.groups:
                raise ValueError(f"group_of must give a group in [0, {self.groups}), got {group} for sample {sample}")
            members.setdefault(group, []).append(place)
        return members

    def _same(self, parts: Sequence[Tensor]) -> bool:
        """Whether all samples, with these, are equal so far."""
        if self._first is None and self._shape is not None:
            return False
        first = self._first or [part[0] for part in parts]
        return all(torch.equal(one, f) for part, f in zip(parts, first, strict=True) for one in part)

    def _observe(
        self,
        flat: Sequence[Tensor],
        members: Mapping[int, list[int]],
        samples: Sequence[int],
    ) -> None:
        """Adds the observables of the samples to the moments, block by block."""
        blocks = list(self._known.blocks(len(samples) * math.prod(flat[0].shape[2:-1])))
        kept: dict[str, Tensor] = {}
        grouped, known, dtype = self._grouped(), self._known, self.dtype
        shares = self._moments.shares(members) if grouped else []
        for number, (rows, places) in enumerate(blocks):
            for name, values in self.task.observe(cut(flat, (rows, places))).items():
                if number == 0:
                    self._make_room(name, name in grouped, values, len(blocks))
                if name in grouped:
                    for share in shares:
                        share.add(name, values, rows, places)
                else:
                    whole = self._moments.whole[name][0]
                    (whole if len(blocks) == 1 else whole.part(rows, places)).add(values)
                if self.keep_samples and name in self.task.kept:
                    if name not in kept:
                        kept[name] = torch.stack([known.room(values[0], dtype)] * len(samples))
                    kept[name][:, rows, ..., places] = values
        for share in shares:
            share.close()
        if len(blocks) > 1:
            for whole in self._moments.whole.values():
                whole[0].count += len(samples)
        if kept:
            self._kept.append((list(samples), kept))

    def _make_room(self, name: str, grouped: bool, values: Tensor, blocks: int) -> None:
        """Makes memory for the moments of an observable, where there is none."""
        counted = values.dtype == torch.bool
        dtype = torch.int32 if counted else wide(values[:0]).dtype
        if grouped:
            for stack in self._moments.stacks if blocks > 1 else ():
                if name not in stack.moments:
                    room = self._known.room(values[0], dtype, len(stack.groups))
                    one = StackedCounts(room) if counted else StackedMoments(room, torch.empty_like(room))
                    stack.moments[name] = one
        elif name not in self._moments.whole:
            whole: Moments | Counts = Counts() if counted else Moments()
            if blocks > 1:
                room = self._known.room(values[0], dtype).zero_()
                whole = Counts(0, room) if counted else Moments(0, room, torch.zeros_like(room))
            self._moments.whole[name] = [whole]

    def _grouped(self) -> set[str]:
        """Returns the observables that must be kept by groups."""
        names = needs_groups(self.task, self.errors)
        if self.rounds:
            names |= {one.observable for one in self.task.statistics().values() if isinstance(one, Mean)}
        return names

    def total(self) -> dict[str, Any]:
        """Returns the moments of every observable over all samples, each of shape (B, ...), classes after rows."""
        return {name: self._whole(one) for name, one in self._moments.total().items()}

    def leave_one_out(self) -> Iterator[dict[str, Any]]:
        """Yields, for each group in turn, the moments over all samples but its own; needs two groups or more."""
        for moments in self._moments.leave_one_out():
            yield {name: self._whole(one) for name, one in moments.items()}

    def _whole(self, moments: Any) -> Any:
        reshaped = self._known.unflattened
        if isinstance(moments, Counts):
            return Counts(moments.count, reshaped(moments.yes))
        return Moments(moments.count, reshaped(moments.mean), reshaped(moments.m2))

    def samples(self, observable: str) -> Tensor | None:
        """Returns all samples (T, B, ...) of an observable in the order of their indices; None if they are not kept."""
        if not self._kept:
            return None
        numbers = [sample for samples, _ in self._kept for sample in samples]
        stacked = torch.cat([kept[observable] for _, kept in self._kept])
        if numbers != sorted(numbers):
            stacked = stacked[torch.tensor(numbers).argsort(stable=True).to(stacked.device)]
        return self._in_order(stacked)

    def results(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns all of the task's statistics, and the standard errors that were chosen, in the results' dtype and
        the order of the outputs' dimensions."""
        if self._results is not None:
            return self._results
        statistics = self.task.statistics()
        chosen = {name: statistics[name] for name in self.errors}
        found = self._in_blocks(lambda part: part.results(statistics, chosen), self.dtype, self._copies(chosen))
        return self._reported(found, VALUE), self._reported(found, ERROR)

    def _reported(self, found: Mapping[tuple[str, str], Tensor], kind: str) -> dict[str, Tensor]:
        masked = {
            name: self._masked(one, one.dim() == 3) for (name, its_kind), one in found.items() if its_kind == kind
        }
        return {name: self.task.restored(values, self._dims) for name, values in masked.items()}

    def _masked(self, values: Tensor, classes: bool) -> Tensor:
        """Returns values (..., places) in the places' own dimensions, and NaN where they are not reported."""
        if self.valid is not None:
            valid = self._known.expanded(self.valid)
            values = values.where(valid.unsqueeze(1) if classes else valid, math.nan)
        return self._known.unflattened(values)

    @property
    def _dims(self) -> int:
        return len(self._known.outputs[0])

    def standard_error(self, statistic: Statistic) -> Tensor:
        """Returns the Monte Carlo standard error of one statistic. See `Groups.standard_errors`."""
        return self.standard_errors({"it": statistic})["it"]

    def standard_errors(self, statistics: Mapping[str, Statistic]) -> dict[str, Tensor]:
        """Returns the Monte Carlo standard error of each statistic. See `Groups.standard_errors`."""
        errors = self._in_blocks(lambda part: part.standard_errors(statistics).items(), None, self._copies(statistics))
        return {name: self._known.unflattened(values) for name, values in errors.items()}

    def _copies(self, statistics: Mapping[str, Statistic]) -> int:
        """Returns how many numbers are made of each element for the standard errors of these statistics."""
        return 2 * self.groups if any(not isinstance(one, Mean) for one in statistics.values()) else 1

    def _in_blocks(
        self, compute: Callable[[Groups], Iterable[tuple[Name, Tensor]]], dtype: torch.dtype | None, parts: int
    ) -> dict[Name, Tensor]:
        """Returns what is computed from the moments, block by block; blocks are smaller by a factor of `parts`."""
        known, out = self._known, dict[Name, Tensor]()
        classes = max(math.prod(one.shape[1:-1]) for one in self._tensors())
        blocks = list(known.blocks(classes * parts))
        if len(blocks) == 1:
            return {name: values.to(dtype or values.dtype) for name, values in compute(self._moments)}
        for rows, places in blocks:
            for name, values in compute(self._moments.part(rows, places)):
                if name not in out:
                    out[name] = known.room(values, dtype or values.dtype)
                out[name][rows, ..., places] = values
        return out

    def _tensors(self) -> Iterator[Tensor]:
        for stack in self._moments.stacks[:1]:
            for one in stack.moments.values():
                yield (one.yes if isinstance(one, StackedCounts) else one.mean)[0]
        for several in self._moments.whole.values():
            yield several[0].yes if isinstance(several[0], Counts) else several[0].mean

    def state(self) -> dict[str, Any]:
        """Returns all collected moments and samples, on the CPU, for processes to pickle and exchange. See `load`."""
        return {
            "task": self.task,
            "shape": self._shape,
            "first": None if self._first is None else tuple(part.cpu() for part in self._first),
            "moments": self._moments.to("cpu"),
            "kept": [(samples, {name: one.cpu() for name, one in kept.items()}) for samples, kept in self._kept],
        }

    def load(self, states: Iterable[Mapping[str, Any]], device: torch.device | str | None = None) -> None:
        """Replaces the collected moments and samples by the union of several processes' states, each group from one.

        Raises:
            ValueError: a group in two states, or states of other tasks or of outputs of other shapes.
        """
        filled = [state for state in states if state["shape"] is not None]
        held = [group for state in filled for group in state["moments"].sizes]
        if len(held) > len(set(held)):
            raise ValueError(f"states must hold different groups, got {held}")
        tasks, shapes = {state["task"] for state in filled}, {state["shape"].outputs for state in filled}
        if len(tasks) > 1 or len(shapes) > 1:
            raise ValueError(f"states must agree in task and shape, got {tasks} and {shapes}")
        if not filled:
            return
        self.task, self._shape = filled[0]["task"], filled[0]["shape"]
        firsts = [state["first"] for state in filled]
        same = all(first is not None and all(map(torch.equal, firsts[0], first)) for first in firsts)
        self._first = tuple(part.to(device) for part in firsts[0]) if same else None
        self._moments = Groups.joined([state["moments"].to(device) for state in filled])
        self._kept = [
            (samples, {name: one.to(device) for name, one in kept.items()})
            for state in filled
            for samples, kept in state["kept"]
        ]

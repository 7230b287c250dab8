"""The batches of one prediction: their samples are run, and statistics are made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .activate import ADVICE, Activation
from .compiled import CompiledSampler
from .heads import Heads
from .inputs import Inputs, valid_places
from .memory import GROUPS, MemoryPlan
from .outputs import Picker
from .plain import Task
from .plan import ROUND, SamplePlan
from .prediction import Prediction
from .sample import Outputs, Sampler
from .statistics import Collector, Results
from .strategy import Choice

_WORTH_MEASURING = 2
"""The number of chunks that a measurement of memory may save at most and that take about as much time as it does."""

ResultsOf = Callable[[Outputs, Sequence[int]], dict[str, Results]]


class Job:
    """The batches of one prediction, one after another. The strategy is decided on the first.

    Args:
        activation: the activation of the model.
        sampler: the sampler of the prediction.
        pick: takes the outputs of interest.
        tasks: the task of all outputs, or those of several by name.
        effort: the plan of samples.
        choice: the choice of a strategy.
        chunk: the number of samples to be run at a time; None for as many as fit into memory.
        memory: the bound on memory.
        keep_samples: whether all samples are kept.
        valid: the places that are reported: see `mc_predict`.
        compile: whether samples are run by compiled functions, where they can be.

    Attributes:
        identical: whether all samples were equal.
        reached: the largest standard error of the mean, if it did not reach the tolerance.
    """

    def __init__(
        self,
        activation: Activation,
        sampler: Sampler,
        pick: Picker,
        tasks: Task | dict[str, Task],
        effort: SamplePlan,
        choice: Choice,
        chunk: int | None,
        memory: MemoryPlan,
        keep_samples: bool,
        valid: str | Tensor | None,
        compile: bool = False,
    ) -> None:
        self.activation, self._sampler, self._pick, self._effort = activation, sampler, pick, effort
        self._tasks, self._choice, self._chunk, self._memory, self._keep = tasks, choice, chunk, memory, keep_samples
        self._valid = valid
        self._compiled = CompiledSampler(sampler, self._rows_first) if compile else None
        self._prepared = False
        self._told: set[str] = set()
        self._next_row = 0
        self.identical = True
        self.reached: float | None = None

    def restart(self) -> None:
        """Begins another prediction, for which all that is known of the model and of its outputs holds."""
        self._next_row, self.identical, self.reached = 0, True, None

    def omissions(self) -> list[str]:
        """Returns what the user is to be told of the model's randomness."""
        self.activation.list_sources()
        return self.activation.omissions()

    def remarks(self) -> list[str]:
        """Returns what the user is to be told of the last prediction, and has not been told before if it lasts."""
        effort = self._effort
        lasting = [*self._choice.said, *self._doubts, *([] if self._compiled is None else self._compiled.said)]
        said = [one for one in lasting if one not in self._told]
        self._told |= set(lasting)
        if effort.samples > 1 and self.identical:
            said.append(f"all samples are identical. {ADVICE}")
        if self.reached is not None:
            said.append(
                f"tolerance={effort.tolerance} was not met after {effort.samples} samples: the largest standard error "
                f"of the mean is {self.reached:.3g}. Raise samples or tolerance"
            )
        return said

    def run(self, inputs: Inputs, weight_scaling: bool) -> list[dict[str, Prediction]]:
        """Returns the predictions for one batch, by the outputs' names: one, or one for each block of its rows."""
        if not self._prepared:
            self._prepare(inputs)
        elif self._choice.strategy:
            self._choice.look_at_rows(inputs)
        return [self._run(block, weight_scaling) for block in self._blocks(inputs)]

    def _prepare(self, inputs: Inputs) -> None:
        """Surveys the model with the first batch, and finds out how much memory its samples need."""
        if inputs.rows == 0:
            raise ValueError("inputs must hold at least one row, got none")
        self._choice.survey(inputs)
        memory, sampler = self._memory, self._sampler
        memory.row_elements, tasks = self._pick.by_name(sampler.row_elements), self._named_tasks()
        heights, chunks = [], []
        for memory.row_bytes in (sampler.least_bytes, sampler.most_bytes):
            heights.append(memory.rows(inputs, tasks))
            chunks.append(math.ceil(self._effort.samples / (self._chunk or memory.samples(inputs, tasks))))
        if self._effort.latin or heights[0] != heights[1] or chunks[1] - chunks[0] > _WORTH_MEASURING:
            memory.row_bytes = sampler.measured_bytes()
        self._prepared = True

    def _blocks(self, inputs: Inputs) -> Iterator[Inputs]:
        """Yields the batch, or blocks of its rows if its statistics, or a sample of it, do not fit into memory."""
        height, rows, choice = self._memory.rows(inputs, self._named_tasks()), inputs.rows or 1, self._choice
        if height is None:
            yield inputs
            return
        choice.look_at_rows(inputs)
        if not choice.rows_alone:
            yield inputs
            return
        for first in range(0, rows, height):
            yield inputs.part(first, min(height, rows - first))

    def _run(self, inputs: Inputs, weight_scaling: bool) -> dict[str, Prediction]:
        """Returns the predictions for a block of rows, or for a whole batch."""
        self._pick.row_dims = self._sampler.row_dims if inputs.rows == 1 else None
        effort, groups = self._effort, max(GROUPS, self._effort.processes)
        valid = valid_places(self._valid, inputs, self._next_row)
        heads = total = self._heads(groups, valid)
        done, results_of = False, heads.results_of if self._needs_no_samples(weight_scaling) else None
        self._sampler.keep_prefix()
        for step in effort.steps():
            for samples, outputs, results in self._sampled(inputs, effort.mine(step, groups), results_of):
                if results is None or not heads.take(results, len(samples)):
                    heads.add(outputs, samples)
            total = self._merged(heads, groups, valid, inputs.device)
            done = self._close_enough(total)
            if done:
                break
        self.activation.server.prefix = None
        if effort.tolerance is not None and not done:
            self.reached = max(self.reached or 0.0, _largest_error(total))
        self._tasks, self.identical = total.tasks, self.identical and total.identical
        if self._compiled is not None and not self._compiled.tried:  # the first samples were run to decide
            first = next(effort.chunks(range(effort.samples), self._size(self._choice.strategy, inputs)))
            self._sample(inputs, first, results_of and self._heads(groups, valid).results_of)
        self._next_row += inputs.rows or 0
        return total.predictions(
            self._weight_scaling(inputs) if weight_scaling else None,
            seed=self._sampler.seed,
            strategy=self._choice.strategy,
            report=self.activation.report,
        )

    def _needs_no_samples(self, weight_scaling: bool) -> bool:
        """Whether a prediction is made of the statistics of its samples alone."""
        effort = self._effort
        more = self._keep or weight_scaling or self._valid is not None
        return not more and effort.processes == 1 and effort.tolerance is None

    def _sampled(
        self, inputs: Inputs, samples: Sequence[int], results_of: ResultsOf | None
    ) -> Iterator[tuple[Sequence[int], Outputs, Any]]:
        """Yields chunks of these samples with their outputs, and what `_sample` returns beside these."""
        choice, effort = self._choice, self._effort
        if samples and not choice.strategy:
            chosen, outputs = choice.first(
                inputs, self._next_row, lambda strategy: next(effort.chunks(samples, self._size(strategy, inputs)))
            )
            self.activation.report.chunk = 1 if choice.strategy == "loop" else self._size(choice.strategy, inputs)
            samples = samples[len(chosen) :]
            yield chosen, self._rows_first(outputs), None
        for chunk in effort.chunks(samples, self._size(choice.strategy, inputs)):
            yield chunk, *self._sample(inputs, chunk, results_of)

    def _sample(
        self, inputs: Inputs, samples: Sequence[int], results_of: ResultsOf | None
    ) -> tuple[Outputs, dict[str, Results] | None]:
        """Returns the outputs of these samples, rows first, and what a function makes of the outputs of all samples, if
        that is compiled with them."""
        strategy = self._choice.strategy
        if self._compiled is not None:
            whole = results_of if len(samples) == self._effort.samples else None
            alone = bool(self._choice.rows_alone)
            found = self._compiled.run(strategy, inputs, samples, self._next_row, alone, whole)
            if found is not None:
                self.activation.report.compiled = True
                return found
        return self._rows_first(self._sampler.run(strategy, inputs, samples, self._next_row)), None

    @property
    def _doubts(self) -> list[str]:
        """The decisions of tasks of which the user is to be told, because others were possible."""
        found = (getattr(task, "doubt", "") for task in self._named_tasks().values())
        return [doubt for doubt in found if doubt]

    def _size(self, strategy: str, inputs: Inputs) -> int:
        """Returns the number of samples that are run at a time, or whose statistics are taken at a time."""
        if self._chunk:
            return self._chunk
        if strategy == "loop":
            return self._memory.outputs(inputs, self._named_tasks())
        return self._memory.samples(inputs, self._named_tasks())

    def _named_tasks(self) -> dict[str, Task]:
        tasks = self._tasks
        return tasks if isinstance(tasks, dict) else dict.fromkeys(self._pick.names, tasks)

    def _heads(self, groups: int, valid: Tensor | None) -> Heads:
        return Heads(
            {name: self._collector(task, groups, valid) for name, task in self._named_tasks().items()}, self._pick.sizes
        )

    def _collector(self, task: Task, groups: int, valid: Tensor | None) -> Collector:
        return Collector(
            task,
            groups,
            group_of=self._effort.group_of(groups),
            rounds=self._effort.rounds,
            keep_samples=self._keep,
            errors=self._memory.errors,
            valid=valid,
        )

    def _rows_first(self, outputs: Outputs) -> Outputs:
        """Returns the outputs with samples and then rows in front."""
        dims = self._sampler.row_dims
        return tuple(out if dim is None else out.movedim(dim + 1, 1) for out, dim in zip(outputs, dims, strict=True))

    def _merged(self, collector: Heads, groups: int, valid: Tensor | None, device: torch.device) -> Heads:
        """Returns the statistics of the samples of all processes."""
        if self._effort.processes == 1:
            return collector
        states: list[Any] = [None] * self._effort.processes
        torch.distributed.all_gather_object(states, collector.state(), group=self._effort.group)
        total = self._heads(groups, valid)
        total.load(states, device)
        return total

    def _close_enough(self, total: Heads) -> bool:
        tolerance, effort = self._effort.tolerance, self._effort
        if tolerance is None or total.count < (4 * ROUND if effort.rounds else ROUND):
            return False
        return _largest_error(total) <= tolerance

    def _weight_scaling(self, inputs: Inputs) -> Outputs:
        out = tuple(part.unsqueeze(0) for part in self._sampler.deterministic(inputs))
        return tuple(part[0] for part in self._rows_first(out))


def _largest_error(heads: Heads) -> float:
    """Returns the largest standard error of the mean of any output."""
    return max(float(_mean_error(one).max()) for one in heads.collectors.values())


def _mean_error(collector: Collector) -> Tensor:
    return collector.standard_error(collector.task.statistics()["mean"])

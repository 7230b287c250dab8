"""The bound on memory: how many samples run at a time, and how many rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..handlers.masks import Hypercube
from .inputs import Inputs
from .plain import Task
from .plan import SamplePlan
from .standard_errors import Errors, error_names, needs_groups

GROUPS = 10
"""The number of groups of samples. Standard errors come from the spread between groups."""

ELEMENT_BYTES = 20
"""The bytes that are kept for each element of an output and each group: two float64 moments, and a count of votes."""


@dataclass
class MemoryPlan:
    """The numbers of samples and rows that fit into memory, for what samples and statistics hold.

    Args:
        bound: the bound in bytes that was given, if any.
        effort: the plan of samples.
        errors: the choice of standard errors.
        row_bytes: the bytes that a row of one sample needs.
        row_elements: the elements of a row's outputs, by the outputs' names.
    """

    bound: int | None
    effort: SamplePlan
    errors: Errors
    row_bytes: int = 1
    row_elements: Mapping[str, int] = field(default_factory=dict)

    def limit(self, device: torch.device) -> int:
        """Returns the bound, by default 32 MiB on the CPU and 1 GiB elsewhere."""
        return self.bound or (2**25 if device.type == "cpu" else 2**30)

    def statistics_bytes(self, tasks: Mapping[str, Task]) -> int:
        """Returns the bytes that the statistics of one row hold, for the tasks of all outputs."""
        total = 0
        for name, task in tasks.items():
            elements = self.row_elements[name]
            grouped = self.effort.rounds or needs_groups(task, error_names(self.errors, task, elements))
            total += (GROUPS if grouped else 1) * ELEMENT_BYTES * elements
        return total

    def samples(self, inputs: Inputs, tasks: Mapping[str, Task]) -> int:
        """Returns the number of samples that fit beside the statistics, at least one."""
        rows, cube = inputs.rows or 1, self.effort.hypercube
        held = self.row_bytes * rows + (0 if cube is None else 8 * Hypercube(cube).family)
        return max(1, min(self._left(inputs, rows, tasks) // held, self.effort.samples))

    def outputs(self, inputs: Inputs, tasks: Mapping[str, Task]) -> int:
        """Returns the number of samples whose outputs fit beside the statistics, at least one."""
        rows = inputs.rows or 1
        held = 8 * rows * sum(self.row_elements.values())
        return max(1, min(self._left(inputs, rows, tasks) // max(held, 1), self.effort.samples))

    def _left(self, inputs: Inputs, rows: int, tasks: Mapping[str, Task]) -> int:
        """Returns the bytes that samples may hold: what statistics leave of a bound that was given, or all of the
        usual one, which holds for either."""
        limit = self.limit(inputs.device)
        return limit if self.bound is None else limit - rows * self.statistics_bytes(tasks)

    def rows(self, inputs: Inputs, tasks: Mapping[str, Task]) -> int | None:
        """Returns the number of rows in a block if the batch is to be run in blocks.

        It is if its statistics do not fit, or one sample of it does not fit into a bound that was given. A batch of two
        rows stays whole, since it could not be told whether rows depend on each other, and so does one whose samples
        are taken until a tolerance is met.
        """
        limit, statistics = self.limit(inputs.device), self.statistics_bytes(tasks)
        fitting = limit // max(statistics, 1)
        if self.bound is not None:
            fitting = min(fitting, limit // (self.row_bytes + statistics))
        if inputs.rows is None or inputs.rows <= max(fitting, 2) or self.effort.tolerance is not None:
            return None
        return max(1, fitting)

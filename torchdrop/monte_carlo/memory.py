"""The bound on memory: how many samples run at a time, and how many rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.torch_state import tree_map
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
        row_elements: the elements of a row's output.
    """

    bound: int | None
    effort: SamplePlan
    errors: Errors
    row_bytes: int = 1
    row_elements: int = 0

    def limit(self, device: torch.device) -> int:
        """Returns the bound, by default 32 MiB on the CPU and 1 GiB elsewhere."""
        return self.bound or (2**25 if device.type == "cpu" else 2**30)

    def statistics_bytes(self, task: Task) -> int:
        """Returns the bytes that the statistics of one row hold."""
        names = error_names(self.errors, task, self.row_elements)
        groups = GROUPS if self.effort.rounds or needs_groups(task, names) else 1
        return groups * ELEMENT_BYTES * self.row_elements

    def samples(self, inputs: Inputs, task: Task) -> int:
        """Returns the number of samples that fit beside the statistics, at least one."""
        rows, cube = inputs.rows or 1, self.effort.hypercube
        held = self.row_bytes * rows + (0 if cube is None else 8 * Hypercube(cube).family)
        left = self.limit(inputs.device) - rows * self.statistics_bytes(task)
        return max(1, min(left // held, self.effort.samples))

    def rows(self, inputs: Inputs, task: Task) -> int | None:
        """Returns the number of rows in a block if the batch is to be run in blocks.

        It is if its statistics do not fit, or one sample of it does not fit into a bound that was given. A batch of two
        rows stays whole, since it could not be told whether rows depend on each other, and so does one whose samples
        are taken until a tolerance is met.
        """
        limit, statistics = self.limit(inputs.device), self.statistics_bytes(task)
        fitting = limit // max(statistics, 1)
        if self.bound is not None:
            fitting = min(fitting, limit // (self.row_bytes + statistics))
        if inputs.rows is None or inputs.rows <= max(fitting, 2) or self.effort.tolerance is not None:
            return None
        return max(1, fitting)


def rows_of(inputs: Inputs, first: int, count: int) -> Inputs:
    """Returns so many rows of a batch, from this one on, which share its memory."""
    dim = inputs.dim or 0
    args, kwargs = tree_map(
        lambda leaf: leaf.narrow(dim, first, count) if isinstance(leaf, Tensor) and leaf.dim() > 0 else leaf,
        (inputs.args, inputs.kwargs),
    )
    return Inputs(args, kwargs, dim)


def valid_places(valid: str | Tensor | None, inputs: Inputs, first_row: int) -> Tensor | None:
    """Returns whether places of this batch's rows are reported, rows first: see `mc_predict`.

    Raises:
        ValueError: a name that no tensor among the named arguments has, or a tensor of too few rows.
        TypeError: something else than a name or a tensor.
    """
    if valid is None:
        return None
    if isinstance(valid, str):
        named = {name: value for name, value in inputs.kwargs.items() if isinstance(value, Tensor)}
        if valid not in named:
            listed = ", ".join(named) or "there are none"
            raise ValueError(f"valid must name a tensor among the model's named arguments ({listed}), got {valid!r}")
        return named[valid].movedim(inputs.dim or 0, 0) != 0
    if not isinstance(valid, Tensor):
        raise TypeError(f"valid must be the name of an argument, a tensor or None, got {type(valid).__name__}")
    if inputs.rows is None:
        return valid.to(inputs.device) != 0
    if valid.dim() == 0 or len(valid) < first_row + inputs.rows:
        raise ValueError(
            f"valid must have a row for each row of the inputs, got shape {tuple(valid.shape)} for row "
            f"{first_row + inputs.rows - 1}"
        )
    return valid[first_row : first_row + inputs.rows].to(inputs.device) != 0

"""The plan of samples: their number, their order, and the process that runs each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROUND = 20
"""The samples between two checks of the tolerance, and in a Latin hypercube if a tolerance may stop early."""


@dataclass(frozen=True)
class SamplePlan:
    """The number of samples, their order, and the number of processes."""

    samples: int
    tolerance: float | None
    latin: bool
    group: Any

    @property
    def hypercube(self) -> int | None:
        if not self.latin:
            return None
        return self.samples if self.tolerance is None else ROUND

    @property
    def rounds(self) -> bool:
        """Whether the samples come in several hypercubes."""
        return self.latin and self.tolerance is not None

    @property
    def processes(self) -> int:
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    def steps(self) -> Iterator[range]:
        """Yields the samples that are run between two checks of the tolerance."""
        size = self.samples if self.tolerance is None else ROUND * (self.processes if self.rounds else 1)
        for first in range(0, self.samples, size):
            yield range(first, min(first + size, self.samples))

    def group_of(self, groups: int) -> Callable[[int], int]:
        return (lambda sample: sample // ROUND % groups) if self.rounds else (lambda sample: sample % groups)

    def mine(self, step: range, groups: int) -> list[int]:
        """Returns this process's share: whole groups."""
        of = self.group_of(groups)
        return [sample for sample in step if of(sample) % self.processes == self.rank]

    def chunks(self, samples: Sequence[int], size: int) -> Iterator[Sequence[int]]:
        """Yields chunks, each within one hypercube."""
        cube = self.hypercube or self.samples
        start = 0
        while start < len(samples):
            end = start
            while end < len(samples) and end - start < size and samples[end] // cube == samples[start] // cube:
                end += 1
            yield samples[start:end]
            start = end


def agreed_seed(seed: int, group: Any) -> int:
    """Returns the seed of the group's first process."""
    if group is None:
        return seed
    seeds = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(seeds, seed, group=group)
    return int(seeds[0])  # type: ignore[call-overload]

"""Timing of several callables against each other, and the statistics and tables made of it."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Call = Callable[[], object]


class Quartiles(NamedTuple):
    """First quartile, median and third quartile."""

    low: float
    median: float
    high: float

    def inverse(self) -> Quartiles:
        """The quartiles of the reciprocals."""
        return Quartiles(1 / self.high, 1 / self.median, 1 / self.low)


def quartiles(samples: Sequence[float]) -> Quartiles:
    """Linearly interpolated between the two nearest samples."""
    if not samples:
        raise ValueError("no samples")
    if len(samples) == 1:
        return Quartiles(*[samples[0]] * 3)
    return Quartiles(*statistics.quantiles(samples, n=4, method="inclusive"))


class Clock(Protocol):
    """How long `count` calls take together, in seconds."""

    def __call__(self, call: Call, count: int) -> float: ...


def cpu_clock(call: Call, count: int) -> float:
    repeats = range(count)
    begin = time.perf_counter()
    for _ in repeats:
        call()
    return time.perf_counter() - begin


def cuda_clock(call: Call, count: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def clock_for(device: torch.device) -> Clock:
    return cuda_clock if device.type == "cuda" else cpu_clock


@dataclass(frozen=True)
class Effort:
    """How much time a comparison may take, in seconds, and how it is divided."""

    budget: float = 2.0
    batch: float = 4e-3
    min_rounds: int = 7
    max_rounds: int = 400


@dataclass
class Comparison:
    """Seconds per call, one sample per contender and round; the samples of a round were taken next to each other."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return min((len(s) for s in self.samples.values()), default=0)

    def seconds(self, name: str) -> Quartiles:
        return quartiles(self.samples[name])

    def ratio(self, name: str, to: str) -> Quartiles:
        """Quartiles, over rounds, of the time of `name` as a multiple of the time of `to` in the same round."""
        return quartiles([a / b for a, b in zip(self.samples[name], self.samples[to], strict=True)])


def _calibrated(call: Call, clock: Clock, batch: float) -> int:
    """How many calls take about `batch` seconds when nothing interrupts them."""
    count = 1
    while True:
        taken = clock(call, count)
        if taken >= batch / 2:
            taken = min(taken, clock(call, count), clock(call, count)) if taken < 4 * batch else taken
        if taken >= batch / 2 or count >= 2**22:
            return max(1, math.ceil(count * batch / taken))
        count *= 4 if taken < batch / 16 else 2


def compare(
    contenders: dict[str, Call],
    effort: Effort | None = None,
    clock: Clock = cpu_clock,
    seed: int = 0,
    elapsed: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Times the contenders in interleaved rounds, so that the machine's noise meets all of them alike.

    A round gives each contender one batch of calls, in an order shuffled anew from `seed`. A batch is at least about
    `effort.batch` seconds long, and short calls have one untimed call before it, which brings their code and data back
    into the caches. Rounds go on until the budget is spent, within the effort's bounds.
    """
    effort = effort or Effort()
    begin = elapsed()
    for call in contenders.values():
        call()
    result = Comparison({name: [] for name in contenders})
    for name, call in contenders.items():
        result.counts[name] = _calibrated(call, clock, effort.batch)
    order = list(contenders)
    shuffler = random.Random(seed)
    while contenders and result.rounds < effort.max_rounds:
        if result.rounds >= effort.min_rounds and elapsed() - begin >= effort.budget:
            break
        shuffler.shuffle(order)
        for name in order:
            call, count = contenders[name], result.counts[name]
            if count > 1:
                call()
            result.samples[name].append(clock(call, count) / count)
    return result


def rotating(calls: Sequence[Call]) -> Call:
    """One call that makes the next of these each time. On copies of an input, it leaves none of them in a cache."""
    return calls[0] if len(calls) == 1 else _Rotation(calls)


class _Rotation:
    def __init__(self, calls: Sequence[Call]) -> None:
        self._next = itertools.cycle(calls).__next__

    def __call__(self) -> object:
        return self._next()()


def settle_allocator() -> None:
    """Brings the C library's allocator to where a long-running process has it.

    Glibc returns blocks to the system above a threshold that rises with the blocks it has freed, so the first cells
    would pay for page faults that later ones do not.
    """
    block = torch.empty(31 * 2**20, dtype=torch.uint8)
    del block


def copies(x: Tensor, least_bytes: int, at_most: int = 64) -> list[Tensor]:
    """x and as many copies of it as take `least_bytes` together, with its strides."""
    size = max(1, x.numel() * x.element_size())
    extra = min(max(0, math.ceil(least_bytes / size) - 1), at_most - 1)
    return [x, *[x.detach().clone().requires_grad_(x.requires_grad) for _ in range(extra)]]


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits.

    >>> duration(1.23456e-5), duration(0.25)
    ('12.3 us', '250 ms')
    """
    for unit, scale in (("ns", 1e9), ("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{digits(seconds * scale)} {unit}"
    return f"{digits(seconds)} s"


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value) * 1.0005)))}f}"


def factor(ratio: Sequence[float]) -> str:
    """A ratio's median with its quartiles."""
    low, median, high = ratio
    return f"{digits(median)}x [{digits(low)}, {digits(high)}]"


def text_row(cells: Sequence[str], widths: Sequence[int], left: int = 1) -> str:
    """The first `left` cells to the left, the others to the right of their columns."""
    pairs = enumerate(zip(cells, widths, strict=True))
    return "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in pairs).rstrip()


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [text_row(header, widths, left), "  ".join("-" * w for w in widths)]
    return "\n".join(lines + [text_row(row, widths, left) for row in rows])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)

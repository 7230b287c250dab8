"""Dropout on a CUDA device: against torch.nn's, eager and compiled, against a copy of the same bytes, and its overhead.

python benchmarks/bench_cuda.py [--fill benchmarks/README.md] [--quick] [--output FILE]
python benchmarks/bench_cuda.py --render FILE

Times are CUDA events', medians of interleaved rounds; a ratio is taken within each round. What is timed has passed its
checks first. The table says of each row what is required and whether it holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import checks
import command
import cuda_summary
import machine
import memory
import torch
import torch.nn.functional as F
from cuda_summary import COMPILED_OURS, COMPILED_STOCK, COPY, OURS, STOCK
from harness import (
    Call,
    Clock,
    Effort,
    clock_for,
    compare,
    copies,
    duration,
    rotating,
    text_row,
    text_table,
)
from summary import BOTH, FORWARD
from torch import Tensor, nn
from torch._inductor import config as inductor

import torchdrop
from torchdrop import functional as TF
from torchdrop import kernels

RESULT = "cuda.json"
P = 0.5
DTYPE = torch.bfloat16

Map = Callable[..., Tensor]


@dataclass(frozen=True)
class Cell:
    """One question: this operation, at this size, in this direction.

    Args:
        operation: "dropout" of one tensor, or "dropout_add" of two.
        elements: of each tensor.
        mode: forward, or forward and backward.
        section: where it is shown and what is asked of it.
    """

    section: str
    operation: str
    elements: int
    mode: str = BOTH

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Small multiples of 1/4 other than 0, of which dropout at 1/2 and sums are exact in bfloat16."""
        seeds = (1, 2)[: 2 if self.operation == "dropout_add" else 1]
        return tuple(quarters(self.elements, device, seed).requires_grad_(self.mode == BOTH) for seed in seeds)

    def label(self) -> str:
        return f"{self.operation}, 2^{self.elements.bit_length() - 1}, {self.mode}"


def quarters(n: int, device: torch.device, seed: int) -> Tensor:
    """A million of them, over and over: the host takes long to draw more."""
    period = min(n, 2**20)
    x = (checks.sample((period,), torch.float32, "cpu", seed) * 4).round().clamp(-8, 8) / 4
    return torch.where(x == 0, 0.25, x).to(device, DTYPE).repeat(n // period)


def cells(quick: bool) -> Iterator[Cell]:
    """In the order in which they are shown."""
    large = 2**22 if quick else 2**28
    yield Cell("large", "dropout", large)
    yield Cell("large", "dropout_add", large)
    for mode in (FORWARD, BOTH):
        for exponent in (10, 16) if quick else range(10, 17, 2):
            yield Cell("launch", "dropout", 2**exponent, mode)


def added(x: Tensor, residual: Tensor) -> Tensor:
    """What is written where there is no fused operator."""
    return F.dropout(x, P) + residual


def fused(x: Tensor, residual: Tensor) -> Tensor:
    return TF.dropout_add(x, residual, P)


def contenders(cell: Cell) -> dict[str, Map]:
    ours, stock = (torchdrop.Dropout(P), nn.Dropout(P)) if cell.operation == "dropout" else (fused, added)
    maps: dict[str, Map] = {OURS: ours, STOCK: stock}
    if cell.section == "large":
        maps |= compiled(cell.operation)
    return maps


def compiled(operation: str) -> dict[str, Map]:
    """Compiled anew, with functions of their own, so that no limit on recompilations is met."""
    torch.compiler.reset()
    inductor.compile_threads = 1
    ours, stock = (torchdrop.Dropout(P), nn.Dropout(P)) if operation == "dropout" else (fused, added)
    return {
        COMPILED_STOCK: torch.compile(stock, dynamic=False, fullgraph=True),
        COMPILED_OURS: torch.compile(ours, dynamic=False, fullgraph=True),
    }


def fault(name: str, function: Map, inputs: Sequence[Tensor]) -> str | None:
    """Why a contender is not timed: "wrong: ..." or "n/a: ...". None where it computes what it should."""
    try:
        found = wrong(function, inputs)
    except Exception as error:  # a compiler that is missing or fails is a result too
        if name not in (COMPILED_STOCK, COMPILED_OURS):
            raise
        lines = str(error).strip().splitlines() or [""]
        return f"n/a: {type(error).__name__}: {lines[0][:120]}"
    return found and f"wrong: {found}"


def wrong(function: Map, inputs: Sequence[Tensor]) -> str | None:
    """What is wrong with it, or None. A residual can be taken off again, since all of it is exact."""
    if len(inputs) == 1:
        return checks.dropout_fault(function, inputs[0], P)
    x, residual = inputs
    held = residual.detach()
    found = checks.dropout_fault(lambda x: function(x, held) - held, x, P)
    if found or not residual.requires_grad:
        return found
    g = torch.full_like(held, 0.75)
    (gradient,) = torch.autograd.grad(function(x.detach(), residual), residual, g)
    return None if torch.equal(gradient, g) else "a gradient of the residual other than g"


def _both(function: Map, inputs: Sequence[Tensor], g: Tensor) -> Call:
    return lambda: torch.autograd.grad(function(*inputs), inputs, g)


def step(function: Map, cell: Cell, inputs: Sequence[Sequence[Tensor]]) -> Call:
    """What is timed, on each of the copies of the inputs in turn."""
    if cell.mode == FORWARD:
        return rotating([partial(function, *xs) for xs in inputs])
    g = torch.ones_like(inputs[0][0])
    return rotating([_both(function, xs, g) for xs in inputs])


def copying(x: Tensor) -> Call:
    """A read and a write of each element, twice: the bytes that forward and backward of dropout cannot do without."""
    x, g = x.detach(), torch.ones_like(x)
    return lambda: (x.clone(), g.clone())


def measure(
    cell: Cell,
    device: torch.device,
    effort: Effort,
    maps: dict[str, Map] | None = None,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """The cell's result: for each contender its seconds and, against torchdrop, the ratio of times, or its fault."""
    maps = contenders(cell) if maps is None else maps
    given = cell.inputs(device)
    faults = {name: fault(name, function, given) for name, function in maps.items()}
    for name, why in faults.items():
        if why:
            print(f"    {cell.label()}, {name}: {why}", flush=True)
    least = 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    inputs = list(zip(*[copies(x, least) for x in given], strict=True))
    calls = {name: step(function, cell, inputs) for name, function in maps.items() if not faults[name]}
    if cell.section == "large" and cell.operation == "dropout":
        calls[COPY] = copying(given[0])
    compared = compare(calls, effort, clock or clock_for(device))
    result: dict[str, Any] = {
        "section": cell.section, "label": cell.label(), "operation": cell.operation, "elements": cell.elements,
        "mode": cell.mode, "dtype": str(DTYPE).removeprefix("torch."), "p": P, "rounds": compared.rounds,
        "contenders": {name: {"fault": why} for name, why in faults.items() if why},
    }  # fmt: skip
    for name in calls:
        entry: dict[str, Any] = {"seconds": compared.seconds(name), "calls_per_round": compared.counts[name]}
        if name != OURS and not faults[OURS]:
            entry["times_torchdrop"] = compared.ratio(name, OURS)
        if name == COMPILED_OURS and COMPILED_STOCK in calls:
            entry["times_torch_compiled"] = compared.ratio(name, COMPILED_STOCK)
        result["contenders"][name] = entry
    return result


def kept_and_peak(device: torch.device, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """For each operation and contender, bytes an element that are kept for backward, and at the peak of both passes.

    They are the differences between two sizes, so what does not grow is not in them.
    """
    found = []
    for operation in ("dropout", "dropout_add"):
        for name in (OURS, STOCK, COMPILED_STOCK, COMPILED_OURS):
            result: dict[str, Any] = {"operation": operation, "contender": name, "sizes": list(sizes)}
            try:
                small, large = (_bytes(operation, name, n, device) for n in sizes)
            except Exception as error:  # as in `fault`
                if name not in (COMPILED_STOCK, COMPILED_OURS):
                    raise
                found.append(result | {"fault": f"n/a: {type(error).__name__}"})
                continue
            for what in ("kept", "peak"):
                result[what] = (large[what] - small[what]) / (sizes[1] - sizes[0])
            found.append(result)
    return found


def _bytes(operation: str, name: str, n: int, device: torch.device) -> dict[str, int]:
    cell = Cell("large", operation, n)
    function = contenders(cell)[name]
    given = cell.inputs(device)
    x, others = given[0], [other.detach() for other in given[1:]]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # blocks that are larger than what is asked for would count as a whole
    saved = memory.saved_bytes(lambda x: function(x, *others), x)
    return {"kept": saved.largest, "peak": memory.peak_bytes(_both(function, given, torch.ones_like(x)), device)}


def cell_row(result: dict[str, Any]) -> list[str]:
    row = [result["label"]]
    for name in cuda_summary.COLUMNS:
        entry = result["contenders"].get(name)
        if entry is None:
            row.append("-")
        elif "fault" in entry:
            row.append(entry["fault"].partition(":")[0])
        else:
            row.append(duration(entry["seconds"][1]))
    return row


_WIDTHS = [44, 10, 10, 17, 18, 10]


def run(device: torch.device, quick: bool, save: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Measures everything, printing as it goes. `save` gets what there is after each cell."""
    effort = Effort(budget=0.5, min_rounds=5) if quick else Effort(budget=4.0, batch=2e-2)
    begin = time.perf_counter()
    report: dict[str, Any] = {"machine": machine.describe(device), "quick": quick, "cells": []}
    report["backend"] = kernels.backend_for(device, DTYPE).NAME
    print("\n".join(f"{name}: {value}" for name, value in report["machine"].items()))
    print(f"torchdrop's backend: {report['backend']}\n\n{text_row(cuda_summary.CELL_HEADER, _WIDTHS)}")
    for cell in cells(quick):
        report["cells"].append(measure(cell, device, effort))
        print(text_row(cell_row(report["cells"][-1]), _WIDTHS), flush=True)
        if save is not None:
            save(report)
    report["memory"] = kept_and_peak(device, (2**16, 2**18) if quick else (2**24, 2**26))
    rows = [cuda_summary.memory_row(result) for result in report["memory"]]
    print(f"\nbytes an element, {DTYPE}\n{text_table(cuda_summary.MEMORY_HEADER, rows, left=2)}")
    report["summary"] = cuda_summary.verdicts(report)
    report["seconds"] = round(time.perf_counter() - begin, 1)
    print(f"\nsummary, after {report['seconds']:.0f} s\n{cuda_summary.text(report)}")
    return report


def render(report: dict[str, Any]) -> str:
    """A report as markdown: machine, summary, times and bytes."""
    rows = [cell_row(result) for result in report["cells"]]
    return cuda_summary.markdown(report, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, RESULT, "smaller tensors and fewer rounds, nothing judged")
    parser.add_argument("--device", default="cuda", type=torch.device, help="which CUDA device: cuda, or cuda:1")
    parser.add_argument(
        "--fill", type=Path, metavar="FILE", help="put the table between the markers for it in a markdown file"
    )
    options = parser.parse_args(arguments)
    if options.fill is not None and not cuda_summary.has_place(options.fill):
        parser.error(f"--fill: {options.fill} has no lines {' and '.join(cuda_summary.MARKERS)}")
    if options.fill is not None and (options.quick or options.render):
        parser.error("--fill is for a whole run: not with --quick or --render")
    if command.rendered(options, render):
        return
    if options.device.type != "cuda":
        parser.error(f"--device must be a CUDA device, got {options.device}: on the CPU, bench_dropout.py measures")
    if not torch.cuda.is_available():
        parser.error(
            "there is no CUDA device here, or this build of torch cannot use it (torch.cuda.is_available() is False): "
            "nothing is measured"
        )
    torch.set_num_threads(options.threads)
    with torch.cuda.device(options.device):
        report = run(options.device, options.quick)
    command.write(report, options, RESULT, not options.quick)
    if options.fill is not None:
        cuda_summary.fill(options.fill, report)


if __name__ == "__main__":
    main()

"""Dropout on a CUDA device: against torch.nn's, eager and compiled, against a copy of the same bytes, and its overhead.

python benchmarks/bench_cuda.py [--fill benchmarks/README.md] [--quick] [--output FILE]
python benchmarks/bench_cuda.py --render FILE [--fill benchmarks/README.md]

Times are CUDA events', medians of interleaved rounds; a ratio is taken within each round. What is timed has passed its
checks first. What matters most comes first. The table says of each row what is required and whether it holds.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import bench_monte_carlo
import command
import cuda_summary
import machine
import memory
import monte_carlo_models
import torch
from cuda_contenders import BLOCK_P, DTYPE, Map, P, pair, quarters, wrong
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
)
from summary import BOTH, FORWARD
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import torchdrop
from torchdrop import kernels

RESULT = "cuda.json"

Size = Literal["whole", "quick", "tiny"]
Result = dict[str, Any]
Step = tuple[str, str, Callable[[], list[Result]]]
"""Where in the report its results go, its label, and what measures it."""

LARGE = ("dropout", "dropout_add", "gelu_dropout_add")


@dataclass(frozen=True)
class Cell:
    """One question: this operation, at this size, in this direction.

    Args:
        section: where it is shown and what is asked of it.
        operation: "dropout" of one tensor, "dropout_add" or "gelu_dropout_add" of two, or "block", a transformer's.
        elements: of each tensor.
        mode: forward, or forward and backward.
        shape: of a block's input, (batch, length, width).
    """

    section: str
    operation: str
    elements: int
    mode: str = BOTH
    shape: tuple[int, ...] = ()

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Small multiples of 1/4 other than 0, of which dropout at 1/2 and sums are exact in bfloat16."""
        seeds = (1, 2)[: 2 if self.operation.endswith("_add") else 1]
        shape = self.shape or (self.elements,)
        return tuple(
            quarters(self.elements, device, seed).view(shape).requires_grad_(self.mode == BOTH) for seed in seeds
        )

    def label(self) -> str:
        size = self.shape or f"2^{self.elements.bit_length() - 1}"
        return f"{self.operation}, {size}, {self.mode}"

    def pair(self, device: torch.device) -> tuple[Map, Map]:
        """torchdrop's and torch.nn's."""
        return pair(self.operation, self.shape[-1] if self.shape else 0, device)


def cells(size: Size) -> Iterator[Cell]:
    """In the order in which they are measured."""
    large = {"whole": 2**28, "quick": 2**22, "tiny": 2**12}[size]
    for operation in LARGE:
        yield Cell("large", operation, large)
    shape = (2, 16, 64) if size == "tiny" else (8, 512, 1024)
    yield Cell("block", "block", math.prod(shape), BOTH, shape)
    for mode in (FORWARD, BOTH):
        for exponent in range(10, 17, 2) if size == "whole" else (10, 16):
            yield Cell("launch", "dropout", 2**exponent, mode)


def contenders(cell: Cell, device: torch.device, backend: str = "inductor") -> dict[str, Map]:
    ours, stock = cell.pair(device)
    maps: dict[str, Map] = {OURS: ours, STOCK: stock}
    if cell.section != "launch":
        maps |= compiled(ours, stock, backend)
    return maps


def compiled(ours: Map, stock: Map, backend: str = "inductor") -> dict[str, Map]:
    """Compiled anew, so that no limit on recompilations is met."""
    torch.compiler.reset()
    inductor.compile_threads = 1
    return {
        COMPILED_STOCK: torch.compile(stock, dynamic=False, fullgraph=True, backend=backend),
        COMPILED_OURS: torch.compile(ours, dynamic=False, fullgraph=True, backend=backend),
    }


def fault(
    name: str, function: Map, inputs: Sequence[Tensor], operation: str = "dropout", eager: Map | None = None
) -> str | None:
    """Why a contender is not timed: "wrong: ..." or "n/a: ...". None where it computes what it should."""
    try:
        found = wrong(operation, function, inputs, eager if name == COMPILED_OURS else None)
    except Exception as error:  # a compiler that is missing or fails is a result too
        if name not in (COMPILED_STOCK, COMPILED_OURS):
            raise
        lines = str(error).strip().splitlines() or [""]
        return f"n/a: {type(error).__name__}: {lines[0][:120]}"
    return found and f"wrong: {found}"


def _both(function: Map, inputs: Sequence[Tensor], g: Tensor) -> Call:
    """Gradients of inputs and parameters."""
    wanted = [*inputs, *(function.parameters() if isinstance(function, nn.Module) else ())]
    return lambda: torch.autograd.grad(function(*inputs), wanted, g)


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
    backend: str = "inductor",
) -> Result:
    """The cell's result: for each contender its seconds and, against torchdrop, the ratio of times, or its fault."""
    maps = contenders(cell, device, backend) if maps is None else maps
    given = cell.inputs(device)
    faults = {name: fault(name, function, given, cell.operation, maps.get(OURS)) for name, function in maps.items()}
    for name, why in faults.items():
        if why:
            print(f"    {cell.label()}, {name}: {why}", flush=True)
    least = 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    inputs = list(zip(*[copies(x, least) for x in given], strict=True))
    calls = {name: step(function, cell, inputs) for name, function in maps.items() if not faults[name]}
    if cell.section == "large" and cell.operation == "dropout":
        calls[COPY] = copying(given[0])
    compared = compare(calls, effort, clock or clock_for(device))
    result: Result = {
        "section": cell.section, "label": cell.label(), "operation": cell.operation, "elements": cell.elements,
        "mode": cell.mode, "dtype": str(DTYPE).removeprefix("torch."), "p": BLOCK_P if cell.operation == "block" else P,
        "rounds": compared.rounds,
        "contenders": {name: {"fault": why} for name, why in faults.items() if why},
    }  # fmt: skip
    for name in calls:
        entry: dict[str, Any] = {"seconds": compared.seconds(name), "calls_per_round": compared.counts[name]}
        if name != OURS and not faults[OURS]:
            entry["times_torchdrop"] = compared.ratio(name, OURS)
        if name == COMPILED_OURS and COMPILED_STOCK in calls:
            entry["times_torch_compiled"] = compared.ratio(name, COMPILED_STOCK)
        if cell.operation == "block":  # its function is compiled already
            entry["kept"] = memory.saved_bytes(maps[name], given[0]).live / cell.elements
        result["contenders"][name] = entry
    return result


def kept_and_peak(
    operation: str, device: torch.device, sizes: Sequence[int], backend: str = "inductor"
) -> list[Result]:
    """For each contender, bytes an element that are kept for backward, and at the peak of both passes.

    They are the differences between two sizes, so what does not grow is not in them.
    """
    found = []
    for name in (OURS, STOCK, COMPILED_STOCK, COMPILED_OURS):
        result: Result = {"operation": operation, "contender": name, "sizes": list(sizes)}
        try:
            small, large = (_bytes(operation, name, n, device, backend) for n in sizes)
        except Exception as error:  # as in `fault`
            if name not in (COMPILED_STOCK, COMPILED_OURS):
                raise
            found.append(result | {"fault": f"n/a: {type(error).__name__}"})
            continue
        for what in ("kept", "peak"):
            result[what] = (large[what] - small[what]) / (sizes[1] - sizes[0])
        found.append(result)
    return found


def _bytes(operation: str, name: str, n: int, device: torch.device, backend: str) -> dict[str, int]:
    cell = Cell("large", operation, n)
    function = contenders(cell, device, backend)[name]
    given = cell.inputs(device)
    x, others = given[0], [other.detach() for other in given[1:]]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # blocks that are larger than what is asked for would count as a whole
    saved = memory.saved_bytes(lambda x: function(x, *others), x)
    return {"kept": saved.largest, "peak": memory.peak_bytes(_both(function, given, torch.ones_like(x)), device)}


def new_rates(device: torch.device, n: int = 2**20) -> list[Result]:
    """Whether a layer's new keep_prob takes effect in a compiled function whose graph was captured with another one."""
    torch.compiler.reset()
    inductor.compile_threads = 1
    counters.clear()
    layer = torchdrop.Dropout(P).to(device)
    step = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    x = torch.ones(n, device=device, dtype=DTYPE, requires_grad=True)
    asked, kept, compilations = (P, P, P, 0.9, 0.25, 0.75), [], []
    for keep_prob in asked:
        layer.keep_prob = keep_prob
        torch.compiler.cudagraph_mark_step_begin()
        y = step(x)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        kept.append([float(one.count_nonzero()) / n for one in (y, gradient)])
        compilations.append(counters["stats"]["unique_graphs"])
    skipped = counters["inductor"]["cudagraph_skips"]
    return [
        {
            "elements": n, "asked": asked[3:], "kept": kept[3:],
            "recompilations": compilations[-1] - compilations[2], "graphs_skipped": skipped,
        }
    ]  # fmt: skip


def cell_row(result: Result) -> list[str]:
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


_WIDTHS = [48, 10, 10, 17, 18, 10]


def steps(device: torch.device, size: Size) -> Iterator[Step]:
    """All that is measured, what matters most first. A whole run takes less than five minutes."""
    large, small = (Effort(budget=4.0, batch=2e-2), Effort(budget=1.5, batch=2e-2))
    if size != "whole":
        large = small = Effort(budget=0.5 if size == "quick" else 0.0, min_rounds=5 if size == "quick" else 3)
    sizes = {"whole": (2**24, 2**26), "quick": (2**16, 2**18), "tiny": (2**12, 2**14)}[size]
    backend = "aot_eager" if size == "tiny" else "inductor"

    def timed(cell: Cell, effort: Effort) -> Step:
        return "cells", cell.label(), lambda: [measure(cell, device, effort, backend=backend)]

    there = list(cells(size))
    yield from (timed(cell, large) for cell in there if cell.section == "large")
    for operation in LARGE:
        yield "memory", f"bytes of {operation}", partial(kept_and_peak, operation, device, sizes, backend)
    yield from (timed(cell, large) for cell in there if cell.section == "block")
    yield from (timed(cell, small) for cell in there if cell.section == "launch")
    yield "rates", "new keep_prob", partial(new_rates, device, 2**12 if size == "tiny" else 2**20)
    for case in monte_carlo_models.timed(size != "whole"):
        if size == "whole":
            case = replace(case, samples=50)
        elif size == "tiny":
            case = replace(case, samples=5, shape=(4, *case.shape[1:]))
        yield "monte_carlo", case.label, lambda case=case: [bench_monte_carlo.measure(case, device, large)]


def _show(place: str, label: str, results: list[Result]) -> None:
    for result in results:
        if place == "cells":
            print(text_row(cell_row(result), _WIDTHS), flush=True)
        elif place == "memory":
            print("bytes an element:", ", ".join(cuda_summary.memory_row(result)), flush=True)
        else:
            shown = cuda_summary.rates(result) if place == "rates" else cuda_summary.monte_carlo(result)
            print(f"{label}: {shown[0]}", flush=True)


def run(device: torch.device, size: Size, save: Callable[[Result], None] | None = None) -> Result:
    """Measures everything, printing as it goes. `save` gets what there is after each step; none is ended by another."""
    begin = time.perf_counter()
    report: Result = {
        "machine": machine.describe(device), "quick": size != "whole", "failed": {}, "took": {},
        "backend": kernels.backend_for(device, DTYPE).NAME,
    }  # fmt: skip
    report |= {place: [] for place in cuda_summary.PLACES}
    print("\n".join(f"{name}: {value}" for name, value in report["machine"].items()))
    print(f"torchdrop's backend: {report['backend']}\n\n{text_row(cuda_summary.CELL_HEADER, _WIDTHS)}")
    for place, label, measured in steps(device, size):
        started = time.perf_counter()
        try:
            results = measured()
        except Exception as error:
            traceback.print_exc()
            report["failed"][label] = f"{type(error).__name__}: {error}"[:500]
        else:
            report[place] += results
            _show(place, label, results)
        report["summary"] = cuda_summary.verdicts(report)
        report["took"][label] = round(time.perf_counter() - started, 1)
        report["seconds"] = round(time.perf_counter() - begin, 1)
        if save is not None:
            save(report)
    print(f"\nsummary, after {report['seconds']:.0f} s\n{cuda_summary.text(report)}")
    return report


def render(report: Result) -> str:
    """A report as markdown: machine, summary, times and bytes."""
    rows = [cell_row(result) for result in report["cells"]]
    return cuda_summary.markdown(report, rows)


def _fill(file: Path | None, report: Result) -> None:
    if file is not None:
        command.fill(file, cuda_summary.MARKERS, cuda_summary.section(report))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, RESULT, "smaller tensors and fewer rounds, nothing judged")
    parser.add_argument("--device", default="cuda", type=torch.device, help="which CUDA device: cuda, or cuda:1")
    parser.add_argument(
        "--fill", type=Path, metavar="FILE", help="put the table between the markers for it in a markdown file"
    )
    options = parser.parse_args(arguments)
    if options.fill is not None and not cuda_summary.has_place(options.fill):
        parser.error(f"--fill: {options.fill} has no lines {' and '.join(cuda_summary.MARKERS)}")
    if options.fill is not None and options.quick:
        parser.error("--fill is for a whole run: not with --quick")
    if command.rendered(options, render):
        _fill(options.fill, json.loads(options.render.read_text(encoding="utf-8")))
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
        report = run(options.device, "quick" if options.quick else "whole")
    command.write(report, options, RESULT, not options.quick)
    _fill(options.fill, report)


if __name__ == "__main__":
    main()

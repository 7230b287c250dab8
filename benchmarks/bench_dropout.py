"""Dropout against torch.nn's, eager and compiled, and against ``x * s`` as the limit: time and memory.

python benchmarks/bench_dropout.py [--threads 2] [--quick] [--output FILE]
python benchmarks/bench_dropout.py --render FILE
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import checks
import command
import machine
import memory
import summary
import torch
from harness import (
    Call,
    Effort,
    clock_for,
    compare,
    copies,
    digits,
    duration,
    factor,
    rotating,
    settle_allocator,
    text_row,
    text_table,
)
from torch import Tensor, nn
from torch._inductor import config as inductor

import torchdrop

OURS, STOCK, LIMIT = summary.OURS, summary.STOCK, summary.LIMIT
COMPILED_STOCK, COMPILED_OURS = "torch.nn compiled", "torchdrop compiled"
COLUMNS = [OURS, STOCK, COMPILED_STOCK, COMPILED_OURS, LIMIT]
FORWARD, BOTH, BACKWARD = summary.FORWARD, summary.BOTH, summary.BACKWARD

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cell:
    """One question: this input, at this rate, in this direction."""

    section: str
    shape: tuple[int, ...]
    mode: str = FORWARD
    p: float = 0.5
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    module: str = "Dropout"
    compiled: bool = False

    @property
    def channels(self) -> int | None:
        return 2 if self.module == "Dropout2d" else None

    def input(self, device: torch.device) -> Tensor:
        """Without zeros, in this cell's layout, and wanting a gradient where the mode has a backward."""
        x = checks.sample(self.shape, self.dtype, device)
        if self.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif self.layout == "transposed":
            x = checks.sample(self.shape[::-1], self.dtype, device).t()
        elif self.layout == "every second":
            x = checks.sample((*self.shape[:-1], 2 * self.shape[-1]), self.dtype, device)[..., ::2]
        return x.requires_grad_(self.mode != FORWARD)

    def label(self) -> str:
        """What tells this cell from the others of its section."""
        n = 1
        for size in self.shape:
            n *= size
        power = len(self.shape) == 1 and n & (n - 1) == 0
        parts = [f"2^{n.bit_length() - 1}" if power else "x".join(map(str, self.shape))]
        parts += [f"p={self.p:g}"] if self.p != 0.5 else []
        parts += [str(self.dtype).removeprefix("torch.")] if self.section == "dtypes" else []
        parts += [self.layout] if self.section in ("layouts", "channels") else []
        return " ".join([*parts, self.mode])


def cells(quick: bool) -> Iterator[Cell]:
    """In the order in which they are shown."""
    sizes = [6, 12, 18, 20] if quick else range(6, 25, 2)
    with_compiler = () if quick else (10, 16, 20, 22)
    for mode in (FORWARD, BOTH):
        for e in sizes:
            yield Cell(mode, (2**e,), mode, compiled=e in with_compiler)
    for e in (20,) if quick else (10, 16, 20, 22):
        yield Cell("rate", (2**e,), p=0.1)
        yield Cell("rate", (2**e,), BOTH, p=0.1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for mode in (FORWARD,) if quick else (FORWARD, BOTH):
            yield Cell("dtypes", (2**20,), mode, dtype=dtype)
    images = (8, 64, 28, 28) if quick else (32, 64, 56, 56)
    for layout, shape in (
        ("contiguous", images),
        ("channels_last", images),
        ("transposed", (2048, 512)),
        ("every second", (2048, 512)),
    ):
        for mode in (FORWARD,) if quick else (FORWARD, BOTH):
            yield Cell("layouts", shape, mode, layout=layout)
    for layout in ("contiguous", "channels_last"):
        for mode in (FORWARD, BOTH, BACKWARD):
            yield Cell("channels", (64, 256, 14, 14), mode, layout=layout, module="Dropout2d")


def contenders(cell: Cell) -> dict[str, Map]:
    """All as calls of a module but the limit, which is a multiplication by a number."""
    ours, stock = getattr(torchdrop, cell.module)(cell.p), getattr(nn, cell.module)(cell.p)
    maps: dict[str, Map] = {OURS: ours, STOCK: stock}
    if cell.compiled:
        torch.compiler.reset()
        inductor.compile_threads = 1
        maps[COMPILED_STOCK] = torch.compile(getattr(nn, cell.module)(cell.p), dynamic=False)
        maps[COMPILED_OURS] = torch.compile(getattr(torchdrop, cell.module)(cell.p), dynamic=False)
    scale = 1.0 / (1.0 - cell.p)
    maps[LIMIT] = lambda x: x * scale
    return maps


def fault(name: str, function: Map, cell: Cell, x: Tensor) -> str | None:
    """Why a contender is not timed: "wrong: ..." or "n/a: ...". None where it computes what it should."""
    try:
        if name == LIMIT:
            found = checks.scaling_fault(function, x, 1.0 / (1.0 - cell.p))
        else:
            found = checks.dropout_fault(function, x, cell.p, cell.channels)
    except Exception as error:  # a compiler that is missing or fails is a result too
        if name not in (COMPILED_STOCK, COMPILED_OURS):
            raise
        lines = str(error).strip().splitlines() or [""]
        return f"n/a: {type(error).__name__}: {lines[0][:120]}"
    return found and f"wrong: {found}"


def _both(function: Map, x: Tensor, g: Tensor) -> Call:
    return lambda: torch.autograd.grad(function(x), x, g)


def step(function: Map, cell: Cell, inputs: Sequence[Tensor]) -> Call:
    """What is timed."""
    if cell.mode == FORWARD:
        return rotating([partial(function, x) for x in inputs])
    g = torch.empty_like(inputs[0], requires_grad=False).normal_()
    if cell.mode == BOTH:
        return rotating([_both(function, x, g) for x in inputs])
    x = inputs[0]
    y = function(x)
    return partial(torch.autograd.grad, y, x, g, retain_graph=True)


def measure(cell: Cell, device: torch.device, effort: Effort, maps: dict[str, Map] | None = None) -> dict[str, Any]:
    """The cell's result: for each contender its seconds and, against torchdrop, the ratio of times, or its fault."""
    maps = contenders(cell) if maps is None else maps
    x = cell.input(device)
    faults = {name: fault(name, function, cell, x) for name, function in maps.items()}
    for name, why in faults.items():
        if why:
            print(f"    {cell.label()}, {name}: {why}", flush=True)
    least = 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    inputs = copies(x, least)
    calls = {name: step(function, cell, inputs) for name, function in maps.items() if not faults[name]}
    compared = compare(calls, effort, clock_for(device))
    result: dict[str, Any] = {
        "section": cell.section, "label": cell.label(), "mode": cell.mode, "shape": list(cell.shape),
        "elements": x.numel(), "p": cell.p, "dtype": str(cell.dtype).removeprefix("torch."), "layout": cell.layout,
        "module": cell.module, "rounds": compared.rounds, "contenders": {},
    }  # fmt: skip
    for name, why in faults.items():
        entry: dict[str, Any] = {"fault": why} if why else {
            "seconds": compared.seconds(name), "calls_per_round": compared.counts[name]
        }  # fmt: skip
        if not why and not faults[OURS] and name != OURS:
            entry["times_torchdrop"] = compared.ratio(name, OURS)
        result["contenders"][name] = entry
    return result


def cell_row(result: dict[str, Any]) -> list[str]:
    row = [result["label"]]
    for name in COLUMNS:
        entry = result["contenders"].get(name)
        if entry is None:
            row.append("-")
        elif "fault" in entry:
            row.append(entry["fault"].partition(":")[0])
        else:
            row.append(duration(entry["seconds"][1]))
    found = result["contenders"]
    stock, limit = (found.get(name, {}).get("times_torchdrop") for name in (STOCK, LIMIT))
    row.append(factor(stock) if stock else "-")
    row.append(factor(summary.inverse(limit)) if limit else "-")
    return row


CELL_HEADER = ["cell", *COLUMNS, "torch.nn / torchdrop", "torchdrop / x * s"]
_CELL_WIDTHS = [46, 10, 10, 17, 18, 10, 26, 26]

QUESTIONS = {
    FORWARD: "forward, float32, p=0.5, over sizes",
    BOTH: "forward and backward, float32, p=0.5, over sizes",
    "rate": "p=0.1: torch.nn's cost depends on p",
    "dtypes": "element types at 2^20",
    "layouts": "memory formats and strides",
    "channels": "channel dropout 2d",
}


def memory_cells(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Bytes kept for backward at sizes of both of torchdrop's paths, and the peaks of the largest."""
    results = []
    makers: dict[str, Callable[[str], Map]] = {
        OURS: lambda module: getattr(torchdrop, module)(0.5),
        STOCK: lambda module: getattr(nn, module)(0.5),
        COMPILED_STOCK: lambda module: torch.compile(getattr(nn, module)(0.5), dynamic=False),
        COMPILED_OURS: lambda module: torch.compile(getattr(torchdrop, module)(0.5), dynamic=False),
        LIMIT: lambda module: lambda x: x * 2.0,
    }
    flat: list[tuple[int, ...]] = [(2**8,), (2**12,), (2**16,), (2**20,)]
    images: list[tuple[int, ...]] = [(4, 256, 14, 14), (64, 256, 14, 14)]
    for module, shapes in (("Dropout", flat), ("Dropout2d", images)):
        for name, maker in makers.items():
            if name in (COMPILED_STOCK, COMPILED_OURS) and (quick or module != "Dropout"):
                continue
            try:
                results.append(_memory_cell(name, module, maker, shapes, device))
            except Exception as error:  # as in `fault`
                if name not in (COMPILED_STOCK, COMPILED_OURS):
                    raise
                results.append({"contender": name, "module": module, "fault": f"n/a: {type(error).__name__}"})
    return results


def _memory_cell(
    name: str, module: str, maker: Callable[[str], Map], shapes: list[tuple[int, ...]], device: torch.device
) -> dict[str, Any]:
    saved = []
    for shape in shapes:
        torch.compiler.reset()
        function, x = maker(module), checks.sample(shape, torch.float32, device).requires_grad_()
        found = memory.saved_bytes(function, x)
        saved.append(
            {
                "elements": x.numel(),
                "hooks": found.hooks,
                "graph": found.graph,
                "live": found.live,
                "bytes": found.largest,
            }
        )
    g, plain = torch.ones_like(x), x.detach()
    pairs = list(itertools.pairwise(saved))
    result: dict[str, Any] = {
        "contender": name,
        "module": module,
        "elements": x.numel(),
        "saved": saved,
        "saved_per_element": max((b["bytes"] - a["bytes"]) / (b["elements"] - a["elements"]) for a, b in pairs),
        "peak_forward": memory.peak_bytes(lambda: function(plain), device),
        "peak_both": memory.peak_bytes(_both(function, x, g), device),
    }
    if device.type == "cpu" and module == "Dropout" and name in (OURS, STOCK, LIMIT):
        large = torch.ones(2**24)
        grown = memory.peak_resident(lambda: function(large))
        result["peak_resident_per_element"] = None if grown is None else grown / large.numel()
    return result


def memory_row(result: dict[str, Any]) -> list[str]:
    title = [result["module"], result["contender"]]
    if "fault" in result:
        return [*title, result["fault"], *["-"] * 6]
    last, n, resident = result["saved"][-1], result["elements"], result.get("peak_resident_per_element")
    return [
        *title,
        str(n),
        *[str(last[kind]) for kind in ("hooks", "graph", "live")],
        digits(result["saved_per_element"]),
        *[digits(result[kind] / n) for kind in ("peak_forward", "peak_both")],
        "-" if resident is None else digits(resident),
    ]


MEMORY_HEADER = [
    "module", "contender", "elements", "saved: hooks", "in the graph", "live", "saved/element",
    "peak/element forward", "both", "resident, 2^24",
]  # fmt: skip


def run(device: torch.device, quick: bool) -> dict[str, Any]:
    """Measures everything, printing as it goes."""
    effort = Effort(budget=0.25, min_rounds=5) if quick else Effort()
    begin = time.perf_counter()
    settle_allocator()
    report: dict[str, Any] = {"machine": machine.describe(device), "quick": quick, "cells": []}
    print("\n".join(f"{name}: {value}" for name, value in report["machine"].items()))
    busy = report["machine"]["load_before"]
    if busy is not None and busy > 0.3:
        print(f"the machine is not idle (load {busy}): timings on several threads suffer most")
    section = None
    for cell in cells(quick):
        if cell.section != section:
            section = cell.section
            print(f"\n{QUESTIONS[section]}\n{text_row(CELL_HEADER, _CELL_WIDTHS)}")
        report["cells"].append(measure(cell, device, effort))
        print(text_row(cell_row(report["cells"][-1]), _CELL_WIDTHS), flush=True)
    print("\nmemory, float32, bytes")
    report["memory"] = memory_cells(device, quick)
    print(text_table(MEMORY_HEADER, [memory_row(result) for result in report["memory"]], left=2))
    report["summary"] = summary.verdicts(report)
    report["seconds"] = round(time.perf_counter() - begin, 1)
    print(f"\nsummary, after {report['seconds']:.0f} s")
    print(summary.text(report))
    return report


def render(report: dict[str, Any]) -> str:
    """A report as markdown: machine, summary, and the cells with their ratios."""
    parts = [summary.markdown(report)]
    for section, question in QUESTIONS.items():
        rows = [cell_row(result) for result in report["cells"] if result["section"] == section]
        if rows:
            parts.append(f"### {question}\n\n{summary.markdown_table(CELL_HEADER, rows)}")
    if report.get("memory"):
        table = summary.markdown_table(MEMORY_HEADER, [memory_row(result) for result in report["memory"]])
        parts.append(f"### memory, float32, bytes\n\n{table}")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "dropout-DEVICE.json", "fewer cells and rounds, no compiled contenders")
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu or cuda")
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here, or this build of torch cannot use it")
    torch.set_num_threads(options.threads)
    report = run(options.device, options.quick)
    command.write(report, options, f"dropout-{options.device.type}.json", not options.quick)


if __name__ == "__main__":
    main()

"""Dropout fused with what stands beside it, against the same from separate operators, torchdrop's own and torch.nn's.

python benchmarks/bench_fused.py [--threads 2] [--quick] [--output FILE]
python benchmarks/bench_fused.py --render FILE
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import checks
import command
import machine
import summary
import torch
import torch.nn.functional as F
from harness import Effort, compare, digits, duration, factor, markdown_table, settle_allocator, text_table
from torch import Tensor, nn

import torchdrop

RESULT = "fused-cpu.json"
FUSED, SEPARATE, STOCK = "fused", "separate", "torch.nn"
P = 0.5
FEATURES = 1024
GELU_ERROR = 4e-6
"""How far torch's GELU in float32 is from the function: 1e-6, times the scale of 2."""

Result = dict[str, Any]
Map = Callable[..., Tensor]


@dataclass(frozen=True)
class Operation:
    """What is fused, and its plain parts.

    Args:
        label: as in tables.
        fused: makes the module.
        parts: the same of the operands and a dropout layer.
        inputs: how many operands there are.
        required: how many times faster than the separate operators it must be at 2^20; 0 where nothing is required.
    """

    label: str
    fused: Callable[[], Map]
    parts: Callable[..., Tensor]
    inputs: int = 1
    required: float = 0.0


OPERATIONS = [
    Operation("dropout_add", lambda: torchdrop.DropoutAdd(P), lambda d, x, r: r + d(x), 2, 1.3),
    Operation("bias_dropout_add", lambda: torchdrop.BiasDropoutAdd(P), lambda d, x, b, r: r + d(x + b), 3),
    Operation("relu_dropout", lambda: torchdrop.ReLUDropout(P), lambda d, x: d(F.relu(x)), 1, 1.3),
    Operation("gelu_dropout", lambda: torchdrop.GELUDropout(P), lambda d, x: d(F.gelu(x))),
]


@dataclass(frozen=True)
class Cell:
    """One operation on `rows` rows of features."""

    operation: Operation
    rows: int
    dtype: torch.dtype = torch.float32

    def operands(self) -> list[Tensor]:
        """All wanting a gradient; the second of three is a bias."""
        shapes = [(self.rows, FEATURES)] * self.operation.inputs
        if self.operation.inputs == 3:
            shapes[1] = (FEATURES,)  # type: ignore[assignment]
        return [checks.sample(s, self.dtype, "cpu", seed).requires_grad_() for seed, s in enumerate(shapes)]


def cells(quick: bool) -> Iterator[Cell]:
    for operation in OPERATIONS:
        for rows in (4,) if quick else (4, 64, 1024, 4096):
            yield Cell(operation, rows)
        if not quick:
            yield Cell(operation, 1024, torch.bfloat16)


def contenders(cell: Cell) -> dict[str, Map]:
    operation = cell.operation
    return {
        FUSED: operation.fused(),
        SEPARATE: partial(operation.parts, torchdrop.Dropout(P)),
        STOCK: partial(operation.parts, nn.Dropout(P)),
    }


def fault(function: Map, cell: Cell, operands: Sequence[Tensor]) -> str | None:
    """What is wrong with a contender: each element is what a dropped or a kept one is, at the right rate, and gradients
    are those of the plain parts under the output's mask, wherever dropped and kept can be told apart."""
    wide = [operand.detach().double().requires_grad_() for operand in operands]
    with torch.no_grad():
        dropped, kept = (cell.operation.parts(lambda x, s=s: x * s, *wide) for s in (0.0, 1 / (1 - P)))
    y = function(*operands)
    g = checks.sample(tuple(y.shape), y.dtype, "cpu", 7)
    gradients = torch.autograd.grad(y, operands, g)
    rounding, out = max(2 * torch.finfo(y.dtype).eps, GELU_ERROR), y.detach().double()
    allowed = rounding * (1 + dropped.abs() + kept.abs())
    was_kept = (out - kept).abs() <= allowed
    if not bool((was_kept | ((out - dropped).abs() <= allowed)).all()):
        return "an element that is neither dropped nor kept"
    told = (kept - dropped).abs() > 3 * allowed
    share, n = float(was_kept[told].double().mean()), int(told.sum())
    if abs(share - (1 - P)) > 6 * math.sqrt(P * (1 - P) / n):
        return f"a kept share of {share:.4f}"
    parts = cell.operation.parts(lambda x: x * was_kept / (1 - P), *wide)
    for found, right in zip(gradients, torch.autograd.grad(parts, wide, g.double()), strict=True):
        apart = (found.double() - right).abs()
        if right.shape == told.shape:
            wrong = told & (apart > 2 * rounding * (1 + g.double().abs() + right.abs()))
        else:  # a sum over the rows, those that cannot be told among them
            unknown = (~told * g.double().abs() / (1 - P)).sum_to_size(right.shape)
            wrong = apart > unknown + 0.02 * right.abs().mean()
        if bool(wrong.any()):
            return "a gradient of another mask"
    return None


def differ(cell: Cell, maps: dict[str, Map], operands: Sequence[Tensor]) -> str | None:
    """Whether the fused and the separate operators differ under one seed, where both round alike."""
    if cell.dtype != torch.float32:
        return None
    found = []
    for name in (FUSED, SEPARATE):
        torch.manual_seed(3)
        y = maps[name](*operands)
        found.append([y, *torch.autograd.grad(y, operands, torch.ones_like(y))])
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return None if same else "another result than that of the separate operators"


def measure(cell: Cell, effort: Effort) -> Result:
    """Forward and backward, with the gradients of all operands, of those that compute what they should."""
    operands, maps = cell.operands(), contenders(cell)
    faults = {name: fault(function, cell, operands) for name, function in maps.items()}
    faults[FUSED] = faults[FUSED] or differ(cell, maps, operands)
    g = checks.sample(tuple(operands[0].shape), cell.dtype, "cpu", 9)

    def step(function: Map) -> object:
        return torch.autograd.grad(function(*operands), operands, g)

    compared = compare({n: partial(step, f) for n, f in maps.items() if not faults[n]}, effort)
    found: Result = {}
    for name in maps:
        found[name] = {"fault": f"wrong: {faults[name]}"} if faults[name] else {"seconds": compared.seconds(name)}
        if name != FUSED and not faults[name] and not faults[FUSED]:
            found[name]["times_fused"] = compared.ratio(name, FUSED)
    return {
        "label": cell.operation.label, "elements": cell.rows * FEATURES, "required": cell.operation.required,
        "dtype": str(cell.dtype).removeprefix("torch."), "rounds": compared.rounds, "contenders": found,
    }  # fmt: skip


def verdict(cell: Result) -> dict[str, str]:
    """The row that says whether the fused operator is as much faster than the separate ones as it must be."""
    found = cell["contenders"]
    ratio = found[SEPARATE].get("times_fused")
    shown = factor(ratio) if ratio else found[FUSED].get("fault") or found[SEPARATE].get("fault")
    return {
        "case": f"{cell['label']}, float32, 2^20, forward + backward",
        "required": f"{cell['required']:g} times faster than separate",
        "measured": shown,
        "verdict": "ok" if ratio and ratio[1] >= cell["required"] else "short",
    }


def verdicts(report: Result) -> list[dict[str, str]]:
    judged = [c for c in report["cells"] if c["required"] and c["elements"] == 2**20 and c["dtype"] == "float32"]
    return [verdict(cell) for cell in judged]


HEADER = ["operation", "elements", "dtype", FUSED, SEPARATE, STOCK, "separate / fused", "torch.nn / fused"]


def row(cell: Result) -> list[str]:
    entries = [cell["contenders"][name] for name in (FUSED, SEPARATE, STOCK)]
    times = [entry["fault"] if "fault" in entry else duration(entry["seconds"][1]) for entry in entries]
    ratios = [f"{digits(e['times_fused'][1])}x" if "times_fused" in e else "-" for e in entries[1:]]
    n = cell["elements"]
    return [cell["label"], f"2^{n.bit_length() - 1}", cell["dtype"], *times, *ratios]


def run(quick: bool) -> Result:
    """Measures everything."""
    begin = time.perf_counter()
    settle_allocator()
    report: Result = {"machine": machine.describe(torch.device("cpu")), "quick": quick}
    effort = Effort(budget=0.2, min_rounds=3) if quick else Effort(budget=6.0)
    report["cells"] = [measure(cell, effort) for cell in cells(quick)]
    report["summary"] = verdicts(report)
    report["machine"]["load_after"] = machine.load()
    report["seconds"] = round(time.perf_counter() - begin, 1)
    print(text_table(HEADER, [row(cell) for cell in report["cells"]], left=3))
    if report["summary"]:
        print(summary.text(report))
    return report


def render(report: Result) -> str:
    """A report as markdown: machine, summary, and the cells."""
    title = "forward + backward, with the gradients of all operands"
    return f"{summary.markdown(report)}\n\n### {title}\n\n{markdown_table(HEADER, [row(c) for c in report['cells']])}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = command.parser(__doc__, RESULT, "small inputs and few rounds, nothing judged").parse_args(arguments)
    if command.rendered(options, render):
        return
    torch.set_num_threads(options.threads)
    command.write(run(options.quick), options, RESULT, not options.quick)


if __name__ == "__main__":
    main()

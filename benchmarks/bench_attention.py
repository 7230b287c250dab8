"""Attention with dropout of its weights, forward and backward, against PyTorch's with and without dropout.

python benchmarks/bench_attention.py [--threads 2] [--quick] [--output FILE]
python benchmarks/bench_attention.py --render FILE
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
from torch import Tensor

from torchdrop.functional import scaled_dot_product_attention

RESULT = "attention-cpu.json"
OURS, STOCK, PLAIN = "torchdrop", "torch.nn", "without dropout"
P = 0.1
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""How far results may be from those in float64, relative to the largest: a few roundings of the element type."""

Result = dict[str, Any]
Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Cell:
    """One problem.

    Args:
        shape: samples, heads, positions and features.
        masked: whether some keys of each sample may not be seen.
        times: how many times faster than PyTorch's with dropout it must be; 0 where nothing is required.
        at_most: the most that its time may be, as a multiple of PyTorch's without dropout; 0 where nothing is required.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    masked: bool = False
    times: float = 0.0
    at_most: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.shape}{', masked keys' if self.masked else ''}"

    def operands(self) -> list[Tensor]:
        """Query, key and value, laid out as a projection makes them: heads beside each other in a row."""
        samples, heads, length, features = self.shape
        made = [checks.sample((samples, length, heads, features), self.dtype, "cpu", seed) for seed in range(3)]
        return [t.transpose(1, 2).requires_grad_() for t in made]

    def mask(self) -> Tensor | None:
        samples, _, length, _ = self.shape
        if not self.masked:
            return None
        lengths = torch.linspace(length / 2, length, samples).long()
        return torch.arange(length) < lengths.reshape(-1, 1, 1, 1)


def cells(quick: bool) -> Iterator[Cell]:
    single, half = torch.float32, torch.bfloat16
    if quick:
        yield from (Cell((2, 2, 16, 8), dtype, masked) for dtype in (single, half) for masked in (False, True))
        return
    yield Cell((2, 8, 1024, 64), single, times=3.5, at_most=1.4)
    yield Cell((2, 8, 1024, 64), half, times=5.0, at_most=1.4)
    for dtype in (single, half):
        yield from (Cell((8, 8, 256, 64), dtype, masked, at_most=1.3) for masked in (False, True))
        yield Cell((8, 4, 64, 32), dtype)
        yield Cell((8, 4, 16, 16), dtype, times=1.0)


CONTENDERS: dict[str, Attention] = {
    OURS: partial(scaled_dot_product_attention, dropout_p=P),
    STOCK: partial(F.scaled_dot_product_attention, dropout_p=P),
    PLAIN: F.scaled_dot_product_attention,
}


def fault(function: Attention, dtype: torch.dtype, masked: bool, p: float) -> str | None:
    """What is wrong with a contender, on a problem whose values are unit vectors, so that its output is its weights:
    each is zero, or the softmax divided by the keep probability, and gradients are those under the same mask."""
    problem = Cell((4, 4, 64, 64), dtype, masked)
    q, k, v = problem.operands()
    v = torch.eye(64, dtype=dtype).expand(v.shape).requires_grad_()
    y = function(q, k, v, problem.mask())
    g = checks.sample(tuple(y.shape), dtype, "cpu", 7)
    gradients = torch.autograd.grad(y, (q, k, v), g)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    scores = wide[0] @ wide[1].mT / 8
    mask = problem.mask()
    weights = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)
    kept, seen = y.detach() != 0, weights.detach() > 1e-3
    share = float(kept[seen].double().mean())
    if abs(share - (1 - p)) > 6 * math.sqrt(p * (1 - p) / int(seen.sum())):
        return f"a kept share of {share:.4f}"
    right = (weights * kept / (1 - p)) @ wide[2]
    expected = [right, *torch.autograd.grad(right, wide, g.double())]
    for name, a, b in zip(("output", "query", "key", "value"), (y, *gradients), expected, strict=True):
        if not bool((a.double() - b).abs().max() <= ERRORS[dtype] * b.abs().max()):
            return f"another {'output' if name == 'output' else f'gradient of {name}'}"
    return None


def kept_bytes(function: Attention, cell: Cell) -> int:
    """The bytes of the tensors that are kept for backward, each memory once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*cell.operands(), cell.mask())
    return sum(kept.values())


def measure(cell: Cell, effort: Effort) -> Result:
    """Forward and backward, with the gradients of query, key and value, of those that compute what they should."""
    operands, mask = cell.operands(), cell.mask()
    faults = {
        name: fault(function, cell.dtype, cell.masked, 0.0 if name == PLAIN else P)
        for name, function in CONTENDERS.items()
    }
    samples, heads, length, features = cell.shape
    g = checks.sample((samples, length, heads, features), cell.dtype, "cpu", 9).transpose(1, 2)

    def step(function: Attention) -> object:
        return torch.autograd.grad(function(*operands, mask), operands, g)

    compared = compare({n: partial(step, f) for n, f in CONTENDERS.items() if not faults[n]}, effort)
    found: Result = {}
    for name, function in CONTENDERS.items():
        found[name] = {"fault": f"wrong: {faults[name]}"} if faults[name] else {"seconds": compared.seconds(name)}
        found[name]["kept_bytes"] = kept_bytes(function, cell)
        if name != OURS and not faults[name] and not faults[OURS]:
            found[name]["times_torchdrop"] = compared.ratio(name, OURS)
            found[name]["of_torchdrop"] = compared.ratio(OURS, name)
    return {
        "label": cell.label, "dtype": str(cell.dtype).removeprefix("torch."), "times": cell.times,
        "at_most": cell.at_most, "rounds": compared.rounds, "contenders": found,
    }  # fmt: skip


def verdicts(report: Result) -> list[dict[str, str]]:
    """The rows that say whether attention is as fast as it must be."""
    rows = []
    for cell in report["cells"]:
        for bound, other, ratio, wording in (
            (cell["times"], STOCK, "times_torchdrop", "{:g} times faster than torch.nn's with dropout"),
            (cell["at_most"], PLAIN, "of_torchdrop", "at most {:g} times torch.nn's time without dropout"),
        ):
            if not bound:
                continue
            entry = cell["contenders"][other]
            found = entry.get(ratio)
            fits = found is not None and (found[1] >= bound if other == STOCK else found[1] <= bound)
            rows.append(
                {
                    "case": f"{cell['label']}, {cell['dtype']}, forward + backward",
                    "required": wording.format(bound),
                    "measured": factor(found)
                    if found
                    else cell["contenders"][OURS].get("fault") or entry.get("fault", "not measured"),
                    "verdict": "ok" if fits else "short",
                }
            )
    return rows


HEADER = ["shape", "dtype", OURS, STOCK, PLAIN, "torch.nn / ours", "ours / without", "kept, ours", "kept, torch.nn"]


def row(cell: Result) -> list[str]:
    entries = [cell["contenders"][name] for name in (OURS, STOCK, PLAIN)]
    times = [entry["fault"] if "fault" in entry else duration(entry["seconds"][1]) for entry in entries]
    ratios = [
        f"{digits(cell['contenders'][name][ratio][1])}x" if ratio in cell["contenders"][name] else "-"
        for name, ratio in ((STOCK, "times_torchdrop"), (PLAIN, "of_torchdrop"))
    ]
    kept = [f"{digits(cell['contenders'][name]['kept_bytes'] / 2**20)} MiB" for name in (OURS, STOCK)]
    return [cell["label"], cell["dtype"], *times, *ratios, *kept]


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
    print(text_table(HEADER, [row(cell) for cell in report["cells"]], left=2))
    if report["summary"]:
        print(summary.text(report))
    return report


def render(report: Result) -> str:
    """A report as markdown: machine, summary, and the cells."""
    title = "forward + backward, with the gradients of query, key and value"
    return f"{summary.markdown(report)}\n\n### {title}\n\n{markdown_table(HEADER, [row(c) for c in report['cells']])}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = command.parser(__doc__, RESULT, "small inputs and few rounds, nothing judged").parse_args(arguments)
    if command.rendered(options, render):
        return
    torch.set_num_threads(options.threads)
    command.write(run(options.quick), options, RESULT, not options.quick)


if __name__ == "__main__":
    main()

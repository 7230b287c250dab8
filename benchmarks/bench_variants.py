"""The dropout variants: their cost against other packages' and against the plain operation, rates, and float16.

python benchmarks/bench_variants.py [--threads 2] [--quick] [--output FILE]
python benchmarks/bench_variants.py --render FILE
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import checks
import command
import compact
import machine
import torch
import variants_own
import variants_summary
from harness import Effort, compare, settle_allocator
from torch import Tensor
from variants_peers import OURS, PEERS, TIMM, TORCHVISION, Map, Peer, block_fault

from torchdrop import DropBlock2d, DropPath, StochasticDepth

LIMIT = "x * s"
RESULT = "variants-cpu.json"
SHAPE = (32, 96, 28, 28)
P = 0.1

Result = dict[str, Any]
Fault = Callable[[Map, Tensor], str | None]


@dataclass(frozen=True)
class Case:
    """One variant beside those that it can stand in for.

    Args:
        label: as in tables.
        ours: makes torchdrop's.
        peers: makes the others', from their loaded modules, by the name of a package; a name may say which form, after
            a comma.
        fault: what is wrong with one of them.
        required: how many times faster torchdrop's must be; 0 where nothing is required.
    """

    label: str
    ours: Callable[[], Map]
    peers: dict[str, Callable[[Any], Map]]
    fault: Fault
    required: float = 2.0


def _rows(function: Map, x: Tensor) -> str | None:
    return checks.dropout_fault(function, x, P, channels=1)


def _blocks(function: Map, x: Tensor) -> str | None:
    return block_fault(function, x, 7)


CASES = [
    Case("DropPath(0.1)", lambda: DropPath(P), {TIMM: lambda timm: timm.DropPath(P)}, _rows),
    Case(
        "StochasticDepth(0.1, 'row')",
        lambda: StochasticDepth(P, "row"),
        {TORCHVISION: lambda ops: ops.StochasticDepth(P, "row")},
        _rows,
    ),
    Case(
        "DropBlock2d(0.1, 7)",
        lambda: DropBlock2d(P, 7),
        {
            TORCHVISION: lambda ops: ops.DropBlock2d(P, 7),
            TIMM: lambda timm: timm.DropBlock2d(P, 7, couple_channels=False),
        },
        _blocks,
    ),
    Case(
        "DropBlock2d(0.1, 7), one mask for all channels",
        lambda: DropBlock2d(P, 7, shared_axes=1),
        {TIMM: lambda timm: timm.DropBlock2d(P, 7)},
        _blocks,
        required=0.0,
    ),
]


def available(peers: Sequence[Peer] = PEERS) -> tuple[dict[str, Any], dict[str, Result]]:
    """The packages that can be used, and what is said of all of them."""
    facts = {peer.name: {"version": peer.version(), "missing": peer.missing()} for peer in peers}
    return {peer.name: peer.load() for peer in peers if not facts[peer.name]["missing"]}, facts


def contenders(case: Case, modules: dict[str, Any]) -> dict[str, Map]:
    maps = {OURS: case.ours()}
    return maps | {name: make(modules[name]) for name, make in case.peers.items() if name in modules}


def _examined(fault: Fault, function: Map, x: Tensor) -> str | None:
    """Why it is not timed. Others may fail in any way; torchdrop's may not."""
    found = fault(function, x)
    return found and f"wrong: {found}"


def measure(case: Case, modules: dict[str, Any], shape: tuple[int, ...], effort: Effort) -> Result:
    """Forward and backward of everything that computes what it should, and of ``x * s``."""
    x = checks.sample(shape, torch.float32, "cpu").requires_grad_()
    g = checks.sample(shape, torch.float32, "cpu", seed=1)
    maps = contenders(case, modules)
    faults = {name: _examined(case.fault, function, x) for name, function in maps.items()}
    maps[LIMIT] = lambda x: x * (1 / (1 - P))

    def step(function: Map) -> object:
        return torch.autograd.grad(function(x), x, g)

    compared = compare({n: partial(step, f) for n, f in maps.items() if not faults.get(n)}, effort)
    found: Result = {}
    for name in maps:
        found[name] = {"fault": faults[name]} if faults.get(name) else {"seconds": compared.seconds(name)}
        if name != OURS and not faults.get(name) and not faults[OURS]:
            found[name]["times_torchdrop"] = compared.ratio(name, OURS)
    return {
        "label": case.label, "shape": list(shape), "required": case.required, "peers": list(case.peers),
        "rounds": compared.rounds, "contenders": found,
    }  # fmt: skip


SIZES, BLOCKS = (7, 14, 28, 56), (3, 5, 7)


def dropped_share(function: Map, size: int, error: float, most: float) -> tuple[float, float]:
    """The share that is dropped, and its standard error with maps as the independent units.

    Maps are drawn until the error is reached or `most` seconds are over.
    """
    begin, total, squares, maps = time.perf_counter(), 0.0, 0.0, 0
    x = torch.ones(max(64, 2**20 // size**2), 1, size, size)
    while True:
        shares = (function(x) == 0).flatten(1).double().mean(1)
        total, squares, maps = total + float(shares.sum()), squares + float(shares.square().sum()), maps + len(shares)
        mean = total / maps
        found = math.sqrt(max(squares / maps - mean**2, 0.0) / maps)
        if (maps > 1000 and found <= error) or time.perf_counter() - begin > most:
            return mean, found


def rates(modules: dict[str, Any], quick: bool) -> list[Result]:
    """What DropBlock2d drops at a nominal 0.1, on maps of several sizes."""
    makers: dict[str, Callable[[int], Map]] = {OURS: lambda block: DropBlock2d(P, block)}
    if TORCHVISION in modules:
        makers[TORCHVISION] = lambda block: modules[TORCHVISION].DropBlock2d(P, block)
    if TIMM in modules:
        makers[TIMM] = lambda block: modules[TIMM].DropBlock2d(P, block, couple_channels=False)
    cells = []
    for size in SIZES[:2] if quick else SIZES:
        for block in BLOCKS:
            found = {}
            for name, make in makers.items():
                error = 5e-3 if quick else 1e-4 if name == OURS else 1e-3
                found[name] = dropped_share(make(block), size, error, 1.0 if quick else 20.0)
            cells.append({"size": size, "block": block, "p": P, "dropped": found})
    return cells


def halves(modules: dict[str, Any]) -> list[Result]:
    """What becomes of float16 ones: whether all is finite, what is not zero, and the mean."""
    x = torch.ones(SHAPE, dtype=torch.float16)
    cells = []
    for case in CASES:
        found = {}
        for name, function in contenders(case, modules).items():
            torch.manual_seed(0)
            y = function(x)
            found[name] = {
                "finite": bool(y.isfinite().all()),
                "kept": float((y != 0).double().mean()),
                "mean": float(y.double().mean()),
            }
        cells.append({"label": case.label, "contenders": found})
    return cells


def run(quick: bool) -> Result:
    """Measures everything, printing as it goes."""
    begin = time.perf_counter()
    settle_allocator()
    modules, facts = available()
    report: Result = {"machine": machine.describe(torch.device("cpu")), "quick": quick, "peers": facts}
    print("\n".join(f"{name}: {value}" for name, value in report["machine"].items()))
    for name, fact in facts.items():
        print(f"{name}: {fact['missing'] or fact['version']}")
    busy = report["machine"]["load_before"]
    if busy is not None and busy > 0.3:
        print(f"the machine is not idle (load {busy}): timings on several threads suffer most")
    effort = Effort(budget=0.3, min_rounds=3) if quick else Effort(budget=6.0)
    shape = (32, 4, 28, 28) if quick else SHAPE
    parts: dict[str, Callable[[], list[Result]]] = {
        "speed": lambda: [measure(case, modules, shape, effort) for case in CASES],
        "rates": lambda: rates(modules, quick),
        "halves": lambda: halves(modules),
        "own": lambda: [variants_own.measure(case, effort) for case in variants_own.cases(quick)],
        "compact": lambda: [compact.measure(compact.cases(quick)[0], 0.5, effort)],
    }
    for name, part in parts.items():
        print(f"{time.perf_counter() - begin:.0f} s: {name}", flush=True)
        report[name] = part()
    report["summary"] = variants_summary.verdicts(report)
    report["machine"]["load_after"] = machine.load()
    report["seconds"] = round(time.perf_counter() - begin, 1)
    print(variants_summary.text(report))
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    options = command.parser(__doc__, RESULT, "small inputs and few rounds, nothing judged").parse_args(arguments)
    if command.rendered(options, variants_summary.markdown):
        return
    torch.set_num_threads(options.threads)
    command.write(run(options.quick), options, RESULT, not options.quick)


if __name__ == "__main__":
    main()

"""Monte Carlo inference with dense outputs against the usual loop: time, and memory in a process for each.

A sample's memory is what one pass of the loop takes.

python benchmarks/bench_dense.py [--threads 2] [--quick] [--output FILE]
python benchmarks/bench_dense.py --render FILE
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import command
import machine
import memory
import summary
import torch
from harness import markdown_table
from torch import Tensor, nn

import torchdrop

SHAPE, CLASSES = (1, 3, 256, 256), 21
TIMES, SAMPLES_ABOVE = 1.3, 4
"""The most time that is allowed, of the loop's, and the most samples whose memory may be taken above the loop's."""

LOOP, OURS, ALL = "train-mode loop", "mc_predict", "mc_predict, every standard error"


def network() -> nn.Module:
    """A small segmentation network with dropout from its second layer on, so that little runs only once."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout2d(0.2),
        nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Dropout2d(0.2),
        nn.Conv2d(48, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(48, CLASSES, 1),
    ).eval()  # fmt: skip


@torch.no_grad()
def loop(model: nn.Module, x: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Mean probabilities and the entropy of them, as they are usually computed."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    mean = torch.zeros(())
    for _ in range(samples):
        mean = mean + model(x).softmax(1) / samples
    model.eval()
    return mean, torch.special.entr(mean).sum(1)


def ours(model: nn.Module, x: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    result = torchdrop.mc_predict(model, x, samples, task="classification")
    return result.mean, result.predictive_entropy  # type: ignore[attr-defined]


def every_error(model: nn.Module, x: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    result = torchdrop.mc_predict(model, x, samples, task="classification", standard_errors=True)
    return result.mean, result.predictive_entropy  # type: ignore[attr-defined]


WAYS: dict[str, Callable[[nn.Module, Tensor, int], tuple[Tensor, Tensor]]] = {
    LOOP: loop, OURS: ours, ALL: every_error
}  # fmt: skip


def child(name: str, samples: int) -> None:
    """Prints the growth of this process's peak of resident memory by one call, in bytes."""
    model, x = network(), torch.randn(SHAPE)
    print(memory.peak_resident(lambda: WAYS[name](model, x, samples)))


def peak(name: str, samples: int, threads: int) -> int:
    """The bytes by which the resident memory of a process of its own grows in one call."""
    arguments = [sys.executable, __file__, "--child", name, "--samples", str(samples), "--threads", str(threads)]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def seconds(names: Sequence[str], samples: int, rounds: int) -> dict[str, float]:
    """The median time of a call in each way; the ways take turns."""
    model, x = network(), torch.randn(SHAPE)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            begin = time.perf_counter()
            WAYS[name](model, x, samples)
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


def wrong(samples: int) -> str:
    """Says how the means of the two ways differ, or "" if they agree within seven standard errors."""
    model, x = network(), torch.randn(SHAPE)[..., :64, :64]
    result = torchdrop.mc_predict(model, x, samples, task="classification")
    apart = (result.mean - loop(model, x, samples)[0]).abs() / (2**0.5 * result.standard_error + 1e-6)
    return f"wrong: means {apart.max():.1f} standard errors apart" if apart.max() > 7 else ""


def run(threads: int, quick: bool) -> dict[str, Any]:
    """Measures time at several numbers of samples, and memory at the first of them."""
    report: dict[str, Any] = {"machine": machine.describe(torch.device("cpu")), "fault": wrong(20), "cells": []}
    for samples in (4,) if quick else (20, 100):
        taken = seconds([LOOP, OURS], samples, 1 if quick else 5) | seconds([ALL], samples, 1)
        report["cells"] += [{"way": name, "samples": samples, "seconds": taken[name]} for name in WAYS]
    first = report["cells"][0]["samples"]
    report["peaks"] = {name: peak(name, first, threads) for name in WAYS} | {"one pass": peak(LOOP, 1, threads)}
    report["summary"] = verdicts(report)
    report["machine"]["load_after"] = machine.load()
    return report


def verdicts(report: dict[str, Any]) -> list[dict[str, str]]:
    """What must hold, and whether it does."""
    taken = {(cell["way"], cell["samples"]): cell["seconds"] for cell in report["cells"]}
    case, rows = f"segmentation, {CLASSES} x {SHAPE[2]} x {SHAPE[3]}", []
    for samples in sorted({samples for _, samples in taken}):
        ratio = taken[OURS, samples] / taken[LOOP, samples]
        measured = report["fault"] or f"{ratio:.2f} times"
        held = not report["fault"] and ratio <= TIMES
        rows.append(_row(f"{case}, T = {samples}, time", f"at most {TIMES} times the loop's", measured, held))
    above, one = report["peaks"][OURS] - report["peaks"][LOOP], report["peaks"]["one pass"]
    required = f"at most that of {SAMPLES_ABOVE} samples above the loop's"
    measured = f"{above / 1e6:.0f} MB above, a sample has {one / 1e6:.0f} MB"
    return [*rows, _row(f"{case}, peak memory", required, measured, above <= SAMPLES_ABOVE * one)]


def _row(case: str, required: str, measured: str, held: bool) -> dict[str, str]:
    return {"case": case, "required": required, "measured": measured, "verdict": "ok" if held else "short"}


def render(report: dict[str, Any]) -> str:
    """A report as markdown: machine, summary, and the table of all ways."""
    rows = [
        [cell["way"], str(cell["samples"]), f"{cell['seconds']:.2f} s", f"{report['peaks'][cell['way']] / 1e6:.0f} MB"]
        for cell in report["cells"]
    ]
    table = markdown_table(["way", "T", "time", f"peak memory at T = {report['cells'][0]['samples']}"], rows)
    return f"{summary.markdown(report)}\n\n### Times and memory\n\n{table}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "dense-cpu.json", "few samples, timed once")
    parser.add_argument("--samples", default=20, type=int, help="the number of samples of --child")
    parser.add_argument("--child", choices=WAYS, help="measure the memory of this way in this process")
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    torch.set_num_threads(options.threads)
    if options.child:
        child(options.child, options.samples)
        return
    report = run(options.threads, options.quick)
    print(render(report))
    command.write(report, options, "dense-cpu.json", not options.quick)


if __name__ == "__main__":
    main()

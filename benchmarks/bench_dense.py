"""Monte Carlo inference with dense outputs against the usual loop: time, and memory in a process for each.

python benchmarks/bench_dense.py [--threads 2] [--samples 20] [--output FILE]
python benchmarks/bench_dense.py --render FILE
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import command
import machine
import torch
from harness import markdown_table
from torch import Tensor, nn

import torchdrop

SHAPE, CLASSES = (1, 3, 256, 256), 21
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
    WAYS[name](model, x[..., :32, :32], 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[name](model, x, samples)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


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


def run(samples: int, threads: int, rounds: int) -> dict[str, Any]:
    report: dict[str, Any] = {"machine": machine.describe(torch.device("cpu")), "samples": samples, "ways": {}}
    report["fault"] = wrong(samples)
    taken = seconds([LOOP, OURS], samples, rounds) | seconds([ALL], samples, 1)
    for name in WAYS:
        report["ways"][name] = {"seconds": taken[name], "peak": peak(name, samples, threads)}
    return report


def render(report: dict[str, Any]) -> str:
    if report["fault"]:
        return str(report["fault"])
    base = report["ways"][LOOP]
    rows = [
        [
            name, f"{way['seconds']:.2f} s", f"{way['seconds'] / base['seconds']:.2f}",
            f"{way['peak'] / 1e6:.0f} MB", f"{(way['peak'] - base['peak']) / 1e6:+.0f} MB",
        ]
        for name, way in report["ways"].items()
    ]  # fmt: skip
    return markdown_table(["way", "time", "of the loop's", "peak memory", "above the loop's"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "dense-cpu.json")
    parser.add_argument("--samples", default=20, type=int, help="the number of samples")
    parser.add_argument("--rounds", default=5, type=int, help="the calls of each way that are timed")
    parser.add_argument("--child", help="measure the memory of this way in this process")
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    torch.set_num_threads(options.threads)
    if options.child:
        child(options.child, options.samples)
        return
    report = run(options.samples, options.threads, options.rounds)
    print(render(report))
    command.write(report, options, "dense-cpu.json")


if __name__ == "__main__":
    main()

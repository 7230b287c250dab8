"""The steps of card.sh that are no tests: kernels against the reference, bench_cuda, and training steps.

python benchmarks/card.py {kernels, bench, train} [--dry] [--output FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_cuda
import torch
from cuda_contenders import block
from torch import Tensor, nn

import torchdrop
from torchdrop.kernels import reference, triton
from torchdrop.kernels.mask_params import MaskParams, alpha, mask_params
from torchdrop.ops import fused

KEY = torch.tensor([3, -4])


def cases(dtype: torch.dtype, n: int, device: torch.device) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """Names, what the Triton kernels make, and what the reference makes on the same device."""
    key, some, affine = KEY.to(device), mask_params(0.37), mask_params(0.6, alpha)
    x, other = (torch.randn(n // 8, 8, device=device).to(dtype) for _ in range(2))

    def drop(given: MaskParams) -> Callable[[Tensor], Tensor]:
        return lambda value: reference.masked(value, key, given, value.shape)

    yield "whole", triton.masked(x, key, some, x.shape), drop(some)(x)
    yield "affine", triton.masked(x, key, affine, x.shape), drop(affine)(x)
    yield "groups", triton.masked(x, key, some, (n // 8, 1)), reference.masked(x, key, some, (n // 8, 1))
    in_memory = affine.tensor().to(device)
    yield "in memory", triton.masked(x, key, in_memory, x.shape), drop(affine)(x)
    yield "linear", triton.masked(x, key, in_memory, x.shape, linear=True), drop(affine.linear())(x)
    expected = fused.composed_add(x, other[0], other, drop(some))
    yield "add", triton.dropout_add(x, other[0], other, key, some), expected
    for name in ("relu", "gelu"):
        expected = fused.composed_activation(x, name, drop(some))
        yield name, triton.activation_dropout(x, key, some, name), expected


def kernels(device: torch.device, dry: bool) -> bool:
    """Compares every kernel with the reference. GELU is rounded once there, and twice in PyTorch's parts."""
    fine = True
    sizes = (8, 1000) if dry else (8, 1000, 4096, 2**20 + 8, 2**24)
    for n, dtype in itertools.product(sizes, (torch.bfloat16, torch.float32, torch.float16, torch.float64)):
        for name, got, expected in cases(dtype, n, device):
            near = 2e-2 if dtype.itemsize == 2 else 1e-5
            same = got is not None and (
                torch.allclose(got, expected, near, near) if name == "gelu" else torch.equal(got, expected)
            )
            fine &= same
            print(f"{'same' if same else 'WRONG'} {dtype} {n} {name}", flush=True)
    return fine


def train(device: torch.device, dry: bool) -> bool:
    """Prints the median time of a training step, eager and compiled, with torch.nn's dropout and ours."""
    width, length, steps = (64, 16, 3) if dry else (1024, 512, 30)
    ways: tuple[str | None, ...] = (None,) if dry else (None, "default", "reduce-overhead")
    for mode, dropout in itertools.product(ways, (nn.Dropout, torchdrop.Dropout)):
        torch.compiler.reset()
        model = nn.Sequential(*(block(dropout, width, device) for _ in range(2 if dry else 4)))
        step = model if mode is None else torch.compile(model, mode=mode)
        x, times = torch.randn(8, length, width, device=device, dtype=torch.bfloat16), []
        for _ in range(steps):
            begin = time.perf_counter()
            step(x).float().square().mean().backward()
            model.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        last = 1000 * statistics.median(times[len(times) // 2 :])
        print(f"{mode or 'eager'} {dropout.__module__.split('.')[0]}: {last:.3f} ms a step", flush=True)
    return True


def bench(device: torch.device, dry: bool, output: Path | None) -> bool:
    """Runs bench_cuda, and writes what there is after each of its steps."""

    def save(report: dict[str, Any]) -> None:
        if output is not None:
            # in one move, so that being cut off while writing loses nothing
            draft = output.with_suffix(".part")
            draft.write_text(json.dumps(report, indent=1) + "\n")
            draft.replace(output)

    return not bench_cuda.run(device, "tiny" if dry else "whole", save)["failed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("kernels", "bench", "train"))
    parser.add_argument("--dry", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--output", type=Path, help="the JSON file of bench")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry else "cuda:0")
    if options.dry:
        torch.set_num_threads(1)  # small sizes gain nothing from more, and lose much on a busy machine
    if options.step == "bench":
        fine = bench(device, options.dry, options.output)
    else:
        fine = {"kernels": kernels, "train": train}[options.step](device, options.dry)
    raise SystemExit(not fine)


if __name__ == "__main__":
    main()

"""Samples split over the processes of a torch.distributed group: one result, the same as of one process."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import torchdrop

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

CASES: dict[str, dict[str, Any]] = {
    "iid": {"samples": 23},
    "latin": {"samples": 23, "sampling": "latin"},
    "classes": {"samples": 20, "task": "classification", "keep_samples": True},
    "shared": {"samples": 7, "masks": "shared", "strategy": "loop"},
    "tolerance": {"samples": 400, "tolerance": 0.08},
    "masks": {"samples": 9, "keep_samples": True, "select_output": lambda y: (y != 0).double()},
    "few": {"samples": 1},
}


def model() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3), nn.Dropout(0.3)]
    return nn.Sequential(*layers).double().eval()


def data() -> torch.Tensor:
    return torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def run(group: Any) -> dict[str, dict[str, Any]]:
    results = {}
    for name, options in CASES.items():
        result = torchdrop.mc_predict(model(), data(), seed=4, group=group, **options)
        results[name] = {
            "mean": result.mean,
            "variance": result.variance,
            "errors": result.standard_errors,
            "samples": result.samples,
            "number": result.num_samples,
        }
    return results


def work(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    results: dict[str, Any] = run(dist.group.WORLD)
    torch.manual_seed(rank)  # without a seed, the first process's is everybody's
    results["unseeded"] = torchdrop.mc_predict(model(), data(), 6, group=dist.group.WORLD).mean
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first.pop("unseeded"), second.pop("unseeded"))
    alone = run(None)
    assert alone["tolerance"]["number"] < 400
    for name, expected in alone.items():
        for result in (first[name], second[name]):
            assert result["number"] == expected["number"]
            assert torch.allclose(result["mean"], expected["mean"], rtol=1e-12)
            assert torch.allclose(result["variance"], expected["variance"], rtol=1e-10, equal_nan=True)
            for statistic, error in expected["errors"].items():
                got = result["errors"][statistic]
                assert torch.allclose(got, error, rtol=1e-6, atol=1e-9, equal_nan=True), statistic
            if expected["samples"] is not None:
                assert torch.allclose(result["samples"], expected["samples"], rtol=1e-12)
    assert torch.equal(first["masks"]["samples"], alone["masks"]["samples"])
    assert 0 < first["masks"]["samples"].mean() < 1

"""Reached modules in two processes: data parallel, and with parameters that are cut among them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from torchdrop import keep_probs, replace, set_keep_prob

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]

WORLD = 2


class Block(nn.Module):
    """Keeps its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.exp(self.fc(x)), 0.5, self.training)
        self.mask = h.detach() != 0
        return h.log1p() + x


def data(rank: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(rank))


def made() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    replace(model)
    return model


def found(model: nn.Module, rank: int, parts: nn.Sequential) -> dict[str, Any]:
    """The masks and the gradients of one step, in the order of the parameters; the rates after it."""
    model.zero_grad()
    with torchdrop.seeded(7):
        model(data(rank)).square().mean().backward()
    slopes = [p.grad for p in parts.parameters()]
    whole = [s.full_tensor() if hasattr(s, "full_tensor") else s for s in slopes]  # type: ignore[operator, union-attr]
    return {
        "masks": [part.mask for part in parts],
        "gradients": torch.cat([s.flatten() for s in whole]),  # type: ignore[union-attr]
        "rates": dict(keep_probs(parts)),
    }


def alone(rank: int) -> dict[str, Any]:
    model = made()
    with torchdrop.seeded(7, rank=rank):
        model(data(rank)).square().mean().backward()
    return {
        "masks": [part.mask for part in model],
        "gradients": torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
    }


def sharded(model: nn.Sequential) -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    return model


def work(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    results = {}
    model = made()
    results["data parallel"] = found(nn.parallel.DistributedDataParallel(model), rank, model)
    model = sharded(made())
    results["sharded"] = found(model, rank, model)
    set_keep_prob(model, {"*.dropout:0": 1.0})
    model(data(rank))
    results["sharded"]["kept"] = [part.mask for part in model]
    replace(model := sharded(made_plain()))
    results["sharded before"] = found(model, rank, model)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def made_plain() -> nn.Sequential:
    model = made()
    replace(model, to="torch")
    return model


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes found, in the order of their ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder / "store"), str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("way", ["data parallel", "sharded", "sharded before"])
def test_masks_are_each_ranks_own_and_gradients_averages(way: str, ranks: list[dict[str, Any]]) -> None:
    expected = [alone(rank) for rank in range(WORLD)]
    assert not torch.equal(expected[0]["masks"][0], expected[1]["masks"][0])
    average = (expected[0]["gradients"] + expected[1]["gradients"]) / 2
    for rank in range(WORLD):
        got = ranks[rank][way]
        assert all(map(torch.equal, got["masks"], expected[rank]["masks"]))
        torch.testing.assert_close(got["gradients"], average)
        assert got["rates"] == {"0.dropout:0": 0.5, "1.dropout:0": 0.5}


def test_a_rate_that_is_set_on_a_sharded_model(ranks: list[dict[str, Any]]) -> None:
    assert all(mask.all() for results in ranks for mask in results["sharded"]["kept"])

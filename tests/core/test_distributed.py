"""Masks in two processes: their own for data-parallel ones, parts of one mask where a tensor is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import torchdrop
import torchdrop.functional as F
from tests.seeding import seeded
from torchdrop import Shard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]

WORLD = 2

Results = dict[Any, Any]


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Keeps what its dropout layer gave, and sums up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 40), torchdrop.Dropout(0.5), nn.Linear(40, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.dropped = self.drop(torch.exp(self.first(x)))
        return self.last(self.dropped).square().mean()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def data_parallel(rank: int) -> Results:
    """All ranks are seeded alike, so that they start from the same parameters; the data are the same, too."""
    torch.manual_seed(0)
    net = Net()
    model = nn.parallel.DistributedDataParallel(net)
    results = {}
    for name, of_rank in (("own", None), ("again", None), ("same", 0)):
        model.zero_grad()
        with torchdrop.seeded(7, rank=of_rank):
            model(data(5, 6)).backward()
        results[name] = {"mask": net.dropped.detach() != 0, "gradients": gradients(net)}
    model(data(5, 6))
    results["without"] = {"mask": net.dropped.detach() != 0}
    return results


def alone(rank: int) -> Tensor:
    """The gradients of one process of `data_parallel`, before they are averaged."""
    torch.manual_seed(0)
    net = Net()
    with torchdrop.seeded(7, rank=rank):
        net(data(5, 6)).backward()
    return gradients(net)


CUTS = {"rows": (0, (0, 4, 7)), "columns": (1, (0, 2, 6)), "empty": (1, (0, 6, 6)), "neither": (1, (0, 6))}


def drop_twice(x: Tensor, shard: Shard | None = None) -> tuple[Tensor, Tensor]:
    """Twice, so that each rank draws as many keys; with the gradient."""
    x = x.detach().clone().requires_grad_()
    with torchdrop.seeded(3, rank=0):
        y = F.dropout(torch.tanh(F.dropout(x, 0.4, shard=shard)), 0.3, shard=shard)
        z = F.dropout(y, 0.3, shard=shard)
    (slope,) = torch.autograd.grad(z.square().sum(), x)
    return z.detach(), slope


def plain_shards(rank: int) -> Results:
    results: Results = {}
    for name, (dim, bounds) in CUTS.items():
        start, stop = bounds[min(rank, len(bounds) - 2) :][:2]
        x = data(7, 6)
        results[name] = drop_twice(x.narrow(dim, start, stop - start), Shard(dim, start, x.shape[dim]))
    return results


class Twice(nn.Module):
    """A layer of two tensors, given one of them twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dropout": (torchdrop.Dropout(0.4), (7, 6)),
    "shared": (torchdrop.Dropout(0.4, shared_axes=0), (7, 6)),
    "rates": (torchdrop.Dropout(keep_prob=torch.linspace(0.1, 0.9, 42).reshape(7, 6)), (7, 6)),
    "original": (torchdrop.Dropout(0.4, inverted=False), (7, 6)),
    "certain": (torchdrop.Dropout(1.0), (7, 6)),
    "channels": (torchdrop.Dropout1d(0.4), (7, 6, 3)),
    "alpha": (torchdrop.AlphaDropout(0.4), (7, 6)),
    "gaussian": (torchdrop.GaussianDropout(0.4), (7, 6)),
    "path": (torchdrop.DropPath(0.4), (7, 6)),
    "residual": (Twice(torchdrop.DropoutAdd(0.4)), (7, 6)),
    "relu": (torchdrop.ReLUDropout(0.4), (7, 6)),
    "gelu": (torchdrop.GELUDropout(0.4), (7, 6)),
}


def layer_of_dtensor(layer: Any, x: Any, weights: Any) -> tuple[Any, Any]:
    with torchdrop.seeded(3, rank=0):
        y = layer(x)
    (slope,) = torch.autograd.grad((y * weights).sum(), x)
    return y, slope


def dtensors(rank: int) -> Results:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Sharded

    mesh = init_device_mesh("cpu", (WORLD,))
    both = init_device_mesh("cpu", (WORLD, 1))
    ways: dict[str, tuple[Any, list[Placement]]] = {
        "0": (mesh, [Sharded(0)]),
        "1": (mesh, [Sharded(1)]),
        "whole": (mesh, [Replicate()]),
        "0 and 1": (both, [Sharded(0), Sharded(1)]),
        "0 twice": (both, [Sharded(0), Sharded(0)]),
    }
    layers: Results = {}
    for name, (layer, shape) in LAYERS.items():
        for way, (on, placements) in ways.items():
            x = distribute_tensor(data(*shape), on, placements).requires_grad_()
            y, slope = layer_of_dtensor(layer, x, distribute_tensor(data(*shape), on, placements))
            assert isinstance(y, DTensor)
            assert y.placements == tuple(placements) == slope.placements, (name, way, slope)
            assert y.shape == x.shape
            assert y.stride() == x.stride()
            layers[name, way] = y.detach().full_tensor(), slope.full_tensor()

    x = distribute_tensor(data(7, 6), mesh, [Sharded(1)])
    layer = torchdrop.Dropout(0.4)
    assert layer.eval()(x) is x
    assert torchdrop.Dropout(0.0)(x) is x

    slopes: Results = {}
    for way, of_gradient in (("1", Sharded(0)), ("0", Replicate()), ("whole", Sharded(1)), ("whole", Partial())):
        x = distribute_tensor(data(7, 6), mesh, ways[way][1]).requires_grad_()
        with torchdrop.seeded(3, rank=0):
            y = F.dropout(x, 0.4)
        if isinstance(of_gradient, Partial):
            gradient = DTensor.from_local(data(7, 6) / WORLD, mesh, [of_gradient])
        else:
            gradient = distribute_tensor(data(7, 6), mesh, [of_gradient])
        (slope,) = torch.autograd.grad(y, x, gradient)
        slopes[way, str(of_gradient)] = slope.full_tensor()
    results: Results = {"layers": layers, "slopes": slopes}

    x = distribute_tensor(data(7, 6), mesh, [Sharded(1)])
    gathering = x.redistribute(placements=[Replicate()], async_op=True)
    with torchdrop.seeded(3, rank=0):
        results["gathering"] = F.dropout(gathering, 0.4).to_local() + 0.0
    with torchdrop.seeded(3, rank=0), torch.no_grad():
        assert F.dropout(x, 0.4, inplace=True) is x
    results["in place"] = x.full_tensor()
    leaf = distribute_tensor(data(7, 6), mesh, [Sharded(1)]).requires_grad_()
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        F.dropout(leaf, 0.4, inplace=True)
    assert torch.equal(torch.get_rng_state(), before)
    with torchdrop.seeded(3, rank=0):
        y = F.dropout(leaf * 1.0, 0.4, inplace=True)
    results["in place with a gradient"] = torch.autograd.grad(y, leaf, torch.ones_like(y))[0].full_tensor()

    model = torchdrop.Dropout(0.4).eval()
    with torchdrop.mc_dropout(model, seed=1, batch_dim=None):
        results["monte carlo"] = model(distribute_tensor(data(7, 6), mesh, [Sharded(1)])).full_tensor()

    partial = DTensor.from_local(data(7, 6), mesh, [Partial()])
    message = (
        r"^dropout of a DTensor needs placements that are Shard or Replicate, got \(Partial\(sum\),\): call redistr"
    )
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        torchdrop.Dropout(0.4)(partial)
    with pytest.raises(TypeError, match=r"^keep_prob must be a plain tensor, the whole of it on every rank"):
        F.dropout(x, keep_prob=distribute_tensor(torch.tensor(0.5), mesh, [Replicate()]))
    with pytest.raises(TypeError, match=r"^a DTensor knows where its parts belong: shard must be None, got Shard"):
        F.dropout(x, shard=Shard(1, 0, 6))
    assert torch.equal(torch.get_rng_state(), before)

    of_one = init_device_mesh("cpu", (1,))  # rank 1 is no part of it
    x = (
        distribute_tensor(data(7, 6), of_one, [Sharded(0)])
        if rank == 0
        else DTensor.from_local(torch.empty(0), of_one, [Sharded(0)], shape=torch.Size([7, 6]), stride=(6, 1))
    )
    y = F.dropout(x, 0.4)
    assert y.shape == (7, 6)
    assert y.to_local().shape == ((7, 6) if rank == 0 else (0,))
    results["state"] = torch.get_rng_state()
    return results


def layer_drop(rank: int) -> Results:
    torch.manual_seed(rank)
    layers = torchdrop.LayerDrop([nn.Linear(1, 1) for _ in range(40)], 0.5)

    def kept() -> list[bool]:
        chosen = {id(layer) for layer in layers}
        return [id(layer) in chosen for layer in layers._modules.values()]

    with torchdrop.seeded(5, rank=0):
        same = [kept(), kept()]
    with torchdrop.seeded(5):
        return {"same": same, "own": kept()}


def work(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    parts = (data_parallel, plain_shards, dtensors, layer_drop)
    torch.save({part.__name__: part(rank) for part in parts}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    """What the processes found, in the order of their ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder / "store"), str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


class TestDataParallel:
    def test_ranks_draw_masks_of_their_own_and_replay_them(self, ranks: list[dict[str, Results]]) -> None:
        first, second = (found["data_parallel"] for found in ranks)
        for results in (first, second):
            assert torch.equal(results["own"]["mask"], results["again"]["mask"])
        assert not torch.equal(first["own"]["mask"], second["own"]["mask"])

    def test_ranks_draw_the_same_on_request_and_where_they_are_seeded_alike(
        self, ranks: list[dict[str, Results]]
    ) -> None:
        first, second = (found["data_parallel"] for found in ranks)
        for name in ("same", "without"):
            assert torch.equal(first[name]["mask"], second[name]["mask"])
        assert torch.equal(first["same"]["mask"], first["own"]["mask"])  # of rank 0
        assert not torch.equal(first["same"]["mask"], first["without"]["mask"])

    def test_gradients_are_averages_over_the_masks_of_both(self, ranks: list[dict[str, Results]]) -> None:
        first, second = (found["data_parallel"] for found in ranks)
        own, same = (alone(0) + alone(1)) / 2, alone(0)
        assert not torch.allclose(own, same, atol=1e-3)
        for name, expected in (("own", own), ("again", own), ("same", same)):
            assert torch.equal(first[name]["gradients"], second[name]["gradients"])
            assert torch.allclose(first[name]["gradients"], expected, atol=1e-6)


@pytest.mark.parametrize("name", CUTS)
def test_shards_put_together_are_what_one_process_gives(name: str, ranks: list[dict[str, Results]]) -> None:
    dim, bounds = CUTS[name]
    found = [results["plain_shards"][name] for results in ranks]
    for of_both, expected in zip(zip(*found, strict=True), drop_twice(data(7, 6)), strict=True):
        if len(bounds) == 2:
            assert all(torch.equal(part, expected) for part in of_both)
        else:
            assert torch.equal(torch.cat(of_both, dim), expected)


class TestDTensors:
    @pytest.mark.parametrize("name", LAYERS)
    def test_layers_give_what_one_process_gives(self, name: str, ranks: list[dict[str, Results]]) -> None:
        layer, shape = LAYERS[name]
        expected = layer_of_dtensor(layer, data(*shape).requires_grad_(), data(*shape))
        for results in ranks:
            found = {way: values for (of, way), values in results["dtensors"]["layers"].items() if of == name}
            assert len(found) == 5
            for way, values in found.items():
                for ours, theirs in zip(values, expected, strict=True):
                    assert torch.equal(ours, theirs), way

    def test_gradients_in_other_placements(self, ranks: list[dict[str, Results]]) -> None:
        x = data(7, 6).requires_grad_()
        with torchdrop.seeded(3, rank=0):
            (expected,) = torch.autograd.grad(F.dropout(x, 0.4), x, data(7, 6))
        for results in ranks:
            slopes = results["dtensors"]["slopes"]
            assert len(slopes) == 4
            assert all(torch.equal(slope, expected) for slope in slopes.values())

    def test_in_place_and_while_it_is_gathered(self, ranks: list[dict[str, Results]]) -> None:
        x = data(7, 6).requires_grad_()
        with torchdrop.seeded(3, rank=0):
            y = F.dropout(x, 0.4)
        (slope,) = torch.autograd.grad(y.sum(), x)
        for results in ranks:
            assert torch.equal(results["dtensors"]["gathering"], y)
            assert torch.equal(results["dtensors"]["in place"], y)
            assert torch.equal(results["dtensors"]["in place with a gradient"], slope)

    def test_monte_carlo(self, ranks: list[dict[str, Results]]) -> None:
        model = torchdrop.Dropout(0.4).eval()
        with torchdrop.mc_dropout(model, seed=1, batch_dim=None):
            expected = model(data(7, 6))
        assert (expected == 0).any()
        assert all(torch.equal(results["dtensors"]["monte carlo"], expected) for results in ranks)

    def test_ranks_outside_the_mesh_draw_as_many_keys(self, ranks: list[dict[str, Results]]) -> None:
        first, second = (results["dtensors"]["state"] for results in ranks)
        assert torch.equal(first, second)


@pytest.fixture
def last_of_four() -> Iterator[Any]:
    """The mesh of a group of four, 2 by 2, as its last rank sees it. The group's communication does nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=3, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (2, 2))
    dist.destroy_process_group()


class TestOneOfFour:
    def of_rank(self, x: Tensor, mesh: Any, dims: tuple[int, int]) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """The DTensor that is x, sharded along two dimensions, and what takes this rank's part of a tensor."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Sharded

        def part(x: Tensor) -> Tensor:
            return x.chunk(2, dims[0])[1].chunk(2, dims[1])[1]

        placements = [Sharded(dim) for dim in dims]
        local = part(x).clone()
        return DTensor.from_local(local, mesh, placements, shape=x.shape, stride=x.stride()).requires_grad_(), part

    @pytest.mark.parametrize("dims", [(0, 0), (0, 1), (0, 2), (1, 1), (2, 0)])
    def test_two_dimensions(self, dims: tuple[int, int], last_of_four: Any) -> None:
        x, part = self.of_rank(data(7, 8, 8), last_of_four, dims)
        assert torch.equal(seeded(3, F.dropout, x, 0.4).to_local(), part(seeded(3, F.dropout, data(7, 8, 8), 0.4)))

    def test_two_inner_dimensions(self, last_of_four: Any) -> None:
        x, part = self.of_rank(data(7, 8, 8), last_of_four, (1, 2))
        with pytest.raises(NotImplementedError, match=r"cut along \[1, 2\]: share the mask along one of them"):
            F.dropout(x, 0.4)
        expected = part(seeded(3, F.dropout, data(7, 8, 8), 0.4, shared_axes=2))
        assert torch.equal(seeded(3, F.dropout, x, 0.4, shared_axes=2).to_local(), expected)

    def test_compiled_in_one_piece(self, last_of_four: Any) -> None:
        torch.compiler.reset()
        layer = torchdrop.Dropout(0.4)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x, part = self.of_rank(data(7, 6), last_of_four, (0, 1))
        whole = data(7, 6).requires_grad_()
        for seed in (1, 2):
            ours, expected = seeded(seed, compiled, x), seeded(seed, layer, whole)
            assert torch.equal(ours.to_local(), part(expected))
            (slope,) = torch.autograd.grad(expected.sum(), whole)
            assert torch.equal(torch.autograd.grad(ours, x, torch.ones_like(ours))[0].to_local(), part(slope))


def test_ranks_leave_out_the_same_layers(ranks: list[dict[str, Results]]) -> None:
    first, second = (results["layer_drop"] for results in ranks)
    assert first["same"] == second["same"]
    assert first["same"][0] != first["same"][1]
    assert first["own"] != second["own"]

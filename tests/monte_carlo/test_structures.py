"""Inputs that are no strided tensors, or that hold them in a structure: records, packed sequences, graphs, sparse and
jagged tensors."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

import torchdrop
from torchdrop.monte_carlo import Prediction
from torchdrop.monte_carlo.inputs import Inputs
from torchdrop.monte_carlo.sample import STRATEGIES

pytestmark = [
    # PyTorch says so once of the first tensor of each kind.
    pytest.mark.filterwarnings("ignore:Sparse ... tensor support is in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
]

X = torch.randn(10, 6, generator=torch.Generator().manual_seed(3))


def predict(model: nn.Module, inputs: Any, **options: Any) -> Prediction:
    return torchdrop.mc_predict(model, inputs, 8, **{"seed": 5, "keep_samples": True, **options})


def agree(one: Prediction, other: Prediction) -> bool:
    assert one.samples is not None
    assert other.samples is not None
    return one.std.max() > 0 and torch.allclose(one.samples, other.samples, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Record:
    x: Tensor
    name: str = "a"
    made: list[int] = dataclasses.field(default_factory=list)
    doubled: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "doubled", 2 * self.x)


class Row(NamedTuple):
    x: Tensor
    name: str


class Body(nn.Module):
    """Takes `x` out of its argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.drop, self.last = nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3)
        self.eval()

    def forward(self, batch: Any) -> Tensor:
        x = batch if isinstance(batch, Tensor) else batch["x"] if isinstance(batch, UserDict) else batch.x
        return self.last(self.drop(self.first(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.LSTM(6, 8, 2, dropout=0.4)

    def forward(self, x: Any) -> Tensor:
        return self.rnn(x)[1][0][-1]


class Sparse(nn.Module):
    """Multiplies sparse features with dense weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight, self.drop, self.last = nn.Parameter(torch.randn(6, 8)), nn.Dropout(0.5), nn.Linear(8, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(x @ self.weight))


class Neighbors(nn.Module):
    """Adds the features of a node's neighbors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.drop = nn.Linear(6, 3), nn.Dropout(0.5)
        self.eval()

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        return adjacency @ self.drop(self.first(x))


class Padded(Body):
    """Pads a jagged tensor before its dropout, and looks at the first two of each row."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(torch.nested.to_padded_tensor(x, 0.0))))[:, :2].mean(1)


class Jagged(Body):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = x if shift is None else x + shift
        return torch.nested.to_padded_tensor(self.last(self.drop(self.first(x))), 0.0).sum(1)


def jagged(*lengths: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randn(length, 6, generator=generator) for length in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


class TestRecords:
    @pytest.mark.parametrize("record", [Record, lambda x: Row(x, "a"), lambda x: UserDict(x=x)])
    def test_have_the_rows_of_their_tensors(self, record: Callable[[Tensor], Any]) -> None:
        expected = predict(Body(), X)
        assert agree(predict(Body(), (record(X),)), expected)
        assert agree(predict(Body(), (record(X),), strategy="repeated"), expected)
        assert agree(predict(Body(), iter([((record(X[:4]),), 0), ((record(X[4:]),), 0)])), expected)

    def test_are_inputs_or_batches_themselves(self) -> None:
        expected = predict(Body(), X)
        assert agree(predict(Body(), Record(X)), expected)
        assert agree(predict(Body(), iter([Record(X[:4]), Record(X[4:])])), expected)
        assert agree(predict(Body(), iter([(Record(X[:4]), 0), (Record(X[4:]), 0)])), expected)
        loader = DataLoader(list(X), batch_size=4, collate_fn=lambda rows: Record(torch.stack(rows)))  # type: ignore[arg-type]
        assert agree(predict(Body(), loader), expected)

    def test_arrays_in_them(self) -> None:
        assert agree(predict(Body(), Record(X.double().numpy())), predict(Body(), X))  # type: ignore[arg-type]

    def test_within_mc_dropout(self) -> None:
        model, expected = Body(), predict(Body(), X)
        with torchdrop.mc_dropout(model, seed=5) as report, torch.no_grad():
            first, second = model(Record(X)), model(Row(X, "a"))
        assert report.rows == 0
        assert expected.samples is not None
        assert torch.allclose(torch.stack([first, second]), expected.samples[:2], atol=1e-5)

    def test_rows_copies_and_repetitions(self) -> None:
        record = Record(X, "b", [1])
        inputs = Inputs((record, 3), {"mask": X > 0}, 0)
        assert inputs.rows == 10
        few, copy, thrice = inputs.first(2).args[0], inputs.copy().args[0], inputs.folded(3).args[0]
        assert torch.equal(few.x, X[:2])
        assert torch.equal(few.doubled, 2 * X[:2])
        assert (few.name, few.made) == ("b", [1])
        assert copy.x is not X
        assert torch.equal(copy.x, X)
        assert copy.made is not record.made
        assert torch.equal(thrice.x, torch.cat([X, X, X]))
        before = inputs.versions
        record.x.add_(0)
        assert inputs.versions != before
        assert record.x is X


class TestPackedSequences:
    """They are one whole: their draws depend on the batch."""

    def test_are_one_argument(self) -> None:
        packed = pack_sequence([X[:5], X[5:8], X[8:]])
        model = Recurrent().eval()
        result = predict(model, packed)
        assert result.mean.shape == (3, 8)
        assert result.std.max() > 0
        assert result.report.rows is None  # type: ignore[attr-defined]
        assert agree(predict(model, packed, batch_dim=None), result)
        assert agree(predict(model, iter([(packed, torch.zeros(3))])), result)
        with torchdrop.mc_dropout(model, seed=5) as report:
            assert model(packed).shape == (3, 8)
        assert report.rows is None

    def test_equal_lengths(self) -> None:
        """Here the tensors of a packed sequence agree in a number of rows, by accident."""
        packed = pack_sequence([X[:1], X[1:2]])
        inputs = Inputs((packed._replace(sorted_indices=None, unsorted_indices=None),), {}, 0)
        assert inputs.rows is None
        assert torch.equal(inputs.copy().args[0].data, packed.data)


class TestSparse:
    @pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
    def test_rows(self, layout: torch.layout) -> None:
        x = X * (X > 0)
        expected = predict(Sparse(), x)
        served = set()
        for strategy in STRATEGIES:
            try:
                result = predict(Sparse(), x.to_sparse(layout=layout), strategy=strategy)
            except RuntimeError:
                continue
            assert agree(result, expected)
            served.add(strategy)
        assert served >= {"loop", "repeated"}
        parts = iter([x[:4].to_sparse(layout=layout), x[4:].to_sparse(layout=layout)])
        assert agree(predict(Sparse(), parts), expected)

    def test_blocks_are_one_whole(self) -> None:
        blocks = (X * (X > 0)).to_sparse_bsr((2, 2))
        assert predict(Sparse(), blocks).report.rows is None  # type: ignore[attr-defined]

    @pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
    def test_adjacency(self, layout: torch.layout) -> None:
        dense = (torch.rand(10, 10, generator=torch.Generator().manual_seed(5)) < 0.3).float()
        adjacency, model = dense.to_sparse(layout=layout), Neighbors()
        with pytest.raises(RuntimeError, match="Pass batch_dim=None to take the inputs as one whole"):
            predict(model, (adjacency, X))
        result = predict(model, (adjacency, X), batch_dim=None)
        assert agree(result, predict(model, (dense, X), batch_dim=None))
        with torchdrop.mc_dropout(model, seed=5, batch_dim=None), torch.no_grad():
            first = model(adjacency, X)
        assert result.samples is not None
        assert torch.allclose(first, result.samples[0], atol=1e-5)


class TestNested:
    def test_rows_that_are_padded_by_the_model(self) -> None:
        x = jagged(3, 2, 5)
        loop = predict(Padded(), x, strategy="loop")
        assert loop.report.rows == 0  # type: ignore[attr-defined]
        for strategy in ("vectorized", "repeated"):
            assert agree(predict(Padded(), x, strategy=strategy), loop)
        few, more = predict(Padded(), jagged(3, 2)), predict(Padded(), x)
        assert few.samples is not None
        assert more.samples is not None
        assert torch.allclose(few.samples, more.samples[:, :2], atol=1e-5)

    def test_dropout_of_jagged_tensors(self) -> None:
        x, model = jagged(3, 2, 5), Jagged()
        result = predict(model, x)
        assert result.mean.shape == (3, 3)
        assert result.std.max() > 0
        assert predict(model, (x, 2 * x)).mean.shape == (3, 3)  # they share the lengths of their rows
        with torchdrop.mc_dropout(model, seed=5) as report:
            assert model(x).shape == (3, 3)
        assert report.draws == 1

    def test_rows_and_repetitions(self) -> None:
        x = jagged(3, 2, 5)
        inputs = Inputs((x,), {"other": 2 * x}, 0)
        assert inputs.rows == 3
        few, other = inputs.first(2).args[0], inputs.first(2).kwargs["other"]
        assert [row.shape[0] for row in few.unbind()] == [3, 2]
        repeated = inputs.folded(2)
        assert [row.shape[0] for row in (repeated.args[0] + repeated.kwargs["other"]).unbind()] == [3, 2, 5, 3, 2, 5]
        assert torch.equal(other.unbind()[1], 2 * x.unbind()[1])

    def test_of_another_layout(self) -> None:
        with pytest.raises(TypeError, match=r"nested tensors must be jagged.*layout=torch.jagged"):
            predict(Padded(), torch.nested.nested_tensor([X[:2], X[2:]]))


class TestGraphs:
    """Graphs of torch_geometric are one whole, alone or several in a batch."""

    def graph(self, nodes: int) -> Any:
        data = pytest.importorskip("torch_geometric.data")
        return data.Data(x=X[:nodes].clone(), edge_index=torch.arange(2 * nodes).reshape(2, nodes) % nodes)

    @pytest.mark.parametrize("nodes", [2, 7])
    def test_are_one_argument(self, nodes: int) -> None:
        """With two nodes, all their tensors have two rows, by accident."""
        graph, model = self.graph(nodes), Body()
        expected = predict(model, X[:nodes], batch_dim=None)
        assert agree(predict(model, graph), expected)
        assert agree(predict(model, (graph,), batch_dim=None), expected)
        with torchdrop.mc_dropout(model, seed=5) as report, torch.no_grad():
            first = model(graph)
        assert report.rows is None
        assert expected.samples is not None
        assert torch.allclose(first, expected.samples[0], atol=1e-5)

    def test_loaders(self) -> None:
        loader = pytest.importorskip("torch_geometric.loader").DataLoader([self.graph(3)] * 5, batch_size=2)
        result = predict(Body(), loader)
        assert result.mean.shape == (15, 3)
        assert agree(predict(Body(), ((batch, 0) for batch in loader)), result)

    def test_copies(self) -> None:
        graph = self.graph(3)
        inputs = Inputs((graph,), {}, 0)
        copy = inputs.copy().args[0]
        assert type(copy) is type(graph)
        assert torch.equal(copy.edge_index, graph.edge_index)
        copy.x.zero_()
        assert graph.x.abs().min() > 0
        assert len(inputs.tensors) == 2


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
def test_dtensors_are_one_whole(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])
        model = distribute_module(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), mesh).eval()
        with torch.no_grad(), torchdrop.mc_dropout(model, seed=0) as report:
            first, second = model(x), model(x)
        assert isinstance(first, DTensor)
        assert not torch.equal(first.full_tensor(), second.full_tensor())
        assert len(report.active) == 1
        assert report.rows is None
    finally:
        torch.distributed.destroy_process_group()

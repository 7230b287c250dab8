"""Monte Carlo inference on graph networks of torch_geometric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.mc_models import apart, call, check_draws, check_each_source, check_rows, equal, train_draws, unchanged

torch_geometric = pytest.importorskip("torch_geometric")

from torch_geometric.nn import GATConv, GATv2Conv, GCNConv, MLP, TransformerConv  # noqa: E402, I001
from torch_geometric.utils import dropout_edge, dropout_node  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Network(nn.Module):
    """One convolution, batch normalization, functional dropout and a linear layer, with something dropped before."""

    def __init__(self, convolution: nn.Module, features: int, before: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.convolution, self.norm, self.out = convolution, nn.BatchNorm1d(features), nn.Linear(features, 3)
        self._before = before

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        if self._before is not None:
            x, edges = self._before(x, edges, self.training)
        x = torch.relu(self.norm(self.convolution(x, edges)))
        return self.out(F.dropout(x, 0.2, self.training))


def without_edges(x: Tensor, edges: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    return x, dropout_edge(edges, p=0.4, training=training)[0]


def without_nodes(x: Tensor, edges: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    return x, dropout_node(edges, p=0.3, num_nodes=x.shape[0], training=training)[0]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "gat": (lambda: Network(GATConv(16, 8, heads=4, dropout=0.3), 32), 2),
    "gat-v2": (lambda: Network(GATv2Conv(16, 8, heads=4, dropout=0.3, concat=False), 8), 2),
    "transformer": (lambda: Network(TransformerConv(16, 8, heads=4, dropout=0.3), 32), 2),
    "gcn-edges": (lambda: Network(GCNConv(16, 8), 8, without_edges), 2),
    "gat-nodes": (lambda: Network(GATConv(16, 8, dropout=0.3), 8, without_nodes), 3),
}
"""Each with its draws."""

every_network = pytest.mark.parametrize("name", NETWORKS)


def built(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return NETWORKS[name][0]().eval(), (torch.randn(9, 16), torch.randint(0, 9, (2, 30)))


@every_network
def test_draws_are_those_of_train_mode(name: str) -> None:
    model, inputs = built(name)
    report = check_draws(model, inputs)
    assert report.expected == NETWORKS[name][1]
    assert report.rows is None
    assert any("do not agree in a number of rows" in note for note in report.notes)


@every_network
def test_every_source_makes_a_difference(name: str) -> None:
    check_each_source(*built(name))


@every_network
def test_whole_graph(name: str) -> None:
    """Nodes and edges are one whole; strategies and chunks do not matter, and the samples replay."""
    model, inputs = built(name)

    def predict(**options: Any) -> Any:
        return torchdrop.mc_predict(model, inputs, samples=6, seed=2, keep_samples=True, **options)

    with unchanged(model):
        result, loop, chunked = predict(), predict(strategy="loop"), predict(chunk=4)
    assert result.mean.shape == (9, 3)
    assert float(result.std.min()) > 0
    assert result.report.replayable
    for other in (loop, chunked, predict(batch_dim=None)):
        assert apart(other.samples, result.samples) < 1e-4
    with torchdrop.mc_dropout(model, seed=2):
        for sample in range(6):
            assert apart(call(model, inputs), result.samples[sample]) < 1e-4
    with pytest.raises(RuntimeError, match="strategy='repeated' does not work here"):
        predict(strategy="repeated")


def test_attention_differs_between_edges_and_heads() -> None:
    """The weights of a node's edges are dropped one by one."""
    model, inputs = GATConv(16, 8, heads=4, dropout=0.5, add_self_loops=False).eval(), built("gat")[1]
    _, (_, plain) = model(*inputs, return_attention_weights=True)
    kept = torch.zeros_like(plain)
    with torchdrop.mc_dropout(model, seed=0) as report:
        for _ in range(400):
            _, (_, weights) = model(*inputs, return_attention_weights=True)
            dropped = weights == 0
            torch.testing.assert_close(weights[~dropped], 2 * plain[~dropped])
            kept += ~dropped
    assert report.draws == 1
    assert plain.shape == (30, 4)
    # each of 120 counts of 400 is within 7 standard deviations, and they are not all the same
    assert float((kept - 200).abs().max()) < 70
    assert len(kept.unique()) > 10


def test_dropped_edges_are_those_of_the_sample() -> None:
    """An edge's message arrives in full or not at all, and no sample has them all."""

    class Edges(nn.Module):
        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            left, _ = dropout_edge(edges, p=0.5, training=self.training)
            return torch.zeros(9, 9).index_put((left[0], left[1]), torch.ones(()))

    model, edges = Edges().eval(), torch.stack([torch.arange(9), torch.arange(9).roll(1)])
    x = torch.randn(9, 1)
    assert int(model(x, edges).sum()) == 9
    with torchdrop.mc_dropout(model, seed=0) as report:
        counts = {int(model(x, edges).sum()) for _ in range(50)}
    assert report.draws == 1
    assert counts <= set(range(10))
    assert len(counts) > 3


def test_mlp() -> None:
    """Its rows are rows of data."""
    model, x = MLP([16, 32, 32, 3], dropout=0.2).eval(), torch.randn(5, 16)
    assert any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    report = check_draws(model, x)
    assert (report.expected, report.rows) == (2, 0)
    check_each_source(model, x)
    with unchanged(model):
        check_rows(model, x)


def test_batch_norm_would_have_moved() -> None:
    """What `unchanged` holds still does change in train mode."""
    model, inputs = built("gat")
    with pytest.raises(AssertionError, match=r"norm\.running_mean"), unchanged(model):
        call(model.train(), inputs)


def test_two_nodes_as_one_whole() -> None:
    """A graph of two nodes has as many rows in its nodes as in its edges: `batch_dim=None` says that they are none."""
    model, inputs = built("gat")[0], (torch.randn(2, 16), torch.tensor([[0, 1, 0], [1, 0, 0]]))
    assert len(train_draws(model, inputs)) == 2
    with torchdrop.mc_dropout(model, seed=0, batch_dim=None) as report:
        first, second = call(model, inputs), call(model, inputs)
    assert (report.draws, report.rows) == (2, None)
    assert not equal(first, second)

"""DropEdge, DropNode, DropMessage: the expectation of sums over neighbors, undirected pairs, bad input."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from tests.seeding import seeded
from tests.statistical import check_rate, draws_for
from torchdrop.core import sites
from torchdrop.layers.graph.graph import (
    DropEdge,
    DropMessage,
    DropNode,
    drop_edge,
    drop_edge_weight,
    drop_message,
    drop_node,
)

EDGES = torch.tensor([[0, 1, 1, 2, 2], [1, 0, 2, 1, 2]])
"""Two undirected edges and a self-loop."""


def aggregated(x: Tensor, edges: Tensor, weight: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, edges[1], weight[:, None] * x[edges[0]])


def expectation(drop: Callable[[], Tensor], aggregate: Callable[[Tensor], Tensor], k: float, units: Any) -> Tensor:
    """The exact mean of the aggregate over all masks of the independent `units`; without its zeros, what is dropped
    from is positive."""
    outputs = torch.func.vmap(lambda _: drop(), randomness="different")(torch.empty(30_000))
    values = {tuple(mask): n for n, mask in enumerate((outputs.flatten(1)[:, units] != 0).tolist())}
    assert len(values) == 2 ** len(units)
    return sum(  # type: ignore[return-value]
        k ** sum(mask) * (1 - k) ** (len(mask) - sum(mask)) * aggregate(outputs[n]) for mask, n in values.items()
    )


@pytest.mark.parametrize("k", [0.25, 0.75])
@pytest.mark.parametrize("undirected", [False, True])
@pytest.mark.parametrize("keep_self_loops", [False, True])
def test_expectation_of_the_aggregate_is_kept_by_enumeration_of_edges(
    k: float, undirected: bool, keep_self_loops: bool
) -> None:
    x, weight = torch.randn(3, 2, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    options: dict[str, Any] = {"undirected": undirected, "keep_self_loops": keep_self_loops, "keep_prob": k}
    units = ([0, 2] if undirected else [0, 1, 2, 3]) + ([] if keep_self_loops else [4])
    mean = expectation(lambda: drop_edge_weight(EDGES, weight, **options), lambda w: aggregated(x, EDGES, w), k, units)
    torch.testing.assert_close(mean, aggregated(x, EDGES, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [0.25, 0.75])
def test_expectation_of_the_aggregate_is_kept_by_enumeration_of_nodes_and_messages(k: float) -> None:
    x, weight = torch.rand(3, 2, dtype=torch.float64) + 0.1, torch.rand(5, dtype=torch.float64)
    whole = aggregated(x, EDGES, weight)
    mean = expectation(lambda: drop_node(x, keep_prob=k), lambda y: aggregated(y, EDGES, weight), k, [0, 2, 4])
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=1e-12)
    few, ones = EDGES[:, 1:3], torch.ones(2, dtype=torch.float64)
    mean = expectation(
        lambda: drop_message(x[few[0]], keep_prob=k),
        lambda messages: torch.zeros_like(x).index_add(0, few[1], messages),
        k,
        range(4),
    )
    torch.testing.assert_close(mean, aggregated(x, few, ones), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("undirected", [False, True])
@pytest.mark.parametrize("keep_self_loops", [False, True])
def test_removed_edges_are_those_of_weight_zero(undirected: bool, keep_self_loops: bool) -> None:
    edges = random_graph(30, 200)
    weight = torch.rand(edges.shape[1])
    weight[::9] = 0.0  # an edge of weight 0 is an edge
    options: dict[str, Any] = {"undirected": undirected, "keep_self_loops": keep_self_loops, "p": 0.4}
    kept = seeded(1, drop_edge_weight, edges, **options) != 0
    fewer, left = seeded(1, drop_edge, edges, weight, **options)
    assert torch.equal(fewer, edges[:, kept])
    assert torch.equal(left, seeded(1, drop_edge_weight, edges, weight, **options)[kept])


def random_graph(nodes: int, edges: int, first: int = 0) -> Tensor:
    """An undirected graph with repeated edges and self-loops, in any order."""
    half = torch.randint(first, first + nodes, (2, edges))
    both = torch.cat([half, half[:, : edges // 2].flip(0), half[:, :20]], 1)
    return both[:, torch.randperm(both.shape[1])]


@pytest.mark.parametrize("first", [0, 2**31 - 25, 2**32 - 50])
def test_undirected_pairs_share_one_fate_and_others_have_their_own(first: int) -> None:
    edges = random_graph(50, 3000, first)
    kept = drop_edge_weight(edges, p=0.5, undirected=True) != 0
    outcomes: dict[frozenset[int], set[bool]] = {}
    for source, target, outcome in zip(*edges.tolist(), kept.tolist(), strict=True):
        outcomes.setdefault(frozenset((source, target)), set()).add(outcome)
    assert all(len(outcome) == 1 for outcome in outcomes.values())
    share = sum(outcome == {True} for outcome in outcomes.values()) / len(outcomes)
    assert 0.4 < share < 0.6
    order = torch.randperm(edges.shape[1])
    first_order, second = (
        seeded(3, drop_edge_weight, e, p=0.5, undirected=True) for e in (edges, edges.flip(0)[:, order])
    )
    assert torch.equal(second, first_order[order])
    directed = drop_edge_weight(torch.stack([edges[0], edges[0]]), p=0.5) != 0
    assert len({(n, f) for n, f in zip(edges[0].tolist(), directed.tolist(), strict=True)}) > 90


def test_different_pairs_have_different_draws_of_a_key_of_128_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    far = 2**31
    pairs = torch.tensor([[0, 5], [1, 4], [2, 3], [0, 1], [1, far + 5], [1, 5], [5, 5], [far, far + 1], [0, far]])
    edges = torch.cat([pairs, pairs.flip(1)]).T
    kept = torch.func.vmap(lambda _: drop_edge_weight(edges, undirected=True), randomness="different")(torch.empty(64))
    first, second = kept.chunk(2, 1)
    assert torch.equal(first, second)
    assert len({tuple(column) for column in first.T.tolist()}) == len(pairs)
    masks = set()
    for words in torch.eye(5, 4, dtype=torch.int64) * 2**31:
        monkeypatch.setattr(sites, "random_bits", lambda *_, words=words: words)
        masks.add(tuple(drop_edge_weight(torch.arange(64).expand(2, 64), undirected=True).tolist()))
    assert len(masks) == 5


def test_int32_edges_have_the_fate_of_int64_ones() -> None:
    edges = random_graph(50, 300)
    first, second = (seeded(1, drop_edge_weight, e, undirected=True) for e in (edges, edges.int()))
    assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("k", [0.1, 0.5, 0.9])
def test_rate_of_undirected_edges_is_k_and_pairs_are_independent(k: float) -> None:
    n = max(draws_for(k * k, 0.01), draws_for(k, 0.01))
    edges = torch.stack([torch.arange(2 * n), torch.arange(2 * n) + 1])
    kept = drop_edge_weight(edges, keep_prob=k, undirected=True) != 0
    check_rate(int(kept.sum()), 2 * n, k, 0.01)
    check_rate(int((kept[::2] & kept[1::2]).sum()), n, k * k, 0.01)


def test_self_loops_are_not_duplicated_and_stay_on_request() -> None:
    loops = torch.arange(100).expand(2, 100)
    edges = torch.cat([random_graph(100, 500), loops], 1)
    fewer, _ = drop_edge(edges, p=0.3, undirected=True)
    assert fewer.shape[1] < edges.shape[1]
    for node in range(100):
        count = [int(((e[0] == node) & (e[1] == node)).sum()) for e in (edges, fewer)]
        assert count[1] in (0, count[0])
    is_loop = edges[0] == edges[1]
    for undirected in (False, True):
        weight = drop_edge_weight(edges, p=0.5, undirected=undirected, keep_self_loops=True)
        assert (weight[is_loop] == 1).all()
        assert set(weight[~is_loop].tolist()) == {0.0, 2.0}
        fewer, weight = drop_edge(edges, p=1.0, undirected=undirected, keep_self_loops=True)
        assert torch.equal(fewer, edges[:, is_loop])
        assert torch.equal(weight, torch.ones_like(weight))


def test_eval_and_keep_prob_zero_and_one() -> None:
    weight, x = torch.rand(5), torch.randn(5, 3)
    for options in ({"training": False}, {"p": 0.0}, {"p": 0.0, "undirected": True}):
        edges, same = drop_edge(EDGES, weight, **options)
        assert edges is EDGES
        assert same is weight
        assert drop_edge_weight(EDGES, weight, **options) is weight
        assert torch.equal(drop_edge_weight(EDGES, **options), torch.ones(5))
    for function in (drop_node, drop_message):
        assert function(x, 0.5, training=False) is x
        assert function(x, 0.0) is x
        assert torch.equal(function(x, 1.0), torch.zeros(5, 3))
    for layer in (DropNode(), DropMessage()):
        assert layer.eval()(x) is x
    assert DropEdge().eval()(EDGES, weight)[1] is weight
    assert drop_edge(EDGES, p=1.0)[0].shape == (2, 0)
    after = [seeded(1, lambda k: (drop_edge(EDGES, keep_prob=k), torch.rand(2))[1], k) for k in (1.0, 0.5)]
    assert torch.equal(*after)


def test_weights_of_any_shape_and_gradients() -> None:
    weight = torch.rand(5, 3, 2, dtype=torch.float64, requires_grad=True)
    out = seeded(1, drop_edge_weight, EDGES, weight, keep_prob=0.5)
    kept = seeded(1, drop_edge_weight, EDGES, keep_prob=0.5)
    assert 0 < (kept == 0).sum() < 5
    assert torch.equal(out, weight * kept[:, None, None])
    assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], kept[:, None, None].expand(5, 3, 2).double())
    fewer = seeded(1, drop_edge, EDGES, weight, keep_prob=0.5)[1]
    assert torch.equal(torch.autograd.grad(fewer.sum(), weight)[0], kept[:, None, None].expand(5, 3, 2).double())
    assert torch.autograd.gradcheck(lambda w: seeded(1, drop_edge_weight, EDGES, w, 0.5), weight)
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    for function in (drop_node, drop_message):
        assert torch.autograd.gradcheck(lambda x, f=function: seeded(1, f, x, 0.5), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once_and_dropped_infinities_are_zero(dtype: torch.dtype) -> None:
    edges = random_graph(50, 300)
    weight = torch.rand(edges.shape[1]).to(dtype)
    y, wide = (seeded(1, drop_edge_weight, edges, w, 0.3) for w in (weight, weight.float()))
    assert y.dtype == dtype
    assert torch.equal(y, wide.to(dtype))
    worst = torch.full_like(weight, torch.inf)
    assert set(drop_edge_weight(edges, worst).tolist()) == {0.0, torch.inf}
    x = torch.rand(50, 4).to(dtype) + 1
    for function in (drop_node, drop_message):
        assert set((function(x, 0.5) / x).unique().tolist()) == {0.0, 2.0}


def test_rates_of_each_edge_and_node() -> None:
    edges = torch.arange(3000).expand(2, 3000)
    k = torch.tensor([1.0, 0.5, 0.0]).repeat(1000)
    for undirected in (False, True):
        weight = drop_edge_weight(edges, keep_prob=k, undirected=undirected).reshape(1000, 3)
        assert (weight[:, 0] == 1).all()
        assert 400 < (weight[:, 1] == 2).sum() < 600
        assert (weight[:, 2] == 0).all()
    y = drop_node(torch.ones(3, 4), keep_prob=torch.tensor([[1.0], [0.0], [1.0]]))
    assert torch.equal(y[:, 0], torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="does not broadcast"):
        drop_node(torch.ones(3, 4), keep_prob=torch.full((4,), 0.5))


def test_nodes_share_a_draw_over_features_and_messages_do_not() -> None:
    kept = drop_node(torch.ones(400, 3, 2)) != 0
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert 100 < kept[:, 0, 0].sum() < 300
    kept = drop_message(torch.ones(400, 2)) != 0
    assert not torch.equal(kept[:, 0], kept[:, 1])
    x = torch.ones(9, 4)
    assert drop_node(x, inplace=True) is x
    assert DropMessage(inplace=True)(x) is x


@pytest.mark.parametrize(
    ("edges", "weight", "options", "error", "message"),
    [
        ([[0], [1]], None, {}, TypeError, r"^edge_index must be a tensor of shape \(2, edges\), got list$"),
        (torch.ones(2, 3), None, {}, TypeError, r"^edge_index must hold integers, int64 or int32, got torch.float32$"),
        (EDGES.T, None, {}, ValueError, r"^edge_index must have the shape \(2, edges\), got \(5, 2\)$"),
        (EDGES[0], None, {}, ValueError, r"^edge_index must have the shape \(2, edges\), got \(5,\)$"),
        (EDGES - 1, None, {}, ValueError, r"^edge_index must hold numbers of nodes, from 0 and below 2\*\*32, got -1$"),
        (EDGES + 2**32 - 2, None, {}, ValueError, r"from 0 and below 2\*\*32, got 4294967296$"),
        (EDGES, None, {"num_nodes": 2}, ValueError, r"from 0 and below num_nodes=2, got 2$"),
        (EDGES, torch.ones(4), {}, ValueError, r"^edge_weight must have .* each of the 5 edges, got \(4,\)$"),
        (EDGES, torch.tensor(1.0), {}, ValueError, r"^edge_weight must have .* each of the 5 edges, got \(\)$"),
        (EDGES, 0.5, {}, TypeError, r"^edge_weight must be a tensor or None, got float: the rate comes after it$"),
        (EDGES, torch.ones(5, dtype=torch.int64), {}, RuntimeError, "result type Float"),
        (EDGES, None, {"p": 2}, ValueError, "dropout probability has to be between 0 and 1, but got 2"),
        (EDGES, None, {"p": 0.5, "keep_prob": 0.5}, TypeError, "give the rate as p or as keep_prob"),
    ],
)
def test_wrong_edges(edges: Any, weight: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    for function in (drop_edge, drop_edge_weight):
        for training in (True, False):
            with pytest.raises(error, match=message):
                function(edges, weight, training=training, **options)
    if not options:
        for call in (DropEdge(), DropEdge().edge_weight):
            with pytest.raises(error, match=message):
                call(edges, weight)


def test_wrong_features_and_messages() -> None:
    with pytest.raises(ValueError, match=r"^drop_node takes features of shape \(nodes, ...\), got a 0-D tensor$"):
        drop_node(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^drop_message takes messages of shape \(edges, features, ...\), got a 1-D"):
        DropMessage()(torch.ones(3))
    for function in (drop_node, drop_message):
        with pytest.raises(RuntimeError, match="result type Float"):
            function(EDGES)


def test_empty_graphs() -> None:
    none = torch.empty(2, 0, dtype=torch.int64)
    for undirected in (False, True):
        edges, weight = drop_edge(none, undirected=undirected, keep_self_loops=True, num_nodes=0)
        assert (edges.shape, weight.shape) == ((2, 0), (0,))
    assert drop_node(torch.ones(0, 3)).shape == drop_message(torch.ones(0, 3)).shape == (0, 3)


class Network(nn.Module):
    """Two sums over neighbors with all three, by plain index_add."""

    def __init__(self, removed: bool, undirected: bool = True) -> None:
        super().__init__()
        self.removed = removed
        self.node, self.edge, self.message = DropNode(0.2), DropEdge(0.4, undirected=undirected), DropMessage(0.3)
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.node(x)
        if self.removed:
            edges, weight = self.edge(edges)
        else:
            weight = self.edge.edge_weight(edges)
        messages = self.message(weight[:, None] * self.linear(x)[edges[0]])
        return torch.zeros_like(x).index_add(0, edges[1], messages)


def test_seeds_generators_frozen_masks_rates_and_copies() -> None:
    model, x, edges = Network(True), torch.randn(9, 3), random_graph(9, 40)
    assert torch.equal(seeded(1, model, x, edges), seeded(1, model, x, edges))
    assert not torch.equal(model(x, edges), model(x, edges))
    for options in ({}, {"undirected": True}):
        first, second = (
            drop_edge_weight(edges, generator=torch.Generator().manual_seed(5), **options) for _ in range(2)
        )
        assert torch.equal(first, second)
    with torchdrop.frozen_masks(model, seed=1):
        assert torch.equal(model(x, edges), model(x, edges))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(seeded(1, twin, x, edges), seeded(1, model, x, edges))
    assert torchdrop.keep_probs(model) == {"node": 0.8, "edge": 0.6, "message": 0.7}
    torchdrop.set_keep_prob(model, {"edge": 0.9})
    assert repr(model.edge) == "DropEdge(p=0.1, undirected=True, keep_self_loops=False)"
    scheduler = torchdrop.KeepProbScheduler(model, {"*": torchdrop.schedules.linear(1.0, 0.5, 2)})
    scheduler.step()
    assert set(torchdrop.keep_probs(model).values()) == {0.75}
    assert list(model.state_dict()) == ["linear.weight", "linear.bias"]
    assert all(isinstance(m, nn.modules.dropout._DropoutNd) for m in (model.node, model.edge, model.message))


@pytest.mark.parametrize("removed", [False, True])
def test_monte_carlo_on_a_graph(removed: bool) -> None:
    model, x, edges = Network(removed).eval(), torch.randn(9, 3), random_graph(9, 40)
    with torchdrop.mc_dropout(model, seed=1, batch_dim=None) as report:
        first, second = model(x, edges), model(x, edges)
        assert {s.module for s in report.sources if s.active} == {"node", "edge" if removed else "", "message"}
    with torchdrop.mc_dropout(model, seed=1, batch_dim=None):
        assert torch.equal(model(x, edges), first)
    assert not torch.equal(first, second)
    options: dict[str, Any] = {"samples": 12, "seed": 3, "task": "regression", "batch_dim": None}
    loop = torchdrop.mc_predict(model, (x, edges), strategy="loop", **options).mean
    strategy = "auto" if removed else "vectorized"
    torch.testing.assert_close(torchdrop.mc_predict(model, (x, edges), strategy=strategy, **options).mean, loop)


@pytest.mark.parametrize("undirected", [False, True])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(undirected: bool, randomness: str) -> None:
    edges = random_graph(20, 100)
    weight = torch.rand(3, edges.shape[1])
    kept = torch.func.vmap(lambda w: drop_edge_weight(edges, w, undirected=undirected) != 0, randomness=randomness)(
        weight
    )
    assert torch.equal(kept[0], kept[1]) == (randomness == "same")
    same = torch.func.vmap(lambda w: drop_edge_weight(edges, w, 0.0, undirected=undirected))(weight)
    assert torch.equal(same, weight)
    rows = torch.func.vmap(drop_node, randomness=randomness)(torch.ones(3, 40, 2))
    assert torch.equal(rows[0], rows[1]) == (randomness == "same")
    assert torch.equal(rows[..., 0], rows[..., 1])


@pytest.mark.parametrize("normalize", [False, True])
def test_inside_a_convolution_of_torch_geometric(normalize: bool) -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    conv = geometric.GCNConv(3, 4, normalize=normalize, bias=False)
    x, edges = torch.randn(9, 3), random_graph(9, 40)
    layer = DropEdge(0.5, undirected=True, keep_self_loops=True)  # GCNConv gives nodes the self-loops they lack
    fewer, weight = seeded(1, layer, edges)
    static = seeded(1, layer.edge_weight, edges)
    torch.testing.assert_close(conv(x, fewer, weight), conv(x, edges, static))
    if not normalize:
        expected = torch.zeros(9, 4).index_add(0, edges[1], static[:, None] * conv.lin(x)[edges[0]])
        torch.testing.assert_close(conv(x, edges, static), expected)
        message = DropMessage(0.5)
        conv.register_message_forward_hook(lambda module, inputs, messages: message(messages))
        expected = torch.zeros(9, 4).index_add(0, edges[1], seeded(2, message, conv.lin(x)[edges[0]]))
        torch.testing.assert_close(seeded(2, conv, x, edges), expected)


@pytest.mark.slow
@pytest.mark.parametrize("undirected", [False, True])
def test_compiled_without_breaks_and_rates_without_recompilation(undirected: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, x, edges = Network(False, undirected), torch.randn(9, 3), random_graph(9, 40)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for p in (0.5, 0.2, 0.9):
        for layer in (model.node, model.edge, model.message):
            layer.p = p
        torch.testing.assert_close(seeded(1, compiled, x, edges), seeded(1, model, x, edges))
    assert counter.frame_count == 1
    for options in ({"undirected": undirected, "keep_self_loops": True},):
        function = torch.compile(lambda e, o=options: drop_edge_weight(e, p=0.3, **o), fullgraph=True)
        torch.testing.assert_close(seeded(1, function, edges), seeded(1, drop_edge_weight, edges, p=0.3, **options))

"""Every variant in a small model: what the tests that hold for all of them run over."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import torchdrop

ROWS = 6

EDGES = torch.tensor([[0, 1, 1, 2, 3, 4, 5, 0, 2, 5], [1, 0, 2, 1, 4, 3, 0, 5, 5, 2]])


class Residual(nn.Module):
    """x + drop(f(x))."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.body, self.drop = nn.Linear(12, 12), drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.body(x)))


class Branch(Residual):
    """x + f(x) on a part of the rows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x, self.body)


class Added(nn.Module):
    """x + drop(f(x)), in one operator; f's bias in it too, or not."""

    def __init__(self, drop: nn.Module, with_bias: bool) -> None:
        super().__init__()
        self.body, self.drop, self.bias = nn.Linear(12, 12), drop, None
        if with_bias:
            self.bias = nn.Parameter(torch.linspace(-1.0, 1.0, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.body(x))
        return self.drop(y, x) if self.bias is None else self.drop(y, self.bias, x)


class Attention(nn.Module):
    """Two heads of six features, with dropout of heads or keys."""

    def __init__(self, heads: nn.Module | None = None, keys: nn.Module | None = None) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.heads, self.keys = heads, keys

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1)
        if self.keys is not None:
            scores = self.keys(scores)
        y = scores.softmax(-1) @ v
        if self.heads is not None:
            y = self.heads(y)
        return self.out(y.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Layers that may be skipped."""

    def __init__(self, keep_graph: bool) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(4)]
        self.layers = torchdrop.LayerDrop(layers, 0.5, keep_graph=keep_graph)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Graph(nn.Module):
    """A sum over neighbors, with dropout of edges, nodes and messages."""

    def __init__(self) -> None:
        super().__init__()
        self.edges, self.nodes = torchdrop.DropEdge(0.3, undirected=True), torchdrop.DropNode(0.3)
        self.messages, self.linear = torchdrop.DropMessage(0.3), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        edges, weight = self.edges(EDGES.to(x.device))
        x = self.nodes(self.linear(x))
        messages = self.messages(x[edges[0]])
        if weight is not None:
            messages = messages * weight.unsqueeze(-1).to(x.dtype)
        return torch.zeros_like(x).index_add(0, edges[1], messages)


class Cell(nn.Module):
    """A step of one's own with zoneout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.zoneout = nn.Linear(12, 12), torchdrop.Zoneout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.zoneout(torch.tanh(self.linear(x)), x)


class First(nn.Module):
    """The outputs of a recurrent layer, without its states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Variant(NamedTuple):
    """A model with one variant, and what can be asked of it.

    Args:
        make: the model, in train mode.
        shape: of an input, rows first.
        names: the layers with a rate, as `torchdrop.keep_probs` lists them.
        ids: how many ids an input is made of; 0 for numbers.
        own_rows: whether each row has a mask of its own.
        whole: whether keep_prob 1 gives what eval mode gives.
        compiles: whether torch.compile takes it in one piece.
        vmap: whether it can be batched by torch.func.vmap.
        draws: whether it draws anything, or its masks are fixed.
        reads: whether it reads what it has drawn, because layers are skipped or edges removed by it.
        skips: whether Python code skips layers by it, so that a trace would hold one choice.
        independent: whether a part of the rows is an input, too. The nodes of a graph are one whole.
        empty: whether it takes no rows at all.
        subset: whether the output in train mode is a part of that in eval mode, which changes with each draw.
        sized_by_rate: whether shapes follow from the rate, so that another rate is compiled anew.
        stays_on: whether an exported program keeps its noise when it is moved to eval mode.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (ROWS, 12)
    names: tuple[str, ...] = ()
    ids: int = 0
    own_rows: bool = True
    whole: bool = True
    compiles: bool = True
    vmap: bool = True
    draws: bool = True
    reads: bool = False
    skips: bool = False
    independent: bool = True
    empty: bool = True
    subset: bool = False
    sized_by_rate: bool = False
    stays_on: bool = False

    @property
    def batch_dim(self) -> int | None:
        """The dimension of rows for Monte Carlo inference."""
        return 0 if self.independent else None


def between(drop: nn.Module, *last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), drop, *(last or (nn.Linear(12, 12),)))


def weighted(model: nn.Module, names: str) -> nn.Module:
    return torchdrop.apply_weight_dropout(model, names, 0.3)


def mixed(model: nn.Module) -> nn.Module:
    """With weights that have moved since they were remembered."""
    torchdrop.apply_mixout(model, "0.weight", 0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def conv(drop: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), drop, nn.Conv2d(4, 2, 1))


SEQUENCE, IMAGE = (ROWS, 5, 12), (ROWS, 3, 7, 7)
FIRST_WEIGHT = "0.parametrizations.weight.0"

VARIANTS: dict[str, Variant] = {
    "dropout": Variant(lambda: between(torchdrop.Dropout(0.3)), names=("2",)),
    "gaussian": Variant(lambda: between(torchdrop.GaussianDropout(0.3)), names=("2",)),
    "dropout_add": Variant(lambda: nn.Sequential(Added(torchdrop.DropoutAdd(0.3), False)), names=("0.drop",)),
    "bias_dropout_add": Variant(lambda: nn.Sequential(Added(torchdrop.BiasDropoutAdd(0.3), True)), names=("0.drop",)),
    "relu_dropout": Variant(lambda: between(torchdrop.ReLUDropout(0.3)), names=("2",)),
    "gelu_dropout": Variant(lambda: between(torchdrop.GELUDropout(0.3)), names=("2",)),
    "drop_path": Variant(lambda: nn.Sequential(Residual(torchdrop.DropPath(0.3))), names=("0.drop",)),
    "stochastic_depth": Variant(
        lambda: nn.Sequential(Residual(torchdrop.StochasticDepth(0.3, "row"))), names=("0.drop",)
    ),
    "efficient_stochastic_depth": Variant(
        lambda: nn.Sequential(Branch(torchdrop.EfficientStochasticDepth(0.5))),
        names=("0.drop",),
        sized_by_rate=True,
        stays_on=True,
    ),
    "drop_block": Variant(lambda: conv(torchdrop.DropBlock2d(0.3, 3)), IMAGE, ("2",)),
    "drop_block_marginal": Variant(lambda: conv(torchdrop.DropBlock2d(0.2, 3, scaling="marginal")), IMAGE, ("2",)),
    "patch": Variant(
        lambda: between(torchdrop.PatchDropout(0.5)), SEQUENCE, ("2",), subset=True, sized_by_rate=True, stays_on=True
    ),
    "masksembles": Variant(lambda: between(torchdrop.Masksembles(12, 3)), own_rows=False, draws=False),
    "multi_sample": Variant(
        lambda: between(torchdrop.MultiSampleDropout(nn.Linear(12, 12), 0.3)), names=("2.dropout",)
    ),
    "locked": Variant(lambda: between(torchdrop.LockedDropout(0.3, batch_first=True)), SEQUENCE, ("2",)),
    "weight": Variant(lambda: weighted(between(nn.Tanh()), "0.weight"), names=(FIRST_WEIGHT,), own_rows=False),
    "weight_lstm": Variant(
        lambda: nn.Sequential(First(weighted(nn.LSTM(12, 8, batch_first=True), "weight_hh_*"))),
        SEQUENCE,
        ("0.layer.parametrizations.weight_hh_l0.0",),
        own_rows=False,
        compiles=False,
        vmap=False,
        empty=False,
    ),
    "mixout": Variant(lambda: mixed(between(nn.Tanh())), names=(FIRST_WEIGHT,), own_rows=False),
    "targeted": Variant(
        lambda: torchdrop.apply_targeted_dropout(between(nn.Tanh()), "0.weight", 0.5, 0.5),
        names=(FIRST_WEIGHT,),
        own_rows=False,
    ),
    "embedding": Variant(
        lambda: nn.Sequential(torchdrop.EmbeddingDropout(20, 12, p=0.3)), (ROWS, 5), ("0.dropout",), 20, False
    ),
    "word": Variant(
        lambda: nn.Sequential(torchdrop.WordDropout(0.3, unk_id=1), nn.Embedding(20, 12)), (ROWS, 5), ("0",), ids=20
    ),
    "word_vectors": Variant(lambda: between(torchdrop.WordDropout(0.3)), SEQUENCE, ("2",)),
    "zoneout": Variant(lambda: nn.Sequential(Cell()), names=("0.zoneout",)),
    "zoneout_lstm": Variant(
        lambda: nn.Sequential(First(torchdrop.ZoneoutLSTM(12, 8, batch_first=True, zoneout_hidden=0.3))),
        SEQUENCE,
        ("0.layer.zoneout_hidden", "0.layer.zoneout_cell"),
    ),
    "zoneout_gru": Variant(
        lambda: nn.Sequential(First(torchdrop.ZoneoutGRU(12, 8, batch_first=True, zoneout_hidden=0.3))),
        SEQUENCE,
        ("0.layer.zoneout_hidden",),
    ),
    "recurrent_lstm": Variant(
        lambda: nn.Sequential(First(torchdrop.RecurrentDropoutLSTM(12, 8, batch_first=True))),
        SEQUENCE,
        ("0.layer.recurrent_dropout",),
    ),
    "recurrent_gru": Variant(
        lambda: nn.Sequential(First(torchdrop.RecurrentDropoutGRU(12, 8, batch_first=True, per_step=False))),
        SEQUENCE,
        ("0.layer.recurrent_dropout",),
    ),
    "drop_head": Variant(
        lambda: nn.Sequential(Attention(heads=torchdrop.DropHead(0.5, dim=1))), SEQUENCE, ("0.heads",)
    ),
    "drop_key": Variant(lambda: nn.Sequential(Attention(keys=torchdrop.DropKey(0.3))), SEQUENCE, ("0.keys",)),
    "layer_drop": Variant(
        lambda: nn.Sequential(Stack(False)),
        names=("0.layers",),
        own_rows=False,
        compiles=False,
        vmap=False,
        reads=True,
        skips=True,
    ),
    "layer_drop_in_graph": Variant(lambda: nn.Sequential(Stack(True)), names=("0.layers",), own_rows=False),
    "graph": Variant(
        lambda: nn.Sequential(Graph()),
        names=("0.edges", "0.nodes", "0.messages"),
        own_rows=False,
        compiles=False,
        vmap=False,
        reads=True,
        independent=False,
        empty=False,
    ),
    "concrete": Variant(lambda: between(torchdrop.ConcreteDropout(0.3)), whole=False, stays_on=True),
    "concrete_layer": Variant(
        lambda: nn.Sequential(torchdrop.ConcreteLayer(nn.Linear(12, 12), 0.3, regularizers=(1e-6, 1e-3))),
        whole=False,
        stays_on=True,
    ),
    "standout": Variant(lambda: nn.Sequential(torchdrop.Standout(nn.Linear(12, 12))), whole=False, stays_on=True),
    "variational": Variant(lambda: between(torchdrop.VariationalLinear(12, 12)), whole=False, stays_on=True),
    "sparse_variational": Variant(
        lambda: between(torchdrop.SparseVariationalLinear(12, 12, log_sigma2=-3.0)), whole=False, stays_on=True
    ),
    "compact": Variant(
        lambda: torchdrop.compact([nn.Linear(12, 16), nn.ReLU(), torchdrop.Dropout(0.4), nn.Linear(16, 12)]),
        names=("2",),
        own_rows=False,
    ),
}


CPU = torch.device("cpu")


def inputs(variant: Variant, device: torch.device = CPU) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if variant.ids:
        return torch.randint(2, variant.ids, variant.shape, generator=generator).to(device)
    return torch.randn(variant.shape, generator=generator).to(device)


def built(name: str, device: torch.device = CPU) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return VARIANTS[name].make().to(device)


def gradients(model: nn.Module, output: Tensor) -> list[Tensor | None]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(output.square().sum(), wanted, allow_unused=True))

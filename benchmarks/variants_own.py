"""What the other variants cost: each beside the operation that it stands in for, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import checks
import torch
from harness import Effort, compare
from torch import Tensor, nn

from torchdrop import (
    ConcreteLayer,
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    DropEdge,
    DropHead,
    DropKey,
    EfficientStochasticDepth,
    EmbeddingDropout,
    LayerDrop,
    LockedDropout,
    Masksembles,
    MultiSampleDropout,
    PatchDropout,
    RecurrentDropoutLSTM,
    SparseVariationalLinear,
    Standout,
    VariationalLinear,
    ZoneoutLSTM,
    apply_mixout,
    apply_targeted_dropout,
    apply_weight_dropout,
)

PLAIN, VARIANT = "plain", "variant"

Map = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Own:
    """A variant and the operation without it.

    Args:
        label: as in tables.
        operation: what `plain` is, in words.
        variant: a module, in train mode.
        plain: the operation.
        x: what both take.
        same: whether the variant does in eval mode what `plain` does.
        random: whether two calls in train mode differ.
    """

    label: str
    operation: str
    variant: nn.Module
    plain: nn.Module
    x: Tensor
    same: bool = True
    random: bool = True


class _Calls(nn.Module):
    """A module that is called in a way of its own."""

    def __init__(self, call: Map, *modules: nn.Module) -> None:
        super().__init__()
        self.inner, self._call = nn.ModuleList(modules), call

    def forward(self, x: Tensor) -> Any:
        return self._call(x)


def _masks(quick: bool) -> Iterator[Own]:
    """Variants that multiply by a mask or choose, beside a multiplication of the same tensor."""

    def case(label: str, variant: nn.Module, *shape: int, **options: bool) -> Own:
        sizes = (max(1, shape[0] // 8), *shape[1:]) if quick else shape
        return Own(
            label, "x * s", variant, _Calls(lambda x: x * 1.0), checks.sample(sizes, torch.float32, "cpu"), **options
        )

    yield case("LockedDropout(0.5)", LockedDropout(0.5, batch_first=True), 64, 70, 400)
    yield case("DropBlock1d(0.1, 7)", DropBlock1d(0.1, 7), 32, 256, 256)
    yield case("DropBlock2d(0.1, 7, scaling='marginal')", DropBlock2d(0.1, 7, scaling="marginal"), 32, 96, 28, 28)
    yield case("DropBlock3d(0.1, 5)", DropBlock3d(0.1, 5), 8, 16, 28, 28, 28)
    yield case("Masksembles(256, 4)", Masksembles(256, 4), 32, 256, 14, 14, same=False, random=False)
    yield case("DropHead(0.2)", DropHead(0.2), 32, 12, 197, 64)
    yield case("DropKey(0.2)", DropKey(0.2), 16, 12, 197, 197)
    yield case("PatchDropout(0.5)", PatchDropout(0.5), 64, 197, 384)


def _layers(quick: bool) -> Iterator[Own]:
    """Variants of a fully connected layer."""
    width, rows = (64, 16) if quick else (1024, 128)
    torch.manual_seed(0)
    linear, x = nn.Linear(width, width), checks.sample((rows, width), torch.float32, "cpu")

    def case(
        label: str, variant: nn.Module, operation: str = "Linear", plain: nn.Module = linear, **options: bool
    ) -> Own:
        return Own(label, operation, variant, plain, x, **options)

    yield case("weight dropout (0.5)", apply_weight_dropout(copy.deepcopy(linear), "weight", 0.5))
    mixed = apply_mixout(nn.Linear(width, width), "weight", 0.5)
    with torch.no_grad():
        mixed.bias.copy_(linear.bias)
        mixed.parametrizations.weight.original.copy_(linear.weight)
    yield case("mixout (0.5)", mixed)
    yield case("targeted dropout (0.5, 0.5)", apply_targeted_dropout(copy.deepcopy(linear), "weight", 0.5, 0.5))
    yield case("ConcreteLayer", ConcreteLayer(copy.deepcopy(linear), 0.1, regularizers=(1e-6, 1e-3)))
    yield case("VariationalLinear", VariationalLinear(width, width), same=False)
    yield case("SparseVariationalLinear", SparseVariationalLinear(width, width), same=False)
    yield case(
        "Standout", Standout(copy.deepcopy(linear)), "Linear, ReLU", nn.Sequential(linear, nn.ReLU()), same=False
    )
    yield case("MultiSampleDropout(0.5), 8 samples", MultiSampleDropout(copy.deepcopy(linear), 0.5, 8))

    branch = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    depth = EfficientStochasticDepth(0.5)
    inner = copy.deepcopy(branch)
    yield case(
        "EfficientStochasticDepth(0.5)", _Calls(lambda x: depth(x, inner), depth, inner), "x + f(x)",
        _Calls(lambda x: x + branch(x), branch),
    )  # fmt: skip
    stack = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(12))
    skipped = LayerDrop(copy.deepcopy(stack), 0.2)
    yield case("LayerDrop(0.2)", _Calls(lambda x: _through(skipped, x), skipped), "all 12 layers",
               _Calls(lambda x: _through(stack, x), stack))  # fmt: skip


def _through(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _sequences(quick: bool) -> Iterator[Own]:
    """Variants of an LSTM and of an embedding."""
    width, rows, steps, words = (16, 4, 6, 50) if quick else (256, 32, 35, 10_000)
    torch.manual_seed(0)
    lstm, x = nn.LSTM(width, width), checks.sample((steps, rows, width), torch.float32, "cpu")
    variants = {
        "weight dropout (0.5) of nn.LSTM": apply_weight_dropout(copy.deepcopy(lstm), "weight_hh_*", 0.5),
        "ZoneoutLSTM": ZoneoutLSTM(width, width),
        "RecurrentDropoutLSTM": RecurrentDropoutLSTM(width, width),
    }
    for label, variant in variants.items():
        yield Own(label, "nn.LSTM", variant, lstm, x, same=label.startswith("weight"))
    embedding = nn.Embedding(words, width)
    dropped = EmbeddingDropout(words, width, p=0.1)
    dropped.load_state_dict(embedding.state_dict())
    ids = torch.randint(words, (steps, rows))
    yield Own("EmbeddingDropout(0.1)", "nn.Embedding", dropped, embedding, ids)


def _graphs(quick: bool) -> Iterator[Own]:
    """DropEdge before a sum over neighbors."""
    nodes, edges = (50, 200) if quick else (10_000, 100_000)
    torch.manual_seed(0)
    edge_index = torch.randint(nodes, (2, edges))
    x, layer = checks.sample((nodes, 64), torch.float32, "cpu"), DropEdge(0.5)

    def summed(x: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
        messages = x[index[0]] if weight is None else weight[:, None] * x[index[0]]
        return torch.zeros_like(x).index_add(0, index[1], messages)

    yield Own(
        "DropEdge(0.5)", "sum over neighbors", _Calls(lambda x: summed(x, *layer(edge_index)), layer),
        _Calls(lambda x: summed(x, edge_index)), x,
    )  # fmt: skip


def cases(quick: bool) -> Iterator[Own]:
    for family in (_masks, _layers, _sequences, _graphs):
        yield from family(quick)


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def fault(case: Own) -> str | None:
    """Why a variant is not timed: it repeats itself, is not finite, or differs from the operation in eval mode."""
    with torch.no_grad():
        first, second = _first(case.variant(case.x)), _first(case.variant(case.x))
        expected = _first(case.plain(case.x))
        still = _first(case.variant.eval()(case.x))
        case.variant.train()
    finite = torch.where(first == -torch.inf, torch.zeros_like(first), first)  # what DropKey puts before softmax
    if not bool(finite.isfinite().all()):
        return "values that are not finite"
    if case.random and torch.equal(first, second):
        return "one result in two calls"
    if case.same and not torch.allclose(still, expected, rtol=1e-4, atol=1e-5):
        return "another result in eval mode"
    return None


def _step(module: nn.Module, x: Tensor) -> Callable[[], object]:
    x = x.detach().requires_grad_(x.is_floating_point())
    inputs = [one for one in (x, *module.parameters()) if one.requires_grad]

    def run() -> object:
        out = _first(module(x))
        return torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)

    return run


def measure(case: Own, effort: Effort) -> dict[str, Any]:
    """Seconds of both, and the variant's as a multiple of the operation's."""
    found = fault(case)
    result: dict[str, Any] = {"label": case.label, "operation": case.operation, "shape": list(case.x.shape)}
    if found:
        return result | {"fault": f"wrong: {found}"}
    calls = {VARIANT: _step(case.variant, case.x), PLAIN: _step(case.plain, case.x)}
    compared = compare(calls, effort)
    return result | {
        "rounds": compared.rounds,
        "seconds": {name: compared.seconds(name) for name in calls},
        "times_plain": compared.ratio(VARIANT, PLAIN),
    }

"""torch.fx's symbolic tracing: layers are leaves of the trace, functions are nodes, and dropout follows the flags."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer, symbolic_trace

import torchdrop
from tests.family import VARIANTS, built, inputs
from tests.seeding import seeded
from torchdrop import functional

FUNCTIONS = sorted(set(functional.__all__) - {"masksembles_masks", "masksembles_predict", "multi_sample_loss"})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.skips])
def test_a_traced_variant_is_the_variant_in_both_modes(name: str, training: bool) -> None:
    model, x = nn.Sequential(built(name)).train(training), inputs(VARIANTS[name])
    traced = symbolic_trace(model)
    for mode in (True, False, True):
        assert torch.equal(seeded(3, traced.train(mode), x), seeded(3, model.train(mode), x))
    assert not VARIANTS[name].draws or not torch.equal(seeded(3, traced, x), seeded(3, traced.eval(), x))


def test_a_layer_is_a_leaf_as_torchs_is() -> None:
    ours, stock = (nn.Sequential(nn.Linear(3, 3), layer) for layer in (torchdrop.Dropout(0.5), nn.Dropout(0.5)))
    for model in (ours, ours.eval()):
        assert str(symbolic_trace(model).graph) == str(symbolic_trace(stock).graph)


class Everything(Tracer):
    """A tracer that has no leaves of its own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


@pytest.mark.parametrize("training", [True, False])
def test_a_tracer_without_leaves_meets_a_call_of_the_layer(training: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), torchdrop.Dropout(0.5)).train(training)
    assert [node.target for node in Everything().trace(model).nodes if node.op == "call_module"] == ["1"]


class Doubled(torchdrop.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


def _hooked() -> nn.Module:
    layer = torchdrop.Dropout(0.5)
    layer.register_forward_hook(lambda module, args, output: output * 3)
    return layer


def _patched() -> nn.Module:
    layer = torchdrop.DropPath(0.5)
    old = layer.forward
    layer.forward = lambda x: old(x) * 3  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize("make", [lambda: Doubled(0.5), _hooked, _patched])
def test_what_stands_around_a_forward_is_traced_once(make: Any) -> None:
    model, x = nn.Sequential(make()), torch.randn(40, 5)
    traced = symbolic_trace(model.eval())
    for mode in (True, False):
        assert torch.equal(seeded(0, traced.train(mode), x), seeded(0, model.train(mode), x))


def _arguments(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a function is called with, the input excluded."""
    x, kept = torch.rand(2, 6, 6, 6) + 0.5, {"keep_prob": 0.5}
    more: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "bias_dropout_add": ((torch.ones(6), x), kept),
        "concrete_dropout": ((0.0,), {}),
        "drop_block1d": ((), {**kept, "block_size": 3}),
        "drop_block2d": ((), {**kept, "block_size": 3}),
        "drop_block3d": ((), {**kept, "block_size": 3}),
        "drop_head": ((), {**kept, "dim": 1}),
        "drop_key_mask": ((x,), {**kept, "is_causal": True}),
        "dropout_add": ((x,), kept),
        "efficient_stochastic_depth": ((nn.Linear(6, 6),), kept),
        "embedding_dropout": ((torch.randn(20, 5),), kept),
        "local_reparameterization": ((x,), {}),
        "masksembles": ((torch.eye(6, dtype=torch.bool),), {}),
        "mixout": ((torch.zeros_like(x),), kept),
        "multi_sample_dropout": ((nn.Linear(6, 6),), kept),
        "sparse_variational_kl": ((), {}),
        "scaled_dot_product_attention": ((x, x), kept),
        "targeted_dropout": ((), {**kept, "target_fraction": 0.5}),
        "variational_kl": ((), {}),
        "zoneout": ((torch.zeros_like(x),), kept),
    }
    return more.get(name, ((), kept))


def _input(name: str) -> Tensor:
    if name in ("drop_edge", "drop_edge_weight"):
        return torch.randint(5, (2, 30))
    if name == "embedding_dropout":
        return torch.randint(20, (6, 5))
    flat = ("targeted_dropout", "weight_dropout")
    rows = ("dropout1d", "drop_block1d", "patch_dropout", "patch_dropout_indices", "locked_dropout", "word_dropout")
    dims = 2 if name in flat else 3 if name in rows else 5 if name.endswith("3d") else 4
    return torch.rand((2, 6, 6, 6, 6)[:dims]) + 0.5


class Calls(nn.Module):
    """A function of torchdrop's in a forward, under this module's flag or a given one."""

    def __init__(self, name: str, **flags: Any) -> None:
        super().__init__()
        self.function, self.flags = getattr(functional, name), flags
        self.args, self.kwargs = _arguments(name)
        self.branch = next((arg for arg in self.args if isinstance(arg, nn.Module)), None)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.args, **self.kwargs, **self.flags)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_a_node_that_keeps_its_flag(name: str) -> None:
    flagless = ("masksembles", "variational_kl", "sparse_variational_kl", "scaled_dot_product_attention")
    has_flag = name not in flagless
    for flags in [{"training": True}, {"training": False}] if has_flag else [{}]:
        model, x = Calls(name, **flags), _input(name)
        traced = symbolic_trace(model)
        (node,) = [node for node in traced.graph.nodes if node.op == "call_function"]
        assert node.target is model.function
        assert {"training": node.kwargs.get("training")} == {"training": None, **flags}
        left, right = (seeded(0, run, x) for run in (model, traced))
        left, right = (out if isinstance(out, tuple) else (out,) for out in (left, right))
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_layer_drop_in_one_path_is_refused_or_warned_of() -> None:
    model = built("layer_drop")
    with pytest.raises(RuntimeError, match="use keep_graph=True, or trace it in eval mode"):
        symbolic_trace(model)
    with pytest.warns(UserWarning, match="the graph runs all of them"):
        symbolic_trace(model.eval())


def test_a_layer_alone_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"trace torch\.nn\.Sequential\(layer\)"):
        symbolic_trace(torchdrop.Dropout(0.5))


def test_graphs_are_code_and_pickles() -> None:
    model = nn.Sequential(built("efficient_stochastic_depth"), Calls("drop_path", training=True), Doubled(0.3))
    x, traced = torch.randn(6, 12), symbolic_trace(model)
    again = pickle.loads(pickle.dumps(traced))
    assert isinstance(again, GraphModule)
    assert torch.equal(seeded(0, again, x), seeded(0, model, x))


def test_monte_carlo_reaches_a_traced_model() -> None:
    model = symbolic_trace(nn.Sequential(nn.Linear(4, 64), torchdrop.Dropout(0.5), nn.Linear(64, 1)).eval())
    assert (torchdrop.mc_predict(model, torch.randn(5, 4), samples=16).std > 0).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
def test_quantization_aware_training_keeps_dropout(training: bool) -> None:
    quantize = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qat_qconfig_mapping

    model = nn.Sequential(nn.Linear(8, 8), torchdrop.Dropout(0.5), nn.Linear(8, 8)).train()
    x = torch.randn(4, 8)
    prepared = quantize.prepare_qat_fx(model, get_default_qat_qconfig_mapping(), (x,))
    assert isinstance(prepared.get_submodule("1"), torchdrop.Dropout)
    prepared.train(training)
    assert torch.equal(seeded(1, prepared, x), seeded(2, prepared, x)) == (not training)


def test_a_layer_that_gets_its_tensors_by_name_is_a_leaf_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torchdrop.ReLUDropout(0.5), torchdrop.DropoutAdd(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(input=self.one(input=x), residual=x)

    traced = symbolic_trace(Named())
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["one", "two"]
    assert torch.equal(traced.eval()(torch.ones(3)), torch.full((3,), 2.0))

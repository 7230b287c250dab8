"""Graphs that run where our operators are not known: torch.jit.trace and ONNX, and what torch.jit.script is told."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from tests.family import VARIANTS, built, inputs
from tests.seeding import seeded

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

TRACED = [name for name, variant in VARIANTS.items() if not variant.skips]


def traced(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, (x,), check_trace=False)


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_in_train_mode_draws_and_one_in_eval_mode_does_not(name: str) -> None:
    model, x = built(name), inputs(VARIANTS[name])
    graph = traced(model, x)
    outputs = [seeded(seed, graph, x) for seed in (1, 1, 2, 3, 4)]
    assert outputs[0].shape == model(x).shape or VARIANTS[name].subset
    assert torch.equal(*outputs[:2])
    assert not VARIANTS[name].draws or not all(torch.equal(outputs[0], other) for other in outputs[2:])
    expected = model.eval()(x)
    assert torch.allclose(traced(model, x)(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["dropout", "drop_path", "drop_block", "zoneout_lstm", "drop_head"])
def test_traces_hold_no_operator_of_ours_and_run_from_a_file(name: str) -> None:
    model, x = built(name), inputs(VARIANTS[name])
    file = io.BytesIO()
    torch.jit.save(traced(model, x), file)
    assert b"torchdrop::" not in file.getvalue()
    file.seek(0)
    assert torch.jit.load(file)(x[:3]).shape == model(x[:3]).shape


@pytest.mark.parametrize(
    "layer",
    [
        torchdrop.Dropout(0.3),
        torchdrop.Dropout(0.3, inplace=True),
        torchdrop.Dropout(0.3, inverted=False),
        torchdrop.Dropout(torch.tensor(0.3)),
        torchdrop.AlphaDropout(0.3),
        torchdrop.GaussianDropout(0.3),
        torchdrop.ReLUDropout(0.3),
    ],
    ids=repr,
)
def test_the_values_of_a_trace_have_the_layers_moments(layer: nn.Module) -> None:
    x = torch.full((200_000,), 1.5)
    ours, theirs = layer(x.clone()), traced(nn.Sequential(layer), x.clone())(x.clone())
    if not isinstance(layer, torchdrop.GaussianDropout):
        assert theirs.unique().tolist() == pytest.approx(ours.unique().tolist())
    # Means and deviations of 2 * 10^5 values of deviation below 2: within 0.05 but for a chance below 1e-9.
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.05)
    assert ours.std().item() == pytest.approx(theirs.std().item(), abs=0.05)


def test_a_dropped_infinity_is_0_and_gradients_have_the_mask() -> None:
    x = torch.full((50,), torch.inf, requires_grad=True)
    y = traced(nn.Sequential(torchdrop.Dropout(0.5)), x)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.where(y == 0, 0.0, 2.0))
    assert (y == 0).any()


def test_what_no_graph_can_hold_is_refused() -> None:
    x = torch.ones(4)
    with pytest.raises(RuntimeError, match="set its generator to None, or put the model in eval mode"):
        traced(nn.Sequential(torchdrop.Dropout(0.5, generator=torch.Generator())), x)
    with pytest.raises(RuntimeError, match="use keep_graph=True, or put the model in eval mode"):
        traced(built("layer_drop"), inputs(VARIANTS["layer_drop"]))


@pytest.mark.parametrize("strict", [False, True])
def test_what_onnx_is_given_holds_no_operator_of_ours(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter sets its flag and exports with torch.export; what follows needs packages that are not here."""
    flags = pytest.importorskip("torch.onnx._internal.exporter._flags")
    model, x = nn.Sequential(built("dropout"), built("dropout_add"), built("drop_key")), torch.randn(6, 5, 12)
    for wanted in (False, True):
        monkeypatch.setattr(flags, "_is_onnx_exporting", wanted)
        graph = torch.export.export(model, (x,), strict=strict).graph
        assert any("torchdrop" in str(node.target) for node in graph.nodes) == (not wanted)
    assert sum("rand" in str(node.target) for node in graph.nodes) == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name", [name for name in VARIANTS if "weight" not in name and name not in ("mixout", "targeted")]
)
def test_script_is_told_what_helps(name: str, training: bool) -> None:
    model, x = built(name).train(training), inputs(VARIANTS[name])
    with pytest.raises(
        RuntimeError, match=r"torch\.jit\.script cannot compile torchdrop's \w+: .*use torch\.jit\.trace"
    ):
        torch.jit.script(model)
    assert torch.allclose(traced(model.eval(), x)(x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]
)
def test_the_remedy_that_script_is_told_helps(kind: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), getattr(torchdrop, kind)(0.5)), torch.randn(2, 6, 8)
    x = x if kind[-2:] not in ("2d", "3d") else torch.randn((2, 6, 3, 8) if kind[-2:] == "2d" else (2, 6, 3, 3, 8))
    with pytest.raises(RuntimeError, match=r"torchdrop\.replace\(model, to='torch'\)"):
        torch.jit.script(model)
    torchdrop.replace(model, to="torch")
    script = torch.jit.script(model)
    assert not torch.equal(script(x), script(x))
    assert torch.equal(script.eval()(x), model.eval()(x))

"""Exported programs: dropout follows what moves such a program between train and eval mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

import torchdrop
from tests import TORCH
from tests.family import VARIANTS, built, inputs
from tests.seeding import seeded
from torchdrop.core import exported as _exported

pytestmark = pytest.mark.slow

EXPORTED = [name for name, variant in VARIANTS.items() if variant.compiles and variant.draws]


class Dropped(nn.Module):
    def __init__(self, training: bool, inplace: bool) -> None:
        super().__init__()
        self.flags = (0.5, training, inplace)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, *self.flags)


def move(program: GraphModule, training: bool) -> None:
    """What torch.ao's and torchao's move_exported_model_to_eval and move_exported_model_to_train do to dropout."""
    program.graph.eliminate_dead_code()
    program.recompile()
    for inplace in (False, True):
        pattern, other = (
            torch.export.export(Dropped(flag, inplace), (torch.randn(1),)).module() for flag in (not training, training)
        )
        for graph in (pattern, other):
            for node in [node for node in graph.graph.nodes if node.op == "call_module"]:
                graph.graph.erase_node(node)  # guards of the inputs
            graph.recompile()
        replace_pattern_with_filters(program, pattern, other, match_filters=[], ignore_literals=True)
        program.recompile()


def exported(model: nn.Module, x: Tensor, strict: bool = False) -> GraphModule:
    return torch.export.export(model, (x,), strict=strict).module()


def test_the_move_moves_torchs_dropout() -> None:
    program, x = exported(nn.Sequential(nn.Dropout(0.5)), torch.ones(50)), torch.ones(50)
    assert not torch.equal(program(x), x)
    move(program, False)
    assert torch.equal(program(x), x)
    move(program, True)
    assert not torch.equal(program(x), x)


@pytest.mark.parametrize(
    ("name", "strict"),
    [
        *[pytest.param(name, False, id=f"{name}-plain") for name in EXPORTED],
        # Strict export is made by Dynamo, which test_family has for all variants.
        *[pytest.param(name, True, id=f"{name}-strict", marks=pytest.mark.slow) for name in EXPORTED[::3]],
    ],
)
def test_a_moved_program_drops_in_train_mode_alone(name: str, strict: bool) -> None:
    if strict and TORCH < (2, 9) and name in ("zoneout_lstm", "recurrent_gru", "layer_drop_in_graph"):
        pytest.skip("Dynamo of PyTorch 2.8 does not export it")
    model, x = built(name), inputs(VARIANTS[name])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = exported(model, x, strict)
    warned = any("keeps this layer's noise" in str(warning.message) for warning in caught)
    assert warned == VARIANTS[name].stays_on
    assert torch.allclose(seeded(1, program, x), seeded(1, model, x), atol=1e-6)
    assert not torch.equal(seeded(1, program, x), seeded(2, program, x))
    if warned:
        return
    move(program, False)
    assert torch.allclose(program(x), model.eval()(x), atol=1e-5)
    move(program, True)
    assert not torch.equal(seeded(1, program, x), seeded(2, program, x))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        lambda **more: torchdrop.Dropout(0.3, inverted=False, **more),
        lambda **more: torchdrop.Dropout2d(0.3, inverted=False, **more),
        lambda **more: torchdrop.AlphaDropout(0.3, **more),
        lambda **more: torchdrop.Dropout(torch.tensor([[0.2], [0.7], [0.5]]).expand(3, 5)[..., None, None], **more),
    ],
)
def test_its_eval_mode_is_the_layers(layer: Callable[..., nn.Module], inplace: bool) -> None:
    model, x = nn.Sequential(layer(inplace=inplace)), torch.randn(3, 5, 4, 4)
    program = exported(model, x.clone())
    assert torch.allclose(seeded(0, program, x.clone()), seeded(0, model, x.clone()))
    move(program, False)
    assert torch.allclose(program(x.clone()), model.eval()(x.clone()), atol=1e-6)


def test_a_program_that_is_moved_and_compiled_follows() -> None:
    model, x = nn.Sequential(nn.Linear(4, 64), torchdrop.Dropout(0.5)), torch.randn(8, 4)
    program = exported(model, x)
    for training in (False, True):
        move(program, training)
        torch.compiler.reset()
        compiled = torch.compile(program, backend="aot_eager")
        assert torch.equal(seeded(1, compiled, x), seeded(2, compiled, x)) == (not training)


def test_only_export_looks_for_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exported, "trains", lambda device: pytest.fail("it was looked for"))
    model, x = nn.Sequential(torchdrop.Dropout(0.5)), torch.ones(10)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    with pytest.raises(pytest.fail.Exception):
        exported(model, x)

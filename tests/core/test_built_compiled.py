"""Layers that are built inside compiled code, in one piece, as torch.nn's can be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from tests import TORCH
from torchdrop.core.rate import DEFAULT_P
from torchdrop.layers.drop_path import NO_DROP

pytestmark = pytest.mark.slow

LINEAR = nn.Linear(8, 8)
EDGES = torch.tensor([[0, 1, 2], [1, 2, 0]])


def with_another_rate(x: Tensor) -> Tensor:
    layer = torchdrop.Dropout()
    layer.keep_prob = 0.25
    return layer(x)


def in_place(x: Tensor) -> Tensor:
    return torchdrop.Dropout(0.5, inplace=True)(x * 1.0)


BUILT: dict[str, Callable[[Tensor], Tensor]] = {
    "stock": lambda x: nn.Dropout(0.5)(x),
    "dropout": lambda x: torchdrop.Dropout(0.5)(x),
    "default": lambda x: torchdrop.Dropout()(x),
    "keep_prob": lambda x: torchdrop.Dropout(keep_prob=0.8)(x),
    "tensor": lambda x: torchdrop.Dropout(keep_prob=torch.linspace(0.1, 0.9, 8))(x),
    "shared": lambda x: torchdrop.Dropout(0.5, shared_axes=1)(x),
    "original": lambda x: torchdrop.Dropout(0.5, inverted=False)(x),
    "eval": lambda x: torchdrop.Dropout(0.5, inverted=False).eval()(x),
    "shard": lambda x: torchdrop.Dropout(0.5, shard=torchdrop.Shard(0, 0, 8))(x),
    "another rate": with_another_rate,
    "in place": in_place,
    "two": lambda x: nn.Sequential(torchdrop.Dropout(0.5), torchdrop.Dropout(0.1))(x),
    "1d": lambda x: torchdrop.Dropout1d(0.5)(x),
    "2d": lambda x: torchdrop.Dropout2d(0.5)(x.unsqueeze(-1)),
    "3d": lambda x: torchdrop.Dropout3d(0.5)(x.unsqueeze(-1)),
    "alpha": lambda x: torchdrop.AlphaDropout(0.5)(x),
    "feature alpha": lambda x: torchdrop.FeatureAlphaDropout(0.5)(x),
    "gaussian": lambda x: torchdrop.GaussianDropout(0.5)(x),
    "add": lambda x: torchdrop.DropoutAdd(0.5)(x, x),
    "bias and add": lambda x: torchdrop.BiasDropoutAdd(0.5)(x, x[0, 0], x),
    "relu": lambda x: torchdrop.ReLUDropout(0.5)(x),
    "gelu": lambda x: torchdrop.GELUDropout(0.5)(x),
    "path": lambda x: torchdrop.DropPath(0.5)(x),
    "path without a rate": lambda x: torchdrop.DropPath()(x),
    "stochastic depth": lambda x: torchdrop.StochasticDepth(0.5, "row")(x),
    "on a part": lambda x: torchdrop.EfficientStochasticDepth(0.5)(x, LINEAR),
    "block": lambda x: torchdrop.DropBlock1d(0.5, 3)(x),
    "locked": lambda x: torchdrop.LockedDropout(0.5)(x),
    "patch": lambda x: torchdrop.PatchDropout(0.5)(x),
    "zoneout": lambda x: torchdrop.Zoneout(0.5)(x, x * 2.0),
    "head": lambda x: torchdrop.DropHead(0.5)(x.unsqueeze(-1)),
    "key": lambda x: torchdrop.DropKey(0.5)(x).softmax(-1),
    "node": lambda x: torchdrop.DropNode(0.5)(x[0]),
    "message": lambda x: torchdrop.DropMessage(0.5)(x[0]),
    "edge": lambda x: torchdrop.DropEdge(0.5)(EDGES)[0] * x.sum(),
    "multi-sample": lambda x: torchdrop.MultiSampleDropout(LINEAR, 0.5)(x),
}


NEEDS = {"another rate": (2, 7), "edge": (2, 9)}
"""The PyTorch whose Dynamo follows setters of properties, and selections whose size follows from data."""


@pytest.mark.parametrize("name", BUILT)
def test_a_layer_is_built_and_called_in_compiled_code(name: str) -> None:
    torch.compiler.reset()
    x = torch.randn(4, 6, 8)
    compiled = torch.compile(BUILT[name], fullgraph=True, backend="aot_eager")
    if NEEDS.get(name, (0,)) > TORCH:
        with pytest.raises(Exception, match=r"fset|[Dd]ynamic shape"):
            compiled(x)
        return
    for seed in (1, 2):
        torch.manual_seed(seed)
        y = compiled(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(y, BUILT[name](x), msg=name)


def test_a_layer_that_leaves_compiled_code_works_as_any_other() -> None:
    torch.compiler.reset()

    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.layer = torchdrop.Dropout(0.25)
            return self.layer(x)

    model, x = Late(), torch.ones(4096)
    torch.compile(model, backend="aot_eager")(x)
    torch.manual_seed(1)
    y = model.layer(x)
    torch.manual_seed(1)
    assert torch.equal(y, torchdrop.Dropout(0.25)(x))
    assert model.layer.p == 0.25
    assert model.layer.eval()(x) is x


def test_both_names_of_the_rate_are_refused_there_too() -> None:
    torch.compiler.reset()
    for build in (lambda: torchdrop.Dropout(0.5, keep_prob=0.5), lambda: torchdrop.DropPath(0.0, keep_prob=0.5)):
        with pytest.raises(TypeError, match="not both"):
            build()
        with pytest.raises(Exception, match="not both" if TORCH >= (2, 9) else "TypeError|[Oo]bserved exception"):
            torch.compile(lambda x, build=build: build()(x), fullgraph=True, backend="aot_eager")(torch.ones(3))


def test_a_rate_that_is_a_layers_is_not_taken_for_the_default() -> None:
    for rate in (torchdrop.Dropout().p, torchdrop.DropPath().p):
        assert rate is not DEFAULT_P
        assert rate is not NO_DROP
        with pytest.raises(TypeError, match="not both"):
            torchdrop.Dropout(rate, keep_prob=0.5)
        with pytest.raises(TypeError, match="not both"):
            torchdrop.DropPath(rate, keep_prob=0.5)

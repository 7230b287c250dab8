"""The search for random calls in the source of a class."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.configure.reached import Block
from torchdrop.configure.drawing import random_calls

pytestmark = pytest.mark.usefixtures("one_thread")


def alpha(x: Tensor) -> Tensor:
    return torch.alpha_dropout(x, 0.5, True)


class Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).bernoulli_(0.5)


class OtherName(nn.Module):
    def forward(this, x: Tensor) -> Tensor:  # noqa: N805
        return this.helper(x)

    def helper(this, x: Tensor) -> Tensor:  # noqa: N805
        return F.dropout(x, 0.5, this.training)


class Inherits(OtherName):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2

    def helper(self, x: Tensor) -> Tensor:
        return x


class CallsItsBase(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OfFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return alpha(x)


class OfAutograd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Inverse.apply(x)  # type: ignore[no-any-return]


class OfMethod(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(x.shape).uniform_()


class Quiet(nn.Module):
    """What is random is not in its forward, or is a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.start = torch.rand(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x).dropout if False else torchdrop.functional.dropout(self.drop(x))


class TestSearch:
    @pytest.mark.parametrize(
        ("kind", "calls"),
        [
            (Block, ["F.dropout"]), (CallsItsBase, ["F.dropout"]), (OtherName, ["F.dropout"]), (Inherits, []),
            (OfFunction, ["torch.alpha_dropout"]),
            (OfAutograd, ["Tensor.bernoulli_"]), (OfMethod, ["Tensor.uniform_"]), (Quiet, []),
            (nn.LSTM, ["torch.lstm"]), (nn.GRUCell, []), (nn.Transformer, []), (nn.RReLU, ["F.rrelu"]),
            (nn.Sequential, []), (nn.Module, []),
        ],
    )  # fmt: skip
    def test_what_a_class_calls(self, kind: type[nn.Module], calls: list[str]) -> None:
        assert random_calls(kind) == calls

    def test_functions_of_other_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are found by their names in the module, as `torchvision.ops.stochastic_depth` is."""
        other = types.ModuleType("other_package")
        exec("def noisy(x):\n    return x", vars(other))
        monkeypatch.setattr(alpha, "__module__", "other_package")
        monkeypatch.setitem(sys.modules, "other_package", other)
        own = type("Own", (nn.Module,), {"forward": OfFunction.forward})
        assert random_calls(own) == ["torch.alpha_dropout"]

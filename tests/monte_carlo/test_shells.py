"""Shells are made again where a module has changed since the last pass, whatever has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torchdrop

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


class Scaled(nn.Module):
    """A layer whose output depends on attributes of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.scale, self.terms, self.named, self.extra = 1.0, [1.0], {"shift": 0.0}, [nn.Identity()]
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.linear(x)) * self.scale * sum(self.terms) + self.named["shift"] + self.offset
        return self.extra[-1](y)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def replaced(model: Any) -> None:
    model.linear = nn.Linear(4, 4)


def another_buffer(model: Any) -> None:
    model.offset = torch.ones(4)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a number": lambda model: setattr(model, "scale", 3.0),
    "an element of a list": lambda model: model.terms.append(4.0),
    "an entry of a dict": lambda model: model.named.update(shift=2.0),
    "a module in a list": lambda model: model.extra.append(nn.Tanh()),
    "a submodule": replaced,
    "a buffer": another_buffer,
    "a buffer's values": lambda model: model.offset.add_(1.0),
    "a parameter": lambda model: setattr(model.linear, "bias", nn.Parameter(torch.ones(4))),
    "a parameter's values": lambda model: model.linear.weight.data.mul_(2.0),
    "a parameter less": lambda model: model.linear.register_parameter("bias", None),
    "a rate": lambda model: setattr(model.drop, "p", 0.25),
    "a hook": lambda model: model.linear.register_forward_hook(lambda module, args, out: out + 1),
    "a parametrization": lambda model: parametrize.register_parametrization(model.linear, "weight", Doubled()),
    "a forward": lambda model: setattr(model.linear, "forward", lambda x: x * 5),
    "an attribute under another name": lambda model: (delattr(model, "scale"), setattr(model, "scale", 7.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_passes_is_seen_by_the_second(change: str) -> None:
    def sample(model: nn.Module) -> Tensor:
        with torchdrop.mc_dropout(model, seed=0) as report, report.sample(3):
            return model(X)

    model, other = Scaled().eval(), Scaled().eval()
    with torch.no_grad(), torchdrop.mc_dropout(model, seed=0) as report:
        with report.sample(3):
            before, again = model(X), model(X)
        torch.manual_seed(2)
        CHANGES[change](model)
        with report.sample(3):
            after = model(X)
    torch.manual_seed(2)
    CHANGES[change](other)
    with torch.no_grad():
        assert torch.equal(before, again)
        assert not torch.equal(before, after)
        assert torch.equal(after, sample(other))
        assert torch.equal(after, sample(model))


def test_a_flag_that_a_pass_needs_is_set_on_shells_alone() -> None:
    model = Scaled().train()
    for flag in (True, False):
        model.train(flag)
        with torchdrop.mc_dropout(model, seed=0):
            first = model(X)
            assert model.drop.training is flag
        result = torchdrop.mc_predict(model, X, samples=2, seed=0, keep_samples=True)
        assert model.training is flag
        assert result.samples is not None
        assert torch.allclose(result.samples[0], first)

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


class Plain(nn.Module):
    """A layer with no list, dict or the like, so that its shell lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.power, self.last = 1.0, None

    def forward(self, x: Tensor) -> Tensor:
        return x * self.power - int(hasattr(self, "last"))


class Scaled(nn.Module):
    """A layer whose output depends on attributes of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.scale, self.terms, self.named, self.extra = 1.0, [1.0], {"shift": 0.0}, [nn.Identity()]
        self.register_buffer("offset", torch.zeros(4))
        self.steps, self.plain = [self.linear], Plain()
        self.by_name = {"last": self.plain}

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.linear(x)) * self.scale * sum(self.terms) + self.named["shift"] + self.offset
        return self.by_name["last"](self.extra[-1](y) + len(self.steps))


class Negative(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def replaced(model: Any) -> None:
    model.linear = nn.Linear(4, 4)


def renamed(model: Any) -> None:
    value = model.plain.last
    del model.plain.last
    model.plain.previous = value


def another_buffer(model: Any) -> None:
    model.offset = torch.ones(4)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a number": lambda model: setattr(model, "scale", 3.0),
    "an element of a list": lambda model: model.terms.append(4.0),
    "an entry of a dict": lambda model: model.named.update(shift=2.0),
    "a module in a list": lambda model: model.extra.append(nn.Tanh()),
    "a module in a dict": lambda model: model.by_name.update(last=nn.Tanh()),
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
    "an attribute under another name": renamed,
    "a submodule in a list": lambda model: model.steps.append(model.drop),
    "the class": lambda model: setattr(model.plain, "__class__", Negative),
    "a number of a part": lambda model: setattr(model.plain, "power", 3.0),
}


@pytest.mark.parametrize("passes", [2, 9])  # after many, all shells are compared at once
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_passes_is_seen_by_the_second(change: str, passes: int) -> None:
    def sample(model: nn.Module) -> Tensor:
        with torchdrop.mc_dropout(model, seed=0) as report, report.sample(3):
            return model(X)

    model, other = Scaled().eval(), Scaled().eval()
    with torch.no_grad(), torchdrop.mc_dropout(model, seed=0) as report:
        del model.plain.last
        model.plain.last = None  # which is the last of all attributes now
        with report.sample(3):
            before, *_, again = [model(X) for _ in range(passes)]
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


class Counting(nn.Module):
    """Adds the number of calls, kept in an attribute, a list or a buffer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.drop, self.kind, self.calls = nn.Dropout(0.5), kind, 0
        if kind == "list":
            self.seen: list[None] = []
        if kind == "buffer":
            self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "buffer":
            self.count.add_(1)
            return self.drop(x) + self.count
        if self.kind == "attribute":
            self.calls += 1
            return self.drop(x) + self.calls
        self.seen.append(None)
        return self.drop(x) + len(self.seen)


@pytest.mark.parametrize("kind", ["attribute", "list", "buffer"])
@pytest.mark.parametrize("strategy", ["auto", "loop", "vectorized", "repeated"])
@pytest.mark.parametrize("samples", [5, 20])
def test_each_sample_is_the_first_call(kind: str, strategy: str, samples: int) -> None:
    model = nn.Sequential(Counting(kind)).eval()
    result = torchdrop.mc_predict(model, X.abs(), samples=samples, seed=0, keep_samples=True, strategy=strategy)
    assert result.samples is not None
    assert torch.equal(result.samples.amin((1, 2)), torch.ones(samples))
    assert model[0].calls == 0
    assert kind != "list" or model[0].seen == []
    assert kind != "buffer" or model[0].count == 0


@pytest.mark.parametrize("kind", ["attribute", "list", "buffer"])
def test_a_call_of_a_part_is_surveyed_without_a_trace_of_it(kind: str) -> None:
    model = nn.Sequential(Counting(kind)).eval()
    with torchdrop.mc_dropout(model, seed=0):
        outputs = [model(X.abs()), model(X.abs()), model[0](X.abs()), model[0](X.abs())]
    assert [float(output.min()) for output in outputs] == [1.0, 2.0, 3.0, 4.0]

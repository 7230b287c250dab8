"""A search over models whose modules drop in their own code, which `replace` serves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from torchdrop.tune import cross_validate, grid

pytestmark = pytest.mark.usefixtures("one_thread")


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x).relu(), 0.5, self.training))


class Layer(Function):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = torchdrop.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.first(x).relu()))


def replaced() -> nn.Module:
    model = Function()
    torchdrop.replace(model)
    return model


def with_a_rate() -> nn.Module:
    model = replaced()
    torchdrop.set_keep_prob(model, {"dropout:0": 0.25})
    return model


def scores(build: type[nn.Module] | object, settings: list[dict[str, float]]) -> tuple[list[float], int]:
    x = torch.rand(90, 4, generator=torch.Generator().manual_seed(1))
    found = cross_validate(
        build, x, (x.sum(1) > 2).long(), settings, folds=3, epochs=4,
        loss=F.cross_entropy, score=lambda output, target: -F.cross_entropy(output, target),
    )  # fmt: skip
    return found.scores.flatten().tolist(), found.at_once


def test_one_rate_for_all_is_trained_at_once_as_that_of_a_layer() -> None:
    expected, count = scores(Layer, [{"*": 0.5}])
    assert scores(replaced, [{"*": 0.5}]) == (expected, count)
    assert count == 3


@pytest.mark.filterwarnings("ignore:cross_validate trains one model after another:UserWarning")
@pytest.mark.parametrize("pattern", ["*", "dropout:0"])
def test_rates_of_a_call_are_those_of_a_layer(pattern: str) -> None:
    """With the same masks in each fold and step, so that the scores are the same."""
    expected, _ = scores(Layer, grid({"dropout": [0.25, 0.9]}))
    found, _ = scores(replaced, grid({pattern: [0.25, 0.9]}))
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[:3] != found[3:]
    assert scores(with_a_rate, grid({"dropout:0": [0.25, 0.9]}))[0] == pytest.approx(found)


def test_a_rate_that_was_set_on_a_call_is_followed() -> None:
    class Both(Layer):
        """A layer that the settings name, beside the call."""

        def __init__(self) -> None:
            super().__init__()
            self.other = torchdrop.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.other(x))

    class Call(Function):
        def __init__(self) -> None:
            super().__init__()
            self.other = torchdrop.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.other(x))

    def build() -> nn.Module:
        model = Call()
        torchdrop.replace(model)
        torchdrop.set_keep_prob(model, {"dropout:0": 0.25})
        return model

    expected, _ = scores(Both, [{"other": 1.0, "dropout": 0.25}])
    assert scores(build, [{"other": 1.0}])[0] == pytest.approx(expected, rel=1e-4)
    assert scores(Both, [{"other": 1.0, "dropout": 0.5}])[0] != pytest.approx(expected, rel=1e-4)


def test_a_call_that_no_module_makes_is_named() -> None:
    with pytest.raises(ValueError, match=r"the pattern 'dropout:1' matches none .*dropout:0"):
        scores(replaced, [{"dropout:1": 0.5}])

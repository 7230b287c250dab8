"""Shards under function modes: whatever puts keys of its own in the place of ours meets the same parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
import torchdrop.functional as F
from tests.seeding import seeded
from torchdrop import Shard
from torchdrop.core import sites

LAST = Shard(-1, 2, 8)
"""Of a tensor with 8 columns, those from the third on."""


def of_last(x: Tensor) -> Tensor:
    return x[..., 2:5]


class Model(nn.Module):
    """Columns of a hidden layer, dropped and summed."""

    def __init__(self, shard: Shard | None) -> None:
        super().__init__()
        self.drop, self.shard = torchdrop.Dropout(0.4, shard=shard), shard

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.drop(x), F.dropout(torch.cos(x), 0.3, self.training, shard=self.shard)], 1)


PARTS = (None, Shard(1, 0, 8), Shard(1, 3, 8))


def results(f: Callable[[Model, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Of the whole, and of its two parts put together; the last two dimensions are rows and columns."""
    x = torch.randn(6, 8)
    whole, *parts = (f(Model(shard), part) for shard, part in zip(PARTS, (x, x[:, :3], x[:, 3:]), strict=True))
    first, second = (part.unflatten(-1, (2, -1)) for part in parts)
    return whole, torch.cat([first, second], -1).flatten(-2)


@pytest.mark.parametrize("sampling", ["iid", "latin"])
@pytest.mark.parametrize("strategy", ["loop", "auto"])
@pytest.mark.parametrize("masks", ["independent", "shared"])
def test_monte_carlo(sampling: str, strategy: str, masks: str) -> None:
    def samples(model: Model, x: Tensor) -> Tensor:
        options: dict[str, Any] = {"sampling": sampling, "strategy": strategy, "masks": masks}
        result = torchdrop.mc_predict(
            model.eval(), x, samples=8, seed=1, task="regression", keep_samples=True, **options
        )
        assert result.samples is not None
        return result.samples.reshape(8, *result.samples.shape[-2:])

    whole, parts = results(samples)
    assert whole.shape == (8, 6, 16)
    assert torch.equal(parts, whole)
    assert 0.1 < (whole == 0).double().mean() < 0.7


def test_monte_carlo_in_a_context() -> None:
    def outputs(model: Model, x: Tensor) -> Tensor:
        with torchdrop.mc_dropout(model.eval(), seed=1) as report:
            out = torch.stack([model(x) for _ in range(3)])
        assert report.draws > 0
        return out

    whole, parts = results(outputs)
    assert torch.equal(parts, whole)


def test_monte_carlo_of_rows_that_are_a_shard() -> None:
    model, x = nn.Sequential(torchdrop.Dropout(0.4, shard=Shard(0, 4, 10))).eval(), torch.randn(6, 8)
    result = torchdrop.mc_predict(model, x, samples=5, seed=1, task="regression", keep_samples=True)
    again = torchdrop.mc_predict(model, x, samples=5, seed=1, task="regression", keep_samples=True)
    assert torch.equal(result.samples, again.samples)  # type: ignore[arg-type]


def test_monte_carlo_in_place() -> None:
    layer, x = torchdrop.Dropout(0.4, inplace=True, shard=LAST).eval(), torch.ones(6, 8)
    other = torchdrop.Dropout(0.4).eval()
    with torchdrop.mc_dropout(other, seed=1):
        expected = of_last(other(x))
    part = of_last(x).clone()
    with torchdrop.mc_dropout(layer, seed=1):
        assert layer(part) is part
    assert torch.equal(part, expected)


def test_rates_as_tensors_under_monte_carlo() -> None:
    x, k = torch.ones(6, 8), torch.linspace(0.1, 0.9, 8)
    outputs = []
    for rate, shard, part in ((k, None, x), (of_last(k), LAST, of_last(x))):
        layer = torchdrop.Dropout(keep_prob=rate, shard=shard).eval()
        with torchdrop.mc_dropout(layer, seed=1):
            outputs.append(layer(part))
    assert torch.equal(of_last(outputs[0]), outputs[1])


def test_a_search() -> None:
    from torchdrop.tune.training import Masks

    def outputs(model: Model, x: Tensor) -> Tensor:
        with Masks(3).at(torch.tensor(5)):
            return model(x)

    whole, parts = results(outputs)
    assert torch.equal(parts, whole)


def test_frozen_masks() -> None:
    def outputs(model: Model, x: Tensor) -> Tensor:
        with torchdrop.frozen_masks(model, seed=1):
            return model(x)

    whole, parts = results(outputs)
    assert torch.equal(parts, whole)


def test_disabled() -> None:
    x = torch.randn(6, 8)
    model, part = Model(LAST), of_last(x)
    with torchdrop.disabled(model):
        assert torch.equal(model(part), torch.cat([part, torch.cos(part)], 1))
        assert model.drop(part) is part


def test_audit() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), torchdrop.Dropout(0.4, shard=LAST), nn.Linear(3, 2))
    noise = {"realized rate", "active in eval mode", "ignores training", "never called"}
    found = torchdrop.audit(model, torch.randn(32, 3))
    assert [finding for finding in found.findings if finding.code in noise] == []


@pytest.mark.parametrize("shard", [None, LAST])
def test_a_leaf_is_not_written_to(shard: Shard | None) -> None:
    x = torch.ones(6, 3, requires_grad=True)
    layer = torchdrop.Dropout(0.4, inplace=True, shard=shard)
    with (
        pytest.raises(RuntimeError, match="a leaf Variable that requires grad"),
        torchdrop.mc_dropout(layer, seed=1),
    ):
        layer(x)


def test_a_default_device_costs_no_whole_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "apply_to_whole", None)
    x = torch.randn(6, 8)
    expected = of_last(seeded(7, F.dropout, x))
    with torch.device("cpu"):
        assert torch.equal(seeded(7, F.dropout, of_last(x), shard=LAST), expected)

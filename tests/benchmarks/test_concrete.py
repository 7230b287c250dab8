"""The benchmark of concrete dropout: its data, loss and training, what is judged, and its program."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import concrete
import pytest
import torch
from torch import Tensor

from torchdrop.core.regularization import regularization
from torchdrop.layers.concrete.layer import ConcreteLayer, concrete_regularizers

TINY = concrete.Protocol(8, {10: 4, 30: 6}, 1e-2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_data_are_the_published_line_with_unit_noise() -> None:
    x, y = concrete.sample(50_000, generator())
    assert x.shape == y.shape == (50_000, 1)
    noise = y - 2 * x - 8
    assert abs(noise.mean().item()) < 0.03
    assert abs(noise.std().item() - 1) < 0.02
    assert abs((noise * x).mean().item()) < 0.03


def test_the_loss_is_twice_the_negative_log_likelihood_up_to_a_constant() -> None:
    output, y = torch.randn(7, 2), torch.randn(7, 1)
    normal = torch.distributions.Normal(output[:, 0], (output[:, 1] / 2).exp())
    expected = -2 * normal.log_prob(y[:, 0]).mean() - math.log(2 * math.pi)
    torch.testing.assert_close(concrete.heteroscedastic(output, y), expected)


def test_the_network_has_five_layers_with_rates_of_their_own() -> None:
    factors = concrete_regularizers(100, length_scale=concrete.LENGTH_SCALE)
    network = concrete.Network(16, factors)
    layers = [m for m in network.modules() if isinstance(m, ConcreteLayer)]
    assert [layer.layer.in_features for layer in layers] == [1, 16, 16, 16, 16]
    assert all(layer.regularizers == factors for layer in layers)
    assert network.rates() == pytest.approx([0.1] * len(concrete.LAYERS))
    x = torch.randn(6, 1)
    assert network(x).shape == (6, 2)
    network.eval()
    h = x
    for layer in layers[:3]:
        h = layer.layer(h).relu()
    torch.testing.assert_close(network(x), torch.cat([layers[3].layer(h), layers[4].layer(h)], 1))


def test_batches_go_through_the_examples_in_new_orders() -> None:
    found = list(islice(concrete.batches(50, generator()), 6))
    assert [len(batch) for batch in found] == [20, 20, 10] * 2
    first, second = torch.cat(found[:3]), torch.cat(found[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert not torch.equal(first, second)


def test_training_is_adam_on_loss_and_regularizer_with_a_pace_of_its_own_for_rates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = concrete.sample(30, generator())
    network = concrete.Network(8, concrete_regularizers(30))
    seen: list[Tensor] = []
    monkeypatch.setattr(concrete, "regularization", lambda model: seen.append(regularization(model)) or seen[-1])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    concrete.train(network, x, y, range(1), 1e-2, generator())
    assert len(seen) == 1
    for name, p in network.named_parameters():
        moved = (p - before[name]).abs().max().item()  # Adam's first step is as long as its learning rate
        assert moved == pytest.approx(1e-2 if name.endswith("logit_p") else 1e-3, rel=1e-2)
    concrete.train(network, x, y, range(5), 1e-2, generator())
    assert len(seen) == 6


def test_uncertainty_is_that_of_stochastic_passes_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    network = concrete.Network(32, concrete_regularizers(30))
    with torch.no_grad():
        network.log_variance.layer.weight.zero_()
        network.log_variance.layer.bias.fill_(math.log(4.0))
    x, y = concrete.sample(40, generator())
    found = concrete.uncertainty(network, x, y, seed=1)
    assert found == concrete.uncertainty(network, x, y, seed=1)
    assert found["aleatoric"] == pytest.approx(2.0)
    assert found["epistemic"] > 0
    for layer in network.modules():
        if isinstance(layer, ConcreteLayer):
            layer.dropout.p = 1e-9
    sure = concrete.uncertainty(network, x, y, seed=1)
    assert sure["epistemic"] == pytest.approx(0.0, abs=1e-6)
    mean = network.eval()(x)[:, :1]
    assert sure["rmse"] == pytest.approx((mean - y).square().mean().sqrt().item(), rel=1e-4)


def result(examples: int, rates: list[float], aleatoric: float = 1.0) -> dict[str, Any]:
    runs = [
        {"seed": 0, "seconds": 1.0, "p": [0.9, p, p, p, 0.9], "aleatoric": aleatoric, "epistemic": 0.1, "rmse": 1.0}
        for p in rates
    ]
    return {"examples": examples, "updates": 100, "runs": runs}


@pytest.mark.parametrize(
    ("rates", "outcome"),
    [
        ([[0.4], [0.3], [0.2]], "ok"),
        ([[0.4, 0.2], [0.2, 0.3], [0.2, 0.1]], "ok"),
        ([[0.4], [0.4], [0.2]], "short"),
        ([[0.2], [0.3], [0.4]], "short"),
    ],
)
def test_the_mean_rate_must_fall_at_every_step(rates: list[list[float]], outcome: str) -> None:
    sizes = [result(10**n, values) for n, values in enumerate(rates)]
    rows = concrete.verdict({"sizes": sizes, "settings": {"quick": False}})
    assert [row["verdict"] for row in rows] == [outcome, "ok"]
    quick = concrete.verdict({"sizes": sizes, "settings": {"quick": True}})
    assert {row["verdict"] for row in quick} == {"not judged"}


@pytest.mark.parametrize(("aleatoric", "outcome"), [(1.09, "ok"), (0.91, "ok"), (1.11, "short"), (0.89, "short")])
def test_the_noise_must_be_found_at_the_largest_size(aleatoric: float, outcome: str) -> None:
    sizes = [result(10, [0.4], 3.0), result(100, [0.3], aleatoric)]
    rows = concrete.verdict({"sizes": sizes, "settings": {"quick": False}})
    assert [row["verdict"] for row in rows] == ["ok", outcome]


def test_only_layers_behind_hidden_ones_that_lead_to_the_mean_are_judged() -> None:
    assert concrete.judged({"p": [0.0, 0.1, 0.2, 0.3, 1.0]}) == pytest.approx(0.2)


def test_protocols() -> None:
    assert list(concrete.OURS.updates) == list(concrete.PUBLISHED.updates) == [10, 25, 50, 100, 1000, 10_000]
    assert len(set(concrete.OURS.updates.values())) == 1
    published = [
        epochs * math.ceil(n / 20) for n, epochs in zip(concrete.SIZES, (2000, 1000, 500, 200, 20, 2), strict=True)
    ]
    assert list(concrete.PUBLISHED.updates.values()) == published
    assert concrete.PUBLISHED.units == 1024
    assert concrete.PUBLISHED.rate_learning_rate == concrete.LEARNING_RATE


@pytest.mark.slow
def test_the_program_writes_a_report_and_renders_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(concrete, "OURS", TINY)
    monkeypatch.setattr(concrete, "TESTS", 20)
    output = tmp_path / "made" / "concrete.json"
    concrete.main(["--seeds", "0", "5", "--output", str(output)])
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert [(size["examples"], size["updates"]) for size in report["sizes"]] == [(10, 4), (30, 6)]
    assert [run["seed"] for run in report["sizes"][0]["runs"]] == [0, 5]
    assert report["settings"]["units"] == 8
    assert report["machine"]["load_after"] is not None
    assert {row["verdict"] for row in report["summary"]} <= {"ok", "short"}
    concrete.main(["--render", str(output)])
    rendered = capsys.readouterr().out
    assert rendered.strip() == printed.rpartition("\n\nwritten to")[0].strip()
    assert "| N | updates | p, first |" in rendered
    assert "over the seeds 0, 5" in rendered


@pytest.mark.slow
def test_a_training_can_be_repeated() -> None:
    first, second = (concrete.measure(TINY, 10, 3, iter) | {"seconds": 0} for _ in range(2))
    assert first == second
    assert first["p"] != concrete.measure(TINY, 10, 4, iter)["p"]


def test_a_quick_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(concrete, "QUICK", TINY)
    monkeypatch.setattr(concrete.command, "RESULTS", tmp_path)
    concrete.main(["--quick", "--seeds", "0"])
    assert "its figures mean nothing" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_published_protocol_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concrete, "PUBLISHED", TINY)
    monkeypatch.setattr(concrete.command, "RESULTS", tmp_path)
    concrete.main(["--published", "--seeds", "0"])
    assert [file.name for file in tmp_path.iterdir()] == ["concrete-published.json"]

"""Keep probabilities at inference: the search, what it leaves behind, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from tests.calibrate.predictions import classified
from torchdrop.calibrate import inference_rates, scores
from torchdrop.calibrate.inference_rates import LARGEST, scaled

pytestmark = pytest.mark.usefixtures("one_thread")


class Noisy(nn.Module):
    """f(x) = sum of 64 units, each of which is dropped: its variance is 64 (1 - k) / k."""

    def __init__(self, *keep_probs: float) -> None:
        super().__init__()
        self.drops = nn.ModuleList(torchdrop.Dropout(keep_prob=k) for k in keep_probs)

    def forward(self, x: Tensor) -> Tensor:
        units = torch.ones(len(x), 64, dtype=torch.float64)
        return torch.stack([drop(units).sum(1) for drop in self.drops]).sum(0).unsqueeze(1)


def predictor(model: nn.Module, samples: int = 200) -> Any:
    x = torch.zeros(50, 1)
    return lambda: torchdrop.mc_predict(model, x, samples, task="regression", seed=0, standard_errors=False)


def targets(std: float, mean: float = 64.0) -> Tensor:
    """Fifty values whose mean square deviation from the mean is std^2 exactly."""
    return mean + std * torch.tensor([-1.0, 1.0]).double().repeat(25).unsqueeze(1)


class TestSearch:
    @pytest.mark.parametrize("factor", [0.25, 1.0, 9.0])
    def test_finds_the_variance_of_the_targets(self, factor: float) -> None:
        model = Noisy(0.8)
        fit = inference_rates(model, predictor(model), targets(math.sqrt(factor * 64 * 0.25)))
        assert fit.factors["drops.0"] == pytest.approx(factor, rel=0.2)  # the likelihood is flat there
        assert fit.keep_probs["drops.0"] == scaled(0.8, fit.factors["drops.0"])
        assert fit.after <= fit.before
        with fit.applied(model):
            prediction = predictor(model)()
        assert fit.after == scores(prediction, targets(math.sqrt(factor * 64 * 0.25)))["negative_log_likelihood"]
        assert fit.before == scores(predictor(model)(), targets(math.sqrt(factor * 16)))["negative_log_likelihood"]

    @pytest.mark.parametrize(
        ("std", "match"), [(0.1, "next to no dropout at inference: compare"), (1e3, "more dropout")]
    )
    def test_says_where_the_search_ends(self, std: float, match: str) -> None:
        model = Noisy(0.8)
        with pytest.warns(UserWarning, match=f"^inference_rates: the likelihood still rises where .* prefer {match}"):
            inference_rates(model, predictor(model), targets(std))

    @pytest.mark.parametrize("keep_prob", [0.1, 0.5, 0.99])
    def test_the_factor_is_that_of_the_variance(self, keep_prob: float) -> None:
        for factor in (1 / LARGEST, 0.5, 1.0, LARGEST):
            new = scaled(keep_prob, factor)
            assert (1 - new) / new == pytest.approx(factor * (1 - keep_prob) / keep_prob)
        tensor = scaled(torch.tensor([keep_prob, 1.0, 0.0]), 2.0)
        assert tensor.tolist() == pytest.approx([scaled(keep_prob, 2.0), 1.0, 0.0])

    def test_layers_apart(self) -> None:
        """Only the first layer's noise depends on the row as the targets' does, so it gets more and the other less."""

        class Rows(Noisy):
            def forward(self, x: Tensor) -> Tensor:
                units = torch.ones(len(x), 64, dtype=torch.float64)
                first, second = (drop(units).sum(1, keepdim=True) - 64 for drop in self.drops)
                return first * (x > 0) + second * (x <= 0)

        model = Rows(0.8, 0.8)
        x = torch.tensor([[1.0], [-1.0]]).repeat(25, 1)
        sign = torch.tensor([1.0, 1.0, -1.0, -1.0]).double().repeat(13)[:50].unsqueeze(1)
        y = sign * torch.where(x > 0, 8.0, 2.0)  # variances of 64 and 4, where the layers have 16 each

        def predict() -> Any:
            return torchdrop.mc_predict(model, x, 200, task="regression", seed=0, standard_errors=False)

        fit = inference_rates(model, predict, y, per_layer=True)
        assert fit.factors["drops.0"] == pytest.approx(4.0, rel=0.3)
        assert fit.factors["drops.1"] == pytest.approx(0.25, rel=0.3)
        assert fit.after < inference_rates(model, predict, y).after - 0.1
        table = str(fit)
        assert "drops.1" in table
        assert f"{fit.calls} predictions" in table

    def test_classes_and_a_layer_of_torch_nn(self) -> None:
        model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3)).eval()
        x = torch.randn(60, 8)

        def predict() -> Any:
            return torchdrop.mc_predict(model, 5 * x, 10, task="classification", seed=0, standard_errors=False)

        y = predict().predicted
        with pytest.warns(UserWarning, match="prefer next to no dropout"):
            fit = inference_rates(model, predict, y)
        assert fit.after == pytest.approx(self.at(model, fit, predict, y))
        assert fit.factors["2"] < 0.2  # its own classes are most likely with little noise
        found = fit.compare(model, predict, y)
        assert found.after["negative_log_likelihood"] == pytest.approx(fit.after, rel=1e-5)
        assert found.before["negative_log_likelihood"] == pytest.approx(fit.before, rel=1e-5)

    def at(self, model: nn.Module, fit: Any, predict: Any, y: Tensor) -> float:
        with fit.applied(model):
            return -predict().log_likelihood(y).double().mean().item()


class TestModel:
    def test_is_left_as_it_was(self) -> None:
        model = nn.Sequential(
            torchdrop.Dropout(0.3),
            nn.Dropout(0.1),
            torchdrop.Dropout(0.0),
            torchdrop.Dropout(keep_prob=torch.tensor([0.5, 1.0])),
        )
        before = dict(torchdrop.keep_probs(model))
        state = [vars(module).copy() for module in model]
        calls = iter(range(5))

        def predict() -> Any:
            if next(calls) == 4:
                raise KeyboardInterrupt
            return torchdrop.mc_predict(model, torch.ones(6, 2), 5, task="regression", tau=1.0, seed=0)

        with pytest.raises(KeyboardInterrupt):
            inference_rates(model, predict, torch.ones(6, 2))
        calls = iter(range(10, 99))
        with pytest.warns(UserWarning, match="prefer next to no dropout"):
            fit = inference_rates(model, predict, torch.ones(6, 2))
        assert fit.keep_probs.keys() == {"0", "1", "3"}
        with fit.applied(model):
            assert torchdrop.keep_probs(model)["0"] == fit.keep_probs["0"] != before["0"]
        after = dict(torchdrop.keep_probs(model))
        assert all(torch.equal(torch.as_tensor(after[name]), torch.as_tensor(old)) for name, old in before.items())
        assert [vars(module).keys() for module in model] == [one.keys() for one in state]

    def test_chosen_rates_can_be_set_for_good(self) -> None:
        model = Noisy(0.8)
        fit = inference_rates(model, predictor(model, 20), targets(8.0))
        torchdrop.set_keep_prob(model, fit.keep_probs)
        assert dict(torchdrop.keep_probs(model)) == fit.keep_probs


class TestRefused:
    def test_a_model_without_dropout(self) -> None:
        model = nn.Sequential(torchdrop.Dropout(0.0))
        with pytest.raises(ValueError, match="a layer with a keep_prob between 0 and 1, got none"):
            inference_rates(model, predictor(model), targets(1.0))

    def test_what_is_no_prediction(self) -> None:
        model: Any = Noisy(0.5)
        prediction: Any = torchdrop.mc_predict(model, torch.ones(3, 1), 5)
        with pytest.raises(TypeError, match=r"predict must be a function without arguments .* got Prediction"):
            inference_rates(model, prediction, targets(1.0))
        with pytest.raises(TypeError, match="predict must return a prediction of mc_predict, got Tensor"):
            inference_rates(Noisy(0.5), lambda: torch.ones(3), targets(1.0))  # type: ignore[arg-type, return-value]

    def test_seeds_that_differ(self) -> None:
        model = Noisy(0.5)
        x = torch.zeros(50, 1)
        with pytest.raises(ValueError, match="the same seed at each call, such as seed=0"):
            inference_rates(model, lambda: torchdrop.mc_predict(model, x, 5, task="regression"), targets(1.0))

    def test_targets(self) -> None:
        model = Noisy(0.5)
        with pytest.raises(ValueError, match=r"the predictions' shape \(50, 1\), got \(50,\)"):
            inference_rates(model, predictor(model), torch.zeros(50))
        impossible = classified(torch.tensor([[[1.0, 0.0]]]))
        with pytest.raises(ValueError, match="the likelihood of the targets is 0 wherever"):
            inference_rates(model, lambda: impossible, torch.tensor([1]))

    def test_another_model(self) -> None:
        model = Noisy(0.5)
        fit = inference_rates(model, predictor(model, 10), targets(8.0))
        with pytest.raises(ValueError, match=r"and lacks \['drops.0'\]"), fit.applied(nn.Dropout()):
            pass

"""Temperature and the scale of standard deviations: what they minimize, what follows, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import torchdrop
from tests.calibrate.predictions import classified, regressed
from torchdrop.calibrate import deviation_scale, scores, temperature
from torchdrop.calibrate.scores import interval_shares
from torchdrop.calibrate.search import minimize
from torchdrop.monte_carlo import metrics


def logits_and_targets(rows: int = 400, sharpness: float = 3.0) -> tuple[Tensor, Tensor]:
    """Samples of logits (5, rows, 4) that are too large by this factor, and classes drawn from the right ones."""
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(1, rows, 4, generator=generator, dtype=torch.float64)
    logits = center + 0.5 * torch.randn(5, rows, 4, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(2).mean(0), 1, generator=generator).squeeze(1)
    return sharpness * logits, targets


class TestTemperature:
    def test_on_samples_is_that_of_the_logits(self) -> None:
        """It is where the derivative of the loss of the logits, from autograd, is 0, and the result is their mean."""
        logits, targets = logits_and_targets()
        prediction = classified(logits.softmax(2))
        fit = temperature(prediction, targets)
        value = torch.tensor(fit.value, dtype=torch.float64, requires_grad=True)
        mean = (logits / value).softmax(2).mean(0)
        loss = torch.nn.functional.nll_loss(mean.log(), targets)
        (slope,) = torch.autograd.grad(loss, value)
        assert abs(slope) < 1e-6
        assert fit.after == pytest.approx(loss.item(), abs=1e-9)
        assert fit.before == pytest.approx(metrics.negative_log_likelihood(prediction, targets), abs=1e-9)
        assert 2.0 < fit.value < 4.0
        torch.testing.assert_close(fit(prediction).mean, mean.detach())

    def test_all_statistics_follow(self) -> None:
        logits, targets = logits_and_targets(50)
        fit = temperature(classified(logits.softmax(2)), targets)
        found, expected = fit(classified(logits.softmax(2))), classified((logits / fit.value).softmax(2))
        assert found.statistics.keys() == expected.statistics.keys()
        for name, value in expected.statistics.items():
            torch.testing.assert_close(getattr(found, name), value, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(found.standard_errors[name], expected.standard_errors[name])
        assert (found.seed, found.strategy, found.num_samples) == (3, "loop", 5)
        torch.testing.assert_close(found.samples, expected.samples)

    def test_on_the_mean(self) -> None:
        logits, targets = logits_and_targets()
        prediction = classified(logits.softmax(2), keep_samples=False)
        fit = temperature(prediction, targets)
        assert fit.on == "mean"
        value = torch.tensor(fit.value, dtype=torch.float64, requires_grad=True)
        mean = (prediction.mean.log() / value).softmax(1)
        (slope,) = torch.autograd.grad(torch.nn.functional.nll_loss(mean.log(), targets), value)
        assert abs(slope) < 1e-6
        found = fit(prediction)
        torch.testing.assert_close(found.mean, mean.detach())
        torch.testing.assert_close(found.predictive_entropy, torch.special.entr(mean.detach()).sum(1))
        for name in ("variance", "std", "expected_entropy", "mutual_information", "variation_ratio"):
            assert getattr(found, name).isnan().all()
        assert found.predicted.equal(prediction.predicted)
        with pytest.raises(ValueError, match="fitted on samples, which this prediction did not keep"):
            temperature(classified(logits.softmax(2)), targets)(prediction)

    def test_places_that_are_not_reported_do_not_count(self) -> None:
        logits, targets = logits_and_targets(400)
        valid = torch.rand(100, 4) < 0.7
        probabilities = logits.view(5, 100, 4, 4).softmax(3)
        some = classified(probabilities, 2, valid=valid)
        fit = temperature(some, targets.view(100, 4).where(valid, -100))
        kept = valid.flatten()
        assert fit.value == pytest.approx(temperature(classified(logits.softmax(2)[:, kept]), targets[kept]).value)
        assert fit(some).mean.isnan().any(2).equal(~valid)

    def test_a_real_model_of_half_precision_probabilities_and_a_deterministic_pass(self) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 3)).eval()
        x = torch.randn(60, 4)
        result = torchdrop.mc_predict(
            model, 40 * x, 10, task="classification", seed=1, keep_samples=True, weight_scaling=True
        )
        assert (result.samples == 0).any()  # rounded
        fit = temperature(result, torch.arange(60) % 3)
        found = fit(result)
        assert found.mean.dtype == torch.float32
        assert all(value.isfinite().all() for value in found.statistics.values())
        expected = (model(40 * x) / fit.value).softmax(1)
        torch.testing.assert_close(found.weight_scaling, expected, rtol=1e-3, atol=1e-4)
        assert str(fit).startswith("temperature ")

    @pytest.mark.parametrize("on", ["samples", "mean"])
    def test_batches_stay(self, on: str) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 3)).eval()
        batches = iter(torch.randn(50, 4).split(40))
        result = torchdrop.mc_predict(model, batches, 10, task="classification", seed=1, keep_samples=True)
        fit = temperature(result, torch.where(torch.arange(50) % 4 > 0, result.predicted, 0), on=on)
        found = fit(result)
        assert [len(one) for one in found.batches()] == [40, 10]
        assert found.batches()[1].mean.equal(found.mean[40:])

    def test_says_before_and_after(self) -> None:
        logits, targets = logits_and_targets()
        prediction = classified(logits.softmax(2))
        fit = temperature(prediction, targets)
        found = fit.compare(prediction, targets)
        assert found.before == scores(prediction, targets)
        assert found.after == scores(fit(prediction), targets)
        assert all(found.after[name] < value for name, value in found.before.items())
        assert "calibration_error" in str(found)

    @pytest.mark.parametrize(("right", "words"), [(True, "all too well"), (False, "hardly")])
    def test_a_likelihood_without_a_maximum(self, right: bool, words: str) -> None:
        rows = torch.tensor([[[0.9, 0.1]] * 20] * 2)
        with pytest.warns(UserWarning, match=f"the likelihood still rises at T = .* The targets are {words} predicted"):
            temperature(classified(rows), torch.full((20,), 0 if right else 1))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"prediction": torch.ones(3, 2)}, TypeError, "must be a ClassificationPrediction .* got Tensor"),
            ({"on": "logits"}, ValueError, "on must be 'auto', 'samples' or 'mean', got 'logits'"),
            ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, r"shape \(3,\), got \(4,\)"),
            ({"targets": torch.full((3,), 2)}, ValueError, r"targets must be integers in \[0, 2\)"),
            (
                {"prediction": classified(torch.full((2, 3, 2), 0.5), keep_samples=False), "on": "samples"},
                ValueError,
                "the samples were not kept: predict with keep_samples=True, or fit with on='mean'",
            ),
            (
                {"prediction": classified(torch.full((2, 0, 2), 0.5)), "targets": torch.zeros(0, dtype=torch.int64)},
                ValueError,
                "targets must hold at least one row, got none",
            ),
        ],
    )
    def test_refused(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        given = {"prediction": classified(torch.full((2, 3, 2), 0.5)), "targets": torch.tensor([0, 1, 0]), **changes}
        with pytest.raises(error, match=message):
            temperature(**given)


class TestDeviation:
    def test_is_the_most_likely_scale(self) -> None:
        prediction, targets = regressed(torch.randn(6, 40, 2, dtype=torch.float64), tau=9.0), 3 * torch.randn(40, 2)
        fit = deviation_scale(prediction, targets)
        scale = torch.tensor(fit.value, dtype=torch.float64, requires_grad=True)
        normal = torch.distributions.Normal(prediction.mean, scale * prediction.std)
        loss = -normal.log_prob(targets).mean()
        (slope,) = torch.autograd.grad(loss, scale)
        assert abs(slope) < 1e-12
        assert fit.after == pytest.approx(loss.item(), rel=1e-12)
        assert fit.before == pytest.approx(
            -torch.distributions.Normal(prediction.mean, prediction.std).log_prob(targets).mean().item()
        )

    @pytest.mark.parametrize("tau", [None, 4.0])
    def test_everything_follows(self, tau: float | None) -> None:
        """Of samples and noise that are scaled, the statistics are the scaled ones."""
        samples = torch.randn(6, 30, dtype=torch.float64)
        prediction, targets = regressed(samples, tau), 3 * torch.randn(30)
        fit = deviation_scale(prediction, targets)
        found = fit(prediction)
        moved = prediction.mean + fit.value * (samples - prediction.mean)
        expected = regressed(moved, None if tau is None else tau / fit.value**2)
        assert found.statistics.keys() == expected.statistics.keys()
        for name, value in expected.statistics.items():
            torch.testing.assert_close(getattr(found, name), value)
            if name != "mean":
                torch.testing.assert_close(found.standard_errors[name], expected.standard_errors[name])
        torch.testing.assert_close(found.quantile(0.9), expected.quantile(0.9))
        assert found.standard_errors["mean"].equal(prediction.standard_errors["mean"])
        if tau is not None:
            torch.testing.assert_close(found.log_likelihood(targets), expected.log_likelihood(targets))

    def test_crps_is_the_integral(self) -> None:
        """The integral of (F(x) - [x >= y])^2 over x."""
        prediction = regressed(torch.tensor([[0.0, 2.0], [1.0, 8.0]], dtype=torch.float64))
        targets = torch.tensor([1.5, -3.0])
        grid = torch.linspace(-60, 60, 400_001, dtype=torch.float64).unsqueeze(1)
        distribution = torch.special.ndtr((grid - prediction.mean) / prediction.std)
        integrals = torch.trapezoid((distribution - (grid >= targets).double()).square(), grid, dim=0)
        assert scores(prediction, targets)["crps"] == pytest.approx(integrals.mean().item(), abs=1e-3)

    def test_shares_of_intervals(self) -> None:
        prediction = regressed(torch.tensor([[-1.0] * 4, [1.0] * 4]))
        z = torch.tensor([0.1, 0.6, 1.0, 3.0])
        shares = interval_shares(prediction, z * prediction.std, (0.5, 0.9, 0.95))
        assert shares.tolist() == [0.5, 0.75, 0.75]

    def test_says_before_and_after(self) -> None:
        prediction, targets = regressed(0.1 * torch.randn(9, 500)), torch.randn(500)
        fit = deviation_scale(prediction, targets)
        found = fit.compare(prediction, targets)
        assert all(found.after[name] < value for name, value in found.before.items())
        assert str(fit).startswith(f"standard deviations times {fit.value:.4g}")

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"targets": torch.zeros(3, 1)}, ValueError, r"the predictions' shape \(3,\), got \(3, 1\)"),
            ({"targets": torch.tensor([0.0, math.nan, 1.0])}, ValueError, "targets must be finite real numbers"),
            ({"targets": torch.zeros(3)}, ValueError, "got residuals that are all 0"),
            ({"prediction": regressed(torch.ones(2, 3))}, ValueError, "got 3 of 3 that are not: take more samples"),
            ({"prediction": classified(torch.full((2, 3, 2), 0.5))}, TypeError, "see conformal_sets and temperature"),
            (
                {"prediction": regressed(torch.randn(2, 0)), "targets": torch.zeros(0)},
                ValueError,
                "targets must hold at least one row, got none",
            ),
        ],
    )
    def test_refused(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        given = {"prediction": regressed([[-1.0] * 3, [1.0] * 3]), "targets": torch.tensor([1.0, 2.0, 0.0]), **changes}
        with pytest.raises(error, match=message):
            deviation_scale(**given)


class TestSearch:
    def test_ends_and_infinities(self) -> None:
        assert minimize(lambda x: x, 0.5, 8.0, 5, 1e-3) == 0.5
        assert minimize(lambda x: -x, 0.5, 8.0, 5, 1e-3) == pytest.approx(8.0)
        assert minimize(lambda x: math.nan if x < 1 else x, 0.1, 8.0, 9, 1e-6) == pytest.approx(1.0, rel=1e-5)
        with pytest.raises(ValueError, match="the likelihood of the targets is 0 wherever"):
            minimize(lambda _: math.inf, 0.1, 1.0, 3, 0.1)

    def test_the_best_that_was_tried_is_returned(self) -> None:
        tried: dict[float, float] = {}

        def rough(x: float) -> float:
            return tried.setdefault(x, math.sin(40 * x) + (x - 3) ** 2)

        assert minimize(rough, 0.1, 10.0, 9, 1e-2) == min(tried, key=tried.__getitem__)

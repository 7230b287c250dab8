"""What the user gets: results, their conversions, quantiles and likelihoods, and Gal's formulas."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchdrop._extras import optional
from torchdrop.monte_carlo import from_samples
from torchdrop.monte_carlo.classes import Classification
from torchdrop.monte_carlo.gal import (
    predictive_log_likelihood,
    predictive_quantile,
    tau_from_weight_decay,
    weight_decay_from_tau,
)
from torchdrop.monte_carlo.plain import Plain
from torchdrop.monte_carlo.prediction import Prediction, normal_quantile
from torchdrop.monte_carlo.statistics import Collector
from torchdrop.monte_carlo.task_predictions import ClassificationPrediction, RegressionPrediction, predict_from
from torchdrop.monte_carlo.tasks import Regression


def predicted(task: Any, outputs: Any, *, keep_samples: bool = False, **about: Any) -> Any:
    collector = Collector(task, keep_samples=keep_samples)
    collector.add(outputs, range(len(outputs if isinstance(outputs, Tensor) else outputs[0])))
    return predict_from(collector, **about)


def of_each_kind() -> list[Any]:
    about: dict[str, Any] = {"keep_samples": True, "seed": 3, "strategy": "loop", "report": "2 sources, all active"}
    values, noise = torch.randn(6, 5, 2), torch.randn(6, 5, 2)
    return [
        predicted(Plain(), values, weight_scaling=values[0], **about),
        predicted(Classification(), values, weight_scaling=values[0], **about),
        predicted(Regression(tau=4.0), values, weight_scaling=values[0], **about),
        predicted(Regression(noise="log_variance"), (values, noise), weight_scaling=(values[0], noise[0]), **about),
    ]


KINDS = ["plain", "classification", "tau", "log_variance"]


@pytest.fixture(params=range(4), ids=KINDS)
def prediction(request: pytest.FixtureRequest) -> Any:
    return of_each_kind()[request.param]


def tensors_of(prediction: Prediction) -> dict[str, Tensor]:
    own = {name: value for name, value in vars(prediction).items() if isinstance(value, Tensor)}
    assert {"mean", "variance", "std"} <= own.keys()
    assert prediction.standard_errors
    return own | {f"error of {name}": value for name, value in prediction.standard_errors.items()}


class TestPredictFrom:
    def test_plain(self) -> None:
        values = torch.randn(6, 5, 2)
        made = predicted(Plain(), values, seed=3, strategy="loop", weight_scaling=values[2])
        assert type(made) is Prediction
        torch.testing.assert_close(made.mean, values.mean(0))
        torch.testing.assert_close(made.variance, values.var(0))
        torch.testing.assert_close(made.std, values.std(0))
        torch.testing.assert_close(made.standard_error, values.std(0) / math.sqrt(6))
        assert list(made.standard_errors) == ["mean", "variance", "std"]
        assert (made.num_samples, made.seed, made.strategy, made.samples, len(made)) == (6, 3, "loop", None, 5)
        assert torch.equal(made.weight_scaling, values[2])

    def test_classification(self) -> None:
        logits = torch.randn(6, 5, 3)
        made = predicted(Classification(), logits, keep_samples=True, weight_scaling=logits[0])
        assert type(made) is ClassificationPrediction
        torch.testing.assert_close(made.samples, logits.softmax(2))
        torch.testing.assert_close(made.mean, logits.softmax(2).mean(0))
        torch.testing.assert_close(made.weight_scaling, logits[0].softmax(1))
        torch.testing.assert_close(made.predictive_entropy - made.expected_entropy, made.mutual_information)
        assert torch.equal(made.predicted, logits.softmax(2).mean(0).argmax(1))
        assert made.variation_ratio.shape == (5,)
        assert set(made.standard_errors) == set(Classification().statistics())

    def test_regression(self) -> None:
        values, log_variance = torch.randn(6, 5, 2), torch.randn(6, 5, 2)
        made = predicted(
            Regression(noise="log_variance"),
            (values, log_variance),
            keep_samples=True,
            weight_scaling=(values[0], values[0]),
        )
        assert type(made) is RegressionPrediction
        torch.testing.assert_close(made.epistemic_variance, values.var(0))
        torch.testing.assert_close(made.aleatoric_variance, log_variance.exp().mean(0))
        torch.testing.assert_close(made.variance, made.epistemic_variance + made.aleatoric_variance)
        torch.testing.assert_close(made.std.square(), made.variance)
        torch.testing.assert_close(made.noise_variances, log_variance.exp())
        assert torch.equal(made.weight_scaling, values[0])

    def test_regression_without_noise(self) -> None:
        made = predicted(Regression(), torch.randn(6, 5, 2), keep_samples=True)
        assert made.aleatoric_variance is made.noise_variances is None
        assert torch.equal(made.variance, made.epistemic_variance)
        assert "aleatoric_variance" not in made.standard_errors

    @pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
    def test_dtype(self, dtype: torch.dtype, expected: torch.dtype) -> None:
        logits = torch.randn(6, 5, 3).to(dtype)
        made = predicted(Classification("logits"), logits, keep_samples=True, weight_scaling=logits[0])
        assert {tensor.dtype for tensor in tensors_of(made).values()} == {expected}

    def test_one_sample_has_a_mean_alone(self) -> None:
        made = predicted(Plain(), torch.ones(1, 5, 2))
        assert torch.equal(made.mean, torch.ones(5, 2))
        assert made.std.isnan().all()
        assert made.standard_error.isnan().all()

    def test_without_samples(self) -> None:
        with pytest.raises(ValueError, match="there are no samples yet"):
            predict_from(Collector(Plain()))


class TestConversions:
    def test_to(self, prediction: Any) -> None:
        moved = prediction.to(torch.float64)
        assert type(moved) is type(prediction)
        assert {tensor.dtype for tensor in tensors_of(moved).values()} == {torch.float64}
        assert {tensor.dtype for tensor in tensors_of(prediction).values()} == {torch.float32}
        assert (moved.seed, moved.strategy, moved.num_samples) == (3, "loop", 6)
        elsewhere = tensors_of(prediction.to("meta"))
        assert elsewhere.keys() == tensors_of(prediction).keys()
        assert {tensor.device.type for tensor in elsewhere.values()} == {"meta"}
        with pytest.raises(ValueError, match=r"dtype must be floating-point, got torch.int64"):
            prediction.to(torch.int64)

    def test_numpy(self, prediction: Any) -> None:
        arrays = prediction.numpy()
        assert {
            "mean",
            "std",
            "mean_standard_error",
            "std_standard_error",
            "weight_scaling",
            "samples",
        } <= arrays.keys()
        assert ("predicted" in arrays) == isinstance(prediction, ClassificationPrediction)
        assert all(isinstance(array, np.ndarray) for array in arrays.values())
        np.testing.assert_array_equal(arrays["variance"], prediction.variance.numpy())
        np.testing.assert_array_equal(arrays["mean_standard_error"], prediction.standard_error.numpy())
        assert arrays["samples"].shape == (6, 5, 2)

    def test_rows_and_pandas(self, prediction: Any) -> None:
        rows = prediction.rows()
        assert len(rows) == 5
        assert rows[3]["mean"] == prediction.mean[3].tolist()
        assert "samples" not in rows[3]
        frame = prediction.pandas()
        assert list(frame.columns) == list(rows[0])
        assert frame["std"][4] == prediction.std[4].tolist()
        if isinstance(prediction, ClassificationPrediction):
            assert rows[3]["predicted"] == prediction.predicted[3].item()
            assert rows[3]["mutual_information"] == prediction.mutual_information[3].item()

    def test_one_value_for_a_row_is_a_number(self) -> None:
        made = predicted(Plain(), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
        assert [row["mean"] for row in made.rows()] == [2.0, 3.0]

    def test_summary(self, prediction: Any) -> None:
        text = str(prediction)
        title, head, *lines, report = text.splitlines()
        assert title == f"{type(prediction).__name__} of shape (5, 2) from 6 samples, loop, seed 3"
        assert head.split() == ["average", "least", "most", "largest", "standard", "error"]
        assert report == "2 sources, all active"
        table = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in lines}
        assert list(table) == list(prediction.standard_errors)
        for name, (average, least, most, error) in table.items():
            values = getattr(prediction, name)
            assert average == pytest.approx(values.mean().item(), rel=1e-3, abs=1e-6)
            assert (least, most) == (float(f"{values.min():.4g}"), float(f"{values.max():.4g}"))
            assert error == float(f"{prediction.standard_errors[name].max():.4g}")
        assert repr(prediction) == text

    def test_summary_without_rows(self) -> None:
        assert str(predicted(Plain(), torch.ones(2, 0, 3))) == "Prediction of shape (0, 3) from 2 samples"

    @pytest.mark.parametrize(("method", "module"), [("numpy", "numpy"), ("pandas", "pandas")])
    def test_without_the_optional_packages(self, method: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
        made = predicted(Plain(), torch.ones(2, 3, 1))
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"this needs {module}: pip install 'torchdrop\[uncertainty\]'"):
            getattr(made, method)()

    def test_optional_gives_the_module(self) -> None:
        assert optional("math") is math


class TestConcatenated:
    @pytest.mark.parametrize("kind", range(4), ids=KINDS)
    def test_batches_join_to_the_whole(self, kind: int) -> None:
        torch.manual_seed(4)
        whole = of_each_kind()[kind]
        task = [Plain(), Classification("logits"), Regression(tau=4.0), Regression(noise="log_variance")][kind]
        torch.manual_seed(4)
        values, noise = torch.randn(6, 5, 2), torch.randn(6, 5, 2)
        batches = []
        for rows in (slice(0, 2), slice(2, 5)):
            outputs = (values[:, rows], noise[:, rows]) if kind == 3 else values[:, rows]
            deterministic = (values[0, rows], noise[0, rows]) if kind == 3 else values[0, rows]
            batches.append(predicted(task, outputs, keep_samples=True, seed=3, weight_scaling=deterministic))
        joined = type(whole).concatenated(batches)
        assert type(joined) is type(whole)
        assert (joined.num_samples, joined.seed, joined.strategy) == (6, 3, None)
        found, expected = tensors_of(joined), tensors_of(whole)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name

    def test_the_fewest_samples_and_every_strategy_are_named(self) -> None:
        parts = [predicted(Plain(), torch.ones(t, 2, 1), strategy=name) for t, name in ((5, "a"), (3, "b"), (4, "a"))]
        joined = Prediction.concatenated(parts)
        assert (joined.num_samples, joined.strategy, len(joined)) == (3, "a, b", 6)

    def test_what_cannot_be_joined(self) -> None:
        plain, classes, *_ = of_each_kind()
        with pytest.raises(ValueError, match="predictions must hold at least one, got none"):
            Prediction.concatenated([])
        with pytest.raises(ValueError, match=r"predictions must be of one kind, got \['Prediction', 'Classification"):
            Prediction.concatenated([plain, classes])
        with pytest.raises(ValueError, match="weight_scaling is missing from 1 of 2 predictions"):
            Prediction.concatenated([plain, predicted(Plain(), torch.ones(6, 5, 2), keep_samples=True)])
        more = predicted(Plain(), torch.ones(7, 5, 2), keep_samples=True, weight_scaling=torch.ones(5, 2))
        with pytest.raises(
            ValueError, match=r"different numbers of samples, \[6, 7\], cannot be joined: leave out keep_s"
        ):
            Prediction.concatenated([plain, more])


class TestQuantiles:
    @pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.77, 1.0])
    def test_of_samples(self, q: float) -> None:
        values = torch.randn(21, 4, 2)
        for task in (Plain(), Regression()):
            found = predicted(task, values, keep_samples=True).quantile(q)
            np.testing.assert_allclose(found, np.quantile(values.numpy(), q, axis=0), rtol=1e-6, atol=1e-7)
        noisy = predicted(Regression(tau=1.0), values, keep_samples=True)
        np.testing.assert_allclose(noisy.quantile(q, noise=False), np.quantile(values.numpy(), q, axis=0), atol=1e-6)

    @pytest.mark.parametrize("q", [1e-6, 0.025, 0.5, 0.9, 1 - 1e-6])
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_of_a_mixture(self, q: float, scale: float) -> None:
        """Against scipy's root of the mixture's distribution function."""
        optimize, norm = pytest.importorskip("scipy.optimize"), pytest.importorskip("scipy.stats").norm
        values, variance = torch.randn(7, 3, 2).double(), (scale * torch.randn(7, 3, 2).double().exp()).square()
        found = predictive_quantile(values, q, noise_variance=variance)
        assert found.shape == (3, 2)
        for row, column in np.ndindex(3, 2):
            f, s = values[:, row, column].numpy(), variance[:, row, column].sqrt().numpy()
            excess = lambda y, f=f, s=s: norm.cdf((y - f) / s).mean() - q  # noqa: E731
            root = optimize.brentq(excess, (f - 10 * s).min(), (f + 10 * s).max(), xtol=1e-14, rtol=1e-14)
            assert found[row, column].item() == pytest.approx(root, rel=1e-7, abs=1e-9 * scale)

    def test_of_one_normal_distribution(self) -> None:
        found = predictive_quantile(torch.tensor([[3.0]]), 0.975, tau=4.0)
        assert found.item() == pytest.approx(3 + normal_quantile(0.975) / 2, rel=1e-14)
        assert normal_quantile(0.975) == pytest.approx(1.959963984540054, rel=1e-14)

    def test_of_a_prediction_are_those_of_its_mixture(self) -> None:
        values, log_variance = torch.randn(7, 3, 1).double(), torch.randn(7, 3, 1).double()
        made = predicted(Regression(noise="log_variance"), (values, log_variance), keep_samples=True)
        expected = predictive_quantile(values, 0.9, noise_variance=log_variance.exp())
        assert torch.equal(made.quantile(0.9), expected)
        low, high = made.interval(0.8, method="samples")
        torch.testing.assert_close(high, expected)
        torch.testing.assert_close(low, made.quantile(0.1))
        low, high = predicted(Regression(tau=4.0), values, keep_samples=True).interval(0.8, method="samples")
        torch.testing.assert_close(high, predictive_quantile(values, 0.9, tau=4.0))

    def test_normal_interval(self, prediction: Any) -> None:
        low, high = prediction.interval(0.9)
        torch.testing.assert_close(high - prediction.mean, 1.6448536 * prediction.std)
        torch.testing.assert_close(prediction.mean - low, 1.6448536 * prediction.std)

    def test_bad_questions(self, prediction: Any) -> None:
        with pytest.raises(ValueError, match=r"q must be .* got 1.5"):
            prediction.quantile(1.5)
        with pytest.raises(ValueError, match=r"level must be between 0 and 1, both excluded, got 1.0"):
            prediction.interval(1.0)
        with pytest.raises(ValueError, match="method must be 'normal' or 'samples', got 'bootstrap'"):
            prediction.interval(method="bootstrap")

    @pytest.mark.parametrize("task", [Plain(), Classification("logits"), Regression(), Regression(tau=1.0)])
    def test_samples_that_were_not_kept(self, task: Any) -> None:
        made = predicted(task, torch.randn(4, 3, 2))
        message = "quantiles need the samples, which were not kept: predict with keep_samples=True"
        with pytest.raises(ValueError, match=message):
            made.quantile(0.5)
        with pytest.raises(ValueError, match=message):
            made.interval(method="samples")
        made.interval()


class TestLogLikelihood:
    def test_of_classes(self) -> None:
        made = predicted(
            Classification("probabilities"), torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
        )
        assert torch.equal(made.log_likelihood(torch.tensor([0, 1])), torch.tensor([0.5, 0.5]).log())
        sure = predicted(Classification("probabilities"), torch.tensor([[[1.0, 0.0]]]))
        assert sure.log_likelihood(torch.tensor([1])).item() == -math.inf

    def test_of_classes_at_each_pixel(self) -> None:
        logits, targets = torch.randn(4, 2, 3, 5, 6), torch.randint(3, (2, 5, 6))
        made = predicted(Classification(), logits)
        found = made.log_likelihood(targets)
        assert found.shape == (2, 5, 6)
        for where in np.ndindex(2, 5, 6):
            row, i, j = where
            torch.testing.assert_close(found[where], made.mean[row, targets[where], i, j].log())

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (torch.zeros(5, 1, dtype=torch.int64), r"targets must have the predictions' shape \(5,\), got \(5, 1\)"),
            (torch.zeros(5), "targets must be classes, of an integer dtype, got torch.float32"),
            (torch.zeros(5) > 0, "targets must be classes, of an integer dtype, got torch.bool"),
            (torch.tensor([0, 1, 2, 0, 0]), r"targets must be in \[0, 2\), got 0 to 2"),
            (torch.tensor([0, 1, -1, 0, 0]), r"targets must be in \[0, 2\), got -1 to 1"),
        ],
    )
    def test_targets_that_are_no_classes(self, targets: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            predicted(Classification(), torch.randn(3, 5, 2)).log_likelihood(targets)

    def test_of_values(self) -> None:
        """Against the densities summed as they are, outputs of a row multiplied within each sample."""
        norm = pytest.importorskip("scipy.stats").norm
        values, log_variance, targets = (
            torch.randn(7, 3, 2).double(),
            torch.randn(7, 3, 2).double(),
            torch.randn(3, 2).double(),
        )
        for task, outputs, scale in (
            (Regression(noise="log_variance"), (values, log_variance), (log_variance / 2).exp().numpy()),
            (Regression(tau=2.5), values, 1 / math.sqrt(2.5)),
        ):
            density = norm.pdf(targets.numpy(), values.numpy(), scale).prod(axis=2).mean(axis=0)
            found = predicted(task, outputs, keep_samples=True).log_likelihood(targets)
            np.testing.assert_allclose(found, np.log(density), rtol=1e-12)
        np.testing.assert_allclose(predictive_log_likelihood(values, targets, tau=2.5), np.log(density), rtol=1e-12)
        flat = predictive_log_likelihood(values[:, :, 0], targets[:, 0], tau=2.5)
        np.testing.assert_allclose(
            flat, predictive_log_likelihood(values[:, :, :1], targets[:, :1], tau=2.5), rtol=1e-12
        )

    def test_far_from_the_data(self) -> None:
        """Where every density underflows to 0: logsumexp(-tau/2 |y - f|^2) - log T - 1/2 log 2 pi / tau."""
        found = predictive_log_likelihood(torch.tensor([[0.0], [1.0]]), torch.tensor([1e3]), tau=2.0)
        expected = -(999.0**2) - math.log(2) - 0.5 * math.log(2 * math.pi / 2.0)
        assert found.item() == pytest.approx(expected, rel=1e-14)

    def test_what_is_missing(self) -> None:
        values, targets = torch.randn(4, 3, 1), torch.randn(3, 1)
        with pytest.raises(ValueError, match="log-likelihoods need a model of the noise: predict with tau= or noise="):
            predicted(Regression(), values, keep_samples=True).log_likelihood(targets)
        with pytest.raises(ValueError, match="log-likelihoods need the samples, which were not kept"):
            predicted(Regression(tau=1.0), values).log_likelihood(targets)
        with pytest.raises(ValueError, match=r"targets must have the predictions' shape \(3, 1\), got \(3,\)"):
            predicted(Regression(tau=1.0), values, keep_samples=True).log_likelihood(targets[:, 0])


class TestGal:
    def test_there_and_back(self) -> None:
        decay = weight_decay_from_tau(length_scale=0.01, keep_prob=0.95, n=927, tau=0.2)
        assert decay == pytest.approx(0.01**2 * (1 - 0.05) / (2.0 * 927 * 0.2), rel=1e-14)
        assert tau_from_weight_decay(0.01, 0.95, 927, decay) == pytest.approx(0.2, rel=1e-14)
        assert tau_from_weight_decay(0.01, 0.0, 927, decay) == 0

    def test_the_weight_decay_of_an_optimizer(self) -> None:
        """The docstring's factors: a step on each loss with its weight decay is a step on Gal's objective."""
        x, y, decay = torch.randn(8, 3).double(), torch.randn(8, 1).double(), 0.1
        start = torch.randn(3, 1).double()

        def step(loss: Any, weight_decay: float, rate: float) -> Tensor:
            weight = start.clone().requires_grad_()
            optimizer = torch.optim.SGD([weight], lr=rate, weight_decay=weight_decay)
            loss(weight).backward()
            optimizer.step()
            return weight.detach()

        half = lambda w: (y - x @ w).square().sum() / 2 / 8  # noqa: E731
        whole = step(lambda w: half(w) + decay * w.square().sum(), 0.0, 0.01)
        torch.testing.assert_close(step(half, 2 * decay, 0.01), whole)
        torch.testing.assert_close(step(lambda w: torch.nn.functional.mse_loss(x @ w, y), 4 * decay, 0.005), whole)

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    @pytest.mark.parametrize("name", ["length_scale", "n", "weight_decay", "tau"])
    def test_arguments_that_are_not_positive(self, name: str, value: float) -> None:
        functions = {"weight_decay": tau_from_weight_decay, "tau": weight_decay_from_tau}
        for last, function in functions.items():
            arguments: dict[str, Any] = {"length_scale": 1.0, "keep_prob": 0.5, "n": 10, last: 1.0}
            if name in arguments:
                with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
                    function(**(arguments | {name: value}))

    @pytest.mark.parametrize("keep_prob", [-0.1, 1.1, math.nan])
    @pytest.mark.parametrize("function", [tau_from_weight_decay, weight_decay_from_tau])
    def test_keep_prob(self, function: Any, keep_prob: float) -> None:
        with pytest.raises(ValueError, match=rf"keep_prob must be in \[0, 1\], got {keep_prob}"):
            function(1.0, keep_prob, 10, 1.0)

    @pytest.mark.parametrize("name", ["quantile", "log_likelihood"])
    def test_noise_and_samples(self, name: str) -> None:
        def function(samples: Tensor, **noise: Any) -> Tensor:
            if name == "quantile":
                return predictive_quantile(samples, 0.5, **noise)
            return predictive_log_likelihood(samples, torch.zeros(3), **noise)

        samples = torch.zeros(2, 3)
        for noise in ({}, {"tau": 1.0, "noise_variance": torch.ones(2, 3)}):
            with pytest.raises(TypeError, match="give tau or noise_variance: one of the two, and not both"):
                function(samples, **noise)
        with pytest.raises(ValueError, match=r"noise_variance must have the samples' shape \(2, 3\), got \(3,\)"):
            function(samples, noise_variance=torch.ones(3))
        with pytest.raises(ValueError, match=r"noise_variance must be positive, got 0.0"):
            function(samples, noise_variance=torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"tau must be positive and finite, got -1.0"):
            function(samples, tau=-1.0)
        with pytest.raises(ValueError, match="samples must hold at least one, got none"):
            function(samples[:0], tau=1.0)

    @pytest.mark.parametrize("q", [0.0, 1.0, math.nan])
    def test_quantiles_at_the_ends_of_a_mixture(self, q: float) -> None:
        with pytest.raises(ValueError, match=f"q must be between 0 and 1, both excluded where there is noise, got {q}"):
            predictive_quantile(torch.zeros(2, 3), q, tau=1.0)


class TestFromSamples:
    def test_is_what_the_statistics_say(self) -> None:
        logits = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1))
        found = from_samples(logits, "classification")
        assert isinstance(found, ClassificationPrediction)
        p = logits.double().softmax(2)
        entropy = torch.special.entr(p.mean(0)).sum(1)
        torch.testing.assert_close(found.mean.double(), p.mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(found.std.double(), p.std(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(found.predictive_entropy.double(), entropy, rtol=0, atol=1e-6)
        expected = entropy - torch.special.entr(p).sum(2).mean(0)
        torch.testing.assert_close(found.mutual_information.double(), expected, rtol=0, atol=1e-6)
        assert found.samples is not None
        torch.testing.assert_close(found.samples.double(), p, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.standard_errors["mean"].double(), p.std(0) / 7**0.5, rtol=0, atol=1e-6)
        assert (found.num_samples, found.seed) == (7, None)

    def test_of_one_pass(self) -> None:
        found = from_samples(torch.randn(1, 5, 2), "regression", tau=4.0)
        assert found.variance.isnan().all()
        assert found.num_samples == 1

    def test_of_a_pair(self) -> None:
        pair = (torch.zeros(3, 5, 1), torch.zeros(3, 5, 1))
        found = from_samples(pair, "regression", noise="log_variance")
        assert torch.equal(found.variance, torch.ones(5, 1))

    @pytest.mark.parametrize(
        ("outputs", "error", "match"),
        [
            (torch.randn(0, 5, 3), ValueError, "outputs must hold at least one sample, in their first dimension"),
            (torch.randn(()), ValueError, "outputs must hold at least one sample"),
            ((), ValueError, "outputs must hold at least one sample"),
            (torch.randn(4), ValueError, "outputs must have a first dimension for the rows"),
            ([[1.0, 2.0]], ValueError, "outputs must hold at least one sample"),
            (torch.full((2, 3, 4), torch.nan), ValueError, "sample 0 is not finite in row 0"),
        ],
    )
    def test_refuses(self, outputs: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            from_samples(outputs, "classification")

"""Labels that are independent of each other, and kinds of outputs that are told apart or refused."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.monte_carlo import MultiLabelPrediction, Prediction, metrics
from torchdrop.monte_carlo.classes import Classification
from torchdrop.monte_carlo.labels import MultiLabel
from torchdrop.monte_carlo.statistics import Collector
from torchdrop.monte_carlo.task_predictions import predict_from

F64 = torch.float64


def predicted(task: Any, outputs: Tensor, **options: Any) -> Any:
    collector = Collector(task, keep_samples=True, **options)
    collector.add(outputs, range(len(outputs)))
    return predict_from(collector)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


class TestStatistics:
    @pytest.mark.parametrize("scores", ["logits", "probabilities"])
    @pytest.mark.parametrize("shape", [(9, 4), (9, 4, 3), (9, 2, 3, 4, 5)])
    def test_are_their_formulas(self, scores: str, shape: tuple[int, ...]) -> None:
        logits = 3 * torch.randn(shape, dtype=F64)
        made = predicted(MultiLabel(scores), logits if scores == "logits" else logits.sigmoid())
        assert type(made) is MultiLabelPrediction
        p = 1 / (1 + np.exp(-logits.numpy()))
        expected = {
            "mean": p.mean(0),
            "variance": p.var(0, ddof=1),
            "std": p.std(0, ddof=1),
            "predictive_entropy": entropy(p.mean(0)),
            "expected_entropy": entropy(p).mean(0),
            "mutual_information": entropy(p.mean(0)) - entropy(p).mean(0),
        }
        assert list(made.statistics) == list(made.standard_errors) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(made.statistics[name], value, rtol=1e-10, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(made.samples, p, rtol=1e-12)
        assert torch.equal(made.predicted, (made.mean > 0.5).long())

    def test_are_those_of_two_classes(self) -> None:
        """A label is a classification into absent and present."""
        z = torch.randn(12, 5, dtype=F64)
        label = predicted(MultiLabel("logits"), z, groups=4)
        classes = predicted(Classification("logits"), torch.stack([torch.zeros_like(z), z], 2), groups=4)
        for name in ("predictive_entropy", "expected_entropy", "mutual_information"):
            torch.testing.assert_close(getattr(label, name), getattr(classes, name), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(
                label.standard_errors[name], classes.standard_errors[name], rtol=1e-8, atol=1e-10
            )
        torch.testing.assert_close(label.mean, classes.mean[:, 1])
        torch.testing.assert_close(label.standard_error, classes.standard_error[:, 1])

    @pytest.mark.parametrize("z", [0.0, 1e-6, 30.0, -30.0, 700.0, -1e4, math.inf, -math.inf])
    def test_of_logits_of_any_size(self, z: float) -> None:
        observed = MultiLabel("logits").observe(torch.full((1, 1, 1), z, dtype=F64))
        p = 1 / (1 + math.exp(-z)) if z > -700 else 0.0
        assert observed["probability"].item() == pytest.approx(p, rel=1e-14)
        size = abs(z)
        expected = math.log1p(math.exp(-size)) + (size / (1 + math.exp(size)) if size <= 700 else 0.0)
        assert observed["entropy"].item() == pytest.approx(expected, rel=1e-12, abs=1e-300)

    def test_extremes(self) -> None:
        certain = predicted(MultiLabel("probabilities"), torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]]))
        assert certain.expected_entropy.tolist() == [[0.0, 0.0]]
        torch.testing.assert_close(certain.mutual_information, torch.tensor([[math.log(2), 0.0]]))
        same = predicted(MultiLabel("probabilities"), torch.rand(1, 500, 3).expand(4, 500, 3))
        assert (same.mutual_information >= 0).all()
        assert (same.variance == 0).all()

    @pytest.mark.slow
    def test_against_all_masks(self) -> None:
        """Six units that are dropped with probability 1/2; within seven standard errors, once in 10^11 left."""
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double().eval()
        x = torch.randn(5, 4, dtype=F64)
        every = torch.tensor(list(itertools.product([0.0, 2.0], repeat=6)), dtype=F64)
        p = model[3](model[1](model[0](x)) * every[:, None]).sigmoid().detach().numpy()
        result = torchdrop.mc_predict(model, x, 4000, task="multilabel", scores="logits", seed=3)
        expected = {
            "mean": p.mean(0),
            "variance": p.var(0),
            "expected_entropy": entropy(p).mean(0),
            "mutual_information": entropy(p.mean(0)) - entropy(p).mean(0),
        }
        for name, value in expected.items():
            apart, error = np.abs(result.statistics[name].numpy() - value), result.standard_errors[name].numpy()
            assert (apart <= 7 * error + 1e-9).all(), name
            assert error.mean() < 0.07 * np.abs(value).mean(), name


class TestKinds:
    def test_auto(self) -> None:
        logits = torch.randn(2, 3, 4)
        assert MultiLabel().settled(logits).scores == "logits"
        assert MultiLabel().settled(logits.sigmoid()).scores == "probabilities"
        collector = Collector(MultiLabel())
        collector.add(logits.sigmoid(), range(2))
        with pytest.raises(ValueError, match=r"must be probabilities in \[0, 1\], got .* logits, say scores='l"):
            collector.add(logits, [2, 3])
        assert collector.count == 2
        with pytest.raises(ValueError, match="must be settled by a first chunk"):
            MultiLabel().observe(logits)
        with pytest.raises(ValueError, match="scores must be 'auto', 'logits' or 'probabilities', got 'odds'"):
            MultiLabel("odds")
        logits[1, 2, 0] = math.nan
        collector = Collector(MultiLabel("logits"))
        with pytest.raises(ValueError, match="sample 1 is not finite in row 2"):
            collector.add(logits, range(2))

    def test_logits_that_happen_to_lie_between_0_and_1(self) -> None:
        """They are taken as logits, since probabilities of classes sum to 1, and it is said."""
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3), nn.Sigmoid()).eval()
        x = torch.randn(5, 6)
        with pytest.warns(UserWarning, match=r"lie in \[0, 1\] .* taken as logits: .*task='multilabel'"):
            found = torchdrop.mc_predict(model, x, 8, task="classification", seed=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            said = torchdrop.mc_predict(model, x, 8, task="classification", scores="logits", seed=1)
            torchdrop.mc_predict(nn.Sequential(model, nn.Softmax(1)), x, 8, task="classification", seed=1)
            labels = torchdrop.mc_predict(model, x, 8, task="multilabel", seed=1)
        assert torch.equal(found.mean, said.mean)
        assert isinstance(labels, MultiLabelPrediction)
        assert not torch.equal(labels.mean, said.mean)

    def test_a_binary_model_with_one_logit(self) -> None:
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1), nn.Flatten(0)).eval()
        result = torchdrop.mc_predict(model, torch.randn(5, 6), 8, task="multilabel", scores="logits", seed=1)
        assert result.mean.shape == (5,)
        with pytest.raises(ValueError, match=r"one logit for each row, give two .* or say task='multilabel'"):
            torchdrop.mc_predict(model, torch.randn(5, 6), 8, task="classification", seed=1)


class TestTargets:
    def test_log_likelihood(self) -> None:
        made = predicted(MultiLabel("logits"), torch.randn(5, 6, 3, dtype=F64))
        targets = torch.randint(2, (6, 3))
        p, y = made.mean.numpy(), targets.numpy()
        expected = y * np.log(p) + (1 - y) * np.log(1 - p)
        for one in (targets, targets.bool(), targets.double()):
            np.testing.assert_allclose(made.log_likelihood(one), expected)
        with pytest.raises(ValueError, match="targets must be 0 or 1 for each label"):
            made.log_likelihood(targets + 1)
        with pytest.raises(ValueError, match="targets must have the predictions' shape"):
            made.log_likelihood(targets[:, :1])

    def test_metrics_count_labels_as_rows_of_two_classes(self) -> None:
        made = predicted(MultiLabel("logits"), torch.randn(5, 60, 3))
        targets = torch.randint(2, (60, 3))
        pairs = torch.stack([1 - made.mean, made.mean], 1)
        expected = metrics.scores(pairs, targets)
        for one in (targets, targets.bool(), targets.float()):
            assert metrics.scores(made, one) == pytest.approx(expected)
        found = metrics.misclassification_auroc(made, targets, made.mutual_information)
        assert found == metrics.misclassification_auroc(pairs, targets, made.mutual_information)
        assert metrics.brier(made, targets) == pytest.approx(2 * (made.mean - targets).square().mean().item(), rel=1e-5)
        with pytest.raises(ValueError, match="targets must be 0 or 1"):
            metrics.brier(made, targets / 2)

    def test_places_that_are_left_out(self) -> None:
        logits, valid = torch.randn(5, 6, 7, 3), torch.rand(6, 7) < 0.6
        made = predicted(MultiLabel("logits"), logits.masked_fill(~valid[..., None], math.nan), valid=valid)
        full = predicted(MultiLabel("logits"), logits)
        torch.testing.assert_close(made.mutual_information[valid], full.mutual_information[valid])
        assert (made.predicted[~valid] == -100).all()
        targets = torch.randint(2, (6, 7, 3))
        expected = metrics.brier(torch.stack([1 - full.mean[valid], full.mean[valid]], 1), targets[valid])
        assert metrics.brier(made, targets.masked_fill(~valid[..., None], -100)) == pytest.approx(expected)
        assert made.log_likelihood(targets.masked_fill(~valid[..., None], -100))[~valid].isnan().all()


class Deciding(nn.Module):
    """Outputs of a dtype of choice."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.dtype, self.drop, self.head = dtype, nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.drop(x))
        return scores > 0 if self.dtype == torch.bool else scores.mul(10).to(self.dtype)


class TestDtypes:
    @pytest.mark.parametrize("strategy", ["vectorized", "repeated", "loop"])
    def test_true_and_false_are_one_and_zero(self, strategy: str) -> None:
        model, x = Deciding(torch.bool).eval(), torch.randn(5, 6)
        options: dict[str, Any] = {"samples": 20, "seed": 1, "strategy": strategy, "keep_samples": True}
        plain = torchdrop.mc_predict(model, x, **options)
        assert type(plain) is Prediction
        assert plain.samples is not None
        assert set(plain.samples.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(plain.mean, plain.samples.mean(0))
        labels = torchdrop.mc_predict(model, x, task="multilabel", **options)
        assert torch.equal(labels.mean, plain.mean)
        assert (labels.statistics["expected_entropy"] == 0).all()

    @pytest.mark.parametrize("task", ["classification", "regression"])
    def test_true_and_false_are_no_scores_or_values(self, task: str) -> None:
        message = f"floating-point for task='{task}', got torch.bool: say task='multilabel' for the probability of True"
        with pytest.raises(ValueError, match=message):
            torchdrop.mc_predict(Deciding(torch.bool), torch.randn(5, 6), 4, task=task)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
    @pytest.mark.parametrize("task", [None, "classification", "multilabel", "regression"])
    def test_integers(self, dtype: torch.dtype, task: str | None) -> None:
        message = rf"floating-point, got {dtype}: if they are classes, pick .* and if they are numbers, .* y.float\(\)"
        with pytest.raises(ValueError, match=message):
            torchdrop.mc_predict(Deciding(dtype), torch.randn(5, 6), 4, task=task)
        if dtype == torch.int64 and task != "classification":
            torchdrop.mc_predict(
                Deciding(dtype), torch.randn(5, 6), 4, task=task, select_output=lambda y: y.float(), seed=1
            )

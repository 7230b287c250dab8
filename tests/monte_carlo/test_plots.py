"""Measures of predicted probabilities against their definitions, and what the pictures show."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchdrop.monte_carlo import metrics, plots
from torchdrop.monte_carlo.classes import Classification
from torchdrop.monte_carlo.plain import Plain
from torchdrop.monte_carlo.prediction import Prediction
from torchdrop.monte_carlo.statistics import Collector
from torchdrop.monte_carlo.task_predictions import predict_from
from torchdrop.monte_carlo.tasks import Regression

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")


def predicted(task: Any, outputs: Tensor) -> Any:
    collector = Collector(task)
    collector.add(outputs, range(len(outputs)))
    return predict_from(collector)


@pytest.fixture
def case() -> tuple[Tensor, Tensor]:
    """Probabilities (200, 4) that are right more often than not, and targets."""
    logits = 2 * torch.randn(200, 4).double()
    targets = torch.distributions.Categorical(logits=logits + torch.randn(200, 4)).sample()
    p = logits.softmax(1)
    assert 0.4 < (p.argmax(1) == targets).double().mean() < 0.9
    return p, targets


class TestMetrics:
    def test_calibration_error(self, case: tuple[Tensor, Tensor]) -> None:
        p, targets = case
        confidence, right = p.amax(1).numpy(), (p.argmax(1) == targets).numpy()
        of_row = np.minimum((confidence * 15).astype(int), 14)
        gaps = [
            (of_row == b).mean() * abs(right[of_row == b].mean() - confidence[of_row == b].mean())
            for b in range(15) if (of_row == b).any()
        ]  # fmt: skip
        assert len(gaps) > 8
        assert metrics.calibration_error(p, targets) == pytest.approx(sum(gaps), rel=1e-6)
        assert metrics.calibration_error(p, targets, norm="max") > sum(gaps)

    def test_brier_and_likelihood(self, case: tuple[Tensor, Tensor]) -> None:
        p, targets = case
        one_hot = torch.nn.functional.one_hot(targets, 4)
        assert metrics.brier(p, targets) == pytest.approx((p - one_hot).square().sum(1).mean().item(), rel=1e-9)
        two = p[:, :2] / p[:, :2].sum(1, keepdim=True)
        expected = (two - torch.nn.functional.one_hot(targets.clamp(max=1), 2)).square().sum(1).mean().item()
        assert metrics.brier(two, targets.clamp(max=1)) == pytest.approx(expected, rel=1e-9)
        expected = torch.nn.functional.nll_loss(p.log(), targets).item()
        assert metrics.negative_log_likelihood(p, targets) == pytest.approx(expected, rel=1e-9)
        assert metrics.negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == math.inf

    def test_misclassification(self, case: tuple[Tensor, Tensor]) -> None:
        p, targets = case
        for uncertainty in (None, torch.rand(200).mul(5).round()):
            u = torch.special.entr(p).sum(1) if uncertainty is None else uncertainty
            wrong = p.argmax(1) != targets
            difference = u[wrong][:, None] - u[~wrong][None, :]
            expected = ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()
            assert metrics.misclassification_auroc(p, targets, uncertainty) == pytest.approx(expected, rel=1e-9)

    def test_misclassification_where_all_are_right_or_wrong(self) -> None:
        p = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
        assert math.isnan(metrics.misclassification_auroc(p, torch.tensor([0, 0])))
        assert math.isnan(metrics.misclassification_auroc(p, torch.tensor([1, 1])))

    def test_out_of_distribution(self) -> None:
        inside, outside = torch.rand(30, 2), torch.rand(40) + 0.3
        expected = (outside[None, :] > inside.reshape(-1, 1)).double().mean().item()
        assert metrics.out_of_distribution_auroc(inside, outside) == pytest.approx(expected, rel=1e-9)
        with pytest.raises(ValueError, match="inside and outside must hold uncertainties, got 60 and 0"):
            metrics.out_of_distribution_auroc(inside, outside[:0])

    def test_risk_coverage(self, case: tuple[Tensor, Tensor]) -> None:
        """At each value u: the rows no more uncertain than u."""
        p, targets = case
        uncertainty = torch.rand(200).mul(20).round()
        coverage, risk = metrics.risk_coverage_curve(p, targets, uncertainty)
        values = uncertainty.unique()
        assert len(coverage) == len(values) + 1 == 22
        wrong = (p.argmax(1) != targets).double()
        for i, u in enumerate(values):
            kept = uncertainty <= u
            assert coverage[i + 1].item() == pytest.approx(kept.double().mean().item())
            assert risk[i + 1].item() == pytest.approx(wrong[kept].mean().item())
        assert (coverage[0], risk[0]) == (0, risk[1])
        area = ((coverage[1:] - coverage[:-1]) * (risk[1:] + risk[:-1]) / 2).sum().item()
        assert metrics.risk_coverage_area(p, targets, uncertainty) == pytest.approx(area, rel=1e-9)
        useless = metrics.risk_coverage_area(p, targets, torch.ones(200))
        assert useless == pytest.approx(wrong.mean().item())
        assert metrics.risk_coverage_area(p, targets, wrong) < metrics.risk_coverage_area(p, targets) < useless

    def test_scores(self, case: tuple[Tensor, Tensor]) -> None:
        p, targets = case
        found = metrics.scores(p, targets)
        assert found == {
            "accuracy": pytest.approx((p.argmax(1) == targets).double().mean().item()),
            "negative_log_likelihood": metrics.negative_log_likelihood(p, targets),
            "brier": metrics.brier(p, targets),
            "calibration_error": metrics.calibration_error(p, targets),
            "misclassification_auroc": metrics.misclassification_auroc(p, targets),
            "risk_coverage_area": metrics.risk_coverage_area(p, targets),
        }
        whole = predicted(Classification("probabilities"), p.unsqueeze(0))
        assert metrics.scores(whole, targets) == pytest.approx(found, rel=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_rounded_probabilities_of_sure_networks(self, dtype: torch.dtype) -> None:
        """Confidences of 1 and sums that are 1 to rounding alone raise nothing and are not taken for logits."""
        p = (30 * torch.randn(500, 10)).softmax(1).to(dtype)
        targets = p.argmax(1)
        assert (p.amax(1) == 1).any()
        assert (p.double().sum(1) != 1).any()
        found = metrics.scores(p, targets)
        assert found["accuracy"] == 1
        assert found["calibration_error"] < 0.05
        assert found["brier"] < 0.05

    def test_further_dimensions_are_rows(self, case: tuple[Tensor, Tensor]) -> None:
        p, targets = case
        image = p.reshape(10, 4, 5, 4).movedim(3, 1)
        found = metrics.scores(image, targets.reshape(10, 4, 5))
        assert found == pytest.approx(metrics.scores(p, targets), rel=1e-9)

    @pytest.mark.parametrize(
        ("prediction", "targets", "message"),
        [
            (
                torch.ones(3, 2),
                torch.zeros(3).long(),
                r"prediction must hold probabilities .* got torch.float32 of shape \(3, 2\)",
            ),
            (torch.ones(3), torch.zeros(3).long(), r"prediction must hold probabilities .* of shape \(3,\)"),
            (
                torch.full((3, 2), 0.5),
                torch.zeros(3, 1).long(),
                r"targets must have the predictions' shape \(3,\), got \(3, 1\)",
            ),
            (torch.full((3, 2), 0.5), torch.zeros(3), r"targets must be integers in \[0, 2\), got torch.float32"),
            (
                torch.full((3, 2), 0.5),
                torch.tensor([0, 1, 2]),
                r"targets must be integers in \[0, 2\), got torch.int64 up to 2",
            ),
            (torch.full((0, 2), 0.5), torch.zeros(0).long(), "targets must hold at least one row, got none"),
        ],
    )
    def test_what_cannot_be_scored(self, prediction: Tensor, targets: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            metrics.scores(prediction, targets)

    @pytest.mark.parametrize("uncertainty", [torch.ones(200, 1), torch.full((200,), math.nan)])
    def test_uncertainties_that_do_not_fit(self, case: tuple[Tensor, Tensor], uncertainty: Tensor) -> None:
        for function in (metrics.misclassification_auroc, metrics.risk_coverage_curve):
            with pytest.raises(ValueError, match=r"uncertainty must be finite and of the targets' shape \(200,\)"):
                function(*case, uncertainty)

    @pytest.mark.parametrize(
        ("name", "module"),
        [
            ("calibration_error", "torchmetrics.functional.classification"),
            ("brier", "sklearn.metrics"),
            ("misclassification_auroc", "sklearn.metrics"),
            ("risk_coverage_area", "sklearn.metrics"),
        ],
    )
    def test_without_the_optional_packages(
        self, case: tuple[Tensor, Tensor], name: str, module: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"this needs {module}: pip install 'torchdrop\[uncertainty\]'"):
            getattr(metrics, name)(*case)


def labels(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def drawn(ax: Any) -> Any:
    """The Axes after they were really drawn, off the screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(ax.figure).draw()
    return ax


class TestPlots:
    def test_reliability_diagram(self, case: tuple[Tensor, Tensor]) -> None:
        p, targets = case
        ax = drawn(plots.reliability_diagram(p, targets, bins=10))
        right = (p.argmax(1) == targets).numpy()
        of_row = np.minimum((p.amax(1).numpy() * 10).astype(int), 9)
        accuracy = [right[of_row == b].mean() if (of_row == b).any() else math.nan for b in range(10)]
        share = [(of_row == b).mean() for b in range(10)]
        bars, shares = (patch.get_data() for patch in ax.patches)
        np.testing.assert_allclose(bars.values, accuracy)
        np.testing.assert_allclose(shares.values, share)
        np.testing.assert_allclose(ax.lines[1].get_ydata(), accuracy)
        error = metrics.calibration_error(p, targets, bins=10)
        assert ax.get_title() == f"expected calibration error {100 * error:.1f} %"

    def test_a_confidence_on_an_edge_belongs_to_the_bin_above(self) -> None:
        """As in torchmetrics; certainty belongs to the last bin."""
        p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
        ax = plots.reliability_diagram(p, torch.zeros(2).long(), bins=4)
        np.testing.assert_array_equal(ax.patches[1].get_data().values, [0, 0, 0.5, 0.5])

    def test_risk_coverage(self, case: tuple[Tensor, Tensor]) -> None:
        p, targets = case
        ax = plots.risk_coverage(p, targets, label="entropy")
        assert plots.risk_coverage(p, targets, torch.rand(200), ax=ax) is ax
        drawn(ax)
        curve = metrics.risk_coverage_curve(p, targets)
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), curve.coverage)
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), curve.risk)
        first, second = labels(ax)
        assert first == f"entropy (area {metrics.risk_coverage_area(p, targets):.3g})"
        assert second.startswith("area 0.")

    def test_uncertainty_histogram(self) -> None:
        ax = drawn(plots.uncertainty_histogram(torch.rand(20, 5), torch.rand(50) + 1, name="entropy", bins=10))
        assert labels(ax) == ["inside the distribution (100)", "outside the distribution (50)"]
        heights = np.array([patch.get_height() for patch in ax.patches]).reshape(2, 10)
        np.testing.assert_allclose(heights.sum(1) * ax.patches[0].get_width(), 1)
        assert heights[0, 9] == heights[1, 0] == 0
        assert labels(drawn(plots.uncertainty_histogram(torch.rand(20)))) == ["inside the distribution (20)"]
        with pytest.raises(
            ValueError, match="uncertainties outside the distribution must be finite and at least one, got 0"
        ):
            plots.uncertainty_histogram(torch.rand(2), torch.rand(0))
        with pytest.raises(ValueError, match="uncertainties inside the distribution must be finite"):
            plots.uncertainty_histogram(torch.tensor([math.nan]))

    @pytest.mark.parametrize("task", [Plain(), Regression(), Regression(tau=4.0)])
    def test_band(self, task: Any) -> None:
        x, outputs = torch.randn(30), torch.randn(20, 30, 1).double()
        made: Prediction = predicted(task, outputs)
        data = (torch.zeros(4, 1), torch.arange(4.0))
        ax = drawn(plots.band(x, made, data=data, level=0.9))
        noisy = task == Regression(tau=4.0)
        assert labels(ax) == ["mean", *(["90 % of new observations"] if noisy else []), "90 % of models", "data"]
        order = x.argsort()
        np.testing.assert_allclose(ax.lines[0].get_xdata(), x[order])
        np.testing.assert_allclose(ax.lines[0].get_ydata(), made.mean[order, 0])
        np.testing.assert_allclose(ax.lines[1].get_ydata(), data[1])
        half = 1.6448536269514722 * outputs.std(0)[:, 0]
        inner = ax.collections[-1].get_paths()[0].vertices
        assert inner[:, 1].max() == pytest.approx((made.mean[:, 0] + half).max().item(), rel=1e-9)
        if noisy:
            outer = ax.collections[0].get_paths()[0].vertices
            wide = 1.6448536269514722 * (outputs.var(0)[:, 0] + 0.25).sqrt()
            assert outer[:, 1].max() == pytest.approx((made.mean[:, 0] + wide).max().item(), rel=1e-9)
        assert len(ax.collections) == 1 + noisy

    def test_bands_that_cannot_be_drawn(self) -> None:
        made = predicted(Regression(), torch.randn(5, 6, 1))
        with pytest.raises(ValueError, match=r"x must have one value for each row, got shape \(6, 2\)"):
            plots.band(torch.randn(6, 2), made)
        with pytest.raises(ValueError, match=r"prediction must have one value for each row, got shape \(6, 2\)"):
            plots.band(torch.randn(6), predicted(Regression(), torch.randn(5, 6, 2)))
        with pytest.raises(ValueError, match="x and prediction must have the same number of rows, got 5 and 6"):
            plots.band(torch.randn(5), made)
        with pytest.raises(ValueError, match="level must be between 0 and 1, both excluded, got 95"):
            plots.band(torch.randn(6), made, level=95)

    def test_the_axes_given_are_drawn_on_and_pyplot_knows_of_none(self, case: tuple[Tensor, Tensor]) -> None:
        from matplotlib import _pylab_helpers
        from matplotlib.figure import Figure

        axes = Figure().subplots(2, 2)
        made = predicted(Regression(tau=1.0), torch.randn(5, 6, 1))
        assert plots.reliability_diagram(*case, ax=axes[0, 0]) is axes[0, 0]
        assert plots.risk_coverage(*case, ax=axes[0, 1]) is axes[0, 1]
        assert plots.uncertainty_histogram(torch.rand(9), ax=axes[1, 0]) is axes[1, 0]
        assert plots.band(torch.rand(6), made, ax=axes[1, 1]) is axes[1, 1]
        assert _pylab_helpers.Gcf.figs == {}

    def test_without_matplotlib(self, case: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        made = predicted(Regression(), torch.randn(5, 6, 1))
        for draw in (
            lambda: plots.reliability_diagram(*case),
            lambda: plots.risk_coverage(*case),
            lambda: plots.uncertainty_histogram(torch.rand(9)),
            lambda: plots.band(torch.rand(6), made),
        ):
            with pytest.raises(
                ImportError, match=r"this needs matplotlib.figure: pip install 'torchdrop\[uncertainty\]'"
            ):
                draw()

"""Pictures of calibration and uncertainty, with matplotlib (``pip install 'torchdrop[uncertainty]'``).

Each function draws on the Axes that it is given, or on a Figure of its own (no pyplot, no global state), and returns
the Axes: ``reliability_diagram(prediction, targets).figure.savefig("reliability.png")``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._extras import BLUE, VERMILION, axes_or_new
from .metrics import BINS, Classes, calibration_error, flat, risk_coverage_area, risk_coverage_curve
from .prediction import Prediction, normal_quantile
from .task_predictions import RegressionPrediction

INNER, OUTER = "#8DBFE0", "#D6EAF6"


def reliability_diagram(prediction: Classes, targets: Tensor, *, bins: int = BINS, ax: Any = None) -> Any:
    """Draws accuracy against confidence (the largest probability), in equal bins: calibrated is on the diagonal.

    Bars show the accuracy, dots are at each bin's mean confidence, and an orange line shows the share of all
    predictions that are in the bin.

    Args:
        prediction: a `ClassificationPrediction`, or probabilities (B, C, ...).
        targets: classes (B, ...).
        bins: their number.
        ax: the Axes to draw on; new ones if None.

    Returns:
        The Axes.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, figure 1.

    Example:
        >>> ax = reliability_diagram(torch.tensor([[0.2, 0.8], [0.2, 0.8]]), torch.tensor([1, 0]))
        >>> ax.get_title()
        'expected calibration error 30.0 %'
    """
    rows = flat(prediction, targets)
    error = calibration_error(prediction, targets, bins=bins)
    ax = axes_or_new(ax)
    # A bin includes its lower edge, as in torchmetrics; the last one includes 1 too.
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    of_row = torch.bucketize(rows.confidence, edges[1:-1], right=True)
    size = torch.bincount(of_row, minlength=bins).double()
    confidence = (torch.bincount(of_row, rows.confidence, bins) / size).numpy()
    accuracy = (torch.bincount(of_row, rows.right.double(), bins) / size).numpy()
    ax.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="perfect calibration")
    ax.stairs(accuracy, edges.numpy(), fill=True, color=BLUE, alpha=0.5, label="accuracy")
    ax.plot(confidence, accuracy, "o", color="black", markersize=3.5, clip_on=False, label="mean of the bin")
    ax.stairs((size / size.sum()).numpy(), edges.numpy(), color=VERMILION, label="share of predictions")
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence (largest probability)", ylabel="accuracy, share")
    ax.set_title(f"expected calibration error {100 * error:.1f} %", fontsize=11)
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    return ax


def risk_coverage(
    prediction: Classes,
    targets: Tensor,
    uncertainty: Tensor | None = None,
    *,
    label: str | None = None,
    ax: Any = None,
) -> Any:
    """Draws the error among the most certain predictions against their share; see `metrics.risk_coverage_curve`.

    Args:
        prediction: a `ClassificationPrediction`, or probabilities (B, C, ...).
        targets: classes (B, ...).
        uncertainty: a tensor of the targets' shape; the predictive entropy if None.
        label: the curve's name in the legend, to which its area is added. Draw several on one Axes to compare them.
        ax: the Axes to draw on; new ones if None.

    Returns:
        The Axes.

    Example:
        >>> ax = risk_coverage(torch.tensor([[0.4, 0.6], [0.1, 0.9]]), torch.tensor([0, 1]), label="entropy")
        >>> ax.get_legend().get_texts()[0].get_text()
        'entropy (area 0.125)'
    """
    coverage, risk = risk_coverage_curve(prediction, targets, uncertainty)
    area = risk_coverage_area(prediction, targets, uncertainty)
    ax = axes_or_new(ax)
    ax.plot(
        coverage.numpy(), risk.numpy(), label=f"{label} (area {area:.3g})" if label is not None else f"area {area:.3g}"
    )
    ax.set(xlim=(0, 1), xlabel="coverage (share of predictions kept)", ylabel="risk (error among those kept)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=9)
    return ax


def uncertainty_histogram(
    inside: Tensor, outside: Tensor | None = None, *, name: str = "uncertainty", bins: int = 30, ax: Any = None
) -> Any:
    """Draws histograms of uncertainty, inside and outside the data's distribution, each with area 1.

    Args:
        inside: uncertainties of inputs like those trained on, of any shape.
        outside: uncertainties of others, to compare.
        name: the name of the uncertainty, with its unit, for the axis.
        bins: their number, over the range of both.
        ax: the Axes to draw on; new ones if None.

    Returns:
        The Axes.

    Raises:
        ValueError: uncertainties that are empty or not finite.

    Example:
        >>> ax = uncertainty_histogram(torch.rand(50), torch.rand(50) + 1, name="predictive entropy (nats)")
        >>> ax.get_xlabel()
        'predictive entropy (nats)'
    """
    shown = {"inside the distribution": inside} | ({} if outside is None else {"outside the distribution": outside})
    values = [one.detach().cpu().double().reshape(-1) for one in shown.values()]
    for label, one in zip(shown, values, strict=True):
        if len(one) == 0 or not one.isfinite().all():
            raise ValueError(f"uncertainties {label} must be finite and at least one, got {len(one)}")
    ax = axes_or_new(ax)
    every = torch.cat(values)
    for label, one, color in zip(shown, values, (BLUE, VERMILION), strict=False):
        ends = (every.min().item(), every.max().item())
        ax.hist(one.numpy(), bins, range=ends, density=True, color=color, alpha=0.5, label=f"{label} ({len(one)})")
    ax.set(xlabel=name, ylabel="density")
    ax.legend(frameon=False, fontsize=9)
    return ax


def band(
    x: Tensor, prediction: Prediction, *, data: tuple[Tensor, Tensor] | None = None, level: float = 0.95, ax: Any = None
) -> Any:
    """Draws a regression on one input: the mean, the band of the model's uncertainty, and that of a new observation.

    Both bands are ``mean -+ z std``: the inner one with the epistemic variance, the outer one, if the noise is modeled,
    with the total. Without a model of the noise there is one band.

    Args:
        x: the inputs, of shape (B,) or (B, 1), in any order.
        prediction: their prediction, with one value for each.
        data: inputs and targets of points to show, each of shape (N,) or (N, 1).
        level: the probability of the bands.
        ax: the Axes to draw on; new ones if None.

    Returns:
        The Axes.

    Raises:
        ValueError: several inputs or values for a row, or numbers of rows that differ.

    Example:
        >>> from torchdrop.monte_carlo.statistics import Collector
        >>> from torchdrop.monte_carlo.task_predictions import predict_from
        >>> from torchdrop.monte_carlo.tasks import Regression
        >>> collector = Collector(Regression(tau=4.0))
        >>> collector.add(torch.randn(20, 30, 1), range(20))
        >>> ax = band(torch.linspace(0, 1, 30), predict_from(collector))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['mean', '95 % of new observations', '95 % of models']
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, both excluded, got {level}")
    at, order = _one_column("x", x).sort()
    mean = _one_column("prediction", prediction.mean)
    if len(at) != len(mean):
        raise ValueError(f"x and prediction must have the same number of rows, got {len(at)} and {len(mean)}")
    points = [_one_column("data", one).numpy() for one in data or ()]
    noisy = isinstance(prediction, RegressionPrediction) and prediction.aleatoric_variance is not None
    epistemic = prediction.epistemic_variance if isinstance(prediction, RegressionPrediction) else prediction.variance
    bands = [("models", _one_column("prediction", epistemic), INNER)]
    if noisy:
        bands.insert(0, ("new observations", _one_column("prediction", prediction.variance), OUTER))

    ax = axes_or_new(ax)
    xs, center = at.numpy(), mean[order].numpy()
    ax.plot(xs, center, color=BLUE, label="mean", zorder=2)
    for what, variance, color in bands:
        half = normal_quantile((1 + level) / 2) * variance[order].sqrt().numpy()
        label = f"{100 * level:g} % of {what}"
        ax.fill_between(xs, center - half, center + half, color=color, linewidth=0, label=label)
    if points:
        ax.plot(*points, "o", color="black", markersize=2.5, alpha=0.7, label="data", zorder=3)
    ax.set(xlabel="x", ylabel="y")
    ax.legend(frameon=False, fontsize=9)
    return ax


def _one_column(name: str, values: Tensor) -> Tensor:
    if values.dim() not in (1, 2) or values.numel() != len(values):
        raise ValueError(f"{name} must have one value for each row, got shape {tuple(values.shape)}")
    return values.detach().cpu().double().reshape(-1)

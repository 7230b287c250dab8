"""Conformal intervals: a new observation is in its interval with probability at least 1 - alpha."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..monte_carlo.gal import check_targets
from ..monte_carlo.moments import wide
from ..monte_carlo.prediction import Prediction
from ..monte_carlo.task_predictions import ClassificationPrediction, MultiLabelPrediction
from .conformal import Thresholds, check_alpha, check_groups, thresholds

METHODS = ("scaled", "absolute", "cqr")


class IntervalCoverage(NamedTuple):
    """The share of targets that are in their interval, and the mean width of intervals."""

    coverage: float
    width: float


@dataclass(frozen=True, eq=False, repr=False)
class Intervals:
    """An interval for each output.

    Args:
        lower: the lower ends, of shape (B, ...).
        upper: the upper ends. Where one is below its lower end, which "cqr" can lead to, the interval is empty.

    Example:
        >>> intervals = Intervals(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]))
        >>> intervals
        2 intervals of mean width 1.5
        >>> intervals.coverage(torch.tensor([2.0, 0.0]))
        0.5
    """

    lower: Tensor
    upper: Tensor

    def __len__(self) -> int:
        return len(self.lower)

    def __repr__(self) -> str:
        return f"{self.lower.numel()} intervals of mean width {wide(self.width).mean():.4g}"

    @property
    def width(self) -> Tensor:
        """The widths, 0 where an interval is empty."""
        return (self.upper - self.lower).clamp_min(0)

    def contain(self, targets: Tensor) -> Tensor:
        """Returns whether the targets are in their intervals, ends included.

        Raises:
            ValueError: targets of another shape, or that are no numbers.
        """
        targets = check_values(targets, self.lower)
        return (self.lower <= targets) & (targets <= self.upper)

    def coverage(self, targets: Tensor) -> float:
        """Returns the share of targets that are in their interval; NaN without rows."""
        return float(wide(self.contain(targets)).mean())

    def coverage_of(self, groups: Tensor, targets: Tensor) -> dict[int, IntervalCoverage]:
        """Returns coverage and mean width by group, an integer for each row."""
        inside, width = wide(self.contain(targets)), wide(self.width)
        groups = check_groups(groups, len(self)).to(inside.device)
        return {
            int(name): IntervalCoverage(float(inside[groups == name].mean()), float(width[groups == name].mean()))
            for name in groups.unique()
        }


@dataclass(frozen=True, eq=False, repr=False)
class ConformalIntervals:
    """The rule that makes intervals from a prediction: see `conformal_intervals`, which fits it.

    Args:
        method: the name of the score.
        alpha: the probability of an error that is allowed.
        thresholds: for all rows or for each group, of the shape of a row's outputs.
    """

    method: str
    alpha: float
    thresholds: Thresholds

    def __repr__(self) -> str:
        rows, names = self.thresholds.rows, self.thresholds.groups
        text = f"conformal intervals by {self.method!r}, for a coverage of at least {1 - self.alpha:.4g}"
        shown = [
            f"threshold {_numbers(value)} from {n} rows" for value, n in zip(self.thresholds.values, rows, strict=True)
        ]
        if names is None:
            return f"{text}: {shown[0]}"
        lines = [f"  group {name}: {what}" for name, what in zip(names.tolist(), shown, strict=True)]
        return "\n".join([f"{text} in each group:", *lines])

    def __call__(self, prediction: Prediction, groups: Tensor | None = None) -> Intervals:
        """Returns the interval of each output, in the prediction's dtype.

        Args:
            prediction: a prediction with as many outputs for each row as the calibration set's.
            groups: the group of each row, if the calibration set had groups.

        Raises:
            ValueError: outputs of another shape, groups that do not fit, or samples that are needed and were not kept.
        """
        lower, upper, unit = _parts(prediction, self.method, self.alpha)
        of_row = tuple(self.thresholds.values.shape[1:])
        if tuple(lower.shape[1:]) != of_row:
            raise ValueError(
                f"prediction must have outputs of the calibration set's shape {of_row} for each row, got "
                f"{tuple(lower.shape[1:])}"
            )
        half = self.thresholds.of(groups, len(lower)).to(lower.device) * unit
        dtype = prediction.mean.dtype
        return Intervals((lower - half).to(dtype), (upper + half).to(dtype))


def conformal_intervals(
    prediction: Prediction,
    targets: Tensor,
    alpha: float = 0.1,
    *,
    method: str = "scaled",
    groups: Tensor | None = None,
) -> ConformalIntervals:
    """Fits intervals that a new observation lies in with probability at least 1 - alpha, whatever the model.

    The threshold q is the k-th smallest score of the n calibration rows, ``k = ceil((n + 1)(1 - alpha))``. With m and s
    the mean and standard deviation over the Monte Carlo samples (with the noise's, where it is modeled), and a, b the
    alpha / 2 and 1 - alpha / 2 quantiles of the samples (of new observations, where the noise is modeled),

    - "scaled": the score is ``|y - m| / s``, the interval ``m -+ q s``: as wide as the model is unsure.
    - "absolute": the score is ``|y - m|``, the interval ``m -+ q``: the same width everywhere.
    - "cqr": the score is ``max(a - y, y - b)``, the interval ``[a - q, b + q]``: conformalized quantile regression, the
      quantiles being those of Monte Carlo samples. It needs `keep_samples`.

    The guarantee is for a row like those of the calibration set (exchangeable with them), on average over calibration
    sets, and for each output by itself where a row has several. The rows must not have been used for training, or for
    fitting anything else such as a scale.

    Args:
        prediction: the prediction of the calibration rows, with task="regression" or None.
        targets: their observations, of the mean's shape (N, ...).
        alpha: the probability of an error that is allowed.
        method: "scaled", "absolute" or "cqr".
        groups: integers (N,). Each group gets its own threshold, and the guarantee holds within it.
            `ConformalIntervals` then needs the group of each row, too.

    Returns:
        A `ConformalIntervals`, which makes `Intervals` from other predictions of the same model.

    Raises:
        ValueError: too few rows for alpha, in all or in a group; targets or groups that do not fit; a standard
            deviation of 0 with "scaled"; samples that were not kept with "cqr"; an argument out of range.
        TypeError: a prediction of classes or labels.

    References:
        Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, "Distribution-Free Predictive Inference for Regression", JASA 113,
        2018, algorithm 2 and section 5.2 ("absolute", "scaled"). Romano, Patterson, Candes, "Conformalized Quantile
        Regression", NeurIPS 2019, equation 6 ("cqr").

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 1)).eval()
        >>> x, y = torch.randn(300, 4), torch.randn(300, 1)
        >>> result = torchdrop.mc_predict(model, x, samples=20, task="regression", seed=0)
        >>> intervals = torchdrop.calibrate.conformal_intervals(result, y, alpha=0.1)
        >>> new = torchdrop.mc_predict(model, torch.randn(5, 4), samples=20, task="regression", seed=0)
        >>> intervals(new).lower.shape
        torch.Size([5, 1])
    """
    alpha = check_alpha(alpha)
    if method not in METHODS:
        raise ValueError(f"method must be {', '.join(map(repr, METHODS))}, got {method!r}")
    lower, upper, unit = _parts(prediction, method, alpha)
    targets = check_values(targets, lower)
    scores = torch.maximum(lower - targets, targets - upper) / unit
    return ConformalIntervals(method, alpha, thresholds(scores, alpha, groups))


def check_regression(prediction: Any) -> Prediction:
    """Returns a prediction of values.

    Raises:
        TypeError: it is no prediction, or one of classes or labels.
        ValueError: places were left out of it.
    """
    classes = isinstance(prediction, (ClassificationPrediction, MultiLabelPrediction))
    if not isinstance(prediction, Prediction) or classes:
        raise TypeError(
            "prediction must be a Prediction of values (task='regression' or None), got "
            f"{type(prediction).__name__}{': see conformal_sets and temperature' if classes else ''}"
        )
    if prediction.valid is not None:
        raise ValueError("prediction must report all places: take those rows alone that are wanted, without valid=")
    return prediction


def _parts(prediction: Any, method: str, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what an interval grows from, [lower, upper], and the unit in which it grows."""
    prediction = check_regression(prediction)
    mean = wide(prediction.mean)
    if method == "absolute":
        return mean, mean, torch.ones_like(mean)
    if method == "scaled":
        std = wide(prediction.std)
        if not bool((std > 0).all()):
            raise ValueError(
                "standard deviations must be positive for method='scaled', got "
                f"{int((~(std > 0)).sum())} of {std.numel()} that are not: take more samples, or method='absolute'"
            )
        return mean, mean, std
    lower, upper = prediction.interval(1 - alpha, method="samples")
    return wide(lower), wide(upper), torch.ones_like(mean)


def check_values(targets: Any, of: Tensor) -> Tensor:
    """Returns targets in float64 on the device of predictions.

    Raises:
        ValueError: they have another shape, or are no finite numbers.

    Example:
        >>> check_values(torch.tensor([1.0]), torch.ones(1))
        tensor([1.], dtype=torch.float64)
    """
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets must be a tensor of shape {tuple(of.shape)}, got {type(targets).__name__}")
    check_targets(targets, of.shape)
    if targets.is_complex() or not bool(targets.isfinite().all()):
        raise ValueError("targets must be finite real numbers")
    return wide(targets.to(of.device))


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.reshape(-1).tolist())

"""Measures of predicted probabilities, and of how well uncertainty separates right from wrong, or known from unknown.

The measures are torchmetrics' and scikit-learn's (``pip install 'torchdrop[uncertainty]'``); this module passes them a
prediction and its targets. Predictions are a `ClassificationPrediction` or probabilities (B, C, ...), and targets are
classes (B, ...); further dimensions count as rows. Places that a prediction does not report are left out, whatever the
targets there. Each label of a `MultiLabelPrediction` counts as a row of two classes, absent (0) and present (1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._extras import optional
from .classes import normalized
from .gal import check_targets
from .task_predictions import ClassificationPrediction, MultiLabelPrediction

BINS = 15
"""The number of bins of confidence, as in Guo et al., ICML 2017."""

Classes = ClassificationPrediction | MultiLabelPrediction | Tensor


class Flat(NamedTuple):
    """Probabilities (N, C) in float64, their sums exactly 1 to rounding, and classes (N,), on the CPU."""

    probabilities: Tensor
    targets: Tensor
    chosen: Tensor | None = None
    """The places that are reported, among all; None for all of them."""

    @property
    def confidence(self) -> Tensor:
        return self.probabilities.amax(1)

    @property
    def right(self) -> Tensor:
        return self.probabilities.argmax(1) == self.targets


def flat(prediction: Classes, targets: Tensor) -> Flat:
    """Returns a prediction and its targets, checked, with all dimensions but the classes made rows.

    Raises:
        ValueError: numbers that are no probabilities, targets that do not fit them, or no rows.

    Example:
        >>> flat(torch.tensor([[0.25, 0.75]]), torch.tensor([1])).right
        tensor([True])
    """
    valid: Tensor | None = None
    if isinstance(prediction, Tensor):
        probabilities, dim = prediction, 1
    elif isinstance(prediction, MultiLabelPrediction):
        probabilities, dim = torch.stack([1 - prediction.mean, prediction.mean], -1), prediction.mean.dim()
        valid = None if prediction.valid is None else ~prediction.mean.isnan()
        targets = _labels(targets)
    else:
        probabilities, dim, valid = prediction.mean, prediction.class_dim, prediction.valid
    fits = probabilities.dim() >= 2 and probabilities.is_floating_point()
    rows = probabilities.detach().cpu().double().movedim(dim, -1).flatten(0, -2) if fits else probabilities
    chosen = None if valid is None else valid.cpu().flatten().nonzero().squeeze(1)
    if fits and chosen is not None:
        rows = rows[chosen]
    if not fits or not normalized(rows.to(probabilities.dtype), 1):
        raise ValueError(
            "prediction must hold probabilities (B, C, ...), in [0, 1] and with sum 1 over their classes, "
            f"got {probabilities.dtype} of shape {tuple(probabilities.shape)}"
        )
    check_targets(targets, probabilities.select(dim, 0).shape)
    targets, classes = targets.detach().cpu().flatten(), probabilities.shape[dim]
    targets = targets if chosen is None else targets[chosen]
    if targets.numel() == 0:
        raise ValueError("targets must hold at least one row, got none")
    if targets.dtype == torch.bool or targets.is_floating_point() or targets.min() < 0 or targets.max() >= classes:
        raise ValueError(f"targets must be integers in [0, {classes}), got {targets.dtype} up to {targets.max()}")
    return Flat(rows / rows.sum(1, keepdim=True), targets.long(), chosen)


def calibration_error(prediction: Classes, targets: Tensor, *, bins: int = BINS, norm: str = "l1") -> float:
    """Returns the expected calibration error ``sum_b n_b / n |accuracy_b - confidence_b|`` over bins of confidence.

    Args:
        prediction: probabilities (B, C, ...).
        targets: classes (B, ...).
        bins: their number, of equal width.
        norm: "l1" for the expected error, "l2" for its root mean square, "max" for the largest of a bin.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3. By torchmetrics.

    Example:
        >>> round(calibration_error(torch.tensor([[0.2, 0.8], [0.2, 0.8]]), torch.tensor([1, 0])), 4)
        0.3
    """
    rows = flat(prediction, targets)
    functional = optional("torchmetrics.functional.classification")
    classes = rows.probabilities.shape[1]
    error = functional.multiclass_calibration_error(
        rows.probabilities, rows.targets, num_classes=classes, n_bins=bins, norm=norm
    )
    return float(error)


def brier(prediction: Classes, targets: Tensor) -> float:
    """Returns the Brier score ``1/n sum_i sum_c (p_ic - [y_i = c])^2``, between 0 (best) and 2.

    References:
        Brier, Monthly Weather Review 78, 1950. By scikit-learn.

    Example:
        >>> brier(torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
        0.5
    """
    rows = flat(prediction, targets)
    labels = list(range(rows.probabilities.shape[1]))
    score = optional("sklearn.metrics").brier_score_loss
    return float(score(rows.targets.numpy(), rows.probabilities.numpy(), labels=labels, scale_by_half=False))


def negative_log_likelihood(prediction: Classes, targets: Tensor) -> float:
    """Returns the mean of ``-log p`` of the target classes, in nats; infinite if one of them has probability 0.

    Example:
        >>> round(negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([1])), 4)
        0.6931
    """
    rows = flat(prediction, targets)
    return float(-rows.probabilities.gather(1, rows.targets.unsqueeze(1)).log().mean())


def misclassification_auroc(prediction: Classes, targets: Tensor, uncertainty: Tensor | None = None) -> float:
    """Returns the probability that a wrong prediction is more uncertain than a right one (a tie counts half).

    Args:
        prediction: probabilities (B, C, ...).
        targets: classes (B, ...).
        uncertainty: a tensor of the targets' shape, larger for less certain; the predictive entropy if None.

    Returns:
        1 if uncertainty separates them, 0.5 if it is uninformative; NaN if all are right, or all are wrong.

    References:
        Hendrycks, Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017. By
        scikit-learn.

    Example:
        >>> misclassification_auroc(torch.tensor([[0.4, 0.6], [0.1, 0.9]]), torch.tensor([0, 1]))
        1.0
    """
    rows = flat(prediction, targets)
    wrong = ~rows.right
    scores = _uncertainty(rows, targets, uncertainty)
    if wrong.all() or not wrong.any():
        return float("nan")
    return float(optional("sklearn.metrics").roc_auc_score(wrong.numpy(), scores.numpy()))


def out_of_distribution_auroc(inside: Tensor, outside: Tensor) -> float:
    """Returns the probability that an input from outside the distribution is more uncertain than one from inside.

    Args:
        inside: uncertainties of inputs like those trained on, of any shape.
        outside: uncertainties of other inputs.

    Raises:
        ValueError: one of them is empty.

    References:
        Hendrycks, Gimpel, ICLR 2017. By scikit-learn.

    Example:
        >>> out_of_distribution_auroc(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.4]))
        0.75
    """
    if inside.numel() == 0 or outside.numel() == 0:
        raise ValueError(f"inside and outside must hold uncertainties, got {inside.numel()} and {outside.numel()}")
    scores = torch.cat([one.detach().cpu().double().reshape(-1) for one in (inside, outside)])
    return float(
        optional("sklearn.metrics").roc_auc_score((torch.arange(len(scores)) >= inside.numel()).numpy(), scores.numpy())
    )


class RiskCoverage(NamedTuple):
    """The error among the predictions that are kept, for each share that can be kept."""

    coverage: Tensor
    """Shares of the rows, increasing from 0 to 1."""
    risk: Tensor
    """The fraction of wrong predictions among the most certain ones."""


def risk_coverage_curve(prediction: Classes, targets: Tensor, uncertainty: Tensor | None = None) -> RiskCoverage:
    """Returns the error among the most certain predictions against their share.

    There is a point for each value of the uncertainty: rows that are equally uncertain are kept together. At coverage 0
    the curve begins with the risk of its first point.

    Args:
        prediction: probabilities (B, C, ...).
        targets: classes (B, ...).
        uncertainty: a tensor of the targets' shape, larger for less certain; the predictive entropy if None.

    References:
        El-Yaniv, Wiener, JMLR 11, 2010; Geifman, El-Yaniv, "Selective Classification for Deep Neural Networks", 2017.

    Example:
        >>> risk_coverage_curve(torch.tensor([[0.4, 0.6], [0.1, 0.9]]), torch.tensor([0, 1])).risk.tolist()
        [0.0, 0.0, 0.5]
    """
    rows = flat(prediction, targets)
    scores, order = _uncertainty(rows, targets, uncertainty).sort()
    kept = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    risk = (~rows.right)[order].double().cumsum(0) / kept
    last = torch.cat([scores[1:] > scores[:-1], torch.tensor([True])])
    coverage, risk = kept[last] / len(scores), risk[last]
    return RiskCoverage(torch.cat([coverage.new_zeros(1), coverage]), torch.cat([risk[:1], risk]))


def risk_coverage_area(prediction: Classes, targets: Tensor, uncertainty: Tensor | None = None) -> float:
    """Returns the area under `risk_coverage_curve`, the mean error over coverages; smaller is better. By scikit-learn.

    Example:
        >>> risk_coverage_area(torch.tensor([[0.4, 0.6], [0.1, 0.9]]), torch.tensor([0, 1]))
        0.125
    """
    curve = risk_coverage_curve(prediction, targets, uncertainty)
    return float(optional("sklearn.metrics").auc(curve.coverage.numpy(), curve.risk.numpy()))


def scores(prediction: Classes, targets: Tensor) -> dict[str, float]:
    """Returns the accuracy and all of the above for one prediction, with the predictive entropy as uncertainty.

    Example:
        >>> scores(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([1, 1]))["accuracy"]
        0.5
    """
    return {
        "accuracy": float(flat(prediction, targets).right.double().mean()),
        "negative_log_likelihood": negative_log_likelihood(prediction, targets),
        "brier": brier(prediction, targets),
        "calibration_error": calibration_error(prediction, targets),
        "misclassification_auroc": misclassification_auroc(prediction, targets),
        "risk_coverage_area": risk_coverage_area(prediction, targets),
    }


def _labels(targets: Tensor) -> Tensor:
    """Returns labels that may be given as booleans, or as floating-point numbers 0 and 1, as integers."""
    if targets.is_floating_point() and not bool((targets.long() == targets).all()):
        raise ValueError("targets must be 0 or 1 for each label")
    return targets.long()


def _uncertainty(rows: Flat, targets: Tensor, uncertainty: Tensor | None) -> Tensor:
    if uncertainty is None:
        return torch.special.entr(rows.probabilities).sum(1)
    fits = uncertainty.shape == targets.shape
    values = uncertainty.detach().cpu().double().flatten()
    if fits and rows.chosen is not None:
        values = values[rows.chosen]
    if not fits or not values.isfinite().all():
        raise ValueError(
            f"uncertainty must be finite and of the targets' shape {tuple(targets.shape)}, "
            f"got shape {tuple(uncertainty.shape)}"
        )
    return values

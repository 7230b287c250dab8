"""Scores of the uncertainty benchmark for one prediction, and their means and differences over groups of networks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from uncertainty_ways import MONTE_CARLO, ONE_PASS, WAYS, Outputs

from torchdrop.monte_carlo import ClassificationPrediction, metrics

ANGLES = tuple(range(0, 181, 15))
"""Degrees by which digits are turned."""

OUTSIDE = 90
"""The angle at which digits are told from upright ones by their uncertainty."""

LOWEST = math.log(torch.finfo(torch.float32).tiny)
"""The least log-likelihood that counts: a probability that is smaller may have been rounded to 0."""

COVERAGES = tuple(percent / 100 for percent in range(50, 101))
"""The shares of the most certain predictions for which the error is reported."""

HIGHER_IS_BETTER = ("misclassification_auroc", "mutual_information_auroc")
SCORES = (
    "error", "negative_log_likelihood", "brier", "calibration_error", "risk_coverage_area", *HIGHER_IS_BETTER
)  # fmt: skip
SHORT_NAMES = dict(zip(SCORES, ("error", "NLL", "Brier", "ECE", "AURC", "AUROC", "AUROC by MI"), strict=True))
BASELINES = (*ONE_PASS, MONTE_CARLO)

Judged = dict[str, Any]


def of_test(way: str, prediction: ClassificationPrediction, labels: Tensor) -> dict[str, float | None]:
    """The scores of test digits. Uncertainty is the predictive entropy, and once the mutual information."""
    found = metrics.scores(prediction, labels)
    mutual = metrics.misclassification_auroc(prediction, labels, prediction.mutual_information)
    return {
        "error": 1 - found.pop("accuracy"),
        **found,
        "mutual_information_auroc": None if way in ONE_PASS else mutual,
    }


def risks(prediction: ClassificationPrediction, labels: Tensor) -> list[float]:
    """The error among the most certain predictions, at each coverage."""
    curve = metrics.risk_coverage_curve(prediction, labels)
    return [float(risk) for risk in np.interp(COVERAGES, curve.coverage.numpy(), curve.risk.numpy())]


def under_rotation(prediction: ClassificationPrediction, labels: Tensor) -> Judged:
    """Means over the digits at each angle, and how well the predictive entropy tells turned from upright digits.

    Args:
        prediction: of all rotations of the digits, one angle after another.
        labels: of the digits, (B,).
    """
    rows = len(labels)
    entropy, mutual = (
        one.double().split(rows) for one in (prediction.predictive_entropy, prediction.mutual_information)
    )
    wrong = (prediction.predicted != labels.repeat(len(ANGLES))).double().split(rows)
    likelihood = prediction.log_likelihood(labels.repeat(len(ANGLES))).double().clamp_min(LOWEST).split(rows)
    outside = metrics.out_of_distribution_auroc(entropy[ANGLES.index(0)], entropy[ANGLES.index(OUTSIDE)])
    return {
        "entropy": [float(one.mean()) for one in entropy],
        "mutual_information": [float(one.mean()) for one in mutual],
        "error": [float(one.mean()) for one in wrong],
        "negative_log_likelihood": [-float(one.mean()) for one in likelihood],
        "outside_auroc": outside,
    }


def judged(way: str, outputs: Outputs, labels: Tensor, turned_labels: Tensor) -> Judged:
    """All that is reported of one network, or of one ensemble, in one way."""
    return {
        "scores": of_test(way, outputs.test, labels),
        "risks": risks(outputs.test, labels),
        "rotation": under_rotation(outputs.turned, turned_labels),
    }


def mean_of(found: Sequence[Any]) -> Any:
    """The mean of numbers, and of mappings and lists of them element by element; None where there are none."""
    first = found[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: mean_of([one[name] for one in found]) for name in first}
    return [mean_of(ones) for ones in zip(*found, strict=True)] if isinstance(first, list) else statistics.fmean(found)


def with_error(values: Sequence[float]) -> dict[str, float]:
    """The mean over independent groups and its standard error, which is NaN where a value is infinite or NaN."""
    finite = all(map(math.isfinite, values))
    spread = statistics.stdev(values) if finite else math.nan
    return {"mean": rounded(statistics.fmean(values)), "standard_error": rounded(spread / math.sqrt(len(values)))}


def rounded(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def bound(groups: int) -> float:
    """The 97.5 % point of Student's t distribution: so many standard errors a mean over groups must be from 0."""
    from scipy.special import stdtrit

    return float(stdtrit(groups - 1, 0.975))


def difference(groups: Sequence[dict[str, Judged]], way: str, than: str, score: str) -> dict[str, Any] | None:
    """One way's score minus another's, paired by group, and whether it is better, worse, or neither."""
    pairs = [(group[way]["scores"][score], group[than]["scores"][score]) for group in groups]
    if any(None in pair for pair in pairs):
        return None
    found = with_error([first - second for first, second in pairs])
    far = abs(found["mean"]) > bound(len(groups)) * found["standard_error"]
    better = (found["mean"] > 0) == (score in HIGHER_IS_BETTER)
    return {**found, "verdict": ("better" if better else "worse") if far else "neither"}


def over_groups(groups: Sequence[dict[str, Judged]]) -> dict[str, Any]:
    """Means and standard errors over groups, and the differences between ways.

    Args:
        groups: for each group what was found in each way: of one network the mean over the group's networks.
    """

    def curve(way: str, *path: str) -> dict[str, list[float]]:
        found = []
        for group in groups:
            values: Any = group[way]
            for name in path:
                values = values[name]
            found.append(values)
        points = [with_error(values) for values in zip(*found, strict=True)]
        return {name: [point[name] for point in points] for name in ("mean", "standard_error")}

    def score(way: str, name: str) -> dict[str, Any] | None:
        values = [group[way]["scores"][name] for group in groups]
        return None if None in values else {**with_error(values), "by_group": [rounded(value) for value in values]}

    rotated = ("entropy", "mutual_information", "error", "negative_log_likelihood")
    return {
        "scores": {way: {name: score(way, name) for name in SCORES} for way in WAYS},
        "differences": {
            than: {way: {name: difference(groups, way, than, name) for name in SCORES} for way in WAYS if way != than}
            for than in BASELINES
        },
        "risks": {way: curve(way, "risks") for way in WAYS},
        "rotation": {
            way: {name: curve(way, "rotation", name) for name in rotated}
            | {"outside_auroc": with_error([group[way]["rotation"]["outside_auroc"] for group in groups])}
            for way in WAYS
        },
    }  # fmt: skip

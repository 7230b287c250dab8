"""Scores of a prediction before and after it is calibrated; smaller is better for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..monte_carlo import metrics
from ..monte_carlo.moments import wide
from ..monte_carlo.prediction import Prediction, normal_quantile
from ..monte_carlo.task_predictions import ClassificationPrediction
from .intervals import check_values

LEVELS = tuple(level / 20 for level in range(1, 20))
"""The levels of the intervals that are compared with the share of targets in them."""


@dataclass(frozen=True)
class Comparison:
    """Scores by name, of the same rows before and after. It prints as a table.

    Example:
        >>> Comparison({"brier": 0.5}, {"brier": 0.25})
                                      before       after
        brier                            0.5        0.25
    """

    before: dict[str, float]
    after: dict[str, float]

    def __repr__(self) -> str:
        lines = [f"{'':<24}{'before':>12}{'after':>12}"]
        lines += [f"{name:<24}{value:>12.4g}{self.after[name]:>12.4g}" for name, value in self.before.items()]
        return "\n".join(lines)


def scores(prediction: Prediction, targets: Tensor) -> dict[str, float]:
    """Returns the scores of a prediction: those of classes, or those of values.

    Classes have "negative_log_likelihood", "calibration_error" and "brier" of `torchdrop.monte_carlo.metrics`, which
    need ``pip install 'torchdrop[uncertainty]'``. Values have, for the normal distribution with the prediction's mean m
    and variance s^2, and ``z = (y - m) / s``,

    - "negative_log_likelihood": the mean of ``z^2 / 2 + log(s sqrt(2 pi))``,
    - "crps": the mean of ``s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi))``, in the unit of y,
    - "interval_error": the mean over the levels 0.05 to 0.95 of the difference between a level and the share of targets
      that are in the central interval of this level.

    Args:
        prediction: a prediction of classes or values.
        targets: their targets.

    Raises:
        ValueError: targets that do not fit, or a variance of 0.

    References:
        Gneiting, Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", JASA 102, 2007 (CRPS). Kuleshov,
        Fenner, Ermon, "Accurate Uncertainties for Deep Learning Using Calibrated Regression", ICML 2018 (levels).
    """
    if isinstance(prediction, ClassificationPrediction):
        return {
            "negative_log_likelihood": metrics.negative_log_likelihood(prediction, targets),
            "calibration_error": metrics.calibration_error(prediction, targets),
            "brier": metrics.brier(prediction, targets),
        }
    z, std = standardized(prediction, targets)
    shares = interval_shares(prediction, targets, LEVELS)
    return {
        "negative_log_likelihood": float((z.square() / 2 + std.log() + math.log(2 * math.pi) / 2).mean()),
        "crps": float((std * _crps(z)).mean()),
        "interval_error": float((shares - torch.tensor(LEVELS, dtype=torch.float64)).abs().mean()),
    }


def standardized(prediction: Prediction, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``(y - m) / s`` and s in float64, both of the mean's shape.

    Raises:
        ValueError: targets that do not fit, or a standard deviation that is not positive.
    """
    targets = check_values(targets, prediction.mean)
    if targets.numel() == 0:
        raise ValueError("targets must hold at least one row, got none")
    std = wide(prediction.std)
    if not bool((std > 0).all()):
        raise ValueError(
            f"standard deviations must be positive, got {int((~(std > 0)).sum())} of {std.numel()} that are not: take "
            "more samples, or give tau= or noise= to mc_predict"
        )
    return (targets - wide(prediction.mean)) / std, std


def interval_shares(prediction: Prediction, targets: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Returns the share of targets in the central normal interval of each level, in float64."""
    z = standardized(prediction, targets)[0].abs().reshape(-1)
    bounds = torch.tensor([normal_quantile((1 + level) / 2) for level in levels], dtype=z.dtype, device=z.device)
    return (z <= bounds.unsqueeze(1)).to(z.dtype).mean(1).cpu().double()


def _crps(z: Tensor) -> Tensor:
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return z * (2 * torch.special.ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi)

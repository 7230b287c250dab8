"""Predictions of samples that are given, as `mc_predict` would return them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchdrop.monte_carlo import ClassificationPrediction, RegressionPrediction
from torchdrop.monte_carlo.classes import Classification
from torchdrop.monte_carlo.statistics import Collector
from torchdrop.monte_carlo.task_predictions import predict_from
from torchdrop.monte_carlo.tasks import Regression


def classified(probabilities: Tensor, class_dim: int = 1, **options: Any) -> ClassificationPrediction:
    """The prediction of probabilities (T, B, ...)."""
    collector = Collector(Classification("probabilities", class_dim), **{"keep_samples": True, **options})
    collector.add(probabilities, range(len(probabilities)))
    prediction = predict_from(collector, seed=3, strategy="loop")
    assert isinstance(prediction, ClassificationPrediction)
    return prediction


def regressed(samples: Any, tau: float | None = None, keep_samples: bool = True) -> RegressionPrediction:
    """The prediction of values (T, B, ...)."""
    collector = Collector(Regression(tau), keep_samples=keep_samples)
    collector.add(torch.as_tensor(samples), range(len(samples)))
    prediction = predict_from(collector, seed=3, strategy="loop")
    assert isinstance(prediction, RegressionPrediction)
    return prediction

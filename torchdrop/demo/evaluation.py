"""Predicted probabilities, one pass or many, and the numbers that say how good they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import log_loss  # type: ignore[import-untyped]
from torch import Tensor, nn

Array = NDArray[np.float64]

BINS = 15


class Scores(NamedTuple):
    accuracy: float
    """Fraction of right answers."""
    nll: float
    """Negative log-likelihood per image, in nats."""
    ece: float
    """Expected calibration error, a fraction."""


class Reliability(NamedTuple):
    """For each bin of confidence: its number of predictions, their mean confidence and accuracy (NaN if none)."""

    size: Array
    confidence: Array
    accuracy: Array


def probabilities(network: nn.Module, images: Tensor, *, dropout: bool) -> Array:
    """One pass: (images, classes). The network's mode is left as it was."""
    before = network.training
    network.train(dropout)
    try:
        with torch.no_grad():
            return network(images).cpu().double().softmax(-1).numpy()
    finally:
        network.train(before)


def monte_carlo(network: nn.Module, images: Tensor, samples: int) -> Iterator[Array]:
    """For k = 1 to `samples`, the mean of the probabilities of the first k passes with dropout on.

    Sound only where train mode switches on nothing but dropout: the network has no batch normalisation.
    """
    total: Any = 0.0
    for k in range(1, samples + 1):
        total = total + probabilities(network, images, dropout=True)
        yield total / k


def error(predicted: Array, labels: NDArray[np.int64]) -> float:
    """Fraction of wrong answers."""
    return float(np.mean(predicted.argmax(axis=1) != labels))


def entropy(predicted: Array) -> Array:
    """Predictive entropy ``-sum_c p_c log p_c`` of each row, in nats."""
    return -np.sum(predicted * np.log(np.maximum(predicted, np.finfo(np.float64).tiny)), axis=1)


def reliability(predicted: Array, labels: NDArray[np.int64], bins: int = BINS) -> Reliability:
    """Predictions grouped by confidence, the largest probability, into bins ``((m - 1) / bins, m / bins]``."""
    confidence = predicted.max(axis=1)
    right = predicted.argmax(axis=1) == labels
    bin_of = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    size = np.bincount(bin_of, minlength=bins).astype(np.float64)
    members = np.where(size > 0, size, np.nan)
    return Reliability(
        size,
        np.bincount(bin_of, weights=confidence, minlength=bins) / members,
        np.bincount(bin_of, weights=right, minlength=bins) / members,
    )


def expected_calibration_error(predicted: Array, labels: NDArray[np.int64], bins: int = BINS) -> float:
    """``sum_m n_m / n |accuracy_m - confidence_m|`` over bins of equal width.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    size, confidence, accuracy = reliability(predicted, labels, bins)
    return float(np.nansum(size * np.abs(accuracy - confidence)) / size.sum())


def score(predicted: Array, labels: NDArray[np.int64]) -> Scores:
    """The three numbers for predicted probabilities of shape (images, classes)."""
    return Scores(
        1 - error(predicted, labels),
        float(log_loss(labels, predicted, labels=range(predicted.shape[1]))),
        expected_calibration_error(predicted, labels),
    )

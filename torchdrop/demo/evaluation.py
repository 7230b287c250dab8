"""Predicted probabilities, from one pass or many, and the numbers that measure how good they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

# `metrics` imports it only when it is needed. A demo without it would train first and fail then.
import torchmetrics  # noqa: F401
from numpy.typing import NDArray
from torch import Tensor, nn

from ..monte_carlo import ClassificationPrediction, mc_predict
from ..monte_carlo.metrics import calibration_error, negative_log_likelihood

Array = NDArray[np.float64]


class Scores(NamedTuple):
    accuracy: float
    """Fraction of right predictions."""
    nll: float
    """Negative log-likelihood per image, in nats."""
    ece: float
    """Expected calibration error, a fraction, over 15 bins of confidence."""


def probabilities(network: nn.Module, images: Tensor) -> Tensor:
    """Makes one pass in eval mode: (images, classes) in float64, on the CPU. The network's mode is left as it was."""
    before = network.training
    network.eval()
    try:
        with torch.no_grad():
            return network(images).cpu().double().softmax(-1)
    finally:
        network.train(before)


def monte_carlo(network: nn.Module, images: Tensor, samples: int, *, seed: int) -> ClassificationPrediction:
    """Takes that many samples of the probabilities, and keeps all, with their statistics. See `torchdrop.mc_predict`.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.Dropout())
        >>> monte_carlo(network, torch.ones(2, 4), 5, seed=0).samples.shape
        torch.Size([5, 2, 3])
    """
    result = mc_predict(network, images, samples=samples, task="classification", keep_samples=True, seed=seed)
    assert isinstance(result, ClassificationPrediction)
    return result


def running_mean(samples: Tensor) -> Iterator[Tensor]:
    """Yields for k = 1 ... T the mean ``1/k sum_(t <= k) p_t`` of the first k of T samples, in float64, on the CPU.

    Example:
        >>> [mean.tolist() for mean in running_mean(torch.tensor([[1.0], [3.0], [2.0]]))]
        [[1.0], [2.0], [2.0]]
    """
    total = torch.zeros(samples.shape[1:], dtype=torch.float64)
    for k, sample in enumerate(samples.cpu(), start=1):
        total = total + sample
        yield total / k


def error(predicted: Tensor, labels: Tensor) -> float:
    """Returns the fraction of wrong predictions.

    Example:
        >>> error(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        0.5
    """
    return float((predicted.argmax(1) != labels).double().mean())


def score(predicted: Tensor, labels: Tensor) -> Scores:
    """Returns the three numbers for predicted probabilities of shape (images, classes).

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    return Scores(
        1 - error(predicted, labels), negative_log_likelihood(predicted, labels), calibration_error(predicted, labels)
    )

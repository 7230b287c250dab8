"""Regression on one input: the uncertainty of a network with dropout at the data, between them and beyond them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..layers.dropout import Dropout
from ..monte_carlo import RegressionPrediction, mc_predict, weight_decay_from_tau
from ..monte_carlo.prediction import normal_quantile
from .experiment import undisturbed

INTERVALS = ((-3.0, -1.0), (1.0, 3.0))
"""The intervals that have data."""

POINTS = 40
"""The number of data in each interval."""

NOISE = 0.1
"""Standard deviation of the noise, which is known here because the data are made."""

TAU = 1 / NOISE**2
LENGTH_SCALE = 1.0
KEEP_PROB, UNITS = 0.8, 100
STEPS, LEARNING_RATE = 2000, 3e-3
SAMPLES = 300
LEVEL = 0.95
GRID = torch.linspace(-6, 6, 481)


class Fit(NamedTuple):
    """The data, and the prediction on `GRID`; all of shape (..., 1), on the CPU."""

    x: Tensor
    y: Tensor
    prediction: RegressionPrediction


class Region(NamedTuple):
    """A part of the grid."""

    name: str
    std: float
    """The mean of the epistemic standard deviation."""
    held: float
    """The share of the part in which the band of the models contains the function that the data come from."""


def function(x: Tensor) -> Tensor:
    """Returns the function that the data come from, ``sin(3 x / 2)``."""
    return torch.sin(1.5 * x)


def decay() -> float:
    """Returns the optimizer's weight decay that belongs to `TAU`: 4 lambda with `torch.nn.functional.mse_loss`.

    Example:
        >>> round(decay(), 6)
        0.0002
    """
    return 4 * weight_decay_from_tau(LENGTH_SCALE, KEEP_PROB, POINTS * len(INTERVALS), TAU)


def fit(seed: int, device: torch.device) -> Fit:
    """Makes the data, trains on all of them at once, and predicts far beyond them, with a progress bar.

    All samples share their masks over the grid, so that each is one function and the curves are smooth. PyTorch's
    generators and thread count are left as they were.

    Args:
        seed: the seed of the data, the network's first weights, its masks in training and those of the samples.
        device: the device of the network.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([low + (high - low) * torch.rand(POINTS, 1, generator=generator) for low, high in INTERVALS])
    y = function(x) + NOISE * torch.randn(x.shape, generator=generator)
    with (
        undisturbed(device),
        tqdm(total=STEPS, unit="step", desc="regression", disable=None, leave=False) as bar,
    ):
        torch.manual_seed(seed)
        network = _network().to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, weight_decay=decay())
        inputs, targets = x.to(device), y.to(device)
        for _ in range(STEPS):
            loss = F.mse_loss(network(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
        grid = GRID.unsqueeze(1).to(device)
        prediction = mc_predict(network, grid, SAMPLES, task="regression", tau=TAU, masks="shared", seed=seed)
    assert isinstance(prediction, RegressionPrediction)
    return Fit(x, y, prediction.to("cpu"))


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(1, UNITS),
        nn.ReLU(),
        Dropout(keep_prob=KEEP_PROB),
        nn.Linear(UNITS, UNITS),
        nn.ReLU(),
        Dropout(keep_prob=KEEP_PROB),
        nn.Linear(UNITS, 1),
    )


def regions(prediction: RegressionPrediction) -> list[Region]:
    """Returns three regions: the intervals that have data, the gap between them, and the part beyond them.

    Args:
        prediction: the prediction on `GRID`, of shape (481, 1).
    """
    std = prediction.epistemic_variance.squeeze(1).sqrt()
    x = GRID
    off = (prediction.mean.squeeze(1) - function(x)).abs()
    held = (off <= normal_quantile((1 + LEVEL) / 2) * std).double()
    among = torch.stack([(low <= x) & (x <= high) for low, high in INTERVALS]).any(0)
    beyond = (x < INTERVALS[0][0]) | (x > INTERVALS[-1][1])
    parts = {"where the data lie": among, "in the gap between them": ~among & ~beyond, "beyond them": beyond}
    return [Region(name, float(std[part].mean()), float(held[part].mean())) for name, part in parts.items()]


def conclusions(fitted: Fit) -> list[str]:
    """Returns sentences: the choice of the noise, and the uncertainty in each region and whether it is justified."""
    among, *others = regions(fitted.prediction)
    stds = [f"{among.std:.3f} {among.name}"]
    stds += [f"{other.std:.3f} {other.name} ({other.std / among.std:.1f} times that)" for other in others]
    shares = [f"{100 * among.held:.0f} % of the inputs {among.name}"]
    shares += [f"{100 * other.held:.0f} % {other.name}" for other in others]
    return [
        f"Regression on {len(fitted.x)} points: the noise they were made with has standard deviation {NOISE:g}, so "
        f"tau = {TAU:g}, and the weight decay is what belongs to that tau and a length scale of {LENGTH_SCALE:g}.",
        f"The mean epistemic standard deviation is {', '.join(stds)}.",
        f"The {100 * LEVEL:g} % band of the models holds the true function at {', '.join(shares)}.",
    ]

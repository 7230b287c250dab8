"""The networks of the uncertainty benchmark, the digits that each group of them learns, and digits that are turned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import calibration
import mnist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop

RATE = 0.5
"""The share of units that every dropout layer drops."""


def mlp(seed: int) -> nn.Module:
    """Two hidden layers of 256 rectified linear units with dropout after each."""
    return calibration.network(mnist.PIXELS, 256, mnist.CLASSES, RATE, seed)


def cnn(seed: int) -> nn.Module:
    """Two convolutions and two linear layers, after LeCun et al. (1998), with dropout before both linear ones."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), torchdrop.Dropout(RATE),
        nn.Linear(256, 128), nn.ReLU(), torchdrop.Dropout(RATE), nn.Linear(128, mnist.CLASSES),
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of network: how one is made from a seed, and for how many updates it is trained."""

    name: str
    build: Callable[[int], nn.Module]
    updates: int


KINDS = (Kind("MLP", mlp, 1000), Kind("CNN", cnn, 1000))


class Part(NamedTuple):
    """The digits of one group: those that its networks learn, and those that temperatures and rates are fitted to."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def parts(digits: mnist.Digits, groups: int, training: int, held_out: int) -> list[Part]:
    """Disjoint random parts of the training digits.

    Raises:
        ValueError: there are too few digits.
    """
    rows = training + held_out
    if groups * rows > len(digits.labels):
        raise ValueError(f"{groups} parts take {groups * rows} training digits, got {len(digits.labels)}")
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(0))
    cuts = [order[group * rows : (group + 1) * rows].split([training, held_out]) for group in range(groups)]
    return [
        Part(digits.images[learned], digits.labels[learned], digits.images[left], digits.labels[left])
        for learned, left in cuts
    ]


def trained(kind: Kind, part: Part, seed: int) -> nn.Module:
    """A network that has learned a part; its initial weights, batches and masks depend on `seed` alone."""
    return calibration.train(kind.build(seed), part.images, part.labels, kind.updates, seed)


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Digits that are turned counterclockwise about their center, between pixels by bilinear interpolation.

    Args:
        images: rows of 28 * 28 pixels, (B, 784).

    Returns:
        The same shape. What is turned out of the picture is lost; what comes in is 0, as the ground is.
    """
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]], dtype=images.dtype)
    pictures = images.reshape(-1, 1, 28, 28)
    grid = F.affine_grid(matrix.expand(len(pictures), 2, 3), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False).reshape(images.shape)


def all_rotations(images: Tensor, angles: Sequence[int]) -> Tensor:
    """The digits at each angle, one angle after another: (angles * B, 784)."""
    return torch.cat([images if angle == 0 else rotated(images, angle) for angle in angles])

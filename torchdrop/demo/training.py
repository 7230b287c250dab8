"""Training, the same for the network with dropout and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scheduler import KeepProbScheduler

BATCH = 32
LEARNING_RATE, MOMENTUM = 0.05, 0.9


def train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    schedule: Mapping[str, Any],
    after_epoch: Callable[[], None],
) -> None:
    """Trains by stochastic gradient descent with momentum on the cross-entropy. Only `seed` decides the images' order.

    The layers that `schedule` names follow it, epoch by epoch; if it is empty, all keep their rates.
    The masks come from PyTorch's default generator, the order of the images from another one: it is the same with and
    without dropout, and on every device.
    """
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    scheduler = KeepProbScheduler(network, schedule) if schedule else None
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order).to(images.device).split(BATCH):
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        after_epoch()

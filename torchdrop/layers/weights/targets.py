"""The weights that targeted dropout may drop: the smallest of each output unit, or the smallest units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.masking import COMPUTE_DTYPE


class Choice(NamedTuple):
    """The choice of targets: a fraction of each unit's smallest weights, or of the units themselves.

    Args:
        fraction: gamma; a tensor of shape (1,) in compiled code, which is then not compiled again for another.
        units: whether whole units are chosen, by their weights' norm.
        dim: the weight's axis of output units.
    """

    fraction: float | Tensor
    units: bool
    dim: int

    def mask_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns a mask's shape: the weight's, with ones on all axes but that of units if whole units are dropped."""
        if not self.units:
            return tuple(shape)
        return tuple(size if axis == self.dim % len(shape) else 1 for axis, size in enumerate(shape))

    def targets(self, weight: Tensor) -> Tensor:
        """Returns bools of the mask's shape. If magnitudes are equal, the first ones count as smaller, so the number is
        exact."""
        rows = weight.detach().movedim(self.dim, 0)
        if self.units:
            magnitudes = rows.flatten(1).to(COMPUTE_DTYPE[weight.dtype]).norm(dim=1)
        else:
            magnitudes = rows.flatten(1).abs()
        order = magnitudes.argsort(dim=-1, stable=True)
        places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        ranks = torch.zeros_like(order).scatter(-1, order, places)
        chosen = ranks < self._count(order)
        shape = (rows.shape[0], *[1] * (rows.dim() - 1)) if self.units else rows.shape
        return chosen.reshape(shape).movedim(0, self.dim)

    def _count(self, order: Tensor) -> int | Tensor:
        """Returns floor(gamma n) for the decimal gamma: 29 of 100 at 0.29, whose product is 28.999999999999996."""
        count = self.fraction * order.shape[-1] + 1e-9
        return count.floor().to(torch.int64).to(order.device) if isinstance(count, Tensor) else math.floor(count)

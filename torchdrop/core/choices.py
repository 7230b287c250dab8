"""Choices made from random bits: a subset of a fixed size, and a mask that leaves at least one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.mask_params import ONE, MaskParams
from ..kernels.masking import unpack_params


def subset(bits: Tensor, count: int) -> Tensor:
    """Returns the places of the `count` smallest bits along the last dimension, in order. All subsets are equally
    likely.

    Equal bits, which a pair has with probability 2**-32, count in their order.
    """
    return bits.argsort(dim=-1, stable=True)[..., :count].sort(dim=-1).values


def kept_or_smallest(bits: Tensor, params: MaskParams | Tensor, dim: int, allowed: Tensor | None = None) -> Tensor:
    """Returns True where a draw is below the threshold or is the smallest along `dim`, among those allowed. If none is
    allowed, all are kept."""
    if not bits.shape[dim]:
        return bits >= 0
    threshold = unpack_params(params, bits.device)[0]
    least = (bits if allowed is None else torch.where(allowed, bits, ONE)).amin(dim, keepdim=True)
    if isinstance(threshold, Tensor):
        return bits <= torch.maximum(least, threshold.to(torch.int64) - 1)
    return bits <= least.clamp(min=threshold - 1)

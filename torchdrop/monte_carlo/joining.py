"""Tensors of several batches as one: rows after rows, with NaN where a batch's outputs are smaller than another's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_mode(batches: str) -> bool:
    """Returns whether outputs of different sizes are padded.

    >>> check_mode("padded")
    True
    """
    if batches not in ("joined", "padded"):
        raise ValueError(f"batches must be 'joined' or 'padded', got {batches!r}")
    return batches == "padded"


def check_shapes(first: Sequence[int], other: Sequence[int], number: int, padded: bool) -> None:
    """Checks that outputs of batch 1 and of another fit together but for the number of rows.

    Raises:
        ValueError: they do not. The message says what to give.
    """
    if tuple(first[1:]) == tuple(other[1:]) or (padded and len(first) == len(other)):
        return
    remedy = "select_output=, a function that gets a tensor of as many dimensions for each batch"
    if len(first) == len(other):
        remedy = (
            "batches='padded' for NaN and a mask where there are no outputs (result.batches() then returns them by "
            "batch), or select_output=, a function that gets a tensor of one shape"
        )
    raise ValueError(
        f"batch {number} has outputs of shape {tuple(other)} and batch 1 of {tuple(first)}, so their rows cannot be "
        f"joined: give {remedy}"
    )


def joined(tensors: Sequence[Tensor], dim: int, padded: bool = False) -> Tensor:
    """Returns the tensors' rows, along this dimension, one after another.

    Args:
        tensors: the tensors.
        dim: the dimension of rows.
        padded: whether the dimensions after it get the largest size of all, filled with NaN, or with False.

    Example:
        >>> joined([torch.ones(1, 2), torch.zeros(1, 1)], 0, padded=True)
        tensor([[1., 1.],
                [0., nan]])
    """
    if padded:
        sizes = [max(each) for each in zip(*(one.shape for one in tensors), strict=True)]
        tensors = [_filled(one, [*one.shape[: dim + 1], *sizes[dim + 1 :]]) for one in tensors]
    return torch.cat(list(tensors), dim)


def _filled(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    full = tensor.new_full(shape, False if tensor.dtype == torch.bool else math.nan)
    full[tuple(map(slice, tensor.shape))] = tensor
    return full

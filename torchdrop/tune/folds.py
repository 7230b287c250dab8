"""The division of the data's rows into the training and test part of each fold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_integer
from .training import mixed


def divide(rows: int, folds: Any, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Returns the training and test rows of each fold.

    Args:
        rows: the number of rows.
        folds: a number of parts of about equal size, drawn at random, or pairs of indices (train, test).
        seed: the seed of the draw.

    Raises:
        TypeError: `folds` is neither, or has indices that are no integers.
        ValueError: fewer than 2 folds, more folds than rows; a part that is empty or not within the rows, or a row that
            a fold both trains and tests on.

    Example:
        >>> [len(test) for _, test in divide(11, 3, seed=0)]
        [4, 4, 3]
    """
    if isinstance(folds, int):
        check_integer("folds", folds, 2)
        if folds > rows:
            raise ValueError(f"folds must be at most the number of rows, {rows}, got {folds}")
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(mixed(seed, "folds")))
        parts = order.tensor_split(folds)
        return [(torch.cat([*parts[:i], *parts[i + 1 :]]), part) for i, part in enumerate(parts)]
    if isinstance(folds, str) or not isinstance(folds, Iterable):
        raise TypeError(f"folds must be a number, or pairs of indices (train, test), got {type(folds).__name__}")
    pairs = [_pair(number, pair, rows) for number, pair in enumerate(folds)]
    if len(pairs) < 2:
        raise ValueError(f"folds must be at least 2, got {len(pairs)}")
    return pairs


def _pair(number: int, pair: Any, rows: int) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"folds[{number}] must be a pair of indices (train, test), got {type(pair).__name__}")
    train, test = (_indices(f"folds[{number}]", part, rows) for part in pair)
    both = set(train.tolist()) & set(test.tolist())
    if both:
        raise ValueError(f"folds[{number}] must not test on what it trains on, got row {min(both)} in both")
    return train, test


def _indices(name: str, part: Any, rows: int) -> Tensor:
    indices = torch.as_tensor(part).cpu()
    if indices.numel() == 0:
        raise ValueError(f"{name} must have training and test rows, got an empty part")
    if indices.dim() != 1 or indices.is_floating_point() or indices.is_complex() or indices.dtype is torch.bool:
        raise TypeError(f"{name} must hold indices of rows, got {indices.dtype} of shape {tuple(indices.shape)}")
    if indices.min() < 0 or indices.max() >= rows:
        raise ValueError(f"{name} must hold indices in [0, {rows}), got {int(indices.min())} to {int(indices.max())}")
    return indices.long()

"""Row plans: how a mask is cut into rows whose elements share a key and a set of parameters.

Kernels work on contiguous elements, one row after the other, so the native and the Triton backend ask here which rows
there are. A mask has no plan if its parameters change too often, or are shared in another way. Backends then make all
random bits first, and compare them with the thresholds afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from .mask_params import MaskParams
from .masking import MaskSlice

SHORTEST_ROW = 64
"""A row costs at least one chunk of random bits. Where parameters change more often than after so many elements, it is
cheaper to make the random bits first."""


class RowPlan(NamedTuple):
    """The rows of a mask of shape ``key.shape[:-1] + shape``, which are end to end in memory."""

    rows: int
    length: int
    rows_per_key: int
    pitch: int
    """The rows of a key start this many elements apart in its mask."""
    params_for: Literal["all", "key", "row"]
    """Whether there is one set of parameters for all rows, or one for each key, or one for each row."""
    params: MaskParams | Tensor
    """These sets. For "key" and "row" they are a view with the four numbers in its last dimension."""


def varying_dims(params: MaskParams | Tensor) -> int:
    """Counts the leading dimensions that mask parameters vary over."""
    if isinstance(params, MaskParams):
        return 0
    return max((d + 1 for d, size in enumerate(params.shape[:-1]) if size > 1), default=0)


def has_plan(params: MaskParams | Tensor, key: Tensor, shape: Sequence[int], part: MaskSlice) -> bool:
    """Whether `plan_rows` serves this mask, and rows are long enough to be worth their cost."""
    keys, dims = len(key.shape) - 1, varying_dims(params)
    if part.run and dims > keys:
        return False
    if isinstance(params, Tensor) and params.dim() > 1:
        full = (*key.shape[:-1], *shape)
        if any(size not in (1, whole) for size, whole in zip(params.shape[:-1], full, strict=True)):
            return False  # the same random bits are compared with several thresholds
    return dims <= keys or math.prod(shape[dims - keys :]) >= SHORTEST_ROW


def plan_rows(key: Tensor, params: MaskParams | Tensor, shape: Sequence[int], part: MaskSlice) -> RowPlan:
    """Plans the rows of a mask for which `has_plan` is true.

    Raises:
        ValueError: the elements are not whole rows of the slice.
    """
    keys, dims = len(key.shape) - 1, varying_dims(params)
    if dims <= keys:
        rows_per_key, length, pitch = part.rows(math.prod(shape))
        rows = math.prod(key.shape[:-1]) * rows_per_key
        if not dims:
            return RowPlan(rows, length, rows_per_key, pitch, "all", params)
        return RowPlan(rows, length, rows_per_key, pitch, "key", _params_over(key.shape[:-1], params, len(shape)))
    split = dims - keys
    rows_per_key, length = math.prod(shape[:split]), math.prod(shape[split:])
    rows = math.prod(key.shape[:-1]) * rows_per_key
    given = _params_over((*key.shape[:-1], *shape[:split]), params, len(shape) - split)
    return RowPlan(rows, length, rows_per_key, length, "row", given)


def _params_over(leading: Sequence[int], params: MaskParams | Tensor, shared: int) -> Tensor:
    """Parameters of shape ``leading + (4,)``: the last `shared` dimensions, over which they are the same, are left
    out."""
    assert isinstance(params, Tensor)
    return params[(slice(None),) * len(leading) + (0,) * shared].expand(*leading, 4)


def group_size(x: Tensor, key: Tensor, params: MaskParams | Tensor, shape: Sequence[int]) -> int:
    """Counts the neighbors in a contiguous x that share their random bits, and returns 0 for a mask without groups.

    A mask has groups if it has one set of parameters, and x's shape but for ones in the place of its last dimensions.
    """
    keys, split = key.dim() - 1, len(shape)
    if varying_dims(params) or x.numel() == 0:
        return 0
    while split and shape[split - 1] == 1:
        split -= 1
    full = (*key.shape[:-1], *shape[:split])
    return math.prod(x.shape[keys + split :]) if full == x.shape[: keys + split] else 0

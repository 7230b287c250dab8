"""The rows and columns of a matrix that a mask keeps, and the map back: a matrix with zeros in the other places.

    cut(W, R, C)_ij = W_{R_i, C_j}        spread(G, R, C)_{R_i, C_j} = G_ij, 0 elsewhere

The two are linear and each other's adjoint, so each is the other's backward, to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Index = Tensor | None
"""Numbers of rows or columns, int64 and ascending; None for all of them."""


_BLOCK = 256


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Index, columns: Index) -> Tensor:
        ctx.rows, ctx.columns, ctx.shape = rows, columns, matrix.shape
        return _taken(matrix, rows, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(grad, ctx.rows, ctx.columns, ctx.shape), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: Index, columns: Index, shape: Sequence[int]) -> Tensor:
        ctx.rows, ctx.columns = rows, columns
        return _placed(part, rows, columns, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Cut.apply(grad, ctx.rows, ctx.columns), None, None, None


def _taken(matrix: Tensor, rows: Index, columns: Index) -> Tensor:
    if rows is not None:
        matrix = matrix.index_select(0, rows)
    return matrix if columns is None else matrix.index_select(1, columns)


def _placed(part: Tensor, rows: Index, columns: Index, shape: Sequence[int]) -> Tensor:
    """Places the part among zeros. Rows are copied as a whole: on the CPU in blocks, which stay in a cache."""
    whole = part.new_zeros(shape)
    if columns is None:
        assert rows is not None
        return whole.index_put_((rows,), part)
    if rows is None:
        return whole.scatter_(1, columns.expand(part.shape[0], -1), part)
    size = _BLOCK if part.is_cpu else max(part.shape[0], 1)
    block = part.new_zeros((min(size, part.shape[0]), shape[1]))
    for first in range(0, part.shape[0], size):
        few = part[first : first + size]
        filled = block[: few.shape[0]].scatter_(1, columns.expand(few.shape[0], -1), few)
        whole.index_put_((rows[first : first + size],), filled)
    return whole


def cut(matrix: Tensor, rows: Index, columns: Index) -> Tensor:
    """Returns these rows and columns of a matrix. Its gradient is the whole matrix's, exactly 0 elsewhere."""
    return matrix if rows is None and columns is None else _Cut.apply(matrix, rows, columns)

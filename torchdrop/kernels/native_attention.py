"""The calls of the C kernels between the products of attention (csrc/attention.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from . import native


class _Call(ctypes.Structure):
    """td_attention of csrc/entry_points.h, which says what is in it."""

    _fields_ = [
        ("heads", c_int64), ("queries", c_int64), ("keys", c_int64), ("is_causal", c_int64), ("scale", c_double),
        ("bias_type", c_int64), ("bias", c_void_p), ("bias_strides", c_int64 * 3), ("logsumexp", c_void_p),
        ("inner", c_void_p), ("mask_key", c_void_p), ("params", c_void_p),
    ]  # fmt: skip


class _Block(ctypes.Structure):
    """td_attention_block of csrc/entry_points.h."""

    _fields_ = [
        ("first_head", c_int64), ("heads", c_int64), ("first_query", c_int64), ("rows", c_int64), ("columns", c_int64),
        ("score_pitch", c_int64), ("pitch", c_int64), ("scores", c_void_p), ("weights", c_void_p),
        ("gradients", c_void_p),
    ]  # fmt: skip


_NONE, _SEEN, _ADDED = range(3)
"""td_bias_type"""


class Buffer:
    """Memory for the arrays of one block after the other.

    Rows of float32 and float64 that are a multiple of a large power of two long are padded: one below the other their
    elements would compete for the same lines of the cache, and products with the transpose take up to a third longer.
    Products of bfloat16 take longer where rows are padded.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._flat = torch.empty(0, dtype=dtype)
        self._pads = dtype is not torch.bfloat16

    def of(self, shape: Sequence[int]) -> Tensor:
        heads, rows, columns = shape
        pitch = columns + 16 if self._pads and columns % 256 == 0 else columns
        n = heads * rows * pitch
        if self._flat.numel() < n:
            self._flat = self._flat.new_empty(n)
        out = (self._flat if self._flat.numel() == n else self._flat[:n]).view(heads, rows, pitch)
        return out if pitch == columns else out[:, :, :columns]


class Native:
    """The kernel of one call of attention."""

    def __init__(self, problem: Any, logsumexp: Tensor, inner: Tensor | None) -> None:
        _, self._heads, queries, keys = problem.shape
        self._dtype, bias = problem.query.dtype, problem.bias
        params, mask_key = native._readable(problem.params), problem.mask_key.contiguous()
        self._kept = (params, mask_key, bias, logsumexp, inner)  # the structure holds their addresses
        kind = _NONE if bias is None else _SEEN if bias.dtype is torch.bool else _ADDED
        self._call = _Call(
            self._heads, queries, keys, problem.is_causal, problem.scale, kind,
            None if bias is None else bias.data_ptr(), (0, 0, 0) if bias is None else bias.stride()[:3],
            logsumexp.data_ptr(), None if inner is None else inner.data_ptr(), mask_key.data_ptr(),
            native._address(params),
        )  # fmt: skip
        self._at = ctypes.addressof(self._call)
        self._buffer = Buffer(self._dtype)

    def _weights_for(self, scores: Tensor) -> Tensor:
        """Returns the memory of weights: that of the scores if these have their type."""
        if scores.dtype == self._dtype:
            return scores
        return self._buffer.of(scores.shape)

    def _run(self, function: Any, block: Any, scores: Tensor, weights: Tensor, gradients: Tensor | None) -> None:
        heads, rows, columns = scores.shape
        given = _Block(
            block.sample * self._heads + block.heads.start, heads, block.queries.start, rows, columns, scores.stride(1),
            weights.stride(1), scores.data_ptr(), weights.data_ptr(),
            None if gradients is None else gradients.data_ptr(),
        )  # fmt: skip
        function(
            native.ELEMENT_TYPES[self._dtype], self._at, ctypes.addressof(given), native.threads(), native.ANY_WIDTH
        )

    def weights(self, block: Any, scores: Tensor) -> Tensor:
        weights = self._weights_for(scores)
        self._run(native.library.attention_weights, block, scores, weights, None)  # type: ignore[union-attr]
        return weights

    def gradients(self, block: Any, scores: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._weights_for(scores)
        self._run(native.library.attention_gradients, block, scores, weights, gradients)  # type: ignore[union-attr]
        return weights, gradients

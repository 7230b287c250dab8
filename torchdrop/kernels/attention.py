"""Attention with dropout on the CPU, block by block: nothing of the size queries times keys exists as a whole.

A block is some heads of one sample, some of their queries, and all keys that these may see. Its products are BLAS's.
Between them there is one call for each block, of `weights` in forward and of `gradients` in backward.

    forward     X = s Q K' + bias        logsumexp = log sum exp X        P = exp(X - logsumexp)        O = (m P / k) V
    backward    dP = m (dO V') / k       dX = P (dP - D) with D = rowsum(dO O)
                dQ = s dX K              dK = s dX' Q                     dV = (m P / k)' dO

The index of a weight in the mask is its row-major index in the tensor of all weights, of shape (samples, heads,
queries, keys).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.torch_state import has_bfloat16_products
from . import backend_for, masked, native
from .mask_params import MaskParams, linear
from .masking import COMPUTE_DTYPE, MaskSlice
from .native_attention import Buffer, Native

BLOCK_BYTES = 2**22
"""The scores of a block take about so many bytes, so that they stay in the cache between two products."""


class Problem(NamedTuple):
    """One call of attention.

    Args:
        query: (samples, heads, queries, features).
        key: (samples, heads, keys, features).
        value: (samples, heads, keys, features of values).
        bias: bools, True where a key may be seen, or numbers of the scores' type to be added to them, expanded to
            (samples, heads, queries, keys), whose keys are neighbors in memory; None if there are none.
        is_causal: whether query i may see only the keys 0 ... i.
        scale: the factor of the scores.
        mask_key: the key of the mask, int64 of shape (2,).
        params: the mask's parameters, one set.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    is_causal: bool
    scale: float
    mask_key: Tensor
    params: MaskParams | Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(samples, heads, queries, keys)"""
        return (*self.query.shape[:-1], self.key.shape[-2])


class Block(NamedTuple):
    """Some heads and queries of one sample, and how many keys these queries may see."""

    sample: int
    heads: slice
    queries: slice
    keys: int


class Kernel(Protocol):
    """The functions between the products of a block, whose arrays have the shape (heads, queries, keys).

    weights      overwrites raw scores; returns weights, dropped and scaled; writes the logsumexp
    gradients    overwrites raw scores and gradients of weights; returns weights, dropped and scaled, and the gradients
                 of the raw scores
    """

    def weights(self, block: Block, scores: Tensor) -> Tensor: ...

    def gradients(self, block: Block, scores: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]: ...


class Composed:
    """The kernel in PyTorch's operations, for other backends than the native one."""

    def __init__(self, problem: Problem, logsumexp: Tensor, inner: Tensor | None) -> None:
        self._problem, self._logsumexp, self._inner = problem, logsumexp, inner

    def _scores(self, block: Block, scores: Tensor) -> Tensor:
        problem = self._problem
        scores.mul_(problem.scale)
        if problem.is_causal:
            rows = torch.arange(block.queries.start, block.queries.stop).unsqueeze(-1)
            scores.masked_fill_(torch.arange(block.keys) > rows, -math.inf)
        if problem.bias is not None:
            bias = problem.bias[block.sample, block.heads, block.queries, : block.keys]
            if bias.dtype is torch.bool:
                scores.masked_fill_(~bias, -math.inf)
            else:
                scores += bias
        return scores

    def _dropped(self, block: Block, values: Tensor) -> Tensor:
        """Returns values under the block's part of the mask."""
        _, heads, queries, keys = self._problem.shape
        out, params = torch.empty_like(values), linear(self._problem.params)
        for at, head in enumerate(range(block.heads.start, block.heads.stop)):
            start = ((block.sample * heads + head) * queries + block.queries.start) * keys
            part = MaskSlice(start, block.keys, keys)
            masked(values[at], self._problem.mask_key, params, values.shape[1:], part, out[at])
        return out

    def _undropped(self, scores: Tensor, logsumexp: Tensor) -> Tensor:
        blind = logsumexp == -math.inf
        return scores.sub_(logsumexp.unsqueeze(-1)).exp_().masked_fill_(blind.unsqueeze(-1), 0.0)

    def weights(self, block: Block, scores: Tensor) -> Tensor:
        logsumexp = self._scores(block, scores).logsumexp(-1)
        self._logsumexp[block.sample, block.heads, block.queries] = logsumexp
        return self._dropped(block, self._undropped(scores, logsumexp))

    def gradients(self, block: Block, scores: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        at = (block.sample, block.heads, block.queries)
        weights = self._undropped(self._scores(block, scores), self._logsumexp[at])
        assert self._inner is not None
        gradients = self._dropped(block, gradients).sub_(self._inner[at].unsqueeze(-1))
        return self._dropped(block, weights), gradients.mul_(weights).mul_(self._problem.scale)


def _blocks(shape: tuple[int, int, int, int], is_causal: bool, at_once: int) -> Iterator[Block]:
    """Divides weights of this shape into blocks with about so many rows at once."""
    samples, heads, queries, keys = shape
    rows = min(queries, at_once)
    if is_causal:  # so that what no query of a block may see is left out
        rows = min(rows, max(queries // 4, 64))
    group = max(1, min(heads, at_once // rows))
    for sample in range(samples):
        for head in range(0, heads, group):
            for row in range(0, queries, rows):
                end = min(row + rows, queries)
                seen = min(keys, end) if is_causal else keys
                yield Block(sample, slice(head, min(head + group, heads)), slice(row, end), seen)


def _has_products(dtype: torch.dtype) -> bool:
    """Whether products of this type are as fast as they should be. Other half types are computed in float32."""
    return dtype in (torch.float32, torch.float64) or (dtype is torch.bfloat16 and has_bfloat16_products())


def _kernel(problem: Problem, logsumexp: Tensor, inner: Tensor | None = None) -> Kernel:
    backend = backend_for(problem.query.device, problem.query.dtype)
    if backend is native:
        return Native(problem, logsumexp, inner)
    return Composed(problem, logsumexp, inner)


def _in_float32(problem: Problem) -> Problem:
    return problem._replace(query=problem.query.float(), key=problem.key.float(), value=problem.value.float())


def _in_shape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns a tensor with so many samples and heads, whose rows BLAS can read."""
    if shape[0] != tensor.shape[0]:
        tensor = tensor.reshape(1, shape[1], *tensor.shape[2:])
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _arranged(problem: Problem, kernel: Kernel) -> tuple[tuple[int, int, int, int], int]:
    """Returns the shape of the weights and how many rows of them make a block.

    If all fit in one block, the heads of all samples are taken for those of one: a small problem is then one block.
    """
    samples, heads, queries, keys = problem.shape
    at_once = max(1, BLOCK_BYTES // (keys * (8 if problem.query.dtype is torch.float64 else 4)))
    if samples * heads * queries <= at_once and isinstance(kernel, Native):
        return (1, samples * heads, queries, keys), at_once
    return problem.shape, at_once


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns the output and the logsumexp of the scores of each query, -inf where it may see no key. The memory of a
    large output has the order (samples, queries, heads, features)."""
    dtype = problem.query.dtype
    if not _has_products(dtype):
        out, logsumexp = forward(_in_float32(problem))
        return out.to(dtype), logsumexp
    wide = COMPUTE_DTYPE[dtype]
    logsumexp = torch.empty(problem.shape[:3], dtype=wide)
    kernel, buffer = _kernel(problem, logsumexp), Buffer(wide)
    shape, at_once = _arranged(problem, kernel)
    query, key, value = (_in_shape(t, shape) for t in problem[:3])
    q, k = query.to(wide), key.to(wide)
    out = value.new_empty((shape[0], shape[2], shape[1], value.shape[-1])).transpose(1, 2)
    for block in _blocks(shape, problem.is_causal, at_once):
        at, seen = block[:3], (block.sample, block.heads, slice(block.keys))
        q_block, k_block = q[at], k[seen]
        scores = torch.bmm(q_block, k_block.mT, out=buffer.of((*q_block.shape[:2], block.keys)))
        torch.bmm(kernel.weights(block, scores).to(dtype), value[seen], out=out[at])
    return out.reshape(*problem.shape[:3], -1), logsumexp


def backward(problem: Problem, grad: Tensor, out: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    dtype = problem.query.dtype
    if not _has_products(dtype):
        q, k, v = backward(_in_float32(problem), grad.float(), out.float(), logsumexp)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    wide = COMPUTE_DTYPE[dtype]
    inner = (grad.to(wide) * out.to(wide)).sum(-1).contiguous()
    kernel, buffer, other = _kernel(problem, logsumexp, inner), Buffer(wide), Buffer(dtype)
    shape, at_once = _arranged(problem, kernel)
    query, key, value, grad = (_in_shape(t, shape) for t in (*problem[:3], grad))
    of_query, of_key, of_value = (torch.empty_like(t) for t in (query, key, value))
    if dtype is torch.bfloat16:  # products with its transpose take a third less time then
        value = value.contiguous()
    q_wide, k_wide = query.to(wide), key.to(wide)
    sums: list[Any] = [None, None]
    for block in _blocks(shape, problem.is_causal, at_once):
        at, seen = block[:3], (block.sample, block.heads, slice(block.keys))
        q, k, g = query[at], key[seen], grad[at]
        scores = torch.bmm(q_wide[at], k_wide[seen].mT, out=buffer.of((*q.shape[:2], block.keys)))
        gradients = torch.bmm(g, value[seen].mT, out=other.of((*q.shape[:2], block.keys)))
        weights, of_scores = (t.to(dtype) for t in kernel.gradients(block, scores, gradients))
        torch.bmm(of_scores, k, out=of_query[at])
        if q.shape[1] == shape[2]:
            torch.bmm(weights.mT, g, out=of_value[seen])
            torch.bmm(of_scores.mT, q, out=of_key[seen])
            if block.keys < shape[3]:
                for t in (of_value, of_key):
                    t[block.sample, block.heads, block.keys :] = 0
            continue
        if block.queries.start == 0:
            sums = [torch.zeros(q.shape[0], *t.shape[2:], dtype=wide) for t in (value, key)]
        sums[0][:, : block.keys] += weights.mT @ g
        sums[1][:, : block.keys] += of_scores.mT @ q
        if block.queries.stop == shape[2]:
            of_value[block.sample, block.heads] = sums[0]
            of_key[block.sample, block.heads] = sums[1]
    q, k, v = (t.reshape(like.shape) for t, like in zip((of_query, of_key, of_value), problem[:3], strict=True))
    return q, k, v

"""Attention with dropout on the CPU, block by block: nothing of the size queries times keys exists as a whole.

A block is some heads of one sample, some of their queries, and all keys that these may see. Its products are BLAS's.
What stands between them, from scores to dropped weights and from gradients of weights to gradients of scores, is one
call for each block.

    forward     X = s Q K' + bias        logsumexp = log sum exp X        P = exp(X - logsumexp)        O = (m P / k) V
    backward    dP = m (dO V') / k       dX = P (dP - D) with D = rowsum(dO O)
                dQ = s dX K              dK = s dX' Q                     dV = (m P / k)' dO

The index of a weight in the mask is its row-major index in the tensor of all weights, of shape (samples, heads,
queries, keys).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import masked
from .mask_params import MaskParams, linear
from .masking import COMPUTE_DTYPE, MaskSlice

BLOCK_BYTES = 2**21
"""The scores of a block take about so many bytes, so that they stay in the cache between two products."""


class Problem(NamedTuple):
    """One call of attention.

    Args:
        query: (samples, heads, queries, features).
        key: (samples, heads, keys, features).
        value: (samples, heads, keys, features of values).
        bias: bools, True where a key may be seen, or numbers to be added to the scores, expanded to (samples, heads,
            queries, keys); None if there are none.
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


def _blocks(problem: Problem) -> Iterator[Block]:
    samples, heads, queries, keys = problem.shape
    per_row = keys * torch.finfo(COMPUTE_DTYPE[problem.query.dtype]).bits // 8
    at_once = max(1, BLOCK_BYTES // max(per_row, 1))
    rows = min(queries, at_once)
    if problem.is_causal:
        rows = min(rows, max(queries // 4, 64))
    group = max(1, min(heads, at_once // max(rows, 1)))
    for sample in range(samples):
        for head in range(0, heads, group):
            for row in range(0, queries, rows):
                end = min(row + rows, queries)
                seen = min(keys, end) if problem.is_causal else keys
                yield Block(sample, slice(head, min(head + group, heads)), slice(row, end), seen)


def _scores(problem: Problem, block: Block) -> Tensor:
    """Returns the scores of a block, -inf where a key may not be seen."""
    wide = COMPUTE_DTYPE[problem.query.dtype]
    q = problem.query[block.sample, block.heads, block.queries].to(wide)
    k = problem.key[block.sample, block.heads, : block.keys].to(wide)
    scores = (q @ k.mT).mul_(problem.scale)
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


def _dropped(problem: Problem, block: Block, weights: Tensor) -> Tensor:
    """Returns the weights of a block under their part of the mask."""
    _, heads, queries, keys = problem.shape
    out = torch.empty_like(weights)
    for at, head in enumerate(range(block.heads.start, block.heads.stop)):
        start = ((block.sample * heads + head) * queries + block.queries.start) * keys
        part = MaskSlice(start, block.keys, keys)
        params = linear(problem.params)
        masked(weights[at], problem.mask_key, params, weights.shape[1:], part, out[at])
    return out


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns the output, whose memory has the order (samples, queries, heads, features), and the logsumexp of the
    scores of each query, -inf where it may see no key."""
    samples, heads, queries, _ = problem.shape
    value, wide = problem.value, COMPUTE_DTYPE[problem.query.dtype]
    out = value.new_empty((samples, queries, heads, value.shape[-1])).transpose(1, 2)
    logsumexp = torch.empty((samples, heads, queries), dtype=wide)
    for block in _blocks(problem):
        scores = _scores(problem, block)
        lse = scores.logsumexp(-1)
        logsumexp[block.sample, block.heads, block.queries] = lse
        weights = scores.sub_(lse.unsqueeze(-1)).exp_().masked_fill_(lse.unsqueeze(-1) == -math.inf, 0.0)
        v = value[block.sample, block.heads, : block.keys].to(wide)
        out[block.sample, block.heads, block.queries] = (_dropped(problem, block, weights) @ v).to(out.dtype)
    return out, logsumexp


def backward(problem: Problem, grad: Tensor, out: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    wide = COMPUTE_DTYPE[problem.query.dtype]
    of_query = torch.empty_like(problem.query)
    of_key, of_value = (torch.zeros_like(t, dtype=wide) for t in (problem.key, problem.value))
    inner = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    for block in _blocks(problem):
        at = (block.sample, block.heads, block.queries)
        seen = (block.sample, block.heads, slice(block.keys))
        q, g = problem.query[at].to(wide), grad[at].to(wide)
        k, v = problem.key[seen].to(wide), problem.value[seen].to(wide)
        lse = logsumexp[at].unsqueeze(-1)
        weights = (_scores(problem, block) - lse).exp_().masked_fill_(lse == -math.inf, 0.0)
        of_value[seen] += _dropped(problem, block, weights).mT @ g
        of_scores = (_dropped(problem, block, g @ v.mT) - inner[at]).mul_(weights).mul_(problem.scale)
        of_query[at] = (of_scores @ k).to(of_query.dtype)
        of_key[seen] += of_scores.mT @ q
    return of_query, of_key.to(problem.key.dtype), of_value.to(problem.value.dtype)

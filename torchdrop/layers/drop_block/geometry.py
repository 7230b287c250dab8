"""The possible places of DropBlock's blocks, and the probability that a position is kept.

Blocks of side b are wholly inside the map, so an axis of length L has L - b + 1 anchors, and

    r(i) = min(i, L - b) - max(0, i - b + 1) + 1

of them cover position i. If no block starts at an anchor with probability q, independently, position (i, j) is kept
with probability q**(r(i) r(j)), and the mean over positions is a polynomial in q with positive coefficients: it rises
from 0 to 1, and exactly one q gives it the value k.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.mask_params import ONE, MaskParams, threshold
from ...ops.arguments import check_blocks

Sizes = tuple[int, ...]

LARGEST_SCALE = 10.0
"""The largest factor for scaling by each position's own keep probability."""


def covers(length: int, block: int) -> list[int]:
    """Counts, for each position of an axis, the anchors whose blocks cover it.

    >>> covers(7, 3)
    [1, 2, 3, 3, 3, 2, 1]
    """
    return [min(i, length - block) - max(0, i - block + 1) + 1 for i in range(length)]


@functools.lru_cache(maxsize=1024)
def _terms(sizes: Sizes, block: int) -> tuple[tuple[int, float], ...]:
    """Returns the mean keep probability as a polynomial: exponents, and the share of the positions that have each."""
    counts = Counter({1: 1})
    for length in sizes:
        axis, product = Counter(covers(length, block)), Counter[int]()
        for exponent, number in counts.items():
            for r, times in axis.items():
                product[exponent * r] += number * times
        counts = product
    return tuple((exponent, number / math.prod(sizes)) for exponent, number in sorted(counts.items()))


def mean_keep(q: float, sizes: Sizes, block: int) -> float:
    """Returns the mean over positions of the probability that a position is kept.

    >>> mean_keep(0.5, (2, 2), 2)
    0.5
    """
    return sum(share * q**exponent for exponent, share in _terms(sizes, block))


def solve(keep_prob: float, sizes: Sizes, block: int) -> float:
    """Returns the q with ``mean_keep(q) == keep_prob``, for a keep_prob strictly between 0 and 1.

    Newton's method starts from q = 1: on a convex, rising function it comes down to the root from above, so it has
    reached double precision at the first step that does not go down.
    """
    terms, q = _terms(sizes, block), 1.0
    while True:
        slope = sum(exponent * share * q ** (exponent - 1) for exponent, share in terms)
        lower = q - (mean_keep(q, sizes, block) - keep_prob) / slope
        if not 0.0 < lower < q:
            return q
        q = lower


@functools.lru_cache(maxsize=4096)
def _anchor_params(kept: int, sizes: Sizes, block: int) -> MaskParams:
    """Returns, for a keep probability of ``kept / 2**32``, the threshold of q and the reciprocal of its mean."""
    if kept in (0, ONE):
        return MaskParams(kept, 1.0)
    below = threshold(solve(kept / ONE, sizes, block))
    return MaskParams(below, 1.0 / mean_keep(below / ONE, sizes, block))


def _anchor_params_of_each(params: Tensor, sizes: Sizes, block: int) -> Tensor:
    found = [_anchor_params(min(max(int(kept), 0), ONE), sizes, block) for kept in params[..., 0].flatten().tolist()]
    rows = [[one.threshold, one.scale, 0.0, 0.0] for one in found]
    return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(params.shape).to(params.device)


def _position_scales(params: Tensor, sizes: Sizes, block: int) -> Tensor:
    exponents = torch.ones((), dtype=torch.float64, device="cpu")
    for length in sizes:
        exponents = exponents.unsqueeze(-1) * torch.tensor(covers(length, block), dtype=torch.float64, device="cpu")
    q = params[..., 0].cpu() / ONE
    scales = torch.where(q > 0, q, 1.0).reshape(*q.shape, *[1] * (len(sizes) - q.dim())) ** -exponents
    largest = scales.max().item() if scales.numel() else 1.0
    if largest > LARGEST_SCALE:
        raise ValueError(
            f"scaling='marginal' would multiply the center of a map of {sizes} with block_size={block} by "
            f"{largest:.3g}, and {LARGEST_SCALE:g} is the most it may: use a larger keep_prob, a smaller block_size or "
            "scaling='mean'"
        )
    return scales.to(params.device)


def _define(
    name: str, run: Callable[[Tensor, Sizes, int], Tensor], shape_of: Callable[[Tensor, Sequence[int]], Sequence[int]]
) -> Any:
    """Defines an operator of mask parameters, with the same double precision in eager and in compiled code, which
    cannot see the parameters."""
    qualified, scales = f"torchdrop::{name}", name == "block_scales"
    torch.library.define(qualified, "(Tensor params, SymInt[] sizes, SymInt block) -> Tensor")
    registered = getattr(torch.ops.torchdrop, name).default

    @torch.library.impl(qualified, "default")
    def implementation(params: Tensor, sizes: Sequence[int], block: int) -> Tensor:
        check_blocks(qualified, params, sizes, block, scales)
        return run(params, tuple(sizes), block).contiguous()

    @torch.library.register_fake(qualified)
    def fake(params: Tensor, sizes: Sequence[int], block: int) -> Tensor:
        check_blocks(qualified, params, sizes, block, scales)
        return params.new_empty(shape_of(params, sizes))

    def batched(info: Any, in_dims: Sequence[int | None], params: Tensor, sizes: Sequence[int], block: int) -> Any:
        params = params.movedim(in_dims[0] or 0, 0)
        if params.dim() == 2 and scales:
            params = params.reshape(params.shape[0], *[1] * len(sizes), params.shape[1])
        return registered(params, sizes, block), 0

    torch.library.register_vmap(qualified, batched)
    return registered


_block_anchors = _define("block_anchors", _anchor_params_of_each, lambda params, sizes: params.shape)
_block_scales = _define(
    "block_scales", _position_scales, lambda params, sizes: torch.broadcast_shapes(params.shape[:-1], tuple(sizes))
)


def anchor_params(params: MaskParams | Tensor, sizes: Sequence[int], block: int) -> MaskParams | Tensor:
    """Converts the parameters of a keep probability to those of the anchors: no block starts below their threshold.

    Their scale is the reciprocal of the mean keep probability under this threshold.
    """
    if isinstance(params, MaskParams):
        return _anchor_params(params.threshold, tuple(sizes), block)
    return _block_anchors(params, sizes, block)


def position_scales(params: MaskParams | Tensor, sizes: Sequence[int], block: int) -> Tensor:
    """Returns the reciprocal of each position's own keep probability under the parameters of the anchors, as float64.

    Raises:
        ValueError: one is larger than `LARGEST_SCALE`.
    """
    return _block_scales(params.tensor() if isinstance(params, MaskParams) else params, sizes, block)


def free(unstarted: Tensor, sizes: Sequence[int], block: int) -> Tensor:
    """Computes the positions that no block covers from the places where none starts, as bools.

    The last dimensions are the map's. A block starts at its corner of lowest indices. The values of `unstarted` at
    places that are no anchors, where a block would not fit, have no effect.

    Position i is free if the b places up to it start no block, on each axis. Each row ends with places that are no
    anchors, and each map with rows of them, so the whole tensor can be taken as one row: a window that reaches back
    over an edge contains only them. A window of b is made from log2(b) windows of half the size.
    """
    beyond = torch.ones(tuple(sizes), dtype=torch.bool, device=unstarted.device)
    beyond[tuple(slice(0, length - block + 1) for length in sizes)] = False
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    row = torch.nn.functional.pad((unstarted | beyond).flatten(), ((block - 1) * sum(strides), 0), value=True)
    for stride in strides:
        width = 1
        while width < block:
            step = min(width, block - width)
            row = row[step * stride :] & row[: -step * stride]
            width += step
    return row.reshape(unstarted.shape)

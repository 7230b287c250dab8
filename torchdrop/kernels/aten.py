"""The backend for devices and installations without a kernel: PyTorch's own operations make the masks of the reference.

The ten rounds of Philox run on both halves of many counters at a time, in place, in pieces that stay in cache. A mask
looks at the upper 16 of the random bits first, and at the lower 16 only for those elements that the upper ones do not
decide. A few blocks under one key are computed with Python's long integers, in which each block has 64 bits: that takes
a third of the time that operations on small tensors take.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .mask_params import MaskParams, has_float64
from .masking import COMPUTE_DTYPE, WHOLE, MaskSlice, apply_mask
from .reference import NORMAL_PLANE, SECOND_PLANE

NAME = "aten"

_WORD = 0xFFFFFFFF
_MULTIPLIERS, _STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

PIECE = 2**16
"""The number of blocks that are computed at a time."""

FEW = 512
"""The largest number of blocks for which Python's integers are faster."""


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    return [] if dtype in COMPUTE_DTYPE else [f"it takes {', '.join(map(str, COMPUTE_DTYPE))}, not {dtype}"]


def _blocks(first: int, last: int, key: Tensor) -> Tensor:
    """Returns blocks first to last - 1, as int32 of shape ``key.shape[:-1] + (last - first, 4)``."""
    if key.dim() == 1 and key.is_cpu and last - first <= FEW:
        return _few_blocks(first, last - first, *key.tolist())
    block = torch.arange(first, last, device=key.device)
    return _numbered_blocks(block, key.reshape(-1, 2)).reshape((*key.shape[:-1], last - first, 4))


def _numbered_blocks(block: Tensor, key: Tensor) -> Tensor:
    """Returns the blocks with these numbers (n,) under each of the keys (k, 2), as int32 (k, n, 4)."""
    out = torch.empty((len(key), len(block), 4), dtype=torch.int32, device=key.device)
    _fill(out, block, key)
    return out


def _fill(out: Tensor, block: Tensor, key: Tensor) -> None:
    keys, blocks = out.shape[:2]
    if keys * blocks > PIECE:
        dim = 0 if keys > 1 else 1
        half = out.shape[dim] // 2
        for part in (slice(0, half), slice(half, None)):
            if dim:
                _fill(out[:, part], block[part], key)
            else:
                _fill(out[part], block, key[part])
        return
    # Counter words 0 and 2 are in `even`, and 1 and 3 are in `odd`. The products of a round are made twice, one pair
    # after the other, so that the middle two belong to words 2 and 0. The round swaps them into this order.
    device = key.device
    room = torch.empty((12, keys, blocks), dtype=torch.int64, device=device)
    even, first, second, odd = room.split((2, 4, 4, 2))
    for counter, number in ((0, block), (1, key[:, 1:])):
        even[counter], odd[counter] = number & _WORD, number >> 32
    constants = torch.tensor((_MULTIPLIERS, _STEPS), device=device)
    multipliers = constants[0].reshape(2, 1, 1)
    rounds = torch.arange(_ROUNDS, device=device).reshape(-1, 1, 1, 1)
    seeds = torch.stack([key[:, :1], key[:, :1] >> 32]).bitwise_and_(_WORD)
    seeds = (constants[1].reshape(2, 1, 1) * rounds + seeds).bitwise_and_(_WORD)
    twice = even.expand(2, 2, keys, blocks)
    products = [(p.view(2, 2, keys, blocks), p[1:3]) for p in (first, second)]
    for i, seed in enumerate(seeds.unbind()):
        product, swapped = products[i % 2]
        torch.mul(twice, multipliers, out=product)
        torch.bitwise_right_shift(swapped, 32, out=even)
        even.bitwise_xor_(odd).bitwise_xor_(seed).bitwise_and_(_WORD)
        odd = swapped  # the bits above its lower 32 have no meaning
    pairs = out.unflatten(-1, (2, 2))
    pairs[..., 0], pairs[..., 1] = even.movedim(0, -1), odd.movedim(0, -1)


@functools.lru_cache(maxsize=64)
def _lanes(n: int) -> tuple[int, int]:
    """Returns two integers of n groups of 64 bits. Group i is 1 in the first, and i in the second."""
    ones = ((1 << 64 * n) - 1) // ((1 << 64) - 1)
    return ones, int.from_bytes(b"".join(i.to_bytes(8, "little") for i in range(n)), "little")


def _few_blocks(first: int, n: int, seed: int, stream: int) -> Tensor:
    ones, numbers = _lanes(n)
    low = ones * _WORD
    block = ones * (first % 2**64) + numbers
    c0, c1, c2, c3 = block & low, block >> 32 & low, ones * (stream & _WORD), ones * (stream >> 32 & _WORD)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ ones * k0, p1 & low, (p0 >> 32 & low) ^ c3 ^ ones * k1, p0 & low
        k0, k1 = k0 + _STEPS[0] & _WORD, k1 + _STEPS[1] & _WORD
    pairs = [bytearray((even | odd << 32).to_bytes(8 * n, "little")) for even, odd in ((c0, c1), (c2, c3))]
    if not n:
        return torch.empty((0, 4), dtype=torch.int32)
    words = [torch.frombuffer(pair, dtype=torch.int32) for pair in pairs]
    if sys.byteorder == "big":
        words = [torch.frombuffer(pair, dtype=torch.uint8).reshape(-1, 4).flip(-1).view(torch.int32) for pair in pairs]
    return torch.stack([pair.reshape(n, 2) for pair in words], 1).reshape(n, 4)


def _halves(first: int, last: int, plane: int, key: Tensor) -> Tensor:
    """Returns the halves of the words of blocks first to last - 1 of a plane, in order, as int16."""
    words = _blocks(first + plane, last + plane, key)
    halves = words.view(torch.int16)
    if sys.byteorder == "big":
        halves = halves.unflatten(-1, (4, 2)).flip(-1).flatten(-2)
    return halves.flatten(-2)


def _plane(shape: Sequence[int], key: Tensor, part: MaskSlice, plane: int) -> Tensor:
    """Returns each element's 16 bits of a plane, as int16."""

    def row(start: int, n: int) -> Tensor:
        return _halves(start // 8, -(-(start + n) // 8), plane, key)[..., start % 8 : start % 8 + n]

    return reference.stack_rows(row, shape, key, part)


def random_bits(shape: Sequence[int], key: Tensor, part: MaskSlice = WHOLE) -> Tensor:
    upper, lower = (_plane(shape, key, part, plane).to(torch.int64) & 0xFFFF for plane in (0, SECOND_PLANE))
    return upper << 16 | lower


def keep_mask(shape: Sequence[int], key: Tensor, params: MaskParams | Tensor, part: MaskSlice = WHOLE) -> Tensor:
    upper = _plane(shape, key, part, 0).to(torch.int32) & 0xFFFF
    if isinstance(params, MaskParams):
        below: int | Tensor = params.threshold
        kept, open_ = upper < below >> 16, below & 0xFFFF != 0
    else:
        below = params[..., 0].to(torch.int64).to(key.device)
        kept, open_ = upper < below >> 16, True
    if not open_:
        return kept
    tied = upper == below >> 16
    if isinstance(below, Tensor):
        tied &= below & 0xFFFF != 0
    places = tied.nonzero()
    if len(places):
        lower = _lower(places, shape, key, part)
        limit = below & 0xFFFF
        if isinstance(limit, Tensor):
            limit = limit.expand(tied.shape)[tied]
        kept[tied] = lower < limit
    return kept


def _lower(places: Tensor, shape: Sequence[int], key: Tensor, part: MaskSlice) -> Tensor:
    """Returns the lower 16 random bits of these elements. Each row of `places` has the indices of one element."""
    keys = key.dim() - 1
    element = torch.zeros_like(places[:, 0])
    for dim, size in enumerate(shape):
        element = element * size + places[:, keys + dim]
    if part.run:
        element = element // part.run * part.pitch + element % part.run
    element = element + part.start
    own = key[tuple(places[:, :keys].unbind(-1))] if keys else key
    words = torch.stack(torch.broadcast_tensors(*reference.philox(element // 8 + SECOND_PLANE, own)), -1)
    word = words.gather(-1, (element % 8 // 2).unsqueeze(-1)).squeeze(-1)
    return word >> 16 * (element % 2) & 0xFFFF


def masked(
    x: Tensor,
    key: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    part: MaskSlice = WHOLE,
    out: Tensor | None = None,
) -> Tensor:
    return apply_mask(x, keep_mask(shape, key, params, part), params, out)


select = apply_mask


def standard_normal(shape: Sequence[int], key: Tensor, part: MaskSlice = WHOLE) -> Tensor:
    def row(start: int, n: int) -> Tensor:
        words = _blocks(start // 4 + NORMAL_PLANE, -(-(start + n) // 4) + NORMAL_PLANE, key)
        exact = has_float64(key.device)
        wide = (words if exact else words.cpu()).to(torch.int64).bitwise_and_(_WORD)
        variates = reference.normals(wide)
        return (variates if exact else variates.to(key.device, torch.float32))[..., start % 4 : start % 4 + n]

    return reference.stack_rows(row, shape, key, part)

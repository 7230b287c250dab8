"""The specification of random bits and masks, in plain integer operations on tensors. It runs on any device.

Every other backend that claims the same masks must agree with this file bit for bit.

- A block is Philox4x32-10 (Salmon et al., SC 2011) of the counter (block number, stream) under the key seed. Seed,
  stream and block number have 64 bits each, and the block has four 32-bit words.
- Element i has 32 random bits. Block i // 8 gives their upper half: the lower half of word (i % 8) // 2 if i is even,
  and the upper half of that word if i is odd. Block 2**61 + i // 8 gives their lower half in the same way.
- An element is kept where the unsigned integer that its random bits make is below the threshold.
- Standard normal variate i comes from block 2**62 + i // 4: words 0 and 1 give variates 0 and 1 by the method of Box
  and Muller, and words 2 and 3 give variates 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .mask_params import MaskParams
from .masking import COMPUTE_DTYPE, WHOLE, MaskSlice, apply_mask, unpack_params

NAME = "reference"

_WORD = 0xFFFFFFFF
SECOND_PLANE, NORMAL_PLANE = 2**61, 2**62


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    return [] if dtype in COMPUTE_DTYPE else [f"it takes {', '.join(map(str, COMPUTE_DTYPE))}, not {dtype}"]


def philox(block: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the four words of the blocks with these numbers, as int64 tensors.

    `key` holds (seed, stream) in its last dimension; its other dimensions broadcast against `block`.
    """
    seed, stream = key[..., 0], key[..., 1]
    c0, c1, c2, c3 = block & _WORD, block >> 32 & _WORD, stream & _WORD, stream >> 32 & _WORD
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def _blocks(first: int, last: int, plane: int, key: Tensor) -> Tensor:
    """Returns blocks first to last - 1 of a plane, with four words each, in the last two dimensions."""
    block = torch.arange(first, last, device=key.device) + plane
    return torch.stack(torch.broadcast_tensors(*philox(block, key.unsqueeze(-2))), -1)


def _halves(first: int, last: int, plane: int, key: Tensor) -> Tensor:
    """Returns the halves of the words of blocks first to last - 1, in order, in the last dimension."""
    words = _blocks(first, last, plane, key)
    return torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-3)


def stack_rows(row: Callable[[int, int], Tensor], shape: Sequence[int], key: Tensor, part: MaskSlice) -> Tensor:
    """Stacks the rows of a slice. `row` makes each of them from its first index and its length."""
    count, length, pitch = part.rows(math.prod(shape))
    rows = [row(part.start + r * pitch, length) for r in range(count)]
    out = torch.stack(rows, -2) if count else row(part.start, 0)
    return out.reshape((*key.shape[:-1], *shape))


def random_bits(shape: Sequence[int], key: Tensor, part: MaskSlice = WHOLE) -> Tensor:
    """Returns the random bits of the slice's elements, 32 each, as int64 of shape ``key.shape[:-1] + shape``."""

    def row(start: int, n: int) -> Tensor:
        first, last, skip = start // 8, -(-(start + n) // 8), start % 8
        bits = _halves(first, last, 0, key) << 16 | _halves(first, last, SECOND_PLANE, key)
        return bits[..., skip : skip + n]

    return stack_rows(row, shape, key, part)


def keep_mask(shape: Sequence[int], key: Tensor, params: MaskParams | Tensor, part: MaskSlice = WHOLE) -> Tensor:
    """Returns True where the random bits are below the threshold, in the shape ``key.shape[:-1] + shape``."""
    return random_bits(shape, key, part) < unpack_params(params, key.device)[0]


def masked(
    x: Tensor,
    key: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    part: MaskSlice = WHOLE,
    out: Tensor | None = None,
) -> Tensor:
    """Applies the parameters to x, under a mask of this shape that is broadcast where it has ones."""
    return apply_mask(x, keep_mask(shape, key, params, part), params, out)


select = apply_mask


def _log(u: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(u)
    m, e = mantissa * 2.0, exponent.to(torch.float64) - 1.0
    halve = (m > math.sqrt(2.0)).to(torch.float64)
    m, e = m * (1.0 - 0.5 * halve), e + halve
    f = (m - 1.0) / (m + 1.0)
    s = f * f
    total = torch.full_like(s, 1.0 / 21.0)
    for odd in range(19, 0, -2):
        total = total * s + 1.0 / odd
    return e * math.log(2.0) + (2.0 * f) * total


def _circle(word: Tensor) -> tuple[Tensor, Tensor]:
    quadrant = word >> 30
    a = ((word & 0x3FFFFFFF).to(torch.float64) - 536870911.5) * (math.pi / 2 * 2.0**-30)
    t = a * a
    c, s = torch.full_like(t, 1.0 / math.factorial(16)), torch.full_like(t, 1.0 / math.factorial(17))
    for even in range(14, -1, -2):
        sign = 1.0 if even % 4 == 0 else -1.0
        c = c * t + sign / math.factorial(even)
        s = s * t + sign / math.factorial(even + 1)
    s = s * a
    odd = quadrant % 2 == 1
    x, y = torch.where(odd, s, c), torch.where(odd, c, s)
    return torch.where((quadrant == 1) | (quadrant == 2), -x, x), torch.where(quadrant >= 2, -y, y)


def normals(words: Tensor) -> Tensor:
    """Makes normal variates from the words in the last dimension, as many as there are words and in their order."""
    first, second = words[..., 0::2], words[..., 1::2]
    square = -2.0 * _log((first.to(torch.float64) + 0.5) * 2.0**-32)
    radius = square * square.rsqrt()  # sqrt() may call a vector library that does not round exactly
    cosine, sine = _circle(second)
    return torch.stack([radius * cosine, radius * sine], -1).flatten(-3)


def standard_normal(shape: Sequence[int], key: Tensor, part: MaskSlice = WHOLE) -> Tensor:
    """Returns standard normal variates of the slice's elements, as float64 of shape ``key.shape[:-1] + shape``."""

    def row(start: int, n: int) -> Tensor:
        words = _blocks(start // 4, -(-(start + n) // 4), NORMAL_PLANE, key)
        return normals(words)[..., start % 4 : start % 4 + n]

    return stack_rows(row, shape, key, part)

"""The specification, in plain integer operations on tensors: what the draws are, and what a kernel makes of them.

Every other backend that claims the same masks is held to this file bit for bit. It runs on any device.

- A block is Philox4x32-10 (Salmon et al., SC 2011) of the counter (block number, stream) under the key seed; seed,
  stream and block number have 64 bits, and the block gives four 32-bit words.
- Element i takes 16 bits from block i // 8: the lower half of word (i % 8) // 2 if i is even, else its upper half.
  They are the upper half of its draw. The lower half comes in the same way from block 2**61 + i // 8.
- It is kept when the draw is below the threshold.
- Standard normal variate i comes from block 2**62 + i // 4: words 0 and 1 give variates 0 and 1 by Box and Muller's
  method, words 2 and 3 give variates 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .mask_params import MaskParams
from .masking import COMPUTE_DTYPE, WHOLE, MaskSlice, apply_mask, trailing

NAME = "reference"

_WORD = 0xFFFFFFFF
SECOND_PLANE, NORMAL_PLANE = 2**61, 2**62


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    return [] if dtype in COMPUTE_DTYPE else [f"it takes {', '.join(map(str, COMPUTE_DTYPE))}, not {dtype}"]


def philox(block: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words, as int64 tensors, of the blocks with these numbers.

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


def _words(first: int, last: int, plane: int, key: Tensor) -> Tensor:
    """Blocks first to last - 1, four words each, in the last two dimensions."""
    block = torch.arange(first, last, device=key.device) + plane
    return torch.stack(torch.broadcast_tensors(*philox(block, key.unsqueeze(-2))), -1)


def _halves(first: int, last: int, plane: int, key: Tensor) -> Tensor:
    """The 16-bit values of blocks first to last - 1, in order, in the last dimension."""
    words = _words(first, last, plane, key)
    return torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-3)


def of_part(row: Callable[[int, int], Tensor], shape: Sequence[int], key: Tensor, part: MaskSlice) -> Tensor:
    """The rows of a part, each from `row`, which takes an index and a length."""
    count, length, pitch = part.rows(math.prod(shape))
    rows = [row(part.start + r * pitch, length) for r in range(count)]
    out = torch.stack(rows, -2) if count else row(part.start, 0)
    return out.reshape((*key.shape[:-1], *shape))


def draws(shape: Sequence[int], key: Tensor, part: MaskSlice = WHOLE) -> Tensor:
    """The 32-bit draws of the part's elements as int64, of shape ``key.shape[:-1] + shape``."""

    def row(start: int, n: int) -> Tensor:
        first, last, skip = start // 8, -(-(start + n) // 8), start % 8
        draw = _halves(first, last, 0, key) << 16 | _halves(first, last, SECOND_PLANE, key)
        return draw[..., skip : skip + n]

    return of_part(row, shape, key, part)


def keep_mask(shape: Sequence[int], key: Tensor, params: MaskParams | Tensor, part: MaskSlice = WHOLE) -> Tensor:
    """True where the draw is below the parameters' threshold, of shape ``key.shape[:-1] + shape``."""
    return draws(shape, key, part) < trailing(params, key.device)[0]


def masked(
    x: Tensor,
    key: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    part: MaskSlice = WHOLE,
    out: Tensor | None = None,
) -> Tensor:
    """`x` under the parameters and a mask of this shape, broadcast where it has ones."""
    return apply_mask(x, keep_mask(shape, key, params, part), params, out)


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
    """The variates of blocks whose words lie in the last dimension, in order in the last dimension."""
    first, second = words[..., 0::2], words[..., 1::2]
    square = -2.0 * _log((first.to(torch.float64) + 0.5) * 2.0**-32)
    radius = square * square.rsqrt()  # sqrt() may go to a vector library that does not round exactly
    cosine, sine = _circle(second)
    return torch.stack([radius * cosine, radius * sine], -1).flatten(-3)


def standard_normal(shape: Sequence[int], key: Tensor, part: MaskSlice = WHOLE) -> Tensor:
    """Standard normal variates of the part's elements as float64, of shape ``key.shape[:-1] + shape``."""

    def row(start: int, n: int) -> Tensor:
        words = _words(start // 4, -(-(start + n) // 4), NORMAL_PLANE, key)
        return normals(words)[..., start % 4 : start % 4 + n]

    return of_part(row, shape, key, part)

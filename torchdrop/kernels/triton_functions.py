"""The functions that the Triton kernels are made of. This file imports triton, so it is itself imported only when it is
used.

Tensors here have the shape (vectors, lanes): a vector is 16 bytes that a thread reads and writes at once. A Philox
block decides eight neighbors. Where these are several vectors, each of their threads makes the block, which costs less
than an exchange between threads.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = not isinstance(tl.zeros, triton.JITFunction)
"""Whether kernels run in Triton's interpreter. They do if TRITON_INTERPRET is 1 when triton is imported."""

_BY_HAND = tl.constexpr(INTERPRETED)
_SIGN = tl.constexpr(-(2**63))


@triton.jit
def _philox(block, seed, stream):
    """Makes the four 32-bit words of Philox4x32-10 for each 64-bit block number."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _halves(vector, a, b, c, d, lanes: tl.constexpr):
    """Takes the halves of a block's words that belong to a vector, the lower half of the first word first.

    Each is in the upper half of a 32-bit number, whose lower half has no meaning.
    """
    if lanes == 8:
        words = tl.join(tl.join(a, c), tl.join(b, d))
    elif lanes == 4:
        odd = (vector & 1) != 0
        words = tl.join(tl.where(odd, c, a), tl.where(odd, d, b))
    else:
        odd = (vector & 1) != 0
        words = tl.where((vector & 2) != 0, tl.where(odd, d, c), tl.where(odd, b, a))
    return tl.reshape(tl.join(words << 16, words), [a.shape[0], lanes])


@triton.jit
def _has_half(word, twice):
    """Makes a number that is not 0 where one of the word's halves is equal to both halves of `twice`."""
    other = word ^ twice
    return (other - 0x00010001) & (other ^ 0xFFFFFFFF) & 0x80008000  # the interpreter fails at ~ of unsigned numbers


@triton.jit
def keep_mask(vector, seed, stream, high, low, lanes: tl.constexpr):
    """Whether the random bits of each element are below the threshold ``high * 2**16 + low``, with high below 2**16.

    Their upper halves decide. Where one is equal to `high`, which is rare, the lower halves do.
    """
    block = vector // (8 // lanes)
    a, b, c, d = _philox(block, seed, stream)
    upper, limit = _halves(vector, a, b, c, d, lanes), high.to(tl.uint32) << 16
    if low > 0:
        twice = high.to(tl.uint32) * 0x00010001
        ties = _has_half(a, twice) | _has_half(b, twice) | _has_half(c, twice) | _has_half(d, twice)
        if tl.max(ties, 0) > 0:
            e, f, g, h = _philox(block + (1 << 61), seed, stream)
            lower = _halves(vector, e, f, g, h, lanes) >> 16
            below = (upper < limit) | (((upper >> 16) == high.to(tl.uint32)) & (lower < low.to(tl.uint32)))
            upper, limit = tl.where(below, 0, upper | 1), tl.full([], 1, tl.uint32)
    return upper < limit


@triton.jit
def random_bits(vector, seed, stream, lanes: tl.constexpr):
    """Makes both halves of the random bits of each element."""
    block = vector // (8 // lanes)
    a, b, c, d = _philox(block, seed, stream)
    e, f, g, h = _philox(block + (1 << 61), seed, stream)
    upper, lower = _halves(vector, a, b, c, d, lanes), _halves(vector, e, f, g, h, lanes)
    return ((upper & 0xFFFF0000) | (lower >> 16)).to(tl.int64)


@triton.jit
def computed(number, pointer):
    """Returns a number in the type in which the elements behind a pointer are computed."""
    if pointer.dtype.element_ty == tl.float64:
        return tl.full([], number, tl.float64)
    else:  # noqa: RET505 (Triton reads on after a return)
        return tl.full([], number, tl.float32)


@triton.jit
def read_params(mask_params, high, low, scale, shift, fill, pointer, affine: tl.constexpr):
    """Reads the parameters: the threshold in two halves, and the other numbers in the type that is computed in.

    Shift and fill are read from memory only if the map is affine. A shift of 0 becomes -0, because the addition of -0
    changes nothing, not even the sign of a zero.
    """
    if mask_params is not None:
        threshold = tl.minimum(tl.maximum(tl.load(mask_params), 0.0), 4294967296.0).to(tl.int64)
        high = tl.minimum(threshold >> 16, 0xFFFF)
        high, low = high.to(tl.int32), (threshold - (high << 16)).to(tl.int32)
        scale = tl.load(mask_params + 1)
        if affine:
            shift, fill = tl.load(mask_params + 2), tl.load(mask_params + 3)
            negative_zero = tl.full([], _SIGN, tl.int64).to(tl.float64, bitcast=True)  # a -0.0 would be taken for 0
            shift = tl.where((shift == 0.0) & (fill == 0.0), negative_zero, shift)
    return high, low, computed(scale, pointer), computed(shift, pointer), computed(fill, pointer)


@triton.jit
def widen(value, wide: tl.constexpr):
    """Converts exactly. The interpreter's own conversions of bfloat16 are wrong for subnormal numbers, and truncate."""
    if value.dtype == tl.bfloat16 and _BY_HAND:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505 (Triton reads on after a return)
        return value.to(wide)


@triton.jit
def narrow(value, pointer):
    """Rounds to the nearest element, and ties to even."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    if dtype == tl.bfloat16 and _BY_HAND:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505
        return value.to(dtype)


@triton.jit
def scale_kept(value, kept, scale, shift, fill, affine: tl.constexpr):
    """Scales kept elements and fills the rest.

    The compiler does not have the fill, so it chooses before it rounds, and rounds two elements at once.
    """
    return tl.where(kept, value * scale + shift if affine else value * scale, fill)


@triton.jit
def element_offsets(vectors: tl.constexpr, lanes: tl.constexpr):
    """Makes the numbers from 0 to vectors * lanes - 1, in a row for each vector."""
    return (tl.arange(0, vectors) * lanes)[:, None] + tl.arange(0, lanes)[None, :]

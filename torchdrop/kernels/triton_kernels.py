"""The kernels of the Triton backend. This file imports triton, so it is itself imported only when used.

Tensors here have the shape (vectors, lanes): a vector is 16 bytes that a thread reads and writes at once. A Philox
block decides eight neighbors; where they are several vectors, each of their threads makes the block, which costs less
than an exchange between threads.

The numbers of mask parameters are arguments, or are read from `mask_params` where that is given: four doubles in the
device's memory. Neither they nor sizes and indices, which have 64 bits, are specialized: another rate or size compiles
nothing.

A kernel has two bodies, one for programs all of whose elements exist: masks would keep loads and stores from being
vectors.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.runtime.driver import driver

INTERPRETED = not isinstance(tl.zeros, triton.JITFunction)
"""Whether kernels run in Triton's interpreter, for which TRITON_INTERPRET=1 asks when triton is imported."""

_BY_HAND = tl.constexpr(INTERPRETED)
_SIGN = tl.constexpr(-(2**63))
_RUNTIME = [
    "key",
    "mask_params",
    "high",
    "low",
    "start",
    "length",
    "pitch",
    "rows_per_key",
    "chunks",
    "tiles",
    "width",
]


@triton.jit
def _words(block, seed, stream):
    """The four words of Philox4x32-10 for each 64-bit block number."""
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
    """The halves of a block's words that belong to a vector, the lower half of the first word first.

    Each in the upper half of a 32-bit number, whose lower half has no meaning.
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
    """Not 0 where one of the word's halves is that of `twice`, whose halves are the same."""
    other = word ^ twice
    return (other - 0x00010001) & (other ^ 0xFFFFFFFF) & 0x80008000  # the interpreter fails at ~ of unsigned numbers


@triton.jit
def _kept(vector, seed, stream, high, low, lanes: tl.constexpr):
    """Whether each draw of these vectors is below the threshold ``high * 2**16 + low``, with high below 2**16.

    The draws' upper halves decide; where one is equal to `high`, which is rare, the lower ones do.
    """
    block = vector // (8 // lanes)
    a, b, c, d = _words(block, seed, stream)
    upper, limit = _halves(vector, a, b, c, d, lanes), high.to(tl.uint32) << 16
    if low > 0:
        twice = high.to(tl.uint32) * 0x00010001
        ties = _has_half(a, twice) | _has_half(b, twice) | _has_half(c, twice) | _has_half(d, twice)
        if tl.max(ties, 0) > 0:
            e, f, g, h = _words(block + (1 << 61), seed, stream)
            lower = _halves(vector, e, f, g, h, lanes) >> 16
            below = (upper < limit) | (((upper >> 16) == high.to(tl.uint32)) & (lower < low.to(tl.uint32)))
            upper, limit = tl.where(below, 0, upper | 1), tl.full([], 1, tl.uint32)
    return upper < limit


@triton.jit
def _draws(vector, seed, stream, lanes: tl.constexpr):
    """The draws of these vectors, both halves."""
    block = vector // (8 // lanes)
    a, b, c, d = _words(block, seed, stream)
    e, f, g, h = _words(block + (1 << 61), seed, stream)
    upper, lower = _halves(vector, a, b, c, d, lanes), _halves(vector, e, f, g, h, lanes)
    return ((upper & 0xFFFF0000) | (lower >> 16)).to(tl.int64)


@triton.jit
def _law(mask_params, high, low, scale, shift, fill, wide: tl.constexpr):
    """The threshold in two halves, and the other numbers in the type that is computed in.

    A shift of -0 changes nothing, not even a zero's sign.
    """
    if mask_params is not None:
        threshold = tl.minimum(tl.maximum(tl.load(mask_params), 0.0), 4294967296.0).to(tl.int64)
        high = tl.minimum(threshold >> 16, 0xFFFF)
        high, low = high.to(tl.int32), (threshold - (high << 16)).to(tl.int32)
        scale, shift, fill = tl.load(mask_params + 1), tl.load(mask_params + 2), tl.load(mask_params + 3)
        negative_zero = tl.full([], _SIGN, tl.int64).to(tl.float64, bitcast=True)  # a -0.0 would be taken for 0
        shift = tl.where((shift == 0.0) & (fill == 0.0), negative_zero, shift)
    return high, low, tl.full([], scale, wide), tl.full([], shift, wide), tl.full([], fill, wide)


@triton.constexpr_function
def _wide(pointer):
    """The type in which what lies there is computed."""
    return tl.float64 if pointer.dtype.element_ty == tl.float64 else tl.float32


@triton.jit
def _widen(value, wide: tl.constexpr):
    """Exactly. The interpreter's conversions of bfloat16 go wrong for subnormal numbers, and truncate."""
    if value.dtype == tl.bfloat16 and _BY_HAND:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505 (Triton reads on after a return)
        return value.to(wide)


@triton.jit
def _narrow(value, pointer):
    """Rounded to the nearest, ties to even."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    if dtype == tl.bfloat16 and _BY_HAND:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505
        return value.to(dtype)


@triton.jit
def _scaled(value, kept, scale, shift, fill, affine: tl.constexpr):
    """A fill that the compiler does not know is chosen before the rounding, which then takes two elements at once."""
    return tl.where(kept, value * scale + shift if affine else value * scale, fill)


@triton.jit
def _elements(vectors: tl.constexpr, lanes: tl.constexpr):
    """The numbers from 0 to vectors * lanes - 1, a row for each vector."""
    return (tl.arange(0, vectors) * lanes)[:, None] + tl.arange(0, lanes)[None, :]


@triton.jit
def _rows_body(
    out, x, each, inside, vector, seed, stream, high, low, scale, shift, fill,
    makes: tl.constexpr, affine: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    if makes == "draws":
        tl.store(out + each, _draws(vector, seed, stream, lanes), mask=inside)
    elif makes == "mask":
        tl.store(out + each, _kept(vector, seed, stream, high, low, lanes), mask=inside)
    else:
        value = _widen(tl.load(x + each, mask=inside), scale.dtype)
        kept = _kept(vector, seed, stream, high, low, lanes)
        tl.store(out + each, _narrow(_scaled(value, kept, scale, shift, fill, affine), out), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def rows(
    out, x, key, mask_params, high: tl.int32, low: tl.int32, scale: tl.float64, shift: tl.float64, fill: tl.float64,
    start: tl.int64, length: tl.int64, pitch: tl.int64, rows_per_key: tl.int64, chunks: tl.int32,
    makes: tl.constexpr, affine: tl.constexpr, params_of: tl.constexpr, single: tl.constexpr, aligned: tl.constexpr,
    vectors: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """Rows of `length` neighbors that lie end to end. Row r of a key starts at the index ``start + r * pitch``.

    A program serves a chunk of one row. `aligned` says that rows start with whole vectors, in the mask and in memory.
    """
    program = tl.program_id(0)
    if single:
        chunk, row, of_key = program.to(tl.int64), tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    else:
        chunk, row = (program % chunks).to(tl.int64), (program // chunks).to(tl.int64)
        of_key = row // rows_per_key
    seed, stream = tl.load(key + 2 * of_key), tl.load(key + 2 * of_key + 1)
    if params_of == "row":
        mask_params += 4 * row
    elif params_of == "key":
        mask_params += 4 * of_key
    index = (row - of_key * rows_per_key) * pitch + start
    place, column = row * length, chunk * (vectors * lanes)
    if aligned:
        place = place // lanes * lanes
    else:
        column -= index % lanes
    out += place + column
    if x is not None:
        x += place + column
    vector = index // lanes + chunk * vectors + tl.arange(0, vectors)
    each = _elements(vectors, lanes)
    high, low, scale, shift, fill = _law(mask_params, high, low, scale, shift, fill, _wide(out))
    if (column >= 0) & (column + vectors * lanes <= length):
        _rows_body(out, x, each, None, vector, seed, stream, high, low, scale, shift, fill, makes, affine, lanes)
    else:
        inside = each < tl.minimum(length - column, vectors * lanes).to(tl.int32)
        if not aligned:
            inside = inside & (each >= -tl.minimum(column, 0).to(tl.int32))
        _rows_body(out, x, each, inside, vector, seed, stream, high, low, scale, shift, fill, makes, affine, lanes)


@triton.jit(do_not_specialize=_RUNTIME)
def groups(
    out, x, key, mask_params, high: tl.int32, low: tl.int32, scale: tl.float64, shift: tl.float64, fill: tl.float64,
    start: tl.int64, length: tl.int64, width: tl.int64, tiles: tl.int32, chunks: tl.int32,
    affine: tl.constexpr, aligned: tl.constexpr, tile_groups: tl.constexpr, tile_width: tl.constexpr,
):  # fmt: skip
    """For each key, `length` groups of `width` neighbors that share a draw: group g has that of index ``start + g``.

    A program serves `tile_width` elements of each of `tile_groups` groups. Groups that are dropped are not read.
    `aligned` says that groups are whole vectors.
    """
    program = tl.program_id(0)
    chunk, tile = (program % chunks).to(tl.int64), program // chunks
    of_key, tile = (tile // tiles).to(tl.int64), (tile % tiles).to(tl.int64)
    seed, stream = tl.load(key + 2 * of_key), tl.load(key + 2 * of_key + 1)
    index = tile * tile_groups + start
    group = tile * tile_groups - index % 8 + tl.arange(0, tile_groups)
    high, low, scale, shift, fill = _law(mask_params, high, low, scale, shift, fill, _wide(out))
    vector = index // 8 + tl.arange(0, tile_groups // 8)
    kept = tl.reshape(_kept(vector, seed, stream, high, low, 8), [tile_groups, 1])
    if aligned:
        width = width // 8 * 8
    column = (chunk * tile_width + tl.arange(0, tile_width))[None, :]
    inside = ((group >= 0) & (group < length))[:, None] & (column < width)
    place = (of_key * length + group)[:, None] * width + column
    value = _widen(tl.load(x + place, mask=inside & kept), scale.dtype)
    tl.store(out + place, _narrow(_scaled(value, kept, scale, shift, fill, affine), out), mask=inside)


@triton.jit
def _add_body(
    out, x, bias, residual, each, inside, column, vector, seed, stream, high, low, scale, shift, fill,
    affine: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    value = _widen(tl.load(x + each, mask=inside), scale.dtype)
    beside = _widen(tl.load(residual + each, mask=inside), scale.dtype)
    if bias is not None:
        value += _widen(tl.load(bias + column), scale.dtype)
    kept = _kept(vector, seed, stream, high, low, lanes)
    tl.store(out + each, _narrow(beside + _scaled(value, kept, scale, shift, fill, affine), out), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def add(
    out, x, bias, residual, key, mask_params, high: tl.int32, low: tl.int32, scale: tl.float64, shift: tl.float64,
    fill: tl.float64, length: tl.int64, width: tl.int64,
    affine: tl.constexpr, aligned: tl.constexpr, vectors: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """``residual + (kept ? (x + bias) * scale : 0)`` with a bias of `width` elements for each row of x.

    `aligned` says that rows of x are whole vectors.
    """
    chunk = tl.program_id(0).to(tl.int64)
    seed, stream = tl.load(key), tl.load(key + 1)
    first = chunk * (vectors * lanes)
    out, x, residual = out + first, x + first, residual + first
    vector = chunk * vectors + tl.arange(0, vectors)
    each = _elements(vectors, lanes)
    column = each
    if bias is not None:
        if aligned:
            period = width // lanes
            of_row = (chunk * vectors % period).to(tl.int32) + tl.arange(0, vectors)
            column = (of_row % period.to(tl.int32) * lanes)[:, None] + tl.arange(0, lanes)[None, :]
        else:
            column = ((first % width).to(tl.int32) + each) % width.to(tl.int32)
    high, low, scale, shift, fill = _law(mask_params, high, low, scale, shift, fill, _wide(out))
    if first + vectors * lanes <= length:
        _add_body(
            out, x, bias, residual, each, None, column, vector, seed, stream, high, low, scale, shift, fill, affine,
            lanes,
        )  # fmt: skip
    else:
        inside = each < (length - first).to(tl.int32)
        _add_body(
            out, x, bias, residual, each, inside, column, vector, seed, stream, high, low, scale, shift, fill, affine,
            lanes,
        )  # fmt: skip


@triton.jit
def _gelu(x, tanh: tl.constexpr):
    """a and b such that gelu(x) is ``x * a`` and its derivative ``a + x * b``.

    With u the argument of the tanh and e = exp(-2 |u|), (1 + tanh u) / 2 is 1 / (1 + e), or e / (1 + e) for negative u.
    """
    if tanh:
        u = (x + x * x * x * 0.044715) * 0.7978845608028654  # sqrt(2 / pi)
        e = tl.exp(-2.0 * tl.abs(u))
        a = tl.where(u < 0.0, e, 1.0) / (1.0 + e)
        b = 2.0 * e / ((1.0 + e) * (1.0 + e)) * ((1.0 + x * x * 0.134145) * 0.7978845608028654)
    else:
        a = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        b = tl.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return a, b


@triton.jit
def _activation_body(
    out, x, grad, each, inside, vector, seed, stream, high, low, scale, shift, fill,
    affine: tl.constexpr, function: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    value = _widen(tl.load(x + each, mask=inside), scale.dtype)
    if grad is not None:
        given = _widen(tl.load(grad + each, mask=inside), scale.dtype)
    kept = _kept(vector, seed, stream, high, low, lanes)
    if function == "relu":
        value = _scaled(tl.where(value <= 0.0, 0.0, value), kept, scale, shift, fill, affine)
    else:
        a, b = _gelu(value, function == "gelu_tanh")
        if grad is not None:
            value = _scaled(given, kept, scale, shift, fill, affine) * (a + value * b)
        else:
            value = _scaled(value * a, kept, scale, shift, fill, affine)
    tl.store(out + each, _narrow(value, out), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def activation(
    out, x, grad, key, mask_params, high: tl.int32, low: tl.int32, scale: tl.float64, shift: tl.float64,
    fill: tl.float64, length: tl.int64,
    affine: tl.constexpr, function: tl.constexpr, vectors: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """``kept ? f(x) * scale : 0``, or with `grad` the gradient of that."""
    chunk = tl.program_id(0).to(tl.int64)
    seed, stream = tl.load(key), tl.load(key + 1)
    first = chunk * (vectors * lanes)
    out, x = out + first, x + first
    if grad is not None:
        grad += first
    vector = chunk * vectors + tl.arange(0, vectors)
    each = _elements(vectors, lanes)
    high, low, scale, shift, fill = _law(mask_params, high, low, scale, shift, fill, _wide(out))
    if first + vectors * lanes <= length:
        _activation_body(
            out, x, grad, each, None, vector, seed, stream, high, low, scale, shift, fill, affine, function, lanes
        )
    else:
        inside = each < (length - first).to(tl.int32)
        _activation_body(
            out, x, grad, each, inside, vector, seed, stream, high, low, scale, shift, fill, affine, function, lanes
        )


@triton.jit
def _relu_backward_body(out, grad, kept, each, inside, scale, fill):
    given = _widen(tl.load(grad + each, mask=inside), scale.dtype)
    value = _widen(tl.load(kept + each, mask=inside), scale.dtype)
    tl.store(out + each, _narrow(tl.where(value <= 0.0, fill, given * scale), out), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def relu_backward(
    out, grad, kept, mask_params, scale: tl.float64, fill: tl.float64, length: tl.int64, elements: tl.constexpr
):
    """``kept <= 0 ? fill : grad * scale`` with `kept` the output of relu and dropout; nothing is drawn."""
    first = tl.program_id(0).to(tl.int64) * elements
    out, grad, kept = out + first, grad + first, kept + first
    if mask_params is not None:
        scale, fill = tl.load(mask_params + 1), tl.load(mask_params + 3)
    scale, fill, each = tl.full([], scale, _wide(out)), tl.full([], fill, _wide(out)), tl.arange(0, elements)
    if first + elements <= length:
        _relu_backward_body(out, grad, kept, each, None, scale, fill)
    else:
        _relu_backward_body(out, grad, kept, each, each < (length - first).to(tl.int32), scale, fill)


def starter(kernel: Any, index: int) -> Callable[..., None]:
    """A function of the number of programs and a compiled kernel's arguments, all of them, that launches it on the
    current stream of this device: with fewer calls than Triton makes, unless a profiler has to hear of launches."""
    run, function, packed = kernel.run, kernel.function, kernel.packed_metadata
    runtime, stream_of = knobs.runtime, driver.active.get_current_stream

    def start(programs: int, *arguments: Any) -> None:
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(before, "calls", before) or getattr(after, "calls", after):
            kernel[(programs, 1, 1)](*arguments)
        else:
            run(programs, 1, 1, stream_of(index), function, packed, None, None, None, *arguments)

    return start

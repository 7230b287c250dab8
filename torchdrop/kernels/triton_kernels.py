"""The kernels of the Triton backend. This file imports triton, so it is itself imported only when it is used.

Tensors here have the shape (vectors, lanes), as `triton_functions` describes.

The four numbers of mask parameters are arguments, or are read from `mask_params` where that is given: it points at four
doubles in the device's memory. No argument of a kernel may have the name params, which is a variable in the code that
Triton generates. Neither these numbers nor sizes and indices, which have 64 bits, are specialized, so a new rate or
size compiles nothing.

The body of a kernel is called in two places. The first serves programs all of whose elements exist; it has no masks,
because loads and stores with masks would not be vectors.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.runtime.driver import driver

try:
    from triton import knobs
except ImportError as error:
    needed = "these kernels need Triton 3.4 or newer, which comes with PyTorch 2.8"
    raise ImportError(f"{needed}, got {triton.__version__}") from error

from .triton_functions import (
    computed,
    element_offsets,
    keep_mask,
    narrow,
    random_bits,
    read_params,
    scale_kept,
    widen,
)

_RUNTIME = ["key", "mask_params", "high", "low", "start", "length", "pitch", "rows_per_key", "chunks", "tiles", "width"]
"""Triton compiles no variants of a kernel for values of these arguments."""


@triton.jit
def _rows_body(
    out, x, each, inside, vector, seed, stream, high, low, scale, shift, fill,
    makes: tl.constexpr, affine: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    if makes == "random_bits":
        tl.store(out + each, random_bits(vector, seed, stream, lanes), mask=inside)
    elif makes == "mask":
        tl.store(out + each, keep_mask(vector, seed, stream, high, low, lanes), mask=inside)
    else:
        value = widen(tl.load(x + each, mask=inside), scale.dtype)
        kept = keep_mask(vector, seed, stream, high, low, lanes)
        tl.store(out + each, narrow(scale_kept(value, kept, scale, shift, fill, affine), out), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def rows(
    out, x, key, mask_params, high: tl.int32, low: tl.int32, scale: tl.float64, shift: tl.float64, fill: tl.float64,
    start: tl.int64, length: tl.int64, pitch: tl.int64, rows_per_key: tl.int64, chunks: tl.int32,
    makes: tl.constexpr, affine: tl.constexpr, params_for: tl.constexpr, single: tl.constexpr, aligned: tl.constexpr,
    vectors: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """Serves rows of `length` neighbors that are end to end. Row r of a key starts at the index ``start + r * pitch``.

    A program serves a chunk of one row. `aligned` says that rows start with whole vectors, in the mask and in memory.
    """
    program = tl.program_id(0)
    if single:
        chunk, row, of_key = program.to(tl.int64), tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    else:
        chunk, row = (program % chunks).to(tl.int64), (program // chunks).to(tl.int64)
        of_key = row // rows_per_key
    seed, stream = tl.load(key + 2 * of_key), tl.load(key + 2 * of_key + 1)
    if params_for == "row":
        mask_params += 4 * row
    elif params_for == "key":
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
    each = element_offsets(vectors, lanes)
    high, low, scale, shift, fill = read_params(mask_params, high, low, scale, shift, fill, out, affine)
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
    """Serves `length` groups of `width` neighbors for each key. The elements of group g share the random bits of index
    ``start + g``.

    A program serves `tile_width` elements of each of `tile_groups` groups. Groups that are dropped are not read.
    `aligned` says that groups are whole vectors.
    """
    program = tl.program_id(0)
    chunk, tile = (program % chunks).to(tl.int64), program // chunks
    of_key, tile = (tile // tiles).to(tl.int64), (tile % tiles).to(tl.int64)
    seed, stream = tl.load(key + 2 * of_key), tl.load(key + 2 * of_key + 1)
    index = tile * tile_groups + start
    group = tile * tile_groups - index % 8 + tl.arange(0, tile_groups)
    high, low, scale, shift, fill = read_params(mask_params, high, low, scale, shift, fill, out, affine)
    vector = index // 8 + tl.arange(0, tile_groups // 8)
    kept = tl.reshape(keep_mask(vector, seed, stream, high, low, 8), [tile_groups, 1])
    if aligned:
        width = width // 8 * 8
    column = (chunk * tile_width + tl.arange(0, tile_width))[None, :]
    inside = ((group >= 0) & (group < length))[:, None] & (column < width)
    place = (of_key * length + group)[:, None] * width + column
    value = widen(tl.load(x + place, mask=inside & kept), scale.dtype)
    tl.store(out + place, narrow(scale_kept(value, kept, scale, shift, fill, affine), out), mask=inside)


@triton.jit
def _add_body(
    out, x, bias, residual, each, inside, column, vector, seed, stream, high, low, scale, shift, fill,
    affine: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    value = widen(tl.load(x + each, mask=inside), scale.dtype)
    beside = widen(tl.load(residual + each, mask=inside), scale.dtype)
    if bias is not None:
        value += widen(tl.load(bias + column), scale.dtype)
    kept = keep_mask(vector, seed, stream, high, low, lanes)
    tl.store(out + each, narrow(beside + scale_kept(value, kept, scale, shift, fill, affine), out), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def add(
    out, x, bias, residual, key, mask_params, high: tl.int32, low: tl.int32, scale: tl.float64, shift: tl.float64,
    fill: tl.float64, length: tl.int64, width: tl.int64,
    affine: tl.constexpr, aligned: tl.constexpr, vectors: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """Computes ``residual + (kept ? (x + bias) * scale : 0)`` with a bias of `width` elements for each row of x.

    `aligned` says that rows of x are whole vectors.
    """
    chunk = tl.program_id(0).to(tl.int64)
    seed, stream = tl.load(key), tl.load(key + 1)
    first = chunk * (vectors * lanes)
    out, x, residual = out + first, x + first, residual + first
    vector = chunk * vectors + tl.arange(0, vectors)
    each = element_offsets(vectors, lanes)
    column = each
    if bias is not None:
        if aligned:
            period = width // lanes
            of_row = (chunk * vectors % period).to(tl.int32) + tl.arange(0, vectors)
            column = (of_row % period.to(tl.int32) * lanes)[:, None] + tl.arange(0, lanes)[None, :]
        else:
            column = ((first % width).to(tl.int32) + each) % width.to(tl.int32)
    high, low, scale, shift, fill = read_params(mask_params, high, low, scale, shift, fill, out, affine)
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
    """Returns a and b such that gelu(x) is ``x * a`` and its derivative is ``a + x * b``.

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
    value = widen(tl.load(x + each, mask=inside), scale.dtype)
    if grad is not None:
        given = widen(tl.load(grad + each, mask=inside), scale.dtype)
    kept = keep_mask(vector, seed, stream, high, low, lanes)
    if function == "relu":
        value = scale_kept(tl.where(value <= 0.0, 0.0, value), kept, scale, shift, fill, affine)
    else:
        a, b = _gelu(value, function == "gelu_tanh")
        if grad is not None:
            value = scale_kept(given, kept, scale, shift, fill, affine) * (a + value * b)
        else:
            value = scale_kept(value * a, kept, scale, shift, fill, affine)
    tl.store(out + each, narrow(value, out), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def activation(
    out, x, grad, key, mask_params, high: tl.int32, low: tl.int32, scale: tl.float64, shift: tl.float64,
    fill: tl.float64, length: tl.int64,
    affine: tl.constexpr, function: tl.constexpr, vectors: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """Computes ``kept ? f(x) * scale : 0``, or the gradient of it where `grad` is given."""
    chunk = tl.program_id(0).to(tl.int64)
    seed, stream = tl.load(key), tl.load(key + 1)
    first = chunk * (vectors * lanes)
    out, x = out + first, x + first
    if grad is not None:
        grad += first
    vector = chunk * vectors + tl.arange(0, vectors)
    each = element_offsets(vectors, lanes)
    high, low, scale, shift, fill = read_params(mask_params, high, low, scale, shift, fill, out, affine)
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
    given = widen(tl.load(grad + each, mask=inside), scale.dtype)
    value = widen(tl.load(kept + each, mask=inside), scale.dtype)
    tl.store(out + each, narrow(tl.where(value <= 0.0, fill, given * scale), out), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def relu_backward(
    out, grad, kept, mask_params, scale: tl.float64, fill: tl.float64, length: tl.int64, elements: tl.constexpr
):
    """Computes ``kept <= 0 ? fill : grad * scale``, where `kept` is the output of relu and dropout."""
    first = tl.program_id(0).to(tl.int64) * elements
    out, grad, kept = out + first, grad + first, kept + first
    if mask_params is not None:
        scale = tl.load(mask_params + 1)
    each = tl.arange(0, elements)
    scale, fill = computed(scale, out), computed(fill, out)
    if first + elements <= length:
        _relu_backward_body(out, grad, kept, each, None, scale, fill)
    else:
        _relu_backward_body(out, grad, kept, each, each < (length - first).to(tl.int32), scale, fill)


def starter(kernel: Any, index: int) -> Callable[..., None]:
    """Returns a function that launches a compiled kernel on the current stream of this device.

    It takes the number of programs and all arguments of the kernel. It makes fewer calls than Triton does, unless a
    profiler is to be told of launches.
    """
    run, function, packed = kernel.run, kernel.function, kernel.packed_metadata
    runtime, stream_of = knobs.runtime, driver.active.get_current_stream

    def start(programs: int, *arguments: Any) -> None:
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(before, "calls", before) or getattr(after, "calls", after):
            kernel[(programs, 1, 1)](*arguments)
        else:
            run(programs, 1, 1, stream_of(index), function, packed, None, None, None, *arguments)

    return start

"""The Triton backend for CUDA: the masks of the reference, bit for bit, in one pass over memory.

The kernels read keys from the device's memory and get a `MaskParams` by value. So a launch copies nothing and waits for
nothing, and a CUDA graph can capture it. Triton itself is imported when there is a tensor that it can serve.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from ..core.torch_state import current_cuda_device, without_dispatch_modes
from . import reference
from .mask_params import ONE, MaskParams
from .mask_params import linear as linear_part
from .masking import COMPUTE_DTYPE, WHOLE, MaskSlice, apply_mask, params_by_value, unpack_params
from .rows import group_size, has_plan, plan_rows

NAME = "triton"

_WARPS, _VECTORS = 4, 256
"""A program has so many warps, and serves so many vectors of 16 bytes: two for each thread."""

_SHORT_VECTORS = 32
"""A program of one warp serves so many vectors. Rows that are no longer than that get such programs."""

_INTERPRETED_VECTORS = 4096
"""A program in the interpreter serves so many vectors, because the interpreter takes as long for many as for few."""

_TILES = ((16, 128), (64, 32), (256, 8))
"""If groups of neighbors share their random bits, a program serves so many neighbors of so many groups."""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


@functools.cache
def _functions() -> ModuleType:
    from . import triton_functions

    return triton_functions


@functools.cache
def _interpreted() -> bool:
    """Whether Triton's interpreter is on. triton is not imported to find that out where no variable asks for it."""
    return "TRITON_INTERPRET" in os.environ and _functions().INTERPRETED


@functools.cache
def _failure(index: int, dtype: torch.dtype) -> str:
    """Tries a kernel on this CUDA device, and returns why it cannot be compiled or launched there; "" if it can."""
    device = torch.device("cuda", index)
    try:
        with without_dispatch_modes(), torch.inference_mode(False):
            x, key = torch.ones(64, dtype=dtype, device=device), torch.zeros(2, dtype=torch.int64, device=device)
            half = MaskParams(ONE // 2, 2.0)
            expected = reference.masked(x, key, half, x.shape)
            if not all(torch.equal(masked(x, key, half, x.shape), expected) for _ in range(2)):
                raise RuntimeError("masks are not those of the reference")
    except Exception as error:  # compilers, drivers and libraries raise errors of any type
        why = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"torchdrop's Triton kernels do not take {dtype} on {device}: masks for it come from another backend "
            f"there, and may be others than those of the same seed elsewhere ({why})",
            UserWarning,
            stacklevel=2,
        )
        return why
    return ""


served: set[tuple[int | None, torch.dtype]] = set()
"""A kernel has run for these CUDA devices and element types."""


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    if device.type == "cuda" and (device.index, dtype) in served:
        return []
    reasons = [] if dtype in COMPUTE_DTYPE else [f"it takes {', '.join(map(str, COMPUTE_DTYPE))}, not {dtype}"]
    if not _installed():
        reasons.append("the package triton is not installed: it comes with PyTorch's CUDA builds for Linux")
    elif device.type == "cuda":
        why = "" if reasons else _why_not(device, dtype)
        if why:
            reasons.append(why)
    elif device.type != "cpu" or not _interpreted():
        reasons.append(
            f"it works on CUDA tensors, not on {device.type}; for tests, Triton's interpreter takes CPU tensors: set "
            "TRITON_INTERPRET=1 in the environment before Python starts"
        )
    return reasons


def _why_not(device: torch.device, dtype: torch.dtype) -> str:
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if torch.cuda.is_current_stream_capturing():
        return ""  # a trial would be captured
    index = torch.cuda.current_device() if device.index is None else device.index
    why = _failure(index, dtype)
    if why:
        return f"its kernels do not work on this machine: {why}"
    served.add((index, dtype))
    return ""


Values = tuple[int, int, float, float, float]
"""A kernel takes mask parameters as these: the threshold in two halves, scale, shift and fill. The upper half has 16
bits, so the lower half of 2**32 has 17."""


@functools.lru_cache(maxsize=4096)
def _values(params: MaskParams) -> Values:
    high = min(params.threshold >> 16, 0xFFFF)
    return high, params.threshold - (high << 16), params.scale, params.shift, params.fill


def _arguments_of(params: MaskParams | Tensor, linear: bool) -> tuple[Tensor | None, Values, bool]:
    """Returns the memory that a kernel reads mask parameters from, or None and their values.

    The third result says whether kept elements may be shifted, or dropped ones filled. With `linear` they are not.
    """
    params = params_by_value(params)
    if isinstance(params, Tensor):
        return params.contiguous(), (0, 0, 0.0, 0.0, 0.0), not linear
    if linear:
        params = params.linear()
    return None, _values(params), bool(params.shift or params.fill)


@functools.cache
def _vectors() -> int:
    return _INTERPRETED_VECTORS if _functions().INTERPRETED else _VECTORS


def _lanes(out: Tensor) -> int:
    """Counts the elements of a vector. There are eight at most, because a Philox block decides so many."""
    return min(16 // out.element_size(), 8)


_Starter = Callable[..., None]

_starters: dict[Any, _Starter] = {}
"""The functions that launch compiled kernels, by all that these are compiled for. Triton's own search would take
longer than everything else."""


def _launch(
    name: str,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    values: tuple[int | float, ...],
    constants: tuple[Any, ...],
    warps: int = _WARPS,
) -> _Starter | None:
    """Runs a kernel. All `tensors` except the key and the parameters have the same element type.

    Returns a function that launches the same kernel again, or None in the interpreter, which compiles nothing.
    """
    out = cast(Tensor, tensors[0])
    index = out.get_device()
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return _launch(name, programs, tensors, values, constants, warps)
    places = tuple([None if tensor is None else tensor.data_ptr() % 16 for tensor in tensors])
    variant = (name, index, out.dtype, places, constants, warps)
    start = _starters.get(variant)
    if start is not None:
        start(programs, *tensors, *values, *constants)
        return start
    # A fused multiplication and addition would be rounded once, and the reference rounds twice.
    kernel = getattr(_kernels(), name)[(programs,)]
    compiled = kernel(*tensors, *values, *constants, num_warps=warps, enable_fp_fusion=False)
    if compiled is None:
        return None
    start = _starters[variant] = _kernels().starter(compiled, index)
    return start


def _rows(
    makes: str,
    out: Tensor,
    x: Tensor | None,
    key: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    part: MaskSlice,
    linear: bool = False,
) -> None:
    """Runs the kernel for contiguous elements of a mask of shape ``key.shape[:-1] + shape``, for which `has_plan` is
    true. `makes` is "product", "mask" or "random_bits"."""
    rows, length, rows_per_key, pitch, params_for, given = plan_rows(key, params, shape, part)
    if rows * length == 0:
        return
    if params_for != "all":
        given = cast(Tensor, given).to(out.device).contiguous()
    lanes = _lanes(out)
    aligned = part.start % lanes == 0 and (
        rows == 1 or (length % lanes == 0 and (rows_per_key == 1 or pitch % lanes == 0))
    )
    skip = 0 if aligned else part.start % lanes if rows == 1 else lanes - 1
    short = skip + length <= _SHORT_VECTORS * lanes and rows > 1
    vectors = _SHORT_VECTORS if short else _vectors()
    chunks = -(-(skip + length) // (vectors * lanes))
    in_memory, values, affine = _arguments_of(given, linear)
    _launch(
        "rows", rows * chunks, (out, x, key.contiguous(), in_memory),
        (*values, part.start, length, pitch, rows_per_key, chunks),
        (makes, affine, params_for, rows == 1, aligned, vectors, lanes),
        1 if short else _WARPS,
    )  # fmt: skip


_ready: dict[tuple[int, torch.dtype], tuple[_Starter, int, tuple[Any, ...]]] = {}
"""The launches of `masked_row` for each device and element type, if tensors are aligned and parameters only scale: the
function that launches the kernel, the number of elements that a program serves, and the kernel's constants."""


def masked_row(x: Tensor, key: Tensor, params: MaskParams, out: Tensor | None = None) -> Tensor:
    """Does what `masked` does for a whole contiguous tensor under one contiguous key, in less time."""
    if out is None:
        out = torch.empty_like(x)
    n = x.numel()
    if not n:
        return out
    index, dtype, affine = x.get_device(), x.dtype, bool(params.shift or params.fill)
    aligned = not (affine or (out.data_ptr() | x.data_ptr() | key.data_ptr()) & 15)
    ready = _ready.get((index, dtype)) if aligned else None
    if ready is not None and (index < 0 or index == current_cuda_device()):
        start, elements, constants = ready
        programs = -(-n // elements)
        start(programs, out, x, key, None, *_values(params), 0, n, n, 1, programs, *constants)
        return out
    lanes, vectors = _lanes(out), _vectors()
    elements = vectors * lanes
    programs = -(-n // elements)
    constants = ("product", affine, "all", True, True, vectors, lanes)
    found = _launch("rows", programs, (out, x, key, None), (*_values(params), 0, n, n, 1, programs), constants)
    if aligned and found is not None:
        _ready[index, dtype] = found, elements, constants
    return out


_NO_PARAMS = MaskParams(0, 0.0)


def random_bits(shape: Sequence[int], key: Tensor, part: MaskSlice = WHOLE) -> Tensor:
    out = torch.empty((*key.shape[:-1], *shape), dtype=torch.int64, device=key.device)
    _rows("random_bits", out, None, key, _NO_PARAMS, shape, part)
    return out


standard_normal: Callable[..., Tensor] = reference.standard_normal
select = apply_mask


def keep_mask(shape: Sequence[int], key: Tensor, params: MaskParams | Tensor, part: MaskSlice = WHOLE) -> Tensor:
    if not has_plan(params, key, shape, part):
        return random_bits(shape, key, part) < unpack_params(params, key.device)[0]
    out = torch.empty((*key.shape[:-1], *shape), dtype=torch.bool, device=key.device)
    _rows("mask", out, None, key, params, shape, part)
    return out


def masked(
    x: Tensor,
    key: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    part: MaskSlice = WHOLE,
    out: Tensor | None = None,
    linear: bool = False,
) -> Tensor:
    if out is None:
        out = torch.empty_like(x)
    if linear and isinstance(params, MaskParams):
        params = params.linear()
    contiguous = x.is_contiguous() and out.is_contiguous()
    if contiguous and part == WHOLE and type(params) is MaskParams and key.dim() == 1 and tuple(shape) == x.shape:
        return masked_row(x, key.contiguous(), params, out)
    in_rows = (*key.shape[:-1], *shape) == x.shape and has_plan(params, key, shape, part)
    width = 0 if in_rows or part.run else group_size(x, key, params, shape)
    if not (in_rows or width):
        return apply_mask(x, keep_mask(shape, key, params, part), linear_part(params) if linear else params, out)
    if not contiguous:
        return out.copy_(masked(x.contiguous(), key, params, shape, part, None, linear))
    if in_rows:
        _rows("product", out, x, key, params, shape, part, linear)
    else:
        _groups(out, x, key, params, part.start, width, linear)
    return out


def _groups(
    out: Tensor, x: Tensor, key: Tensor, params: MaskParams | Tensor, start: int, width: int, linear: bool
) -> None:
    keys = math.prod(key.shape[:-1])
    count = x.numel() // (keys * width)
    tile_width, tile_groups = next((tile for tile in _TILES if width <= tile[0]), _TILES[-1])
    tiles, chunks = -(-(start % 8 + count) // tile_groups), -(-width // tile_width)
    in_memory, values, affine = _arguments_of(params, linear)
    _launch(
        "groups", keys * tiles * chunks, (out, x, key.contiguous(), in_memory),
        (*values, start, count, width, tiles, chunks), (affine, width % 8 == 0, tile_groups, tile_width),
    )  # fmt: skip


def dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor, key: Tensor, params: MaskParams | Tensor
) -> Tensor | None:
    if not (x.is_contiguous() and residual.is_contiguous() and (bias is None or bias.is_contiguous())):
        return None
    width = 0 if bias is None else bias.numel()
    if width >= 2**30:
        return None
    out, lanes, vectors = torch.empty_like(x), _lanes(x), _vectors()
    if x.numel():
        in_memory, values, affine = _arguments_of(params, True)
        _launch(
            "add", -(-x.numel() // (vectors * lanes)), (out, x, bias, residual, key.contiguous(), in_memory),
            (*values, x.numel(), width), (affine, width % lanes == 0, vectors, lanes),
        )  # fmt: skip
    return out


def activation_dropout(x: Tensor, key: Tensor, params: MaskParams | Tensor, activation: str) -> Tensor | None:
    return _activation(x, None, key, params, activation) if x.is_contiguous() else None


def _activation(x: Tensor, grad: Tensor | None, key: Tensor, params: MaskParams | Tensor, activation: str) -> Tensor:
    out, lanes, vectors = torch.empty_like(x), _lanes(x), _vectors()
    if x.numel():
        in_memory, values, affine = _arguments_of(params, True)
        _launch(
            "activation", -(-x.numel() // (vectors * lanes)), (out, x, grad, key.contiguous(), in_memory),
            (*values, x.numel()), (affine, activation, vectors, lanes),
        )  # fmt: skip
    return out


def activation_dropout_backward(
    grad: Tensor, kept: Tensor, key: Tensor, params: MaskParams | Tensor, activation: str
) -> Tensor | None:
    if not (grad.is_contiguous() and kept.is_contiguous()):
        return None
    if activation != "relu":
        return _activation(kept, grad, key, params, activation)
    out, elements = torch.empty_like(grad), _vectors() * _lanes(grad)
    if grad.numel():
        in_memory, values, _ = _arguments_of(params, True)
        _launch(
            "relu_backward", -(-grad.numel() // elements), (out, grad, kept, in_memory),
            (values[2], values[4], grad.numel()), (elements,),
        )  # fmt: skip
    return out

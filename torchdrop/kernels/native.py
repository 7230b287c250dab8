"""The native backend: C kernels from a small shared library, which is called through ctypes.

The kernels themselves (csrc/dropout.c) use neither Python nor libtorch: they get addresses and numbers. If Python's
headers were found, the library is also a module for CPython (csrc/module.c) with faster entry points for small tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_int, c_int64, c_uint64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .mask_params import MaskParams
from .masking import WHOLE, MaskSlice, apply_mask, unpack_params
from .rows import group_size, has_plan, plan_rows, varying_dims

NAME = "native"


class ElementType(IntEnum):
    """The numbers by which csrc/entry_points.h names element types."""

    FLOAT32 = 0
    FLOAT64 = 1
    BFLOAT16 = 2
    FLOAT16 = 3


class Operation(IntEnum):
    """The numbers by which csrc/entry_points.h names operations. It says there what each of them computes."""

    DROPOUT = 0
    RELU_DROPOUT = 1
    KEEP_MASK = 2
    RANDOM_BITS = 3
    STANDARD_NORMAL = 4
    DROPOUT_ADD = 5
    RELU_DROPOUT_BACKWARD = 6


ELEMENT_TYPES = {
    torch.float32: ElementType.FLOAT32,
    torch.float64: ElementType.FLOAT64,
    torch.bfloat16: ElementType.BFLOAT16,
    torch.float16: ElementType.FLOAT16,
}

_NO_ELEMENTS = ElementType.FLOAT32
"""The element type for operations that read no elements, which ignore it."""

NO_KEY = bytes(16)
"""The key for operations that use no random bits."""

_NO_PARAMS = MaskParams(0, 0.0)
"""The parameters for operations that use none."""

SERIAL = 2 * 16384
"""Below this many elements one thread does the work."""

ANY_WIDTH = -1
"""The C kernels use the widest instruction set that the processor has."""

_LIBRARY = Path(__file__).with_name("_native.dll" if sys.platform == "win32" else "_native.so")


def _typed(function: Any, result: Any, *arguments: Any) -> Any:
    function.restype, function.argtypes = result, arguments
    return function


class Library:
    """The functions of one compiled library, with their argument types. csrc/entry_points.h describes them."""

    def __init__(self, path: Path) -> None:
        lib = ctypes.CDLL(str(path))
        self.rows: Callable[..., None] = _typed(
            lib.td_rows, None, c_int, c_int, c_void_p, c_void_p, *[c_int64] * 3, c_uint64, c_int64, c_void_p, c_void_p,
            c_int64, c_int, c_int,
        )  # fmt: skip
        self.select: Callable[..., int] = _typed(
            lib.td_select, c_int, c_int, *[c_void_p] * 3, c_int, *[c_void_p] * 5, c_int, c_int
        )
        self.groups: Callable[..., None] = _typed(
            lib.td_groups, None, c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int
        )
        self.stratified: Callable[..., None] = _typed(
            lib.td_stratified, None, c_void_p, *[c_int64] * 3, *[c_void_p] * 3, c_int64, c_void_p, c_int, c_int
        )
        self.attention_weights: Callable[..., None] = _typed(
            lib.td_attention_weights, None, c_int, c_void_p, c_void_p, c_int, c_int
        )
        self.attention_gradients: Callable[..., None] = _typed(
            lib.td_attention_gradients, None, c_int, c_void_p, c_void_p, c_int, c_int
        )
        self.philox_block: Callable[..., None] = _typed(lib.td_philox_block, None, c_uint64, c_void_p, c_void_p)
        self.width: Callable[[], int] = _typed(lib.td_width, c_int)
        self.openmp: Callable[[], int] = _typed(lib.td_openmp, c_int)
        self.row: Callable[..., None]
        self.fused: Callable[..., None]
        self.row, self.fused = _entry_points(path)


EntryPoints = tuple[Callable[..., None], Callable[..., None]]
"""td_row and td_fused. Both take a key as 16 bytes."""


def _can_load_module() -> bool:
    """Whether this Python has the limited API that the library's module is compiled for.

    Objects have another layout if Python runs without its lock, or if it is built to be debugged. A wheel of
    this library is for any Python, which would load the module all the same.
    """
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    return not (free_threaded or hasattr(sys, "gettotalrefcount") or hasattr(sys, "getobjects"))


def _entry_points(path: Path) -> EntryPoints:
    if not _can_load_module():
        return entry_points_by_ctypes(ctypes.CDLL(str(path)))
    try:
        from . import _native  # type: ignore[attr-defined]

        return _native.row, _native.fused
    except ImportError:  # the library was compiled without Python's headers
        return entry_points_by_ctypes(ctypes.CDLL(str(path)))


def entry_points_by_ctypes(lib: ctypes.CDLL) -> EntryPoints:
    row = _typed(lib.td_row, None, c_int, c_int, c_void_p, c_void_p, c_int64, c_char_p, c_void_p, c_int)
    fused = _typed(
        lib.td_fused, None, c_int, c_int, *[c_void_p] * 3, c_int64, c_void_p, c_int64, c_char_p, c_void_p, c_int, c_int
    )
    return row, fused


def _share_openmp(torch_folder: Path) -> None:
    """Lets the library's calls of OpenMP go to the runtime that PyTorch has loaded, whatever its file is called.

    In PyTorch's wheels for Linux on x86-64 the runtime is called libgomp.so.1, as in the library, and the loader takes
    it for both. On aarch64 its name contains a hash. The library would get a runtime of its own, and idle threads of
    each runtime would keep the cores from threads of the other.
    """
    if sys.platform != "linux":
        return
    for runtime in [*torch_folder.glob("lib/libgomp*"), *torch_folder.parent.glob("torch.libs/libgomp*")]:
        with contextlib.suppress(OSError):  # PyTorch has not loaded it
            ctypes.CDLL(str(runtime), os.RTLD_GLOBAL | os.RTLD_NOLOAD)


_REINSTALL = "`pip install --no-cache-dir --force-reinstall --no-deps torchdrop` (pip keeps the wheel it has built)"


def _load() -> tuple[Library | None, str]:
    if not _LIBRARY.exists():
        return None, f"its C kernels were not built: install a C compiler (gcc or clang), then run {_REINSTALL}"
    _share_openmp(Path(torch.__file__).parent)
    try:
        return Library(_LIBRARY), ""
    except (OSError, AttributeError) as error:
        return None, _unloaded(error)


def _unloaded(error: Exception) -> str:
    runtime = re.search(r"\blib[gi]?omp[\w-]*\.(?:so|dylib|dll)[\w.]*", str(error))
    if runtime:
        return (
            f"the OpenMP runtime {runtime[0]}, which {_LIBRARY.name} needs, is missing ({error}): install it (package "
            "libgomp1 on Debian and Ubuntu, libgomp on Fedora and Alpine)"
        )
    return f"{_LIBRARY.name} could not be loaded ({error}): run {_REINSTALL}"


library: Library | None
why_not: str
library, why_not = _load()
"""The compiled kernels, or None and the reason."""

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    # GNU OpenMP's threads do not survive a fork, and a parallel region in the child would wait for them for ever.
    os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Returns PyTorch's number of threads, or 1 in a forked child. The mask does not depend on it."""
    return 1 if _forked else torch.get_num_threads()


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = [why_not] if library is None else []
    if device.type != "cpu":
        reasons.append(f"it works on CPU tensors, not on {device.type}")
    if dtype not in ELEMENT_TYPES:
        reasons.append(f"it takes {', '.join(map(str, ELEMENT_TYPES))}, not {dtype}")
    return reasons


def _rows(
    operation: Operation,
    element_type: ElementType,
    out: Tensor,
    x: Tensor | None,
    key: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    part: MaskSlice,
) -> None:
    """Runs an operation on contiguous elements of a mask of shape ``key.shape[:-1] + shape``, for which `has_plan` is
    true."""
    if not out.numel():
        return
    plan = plan_rows(key, params, shape, part)
    given, key = plan.params, key.contiguous()
    if isinstance(given, Tensor):
        if plan.params_for == "key":
            given = given.unsqueeze(-2).expand(*given.shape[:-1], plan.rows_per_key, 4)
        given = given.cpu().contiguous()
    library.rows(  # type: ignore[union-attr]
        operation, element_type, out.data_ptr(), None if x is None else x.data_ptr(), plan.rows, plan.length,
        max(plan.rows_per_key, 1), part.start, plan.pitch, key.data_ptr(), _address(given),
        0 if plan.params_for == "all" else 4, threads(), ANY_WIDTH,
    )  # fmt: skip


def random_bits(shape: Sequence[int], key: Tensor, part: MaskSlice = WHOLE) -> Tensor:
    out = torch.empty((*key.shape[:-1], *shape), dtype=torch.int64)
    _rows(Operation.RANDOM_BITS, _NO_ELEMENTS, out, None, key, _NO_PARAMS, shape, part)
    return out


def standard_normal(shape: Sequence[int], key: Tensor, part: MaskSlice = WHOLE) -> Tensor:
    out = torch.empty((*key.shape[:-1], *shape), dtype=torch.float64)
    _rows(Operation.STANDARD_NORMAL, _NO_ELEMENTS, out, None, key, _NO_PARAMS, shape, part)
    return out


def keep_mask(shape: Sequence[int], key: Tensor, params: MaskParams | Tensor, part: MaskSlice = WHOLE) -> Tensor:
    if not has_plan(params, key, shape, part):
        return random_bits(shape, key, part) < unpack_params(params, key.device)[0]
    out = torch.empty((*key.shape[:-1], *shape), dtype=torch.bool)
    _rows(Operation.KEEP_MASK, _NO_ELEMENTS, out, None, key, params, shape, part)
    return out


def stratified(shape: Sequence[int], shift: Tensor, choice: Tensor, offsets: Tensor, params: MaskParams) -> Tensor:
    samples, family = offsets.shape
    out = torch.empty((samples, *shift.shape[:-1], *shape), dtype=torch.bool)
    shift, choice, offsets = shift.contiguous(), choice.contiguous(), offsets.to(torch.int32).contiguous()
    library.stratified(  # type: ignore[union-attr]
        out.data_ptr(), samples, math.prod(shift.shape[:-1]), math.prod(shape), shift.data_ptr(), choice.data_ptr(),
        offsets.data_ptr(), family, params.address, threads(), ANY_WIDTH,
    )  # fmt: skip
    return out


def masked(
    x: Tensor,
    key: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    part: MaskSlice = WHOLE,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.empty_like(x)
    contiguous = x.is_contiguous() and out.is_contiguous()
    if (*key.shape[:-1], *shape) == x.shape and contiguous:
        if key.dim() == 1 and part == WHOLE and _is_single(params) and x.numel():
            return _whole_row(Operation.DROPOUT, x, key, params, out)
        if has_plan(params, key, shape, part):
            _rows(Operation.DROPOUT, ELEMENT_TYPES[x.dtype], out, x, key, params, shape, part)
            return out
    single_key = key.dim() == 1 and key.is_contiguous()
    group = group_size(x, key, params, shape) if part == WHOLE and contiguous and single_key else 0
    if group:
        params = _readable(params)
        library.groups(  # type: ignore[union-attr]
            ELEMENT_TYPES[x.dtype], out.data_ptr(), x.data_ptr(), x.numel() // group, group, key.data_ptr(),
            _address(params), threads(),
        )  # fmt: skip
        return out
    return select(x, keep_mask(shape, key, params, part), params, out)


def _is_single(params: MaskParams | Tensor) -> bool:
    return isinstance(params, MaskParams) or params.dim() == 1


def _whole_row(operation: Operation, x: Tensor, key: Tensor, params: MaskParams | Tensor, out: Tensor) -> Tensor:
    """Runs an operation on a whole contiguous tensor under one key, in fewer steps: each matters for small tensors."""
    n, readable = x.numel(), _readable(params)
    library.row(  # type: ignore[union-attr]
        operation, ELEMENT_TYPES[x.dtype], out.data_ptr(), x.data_ptr(), n, key_bytes(key), _address(readable),
        1 if n < SERIAL else threads(),
    )  # fmt: skip
    return out


def _readable(params: MaskParams | Tensor) -> MaskParams | Tensor:
    """Returns one set of parameters with its four numbers in a row in the host's memory."""
    return params if isinstance(params, MaskParams) else params.cpu().contiguous()


def _address(params: MaskParams | Tensor) -> int:
    return params.address if isinstance(params, MaskParams) else params.data_ptr()


def select(x: Tensor, kept: Tensor, params: MaskParams | Tensor, out: Tensor) -> Tensor:
    if varying_dims(params):
        return apply_mask(x, kept, params, out)
    _select(x, kept.expand(x.shape), params, out)
    return out


def _select(x: Tensor, kept: Tensor, params: MaskParams | Tensor, out: Tensor) -> None:
    """Applies a mask of x's shape to tensors of any strides, under one set of parameters.

    The kernel gets the dimensions in the order of the output's memory. Those that are adjacent in all three tensors are
    merged into one.
    """
    if not out.numel():
        return
    strides = zip(x.shape, out.stride(), x.stride(), kept.stride(), strict=True)
    dims: list[list[int]] = []
    for size, *steps in sorted((d for d in strides if d[0] != 1), key=lambda d: -d[1]):
        if dims and all(outer == inner * size for outer, inner in zip(dims[-1][1:], steps, strict=True)):
            dims[-1] = [dims[-1][0] * size, *steps]
        else:
            dims.append([size, *steps])
    columns = [(c_int64 * len(dims))(*column) for column in zip(*dims, strict=True)] if dims else [(c_int64 * 1)(1)] * 4
    readable = _readable(params if isinstance(params, MaskParams) else params.reshape(4))
    failed = library.select(  # type: ignore[union-attr]
        ELEMENT_TYPES[x.dtype], out.data_ptr(), x.data_ptr(), kept.data_ptr(), max(len(dims), 1), *columns,
        _address(readable), threads(), ANY_WIDTH,
    )  # fmt: skip
    if failed:
        raise RuntimeError(f"torchdrop's native kernels take at most 64 dimensions, got {x.dim()}")


def key_bytes(key: Tensor) -> bytes:
    key = key.contiguous()
    return ctypes.string_at(key.data_ptr(), 16)


def dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor, key: Tensor, params: MaskParams | Tensor
) -> Tensor | None:
    if not (x.is_contiguous() and residual.is_contiguous() and (bias is None or bias.is_contiguous())):
        return None
    readable, out = _readable(params), torch.empty_like(x)
    library.fused(  # type: ignore[union-attr]
        Operation.DROPOUT_ADD, ELEMENT_TYPES[x.dtype], out.data_ptr(), x.data_ptr(),
        None if bias is None else bias.data_ptr(), 1 if bias is None else bias.numel(), residual.data_ptr(), x.numel(),
        key_bytes(key), _address(readable), threads(), ANY_WIDTH,
    )  # fmt: skip
    return out


def activation_dropout(x: Tensor, key: Tensor, params: MaskParams | Tensor, activation: str) -> Tensor | None:
    if activation != "relu" or not x.is_contiguous():
        return None
    return _whole_row(Operation.RELU_DROPOUT, x, key, params, torch.empty_like(x))


def activation_dropout_backward(
    grad: Tensor, kept: Tensor, key: Tensor, params: MaskParams | Tensor, activation: str
) -> Tensor | None:
    if activation != "relu" or not (grad.is_contiguous() and kept.is_contiguous()):
        return None
    readable, out = _readable(params), torch.empty_like(grad)
    library.fused(  # type: ignore[union-attr]
        Operation.RELU_DROPOUT_BACKWARD, ELEMENT_TYPES[grad.dtype], out.data_ptr(), grad.data_ptr(), None, 1,
        kept.data_ptr(), grad.numel(), NO_KEY, _address(readable), threads(), ANY_WIDTH,
    )  # fmt: skip
    return out

"""Masks as functions of a key, and the backends that compute them.

A backend is a module with a NAME and six functions:

    unsupported_reasons(device, dtype)           why it cannot serve such tensors
    random_bits(shape, key, part)                32 random bits for each element
    standard_normal(shape, key, part)            standard normal variates
    keep_mask(shape, key, params, part)          whether random bits are below the threshold
    masked(x, key, params, shape, part, out)     x under such a mask
    select(x, kept, params, out)                 x under a mask that is given

The first backend that has no reasons against a tensor serves it. The native and the Triton backend also have kernels
for the fused operators: see `torchdrop.ops.fused`.

`key` is an int64 tensor with (seed, stream) in its last dimension. Its other dimensions are a batch of keys, which
comes before the mask's own `shape`. `part` says which elements of a larger mask are meant, for a caller that has only
some of them. `params` is a `MaskParams`, or a float64 tensor that has (threshold, scale, shift, fill) in its last
dimension and whose other dimensions broadcast against the mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from . import aten, native, reference, triton
from .mask_params import ONE, MaskParams
from .mask_params import linear as linear_part
from .masking import COMPUTE_DTYPE, WHOLE, MaskSlice, apply_normal, params_by_value, unpack_params

BACKENDS: tuple[ModuleType, ...] = (native, triton, aten, reference)
"""The backends, in the order in which they are tried."""

_forced: ModuleType | None = None
_told = False


def _named(name: str) -> ModuleType:
    for backend in BACKENDS:
        if name == backend.NAME:
            return backend
    raise ValueError(f"backend must be one of {', '.join(repr(b.NAME) for b in BACKENDS)}, got {name!r}")


def available_backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, list[str]]:
    """Returns for each backend, in the order in which they are tried, why it cannot serve such tensors: [] if it can.

    >>> available_backends()["reference"]
    []
    """
    device = torch.device(device)
    return {backend.NAME: backend.unsupported_reasons(device, dtype) for backend in BACKENDS}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend: within the context, for all threads, it serves every mask or raises with its reasons.

    Args:
        name: "native", "triton", "aten" or "reference". See `available_backends`.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend cannot work in this installation. A layer inside the context raises it as well, where
            the backend cannot serve that layer's input.

    >>> x, key = torch.ones(4), torch.tensor([1, 2])
    >>> params = MaskParams(2**31, 2.0)
    >>> with use_backend("reference"):
    ...     y = masked(x, key, params, x.shape)
    >>> torch.equal(y, masked(x, key, params, x.shape))
    True
    """
    global _forced
    backend = _named(name)
    _refuse_absent(backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def _refuse(backend: ModuleType, reasons: Sequence[str]) -> None:
    if reasons:
        raise RuntimeError(f"the {backend.NAME} backend cannot serve this: {'; '.join(reasons)}")


def _refuse_absent(backend: ModuleType) -> None:
    """Refuses a backend that can serve no device, for the reasons that hold on all of them."""
    reasons = backend.unsupported_reasons(torch.device("cpu"), torch.float32)
    if reasons:
        elsewhere = backend.unsupported_reasons(torch.device("cuda"), torch.float32)
        _refuse(backend, [reason for reason in reasons if reason in elsewhere])


def backend_for(device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    """Returns the backend that serves such tensors.

    Raises:
        RuntimeError: the forced backend cannot serve them, or none can. The message has the reasons.
    """
    if _forced is not None:
        _refuse(_forced, _forced.unsupported_reasons(device, dtype))
        return _forced
    if device.type == "cpu" and dtype in native.ELEMENT_TYPES and native.library is not None:
        return native
    if device.type == "cuda" and (device.index, dtype) in triton.served:
        return triton
    for backend in BACKENDS:
        interpreted = backend is triton and device.type == "cpu"  # tests force it
        if not interpreted and not backend.unsupported_reasons(device, dtype):
            if backend is aten and device.type == "cpu" and native.library is None:
                _tell_of_absence()
            return backend
    why = "; ".join(f"{b.NAME}: {', '.join(b.unsupported_reasons(device, dtype))}" for b in BACKENDS)
    raise RuntimeError(f"no backend serves {dtype} on {device}: {why}")


def _tell_of_absence() -> None:
    """Warns, once, that an installation has no compiled kernels."""
    global _told
    if not _told:
        _told = True
        warnings.warn(
            "torchdrop works without its compiled kernels here: the masks are the same, and take many times as long. "
            f"The reason: {native.why_not}",
            UserWarning,
            stacklevel=2,
        )


def masked(
    x: Tensor,
    key: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    part: MaskSlice = WHOLE,
    out: Tensor | None = None,
    linear: bool = False,
) -> Tensor:
    """Returns ``x * scale + shift`` where an element's random bits are below the threshold, and ``fill`` elsewhere.

    `shape` is the mask's shape without the keys' dimensions. It has ones where elements of x share their random bits.
    With `linear`, shift and fill are taken for 0.
    """
    given, backend = params if x.is_cpu else params_by_value(params), backend_for(x.device, x.dtype)
    if linear and backend is triton:
        return triton.masked(x, key, given, shape, part, out, linear)
    if linear:
        given = linear_part(params_by_value(given))
    return backend.masked(x, key, given, shape, part, out)


def gaussian(
    x: Tensor,
    key: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    part: MaskSlice = WHOLE,
    out: Tensor | None = None,
    linear: bool = False,
) -> Tensor:
    """Returns ``x * (1 + scale * z)`` with standard normal z of this shape, which is broadcast where it has ones.

    It is linear in x, with or without `linear`.
    """
    z = backend_for(x.device, x.dtype).standard_normal(shape, key, part)
    return apply_normal(x, z, params if x.is_cpu else params_by_value(params), out)


def select(x: Tensor, kept: Tensor, params: MaskParams | Tensor) -> Tensor:
    """Returns ``x * scale + shift`` where `kept`, and `fill` elsewhere, for x and a mask that broadcast together."""
    if x.shape != kept.shape:  # broadcast_shapes takes 15 us of Python
        x = x.expand(torch.broadcast_shapes(x.shape, kept.shape))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return backend_for(x.device, x.dtype).select(x, kept, params, out)


def keep_mask(shape: Sequence[int], key: Tensor, params: MaskParams | Tensor, part: MaskSlice = WHOLE) -> Tensor:
    """Returns the mask itself, as bools of shape ``key.shape[:-1] + shape``."""
    return backend_for(key.device).keep_mask(shape, key, params, part)


def stratified(
    shape: Sequence[int], shift: Tensor, choice: Tensor, offsets: Tensor, params: MaskParams | Tensor
) -> Tensor:
    """Returns masks of several samples that are strata of each other, as bools of shape ``(S,) + shift.shape[:-1] +
    shape``.

    An element is kept in sample s where ``(b + offsets[s, m]) mod 2**32`` is below the threshold. Its random bits under
    the key `shift` are b, and its random bits under the key `choice` are scaled to a member m of the family. `offsets`
    has the shape (S, family) and integers in [0, 2**32).
    """
    backend = backend_for(shift.device)
    if backend is native and isinstance(params, MaskParams):
        return native.stratified(shape, shift, choice, offsets, params)
    first, member = backend.random_bits(shape, shift), backend.random_bits(shape, choice) * offsets.shape[1] >> 32
    return (first + offsets[:, member] & ONE - 1) < unpack_params(params, shift.device)[0]


def random_bits(shape: Sequence[int], key: Tensor, part: MaskSlice = WHOLE) -> Tensor:
    """Returns the 32 random bits by which masks are decided, as int64 of shape ``key.shape[:-1] + shape``."""
    return backend_for(key.device).random_bits(shape, key, part)


def standard_normal(shape: Sequence[int], key: Tensor, part: MaskSlice = WHOLE) -> Tensor:
    """Returns standard normal variates, as float64 of shape ``key.shape[:-1] + shape``."""
    return backend_for(key.device).standard_normal(shape, key, part)


__all__ = [
    "BACKENDS",
    "COMPUTE_DTYPE",
    "WHOLE",
    "MaskParams",
    "MaskSlice",
    "available_backends",
    "backend_for",
    "gaussian",
    "keep_mask",
    "masked",
    "random_bits",
    "select",
    "standard_normal",
    "stratified",
    "use_backend",
]

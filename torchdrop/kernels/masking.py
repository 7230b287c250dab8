"""Slices of masks, and functions that apply masks and noise with PyTorch's own operations.

Backends use these functions if they have no kernel for the case at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.torch_state import transforms_active
from .mask_params import ONE, MaskParams, has_float64

COMPUTE_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""The element types that are served, and the types they are computed in. Half types are rounded once, at the end."""

SERVED = frozenset(COMPUTE_DTYPE)
"""The element types that are served. Compiled regions within compiled code cannot ask a dictionary what it contains."""


SERVED_COMPLEX = frozenset((torch.complex64, torch.complex128))
"""The complex element types whose real and imaginary parts some layers mask together."""


class MaskSlice(NamedTuple):
    """The elements of a larger mask that are wanted: element e has the index ``start + (e // run) * pitch + e % run``.

    So the slice is made of rows of `run` neighbors, which start `pitch` elements apart. With a run of 0 it is one row.
    """

    start: int = 0
    run: int = 0
    pitch: int = 0

    def rows(self, n: int) -> tuple[int, int, int]:
        """Returns how many rows n elements are, their length and their pitch.

        Raises:
            ValueError: they are not whole rows.
        """
        if not self.run:
            return 1, n, n
        if self.run < 0 or n % self.run:
            raise ValueError(f"the run of a part must divide its number of elements, got a run of {self.run} and {n}")
        return n // self.run, self.run, self.pitch


WHOLE = MaskSlice()


def params_by_value(params: MaskParams | Tensor) -> MaskParams | Tensor:
    """Returns parameters as a `MaskParams` where their tensor is one set in the host's memory, and unchanged otherwise.

    A kernel on another device then gets them by value. A copy of the tensor to the device would be waited for. Code
    that is traced must not call this function, because it reads the tensor's numbers.
    """
    if isinstance(params, MaskParams) or params.numel() != 4 or not params.is_cpu:
        return params
    threshold, scale, shift, fill = params.reshape(4).tolist()
    return MaskParams(int(min(max(0.0, threshold), ONE)), scale, shift, fill)  # a NaN keeps nothing


def unpack_params(params: MaskParams | Tensor, device: torch.device) -> tuple[float | Tensor, ...]:
    """Returns threshold, scale, shift and fill: numbers, or tensors that can be combined with tensors of `device`."""
    if isinstance(params, MaskParams):
        return params.threshold, params.scale, params.shift, params.fill
    if not has_float64(device):
        threshold, *others = params.unbind(-1)
        return threshold.to(torch.int64).to(device), *(other.to(torch.float32).to(device) for other in others)
    if params.dim() == 1 and params.is_cpu and not transforms_active():
        return params.unbind(-1)  # 0-d tensors of the host can be combined with tensors of any device
    return params.to(device).unbind(-1)


def masked_values(x: Tensor, kept: Tensor, params: MaskParams | Tensor) -> Tensor:
    """Returns ``x * scale + shift`` where `kept`, and `fill` elsewhere, in the element type that x is computed in.

    This is a select and not a product, so a dropped infinity or NaN becomes `fill`.
    """
    dtype = COMPUTE_DTYPE[x.dtype]
    _, scale, shift, fill = (v.to(dtype) if isinstance(v, Tensor) else v for v in unpack_params(params, x.device))
    value = x.to(dtype) * scale
    if not isinstance(params, MaskParams) or params.shift or params.fill:
        if not isinstance(fill, Tensor):
            fill = torch.full((), fill, dtype=dtype, device=x.device)  # a copy from the host would wait for CUDA
        return torch.where(kept, value + shift, fill)
    return torch.where(kept, value, torch.zeros((), dtype=dtype, device=x.device))


def apply_mask(x: Tensor, kept: Tensor, params: MaskParams | Tensor, out: Tensor | None = None) -> Tensor:
    """Rounds `masked_values` to x's element type, and writes them to `out` or to a new tensor with x's strides."""
    if out is None:
        out = torch.empty_like(x)
    return out.copy_(masked_values(x, kept, params))


def normal_values(x: Tensor, z: Tensor, params: MaskParams | Tensor) -> Tensor:
    """Returns ``x * (1 + scale * z)`` in x's element type. The factor is computed in double precision."""
    dtype = COMPUTE_DTYPE[x.dtype]
    factor = 1.0 + unpack_params(params, x.device)[1] * z
    return (x.to(dtype) * factor.to(dtype)).to(x.dtype)


def apply_normal(x: Tensor, z: Tensor, params: MaskParams | Tensor, out: Tensor | None = None) -> Tensor:
    """Writes `normal_values` to `out` or to a new tensor with x's strides."""
    dtype = COMPUTE_DTYPE[x.dtype]
    factor = 1.0 + unpack_params(params, x.device)[1] * z
    if out is None:
        out = torch.empty_like(x)
    return out.copy_(x.to(dtype) * factor.to(dtype))


def scaled_where(kept: Tensor, x: Tensor, scale: Tensor | float) -> Tensor:
    """Returns ``x * scale`` where kept, and 0 elsewhere. Half types are rounded once."""
    if isinstance(scale, float):
        return torch.where(kept, x * scale, 0.0)
    wide = COMPUTE_DTYPE[x.dtype]
    return torch.where(kept, x.to(wide) * scale.to(wide), 0.0).to(x.dtype)

"""Tensors that are refused before anything is drawn or written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels.masking import COMPUTE_DTYPE, SERVED, SERVED_COMPLEX
from .torch_state import is_compiling, is_usual_view


def check_input(input: Any, name: str, complex_too: bool = False) -> None:
    """Refuses, before anything is drawn, an input that no kernel takes, or that the forced backend does not.

    Args:
        input: what a user gave.
        name: the name of the caller.
        complex_too: whether the caller serves complex numbers, as pairs of floating-point ones.

    Raises:
        TypeError: `input` is no tensor or has another layout than strided.
        RuntimeError: an integer tensor, with the start of torch.nn's message; or the forced backend cannot serve it.
        NotImplementedError: a complex tensor, or another element type that is not served.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}")
    dtype = input.dtype
    if complex_too and dtype in SERVED_COMPLEX:
        dtype = torch.float64 if dtype is torch.complex128 else torch.float32
    if dtype not in SERVED:
        served = ", ".join(str(d).removeprefix("torch.") for d in COMPUTE_DTYPE)
        if not (dtype.is_floating_point or dtype.is_complex):
            kind = (
                "Bool" if dtype is torch.bool else "Long" if dtype is torch.int64 else str(dtype).removeprefix("torch.")
            )
            raise RuntimeError(
                f"result type Float can't be cast to the desired output type {kind}: {name} takes {served} tensors; "
                "convert the input with .float() first"
            )
        raise NotImplementedError(f"{name} is not implemented for {dtype}: it takes {served} tensors")
    if input.layout is not torch.strided:
        raise TypeError(
            f"{name} takes strided tensors, got the layout {input.layout}: apply it to the tensor of values"
        )
    if kernels._forced is not None:
        kernels.backend_for(input.device, dtype)


def check_inplace(input: Tensor) -> None:
    """Refuses, with PyTorch's words, a tensor that must not be written to, before it is. Compiled code cannot recognize
    views, so PyTorch refuses them there.

    Raises:
        RuntimeError: a leaf that requires a gradient, a view of one, one of several views of a tensor, a view that was
            made under other rules of autograd, an inference tensor, or a tensor whose elements share memory.
    """
    if torch.is_grad_enabled() and input.requires_grad:
        is_view = not is_compiling() and input._is_view()
        if is_view and not is_usual_view(input):
            input.mul_(1)  # PyTorch says why it refuses, before it writes
        if input.is_leaf:
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        base = input._base if is_view else None
        if base is not None and base.is_leaf and base.requires_grad:
            raise RuntimeError("a view of a leaf Variable that requires grad is being used in an in-place operation.")
    if not is_compiling() and input.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed. You can make a clone to get a "
            "normal tensor before doing inplace update."
        )
    if any(stride == 0 and size > 1 for size, stride in zip(input.shape, input.stride(), strict=True)):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )

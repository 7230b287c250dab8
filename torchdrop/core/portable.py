"""Dropout in PyTorch's own operators and random numbers, for graphs that are to run without our operators.

These are the graphs of torch.jit.trace and of torch.onnx.export. Their draws have the same distribution, but not the
bits that a key gives.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..kernels.mask_params import ONE, MaskParams, has_float64
from ..kernels.masking import COMPUTE_DTYPE, unpack_params
from ..ops import operators, random_bits
from .torch_state import constant_when_compiled, is_compiling, tracing_state


def is_wanted(compiling: bool) -> bool:
    """Whether the current call becomes a part of such a graph."""
    return is_in_onnx_export() if compiling else tracing_state() is not None


@constant_when_compiled
def is_in_onnx_export() -> bool:
    """Whether the code that is compiled now is for ONNX."""
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")  # not imported: no export
    return flags is not None and torch.onnx.is_in_onnx_export()


def numbered(shape: Sequence[int]) -> Sequence[int]:
    """Returns sizes as integers. In torch.jit.trace they are tensors: it warns that they become constants."""
    return shape if is_compiling() or tracing_state() is None else tuple(int(size) for size in shape)


def refuse_script(layer: nn.Module) -> NoReturn:
    """Refuses to be compiled: torch.jit.script calls this before it compiles a module.

    Raises:
        RuntimeError: always. The message has the remedy.
    """
    kind = type(layer)
    has_twin = any(base.__module__ == "torch.nn.modules.dropout" for base in kind.__mro__ if base is not _DropoutNd)
    remedy = "put torch.nn's layer in its place with torchdrop.replace(model, to='torch'), or " if has_twin else ""
    raise RuntimeError(
        f"torch.jit.script cannot compile torchdrop's {kind.__name__}: {remedy}use torch.jit.trace, with the model in "
        "eval mode for inference"
    )


def _check(generator: torch.Generator | None) -> None:
    if generator is not None:
        raise RuntimeError(
            "a graph of torch.jit.trace or torch.onnx.export cannot draw from a generator of a layer's own: set its "
            "generator to None, or put the model in eval mode"
        )


def apply(
    operator: operators.Operator,
    input: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    inplace: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """Computes what `sites.apply` computes."""
    _check(generator)
    if isinstance(params, MaskParams) and params.threshold == ONE:
        return input
    dtype = COMPUTE_DTYPE[input.dtype]
    threshold, scale, shift, fill = unpack_params(params, input.device)
    if operator is operators.gaussian:
        out = input.to(dtype) * (1.0 + scale * _normal(input, shape)).to(dtype)
    else:
        kept = _words(input, shape) < threshold
        value = input * scale + shift
        out = torch.where(kept, value.to(dtype), torch.zeros((), dtype=dtype, device=input.device) + fill)
    out = out.to(input.dtype)
    return input.copy_(out) if inplace else out


def numbers(
    kind: random_bits.Numbers,
    like: Tensor,
    shape: Sequence[int],
    generator: torch.Generator | None,
    params: MaskParams | Tensor | None,
) -> Tensor:
    """Draws what `sites.draw` draws."""
    _check(generator)
    if kind is random_bits.standard_normal:
        return _normal(like, shape)
    words = _words(like, shape).to(torch.int64)
    return words if params is None else words < unpack_params(params, like.device)[0]


def _words(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Draws uniform numbers in [0, 2**32). ONNX has only random numbers of floating point."""
    if not has_float64(like.device):
        return torch.randint(ONE, tuple(shape), device=like.device)
    return torch.rand(tuple(shape), dtype=torch.float64, device=like.device) * ONE


def _normal(like: Tensor, shape: Sequence[int]) -> Tensor:
    dtype = torch.float64 if has_float64(like.device) else torch.float32
    return torch.randn(tuple(shape), dtype=dtype, device=like.device)

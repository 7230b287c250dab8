"""Dropout fused with the operation next to it: one pass over memory instead of two, and nothing more kept for backward.

With m a mask of x's shape and k its keep probability, the operators are

    dropout_add         residual + m (x + bias) / k
    activation_dropout  m f(x) / k, with f the rectifier or GELU

They take a mask's threshold and scale, not its shift and fill, as do the kernels that backends have for them. Each is
one kernel if the backend has one for the case at hand, and is composed of its plain parts otherwise, with the same
result: half types are computed in float32 and rounded once at the end (except for the parts of GELU, which each round
their result). Backward draws the mask again from the key. A rectifier also keeps its output, zero where either of the
two made it zero; GELU keeps its input, as it does alone.

The derivatives are `_add_gradients` and `gradient`. The registered backwards and the lean nodes `_Added` and
`_Activated` call them, for the reasons that ops/operators.py gives: in eager mode the lean nodes take less than half
the time. The nodes of ops/fast_path.py call them where a gradient is not what they expect.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..core.torch_inductor import lower_in_inductor
from ..core.torch_state import (
    dispatch_modes,
    is_compiling,
    is_plain,
    node_of,
    transforms_active,
)
from ..kernels import inductor, native, triton
from ..kernels.mask_params import MaskParams, tensor_beside
from ..kernels.masking import COMPUTE_DTYPE, WHOLE
from .arguments import check_activation, check_activation_backward, check_add
from .operators import fitting, masked

Drop = Callable[[Tensor], Tensor]
"""A function that masks a tensor and scales it, or leaves it as it is."""

FUSED = (native, triton)
"""The backends with kernels for these operators."""


class Activation(NamedTuple):
    """An elementwise function, its gradient from the tensor kept for it, and whether that is its output."""

    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    keeps_output: bool = False


def _gelu(approximate: str) -> Activation:
    return Activation(
        partial(F.gelu, approximate=approximate), partial(torch.ops.aten.gelu_backward, approximate=approximate)
    )


ACTIVATIONS = {
    "relu": Activation(torch.relu, partial(torch.ops.aten.threshold_backward, threshold=0), keeps_output=True),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}


def composed_add(x: Tensor, bias: Tensor | None, residual: Tensor, drop: Drop) -> Tensor:
    """Returns ``residual + drop(x + bias)``, rounded once."""
    wide = COMPUTE_DTYPE[x.dtype]
    whole = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    return (drop(whole) + residual.to(wide)).to(x.dtype)


def composed_activation(x: Tensor, activation: str, drop: Drop) -> Tensor:
    """Returns ``drop(f(x))``. GELU rounds its own result, so half types are rounded twice there."""
    return drop(ACTIVATIONS[activation].function(x))


def _composed_gradient(grad: Tensor, kept: Tensor, activation: str, drop: Drop) -> Tensor:
    return ACTIVATIONS[activation].gradient(drop(grad), kept)


def _written(key: Tensor, params: MaskParams | Tensor) -> Drop:
    """Returns a function that writes its result to the tensor it is given."""
    return lambda x: kernels.masked(x, key, params, x.shape, WHOLE, x, True)


def _fresh(key: Tensor, params: MaskParams | Tensor) -> Drop:
    return lambda x: kernels.masked(x, key, params, x.shape, WHOLE, None, True)


def _differentiable(key: Tensor, params: MaskParams | Tensor) -> Drop:
    return lambda x: masked(x, key, params, x.shape, False, WHOLE, True)


def _kernel(x: Tensor) -> Any:
    """Returns the backend for x if it has kernels for these operators, or None."""
    backend = kernels.backend_for(x.device, x.dtype)
    return backend if backend in FUSED else None


def _laid_out_as(x: Tensor, out: Tensor) -> Tensor:
    """Returns `out` with the strides of ``empty_like(x)``, as compiled code was told; plain parts may have others."""
    promised = torch.empty_like(x, device="meta").stride()
    return out if out.stride() == promised else torch.empty_like(x).copy_(out)


def _add(x: Tensor, bias: Tensor | None, residual: Tensor, key: Tensor, params: MaskParams | Tensor) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    backend = _kernel(x)
    by_column = bias is None or bias.shape == x.shape[-1:]
    out = None
    if backend is not None and by_column:
        out = backend.dropout_add(x, bias, residual, key, params)
    if out is None:
        out = _laid_out_as(x, composed_add(x, bias, residual, _fresh(key, params)))
    return out


def _activation(x: Tensor, key: Tensor, params: MaskParams | Tensor, activation: str) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    backend = _kernel(x)
    out = None
    if backend is not None:
        out = backend.activation_dropout(x, key, params, activation)
    return out if out is not None else _laid_out_as(x, composed_activation(x, activation, _written(key, params)))


def _activation_backward(
    grad: Tensor, kept: Tensor, key: Tensor, params: MaskParams | Tensor, activation: str
) -> Tensor:
    if grad.numel() == 0:
        return torch.empty_like(grad)
    backend = _kernel(grad)
    out = backend.activation_dropout_backward(grad, kept, key, params, activation) if backend is not None else None
    return (
        out if out is not None else _laid_out_as(grad, _composed_gradient(grad, kept, activation, _fresh(key, params)))
    )


# The registered operators, which compiled and exported code calls.

torch.library.define(
    "torchdrop::dropout_add", "(Tensor x, Tensor? bias, Tensor residual, Tensor key, Tensor params) -> Tensor"
)
torch.library.define("torchdrop::activation_dropout", "(Tensor x, Tensor key, Tensor params, str activation) -> Tensor")
torch.library.define(
    "torchdrop::activation_dropout_backward",
    "(Tensor grad, Tensor kept, Tensor key, Tensor params, str activation) -> Tensor",
)


def _implement(name: str, run: Callable[..., Tensor], check: Callable[..., None]) -> None:
    qualified, registered = f"torchdrop::{name}", getattr(torch.ops.torchdrop, name).default

    @torch.library.impl(qualified, "default")
    def implementation(x: Tensor, *args: Any) -> Tensor:
        check(qualified, x, *args)
        return run(x, *args)

    @torch.library.register_fake(qualified)
    def fake(x: Tensor, *args: Any) -> Tensor:
        check(qualified, x, *args)
        lower_in_inductor(registered, getattr(inductor, name))  # it is loaded by now if it compiles this call
        return torch.empty_like(x)


_implement("dropout_add", _add, check_add)
_implement("activation_dropout", _activation, partial(check_activation, known=ACTIVATIONS))
_implement("activation_dropout_backward", _activation_backward, partial(check_activation_backward, known=ACTIVATIONS))


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, _, key, params = inputs
    ctx.shape, ctx.bias = x.shape, None if bias is None else bias.shape
    ctx.save_for_backward(key, params)


def _add_gradients(
    ctx: Any, grad: Tensor, key: Tensor, params: MaskParams | Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of x, bias and residual."""
    of_x, of_bias, of_residual = ctx.needs_input_grad[:3]
    grad = fitting(grad, ctx.shape, key.device)
    dropped = _differentiable(key, params)(grad) if of_x or of_bias else None
    summed = dropped.sum_to_size(ctx.bias) if of_bias and dropped is not None else None
    return dropped if of_x else None, summed, grad if of_residual else None


def _add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_add_gradients(ctx, grad, *ctx.saved_tensors), None, None


torch.library.register_autograd("torchdrop::dropout_add", _add_backward, setup_context=_add_setup)


def _activation_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, key, params, ctx.activation = inputs
    ctx.save_for_backward(output if ACTIVATIONS[ctx.activation].keeps_output else x, key, params)


def _activation_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    kept, key, params = ctx.saved_tensors
    return gradient(grad, kept, key, params, ctx.activation), None, None, None


torch.library.register_autograd("torchdrop::activation_dropout", _activation_gradient, setup_context=_activation_setup)


def gradient(grad: Tensor, kept: Tensor, key: Tensor, params: MaskParams | Tensor, activation: str) -> Tensor:
    """Returns the gradient of `activation_dropout`, in one pass if it is not to be differentiated again."""
    grad = fitting(grad, kept.shape, kept.device)
    if not torch.is_grad_enabled():
        if is_compiling() or dispatch_modes():
            tensor = tensor_beside(params, grad.device)
            return torch.ops.torchdrop.activation_dropout_backward(grad, kept, key, tensor, activation)
        if is_plain(grad) and is_plain(kept) and grad.dtype == kept.dtype:
            return _activation_backward(grad, kept, key, params, activation)
    return _composed_gradient(grad, kept, activation, _differentiable(key, params))


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, key: Tensor, params: MaskParams | Tensor
    ) -> Tensor:
        ctx.key, ctx.params, ctx.shape, ctx.bias = key, params, x.shape, None if bias is None else bias.shape
        return _add(x, bias, residual, key, params)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_add_gradients(ctx, grad, ctx.key, ctx.params), None, None


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, params: MaskParams | Tensor, activation: str) -> Tensor:
        out = _activation(x, key, params, activation)
        ctx.key, ctx.params, ctx.activation = key, params, activation
        ctx.save_for_backward(out if ACTIVATIONS[activation].keeps_output else x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (kept,) = ctx.saved_tensors
        return gradient(grad, kept, ctx.key, ctx.params, ctx.activation), None, None, None


# Function.apply looks for transforms first; `is_plain` has seen that there are none.
_record_add = node_of(_Added)
_record_activation = node_of(_Activated)


def _fusible(key: Tensor, params: MaskParams | Tensor, *operands: Tensor) -> bool:
    """Whether one kernel can do it: one key, one set of parameters, and tensors that are plain."""
    single = key.dim() == 1 and (isinstance(params, MaskParams) or params.dim() == 1)
    if is_compiling():
        return single and not transforms_active()
    return single and all(map(is_plain, operands))


def dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, key: Tensor, params: MaskParams | Tensor) -> Tensor:
    """Returns ``residual + m (x + bias) / k``, differentiable in all three; bias may be None."""
    operands = (x, residual) if bias is None else (x, bias, residual)
    if not _fusible(key, params, *operands):
        return composed_add(x, bias, residual, _differentiable(key, params))
    if is_compiling():
        tensor = tensor_beside(params, x.device)
        return torch.ops.torchdrop.dropout_add(x, bias, residual, key, tensor)
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        return _record_add(x, bias, residual, key, params)
    return _add(x, bias, residual, key, params)


def activation_dropout(x: Tensor, key: Tensor, params: MaskParams | Tensor, activation: str) -> Tensor:
    """Returns ``m f(x) / k``, differentiable in x.

    Args:
        activation: the name of f in `ACTIVATIONS`.
    """
    if not _fusible(key, params, x):
        return composed_activation(x, activation, _differentiable(key, params))
    if is_compiling():
        tensor = tensor_beside(params, x.device)
        return torch.ops.torchdrop.activation_dropout(x, key, tensor, activation)
    if x.requires_grad and torch.is_grad_enabled():
        return _record_activation(x, key, params, activation)
    return _activation(x, key, params, activation)

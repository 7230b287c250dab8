"""The fast path: dropout of contiguous tensors in eager mode, where Python's overhead is most of a small one's cost.

It returns what the general path returns (tests compare them) with fewer calls. On the CPU the key is drawn as 16 bytes
instead of a tensor, and the kernel is called with addresses. On CUDA the key stays a tensor in the device's memory.
Backward needs only the key and the parameters, and for relu its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import kernels, random
from ..core.torch_state import function_modes, is_observed, is_watched, lean_node_of, without_function_modes
from ..kernels import native, triton
from ..kernels.mask_params import ONE, MaskParams
from . import fused, operators

_CPU = torch.device("cpu")
_empty_like = torch.empty_like
_strided = torch.strided
_is_grad_enabled = torch.is_grad_enabled
_key = random.key_bytes
_threads = native.threads
_SERIAL = native.SERIAL
# Plain integers: C takes them in less time than members of an enumeration.
_element_type_of = {dtype: int(number) for dtype, number in native.ELEMENT_TYPES.items()}.get
_row: Any = native.library.row if native.library is not None else None
_groups: Any = native.library.groups if native.library is not None else None
_fused: Any = native.library.fused if native.library is not None else None
_DROPOUT, _RELU_DROPOUT = int(native.Operation.DROPOUT), int(native.Operation.RELU_DROPOUT)
_DROPOUT_ADD, _RELU_DROPOUT_BACKWARD = int(native.Operation.DROPOUT_ADD), int(native.Operation.RELU_DROPOUT_BACKWARD)
_ANY_WIDTH = native.ANY_WIDTH

State = tuple[int, int, bytes, int, MaskParams]
"""Element type, number of elements, key, address of the parameters, and the parameters."""


def _unseen(path: Callable[..., Tensor | None], *args: Any) -> Tensor | None:
    """Takes a fast path under function modes, if all they do is name a default device: every device is named here.

    The modes are set aside meanwhile, because they would be called at each look at a tensor.
    """
    if is_watched():
        return None
    with without_function_modes():
        return path(*args, True)


def _served_element_type(x: Tensor) -> int | None:
    """Returns the element type of a CPU tensor that is one row in memory, or None if the fast path does not serve
    it."""
    cls = type(x)
    if (
        (cls is not Tensor and cls is not Parameter)
        or x.layout is not _strided
        or x.is_neg()
        or not x.is_cpu
        or not x.is_contiguous()
        or _row is None
        or random.frozen
        or kernels._forced is not None
        or is_observed()
    ):
        return None
    return _element_type_of(x.dtype)


def _is_served_row(x: Tensor) -> bool:
    """Whether it is a CUDA tensor that is one row in memory, and kernels for its type have run on its device."""
    cls = type(x)
    return (
        (cls is Tensor or cls is Parameter)
        and x.is_cuda
        and (x.get_device(), x.dtype) in triton.served
        and x.layout is _strided
        and not x.is_neg()
        and x.is_contiguous()
        and x.data_ptr() != 0
        and not random.frozen
        and kernels._forced is None
        and not is_observed()
    )


def fast_dropout(x: Tensor, params: MaskParams, unseen: bool = False) -> Tensor | None:
    """Returns inverted dropout of x, or None if the fast path does not serve it.

    It serves x under function modes if these do not have to see the call. Only `_unseen` sets `unseen`.
    """
    if function_modes() and not unseen:
        return _unseen(fast_dropout, x, params)
    element_type = _served_element_type(x)
    if element_type is None:
        return _dropout_on_cuda(x, params) if _is_served_row(x) else None
    n, source = x.numel(), x.data_ptr()
    if not source:
        return None
    _key.draw()
    if params.threshold == ONE:
        return x
    key = _key.memory.raw
    if x.requires_grad and _is_grad_enabled():
        return _record(x, (element_type, n, key, params.address, params))
    out = _empty_like(x)
    _row(_DROPOUT, element_type, out.data_ptr(), source, n, key, params.address, 1 if n < _SERIAL else _threads())
    return out


def _dropout_on_cuda(x: Tensor, params: MaskParams) -> Tensor:
    key = random.cuda_key(x.get_device())
    if params.threshold == ONE:
        return x
    if x.requires_grad and _is_grad_enabled():
        return _record_on_cuda(x, key, params)
    return triton.masked_row(x, key, params)


def fast_channel_dropout(x: Tensor, params: MaskParams, mask: Sequence[int], unseen: bool = False) -> Tensor | None:
    """Returns inverted dropout under a mask of this shape, which is x's with ones at its end; or None as `fast_dropout`
    does."""
    if function_modes() and not unseen:
        return _unseen(fast_channel_dropout, x, params, mask)
    element_type = _served_element_type(x)
    if element_type is None or not x.data_ptr():
        return None
    _key.draw()
    if params.threshold == ONE:
        return x
    n = x.numel()
    state, group = (element_type, n, _key.memory.raw, params.address, params), n // math.prod(mask)
    if x.requires_grad and _is_grad_enabled():
        return _record_channels(x, state, mask, group)
    return _grouped(x, state, group)


def fast_dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor, params: MaskParams, unseen: bool = False
) -> Tensor | None:
    """Returns dropout with a residual added after it and a bias before it, or None as `fast_dropout` does."""
    if function_modes() and not unseen:
        return _unseen(fast_dropout_add, x, bias, residual, params)
    element_type = _served_element_type(x)
    if (
        element_type is None
        or _served_element_type(residual) != element_type
        or residual.shape != x.shape
        or not x.data_ptr()
        or not residual.data_ptr()
    ):
        return None
    if bias is not None and (_served_element_type(bias) != element_type or bias.shape != x.shape[-1:]):
        return None
    _key.draw()
    if params.threshold == ONE:
        return fused.composed_add(x, bias, residual, lambda whole: whole)
    state = (element_type, x.numel(), _key.memory.raw, params.address, params)
    wanted = x.requires_grad or residual.requires_grad or (bias is not None and bias.requires_grad)
    return _record_add(x, bias, residual, state) if wanted and _is_grad_enabled() else _added(x, bias, residual, state)


def fast_activation_dropout(x: Tensor, params: MaskParams, activation: str, unseen: bool = False) -> Tensor | None:
    """Returns inverted dropout of an activation of x, or None as `fast_dropout` does."""
    if function_modes() and not unseen:
        return _unseen(fast_activation_dropout, x, params, activation)
    element_type = _served_element_type(x)
    if element_type is None or not x.data_ptr():
        return None
    _key.draw()
    if params.threshold == ONE:
        return fused.ACTIVATIONS[activation].function(x)
    state = (element_type, x.numel(), _key.memory.raw, params.address, params)
    recorded = x.requires_grad and _is_grad_enabled()
    if activation == "relu":
        return _record_relu(x, state) if recorded else _rectified(x, state)
    return _record_gelu(x, state, activation) if recorded else _gelu(x, state, activation)


def _again(grad: Tensor, state: State, shape: Sequence[int]) -> Tensor:
    """Applies the derivative, which is forward's map under the linear part of the parameters."""
    if _is_row(grad, shape, state[0]):
        return _masked(grad, state)
    _, _, key, _, params = state
    return operators.masked(operators.fitting(grad, shape, _CPU), random.key_tensor(key), params, shape)


def _is_row(grad: Tensor, shape: Sequence[int], element_type: int, device: int = -1) -> bool:
    """Whether a gradient is like the output, is one row in memory, and nothing has to see the call.

    Autograd always gives a gradient like the output, but a node may be called by hand.
    """
    if (
        type(grad) is not Tensor
        or grad.shape != shape
        or _element_type_of(grad.dtype) != element_type
        or grad.get_device() != device
        or not grad.is_contiguous()
        or grad.is_neg()
        or _is_grad_enabled()
        or is_observed()
    ):
        return False
    try:
        return grad.data_ptr() != 0
    except RuntimeError:  # the batched gradients of autograd.grad have no memory
        return False


def _masked(x: Tensor, state: State) -> Tensor:
    element_type, n, key, address, _ = state
    out = _empty_like(x)
    _row(_DROPOUT, element_type, out.data_ptr(), x.data_ptr(), n, key, address, 1 if n < _SERIAL else _threads())
    return out


def _grouped(x: Tensor, state: State, group: int) -> Tensor:
    element_type, n, key, address, _ = state
    out = _empty_like(x)
    threads = 1 if n < _SERIAL else _threads()
    _groups(element_type, out.data_ptr(), x.data_ptr(), n // group, group, key, address, threads)
    return out


def _added(x: Tensor, bias: Tensor | None, residual: Tensor, state: State) -> Tensor:
    element_type, n, key, address, _ = state
    out = _empty_like(x)
    _fused(
        _DROPOUT_ADD, element_type, out.data_ptr(), x.data_ptr(), None if bias is None else bias.data_ptr(),
        1 if bias is None else bias.numel(), residual.data_ptr(), n, key, address, 1 if n < _SERIAL else _threads(),
        _ANY_WIDTH,
    )  # fmt: skip
    return out


def _rectified(x: Tensor, state: State) -> Tensor:
    element_type, n, key, address, _ = state
    out = _empty_like(x)
    _row(_RELU_DROPOUT, element_type, out.data_ptr(), x.data_ptr(), n, key, address, 1 if n < _SERIAL else _threads())
    return out


def _gelu(x: Tensor, state: State, activation: str) -> Tensor:
    """Applies the mask in place, to the output of GELU."""
    element_type, n, key, address, _ = state
    out = fused.ACTIVATIONS[activation].function(x)
    _row(_DROPOUT, element_type, out.data_ptr(), out.data_ptr(), n, key, address, 1 if n < _SERIAL else _threads())
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, state: State) -> Tensor:
        ctx.state, ctx.shape = state, x.shape
        element_type, n, key, address, _ = state
        out = _empty_like(x)
        _row(_DROPOUT, element_type, out.data_ptr(), x.data_ptr(), n, key, address, 1 if n < _SERIAL else _threads())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _again(grad, ctx.state, ctx.shape), None


class _DropoutOnCUDA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, params: MaskParams) -> Tensor:
        ctx.key, ctx.params, ctx.shape, ctx.element_type = key, params, x.shape, _element_type_of(x.dtype)
        return triton.masked_row(x, key, params)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        key, params, shape = ctx.key, ctx.params, ctx.shape
        if _is_row(grad, shape, ctx.element_type, key.get_device()):
            return triton.masked_row(grad, key, params), None, None
        return operators.masked(operators.fitting(grad, shape, key.device), key, params, shape), None, None


class _ChannelDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, state: State, mask: Sequence[int], group: int) -> Tensor:
        ctx.state, ctx.shape, ctx.mask, ctx.group = state, x.shape, mask, group
        return _grouped(x, state, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        element_type, _, key, _, params = ctx.state
        if _is_row(grad, ctx.shape, element_type):
            return _grouped(grad, ctx.state, ctx.group), None, None, None
        grad = operators.fitting(grad, ctx.shape, _CPU)
        return operators.masked(grad, random.key_tensor(key), params, ctx.mask), None, None, None


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, state: State) -> Tensor:
        ctx.state, ctx.shape, ctx.bias = state, x.shape, None if bias is None else bias.shape
        return _added(x, bias, residual, state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        of_x, of_bias, of_residual, _ = ctx.needs_input_grad
        if _is_row(grad, ctx.shape, ctx.state[0]):
            dropped = _masked(grad, ctx.state) if of_x or of_bias else None
        else:
            grad = operators.fitting(grad, ctx.shape, _CPU)
            dropped = _again(grad, ctx.state, ctx.shape) if of_x or of_bias else None
        summed = dropped.sum_to_size(ctx.bias) if of_bias and dropped is not None else None
        return dropped if of_x else None, summed, grad if of_residual else None, None


class _ReLUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, state: State) -> Tensor:
        ctx.state = state
        out = _rectified(x, state)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        element_type, n, key, address, params = ctx.state
        if not _is_row(grad, y.shape, element_type):
            return fused.gradient(grad, y, random.key_tensor(key), params, "relu"), None
        out = _empty_like(grad)
        _fused(
            _RELU_DROPOUT_BACKWARD, element_type, out.data_ptr(), grad.data_ptr(), None, 1, y.data_ptr(), n, key,
            address, 1 if n < _SERIAL else _threads(), _ANY_WIDTH,
        )  # fmt: skip
        return out, None


class _GELUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, state: State, activation: str) -> Tensor:
        ctx.state, ctx.activation = state, activation
        ctx.save_for_backward(x)
        return _gelu(x, state, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        if _is_row(grad, x.shape, ctx.state[0]):
            return fused.ACTIVATIONS[ctx.activation].gradient(_again(grad, ctx.state, x.shape), x), None, None
        _, _, key, _, params = ctx.state
        return fused.gradient(grad, x, random.key_tensor(key), params, ctx.activation), None, None


_record, _record_on_cuda, _record_channels, _record_add, _record_relu, _record_gelu = map(
    lean_node_of, (_Dropout, _DropoutOnCUDA, _ChannelDropout, _DropoutAdd, _ReLUDropout, _GELUDropout)
)

"""The short road: inverted dropout of a contiguous CPU tensor in eager mode. Python's overhead is what small ones cost.

It gives what the general road gives (a test compares them) with fewer calls: the key is drawn as 16 bytes instead of a
tensor, and the kernel is called with addresses. All that stays for backward is those bytes and the law.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import kernels, random
from ..kernels import native, operators
from ..kernels.law import ONE, Law

_empty_like = torch.empty_like
_is_grad_enabled = torch.is_grad_enabled
_transformed = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_key = random.key_bytes
_threads = native.threads
_SERIAL = native.SERIAL
_kind_of = native.KINDS.get
_row: Any = native.library.masked_row if native.library is not None else None

State = tuple[int, int, bytes, int, Law]


def short(x: Tensor, law: Law) -> Tensor | None:
    """Inverted dropout of x, or None where this road does not lead there."""
    kind = type(x)
    if (
        (kind is not Tensor and kind is not Parameter)
        or x.is_neg()
        or not x.is_cpu
        or not x.is_contiguous()
        or _row is None
        or random._frozen
        or kernels._forced is not None
        or _transformed()
        or _dispatch_modes()
        or _function_modes()
        or forward_ad._current_level >= 0
        or _tracing() is not None
    ):
        return None
    code, n, source = _kind_of(x.dtype), x.numel(), x.data_ptr()
    if code is None or not source:
        return None
    _key.draw()
    if law.threshold == ONE:
        return x
    key = _key.memory.raw
    if x.requires_grad and _is_grad_enabled():
        return _record(x, (code, n, key, law.address, law))
    out = _empty_like(x)
    _row(code, out.data_ptr(), source, n, key, law.address, 1 if n < _SERIAL else _threads())
    return out


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, state: State) -> Tensor:
        ctx.state = state
        code, n, key, address, _ = state
        out = _empty_like(x)
        _row(code, out.data_ptr(), x.data_ptr(), n, key, address, 1 if n < _SERIAL else _threads())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        code, n, key, address, law = ctx.state
        if (
            type(grad) is Tensor
            and grad.is_contiguous()
            and not grad.is_neg()
            and not _is_grad_enabled()
            and not _transformed()
            and not _dispatch_modes()
            and forward_ad._current_level < 0
        ):
            try:
                source = grad.data_ptr()
            except RuntimeError:  # the batched gradients of autograd.grad have no memory
                source = 0
            if source:
                out = _empty_like(grad)
                _row(code, out.data_ptr(), source, n, key, address, 1 if n < _SERIAL else _threads())
                return out, None
        return operators.masked(grad, random.key_tensor(key), law, grad.shape), None


# Two detours left out: Function.apply looks for transforms, and `short` has seen that there are none; the node's apply
# looks up which of backward and vjp is defined.
_record = super(torch.autograd.Function, _Short).apply
_Short._backward_cls.apply = _Short.backward  # type: ignore[attr-defined]

"""Attention with dropout of its weights: O = (m softmax(s Q K' + bias) / k) V, with m a mask of the weights' shape.

The blockwise kernels of kernels/attention.py serve plain CPU tensors and compiled code on the CPU. They keep for
backward what they got, the output, the logsumexp of each query's scores and 16 bytes of mask key: nothing of the size
queries times keys. All else is composed of products, a softmax and the operator `masked`, with the same mask and the
same result up to rounding: transforms, forward-mode derivatives, double backward, a bias that wants a gradient, and
other devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.torch_state import dispatch_modes, is_compiling, is_plain, node_of, transforms_active
from ..kernels import attention as blockwise
from ..kernels.attention import Problem
from ..kernels.mask_params import MaskParams, tensor_beside
from ..kernels.masking import COMPUTE_DTYPE
from .arguments import check_attention
from .operators import fitting, masked

Drop = Callable[[Tensor], Tensor]
"""A function that masks a tensor of weights and scales it, or leaves it as it is."""


def composed(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float, drop: Drop
) -> Tensor:
    """Returns ``drop(softmax(scale * query @ key.mT + bias)) @ value``. Half types have a softmax in float32."""
    wide = COMPUTE_DTYPE[query.dtype]
    if query.dim() > 2 and key.dim() > 2:
        key, value = (_for_heads(t, query.shape[-3]) for t in (key, value))
    weights = _softmax((query.to(wide) @ key.to(wide).mT) * scale, bias, is_causal)
    return drop(weights).to(value.dtype) @ value


def _for_heads(tensor: Tensor, heads: int) -> Tensor:
    """Returns keys or values with as many heads as queries have (grouped-query attention)."""
    own = tensor.shape[-3]
    return tensor if own in (1, heads) else tensor.repeat_interleave(heads // own, -3)


def _softmax(scores: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
    """Returns attention weights; 0 for a query that may see no key, as in scaled_dot_product_attention."""
    if is_causal:
        bias = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if bias is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias.to(scores.dtype)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def _differentiable(key: Tensor, params: MaskParams | Tensor) -> Drop:
    return lambda weights: masked(weights, key, params, weights.shape)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask_key: Tensor,
    params: MaskParams | Tensor,
    is_causal: bool,
    scale: float,
) -> Problem:
    """Returns the tensors with four dimensions, and with as many heads of keys and values as of queries."""
    heads = query.shape[-3] if query.dim() > 2 else 1
    if query.dim() > 2 and key.shape[-3] != heads:
        key, value = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (key, value))
    q, k, v = (_in_four(t, heads) for t in (query, key, value))
    if bias is not None:
        if bias.dtype is not torch.bool:
            bias = bias.to(COMPUTE_DTYPE[q.dtype])
        if bias.dim() == 0 or bias.shape[-1] != key.shape[-2] or bias.stride(-1) != 1:
            bias = bias.expand(*bias.shape[:-1], key.shape[-2]).contiguous()
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
        bias = _in_four(bias, heads)
    return Problem(q, k, v, bias, is_causal, scale, mask_key, params)


def _in_four(tensor: Tensor, heads: int) -> Tensor:
    """Returns a tensor of shape (samples, heads, positions, features)."""
    return tensor if tensor.dim() == 4 else tensor.reshape(-1, heads, *tensor.shape[-2:])


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, logsumexp = blockwise.forward(_problem(query, key, value, *rest))
    if query.dim() == 4:
        return out, logsumexp
    shape = query.shape[:-1]
    return out.reshape(*shape, value.shape[-1]), logsumexp.reshape(shape)


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(query, key, value, *rest)
    heads = problem.query.shape[1]
    grad, out = _in_four(grad, heads), _in_four(out, heads)
    of_query, of_key, of_value = blockwise.backward(problem, grad, out, logsumexp.reshape(problem.query.shape[:-1]))
    return (
        of_query.reshape(query.shape),
        _of_heads(of_key, key.shape),
        _of_heads(of_value, value.shape),
    )


def _of_heads(grad: Tensor, shape: torch.Size) -> Tensor:
    """Returns the gradient of keys or values, summed over the queries' heads that share them."""
    if grad.numel() == math.prod(shape):
        return grad.reshape(shape)
    groups = grad.shape[1] // shape[-3]
    return grad.unflatten(1, (shape[-3], groups)).sum(2).reshape(shape)


# The registered operators, which compiled and exported code calls.

_ARGUMENTS = "Tensor query, Tensor key, Tensor value"
_REST = "Tensor? bias, Tensor mask_key, Tensor params, bool is_causal, float scale"
torch.library.define("torchdrop::attention", f"({_ARGUMENTS}, {_REST}) -> (Tensor, Tensor)")
torch.library.define(
    "torchdrop::attention_backward",
    f"(Tensor grad, {_ARGUMENTS}, Tensor out, Tensor logsumexp, {_REST}) -> (Tensor, Tensor, Tensor)",
)


def _laid_out(query: Tensor, value: Tensor) -> Tensor:
    """Returns an empty tensor with the shape and strides of the output."""
    *batch, queries = query.shape[:-1]
    if not batch:
        return value.new_empty((queries, value.shape[-1]))
    return value.new_empty((*batch[:-1], queries, batch[-1], value.shape[-1])).transpose(-3, -2)


@torch.library.impl("torchdrop::attention", "default")
def _implementation(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    check_attention("torchdrop::attention", query, key, value, *rest[:3])
    out, logsumexp = _forward(query, key, value, *rest)
    like = _laid_out(query, value)
    return out if out.stride() == like.stride() else like.copy_(out), logsumexp


@torch.library.register_fake("torchdrop::attention")
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    check_attention("torchdrop::attention", query, key, value, *rest[:3])
    return _laid_out(query, value), query.new_empty(query.shape[:-1], dtype=COMPUTE_DTYPE[query.dtype])


@torch.library.impl("torchdrop::attention_backward", "default")
def _implementation_of_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_attention("torchdrop::attention_backward", query, key, value, *rest[:3])
    grads = _backward(grad, query, key, value, out, logsumexp, *rest)
    empty = [torch.empty_like(t) for t in (query, key, value)]
    same = [g if g.stride() == e.stride() else e.copy_(g) for g, e in zip(grads, empty, strict=True)]
    return same[0], same[1], same[2]


@torch.library.register_fake("torchdrop::attention_backward")
def _fake_of_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_attention("torchdrop::attention_backward", query, key, value, *rest[:3])
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _gradients(
    grad: Tensor, kept: Sequence[Tensor], rest: tuple[Tensor | None, Tensor, MaskParams | Tensor, bool, float]
) -> tuple[Tensor, ...]:
    """Returns the gradients of query, key and value. If they are to be differentiated again, those of the composition.

    Args:
        grad: the gradient of the output.
        kept: query, key, value, output and logsumexp.
        rest: the other arguments of `attention`.
    """
    query, key, value, out, _ = kept
    bias, mask_key, params, is_causal, scale = rest
    grad = fitting(grad, out.shape, out.device)
    if torch.is_grad_enabled():
        q, k, v = (t if t.requires_grad else t.detach().requires_grad_() for t in (query, key, value))
        again = composed(q, k, v, bias, is_causal, scale, _differentiable(mask_key, params))
        return torch.autograd.grad(again, (q, k, v), grad, create_graph=True)
    if is_compiling() or dispatch_modes() or not (is_plain(grad) and grad.dtype == out.dtype):
        tensor = tensor_beside(params, grad.device)
        return torch.ops.torchdrop.attention_backward(grad, *kept, bias, mask_key, tensor, is_causal, scale)
    return _backward(grad, *kept, *rest)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, mask_key, params, ctx.is_causal, ctx.scale = inputs
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(query, key, value, out, logsumexp, bias, mask_key, params)


def _registered_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *kept, bias, mask_key, params = ctx.saved_tensors
    rest = (bias, mask_key, params, ctx.is_causal, ctx.scale)
    return *_gradients(grad, kept, rest), None, None, None, None, None


torch.library.register_autograd("torchdrop::attention", _registered_backward, setup_context=_setup)


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        out, logsumexp = _forward(query, key, value, *rest)
        bias, ctx.mask_key, ctx.params, ctx.is_causal, ctx.scale = rest
        ctx.save_for_backward(query, key, value, out, logsumexp, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, bias = ctx.saved_tensors
        rest = (bias, ctx.mask_key, ctx.params, ctx.is_causal, ctx.scale)
        return *_gradients(grad, kept, rest), None, None, None, None, None


_record = node_of(_Attended)  # `is_plain` has seen that there are no transforms


FEW = 2**17
"""So many weights at most are computed as a whole: the calls for a block would take longer than its work."""


def _blockwise(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, params: MaskParams | Tensor) -> bool:
    """Whether the kernels take these: on the CPU, with the same sizes but for groups of heads, one rate, and many
    weights."""
    tensors = (query, key, value)
    if not query.is_cpu or query.dtype not in COMPUTE_DTYPE or any(t.dtype != query.dtype for t in tensors):
        return False
    single = isinstance(params, MaskParams) or params.dim() == 1
    dims = query.dim()
    if not single or dims < 2 or any(t.dim() != dims or t.layout is not torch.strided for t in tensors):
        return False
    if dims > 3 and not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        return False
    if dims > 2 and (key.shape[-3] != value.shape[-3] or key.shape[-3] == 0 or query.shape[-3] % key.shape[-3]):
        return False
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return False
    return math.prod(query.shape[:-1]) * key.shape[-2] > FEW


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask_key: Tensor,
    params: MaskParams | Tensor,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Returns attention under a mask key, differentiable in query, key, value and bias."""
    compiling = is_compiling()
    if mask_key.dim() == 1 and _blockwise(query, key, value, bias, params):
        operands = (query, key, value) if bias is None else (query, key, value, bias)
        if compiling and not transforms_active():
            tensor = tensor_beside(params, query.device)
            return torch.ops.torchdrop.attention(query, key, value, bias, mask_key, tensor, is_causal, scale)[0]
        if not compiling and all(map(is_plain, operands)):
            if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
                return _record(query, key, value, bias, mask_key, params, is_causal, scale)
            return _forward(query, key, value, bias, mask_key, params, is_causal, scale)[0]
    return composed(query, key, value, bias, is_causal, scale, _differentiable(mask_key, params))

"""The registered operators, and the three paths to a kernel.

``torchdrop::masked`` and ``torchdrop::gaussian`` are linear in x up to a constant, and their derivative is the same map
under the parameters' linear part. Backward, double backward, forward mode and vmap all follow from that one fact, so
both operators come out of `_define`. They take the parameters whole, and a flag which says that only the linear part is
meant: to compute a tensor with that part would take a kernel of its own in every backward.

All paths give the same result:

- plain: ordinary tensors in eager mode. They go straight to the backend, in a lean autograd.Function for a gradient.
- transformed: torch.func transforms and forward-mode AD, through an autograd.Function with all the rules.
- operator: torch.compile, torch.export, fake tensors, subclasses and dispatch or function modes.

The derivative is written once for each way in which PyTorch asks for it. Each has a reason:

- The registered backward is the only one that compiled and exported code, subclasses and dispatch modes take. In eager
  mode a forward and backward of 4,096 elements through it take three times as long as through `Recorded`.
- `Transformed` is the only one that torch.func and forward-mode AD take: an operator cannot register a jvp.
- `Recorded` serves eager mode in all cases: generators, strided tensors, rates that are tensors, in-place calls.
- The nodes of ops/fast_path.py serve eager mode in the usual case, on the CPU and on CUDA. Without them a forward and
  backward of 4,096 elements take 1.5 to 1.8 times as long (Dropout, Dropout2d, DropoutAdd and ReLUDropout).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import kernels
from ..core.torch_inductor import lower_in_inductor
from ..core.torch_state import (
    forward_mode_active,
    functionalize_active,
    is_compiling,
    is_plain,
    node_of,
    transforms_active,
)
from ..kernels import inductor
from ..kernels.mask_params import MaskParams, tensor_beside
from ..kernels.mask_params import linear as linear_part
from ..kernels.masking import COMPUTE_DTYPE, WHOLE, MaskSlice, masked_values
from .arguments import check_masked

Runner = Callable[..., Tensor]
Operator = Callable[..., Tensor]


def fitting(grad: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """Returns a gradient of the output's shape. Autograd gives no other; one given to a node by hand is broadcast.

    Raises:
        RuntimeError: it does not broadcast, or is on another device.
    """
    if grad.device != device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got a gradient on {grad.device} for an output on "
            f"{device}"
        )
    if grad.shape == shape:
        return grad
    if grad.dim() > len(shape) or any(
        size not in (1, whole) for size, whole in zip(reversed(grad.shape), reversed(shape), strict=False)
    ):
        raise RuntimeError(
            f"a gradient must have the output's shape {tuple(shape)} or broadcast against it, got {tuple(grad.shape)}"
        )
    return grad.expand(shape)


def _batch(
    batch_size: int,
    in_dims: Sequence[int | None],
    x: Tensor,
    key: Tensor,
    params: Tensor,
    shape: Sequence[int],
    part: Sequence[int] = WHOLE,
    linear: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[int], Sequence[int], bool]:
    """Returns the arguments of one call that does what `batch_size` calls would, with the new dimension first.

    A batched key gives every call its own mask; an unbatched one is shared, so the mask has a one there. A part is one
    of each key's mask, so it stays.
    """
    x_dim, key_dim, params_dim = in_dims[:3]
    shape = list(shape)
    x = x.expand(batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
    if key_dim is not None:
        key = key.movedim(key_dim, 0)
    elif key.dim() > 1:
        key = key.unsqueeze(0)
    else:
        shape = [1, *shape]
    if params_dim is not None:
        params = params.movedim(params_dim, 0)
        if params.dim() == 2:
            params = params.reshape(batch_size, *[1] * (x.dim() - 1), params.shape[-1])
    elif params.dim() > 1:
        params = params.unsqueeze(0)
    return x, key, params, shape, part, linear


Composed = Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor]
"""Computes an operator with operations that have derivatives. It takes a function of tensors and parameters that has
none, x and the parameters."""


def _mask_composed(drawn: Callable[..., Tensor], x: Tensor, params: Tensor) -> Tensor:
    threshold = params[..., :1]
    kept = drawn(torch.ones_like(x), torch.cat([threshold, torch.ones_like(threshold), params[..., 2:] * 0], -1)) != 0
    return masked_values(x, kept, params).to(x.dtype)


def _normal_composed(drawn: Callable[..., Tensor], x: Tensor, params: Tensor) -> Tensor:
    dtype = COMPUTE_DTYPE[x.dtype]
    return (x.to(dtype) * drawn(torch.ones_like(x, dtype=dtype), params)).to(x.dtype)


def _define(
    name: str, run: Runner, composed: Composed, expression: Callable[..., inductor.Element | None] | None = None
) -> Operator:
    qualified = f"torchdrop::{name}"
    rest = "SymInt[] shape, SymInt[] part=[], bool linear=False"
    torch.library.define(qualified, f"(Tensor x, Tensor key, Tensor params, {rest}) -> Tensor")
    registered = getattr(torch.ops.torchdrop, name).default

    @torch.library.impl(qualified, "default")
    def implementation(
        x: Tensor, key: Tensor, params: Tensor, shape: Sequence[int], part: Sequence[int] = (), linear: bool = False
    ) -> Tensor:
        check_masked(qualified, x, key, params, shape, part)
        return run(x, key, params, tuple(shape), MaskSlice(*part) if any(part) else WHOLE, linear=linear)

    @torch.library.register_fake(qualified)
    def fake(
        x: Tensor, key: Tensor, params: Tensor, shape: Sequence[int], part: Sequence[int] = (), linear: bool = False
    ) -> Tensor:
        check_masked(qualified, x, key, params, shape, part)
        if expression is not None:
            lower_in_inductor(registered, expression)  # it is loaded by now if it compiles this call
        return torch.empty_like(x)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, key, params, ctx.shape, *others = inputs
        ctx.part = others[0] if others else WHOLE
        ctx.save_for_backward(key, params)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        key, params = ctx.saved_tensors
        return registered(grad, key, params, ctx.shape, ctx.part, True), None, None, None, None, None

    def batched(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
        return registered(*_batch(info.batch_size, in_dims, *args)), 0

    torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    torch.library.register_vmap(qualified, batched)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(
            x: Tensor, key: Tensor, params: Tensor, shape: Sequence[int], part: Sequence[int], linear: bool
        ) -> Tensor:
            return registered(x, key, params, shape, part, linear)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            setup_context(ctx, inputs, output)
            ctx.save_for_forward(inputs[1], inputs[2])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
            key, params = ctx.saved_tensors
            return transformed(grad, key, params, ctx.shape, ctx.part, True), None, None, None, None, None

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
            key, params = ctx.saved_tensors
            return transformed(tangent, key, params, ctx.shape, ctx.part, True)

        @staticmethod
        def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
            return transformed(*_batch(info.batch_size, in_dims, *args)), 0

    def transformed(
        x: Tensor, key: Tensor, params: Tensor, shape: Sequence[int], part: Sequence[int], linear: bool
    ) -> Tensor:
        return Transformed.apply(x, key, params, shape, part, linear)

    def written(
        x: Tensor, key: Tensor, params: MaskParams | Tensor, shape: Sequence[int], part: MaskSlice, linear: bool
    ) -> Tensor:
        run(x, key, params, shape, part, x, linear)
        if not x.is_inference():
            increment_version(x)  # a kernel writes through an address, unseen by autograd
        return x

    class Recorded(torch.autograd.Function):
        """The lean one: 16 bytes of key and the parameters stay for backward, as plain attributes."""

        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            key: Tensor,
            params: MaskParams | Tensor,
            shape: Sequence[int],
            inplace: bool,
            part: MaskSlice,
            linear: bool,
        ) -> Tensor:
            ctx.key, ctx.params, ctx.shape, ctx.part, ctx.whole = key, params, shape, part, x.shape
            if inplace:
                ctx.mark_dirty(x)
                return written(x, key, params, shape, part, linear)
            return run(x, key, params, shape, part, None, linear)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
            grad = fitting(grad, ctx.whole, ctx.key.device)
            out = call(grad, ctx.key, ctx.params, ctx.shape, False, ctx.part, True)
            return out, None, None, None, None, None, None

    record = node_of(Recorded)  # `is_plain` has seen that there are no transforms

    def call(
        x: Tensor,
        key: Tensor,
        params: MaskParams | Tensor,
        shape: Sequence[int],
        inplace: bool = False,
        part: MaskSlice = WHOLE,
        linear: bool = False,
    ) -> Tensor:
        if not is_compiling() and is_plain(x):
            if x.requires_grad and torch.is_grad_enabled():
                return record(x, key, params, shape, inplace, part, linear)
            if inplace:
                return written(x, key, params, shape, part, linear)
            return run(x, key, params, shape, part, None, linear)
        params = tensor_beside(params, x.device)
        if not (transforms_active() or (not is_compiling() and forward_mode_active())):
            out = registered(x, key, params, shape, part, linear)
        elif (
            is_compiling() or functionalize_active()
        ):  # an operator's own derivative cannot be combined with torch.func's there
            given = cast(Tensor, linear_part(params)) if linear else params
            out = composed(lambda ones, params: registered(ones, key, params, shape, part), x, given)
        else:
            out = transformed(x, key, params, shape, part, linear)
        return x.copy_(out) if inplace else out

    return call


masked: Operator = _define("masked", kernels.masked, _mask_composed, inductor.masked)
"""``masked(x, key, params, shape, inplace=False, part=WHOLE, linear=False)``: ``x * scale + shift`` where kept, `fill`
elsewhere. With `linear`, shift and fill are taken for 0.

Differentiable in x. A set of mask parameters given as a tensor gets no gradient.
"""

gaussian: Operator = _define("gaussian", kernels.gaussian, _normal_composed)
"""``gaussian(x, key, params, shape, inplace=False, part=WHOLE)``: ``x * (1 + scale * z)`` with z standard normal.

Differentiable in x."""

"""A layer's run through time with a backward pass of its own: `run_fast`, for plain tensors in eager mode.

Autograd would multiply matrices at each time step for the gradient of the weights, and would keep and launch an
operation for every one of the cell. Here all factors of the chain rule are computed for all steps at once, so that a
step of the backward pass is a product with the recurrent matrix and few others; at the end each weight's gradient is
one product. With e the gradient of the new c (after that of h has been added) and a' the derivative of a gate a,

    LSTM    d(i, f, g, o) = (e d(g) i', e c' f', e i d' g', dh tanh(c) o'),    e = dc + dh o (1 - tanh(c)^2)
    GRU     d(r, z, n) = dh ((1 - z) d' n' q r', (h' - d(n)) z', (1 - z) d' n'),    q = W h' + b of the candidate
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.torch_state import is_compiling, is_plain
from ...kernels.masking import scaled_where
from .cells import Noise, State, Update, Weights, run, unroll, updated

_of_sigmoid = torch.ops.aten.sigmoid_backward
_of_tanh = torch.ops.aten.tanh_backward


def run_fast(
    data: Tensor, sizes: Sequence[int], weights: Weights, state: State, noise: Noise, backwards: bool
) -> tuple[Tensor, State]:
    """Does what `cells.run` does, faster if it can."""
    if is_compiling() or not _can_run_fast(data, weights, state, noise):
        return run(data, sizes, weights, state, noise, backwards)
    hidden, *final = _Recorded.apply(noise, sizes, backwards, data, *weights[:4], *state)
    return hidden, tuple(final)


def _can_run_fast(data: Tensor, weights: Weights, state: State, noise: Noise) -> bool:
    tensors = [data, *(weight for weight in weights if weight is not None), *state]
    return (
        torch.is_grad_enabled()
        and weights.weight_hr is None
        and isinstance(noise.scale, float)
        and all(_is_mask(update) for update in (noise.hidden, noise.cell))
        and data.dtype in (torch.float32, torch.float64)
        and all(is_plain(tensor) and tensor.dtype == data.dtype for tensor in tensors)
        and any(tensor.requires_grad for tensor in tensors)
        and not torch.is_autocast_enabled(data.device.type)
    )


def _is_mask(update: Update) -> bool:
    return update is None or (isinstance(update, Tensor) and update.dtype == torch.bool)


def _split_gradient(gradient: Tensor, update: Update) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of a state's new and old value."""
    if not isinstance(update, Tensor):
        return gradient, None
    return torch.where(update, gradient, 0.0), torch.where(update, 0.0, gradient)


def _factor(noise: Noise, sizes: Sequence[int], dtype: torch.dtype) -> Tensor | float:
    """Returns the derivative of d(g) for all rows."""
    if noise.kept is None:
        return 1.0
    steps = noise.kept.unbind(1)
    return torch.cat([kept[:size] for kept, size in zip(steps, sizes, strict=True)]).to(dtype) * noise.scale


def _in_order_of_time(parts: list[Tensor], backwards: bool) -> Tensor:
    """Concatenates rows that were recorded in the order of the run, in the order of time."""
    return torch.cat(parts[::-1] if backwards else parts)


def _rows_of_steps(x: Tensor, sizes: Sequence[int], from_the_end: bool) -> Iterator[Tensor]:
    """Yields the rows of each time step, in the order of a run."""
    parts = x.split(list(sizes))
    return iter(parts[::-1] if from_the_end else parts)


class _Recorded(torch.autograd.Function):
    """The function from (data, weight_ih, weight_hh, bias_ih, bias_hh, state...) to (h of all rows, final state...)."""

    @staticmethod
    def forward(
        ctx: Any, noise: Noise, sizes: Sequence[int], backwards: bool, data: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        weights, state = Weights(*rest[:4]), rest[4:]
        ctx.noise, ctx.sizes, ctx.backwards = noise, sizes, backwards
        forward = _lstm_forward if len(state) == 2 else _gru_forward
        outputs, final, records = forward(noise, sizes, backwards, data, weights, state)
        ctx.save_for_backward(data, *rest, *records)
        return torch.cat(outputs), *final

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count = 6 if len(gradients) == 2 else 7
        saved = ctx.saved_tensors
        inputs, records = saved[:count], saved[count:]
        if torch.is_grad_enabled() or not all(map(is_plain, gradients)):
            return None, None, None, *_gradients_by_autograd(ctx, inputs, gradients)
        of_hidden, of_final = gradients[0], gradients[1:]
        backward = _lstm_backward if len(of_final) == 2 else _gru_backward
        weight_hh = inputs[2]
        projected, recurrent, before, initial = backward(
            ctx.noise, ctx.sizes, ctx.backwards, weight_hh, records, of_hidden, of_final
        )
        wanted = ctx.needs_input_grad[3:]
        data, weight_ih = inputs[:2]
        return (
            None, None, None,
            projected @ weight_ih if wanted[0] else None,
            projected.t() @ data if wanted[1] else None,
            recurrent.t() @ before if wanted[2] else None,
            projected.sum(0) if wanted[3] else None,
            recurrent.sum(0) if wanted[4] else None,
            *initial,
        )  # fmt: skip


def _gradients_by_autograd(ctx: Any, inputs: Sequence[Any], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """Computes the gradients by autograd: for derivatives of them, and for batches of them."""
    data, *rest = inputs
    wanted = [n for n, needs in enumerate(ctx.needs_input_grad[3:]) if needs]
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        hidden, final = run(data, ctx.sizes, Weights(*rest[:4]), tuple(rest[4:]), ctx.noise, ctx.backwards)
        found = torch.autograd.grad(
            (hidden, *final), [inputs[n] for n in wanted], gradients, create_graph=differentiated, allow_unused=True
        )
    result: list[Tensor | None] = [None] * len(inputs)
    for n, gradient in zip(wanted, found, strict=True):
        result[n] = gradient
    return result


def _lstm_forward(
    noise: Noise, sizes: Sequence[int], backwards: bool, data: Tensor, weights: Weights, state: State
) -> tuple[list[Tensor], State, tuple[Tensor, ...]]:
    """Returns the outputs, the final state, and of all rows the gates, tanh(c), and c and h before."""
    bias = None if weights.bias_ih is None or weights.bias_hh is None else weights.bias_ih + weights.bias_hh
    gates = F.linear(data, weights.weight_ih, bias)
    size = weights.weight_hh.shape[1]
    tanhs = gates.new_empty(len(gates), size)
    slots = _rows_of_steps(tanhs, sizes, backwards)
    recurrent = weights.weight_hh.t()
    befores: list[Tensor] = []
    memories: list[Tensor] = []

    def step(x: Tensor, state: State, noise: Noise) -> State:
        before, memory = state
        befores.append(before)
        memories.append(memory)
        x.addmm_(before, recurrent)
        x[:, : 2 * size].sigmoid_()
        i, f, g, o = x.chunk(4, 1)
        g.tanh_()
        o.sigmoid_()
        if noise.kept is not None:
            g = scaled_where(noise.kept, g, noise.scale)
        cell = torch.addcmul(f * memory, i, g)
        hidden = o * torch.tanh(cell, out=next(slots))
        return updated(hidden, before, noise.hidden), updated(cell, memory, noise.cell)

    outputs, final = unroll(step, gates.split(list(sizes)), state, noise, backwards)
    return outputs, final, (gates, tanhs, _in_order_of_time(memories, backwards), _in_order_of_time(befores, backwards))


def _lstm_backward(
    noise: Noise, sizes: Sequence[int], backwards: bool, weight: Tensor, records: Sequence[Tensor], of_hidden: Tensor,
    of_final: State,
) -> tuple[Tensor, Tensor, Tensor, State]:  # fmt: skip
    """Returns the gradients of both projections, h before, and the gradients of the initial state."""
    gates, tanhs, memory, before = records
    i, f, g, o = gates.chunk(4, 1)
    factor = _factor(noise, sizes, g.dtype)
    table = torch.stack(
        [_of_sigmoid(g * factor, i), _of_sigmoid(memory, f), _of_tanh(i * factor, g), _of_sigmoid(tanhs, o)], 1
    )
    projected = torch.empty_like(table)
    of_steps = zip(
        *(_rows_of_steps(rows, sizes, not backwards) for rows in (table, projected, _of_tanh(o, tanhs), f)), strict=True
    )

    def step(x: Tensor, state: State, noise: Noise) -> State:
        factors, gradients, through, forget = next(of_steps)
        new, old = _split_gradient(state[0] + x, noise.hidden)
        cell, memory = _split_gradient(state[1], noise.cell)
        cell = torch.addcmul(cell, new, through)
        torch.mul(cell.unsqueeze(1), factors[:, :3], out=gradients[:, :3])
        torch.mul(new, factors[:, 3], out=gradients[:, 3])
        gradients = gradients.flatten(1)
        before = gradients @ weight if old is None else torch.addmm(old, gradients, weight)
        return before, cell * forget if memory is None else torch.addcmul(memory, cell, forget)

    _, initial = unroll(step, of_hidden.split(list(sizes)), of_final, noise, not backwards)
    return projected.flatten(1), projected.flatten(1), before, initial


def _gru_forward(
    noise: Noise, sizes: Sequence[int], backwards: bool, data: Tensor, weights: Weights, state: State
) -> tuple[list[Tensor], State, tuple[Tensor, ...]]:
    """Returns the outputs, the final state, and of all rows the gates, the candidate's recurrent part, and h before."""
    gates = F.linear(data, weights.weight_ih, weights.bias_ih)
    size = weights.weight_hh.shape[1]
    recurrent, bias = weights.weight_hh.t(), weights.bias_hh
    befores: list[Tensor] = []
    parts: list[Tensor] = []

    def step(x: Tensor, state: State, noise: Noise) -> State:
        (before,) = state
        own = before @ recurrent if bias is None else torch.addmm(bias, before, recurrent)
        befores.append(before)
        parts.append(own[:, 2 * size :])
        x[:, : 2 * size].add_(own[:, : 2 * size]).sigmoid_()
        r, z, g = x.chunk(3, 1)
        g.addcmul_(r, parts[-1]).tanh_()
        if noise.kept is not None:
            g = scaled_where(noise.kept, g, noise.scale)
        return (updated(torch.addcmul(g, z, before - g), before, noise.hidden),)

    outputs, final = unroll(step, gates.split(list(sizes)), state, noise, backwards)
    return outputs, final, (gates, _in_order_of_time(parts, backwards), _in_order_of_time(befores, backwards))


def _gru_backward(
    noise: Noise, sizes: Sequence[int], backwards: bool, weight: Tensor, records: Sequence[Tensor], of_hidden: Tensor,
    of_final: State,
) -> tuple[Tensor, Tensor, Tensor, State]:  # fmt: skip
    """Returns the gradients of both projections, h before, and the gradients of the initial state."""
    gates, part, before = records
    r, z, g = gates.chunk(3, 1)
    factor = _factor(noise, sizes, g.dtype)
    slope = _of_tanh((1.0 - z) * factor, g)
    table = torch.stack([_of_sigmoid(slope * part, r), _of_sigmoid(before - g * factor, z), slope * r], 1)
    recurrent, of_new = torch.empty_like(table), torch.empty_like(slope)
    of_steps = zip(*(_rows_of_steps(rows, sizes, not backwards) for rows in (table, recurrent, of_new, z)), strict=True)

    def step(x: Tensor, state: State, noise: Noise) -> State:
        factors, gradients, kept, update = next(of_steps)
        new, old = _split_gradient(state[0] + x, noise.hidden)
        kept.copy_(new)
        torch.mul(new.unsqueeze(1), factors, out=gradients)
        direct = new * update if old is None else torch.addcmul(old, new, update)
        return (torch.addmm(direct, gradients.flatten(1), weight),)

    _, initial = unroll(step, of_hidden.split(list(sizes)), of_final, noise, not backwards)
    projected = torch.cat([recurrent[:, :2].flatten(1), of_new * slope], 1)
    return projected, recurrent.flatten(1), before, initial

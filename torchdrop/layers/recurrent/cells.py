"""LSTM and GRU cells with noise in them, and their run through time.

    LSTM    i, f, g, o = x + W h,  c = zone(f c' + i d(g), c'),  h = zone(o tanh(f c' + i d(g)), h')
    GRU     r, z, a + r (W h) = ...,  h = zone(z h' + (1 - z) d(g), h')

with x the projected input, h' and c' the states before, d dropout (Semeniuta et al., COLING 2016) and zone(new, old)
zoneout (Krueger et al., ICLR 2017).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.masking import scaled_where

Update = Tensor | float | None
"""The units of a state that are updated, as bools; or the weight of the update, in expectation; None for all units."""

State = tuple[Tensor, ...]
"""The state: (h,) of a GRU, (h, c) of an LSTM."""


class Noise(NamedTuple):
    """The noise of one step, or with dimensions (batch, time, units) of all steps.

    Attributes:
        hidden: the update of h.
        cell: the update of c.
        kept: the units of the candidate g that are kept, as bools; None for all.
        scale: the factor of kept units.
    """

    hidden: Update = None
    cell: Update = None
    kept: Tensor | None = None
    scale: Tensor | float = 1.0

    def rows(self, order: Tensor) -> Noise:
        """Returns the noise with the batch in this order."""
        values: list[Any] = [v.index_select(0, order) if isinstance(v, Tensor) and v.dim() == 3 else v for v in self]
        return Noise(*values)

    def steps(self, count: int) -> list[Noise]:
        """Returns the noise of each time step."""
        return [Noise(*values) for values in zip(*(_unbound(value, count) for value in self), strict=True)]

    def first(self, rows: int) -> Noise:
        """Returns the noise of one step for so many rows."""
        values: list[Any] = [v[:rows] if isinstance(v, Tensor) and v.dim() > 0 else v for v in self]
        return Noise(*values)


def _unbound(value: Any, count: int) -> Sequence[Any]:
    return value.unbind(1) if isinstance(value, Tensor) and value.dim() == 3 else [value] * count


def updated(new: Tensor, old: Tensor, update: Update) -> Tensor:
    """Returns `new` where a unit is updated and `old` elsewhere, or the expectation. Half types are rounded once."""
    if update is None:
        return new
    if isinstance(update, float):
        wide = torch.promote_types(old.dtype, new.dtype)  # under autocast they may differ
        return torch.lerp(old.to(wide), new.to(wide), update)
    if update.dtype == torch.bool:
        return torch.where(update, new, old)
    return torch.lerp(old.to(update.dtype), new.to(update.dtype), update).to(new.dtype)


def lstm(x: Tensor, state: State, noise: Noise, weight: Tensor, projection: Tensor | None) -> State:
    """Makes one step of an LSTM.

    Args:
        x: (B, 4 H), the projected input with both biases.
        state: h and c.
        noise: the noise of this step.
        weight: (4 H, H), or (4 H, P) with a projection.
        projection: (P, H) from o tanh(c) to h, if there is one.
    """
    before, memory = state
    i, f, g, o = torch.addmm(x, before, weight.t()).chunk(4, 1)
    g = g.tanh()
    if noise.kept is not None:
        g = scaled_where(noise.kept, g, noise.scale)
    cell = torch.addcmul(f.sigmoid() * memory, i.sigmoid(), g)
    hidden = o.sigmoid() * cell.tanh()
    if projection is not None:
        hidden = hidden @ projection.t()
    return updated(hidden, before, noise.hidden), updated(cell, memory, noise.cell)


def gru(x: Tensor, state: State, noise: Noise, weight: Tensor, bias: Tensor | None) -> State:
    """Makes one step of a GRU.

    Args:
        x: (B, 3 H), the projected input with the input's bias.
        state: only h.
        noise: the noise of this step.
        weight: (3 H, H).
        bias: (3 H), the bias of the hidden state's projection; the reset gate multiplies its last third.
    """
    (before,) = state
    size = before.shape[1]
    recurrent = before @ weight.t() if bias is None else torch.addmm(bias, before, weight.t())
    r, z = (x[:, : 2 * size] + recurrent[:, : 2 * size]).sigmoid().chunk(2, 1)
    g = torch.addcmul(x[:, 2 * size :], r, recurrent[:, 2 * size :]).tanh()
    if noise.kept is not None:
        g = scaled_where(noise.kept, g, noise.scale)
    return (updated(torch.addcmul(g, z, before - g), before, noise.hidden),)


class Weights(NamedTuple):
    """The parameters of one layer in one direction, named as torch.nn names them."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None


Step = Callable[[Tensor, State, Noise], State]


def unroll(
    step: Step, inputs: Sequence[Tensor], state: State, noise: Noise, backwards: bool
) -> tuple[list[Tensor], State]:
    """Runs a cell through time.

    Args:
        step: makes one step of the cell.
        inputs: for each time step the projected inputs of the sequences that last until then: a sequence has the same
            row of the batch in all steps, and those that end are the last ones.
        state: the initial state of all sequences.
        noise: the noise of all steps.
        backwards: whether time runs from the last step to the first.

    Returns:
        h at each time step, and the state after each sequence's own last step.
    """
    noises = noise.steps(len(inputs))
    outputs: list[Tensor] = [state[0]] * len(inputs)
    initial, ended = state, []
    now = inputs[-1].shape[0] if backwards else state[0].shape[0]  # len would make sizes constants in a graph
    if backwards:
        state = tuple(part[:now] for part in initial)
    for t in reversed(range(len(inputs))) if backwards else range(len(inputs)):
        rows = inputs[t].shape[0]
        if rows < now:
            ended.append(tuple(part[rows:] for part in state))
            state = tuple(part[:rows] for part in state)
        elif rows > now:
            state = tuple(torch.cat([part, start[now:rows]]) for part, start in zip(state, initial, strict=True))
        now = rows
        state = step(inputs[t], state, noises[t] if rows == initial[0].shape[0] else noises[t].first(rows))
        outputs[t] = state[0]
    if ended:
        state = tuple(torch.cat(parts[::-1]) for parts in zip(*ended, state, strict=True))
    return outputs, state


def run(
    data: Tensor, sizes: Sequence[int], weights: Weights, state: State, noise: Noise, backwards: bool
) -> tuple[Tensor, State]:
    """Runs a layer in one direction: an LSTM if the state has two parts, else a GRU.

    Args:
        data: (N, F), the inputs of the first time step, then those of the second and so on.
        sizes: the number of rows of each time step, which never grows.
        weights, state, noise, backwards: those of the layer.

    Returns:
        h of each row of `data`, and the final state.
    """
    step: Step
    if len(state) == 2:
        bias = None if weights.bias_ih is None or weights.bias_hh is None else weights.bias_ih + weights.bias_hh
        step = functools.partial(lstm, weight=weights.weight_hh, projection=weights.weight_hr)
    else:
        bias = weights.bias_ih
        step = functools.partial(gru, weight=weights.weight_hh, bias=weights.bias_hh)
    projected = F.linear(data, weights.weight_ih, bias).split(list(sizes))
    outputs, final = unroll(step, projected, state, noise, backwards)
    return torch.cat(outputs), final

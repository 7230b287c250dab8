"""What a forward does with dropout: which calls drop, at which rate, what comes right before and after them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..layers import _rate
from ..monte_carlo.draw import Draw
from ..monte_carlo.mode import Tracker, Watching

_T = Tensor

_LINEAR = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip
_VIEWS = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, _T.flatten,
    _T.reshape, _T.view, _T.permute, _T.transpose, _T.squeeze, _T.unsqueeze, _T.contiguous, _T.to, _T.float,
    _T.movedim, torch.movedim,
}  # fmt: skip

_ENOUGH, _MOST = 20_000, 400
"""Draws after which a keep rate is known well enough, and repetitions after which it has to be."""


@dataclass
class Call:
    """One call that drops.

    Args:
        module: the name of the module that makes it.
        kind: "dropout", "torchdrop", "attention", ...
        is_layer: whether the module is a dropout layer.
        rate: the probability of dropping, if it is known.
        on: whether the call drops anything.
        flagged: whether it draws a plain random tensor, whatever that is for.
        after: the module whose dropout gave the call's input, as it came or reshaped; None if none did.
        realised: the fraction of elements kept in `draws` draws; None if it was not measured.
    """

    module: str
    kind: str
    is_layer: bool
    rate: float | None
    on: bool
    flagged: bool
    after: str | None
    realised: float | None = None
    draws: int = 0

    @property
    def unlikely(self) -> bool:
        """Whether a right layer would be this far off with a probability below 1e-9: Chernoff's bound 2 exp(-n KL)."""
        if self.realised is None or self.rate is None:
            return False
        return self.draws * _divergence(self.realised, 1.0 - self.rate) > math.log(2e9)


def _divergence(a: float, b: float) -> float:
    """Kullback and Leibler's, of two coins.

    >>> _divergence(0.5, 0.5), round(_divergence(1.0, 0.5), 4)
    (0.0, 0.6931)
    """
    total = 0.0
    for x, y in ((a, b), (1.0 - a, 1.0 - b)):
        if x > 0:
            total += x * math.log(x / y) if y > 0 else math.inf
    return total


@dataclass(frozen=True)
class _Trace:
    """Where a tensor comes from: a module's dropout, maybe by way of a linear map, named then."""

    dropout: str
    through: str = ""


class Flow(Watching):
    """Lets a forward happen and follows what its dropout gives.

    Args:
        model: that runs.
        measure: whether the keep rates are measured, by calls of the same functions on ones.

    Attributes:
        calls: that drop or draw, in order.
        normalised: for each batch normalisation of a dropout's output (its module, the dropout, the linear map
        between). ran: the modules that were called.
    """

    def __init__(self, model: nn.Module, measure: bool) -> None:
        super().__init__(Tracker(model, lambda *_: None, lambda: None))
        self.calls: list[Call] = []
        self.normalised: list[tuple[str, str, str]] = []
        self.ran: set[nn.Module] = set()
        self._model, self._measure = model, measure
        self._layers = {name for name, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)}
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._traces: dict[int, _Trace] = {}
        self._alive: list[Tensor] = []  # an id is a tensor's only as long as it lives
        self._handles = [m.register_forward_pre_hook(lambda m, _: self.ran.add(m)) for m in model.modules()]

    def close(self) -> None:
        self._tracker.close()
        for handle in self._handles:
            handle.remove()

    def dropped_outputs(self, output: Any) -> list[str]:
        """The modules whose dropout gave a part of what the model returns."""
        traces = [self._traces.get(id(leaf)) for leaf in tree_flatten(output)[0]]
        return sorted({trace.dropout for trace in traces if trace is not None and not trace.through})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._args, self._kwargs = args, kwargs or {}
        return super().__torch_function__(func, types, args, kwargs)

    def _turns_on(self) -> bool:
        return False

    def _meet(self, func: Any, draw: Draw) -> Any:
        name = self._tracker.next(draw.kind).module
        input, args, kwargs = _first(self._args, self._kwargs), self._args, self._kwargs
        before = self._traces.get(id(input))
        rate = float(draw.rate) if isinstance(draw.rate, float | int) else None
        after = before.dropout if before is not None and not before.through else None
        call = Call(name, draw.kind, name in self._layers, rate, draw.on, draw.flagged, after)
        self.calls.append(call)
        if self._measure and draw.on and rate is not None and input is not None and _drops_elements(func, draw):
            call.realised, call.draws = _measured(func, input, args, kwargs)
        out = draw.original()
        if draw.on and not draw.flagged and draw.served is not None and isinstance(out, Tensor):
            self._mark(out, _Trace(name))
        return out

    def _pass(self, func: Any, call: Any) -> Any:
        input = _first(self._args, self._kwargs)
        trace = self._traces.get(id(input))
        if trace is None:
            return call()
        here = self._tracker.next("call").module
        if func is F.batch_norm:
            self.normalised.append((here, trace.dropout, trace.through))
        out = call()
        if isinstance(out, Tensor) and out is not input:
            if func in _VIEWS:
                self._mark(out, trace)
            elif func in _LINEAR and not trace.through:
                self._mark(out, _Trace(trace.dropout, here))
        return out

    def _mark(self, tensor: Tensor, trace: _Trace) -> None:
        self._traces[id(tensor)] = trace
        self._alive.append(tensor)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)


def _drops_elements(func: Any, draw: Draw) -> bool:
    """Whether ones that come out positive have been kept: dropout in all its forms, and not noise or attention."""
    return not draw.flagged and ("dropout" in draw.kind or func is _rate.apply)


def _measured(func: Any, input: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float | None, int]:
    """The fraction of a mask's elements that are kept, in so many of them."""
    shape = tuple(args[3]) if func is _rate.apply else _mask_shape(func, input)
    mask = math.prod(shape)
    if not mask:
        return None, 0
    kept = repetitions = 0
    while repetitions * mask < _ENOUGH and repetitions < _MOST:
        ones = torch.ones_like(input)
        named = {name: ones if value is input else value for name, value in kwargs.items()}
        out = func(*(ones if value is input else value for value in args), **named)
        if bool(((out > 0) & (out != out.amax())).any()):  # noise, of which nothing is kept or dropped
            return None, 0
        first = tuple(slice(None) if size == full else slice(1) for size, full in zip(shape, input.shape, strict=True))
        kept += int((out[first] > 0).sum())
        repetitions += 1
    return kept / (repetitions * mask), repetitions * mask


def _mask_shape(func: Any, input: Tensor) -> tuple[int, ...]:
    """Of torch's functions: a draw for each element, or for each channel."""
    name = func.__name__
    if not ("feature" in name or name[-2:] in ("1d", "2d", "3d")):
        return tuple(input.shape)
    spatial = int(name[-2]) if name[-1] == "d" else input.dim() - 2
    batched = input.dim() - spatial == 2
    return (*input.shape[: 2 if batched else 1], *[1] * (input.dim() - (2 if batched else 1)))

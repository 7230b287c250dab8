"""A handler that follows dropout through a forward: the calls that drop, their rates, and the modules before and after
them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..core import sites
from ..core.hooks import observer
from ..handlers.base import Handler
from ..handlers.calls import RandomCall
from ..handlers.tracker import Tracker, following
from .realized_rate import RealizedRate, mask_of_call, measured

_T = Tensor

_LINEAR = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip
_COPIES = {torch.clone, _T.clone, _T.contiguous, _T.to, _T.float, _T.reshape, torch.reshape, _T.flatten, torch.flatten}


@dataclass
class Call:
    """One call that drops.

    Args:
        module: the name of the module that makes it.
        kind: "dropout", "torchdrop", "attention", ...
        is_layer: whether the module is a dropout layer.
        rate: the probability of dropping, if it is known.
        on: whether the call drops anything.
        flagged: whether it draws a plain random tensor, for any purpose.
        after: the module whose dropout made the call's input, as it is or reshaped; None if none did.
        realized: the fraction of elements kept in `draws` draws; None if it was not measured.
    """

    module: str
    kind: str
    is_layer: bool
    rate: float | None
    on: bool
    flagged: bool
    after: str | None
    realized: float | None = None
    draws: int = 0

    @property
    def unlikely(self) -> bool:
        """Whether dropout at its rate would keep such a share with a probability below 1e-9."""
        return self.rate is not None and RealizedRate(self.realized, self.draws).unlikely(self.rate)


@dataclass(frozen=True)
class _Followed:
    """A tensor that has the output of a module's dropout, or of a linear map after it, which is then named.

    This holds as long as the tensor's version is this one: an operation in place changes it.
    """

    dropout: str
    through: str
    version: int


class Flow(Handler):
    """Lets a forward happen and follows the outputs of its dropout.

    Args:
        model: the model that runs.
        measure: whether the shares that functions keep are measured, by calls of them on ones.

    Attributes:
        calls: the calls that drop or draw, in order.
        normalized: (its module, the dropout, the linear map between) for each batch normalization of a dropout's
            output.
        ran: the modules that were called, each dropout layer with its first input.
    """

    def __init__(self, model: nn.Module, measure: bool) -> None:
        super().__init__(Tracker())
        self.calls: list[Call] = []
        self.normalized: list[tuple[str, str, str]] = []
        self.ran: dict[nn.Module, Tensor | None] = {}
        self._measure = measure
        self._layers = {name for name, m in model.named_modules() if isinstance(m, _DropoutNd)}
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._traces: dict[int, _Followed] = {}
        self._alive: list[Tensor] = []  # an id belongs to a tensor only as long as that exists

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[None]:
        """Within it, the calls of a model are followed."""
        names = dict(model.named_modules())

        def enter(name: str) -> None:
            self._tracker.enter(name)
            self.ran.setdefault(names[name], None)

        @observer
        def meet(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input = _first(args, kwargs)
            if self.ran[layer] is None and input is not None:
                self.ran[layer] = input.detach()

        handles = [names[name].register_forward_pre_hook(meet, with_kwargs=True) for name in self._layers]
        try:
            with following(model, enter, self._tracker.leave), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def dropped_outputs(self, output: Any) -> list[str]:
        """Returns the modules whose dropout made a part of the model's output."""
        traces = [self._trace(leaf) for leaf in leaves(output)]
        return sorted({trace.dropout for trace in traces if trace is not None and not trace.through})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._args, self._kwargs = args, kwargs or {}
        return super().__torch_function__(func, types, args, kwargs)

    def _turns_on(self) -> bool:
        return False

    def _meet(self, func: Any, draw: RandomCall) -> Any:
        name = self._tracker.next(draw.kind).module
        input, args, kwargs = _first(self._args, self._kwargs), self._args, self._kwargs
        before = self._trace(input)
        rate = float(draw.rate) if isinstance(draw.rate, (float, int)) else None
        after = before.dropout if before is not None and not before.through else None
        call = Call(name, draw.kind, name in self._layers, rate, draw.on, draw.flagged, after)
        self.calls.append(call)
        drops = draw.on and not draw.flagged and ("dropout" in draw.kind or func is sites.apply)
        if self._measure and drops and rate is not None and input is not None and not call.is_layer:

            def on_ones(ones: Tensor) -> Tensor:
                named = {key: ones if value is input else value for key, value in kwargs.items()}
                return func(*(ones if value is input else value for value in args), **named)

            call.realized, call.draws = measured(on_ones, input, mask_of_call(func, args, input))
        out = draw.original()
        if drops and isinstance(out, Tensor):
            self._mark(out, name)
        return out

    def _pass(self, func: Any, call: Any) -> Any:
        input, args, kwargs = _first(self._args, self._kwargs), self._args, self._kwargs
        trace = self._trace(input)
        out = call()
        if trace is None or input is None or _version(input) != trace.version:
            return out
        here = self._tracker.next("call").module
        if func is F.batch_norm:
            if (args[1] if len(args) > 1 else kwargs.get("running_mean")) is not None:
                self.normalized.append((here, trace.dropout, trace.through))
        elif func in _LINEAR:
            if not trace.through:
                self._mark(out, trace.dropout, here)
        else:
            for leaf in leaves(out):
                if leaf is not input and (func in _COPIES or _same_memory(leaf, input)):
                    self._mark(leaf, trace.dropout, trace.through)
        return out

    def _mark(self, tensor: Tensor, dropout: str, through: str = "") -> None:
        self._traces[id(tensor)] = _Followed(dropout, through, _version(tensor))
        self._alive.append(tensor)

    def _trace(self, tensor: Tensor | None) -> _Followed | None:
        trace = self._traces.get(id(tensor))
        return trace if trace is not None and tensor is not None and trace.version == _version(tensor) else None


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the tensor that a call works on."""
    return next((a for a in (kwargs.get("input"), *args, *kwargs.values()) if isinstance(a, Tensor)), None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def leaves(output: Any) -> Iterator[Tensor]:
    """Yields the tensors in a model's output, within sequences, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from leaves(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from leaves(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from leaves(getattr(output, field.name))

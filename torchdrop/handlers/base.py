"""The base of all handlers: a function mode that sees the random calls of a model while it runs.

A handler decides how a call is served: `Trace` records it, `Substitute` gives it a mask of its own, `Disable` leaves it
out, and an audit follows its result. A call that no handler wants goes to the function mode outside of it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..core import sites
from ..core.torch_state import in_backward
from ..functional import dropout
from ..kernels.masking import SERVED
from ..ops import operators
from .calls import RandomCall, Slot
from .random_functions import DESCRIBE, OPENED, describe_other
from .tracker import Tracker

SEEN = frozenset((sites.is_on, *OPENED, *DESCRIBE))
"""The functions that draw, and those whose result decides if others do: their calls matter to a handler as such."""


def refuse_backward() -> None:
    """Refuses a forward that backward makes."""
    if in_backward():
        refuse_checkpoint()


def refuse_checkpoint() -> None:
    raise RuntimeError(
        "activation checkpointing runs a part of the model again in backward, where Monte Carlo masks cannot be given "
        "to it again: switch checkpointing off in the model, or make the pass under torch.no_grad()"
    )


def checkpointed() -> bool:
    """Whether this call is made from within torch.utils.checkpoint."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def _is_plain_kind(input: Tensor) -> bool:
    """Whether a mask is applied to it as it is, without a look at its type, layout or element type."""
    return type(input) is Tensor and input.layout is torch.strided and input.dtype in SERVED


class Handler(TorchFunctionMode):
    """Describes the random calls of a model that is running, and passes on everything else.

    A subclass decides how to serve a random call (`_meet`), any other call (`_pass`), the question whether a layer is
    on (`_is_on`, or `_turns_on` for those whose own flag is off), and calls while its model does not run (`_outside`).

    Attributes:
        others: functions that draw and are not in `DESCRIBE`.
        decides: whether the handlers outside of this one leave the calls to it while its model runs.
        sees_functions: whether it serves functions of torch, and not torchdrop's layers and functions alone.
    """

    decides = True
    sees_functions = True

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.others: set[Any] = set()
        self._tracker = tracker
        self._bound: Slot | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._tracker.running or (self.decides and innermost() is not self):
            return self._outside(func, args, kwargs)
        return self._inside(func, args, kwargs)

    def _outside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Serves a call while the model is not running, or another context's model runs."""
        if func in DESCRIBE:
            refuse_backward()
        return func(*args, **kwargs)

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        describe = DESCRIBE.get(func) or (describe_other if func in self.others else None)
        if describe is not None:
            if self._bound is not None and func is sites.apply:
                slot, self._bound = self._bound, None
                operator, input, params, shape, inplace, _ = args
                return slot.apply(operator, input, params, shape, inplace)
            return self._meet(func, describe(self, func, *args, **kwargs))
        if func is sites.is_on:
            return self._is_on(*args)
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        return self._pass(func, lambda: func(*args, **kwargs))

    def layer(self, slot: Slot, function: Callable[..., Tensor], input: Tensor, rate: float, inplace: bool) -> Tensor:
        """Calls a dropout function of torchdrop that takes its mask from the slot."""
        if function is dropout and not inplace and _is_plain_kind(input) and 0.0 < rate < 1.0:
            return slot.apply(operators.masked, input, slot.params(rate, input.shape), input.shape, False)
        self._bound = slot
        try:
            with self:
                return function(input, rate, True, inplace)
        finally:
            self._bound = None

    def __enter__(self) -> Any:
        _entered.handlers.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _entered.handlers.pop()
        super().__exit__(*exception)

    @property
    def is_entered(self) -> bool:
        """Whether the handler is on in this thread."""
        return self in _entered.handlers

    def _pass(self, func: Any, call: Callable[[], Any]) -> Any:
        """Serves a call that is not random."""
        return call()

    def _turns_on(self) -> bool:
        raise NotImplementedError

    def _is_on(self, training: bool) -> bool:
        return training or self._turns_on()

    def _meet(self, func: Any, draw: RandomCall) -> Any:
        raise NotImplementedError


class _Entered(threading.local):
    """The handlers that are on in this thread, outermost first."""

    def __init__(self) -> None:
        self.handlers: list[Handler] = []


_entered = _Entered()


def innermost() -> Handler | None:
    """Returns the last of this thread's handlers that decide and whose model is running."""
    for one in reversed(_entered.handlers):
        if one.decides and one._tracker.stack:
            return one
    return None


def is_handled() -> bool:
    """Whether a handler of this thread serves the functions that a model which is running calls."""
    return any(one.sees_functions and one._tracker.stack for one in _entered.handlers)

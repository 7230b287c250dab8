"""The handler of training: it serves the random calls that a module's own code makes, under keys drawn anew.

`replace` puts it in force while the forward of such a module runs in train mode. Calls of torchdrop's layers pass
through it, and inside Monte Carlo inference, searches and audits all calls do: those serve them as they serve a model
that was not replaced.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core import sites
from ..core.rate import Probability, as_rate, read_rate
from ..core.torch_state import is_compiling
from ..functional import scaled_dot_product_attention
from ..kernels.mask_params import MaskParams
from ..ops import operators
from .base import is_handled
from .calls import RandomCall, Slot
from .random_functions import DESCRIBE, OPENED, describe_other

SERVED = {
    function: describe
    for function, describe in DESCRIBE.items()
    if function not in (sites.apply, sites.draw) and describe is not describe_other
}
"""The functions of torch that are served in training."""

_SEEN = frozenset((*SERVED, *OPENED))

_RATE = list(inspect.signature(F.multi_head_attention_forward).parameters).index("dropout_p")


_STANDS_IN = 0.123456789
"""A rate that no one chooses, in the place of the one that is given to attention with several heads."""


class NewMasks(Slot):
    """Masks and numbers under keys that are drawn as torchdrop's layers draw theirs."""

    by_rows = False

    def params(self, rate: Any, shape: Sequence[int]) -> MaskParams | Tensor:
        return as_rate(rate, None).params_for(shape)

    def apply(
        self, operator: operators.Operator, x: Tensor, params: MaskParams | Tensor, shape: Sequence[int], inplace: bool
    ) -> Tensor:
        return sites.apply(operator, x, params, shape, inplace)

    def attention(self, rate: Any, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        if query.is_nested:  # its samples have different lengths, so its weights have no shape
            return F.scaled_dot_product_attention(query, key, value, dropout_p=float(rate), **how)
        return scaled_dot_product_attention(query, key, value, dropout_p=rate, **how)

    def another(self, number: int) -> Slot:
        return self

    def words(self, like: Tensor) -> Tensor:
        return sites.random_bits(like, like.shape)

    def normal(self, like: Tensor) -> Tensor:
        return sites.standard_normal(like, like.shape).to(like.dtype)


NEW_MASKS = NewMasks()


def compiled_rate(p: Probability) -> Tensor:
    """Returns a probability of dropping in the form in which compiled code does not look at its value."""
    return torch.as_tensor(p, dtype=torch.float64, device="cpu")


class OwnRate:
    """The rate of one call that was set by name.

    Attributes:
        keep_prob, p: its two views.
    """

    def __init__(self, keep_prob: Probability) -> None:
        self.keep_prob, self.p = read_rate(None, keep_prob)
        self._compiled = compiled_rate(self.p)

    def value(self) -> Probability:
        """Returns the probability of dropping, for eager or for compiled code."""
        return self._compiled if is_compiling() else self.p


class Calls:
    """The random calls of one module, by name: "attention:0" is the first attention in a call of the module.

    Attributes:
        own: the rates that were set by name.
        passed: the rates that the module's code passed when it ran last in train mode, not compiled.
        numbers: the rates that the module holds in attributes, for compiled code.
        off: whether calls with a rate drop nothing.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, Tensor] = {}
        self.own: dict[str, OwnRate] = {}
        self.passed: dict[str, Probability] = {}
        self.off = False


class Training(TorchFunctionMode):
    """Serves the calls of one module while its forward runs once."""

    ignores_layers = True

    def __init__(self, module: nn.Module, calls: Calls, handled: bool, running: list[nn.Module]) -> None:
        super().__init__()
        self._module, self._calls, self._handled, self._running = module, calls, handled, running
        self._numbers: dict[str, int] = {}
        self._given: Probability | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _SEEN or self._running[-1] is not self._module:
            if func is Tensor.unflatten:  # Dynamo cannot enter its call of super()
                func = torch.unflatten
            return func(*args, **kwargs)
        describe = SERVED.get(func)
        if describe is None:
            return self._open(func, args, kwargs)
        if kwargs.get("generator") is not None or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        return self._serve(describe(self, func, *args, **kwargs))

    def _open(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Serves the calls that a function of torch makes."""
        if func is F.multi_head_attention_forward and len(args) > _RATE and not self._handled:
            # It compares the rate with 0, which compiled code could not, and at 0 no key would be drawn.
            self._given, args = args[_RATE], (*args[:_RATE], _STANDS_IN, *args[_RATE + 1 :])
        try:
            with self:
                return OPENED[func](*args, **kwargs)
        finally:
            self._given = None

    def _serve(self, call: RandomCall) -> Any:
        stands_in = self._given is not None and call.rate == _STANDS_IN  # not where its training flag is False
        rate: Any = self._given if stands_in else call.rate
        on, own = call.on, None
        if call.at is not None:
            name = self._name(call.kind)
            own = self._calls.own.get(name)
            trains = self._module.training and call.training is not False
            if trains and not is_compiling():
                self._calls.passed[name] = rate
            if own is not None:
                rate = own.value()
            on = trains and (on or own is not None or not call.is_split)
        off = self._calls.off and call.at is not None
        if on and not (self._handled or is_compiling()) and _checkpointed_inside():
            if off or own is not None:
                raise RuntimeError(
                    f"the code of {type(self._module).__name__} makes the call {name!r} within activation "
                    "checkpointing, which makes it again in backward, where neither `disabled` nor a rate that was set "
                    "by name reaches it: switch checkpointing off in the model, or checkpoint the whole module"
                )
            return call.at(rate) if stands_in and call.at is not None else call.original()
        if off and not self._handled:
            return call.plain()
        if self._handled and own is not None and on and call.at is not None:
            return call.at(rate)
        if self._handled or not on or call.served is None:
            return call.original()
        return call.served(NEW_MASKS, rate)

    def _name(self, kind: str) -> str:
        """Returns the name of the next call of this kind."""
        number = self._numbers.get(kind, 0)
        self._numbers[kind] = number + 1
        return f"{kind}:{number}"

    def layer(
        self, slot: Slot, function: Callable[..., Tensor], input: Tensor, rate: Probability, inplace: bool
    ) -> Tensor:
        """Calls a dropout function of torchdrop."""
        return function(input, rate, True, inplace)


def _checkpointed_inside() -> bool:
    """Whether the running module's forward makes this call within torch.utils.checkpoint: backward then runs the call
    again and not the forward, so it would not be served again. Both times it keeps PyTorch's mask."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not forward.__code__:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def forward(module: nn.Module, calls: Calls, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a module's own forward so that its random calls are served."""
    compiling = is_compiling()
    handled = not compiling and is_handled()
    running = _traced if compiling else _running.modules
    serving = bool(calls.own) if handled else module.training
    if not (serving or running):
        return own(module, *args, **kwargs)
    running.append(module)
    try:
        if not serving:
            return own(module, *args, **kwargs)
        with Training(module, calls, handled, running):
            return own(module, *args, **kwargs)
    finally:
        running.pop()


class _Running(threading.local):
    """The reached modules that run in this thread, outermost first: each serves its own calls alone."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []


_running = _Running()
_traced: list[nn.Module] = []
"""The same while Dynamo traces, which one thread does at a time."""

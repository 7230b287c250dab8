"""Calls of a model's modules within `mc_dropout`, passed to the context in the thread that has entered it."""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

from torch import nn

Receiver = Callable[[nn.Module, str, tuple[Any, ...], dict[str, Any]], Any]
"""It is called with the module, the name of the attribute that was called, and the arguments."""

CALLS = ("_call_impl", "forward")
"""The attributes that are looked up on an instance when a module is called: through ``__call__``, and directly."""

COMPILED = "_compiled_call_impl"
"""The attribute that a module's `compile` sets. If it is there, `__call__` looks at nothing else."""

_MISSING: Any = object()
_lock = threading.Lock()


class _Levels(threading.local):
    """The number of contexts that this thread is in."""

    def __init__(self) -> None:
        self.depth = 0


_levels = _Levels()


def next_level() -> int:
    """Returns the level of a context which this thread enters now."""
    return _levels.depth + 1


class _Redirect:
    """A callable in the place of one of a module's calls."""

    __slots__ = ("_attribute", "_module", "_redirected", "before")

    def __init__(self, redirected: Redirected, module: nn.Module, attribute: str) -> None:
        self._redirected, self._module, self._attribute = redirected, module, attribute
        self.before = module.__dict__.get(attribute, _MISSING)

    @property
    def level(self) -> int:
        """The level of its context, in the thread of that; 0 in other threads, in which it has no effect."""
        return self._redirected.level if threading.get_ident() == self._redirected.thread else 0

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        if self.before is not _MISSING:
            return self.before
        return types.MethodType(getattr(type(self._module), self._attribute), self._module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.level:
            return self._redirected.handler(self._module, self._attribute, args, kwargs)
        return self.__wrapped__(*args, **kwargs)

    def __reduce__(self) -> Any:
        """A copy of the module, or a pickled one, is in no context."""
        return functools.partial, (getattr(type(self._module), self._attribute), self._module)


def beneath(call: Any, level: int | None) -> Any:
    """Returns the call that a context of this level finds in a module: that of a context within it, or the original.

    With None contexts do not count. Returns None if a module has nothing of its own.
    """
    while isinstance(call, _Redirect):
        if level is not None and call.level > level:
            return call
        call = call.before
    return None if call is _MISSING else call


def is_redirected(call: Any) -> bool:
    """Whether a context has replaced the call."""
    return isinstance(call, _Redirect)


def is_nested(call: Any) -> bool:
    """Whether one context has replaced a call that another one had replaced."""
    return isinstance(call, _Redirect) and isinstance(call.before, _Redirect)


class Redirected:
    """A context in which the calls of a model's modules go to a handler, in this thread alone.

    Contexts of several threads, on the same modules, may be entered and left in any order.
    """

    def __init__(self, model: nn.Module, handler: Receiver) -> None:
        self.handler = handler
        self._modules = list(model.modules())
        self.thread: int = threading.get_ident()
        self.level: int = next_level()

    def __enter__(self) -> None:
        _levels.depth = self.level
        with _lock:
            for module in self._modules:
                for attribute in CALLS:
                    module.__dict__[attribute] = _Redirect(self, module, attribute)
                if module.__dict__.get(COMPILED) is not None:
                    module.__dict__[COMPILED] = _Redirect(self, module, COMPILED)

    def __exit__(self, *exception: Any) -> None:
        _levels.depth = self.level - 1
        with _lock:
            for module in self._modules:
                for attribute in (*CALLS, COMPILED):
                    self._remove(module, attribute)

    def _remove(self, module: nn.Module, attribute: str) -> None:
        above, call = None, module.__dict__.get(attribute)
        while isinstance(call, _Redirect):
            if call._redirected is self:
                if above is not None:
                    above.before = call.before
                elif call.before is _MISSING:
                    del module.__dict__[attribute]
                else:
                    module.__dict__[attribute] = call.before
                return
            above, call = call, call.before

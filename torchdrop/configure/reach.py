"""Modules whose own code draws: a class of their own, whose forward runs with `handlers.training` in force."""

from __future__ import annotations

import functools
import types
from typing import Any, NoReturn

import torch
from torch import nn

from ..core.rate import Rated
from ..handlers import training
from .drawing import random_calls

_CALLS = "_torchdrop_calls"

STOCK_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""The layers of torch.nn that are not reached but swapped."""


def reach(module: nn.Module) -> None:
    """Gives a module the class under which its random calls are served."""
    vars(module)[_CALLS] = training.Calls()
    _change_class(module, _reached(type(module)))


def leave(module: nn.Module) -> None:
    """Gives a module its own class back."""
    vars(module).pop(_CALLS, None)
    _change_class(module, type(module)._torchdrop_own)  # type: ignore[attr-defined]


def _change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    forwards = class_forwards(module)
    module.__class__ = kind
    vars(module).update({name: types.MethodType(kind.forward, module) for name in forwards})


def has_own_forward(module: nn.Module) -> bool:
    """Whether a change of a module's class would not change its forward, since its instance has another.

    Accelerate's hooks set one that calls `_old_forward`, which can be changed too.
    """
    own = class_forwards(module)
    hooked = "_hf_hook" in vars(module) and "_old_forward" in own
    return "forward" in vars(module) and "forward" not in own and not hooked


def class_forwards(module: nn.Module) -> list[str]:
    """Returns the attributes of an instance that are its class's forward, bound to it."""
    forward = getattr(type(module), "forward", None)
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is forward
    ]


def is_reachable(module: nn.Module) -> bool:
    """Whether a module's own code draws, in a form that can be served."""
    if hasattr(type(module), "_torchdrop_own") or type(module) in STOCK_LAYERS:
        return False
    if isinstance(module, (Rated, torch.jit.ScriptModule)):
        return False
    return bool(random_calls(type(module))) and not has_own_forward(module)


def is_reached(module: nn.Module) -> bool:
    """Whether a module has the class that `reach` gave it, and not one that was made of that."""
    return "_torchdrop_own" in vars(type(module))


def calls_of(module: nn.Module) -> training.Calls | None:
    """Returns the random calls of a module that is reached, by name; None for others."""
    return vars(module).get(_CALLS) if hasattr(type(module), "_torchdrop_own") else None


_classes: dict[type, type[nn.Module]] = {}


def _reached(own: type[nn.Module]) -> type[nn.Module]:
    """Returns the class of reached modules for one class of modules."""
    if own not in _classes:
        _classes[own] = _subclass(own)
    return _classes[own]


def _subclass(own: Any) -> type[nn.Module]:
    """Makes a class whose forward is served. It has the name of its base, so that what looks modules up by the names of
    their classes finds them."""
    own_forward = own.forward

    @functools.wraps(own_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = getattr(self, _CALLS, None)
        if calls is None:  # the module's class was called, by code that makes another one like it
            calls = self._torchdrop_calls = training.Calls()
        return training.forward(self, calls, own_forward, args, kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        made = own.__reduce_ex__(self, max(protocol, 2))
        if not is_reached(self):  # its class was made of this one
            return made
        return _made, (own, *made[1][1:]), *made[2:]

    return type(own)(
        own.__name__,
        (own,),
        {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__doc__": own.__doc__,
            "__reduce_ex__": reduced,
            "__prepare_scriptable__": _refuse_script,
            "_torchdrop_own": own,
            "forward": forward,
        },
    )


def _refuse_script(self: nn.Module) -> NoReturn:
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(self).__name__}, whose calls torchdrop.replace has made torchdrop's: "
        "call undo() of what it returned, or torchdrop.replace(model, to='torch'), first"
    )


def _made(own: type[nn.Module], *args: Any) -> nn.Module:
    """Makes an empty module of the reached class, to be filled from a pickle or a copy."""
    return own.__new__(_reached(own), *args)

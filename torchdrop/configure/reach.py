"""Modules whose own code draws: a class of their own, whose forward runs with `handlers.training` in force."""

from __future__ import annotations

import functools
import types
from typing import Any, NoReturn

import torch
from torch import nn

from ..core.rate import Rated
from ..core.torch_state import is_compiling
from ..handlers import training
from .drawing import passed_rates, random_calls

_CALLS = "_torchdrop_calls"

STOCK_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""The layers of torch.nn that are not reached but swapped."""


def reach(module: nn.Module) -> None:
    """Gives a module the class under which its random calls are served."""
    passed = [name for name in passed_rates(type(module)) if "drop" in name.lower()]
    numbers = frozenset(name for name in passed if type(vars(module).get(name)) in (int, float))
    vars(module)[_CALLS] = training.Calls()
    _change_class(module, _reached(type(module), numbers))
    for name in numbers:
        setattr(module, name, vars(module)[name])
    for child in _children(module):
        if isinstance(child, Rated):
            child.is_passed = True


def leave(module: nn.Module) -> None:
    """Gives a module its own class back."""
    vars(module).pop(_CALLS, None)
    _change_class(module, type(module)._torchdrop_own)  # type: ignore[attr-defined]
    for child in _children(module):
        vars(child).pop("is_passed", None)


def _children(module: nn.Module) -> list[nn.Module]:
    """Returns the layers whose rate the module's code passes to random functions."""
    children = [module._modules.get(name) for name in passed_rates(type(module))]
    return [child for child in children if child is not None]


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


_classes: dict[tuple[type, frozenset[str]], type[nn.Module]] = {}


def _reached(own: type[nn.Module], numbers: frozenset[str]) -> type[nn.Module]:
    """Returns the class of reached modules for one class of modules, whose code passes on these numbers."""
    if (own, numbers) not in _classes:
        _classes[own, numbers] = _subclass(own, numbers)
    return _classes[own, numbers]


def _subclass(own: Any, numbers: frozenset[str]) -> type[nn.Module]:
    """Makes a class whose forward is served. It has the name of its base, so that what looks modules up by the names of
    their classes finds them."""
    own_forward = own.forward

    @functools.wraps(own_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return training.forward(self, _calls(self), own_forward, args, kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        made = own.__reduce_ex__(self, max(protocol, 2))
        if not is_reached(self):  # its class was made of this one
            return made
        return _made, (own, numbers, *made[1][1:]), *made[2:]

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
            **{name: _number(name) for name in numbers},
        },
    )


def _calls(module: Any) -> training.Calls:
    calls = getattr(module, _CALLS, None)
    if calls is None:  # the module's class was called, by code that makes another one like it
        calls = module._torchdrop_calls = training.Calls()
    return calls


def _number(name: str) -> property:
    """Makes the attribute of a rate. Compiled code, which passes it on and does nothing else with it, gets it as a
    tensor, and so need not be compiled again for another rate."""

    def get(self: Any) -> Any:
        if is_compiling() and self.training:
            return self._torchdrop_calls.numbers[name]
        if name not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return vars(self)[name]

    def put(self: Any, value: Any) -> None:
        vars(self)[name] = value
        _calls(self).numbers[name] = training.compiled_rate(value)

    return property(get, put)


def _refuse_script(self: nn.Module) -> NoReturn:
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(self).__name__}, whose calls torchdrop.replace has made torchdrop's: "
        "call undo() of what it returned, or torchdrop.replace(model, to='torch'), first"
    )


def _made(own: type[nn.Module], numbers: frozenset[str], *args: Any) -> nn.Module:
    """Makes an empty module of the reached class, to be filled from a pickle or a copy."""
    return own.__new__(_reached(own, numbers), *args)

"""Nodes for torch.fx's symbolic tracing: it records a call of the layer or of the function, not the operations inside.

torch.nn's modules are leaves of such a trace and its functions are nodes, so that dropout in a graph follows the flags
and rates of its modules. Tracers do not recognize ours, so each looks at its input: a trace has a Proxy for a tensor.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.fx import Proxy

from .rate import Default

Forward = TypeVar("Forward", bound=Callable[..., Any])


def holds_proxy(*values: Any) -> bool:
    for value in values:  # noqa: SIM110 (a generator takes twice as long)
        if isinstance(value, Proxy):
            return True
    return False


def recorded(function: Callable[..., Any], arguments: Mapping[str, Any], tracer: Any = None) -> Any:
    """Makes a node that calls a function with these arguments, by name. A default rate is left out: the function has
    it."""
    tracer = _tracer(arguments.values()) if tracer is None else tracer
    given = {name: value for name, value in arguments.items() if not isinstance(value, Default)}
    return tracer.create_proxy("call_function", function, (), _without_modules(tracer, given))


def called(owner: type, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Makes a node that calls a layer, whose forward is that of the class `owner`.

    If the call comes from the forward of a subclass or of the instance, or if there are hooks, these are in the trace
    themselves, and the node calls the forward of `owner` only.
    """
    tracer = _tracer((*args, *kwargs.values()))
    path = tracer.path_of_module(layer)
    if not path:
        raise RuntimeError(
            f"torch.fx traces {type(layer).__name__} as a part of a model, whose flags it follows, and got the layer "
            "itself: trace torch.nn.Sequential(layer)"
        )
    kwargs = _without_modules(tracer, kwargs)
    args = tuple(_without_modules(tracer, dict(enumerate(args))).values())
    bare = not (layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer))
    if bare and type(layer).forward is owner.forward:  # type: ignore[attr-defined]
        return tracer.create_proxy("call_module", path, args, kwargs)
    held = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_function", forward_of, (held, owner.__qualname__, *args), kwargs)


def forward_of(layer: nn.Module, owner: str, *args: Any, **kwargs: Any) -> Any:
    """Runs the forward of one of a layer's classes, which is given by its name."""
    kind = next(kind for kind in type(layer).__mro__ if kind.__qualname__ == owner)
    return kind.forward(layer, *args, **kwargs)  # type: ignore[attr-defined]


def leaf(forward: Forward) -> Forward:
    """Wraps a forward, so that it returns a node for a Proxy."""
    owner: list[type] = []

    def node(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not owner:
            owner.append(next(kind for kind in type(self).__mro__ if vars(kind).get("forward") is looking))
        return called(owner[0], self, *args, **kwargs)

    def one(self: nn.Module, input: Any) -> Any:
        return node(self, input) if isinstance(input, Proxy) else forward(self, input)

    def several(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for value in args:
            if isinstance(value, Proxy):
                return node(self, *args, **kwargs)
        if kwargs and holds_proxy(*kwargs.values()):
            return node(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    # A wrapper of one argument takes half the time of one that passes on any arguments.
    alone = tuple(inspect.signature(forward).parameters) == ("self", "input")
    looking: Any = functools.wraps(forward)(one if alone else several)
    # Dynamo counts compilations by code object, up to 8 of one, so each layer has its own.
    looking.__code__ = looking.__code__.replace(co_name=forward.__qualname__.replace(".", "_"))
    return looking


def _tracer(values: Any) -> Any:
    return next(value.tracer for value in values if isinstance(value, Proxy))


def _without_modules(tracer: Any, arguments: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the arguments, with each module among them replaced by a node that gets it."""
    return {
        name: tracer.create_proxy("get_attr", tracer.path_of_module(value), (), {})
        if isinstance(value, nn.Module)
        else value
        for name, value in arguments.items()
    }

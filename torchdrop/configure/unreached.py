"""The dropout that a swap of layers cannot reach: a function call, a number, or a part of a fused module."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..core.rate import Rated
from ..handlers.random_functions import DESCRIBE
from .rate_sites import names_of, rate_sites

_CALLS = {function for function in DESCRIBE if "drop" in function.__name__} | {F.scaled_dot_product_attention}


@dataclass(frozen=True)
class Unreached:
    """Dropout in a model that is no layer to swap.

    Args:
        name: the name of the module that drops.
        kind: the module's class.
        what: a description of the dropout, such as "holds a rate as a number in .dropout".
        advice: a remedy.
    """

    name: str
    kind: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name or '(model)'} ({self.kind}): {self.what}; {self.advice}"


def unreached(model: nn.Module) -> list[Unreached]:
    """Finds all that can be seen without running the model: attributes, and calls in the source of the forwards."""
    found = []
    for site in rate_sites(model):
        if isinstance(site.module, Rated):
            continue
        if isinstance(site.module, _DropoutNd):
            if not type(site.module).__module__.startswith("torch."):
                what = "a subclass of torch.nn's dropout with code of its own"
                found.append(Unreached(site.name, site.kind, what, _settable(site.name)))
            elif has_own_forward(site.module):
                what = "its instance has a forward of its own, which calls that of torch.nn"
                advice = "call torchdrop.replace before what sets it, or set the class's forward again"
                found.append(Unreached(site.name, site.kind, what, advice))
            continue
        what = f"holds a rate as a number in .{site.attribute} (keep_prob {site.keep_prob:g})"
        found.append(Unreached(site.name, site.kind, what, _settable(site.name)))
    advice = "its masks stay PyTorch's; call torchdrop.functional there to have ours"
    for module, names in names_of(model).items():
        calls = functional_calls(type(module))
        if calls and not isinstance(module, (_DropoutNd, nn.MultiheadAttention)):
            what = f"calls {', '.join(calls)} in its forward"
            found.append(Unreached(names[0], type(module).__name__, what, advice))
    return found


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


def _settable(name: str) -> str:
    return f"torchdrop.set_keep_prob(model, {{{name!r}: ...}}) sets it"


_known: dict[type, list[str]] = {}


def functional_calls(kind: type[nn.Module]) -> list[str]:
    """Returns the dropout functions of torch that a class calls by name, itself or through functions of its package.

    >>> functional_calls(nn.Linear), functional_calls(nn.TransformerEncoderLayer)
    ([], [])
    """
    if kind not in _known:
        found: set[str] = set()
        seen: set[Any] = set()
        for base in kind.__mro__:
            if base is nn.Module:
                break
            for value in vars(base).values():
                if isinstance(value, types.FunctionType):
                    found |= set(_calls_in(value, seen))
        _known[kind] = sorted(found)
    return _known[kind]


def _calls_in(function: types.FunctionType, seen: set[Any]) -> Iterator[str]:
    """Yields dropout functions that a function's source names, and those in functions of its package that it names."""
    function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType) or function in seen:
        return
    seen.add(function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    package = (function.__module__ or "").partition(".")[0]
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Name, ast.Attribute)):
            continue
        value = _resolved(node, function.__globals__)
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)) and value in _CALLS:
            yield ast.unparse(node)
        elif isinstance(value, types.FunctionType) and package != "torch" and _is_of_package(value, package):
            yield from _calls_in(value, seen)


def _is_of_package(function: types.FunctionType, package: str) -> bool:
    return (function.__module__ or "").partition(".")[0] == package


def _resolved(node: ast.expr, names: dict[str, Any]) -> Any:
    """Returns the object that a dotted name has in a module, or None: nothing is called or looked up dynamically."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        base = _resolved(node.value, names)
        return vars(base).get(node.attr) if isinstance(base, types.ModuleType) else None
    return None

"""The random functions that modules call in their own code, found in its source without running it."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..handlers.random_functions import OPENED
from ..handlers.training import SERVED

_FUNCTIONS = {*SERVED, *OPENED}
_METHODS = {function.__name__ for function in SERVED if hasattr(Tensor, function.__name__)} - {"dropout"}
_ATTENTION = "ALL_ATTENTION_FUNCTIONS"
"""The table from which models of transformers take their attention function."""


_NOT_FOLLOWED = frozenset(("torch", "torchdrop", "numpy", *sys.stdlib_module_names))
"""Packages whose functions are not searched: what is random in those of torch is known by name."""

_known: dict[type, list[str]] = {}


def random_calls(kind: type[nn.Module]) -> list[str]:
    """Returns the random functions and methods that the forward of a class calls by name, itself or through methods
    and functions that it names.

    >>> random_calls(nn.Linear), random_calls(nn.TransformerEncoderLayer), random_calls(nn.MultiheadAttention)
    ([], [], ['F.multi_head_attention_forward'])
    """
    if kind not in _known:
        _known[kind] = sorted(set(_Search(kind).calls()))
    return _known[kind]


def passed_rates(kind: type[nn.Module]) -> set[str]:
    """Returns the attributes of a class whose value, or whose rate `p`, its forward gives to random functions and uses
    for nothing else, except where it chooses between that and a constant.

    >>> "dropout" in passed_rates(nn.MultiheadAttention), "num_heads" in passed_rates(nn.MultiheadAttention)
    (True, False)
    """
    search = _Search(kind)
    list(search.calls())
    passed: set[str] = set()
    used: set[str] = set()
    for function in search.methods:
        for name, is_passed in _uses(function):
            (passed if is_passed else used).add(name)
    return passed - used


def _uses(method: types.FunctionType) -> Iterator[tuple[str, bool]]:
    """Yields the attributes of the module that a method reads as values, and whether they go to a random function."""
    tree, names, me = _tree(method), method.__globals__, method.__code__.co_varnames[:1]
    if tree is None:
        return
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in parents:
        if not (isinstance(node, ast.Attribute) and _is_name(node.value, me)):
            continue
        use: ast.AST = node
        above = parents[use]
        if isinstance(above, ast.Attribute):
            if above.attr != "p":
                continue  # a part of a layer, which is no rate
            use, above = above, parents[above]
        elif isinstance(above, ast.Call) and above.func is node:
            continue  # a layer or a method that is called
        while isinstance(above, ast.IfExp) and use is not above.test:
            use, above = above, parents[above]
        if isinstance(above, ast.keyword):
            use, above = above, parents[above]
        is_passed = isinstance(above, ast.Call) and use is not above.func and _is_random(above.func, names)
        yield node.attr, is_passed


def _is_random(function: ast.expr, names: dict[str, Any]) -> bool:
    if isinstance(function, ast.Name) and function.id == "attention_interface":
        return True
    value = _resolved(function, names)
    return _is_function(value) and value in _FUNCTIONS


class _Search:
    """A search through the source of one class.

    Attributes:
        methods: the methods of the class that were searched.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        self._kind = kind
        self._seen: set[Any] = set()
        self.methods: list[types.FunctionType] = []

    def calls(self) -> Iterator[str]:
        if issubclass(self._kind, nn.RNNBase) and self._kind.forward.__module__.startswith("torch."):
            yield f"torch.{self._kind.__name__.lower()}"  # it names torch._VF, which is no module of functions
            return
        forward = getattr(self._kind, "forward", None)
        if isinstance(forward, types.FunctionType) and forward is not nn.Module.forward:
            yield from self._calls_in(forward, self._kind)
        if any((function.__module__ or "").endswith("_propagate") for function in self._seen):
            # torch_geometric's generated code calls methods of the class that the source does not name.
            for name in ("message", "update", "edge_update", "message_and_aggregate"):
                yield from self._calls_in(getattr(self._kind, name), self._kind)

    def _calls_in(self, function: Any, owner: type | None) -> Iterator[str]:
        """Yields the random functions that a function's source names, and those in the functions that it names."""
        function = inspect.unwrap(function)
        if not isinstance(function, types.FunctionType) or function in self._seen:
            return
        self._seen.add(function)
        if owner is not None:
            self.methods.append(function)
        tree = _tree(function)
        names = {**function.__globals__, **_closure(function)}
        package = _package(function)
        me = function.__code__.co_varnames[:1] if owner is not None else ()
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.Name) and node.id == _ATTENTION:
                yield "attention_interface"
            if not isinstance(node, (ast.Name, ast.Attribute)):
                continue
            value = _resolved(node, names)
            if value is None and isinstance(node, ast.Attribute):
                holder = owner if _is_name(node.value, me) else _super(node.value, names, owner)
                if holder is not None:
                    yield from self._calls_in(getattr(holder, node.attr, None), owner)
                elif node.attr in _METHODS:
                    yield f"Tensor.{node.attr}"
            elif _is_function(value) and value in _FUNCTIONS:
                yield ast.unparse(node)
            elif package == "torch" or _package(value) in _NOT_FOLLOWED:
                continue
            elif isinstance(value, types.FunctionType):
                yield from self._calls_in(value, None)
            elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
                yield from self._calls_in(value.forward, None)


def _is_name(node: ast.expr, names: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _super(node: ast.expr, names: dict[str, Any], owner: type | None) -> Any:
    """Returns what `super()` is in a method of the class that `names` has as `__class__`; None if it is not called."""
    defining = names.get("__class__")
    is_super = isinstance(node, ast.Call) and _is_name(node.func, ("super",))
    if not is_super or owner is None or not isinstance(defining, type) or not issubclass(owner, defining):
        return None
    return super(defining, owner)


def _is_function(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType))


def _package(value: Any) -> str:
    return (getattr(value, "__module__", None) or "").partition(".")[0]


def _closure(function: types.FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # it is empty yet
            continue
    return found


@functools.cache
def _tree(function: types.FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _resolved(node: ast.expr, names: dict[str, Any]) -> Any:
    """Returns the object that a dotted name has in a module, or None: nothing is called or looked up dynamically."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        base = _resolved(node.value, names)
        if isinstance(base, types.ModuleType) or base is Tensor:
            return vars(base).get(node.attr)
    return None

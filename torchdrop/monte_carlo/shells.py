"""Shells of a model's modules, which run in their place, with its parameters and buffers and flags of their own.

A pass of Monte Carlo inference needs other training flags, and a survey writes to buffers and attributes. All that
happens to the shells, so that another thread finds the model as it is, at any time.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .redirect import beneath
from .tracker import Tracker

_TABLES = ("_modules", "_parameters", "_buffers")
_STANDARD = frozenset(vars(nn.Module()))
"""What every module has, and no reference to another module lies in."""

_CONTAINERS = (list, tuple, set, dict, OrderedDict)
_CALLABLES = (types.MethodType, functools.partial, types.FunctionType)
_MAPPED = frozenset((*_CONTAINERS, *_CALLABLES))


def _no(module: nn.Module) -> bool:
    return False


class Shells:
    """The shells of one model's modules, for one thread.

    Args:
        model: the model.
        tracker: is told which module is running.
        level: of the context that they serve: what contexts within it have put in place of a module's call stays.
    """

    def __init__(self, model: nn.Module, tracker: Tracker, level: int) -> None:
        self._model, self._tracker, self._level = model, tracker, level
        self.names = {module: name for name, module in model.named_modules()}
        self._of = {module: _empty(module) for module in self.names}
        self._before: dict[nn.Module, dict[str, Any]] = {}

    def method(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """One of a module's methods, of its shell."""
        bound = getattr(self._of[module], name)
        if name in ("__call__", "forward"):
            return bound
        return Entering(self._tracker, self.names[module], bound)

    def refresh(
        self,
        training: Callable[[nn.Module], bool] = _no,
        apart: Callable[[nn.Module], bool] = _no,
        *,
        copies: bool = True,
        contexts: bool = True,
    ) -> None:
        """Makes the shells what their modules are now.

        Args:
            training: the training flag of a module's shell.
            apart: whether a module's shell gets buffers of its own.
            copies: whether lists, dicts and sets that are attributes are copied.
            contexts: whether contexts within this one have their say.
        """
        for name, module in self._model.named_modules():
            if module not in self._of:
                self.names[module], self._of[module] = name, _empty(module)
        cloned: dict[int, Tensor] = {}
        for module, shell in self._of.items():
            own = dict(module.__dict__)
            for table in _TABLES:
                own[table] = own[table].copy()
            children = own["_modules"]
            for name, child in children.items():
                children[name] = self._of.get(child)
            if own["_buffers"] and apart(module):
                for name, buffer in own["_buffers"].items():
                    if buffer is not None:
                        own["_buffers"][name] = cloned.setdefault(id(buffer), buffer.clone())
            for name, value in own.items():
                if type(value) in _MAPPED and name not in _STANDARD:
                    own[name] = self._mapped(value, copies)
            own["training"] = training(module)
            level = self._level if contexts else None
            call = self._mapped(beneath(own.get("_call_impl"), level), False)
            forward = self._mapped(beneath(own.get("forward"), level), False)
            kind, name = type(module), self.names[module]
            own["_call_impl"] = Entering(self._tracker, name, call or types.MethodType(kind._call_impl, shell))
            own["forward"] = Entering(self._tracker, name, forward or types.MethodType(kind.forward, shell))
            shell.__dict__.clear()
            shell.__dict__.update(own)
            self._before[module] = {**own, **{table: own[table].copy() for table in _TABLES}}

    def write_back(self, apart: Callable[[nn.Module], bool]) -> None:
        """Gives the modules what a pass has bound to attributes and buffers of their shells, but for some of them."""
        for module, shell in self._of.items():
            if apart(module):
                continue
            own, before = shell.__dict__, self._before[module]
            for name, value in own.items():
                if value is not before.get(name, own) and name not in _TABLES:
                    module.__dict__[name] = value
            for table in _TABLES:
                known = before[table]
                for name, value in own[table].items():
                    if value is not known.get(name, own):
                        module.__dict__[table][name] = value

    def _mapped(self, value: Any, copies: bool, depth: int = 0) -> Any:
        """A value with shells for modules; the value itself where there are none, and no copy is wanted."""
        if isinstance(value, nn.Module):
            return self._of.get(value, value)
        kind = type(value)
        if kind not in _MAPPED or depth > 4:
            return value
        if kind in _CALLABLES:
            return self._mapped_callable(value, depth + 1)
        if kind is dict or kind is OrderedDict:
            pairs = [(key, self._mapped(item, False, depth + 1)) for key, item in value.items()]
            if copies or any(item is not value[key] for key, item in pairs):
                return kind(pairs)
            return value
        items = [self._mapped(item, False, depth + 1) for item in value]
        if copies or any(item is not old for item, old in zip(items, value, strict=True)):
            return kind(items)
        return value

    def _mapped_callable(self, value: Any, depth: int) -> Any:
        if isinstance(value, types.MethodType):
            owner = self._mapped(value.__self__, False, depth)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            function, args, keywords = (self._mapped(part, False, depth) for part in parts)
            if function is value.func and args is value.args and keywords is value.keywords:
                return value
            return functools.partial(function, *args, **keywords)
        cells = [_content(cell) for cell in value.__closure__ or ()]
        contents = [self._mapped(content, False, depth) for content in cells]
        if all(new is old for new, old in zip(contents, cells, strict=True)):
            return value
        closure = tuple(
            cell if new is old else types.CellType(new)
            for cell, new, old in zip(value.__closure__, contents, cells, strict=True)
        )
        copy = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
        copy.__kwdefaults__ = value.__kwdefaults__
        return functools.update_wrapper(copy, value)


def _empty(module: nn.Module) -> nn.Module:
    return object.__new__(type(module))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


class Entering:
    """In the place of a shell's call: tells the tracker which module runs."""

    __slots__ = ("__wrapped__", "_name", "_tracker")

    def __init__(self, tracker: Tracker, name: str, call: Callable[..., Any]) -> None:
        self._tracker, self._name, self.__wrapped__ = tracker, name, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self._tracker.stack
        if stack and stack[-1] == self._name:  # forward, in a call that is known already
            return self.__wrapped__(*args, **kwargs)
        self._tracker.enter(self._name)
        try:
            return self.__wrapped__(*args, **kwargs)
        except Exception:
            self._tracker.fail()
            raise
        finally:
            stack.pop()

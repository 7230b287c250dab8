"""The attributes of modules at some time, to see if they are the same objects at another: a shell is made of them."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from .redirect import CALLS, COMPILED, is_nested, is_redirected

TABLES = ("_modules", "_parameters", "_buffers")
STANDARD = frozenset((*vars(nn.Module()), *CALLS, COMPILED))
"""The attributes that every module has. None refers to another module, except for those that are handled separately."""

CONTAINERS = (list, tuple, set, dict, OrderedDict)
CALLABLES = (types.MethodType, functools.partial, types.FunctionType)
MAPPED = frozenset((*CONTAINERS, *CALLABLES))

DEEPEST = 4
"""The most containers around a value that is looked at."""


class Wanted(NamedTuple):
    """The arguments of `Shells.refresh`, as far as they concern one module."""

    training: bool
    apart: bool
    copies: bool
    hooks: bool
    level: int | None


class Attributes:
    """The attributes of a module at some time, to see if they are the same objects at another."""

    __slots__ = ("_entries", "_names", "own", "tables")

    def __init__(self, module: nn.Module) -> None:
        self.own: dict[str, Any] = module.__dict__.copy()
        self.tables: dict[str, dict[str, Any]] = {table: self.own[table].copy() for table in TABLES}
        self._names = list(self.own)
        self._entries = [(name, len(known), list(known.values())) for name, known in self.tables.items()]

    def are_of(self, module: nn.Module) -> bool:
        """Whether the module has them still."""
        now = module.__dict__
        if len(now) != len(self._names) or not all(map(is_, self.own.values(), now.values())):
            return False
        for name, count, known in self._entries:
            table = now[name]
            if len(table) != count or (count and not all(map(is_, known, table.values()))):
                return False
        return list(now) == self._names


class Snapshot:
    """The attributes of many modules at some time. A comparison of all of them takes one step, and says nothing more
    than whether anything has changed.

    Args:
        modules: the modules.
        contents: whether the items of containers among the attributes are compared, too.
    """

    __slots__ = ("_contents", "_entries", "_modules", "_names", "_sizes", "_tables", "_types", "_values")

    def __init__(self, modules: Iterable[nn.Module], contents: bool = False) -> None:
        self._modules = list(modules)
        self._contents = _Contents(self._modules) if contents else None
        own = self._attributes()
        self._tables: list[dict[str, Any]] = [attributes[table] for attributes in own for table in TABLES]
        self._types = list(map(type, self._modules))
        self._sizes = list(map(len, [*own, *self._tables]))
        self._names = list(chain.from_iterable([*own, *self._tables]))
        self._values = list(chain.from_iterable(map(dict.values, own)))
        self._entries = list(chain.from_iterable(map(dict.values, self._tables)))

    def _attributes(self) -> list[dict[str, Any]]:
        return list(map(vars, self._modules))

    def holds(self) -> bool:
        """Whether all modules have all of these attributes still, and no others."""
        own, tables = self._attributes(), self._tables
        return (
            list(map(len, chain(own, tables))) == self._sizes
            and all(map(is_, chain.from_iterable(map(dict.values, own)), self._values))  # so the tables are the same
            and all(map(is_, chain.from_iterable(map(dict.values, tables)), self._entries))
            and list(chain.from_iterable(chain(own, tables))) == self._names
            and list(map(type, self._modules)) == self._types
            and (self._contents is None or self._contents.hold())
        )


class _Contents:
    """The items, at some time, of all containers that a shell has copies of, in the attributes of some modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._containers: list[Any] = []
        self._are_known = True
        for module in modules:
            for name in further(vars(module)):
                self._find(vars(module)[name], 0)
        self._mappings = [one for one in self._containers if isinstance(one, dict)]
        self._sizes = list(map(len, self._containers))
        self._items = list(chain.from_iterable(self._containers))
        self._values = list(chain.from_iterable(map(dict.values, self._mappings)))

    def _find(self, value: Any, depth: int) -> None:
        if depth > DEEPEST or not _has_content(value):
            return
        if type(value) in CALLABLES:  # what a closure or a partial function holds is not followed
            self._are_known = False
            return
        if type(value) is not tuple:
            self._containers.append(value)
        for item in value.values() if isinstance(value, dict) else value:
            self._find(item, depth + 1)

    def hold(self) -> bool:
        """Whether all containers have these items still, and no others."""
        return (
            self._are_known
            and list(map(len, self._containers)) == self._sizes
            and all(map(is_, chain.from_iterable(self._containers), self._items))
            and all(map(is_, chain.from_iterable(map(dict.values, self._mappings)), self._values))
        )


def holds(snapshot: Snapshot | None) -> bool:
    """Whether there is a snapshot, and it holds."""
    return snapshot is not None and snapshot.holds()


class Known:
    """A module and its shell when the shell was last made.

    Args:
        module, shell: the module and its shell.
        wanted: what was wanted of the shell.

    Attributes:
        lasting: whether the shell need not be made again while the attributes of both are the same objects.
        contained: whether that is so if the items of containers among the attributes are the same objects, too.
    """

    __slots__ = ("_redirected", "_tensors", "contained", "lasting", "module", "shell", "wanted")

    def __init__(self, module: nn.Module, shell: nn.Module, wanted: Wanted) -> None:
        self.module, self.shell, self.wanted = Attributes(module), Attributes(shell), wanted
        own = self.module.own
        values, calls = [own[name] for name in further(own)], [own.get(name) for name in CALLS]
        self._tensors = bool(module._buffers) or any(map(is_own_tensor, values))
        self._redirected = any(map(is_redirected, calls))
        self.contained: bool = not (wanted.apart and self._tensors) and not any(map(is_nested, calls))
        self.lasting: bool = self.contained and not any(map(_has_content, values))

    def is_current(self, module: nn.Module, shell: nn.Module, wanted: Wanted, may_be_written: bool) -> bool:
        """Whether the shell is what is wanted, but for the training flag."""
        was = self.wanted
        return (
            self.lasting
            and not (self._tensors and wanted.apart)
            and not (self._redirected and wanted.level != was.level)
            and ((wanted.hooks and was.hooks) or not (module._forward_hooks or module._forward_pre_hooks))
            and type(shell) is type(module)
            and self.module.are_of(module)
            and not (may_be_written and not self.shell.are_of(shell))
        )

    def is_lasting(self, module: nn.Module) -> bool:
        """Whether the shell lasts as long as the same is wanted of it."""
        return self.lasting and self._has_all_hooks(module)

    def is_contained(self, module: nn.Module) -> bool:
        """Whether it does with the items of containers."""
        return self.contained and self._has_all_hooks(module)

    def _has_all_hooks(self, module: nn.Module) -> bool:
        return self.wanted.hooks or not (module._forward_hooks or module._forward_pre_hooks)

    def set_training(self, shell: nn.Module, wanted: Wanted) -> None:
        """Gives the shell the training flag that is wanted."""
        shell.__dict__["training"] = wanted.training
        self.shell, self.wanted = Attributes(shell), wanted


def further(own: dict[str, Any]) -> list[str]:
    """Returns the names of a module's attributes that not every module has."""
    return [name for name in own if name not in STANDARD]


def is_own_tensor(value: Any) -> bool:
    """Whether the value of such an attribute is a tensor that is no parameter."""
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _has_content(value: Any) -> bool:
    """Whether a value is a container, or the like, from whose content a shell's attribute is made."""
    kind = type(value)
    if kind is tuple:
        return any(map(_has_content, value))
    return kind in MAPPED and not (kind is types.FunctionType and value.__closure__ is None)

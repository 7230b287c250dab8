"""Shells of a model's modules, which run in their place, with the same parameters, and buffers and flags of their own.

A pass of Monte Carlo inference needs other training flags, and a survey writes to buffers and attributes. All of this
happens to the shells, so that another thread finds the model unchanged at any time.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..core.torch_state import is_compiling
from ..handlers.tracker import Tracker
from .attributes import CALLABLES, DEEPEST, MAPPED, TABLES, Known, Snapshot, Wanted, further, holds, is_own_tensor
from .redirect import CALLS, COMPILED, beneath, is_redirected

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

_MANY = 4
"""The number of passes of one kind after which all shells are compared at once, since taking a snapshot takes time. It
doubles with each snapshot that does not hold any more."""


def _no(module: nn.Module) -> bool:
    return False


class Shells:
    """The shells of one model's modules, for one thread.

    Args:
        model: the model.
        tracker: a tracker, which is told which module is running.
        level: the level of the context that they serve. Calls that contexts within it have replaced stay replaced.
    """

    def __init__(self, model: nn.Module, tracker: Tracker, level: int) -> None:
        self._model, self._tracker, self._level = model, tracker, level
        self.names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self._of = {module: _empty(module) for module in self.names}
        self._known: dict[nn.Module, Known] = {}
        self._unwritten = False  # since the last refresh, as `write_back` has seen
        self._wanted: tuple[Any, ...] = ()
        self._passes = 0  # for which the same was wanted, since snapshots were taken
        self._enough = _MANY
        self._modules_then: Snapshot | None = None  # modules whose shells last
        self._shells_then: Snapshot | None = None
        self._varying: list[nn.Module] = []  # all others
        self._varying_modules_then: Snapshot | None = None
        self._varying_shells_then: Snapshot | None = None
        self._usual: dict[tuple[nn.Module, str], Entering] = {}

    def method(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """Returns one of a module's methods, bound to its shell."""
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
        hooks: bool = True,
    ) -> None:
        """Updates the shells to the present state of their modules.

        Args:
            training: returns the training flag of a module's shell.
            apart: returns whether a module's shell gets buffers, and other tensors that are no parameters, of its own.
            copies: whether attributes that are lists, dicts and sets are copied, so that nothing needs writing back.
            contexts: whether contexts within this one serve their calls.
            hooks: whether hooks run that are neither PyTorch's nor torchdrop's own.
        """
        level, copied = self._level if contexts else None, dict[int, Any]()
        all_wanted = (*map(training, self._of), *map(apart, self._of), copies, hooks, level)
        if all_wanted != self._wanted:
            self._forget_snapshots()
            self._wanted, self._passes = all_wanted, 0
        self._passes += 1
        if (
            holds(self._modules_then)
            and (self._unwritten or holds(self._shells_then))
            and not self._has_new(self._varying)
        ):
            if not holds(self._varying_modules_then):
                self._varying_shells_then = None
            self._make_varying()
            self._unwritten = False
            return
        stale = []
        for module, shell in self._of.items():
            wanted, known = Wanted(training(module), apart(module), copies, hooks, level), self._known.get(module)
            current = known is not None and known.is_current(module, shell, wanted, not self._unwritten)
            if known is None or not current:
                stale.append((module, wanted))
            elif known.wanted.training != wanted.training:
                known.set_training(shell, wanted)
        if self._has_new(module for module, _ in stale):
            for name, module in self._model.named_modules():
                if module not in self._of:
                    self.names[module], self._of[module] = name, _empty(module)
                    stale.append((module, Wanted(training(module), apart(module), copies, hooks, level)))
        for module, wanted in stale:
            self._make(module, wanted, copied)
        self._take_snapshots(modules=True)
        self._unwritten = False

    def renew(self) -> None:
        """Puts the shells back to what `refresh` has made of them, for another pass of the same kind."""
        self._passes += 1
        if holds(self._shells_then):
            self._make_varying()
            return
        copied: dict[int, Any] = {}
        for module, known in self._known.items():
            if not (known.lasting and known.shell.are_of(self._of[module])):
                self._make(module, known.wanted, copied)
        self._take_snapshots(modules=False)

    def _make(self, module: nn.Module, wanted: Wanted, copied: dict[int, Any]) -> None:
        self._known[module] = Known(module, self._rebuilt(module, wanted, copied), wanted)

    def _make_varying(self) -> None:
        """Makes the shells that do not last, unless they are as they were, too. Some may share a container's copy."""
        if holds(self._varying_shells_then):
            return
        self._varying_modules_then = self._varying_shells_then = None
        copied: dict[int, Any] = {}
        for module in self._varying:
            self._make(module, self._known[module].wanted, copied)

    def _take_snapshots(self, modules: bool) -> None:
        """Takes what the next passes compare with, after so many of a kind that more are likely.

        Args:
            modules: whether the modules have been seen to be what their shells were made of.
        """
        self._forget_snapshots()
        if self._passes >= self._enough:
            lasts = {module: known.is_lasting(module) for module, known in self._known.items()}
            lasting = [module for module in lasts if lasts[module]]
            self._varying = [module for module in lasts if not lasts[module]]
            self._shells_then = Snapshot(self._of[module] for module in lasting)
            self._modules_then = Snapshot(lasting) if modules else None
            if self._varying and all(self._known[module].is_contained(module) for module in self._varying):
                shells = (self._of[module] for module in self._varying)
                self._varying_shells_then = Snapshot(shells, contents=True)
                self._varying_modules_then = Snapshot(self._varying, contents=True) if modules else None

    def _forget_snapshots(self) -> None:
        if self._shells_then is not None:  # so they are of little use
            self._passes, self._enough = 0, 2 * self._enough
        self._modules_then = self._shells_then = self._varying_modules_then = self._varying_shells_then = None

    def _has_new(self, modules: Iterable[nn.Module]) -> bool:
        """Whether a child of one of these modules has no shell yet."""
        return any(child is not None and child not in self._of for m in modules for child in m._modules.values())

    def _rebuilt(self, module: nn.Module, wanted: Wanted, copied: dict[int, Any]) -> nn.Module:
        """Returns a module's shell with the attributes that the module has now."""
        shell = self._of[module]
        if type(shell) is not type(module):  # parametrizations change it
            shell.__class__ = module.__class__
            for attribute in CALLS:
                self._usual.pop((shell, attribute), None)
        own = dict(module.__dict__)
        for table in TABLES:
            own[table] = own[table].copy()
        children = own["_modules"]
        for name, child in children.items():
            children[name] = self._of.get(child)
        others = further(own)
        for name in others:
            if type(own[name]) in MAPPED:
                own[name] = self._mapped(own[name], copied if wanted.copies else None)
        if wanted.apart:
            _clone_tensors(own, others, copied)
        if not wanted.hooks:
            for table in filter(own.get, _HOOKS):
                own[table] = OrderedDict((key, hook) for key, hook in own[table].items() if _is_internal(hook))
        own["training"] = wanted.training
        own.pop(COMPILED, None)
        for attribute in CALLS:
            call = beneath(own.get(attribute), wanted.level)
            if attribute == "forward" and "_orig_mod" in children and not is_redirected(call):
                call = children["_orig_mod"]  # of what torch.compile returns; its forward is the compiled code
            own[attribute] = self._entering(module, shell, attribute, call)
        shell.__dict__.clear()
        shell.__dict__.update(own)
        return shell

    def _entering(self, module: nn.Module, shell: nn.Module, attribute: str, call: Any) -> Entering:
        """Returns a shell's call: that of its class, or the one that the module has in its place."""
        if call is not None:
            return Entering(self._tracker, self.names[module], self._mapped(call))
        usual = self._usual.get((shell, attribute))
        if usual is None:
            bound = types.MethodType(getattr(type(shell), attribute), shell)
            usual = self._usual[shell, attribute] = Entering(self._tracker, self.names[module], bound)
        return usual

    @property
    def has_foreign_hooks(self) -> bool:
        """Whether a module has a hook that is neither PyTorch's nor torchdrop's."""
        return any(not _is_internal(hook) for m in self._of for table in _HOOKS for hook in vars(m)[table].values())

    def written(self) -> set[nn.Module]:
        """Returns the modules whose buffers, or other tensors, a pass has written to, in the copies of shells."""
        found = set()
        for module, shell in self._of.items():
            known = self._known[module]
            pairs = [(shell._buffers.get(name), buffer) for name, buffer in module._buffers.items()]
            own = known.module.own
            pairs += [(vars(shell).get(name), own[name]) for name in further(own) if is_own_tensor(own[name])]
            if any(_was_written(copy, value) for copy, value in pairs if copy is not value):
                found.add(module)
        return found

    def write_back(self, apart: Callable[[nn.Module], bool]) -> None:
        """Writes attributes and buffers that a pass has bound on the shells back to the modules, except `apart`."""
        for module in self._varying if holds(self._shells_then) else self._of:
            known, shell = self._known[module], self._of[module]
            if apart(module) or known.shell.are_of(shell):
                continue
            known.lasting = known.contained = False
            self._forget_snapshots()
            own = shell.__dict__
            for name, value in own.items():
                if value is not known.shell.own.get(name, own) and name not in TABLES:
                    module.__dict__[name] = value
            for table, before in known.shell.tables.items():
                for name, value in own[table].items():
                    if value is not before.get(name, own):
                        module.__dict__[table][name] = value
        self._unwritten = True

    def _mapped(self, value: Any, copied: dict[int, Any] | None = None, depth: int = 0) -> Any:
        """Returns a value with shells for modules; the value itself if there are none, and no copy is wanted.

        Args:
            value: an attribute of a module, or a part of one.
            copied: the copies of containers that have been made, by the identity of the original; None for no copies.
            depth: the number of containers around the value.
        """
        if isinstance(value, nn.Module):
            return self._of.get(value, value)
        kind = type(value)
        if kind not in MAPPED or depth > DEEPEST:
            return value
        if kind in CALLABLES:
            return self._mapped_callable(value, depth + 1)
        if copied is not None and id(value) in copied:
            return copied[id(value)]
        items: list[Any]
        if kind is dict or kind is OrderedDict:
            items = [self._mapped(item, copied, depth + 1) for item in value.values()]
            same = all(map(is_, items, value.values()))
            new = value if same and copied is None else kind(zip(value, items, strict=True))
        else:
            items = [self._mapped(item, copied, depth + 1) for item in value]
            new = value if all(map(is_, items, value)) and (copied is None or kind is tuple) else kind(items)
        if copied is not None:
            copied[id(value)] = new
        return new

    def _mapped_callable(self, value: Any, depth: int) -> Any:
        if isinstance(value, types.MethodType):
            owner = self._mapped(value.__self__, None, depth)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            function, args, keywords = (self._mapped(part, None, depth) for part in parts)
            if function is value.func and args is value.args and keywords is value.keywords:
                return value
            return functools.partial(function, *args, **keywords)
        cells = [_content(cell) for cell in value.__closure__ or ()]
        contents = [self._mapped(content, None, depth) for content in cells]
        if all(new is old for new, old in zip(contents, cells, strict=True)):
            return value
        closure = tuple(
            cell if new is old else types.CellType(new)
            for cell, new, old in zip(value.__closure__, contents, cells, strict=True)
        )
        copy = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
        copy.__kwdefaults__ = value.__kwdefaults__
        return functools.update_wrapper(copy, value)


def _clone_tensors(own: dict[str, Any], others: Iterable[str], copied: dict[int, Any]) -> None:
    """Puts copies in the place of buffers, and of tensors among other attributes. All modules share a tensor's copy."""
    for name, buffer in own["_buffers"].items():
        if buffer is not None:
            own["_buffers"][name] = _clone_of(buffer, copied)
    for name in others:
        if is_own_tensor(own[name]):
            own[name] = _clone_of(own[name], copied)


def _clone_of(tensor: Tensor, copied: dict[int, Any]) -> Tensor:
    if id(tensor) not in copied:
        copied[id(tensor)] = tensor.detach().clone()
    return copied[id(tensor)]


def _was_written(copy: Tensor | None, original: Tensor | None) -> bool:
    if copy is None or original is None:
        return False
    if copy.is_inference() or original.is_inference():
        return copy.shape != original.shape or not torch.equal(copy, original)
    return copy._version > 0


def _is_internal(hook: Any) -> bool:
    """Whether a hook is PyTorch's or torchdrop's: these compute weights, or gather parameters."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return module.split(".")[0] in ("torch", "torchdrop")


def _empty(module: nn.Module) -> nn.Module:
    return object.__new__(type(module))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


class Entering:
    """A callable in the place of a shell's call. It tells the tracker which module runs."""

    __slots__ = ("__wrapped__", "_name", "_tracker")

    def __init__(self, tracker: Tracker, name: str, call: Callable[..., Any]) -> None:
        self._tracker, self._name = tracker, name
        self.__wrapped__: Callable[..., Any] = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self._tracker.stack
        if stack and stack[-1] == self._name:  # forward, in a call that the tracker has already
            return self.__wrapped__(*args, **kwargs)
        if is_compiling():  # a branch of torch.cond must not have effects, and nothing is served in it
            return self.__wrapped__(*args, **kwargs)
        self._tracker.enter(self._name)
        try:
            return self.__wrapped__(*args, **kwargs)
        except Exception:
            self._tracker.fail()
            raise
        finally:
            stack.pop()

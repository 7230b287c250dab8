"""A tracker of the module that is running in a model, and of its calls of each kind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..core.hooks import observer
from .calls import Site


class Tracker(threading.local):
    """Follows a model's forward, in each thread separately. Hooks (`follow`), or the code that calls the modules, tell
    it which module runs.

    Attributes:
        stack: names of the modules that run, outermost first.
        entered: names of all modules that have run.
        failed: the name of the innermost module that an exception came out of, since this was last set to None.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.entered: set[str] = set()
        self.failed: str | None = None
        self._calls: dict[tuple[str, str], int] = {}

    def enter(self, name: str) -> None:
        """Records that a module is called."""
        self.stack.append(name)
        self.entered.add(name)

    def leave(self, name: str) -> None:
        """Records that a module's call ends. The call is unknown if a hook before `enter` has raised."""
        if name in self.stack:
            while self.stack.pop() != name:
                pass

    def follow(self, model: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which hooks on every module of a model tell the tracker which one runs."""
        return following(model, self.enter, self.leave)

    def fail(self) -> None:
        """Records that an exception comes out of the running module."""
        if self.failed is None:
            self.failed = self.stack[-1]

    def restart(self) -> None:
        """Begins a forward."""
        self._calls.clear()

    @property
    def running(self) -> bool:
        """Whether a module of the model runs."""
        return bool(self.stack)

    def next(self, kind: str) -> Site:
        """Returns the site of the next call of this kind in the running module."""
        name = self.stack[-1]
        number = self._calls.get((name, kind), 0)
        self._calls[name, kind] = number + 1
        return Site(name, kind, number)

    def again(self, site: Site) -> None:
        """Takes the last `next` back."""
        self._calls[site.module, site.kind] -= 1


@contextmanager
def following(
    model: nn.Module, enter: Callable[[str], None], leave: Callable[[str], None], innermost: bool = False
) -> Iterator[None]:
    """Within it, hooks on every module of a model tell the name of the one that is called.

    Args:
        model: the model.
        enter, leave: are called with the name before and after a module's call, of which its other hooks are a part.
        innermost: whether the other hooks that are there are not a part of it, so that of several contexts the last
            one is called closest to the module's forward.
    """
    handles = []
    try:
        for name, module in model.named_modules():
            before, after = _hooks(enter, leave, name)
            handles.append(module.register_forward_pre_hook(before, prepend=not innermost))
            handles.append(module.register_forward_hook(after, always_call=True, prepend=innermost))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(
    enter: Callable[[str], None], leave: Callable[[str], None], name: str
) -> tuple[Callable[..., None], Callable[..., None]]:
    return observer(lambda *_: enter(name)), observer(lambda *_: leave(name))


_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
_WRAPPED = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def inner_names(model: nn.Module) -> dict[str, str]:
    """Returns, for the name of each module, its name without the wrappers around it, from which its masks follow."""
    modules = dict(model.named_modules())
    outer = {
        ".".join(filter(None, (name, "module"))) for name, module in modules.items() if isinstance(module, _WRAPPERS)
    }
    inner = {}
    for name in modules:
        parts = name.split(".")
        if not outer and _WRAPPED.isdisjoint(parts):
            inner[name] = name
            continue
        ahead = (".".join(parts[: n + 1]) for n in range(len(parts)))
        inner[name] = ".".join(
            part for part, whole in zip(parts, ahead, strict=True) if part not in _WRAPPED and whole not in outer
        )
    return inner

"""A handler that lets every random call happen, and records it: `Trace`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.torch_state import DispatchMode, is_compiling
from .base import SEEN, Handler
from .calls import RandomCall
from .random_functions import DESCRIBE, describe_other
from .sources import Seen, Source
from .tracker import Tracker


class DrawCount(DispatchMode):
    """Counts the calls of operators that draw from PyTorch's generators.

    Attention is left out: it is described on its own, and its kernels are tagged whether or not they draw.
    """

    _draws: ClassVar[dict[Any, bool]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draws = self._draws.get(func)
        if draws is None:
            seeded = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
            draws = self._draws[func] = seeded and "scaled_dot_product" not in func.__name__
        self.count += draws
        return func(*args, **kwargs) if kwargs else func(*args)


class Trace(Handler):
    """Lets everything happen, and records what is drawn.

    Args:
        tracker: the tracker of the model.
        rows: the number of rows of data in the forward.
        states: returns the states of the generators that the model may draw from.
        counts: whether `unseen` is on during the forward.

    Attributes:
        sources: the sources of the forward, in order.
        flagged: names of modules whose own code may decide from their training flag what is drawn.
        unseen: a dispatch mode to be on during the forward if wanted, which counts the draws of all operators.
        seen: the number of these draws that belong to calls that were seen.
        branching: whether a single number was drawn, as by code that decides from it to skip a layer.
        hidden: whether a generator has moved on between the calls that were seen. It is a quick look, for a forward
            without `unseen`; `look` ends it.
    """

    def __init__(
        self, tracker: Tracker, rows: int | None, states: Callable[[], Any] = lambda: None, counts: bool = False
    ) -> None:
        super().__init__(tracker)
        self._states = states
        self._state = states()
        self.hidden: bool = False
        self.sources: list[Source] = []
        self.flagged: set[str] = set()
        self.unseen: DrawCount = DrawCount()
        self.seen: int = 0
        self.branching: bool = False
        self._rows, self._counts = rows, counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in SEEN and not self._counts:  # most calls, for which a pass must take no time
            return func(*args, **kwargs) if kwargs else func(*args)
        if is_compiling() and func not in DESCRIBE:  # by flex_attention or torch.cond
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _pass(self, func: Any, call: Callable[[], Any]) -> Any:
        before = self.unseen.count
        out = call()
        if self.unseen.count > before:
            self.seen += self.unseen.count - before
            self.others.add(func)
            self._note(describe_other(self, func), out)
        return out

    def _turns_on(self) -> bool:
        self.sources.append(Source(*self._tracker.next("torchdrop"), None, False))
        return False

    def _meet(self, func: Any, draw: RandomCall) -> Any:
        before = self.unseen.count
        self.look()
        out = draw.original()
        self._state = self._states()
        self.seen += self.unseen.count - before
        return self._note(draw, out)

    def look(self) -> None:
        """Compares the generators' states with those after the last call that was seen."""
        self.hidden = self.hidden or self._state != self._states()

    def _note(self, draw: RandomCall, out: Any) -> Any:
        source = Source.of_call(self._tracker.next(draw.kind), draw)
        source.within = tuple(self._tracker.stack)
        shape = tuple(draw.shape if draw.shape is not None else getattr(_first(out), "shape", ()))
        source.seen = Seen(self._rows, shape, tuple(draw.mask or shape))
        self.sources.append(source)
        if draw.flagged:
            self.flagged.add(source.module)
            self.branching = self.branching or not shape
        return out


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out

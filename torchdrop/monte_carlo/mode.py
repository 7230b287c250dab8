"""The function modes that see a model's random calls: one that records them, one that serves them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..core import sites
from ..core.torch_state import TorchDispatchMode, in_backward, transforms_active
from .draw import Draw, Site
from .masks import Layout, NotVectorizableError, Pass, Slot, find_layout, source_seed
from .prefix import Prefix
from .report import UNCHECKED, Seen, Source
from .sources import DESCRIBE, OPENED, describe_other
from .tracker import Tracker


def refuse_backward() -> None:
    """Refuses a forward that backward makes."""
    if in_backward():
        refuse_checkpoint()


def refuse_checkpoint() -> None:
    raise RuntimeError(
        "activation checkpointing runs a part of the model again in backward, where Monte Carlo masks cannot be given "
        "to it again: switch checkpointing off in the model, or make the pass under torch.no_grad()"
    )


def checkpointed() -> bool:
    """Whether this call is made from within torch.utils.checkpoint."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


class Watching(TorchFunctionMode):
    """Describes the random calls of a model that is running; everything else goes through.

    Attributes:
        others: functions that draw, and that `DESCRIBE` does not know.
    """

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.others: set[Any] = set()
        self._tracker = tracker
        self._bound: Slot | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._tracker.running or _innermost() is not self:
            return self._outside(func, args, kwargs)
        return self._inside(func, args, kwargs)

    def _outside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call while the model is not running, or another context's model runs."""
        if func in DESCRIBE:
            refuse_backward()
        return func(*args, **kwargs)

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        describe = DESCRIBE.get(func) or (describe_other if func in self.others else None)
        if describe is not None:
            if self._bound is not None and func is sites.apply:
                slot, self._bound = self._bound, None
                operator, input, params, shape, inplace, _ = args
                return slot.apply(operator, input, params, shape, inplace)
            return self._meet(func, describe(self, func, *args, **kwargs))
        if func is sites.is_on:
            return self._is_on(*args)
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        return self._pass(func, lambda: func(*args, **kwargs))

    @contextmanager
    def inside(self, slot: Slot) -> Iterator[None]:
        """Within it, the next layer of torchdrop takes its mask from the slot."""
        self._bound = slot
        try:
            with self:
                yield
        finally:
            self._bound = None

    def __enter__(self) -> Any:
        _running.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _running.pop()
        super().__exit__(*exception)

    def _pass(self, func: Any, call: Callable[[], Any]) -> Any:
        """A call that is not random."""
        return call()

    def _turns_on(self) -> bool:
        raise NotImplementedError

    def _is_on(self, training: bool) -> bool:
        return training or self._turns_on()

    def _meet(self, func: Any, draw: Draw) -> Any:
        raise NotImplementedError


class _Running(threading.local):
    """The modes of this thread, outermost first."""

    def __init__(self) -> None:
        self.modes: list[Watching] = []

    def append(self, mode: Watching) -> None:
        self.modes.append(mode)

    def pop(self) -> None:
        self.modes.pop()


_running = _Running()


def _innermost() -> Watching | None:
    """The last of this thread's modes whose model is running: the one that decides."""
    return next((mode for mode in reversed(_running.modes) if mode._tracker.running), None)


class DrawCount(TorchDispatchMode):
    """Counts the calls of operators that draw from PyTorch's generators.

    Attention is left out: it is described on its own, and its kernels are tagged whether or not they draw.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in func.__name__
        return func(*args, **(kwargs or {}))


class Recorder(Watching):
    """Lets everything happen, and notes what is drawn.

    Args:
        tracker: of the model.
        rows: how many rows of data are in the forward.

    Attributes:
        sources: of the forward, in order.
        flagged: names of modules whose own code may decide from their training flag what is drawn.
        unseen: a dispatch mode to be on meanwhile, which counts the draws of all operators.
        seen: how many of these belong to the calls that were seen.
        branching: whether a single number was drawn, as where code decides by it to skip a layer.
    """

    def __init__(self, tracker: Tracker, rows: int | None) -> None:
        super().__init__(tracker)
        self.sources: list[Source] = []
        self.flagged: set[str] = set()
        self.unseen = DrawCount()
        self.seen = 0
        self.branching = False
        self._rows = rows

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

    def _meet(self, func: Any, draw: Draw) -> Any:
        before = self.unseen.count
        out = draw.original()
        self.seen += self.unseen.count - before
        return self._note(draw, out)

    def _note(self, draw: Draw, out: Any) -> Any:
        source = _source(self._tracker.next(draw.kind), draw)
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


def _source(site: Site, draw: Draw) -> Source:
    rate = float(draw.rate) if isinstance(draw.rate, float | int) else None
    return Source(*site, rate, draw.on, replayable=not draw.loose, reason=draw.loose, draws=draw.draws)


_ASKED = frozenset((sites.is_on, *OPENED))
"""Functions that do not draw themselves, and whose answer decides if others do."""

_UNPLACED = "the size of its tensor does not follow the number of rows, so its masks depend on the batch"


class Server(Watching):
    """Serves the calls that are active, each with the mask of its place, and silences the others.

    Args:
        tracker: of the model.
        chosen: whether a module's sources may be active.
        inner: the name by which a module's masks go, where it is another.

    Attributes:
        drew: whether a call was let through that may have drawn from PyTorch's generators.
        elsewhere: is given the calls made while no module of a model runs; None if there are none to serve.
    """

    def __init__(self, tracker: Tracker, chosen: Callable[[str], bool], inner: Mapping[str, str]) -> None:
        super().__init__(tracker)
        self.sources: dict[Site, Source] = {}
        self.run: Pass | None = None
        self.draws = 0
        self.calls = 0
        self.prefix: Prefix | None = None
        self.surveyed = self.differentiated = self.drew = False
        self.elsewhere: Callable[[Server, Any, Any, Any], Any] | None = None
        self._chosen, self._inner = chosen, inner
        self._seeds: dict[tuple[int, Site], int] = {}

    def begin(self, run: Pass) -> None:
        """What follows is this pass."""
        self.run, self.draws, self.calls = run, 0, 0
        if self.prefix is not None:
            self.prefix.restart()

    def _outside(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.elsewhere is None or _innermost() is not None or not (func in _ASKED or func in DESCRIBE):
            return super()._outside(func, args, kwargs)
        return self.elsewhere(self, func, args, kwargs)

    def serve_in(self, module: str, func: Any, args: Any, kwargs: Any) -> Any:
        """A call made by this module's code while its forward does not run."""
        self._tracker.stack.append(module)
        try:
            return self._inside(func, args, kwargs)
        finally:
            self._tracker.stack.pop()

    @property
    def entered(self) -> bool:
        return self in _running.modes

    def _turns_on(self) -> bool:
        site = self._tracker.next("torchdrop")
        source = self._known(site)
        on = source.active if source is not None else self._chosen(site.module)
        if on:
            self._tracker.again(site)  # the layer comes next
        return on

    def _is_on(self, training: bool) -> bool:
        return self._turns_on()  # what is not active is off in a function that is always on, too

    def _pass(self, func: Any, call: Callable[[], Any]) -> Any:
        out = call() if self.prefix is None else self.prefix.run(func, call)
        self.calls += isinstance(out, Tensor)
        return out

    def _known(self, site: Site) -> Source | None:
        """What is known of a call: as of the module's last one of its kind where there were fewer in train mode."""
        for number in range(site.number, -1, -1):
            source = self.sources.get(site._replace(number=number))
            if source is not None:
                return source
        return None

    def _meet(self, func: Any, draw: Draw) -> Any:
        site = self._tracker.next(draw.kind)
        source = self._known(site)
        if source is None:
            source = self.sources[site] = _source(site, draw)
            source.active = (draw.on or bool(draw.rate)) and self._chosen(site.module)
            source.known = UNCHECKED
            if self.surveyed:
                source.replayable, source.reason = False, "not met before, so where its rows lie is not known"
        rate = draw.rate or source.rate
        if not source.active or (draw.rate is not None and not rate):
            self.drew = self.drew or draw.flagged
            return draw.plain() if draw.flagged else self._pass(func, draw.plain)
        if self.prefix is not None:
            self.prefix.end()
        if self.differentiated and checkpointed():
            refuse_checkpoint()
        source.served = True
        self.draws += draw.draws
        if draw.served is not None:
            return draw.served(self._slot(site, source), float(rate or 0.0))
        assert self.run is not None
        if transforms_active() or self.run.folded:
            raise NotVectorizableError(f"{draw.kind} in {site.module or 'the model'} draws torch's own numbers")
        self.drew = True
        return draw.original()

    def _slot(self, site: Site, source: Source) -> Slot:
        run = self.run
        assert run is not None
        seed = self._seeds.get((run.seed, site))
        if seed is None:
            seed = self._seeds[run.seed, site] = source_seed(
                run.seed, self._inner.get(site.module, site.module), site.kind, site.number
            )
        return Slot(run, seed, lambda shape, mask: self._layout(source, shape, mask))

    def _layout(self, source: Source, shape: Sequence[int], mask: Sequence[int]) -> Layout | None:
        run = self.run
        assert run is not None
        if run.rows is None or not source.replayable:
            return None
        seen = source.seen
        if seen is None:
            source.seen = Seen(run.rows, tuple(shape), tuple(mask))
        elif seen.rows is not None and seen.rows != run.rows and not source.placed:
            source.layout = find_layout((shape, seen.shape), (run.rows, seen.rows), seen.mask)
            source.placed = True
            if source.layout is None and tuple(shape) != seen.shape:
                source.replayable, source.reason = False, _UNPLACED
        layout = source.layout
        if layout is not None and shape[layout.dim] != run.copies * run.rows * layout.ratio:
            source.replayable, source.reason = False, _UNPLACED
            return None
        return layout

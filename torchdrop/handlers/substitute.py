"""A handler that gives each random call the mask that belongs to its place in the model: `Substitute`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.torch_state import is_compiling, transforms_active, tree_flatten
from .base import SEEN, Handler, checkpointed, innermost, refuse_checkpoint
from .calls import RandomCall, Site
from .masks import Layout, MaskSlot, NotVectorizableError, Pass, find_layout, source_seed
from .positions import Positions
from .prefix import Prefix
from .sources import UNCHECKED, Seen, Source
from .tracker import Tracker

_WITHIN = 4
"""The number of tensors of its size that a random call makes, at most: scores, weights, words, and its result."""

_UNPLACED = "the size of its tensor does not follow the number of rows, so its masks depend on the batch"


class UnknownSourceError(RuntimeError):
    """Raised at a random call of a hook: a survey without hooks has not met it."""


class Substitute(Handler):
    """Serves the calls that are active, each with the mask of its place, and silences the others.

    Args:
        tracker: the tracker of the model.
        chosen: whether a module's sources may be active.
        inner: the names of modules from which their masks follow, if they differ from the modules' own.

    Attributes:
        strict: whether a call that is not known raises `UnknownSourceError`.
        draws_own: is called before a call is let through that may draw from PyTorch's generators.
        counts: whether the numbers that follow are wanted.
        calls: the number of calls that return tensors, other than random ones, in this pass.
        bytes: more bytes than this pass's tensors hold at once after its first draw: the sum of all.
        largest: the bytes of the largest of them, which are fewer.
        before: the bytes of the tensors that calls before the first draw return, as a measure of their work.
        elsewhere: a function that gets the calls made while no module of a model runs; None if none are served.
        positions: makes the slots instead, where masks belong to places in a sequence and not to rows.
    """

    def __init__(self, tracker: Tracker, chosen: Callable[[str], bool], inner: Mapping[str, str]) -> None:
        super().__init__(tracker)
        self.sources: dict[Site, Source] = {}
        self.run: Pass | None = None
        self.draws: int = 0
        self.calls: int = 0
        self.bytes: int = 0
        self.largest: int = 0
        self.before: int = 0
        self.prefix: Prefix | None = None
        self.surveyed: bool = False
        self.strict: bool = False
        self.differentiated: bool = False
        self.draws_own: Callable[[], None] = lambda: None
        self.counts: bool = False
        self.elsewhere: Callable[[Substitute, Any, Any, Any], Any] | None = None
        self.positions: Positions | None = None
        self._chosen, self._inner = chosen, inner
        self._seeds: dict[tuple[int, Site], int] = {}

    def begin(self, run: Pass) -> None:
        """Begins this pass."""
        self.run, self.draws = run, 0
        self.calls = self.bytes = self.largest = self.before = 0
        if self.prefix is not None:
            self.prefix.restart()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        idle = (self.prefix is None or self.prefix.over) and not self.counts and func not in self.others
        if func not in SEEN and (idle or is_compiling()):
            # Most calls, for which a pass must take no time; and those of flex_attention and torch.cond, which compile.
            return func(*args, **kwargs) if kwargs else func(*args)
        return super().__torch_function__(func, types, args, kwargs)

    def _outside(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.elsewhere is None or innermost() is not None or func not in SEEN:
            return super()._outside(func, args, kwargs)
        return self.elsewhere(self, func, args, kwargs)

    def serve_in(self, module: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Serves a call made by this module's code while its forward does not run."""
        self._tracker.stack.append(module)
        try:
            return self._inside(func, args, kwargs)
        finally:
            self._tracker.stack.pop()

    @property
    def entered(self) -> bool:
        return self.is_entered

    def _turns_on(self) -> bool:
        site = self._tracker.next("torchdrop")
        source = self._known(site)
        on = source.active if source is not None else self._chosen(site.module)
        if on:
            self._tracker.again(site)  # the layer comes next
        return on

    def _is_on(self, training: bool) -> bool:
        return self._turns_on()  # a source that is not active is off in a function that is always on, too

    def _pass(self, func: Any, call: Callable[[], Any]) -> Any:
        out = call() if self.prefix is None else self.prefix.run(func, call)
        if self.counts:
            self.calls += isinstance(out, Tensor)
            size = _bytes_of(out)
            if self.draws:
                self._count(size, 1)
            else:
                self.before += size
        return out

    def _known(self, site: Site) -> Source | None:
        """Returns the source of a call; that of the module's last one of its kind if train mode had fewer."""
        source = self.sources.get(site)
        number = site.number
        while source is None and number:
            number -= 1
            source = self.sources.get(site._replace(number=number))
        return source

    def _meet(self, func: Any, draw: RandomCall) -> Any:
        site = self._tracker.next(draw.kind)
        source = self._known(site)
        if source is None:
            if self.strict and (draw.on or draw.rate):
                raise UnknownSourceError
            source = self.sources[site] = Source.of_call(site, draw)
            source.active = (draw.on or bool(draw.rate)) and self._chosen(site.module)
            source.known = UNCHECKED
            if self.surveyed:
                source.replayable, source.reason = False, "not met before, so where its rows lie is not known"
        rate = draw.rate or source.rate
        if not source.active or (draw.rate is not None and not rate):
            if draw.flagged:
                self.draws_own()
            return draw.plain() if draw.flagged else self._pass(func, draw.plain)
        if self.prefix is not None:
            self.prefix.end()
        if self.differentiated and checkpointed():
            refuse_checkpoint()
        source.served = True
        self.draws += draw.draws
        if draw.served is not None:
            out = draw.served(self._slot(site, source), float(rate or 0.0))
            if self.counts:
                sizes = [size for size in draw.shape or () if isinstance(size, int)]
                self._count(max(_bytes_of(out), 4 * math.prod(sizes)), _WITHIN)
            return out
        assert self.run is not None
        if transforms_active() or self.run.folded:
            raise NotVectorizableError(f"{draw.kind} in {site.module or 'the model'} draws torch's own numbers")
        self.draws_own()
        return draw.original()

    def _count(self, size: int, times: int) -> None:
        self.bytes += times * size
        self.largest = max(self.largest, size)

    def _slot(self, site: Site, source: Source) -> MaskSlot:
        run = self.run
        assert run is not None
        seed = self._seeds.get((run.seed, site))
        if seed is None:
            seed = self._seeds[run.seed, site] = source_seed(
                run.seed, self._inner.get(site.module, site.module), site.kind, site.number
            )
        if self.positions is not None:
            return self.positions.slot(run, site, seed)
        return MaskSlot(run, seed, lambda shape, mask: self._layout(source, shape, mask))

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


def _bytes_of(out: Any) -> int:
    """Returns the bytes of the tensors in a call's result, other than views."""
    if type(out) is Tensor:  # as most are, and pytrees are slow
        return _own_bytes(out)
    return sum(_own_bytes(leaf) for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor))


def _own_bytes(tensor: Tensor) -> int:
    return tensor.nbytes if tensor.layout is torch.strided and not tensor._is_view() else 0

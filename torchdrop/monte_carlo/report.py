"""What is random in a model, and how that is known: the coverage report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .draw import Site
from .masks import Layout

DRAWN = "drawn in a train-mode forward"
AUGMENTS = "augmentation, which stays off"
NOT_CHOSEN = "not chosen by the patterns of `sources`"
UNCHECKED = "called in Monte Carlo mode; no train-mode forward to compare with"


class Seen(NamedTuple):
    """How a source's tensor and mask looked at some number of rows, to find its layout at another number."""

    rows: int | None
    shape: tuple[int, ...]
    mask: tuple[int, ...]


@dataclass
class Source:
    """One call in the model that draws.

    Args:
        module: the name of the module that makes the call; "" for the model itself.
        kind: "dropout", "attention", "lstm", "torchdrop", "bernoulli", ...
        number: of the call among the module's calls of this kind in one forward, from 0.
        rate: the probability of dropping, if there is one.
        active: whether it draws in Monte Carlo mode.
        replayable: whether its draws follow from (seed, source, sample, row) alone.
        known: how that is known.
        reason: why it is not active, or not replayable.
        draws: how many random draws it stands for in one forward.
    """

    module: str
    kind: str
    number: int
    rate: float | None
    active: bool
    replayable: bool = True
    known: str = DRAWN
    reason: str = ""
    draws: int = 1
    layout: Layout | None = field(default=None, repr=False)
    seen: Seen | None = field(default=None, repr=False)
    placed: bool = field(default=False, repr=False)
    served: bool = field(default=False, repr=False)
    within: tuple[str, ...] = field(default=(), repr=False)

    @property
    def site(self) -> Site:
        return Site(self.module, self.kind, self.number)


@dataclass
class Report:
    """The sources of randomness of a model, and how its samples were run.

    Args:
        sources: in the order in which a train-mode forward meets them.
        expected: how many random draws a train-mode forward makes.
        draws: how many the last Monte Carlo forward made.
        rows: the dimension of the inputs that holds the rows of data; None if the inputs are one whole.
        strategy: how the samples were run: "vectorized", "repeated" or "loop"; None before.
        chunk: how many samples were run at a time; None before.
        notes: what else is worth knowing.
        unseen: how many random draws of a train-mode forward were made where calls cannot be seen.
        outside: how many calls of dropout were met, off and with a rate, that belong to no forward of the model.
        called: whether the model, or a part of it, has been called.
    """

    sources: list[Source] = field(default_factory=list)
    expected: int = 0
    draws: int = 0
    rows: int | None = None
    strategy: str | None = None
    chunk: int | None = None
    notes: list[str] = field(default_factory=list)
    unseen: int = 0
    outside: int = 0
    called: bool = False

    @property
    def active(self) -> list[Source]:
        """The sources that draw in Monte Carlo mode."""
        return [source for source in self.sources if source.active]

    @property
    def inactive(self) -> list[Source]:
        """Those that draw in a train-mode forward and not in Monte Carlo mode, each with its reason."""
        return [source for source in self.sources if not source.active]

    @property
    def unreached(self) -> list[Source]:
        """Those of them that were not left out on purpose: they could not be made to draw."""
        return [source for source in self.inactive if source.reason not in (NOT_CHOSEN, AUGMENTS)]

    def noted(self) -> str:
        """The notes, a line each."""
        return "".join(f"\n  {note}" for note in self.notes)

    @property
    def replayable(self) -> bool:
        """Whether every active source's draws follow from (seed, source, sample, row) alone."""
        return all(source.replayable for source in self.active)

    def rows_of(self) -> list[dict[str, Any]]:
        """A plain dict for each source, for tables."""
        names = ("module", "kind", "number", "rate", "active", "replayable", "draws", "known", "reason")
        return [{name: getattr(source, name) for name in names} for source in self.sources]

    def __str__(self) -> str:
        counts = [
            f"{count} {what}"
            for count, what in (
                (self.unseen, "draws of a forward in train mode are made where calls cannot be seen"),
                (self.outside, "calls of dropout that is off belong to no forward of the model"),
            )
            if count
        ]
        if not self.sources:
            found = "none found" if self.called else "none found yet (the model has not been called)"
            return "\n".join([f"Sources of randomness: {found}", *counts, *self.notes])
        lines = [
            f"Sources of randomness: {len(self.active)} of {len(self.sources)} active, {self.draws} draws a forward"
        ]
        lines[0] += f" (train mode: {self.expected})"
        width = max(len(source.module or "(model)") for source in self.sources)
        for source in self.sources:
            rate = "      " if source.rate is None else f"p={source.rate:<4.3g}"
            state = "active" if source.active else "off   "
            why = "; ".join(filter(None, (source.known, source.reason, "" if source.replayable else "not replayable")))
            lines.append(f"  {source.module or '(model)':{width}}  {source.kind:<14} {rate}  {state}  {why}")
        if self.strategy:
            lines.append(f"Samples: {self.strategy}, {self.chunk} at a time")
        return "\n".join([*lines, *counts, *self.notes])

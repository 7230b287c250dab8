"""The report on coverage: the sources of randomness in a model, and the evidence for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ..core.checks import check_integer
from ..handlers.sources import AUGMENTS, NOT_CHOSEN, Source


@dataclass
class Report:
    """The sources of randomness of a model, and the way in which its samples were run.

    Args:
        sources: the sources in the order of a train-mode forward.
        expected: the number of random draws of a train-mode forward.
        draws: the number of draws of the last Monte Carlo forward.
        rows: the dimension of the inputs that holds the rows of data; None if the inputs are one whole.
        strategy: the strategy of the samples: "vectorized", "repeated" or "loop"; None before.
        chunk: the number of samples that were run at a time; None before.
        compiled: whether samples were run by compiled functions.
        notes: further remarks.
        unseen: the number of random draws of a train-mode forward in places where calls cannot be seen.
        outside: the number of calls of dropout, off and with a rate, that belong to no forward of the model.
        called: whether the model, or a part of it, has been called.
    """

    sources: list[Source] = field(default_factory=list)
    expected: int = 0
    draws: int = 0
    rows: int | None = None
    strategy: str | None = None
    chunk: int | None = None
    compiled: bool = False
    notes: list[str] = field(default_factory=list)
    unseen: int = 0
    outside: int = 0
    called: bool = False
    _fix: Callable[[int], AbstractContextManager[None]] | None = field(default=None, repr=False, compare=False)

    def sample(self, number: int) -> AbstractContextManager[None]:
        """Returns a context, for use within `mc_dropout`, in which every call of the model has the masks of one sample.

        So all windows of an image, or all steps of a decoder, are computed by one function. Outside of it each call is
        the next sample.

        Args:
            number: the number of the sample, from 0.

        Raises:
            TypeError, ValueError: a number that is no integer, or negative.
            RuntimeError: the report is not that of a context that this thread is in.

        Example:
            >>> import torch, torchdrop
            >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5)).eval(), torch.randn(3, 4)
            >>> with torchdrop.mc_dropout(model, seed=0) as report:
            ...     with report.sample(5):
            ...         first, again = model(x), model(x)
            >>> torch.equal(first, again)
            True
        """
        check_integer("number", number, least=0)
        if self._fix is None:
            raise RuntimeError("report.sample(number) is for use within `with mc_dropout(model) as report:`")
        return self._fix(number)

    @property
    def active(self) -> list[Source]:
        """The sources that draw in Monte Carlo mode."""
        return [source for source in self.sources if source.active]

    @property
    def inactive(self) -> list[Source]:
        """The sources that draw in a train-mode forward and not in Monte Carlo mode, each with its reason."""
        return [source for source in self.sources if not source.active]

    @property
    def unreached(self) -> list[Source]:
        """The inactive sources that were not left out on purpose: they could not be made to draw."""
        return [source for source in self.inactive if source.reason not in (NOT_CHOSEN, AUGMENTS)]

    def noted(self) -> str:
        """Returns the notes, one in each line."""
        return "".join(f"\n  {note}" for note in self.notes)

    @property
    def replayable(self) -> bool:
        """Whether every active source's draws follow from (seed, source, sample, row) alone."""
        return all(source.replayable for source in self.active)

    def rows_of(self) -> list[dict[str, Any]]:
        """Returns a plain dict for each source, for tables."""
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
            lines.append(f"Samples: {self.strategy}, {self.chunk} at a time{', compiled' if self.compiled else ''}")
        return "\n".join([*lines, *counts, *self.notes])

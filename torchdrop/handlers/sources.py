"""The random calls of a model, as they are known after a forward: `Source`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .calls import RandomCall, Site
from .masks import Layout

DRAWN = "drawn in a train-mode forward"
AUGMENTS = "augmentation, which stays off"
NOT_CHOSEN = "not chosen by the patterns of `sources`"
UNCHECKED = "called in Monte Carlo mode; no train-mode forward to compare with"


class Seen(NamedTuple):
    """The shapes of a source's tensor and mask at some number of rows, to find its layout at another number."""

    rows: int | None
    shape: tuple[int, ...]
    mask: tuple[int, ...]


@dataclass
class Source:
    """One call in the model that draws.

    Args:
        module: the name of the module that makes the call; "" for the model itself.
        kind: "dropout", "attention", "lstm", "torchdrop", "bernoulli", ...
        number: the number of the call among the module's calls of this kind in one forward, from 0.
        rate: the probability of dropping, if there is one.
        active: whether it draws in Monte Carlo mode.
        replayable: whether its draws follow from (seed, source, sample, row) alone.
        known: the evidence for that.
        reason: the reason why it is not active, or not replayable.
        draws: the number of random draws in it in one forward.
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

    @classmethod
    def of_call(cls, site: Site, call: RandomCall) -> Source:
        """Returns the source of one call, as far as the call describes it."""
        rate = float(call.rate) if isinstance(call.rate, (float, int)) else None
        return cls(*site, rate, call.on, replayable=not call.loose, reason=call.loose, draws=call.draws)

    @property
    def site(self) -> Site:
        return Site(self.module, self.kind, self.number)

"""A random call of a model: its place, and the numbers that it would draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Site(NamedTuple):
    """A call in the model: the module that makes it, its kind, and its number among such calls in one forward."""

    module: str
    kind: str
    number: int


@dataclass
class RandomCall:
    """One call of a random function.

    Args:
        kind: the name of its kind in reports.
        rate: the probability of dropping, if there is one.
        on: whether the call as made draws anything.
        shape: the shape of the tensor that is dropped from or drawn; None if only the result has it.
        mask: the shape of its mask, if it is another.
        original: makes the call as it is.
        plain: makes it without randomness.
        served: makes it with masks from a slot, at a rate; None if that is impossible.
        flagged: whether the module's own code decides from its training flag if this is called or used.
        draws: the number of random draws in it.
        loose: why its draws depend on the batch, if they do.
    """

    kind: str
    rate: float | None
    on: bool
    shape: Sequence[int] | None
    original: Callable[[], Any]
    plain: Callable[[], Any]
    served: Callable[[Any, float], Any] | None
    mask: Sequence[int] | None = None
    flagged: bool = False
    draws: int = 1
    loose: str = ""


Mode = Any
"""The function mode that asks; `inside(slot)` makes torchdrop's next layer take its mask from a slot."""

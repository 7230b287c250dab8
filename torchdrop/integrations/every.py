"""The parts that callbacks share: the unit of a schedule's step, and the name of their state in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping


def check_every(every: str) -> str:
    """Checks a value of `every`, and returns it.

    >>> check_every("step")
    'step'
    """
    if every not in ("step", "epoch"):
        raise ValueError(f"every must be 'step' or 'epoch', got {every!r}")
    return every


def state_key(rates: Mapping[str, object], every: str) -> str:
    """Returns the name of a callback's state, which is another one for each callback of a trainer.

    >>> state_key({"fc": 0.5, "conv*": 0.9}, "step")
    "KeepProbCallback(['conv*', 'fc'], step)"
    """
    return f"KeepProbCallback({sorted(rates)}, {every})"

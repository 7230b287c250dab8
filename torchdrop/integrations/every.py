"""What a step of a schedule is to a trainer."""

from __future__ import annotations


def check_every(every: str) -> str:
    """The value itself.

    >>> check_every("step")
    'step'
    """
    if every not in ("step", "epoch"):
        raise ValueError(f"every must be 'step' or 'epoch', got {every!r}")
    return every

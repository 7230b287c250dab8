"""Hooks that only observe which module runs, told apart from hooks that need or change its tensors.

This file imports nothing of torchdrop, so every other file may import it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Hook = TypeVar("Hook", bound=Callable[..., Any])


def observer(hook: Hook) -> Hook:
    """Marks a function or method as a hook that only observes, or that is registered in eval mode only.

    `torchdrop.compact` computes layers in parts, whose tensors such a hook may see in the place of whole ones.
    """
    hook._only_observes = True  # type: ignore[attr-defined]
    return hook


def is_observer(hook: Any) -> bool:
    """Whether a hook is marked by `observer`."""
    return bool(getattr(hook, "_only_observes", False))

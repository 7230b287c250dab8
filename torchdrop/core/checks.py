"""Arguments that are refused: the same words for the same mistake everywhere.

This file imports nothing of torchdrop but `torch_state`, so every other file may import it.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from .torch_state import constant_when_compiled


def shown(value: Any) -> str:
    """Returns a value as an error shows it: itself if it is short, otherwise its type.

    >>> import torch
    >>> shown(2.5), shown("a"), shown(torch.ones(2))
    ('2.5', "'a'", 'Tensor')
    """
    short = value is None or isinstance(value, (bool, int, float, complex, str))
    return repr(value) if short and len(repr(value)) <= 60 else type(value).__name__


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """Returns the value as an int. True and False are not taken for integers.

    Raises:
        TypeError, ValueError: it is no integer, or below `least`.

    Example:
        >>> check_integer("samples", 3), check_integer("samples", 0, least=1)
        Traceback (most recent call last):
        ValueError: samples must be at least 1, got 0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if least is not None and value < least:
        rule = "must not be negative" if least == 0 else f"must be at least {least}"
        raise ValueError(f"{name} {rule}, got {value}")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """Returns the value as a float.

    Raises:
        TypeError: it is no real number.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_finite(name: str, value: Any) -> float:
    """Returns the value as a float.

    Raises:
        TypeError, ValueError: it is no real number, infinite or NaN.
    """
    number = check_number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def check_probability(name: str, value: Any) -> float:
    """Returns the value as a float.

    Raises:
        TypeError, ValueError: it is no real number, or is outside [0, 1].
    """
    number = check_number(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return number


def check_bool(name: str, value: Any) -> None:
    """Raises TypeError unless a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_module(name: str, value: Any) -> None:
    """Raises TypeError unless a value is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")


def check_choice(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raises ValueError unless a value is one of those known."""
    known = list(known)
    if not any(type(value) is type(one) and value == one for one in known):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {shown(value)}")


@constant_when_compiled
def warn(message: str, stacklevel: int) -> None:
    """Warns as `warnings.warn` does. Compiled code warns once, when it is compiled: Dynamo does not enter that call."""
    warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)


def unwrapped(model: Any) -> nn.Module:
    """Returns the module itself, or the original of a compiled one.

    Raises:
        TypeError: it is no module.
    """
    check_module("model", model)
    return unwrapped(model._orig_mod) if isinstance(getattr(model, "_orig_mod", None), nn.Module) else model

"""The settings of a search, `grid` and `draws`, and the rates of a model under each of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..configure.rate_sites import rate_sites
from ..configure.rates import RateOrRule, set_keep_prob
from ..core.checks import check_integer
from ..core.rate import Probability

Setting = Mapping[str, RateOrRule]
"""A keep_prob for each pattern of layer names, as `torchdrop.set_keep_prob` takes them."""


def grid(values: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Returns every combination of the values, the last pattern's changing fastest.

    Args:
        values: for each pattern the keep_probs to try. Layers that share a pattern share one number.

    Raises:
        TypeError: `values` is no mapping, or has a value that is no sequence.
        ValueError: no pattern, or a pattern without values.

    Example:
        >>> grid({"0": [0.8, 1.0], "hidden.*": [0.5]})
        [{'0': 0.8, 'hidden.*': 0.5}, {'0': 1.0, 'hidden.*': 0.5}]
    """
    _check_patterns("values", values, "a list of keep_probs")
    for pattern, choices in values.items():
        if isinstance(choices, str) or not isinstance(choices, Sequence):
            raise TypeError(f"{pattern!r} must have a list of keep_probs, got {type(choices).__name__}")
        if not choices:
            raise ValueError(f"{pattern!r} must have at least one keep_prob, got none")
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def draws(ranges: Mapping[str, tuple[float, float]], n: int, seed: int = 0) -> list[dict[str, float]]:
    """Returns settings drawn at random: ``keep_prob ~ Uniform(low, high)``, independently for each pattern.

    The first settings of a longer list are those of a shorter one.

    Args:
        ranges: for each pattern (low, high). Layers that share a pattern share one number.
        n: the number of settings.
        seed: the seed of the draws.

    Raises:
        TypeError: `ranges` is no mapping, or `n` or `seed` is no integer.
        ValueError: no pattern, no setting, or a range that is not ``0 <= low <= high <= 1``.

    References:
        Bergstra, Bengio, "Random Search for Hyper-Parameter Optimization", JMLR 13, 2012.

    Example:
        >>> [setting] = draws({"fc*": (0.3, 0.9)}, 1)
        >>> 0.3 <= setting["fc*"] <= 0.9
        True
    """
    _check_patterns("ranges", ranges, "(low, high)")
    check_integer("n", n, least=1)
    check_integer("seed", seed)
    for pattern, ends in ranges.items():
        if not isinstance(ends, Sequence) or len(ends) != 2:
            raise TypeError(f"{pattern!r} must have a range (low, high), got {ends!r}")
        if not 0 <= ends[0] <= ends[1] <= 1:
            raise ValueError(f"the range of {pattern!r} must be 0 <= low <= high <= 1, got {tuple(ends)}")
    source = random.Random(seed)
    return [{pattern: source.uniform(*ends) for pattern, ends in ranges.items()} for _ in range(n)]


def _check_patterns(name: str, given: Any, values: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a mapping from pattern to {values}, got {type(given).__name__}")
    if not given:
        raise ValueError(f"{name} must have at least one pattern, got none")


def rates_of(model: nn.Module, settings: Sequence[Setting]) -> list[list[Probability]]:
    """Returns the rates of all places in the model that hold one, under each setting. The model is left as it was.

    Raises:
        TypeError, ValueError: `set_keep_prob` refuses a setting. The message says which.
    """
    found = rate_sites(model)
    states = [site.state() for site in found]
    rates = []
    for number, setting in enumerate(settings):
        try:
            set_keep_prob(model, setting)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}; in settings[{number}], {setting!r}") from None
        rates.append([site.keep_prob for site in found])
        for site, state in zip(found, states, strict=True):
            site.restore(state)
    return rates

"""The realized rate: the share of elements that dropout really keeps, measured on ones, and its probability at a
rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import sites
from ..core.formulations import Formulated
from ..core.mask_shape import mask_shape
from ..layers.alpha import AlphaDropout, FeatureAlphaDropout
from ..layers.channel import Dropout1d, Dropout2d, Dropout3d
from ..layers.dropout import Dropout

_ENOUGH, _MOST = 20_000, 400
"""The number of draws after which a share is known well enough, and the largest number of calls."""

_UNKNOWN = 1_000
"""The number of calls of a layer whose draws cannot be counted: a call counts as one draw."""

_VALUES = 8

ALARM = math.log(2e9)


class RealizedRate(NamedTuple):
    """The fraction of elements kept, in so many independent draws; None for noise, which keeps and drops nothing."""

    kept: float | None
    draws: int

    def unlikely(self, rate: float) -> bool:
        """Whether dropout at this rate keeps a share that far off with a probability below 1e-9.

        By Chernoff's and Hoeffding's bound 2 exp(-n KL), which holds for means of n draws of any kind within [0, 1].

        Example:
            >>> RealizedRate(0.5, 100).unlikely(0.5), RealizedRate(0.5, 1000).unlikely(0.2)
            (False, True)
        """
        return self.kept is not None and self.draws * _divergence(self.kept, 1.0 - rate) > ALARM


def _divergence(a: float, b: float) -> float:
    """Returns the Kullback-Leibler divergence of two Bernoulli distributions.

    >>> _divergence(0.5, 0.5), round(_divergence(1.0, 0.5), 4)
    (0.0, 0.6931)
    """
    total = 0.0
    for x, y in ((a, b), (1.0 - a, 1.0 - b)):
        if x > 0:
            total += x * math.log(x / y) if y > 0 else math.inf
    return total


def measured(drop: Callable[[Tensor], Tensor], input: Tensor, mask: tuple[int, ...] | None) -> RealizedRate:
    """Measures the share that a function of a tensor of this shape keeps.

    Args:
        drop: the function. It maps a one that it keeps to one of a few positive values; noise maps it to any.
        mask: the shape of its mask; None if that is not known.
    """
    each = math.prod(mask) if mask is not None else 1
    if not input.numel() or not each:
        return RealizedRate(None, 0)
    values: set[float] = set()
    kept, calls = 0.0, 0
    with torch.no_grad():
        while calls * each < _ENOUGH and calls < (_MOST if mask is not None else _UNKNOWN):
            out = drop(torch.ones_like(input))
            values.update(out[out > 0].unique()[: _VALUES + 1].tolist())
            if out.shape != input.shape or len(values) > _VALUES:
                return RealizedRate(None, 0)
            kept += (out > 0).double().mean().item()
            calls += 1
    return RealizedRate(kept / calls, calls * each)


def zeroes(layer: nn.Module) -> bool:
    """Whether dropped elements can be counted in a layer's output. This excludes layers with other mechanisms."""
    return not type(layer).__module__.startswith("torchdrop.") or isinstance(layer, _COUNTED)


def mask_of_layer(layer: nn.Module, input: Tensor) -> tuple[int, ...] | None:
    """Returns the shape of the mask of a dropout layer of torch or torchdrop; None for one with code of its own."""
    if not type(layer).__module__.startswith(("torch.", "torchdrop.")):
        return None
    if isinstance(layer, Dropout):
        return tuple(mask_shape(input, layer.shared_axes, layer.noise_shape))
    return mask_of_function(_CHANNELS.get(type(layer).__name__, ""), input)


_COUNTED = (Formulated, AlphaDropout, FeatureAlphaDropout)

_CHANNELS = {
    **{kind.__name__: kind.__name__.lower() for kind in (Dropout1d, Dropout2d, Dropout3d)},
    "FeatureAlphaDropout": "feature_alpha_dropout",
}


def mask_of_function(name: str, input: Tensor) -> tuple[int, ...]:
    """Returns the mask's shape for one of torch's functions: a draw for each element, or for each channel."""
    if not ("feature" in name or name[-2:] in ("1d", "2d", "3d")):
        return tuple(input.shape)
    spatial = int(name[-2]) if name[-1:] == "d" and name[-2].isdigit() else input.dim() - 2
    leading = 2 if input.dim() - spatial == 2 else 1
    return (*input.shape[:leading], *[1] * (input.dim() - leading))


def mask_of_call(func: Any, args: tuple[Any, ...], input: Tensor) -> tuple[int, ...]:
    """Returns the mask's shape of a call that a handler has seen."""
    return tuple(args[3]) if func is sites.apply else mask_of_function(func.__name__, input)

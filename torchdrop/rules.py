"""Keep probabilities over depth: rules from the layers of a model, in order, to the keep_prob of each.

Each factory checks its arguments and returns a `Rule`, which takes a sequence of `LayerSize` and returns as many keep
probabilities. A factory raises a ValueError for a keep probability outside [0, 1], a TypeError for one of another type.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class LayerSize(NamedTuple):
    """The properties of a dropout layer that a rule uses.

    Args:
        name: the layer's name in its model.
        weights: the number of elements of the weight matrix that feeds the units it acts on; None if nothing comes
            before them, so that it acts on the input.
        last: whether no weights follow, so that it acts on the output.

    Example:
        >>> LayerSize("drop1", weights=7 * 3)
        LayerSize(name='drop1', weights=21, last=False)
    """

    name: str
    weights: int | None
    last: bool = False


@dataclass(frozen=True, repr=False)
class Rule:
    """A function layers -> keep_probs with its arguments: immutable, comparable and picklable.

    Example:
        >>> rule = uniform(0.8)
        >>> rule, rule([LayerSize("a", 21), LayerSize("b", 49)]), rule == uniform(0.8)
        (uniform(0.8), [0.8, 0.8], True)
    """

    name: str
    function: Callable[..., list[float]]
    arguments: tuple[float, ...]
    keywords: tuple[tuple[str, float], ...] = ()

    def __call__(self, layers: Sequence[LayerSize]) -> list[float]:
        """Returns the keep probability of each layer.

        Raises:
            TypeError: `layers` is no sequence of LayerSize, or one of them has a field of another type.
            ValueError: no layer, or a number of weights that is not positive.
        """
        return self.function(_checked(layers), *self.arguments, **dict(self.keywords))

    def __repr__(self) -> str:
        given = [*map(repr, self.arguments), *(f"{name}={value!r}" for name, value in self.keywords)]
        return f"{self.name}({', '.join(given)})"


def uniform(keep_prob: float) -> Rule:
    """keep_l = keep_prob: the same for every layer.

    Example:
        >>> uniform(0.5)([LayerSize("a", None), LayerSize("b", 21)])
        [0.5, 0.5]
    """
    return Rule("uniform", _uniform, (_rate("keep_prob", keep_prob),))


def _uniform(layers: list[LayerSize], keep_prob: float) -> list[float]:
    return [keep_prob] * len(layers)


def linear_in_depth(keep_prob: float) -> Rule:
    """p_l = l / L * p_L for l = 1..L: stochastic depth as published, where the first of L layers drops already.

    That is keep_l = 1 - l / L (1 - k_L). The expected number of kept layers at k_L = 1/2 is (3 L - 1) / 4.

    Args:
        keep_prob: k_L, the keep probability of the last layer.

    References:
        Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, arXiv:1603.09382: linear decay.

    Example:
        >>> blocks = [LayerSize(f"block{l}", 576) for l in range(1, 55)]
        >>> linear_in_depth(0.5)(blocks[:4])
        [0.875, 0.75, 0.625, 0.5]
        >>> round(sum(linear_in_depth(0.5)(blocks)), 9), (3 * 54 - 1) / 4
        (40.25, 40.25)
    """
    return Rule("linear_in_depth", _linear_in_depth, (_rate("keep_prob", keep_prob),))


def _linear_in_depth(layers: list[LayerSize], keep_prob: float) -> list[float]:
    depth = len(layers)
    return [_interpolate(keep_prob, (depth - layer) / depth) for layer in range(1, depth + 1)]


def linspace_in_depth(keep_prob: float) -> Rule:
    """p_l = (l - 1) / (L - 1) * p_L for l = 1..L: a linspace from 0 at the first layer, as timm has it.

    With one layer the linspace is [0], as it is for torch.linspace and timm: that layer keeps everything. `uniform` or
    `linear_in_depth` give a single layer its keep_prob.

    Args:
        keep_prob: the keep probability of the last layer.

    References:
        timm's stochastic depth decay rule, torch.linspace(0, drop_path_rate, depth); compare `linear_in_depth`.

    Example:
        >>> blocks = [LayerSize(f"block{l}", 576) for l in range(1, 6)]
        >>> linspace_in_depth(0.5)(blocks), linspace_in_depth(0.5)(blocks[:1])
        ([1.0, 0.875, 0.75, 0.625, 0.5], [1.0])
    """
    return Rule("linspace_in_depth", _linspace_in_depth, (_rate("keep_prob", keep_prob),))


def _linspace_in_depth(layers: list[LayerSize], keep_prob: float) -> list[float]:
    gaps = max(len(layers) - 1, 1)
    return [_interpolate(keep_prob, (gaps - layer) / gaps) for layer in range(len(layers))]


def by_weight_size(largest: float = 0.5, *, smallest: float = 1.0, input: float = 0.9, output: float = 1.0) -> Rule:
    """Ng's advice: the larger the weight matrix, the lower the keep_prob; the input near 1, the output 1.

    A hidden layer whose units are fed by a matrix of n weights gets keep = smallest - (smallest - largest) n / max(n),
    the maximum over the hidden layers, so that the layer with the most weights gets `largest`. The advice has numbers
    (0.5 for the largest matrix, 0.7 for smaller ones, 1 where overfitting is no worry) but no formula: the proportion
    is ours.

    Args:
        largest: the keep_prob of the hidden layer with the largest weight matrix.
        smallest: the limit of a hidden layer's keep_prob as its weight matrix vanishes.
        input: the keep_prob of layers that act on the input.
        output: the keep_prob of layers that act on the output, whatever their weights.

    References:
        Ng, Deep Learning Specialization, course 2 (Improving Deep Neural Networks), week 1: "Understanding dropout".

    Example:
        His network 3-7-7-3-2-1, whose matrices are 7x3, 7x7, 3x7, 2x3 and 1x2:

        >>> layers = [LayerSize("x", None), LayerSize("a1", 7 * 3), LayerSize("a2", 7 * 7), LayerSize("a3", 3 * 7)]
        >>> layers += [LayerSize("a4", 2 * 3), LayerSize("y", 1 * 2, last=True)]
        >>> [round(keep_prob, 3) for keep_prob in by_weight_size()(layers)]
        [0.9, 0.786, 0.5, 0.786, 0.939, 1.0]
    """
    rates = {"smallest": smallest, "input": input, "output": output}
    keywords = tuple((name, _rate(name, value)) for name, value in rates.items())
    return Rule("by_weight_size", _by_weight_size, (_rate("largest", largest),), keywords)


def _by_weight_size(
    layers: list[LayerSize], largest: float, smallest: float, input: float, output: float
) -> list[float]:
    most = max((layer.weights for layer in layers if layer.weights is not None and not layer.last), default=0)

    def keep_prob(layer: LayerSize) -> float:
        if layer.last:
            return output
        return input if layer.weights is None else _interpolate(largest, (most - layer.weights) / most, smallest)

    return [keep_prob(layer) for layer in layers]


def _interpolate(keep_prob: float, fraction: float, end: float = 1.0) -> float:
    """Goes from exactly keep_prob at fraction 0 to `end` at 1, where 1 - (1 - k) (1 - f) would miss k by a rounding."""
    return keep_prob + (end - keep_prob) * fraction


def _checked(layers: Any) -> list[LayerSize]:
    if isinstance(layers, (str, LayerSize)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a sequence of LayerSize, got {layers!r}")
    layers = list(layers)
    if not layers:
        raise ValueError("layers must not be empty: there is nothing that could get a keep_prob")
    for i, layer in enumerate(layers):
        if not isinstance(layer, LayerSize):
            raise TypeError(f"layers[{i}] must be a LayerSize, got {layer!r}")
        if not isinstance(layer.last, bool):
            raise TypeError(f"last of layer {layer.name!r} must be True or False, got {layer.last!r}")
        if layer.weights is None:
            continue
        if isinstance(layer.weights, bool) or not isinstance(layer.weights, numbers.Integral):
            raise TypeError(f"weights of layer {layer.name!r} must be an integer or None, got {layer.weights!r}")
        if layer.weights < 1:
            raise ValueError(f"weights of layer {layer.name!r} must be positive, got {layer.weights}")
    return layers


def _rate(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= value <= 1.0:  # type: ignore[operator]
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)

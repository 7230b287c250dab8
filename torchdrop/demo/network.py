"""The network, and the rule that gives each of its layers a keep_prob."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from ..layers.bernoulli import Dropout

SIZES = (64, 512, 512, 10)
"""Units of the input, of two hidden layers and of the output."""

INPUT = 0.9
LARGEST, SMALLEST = 0.5, 0.8


def keep_probs(sizes: Sequence[int]) -> list[float]:
    """A keep_prob for the input and for each layer after it.

    - Input: 0.9. A pixel that is lost cannot be had from elsewhere, so nearly all are kept.
    - Hidden layer with a weight matrix of n elements: ``0.8 - 0.3 n / n_max``, where n_max is the size of the largest
      one. More weights can overfit more, so the layer with the largest matrix keeps 0.5 and one with a tiny matrix
      nearly 0.8: the range that Srivastava et al. give for hidden units.
    - Output: 1. A dropped logit would be a wrong answer and not a regularised one.

    Args:
        sizes: the units of the input, the hidden layers and the output; at least two numbers.

    References:
        Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014, appendix A.4.

    Example:
        >>> [round(k, 2) for k in keep_probs([64, 512, 512, 10])]
        [0.9, 0.76, 0.5, 1.0]
    """
    weights = [units * above for units, above in pairwise(sizes[:-1])]
    hidden = [SMALLEST - (SMALLEST - LARGEST) * n / max(weights) for n in weights]
    return [INPUT, *hidden, 1.0]


def build(sizes: Sequence[int], keep: Sequence[float]) -> nn.Sequential:
    """Linear layers with ReLU between them, each layer and the input followed by dropout with its keep_prob.

    Dropout has no parameters and needs no initial values: under one seed, networks that differ in `keep` start from the
    same weights. With 1 everywhere it is the network without dropout.
    """
    layers: list[nn.Module] = [Dropout(keep_prob=keep[0])]
    for i, keep_prob in enumerate(keep[1:]):
        if i > 0:
            layers.append(nn.ReLU())
        layers += [nn.Linear(sizes[i], sizes[i + 1]), Dropout(keep_prob=keep_prob)]
    return nn.Sequential(*layers)


def describe(sizes: Sequence[int], keep: Sequence[float]) -> str:
    """A line for the input and for each layer: its units, its weight matrix and its keep_prob."""
    last = len(sizes) - 1
    lines = [f"{'layer':<10}{'units':>6}{'weight matrix':>20}{'keep_prob':>12}"]
    for i, (units, keep_prob) in enumerate(zip(sizes, keep, strict=True)):
        name = "input" if i == 0 else "output" if i == last else f"hidden {i}"
        matrix = f"{sizes[i - 1]} x {units} = {sizes[i - 1] * units}" if i > 0 else "-"
        lines.append(f"{name:<10}{units:>6}{matrix:>20}{keep_prob:>12.2f}")
    return "\n".join(lines)

"""The network, the rule that gives each of its layers a keep_prob, and the schedule that these follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..configure import KeepProbs, keep_probs, set_keep_prob
from ..configure.rates import RateOrRule
from ..layers.dropout import Dropout
from ..rules import by_weight_size
from ..scheduler import KeepProbScheduler
from ..schedules import Scaled, curriculum, scale

SIZES = (64, 512, 512, 10)
"""Units of the input, of two hidden layers and of the output."""

RATES = {"*": by_weight_size(0.5, smallest=0.8, input=0.9, output=1.0)}
"""A keep_prob for every layer.

- Input: 0.9. The information in a lost pixel is nowhere else, so nearly all are kept.
- Hidden layers: 0.5 for the one with the largest weight matrix, which can overfit most, nearly 0.8 for one with a tiny
  matrix: the range that Srivastava et al. (JMLR 2014, appendix A.4) give for hidden units.
- Output: 1. A dropped logit would make the prediction wrong and would not regularize.
"""

WITHOUT = {"*": 1.0}


def ramp(epochs: int) -> Scaled:
    """Multiplies every layer's own probability of dropping by 1 - exp(-10 t / epochs) after epoch t, from 0 on.

    References:
        Morerio et al., "Curriculum Dropout", ICCV 2017.

    Example:
        >>> schedule = ramp(150).of(0.5)
        >>> [round(schedule(epoch), 2) for epoch in (0, 15, 150)]
        [1.0, 0.68, 0.5]
    """
    still = curriculum(0.0, epochs)
    return scale(lambda epoch: 1.0 - still(epoch))


def build(sizes: Sequence[int], rates: Mapping[str, RateOrRule]) -> nn.Sequential:
    """Builds linear layers with ReLU between them, each layer and the input followed by dropout with its keep_prob.

    Dropout has no parameters and needs no initial values: under one seed, networks that differ in their rates start
    from the same weights. With 1 everywhere it is the network without dropout.

    Example:
        >>> print(keep_probs(build(SIZES, RATES)))
        layer  kind     keep_prob  mode
        0      Dropout  0.9        train
        2      Dropout  0.7625     train
        5      Dropout  0.5        train
        8      Dropout  1          train
    """
    layers: list[nn.Module] = [Dropout()]
    for i in range(len(sizes) - 1):
        if i > 0:
            layers.append(nn.ReLU())
        layers += [nn.Linear(sizes[i], sizes[i + 1]), Dropout()]
    network = nn.Sequential(*layers)
    set_keep_prob(network, rates)
    return network


def scheduled(
    sizes: Sequence[int], rates: Mapping[str, RateOrRule], epochs: int
) -> tuple[KeepProbScheduler, KeepProbs]:
    """Returns the schedule of a network that has no weights, only rates, and these rates from before."""
    with torch.device("meta"):
        network = build(sizes, rates)
    own = keep_probs(network)
    return KeepProbScheduler(network, {"*": ramp(epochs)}), own


def describe(sizes: Sequence[int], rates: Mapping[str, RateOrRule], epochs: int) -> str:
    """Returns lines for the input and each layer: units, weight matrix, keep_prob, and keep_probs on the schedule."""
    scheduler, own = scheduled(sizes, rates, epochs)
    shown = sorted({0, epochs // 20, epochs // 5, epochs})
    at = []
    for epoch in shown:
        scheduler.seek(epoch)
        at.append(list(scheduler.get_last_keep_prob().values()))
    last = len(sizes) - 1
    title = f"on a schedule, at epoch {', '.join(map(str, shown))}"
    lines = [f"{'layer':<10}{'units':>6}{'weight matrix':>20}{'keep_prob':>12}   {title}"]
    for i, (units, keep_prob) in enumerate(zip(sizes, own.values(), strict=True)):
        name = "input" if i == 0 else "output" if i == last else f"hidden {i}"
        matrix = f"{sizes[i - 1]} x {units} = {sizes[i - 1] * units}" if i > 0 else "-"
        moments = "  ".join(f"{values[i]:.2f}" for values in at)
        lines.append(f"{name:<10}{units:>6}{matrix:>20}{keep_prob:>12.2f}   {moments}")
    return "\n".join(lines)

"""Labels that are independent of each other: the probability of each, and the uncertainty about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .blocks import Outputs
from .groups import Derived, Mean, Observed, Statistic
from .moments import wide
from .plain import all_finite, one_tensor, std, variance

_LARGE = 800.0
"""A number whose negative has the exponential 0 in float64, in place of infinity, which 0 cannot be multiplied with."""


def binary_entropy(probability: Tensor) -> Tensor:
    """Returns ``h(p) = -p log p - (1 - p) log(1 - p)`` in nats, from 0 if p is 0 or 1 to log 2 if it is 1/2.

    Example:
        >>> binary_entropy(torch.tensor([0.0, 0.5, 1.0])).exp()
        tensor([1., 2., 1.])
    """
    return torch.special.entr(probability) + torch.special.entr(1 - probability)


def predictive_entropy(moments: Observed) -> Tensor:
    """Returns ``h(E p)`` of each label, in nats: all uncertainty."""
    return binary_entropy(moments["probability"].mean)


def mutual_information(moments: Observed) -> Tensor:
    """Returns ``h(E p) - E h(p)`` of each label, in nats, between label and model (epistemic; BALD); never negative.

    References:
        Houlsby, Huszar, Ghahramani, Lengyel, "Bayesian Active Learning for Classification", 2011, equation 2.
    """
    return (predictive_entropy(moments) - moments["entropy"].mean).clamp_min(0)


def _sigmoid(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``p = 1 / (1 + exp(-z))`` and its entropy ``log(1 + exp(-|z|)) + |z| / (1 + exp(|z|))``."""
    values = wide(logits)
    size = values.abs().clamp_max_(_LARGE)
    entropy = (-size).exp_().log1p_().add_((-size).sigmoid_().mul_(size))
    return values.sigmoid(), entropy


@dataclass(frozen=True)
class MultiLabel:
    """Each element of the outputs is a label of its own, which is present or not: outputs of shape (S, B, ...).

    Observables: "probability", and "entropy" of each sample, in nats, both of shape (S, B, ...).

    Args:
        scores: "logits", of which probabilities are the sigmoids, "probabilities", or "auto" for probabilities if all
            are in [0, 1] and logits otherwise. The decision of "auto" on the first chunk holds for all later ones.

    Raises:
        ValueError: another word, or outputs that should be probabilities and are not.

    Example:
        >>> task = MultiLabel("auto").settled(torch.tensor([[[-1.0, 3.0]]]))
        >>> task
        MultiLabel(scores='logits')
        >>> task.observe(torch.tensor([[[0.0, 0.0]]]))["probability"].tolist()
        [[[0.5, 0.5]]]
    """

    scores: str = "auto"

    leading: ClassVar[int] = 1
    kept: ClassVar[tuple[str, ...]] = ("probability",)

    def __post_init__(self) -> None:
        if self.scores not in ("auto", "logits", "probabilities"):
            raise ValueError(f"scores must be 'auto', 'logits' or 'probabilities', got {self.scores!r}")

    def placed(self, outputs: Outputs) -> MultiLabel:
        return self

    def arranged(self, outputs: Outputs) -> Tensor:
        return one_tensor(outputs)

    def restored(self, values: Tensor, dims: int) -> Tensor:
        return values

    def settled(self, outputs: Outputs) -> MultiLabel:
        """Returns the task with the kind of scores decided by outputs; itself if it is known."""
        if self.scores != "auto":
            return self
        return replace(self, scores="probabilities" if _inside(one_tensor(outputs)) else "logits")

    @property
    def takes_finite(self) -> bool:
        return self.scores == "logits"

    def finite(self, outputs: Outputs) -> bool:
        values = one_tensor(outputs)
        if self.scores == "logits":  # infinite ones have probability 0 or 1
            return not bool(values.isnan().any())
        if not all_finite(values):
            return False
        if not _inside(values):
            raise ValueError(
                f"outputs must be probabilities in [0, 1], got values from {values.min():.4g} to {values.max():.4g}: "
                "if they are logits, say scores='logits'"
            )
        return True

    def observe(self, outputs: Outputs) -> dict[str, Tensor]:
        if self.scores == "auto":
            raise ValueError("scores='auto' must be settled by a first chunk")
        values = one_tensor(outputs)
        if self.scores == "logits":
            probability, entropy = _sigmoid(values)
        else:
            probability = wide(values)
            entropy = binary_entropy(probability)
        return {"probability": probability, "entropy": entropy}

    def statistics(self) -> dict[str, Statistic]:
        return {
            "mean": Mean("probability"),
            "variance": variance("probability"),
            "std": std("probability"),
            "predictive_entropy": Derived(predictive_entropy, ("probability",)),
            "expected_entropy": Mean("entropy"),
            "mutual_information": Derived(mutual_information, ("probability", "entropy")),
        }


def _inside(values: Tensor) -> bool:
    return not values.numel() or bool((values.amin() >= 0) & (values.amax() <= 1))

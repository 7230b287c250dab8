"""Classes that exclude each other: their probabilities, and the uncertainty about which one it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.torch_state import dispatch_modes
from .blocks import Outputs
from .groups import Derived, Mean, Observed, Statistic
from .moments import wide
from .plain import all_finite, one_tensor, std, variance

_TWO = "give two with select_output=lambda z: torch.stack([torch.zeros_like(z), z], dim=1), or say task='multilabel'"

_LOWEST = -800.0
"""A number whose exponential is 0 in float64, in place of minus infinity, which 0 cannot be multiplied with."""


def class_numbers(model: nn.Module) -> tuple[int, ...]:
    """Returns the numbers of classes, or of words, that the configuration of a model names, as transformers' do.

    Example:
        >>> class_numbers(nn.Linear(2, 2))
        ()
    """
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in ("num_labels", "vocab_size"))
    return tuple(number for number in found if isinstance(number, int))


def predictive_entropy(moments: Observed) -> Tensor:
    """Returns ``H[E p] = -sum_c E[p_c] log E[p_c]`` in nats, the entropy of mean probabilities: all uncertainty."""
    return torch.special.entr(moments["probability"].mean).sum(1)


def mutual_information(moments: Observed) -> Tensor:
    """Returns ``H[E p] - E H[p]`` in nats, between class and model, which more data could remove (epistemic; BALD).

    It is never negative, as the entropy is concave; a difference that rounding brings below 0 is set to 0.

    References:
        Houlsby, Huszar, Ghahramani, Lengyel, "Bayesian Active Learning for Classification", 2011, equation 2.
    """
    return (predictive_entropy(moments) - moments["entropy"].mean).clamp_min(0)


def variation_ratio(moments: Observed) -> Tensor:
    """Returns ``1 - max_c f_c`` with f_c the share of samples whose most probable class is c: 0 if all samples agree.

    References:
        Freeman, "Elementary Applied Statistics", 1965; Gal, "Uncertainty in Deep Learning", 2016, section 3.3.1.
    """
    return 1 - moments["vote"].mean.amax(1)


def normalized(probabilities: Tensor, dim: int) -> bool:
    """Whether all are in [0, 1] and sum to 1 to rounding: to twice the dtype's epsilon, and 1e-5 at the finest.

    Example:
        >>> normalized(torch.tensor([[0.25, 0.75]]), 1), normalized(torch.tensor([[0.25, 0.25]]), 1)
        (True, False)
    """
    if not probabilities.numel():
        return True
    if not bool(probabilities.amin() >= 0):
        return False
    tolerance = max(1e-5, 2 * torch.finfo(probabilities.dtype).eps)
    total = probabilities.sum(dim, dtype=torch.promote_types(probabilities.dtype, torch.float32))
    return bool(((total - 1).abs() <= tolerance).all())


def _softmax(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Returns probabilities and their entropy, over dimension 2, from logits z and their maximum m.

    With ``e_c = exp(z_c - m)`` and ``s = sum_c e_c``, p is ``e / s`` and its entropy is
    ``log s - sum_c e_c (z_c - m) / s``.
    """
    shifted = wide(logits) - wide(top)
    probability = shifted.exp()
    total = probability.sum(2, keepdim=True)
    inner = shifted.clamp_min_(_LOWEST).mul_(probability).sum(2, keepdim=True)
    entropy = total.log() - inner.div_(total)
    return probability.div_(total), entropy.squeeze(2)


def _votes(values: Tensor, top: Tensor) -> Tensor:
    """Returns whether a class is the most probable one, the first of them if several are."""
    votes = values == top
    if not dispatch_modes() and int(votes.count_nonzero()) == top.numel():  # a recording cannot ask
        return votes
    return torch.zeros_like(votes).scatter_(2, values.argmax(2, keepdim=True), True)


@dataclass(frozen=True)
class Classification:
    """Classes along one dimension: outputs of shape (S, B, ...) in which it counts C > 1 classes.

    Observables: "probability" and "vote" (whether the class is the most probable one) of shape (S, B, C, ...), and
    "entropy" of each sample, in nats, of shape (S, B, ...).

    Args:
        scores: "logits", "probabilities", or "auto" for probabilities if all are in [0, 1] and sum to 1, and logits
            otherwise. The decision of "auto" on the first chunk holds for all later ones: see `settled`.
        class_dim: the dimension of classes in outputs (B, ...), from 1 on or counted from the last by a negative
            number, or "auto": see `placed`.
        class_numbers: numbers of classes that the model is known to have.
        doubt: a sentence that says what else could be meant; "" if nothing could.

    Raises:
        ValueError: another word; outputs that have no dimension of classes, or only one class, or that should be
            probabilities and are not.

    Example:
        >>> task = Classification("auto").settled(torch.tensor([[[0.5, 0.5]]]))
        >>> task
        Classification(scores='probabilities', class_dim=1)
        >>> {name: value.tolist() for name, value in task.observe(torch.tensor([[[0.0, 1.0]]])).items()}
        {'probability': [[[0.0, 1.0]]], 'entropy': [[0.0]], 'vote': [[[False, True]]]}
    """

    scores: str = "auto"
    class_dim: int | str = 1
    class_numbers: tuple[int, ...] = field(default=(), compare=False, repr=False)
    doubt: str = field(default="", compare=False, repr=False)

    leading: ClassVar[int] = 2
    kept: ClassVar[tuple[str, ...]] = ("probability",)

    def __post_init__(self) -> None:
        if self.scores not in ("auto", "logits", "probabilities"):
            raise ValueError(f"scores must be 'auto', 'logits' or 'probabilities', got {self.scores!r}")
        integer = isinstance(self.class_dim, int) and not isinstance(self.class_dim, bool)
        if self.class_dim != "auto" and (not integer or self.class_dim == 0):
            raise ValueError(
                f"class_dim must be 'auto' or a dimension after the rows, which are 0, got {self.class_dim!r}"
            )

    def placed(self, outputs: Outputs) -> Classification:
        """Returns the task with the dimension of classes decided by outputs (S, B, ...), as a positive number.

        "auto" takes dimension 1 of (rows, classes). Where there are several dimensions, it takes the only one over
        which all values are probabilities that sum to 1, or else the only one whose size is a number of classes that
        the model is known to have, and otherwise dimension 1, as torch.nn.CrossEntropyLoss does, or the last of three
        dimensions if both have such a size.
        Where another dimension could be meant, as in three dimensions, `doubt` says so.
        """
        values = one_tensor(outputs)
        shape = tuple(values.shape[1:])
        if len(shape) < 2:
            raise ValueError(
                f"outputs must have a dimension of classes after the rows, got shape {shape}; "
                f"for a binary model with one logit for each row, {_TWO}"
            )
        if isinstance(self.class_dim, int):
            if not self.class_dim % len(shape) > 0 or not -len(shape) < self.class_dim < len(shape):
                raise ValueError(
                    f"class_dim must be a dimension after the rows, in [1, {len(shape) - 1}] or negative, got "
                    f"{self.class_dim} for outputs of shape {shape}"
                )
            return replace(self, class_dim=self.class_dim % len(shape))
        dim, doubt = self._found(values)
        return replace(self, class_dim=dim, doubt=doubt)

    def _found(self, values: Tensor) -> tuple[int, str]:
        """Returns the dimension of classes, and the doubt about it."""
        shape = tuple(values.shape[1:])
        every = range(1, len(shape))
        if len(shape) == 2:
            return 1, ""
        several = [dim for dim in every if shape[dim] > 1]
        if self.scores != "logits" and values.numel() and bool(values.amin() >= 0):
            summing = [dim for dim in several if normalized(values, dim + 1)]
            if len(summing) == 1:
                return summing[0], ""
        known = [dim for dim in every if shape[dim] in self.class_numbers]
        if len(known) == 1:
            return known[0], ""
        dim = len(shape) - 1 if known and known[-1] == len(shape) - 1 and len(shape) == 3 else 1
        others = [other for other in (known or several) if other != dim]
        if not others or (not known and len(shape) > 3 and shape[1] <= min(shape[2:])):
            return dim, ""
        return dim, (
            f"classes are taken from dimension {dim} of outputs of shape {shape}, and dimension {others[-1]} could be "
            f"meant: say class_dim={dim} or class_dim={others[-1]}"
        )

    def arranged(self, outputs: Outputs) -> Tensor:
        values = one_tensor(outputs)
        dim = self._dim(values)
        if values.shape[dim + 1] == 1:
            raise ValueError(
                f"outputs must have a column for each class, got one column: shape {tuple(values.shape[1:])}; "
                f"for a binary model with one logit for each row, {_TWO.replace('stack', 'cat')}"
            )
        return values.movedim(dim + 1, 2)

    def restored(self, values: Tensor, dims: int) -> Tensor:
        assert isinstance(self.class_dim, int)
        return values.movedim(1, self.class_dim) if values.dim() == dims else values

    def settled(self, outputs: Outputs) -> Classification:
        """Returns the task with the kind of scores decided by arranged outputs; itself if it is known.

        They are probabilities if all are in [0, 1] and sum to 1 over the classes, which logits do not, and logits
        otherwise. Where these lie in [0, 1] as well, `doubt` says so.
        """
        if self.scores != "auto":
            return self
        values = one_tensor(outputs)
        if normalized(values, 2):
            return replace(self, scores="probabilities")
        if values.amin() < 0 or values.amax() > 1:
            return replace(self, scores="logits")
        doubt = (
            "outputs lie in [0, 1] and do not sum to 1 over the classes, so they are taken as logits: say "
            "scores='logits' if they are, or task='multilabel' if they are the probabilities of several labels"
        )
        return replace(self, scores="logits", doubt=f"{self.doubt}. {doubt}" if self.doubt else doubt)

    @property
    def takes_finite(self) -> bool:
        return self.scores == "logits"

    def finite(self, outputs: Outputs) -> bool:
        values = one_tensor(outputs)
        if not all_finite(values.amax(2)):
            return False
        if self.scores == "probabilities" and not normalized(values, 2):
            total = wide(values).sum(2)
            raise ValueError(
                "outputs must be probabilities, in [0, 1] and with sum 1 over dimension 2, got values from "
                f"{values.min():.4g} to {values.max():.4g} and sums from {total.min():.4g} to {total.max():.4g}"
            )
        return True

    def observe(self, outputs: Outputs) -> dict[str, Tensor]:
        if self.scores == "auto":
            raise ValueError("scores='auto' must be settled by a first chunk")
        values = one_tensor(outputs)
        top = values.amax(2, keepdim=True)
        if self.scores == "logits":
            probability, entropy = _softmax(values, top)
        else:
            probability = wide(values)
            entropy = torch.special.entr(probability).sum(2)
        return {"probability": probability, "entropy": entropy, "vote": _votes(values, top)}

    def statistics(self) -> dict[str, Statistic]:
        return {
            "mean": Mean("probability"),
            "variance": variance("probability"),
            "std": std("probability"),
            "predictive_entropy": Derived(predictive_entropy, ("probability",)),
            "expected_entropy": Mean("entropy"),
            "mutual_information": Derived(mutual_information, ("probability", "entropy")),
            "variation_ratio": Derived(variation_ratio, ("vote",)),
        }

    def _dim(self, values: Tensor) -> int:
        if not isinstance(self.class_dim, int):
            raise ValueError("class_dim='auto' must be decided by a first chunk: see placed")
        return self.class_dim

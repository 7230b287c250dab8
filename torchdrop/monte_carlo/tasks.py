"""Tasks observe each sample: the outputs as they are, classes, or values with noise.

Each task turns raw outputs into observables, and has the statistics to report, which are functions of the observables'
moments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .blocks import Outputs
from .groups import Derived, Mean, Observed, Statistic
from .moments import wide


class Task(Protocol):
    """The observables of each sample, and the statistics that are reported. See `tasks`."""

    @property
    def leading(self) -> int:
        """The number of dimensions before the places of a row: 1 for rows, 2 for rows and classes."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The observables that are kept of each sample where samples are kept."""

    def settled(self, outputs: Outputs) -> Task:
        """Returns the task with all open questions decided by the first chunk of outputs."""

    def arranged(self, outputs: Outputs) -> Outputs:
        """Returns outputs (S, B, ...) as `observe` takes them, with the leading dimensions in front; no copies."""

    def finite(self, outputs: Outputs) -> bool:
        """Returns whether all observables of arranged outputs are finite. Raises ValueError if it cannot take them."""

    def observe(self, outputs: Outputs) -> dict[str, Tensor]:
        """Returns observables of shape (S, B, ...) from arranged outputs: S samples of B rows. Booleans are counted."""

    def statistics(self) -> dict[str, Statistic]:
        """Returns functions of the observables' moments, by name; "mean" is the first."""


def variance(observable: str) -> Statistic:
    """Returns the statistic "unbiased variance of an observable over the samples"."""
    return Derived(lambda moments: moments[observable].variance, (observable,))


def std(observable: str) -> Statistic:
    """Returns the statistic "standard deviation of an observable over the samples", from the unbiased variance."""
    return Derived(lambda moments: moments[observable].variance.sqrt(), (observable,))


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


_LOWEST = -800.0
"""A number whose exponential is 0 in float64, in place of minus infinity, which 0 cannot be multiplied with."""


def _one_tensor(outputs: Outputs) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"outputs must be one tensor, got {type(outputs).__name__}: pick it with select_output=")
    return outputs


def _all_finite(values: Tensor) -> bool:
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


@dataclass(frozen=True)
class Plain:
    """No task: mean and variance of the outputs as they are. Observable: "value".

    Example:
        >>> Plain().observe(torch.zeros(2, 3, 1))["value"].shape
        torch.Size([2, 3, 1])
    """

    leading: ClassVar[int] = 1
    kept: ClassVar[tuple[str, ...]] = ("value",)

    def settled(self, outputs: Outputs) -> Plain:
        return self

    def arranged(self, outputs: Outputs) -> Tensor:
        return _one_tensor(outputs)

    def finite(self, outputs: Outputs) -> bool:
        return _all_finite(_one_tensor(outputs))

    def observe(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"value": wide(_one_tensor(outputs))}

    def statistics(self) -> dict[str, Statistic]:
        return {"mean": Mean("value"), "variance": variance("value"), "std": std("value")}


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
    return bool(((wide(probabilities).sum(dim) - 1).abs() <= tolerance).all())


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
    if int(votes.count_nonzero()) == top.numel():
        return votes
    return torch.zeros_like(votes).scatter_(2, values.argmax(2, keepdim=True), True)


@dataclass(frozen=True)
class Classification:
    """Classes along the dimension after the rows: outputs of shape (S, B, C, ...) with C > 1.

    Observables: "probability" and "vote" (whether the class is the most probable one) of shape (S, B, C, ...), and
    "entropy" of each sample, in nats, of shape (S, B, ...).

    Args:
        scores: "logits", "probabilities", or "auto" for probabilities if all are in [0, 1] and sum to 1, and logits
            otherwise. The decision of "auto" on the first chunk holds for all later ones: see `settled`.

    Raises:
        ValueError: another word; outputs that have no dimension of classes, or only one class, or that should be
            probabilities and are not.

    Example:
        >>> task = Classification("auto").settled(torch.tensor([[[0.5, 0.5]]]))
        >>> task
        Classification(scores='probabilities')
        >>> {name: value.tolist() for name, value in task.observe(torch.tensor([[[0.0, 1.0]]])).items()}
        {'probability': [[[0.0, 1.0]]], 'entropy': [[0.0]], 'vote': [[[False, True]]]}
    """

    scores: str = "auto"

    def __post_init__(self) -> None:
        if self.scores not in ("auto", "logits", "probabilities"):
            raise ValueError(f"scores must be 'auto', 'logits' or 'probabilities', got {self.scores!r}")

    leading: ClassVar[int] = 2
    kept: ClassVar[tuple[str, ...]] = ("probability",)

    def settled(self, outputs: Outputs) -> Classification:
        """Returns the task with "auto" decided by these outputs; itself if nothing is open."""
        if self.scores != "auto":
            return self
        values = self.arranged(outputs)
        if normalized(values, 2):
            return replace(self, scores="probabilities")
        if values.numel() and values.min() >= 0 and values.max() <= 1:
            raise ValueError(
                "outputs lie in [0, 1] but do not sum to 1 over the classes, so they can be told to be neither "
                "probabilities nor logits: say scores='logits', or give a probability for each class by select_output="
            )
        return replace(self, scores="logits")

    def arranged(self, outputs: Outputs) -> Tensor:
        return self._checked(outputs)

    def finite(self, outputs: Outputs) -> bool:
        values = _one_tensor(outputs)
        if not _all_finite(values.amax(2)):
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
        values = self._checked(outputs)
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

    def _checked(self, outputs: Outputs) -> Tensor:
        values = _one_tensor(outputs)
        shape = tuple(values.shape[1:])
        two = "give two with select_output=lambda z: torch.stack([torch.zeros_like(z), z], dim=1)"
        if len(shape) < 2:
            raise ValueError(
                f"outputs must have a dimension of classes after the rows, got shape {shape}; "
                f"for a binary model with one logit for each row, {two}"
            )
        if shape[1] == 1:
            raise ValueError(
                f"outputs must have a column for each class, got one column: shape {shape}; "
                f"for a binary model with one logit for each row, {two.replace('stack', 'cat')}"
            )
        return values


@dataclass(frozen=True)
class Regression:
    """Outputs are means, with or without a model of the noise. Observables: "value" and, with one, "noise_variance".

    Args:
        tau: the noise's precision: its variance is ``1 / tau``.
        noise: "log_variance" if the model returns the noise's log-variance too: outputs are a pair (mean,
            log_variance), or a tensor whose last dimension holds all means and then all log-variances.

    Raises:
        ValueError: a tau that is not positive and finite, another word, or both; a last dimension of odd size.

    Example:
        >>> task = Regression(noise="log_variance")
        >>> {name: value.tolist() for name, value in task.observe(torch.tensor([[[2.0, 0.0]]])).items()}
        {'value': [[[2.0]]], 'noise_variance': [[[1.0]]]}
    """

    tau: float | None = None
    noise: str | None = None

    def __post_init__(self) -> None:
        if self.tau is not None and not (self.tau > 0 and math.isfinite(self.tau)):
            raise ValueError(f"tau must be positive and finite, got {self.tau}")
        if self.noise not in (None, "log_variance"):
            raise ValueError(f"noise must be None or 'log_variance', got {self.noise!r}")
        if self.tau is not None and self.noise is not None:
            raise ValueError("give tau or noise, not both: each is a model of the noise")

    leading: ClassVar[int] = 1
    kept: ClassVar[tuple[str, ...]] = ("value", "noise_variance")

    def settled(self, outputs: Outputs) -> Regression:
        return self

    def arranged(self, outputs: Outputs) -> Outputs:
        return _one_tensor(outputs) if self.noise is None else self._pair(outputs)

    def finite(self, outputs: Outputs) -> bool:
        if self.noise is None:
            return _all_finite(_one_tensor(outputs))
        mean, log_variance = outputs
        lowest_and_highest = wide(torch.stack(log_variance.aminmax())) if log_variance.numel() else mean.new_zeros(2)
        return _all_finite(mean) and _all_finite(lowest_and_highest.exp())

    def observe(self, outputs: Outputs) -> dict[str, Tensor]:
        if self.noise is None:
            value = wide(_one_tensor(outputs))
            return (
                {"value": value}
                if self.tau is None
                else {"value": value, "noise_variance": torch.full_like(value, 1 / self.tau)}
            )
        mean, log_variance = self._pair(outputs)
        return {"value": wide(mean), "noise_variance": wide(log_variance).exp()}

    def statistics(self) -> dict[str, Statistic]:
        """Returns the statistics. With noise, the variance is the total: epistemic plus aleatoric, by the law of total
        variance."""
        mean, epistemic = Mean("value"), variance("value")
        if self.tau is None and self.noise is None:
            return {"mean": mean, "variance": epistemic, "std": std("value"), "epistemic_variance": epistemic}
        aleatoric = Mean("noise_variance")

        def total(moments: Observed) -> Tensor:
            return epistemic(moments) + aleatoric(moments)

        return {
            "mean": mean,
            "variance": Derived(total, ("value", "noise_variance")),
            "std": Derived(lambda moments: total(moments).sqrt(), ("value", "noise_variance")),
            "epistemic_variance": epistemic,
            "aleatoric_variance": aleatoric,
        }

    def _pair(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        if isinstance(outputs, Tensor):
            if outputs.dim() < 3 or outputs.shape[-1] % 2:
                raise ValueError(
                    "outputs must hold means and then log-variances along their last dimension, which must be even, "
                    f"got shape {tuple(outputs.shape[1:])}"
                )
            half = outputs.shape[-1] // 2
            return outputs[..., :half], outputs[..., half:]
        if len(outputs) != 2 or outputs[0].shape != outputs[1].shape:
            shapes = [tuple(part.shape[1:]) for part in outputs]
            raise ValueError(f"outputs must be a pair (mean, log_variance) of one shape, got shapes {shapes}")
        return outputs[0], outputs[1]


def read_task(task: str | None, *, scores: str = "auto", tau: float | None = None, noise: str | None = None) -> Task:
    """Returns the task of this name, with the arguments that belong to it.

    Raises:
        ValueError: another name, an argument of another task, or an argument that the task itself refuses.

    Example:
        >>> read_task("regression", tau=4.0)
        Regression(tau=4.0, noise=None)
    """
    if task not in (None, "classification", "regression"):
        raise ValueError(f"task must be None, 'classification' or 'regression', got {task!r}")
    if task != "classification" and scores != "auto":
        raise ValueError(f"scores={scores!r} is for task='classification', got task={task!r}")
    if task != "regression" and (tau is not None or noise is not None):
        raise ValueError(f"tau and noise are for task='regression', got task={task!r}")
    if task == "classification":
        return Classification(scores)
    return Regression(tau, noise) if task == "regression" else Plain()

"""Tasks by name: outputs as they are, classes, labels, or values with noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .blocks import Outputs
from .classes import Classification
from .groups import Derived, Mean, Observed, Statistic
from .labels import MultiLabel
from .moments import wide
from .plain import Plain, Task, all_finite, one_tensor, std, variance


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

    def placed(self, outputs: Outputs) -> Regression:
        return self

    def arranged(self, outputs: Outputs) -> Outputs:
        return one_tensor(outputs) if self.noise is None else self._pair(outputs)

    def restored(self, values: Tensor, dims: int) -> Tensor:
        return values

    def settled(self, outputs: Outputs) -> Regression:
        return self

    @property
    def takes_finite(self) -> bool:
        return self.noise is None

    def finite(self, outputs: Outputs) -> bool:
        if self.noise is None:
            return all_finite(one_tensor(outputs))
        mean, log_variance = outputs
        lowest_and_highest = wide(torch.stack(log_variance.aminmax())) if log_variance.numel() else mean.new_zeros(2)
        return all_finite(mean) and all_finite(lowest_and_highest.exp())

    def observe(self, outputs: Outputs) -> dict[str, Tensor]:
        if self.noise is None:
            value = wide(one_tensor(outputs))
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


def read_task(
    task: str | None,
    *,
    scores: str = "auto",
    class_dim: int | str = "auto",
    class_numbers: Sequence[int] = (),
    tau: float | None = None,
    noise: str | None = None,
) -> Task:
    """Returns the task of this name, with the arguments that belong to it.

    Raises:
        ValueError: another name, an argument of another task, or an argument that the task itself refuses.

    Example:
        >>> read_task("regression", tau=4.0)
        Regression(tau=4.0, noise=None)
    """
    if task not in (None, "classification", "multilabel", "regression"):
        raise ValueError(f"task must be None, 'classification', 'multilabel' or 'regression', got {task!r}")
    if scores != "auto" and task not in ("classification", "multilabel"):
        raise ValueError(f"scores={scores!r} is for task='classification' or 'multilabel', got task={task!r}")
    if class_dim != "auto" and task != "classification":
        raise ValueError(f"class_dim={class_dim!r} is for task='classification', got task={task!r}")
    if task != "regression" and (tau is not None or noise is not None):
        raise ValueError(f"tau and noise are for task='regression', got task={task!r}")
    if task == "classification":
        return Classification(scores, class_dim, tuple(class_numbers))
    if task == "multilabel":
        return MultiLabel(scores)
    return Regression(tau, noise) if task == "regression" else Plain()

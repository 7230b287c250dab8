"""The form of a task, and the simplest: mean and variance of the outputs as they are.

Each task turns raw outputs into observables, and has the statistics to report, which are functions of the observables'
moments. The other tasks are in `classes`, `labels` and `tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from .blocks import Outputs
from .groups import Derived, Mean, Statistic
from .moments import wide


class Task(Protocol):
    """The observables of each sample, and the statistics that are reported. See `tasks`."""

    @property
    def leading(self) -> int:
        """The number of dimensions before the places of a row: 1 for rows, 2 for rows and classes."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The observables that are kept of each sample where samples are kept."""

    def placed(self, outputs: Outputs) -> Task:
        """Returns the task with the places of its dimensions decided by the first chunk of outputs (S, B, ...)."""

    def arranged(self, outputs: Outputs) -> Outputs:
        """Returns outputs (S, B, ...) as `observe` takes them, with the leading dimensions in front; no copies."""

    def restored(self, values: Tensor, dims: int) -> Tensor:
        """Returns values (B, ...) in the order of the outputs' dimensions, `dims` in number."""

    def settled(self, outputs: Outputs) -> Task:
        """Returns the task with all open questions decided by the first chunk of arranged outputs."""

    @property
    def takes_finite(self) -> bool:
        """Whether the task can take all finite outputs, with finite observables."""

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


def one_tensor(outputs: Outputs) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"outputs must be one tensor, got {type(outputs).__name__}: pick it with select_output=")
    return outputs


def all_finite(values: Tensor) -> bool:
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


@dataclass(frozen=True)
class Plain:
    """No task: mean and variance of the outputs as they are. Observable: "value".

    Example:
        >>> import torch
        >>> Plain().observe(torch.zeros(2, 3, 1))["value"].shape
        torch.Size([2, 3, 1])
    """

    leading: ClassVar[int] = 1
    kept: ClassVar[tuple[str, ...]] = ("value",)

    def placed(self, outputs: Outputs) -> Plain:
        return self

    def arranged(self, outputs: Outputs) -> Tensor:
        return one_tensor(outputs)

    def restored(self, values: Tensor, dims: int) -> Tensor:
        return values

    def settled(self, outputs: Outputs) -> Plain:
        return self

    takes_finite: ClassVar[bool] = True

    def finite(self, outputs: Outputs) -> bool:
        return all_finite(one_tensor(outputs))

    def observe(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"value": wide(one_tensor(outputs))}

    def statistics(self) -> dict[str, Statistic]:
        return {"mean": Mean("value"), "variance": variance("value"), "std": std("value")}

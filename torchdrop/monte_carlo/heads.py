"""Several outputs of one model, by name: their tasks, their statistics, and the predictions of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .plain import Task
from .prediction import Prediction
from .statistics import Collector, Results
from .task_predictions import predict_from
from .tasks import read_task


class Predictions(Mapping[str, Prediction]):
    """The predictions of a model's outputs, by name, from one set of samples. It prints as their summaries.

    Args:
        predictions: the prediction of each output.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3)).eval()
        >>> both = torchdrop.mc_predict(
        ...     model,
        ...     torch.randn(5, 4),
        ...     select_output=lambda y: {"kind": y[:, :2], "size": y[:, 2:]},
        ...     task={"kind": "classification", "size": "regression"},
        ... )
        >>> both["kind"].mutual_information.shape, both["size"].epistemic_variance.shape
        (torch.Size([5]), torch.Size([5, 1]))
    """

    def __init__(self, predictions: Mapping[str, Prediction]) -> None:
        self._predictions = dict(predictions)

    def __getitem__(self, name: str) -> Prediction:
        return self._predictions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._predictions)

    def __len__(self) -> int:
        return len(self._predictions)

    def __repr__(self) -> str:
        lines = [f"{name}: {replace(one, report=None)!r}" for name, one in self.items()]
        report = next((one.report for one in self.values()), None)
        return "\n".join(lines + ([str(report)] if report is not None else []))

    def to(self, target: torch.device | str | torch.dtype) -> Predictions:
        """Returns the same on another device, or of another floating-point dtype. See `Prediction.to`."""
        return Predictions({name: one.to(target) for name, one in self.items()})


class Heads:
    """The statistics of one batch's samples: a collector for each output.

    Args:
        collectors: the collectors, by the outputs' names.
        sizes: the number of tensors of each output.
    """

    def __init__(self, collectors: Mapping[str, Collector], sizes: Sequence[int]) -> None:
        self.collectors: dict[str, Collector] = dict(collectors)
        self._sizes = sizes

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks, by name, with all that the samples have decided."""
        return {name: one.task for name, one in self.collectors.items()}

    @property
    def count(self) -> int:
        """The number of samples."""
        return next(iter(self.collectors.values())).count

    @property
    def identical(self) -> bool:
        """Whether there are two samples or more, and they are equal in all outputs."""
        return all(one.identical for one in self.collectors.values())

    def add(self, tensors: Sequence[Tensor], samples: Sequence[int]) -> None:
        """Adds the tensors of all outputs (S, B, ...), of the S samples with these numbers.

        Raises:
            TypeError, ValueError: as `Collector.add`, with the name of the output.
        """
        for (name, collector), output in zip(self.collectors.items(), self._split(tensors), strict=True):
            try:
                collector.add(output, samples)
            except (TypeError, ValueError) as error:
                if not name:
                    raise
                raise type(error)(f"output {name!r}: {error}") from error

    def take(self, results: Mapping[str, Results], count: int) -> bool:
        """Takes the results of so many samples, if all collectors can. See `Collector.take`."""
        return all(collector.take(results[name], count) for name, collector in self.collectors.items())

    def results_of(self, tensors: Sequence[Tensor], samples: Sequence[int]) -> dict[str, Results]:
        """Returns what `Collector.results_of` does for each output."""
        split = zip(self.collectors.items(), self._split(tensors), strict=True)
        return {name: collector.results_of(output, samples) for (name, collector), output in split}

    def state(self) -> dict[str, Any]:
        """Returns the states of all collectors, for processes to exchange. See `load`."""
        return {name: one.state() for name, one in self.collectors.items()}

    def load(self, states: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Replaces what was collected by the union of several processes' states."""
        for name, one in self.collectors.items():
            one.load([state[name] for state in states], device)

    def predictions(
        self, weight_scaling: Sequence[Tensor] | None, seed: int, strategy: str, report: object
    ) -> dict[str, Prediction]:
        """Returns the prediction of each output: see `predict_from`. `weight_scaling` has the tensors of all."""
        scaled = [None] * len(self._sizes) if weight_scaling is None else self._split(weight_scaling)
        return {
            name: predict_from(collector, weight_scaling=one, seed=seed, strategy=strategy, report=report)
            for (name, collector), one in zip(self.collectors.items(), scaled, strict=True)
        }

    def _split(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Returns the tensors of each output: one, or a pair."""
        rest = iter(tensors)
        outputs = [tuple(next(rest) for _ in range(size)) for size in self._sizes]
        return [output[0] if len(output) == 1 else output for output in outputs]


def read_tasks(
    task: str | Mapping[str, str | None] | None,
    *,
    scores: str = "auto",
    class_dim: int | str = "auto",
    class_numbers: Sequence[int] = (),
    tau: float | None = None,
    noise: str | None = None,
) -> Task | dict[str, Task]:
    """Returns the task, or those of several outputs by name. Arguments of one kind of task go to all of that kind.

    Raises:
        ValueError: no output is named, or as `read_task`, where an argument belongs to none of the tasks.

    Example:
        >>> read_tasks({"size": "regression", "kind": "classification"}, tau=4.0)
        {'size': Regression(tau=4.0, noise=None), 'kind': Classification(scores='auto', class_dim='auto')}
    """
    if not isinstance(task, Mapping):
        return read_task(task, scores=scores, class_dim=class_dim, class_numbers=class_numbers, tau=tau, noise=noise)
    if not task:
        raise ValueError("task must name one output at least, got an empty mapping")
    kinds = set(task.values())

    def owns(kind: str | None, *owners: str) -> bool:
        """Whether an argument goes to a task: to those that own it, or to all, which refuse it, if there is none."""
        return kind in owners or not kinds & set(owners)

    return {
        name: read_task(
            kind,
            scores=scores if owns(kind, "classification", "multilabel") else "auto",
            class_dim=class_dim if owns(kind, "classification") else "auto",
            class_numbers=class_numbers,
            tau=tau if owns(kind, "regression") else None,
            noise=noise if owns(kind, "regression") else None,
        )
        for name, kind in task.items()
    }

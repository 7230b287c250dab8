"""Predictions: plain objects with named tensors, whose first dimension is the data's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._extras import optional
from . import joining

PER_SAMPLE = ("samples", "noise_variances")
"""The fields whose rows are the second dimension, after the samples."""


P = TypeVar("P", bound="Prediction")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Prediction:
    """Statistics of the outputs over Monte Carlo samples. It prints as a summary.

    Args:
        mean: the mean over the samples, of shape (B, ...).
        variance: the unbiased variance; NaN with a single sample.
        std: the square root of the variance.
        standard_errors: the Monte Carlo standard error of the statistics for which it was chosen, by the statistic's
            name: its standard deviation over other draws of the samples. See `Groups.standard_errors`.
        num_samples: the number of samples.
        valid: whether a place is reported, of shape (B, ...), if places were left out, or batches have outputs of other
            sizes than the largest: all tensors are NaN there.
        samples: all of them, of shape (T, B, ...), if they were kept.
        weight_scaling: the deterministic pass in eval mode, to compare the mean with.
        seed: the seed that the samples follow from.
        strategy: the strategy by which they were run.
        report: the sources of randomness in the model; printed with the summary.
        batch_shapes: the shapes of all tensors in each batch: see `batches`.

    Example:
        >>> from torchdrop.monte_carlo.plain import Plain
        >>> from torchdrop.monte_carlo.statistics import Collector
        >>> from torchdrop.monte_carlo.task_predictions import predict_from
        >>> collector = Collector(Plain())
        >>> collector.add(torch.tensor([[[1.0], [4.0]], [[3.0], [4.0]]]), [0, 1])
        >>> print(predict_from(collector, seed=7))
        Prediction of shape (2, 1) from 2 samples, seed 7
                                    average       least        most   largest standard error
        mean                              3           2           4   1
        variance                          1           0           2   nan
        std                          0.7071           0       1.414   nan
    """

    mean: Tensor
    variance: Tensor
    std: Tensor
    standard_errors: dict[str, Tensor]
    num_samples: int
    valid: Tensor | None = None
    samples: Tensor | None = None
    weight_scaling: Tensor | None = None
    seed: int | None = None
    strategy: str | None = None
    report: object = None
    batch_shapes: tuple[dict[str, tuple[int, ...]], ...] = ()

    @property
    def standard_error(self) -> Tensor:
        """The Monte Carlo standard error of the mean.

        Raises:
            ValueError: it was not chosen.
        """
        if "mean" not in self.standard_errors:
            raise ValueError("the mean's standard error was not computed: predict with standard_errors=True or 'auto'")
        return self.standard_errors["mean"]

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The statistics, by name: `mean`, `variance` and all others that are reported."""
        others = (*PER_SAMPLE, "weight_scaling", "valid")
        named = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in others}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def __len__(self) -> int:
        return len(self.mean)

    def __repr__(self) -> str:
        title = f"{type(self).__name__} of shape {tuple(self.mean.shape)} from {self.num_samples} samples"
        title += f", {self.strategy}" if self.strategy is not None else ""
        title += f", seed {self.seed}" if self.seed is not None else ""
        title += f", {int(self.valid.sum())} of {self.valid.numel()} places valid" if self.valid is not None else ""
        lines = [title]
        reported = self._valid_only(self.mean).numel() > 0
        if reported:
            lines.append(f"{'':<22}{'average':>13}{'least':>12}{'most':>12}   largest standard error")
        for name, tensor in self.statistics.items() if reported else ():
            values, errors = self._valid_only(tensor.double()), self.standard_errors.get(name)
            aggregates = f"{values.mean():>13.4g}{values.min():>12.4g}{values.max():>12.4g}"
            largest = "not computed" if errors is None else f"{self._valid_only(errors).max():.4g}"
            lines.append(f"{name:<22}{aggregates}   {largest}")
        return "\n".join(lines + ([str(self.report)] if self.report is not None else []))

    def to(self: P, target: torch.device | str | torch.dtype) -> P:
        """Returns the same with its tensors on another device, or of another floating-point dtype."""
        if isinstance(target, torch.dtype) and not target.is_floating_point:
            raise ValueError(f"dtype must be floating-point, got {target}")
        kept = "valid" if isinstance(target, torch.dtype) else ""
        return self._with([self], lambda name, tensors: tensors[0] if name == kept else tensors[0].to(target))

    def numpy(self) -> dict[str, Any]:
        """Returns as arrays the statistics, "<statistic>_standard_error" for those that have one, the deterministic
        pass, the samples, and the valid places."""
        optional("numpy")
        kept = {"samples": self.samples, "valid": self.valid}
        tensors = self._columns() | {name: tensor for name, tensor in kept.items() if tensor is not None}
        return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Returns for each row of the data the same without the samples: a number, or a list if there are several."""
        columns = {
            name: tensor.flatten().tolist() if tensor.numel() == len(self) else tensor.tolist()
            for name, tensor in self._columns().items()
        }
        return [{name: values[row] for name, values in columns.items()} for row in range(len(self))]

    def pandas(self) -> Any:
        """Returns `rows` as a pandas.DataFrame."""
        return optional("pandas").DataFrame(self.rows())

    def quantile(self, q: float) -> Tensor:
        """Returns the q-quantile of the samples, element by element, interpolated linearly.

        Raises:
            ValueError: the samples were not kept, or q is outside [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be in [0, 1], got {q}")
        return self._kept("quantiles").quantile(q, dim=0)

    def interval(self, level: float = 0.95, method: str = "normal") -> tuple[Tensor, Tensor]:
        """Returns the central interval of this level, as its lower and upper end.

        Args:
            level: its probability, between 0 and 1, both excluded.
            method: "normal" for ``mean -+ z std``, which has no bounds (a probability can leave [0, 1]), or "samples"
                for the `quantile` at either end, which needs the samples.

        Raises:
            ValueError: a level out of range, another method, or samples that were not kept.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, both excluded, got {level}")
        if method == "samples":
            return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)
        if method != "normal":
            raise ValueError(f"method must be 'normal' or 'samples', got {method!r}")
        half = normal_quantile((1 + level) / 2) * self.std
        return self.mean - half, self.mean + half

    @classmethod
    def concatenated(cls: type[P], predictions: Sequence[P], *, padded: bool = False) -> P:
        """Returns the predictions of several batches as one, in their order; `num_samples` is the smallest of theirs.

        Args:
            predictions: those of the batches.
            padded: whether their outputs may be of different sizes. Smaller ones are filled with NaN: see `valid`.

        Raises:
            ValueError: none is given, they are of different kinds or sizes, or some lack what others have.
        """
        if not predictions:
            raise ValueError("predictions must hold at least one, got none")
        if len({(type(one), tuple(one.standard_errors)) for one in predictions}) > 1:
            raise ValueError(f"predictions must be of one kind, got {[type(one).__name__ for one in predictions]}")

        for number, one in enumerate(predictions, 1):
            joining.check_shapes(predictions[0].mean.shape, one.mean.shape, number, padded)

        def join(name: str, tensors: list[Tensor]) -> Tensor:
            if name in PER_SAMPLE and len({len(one) for one in tensors}) > 1:
                raise ValueError(
                    f"{name} of batches with different numbers of samples, {[len(one) for one in tensors]}, cannot be "
                    "joined: leave out keep_samples or tolerance"
                )
            return joining.joined(tensors, 1 if name in PER_SAMPLE else 0, padded)

        shapes = tuple(one._shapes() for one in predictions)
        if padded:
            predictions = [one if one.valid is not None else replace(one, valid=one._places()) for one in predictions]
        joined = predictions[0]._with(predictions, join)
        strategies = dict.fromkeys(one.strategy for one in predictions if one.strategy is not None)
        return replace(
            joined,
            num_samples=min(one.num_samples for one in predictions),
            strategy=", ".join(strategies) or None,
            batch_shapes=shapes,
        )

    def batches(self: P) -> list[P]:
        """Returns the predictions of the batches that were joined, each with its own shapes and no padding.

        Example:
            >>> import torch, torchdrop
            >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5)).eval(), torch.randn(5, 4)
            >>> whole = torchdrop.mc_predict(model, iter([x, x[:2]]), samples=3)
            >>> len(whole), [len(batch) for batch in whole.batches()]
            (7, [5, 2])
        """
        parts, first = [], 0
        for shapes in self.batch_shapes:

            def cut(name: str, tensors: list[Tensor], first: int = first, shapes: dict[str, Any] = shapes) -> Tensor:
                dim, shape = int(name in PER_SAMPLE), shapes[name]
                return tensors[0].narrow(dim, first, shape[dim])[tuple(map(slice, shape))]

            whole = replace(self, valid=self.valid if "valid" in shapes else None, batch_shapes=())
            parts.append(whole._with([whole], cut))
            first += shapes["mean"][0]
        return parts or [self]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tuple(value.shape) for name, value in values.items() if isinstance(value, Tensor)}

    def _places(self) -> Tensor:
        """Returns True for each place: of the mean's shape, or without its dimension of classes."""
        return torch.ones_like(self.mean, dtype=torch.bool)

    def _with(self: P, several: Sequence[P], combine: Callable[[str, list[Tensor]], Tensor]) -> P:
        """Returns this prediction with each tensor replaced by the combination of those of several."""
        changes: dict[str, Any] = {}
        for name in (field.name for field in fields(self)):
            tensors = [value for one in several if isinstance(value := getattr(one, name), Tensor)]
            if 0 < len(tensors) < len(several):
                raise ValueError(f"{name} is missing from {len(several) - len(tensors)} of {len(several)} predictions")
            if tensors:
                changes[name] = combine(name, tensors)
        errors = {name: combine(name, [one.standard_errors[name] for one in several]) for name in self.standard_errors}
        return replace(self, standard_errors=errors, **changes)

    def _columns(self) -> dict[str, Tensor]:
        columns = self.statistics
        columns |= {f"{name}_standard_error": error for name, error in self.standard_errors.items()}
        return columns if self.weight_scaling is None else columns | {"weight_scaling": self.weight_scaling}

    def _valid_only(self, values: Tensor) -> Tensor:
        """Returns the values at places that are reported, as one dimension if any was left out."""
        return values if self.valid is None else values[~values.isnan()]

    def _kept(self, purpose: str) -> Tensor:
        if self.samples is None:
            raise ValueError(f"{purpose} need the samples, which were not kept: predict with keep_samples=True")
        return self.samples


def normal_quantile(q: float) -> float:
    """Returns the q-quantile of the standard normal distribution.

    Example:
        >>> round(normal_quantile(0.975), 4)
        1.96
    """
    return float(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))

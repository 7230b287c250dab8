"""The predictions of each task, and how they are made from the collected samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import Outputs
from .classes import Classification
from .gal import check_targets, predictive_log_likelihood, predictive_quantile
from .groups import Mean
from .labels import MultiLabel
from .plain import Plain
from .prediction import Prediction
from .statistics import Collector
from .tasks import Regression

IGNORED = -100
"""The class that stands at places that are not reported: the default of `ignore_index` in PyTorch's losses."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ClassificationPrediction(Prediction):
    """Mean probabilities and the uncertainty about the class, in nats.

    `mean`, `variance` and `std` are of shape (B, C, ...), or have their classes in another dimension, `class_dim`; the
    other statistics have no dimension of classes.

    Args:
        class_dim: the dimension of classes.
        predictive_entropy: ``H[E p]``, all of the uncertainty, of shape (B, ...).
        expected_entropy: ``E H[p]``, the uncertainty that remains when the model is known (aleatoric).
        mutual_information: their difference, the part that more data could remove (epistemic; BALD).
        variation_ratio: the share of samples that vote for another class than most do.

    The other arguments are those of `Prediction`; samples and the deterministic pass are probabilities.

    Example:
        >>> collector = Collector(Classification("probabilities"))
        >>> collector.add(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), [0, 1])
        >>> prediction = predict_from(collector)
        >>> prediction.mean, prediction.expected_entropy, prediction.variation_ratio
        (tensor([[0.5000, 0.5000]]), tensor([0.]), tensor([0.5000]))
        >>> torch.equal(prediction.mutual_information, torch.tensor([2.0]).log())
        True
    """

    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    variation_ratio: Tensor
    class_dim: int = 1

    @property
    def predicted(self) -> Tensor:
        """The class of highest mean probability, of shape (B, ...); -100, PyTorch's `ignore_index`, at places that are
        not reported."""
        predicted = self.mean.argmax(self.class_dim)
        return predicted if self.valid is None else predicted.where(self.valid, IGNORED)

    def log_likelihood(self, targets: Tensor) -> Tensor:
        """Returns the log of the target class's mean probability, -inf if that is 0, of shape (B, ...). Samples are not
        needed. At places that are not reported it is NaN, whatever the targets.

        Raises:
            ValueError: targets that are not classes (B, ...), integers in [0, C).
        """
        check_targets(targets, self.predicted.shape)
        classes = self.mean.shape[self.class_dim]
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(f"targets must be classes, of an integer dtype, got {targets.dtype}")
        if self.valid is not None:
            targets = targets.where(self.valid.to(targets.device), 0)
        if targets.numel() and not (targets.min() >= 0 and targets.max() < classes):
            raise ValueError(f"targets must be in [0, {classes}), got {targets.min()} to {targets.max()}")
        chosen = targets.to(self.mean.device, torch.int64).unsqueeze(self.class_dim)
        return self.mean.gather(self.class_dim, chosen).squeeze(self.class_dim).log()

    def _places(self) -> Tensor:
        return torch.ones_like(self.predicted, dtype=torch.bool)

    def _columns(self) -> dict[str, Tensor]:
        return {"predicted": self.predicted} | super()._columns()


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MultiLabelPrediction(Prediction):
    """Mean probabilities of labels that are independent of each other, and the uncertainty about each, in nats.

    All are of the outputs' shape (B, ...), with ``h(p) = -p log p - (1 - p) log(1 - p)``.

    Args:
        predictive_entropy: ``h(E p)``, all of the uncertainty.
        expected_entropy: ``E h(p)``, the uncertainty that remains when the model is known (aleatoric).
        mutual_information: their difference, the part that more data could remove (epistemic; BALD).

    The other arguments are those of `Prediction`; samples and the deterministic pass are probabilities.

    Example:
        >>> collector = Collector(MultiLabel("probabilities"))
        >>> collector.add(torch.tensor([[[1.0, 0.25]], [[0.0, 0.25]]]), [0, 1])
        >>> prediction = predict_from(collector)
        >>> prediction.mean, prediction.predicted, prediction.mutual_information
        (tensor([[0.5000, 0.2500]]), tensor([[0, 0]]), tensor([[0.6931, 0.0000]]))
    """

    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor

    @property
    def predicted(self) -> Tensor:
        """Whether each label is present: 1 if its mean probability is above 1/2, else 0; -100 at places that are not
        reported."""
        predicted = (self.mean > 0.5).long()
        return predicted if self.valid is None else predicted.where(~self.mean.isnan(), IGNORED)

    def log_likelihood(self, targets: Tensor) -> Tensor:
        """Returns ``y log p + (1 - y) log(1 - p)`` of each label, from its mean probability p; NaN where p is.

        Raises:
            ValueError: targets that are not of the outputs' shape, or not 0 or 1.
        """
        check_targets(targets, self.mean.shape)
        present = targets.to(self.mean.device) == 1
        if not bool((present | (targets.to(self.mean.device) == 0) | self.mean.isnan()).all()):
            raise ValueError("targets must be 0 or 1 for each label")
        return torch.where(present, self.mean, 1 - self.mean).log()

    def _columns(self) -> dict[str, Tensor]:
        return {"predicted": self.predicted} | super()._columns()


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RegressionPrediction(Prediction):
    """Mean and variance of a value. With a model of the noise, `variance` is the total, epistemic plus aleatoric.

    Args:
        epistemic_variance: the unbiased variance of the model's value over the samples.
        aleatoric_variance: the mean variance of the noise; None if the noise is not modeled.
        noise_variances: the noise's variance in each sample, of shape (T, B, ...), if samples were kept.

    The other arguments are those of `Prediction`.

    Example:
        >>> collector = Collector(Regression(tau=4.0), keep_samples=True)
        >>> collector.add(torch.tensor([[[1.0]], [[3.0]]]), [0, 1])
        >>> prediction = predict_from(collector)
        >>> prediction.epistemic_variance, prediction.aleatoric_variance, prediction.variance
        (tensor([[2.]]), tensor([[0.2500]]), tensor([[2.2500]]))
        >>> prediction.quantile(0.5), prediction.quantile(0.75, noise=False)
        (tensor([[2.]]), tensor([[2.5000]]))
    """

    epistemic_variance: Tensor
    aleatoric_variance: Tensor | None = None
    noise_variances: Tensor | None = None

    def quantile(self, q: float, *, noise: bool = True) -> Tensor:
        """Returns the q-quantile, by element, of a new observation, or of the model's value with ``noise=False``.

        A new observation follows the Gaussian mixture of `predictive_quantile`. Without a model of the noise, and with
        ``noise=False``, it is the samples' quantile, interpolated linearly.

        Raises:
            ValueError: the samples were not kept, or q is out of range ([0, 1], without the ends for a mixture).
        """
        samples = self._kept("quantiles")
        if not noise or self.noise_variances is None:
            return super().quantile(q)
        return predictive_quantile(samples, q, noise_variance=self.noise_variances).to(samples.dtype)

    def log_likelihood(self, targets: Tensor) -> Tensor:
        """Returns the predictive log-likelihood of each row, (B,), in float64. See `predictive_log_likelihood`.

        Raises:
            ValueError: targets of another shape than the mean's, no model of the noise, or samples that were not kept.
        """
        check_targets(targets, self.mean.shape)
        if self.aleatoric_variance is None:
            raise ValueError("log-likelihoods need a model of the noise: predict with tau= or noise='log_variance'")
        if self.valid is not None:
            raise ValueError("log-likelihoods of rows are not defined where places were left out by valid=")
        samples = self._kept("log-likelihoods")
        return predictive_log_likelihood(samples, targets.to(samples.device), noise_variance=self.noise_variances)


def predict_from(
    collector: Collector,
    *,
    weight_scaling: Outputs | None = None,
    seed: int | None = None,
    strategy: str | None = None,
    report: object = None,
) -> Prediction:
    """Returns the prediction of the collector's task: plain, or of the class that belongs to it.

    Statistics are computed in float64 and returned in the outputs' dtype, or in float32 for half types.

    Args:
        collector: a collector with one sample or more.
        weight_scaling: raw outputs (B, ...) of the deterministic pass.
        seed, strategy, report: fields of the prediction.

    Raises:
        ValueError: there are no samples, or the task cannot take the outputs of the deterministic pass.
    """
    task = collector.task
    kinds = {
        Plain: Prediction,
        Classification: ClassificationPrediction,
        MultiLabel: MultiLabelPrediction,
        Regression: RegressionPrediction,
    }
    mean = task.statistics()["mean"]
    assert isinstance(mean, Mean)
    statistics, errors = collector.results()
    values: dict[str, Any] = dict(statistics)
    if isinstance(task, Regression):
        values["noise_variances"] = collector.samples("noise_variance") if "aleatoric_variance" in values else None
    if weight_scaling is not None:
        outputs = (weight_scaling,) if isinstance(weight_scaling, Tensor) else weight_scaling
        values["weight_scaling"] = collector.observed(tuple(part.unsqueeze(0) for part in outputs))[mean.observable][0]
    if isinstance(task, Classification):
        values["class_dim"] = task.class_dim
    return kinds[type(task)](
        standard_errors=errors,
        num_samples=collector.count,
        valid=collector.valid,
        samples=collector.samples(mean.observable),
        seed=seed,
        strategy=strategy,
        report=report,
        **values,
    )

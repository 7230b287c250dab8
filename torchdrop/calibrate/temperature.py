"""Temperature scaling of averaged predictions."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..monte_carlo import metrics
from ..monte_carlo.classes import Classification
from ..monte_carlo.moments import wide
from ..monte_carlo.statistics import Collector
from ..monte_carlo.task_predictions import ClassificationPrediction, predict_from
from .scores import Comparison, scores
from .search import minimize

LOWEST, HIGHEST = 0.01, 100.0
POINTS, TOLERANCE = 17, 1e-6
ROUNDING = 1e-12


@dataclass(frozen=True, repr=False)
class Temperature:
    """A temperature that was fitted by `temperature`. Called with a prediction, it returns the scaled one.

    Args:
        value: T. Above 1 predictions become less certain, below 1 more certain.
        on: "samples" if each sample is scaled before they are averaged, "mean" if the mean is scaled.
        before, after: the mean negative log-likelihood of the targets that it was fitted to, in nats.
    """

    value: float
    on: str
    before: float
    after: float

    def __repr__(self) -> str:
        return (
            f"temperature {self.value:.4g} on the {self.on}: negative log-likelihood {self.before:.4g} before, "
            f"{self.after:.4g} after, of the targets that it was fitted to"
        )

    def __call__(self, prediction: ClassificationPrediction) -> ClassificationPrediction:
        """Returns the prediction at this temperature, with all statistics that follow from it.

        Fitted on the mean, only `mean` and `predictive_entropy` follow: statistics that need the samples are NaN.

        Raises:
            ValueError: it was fitted on samples, and this prediction has none.
        """
        _check(prediction)
        if self.on == "mean":
            return _scaled_mean(prediction, self.value)
        if prediction.samples is None:
            raise ValueError(
                "the temperature was fitted on samples, which this prediction did not keep: predict with "
                "keep_samples=True, or fit with on='mean'"
            )
        return _scaled_samples(prediction, self.value)

    def compare(self, prediction: ClassificationPrediction, targets: Tensor) -> Comparison:
        """Returns the scores of a prediction before and after: see `scores`. Give rows that it was not fitted to."""
        return Comparison(scores(prediction, targets), scores(self(prediction), targets))


def temperature(prediction: ClassificationPrediction, targets: Tensor, *, on: str = "auto") -> Temperature:
    """Fits the temperature T that makes the targets most likely.

    On the samples, ``p = 1/S sum_s softmax(z_s / T)`` with the logits z_s of S samples; a sample's logits are the
    logarithms of its probabilities, but for a constant that softmax takes away. On the mean, ``p = softmax(log m / T)``
    with the mean probabilities m. T minimizes the mean of ``-log p_y`` between 0.01 and 100. It changes no sample's
    class; averages of samples can change theirs.

    Args:
        prediction: the prediction of rows that the model was not trained on.
        targets: their classes, of the shape of `predicted`.
        on: "samples", "mean", or "auto" for the samples if they were kept (`keep_samples`), else the mean.

    Returns:
        A `Temperature`, which scales other predictions of the same model.

    Raises:
        TypeError: a prediction of another kind.
        ValueError: targets that do not fit, no rows, or samples that were not kept.

    Warns:
        UserWarning: the likelihood still rises at 0.01 or 100, as where all predictions are right: take more rows.

    References:
        Laves, Ihler, Kortmann, Ortmaier, "Well-calibrated Model Uncertainty with Temperature Scaling for Dropout
        Variational Inference", arXiv:1909.13550, 2019 (on samples). Guo, Pleiss, Sun, Weinberger, "On Calibration of
        Modern Neural Networks", ICML 2017, equation 9 (of one pass).

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3)).eval()
        >>> x = torch.randn(300, 4)
        >>> result = torchdrop.mc_predict(model, x, samples=20, task="classification", seed=0, keep_samples=True)
        >>> y = torch.where(torch.rand(300) < 0.7, result.predicted, torch.randint(3, (300,)))
        >>> fit = torchdrop.calibrate.temperature(result, y)
        >>> fit.value < 1, fit.after < fit.before, fit(result).mean.shape
        (True, True, torch.Size([300, 3]))
    """
    _check(prediction)
    if on not in ("auto", "samples", "mean"):
        raise ValueError(f"on must be 'auto', 'samples' or 'mean', got {on!r}")
    if on == "samples" and prediction.samples is None:
        raise ValueError("the samples were not kept: predict with keep_samples=True, or fit with on='mean'")
    chosen = "mean" if on == "mean" or prediction.samples is None else "samples"
    rows = metrics.flat(prediction, targets)
    values = prediction.mean.unsqueeze(0) if chosen == "mean" else prediction.samples
    assert values is not None
    logs = _logs(values).movedim(prediction.class_dim + 1, -1).flatten(1, -2)
    logs = logs if rows.chosen is None else logs[:, rows.chosen.to(logs.device)]
    index = rows.targets.to(logs.device).expand(len(logs), -1).unsqueeze(2)

    def loss(value: float) -> float:
        scaled = logs / value
        of_target = scaled.gather(2, index).squeeze(2) - scaled.logsumexp(2)
        return float(math.log(len(logs)) - of_target.logsumexp(0).mean())

    best = minimize(loss, LOWEST, HIGHEST, POINTS, TOLERANCE)
    if not LOWEST * 1.01 < best < HIGHEST / 1.01 or loss(best) < ROUNDING:
        warnings.warn(
            f"temperature: the likelihood still rises at T = {best:.4g}, where the search ended. The targets are "
            f"{'all too well' if best < 1 else 'hardly'} predicted: take more rows that the model was not trained on",
            UserWarning,
            stacklevel=2,
        )
    return Temperature(best, chosen, loss(1.0), loss(best))


def _check(prediction: Any) -> None:
    if not isinstance(prediction, ClassificationPrediction):
        raise TypeError(
            "prediction must be a ClassificationPrediction (mc_predict with task='classification'), got "
            f"{type(prediction).__name__}"
        )


def _logs(values: Tensor) -> Tensor:
    """Returns logarithms in float64, finite where a probability was rounded to 0."""
    return wide(values).clamp_min(torch.finfo(values.dtype).tiny).log()


def _scaled_samples(prediction: ClassificationPrediction, value: float) -> ClassificationPrediction:
    assert prediction.samples is not None
    collector = Collector(
        Classification("logits", prediction.class_dim),
        keep_samples=True,
        errors=tuple(prediction.standard_errors),
        valid=prediction.valid,
    )
    for i, sample in enumerate(prediction.samples):
        collector.add(_logs(sample).unsqueeze(0) / value, [i])
    deterministic = prediction.weight_scaling
    scaled = predict_from(
        collector, weight_scaling=None if deterministic is None else _logs(deterministic) / value
    )  # fmt: skip
    scaled = scaled.to(prediction.mean.dtype)
    assert isinstance(scaled, ClassificationPrediction)
    return replace(
        scaled,
        seed=prediction.seed,
        strategy=prediction.strategy,
        report=prediction.report,
        batch_shapes=prediction.batch_shapes,
    )


def _scaled_mean(prediction: ClassificationPrediction, value: float) -> ClassificationPrediction:
    dim, dtype = prediction.class_dim, prediction.mean.dtype
    mean = (_logs(prediction.mean) / value).softmax(dim)
    deterministic = prediction.weight_scaling
    unknown = torch.full_like(prediction.predictive_entropy, math.nan)
    return replace(
        prediction,
        mean=mean.to(dtype),
        variance=torch.full_like(prediction.mean, math.nan),
        std=torch.full_like(prediction.mean, math.nan),
        predictive_entropy=torch.special.entr(mean).sum(dim).to(dtype),
        expected_entropy=unknown,
        mutual_information=unknown,
        variation_ratio=unknown,
        standard_errors={},
        samples=None,
        weight_scaling=None if deterministic is None else (_logs(deterministic) / value).softmax(dim).to(dtype),
    )

"""A scale for the standard deviation of a regression."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from ..monte_carlo.moments import wide
from ..monte_carlo.prediction import Prediction
from ..monte_carlo.task_predictions import RegressionPrediction
from .intervals import check_regression
from .scores import Comparison, scores, standardized

P = TypeVar("P", bound=Prediction)

SQUARED = ("variance", "epistemic_variance", "aleatoric_variance")


@dataclass(frozen=True, repr=False)
class DeviationScale:
    """A scale that was fitted by `deviation_scale`. Called with a prediction, it returns the scaled one.

    Args:
        value: s. Above 1 predictions become less certain, below 1 more certain.
        before, after: the mean negative log-likelihood of the targets that it was fitted to, in nats.
    """

    value: float
    before: float
    after: float

    def __repr__(self) -> str:
        return (
            f"standard deviations times {self.value:.4g}: negative log-likelihood {self.before:.4g} before, "
            f"{self.after:.4g} after, of the targets that it was fitted to"
        )

    def __call__(self, prediction: P) -> P:
        """Returns the prediction with all standard deviations times s, and variances times s^2.

        The mean stays as it is. Samples move away from it by the factor s, and variances of the noise in each sample
        are multiplied by s^2, so that quantiles follow.
        """
        check_regression(prediction)
        squared = self.value**2
        changes: dict[str, Tensor | dict[str, Tensor]] = {
            name: squared * value for name in SQUARED if isinstance(value := getattr(prediction, name, None), Tensor)
        }
        changes["std"] = self.value * prediction.std
        if prediction.samples is not None:
            changes["samples"] = prediction.mean + self.value * (prediction.samples - prediction.mean)
        if isinstance(prediction, RegressionPrediction) and prediction.noise_variances is not None:
            changes["noise_variances"] = squared * prediction.noise_variances
        factors = dict.fromkeys(SQUARED, squared) | {"std": self.value}
        errors = {name: factors.get(name, 1.0) * error for name, error in prediction.standard_errors.items()}
        return replace(prediction, standard_errors=errors, **changes)  # type: ignore[arg-type]

    def compare(self, prediction: Prediction, targets: Tensor) -> Comparison:
        """Returns the scores of a prediction before and after: see `scores`. Give rows that it was not fitted to."""
        return Comparison(scores(prediction, targets), scores(self(prediction), targets))


def deviation_scale(prediction: Prediction, targets: Tensor) -> DeviationScale:
    """Fits the factor s of standard deviations that makes the targets most likely: ``s^2 = mean ((y - m) / std)^2``.

    It maximizes the likelihood of the normal distribution with the prediction's mean m and the variance ``s^2 std^2``,
    whose logarithm is ``-n log s - sum ((y - m) / std)^2 / (2 s^2)`` but for a constant. All outputs of a row have the
    same s.

    Args:
        prediction: the prediction of rows that the model was not trained on, with task="regression" or None.
        targets: their observations, of the mean's shape.

    Returns:
        A `DeviationScale`, which scales other predictions of the same model.

    Raises:
        TypeError: a prediction of classes or labels.
        ValueError: targets that do not fit, no rows, a standard deviation of 0, or all residuals 0.

    References:
        Laves, Ihler, Fast, Kahrs, Ortmaier, "Well-Calibrated Regression Uncertainty in Medical Imaging with Deep
        Learning", MIDL 2020 (sigma scaling).

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1)).eval()
        >>> x, y = torch.randn(300, 4), torch.randn(300, 1)
        >>> result = torchdrop.mc_predict(model, x, samples=20, task="regression", seed=0)
        >>> fit = torchdrop.calibrate.deviation_scale(result, y)
        >>> fit.value > 1, fit.after < fit.before, fit(result).std.shape
        (True, True, torch.Size([300, 1]))
    """
    check_regression(prediction)
    value = float(standardized(prediction, targets)[0].square().mean().sqrt())
    if not value > 0:
        raise ValueError("targets must differ from the prediction's mean, got residuals that are all 0")
    fit = DeviationScale(value, scores(prediction, targets)["negative_log_likelihood"], 0.0)
    return replace(
        fit, after=scores(fit(prediction.to(wide(prediction.mean).dtype)), targets)["negative_log_likelihood"]
    )

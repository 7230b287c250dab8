"""Keep probabilities at inference, chosen by the likelihood of held-out targets without training again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..configure.rate_sites import RateSite, rate_sites
from ..configure.rates import shown
from ..core.rate import Probability
from ..monte_carlo.moments import wide
from ..monte_carlo.prediction import Prediction
from ..monte_carlo.task_predictions import ClassificationPrediction, MultiLabelPrediction
from .scores import Comparison, scores
from .search import minimize

LARGEST = 32.0
"""The largest factor of the noise's variance; the smallest is its reciprocal."""

NEAR = 1.1
"""The factor between an end of the search and what counts as that end."""

POINTS, TOLERANCE = 11, 0.05
APART, POINTS_APART, TOLERANCE_APART = 8.0, 5, 0.2

Predict = Callable[[], Prediction]


@dataclass(frozen=True, repr=False)
class InferenceRates:
    """Keep probabilities for Monte Carlo inference, found by `inference_rates`. It prints as a table.

    Args:
        trained: the keep probability that each layer had, by name.
        keep_probs: the keep probability that was chosen, by name. ``set_keep_prob(model, fit.keep_probs)`` sets them
            for good.
        factors: the factor of the noise's variance, by name.
        before, after: the mean negative log-likelihood of the targets that they were chosen by.
        calls: the number of predictions that were made.
    """

    trained: dict[str, Probability]
    keep_probs: dict[str, Probability]
    factors: dict[str, float]
    before: float
    after: float
    calls: int

    def __repr__(self) -> str:
        lines = [f"{'layer':<24}{'keep_prob':>12}{'at inference':>14}"]
        lines += [
            f"{name or '(model)':<24}{shown(old):>12}{shown(self.keep_probs[name]):>14}"
            for name, old in self.trained.items()
        ]
        lines.append(
            f"negative log-likelihood {self.before:.4g} before, {self.after:.4g} after, of the targets that they were "
            f"chosen by, {self.calls} predictions"
        )
        return "\n".join(lines)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model has these keep probabilities. Afterwards it has those that it had before.

        Raises:
            ValueError: the model lacks a layer of the model that they were chosen for.
        """
        sites = {site.name: site for site in rate_sites(model)}
        missing = self.keep_probs.keys() - sites.keys()
        if missing:
            raise ValueError(f"model must have the layers that rates were chosen for, and lacks {sorted(missing)}")
        chosen = [sites[name] for name in self.keep_probs]
        with _kept(chosen):
            for site in chosen:
                site.set(self.keep_probs[site.name])
            yield

    def compare(self, model: nn.Module, predict: Predict, targets: Tensor) -> Comparison:
        """Returns the scores of what `predict` returns before and after: see `scores`. Give rows of their own."""
        before = scores(predict(), targets)
        with self.applied(model):
            return Comparison(before, scores(predict(), targets))


def inference_rates(model: nn.Module, predict: Predict, targets: Tensor, *, per_layer: bool = False) -> InferenceRates:
    """Chooses the keep probabilities at inference that make held-out targets most likely. The model is not trained.

    A layer with keep probability k multiplies by noise of variance ``(1 - k) / k``. All variances are multiplied by
    one factor c, so that k becomes ``k / (k + c (1 - k))``: c = 1 is the trained model, c -> 0 its deterministic pass.
    The factor between 1/32 and 32 of the smallest mean negative log-likelihood is searched for. Layers that keep all or
    nothing stay as they are. At the end the model has the rates that it had.

    The likelihood is that of `log_likelihood` for classes and labels, and for values that of the normal distribution
    with the prediction's mean and variance: give `tau` or `noise` to `mc_predict` unless dropout is to stand for all of
    the uncertainty.

    Args:
        model: the trained model. Nothing else may use it meanwhile.
        predict: returns the prediction of held-out rows by this model, as in ``lambda: torchdrop.mc_predict(model, x,
            50, task="classification", seed=0)``. With the same seed at each call all rates see the same random bits.
        targets: the targets of these rows.
        per_layer: whether each layer then gets a factor of its own, within 1/8 and 8 times the common one, one layer
            after another. It takes about 10 more predictions for each layer, and more rows to choose by.

    Returns:
        An `InferenceRates`, which applies to the model.

    Raises:
        ValueError: no layer with a keep probability between 0 and 1, targets that do not fit, predictions with seeds
            that differ, or targets that are impossible at all rates.
        TypeError: `predict` is no function, or returns no prediction.

    Warns:
        UserWarning: the likelihood still rises at an end of the search: the targets prefer next to no dropout at
            inference, or as much as there can be.

    References:
        Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016, where rates are chosen by the validation
        likelihood, with a training for each.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torchdrop.Dropout(0.5), torch.nn.Linear(64, 3)).eval()
        >>> x, y = torch.randn(200, 4), torch.randint(3, (200,))
        >>> def predict():
        ...     return torchdrop.mc_predict(model, x, samples=10, task="classification", seed=0)
        >>> fit = torchdrop.calibrate.inference_rates(model, predict, y)
        >>> with fit.applied(model):
        ...     calibrated = predict()
        >>> fit.after <= fit.before, torchdrop.keep_probs(model)["1"]
        (True, 0.5)
    """
    if not callable(predict):
        raise TypeError(
            "predict must be a function without arguments that returns a prediction, such as lambda: "
            f"torchdrop.mc_predict(model, x, 50, task='classification', seed=0), got {type(predict).__name__}"
        )
    sites = [site for site in rate_sites(model) if _is_random(site.keep_prob)]
    if not sites:
        raise ValueError("model must have a layer with a keep_prob between 0 and 1, got none: see torchdrop.keep_probs")
    search = _Search(sites, predict, targets)
    with _kept(sites):
        before = search.loss([1.0] * len(sites))
        common = minimize(
            lambda factor: search.loss([factor] * len(sites)), 1 / LARGEST, LARGEST, POINTS, TOLERANCE
        )  # fmt: skip
        factors = [common] * len(sites)
        for i in range(len(sites)) if per_layer and len(sites) > 1 else ():

            def of_layer(factor: float, i: int = i) -> float:
                return search.loss([*factors[:i], common * factor, *factors[i + 1 :]])

            factors[i] = common * minimize(of_layer, 1 / APART, APART, POINTS_APART, TOLERANCE_APART)
        after = search.loss(factors)
    if not NEAR / LARGEST < common < LARGEST / NEAR:
        less = common < 1
        warnings.warn(
            f"inference_rates: the likelihood still rises where the noise's variance is {common:.3g} times that of "
            f"training, and the search ends. The targets prefer {'next to no' if less else 'more'} dropout at inference"
            + (": compare with the deterministic pass" if less else ""),
            UserWarning,
            stacklevel=2,
        )
    return InferenceRates(
        {site.name: old for site, old in zip(sites, search.trained, strict=True)},
        {site.name: new for site, new in zip(sites, search.rates(factors), strict=True)},
        {site.name: factor for site, factor in zip(sites, factors, strict=True)},
        before,
        after,
        search.calls,
    )


class _Search:
    """The loss at given factors, each computed once."""

    def __init__(self, sites: Sequence[RateSite], predict: Predict, targets: Tensor) -> None:
        self.trained = [site.keep_prob for site in sites]
        self.calls = 0
        self._sites, self._predict, self._targets = sites, predict, targets
        self._losses: dict[tuple[float, ...], float] = {}
        self._seed: Any = None

    def rates(self, factors: Sequence[float]) -> list[Probability]:
        return [scaled(keep, factor) for keep, factor in zip(self.trained, factors, strict=True)]

    def loss(self, factors: Sequence[float]) -> float:
        key = tuple(factors)
        if key not in self._losses:
            for site, rate in zip(self._sites, self.rates(factors), strict=True):
                site.set(site.check(rate))
            with warnings.catch_warnings():  # where there is next to no noise, samples may well be identical
                warnings.filterwarnings("ignore", "mc_predict: all samples are identical")
                prediction = self._predict()
            self.calls += 1
            if not isinstance(prediction, Prediction):
                raise TypeError(f"predict must return a prediction of mc_predict, got {type(prediction).__name__}")
            if self.calls > 1 and prediction.seed != self._seed:
                raise ValueError("predict must give mc_predict the same seed at each call, such as seed=0")
            self._seed = prediction.seed
            self._losses[key] = _loss(prediction, self._targets)
        return self._losses[key]


def scaled(keep_prob: Probability, factor: float) -> Probability:
    """Returns the keep probability whose noise has the variance ``(1 - k) / k`` times a factor.

    Example:
        >>> scaled(0.5, 3.0), scaled(0.8, 1.0), scaled(1.0, 3.0)
        (0.25, 0.8, 1.0)
    """
    return keep_prob if factor == 1 else keep_prob / (keep_prob + factor * (1 - keep_prob))


def _loss(prediction: Prediction, targets: Tensor) -> float:
    if isinstance(prediction, (ClassificationPrediction, MultiLabelPrediction)):
        found = wide(prediction.log_likelihood(targets))
        return -float(found[~found.isnan()].mean())
    if prediction.num_samples > 1 and not bool((prediction.std > 0).all()):
        return math.inf  # so little noise that it is lost in rounding
    return scores(prediction, targets)["negative_log_likelihood"]


def _is_random(keep_prob: Probability) -> bool:
    if isinstance(keep_prob, Tensor):
        return bool(((keep_prob > 0) & (keep_prob < 1)).any())
    return 0 < keep_prob < 1


@contextmanager
def _kept(sites: Sequence[RateSite]) -> Iterator[None]:
    """Gives the sites the rates back that they had, to the bit."""
    states = [site.state() for site in sites]
    try:
        yield
    finally:
        for site, state in zip(sites, states, strict=True):
            site.restore(state)

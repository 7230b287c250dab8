"""The ways to a prediction that the uncertainty benchmark compares, with one network and with several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from calibration import classified
from torch import Tensor, nn
from uncertainty_networks import Part

from torchdrop import calibrate
from torchdrop.monte_carlo import ClassificationPrediction
from torchdrop.monte_carlo.classes import Classification
from torchdrop.monte_carlo.statistics import Collector
from torchdrop.monte_carlo.task_predictions import predict_from

DETERMINISTIC, DETERMINISTIC_CALIBRATED = "deterministic", "deterministic, temperature"
MONTE_CARLO, LATIN = "Monte Carlo", "Monte Carlo, latin"
AT_TEMPERATURE, AT_RATES = "Monte Carlo, temperature", "Monte Carlo, rates"
CALIBRATED = "Monte Carlo, rates and temperature"
ENSEMBLE, ENSEMBLE_CALIBRATED = "ensemble", "ensemble, temperature"
ENSEMBLE_OF_SAMPLES = "ensemble of Monte Carlo"
WAYS = (
    DETERMINISTIC, DETERMINISTIC_CALIBRATED, MONTE_CARLO, LATIN, AT_TEMPERATURE, AT_RATES, CALIBRATED, ENSEMBLE,
    ENSEMBLE_CALIBRATED, ENSEMBLE_OF_SAMPLES,
)  # fmt: skip
ONE_PASS = (DETERMINISTIC, DETERMINISTIC_CALIBRATED)


class Inputs(NamedTuple):
    """Digits that predictions are wanted of."""

    test: Tensor
    turned: Tensor


class Outputs(NamedTuple):
    """Predictions of the same digits in one way."""

    test: ClassificationPrediction
    turned: ClassificationPrediction


@dataclass(frozen=True)
class Member:
    """What an ensemble needs of a network: probabilities (1, B, C) of its deterministic pass, and some samples."""

    held_out: Tensor
    deterministic: tuple[Tensor, Tensor]
    samples: tuple[Tensor, Tensor]


def pooled(samples: Tensor) -> ClassificationPrediction:
    """The prediction whose samples are these probabilities (S, B, C)."""
    collector = Collector(Classification("probabilities"), keep_samples=True, errors=())
    collector.add(samples, list(range(len(samples))))
    prediction = predict_from(collector)
    assert isinstance(prediction, ClassificationPrediction)
    return prediction


def deterministic(model: nn.Module, x: Tensor) -> ClassificationPrediction:
    """One pass in eval mode, as a prediction with one sample."""
    with torch.no_grad():
        return pooled(torch.cat([model(rows).softmax(1) for rows in x.split(2500)]).unsqueeze(0))


class Single:
    """One network in all ways that take one network.

    Args:
        model: a trained network.
        part: the digits of its group, of which the held-out ones are fitted to.
        samples: how many Monte Carlo passes are made.
        seed: of their masks.
    """

    def __init__(self, model: nn.Module, part: Part, samples: int, seed: int) -> None:
        self._model, self._part, self._samples, self._seed = model, part, samples, seed
        self._held_out = deterministic(model, part.held_out_images)
        labels = part.held_out_labels
        self._temperature = calibrate.temperature(self._held_out, labels)
        self._of_samples = calibrate.temperature(self._sampled(part.held_out_images), labels)
        self._rates = calibrate.inference_rates(model, self._search, labels)
        with self._rates.applied(model):
            self._at_rates = calibrate.temperature(self._sampled(part.held_out_images), labels)

    @property
    def fitted(self) -> dict[str, float]:
        """The numbers that were fitted to held-out digits."""
        (keep_prob,) = {float(keep_prob) for keep_prob in self._rates.keep_probs.values()}
        return {
            DETERMINISTIC_CALIBRATED: self._temperature.value,
            AT_TEMPERATURE: self._of_samples.value,
            AT_RATES: keep_prob,
            CALIBRATED: self._at_rates.value,
        }

    def predictions(self, inputs: Inputs) -> Iterator[tuple[str, Outputs]]:
        """The predictions in each way, made one after another so that few samples are in memory at once."""
        before = Outputs(*(deterministic(self._model, x) for x in inputs))
        yield DETERMINISTIC, before
        yield DETERMINISTIC_CALIBRATED, Outputs(*map(self._temperature, before))
        samples = Outputs(*(self._sampled(x) for x in inputs))
        yield MONTE_CARLO, samples
        yield AT_TEMPERATURE, Outputs(*map(self._of_samples, samples))
        yield LATIN, Outputs(*(self._sampled(x, sampling="latin") for x in inputs))
        with self._rates.applied(self._model):
            samples = Outputs(*(self._sampled(x) for x in inputs))
        yield AT_RATES, samples
        yield CALIBRATED, Outputs(*map(self._at_rates, samples))

    def member(self, before: Outputs, samples: Outputs, passes: int) -> Member:
        """What an ensemble needs of this network's predictions, with so many of its samples."""
        return Member(
            kept(self._held_out), (kept(before.test), kept(before.turned)),
            (kept(samples.test)[:passes].clone(), kept(samples.turned)[:passes].clone()),
        )  # fmt: skip

    def _sampled(self, x: Tensor, sampling: str = "iid") -> ClassificationPrediction:
        return classified(
            self._model, x, self._samples, self._seed, sampling=sampling, keep_samples=True, standard_errors=False
        )

    def _search(self) -> ClassificationPrediction:
        return classified(self._model, self._part.held_out_images, self._samples, self._seed, standard_errors=False)


def kept(prediction: ClassificationPrediction) -> Tensor:
    """The samples, (S, B, C), of a prediction that kept them."""
    assert prediction.samples is not None
    return prediction.samples


def joined(members: Sequence[tuple[Tensor, Tensor]]) -> Outputs:
    """The predictions of both sets of digits from the samples of all members."""
    return Outputs(*(pooled(torch.cat(found)) for found in zip(*members, strict=True)))


def ensembles(members: Sequence[Member], labels: Tensor) -> tuple[dict[str, Outputs], float]:
    """The predictions of several networks together, and the temperature of their mean on held-out digits.

    The samples of the ensemble are the members' deterministic passes; those of the ensemble of Monte Carlo are some
    Monte Carlo samples of each. Probabilities are averaged. The temperature divides each member's logits.
    """
    temperature = calibrate.temperature(pooled(torch.cat([member.held_out for member in members])), labels)
    test, turned = joined([member.deterministic for member in members])
    return {
        ENSEMBLE: Outputs(test, turned),
        ENSEMBLE_CALIBRATED: Outputs(temperature(test), temperature(turned)),
        ENSEMBLE_OF_SAMPLES: joined([member.samples for member in members]),
    }, temperature.value

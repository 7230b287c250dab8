"""The rows to label next: those whose labels would tell most about the model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .core.checks import check_integer
from .monte_carlo.classes import normalized
from .monte_carlo.moments import wide
from .monte_carlo.task_predictions import ClassificationPrediction

ELEMENTS = 2**23
"""The most elements of an intermediate tensor, 64 MiB in float64."""


class Acquired(NamedTuple):
    """Rows in the order in which they were chosen."""

    rows: Tensor
    """Their indices, of shape (size,)."""
    information: Tensor
    """The mutual information of the labels of the first one, two, ... of them and the model, in nats."""


def batch_bald(
    prediction: ClassificationPrediction, size: int, *, configurations: int = 2000, seed: int = 0
) -> Acquired:
    """Chooses rows whose labels together have the most mutual information with the model: BatchBALD.

    ``I[y_1, ..., y_b; w] = H[y_1, ..., y_b] - sum_i E_w H[y_i | w]``. Rows are added one by one, each time the one with
    which this is largest, which reaches at least 1 - 1/e of the best of all sets. The first is the row of highest
    `mutual_information` (BALD). Rows that tell the same are not chosen together, as the highest ones of BALD would be.

    Labels are independent given the model w, one of the T samples, so
    ``p(y_1, ..., y_b) = 1/T sum_t prod_i p(y_i | w_t)``. The joint entropy is exact as long as the labels of the rows
    chosen so far have no more configurations than `configurations`, and is then estimated from that many, drawn from
    their joint distribution. Its memory and time grow with ``configurations B C``.

    The samples must be functions: predict with ``masks="shared"`` and ``keep_samples=True``. With independent masks the
    samples of two rows have nothing to do with each other, and the result means nothing.

    Args:
        prediction: the prediction of the rows that could be labeled, one output (C,) each.
        size: the number of rows to choose.
        configurations: how many configurations of labels the joint entropy is computed from.
        seed: the seed by which configurations are drawn.

    Returns:
        The rows, and the mutual information after each.

    Raises:
        TypeError: a prediction of another kind.
        ValueError: samples that were not kept or are not of shape (T, B, C), or more rows to choose than there are.

    References:
        Kirsch, van Amersfoort, Gal, "BatchBALD: Efficient and Diverse Batch Acquisition for Deep Bayesian Active
        Learning", NeurIPS 2019, equation 8 and algorithm 1. Houlsby, Huszar, Ghahramani, Lengyel, "Bayesian Active
        Learning for Classification", 2011 (BALD).

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3)).eval()
        >>> pool = torch.randn(100, 4)
        >>> result = torchdrop.mc_predict(
        ...     model, pool, 50, task="classification", masks="shared", keep_samples=True, seed=0
        ... )
        >>> chosen = torchdrop.acquisition.batch_bald(result, 5)
        >>> chosen.rows[0].item() == result.mutual_information.argmax().item(), len(chosen.rows.unique())
        (True, 5)
    """
    samples = _samples(prediction)
    count, rows = samples.shape[:2]
    check_integer("size", size, least=1)
    check_integer("configurations", configurations, least=1)
    if size > rows:
        raise ValueError(f"size must be at most the number of rows, {rows}, got {size}")
    generator = torch.Generator().manual_seed(check_integer("seed", seed, least=0))
    of_each = torch.special.entr(samples).sum(2).mean(0)
    joint = _Joint(count, configurations, generator, samples)
    chosen: list[int] = []
    information: list[float] = []
    conditional = 0.0
    for _ in range(size):
        gains = joint.entropies(samples) - of_each
        gains[chosen] = -torch.inf
        best = int(gains.argmax())
        conditional += float(of_each[best])
        information.append(max(float(gains[best] + of_each[best]) - conditional, 0.0))
        chosen.append(best)
        joint.add(samples[:, best])
    device = prediction.mean.device
    return Acquired(torch.tensor(chosen, device=device), torch.tensor(information, dtype=samples.dtype, device=device))


class _Joint:
    """The joint distribution of the labels of the rows that were chosen.

    `given[m, t]` is the probability of configuration m in sample t, divided by that with which m was drawn, and by the
    number of configurations where they were drawn. So sums over m are exact, or estimates without bias.
    """

    def __init__(self, count: int, configurations: int, generator: torch.Generator, like: Tensor) -> None:
        self.given = like.new_ones(1, count)
        self.logs = like.new_zeros(1)
        self._most, self._generator = configurations, generator

    def entropies(self, samples: Tensor) -> Tensor:
        """Returns the entropy of the labels so far together with that of each row (T, B, C) in turn, of shape (B,)."""
        count, classes = len(samples), samples.shape[2]
        each = max(1, ELEMENTS // (len(self.given) * classes))
        found = []
        for part in samples.split(each, 1):
            joint = (self.given @ part.flatten(1)) / count
            logs = joint.log() + self.logs.unsqueeze(1)
            terms = torch.where(joint > 0, -joint * logs, 0.0)
            found.append(terms.view(len(joint), -1, classes).sum((0, 2)))
        return torch.cat(found)

    def add(self, row: Tensor) -> None:
        """Adds a row (T, C) to those that were chosen."""
        given = (self.given.unsqueeze(1) * row.T).flatten(0, 1)
        logs = self.logs.repeat_interleave(row.shape[1])
        weights = given.mean(1)
        if len(given) > self._most:  # of all configurations, that many are drawn, with their probabilities
            total = weights.sum()
            drawn = torch.multinomial(weights.cpu(), self._most, replacement=True, generator=self._generator)
            drawn = drawn.to(weights.device)
            share = weights[drawn] / total * self._most
            given, logs = given[drawn] / share.unsqueeze(1), logs[drawn] + share.log()
        self.given, self.logs = given, logs


def _samples(prediction: ClassificationPrediction) -> Tensor:
    """Returns the samples (T, B, C) in float64."""
    if not isinstance(prediction, ClassificationPrediction):
        raise TypeError(
            "prediction must be a ClassificationPrediction (mc_predict with task='classification'), got "
            f"{type(prediction).__name__}"
        )
    samples = prediction.samples
    if samples is None:
        raise ValueError("the samples were not kept: predict with keep_samples=True and masks='shared'")
    if samples.dim() != 3 or not normalized(samples, 2):
        raise ValueError(
            "prediction must have one output for each row, in samples of shape (T, B, C), got shape "
            f"{tuple(samples.shape)}{' with places left out' if samples.isnan().any() else ''}"
        )
    return wide(samples)

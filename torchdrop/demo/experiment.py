"""The comparison: for each seed networks without dropout, with it, and with it on a schedule, and their predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..monte_carlo import ClassificationPrediction
from .data import Digits
from .evaluation import Array, error, monte_carlo, probabilities, running_mean
from .network import RATES, WITHOUT, build, ramp
from .training import train


class Outcome(NamedTuple):
    """The predictions of one seed: probabilities of shape (tests, 10), on the CPU."""

    plain: Tensor
    deterministic: Tensor
    scheduled: Tensor
    """The deterministic pass of a network whose rates followed a schedule in training."""
    monte_carlo: dict[int, Tensor]
    """The mean over the first k passes, for the k that are reported, in rising order."""
    prediction: ClassificationPrediction
    """The result of `mc_predict` for all passes, without the samples."""
    errors: Array
    """The fraction of wrong predictions of the mean over the first k passes, for every k from 1."""


def reported(samples: int) -> list[int]:
    """Returns the k that get a row in the table.

    >>> reported(100), reported(20)
    ([1, 10, 50, 100], [1, 10, 20])
    """
    return sorted({k for k in (1, 10, 50, 100, samples) if k <= samples})


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restores PyTorch's generators and thread count at the end. Within the context, the CPU works with one thread.

    Products of 32 x 512 by 512 x 512 gain little from two, and lose a factor of ten if another program keeps a core
    busy. Besides, the numbers then do not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)


def run_seeds(
    digits: Digits, sizes: Sequence[int], *, seed: int, seeds: int, epochs: int, samples: int
) -> list[Outcome]:
    """Returns outcomes for `seed`, `seed` + 1, ... with a progress bar on stderr if that is a terminal.

    PyTorch's generators and thread count are left as they were.
    """
    device = digits.train_images.device
    rows = reported(samples)
    labels = digits.test_labels.cpu()
    outcomes = []
    with (
        undisturbed(device),
        tqdm(total=seeds * (3 * epochs + samples), unit="step", disable=None, leave=False) as bar,
    ):
        for i in range(seeds):
            networks: list[nn.Module] = []
            for name, rates, schedule in (
                ("without dropout", WITHOUT, {}),
                ("with dropout", RATES, {}),
                ("with dropout on a schedule", RATES, {"*": ramp(epochs)}),
            ):
                bar.set_description(f"seed {i + 1} of {seeds}, {name}")
                torch.manual_seed(seed + i)
                network = build(sizes, rates).to(device)
                train(
                    network,
                    digits.train_images,
                    digits.train_labels,
                    epochs=epochs,
                    seed=seed + i,
                    schedule=schedule,
                    after_epoch=bar.update,
                )
                networks.append(network)
            plain, dropped, scheduled = networks
            bar.set_description(f"seed {i + 1} of {seeds}, Monte Carlo")
            prediction = monte_carlo(dropped, digits.test_images, samples, seed=seed + i)
            assert prediction.samples is not None
            means, errors = {}, []
            for k, mean in enumerate(running_mean(prediction.samples), start=1):
                errors.append(error(mean, labels))
                if k in rows:
                    means[k] = mean
                bar.update()
            outcomes.append(
                Outcome(
                    probabilities(plain, digits.test_images),
                    probabilities(dropped, digits.test_images),
                    probabilities(scheduled, digits.test_images),
                    means,
                    replace(prediction, samples=None).to("cpu"),
                    np.array(errors),
                )
            )
    return outcomes

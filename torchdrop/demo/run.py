"""The demo from beginning to end."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from ..kernels import available_backends
from . import figures, regression
from .data import load
from .experiment import run_seeds
from .network import RATES, SIZES, describe
from .report import conclusions, scores, sources_sentence, table


def kernels_in_use(device: torch.device) -> str:
    """Says which backend serves the masks, and gives the reason if it is not the native one."""
    backends = available_backends(device)
    serving = next(name for name, reasons in backends.items() if not reasons)
    if serving == "native":
        return "torchdrop's native kernels are in use."
    return f"torchdrop's native kernels are not in use ({'; '.join(backends['native'])}): {serving!r} serves {device}."


def run(*, seed: int, seeds: int, epochs: int, samples: int, output: Path, device: torch.device) -> list[Path]:
    """Trains, predicts, prints and draws.

    Args:
        seed: the seed of the first repetition; the others have the numbers after it.
        seeds: the number of repetitions.
        epochs: the number of passes over the training set, for each network.
        samples: the number of Monte Carlo passes over the digits.
        output: an existing folder for the figures.
        device: the device of the networks.

    Returns:
        The figures' paths.
    """
    start = time.perf_counter()
    digits = load(device)
    print(
        f"Handwritten digits: {len(digits.train_images)} to train on, {len(digits.test_images)} to test on. "
        f"Seeds {seed} to {seed + seeds - 1}, {epochs} epochs each."
    )
    print(f"{kernels_in_use(device)}\n\n{describe(SIZES, RATES, epochs)}\n", flush=True)
    outcomes = run_seeds(digits, SIZES, seed=seed, seeds=seeds, epochs=epochs, samples=samples)
    labels = digits.test_labels.cpu()
    rows = scores(outcomes, labels)
    spread = f"mean ± standard error of {seeds} seeds" if seeds > 1 else "one seed"
    print(f"On the test set, {spread}:\n\n{table(rows)}\n")
    print("\n".join([*conclusions(outcomes, labels), sources_sentence(outcomes[0].prediction)]) + "\n", flush=True)
    fitted = regression.fit(seed, device)
    print("\n".join(regression.conclusions(fitted)) + "\n", flush=True)
    written = figures.write(output, outcomes, labels, digits.test_pictures, rows, fitted, epochs)
    print("Figures written:")
    for path in written:
        print(f"  {path}")
    print(f"Took {time.perf_counter() - start:.0f} s.")
    return written

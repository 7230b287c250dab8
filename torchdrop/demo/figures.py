"""The figures. Each is drawn on a Figure of its own: no pyplot, no display, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter
from torch import Tensor

from ..monte_carlo.plots import band, reliability_diagram
from .evaluation import Scores, error
from .experiment import Outcome
from .network import RATES, SIZES, scheduled
from .regression import GRID, LEVEL, TAU, Fit, function
from .report import PUBLISHED, mean_and_error

# Okabe and Ito's colors, which color-blind readers can tell apart.
PLAIN, DETERMINISTIC, MONTE_CARLO, WRONG = "#E69F00", "#009E73", "#0072B2", "#D55E00"
DPI = 150


def error_against_k(outcomes: Sequence[Outcome], labels: Tensor) -> Figure:
    """Draws the test error of Monte Carlo averaging for every k, the deterministic pass, and no dropout."""
    errors = 100 * np.stack([outcome.errors for outcome in outcomes])
    samples = errors.shape[1]
    ks = np.arange(1, samples + 1)
    mean, spread = mean_and_error(errors)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, color, style, predictions in (
        ("no dropout", PLAIN, "--", [outcome.plain for outcome in outcomes]),
        ("dropout, deterministic pass", DETERMINISTIC, "-.", [outcome.deterministic for outcome in outcomes]),
    ):
        level, width = mean_and_error([100 * error(predicted, labels) for predicted in predictions])
        axes.axhline(float(level), color=color, linestyle=style, label=label)
        axes.axhspan(float(level - width), float(level + width), color=color, alpha=0.15, linewidth=0)
    axes.plot(ks, mean, color=MONTE_CARLO, label="dropout, Monte Carlo", marker="o", markersize=2.5)
    axes.fill_between(ks, mean - spread, mean + spread, color=MONTE_CARLO, alpha=0.2, linewidth=0)
    if samples >= PUBLISHED:
        axes.axvline(PUBLISHED, color="0.6", linestyle=":", label=f"published: catches up near k = {PUBLISHED}")
    axes.set_xscale("log")
    axes.set_xlim(0.9, 1.1 * max(samples, 2))
    axes.set_xticks([k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= max(samples, 2)])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_xlabel("k, passes averaged")
    axes.set_ylabel("test error (%)")
    many = len(outcomes) > 1
    axes.set_title(
        f"Error against the number of Monte Carlo passes\n(mean of {len(outcomes)} seeds, bands: standard error)"
        if many
        else "Error against the number of Monte Carlo passes (one seed)",
        fontsize=11,
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def reliability(outcomes: Sequence[Outcome], labels: Tensor, rows: dict[str, list[Scores]]) -> Figure:
    """Draws accuracy against confidence for the three methods, over the predictions of all seeds.

    A perfectly calibrated network's bars end on the diagonal. The ECE shown is the table's: the mean over the seeds.
    """
    k = max(outcomes[0].monte_carlo)
    methods = {
        "no dropout": [outcome.plain for outcome in outcomes],
        "dropout, deterministic pass": [outcome.deterministic for outcome in outcomes],
        f"dropout, Monte Carlo, k = {k}": [outcome.monte_carlo[k] for outcome in outcomes],
    }
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    every_axes: Any = figure.subplots(1, 3, sharey=True)
    for axes, (name, predicted) in zip(every_axes, methods.items(), strict=True):
        reliability_diagram(torch.cat(predicted), labels.repeat(len(outcomes)), ax=axes)
        ece, _ = mean_and_error([of_seed.ece for of_seed in rows[name]])
        axes.set_title(f"{name}\nECE {100 * ece:.2f} %", fontsize=11)
        axes.label_outer()
    for axes in every_axes[1:]:
        axes.get_legend().remove()
    return figure


def most_uncertain(outcome: Outcome, labels: Tensor, pictures: Any) -> Figure:
    """Draws the twelve test digits of highest predictive entropy under Monte Carlo averaging, with probabilities."""
    k = max(outcome.monte_carlo)
    predicted = outcome.monte_carlo[k]
    uncertainty = outcome.prediction.predictive_entropy
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(
        f"Most uncertain test digits: highest predictive entropy, mean of {k} Monte Carlo pass{'es' if k > 1 else ''}"
    )
    cells: Any = figure.subfigures(3, 4, wspace=0.04, hspace=0.04)
    for cell, i in zip(cells.flat, uncertainty.argsort(descending=True, stable=True).tolist(), strict=False):
        answer, truth = int(predicted[i].argmax()), int(labels[i])
        picture, bars = cell.subplots(1, 2, width_ratios=[1, 1.5])
        cell.suptitle(
            f"true {truth}, predicted {answer}  ({uncertainty[i]:.2f} nats)",
            color="black" if answer == truth else WRONG,
            fontsize=10,
        )
        picture.imshow(pictures[i], cmap="gray_r", vmin=0, vmax=16)
        picture.set_axis_off()
        colors = [DETERMINISTIC if c == truth else WRONG if c == answer else "0.7" for c in range(predicted.shape[1])]
        bars.bar(range(predicted.shape[1]), predicted[i].numpy(), color=colors)
        bars.set_ylim(0, 1)
        bars.set_xticks(range(predicted.shape[1]))
        bars.set_yticks([0, 0.5, 1])
        bars.yaxis.set_major_formatter(PercentFormatter(1))
        bars.tick_params(labelsize=7)
        bars.set_xlabel("digit", fontsize=8)
        bars.set_ylabel("probability", fontsize=8)
        bars.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("Green: the true digit. Orange: a wrong prediction. Grey: the other digits.", fontsize=9)
    return figure


def regression(fitted: Fit) -> Figure:
    """Draws the regression's mean and bands, its data, and the function that they come from."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = band(GRID, fitted.prediction, data=(fitted.x, fitted.y), level=LEVEL, ax=figure.subplots())
    truth = function(GRID).numpy()
    axes.plot(GRID.numpy(), truth, color=PLAIN, linestyle="--", linewidth=1.2, label="true function", zorder=1.5)
    axes.set_xlim(float(GRID[0]), float(GRID[-1]))
    axes.set_title(
        f"Monte Carlo dropout on one input: {fitted.prediction.num_samples} samples, tau = {TAU:g}", fontsize=11
    )
    axes.set_xlabel("x (input)")
    axes.set_ylabel("y (target)")
    axes.legend(frameon=False, fontsize=9, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def schedule(epochs: int) -> Figure:
    """Draws the keep_prob of each layer over the epochs, for the networks that were trained on a schedule."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    scheduler, _ = scheduled(SIZES, RATES, epochs)
    axes = scheduler.plot(epochs, figure.subplots())
    axes.set_xlabel("epoch")
    axes.set_title("keep_prob on a schedule (Curriculum Dropout), by layer of the network", fontsize=11)
    return figure


def write(
    folder: Path,
    outcomes: Sequence[Outcome],
    labels: Tensor,
    pictures: Any,
    rows: dict[str, list[Scores]],
    fitted: Fit,
    epochs: int,
) -> list[Path]:
    """Writes the figures as PNG files into the folder, over those of an earlier run, and returns their paths."""
    figures = {
        "error_against_k.png": error_against_k(outcomes, labels),
        "reliability.png": reliability(outcomes, labels, rows),
        "most_uncertain.png": most_uncertain(outcomes[0], labels, pictures),
        "regression.png": regression(fitted),
        "schedule.png": schedule(epochs),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    return [folder / name for name in figures]

"""The three figures. Each is drawn on a Figure of its own: no pyplot, no display, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter, ScalarFormatter
from numpy.typing import NDArray

from .evaluation import BINS, Array, Scores, entropy, error, reliability
from .experiment import Outcome
from .report import PUBLISHED, mean_and_error

# Okabe and Ito's colours, which colour-blind readers can tell apart.
PLAIN, DETERMINISTIC, MONTE_CARLO, WRONG = "#E69F00", "#009E73", "#0072B2", "#D55E00"
DPI = 150


def error_against_k(outcomes: Sequence[Outcome], labels: NDArray[np.int64]) -> Figure:
    """Test error of Monte Carlo averaging for every k, with the deterministic pass and no dropout to compare."""
    errors = 100 * np.stack([outcome.errors for outcome in outcomes])
    samples = errors.shape[1]
    ks = np.arange(1, samples + 1)
    mean, spread = mean_and_error(errors)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, colour, style, predictions in (
        ("no dropout", PLAIN, "--", [outcome.plain for outcome in outcomes]),
        ("dropout, deterministic pass", DETERMINISTIC, "-.", [outcome.deterministic for outcome in outcomes]),
    ):
        level, width = mean_and_error([100 * error(predicted, labels) for predicted in predictions])
        axes.axhline(float(level), color=colour, linestyle=style, label=label)
        axes.axhspan(float(level - width), float(level + width), color=colour, alpha=0.15, linewidth=0)
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


def reliability_diagram(
    outcomes: Sequence[Outcome], labels: NDArray[np.int64], rows: dict[str, list[Scores]]
) -> Figure:
    """Accuracy against confidence for the three methods, over the predictions of all seeds, and how many there are.

    A perfectly calibrated network's bars end on the diagonal. The ECE given is the table's: the mean of the seeds'.
    """
    k = max(outcomes[0].monte_carlo)
    methods: list[tuple[str, str, list[Array]]] = [
        ("no dropout", PLAIN, [outcome.plain for outcome in outcomes]),
        ("dropout, deterministic pass", DETERMINISTIC, [outcome.deterministic for outcome in outcomes]),
        (f"dropout, Monte Carlo, k = {k}", MONTE_CARLO, [outcome.monte_carlo[k] for outcome in outcomes]),
    ]
    figure = Figure(figsize=(11, 5.6), layout=ConstrainedLayoutEngine(wspace=0.04))
    grid: Any = figure.subplots(2, 3, sharex=True, sharey="row", height_ratios=[2.4, 1])
    left = np.arange(BINS) / BINS
    every_label = np.tile(labels, len(outcomes))
    for column, (name, colour, predicted) in enumerate(methods):
        size, confidence, accuracy = reliability(np.concatenate(predicted), every_label)
        top, bottom = grid[0, column], grid[1, column]
        top.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="perfect calibration")
        top.bar(
            left, np.nan_to_num(accuracy), width=1 / BINS, align="edge", color=colour, alpha=0.55, edgecolor="white"
        )
        top.plot(
            confidence, accuracy, "o", color="black", markersize=3.5, clip_on=False, zorder=3, label="mean of the bin"
        )
        ece, _ = mean_and_error([of_seed.ece for of_seed in rows[name]])
        top.set_title(f"{name}\nECE {100 * ece:.2f} %", fontsize=11)
        top.set_ylim(0, 1.02)
        bottom.bar(left, size, width=1 / BINS, align="edge", color=colour, edgecolor="white")
        bottom.set_yscale("log")
        bottom.set_ylim(bottom=0.5)
        bottom.set_xlim(0, 1)
        bottom.set_xlabel("confidence (largest probability)")
        for axes in (top, bottom):
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
    grid[0, 0].set_ylabel("accuracy (fraction right)")
    grid[0, 0].legend(frameon=False, loc="upper left", fontsize=9)
    grid[1, 0].set_ylabel("predictions\n(count, log scale)")
    return figure


def most_uncertain(outcome: Outcome, labels: NDArray[np.int64], pictures: Any) -> Figure:
    """The twelve test digits of highest predictive entropy under Monte Carlo averaging, with their probabilities."""
    k = max(outcome.monte_carlo)
    predicted = outcome.monte_carlo[k]
    uncertainty = entropy(predicted)
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(
        f"Most uncertain test digits: highest predictive entropy, mean of {k} Monte Carlo pass{'es' if k > 1 else ''}"
    )
    cells: Any = figure.subfigures(3, 4, wspace=0.04, hspace=0.04)
    for cell, i in zip(cells.flat, np.argsort(-uncertainty, kind="stable"), strict=False):
        answer, truth = int(predicted[i].argmax()), int(labels[i])
        picture, bars = cell.subplots(1, 2, width_ratios=[1, 1.5])
        cell.suptitle(
            f"true {truth}, predicted {answer}  ({uncertainty[i]:.2f} nats)",
            color="black" if answer == truth else WRONG,
            fontsize=10,
        )
        picture.imshow(pictures[i], cmap="gray_r", vmin=0, vmax=16)
        picture.set_axis_off()
        colours = [DETERMINISTIC if c == truth else WRONG if c == answer else "0.7" for c in range(predicted.shape[1])]
        bars.bar(range(predicted.shape[1]), predicted[i], color=colours)
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


def write(
    folder: Path,
    outcomes: Sequence[Outcome],
    labels: NDArray[np.int64],
    pictures: Any,
    rows: dict[str, list[Scores]],
) -> list[Path]:
    """Writes the figures as PNG files into the folder, over those of an earlier run, and returns their paths."""
    figures = {
        "error_against_k.png": error_against_k(outcomes, labels),
        "reliability.png": reliability_diagram(outcomes, labels, rows),
        "most_uncertain.png": most_uncertain(outcomes[0], labels, pictures),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    return [folder / name for name in figures]

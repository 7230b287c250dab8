"""Pictures of calibration before and after, of sets and of intervals (``pip install 'torchdrop[uncertainty]'``).

Each function draws on the Axes that it is given, or on a Figure of its own (no pyplot, no global state), and returns
the Axes: ``set_sizes({"aps": sets}).figure.savefig("sizes.png")``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._extras import BLUE, GREEN, ORANGE, VERMILION, axes_or_new, optional
from ..monte_carlo.moments import wide
from ..monte_carlo.plots import INNER, reliability_diagram
from ..monte_carlo.prediction import Prediction
from ..monte_carlo.task_predictions import ClassificationPrediction
from .intervals import Intervals
from .scores import interval_shares
from .sets import PredictionSets

COLORS = (BLUE, VERMILION, GREEN, ORANGE)
MARKERS = ("o", "s", "^", "D")
NOMINAL = tuple(level / 100 for level in (1, *range(5, 100, 5), 99))


def reliability_before_and_after(
    before: ClassificationPrediction, after: ClassificationPrediction, targets: Tensor, *, axes: Any = None
) -> Any:
    """Draws two reliability diagrams side by side: see `torchdrop.monte_carlo.plots.reliability_diagram`.

    Args:
        before, after: a prediction before and after it was calibrated.
        targets: classes, of rows that it was not calibrated on.
        axes: a pair of Axes to draw on; new ones if None.

    Returns:
        The pair of Axes.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3)).eval()
        >>> result = torchdrop.mc_predict(model, torch.randn(50, 4), samples=20, task="classification", seed=0)
        >>> left, right = reliability_before_and_after(result, result, torch.arange(50) % 3)
        >>> left.get_title().splitlines()[0]
        'before'
    """
    if axes is None:
        axes = optional("matplotlib.figure").Figure(figsize=(9, 4.2), layout="constrained").subplots(1, 2)
    for ax, prediction, name in zip(axes, (before, after), ("before", "after"), strict=True):
        axes_or_new(ax)
        reliability_diagram(prediction, targets, ax=ax)
        ax.set_title(f"{name}\n{ax.get_title()}", fontsize=11)
    return tuple(axes)


def coverage_against_nominal(predictions: Mapping[str, Prediction], targets: Tensor, *, ax: Any = None) -> Any:
    """Draws the share of targets within the central normal interval of each level, against the level.

    Args:
        predictions: predictions of values, by the name in the legend, such as "before" and "after".
        targets: their observations, of rows that nothing was calibrated on.
        ax: the Axes to draw on; new ones if None.

    Returns:
        The Axes.

    References:
        Kuleshov, Fenner, Ermon, "Accurate Uncertainties for Deep Learning Using Calibrated Regression", ICML 2018.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 1)).eval()
        >>> result = torchdrop.mc_predict(model, torch.randn(50, 4), samples=20, task="regression", seed=0)
        >>> coverage_against_nominal({"Monte Carlo": result}, torch.randn(50, 1)).get_xlabel()
        'nominal coverage'
    """
    ax = axes_or_new(ax)
    ax.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="calibrated")
    for i, (name, prediction) in enumerate(predictions.items()):
        shares = interval_shares(prediction, targets, NOMINAL)
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 3.5}
        ax.plot(NOMINAL, shares.numpy(), label=name, **style)
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="nominal coverage", ylabel="share of targets in the interval")
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    return ax


def set_sizes(sets: Mapping[str, PredictionSets], targets: Tensor | None = None, *, ax: Any = None) -> Any:
    """Draws how many sets have how many classes.

    Args:
        sets: sets of the same rows, by the name in the legend, such as the method's.
        targets: classes; the legend then has the coverage, too.
        ax: the Axes to draw on; new ones if None.

    Returns:
        The Axes.

    Raises:
        ValueError: no sets.

    Example:
        >>> import torch, torchdrop
        >>> p, y = torch.randn(100, 4).softmax(1), torch.arange(100) % 4
        >>> ax = set_sizes({"lac": torchdrop.calibrate.conformal_sets(p, y, method="lac")(p)}, y)
        >>> ax.get_xlabel()
        'classes in a set'
    """
    if not sets or any(len(one) == 0 for one in sets.values()):
        raise ValueError("sets must hold at least one row each, and one name, got none")
    ax = axes_or_new(ax)
    most = max(int(one.sizes.max()) for one in sets.values())
    width = 0.8 / len(sets)
    for i, (name, one) in enumerate(sets.items()):
        shares = torch.bincount(one.sizes.cpu(), minlength=most + 1).double() / len(one)
        places = torch.arange(most + 1) + (i - (len(sets) - 1) / 2) * width
        label = f"{name}: mean {wide(one.sizes).mean():.3g}"
        label += "" if targets is None else f", coverage {100 * one.coverage(targets):.1f} %"
        ax.bar(places.numpy(), shares.numpy(), width, color=COLORS[i % len(COLORS)], label=label)
    ax.set(xlabel="classes in a set", ylabel="share of rows")
    ax.set_xticks(range(most + 1))
    ax.legend(frameon=False, fontsize=9)
    return ax


def intervals_over(
    x: Tensor,
    intervals: Intervals,
    *,
    prediction: Prediction | None = None,
    data: tuple[Tensor, Tensor] | None = None,
    ax: Any = None,
) -> Any:
    """Draws intervals of a regression on one input, and which points are outside of theirs.

    Args:
        x: the inputs, of shape (B,) or (B, 1), in any order.
        intervals: their intervals, with one output for each.
        prediction: a prediction of the same rows, whose mean is drawn.
        data: inputs and targets of points to show, each of shape (N,) or (N, 1). Points outside of the band, which is
            taken to be straight between the inputs, are red.
        ax: the Axes to draw on; new ones if None.

    Returns:
        The Axes.

    Raises:
        ValueError: several inputs or outputs for a row, or numbers of rows that differ.

    Example:
        >>> from torchdrop.calibrate import Intervals
        >>> ax = intervals_over(torch.arange(3.0), Intervals(torch.zeros(3), torch.ones(3)))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['interval']
    """
    at, order = _column("x", x).sort()
    columns = {"lower": intervals.lower, "upper": intervals.upper}
    columns |= {} if prediction is None else {"mean": prediction.mean}
    values = {name: _column("intervals", column) for name, column in columns.items()}
    if any(len(one) != len(at) for one in values.values()):
        raise ValueError(f"x and intervals must have the same number of rows, got {len(at)} and {len(intervals)}")
    lower, upper, xs = values["lower"][order].numpy(), values["upper"][order].numpy(), at.numpy()
    ax = axes_or_new(ax)
    ax.fill_between(xs, lower, upper, color=INNER, alpha=0.6, linewidth=0, label="interval")
    if prediction is not None:
        ax.plot(xs, values["mean"][order].numpy(), color=BLUE, label="mean")
    if data is not None:
        interp = optional("numpy").interp
        points, targets = (_column("data", one).numpy() for one in data)
        inside = (targets >= interp(points, xs, lower)) & (targets <= interp(points, xs, upper))
        for chosen, color, name in ((inside, "black", "inside"), (~inside, VERMILION, "outside")):
            label = f"{name} ({int(chosen.sum())})"
            ax.plot(points[chosen], targets[chosen], "o", color=color, markersize=2.5, alpha=0.8, label=label)
    ax.set(xlabel="x", ylabel="y")
    ax.legend(framealpha=0.8, edgecolor="none", fontsize=9, markerscale=2)
    return ax


def _column(name: str, values: Tensor) -> Tensor:
    if values.dim() not in (1, 2) or values.numel() != len(values):
        raise ValueError(f"{name} must have one value for each row, got shape {tuple(values.shape)}")
    return values.detach().cpu().double().reshape(-1)

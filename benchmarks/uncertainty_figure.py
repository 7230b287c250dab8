"""The figure of the uncertainty benchmark and its tables in benchmarks/README.md, made of the committed result.

python benchmarks/uncertainty_figure.py    # writes results/uncertainty.svg and fills in the tables of README.md
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import command
from command import RESULTS
from panel import HEIGHT, Panel, svg
from uncertainty_scores import COVERAGES
from uncertainty_summary import render
from uncertainty_ways import (
    CALIBRATED,
    DETERMINISTIC,
    DETERMINISTIC_CALIBRATED,
    ENSEMBLE,
    ENSEMBLE_OF_SAMPLES,
    MONTE_CARLO,
    ONE_PASS,
)

README = RESULTS.parent / "README.md"
RESULT, FIGURE = RESULTS / "uncertainty.json", RESULTS / "uncertainty.svg"
MARKERS = ("<!-- uncertainty -->", "<!-- end of uncertainty -->")
"""Between these lines of README.md stand the tables."""

# The colors are Okabe and Ito's, which color-blind readers can tell apart.
COLORS = {
    DETERMINISTIC: "#666666", DETERMINISTIC_CALIBRATED: "#000000", MONTE_CARLO: "#0072B2", CALIBRATED: "#56B4E9",
    ENSEMBLE: "#D55E00", ENSEMBLE_OF_SAMPLES: "#009E73",
}  # fmt: skip
DASHED = (DETERMINISTIC_CALIBRATED, CALIBRATED)
WIDTH, SIDE, PLOT, GAP, LEGEND = 1140, 58, 300, 72, 56
BAND = 2
"""The half width of a band, in standard errors."""

Report = dict[str, Any]


def ends(largest: float) -> tuple[float, float]:
    """The least upper end of an axis from 0 with at most six ticks at multiples of 1, 2 or 5, and their distance."""
    power = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(step * power for step in (1, 2, 5, 10) if largest <= 5 * step * power)
    return math.ceil(largest / step) * step, step


def curves(
    left: int,
    title: str,
    xs: Sequence[float],
    found: dict[str, dict[str, list[float]]],
    names: tuple[str, str],
    ticks: dict[float, str],
    unit: float = 1.0,
) -> Panel:
    """A plot of means with bands.

    Args:
        xs: the places of the points.
        found: for each way to be drawn its means and standard errors.
        names: of the axes.
        ticks: of the first axis.
        unit: by what the means are multiplied.
    """  # fmt: skip
    bands = {
        way: [
            (unit * (mean - BAND * error), unit * (mean + BAND * error))
            for mean, error in zip(*curve.values(), strict=True)
        ]
        for way, curve in found.items()
    }
    top, step = ends(max(high for pairs in bands.values() for _, high in pairs))
    panel = Panel(left, (xs[0], xs[-1]), (0.0, top), log=False, log_x=False, width=PLOT)
    levels = [i * step for i in range(round(top / step) + 1)]
    panel.axes(title, ticks, {level: f"{level:g}" for level in levels}, *names)
    for way, pairs in bands.items():
        low, high = ([(x, max(0.0, pair[i])) for x, pair in zip(xs, pairs, strict=True)] for i in (0, 1))
        panel.band(low, high, COLORS[way])
    for way, curve in found.items():
        dashes = ' stroke-dasharray="5 4"' if way in DASHED else ""
        panel.line([(x, unit * mean) for x, mean in zip(xs, curve["mean"], strict=True)], COLORS[way], dashes)
    return panel


def row(network: Report, angles: list[int]) -> list[str]:
    """The three plots of one kind of network."""
    kind, rotation, lefts = network["kind"], network["rotation"], [SIDE + i * (PLOT + GAP) for i in range(3)]
    degrees = {float(angle): f"{angle}°" for angle in angles if angle % 45 == 0}
    shares = {share / 100: f"{share} %" for share in range(50, 101, 10)}

    def rotated(name: str, ways: Sequence[str]) -> dict[str, dict[str, list[float]]]:
        return {way: rotation[way][name] for way in ways}

    several = [way for way in COLORS if way not in ONE_PASS]
    panels = [
        curves(lefts[0], f"{kind}: predictive entropy", angles, rotated("entropy", list(COLORS)),
               ("rotation of the digits", "nats"), degrees),
        curves(lefts[1], f"{kind}: mutual information", angles, rotated("mutual_information", several),
               ("rotation of the digits", "nats"), degrees),
        curves(lefts[2], f"{kind}: risk against coverage", COVERAGES, {way: network["risks"][way] for way in COLORS},
               ("share of predictions kept, the most certain first", "errors among them, %"), shares, 100),
    ]  # fmt: skip
    return [part for panel in panels for part in panel.parts]


def legend(top: int) -> list[str]:
    """The names of the ways, each beside a piece of its line."""
    parts, width = [], (WIDTH - SIDE) // len(COLORS)
    for i, (way, color) in enumerate(COLORS.items()):
        left, dashes = SIDE + i * width, ' stroke-dasharray="5 4"' if way in DASHED else ""
        parts.append(f'<path d="M{left},{top}h22" stroke="{color}" stroke-width="2"{dashes}/>')
        parts += [
            f'<text x="{left + 28}" y="{top + 4 + 16 * line}" fill="#222">{words}</text>'
            for line, words in enumerate(way.replace(", ", ",\n").replace(" of ", " of\n").splitlines())
        ]
    return parts


def figure(report: Report) -> str:
    """The figure as SVG, which is the same text wherever it is made."""
    parts = []
    for i, network in enumerate(report["networks"]):
        parts += [f'<g transform="translate(0,{i * HEIGHT})">', *row(network, report["settings"]["angles"]), "</g>"]
    height = len(report["networks"]) * HEIGHT
    return svg(WIDTH, height + LEGEND, [*parts, *legend(height + 20)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    report = json.loads(RESULT.read_text(encoding="utf-8"))
    FIGURE.write_text(figure(report), encoding="utf-8")
    command.fill(README, MARKERS, render(report))


if __name__ == "__main__":
    main()

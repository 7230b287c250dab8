"""The tables of the uncertainty benchmark, made of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import summary
from harness import markdown_table
from uncertainty_scores import BASELINES, SCORES, SHORT_NAMES
from uncertainty_ways import AT_RATES, CALIBRATED, ONE_PASS, WAYS

Report = dict[str, Any]

UNITS = {
    "error": (100, 2), "negative_log_likelihood": (1, 4), "brier": (1, 4), "calibration_error": (100, 2),
    "risk_coverage_area": (1e4, 1), "misclassification_auroc": (100, 2), "mutual_information_auroc": (100, 2),
}  # fmt: skip
"""By what a score is multiplied for its column, and its decimal places."""

COLUMNS = [
    "error, %",
    "NLL",
    "Brier",
    "ECE, %",
    "AURC, 1e-4",
    "AUROC of errors, %",
    "the same by mutual information, %",
]
SCORE_HEADER = ["network", "way", *COLUMNS]
DIFFERENCE_HEADER = ["network", "way", "minus", *COLUMNS, "verdict"]
SHOWN_ANGLES = (0, 30, 60, 90, 180)
ROTATION_HEADER = [
    "network", "way", *(f"entropy, {angle}°" for angle in SHOWN_ANGLES), "mutual information, 0°", "90°",
    "NLL, 30°", "60°", "AUROC of 90° against 0°, %",
]  # fmt: skip
FITTED_HEADER = ["network", "fitted for", "number", "mean"]


def cell(found: dict[str, Any] | None, score: str, sign: str = "") -> str:
    """A mean with its standard error, in the score's unit."""
    if found is None:
        return "-"
    unit, places = UNITS[score]
    return shown(unit * found["mean"], unit * found["standard_error"], places, sign)


def shown(mean: float, error: float, places: int, sign: str = "") -> str:
    return f"{mean:{sign}.{places}f} ± {error:.{places}f}"


def score_rows(network: Report) -> list[list[str]]:
    return [
        [network["kind"], way, *(cell(scores[score], score) for score in SCORES)]
        for way, scores in network["scores"].items()
    ]


def difference_rows(network: Report) -> list[list[str]]:
    return [
        [network["kind"], way, than, *(cell(found[score], score, "+") for score in SCORES), verdict(found)]
        for than in BASELINES
        for way, found in network["differences"][than].items()
        if WAYS.index(way) > WAYS.index(than)
    ]


def verdict(found: dict[str, dict[str, Any] | None]) -> str:
    """The scores in which a way is better, and those in which it is worse."""
    said = []
    for word in ("better", "worse"):
        names = [SHORT_NAMES[score] for score, one in found.items() if one is not None and one["verdict"] == word]
        said += [f"{word}: {', '.join(names)}"] if names else []
    return "; ".join(said) or "neither"


def rotation_rows(network: Report, angles: Sequence[int]) -> list[list[str]]:
    def at(way: str, name: str, angle: int, places: int = 3) -> str:
        curve, i = network["rotation"][way][name], angles.index(angle)
        return shown(curve["mean"][i], curve["standard_error"][i], places)

    rows = []
    for way in WAYS:
        mutual = ["-", "-"] if way in ONE_PASS else [at(way, "mutual_information", angle) for angle in (0, 90)]
        outside = network["rotation"][way]["outside_auroc"]
        rows.append([
            network["kind"], way, *(at(way, "entropy", angle) for angle in SHOWN_ANGLES), *mutual,
            *(at(way, "negative_log_likelihood", angle, 2) for angle in (30, 60)),
            shown(100 * outside["mean"], 100 * outside["standard_error"], 1),
        ])  # fmt: skip
    return rows


def fitted_rows(network: Report) -> list[list[str]]:
    return [
        [
            network["kind"], way, f"keep probability, trained with {1 - network['rate']:g}" if way == AT_RATES
            else "temperature at these rates" if way == CALIBRATED else "temperature",
            shown(found["mean"], found["standard_error"], 3),
        ]
        for way, found in network["fitted"].items()
    ]  # fmt: skip


def render(report: Report) -> str:
    """A report as markdown: where it was measured, then scores, differences, rotations and what was fitted."""
    settings, networks = report["settings"], report["networks"]
    updates = " and ".join(f"{network['updates']} updates of the {network['kind']}" for network in networks)
    how = (
        f"{settings['groups']} groups of {settings['members']} networks of each kind, {updates}; "
        f"{settings['training_images']} digits of training and {settings['held_out_images']} held out for each group, "
        f"{settings['test_images']} test digits, {settings['turned_images']} of them turned; "
        f"{settings['samples']} Monte Carlo samples. ± is the standard error over groups; better and worse: by more "
        f"than {settings['bound']:.2f} of them. {settings['cpu_seconds'] / 60:.0f} minutes of processor time, "
        f"{settings['seconds'] / 60:.0f} minutes in all."
    )
    if settings["quick"]:
        how += " A quick run of few networks on few digits: its figures mean nothing."
    angles = settings["angles"]
    tables: list[tuple[list[str], list[list[str]]]] = [
        (SCORE_HEADER, [row for network in networks for row in score_rows(network)]),
        (DIFFERENCE_HEADER, [row for network in networks for row in difference_rows(network)]),
        (ROTATION_HEADER, [row for network in networks for row in rotation_rows(network, angles)]),
        (FITTED_HEADER, [row for network in networks for row in fitted_rows(network)]),
    ]
    return "\n\n".join([summary.where(report["machine"]), how, *(markdown_table(*table) for table in tables)])

"""The printed report: a table, and sentences that are computed from its numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ..monte_carlo import ClassificationPrediction, Report
from .evaluation import Array, Scores, error, score
from .experiment import Outcome

PUBLISHED = 50
"""Srivastava et al., JMLR 2014, section 7.5 and figure 11: as good as the deterministic pass at around k = 50."""


def mean_and_error(values: ArrayLike) -> tuple[Array, Array]:
    """Returns mean and standard error over the first dimension, the seeds. One seed has standard error 0."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 1:
        return array[0], np.zeros_like(array[0])
    return array.mean(axis=0), array.std(axis=0, ddof=1) / np.sqrt(len(array))


def scores(outcomes: Sequence[Outcome], labels: Tensor) -> dict[str, list[Scores]]:
    """Returns, for each row of the table, the scores of every seed."""
    rows = {
        "no dropout": [score(outcome.plain, labels) for outcome in outcomes],
        "dropout, deterministic pass": [score(outcome.deterministic, labels) for outcome in outcomes],
    }
    rows["dropout on a schedule, deterministic"] = [score(outcome.scheduled, labels) for outcome in outcomes]
    for k in outcomes[0].monte_carlo:
        rows[f"dropout, Monte Carlo, k = {k}"] = [score(outcome.monte_carlo[k], labels) for outcome in outcomes]
    return rows


def table(rows: dict[str, list[Scores]]) -> str:
    """Returns a table with the mean and, with several seeds, the standard error of each score."""
    name_width = max(map(len, rows))
    lines = [f"{'':<{name_width}}{'accuracy (%)':>18}{'NLL (nats)':>20}{'ECE (%)':>16}"]
    for name, of_seeds in rows.items():
        mean, spread = mean_and_error(of_seeds)
        cells = []
        for value, deviation, unit, digits in zip(mean, spread, (100, 1, 100), (2, 4, 2), strict=True):
            cell = f"{unit * value:.{digits}f}"
            cells.append(cell if len(of_seeds) == 1 else f"{cell} ± {unit * deviation:.{digits}f}")
        lines.append(f"{name:<{name_width}}{cells[0]:>18}{cells[1]:>20}{cells[2]:>16}")
    return "\n".join(lines)


def sources_sentence(prediction: ClassificationPrediction) -> str:
    """Returns a sentence on the way in which `mc_predict` ran the samples, and on the randomness in them."""
    report = prediction.report
    assert isinstance(report, Report)
    active = [f"{source.module} (p = {source.rate:.2g})" for source in report.active]
    return (
        f"mc_predict ran the samples with strategy '{prediction.strategy}', {report.chunk} at a time; "
        f"{len(active)} of {len(report.sources)} sources of randomness were active: layers {', '.join(active)}."
    )


def catch_up(errors: ArrayLike, deterministic: ArrayLike) -> tuple[int | None, int | None]:
    """Returns the first k that is as good as the deterministic pass, and the k from which on all are; None if none is.

    "As good" means that the error's mean over seeds exceeds the deterministic pass's by no more than one standard error
    of the difference, which is taken seed by seed.

    Args:
        errors: the Monte Carlo error for each seed and each k from 1; (seeds, samples).
        deterministic: the deterministic pass's error for each seed; (seeds,).
    """
    gap, spread = mean_and_error(np.asarray(errors) - np.asarray(deterministic)[:, None])
    good = gap <= spread + 1e-12  # the errors are fractions with rounding errors of their own
    if not good.any():
        return None, None
    worse = np.flatnonzero(~good)
    lasting = worse[-1] + 2 if len(worse) else 1
    return int(np.argmax(good)) + 1, int(lasting) if lasting <= len(good) else None


def catch_up_sentence(errors: ArrayLike, deterministic: ArrayLike) -> str:
    """Says at which k Monte Carlo averaging is as good as the deterministic pass, and whether that is near k = 50."""
    first, lasting = catch_up(errors, deterministic)
    seeds, samples = np.shape(errors)
    near = ("within one standard error of" if seeds > 1 else "down to") + " the deterministic pass's error"
    if first is None:
        verdict = (
            f"too few passes to contradict the published k near {PUBLISHED}"
            if samples < 2 * PUBLISHED
            else f"later than the published k near {PUBLISHED}, if at all"
        )
        passes = "one pass" if samples == 1 else f"{samples} passes"
        return f"Monte Carlo averaging does not come {near} in {passes}: {verdict}."
    start = f"Monte Carlo averaging first comes {near} at k = {first}"
    if lasting is None:
        return f"{start} but does not stay there up to k = {samples}: it has not caught up for good."
    stays = "and stays there" if lasting == first else f"and stays there from k = {lasting} on"
    if lasting < PUBLISHED / 2:
        verdict = f"earlier than the published k near {PUBLISHED}"
    elif lasting <= 2 * PUBLISHED:
        verdict = f"near the published k = {PUBLISHED} (within a factor of 2)"
    else:
        verdict = f"later than the published k near {PUBLISHED}"
    return f"{start} {stays}: {verdict}."


def difference_sentence(name: str, errors: ArrayLike, other: str, others: ArrayLike) -> str:
    """Says by how many percentage points of test error one method is above or below another, seed by seed."""
    gap, spread = mean_and_error(100 * (np.asarray(errors) - np.asarray(others)))
    size = f"{abs(gap):.2f}" + (f" ± {spread:.2f}" if np.size(errors) > 1 else "")
    if f"{abs(gap):.2f}" == "0.00":
        return f"{name} has the same test error as {other} ({size} percentage points apart)."
    return f"{name} has a test error {size} percentage points {'below' if gap < 0 else 'above'} {other}."


def conclusions(outcomes: Sequence[Outcome], labels: Tensor) -> list[str]:
    """Returns the conclusions of the run, a sentence for each question."""
    plain = [error(outcome.plain, labels) for outcome in outcomes]
    deterministic = [error(outcome.deterministic, labels) for outcome in outcomes]
    scheduled = [error(outcome.scheduled, labels) for outcome in outcomes]
    errors = np.stack([outcome.errors for outcome in outcomes])
    samples = errors.shape[1]
    last = f"Monte Carlo averaging over {samples} passes" if samples > 1 else "One Monte Carlo pass"
    return [
        difference_sentence("Dropout's deterministic pass", deterministic, "no dropout", plain),
        difference_sentence("Dropout on a schedule", scheduled, "dropout at fixed rates", deterministic),
        catch_up_sentence(errors, deterministic),
        difference_sentence(last, errors[:, -1], "the deterministic pass", deterministic),
    ]

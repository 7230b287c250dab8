"""Optuna as the driver of a search: it proposes settings, a batch at a time, and each batch is trained at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .._extras import optional
from ..core.checks import check_integer
from .result import SearchResult
from .settings import Setting


def optuna_search(
    study: Any,
    suggest: Callable[[Any], Setting],
    evaluate: Callable[[list[Setting]], SearchResult],
    *,
    trials: int,
    at_once: int = 10,
) -> list[SearchResult]:
    """Lets an Optuna study choose the settings, and tells it their mean scores.

    The study proposes a batch of trials, their settings are trained together, and the study is told all their scores.
    Within a batch the sampler does not have the others' scores, so a larger `at_once` makes each trial faster, but its
    proposal a little worse. A setting that diverges is reported to the study as a failed trial.

    Args:
        study: an ``optuna.Study`` that maximizes one value: ``optuna.create_study(direction="maximize")``.
        suggest: returns the setting of a trial, ``lambda trial: {"fc*": trial.suggest_float("fc", 0.3, 1.0)}``.
        evaluate: cross-validates settings, ``lambda settings: cross_validate(build, x, y, settings, epochs=50)``.
        trials: the number of trials.
        at_once: the number of trials in a batch.

    Returns:
        The results, batch by batch. The rest is in ``study.best_params`` and similar attributes.

    Raises:
        ImportError: Optuna is not installed.
        TypeError: `study` is no study.
        ValueError: it does not maximize one value, or a number is below 1.

    References:
        Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019.
    """
    optuna = optional("optuna", "tune")
    if not isinstance(study, optuna.Study):
        raise TypeError(f"study must be an optuna.Study, got {type(study).__name__}")
    if study.directions != [optuna.study.StudyDirection.MAXIMIZE]:
        raise ValueError(
            "study must maximize one value, since higher scores are better: optuna.create_study(direction='maximize'), "
            f"got {[direction.name for direction in study.directions]}"
        )
    check_integer("trials", trials, 1)
    check_integer("at_once", at_once, 1)
    results = []
    for first in range(0, trials, at_once):
        asked = [study.ask() for _ in range(min(at_once, trials - first))]
        try:
            results.append(evaluate([suggest(trial) for trial in asked]))
        except BaseException:
            for trial in asked:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        for trial, mean in zip(asked, results[-1].means.tolist(), strict=True):
            if math.isnan(mean):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, mean)
    return results

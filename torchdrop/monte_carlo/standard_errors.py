"""The choice of statistics that get a standard error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .groups import Derived
from .plain import Task

Errors = bool | str | Sequence[str]
"""The choice of standard errors: see `error_names`."""

DENSE = 2**14
"""The most elements of a row's output for which standard errors need not be asked for."""


def check_errors(errors: Errors, tasks: Iterable[Task]) -> None:
    """Checks a choice of standard errors.

    Raises:
        ValueError: another word, or a name that is no statistic of any of the tasks.
    """
    names = list(dict.fromkeys(name for task in tasks for name in task.statistics()))
    if errors == "auto" or isinstance(errors, bool):
        return
    if isinstance(errors, str) or not set(errors) <= set(names):
        raise ValueError(
            f"standard_errors must be 'auto', True, False, or some of the names {', '.join(names)}, got {errors!r}"
        )


def error_names(errors: Errors, task: Task, row_elements: int | None = None) -> tuple[str, ...]:
    """Returns the names of the statistics that get a standard error, in the task's order.

    Args:
        errors: True for all, False for none, names, or "auto" for all if a row's output has at most `DENSE` elements,
            and the mean's alone otherwise.
        task: the task whose statistics they are.
        row_elements: the number of elements of a row's output, where it is known.
    """
    names = tuple(task.statistics())
    if errors == "auto":
        return names if (row_elements or 0) <= DENSE else names[:1]
    if isinstance(errors, bool):
        return names if errors else ()
    return tuple(name for name in names if name in errors)


def needs_groups(task: Task, names: Sequence[str]) -> set[str]:
    """Returns the observables that must be kept by groups for the standard errors of these statistics."""
    several = (one for name, one in task.statistics().items() if name in names and isinstance(one, Derived))
    return {observable for one in several for observable in one.observables}

"""The result of a search: means and standard errors as a table and a plot, the best choice and the one-standard-error
choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from .._extras import BLUE, VERMILION, axes_or_new
from ..configure.rates import shown
from .settings import Setting


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The scores of every setting in every fold. It prints as a table, the best setting first.

    The standard error of a mean is ``sd / sqrt(K)`` over the K folds, as is usual. The folds' scores are not
    independent, since their training parts overlap, so it is too small rather than too large (Bengio and Grandvalet,
    JMLR 5, 2004).

    Args:
        settings: the settings as they were given.
        scores: float64, (settings, folds), higher is better; NaN where training diverged.
        mean_keep_probs: the mean of each setting over the model's layers that have a rate.
        at_once: the largest number of models that were trained at once; 1 if one after another.
        reason: the reason for one after another; "" if the user asked for it, or if it is not so.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.90, 0.92], [0.93, 0.97], [0.94, 0.95]])
        >>> found = SearchResult([{"0": 0.2}, {"0": 0.8}, {"0": 0.5}], scores, [0.2, 0.8, 0.5], 6)
        >>> found
        2 folds, 3 settings, up to 6 models trained at once
        keep_prob of '0'  mean   s.e.
        0.8               0.950  0.020  best
        0.5               0.945  0.005  one standard error
        0.2               0.910  0.010
        >>> found.best, found.one_standard_error
        ({'0': 0.8}, {'0': 0.5})
    """

    settings: Sequence[Setting]
    scores: Tensor
    mean_keep_probs: Sequence[float]
    at_once: int
    reason: str = ""

    @property
    def means(self) -> Tensor:
        """Each setting's mean over folds; NaN if one diverged."""
        return self.scores.mean(1)

    @property
    def standard_errors(self) -> Tensor:
        """The standard error of each setting's mean."""
        return self.scores.std(1) / math.sqrt(self.scores.shape[1])

    @property
    def order(self) -> list[int]:
        """The settings' numbers, the highest mean first, and those that diverged last; ties are in the order given."""
        means = self.means.tolist()
        return sorted(range(len(means)), key=lambda i: math.inf if math.isnan(means[i]) else -means[i])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Returns a plain dict for each setting, in the order given."""
        columns = {
            "setting": self.settings,
            "scores": self.scores.tolist(),
            "mean": self.means.tolist(),
            "standard_error": self.standard_errors.tolist(),
            "mean_keep_prob": self.mean_keep_probs,
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    @property
    def best(self) -> dict[str, Any]:
        """The setting with the highest mean, for `torchdrop.set_keep_prob`.

        Raises:
            ValueError: every setting diverged.
        """
        return dict(self.settings[self._best()])

    @property
    def one_standard_error(self) -> dict[str, Any]:
        """The most regularized setting that is not clearly worse than the best one.

        The settings whose mean is at least ``best mean - standard error of the best`` are compared, and the one
        with the lowest mean keep_prob over the model's layers is chosen; among equal ones the one with the higher mean.

        Raises:
            ValueError: every setting diverged.

        References:
            Breiman, Friedman, Olshen, Stone, "Classification and Regression Trees", 1984, p. 80; Hastie, Tibshirani,
            Friedman, "The Elements of Statistical Learning", 2nd edition, 2009, section 7.10.
        """
        return dict(self.settings[self._one_standard_error()])

    def _best(self) -> int:
        first = self.order[0]
        if math.isnan(self.means[first]):
            raise ValueError("every setting diverged: train with a smaller learning rate")
        return first

    def _one_standard_error(self) -> int:
        best = self._best()
        least = float(self.means[best] - self.standard_errors[best])
        means = self.means.tolist()
        within = [i for i, mean in enumerate(means) if mean >= least]
        return min(within, key=lambda i: (self.mean_keep_probs[i], -means[i]))

    def __repr__(self) -> str:
        folds, count = self.scores.shape[1], len(self.settings)
        how = f"up to {self.at_once} models trained at once" if self.at_once > 1 else "trained one after another"
        title = f"{folds} folds, {count} settings, {how}" + (f" ({self.reason})" if self.reason else "")
        patterns = list(dict.fromkeys(pattern for setting in self.settings for pattern in setting))
        heads = [f"{'keep_prob of ' if at == 0 else ''}{pattern!r}" for at, pattern in enumerate(patterns)]
        lines = [[*heads, "mean", "s.e.", ""]]
        errors = self.standard_errors.tolist()
        places = _places(errors)
        for i in self.order:
            values = [_value(self.settings[i].get(pattern, "")) for pattern in patterns]
            lines.append([*values, f"{float(self.means[i]):.{places}f}", f"{errors[i]:.{places}f}", self._mark(i)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return "\n".join([title, *table])

    def _mark(self, i: int) -> str:
        lost = int(self.scores[i].isnan().sum())
        if lost:
            return f"diverged in {lost} of {self.scores.shape[1]} folds"
        marks = {"best": self._best(), "one standard error": self._one_standard_error()}
        return ", ".join(name for name, index in marks.items() if index == i)

    def plot(self, ax: Any = None) -> Any:
        """Plots means with standard errors against keep_prob: the pattern's if there is one, else the layers' mean.

        Args:
            ax: the matplotlib Axes to draw on; new ones if None (``pip install 'torchdrop[tune]'``).

        Returns:
            The Axes.
        """
        ax = axes_or_new(ax, "tune")
        patterns = {pattern for setting in self.settings for pattern in setting}
        numbers = all(isinstance(value, (float, int)) for setting in self.settings for value in setting.values())
        shared = next(iter(patterns)) if len(patterns) == 1 and numbers else None
        at = (
            self.mean_keep_probs
            if shared is None
            else [float(cast(float, setting[shared])) for setting in self.settings]
        )
        means, errors = self.means, self.standard_errors
        ax.errorbar(at, means.numpy(), errors.numpy(), fmt="o", color=BLUE, markersize=4, capsize=2, linewidth=1)
        if not means.isnan().all():
            best, chosen = self._best(), self._one_standard_error()
            ax.axhline(
                float(means[best] - errors[best]), color="0.5", linestyle="--", linewidth=1, label="best - 1 s.e."
            )
            ax.plot(at[best], float(means[best]), "o", color=VERMILION, markersize=7, label="best")
            ax.plot(
                at[chosen], float(means[chosen]), "o", markersize=11, markerfacecolor="none", color="black",
                label="one standard error",
            )  # fmt: skip
            ax.legend(frameon=False, fontsize=8)
        ax.set(
            xlabel=f"keep_prob of {shared!r}" if shared is not None else "mean keep_prob of the layers",
            ylabel=f"score, mean of {self.scores.shape[1]} folds",
        )
        return ax


def _value(value: Any) -> str:
    return shown(value) if isinstance(value, (Tensor, float, int)) else str(value)


def _places(errors: Sequence[float]) -> int:
    """Returns enough decimals to show the smallest standard error with one digit, and two of most."""
    sizes = [error for error in errors if error > 0 and math.isfinite(error)]
    return min(8, max(3, 1 - math.floor(math.log10(sorted(sizes)[len(sizes) // 2])))) if sizes else 3

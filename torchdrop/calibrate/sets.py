"""Conformal sets of classes: the true class is in the set with probability at least 1 - alpha."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_integer
from ..monte_carlo.classes import normalized
from ..monte_carlo.moments import wide
from ..monte_carlo.task_predictions import ClassificationPrediction
from .conformal import Thresholds, check_alpha, check_groups, thresholds

METHODS = ("lac", "aps", "raps")


class SetCoverage(NamedTuple):
    """The share of rows whose set has the true class, and the mean size of sets."""

    coverage: float
    size: float


@dataclass(frozen=True, eq=False, repr=False)
class PredictionSets:
    """A set of classes for each row.

    Args:
        members: whether a class is in the set, of shape (B, C).
        probabilities: the probabilities that the sets were made from, of shape (B, C).

    Example:
        >>> sets = PredictionSets(torch.tensor([[True, True], [False, True]]), torch.tensor([[0.5, 0.5], [0.1, 0.9]]))
        >>> sets
        2 sets of 2 classes, of mean size 1.5 and sizes 1 to 2
        >>> sets.sizes, sets[0], sets.coverage(torch.tensor([0, 0]))
        (tensor([2, 1]), [0, 1], 0.5)
    """

    members: Tensor
    probabilities: Tensor

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, row: int) -> list[int]:
        """The classes in the set of a row."""
        return [int(label) for label in self.members[row].nonzero().squeeze(1)]

    def __repr__(self) -> str:
        text = f"{len(self)} sets of {self.members.shape[1]} classes"
        if not len(self):
            return text
        sizes = self.sizes
        return f"{text}, of mean size {wide(sizes).mean():.4g} and sizes {sizes.min()} to {sizes.max()}"

    @property
    def sizes(self) -> Tensor:
        """The number of classes in each set, of shape (B,)."""
        return self.members.sum(1)

    def contain(self, targets: Tensor) -> Tensor:
        """Returns whether the sets have these classes in them, of shape (B,).

        Raises:
            ValueError: targets that are not classes (B,), integers in [0, C).
        """
        return self.members.gather(1, check_classes(targets, self.members).unsqueeze(1)).squeeze(1)

    def coverage(self, targets: Tensor) -> float:
        """Returns the share of rows whose set has the true class in it; NaN without rows."""
        return float(wide(self.contain(targets)).mean())

    def coverage_of(self, groups: Tensor, targets: Tensor) -> dict[int, SetCoverage]:
        """Returns coverage and mean size by group, an integer for each row: by class, if these are the targets."""
        right, sizes = wide(self.contain(targets)), wide(self.sizes)
        groups = check_groups(groups, len(self)).to(right.device)
        return {
            int(name): SetCoverage(float(right[groups == name].mean()), float(sizes[groups == name].mean()))
            for name in groups.unique()
        }

    def never_empty(self) -> PredictionSets:
        """Returns the same with the most probable class in each set that has none. Coverage can only rise by it."""
        top = torch.zeros_like(self.members).scatter_(1, self.probabilities.argmax(1, keepdim=True), True)
        return PredictionSets(self.members | (top & ~self.members.any(1, keepdim=True)), self.probabilities)


@dataclass(frozen=True, eq=False, repr=False)
class ConformalSets:
    """The rule that makes a set of classes from a prediction: see `conformal_sets`, which fits it.

    Args:
        method: the name of the score.
        alpha: the probability of an error that is allowed.
        thresholds: the largest score of a class that is in a set, for all rows, for each group, or for each class.
        by_class: whether each class has its own threshold.
        classes: the number of classes.
        penalty, k_reg: the penalty of "raps".
        seed: the seed of the random numbers of "aps" and "raps"; None without.
    """

    method: str
    alpha: float
    thresholds: Thresholds
    by_class: bool
    classes: int
    penalty: float
    k_reg: int
    seed: int | None

    def __repr__(self) -> str:
        rows, names = self.thresholds.rows, self.thresholds.groups
        text = f"conformal sets by {self.method!r}, for a coverage of at least {1 - self.alpha:.4g}"
        if names is None:
            return f"{text}: threshold {self.thresholds.values.item():.4g} from {rows[0]} rows"
        kind = "class" if self.by_class else "group"
        values = self.thresholds.values.tolist()
        lines = [
            f"  {kind} {name}: threshold {value:.4g} from {n} rows"
            for name, value, n in zip(names.tolist(), values, rows, strict=True)
        ]
        return "\n".join([f"{text} in each {kind}:", *lines])

    def __call__(self, prediction: ClassificationPrediction | Tensor, groups: Tensor | None = None) -> PredictionSets:
        """Returns the set of each row.

        The random numbers of "aps" and "raps" depend on the seed and the row's place in this prediction alone, so that
        the same prediction gets the same sets.

        Args:
            prediction: a prediction, or probabilities (B, C), with the number of classes of the calibration set.
            groups: the group of each row, if the calibration set had groups.

        Raises:
            ValueError: another number of classes, or groups that do not fit.
        """
        rows = probabilities(prediction)
        if rows.shape[1] != self.classes:
            raise ValueError(f"prediction must have the calibration set's {self.classes} classes, got {rows.shape[1]}")
        scores = _scores(rows, self.method, self.penalty, self.k_reg, _uniform(len(rows), self.seed, "new rows"))
        if self.by_class:
            if groups is not None:
                raise ValueError("groups must not be given: the calibration set had by_class=True")
            limits = self.thresholds.values.unsqueeze(0)
        else:
            limits = self.thresholds.of(groups, len(rows)).unsqueeze(1)
        return PredictionSets(scores <= limits.to(scores.device), rows)


def conformal_sets(
    prediction: ClassificationPrediction | Tensor,
    targets: Tensor,
    alpha: float = 0.1,
    *,
    method: str = "aps",
    groups: Tensor | None = None,
    by_class: bool = False,
    randomized: bool = True,
    penalty: float = 0.1,
    k_reg: int = 1,
    seed: int = 0,
) -> ConformalSets:
    """Fits sets of classes that have the true class in them with probability at least 1 - alpha, whatever the model.

    A class y is in the set of a row if its score is at most the k-th smallest score of the n calibration rows at their
    true classes, ``k = ceil((n + 1)(1 - alpha))``. With p the probabilities, r(y) the rank of class y among them (1 for
    the most probable), and u uniform on [0, 1), one for each row, the scores are

    - "lac": ``1 - p_y``. The smallest sets on average, which may be too small for hard rows.
    - "aps": ``sum of p_c over all c more probable than y, + u p_y``. Larger sets for harder rows.
    - "raps": that of "aps" ``+ penalty max(0, r(y) - k_reg)``, which keeps the sets small.

    The guarantee is for a row like those of the calibration set (exchangeable with them), on average over calibration
    sets: at least 1 - alpha, and at most 1 - alpha + 1 / (n + 1) where no two scores are equal. The rows must not have
    been used for training, or for fitting anything else such as a temperature. Sets can be empty where the model is
    surer than its errors allow: see `PredictionSets.never_empty`.

    Args:
        prediction: the prediction of the calibration rows, with one output for each row, or probabilities (N, C).
        targets: their classes, integers (N,).
        alpha: the probability of an error that is allowed.
        method: "lac", "aps" or "raps".
        groups: integers (N,). Each group gets its own threshold, and the guarantee holds within it. `ConformalSets`
            then needs the group of each row, too.
        by_class: whether each class gets its own threshold, so that the guarantee holds for the rows of each class.
        randomized: whether "aps" and "raps" draw u. Without it u is 1, and sets are larger than they need to be.
        penalty: what "raps" adds for each rank beyond `k_reg`.
        k_reg: the rank up to which "raps" adds nothing.
        seed: the seed of u.

    Returns:
        A `ConformalSets`, which makes `PredictionSets` from other predictions of the same model.

    Raises:
        ValueError: too few rows for alpha, in all or in a group or class; probabilities, targets or groups that do not
            fit; an argument out of range.

    References:
        Sadinle, Lei, Wasserman, "Least Ambiguous Set-Valued Classifiers with Bounded Error Levels", JASA 114, 2019
        ("lac"). Romano, Sesia, Candes, "Classification with Valid and Adaptive Coverage", NeurIPS 2020 ("aps").
        Angelopoulos, Bates, Malik, Jordan, "Uncertainty Sets for Image Classifiers using Conformal Prediction", ICLR
        2021 ("raps"). Vovk, "Conditional Validity of Inductive Conformal Predictors", 2012 (groups and classes).

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3)).eval()
        >>> x, y = torch.randn(300, 4), torch.randint(3, (300,))
        >>> result = torchdrop.mc_predict(model, x, samples=20, task="classification", seed=0)
        >>> sets = torchdrop.calibrate.conformal_sets(result, y, alpha=0.1)
        >>> new = torchdrop.mc_predict(model, torch.randn(5, 4), samples=20, task="classification", seed=0)
        >>> sets(new).members.shape
        torch.Size([5, 3])
    """
    alpha = check_alpha(alpha)
    if method not in METHODS:
        raise ValueError(f"method must be {', '.join(map(repr, METHODS))}, got {method!r}")
    if not penalty >= 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    check_integer("k_reg", k_reg, least=0)
    if by_class and groups is not None:
        raise ValueError("groups must not be given with by_class=True, whose groups are the classes")
    rows = probabilities(prediction)
    classes = check_classes(targets, rows)
    own_seed = check_integer("seed", seed, least=0) if randomized and method != "lac" else None
    scores = _scores(rows, method, penalty, k_reg, _uniform(len(rows), own_seed, "calibration"))
    if by_class:
        absent = set(range(rows.shape[1])) - set(classes.tolist())
        if absent:
            raise ValueError(f"targets must have rows of each class for by_class=True, got none of class {min(absent)}")
    limits = thresholds(scores.gather(1, classes.unsqueeze(1)).squeeze(1), alpha, classes if by_class else groups)
    return ConformalSets(method, alpha, limits, by_class, rows.shape[1], penalty, k_reg, own_seed)


def probabilities(prediction: Any) -> Tensor:
    """Returns the probabilities (B, C) of a prediction in float64, as they are: rows may miss a sum of 1 by rounding.

    Raises:
        TypeError: it is no classification.
        ValueError: it has several outputs for each row, or numbers that are no probabilities.

    Example:
        >>> probabilities(torch.tensor([[0.25, 0.75]]))
        tensor([[0.2500, 0.7500]], dtype=torch.float64)
    """
    if isinstance(prediction, ClassificationPrediction):
        if prediction.valid is not None:
            raise ValueError("prediction must report all places: take those rows alone that are wanted, without valid=")
        values = prediction.mean
    elif isinstance(prediction, Tensor):
        values = prediction.detach()
    else:
        raise TypeError(
            "prediction must be a ClassificationPrediction (task='classification') or probabilities (B, C), got "
            f"{type(prediction).__name__}"
        )
    if values.dim() != 2 or not values.is_floating_point():
        raise ValueError(
            "prediction must have one output for each row, of shape (B, C), as places within a row are not "
            f"exchangeable with each other, got {values.dtype} of shape {tuple(values.shape)}"
        )
    if not normalized(values, 1):
        raise ValueError("prediction must hold probabilities, in [0, 1] and with sum 1 over the classes")
    return wide(values)


def check_classes(targets: Any, of: Tensor) -> Tensor:
    """Returns classes as int64 on the device of predictions (B, C).

    Raises:
        ValueError: they are not of shape (B,), not of an integer dtype, or out of [0, C).

    Example:
        >>> check_classes(torch.tensor([1]), torch.ones(1, 2))
        tensor([1])
    """
    rows, classes = of.shape
    if not isinstance(targets, Tensor) or targets.shape != (rows,):
        got = f"shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be a tensor of classes of shape ({rows},), one for each row, got {got}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be classes, of an integer dtype, got {targets.dtype}")
    if rows and not (targets.min() >= 0 and targets.max() < classes):
        raise ValueError(f"targets must be in [0, {classes}), got {targets.min()} to {targets.max()}")
    return targets.to(of.device, torch.int64)


def _scores(rows: Tensor, method: str, penalty: float, k_reg: int, u: Tensor) -> Tensor:
    """Returns the score of each class, (B, C). Equal probabilities are ranked in the order of their classes."""
    if method == "lac":
        return 1 - rows
    ordered, order = rows.sort(dim=1, descending=True, stable=True)
    scores = ordered.cumsum(1) - ordered + u.to(rows.device, rows.dtype).unsqueeze(1) * ordered
    if method == "raps":
        ranks = torch.arange(1, rows.shape[1] + 1, device=rows.device)
        scores = scores + penalty * (ranks - k_reg).clamp_min(0)
    return torch.empty_like(scores).scatter_(1, order, scores)


def _uniform(rows: int, seed: int | None, purpose: str) -> Tensor:
    """Returns u for each row; calibration rows and new rows have different ones, as they must be independent."""
    if seed is None:
        return torch.ones(rows, dtype=torch.float64)
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {purpose}").getrandbits(63))
    return torch.rand(rows, dtype=torch.float64, generator=generator)

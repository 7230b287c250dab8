"""Scores of a segmentation and of its regions, from the label maps of Monte Carlo samples: `region_scores`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check_integer
from .moments import wide
from .task_predictions import IGNORED, ClassificationPrediction

_ELEMENTS = 2**24
"""The most elements of a class's masks at a time. So many ones are also the most that float32 adds up exactly."""


@dataclass(frozen=True, eq=False, repr=False)
class RegionScores:
    """Scores of B images, and of the regions of C classes in each. A region that no sample has is NaN.

    Args:
        volume: the mean number of pixels or voxels of each class over the samples, of shape (B, C).
        volume_std: its standard deviation over the samples; NaN with one sample.
        coefficient_of_variation: their ratio, the volume's relative uncertainty.
        pairwise_dice: the mean Dice coefficient of a class over pairs of different samples; NaN with one sample. It
            is 1 where all agree.
        iou: the intersection over union of all samples.
        region_uncertainty: the mean uncertainty of the pixels that are predicted as the class; NaN if there are none.
        uncertainty: the mean uncertainty of all pixels, of shape (B,).
        foreground_uncertainty: that of all pixels that are not predicted as background; NaN if there are none, or if
            no class is the background.
        background: the class that is the background; None if none is.
    """

    volume: Tensor
    volume_std: Tensor
    coefficient_of_variation: Tensor
    pairwise_dice: Tensor
    iou: Tensor
    region_uncertainty: Tensor
    uncertainty: Tensor
    foreground_uncertainty: Tensor
    background: int | None = None

    def __repr__(self) -> str:
        lines = [f"RegionScores of {len(self.volume)} images and {self.volume.shape[1]} classes"]
        lines.append(f"{'image':>5}{'class':>7}{'volume':>11}{'CV':>9}{'Dice':>8}{'IoU':>8}{'uncertainty':>13}")
        for image in range(len(self.volume)):
            for number in self.volume[image].nonzero().flatten().tolist():
                columns = (self.coefficient_of_variation, self.pairwise_dice, self.iou, self.region_uncertainty)
                cv, dice, iou, uncertainty = (float(column[image, number]) for column in columns)
                name = f"{number} b" if number == self.background else f"{number}  "
                volume = float(self.volume[image, number])
                lines.append(f"{image:>5}{name:>7}{volume:>11.1f}{cv:>9.3f}{dice:>8.3f}{iou:>8.3f}{uncertainty:>13.4g}")
        return "\n".join(lines)


def region_scores(
    prediction: ClassificationPrediction, *, uncertainty: str = "predictive_entropy", background: int | None = 0
) -> RegionScores:
    """Returns how uncertain a segmentation is, as a whole and by region, to sort out images whose segmentation is bad.

    Let ``S_t`` be the pixels that sample t gives to a class, by the largest probability. The scores of the class are
    the coefficient of variation of the volumes ``|S_t|``, the mean of ``2 |S_i and S_j| / (|S_i| + |S_j|)`` over
    pairs of samples, ``|S_1 and ... and S_T| / |S_1 or ... or S_T|``, and the mean of the uncertainty where the class
    has the largest mean probability. Pixels that the prediction does not report are left out.

    Predict with ``masks="shared"`` or independent masks as you like: no score compares two images.

    Args:
        prediction: classes of pixels or voxels, of shape (B, C, ...), with ``keep_samples=True``.
        uncertainty: the statistic that is averaged: "predictive_entropy", "mutual_information", "expected_entropy" or
            "variation_ratio".
        background: the class that is not foreground; None if all are.

    Raises:
        TypeError: a prediction of another kind.
        ValueError: samples that were not kept, outputs without pixels, another statistic, or a background that is no
            class.

    References:
        Roy, Conjeti, Navab, Wachinger, "Inherent Brain Segmentation Quality Control from Fully ConvNet Monte Carlo
        Sampling", MICCAI 2018, and "Bayesian QuickNAT: Model uncertainty in deep whole-brain segmentation for
        structure-wise quality control", NeuroImage 195, 2019 (structure-wise measures).

    Example:
        >>> import torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Dropout2d(0.5), torch.nn.Conv2d(8, 2, 1))
        >>> images = torch.randn(3, 1, 16, 16)
        >>> maps = torchdrop.mc_predict(model, images, 10, task="classification", keep_samples=True, seed=0)
        >>> scores = region_scores(maps)
        >>> scores.pairwise_dice.shape, scores.foreground_uncertainty.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """
    values = checked_uncertainty(prediction, uncertainty)
    if prediction.samples is None:
        raise ValueError("scores of regions need the samples, which were not kept: predict with keep_samples=True")
    classes = prediction.mean.shape[prediction.class_dim]
    if background is not None and not 0 <= check_integer("background", background) < classes:
        raise ValueError(f"background must be a class in [0, {classes}) or None, got {background}")
    labels = prediction.samples.argmax(prediction.class_dim + 1)
    if prediction.valid is not None:
        labels = labels.where(prediction.valid, IGNORED)
    volumes, dice, iou = (
        torch.stack(columns, -1) for columns in zip(*(_agreement(labels == c) for c in range(classes)), strict=True)
    )
    mean = volumes.mean(0)
    std = volumes.std(0) if len(volumes) > 1 else torch.full_like(mean, torch.nan)
    predicted = prediction.predicted.flatten(1)
    regions = torch.stack([_mean_where(values, predicted == c) for c in range(classes)], 1)
    shown = predicted != IGNORED
    foreground = shown & (predicted != background) if background is not None else shown & False
    dtype = prediction.mean.dtype
    return RegionScores(
        volume=mean.to(dtype),
        volume_std=std.to(dtype),
        coefficient_of_variation=(std / mean).to(dtype),
        pairwise_dice=dice.to(dtype),
        iou=iou.to(dtype),
        region_uncertainty=regions.to(dtype),
        uncertainty=_mean_where(values, shown).to(dtype),
        foreground_uncertainty=_mean_where(values, foreground).to(dtype),
        background=background,
    )


def checked_uncertainty(prediction: ClassificationPrediction, uncertainty: str) -> Tensor:
    """Returns a statistic of the uncertainty about classes of pixels, of shape (B, N).

    Raises:
        TypeError: a prediction of another kind.
        ValueError: another statistic, or outputs without pixels.
    """
    if not isinstance(prediction, ClassificationPrediction):
        raise TypeError(
            f"prediction must be a ClassificationPrediction, got {type(prediction).__name__}: say task='classification'"
        )
    known = ("predictive_entropy", "mutual_information", "expected_entropy", "variation_ratio")
    if uncertainty not in known:
        raise ValueError(f"uncertainty must be one of {', '.join(map(repr, known))}, got {uncertainty!r}")
    if prediction.mean.dim() < 3:
        raise ValueError(
            f"prediction must be of pixels or voxels, (B, C, ...), got shape {tuple(prediction.mean.shape)}"
        )
    found: Tensor = getattr(prediction, uncertainty)
    return wide(found).flatten(1)


def _agreement(inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns for one class, from its pixels (T, B, ...): volumes (T, B), mean pairwise Dice and IoU of all, (B,)."""
    inside = inside.flatten(2)
    count = len(inside)
    volumes = wide(inside.sum(2))
    both = torch.zeros(inside.shape[1], count, count, dtype=volumes.dtype, device=inside.device)
    for part in inside.split(max(1, _ELEMENTS // max(1, inside.shape[1] * count)), 2):
        ones = part.movedim(0, 1).to(torch.float32)
        both += ones @ ones.mT
    sums = volumes.T.unsqueeze(1) + volumes.T.unsqueeze(2)
    dice = torch.where(sums > 0, 2 * both / sums, 1.0)  # two samples without the class agree
    pairs = dice.sum((1, 2)) - dice.diagonal(dim1=1, dim2=2).sum(1)
    found = inside.any(0).sum(1)
    mean_dice = pairs / (count * (count - 1)) if count > 1 else torch.full_like(pairs, torch.nan)
    return volumes, mean_dice.where(found > 0, torch.nan), wide(inside.all(0).sum(1)) / found


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Returns the mean of values (B, N) at places of each row; NaN where there are none."""
    return values.where(chosen, 0.0).sum(1) / chosen.sum(1)

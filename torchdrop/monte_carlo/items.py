"""Outputs that are sets of items, such as detected objects, whose number differs between samples: `mc_items`.

The mean of such outputs is not defined until it is said which items of two samples are one. Here items of different
samples are gathered into groups, and the averages are taken over a group's members. So each of them is an average given
that the item is seen, and how often it is seen is a number of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check_integer
from .context import mc_dropout
from .merging import Affinity, Items, Observations, iou, merge_items


def mc_items(
    model: nn.Module,
    inputs: Any,
    samples: int = 20,
    *,
    items: Callable[[Any], Sequence[Items]],
    affinity: Affinity = iou,
    threshold: float = 0.5,
    least: float = 0.0,
    seed: int | None = None,
    masks: str = "independent",
    sources: str | Sequence[str] | None = None,
    batch_dim: int | None = 0,
) -> list[Observations]:
    """Returns the items that a model finds under Monte Carlo dropout, gathered over T samples: see `merge_items`.

    Args:
        model: the model, in train or eval mode.
        inputs: a tensor, a tuple (positional arguments; ``(images,)`` for a list of images) or a mapping (named
            arguments).
        samples: T.
        items: takes the items out of what the model returns, for each image: see `from_scores` for boxes with a score
            and label.
        affinity, threshold, least: see `merge_items`.
        seed, masks, sources, batch_dim: see `mc_dropout`.

    Returns:
        The observations of each image.

    Raises:
        ValueError: another number of images in some sample, or as `merge_items` and `mc_dropout`.
        TypeError: `items` does not return a sequence of `Items`.

    Example:
        >>> class Detector(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.drop = nn.Dropout(0.1)
        ...     def forward(self, boxes):  # (B, N, 4)
        ...         return [(b, b[:, 2] / 9, torch.tensor([1, 2])) for b in self.drop(boxes)]
        >>> boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [3.0, 3.0, 8.0, 8.0]]])
        >>> (found,) = mc_items(Detector(), boxes, 20, items=lambda y: [from_scores(*one, 3) for one in y], seed=0)
        >>> bool(found.frequency[0] > 0.5), found.probabilities.shape[1]
        (True, 4)
    """
    check_integer("samples", samples, least=1)
    args, named = (
        ((), inputs) if isinstance(inputs, Mapping) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    images: list[list[Items]] = []
    with torch.no_grad(), mc_dropout(model, seed=seed, masks=masks, sources=sources, batch_dim=batch_dim):
        for number in range(samples):
            found = list(items(model(*args, **named)))
            if number and len(found) != len(images):
                raise ValueError(f"items must return as many sets in each sample, got {len(found)} after {len(images)}")
            images = images or [[] for _ in found]
            for image, one in zip(images, found, strict=True):
                image.append(one)
    return [merge_items(image, affinity=affinity, threshold=threshold, least=least) for image in images]


def from_scores(boxes: Tensor, scores: Tensor, labels: Tensor, classes: int) -> Items:
    """Returns items whose class is known by its label and score alone, as detectors of torchvision return them.

    The label has the probability of the score. The rest belongs to a class of its own, the last one, "none or another".

    Args:
        boxes: values of shape (N, D).
        scores: the probability of the label, (N,).
        labels: integers in [0, classes), (N,).
        classes: the number of classes without the last one.

    Example:
        >>> from_scores(torch.zeros(1, 4), torch.tensor([0.75]), torch.tensor([1]), 2).probabilities
        tensor([[0.0000, 0.7500, 0.2500]])
    """
    check_integer("classes", classes, least=1)
    if scores.shape != boxes.shape[:1] or labels.shape != boxes.shape[:1]:
        raise ValueError(
            f"boxes, scores and labels must be as many, got {tuple(boxes.shape)}, {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(f"labels must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")
    probabilities = scores.new_zeros(len(scores), classes + 1)
    probabilities[:, -1] = 1 - scores
    return Items(boxes, probabilities.scatter(1, labels.long().unsqueeze(1), scores.unsqueeze(1)))

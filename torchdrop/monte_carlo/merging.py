"""Items that samples have found, such as objects in an image, gathered into groups: `merge_items`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_finite, check_probability
from .moments import wide


class Items(NamedTuple):
    """The items that one sample has found in one image or other input."""

    values: Tensor
    """Numbers that describe each, as the corners (x1, y1, x2, y2) of its box, of shape (N, D)."""
    probabilities: Tensor
    """The probabilities of its classes, of shape (N, C)."""


Affinity = Callable[[Items, Items], Tensor]
"""A function of N and M items with their affinities (N, M), larger for more alike, symmetric."""


@dataclass(frozen=True, eq=False, repr=False)
class Observations:
    """The groups of items that T samples have found in one input, in the order of their frequencies, the largest first.

    Args:
        frequency: the share of samples that have found the item, of shape (G,). Their sum is the mean number of items.
        mean: the mean of its values over these samples, (G, D).
        covariance: their unbiased covariance, (G, D, D); NaN where one sample has found it.
        probabilities: the mean probabilities of its classes, (G, C).
        predictive_entropy: the entropy of these, all of the uncertainty about the class of an item that is there, in
            nats, (G,).
        expected_entropy: the mean entropy of a sample's probabilities.
        mutual_information: their difference.
        members: for each group the pairs (sample, number of the item in it), (M, 2).
        num_samples: T.
    """

    frequency: Tensor
    mean: Tensor
    covariance: Tensor
    probabilities: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    members: list[Tensor]
    num_samples: int

    @property
    def std(self) -> Tensor:
        """The standard deviation of each value, of shape (G, D)."""
        return self.covariance.diagonal(dim1=1, dim2=2).sqrt()

    @property
    def label(self) -> Tensor:
        """The class of the largest mean probability, (G,)."""
        return (
            self.probabilities.argmax(1)
            if self.probabilities.shape[1]
            else self.frequency.new_zeros(len(self), dtype=torch.int64)
        )

    def __len__(self) -> int:
        return len(self.frequency)

    def __repr__(self) -> str:
        lines = [f"Observations of {len(self)} items in {self.num_samples} samples"]
        if len(self):
            lines.append(f"{'seen':>8}{'class':>7}{'p':>7}{'entropy':>9}{'largest std':>13}   mean")
        for frequency, label, p, entropy, std, mean in zip(
            self.frequency, self.label, self.probabilities, self.predictive_entropy, self.std, self.mean, strict=True
        ):
            values = ", ".join(f"{value:.4g}" for value in mean[:6].tolist()) + (", ..." if len(mean) > 6 else "")
            lines.append(f"{frequency:>8.2f}{label:>7}{p[label]:>7.2f}{entropy:>9.3f}{std.max():>13.4g}   {values}")
        return "\n".join(lines)


def iou(first: Items, second: Items) -> Tensor:
    """Returns the intersection over union of boxes with corners (x1, y1, x2, y2), of shape (N, M); 0 for empty ones.

    Example:
        >>> box, other = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]])
        >>> iou(Items(box, torch.ones(1, 1)), Items(other, torch.ones(1, 1)))
        tensor([[0.3333]])
    """
    for boxes in (first.values, second.values):
        if boxes.shape[1] != 4:
            raise ValueError(
                f"boxes must have 4 corners (x1, y1, x2, y2), got {boxes.shape[1]} values: give an affinity= for others"
            )
    a, b = first.values.unsqueeze(1), second.values.unsqueeze(0)
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0)
    shared = sides.prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1) for boxes in (a, b)]
    union = areas[0] + areas[1] - shared
    return torch.where(union > 0, shared / union, 0.0)


def merge_items(
    samples: Sequence[Items], *, affinity: Affinity = iou, threshold: float = 0.5, least: float = 0.0
) -> Observations:
    """Gathers the items of several samples into groups, each one thing that was found again and again.

    At first each item is a group. The two groups of the largest mean affinity between their items are joined as long
    as it is `threshold` at least, except groups that have items of one sample: an object is found once a sample. This
    is clustering by average linkage with that constraint, so the result does not depend on the order of the samples
    or items, but for ties.

    Args:
        samples: the items of each sample, all with the same numbers of values and classes. A sample may have none.
        affinity: a function of two sets of items with their affinities; the intersection over union of boxes by
            default.
        threshold: the least mean affinity of groups that are joined.
        least: the least share of samples of a group that is returned.

    Raises:
        TypeError: samples that are no `Items`.
        ValueError: no samples, shapes that do not fit, probabilities that are negative or sum to more than 1, values
            or affinities that are not finite, or a share out of range.

    References:
        Miller, Nicholson, Dayoub, Suenderhauf, "Dropout Sampling for Robust Object Detection in Open-Set Conditions",
        ICRA 2018 (groups of overlapping boxes, their mean box and classes). Miller, Dayoub, Milford, Suenderhauf,
        "Evaluating Merging Strategies for Sampling-based Uncertainty Techniques in Object Detection", ICRA 2019, which
        compares affinities and clusterings; others than this one. Sokal and Michener, "A Statistical Method for
        Evaluating Systematic Relationships", 1958 (average linkage).

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [9.0, 9.0, 10.0, 10.0]])
        >>> one = Items(boxes, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        >>> two = Items(torch.tensor([[0.0, 0.0, 2.0, 3.0]]), torch.tensor([[1.0, 0.0]]))
        >>> found = merge_items([one, two])
        >>> found.frequency, found.mean[0], found.probabilities[0]
        (tensor([1.0000, 0.5000]), tensor([0.0000, 0.0000, 2.0000, 2.5000]), tensor([0.7500, 0.2500]))
    """
    _check_items(samples)
    check_probability("least", least)
    check_finite("threshold", threshold)
    every = Items(torch.cat([one.values for one in samples]), torch.cat([one.probabilities for one in samples]))
    sizes = torch.tensor([len(one.values) for one in samples])
    sample = torch.arange(len(samples)).repeat_interleave(sizes)
    number = torch.cat([torch.arange(size) for size in sizes.tolist()])
    table = affinity(every, every) if len(sample) else torch.zeros(0, 0)
    if (
        table.shape != (len(sample), len(sample))
        or not bool(table.isfinite().all())
        or not torch.allclose(table, table.T, atol=1e-5)
    ):
        raise ValueError(
            f"affinity must return finite, symmetric numbers of shape {(len(sample),) * 2}, got {tuple(table.shape)}"
        )
    groups = _groups(wide(table.detach().cpu()), sample, threshold)
    pairs = torch.stack([sample, number], 1)
    groups = [group for group in groups if len(group) >= least * len(samples)]
    groups.sort(key=lambda group: (-len(group), pairs[group[0]].tolist()))
    return _observed(every, groups, pairs, len(samples))


def _groups(table: Tensor, sample: Tensor, threshold: float) -> list[list[int]]:
    """Returns the groups, as numbers of items, of average linkage where no group has two items of one sample."""
    linkage = table.masked_fill(sample.unsqueeze(0) == sample.unsqueeze(1), -torch.inf)
    near = linkage >= threshold
    # A mean that reaches the threshold has a pair that does, so groups lie within the connected parts of these pairs.
    part = torch.arange(len(sample))
    while len(part):
        least = torch.where(near, part, len(part)).amin(1).minimum(part)
        if torch.equal(least, part):
            break
        part = least
    chosen = [(part == number).nonzero().flatten() for number in part.unique().tolist()]
    return [one[group].tolist() for one in chosen for group in _linked(linkage[one][:, one], threshold)]


def _linked(linkage: Tensor, threshold: float) -> list[list[int]]:
    """Returns the groups of average linkage. Items whose affinity is minus infinity are never in one group."""
    members = {item: [item] for item in range(len(linkage))}
    size = torch.ones(len(linkage), dtype=linkage.dtype)
    best, other = linkage.max(1)
    while len(members) > 1:
        keep = int(best.argmax())
        gone = int(other[keep])
        if best[keep] < threshold:
            break
        # The mean affinity to the whole is the weighted mean of those to its parts, and forbidden where one of them is.
        row = (size[keep] * linkage[keep] + size[gone] * linkage[gone]) / (size[keep] + size[gone])
        linkage[keep], linkage[:, keep] = row, row
        linkage[gone], linkage[:, gone] = -torch.inf, -torch.inf
        linkage[keep, keep] = -torch.inf
        size[keep] += size[gone]
        members[keep] += members.pop(gone)
        # That mean exceeds neither, so other rows keep their best partner.
        changed = ((other == keep) | (other == gone)).nonzero().flatten()
        changed = torch.cat([changed, torch.tensor([keep, gone])]).unique()
        best[changed], other[changed] = linkage[changed].max(1)
    return [sorted(group) for group in members.values()]


def _observed(every: Items, groups: Sequence[Sequence[int]], pairs: Tensor, count: int) -> Observations:
    """Returns the averages over the members of each group."""
    device = every.values.device
    group = torch.tensor([number for number, one in enumerate(groups) for _ in one], device=device, dtype=torch.int64)
    chosen = torch.tensor([item for one in groups for item in one], device=device, dtype=torch.int64)
    sizes = wide(torch.tensor([len(one) for one in groups], device=device)).unsqueeze(1)

    def mean(values: Tensor) -> Tensor:
        return values.new_zeros(len(groups), values.shape[1]).index_add(0, group, values) / sizes

    values, probabilities = wide(every.values.detach())[chosen], wide(every.probabilities.detach())[chosen]
    center, classes = mean(values), mean(probabilities)
    apart = values - center[group]
    products = (apart.unsqueeze(2) * apart.unsqueeze(1)).flatten(1)
    covariance = (mean(products) * sizes / (sizes - 1)).view(len(groups), *apart.shape[1:], -1) if len(groups) else None
    dims = values.shape[1]
    covariance = values.new_zeros(0, dims, dims) if covariance is None else covariance
    entropy = torch.special.entr(classes).sum(1)
    expected = mean(torch.special.entr(probabilities).sum(1, keepdim=True)).squeeze(1)
    dtype = every.values.dtype if every.values.is_floating_point() else torch.get_default_dtype()
    return Observations(
        frequency=(sizes.squeeze(1) / count).to(dtype),
        mean=center.to(dtype),
        covariance=covariance.to(dtype),
        probabilities=classes.to(dtype),
        predictive_entropy=entropy.to(dtype),
        expected_entropy=expected.to(dtype),
        mutual_information=(entropy - expected).clamp_min(0).to(dtype),
        members=[pairs[list(one)] for one in groups],
        num_samples=count,
    )


def _check_items(samples: Sequence[Items]) -> None:
    if not samples:
        raise ValueError("samples must hold the items of at least one, got none")
    for one in samples:
        if not isinstance(one, Items):
            raise TypeError(
                f"samples must be Items, got {type(one).__name__}: make them by Items(boxes, probabilities)"
            )
        values, p = one
        if values.dim() != 2 or p.dim() != 2 or len(values) != len(p) or not p.is_floating_point():
            raise ValueError(
                f"items must have values (N, D) and probabilities (N, C), got {tuple(values.shape)} and "
                f"{tuple(p.shape)} of {p.dtype}"
            )
        if (values.shape[1], p.shape[1]) != (samples[0].values.shape[1], samples[0].probabilities.shape[1]):
            raise ValueError("items must have as many values and classes in each sample")
        if not bool(values.isfinite().all()):
            raise ValueError("values of items must be finite")
        if not bool((p >= 0).all() & (p.sum(1) <= 1 + 1e-4).all()):
            raise ValueError("probabilities of items must not be negative, nor sum to more than 1")

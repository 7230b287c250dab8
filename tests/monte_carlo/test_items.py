"""Items of many samples, gathered into groups: against an exhaustive clustering, and what it must not depend on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchdrop.monte_carlo import Items, Observations, from_scores, mc_items, merge_items
from torchdrop.monte_carlo.merging import iou


def boxes(samples: int = 6, objects: int = 4, seen: float = 0.7) -> list[Items]:
    """Noisy boxes of a few objects, some of which overlap, each found in some samples."""
    centers = torch.rand(objects, 2).double() * 12
    found = []
    for _ in range(samples):
        chosen = (torch.rand(objects) < seen).nonzero().flatten()
        corner = centers[chosen] + 0.6 * torch.randn(len(chosen), 2).double()
        size = 4 + 0.5 * torch.randn(len(chosen), 2).double()
        found.append(Items(torch.cat([corner, corner + size], 1), torch.randn(len(chosen), 3).double().softmax(1)))
    return found


def brute(samples: Sequence[Items], threshold: float) -> set[frozenset[tuple[int, int]]]:
    """The groups of average linkage: all pairs of groups are compared, from scratch, at each step."""
    groups = [[(t, n)] for t, one in enumerate(samples) for n in range(len(one.values))]

    def overlap(a: tuple[int, int], b: tuple[int, int]) -> float:
        x, y = samples[a[0]].values[a[1]].tolist(), samples[b[0]].values[b[1]].tolist()
        width, height = min(x[2], y[2]) - max(x[0], y[0]), min(x[3], y[3]) - max(x[1], y[1])
        shared = max(width, 0) * max(height, 0)
        return shared / ((x[2] - x[0]) * (x[3] - x[1]) + (y[2] - y[0]) * (y[3] - y[1]) - shared)

    while True:
        best, pair = threshold, None
        for a, b in itertools.combinations(groups, 2):
            if {t for t, _ in a} & {t for t, _ in b}:
                continue
            mean = sum(overlap(x, y) for x in a for y in b) / (len(a) * len(b))
            if mean >= best:
                best, pair = mean, (a, b)
        if pair is None:
            return {frozenset(group) for group in groups}
        groups = [group for group in groups if group is not pair[0] and group is not pair[1]] + [pair[0] + pair[1]]


def members(found: Observations) -> set[frozenset[tuple[int, int]]]:
    return {frozenset(map(tuple, one.tolist())) for one in found.members}


class TestMerging:
    @pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
    def test_groups_are_those_of_average_linkage(self, threshold: float) -> None:
        sizes = set()
        for _ in range(8):
            samples = boxes()
            found = merge_items(samples, threshold=threshold)
            assert members(found) == brute(samples, threshold)
            sizes |= {len(group) for group in found.members}
        assert len(sizes) > 1

    def test_averages_are_those_of_the_members(self) -> None:
        samples = boxes()
        found = merge_items(samples)
        assert found.num_samples == 6
        several = 0
        for group, frequency, mean, covariance, p, total, expected, information in zip(
            found.members, found.frequency, found.mean, found.covariance, found.probabilities,
            found.predictive_entropy, found.expected_entropy, found.mutual_information, strict=True,
        ):  # fmt: skip
            values = torch.stack([samples[t].values[n] for t, n in group.tolist()])
            classes = torch.stack([samples[t].probabilities[n] for t, n in group.tolist()])
            assert len({t for t, _ in group.tolist()}) == len(group)
            assert float(frequency) == len(group) / 6
            torch.testing.assert_close(mean, values.mean(0))
            torch.testing.assert_close(p, classes.mean(0))
            torch.testing.assert_close(total, torch.special.entr(classes.mean(0)).sum())
            torch.testing.assert_close(expected, torch.special.entr(classes).sum(1).mean())
            torch.testing.assert_close(information, total - expected)
            if len(group) > 1:
                torch.testing.assert_close(covariance, values.T.cov())
                several += 1
            else:
                assert covariance.isnan().all()
        assert several > 1
        torch.testing.assert_close(found.std, found.covariance.diagonal(dim1=1, dim2=2).sqrt(), equal_nan=True)
        assert float(found.frequency.sum()) == pytest.approx(sum(len(one.values) for one in samples) / 6)
        assert (found.frequency.diff() <= 0).all()

    def test_known_answers(self) -> None:
        """Boxes whose overlap is 2/3, and one that overlaps with none."""
        one = Items(torch.tensor([[0.0, 0, 2, 2], [9, 9, 10, 10]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        two = Items(torch.tensor([[0.0, 0, 2, 3]]), torch.tensor([[1.0, 0.0]]))
        found = merge_items([one, two], threshold=0.6)
        assert found.frequency.tolist() == [1.0, 0.5]
        assert found.mean.tolist() == [[0, 0, 2, 2.5], [9, 9, 10, 10]]
        assert found.std[0].tolist() == pytest.approx([0, 0, 0, 0.5**0.5])
        assert found.label.tolist() == [0, 0]
        assert len(merge_items([one, two], threshold=0.7)) == 3
        assert "2 items in 2 samples" in repr(found)
        assert len(merge_items([one, two], threshold=0.6, least=0.75)) == 1

    def test_an_object_is_found_once_in_a_sample(self) -> None:
        twice = Items(torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]]), torch.ones(2, 1))
        assert merge_items([twice]).frequency.tolist() == [1, 1]
        assert merge_items([twice, twice]).frequency.tolist() == [1, 1]

    def test_the_order_of_samples_and_items_does_not_matter(self) -> None:
        samples = boxes()
        order = torch.randperm(6).tolist()
        inner = [torch.randperm(len(one.values)) for one in samples]
        mixed = [Items(samples[t].values[inner[t]], samples[t].probabilities[inner[t]]) for t in order]
        first, second = merge_items(samples), merge_items(mixed)
        assert members(first) == {
            frozenset((order[t], int(inner[order[t]][n])) for t, n in one.tolist()) for one in second.members
        }

    def test_another_affinity(self) -> None:
        """Points on a line, which belong together if they are less than 1 apart."""

        def near(a: Items, b: Items) -> Tensor:
            return -torch.cdist(a.values, b.values)

        samples = [
            Items(torch.tensor(values).unsqueeze(1), torch.ones(len(values), 1))
            for values in ([0.0, 5.0], [0.5], [5.5, 9.0], [0.25])
        ]
        found = merge_items(samples, affinity=near, threshold=-1.0)
        assert found.mean.flatten().tolist() == [0.25, 5.25, 9.0]
        assert found.frequency.tolist() == [0.75, 0.5, 0.25]

    def test_nothing_is_found(self) -> None:
        none = Items(torch.zeros(0, 4), torch.zeros(0, 3))
        found = merge_items([none, none])
        assert len(found) == 0
        assert found.covariance.shape == (0, 4, 4)
        assert found.probabilities.shape == (0, 3)
        assert "0 items in 2 samples" in repr(found)
        some = merge_items([none, Items(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1, 3) / 3)])
        assert some.frequency.tolist() == [0.5]

    def test_overlap(self) -> None:
        a = Items(torch.tensor([[0.0, 0, 2, 2], [1, 1, 1, 1], [3, 3, 2, 2]]), torch.ones(3, 1))
        expected = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]])
        assert torch.equal(iou(a, a), expected)


class Detector(nn.Module):
    """It finds one object where a unit is kept, and another always."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.drop = nn.Dropout(p)

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        kept = self.drop(torch.ones(len(images), 1)).flatten() > 0
        always, sometimes = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[6.0, 6, 9, 9]])
        return [
            {
                "boxes": torch.cat([always, sometimes]) if one else always,
                "scores": torch.tensor([0.9, 0.6])[: 1 + int(one)],
                "labels": torch.tensor([0, 1])[: 1 + int(one)],
            }
            for one in kept
        ]


def items(found: list[dict[str, Tensor]]) -> list[Items]:
    return [from_scores(**one, classes=2) for one in found]


class TestModels:
    def test_a_detector(self) -> None:
        model = Detector().eval()
        found = mc_items(model, torch.zeros(3, 1, 8, 8), 40, items=items, seed=0)
        assert len(found) == 3
        for one in found:
            assert one.num_samples == 40
            assert float(one.frequency[0]) == 1
            assert 0.2 < float(one.frequency[1]) < 0.8
            torch.testing.assert_close(one.probabilities, torch.tensor([[0.9, 0, 0.1], [0, 0.6, 0.4]]))
        assert len({float(one.frequency[1]) for one in found}) > 1  # rows have masks of their own
        again = mc_items(model, torch.zeros(3, 1, 8, 8), 40, items=items, seed=0)
        assert [one.frequency.tolist() for one in again] == [one.frequency.tolist() for one in found]
        assert not model.training
        shared = mc_items(model, torch.zeros(3, 1, 8, 8), 40, items=items, seed=0, masks="shared")
        assert len({float(one.frequency[1]) for one in shared}) == 1

    def test_arguments(self) -> None:
        model, images = Detector().eval(), torch.zeros(2, 1, 8, 8)
        first = mc_items(model, images, 5, items=items, seed=0)[0].frequency
        for inputs in ((images,), {"images": images}):
            assert torch.equal(mc_items(model, inputs, 5, items=items, seed=0)[0].frequency, first)

    def test_another_number_of_images(self) -> None:
        counts = iter([2, 1])
        with pytest.raises(ValueError, match="as many sets in each sample, got 1 after 2"):
            mc_items(Detector().eval(), torch.zeros(2, 1), 3, items=lambda y: items(y)[: next(counts)], seed=0)

    def test_items_of_another_kind(self) -> None:
        with pytest.raises(TypeError, match="samples must be Items, got dict"):
            mc_items(Detector().eval(), torch.zeros(2, 1), 3, items=lambda y: y, seed=0)


ONE = Items(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[1.0]]))

BAD: list[tuple[Sequence[Any], dict[str, Any], str]] = [
    ([], {}, "samples must hold the items of at least one, got none"),
    ([Items(torch.zeros(1, 4), torch.zeros(2, 1))], {}, r"values \(N, D\) and probabilities \(N, C\), got \(1, 4\)"),
    ([Items(torch.zeros(4), torch.zeros(4, 1))], {}, r"got \(4,\) and \(4, 1\)"),
    ([Items(torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.int64))], {}, "of torch.int64"),
    ([ONE, Items(torch.zeros(1, 4), torch.zeros(1, 2))], {}, "as many values and classes in each sample"),
    ([Items(torch.full((1, 4), torch.nan), torch.ones(1, 1))], {}, "values of items must be finite"),
    ([Items(torch.zeros(1, 4), torch.full((1, 2), 0.6))], {}, "must not be negative, nor sum to more than 1"),
    ([Items(torch.zeros(1, 4), torch.tensor([[-0.1]]))], {}, "must not be negative"),
    ([Items(torch.zeros(1, 2), torch.ones(1, 1))], {}, r"boxes must have 4 corners .* got 2 values: give an affinity="),
    ([ONE], {"affinity": lambda a, b: torch.zeros(2)}, r"finite, symmetric numbers of shape \(1, 1\), got \(2,\)"),
    ([ONE], {"affinity": lambda a, b: torch.full((1, 1), torch.nan)}, "affinity must return finite"),
    ([ONE, ONE], {"affinity": lambda a, b: torch.tensor([[1.0, 0], [1, 1]])}, "affinity must return finite, symmetric"),
    ([ONE], {"least": 1.5}, r"least must be in \[0, 1\], got 1.5"),
    ([ONE], {"threshold": float("nan")}, "threshold must be finite, got nan"),
]  # fmt: skip


@pytest.mark.parametrize(("samples", "options", "message"), BAD)
def test_bad_input(samples: Sequence[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_items(samples, **options)


def test_bad_scores() -> None:
    with pytest.raises(ValueError, match=r"must be as many, got \(2, 4\), \(1,\) and \(2,\)"):
        from_scores(torch.zeros(2, 4), torch.zeros(1), torch.zeros(2), 3)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got 2 to 2"):
        from_scores(torch.zeros(1, 4), torch.zeros(1), torch.tensor([2]), 2)

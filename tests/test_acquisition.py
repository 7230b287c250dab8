"""BatchBALD: exact on what can be enumerated, close to it where configurations are drawn, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.calibrate.predictions import classified
from torchdrop.acquisition import batch_bald


def information(samples: Tensor, rows: tuple[int, ...]) -> float:
    """The mutual information of the labels of some rows and the sample, by its definition."""
    entropy = 0.0
    for labels in itertools.product(range(samples.shape[2]), repeat=len(rows)):
        p = math.prod(samples[:, row, label] for row, label in zip(rows, labels, strict=True)).mean().item()
        entropy -= p * math.log(p) if p > 0 else 0.0
    return entropy - sum(torch.special.entr(samples[:, row]).sum(1).mean().item() for row in rows)


def random_samples(count: int, rows: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, rows, classes, generator=generator, dtype=torch.float64)).softmax(2)


class TestExact:
    @pytest.mark.parametrize("seed", range(5))
    def test_rows_are_those_of_the_definition(self, seed: int) -> None:
        samples = random_samples(6, 7, 3, seed)
        expected: tuple[int, ...] = ()
        chosen = batch_bald(classified(samples), 4)
        for i in range(4):
            others = [(*expected, row) for row in range(7) if row not in expected]
            expected = max(others, key=lambda rows: information(samples, rows))
            assert chosen.information[i].item() == pytest.approx(information(samples, expected), abs=1e-12)
        assert tuple(chosen.rows.tolist()) == expected

    def test_the_first_is_that_of_bald(self) -> None:
        prediction = classified(random_samples(9, 50, 4))
        chosen = batch_bald(prediction, 1)
        assert chosen.rows.item() == prediction.mutual_information.argmax()
        assert chosen.information.item() == pytest.approx(prediction.mutual_information.max().item())

    def test_rows_that_tell_the_same_are_not_chosen_together(self) -> None:
        """Three copies of the best row, and one that tells less, but something else."""
        first = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
        second = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]])
        samples = torch.stack([first, first, first, second], 1).double()
        prediction = classified(samples)
        assert set(prediction.mutual_information.topk(3).indices.tolist()) == {0, 1, 2}
        chosen = batch_bald(prediction, 3)
        assert chosen.rows[1] == 3
        assert chosen.information[0].item() == pytest.approx(math.log(2))
        assert chosen.information[2].item() == pytest.approx(chosen.information[1].item())

    def test_probabilities_of_0(self) -> None:
        chosen = batch_bald(classified(torch.eye(3).double().unsqueeze(1).repeat(1, 4, 1)), 4)
        assert chosen.information.tolist() == pytest.approx([math.log(3)] * 4)


class TestDrawn:
    def test_is_close_to_the_exact(self) -> None:
        """5 rows of 4 classes have 1024 configurations, of which 400 are drawn."""
        samples = random_samples(12, 6, 4)
        exact = batch_bald(classified(samples), 6, configurations=4**6)
        drawn = batch_bald(classified(samples), 6, configurations=400, seed=1)
        assert exact.information[:5].diff().min() > 0
        torch.testing.assert_close(drawn.information[:5], exact.information[:5], rtol=0, atol=0.06)

    @pytest.mark.parametrize("configurations", [5, 12])
    def test_estimates_have_no_bias(self, configurations: int) -> None:
        """Over seeds, the mean of the estimates is the exact value within its standard error."""
        samples = random_samples(5, 3, 4)
        exact = information(samples, (0, 1, 2))
        prediction = classified(samples)
        found = torch.tensor(
            [batch_bald(prediction, 3, configurations=configurations, seed=s).information[2].item() for s in range(300)]
        )
        error = found.std() / math.sqrt(300)
        assert error < 0.03
        assert abs(found.mean() - exact) < 6 * error

    def test_the_seed_decides(self) -> None:
        prediction = classified(random_samples(8, 30, 5))
        one, same, other = (batch_bald(prediction, 6, configurations=20, seed=s) for s in (1, 1, 2))
        assert torch.equal(one.rows, same.rows)
        assert torch.equal(one.information, same.information)
        assert not torch.equal(one.information, other.information)

    def test_parts_of_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prediction = classified(random_samples(8, 30, 5))
        whole = batch_bald(prediction, 4)
        monkeypatch.setattr("torchdrop.acquisition.ELEMENTS", 100)
        parts = batch_bald(prediction, 4)
        assert torch.equal(parts.rows, whole.rows)
        torch.testing.assert_close(parts.information, whole.information)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prediction": torch.ones(2, 3)}, TypeError, "must be a ClassificationPrediction .* got Tensor"),
        (
            {"prediction": classified(torch.full((2, 3, 2), 0.5), keep_samples=False)},
            ValueError,
            "predict with keep_samples=True and masks='shared'",
        ),
        (
            {"prediction": classified(torch.full((2, 3, 2, 4), 0.5))},
            ValueError,
            r"samples of shape \(T, B, C\), got shape \(2, 3, 2, 4\)",
        ),
        ({"size": 4}, ValueError, "size must be at most the number of rows, 3, got 4"),
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"configurations": 0}, ValueError, "configurations must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must not be negative, got -1"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"prediction": classified(torch.full((2, 3, 2), 0.5)), "size": 2, **changes}
    with pytest.raises(error, match=message):
        batch_bald(**given)

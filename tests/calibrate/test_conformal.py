"""Conformal sets and intervals: the threshold, the scores, the guarantee, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import torchdrop
from tests.calibrate.predictions import classified, regressed
from tests.statistical import check_rate
from torchdrop.calibrate import conformal_intervals, conformal_sets, coverage_bounds
from torchdrop.calibrate.conformal import least_rows, rank_of_threshold, thresholds
from torchdrop.calibrate.sets import PredictionSets

PROBABILITIES = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.25, 0.5, 0.25]], dtype=torch.float64)


def random_rows(rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities of a model that is too sure of itself, and classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return (3 * logits).softmax(1), targets


class TestThreshold:
    def test_is_the_right_one_of_the_smallest_scores(self) -> None:
        for n in range(9, 40):
            k = rank_of_threshold(n, 0.1)
            assert k == -(-9 * (n + 1) // 10)
            assert thresholds(torch.randperm(n).double(), 0.1).values.item() == k - 1

    def test_alpha_is_the_decimal_that_is_written(self) -> None:
        """In floating-point numbers (n + 1)(1 - alpha) would lie above an integer, and k be one too large."""
        assert (39 + 1) * (1 - 0.35) > 26 or (9 + 1) * (1 - 0.7) > 3
        exact = {(n, a): -(-(n + 1) * (100 - a) // 100) for n in range(1, 400) for a in range(1, 100)}
        for (n, a), k in exact.items():
            if k <= n:
                assert rank_of_threshold(n, a / 100) == k

    @given(st.integers(1, 999))
    def test_least_rows(self, thousandths: int) -> None:
        alpha = thousandths / 1000
        n = least_rows(alpha)
        assert rank_of_threshold(n, alpha) == n
        with pytest.raises(ValueError, match=f"needs at least {n} rows in the calibration set, got {n - 1}"):
            rank_of_threshold(n - 1, alpha)

    def test_bounds_are_met_exactly(self) -> None:
        """Over all orders of n + 1 scores that differ, the last is at most the threshold of the others in k of them."""
        n, alpha = 5, 0.25
        scores = torch.arange(n + 1.0)
        covered = [
            scores[order[-1]] <= thresholds(scores[list(order[:-1])], alpha).values
            for order in itertools.permutations(range(n + 1))
        ]
        low, high = coverage_bounds(n, alpha)
        assert sum(map(int, covered)) / len(covered) == pytest.approx(high)
        assert low <= high <= low + 1 / (n + 1)

    def test_each_group_has_its_own(self) -> None:
        scores, groups = torch.arange(18.0), torch.tensor([4, -2]).repeat(9)
        found = thresholds(scores, 0.1, groups)
        assert (found.values.tolist(), found.rows) == ([17.0, 16.0], (9, 9))
        assert found.of(torch.tensor([4, 4, -2]), 3).tolist() == [16.0, 16.0, 17.0]
        with pytest.raises(ValueError, match="which has no group 5"):
            found.of(torch.tensor([4, 5]), 2)


class TestScores:
    """The score of a class is the smallest threshold at which it is in the set."""

    def scores(self, method: str, **options: Any) -> Tensor:
        """Scores found by way of the thresholds: calibration rows of one class, all alike, have that class's score."""
        found = []
        for row in PROBABILITIES:
            many = row.expand(9, 3)
            each = [
                conformal_sets(many, torch.full((9,), label), method=method, randomized=False, **options)
                for label in range(3)
            ]
            found.append(torch.tensor([one.thresholds.values.item() for one in each]))
        return torch.stack(found)

    def test_lac(self) -> None:
        assert torch.allclose(self.scores("lac"), 1 - PROBABILITIES.float())

    def test_aps_adds_up_the_more_probable_classes_and_the_class(self) -> None:
        assert torch.allclose(
            self.scores("aps"), torch.tensor([[0.5, 0.8, 1.0], [1.0, 0.9, 0.7], [0.75, 0.5, 1.0]])
        )  # fmt: skip

    def test_raps_adds_a_penalty_by_rank(self) -> None:
        ranks = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
        penalized = self.scores("aps") + 0.2 * (ranks - 1).clamp_min(0)
        assert torch.allclose(self.scores("raps", penalty=0.2, k_reg=2), penalized)
        assert torch.allclose(self.scores("raps", penalty=0.2, k_reg=1), self.scores("aps") + 0.2 * ranks)

    def test_the_random_share_is_of_the_class_itself(self) -> None:
        """A class is in the set exactly if the sum of the more probable ones and u times its own is below."""
        rows, targets = random_rows(400, 4, 0)
        fit = conformal_sets(rows, targets, method="aps", seed=5)
        sets, whole = fit(rows), conformal_sets(rows, targets, method="aps", randomized=False)(rows)
        before = torch.stack([(rows * (rows > rows[:, [c]])).sum(1) for c in range(4)], 1)
        q = fit.thresholds.values
        u = ((q - before) / rows).clamp(0, 1)  # the largest share with which the class is in
        inside = sets.members
        assert inside[u == 1].all()
        assert not inside[before > q].any()
        undecided = (u > 0) & (u < 1)
        assert inside[undecided].any()
        assert not inside[undecided].all()
        assert fit(rows).members.equal(inside)
        assert not conformal_sets(rows, targets, method="aps", seed=6)(rows).members.equal(inside)
        assert sets.sizes.sum() < whole.sizes.sum()

    def test_a_score_at_the_threshold_is_inside(self) -> None:
        """All rows are alike, and so are their scores."""
        rows, targets = PROBABILITIES[:1].expand(9, 3), torch.ones(9, dtype=torch.int64)
        assert conformal_sets(rows, targets, method="lac")(rows)[0] == [0, 1]
        assert conformal_sets(rows, targets, randomized=False)(rows)[0] == [0, 1]
        new = conformal_sets(rows, targets, seed=1)(rows)
        inside = new.members[:, 1]
        assert not inside.all()  # new rows have random numbers of their own, some of them above all of the old ones

    def test_intervals(self) -> None:
        samples = torch.tensor([[-1.0], [1.0]]).expand(2, 9) * torch.arange(1.0, 10)
        prediction = regressed(samples)
        targets = torch.arange(1.0, 10) * torch.tensor([3.0, -1, 1, -2, 2, 1, 1, 1, 1])
        std = prediction.std
        for method, half in (
            ("scaled", std * (targets.abs() / std).max()),
            ("absolute", targets.abs().max()),
        ):
            found = conformal_intervals(prediction, targets, method=method)(prediction)
            torch.testing.assert_close(found.upper, torch.as_tensor(half).expand(9))
            torch.testing.assert_close(found.lower, -found.upper)
            assert found.coverage(targets) == 1
        low, high = prediction.interval(0.9, "samples")
        found = conformal_intervals(prediction, targets, method="cqr")(prediction)
        q = torch.maximum(low - targets, targets - high).max()
        torch.testing.assert_close(found.lower, low - q)
        torch.testing.assert_close(found.upper, high + q)

    def test_an_interval_that_shrinks_to_nothing_is_empty(self) -> None:
        prediction = regressed(torch.stack([torch.full((9,), -1.0), torch.full((9,), 1.0)]))
        found = conformal_intervals(prediction, torch.zeros(9), method="cqr")(prediction)
        assert found.width.abs().max() < 1e-6
        narrow = conformal_intervals(prediction, torch.zeros(9), alpha=0.5, method="cqr")(prediction)
        assert (narrow.width >= 0).all()

    def test_outputs_have_their_own_thresholds(self) -> None:
        prediction = regressed(torch.randn(5, 20, 2))
        targets = torch.randn(20, 2) * torch.tensor([1.0, 50.0])
        both = conformal_intervals(prediction, targets, method="absolute")
        for i in range(2):
            residuals = targets[:, i] - prediction.mean[:, i]
            alone = conformal_intervals(regressed(torch.zeros(2, 20)), residuals, method="absolute")
            torch.testing.assert_close(both.thresholds.values[:, i], alone.thresholds.values)


class TestGuarantee:
    """At n = 19 and alpha = 0.1 the expected coverage is 18 / 20 exactly, as no scores are equal."""

    TRIALS = 8192

    def test_of_sets_exactly(self) -> None:
        """Of 20 rows, each is covered by the other 19 in 18 cases."""
        for seed in range(20):
            rows, targets = random_rows(20, 4, seed)
            covered = 0
            for new in range(20):
                old = torch.arange(20) != new
                sets = conformal_sets(rows[old], targets[old], method="lac")(rows[~old])
                covered += int(sets.contain(targets[~old]))
            assert covered == 18

    @pytest.mark.parametrize("method", ["aps", "raps"])
    def test_of_sets(self, method: str) -> None:
        """Each trial is a group of its own. An error of 0.1 would be noticed."""
        trials = 2048
        rows, targets = random_rows(20 * trials, 4, 1)
        trial, new = torch.arange(20 * trials) // 20, torch.arange(20 * trials) % 20 == 19
        fit = conformal_sets(rows[~new], targets[~new], method=method, groups=trial[~new])
        covered = fit(rows[new], trial[new]).contain(targets[new])
        check_rate(int(covered.sum()), trials, 0.9, 0.1)

    @pytest.mark.parametrize("method", ["scaled", "absolute", "cqr"])
    def test_of_intervals(self, method: str) -> None:
        """All trials at once: each is an output of its own."""
        generator = torch.Generator().manual_seed(2)
        noise = torch.rand(20, self.TRIALS, generator=generator, dtype=torch.float64) + 0.1
        samples = noise * torch.randn(8, 20, self.TRIALS, generator=generator, dtype=torch.float64)
        targets = 2 * noise * torch.randn(20, self.TRIALS, generator=generator, dtype=torch.float64)
        prediction, new = regressed(samples[:, :19]), regressed(samples[:, 19:])
        inside = conformal_intervals(prediction, targets[:19], method=method)(new).contain(targets[19:])
        check_rate(int(inside.sum()), self.TRIALS, 0.9, 0.06)

    def test_of_groups_and_classes(self) -> None:
        """Half of the rows are hard. One threshold for all covers them too rarely, one for each group does not."""
        rows, targets = random_rows(40_000, 3, 3)
        hard = torch.arange(40_000) % 2
        targets = torch.where(hard == 1, torch.randint(3, (40_000,)), targets)
        old, new = slice(0, 20_000), slice(20_000, 40_000)
        whole = conformal_sets(rows[old], targets[old])(rows[new]).coverage_of(hard[new], targets[new])
        assert whole[1].coverage < 0.87
        fit = conformal_sets(rows[old], targets[old], groups=hard[old])
        for _, found in fit(rows[new], hard[new]).coverage_of(hard[new], targets[new]).items():
            assert abs(found.coverage - 0.9) < 0.03  # 10 standard errors
        by_class = conformal_sets(rows[old], targets[old], by_class=True)
        for _, found in by_class(rows[new]).coverage_of(targets[new], targets[new]).items():
            assert abs(found.coverage - 0.9) < 0.03
        assert "class 2: threshold" in repr(by_class)
        assert "group 1: threshold" in repr(fit)


class TestSets:
    def test_of_a_prediction_are_those_of_its_mean(self) -> None:
        prediction = classified(torch.randn(5, 30, 4).softmax(2))
        targets = torch.arange(30) % 4
        fit, tensor = conformal_sets(prediction, targets), conformal_sets(prediction.mean, targets)
        assert fit(prediction).members.equal(tensor(prediction.mean).members)
        sets = fit(prediction)
        assert [len(sets[row]) for row in range(len(sets))] == sets.sizes.tolist()
        assert repr(fit).startswith("conformal sets by 'aps', for a coverage of at least 0.9: threshold 0.")

    def test_never_empty_adds_the_most_probable_class_to_empty_sets_alone(self) -> None:
        members = torch.tensor([[False, False], [True, False], [False, False]])
        sets = PredictionSets(members, torch.tensor([[0.2, 0.8], [0.2, 0.8], [0.6, 0.4]]))
        assert sets.never_empty().members.tolist() == [[False, True], [True, False], [True, False]]

    def test_no_new_rows(self) -> None:
        fit = conformal_sets(PROBABILITIES.repeat(3, 1), torch.zeros(9, dtype=torch.int64))
        assert repr(fit(PROBABILITIES[:0])) == "0 sets of 3 classes"


ROWS, TARGETS = PROBABILITIES.repeat(4, 1), torch.arange(12) % 3
VALUES = torch.linspace(-1, 1, 24).view(2, 12)


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            (
                {"alpha": 0.01},
                ValueError,
                "alpha=0.01 needs at least 99 rows in the calibration set, got 12",
            ),
            ({"alpha": 1.0}, ValueError, "alpha must be between 0 and 1, both excluded, got 1.0"),
            ({"alpha": float("nan")}, ValueError, "alpha must be between 0 and 1, both excluded, got nan"),
            ({"method": "naive"}, ValueError, "method must be 'lac', 'aps', 'raps', got 'naive'"),
            ({"penalty": -1.0}, ValueError, "penalty must be at least 0, got -1.0"),
            ({"k_reg": 1.5}, TypeError, "k_reg must be an integer, got float"),
            ({"targets": TARGETS[:5]}, ValueError, r"targets .* shape \(12,\), one for each row, got shape \(5,\)"),
            ({"targets": TARGETS.unsqueeze(1)}, ValueError, r"shape \(12,\), one for each row, got shape \(12, 1\)"),
            (
                {"targets": TARGETS.float()},
                ValueError,
                "targets must be classes, of an integer dtype",
            ),
            ({"targets": TARGETS + 1}, ValueError, r"targets must be in \[0, 3\), got 1 to 3"),
            ({"targets": [0] * 12}, ValueError, "targets must be a tensor of classes .* got list"),
            ({"prediction": 3 * ROWS}, ValueError, "prediction must hold probabilities"),
            ({"prediction": ROWS.expand(2, 12, 3)}, ValueError, r"one output for each row, of shape \(B, C\)"),
            ({"prediction": "p"}, TypeError, "prediction must be a ClassificationPrediction .* got str"),
            ({"groups": [1] * 12}, TypeError, "groups must be a tensor with an integer for each row, got list"),
            ({"groups": torch.zeros(12)}, ValueError, r"groups must be integers of shape \(12,\)"),
            (
                {"groups": torch.arange(12) // 10},
                ValueError,
                "alpha=0.1 needs at least 9 rows in group 1 of the calibration set, got 2",
            ),
            ({"groups": TARGETS, "by_class": True}, ValueError, "groups must not be given with by_class=True"),
            ({"targets": TARGETS.clamp_max(1), "by_class": True}, ValueError, "got none of class 2"),
        ],
    )
    def test_by_sets(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            conformal_sets(**{"prediction": ROWS, "targets": TARGETS, **changes})

    def test_by_sets_of_new_rows(self) -> None:
        fit = conformal_sets(ROWS, TARGETS)
        with pytest.raises(ValueError, match="must have the calibration set's 3 classes, got 2"):
            fit(torch.full((4, 2), 0.5))
        with pytest.raises(ValueError, match="the calibration set had no groups"):
            fit(ROWS, TARGETS)
        with pytest.raises(ValueError, match="the calibration set had groups"):
            conformal_sets(ROWS, TARGETS, groups=torch.ones(12, dtype=torch.int64))(ROWS)
        with pytest.raises(ValueError, match="groups must not be given: the calibration set had by_class=True"):
            conformal_sets(ROWS.repeat(3, 1), TARGETS.repeat(3), by_class=True)(ROWS, TARGETS)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"alpha": 0.05}, ValueError, "alpha=0.05 needs at least 19 rows in the calibration set, got 12"),
            ({"method": "quantile"}, ValueError, "method must be 'scaled', 'absolute', 'cqr', got 'quantile'"),
            ({"targets": torch.zeros(12, 1)}, ValueError, r"the predictions' shape \(12,\), got \(12, 1\)"),
            ({"targets": VALUES[0] / 0}, ValueError, "targets must be finite real numbers"),
            ({"prediction": ROWS}, TypeError, "prediction must be a Prediction of values .* got Tensor"),
            ({"prediction": classified(ROWS[None].repeat(2, 1, 1))}, TypeError, "see conformal_sets"),
            ({"prediction": regressed(torch.ones(2, 12))}, ValueError, "got 12 of 12 that are not: take more samples"),
            (
                {"prediction": regressed(VALUES, keep_samples=False), "method": "cqr"},
                ValueError,
                "predict with keep_samples=True",
            ),
        ],
    )
    def test_by_intervals(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            conformal_intervals(**{"prediction": regressed(VALUES), "targets": VALUES[0], **changes})

    def test_by_intervals_of_new_rows(self) -> None:
        fit = conformal_intervals(regressed(VALUES), VALUES[0])
        with pytest.raises(ValueError, match=r"calibration set's shape \(\) for each row, got \(1,\)"):
            fit(regressed(VALUES.unsqueeze(2)))


def test_against_another_package() -> None:
    """Sets and intervals are those of crepes, where it is installed."""
    crepes = pytest.importorskip("crepes")
    rows, targets = random_rows(300, 4, 7)
    old, new = slice(0, 200), slice(200, 300)
    theirs = crepes.ConformalClassifier()
    theirs.fit(1 - rows[old].gather(1, targets[old, None]).squeeze(1).numpy())
    expected = theirs.predict_set((1 - rows[new]).numpy(), confidence=0.9, smoothing=False)
    ours = conformal_sets(rows[old], targets[old], method="lac")(rows[new])
    assert ours.members.tolist() == expected.astype(bool).tolist()
    samples, values = torch.randn(6, 300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    calibration, fresh = regressed(samples[:, old]), regressed(samples[:, new])
    regressor = crepes.ConformalRegressor()
    regressor.fit((values[old] - calibration.mean).numpy(), sigmas=calibration.std.numpy())
    expected = regressor.predict_int(fresh.mean.numpy(), sigmas=fresh.std.numpy(), confidence=0.9)
    found = conformal_intervals(calibration, values[old])(fresh)
    torch.testing.assert_close(torch.stack([found.lower, found.upper], 1), torch.as_tensor(expected))


def test_names_are_where_the_guide_says() -> None:
    assert torchdrop.calibrate.conformal_sets is conformal_sets

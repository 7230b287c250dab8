"""Streaming moments, what tasks observe, and standard errors: exact wherever outcomes can be enumerated."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchdrop.monte_carlo.classes import Classification, normalized
from torchdrop.monte_carlo.groups import Mean, Statistic
from torchdrop.monte_carlo.moments import Moments
from torchdrop.monte_carlo.plain import Plain
from torchdrop.monte_carlo.statistics import Collector
from torchdrop.monte_carlo.tasks import Regression, read_task

F64 = torch.float64


def chunks_of(count: int, cuts: Sequence[int]) -> list[range]:
    """0 to count - 1 cut at these places; empty chunks stay."""
    ends = [0, *sorted(cut % (count + 1) for cut in cuts), count]
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def collected(task: Any, outputs: Tensor, cuts: Sequence[int] = (), **options: Any) -> Collector:
    collector = Collector(task, **options)
    for chunk in chunks_of(len(outputs), cuts):
        collector.add(outputs[chunk.start : chunk.stop], chunk)
    assert collector.count == len(outputs)
    return collector


def every_outcome(draws: int) -> Tensor:
    """All outcomes of so many coin tosses: (draws, 2 ** draws)."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=draws)), dtype=F64).T


def chances(outcomes: Tensor, p: float) -> Tensor:
    """The probability of each column of tosses that give 1 with probability p."""
    return (outcomes * p + (1 - outcomes) * (1 - p)).prod(0)


class TestMoments:
    @given(
        st.lists(st.integers(0, 40), max_size=6), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(-1e6, 1e6)
    )
    def test_any_chunks_give_the_two_pass_result(self, cuts: list[int], count: int, seed: int, center: float) -> None:
        values = center + np.random.default_rng(seed).normal(size=(count, 3))
        moments = Moments()
        for chunk in chunks_of(count, cuts):
            moments.add(torch.tensor(values[chunk.start : chunk.stop]))
        assert moments.count == count
        np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12, atol=1e-12)
        if count > 1:
            np.testing.assert_allclose(moments.variance, values.var(0, ddof=1), rtol=1e-7)

    @given(st.lists(st.integers(0, 30), max_size=5), st.integers(2, 30), st.integers(0, 2**32 - 1))
    def test_any_parts_merge_to_the_two_pass_result(self, cuts: list[int], count: int, seed: int) -> None:
        values = np.random.default_rng(seed).normal(size=(count, 2))
        parts = []
        for chunk in chunks_of(count, cuts):
            part = Moments()
            part.add(torch.tensor(values[chunk.start : chunk.stop]))
            parts.append(part)
        before = [(part.count, part.mean.clone(), part.m2.clone()) for part in parts]
        merged = Moments.merged(parts)
        assert merged.count == count
        np.testing.assert_allclose(merged.mean, values.mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(merged.variance, values.var(0, ddof=1), rtol=1e-12)
        for part, (size, mean, m2) in zip(parts, before, strict=True):
            assert part.count == size
            assert torch.equal(part.mean, mean) or mean.isnan().all()
            assert torch.equal(part.m2, m2)

    @pytest.mark.parametrize("chunk", [1, 3, 50])
    def test_a_mean_far_above_the_deviation(self, chunk: int) -> None:
        """Where E[x^2] - E[x]^2 in float32 has lost every digit."""
        values = 1e4 + 0.1 * torch.randn(50, 1000)
        naive = values.square().mean(0) - values.mean(0).square()
        assert (naive < 0.5 * 0.01).float().mean() > 0.1
        moments = Moments()
        for part in values.split(chunk):
            moments.add(part)
        assert moments.variance.dtype == F64
        np.testing.assert_allclose(moments.variance, values.double().numpy().var(0, ddof=1), rtol=1e-9)

    @pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 1, 3]])
    def test_equal_values_have_variance_exactly_zero(self, sizes: list[int]) -> None:
        values = torch.tensor([0.1, 1 / 3, 1e10], dtype=F64)
        moments = Moments()
        for size in sizes:
            moments.add(values.expand(size, 3))
        assert torch.equal(moments.mean, values)
        assert torch.equal(moments.variance, torch.zeros(3, dtype=F64))

    def test_too_few_values_have_no_variance(self) -> None:
        moments = Moments()
        assert moments.mean.isnan()
        assert moments.variance.isnan()
        moments.add(torch.ones(0, 2))
        assert moments.count == 0
        moments.add(torch.ones(1, 2))
        assert torch.equal(moments.mean, torch.ones(2, dtype=F64))
        assert moments.variance.isnan().all()

    def test_what_was_added_may_change_afterwards(self) -> None:
        values = torch.ones(1, 2, dtype=F64)
        moments = Moments()
        moments.add(values)
        values.zero_()
        assert torch.equal(moments.mean, torch.ones(2, dtype=F64))


def every_mask(keep_fourths: int, units: int = 4) -> Tensor:
    """All masks of so many units, each as often as its probability says, among 4**units (k = keep_fourths / 4)."""
    return torch.tensor(list(itertools.product([0] * (4 - keep_fourths) + [1] * keep_fourths, repeat=units)), dtype=F64)


@pytest.fixture(params=[2, 3], ids=["keep 1/2", "keep 3/4"])
def enumerated(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """A network with one dropped layer: outputs (256, 5, 3) in random order; each mask's once, and its weight."""
    k = request.param / 4
    x, into, out = torch.randn(5, 3, dtype=F64), torch.randn(3, 4, dtype=F64), 2 * torch.randn(4, 3, dtype=F64)
    hidden = (x @ into).relu()
    several = (hidden * every_mask(request.param)[:, None] / k) @ out
    masks = every_outcome(4).T
    once = (hidden * masks[:, None] / k) @ out
    return several[torch.randperm(256)], once, chances(masks.T, k)


class TestTasksAgainstAllMasks:
    def test_classification(self, enumerated: tuple[Tensor, Tensor, Tensor]) -> None:
        outputs, once, weights = enumerated
        moments = collected(Classification("logits"), outputs, [50, 51, 200]).total()
        found = {name: statistic(moments).numpy() for name, statistic in Classification().statistics().items()}

        w = weights.numpy()[:, None, None]
        p = np.exp(once.numpy()) / np.exp(once.numpy()).sum(2, keepdims=True)
        mean = (w * p).sum(0)
        variance = (w * (p - mean) ** 2).sum(0) * 256 / 255
        total, each = -(mean * np.log(mean)).sum(1), (w[..., 0] * -(p * np.log(p)).sum(2)).sum(0)
        shares = np.stack([(w[..., 0] * (p.argmax(2) == c)).sum(0) for c in range(3)], 1)
        expected = {
            "mean": mean,
            "variance": variance,
            "std": np.sqrt(variance),
            "predictive_entropy": total,
            "expected_entropy": each,
            "mutual_information": total - each,
            "variation_ratio": 1 - shares.max(1),
        }
        assert list(found) == list(expected)
        assert (total - each > 0.01).any()
        assert (shares.max(1) < 1).any()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12, err_msg=name)

    def test_regression_with_log_variance(self, enumerated: tuple[Tensor, Tensor, Tensor]) -> None:
        outputs, once, weights = enumerated
        task = Regression(noise="log_variance")
        both = torch.cat([outputs, outputs.flip(2)], dim=2)
        halves = collected(task, both, [100]).total()
        pair = Collector(task)
        pair.add((outputs, outputs.flip(2)), range(256))
        w = weights.numpy()[:, None, None]
        mean = (w * once.numpy()).sum(0)
        epistemic = (w * (once.numpy() - mean) ** 2).sum(0) * 256 / 255
        aleatoric = (w * np.exp(once.flip(2).numpy())).sum(0)
        expected = {
            "mean": mean,
            "variance": epistemic + aleatoric,
            "std": np.sqrt(epistemic + aleatoric),
            "epistemic_variance": epistemic,
            "aleatoric_variance": aleatoric,
        }
        assert list(task.statistics()) == list(expected)
        for name, statistic in task.statistics().items():
            for moments in (halves, pair.total()):
                np.testing.assert_allclose(statistic(moments), expected[name], rtol=1e-10, atol=1e-12, err_msg=name)


class TestTasks:
    def test_plain(self) -> None:
        values = torch.randn(6, 3, 2)
        moments = collected(Plain(), values).total()
        found = {name: statistic(moments) for name, statistic in Plain().statistics().items()}
        torch.testing.assert_close(found["mean"], values.double().mean(0))
        torch.testing.assert_close(found["variance"], values.double().var(0))
        torch.testing.assert_close(found["std"], values.double().std(0))

    def test_tau_is_exactly_its_inverse(self) -> None:
        task = Regression(tau=3.0)
        moments = collected(task, torch.randn(5, 2, 1), [2]).total()
        noise = task.statistics()["aleatoric_variance"](moments)
        assert torch.equal(noise, torch.full((2, 1), 1 / 3.0, dtype=F64))
        assert "aleatoric_variance" not in Regression().statistics()

    def test_certain_samples_that_contradict_each_other(self) -> None:
        """0 log 0 = 0, and all of the uncertainty is about the model."""
        moments = collected(Classification("probabilities"), torch.eye(2).unsqueeze(1)).total()
        found = {name: statistic(moments) for name, statistic in Classification().statistics().items()}
        assert found["predictive_entropy"].item() == found["mutual_information"].item() == math.log(2)
        assert found["expected_entropy"].item() == 0
        assert found["variation_ratio"].item() == 0.5

    def test_mutual_information_is_never_negative(self) -> None:
        p = torch.rand(1, 1000, 7, dtype=F64).softmax(2).expand(3, 1000, 7)
        moments = collected(Classification("probabilities"), p).total()
        difference = Classification().statistics()["predictive_entropy"](moments) - moments["entropy"].mean
        assert difference.abs().max() < 1e-14
        moments["entropy"].mean = moments["entropy"].mean + 1e-15
        assert (Classification().statistics()["predictive_entropy"](moments) < moments["entropy"].mean).any()
        assert (Classification().statistics()["mutual_information"](moments) >= 0).all()

    def test_masked_classes(self) -> None:
        logits = torch.tensor([[[0.0, 0.0, -math.inf]]])
        observed = Classification("logits").observe(logits)
        assert observed["probability"].tolist() == [[[0.5, 0.5, 0.0]]]
        assert observed["entropy"].tolist() == [[math.log(2)]]

    def test_classes_stand_after_the_rows(self) -> None:
        outputs = torch.randn(4, 2, 3, 5, 6)
        observed = Classification("logits").observe(outputs)
        assert {name: tuple(one.shape) for name, one in observed.items()} == {
            "probability": (4, 2, 3, 5, 6),
            "entropy": (4, 2, 5, 6),
            "vote": (4, 2, 3, 5, 6),
        }
        assert torch.equal(observed["vote"].int().argmax(2), outputs.argmax(2))
        assert torch.equal(observed["vote"].sum(2), torch.ones(4, 2, 5, 6, dtype=torch.int64))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_auto_knows_softmax_from_logits(self, dtype: torch.dtype) -> None:
        logits = torch.randn(8, 50, 1000).to(dtype)
        for one in (logits.softmax(2), logits.float().softmax(2).double()):
            assert Classification().settled(one).scores == "probabilities"
        for one in (logits, logits.log_softmax(2)):
            assert Classification().settled(one).scores == "logits"
        assert Classification("logits").settled(logits.softmax(2)).scores == "logits"

    def test_normalized_has_an_edge(self) -> None:
        for error, expected in ((5e-6, True), (5e-5, False)):
            assert normalized(torch.tensor([[0.5, 0.5 + error]]), 1) is expected
        assert not normalized(torch.tensor([[1.5, -0.5]]), 1)

    def test_auto_is_decided_once(self) -> None:
        collector = Collector(Classification())
        logits = torch.tensor([[[2.0, -1.0]]])
        collector.add(logits, [0])
        assert collector.task == Classification("logits")
        collector.add(torch.tensor([[[0.5, 0.5]]]), [1])
        collector.add(torch.tensor([[[0.0, 1.0]]]), [2])
        expected = torch.stack(
            [logits[0, 0].double(), torch.tensor([0.5, 0.5], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)]
        )
        torch.testing.assert_close(collector.total()["probability"].mean[0], expected.softmax(1).mean(0))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"task": "ranking"}, "task must be None, 'classification', 'multilabel' or 'regression', got 'ranking'"),
            (
                {"task": "regression", "class_dim": 2},
                "class_dim=2 is for task='classification', got task='regression'",
            ),
            (
                {"task": "classification", "class_dim": 0},
                "class_dim must be 'auto' or a dimension after the rows, which are 0, got 0",
            ),
            (
                {"task": "regression", "scores": "logits"},
                "scores='logits' is for task='classification' or 'multilabel', got task='regr",
            ),
            ({"task": None, "tau": 1.0}, "tau and noise are for task='regression', got task=None"),
            ({"task": "classification", "noise": "log_variance"}, "tau and noise are for task='regression'"),
            (
                {"task": "classification", "scores": "scores"},
                "scores must be 'auto', 'logits' or 'probabilities', got",
            ),
            ({"task": "regression", "tau": 0.0}, "tau must be positive and finite, got 0.0"),
            ({"task": "regression", "tau": math.nan}, "tau must be positive and finite, got nan"),
            ({"task": "regression", "noise": "variance"}, "noise must be None or 'log_variance', got 'variance'"),
            ({"task": "regression", "tau": 1.0, "noise": "log_variance"}, "give tau or noise, not both"),
        ],
    )
    def test_read_task_refuses(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_task(**arguments)

    def test_read_task(self) -> None:
        assert read_task(None) == Plain()
        assert read_task("classification", scores="logits") == Classification("logits", "auto")
        assert read_task("classification", class_dim=-1) == Classification("auto", -1)
        assert read_task("regression", noise="log_variance") == Regression(noise="log_variance")

    @pytest.mark.parametrize(
        ("task", "outputs", "message"),
        [
            (Plain(), torch.ones(2), "outputs must have a first dimension for the rows of the data"),
            (Plain(), torch.ones(2, 3, dtype=torch.int64), "outputs must be floating-point, got torch.int64"),
            (Plain(), torch.ones(2, 3) > 0, "outputs must be floating-point, got torch.bool"),
            (Plain(), torch.ones(2, 3, dtype=torch.complex64), "outputs must be floating-point, got torch.complex64"),
            (
                Classification(),
                torch.ones(2, 3),
                r"outputs must have a dimension of classes .* got shape \(3,\).*torch.stack",
            ),
            (
                Classification(),
                torch.ones(2, 3, 1),
                r"outputs must have a column for each class, got one .*\(3, 1\).*torch.cat",
            ),
            (
                Classification("probabilities"),
                torch.full((2, 3, 2), 2.0),
                r"outputs must be probabilities, .* got values from 2 to 2 and sums from 4 to 4",
            ),
            (Regression(noise="log_variance"), torch.ones(2, 3, 5), r"which must be even, got shape \(3, 5\)"),
            (Regression(noise="log_variance"), torch.ones(2, 4), r"outputs must hold means and then log-variances"),
            (
                Regression(noise="log_variance"),
                (torch.ones(2, 3, 1), torch.ones(2, 3)),
                r"pair \(mean, log_variance\) of one shape, got shapes \[\(3, 1\), \(3,\)\]",
            ),
        ],
    )
    def test_outputs_that_a_task_cannot_take(self, task: Any, outputs: Any, message: str) -> None:
        collector = Collector(task)
        with pytest.raises(ValueError, match=message):
            collector.add(outputs, range(2))
        assert collector.count == 0
        assert collector.task == task

    @pytest.mark.parametrize("outputs", ["text", {"logits": torch.ones(2, 3)}, (torch.ones(2, 3), None)])
    def test_outputs_that_are_no_tensors(self, outputs: Any) -> None:
        with pytest.raises(TypeError, match=r"outputs must be tensors, got .*: pick them with select_output="):
            Collector(Plain()).add(outputs, range(2))

    @pytest.mark.parametrize("task", [Plain(), Classification(), Regression(tau=1.0)])
    def test_a_pair_where_one_tensor_is_due(self, task: Any) -> None:
        with pytest.raises(TypeError, match="outputs must be one tensor, got tuple: pick it with select_output="):
            Collector(task).add((torch.ones(2, 3, 2), torch.ones(2, 3, 2)), range(2))

    def test_an_auto_that_was_not_settled(self) -> None:
        with pytest.raises(ValueError, match="scores='auto' must be settled by a first chunk"):
            Classification().observe(torch.randn(2, 3, 4))

    def test_a_binary_model_made_two_columns_as_the_message_says(self) -> None:
        z = torch.randn(5)
        p = Classification("logits").observe(torch.stack([torch.zeros_like(z), z], dim=1).unsqueeze(0))["probability"]
        torch.testing.assert_close(p[0, :, 1], z.double().sigmoid())


class TestCollector:
    @given(st.lists(st.integers(0, 60), max_size=5), st.integers(1, 12))
    def test_chunks_and_groups_do_not_matter(self, cuts: list[int], groups: int) -> None:
        torch.manual_seed(3)
        outputs = torch.randn(33, 4, 3)
        one = collected(Classification("logits"), outputs, groups=1).total()
        other = collected(Classification("logits"), outputs, cuts, groups=groups).total()
        assert one.keys() == other.keys() == {"probability", "entropy", "vote"}
        for name in one:
            torch.testing.assert_close(other[name].mean, one[name].mean, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(other[name].m2, one[name].m2, rtol=1e-10, atol=1e-14)

    def test_groups(self) -> None:
        outputs = torch.arange(7.0).reshape(7, 1, 1)
        by_three = collected(Plain(), outputs, [4], groups=3)
        left = [moments["value"].mean.item() for moments in by_three.leave_one_out()]
        assert left == pytest.approx([np.mean([1, 2, 4, 5]), np.mean([0, 2, 3, 5, 6]), np.mean([0, 1, 3, 4, 6])])
        by_halves = collected(Plain(), outputs, [4], groups=2, group_of=lambda sample: int(sample > 4))
        assert list(by_halves.leave_one_out())[1]["value"].mean.item() == 2

    def test_samples_come_in_the_order_of_their_indices(self) -> None:
        outputs = torch.randn(9, 2, 3)
        collector = Collector(Plain(), keep_samples=True)
        for chunk in ([7, 2], [0], [8, 1, 3], [6, 5, 4]):
            collector.add(outputs[chunk], chunk)
        kept = collector.samples("value")
        assert kept is not None
        assert torch.equal(kept, outputs)
        assert collected(Plain(), outputs).samples("value") is None

    def test_kept_samples_and_results_have_the_models_dtype(self) -> None:
        for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)):
            collector = collected(Classification("logits"), torch.randn(3, 2, 4).to(dtype), keep_samples=True)
            kept = collector.samples("probability")
            assert kept is not None
            assert kept.dtype == collector.dtype == expected

    def test_kept_samples_are_copies(self) -> None:
        outputs = torch.ones(2, 1, 1, dtype=F64)
        collector = collected(Plain(), outputs, keep_samples=True)
        outputs.zero_()
        kept = collector.samples("value")
        assert kept is not None
        assert torch.equal(kept, torch.ones(2, 1, 1, dtype=F64))
        collector.add(torch.ones(1, 1, 1, dtype=F64), [2])
        assert collector.identical

    def test_gradients_are_let_go(self) -> None:
        collector = collected(Plain(), torch.ones(2, 1, 1, requires_grad=True), keep_samples=True)
        kept = collector.samples("value")
        assert kept is not None
        assert not kept.requires_grad
        assert not collector.total()["value"].mean.requires_grad

    def test_memory_does_not_grow_with_the_samples(self) -> None:
        def size(count: int) -> int:
            return len(pickle.dumps(collected(Classification("logits"), torch.randn(count, 4, 3), [7, 20]).state()))

        assert abs(size(1000) - size(20)) < 100

    def test_identical(self) -> None:
        same = torch.randn(1, 4, 3).expand(6, 4, 3)
        collector = Collector(Classification("logits"))
        collector.add(same[:1], [0])
        assert not collector.identical
        collector.add(same[1:], range(1, 6))
        assert collector.identical
        assert all(torch.equal(one.m2, torch.zeros_like(one.m2)) for one in collector.total().values())
        assert all(torch.equal(error, torch.zeros_like(error))
                   for error in collector.standard_errors(Classification().statistics()).values())  # fmt: skip
        other = same[:1].clone()
        other[0, 3, 2] += 1e-6
        collector.add(other, [6])
        assert not collector.identical
        collector.add(same[:1], [7])
        assert not collector.identical

    def test_saturated_probabilities_are_not_identical_outputs(self) -> None:
        outputs = torch.tensor([[[500.0, -500.0]], [[600.0, -600.0]]], dtype=F64)
        collector = collected(Classification("logits"), outputs)
        assert collector.total()["probability"].variance.tolist() == [[0.0, 0.0]]
        assert not collector.identical

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("task", [Plain(), Regression(noise="log_variance")])
    def test_a_sample_that_is_not_finite(self, task: Any, value: float) -> None:
        outputs = torch.randn(5, 4, 2)
        outputs[3, 2, 0] = outputs[4, 1, 0] = value
        collector = Collector(task)
        collector.add(outputs[:2], [10, 11])
        before = collector.total()["value"].mean.clone()
        with pytest.raises(ValueError, match=r"sample 13 is not finite in row 2 of its batch \(2 such.*mc_dropout"):
            collector.add(outputs[2:], [12, 13, 14])
        assert collector.count == 2
        assert torch.equal(collector.total()["value"].mean, before)

    @pytest.mark.parametrize("outputs", ["auto", "logits", "probabilities"])
    def test_a_class_that_is_not_finite(self, outputs: str) -> None:
        probabilities = torch.full((3, 4, 2), 0.5)
        probabilities[1, 3, 0] = math.nan
        with pytest.raises(ValueError, match="sample 1 is not finite in row 3"):
            collected(Classification(outputs), probabilities)

    def test_a_variance_that_overflows(self) -> None:
        with pytest.raises(ValueError, match="sample 0 is not finite in row 0"):
            collected(Regression(noise="log_variance"), torch.full((2, 1, 2), 1000.0))

    def test_bad_chunks(self) -> None:
        collector = collected(Plain(), torch.randn(2, 4, 3))
        with pytest.raises(
            ValueError, match=r"outputs change their shape between samples: \[\(5, 3\)\], expected \[\(4, 3\)\]"
        ):
            collector.add(torch.randn(2, 5, 3), [2, 3])
        with pytest.raises(ValueError, match=r"outputs must hold 3 samples, got \[2\]"):
            collector.add(torch.randn(2, 4, 3), [2, 3, 4])
        with pytest.raises(ValueError, match=r"group_of must give a group in \[0, 2\), got 5 for sample 5"):
            Collector(Plain(), groups=2, group_of=lambda sample: sample).add(torch.randn(1, 4, 3), [5])
        with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
            Collector(Plain(), groups=0)
        assert collector.count == 2

    def test_nothing_yet(self) -> None:
        collector = Collector(Plain())
        collector.add(torch.ones(0, 4, 3), [])
        assert (collector.count, collector.identical) == (0, False)
        for ask in (collector.total, lambda: collector.dtype, lambda: collector.standard_error(Mean("value"))):
            with pytest.raises(ValueError, match="there are no samples yet"):
                ask()


class TestProcesses:
    @pytest.mark.slow
    @given(st.lists(st.integers(0, 2), min_size=7, max_size=7), st.lists(st.integers(0, 25), max_size=4), st.booleans())
    def test_merged_states_are_bit_equal_to_one_process(self, owner: list[int], cuts: list[int], rounds: bool) -> None:
        """Three processes, each with some of seven groups, perhaps none, and the same chunks of its own samples."""
        torch.manual_seed(5)
        outputs = torch.randn(25, 3, 4)
        options: dict[str, Any] = {"groups": 7, "rounds": rounds, "keep_samples": True}
        one = collected(Classification(), outputs, cuts, **options)
        states = []
        for rank in range(3):
            mine = Collector(Classification(), **options)
            for chunk in chunks_of(25, cuts):
                chosen = [sample for sample in chunk if owner[sample % 7] == rank]
                mine.add(outputs[chosen], chosen)
            states.append(pickle.loads(pickle.dumps(mine.state())))
        assert sum(len(state["moments"].sizes) for state in states) == 7
        merged = Collector(Classification(), **options)
        merged.load(states, "cpu")
        assert (merged.count, merged.task, merged.identical) == (25, Classification("logits"), False)
        for name, moments in one.total().items():
            assert torch.equal(merged.total()[name].mean, moments.mean)
            assert torch.equal(merged.total()[name].m2, moments.m2)
        kept, expected = merged.samples("probability"), one.samples("probability")
        assert kept is not None
        assert expected is not None
        assert torch.equal(kept, expected)
        errors = one.standard_errors(one.task.statistics())
        assert errors
        for name, error in merged.standard_errors(merged.task.statistics()).items():
            assert torch.equal(error, errors[name])

    @pytest.mark.parametrize(("shift", "expected"), [(0.0, True), (1.0, False)])
    def test_identical_across_processes(self, shift: float, expected: bool) -> None:
        parts = [Collector(Plain()), Collector(Plain())]
        for rank, part in enumerate(parts):
            part.add(torch.ones(1, 2, 1) + rank * shift, [rank])
        merged = Collector(Plain())
        merged.load([part.state() for part in parts])
        assert merged.identical is expected

    def test_states_that_do_not_fit(self) -> None:
        one, other = torch.randn(1, 4, 2), torch.randn(1, 4, 2).softmax(2)
        first = collected(Classification(), one).state()
        second = Collector(Classification())
        with pytest.raises(ValueError, match=r"states must hold different groups, got \[0, 0\]"):
            second.load([first, first])
        second.add(other, [1])
        with pytest.raises(ValueError, match=r"states must agree in task and shape, got .*probabilities"):
            Collector(Classification()).load([first, second.state()])
        third = Collector(Classification())
        third.add(torch.randn(1, 4, 3), [1])
        with pytest.raises(ValueError, match=r"states must agree in task and shape, got .*\(4, 3\)"):
            Collector(Classification()).load([first, third.state()])

    def test_states_without_samples(self) -> None:
        merged = Collector(Plain())
        merged.load([Collector(Plain()).state()] * 2)
        assert merged.count == 0
        merged.load([Collector(Plain()).state(), collected(Plain(), torch.ones(3, 1, 1)).state()])
        assert merged.count == 3


def mean_of(observable: str) -> Statistic:
    """A mean that does not say so, which goes through the jackknife."""
    return lambda moments: moments[observable].mean


def every_outcome_of_groups(groups: int, each: int, p: float) -> tuple[Tensor, Tensor]:
    """Tosses (T, outcomes) dealt to groups in turn, a column for each multiset of the groups' sums, its chance."""
    sums = torch.tensor(list(itertools.combinations_with_replacement(range(each + 1), groups)))
    chance = torch.tensor([math.comb(each, k) * p**k * (1 - p) ** (each - k) for k in range(each + 1)], dtype=F64)
    repeats = [math.prod(math.factorial(row.count(k)) for k in set(row)) for row in sums.tolist()]
    tosses = (torch.arange(each)[:, None, None] < sums.T).reshape(each * groups, -1)
    return tosses.double(), chance[sums].prod(1) * math.factorial(groups) / torch.tensor(repeats)


def two_kinds(tosses: Tensor) -> Tensor:
    """Probabilities of two kinds, with different winners: (T, B, 2)."""
    p = 0.05 + 0.85 * tosses
    return torch.stack([p, 1 - p], 2)


class TestStandardErrors:
    """Rows are all possible outcomes of the sampling, so that expectations over it are sums."""

    def test_of_a_mean_is_unbiased(self) -> None:
        tosses = every_outcome(7)
        errors = collected(Plain(), tosses.unsqueeze(2), [3]).standard_error(Mean("value")).squeeze(1)
        for p in (0.5, 0.9):
            expectation = (chances(tosses, p) * errors.square()).sum()
            assert expectation.item() == pytest.approx(p * (1 - p) / 7, rel=1e-12)

    @pytest.mark.parametrize(("draws", "groups"), [(8, 4), (8, 3), (9, 4), (5, 5)])
    def test_of_a_mean_by_groups_is_unbiased_for_groups_of_any_size(self, draws: int, groups: int) -> None:
        tosses = every_outcome(draws)
        options: dict[str, Any] = {"groups": groups, "rounds": True}
        collector = collected(Plain(), tosses.unsqueeze(2), **options)
        errors = collector.standard_error(Mean("value")).squeeze(1)
        expectation = (chances(tosses, 0.3) * errors.square()).sum()
        assert expectation.item() == pytest.approx(0.3 * 0.7 / draws, rel=1e-12)
        torch.testing.assert_close(collector.standard_error(mean_of("value")).squeeze(1), errors, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("name", Classification().statistics())
    def test_is_the_textbook_jackknife_for_groups_of_equal_size(self, name: str) -> None:
        statistic = Classification().statistics()[name]
        through_jackknife: Statistic = lambda moments: statistic(moments)  # noqa: E731
        outputs = torch.randn(12, 5, 3, dtype=F64)
        error = collected(Classification("logits"), outputs, [5], groups=4).standard_error(through_jackknife)
        without = []
        for group in range(4):
            rest = outputs[[sample for sample in range(12) if sample % 4 != group]]
            without.append(statistic(collected(Classification("logits"), rest, groups=1).total()))
        theta = torch.stack(without)
        expected = (3 / 4 * (theta - theta.mean(0)).square().sum(0)).sqrt()
        assert (expected > 0).any()
        torch.testing.assert_close(error, expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("name", ["variance", "std", "predictive_entropy", "mutual_information", "variation_ratio"])
    @pytest.mark.parametrize(("groups", "each"), [(3, 40), (5, 12)])
    @pytest.mark.slow
    def test_is_the_true_deviation_of_a_statistic(self, name: str, groups: int, each: int) -> None:
        """E[SE^2] / Var is 1 up to O(1 / T), mostly from above (Efron and Stein, 1981)."""
        for p in (0.2, 0.3):
            tosses, weights = every_outcome_of_groups(groups, each, p)
            assert weights.sum().item() == pytest.approx(1)
            collector = collected(Classification("probabilities"), two_kinds(tosses), groups=groups)
            statistic = Classification().statistics()[name]
            values, errors = (one.reshape(len(weights), -1)[:, 0] for one in
                              (statistic(collector.total()), collector.standard_error(statistic)))  # fmt: skip
            variance = (weights * values.square()).sum() - (weights * values).sum().square()
            ratio = ((weights * errors.square()).sum() / variance).item()
            assert 0.99 <= ratio <= 1 + 6 / (groups * each)

    def test_of_rounds(self) -> None:
        """A unit kept with probability 0.625 in hypercubes of four: twice for sure, once perhaps, once not."""
        tosses = every_outcome(6)
        sure = torch.ones_like(tosses)
        outputs = torch.stack([sure, tosses, 0 * sure, sure], 1).reshape(24, 64, 1)
        options: dict[str, Any] = {"groups": 6, "group_of": lambda sample: sample // 4}
        by_rounds = collected(Plain(), outputs, rounds=True, **options).standard_error(Mean("value")).squeeze(1)
        as_iid = collected(Plain(), outputs, **options).standard_error(Mean("value")).squeeze(1)
        true = 0.25 / 16 / 6
        assert by_rounds.square().mean().item() == pytest.approx(true, rel=1e-12)
        assert as_iid.square().mean() > 3 * true

    def test_where_there_are_too_few(self) -> None:
        statistics = Plain().statistics()
        single = collected(Plain(), torch.randn(1, 3, 2)).standard_errors(statistics)
        assert list(single) == ["mean", "variance", "std"]
        assert all(error.shape == (3, 2) and error.isnan().all() for error in single.values())
        pair = collected(Plain(), torch.randn(2, 3, 2)).standard_errors(statistics)
        assert pair["mean"].isfinite().all()
        assert pair["variance"].isnan().all()
        one_group = collected(Plain(), torch.randn(9, 3, 2), groups=1).standard_errors(statistics)
        assert one_group["mean"].isfinite().all()
        assert one_group["variance"].isnan().all()
        one_round = collected(Plain(), torch.randn(9, 3, 2), groups=1, rounds=True).standard_errors(statistics)
        assert one_round["mean"].isnan().all()
        three = collected(Plain(), torch.randn(3, 3, 2)).standard_errors(statistics)
        assert all(error.isfinite().all() for error in three.values())

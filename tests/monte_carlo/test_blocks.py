"""Dense outputs: statistics block by block, standard errors by choice, rows within `memory`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.monte_carlo import blocks
from torchdrop.monte_carlo.blocks import OutputShape
from torchdrop.monte_carlo.classes import Classification
from torchdrop.monte_carlo.live_bytes import LiveBytes
from torchdrop.monte_carlo.plain import Plain
from torchdrop.monte_carlo.standard_errors import DENSE, check_errors, error_names
from torchdrop.monte_carlo.statistics import Collector
from torchdrop.monte_carlo.task_predictions import predict_from
from torchdrop.monte_carlo.tasks import Regression

OUTPUTS = {
    "classes": (Classification("logits"), torch.randn(9, 3, 4, 5, 7)),
    "probabilities": (Classification("probabilities"), torch.randn(9, 3, 4, 5, 7).softmax(2)),
    "plain": (Plain(), torch.randn(9, 3, 4, 5, 7)),
    "log variance": (Regression(noise="log_variance"), torch.randn(9, 3, 70, 2)),
    "strided": (Classification("logits"), torch.randn(9, 3, 35, 4).transpose(2, 3)),
    "one number": (Plain(), torch.randn(9, 3)),
}


def collected(task: Any, outputs: Any, **options: Any) -> Collector:
    collector = Collector(task, groups=3, keep_samples=True, **options)
    for samples in (range(4), range(4, 9)):
        collector.add(outputs[samples.start : samples.stop], samples)
    return collector


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 96)


class TestBlocks:
    @pytest.mark.parametrize("name", OUTPUTS)
    @pytest.mark.parametrize("size", [1, 96, 1000, 10**6])
    def test_their_size_does_not_matter(self, name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        task, outputs = OUTPUTS[name]
        whole = collected(task, outputs)
        values, errors = whole.results()
        monkeypatch.setattr(blocks, "BLOCK", size)
        parts = collected(task, outputs)
        values_in_parts, errors_in_parts = parts.results()
        assert values.keys() == values_in_parts.keys() == errors.keys()
        for name in values:
            torch.testing.assert_close(values_in_parts[name], values[name], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(errors_in_parts[name], errors[name], rtol=1e-5, atol=1e-6)
        for name, moments in whole.total().items():
            torch.testing.assert_close(parts.total()[name].mean, moments.mean, rtol=1e-13, atol=1e-15)
            torch.testing.assert_close(parts.total()[name].m2, moments.m2, rtol=1e-12, atol=1e-15)
        for name in task.kept:
            kept, expected = parts.samples(name), whole.samples(name)
            if expected is not None:
                torch.testing.assert_close(kept, expected)

    @pytest.mark.parametrize(
        ("rows", "places", "each"),
        [(3, (35,), 4), (1, (100, 7), 1), (5, (), 2), (0, (3,), 2), (2, (0,), 3), (1, (9,), 99)],
    )
    def test_cover_everything_once(self, rows: int, places: tuple[int, ...], each: int, small: None) -> None:
        shape = OutputShape(((rows, *places),), torch.float32, rows, places, False)
        seen = torch.zeros(rows, math.prod(places), dtype=torch.int64)
        found = list(shape.blocks(each))
        assert found
        for row, place in found:
            assert seen[row, place].numel() * each <= max(96, each)
            seen[row, place] += 1
        assert (seen == 1).all()

    @pytest.mark.parametrize("name", ["classes", "plain", "log variance"])
    def test_equal_samples_have_variance_exactly_zero(self, name: str, small: None) -> None:
        task, outputs = OUTPUTS[name]
        collector = collected(task, outputs[:1].expand_as(outputs))
        assert collector.identical
        assert all(torch.equal(one.m2, torch.zeros_like(one.m2)) for one in collector.total().values())

    def test_nothing_is_added_where_the_last_block_is_not_finite(self, small: None) -> None:
        task, outputs = OUTPUTS["classes"]
        collector = collected(task, outputs)
        before = collector.total()["probability"].mean.clone()
        bad = outputs[:2].clone()
        bad[1, 2, 3, 4, 6] = math.inf
        with pytest.raises(ValueError, match=r"sample 12 is not finite in row 2 of its batch \(1 such"):
            collector.add(bad, [11, 12])
        assert collector.count == 9
        assert torch.equal(collector.total()["probability"].mean, before)

    def test_tied_classes_give_one_vote_to_the_first(self) -> None:
        outputs = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 0.0, 3.0]]])
        assert Classification("logits").observe(outputs)["vote"].int().tolist() == [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]

    def test_entropies_of_logits_of_any_size(self) -> None:
        logits = torch.tensor(
            [[[1e4, 0.0, -1e4], [-math.inf, 700.0, 700.0], [1e-3, 0.0, -math.inf]]], dtype=torch.float64
        )
        observed = Classification("logits").observe(logits)
        p = logits.softmax(2)
        torch.testing.assert_close(observed["probability"], p, rtol=1e-14, atol=0)
        torch.testing.assert_close(observed["entropy"], torch.special.entr(p).sum(2), rtol=1e-13, atol=1e-300)


class TestMemory:
    """A sample of 2^22 elements in float32 has 16 MiB."""

    def test_of_dense_outputs_is_that_of_four_samples_and_of_what_is_returned(self) -> None:
        outputs = torch.randn(3, 1, 64, 256, 256)
        size = outputs[0].numel() * 4
        collector = Collector(Classification("logits"), errors="auto")
        with LiveBytes(lambda: True) as live:
            for sample in range(3):
                collector.add(outputs[sample : sample + 1], [sample])
        assert live.peak < 6 * size + 2**24  # two moments in float64, votes, the first sample, and a block at a time
        with LiveBytes(lambda: True) as live:
            prediction = predict_from(collector)
        assert live.peak < 4 * size + 2**24
        assert list(prediction.standard_errors) == ["mean"]

    def test_is_the_same_for_any_number_of_groups_if_none_is_needed(self) -> None:
        outputs = torch.randn(20, 2, 4, 50)
        kept = {
            errors: sum(t.numel() * t.element_size() for t in collected_tensors(outputs, errors))
            for errors in (True, False, ("mean", "expected_entropy"), ("predictive_entropy",), ("variation_ratio",))
        }
        elements = 2 * 4 * 50
        assert kept[False] == kept[("mean", "expected_entropy")] == elements * 20 + 100 * 16
        assert kept[True] == 10 * kept[False]
        assert kept[("predictive_entropy",)] == kept[False] + 9 * elements * 16
        assert kept[("variation_ratio",)] == kept[False] + 9 * elements * 4


def collected_tensors(outputs: Tensor, errors: Any) -> Iterator[Tensor]:
    collector = Collector(Classification("logits"), errors=errors)
    collector.add(outputs, range(len(outputs)))
    groups = collector.state()["moments"]
    for one in itertools.chain(*(stack.moments.values() for stack in groups.stacks), *groups.whole.values()):
        yield from (value for value in vars(one).values() if isinstance(value, Tensor))


class TestChoice:
    def test_names(self) -> None:
        task = Classification()
        names = tuple(task.statistics())
        assert error_names(True, task) == names
        assert error_names(False, task) == ()
        assert error_names("auto", task, DENSE) == names
        assert error_names("auto", task, DENSE + 1) == ("mean",)
        assert error_names(["std", "mean"], task) == ("mean", "std")
        for wrong in ("all", "mean", ["mode"], ("mean", "aleatoric_variance")):
            with pytest.raises(
                ValueError, match="standard_errors must be 'auto', True, False, or some of the names mean, v"
            ):
                check_errors(wrong, [task])

    @pytest.mark.parametrize("chosen", [True, False, ("mean",), ("std", "mutual_information")])
    def test_what_is_chosen_is_as_if_all_were(self, chosen: Any) -> None:
        model, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).eval(), torch.randn(5, 6)
        options: dict[str, Any] = {"samples": 12, "task": "classification", "seed": 1}
        every = torchdrop.mc_predict(model, x, **options)
        some = torchdrop.mc_predict(model, x, standard_errors=chosen, **options)
        expected = tuple(every.standard_errors) if chosen is True else tuple(chosen or ())
        assert tuple(some.standard_errors) == expected
        for name in expected:
            torch.testing.assert_close(some.standard_errors[name], every.standard_errors[name], rtol=1e-4, atol=1e-6)
        for name, value in every.statistics.items():
            torch.testing.assert_close(some.statistics[name], value, rtol=1e-5, atol=1e-6)
        assert some.pandas().shape[0] == 5
        assert str(some).count("not computed") == 7 - len(expected)
        if "mean" not in expected:
            with pytest.raises(
                ValueError, match="the mean's standard error was not computed: predict with standard_errors"
            ):
                some.standard_error  # noqa: B018

    def test_dense_outputs_have_the_means_alone(self) -> None:
        model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(1, 5, 1)).eval()
        x = torch.randn(1, 1, 64, 64)
        assert DENSE < 5 * 64 * 64
        dense = torchdrop.mc_predict(model, x, 6, seed=1)
        assert list(dense.standard_errors) == ["mean"]
        every = torchdrop.mc_predict(model, x, 6, seed=1, standard_errors=True)
        assert list(every.standard_errors) == ["mean", "variance", "std"]
        torch.testing.assert_close(every.standard_error, dense.standard_error, rtol=1e-5, atol=1e-7)

    def test_a_tolerance_needs_no_choice(self) -> None:
        model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)).eval()
        for sampling in ("iid", "latin"):
            result = torchdrop.mc_predict(
                model, torch.randn(5, 6), 400, tolerance=0.2, sampling=sampling, standard_errors=False, seed=1
            )
            assert result.num_samples < 400
            assert result.standard_errors == {}


ROWS: list[int] = []
"""The number of rows in each call of a model that is watched."""


class Watched(nn.Module):
    """Tells the number of rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.drop, self.last = nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 30)
        self.unflatten = (3, 10)

    def forward(self, x: Tensor) -> Tensor:
        ROWS.append(len(x))
        return self.last(self.drop(self.first(x))).unflatten(1, self.unflatten)


class TestRows:
    @pytest.mark.parametrize("sampling", ["iid", "latin"])
    @pytest.mark.parametrize("strategy", ["vectorized", "repeated", "loop"])
    @pytest.mark.parametrize("task", [None, "classification"])
    def test_blocks_of_rows_give_what_the_batch_gives(self, sampling: str, strategy: str, task: str | None) -> None:
        x = torch.randn(23, 6, generator=torch.Generator().manual_seed(3))
        options: dict[str, Any] = {
            "samples": 12, "seed": 5, "sampling": sampling, "task": task, "keep_samples": True, "weight_scaling": True
        }  # fmt: skip
        if task is not None:
            options["class_dim"] = 1
        model = Watched().eval()
        ROWS.clear()
        whole = torchdrop.mc_predict(model, x, **options)
        assert max(ROWS) >= 23
        ROWS.clear()
        parts = torchdrop.mc_predict(model, x, memory=40_000, strategy=strategy, **options)
        assert strategy == "repeated" or 3 <= max(ROWS) < 23
        assert parts.num_samples == 12
        assert type(parts) is type(whole)
        torch.testing.assert_close(parts.samples, whole.samples, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts.weight_scaling, whole.weight_scaling)
        for name, value in whole.statistics.items():
            torch.testing.assert_close(parts.statistics[name], value, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(parts.standard_errors[name], whole.standard_errors[name], rtol=1e-3, atol=1e-5)

    def test_several_batches_in_blocks(self) -> None:
        x = torch.randn(23, 6)
        model = nn.Sequential(nn.Dropout(0.5)).eval()
        whole = torchdrop.mc_predict(model, x, 8, seed=5, keep_samples=True)
        parts = torchdrop.mc_predict(model, iter(x.split(9)), 8, seed=5, keep_samples=True, memory=1)
        assert torch.equal(parts.samples, whole.samples)  # type: ignore[arg-type]

    def test_statistics_count_without_a_bound_as_well(self) -> None:
        """A row of 3 * 2^17 elements holds 7.5 MiB of statistics, so that 32 MiB take four rows at a time."""
        model = Watched().eval()
        model.last = nn.Linear(16, 3 * 2**17)
        model.unflatten = (3, 2**17)
        result = torchdrop.mc_predict(model, torch.randn(6, 6), 2, strategy="loop", seed=1)
        assert result.mean.shape == (6, 3, 2**17)
        assert ROWS[-4:] == [4, 4, 2, 2]

    def test_rows_that_depend_on_each_other_stay_together(self) -> None:
        class Centered(Watched):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x - x.mean(0))

        x, model = torch.randn(23, 6), Centered().eval()
        with pytest.warns(UserWarning, match="depend on the other rows"):
            whole = torchdrop.mc_predict(model, x, 6, seed=1, strategy="loop", keep_samples=True)
        with pytest.warns(UserWarning, match="depend on the other rows"):
            bounded = torchdrop.mc_predict(model, x, 6, seed=1, strategy="loop", keep_samples=True, memory=1)
        torch.testing.assert_close(bounded.samples, whole.samples)

    def test_a_tolerance_keeps_them_together(self) -> None:
        x, model = torch.randn(23, 6), Watched().eval()
        ROWS.clear()
        result = torchdrop.mc_predict(
            model, x, 200, tolerance=0.5, seed=1, strategy="loop", memory=1, keep_samples=True
        )
        assert result.samples is not None
        assert result.samples.shape == (result.num_samples, 23, 3, 10)
        assert 1 not in ROWS

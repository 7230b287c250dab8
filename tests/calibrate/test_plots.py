"""Pictures: what is drawn is what was computed."""

from __future__ import annotations

import pytest
import torch

from tests.calibrate.predictions import classified, regressed
from torchdrop.calibrate import Intervals, PredictionSets, deviation_scale
from torchdrop.calibrate.plots import (
    coverage_against_nominal,
    intervals_over,
    reliability_before_and_after,
    set_sizes,
)
from torchdrop.calibrate.scores import interval_shares

pytest.importorskip("matplotlib")


def test_coverage_against_nominal() -> None:
    before, targets = regressed(0.2 * torch.randn(9, 300)), torch.randn(300)
    after = deviation_scale(before, targets)(before)
    ax = coverage_against_nominal({"before": before, "after": after}, targets)
    lines = ax.get_lines()
    assert [line.get_label() for line in lines] == ["calibrated", "before", "after"]
    for line, prediction in zip(lines[1:], (before, after), strict=True):
        expected = interval_shares(prediction, targets, tuple(line.get_xdata()))
        assert torch.equal(torch.as_tensor(line.get_ydata()), expected)


def test_set_sizes() -> None:
    members = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]]).bool()
    sets = PredictionSets(members, torch.full((4, 3), 1 / 3))
    ax = set_sizes({"one": sets, "two": sets.never_empty()}, torch.tensor([0, 2, 0, 1]))
    heights = [[bar.get_height() for bar in container] for container in ax.containers]
    assert heights == [[0.25, 0.5, 0.25], [0, 0.75, 0.25]]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["one: mean 1, coverage 50.0 %", "two: mean 1.25, coverage 75.0 %"]
    with pytest.raises(ValueError, match="sets must hold at least one row"):
        set_sizes({})


def test_intervals_over() -> None:
    x = torch.tensor([[2.0], [0.0], [1.0]])
    intervals = Intervals(x - 1, x + 1)
    prediction = regressed(torch.stack([x - 0.5, x + 0.5]))
    ax = intervals_over(x, intervals, prediction=prediction, data=(torch.tensor([0.5, 0.5]), torch.tensor([1.4, 1.6])))
    mean, inside, outside = ax.get_lines()
    assert mean.get_ydata().tolist() == [0, 1, 2]
    assert (inside.get_label(), outside.get_label()) == ("inside (1)", "outside (1)")
    assert outside.get_ydata().tolist() == [pytest.approx(1.6)]
    with pytest.raises(ValueError, match="the same number of rows, got 2 and 3"):
        intervals_over(x[:2], intervals)
    with pytest.raises(ValueError, match=r"x must have one value for each row, got shape \(3, 2\)"):
        intervals_over(x.expand(3, 2), intervals)


def test_reliability_before_and_after() -> None:
    prediction = classified(torch.randn(4, 60, 3).softmax(2))
    left, right = reliability_before_and_after(prediction, prediction, torch.arange(60) % 3)
    assert left.figure is right.figure
    assert right.get_title().startswith("after\nexpected calibration error")

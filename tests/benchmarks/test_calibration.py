"""The calibration benchmark: splits, pairs, verdicts, and its program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calibration
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def test_splits_are_halves_and_the_bounds_are_judged() -> None:
    seen: list[Tensor] = []

    def fit(old: Tensor, new: Tensor, split: int) -> tuple[float, float]:
        seen.append(torch.cat([old, new]))
        assert (len(old), len(new)) == (9, 10)
        return 0.95 + 0.01 * (split % 2), 1.0

    found = calibration.of_splits(19, fit)
    assert len(seen) == 200
    assert all(one.sort().values.equal(torch.arange(19)) for one in seen)
    assert len({tuple(one.tolist()) for one in seen}) == 200
    assert found["coverage"]["mean"] == pytest.approx(0.955)
    assert found["bounds"] == pytest.approx([0.9, 1.0])
    assert found["within"]
    assert found["exact"] == pytest.approx(0.9)
    assert not calibration.of_splits(19, lambda old, new, split: (0.85 + 0.01 * (split % 2), 1.0))["within"]


def trainings(*differences: float) -> list[dict[str, Any]]:
    scores = ("negative_log_likelihood", "calibration_error")
    ways = ("Monte Carlo", "deterministic", "deterministic, temperature", *calibration.CALIBRATED)
    return [
        {"scores": {way: dict.fromkeys(scores, 1.0 + (d if way in calibration.CALIBRATED else 0)) for way in ways}}
        for d in differences
    ]


def test_differences_are_paired_and_judged() -> None:
    found = calibration.paired(trainings(-0.1, -0.3), "rates", "Monte Carlo", "calibration_error")
    assert found == {"mean": pytest.approx(-0.2), "standard_error": pytest.approx(0.1), "better": False}
    rows = calibration.calibration_rows(calibration.compared("data", trainings(-0.1, -0.11, -0.1)))
    assert [row[-1] for row in rows] == [""] * 3 + ["ok"] * len(calibration.CALIBRATED)
    rows = calibration.calibration_rows(calibration.compared("data", trainings(0.1, -0.1)))
    assert rows[-1][-1].startswith("short: NLL against Monte Carlo, ECE against Monte Carlo")


def test_networks_depend_on_the_seed_alone() -> None:
    one, same, other = (calibration.network(3, 4, 2, 0.5, seed) for seed in (1, 1, 2))
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    for model in (one, same):
        calibration.train(model, x, y, 5, seed=3)
    assert torch.equal(one[0].weight, same[0].weight)
    assert not one.training


def test_active_learning_stops_at_the_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TARGET", 0.5)
    monkeypatch.setattr(calibration, "LABELS", 40)
    for strategy in ("random", "BatchBALD"):
        found = calibration.labels_needed(strategy, 0, samples=3)
        counts = [labels for labels, _ in found["curve"]]
        assert counts == list(range(20, counts[-1] + 1, 10))
        assert found["labels"] == counts[-1]
        assert found["curve"][-1][1] >= 0.5


def test_data_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        calibration.main(["--quick", "--uci", str(tmp_path)])
    assert "--uci must be a folder with concrete.npz: see benchmarks/uci.py" in capsys.readouterr().err

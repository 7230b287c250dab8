"""The benchmark of Monte Carlo inference: its checks, its count of draws, and what it makes of a report."""

from __future__ import annotations

import json
from typing import Any

import bench_monte_carlo
import harness
import monte_carlo_models as models
import monte_carlo_samplers as samplers
import monte_carlo_summary
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BRIEF = harness.Effort(budget=0.0, batch=1e-5, min_rounds=2, max_rounds=2)
CPU = torch.device("cpu")
SMALL = models.Case("a small MLP", "MLP", lambda: models.mlp(8, 16, 4), (32, 8), samples=60, required=2.0)


@pytest.mark.parametrize(
    ("build", "shape", "draws"),
    [
        (lambda: models.mlp(8, 16, 4), (3, 8), 2),
        (lambda: models.encoder(2, 16), (3, 5, 16), 8),
        (models.Functional, (3, 32), 3),
        (models.Recurrent, (3, 12, 16), 3),
        (models.Attention, (3, 12, 32), 3),
    ],
)
def test_draws_are_counted_by_what_moves_the_generator(build: Any, shape: tuple[int, ...], draws: int) -> None:
    model, x = models.Case("", "", build, shape).made(CPU)
    assert models.train_mode_draws(model, x) == draws
    assert samplers.ours(model, x, 2)[1].draws == draws
    with models.Draws() as counted:
        model(x)
        F.dropout(x, 0.5, training=False)
    assert counted.count == 0


def test_a_change_of_statistics_is_seen() -> None:
    model, x = models.Case("", "", models.Functional, (4, 32)).made(CPU)
    with models.statistics_watched(model) as changed:
        model(x)
        models.everything_on(model)(x)
        assert not changed()
        model.train()(x)
        assert changed()


def test_wrong_samplers_are_told_from_right_ones() -> None:
    model, x = SMALL.made(CPU)
    model[0].p = 0.5
    t = 200
    reference = samplers.moments(samplers.sampler(samplers.train_loop, model, x, t)())
    right = samplers.moments(samplers.sampler(samplers.modules_loop, model, x, t)())
    assert samplers.fault(right, reference, t) is None
    assert samplers.fault(samplers.ours(model, x, t)[0], reference, t) is None

    model.eval()[0].train()  # one source of two
    partial = samplers.moments(samplers._repeated(model, x, t)())
    assert "times the variance" in (samplers.fault(partial, reference, t) or "")
    same = samplers.moments(samplers._repeated(model.eval(), x, t)())
    assert samplers.fault(same, reference, t) == "identical samples"
    shifted = right._replace(mean=right.mean + right.variance.sqrt() / 2)
    assert "standard errors" in (samplers.fault(shifted, reference, t) or "")
    assert "finite" in (samplers.fault(right._replace(mean=right.mean / 0), reference, t) or "")
    assert "shape" in (samplers.fault(right._replace(mean=right.mean[:1]), reference, t) or "")


def _identical(model: nn.Module, x: Tensor, samples: int) -> samplers.Samples:
    return samplers._repeated(model.eval(), x, samples)


def _refusing(model: nn.Module, x: Tensor, samples: int) -> samplers.Samples:
    raise TypeError("not this model")


def test_wrong_and_failing_contenders_have_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    makers = {"deterministic": _identical, "refusing": _refusing, "right": samplers.train_loop}
    monkeypatch.setattr(bench_monte_carlo, "peers", lambda: makers)
    cell = bench_monte_carlo.measure(SMALL, CPU, BRIEF)
    found = cell["contenders"]
    assert found["deterministic"] == {"fault": "wrong: identical samples"}
    assert found["refusing"] == {"fault": "n/a: TypeError: not this model"}
    assert found["right"]["times_torchdrop"][1] > 0
    assert found[samplers.LOOP]["times_torchdrop"][1] > 0
    assert cell["draws"] == cell["train_mode_draws"] == 2

    ways = bench_monte_carlo.fired(SMALL, CPU)["ways"]
    assert (ways["deterministic"]["draws"], ways["deterministic"]["fault"]) == (0, "identical samples")
    assert (ways[samplers.OURS]["draws"], ways[samplers.OURS]["fault"]) == (2, None)
    assert ways["refusing"] == {"refused": "TypeError: not this model"}


def test_the_ratio_of_variances_and_its_error() -> None:
    torch.manual_seed(0)
    found = bench_monte_carlo.variance_ratio(2 * torch.randn(400, 50), torch.randn(400, 50))
    assert found["iid"] == pytest.approx(4, rel=0.05)
    assert found["ratio"] == pytest.approx(4, abs=6 * found["standard_error"])
    # each average is over 50 independent variances of 400 values: relative error sqrt(2 / (399 * 50)), twice
    assert found["standard_error"] == pytest.approx(4 * (2 * 2 / (399 * 50)) ** 0.5, rel=0.25)


def test_a_missing_package_says_how_to_install_it() -> None:
    absent = samplers.Peer("absent", "no_such_package_here", "no-such-package-here", {})
    assert absent.missing().startswith("not installed: pip install no-such-package-here")
    assert absent.version() is None


def _cell(loop: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    contenders = {samplers.OURS: {"seconds": [1.0, 1.0, 1.0]}, samplers.LOOP: loop, "peer, loop": peer}
    return {
        "case": "a case", "short": "short", "shape": [4], "samples": 5, "required": 2.0, "strategy": "loop", "chunk": 1,
        "draws": 3, "train_mode_draws": 3, "rounds": 2, "contenders": contenders,
    }  # fmt: skip


def _report(ratio: float, peer: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    timed = {"seconds": [ratio] * 3, "times_torchdrop": [ratio] * 3}
    peaks = {"case": "MLP", "bound": 2**20, "peaks": {"1": 2**20, "9": 2**21}, "chunks": {"1": 1, "9": 1}, "ratio": 2.0}
    network = {"network": 0, "samples": 20, "accuracy": 1.0, "iid": 3.0, "latin": 1.0, "fault": None}
    return {
        "machine": {"device": device},
        "quick": False,
        "speed": [_cell(timed, peer)],
        "draws": [],
        "peers": {
            "peer": {"variants": ["peer, loop"], "version": "1", "missing": ""},
            "gone": {"variants": ["gone"], "version": None, "missing": "not installed: pip install gone"},
        },
        "memory": peaks,
        "latin": {"samples": 20, "networks": [network | {"ratio": 3.0, "standard_error": 0.1}]},
    }


def test_verdicts() -> None:
    faster = {"seconds": [3.0] * 3, "times_torchdrop": [3.0] * 3}
    rows = monte_carlo_summary.verdicts(_report(2.5, faster))
    assert [row["verdict"] for row in rows] == ["ok", "ok", "short", "ok", "ok", "not measured"]
    assert rows[-1]["measured"] == "not installed: pip install gone"
    rows = monte_carlo_summary.verdicts(_report(1.5, {"fault": "wrong: identical samples"}))
    assert [row["verdict"] for row in rows][0::4] == ["short", "not measured"]
    assert rows[4]["measured"] == "short wrong: identical samples"
    assert {row["verdict"] for row in monte_carlo_summary.verdicts(_report(1.5, faster, "cuda"))} == {"-"}


def test_the_committed_result(capsys: pytest.CaptureFixture[str]) -> None:
    file = bench_monte_carlo.command.RESULTS / "monte-carlo-cpu.json"
    report = json.loads(file.read_text())
    assert report["summary"] == monte_carlo_summary.verdicts(report)
    assert not report["quick"]
    for cell in report["draws"]:
        ours = cell["ways"][samplers.OURS]
        assert (ours["draws"], ours["fault"], ours["statistics_changed"]) == (cell["train_mode_draws"], None, False)
    bench_monte_carlo.main(["--render", str(file)])
    shown = capsys.readouterr().out
    for row in report["summary"]:
        assert f"| {row['case']} | {row['required']} | {row['measured']} | {row['verdict']} |" in shown

"""The benchmark of Monte Carlo inference on many models: its list, its checks, and what it makes of a report."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mc_models
import mc_models_checks as checks
import mc_models_packages as packages
import mc_models_summary as summary
import mc_models_torch as own
import pytest
import torch
from torch import Tensor, nn

from tests import ROOT

RESULTS = ROOT / "benchmarks" / "results" / mc_models.RESULT
GUIDE = ROOT / "torchdrop" / "monte_carlo" / "README.md"

SMALL = own.Model(
    "small", "torch.nn", lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5)),
    own.normal(16, 8),
)  # fmt: skip


def test_the_list() -> None:
    names = [case.name for case in packages.MODELS]
    assert len(names) == len(set(names))
    assert len([case for case in packages.MODELS if case.package not in ("timm", "torchvision")]) >= 30
    assert set(packages.QUICK) <= set(names)
    assert {case.package for case in packages.MODELS} == {*packages.PACKAGES, "torch.nn", "torchdrop"}
    assert [case.name for case in packages.MODELS if case.large] == ["BERT, 4 layers, d = 512, 8 x 64"]
    assert {case.group for case in packages.MODELS} == {None, *summary._PASS}


@pytest.mark.parametrize("case", [*own.TORCH, *own.TORCHDROP], ids=lambda case: case.name)
def test_models_draw_as_in_train_mode(case: own.Model) -> None:
    model, inputs = case.made()
    fired, expected = checks.draws(case, model, inputs)
    assert fired == expected > 0
    assert checks.changes(case, model, inputs) == []


class TestSamples:
    def test_right_ones(self) -> None:
        model, inputs = SMALL.made()
        for seed in range(5):
            predicted = checks.predicted(SMALL, model, inputs, 50, keep_samples=True, seed=seed).samples
            torch.manual_seed(seed)
            assert checks.samples_fault(predicted, checks.loop_samples(checks.trained(model), inputs, 50)) is None

    def test_ones_that_all_elements_share(self) -> None:
        """As where one decision is made for all rows: elements are not independent."""
        found, reference = (torch.randn(50, 1, 1).expand(50, 40, 6) for _ in range(2))
        assert checks.samples_fault(found, reference) is None
        assert "a mean off" in (checks.samples_fault(found + 3, reference) or "")

    def test_wrong_ones(self) -> None:
        model, inputs = SMALL.made()
        reference = checks.loop_samples(checks.trained(model), inputs, 50)
        model[0].train()  # one source of two
        assert "times the variance" in (checks.samples_fault(checks.loop_samples(model, inputs, 50), reference) or "")
        plain = checks.loop_samples(model.eval(), inputs, 50)
        assert checks.samples_fault(plain, reference) == "identical samples"
        shifted = reference + reference.std(0) / 2
        assert "a mean off" in (checks.samples_fault(shifted, reference) or "")
        assert checks.samples_fault(reference / 0, reference) == "samples that are not finite"
        assert "of shape" in (checks.samples_fault(reference[1:], reference) or "")


class _Changing(nn.Module):
    """Draws, and changes something of its own or of others in every forward."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.drop, self.change, self.counts = nn.Dropout(0.5), change, [0]
        self.config = SimpleNamespace(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        if self.change == "Python's generator":
            random.random()
        elif self.change == "config":
            self.config.calls += 1
        elif self.change == "counts":
            self.counts[0] += 1
        elif self.change == "drop._parameters":
            self.drop.register_parameter("weight", nn.Parameter(torch.ones(1)))
        elif self.change == "drop.training":
            self.drop.training = True
        return self.drop(x)


@pytest.mark.parametrize("change", ["Python's generator", "config", "counts", "drop._parameters", "drop.training"])
def test_what_is_left_behind_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction that would be made with the model itself."""
    model, x = _Changing(change).eval(), torch.randn(4, 8)

    def predicted(case: own.Model, model: nn.Module, inputs: Any, samples: int, **options: Any) -> Any:
        return model(*inputs)

    assert checks._state(model) == checks._state(model)
    monkeypatch.setattr(checks, "predicted", predicted)
    assert change in checks.changes(SMALL, model, (x,))


def _deterministic(case: own.Model, model: nn.Module, inputs: Any, samples: int, **options: Any) -> Any:
    return SimpleNamespace(samples=checks.loop_samples(model.eval(), inputs, samples))


def test_a_wrong_sampler_has_no_times() -> None:
    found = mc_models.measure(SMALL, mc_models.BRIEF, _deterministic)
    assert found["fault"] == "identical samples"
    assert not {"speed", "pass", "memory"} & set(found)
    assert "wrong: identical samples" in summary._cells(found)
    rows = summary.verdicts(_report(found))
    assert rows[0]["measured"] == "1 of 1 short: small wrong"
    assert rows[0]["verdict"] == rows[1]["verdict"] == "short"


@pytest.mark.parametrize(
    ("what", "value", "said"),
    [("draws", (1, 2), "1 draws of 2"), ("rows_apart", 0.3, "means of rows differ by 0.3 between batches")],
)
def test_other_faults_are_wrong_too(what: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mc_models, what, lambda *arguments: value)
    found = mc_models.measure(SMALL, mc_models.BRIEF)
    assert found["fault"] == said
    assert "speed" not in found


def test_a_model_that_fails_says_so() -> None:
    def build() -> nn.Module:
        raise RuntimeError("no such\nmodel")

    found = mc_models.measure(dataclasses.replace(SMALL, build=build), mc_models.BRIEF)
    assert found["fault"] == "RuntimeError: no such"
    assert summary._cells(found)[2] == "wrong: RuntimeError: no such"
    assert [row["verdict"] for row in summary.verdicts(_report(found))][4:7] == ["short"] * 3


def test_a_right_model_is_measured() -> None:
    found = mc_models.measure(dataclasses.replace(SMALL, group="MLP"), mc_models.BRIEF)
    assert found["fault"] is None
    assert found["changed"] == []
    assert found["draws"] == found["train_mode_draws"] == 2
    assert {*found["speed"]} == {"20", "50"}
    assert all(entry["ratio"][1] > 0 for entry in found["speed"].values())
    assert {*found["pass"]["times"]} == {"eval", "train"}
    assert found["memory"][summary.OURS] > 0 < found["memory"][summary.LOOP]


def _result(name: str, speed: float = 2.0, times: float = 1.0, **more: Any) -> dict[str, Any]:
    timed = {"ratio": [speed] * 3, "seconds": {summary.LOOP: [0.1] * 3, summary.OURS: [0.1] * 3}, "rounds": 2}
    return {
        "model": name, "package": "torch.nn", "group": None, "rows": True, "fault": None, "changed": [],
        "draws": 2, "train_mode_draws": 2, "rows_apart": 0.0, "strategy": "loop",
        "pass": {"times": {"eval": [times] * 3, "train": [times] * 3}, "seconds": {}},
        "speed": {"20": timed, "50": timed}, "memory": {summary.OURS: 3 * 2**20, summary.LOOP: 2**20}, **more,
    }  # fmt: skip


def _report(*results: dict[str, Any], quick: bool = False) -> dict[str, Any]:
    return {
        "machine": {},
        "quick": quick,
        "models": [*results],
        "packages": {"timm": "not installed: pip install timm"},
    }


class TestVerdicts:
    def test_what_is_short_is_named(self) -> None:
        rows = summary.verdicts(
            _report(
                _result("slow", 0.5), _result("near", 0.95), _result("bert", times=1.3, group="BERT"),
                _result("touched", changed=["a.weight"]), _result("silent", draws=1, fault="1 draws of 2"),
                _result("mlp", times=1.5, group="MLP"), _result("apart", rows_apart=0.5, fault="means of rows"),
                {"model": "absent", "package": "timm", "group": None, "rows": True, "skipped": "not installed"},
            )
        )  # fmt: skip
        assert [(row["measured"], row["verdict"]) for row in rows] == [
            ("3 of 7 short: silent wrong, apart wrong, 0.500 (slow)", "short"),
            ("4 of 7 short: silent wrong, apart wrong, 0.500 (slow), 0.950 (near)", "short"),
            ("1 of 1 short: 1.30 (bert)", "short"),
            ("most 1.50 (mlp)", "ok"),
            ("6 of 7: not silent", "short"),
            ("6 of 7: not apart", "short"),
            ("6 of 7: not touched", "short"),
            ("median 2.00 MiB, most 2.00 MiB (touched)", "-"),
        ]

    def test_all_is_well(self) -> None:
        rows = summary.verdicts(_report(_result("a"), _result("b", 1.5, group="BERT"), _result("g", rows=False)))
        assert [row["verdict"] for row in rows] == ["ok", "ok", "ok", "not measured", "ok", "ok", "ok", "-"]
        assert rows[0]["measured"] == "least 1.50 (b)"
        assert rows[5]["measured"] == "2 of 2"

    def test_quick_runs_are_not_judged(self) -> None:
        rows = summary.verdicts(_report(_result("slow", 0.5), quick=True))
        assert {row["verdict"] for row in rows} == {row["required"] for row in rows} == {"-"}
        assert rows[0]["measured"] == "least 0.500 (slow)"


def test_sentences() -> None:
    found = summary.sentences(
        _report(_result("a", 2.0), _result("b", 1.0), _result("c", draws=1, fault="1 of 2 draws"))
    )
    assert "Of 3 models" in found
    assert "2 make all draws" in " ".join(found.split())
    assert "1.50 times as fast" in " ".join(found.split())
    assert all(len(line) <= 120 for line in found.splitlines())
    assert summary.sentences(_report()) == "No model was sampled rightly."


@pytest.mark.slow
def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It judges nothing, writes a file only where it is told to, and renders."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch_geometric")
    file = tmp_path / "quick.json"
    mc_models.main(["--quick", "--threads", "1", "--output", str(file)])
    report = json.loads(file.read_text())
    assert [result["model"] for result in report["models"]] == [*packages.QUICK]
    for result in summary.measured(report):
        assert result["fault"] is None
    assert {row["verdict"] for row in report["summary"]} == {"-"}
    capsys.readouterr()
    mc_models.main(["--render", str(file)])
    shown = capsys.readouterr().out
    for name in packages.QUICK:
        assert f"| {name} | " in shown
    if packages.PACKAGES["timm"].missing():
        assert "| ResNet-18, DropBlock | timm | skipped: not installed: pip install timm | - |" in shown


def test_memory_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    mc_models.main(["--resident", "MLP 64-256-256-10", summary.LOOP, "2", "--threads", "2"])
    assert json.loads(capsys.readouterr().out) is not None
    assert mc_models.resident(own.TORCH[0], summary.OURS, 2, 1) is not None


def test_the_committed_result() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert report["summary"] == summary.verdicts(report)
    assert not report["quick"]
    assert [result["model"] for result in report["models"]] == [case.name for case in packages.MODELS]
    assert summary.sentences(report) in GUIDE.read_text(encoding="utf-8")

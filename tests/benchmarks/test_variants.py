"""The benchmark of variants: its checks, its cells, and what it makes of a report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench_variants
import checks
import command
import harness
import pytest
import torch
import torch.nn.functional as F
import variants_own
import variants_peers
import variants_summary
from torch import Tensor, nn

import torchdrop
from torchdrop.layers.drop_block.drop_block import DropBlock2d, drop_block2d

BRIEF = harness.Effort(budget=0.0, batch=1e-5, min_rounds=2, max_rounds=2)
SHAPE = (32, 4, 14, 14)


def image(gradient: bool = True) -> Tensor:
    return checks.sample(SHAPE, torch.float32, "cpu").requires_grad_(gradient)


def clipped(x: Tensor) -> Tensor:
    """Blocks that may start anywhere and reach over the edge."""
    seeds = (torch.rand_like(x) < 0.02).float()
    kept = 1 - F.max_pool2d(F.pad(seeds, [4, 0, 4, 0]), 5, 1)
    return x * kept * 1.25


def test_the_check_of_blocks_lets_right_ones_pass() -> None:
    assert variants_peers.block_fault(DropBlock2d(0.1, 5), image(), 5) is None
    assert variants_peers.block_fault(DropBlock2d(0.1, 5, shared_axes=1), image(False), 5) is None
    assert variants_peers.block_fault(clipped, image(), 5) is None


WRONG: dict[str, Any] = {
    "drops outside of whole blocks": lambda x: drop_block2d(x, 0.1, 4),
    "several scales": lambda x: drop_block2d(x, 0.1, 5, scaling="marginal"),
    "the same mask in two calls": lambda x: torchdrop.functional.dropout(x, 0.0),
    "values that are not finite": lambda x: drop_block2d(x, 0.1, 5) / torch.zeros(()),
    "two results under one seed": lambda x: drop_block2d(x, 0.1, 5, generator=GENERATOR),
    "a gradient of several scales": lambda x: OtherScale.apply(drop_block2d(x, 0.1, 5)),
    "float64": lambda x: drop_block2d(x, 0.1, 5).double(),
}

GENERATOR = torch.Generator()


class OtherScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.linspace(1, 2, grad.shape[-1])


@pytest.mark.parametrize("why", WRONG)
def test_the_check_of_blocks_sees_what_is_wrong(why: str) -> None:
    found = variants_peers.block_fault(WRONG[why], image(), 5)
    assert found is not None
    assert why in found


def test_a_missing_package_says_how_to_install_it() -> None:
    absent = variants_peers.Peer("absent", "no_such_package_here.ops", "no-such-package-here")
    assert absent.missing().startswith("not installed: pip install no-such-package-here")
    assert absent.version() is None
    modules, facts = bench_variants.available([absent])
    assert (modules, facts["absent"]["version"]) == ({}, None)


def test_a_package_of_another_build_is_imported_with_the_schemas_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "if not hasattr(torch.ops.torchvision, 'qnms'):\n"
        "    raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    (package / "ops.py").write_text("NAME = 'found'\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        torch.library, "define", lambda *_: monkeypatch.setattr(torch.ops.torchvision, "qnms", 1, False)
    )
    try:
        assert variants_peers.Peer("torchvision", "torchvision.ops", "torchvision").load().NAME == "found"
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def _case(peer: Any) -> bench_variants.Case:
    return bench_variants.Case("blocks", lambda: DropBlock2d(0.1, 7), {"peer": lambda _: peer}, bench_variants._blocks)


def test_right_contenders_are_timed_and_wrong_ones_are_not() -> None:
    cell = bench_variants.measure(_case(DropBlock2d(0.1, 7)), {"peer": None}, SHAPE, BRIEF)
    assert cell["contenders"]["peer"]["times_torchdrop"][1] > 0
    assert cell["contenders"][bench_variants.LIMIT]["seconds"][1] > 0
    cell = bench_variants.measure(_case(nn.Dropout(0.1)), {"peer": None}, SHAPE, BRIEF)
    assert cell["contenders"]["peer"] == {"fault": "wrong: drops outside of whole blocks"}
    cell = bench_variants.measure(_case(nn.Dropout(0.1)), {}, SHAPE, BRIEF)
    assert "peer" not in cell["contenders"]


def test_the_share_that_is_dropped_is_measured() -> None:
    share, error = bench_variants.dropped_share(nn.Dropout(0.25), 7, 1e-3, 5.0)
    assert 0 < error <= 1e-3
    assert abs(share - 0.25) < 6 * error


def test_halves_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_variants, "SHAPE", SHAPE)
    monkeypatch.setattr(bench_variants, "CASES", [_case(lambda x: x * float("inf"))])
    found = bench_variants.halves({"peer": None})[0]["contenders"]
    assert (found["torchdrop"]["finite"], found["peer"]["finite"]) == (True, False)
    assert 0.7 < found["torchdrop"]["kept"] < 1


@pytest.mark.slow
def test_the_costs_of_the_other_variants_are_measured() -> None:
    cells = [variants_own.measure(case, BRIEF) for case in variants_own.cases(quick=True)]
    assert len({cell["label"] for cell in cells}) == len(cells) > 20
    assert [cell for cell in cells if "fault" in cell] == []


class Still(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if self.training else x


class Loud(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(())


def test_variants_that_do_not_what_they_should_are_not_timed() -> None:
    x, plain = torch.ones(3, 4), nn.Identity()
    for variant, why in ((Still(), "one result in two calls"), (Loud(), "another result in eval mode")):
        cell = variants_own.measure(variants_own.Own("a", "b", variant, plain, x), BRIEF)
        assert cell["fault"] == f"wrong: {why}"


def _report(ratio: float, dropped: float = 0.1, mean: float = 1.0, quick: bool = False) -> dict[str, Any]:
    timed = {"seconds": [ratio] * 3, "times_torchdrop": [ratio] * 3}
    step = {
        "label": "MLP", "contenders": {
            name: {"seconds": [1.0] * 3} | ({} if name == "compact" else {"times_compact": [1.8] * 3})
            for name in ("no dropout", "compact", "torchdrop.Dropout", "torch.nn.Dropout")
        },
    }  # fmt: skip
    report = {
        "machine": {
            "cpu": "a processor", "cores": 2, "threads": 2, "os": "an OS", "python": "3.11", "torch": "2.13",
            "torchdrop": "0.1", "commit": "0123456789abcdef", "dirty": False, "date": "2026-01-01", "device": "cpu",
        },
        "quick": quick,
        "seconds": 1.0,
        "peers": {
            "timm": {"version": "1", "missing": ""},
            "torchvision": {"version": None, "missing": "not installed: pip install torchvision"},
        },
        "speed": [
            {"label": "A", "shape": [2, 3], "required": 2.0, "peers": ["timm"],
             "contenders": {"torchdrop": {"seconds": [1.0] * 3}, "timm": timed, "x * s": timed}},
            {"label": "B", "shape": [2, 3], "required": 2.0, "peers": ["torchvision"],
             "contenders": {"torchdrop": {"seconds": [1.0] * 3}, "x * s": timed}},
            {"label": "C", "shape": [2, 3], "required": 0.0, "peers": ["timm"],
             "contenders": {"torchdrop": {"seconds": [1.0] * 3}, "timm": {"fault": "wrong: zeros only"}}},
        ],
        "rates": [{"size": 7, "block": 7, "p": 0.1, "dropped": {"torchdrop": [dropped, 1e-5], "timm": [0.93, 1e-3]}}],
        "halves": [{"label": "A", "contenders": {
            "torchdrop": {"finite": True, "kept": 0.9, "mean": mean},
            "timm": {"finite": True, "kept": 0.0, "mean": 0.0},
        }}],
        "own": [
            {"label": "D", "operation": "x * s", "shape": [4], "seconds": {"variant": [2.0] * 3, "plain": [1.0] * 3},
             "times_plain": [2.0] * 3},
            {"label": "E", "operation": "x * s", "shape": [4], "fault": "wrong: one result in two calls"},
        ],
        "compact": [step],
    }  # fmt: skip
    report["summary"] = variants_summary.verdicts(report)
    return json.loads(json.dumps(report))


def test_verdicts() -> None:
    rows = _report(2.5)["summary"]
    assert [row["verdict"] for row in rows] == ["ok", "not measured", "-", "ok", "ok", "ok"]
    assert rows[0]["measured"] == "timm 2.50x [2.50, 2.50]"
    assert rows[1]["measured"] == "torchvision not installed: pip install torchvision"
    assert rows[2]["measured"] == "timm wrong: zeros only"
    assert rows[3]["measured"] == "off by 0.000 % at most"
    assert [row["verdict"] for row in _report(1.9, 0.102, 0.0)["summary"]][::3] == ["short", "short"]
    assert _report(2.5, mean=0.0)["summary"][4]["verdict"] == "short"
    assert {row["verdict"] for row in _report(1.0, quick=True)["summary"]} == {"-"}


def test_torchdrop_itself_must_be_right() -> None:
    report = _report(2.5)
    report["speed"][0]["contenders"] = {"torchdrop": {"fault": "wrong: several scales"}, "timm": {"seconds": [1.0] * 3}}
    row = variants_summary.verdicts(report)[0]
    assert (row["verdict"], row["measured"]) == ("short", "timm torchdrop wrong: several scales")


def test_render(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(_report(2.5)))
    bench_variants.main(["--render", str(file)])
    shown = capsys.readouterr().out
    assert shown.startswith(
        "a processor, 2 cores, 2 threads, an OS; Python 3.11, torch 2.13, torchdrop 0.1 at 0123456789;"
    )
    assert "| A | 1.00 s | 2.50 s (2.50x) | 2.50 s (2.50x) |" in shown
    assert "| C | 1.00 s | wrong: zeros only |" in shown
    assert "| 7 x 7 | 7 | 0.1000 ± 0.0000 | 0.9300 ± 0.0010 |" in shown
    assert "| A | 1.000 (90.0 % kept) | zeros only |" in shown
    assert "| D | 4 | x * s | 2.00 s | 1.00 s | 2.00x [2.00, 2.00] |" in shown
    assert "| E | 4 | x * s | wrong: one result in two calls | - | - |" in shown
    assert all(line.endswith("|") for line in shown.splitlines() if line.startswith("|"))


def test_the_committed_result(capsys: pytest.CaptureFixture[str]) -> None:
    file = command.RESULTS / bench_variants.RESULT
    report = json.loads(file.read_text())
    assert report["summary"] == variants_summary.verdicts(report)
    assert not report["quick"]
    bench_variants.main(["--render", str(file)])
    shown = capsys.readouterr().out
    for row in report["summary"]:
        assert f"| {row['case']} | {row['required']} | {row['measured']} | {row['verdict']} |" in shown

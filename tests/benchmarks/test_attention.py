"""The benchmark of attention: its checks, its cells, and what it makes of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_attention
import harness
import pytest
import torch
import torch.nn.functional as F
from bench_attention import OURS, PLAIN, STOCK, P

from torchdrop.functional import scaled_dot_product_attention
from torchdrop.ops import attention

BRIEF = harness.Effort(budget=0.0, batch=1e-5, min_rounds=2, max_rounds=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", bench_attention.CONTENDERS)
def test_right_contenders_pass(name: str, masked: bool, dtype: torch.dtype) -> None:
    p = 0.0 if name == PLAIN else P
    assert bench_attention.fault(bench_attention.CONTENDERS[name], dtype, masked, p) is None


WRONG: list[tuple[Any, str]] = [
    (lambda q, k, v, m: scaled_dot_product_attention(q, k, v, m, 0.3), "a kept share of 0."),
    (lambda q, k, v, m: scaled_dot_product_attention(q, k, v, None, P), "another output"),
    (lambda q, k, v, m: 1.1 * scaled_dot_product_attention(q, k, v, m, P), "another output"),
    (lambda q, k, v, m: scaled_dot_product_attention(q.detach() + 0 * q, k, v, m, P), "another gradient of query"),
    (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), "a kept share of 1."),
]


@pytest.mark.parametrize(("function", "found"), WRONG)
def test_wrong_contenders_are_found(function: Any, found: str) -> None:
    fault = bench_attention.fault(function, torch.float32, True, P)
    assert fault is not None
    assert found in fault


def test_a_report_is_measured_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "FEW", 0)  # few weights are kept
    cell = bench_attention.Cell((2, 2, 16, 8), torch.float32, times=1e-9, at_most=1e-9)
    report = {"cells": [bench_attention.measure(cell, BRIEF)], "machine": {}, "quick": False}
    assert [row["verdict"] for row in bench_attention.verdicts(report)] == ["ok", "short"]
    found = report["cells"][0]["contenders"]
    assert set(found) == {OURS, STOCK, PLAIN}
    assert found[OURS]["kept_bytes"] == 4 * 2 * 2 * 16 * (4 * 8 + 1)
    assert len(bench_attention.row(report["cells"][0])) == len(bench_attention.HEADER)


def test_a_quick_run_writes_what_can_be_rendered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_attention, "Effort", lambda **_: BRIEF)
    output = tmp_path / "report.json"
    threads = torch.get_num_threads()
    bench_attention.main(["--quick", "--threads", str(threads), "--output", str(output)])
    assert len(json.loads(output.read_text())["cells"]) == 4
    bench_attention.main(["--render", str(output)])
    assert "| shape | dtype |" in capsys.readouterr().out

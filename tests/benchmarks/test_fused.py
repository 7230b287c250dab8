"""The benchmark of fused operators: its checks, its cells, and what it makes of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_fused
import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchdrop

BRIEF = harness.Effort(budget=0.0, batch=1e-5, min_rounds=2, max_rounds=2)
ADD, BIAS_ADD, RELU, GELU = bench_fused.OPERATIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", bench_fused.OPERATIONS, ids=lambda operation: operation.label)
def test_right_contenders_pass(operation: bench_fused.Operation, dtype: torch.dtype) -> None:
    cell = bench_fused.Cell(operation, 32, dtype)
    maps, operands = bench_fused.contenders(cell), cell.operands()
    assert list(maps) == ["fused", "separate", "torch.nn"]
    assert [bench_fused.fault(function, cell, operands) for function in maps.values()] == [None] * 3
    assert bench_fused.differ(cell, maps, operands) is None


class OtherMask(torch.autograd.Function):
    """Drops other elements backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torchdrop.functional.dropout(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torchdrop.functional.dropout(grad)


WRONG: list[tuple[Any, Any, str]] = [
    (ADD, lambda x, r: x + torchdrop.functional.dropout(r), "neither dropped nor kept"),
    (ADD, lambda x, r: r + torchdrop.functional.dropout(x, 0.3), "neither dropped nor kept"),
    (ADD, lambda x, r: r + 2 * torchdrop.functional.dropout(x, 0.4, inverted=False), "a kept share of 0."),
    (ADD, lambda x, r: r + OtherMask.apply(x), "a gradient of another mask"),
    (ADD, lambda x, r: r.detach() + 0 * r + torchdrop.functional.dropout(x), "a gradient of another mask"),
    (RELU, lambda x: torchdrop.functional.dropout(x), "neither dropped nor kept"),
    (RELU, lambda x: OtherMask.apply(F.relu(x)), "a gradient of another mask"),
    (GELU, lambda x: torchdrop.functional.dropout(F.gelu(x, approximate="tanh")), "neither dropped nor kept"),
]


@pytest.mark.parametrize(("operation", "function", "found"), WRONG)
def test_wrong_contenders_are_found(operation: bench_fused.Operation, function: Any, found: str) -> None:
    cell = bench_fused.Cell(operation, 32)
    fault = bench_fused.fault(function, cell, cell.operands())
    assert fault is not None
    assert found in fault


def test_a_fused_operator_that_differs_from_the_separate_ones_is_found() -> None:
    cell = bench_fused.Cell(ADD, 4)
    maps = bench_fused.contenders(cell) | {"fused": lambda x, r: r + torchdrop.functional.dropout(x + 1e-3)}
    assert bench_fused.differ(cell, maps, cell.operands()) == "another result than that of the separate operators"


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = bench_fused.Cell(RELU, 4)
    found = bench_fused.measure(cell, BRIEF)
    assert {name: set(entry) for name, entry in found["contenders"].items()} == {
        "fused": {"seconds"},
        "separate": {"seconds", "times_fused"},
        "torch.nn": {"seconds", "times_fused"},
    }
    assert (found["elements"], found["required"], found["dtype"]) == (4096, 1.3, "float32")
    wrong = bench_fused.contenders(cell) | {"fused": lambda x: torchdrop.functional.dropout(x)}
    monkeypatch.setattr(bench_fused, "contenders", lambda _: wrong)
    found = bench_fused.measure(cell, BRIEF)
    assert found["contenders"]["fused"] == {"fault": "wrong: an element that is neither dropped nor kept"}
    assert "times_fused" not in found["contenders"]["separate"]
    assert bench_fused.verdict(found)["verdict"] == "short"
    assert bench_fused.row(found)[3:5] == [
        "wrong: an element that is neither dropped nor kept",
        harness.duration(found["contenders"]["separate"]["seconds"][1]),
    ]


def cell(label: str, elements: int, ratio: float, dtype: str = "float32", required: float = 1.3) -> dict[str, Any]:
    times = {"seconds": [1e-3, 1e-3, 1e-3], "times_fused": [ratio] * 3}
    return {
        "label": label, "elements": elements, "required": required, "dtype": dtype, "rounds": 3,
        "contenders": {"fused": {"seconds": [1e-3] * 3}, "separate": times, "torch.nn": times},
    }  # fmt: skip


def test_what_is_required_is_judged_at_2_to_the_20_in_float32_alone() -> None:
    cells = [
        cell("a", 2**20, 1.31), cell("b", 2**20, 1.29), cell("a", 2**16, 1.0), cell("a", 2**20, 1.0, "bfloat16"),
        cell("c", 2**20, 0.5, required=0.0),
    ]  # fmt: skip
    rows = bench_fused.verdicts({"cells": cells})
    assert [(row["case"][0], row["verdict"]) for row in rows] == [("a", "ok"), ("b", "short")]
    assert rows[0]["measured"] == "1.31x [1.31, 1.31]"


def test_a_quick_run_writes_nothing_and_a_file_is_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fused.json"
    bench_fused.main(["--quick", "--output", str(file)])
    report = json.loads(file.read_text())
    assert [c["label"] for c in report["cells"]] == [operation.label for operation in bench_fused.OPERATIONS]
    assert report["summary"] == []
    report["cells"] = [cell("dropout_add", 2**20, 1.5)]
    report["summary"] = bench_fused.verdicts(report)
    file.write_text(json.dumps(report))
    capsys.readouterr()
    bench_fused.main(["--render", str(file)])
    shown = capsys.readouterr().out
    assert "| dropout_add, float32, 2^20, forward + backward | 1.3 times faster than separate | 1.50x" in shown
    assert "| dropout_add | 2^20 | float32 | 1.00 ms | 1.00 ms | 1.00 ms | 1.50x | 1.50x |" in shown

"""The benchmark on CUDA, as far as it goes without a device: what it measures, refuses, judges and draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_cuda
import bench_dropout
import command
import cuda_summary
import harness
import machine
import pytest
import summary
import torch
import torch.nn.functional as F
from cuda_summary import COMPILED_OURS, COMPILED_STOCK, COPY, OURS, STOCK
from torch import Tensor, nn

import torchdrop

pytestmark = pytest.mark.slow

BRIEF = harness.Effort(budget=0.0, batch=1e-6, min_rounds=3, max_rounds=3)
CPU = torch.device("cpu")
LARGE, ADD = bench_cuda.Cell("large", "dropout", 2**12), bench_cuda.Cell("large", "dropout_add", 2**12)


class Ticks:
    """A clock by which every call of a contender takes as long as is said."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, call: harness.Call, count: int) -> float:
        for _ in range(count):
            call()
        self.calls += count
        return self.seconds * count


def test_cells_are_those_that_are_asked_for() -> None:
    large = [(c.operation, c.elements, c.mode) for c in bench_cuda.cells(False) if c.section == "large"]
    assert large == [("dropout", 2**28, summary.BOTH), ("dropout_add", 2**28, summary.BOTH)]
    launches = {(c.elements, c.mode) for c in bench_cuda.cells(False) if c.section == "launch"}
    assert launches == {(2**e, mode) for e in (10, 12, 14, 16) for mode in (summary.FORWARD, summary.BOTH)}
    assert max(c.elements for c in bench_cuda.cells(True)) < 2**28


def test_inputs_are_exact_under_dropout_and_sums() -> None:
    x, residual = ADD.inputs(CPU)
    assert x.dtype == residual.dtype == torch.bfloat16
    assert x.requires_grad
    assert residual.requires_grad
    assert not torch.equal(x, residual)
    assert len(LARGE.inputs(CPU)) == 1
    for values in (x, residual):
        assert (values != 0).all()
        assert torch.equal(values * 4, (values * 4).round())
        assert values.abs().max() <= 2
    assert torch.equal((2 * x + residual) - residual, 2 * x)
    assert torch.equal((2 * x + residual).double(), 2 * x.double() + residual.double())
    assert not bench_cuda.Cell("launch", "dropout", 2**10, summary.FORWARD).inputs(CPU)[0].requires_grad
    million, more = (bench_cuda.quarters(2**e, CPU, 1) for e in (20, 22))
    assert torch.equal(more.reshape(4, -1), million.expand(4, -1))


def test_right_contenders_are_timed_against_torchdrop() -> None:
    clock = Ticks()
    maps = {OURS: torchdrop.Dropout(0.5), STOCK: nn.Dropout(0.5)}
    result = bench_cuda.measure(LARGE, CPU, BRIEF, maps, clock)
    assert set(result["contenders"]) == {OURS, STOCK, COPY}
    assert all(entry["seconds"] == (1.0, 1.0, 1.0) for entry in result["contenders"].values())
    assert result["contenders"][STOCK]["times_torchdrop"] == (1.0, 1.0, 1.0)
    assert result["contenders"][COPY]["times_torchdrop"] == (1.0, 1.0, 1.0)
    assert "times_torchdrop" not in result["contenders"][OURS]
    assert clock.calls >= 9
    assert (result["label"], result["rounds"]) == ("dropout, 2^12, forward + backward", 3)


def test_only_a_large_dropout_is_compared_with_a_copy() -> None:
    launch = bench_cuda.Cell("launch", "dropout", 2**10, summary.FORWARD)
    for cell in (launch, ADD):
        maps = {OURS: bench_cuda.fused, STOCK: bench_cuda.added} if cell is ADD else {OURS: torchdrop.Dropout(0.5)}
        assert COPY not in bench_cuda.measure(cell, CPU, BRIEF, maps, Ticks())["contenders"]


def test_a_copy_moves_the_bytes_of_both_passes() -> None:
    x = torch.randn(100, requires_grad=True)
    first, second = bench_cuda.copying(x)()  # type: ignore[misc]
    assert torch.equal(first, x)
    assert first.data_ptr() != x.data_ptr()
    assert second.shape == x.shape


class OtherResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


WRONG: dict[str, Any] = {
    "values other than 0": lambda x, r: F.dropout(x, 0.5) * 1.5 + r,
    "a kept fraction": lambda x, r: F.dropout(x, 0.4) * 1.2 + r,
    "the same mask": lambda x, r: F.dropout(x, 0.5) + r if torch.manual_seed(1) else x,
    "a gradient of the residual": lambda x, r: F.dropout(x, 0.5) + OtherResidual.apply(r),
    "a gradient with another mask": lambda x, r: (F.dropout(x, 0.5) - x).detach() + x + r,
}


@pytest.mark.parametrize("why", WRONG)
def test_a_wrong_sum_is_found_and_gets_no_time(why: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_cuda.measure(ADD, CPU, BRIEF, {OURS: WRONG[why], STOCK: bench_cuda.added}, Ticks())
    found = result["contenders"][OURS]
    assert found["fault"].startswith(f"wrong: {why}")
    assert "times_torchdrop" not in result["contenders"][STOCK]
    assert found["fault"] in capsys.readouterr().out
    assert bench_cuda.cell_row(result)[1] == "wrong"


def test_a_compiler_that_fails_is_a_result_and_anything_else_is_not() -> None:
    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("no compiler\nat all")

    result = bench_cuda.measure(LARGE, CPU, BRIEF, {OURS: nn.Dropout(0.5), COMPILED_OURS: failing}, Ticks())
    assert result["contenders"][COMPILED_OURS] == {"fault": "n/a: RuntimeError: no compiler"}
    assert bench_cuda.cell_row(result)[4] == "n/a"
    with pytest.raises(RuntimeError, match="no compiler"):
        bench_cuda.measure(LARGE, CPU, BRIEF, {OURS: failing}, Ticks())


def test_bytes_grow_as_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(x: Tensor, *_: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    plain = {COMPILED_STOCK: failing, COMPILED_OURS: failing}
    monkeypatch.setattr(bench_cuda, "compiled", lambda operation: plain)
    found = {(m["operation"], m["contender"]): m for m in bench_cuda.kept_and_peak(CPU, (2**14, 2**16))}
    assert len(found) == 8
    for operation in ("dropout", "dropout_add"):
        assert found[operation, OURS]["kept"] == 0
        assert found[operation, STOCK]["kept"] > 0
        assert found[operation, OURS]["peak"] <= found[operation, STOCK]["peak"]
        assert found[operation, COMPILED_OURS]["fault"] == "n/a: RuntimeError"
    assert found["dropout", OURS]["peak"] == pytest.approx(4, abs=0.01)  # the output and the gradient


@pytest.mark.slow
@pytest.mark.parametrize("cell", [LARGE, ADD], ids=["dropout", "dropout_add"])
def test_compiled_contenders_are_measured(cell: bench_cuda.Cell) -> None:
    result = bench_cuda.measure(cell, CPU, BRIEF, None, Ticks())
    assert {OURS, STOCK, COMPILED_STOCK, COMPILED_OURS} <= set(result["contenders"])
    assert not [entry["fault"] for entry in result["contenders"].values() if "fault" in entry]
    assert result["contenders"][COMPILED_OURS]["times_torch_compiled"] == (1.0, 1.0, 1.0)


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it on the CPU, with the plain functions in place of the compiled ones."""
    small = [LARGE, ADD, bench_cuda.Cell("launch", "dropout", 2**10)]
    ours, stock = {"dropout": torchdrop.Dropout(0.5), "dropout_add": bench_cuda.fused}, bench_cuda.added
    monkeypatch.setattr(bench_cuda, "cells", lambda quick: iter(small))
    monkeypatch.setattr(
        bench_cuda,
        "compiled",
        lambda name: {COMPILED_STOCK: stock if name == "dropout_add" else nn.Dropout(0.5), COMPILED_OURS: ours[name]},
    )
    monkeypatch.setattr(bench_cuda, "Effort", lambda **_: BRIEF)
    report = json.loads(json.dumps(bench_cuda.run(CPU, True)))
    rows = {row["case"]: row for row in report["summary"]}
    assert len(rows) == len(cuda_summary.ROWS)
    assert {row["verdict"] for row in rows.values()} == {"-"}
    assert rows["bytes an element kept for backward, bf16"]["measured"].startswith("dropout 0, dropout_add 0 (torch")
    assert "bytes an element" in capsys.readouterr().out
    report["quick"] = False
    judged = {row["case"]: row["verdict"] for row in cuda_summary.verdicts(report)}
    assert set(judged.values()) <= {"ok", "short"}
    assert judged["bytes an element kept for backward, bf16"] == "ok"
    shown = bench_cuda.render(report)
    assert "| dropout_add, 2^12, forward + backward |" in shown
    assert "| dropout_add | torchdrop compiled | 0 |" in shown


def _entry(seconds: float, ratio: float, **more: Any) -> dict[str, Any]:
    return {"seconds": [seconds] * 3, "calls_per_round": 1, "times_torchdrop": [ratio] * 3, **more}


def _large(operation: str, stock: float, compiled: float = 1.0) -> dict[str, Any]:
    found = {
        OURS: {"seconds": [1e-3] * 3, "calls_per_round": 1},
        STOCK: _entry(1e-3 * stock, stock),
        COMPILED_STOCK: _entry(1e-3, 1.0),
        COMPILED_OURS: _entry(1e-3 * compiled, compiled, times_torch_compiled=[compiled] * 3),
    }
    if operation == "dropout":
        found[COPY] = _entry(0.9e-3, 0.9)
    return {
        "section": "large", "label": f"{operation}, 2^28, forward + backward", "operation": operation,
        "elements": 2**28, "mode": summary.BOTH, "dtype": "bfloat16", "p": 0.5, "rounds": 9, "contenders": found,
    }  # fmt: skip


def _launch(exponent: int, mode: str, stock: float) -> dict[str, Any]:
    found = {OURS: {"seconds": [1e-5] * 3, "calls_per_round": 1}, STOCK: _entry(1e-5 * stock, stock)}
    return {"section": "launch", "label": "", "elements": 2**exponent, "mode": mode, "contenders": found}


@pytest.fixture
def report() -> dict[str, Any]:
    facts = {
        "device": "cuda", "cpu": "a processor", "cores": 8, "threads": 2, "os": "an OS", "python": "3.11",
        "torch": "2.13.0+cu130", "torchdrop": "0.1", "commit": "0123456789abcdef", "dirty": False,
        "date": "2026-01-01", "gpu": "NVIDIA H200", "cuda": "13.0", "driver": "580.95", "triton": "3.9.0",
    }  # fmt: skip
    kept = {OURS: 0.0, STOCK: 1.0, COMPILED_STOCK: 0.0, COMPILED_OURS: 0.0}
    memory = [
        {"operation": operation, "contender": name, "sizes": [1, 2], "kept": kept[name], "peak": 4.0 + kept[name]}
        for operation in ("dropout", "dropout_add")
        for name in kept
    ]
    cells = [_large("dropout", 1.25), _large("dropout_add", 1.55)]
    cells += [_launch(10, summary.FORWARD, 1.0), _launch(16, summary.BOTH, 1 / 1.19)]
    made = {"machine": facts, "quick": False, "backend": "triton", "cells": cells, "memory": memory}
    made["summary"] = cuda_summary.verdicts(made)
    return json.loads(json.dumps(made))


def _judged(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {row["case"]: (row["measured"], row["verdict"]) for row in cuda_summary.verdicts(report)}


EAGER = "dropout, bf16, 2^28, forward + backward, against eager"
BANDWIDTH = "dropout, bf16, 2^28, forward + backward, bandwidth"
KEPT = "bytes an element kept for backward, bf16"
SUM = "dropout_add, bf16, 2^28, forward + backward, against eager dropout and add"
COMPILED = "dropout, bf16, 2^28, forward + backward, both compiled"
COMPILED_SUM = "dropout_add, bf16, 2^28, forward + backward, both compiled"
BYTES = "bytes an element, both compiled, torch's in brackets"
OVERHEAD = "overhead of a call, bf16, 2^10 to 2^16, forward, and with backward"


def test_every_row_holds_where_it_should(report: dict[str, Any]) -> None:
    found = _judged(report)
    assert {verdict for _, verdict in found.values()} == {"ok"}
    assert found[EAGER][0] == "1.25x [1.25, 1.25] (1.25 ms / 1.00 ms)"
    assert found[BANDWIDTH][0] == "90.0 % (2.15 of 2.39 TB/s)"
    assert found[KEPT][0] == "dropout 0, dropout_add 0 (torch.nn: 1.00)"
    assert found[SUM][0] == "1.55x [1.55, 1.55] (1.55 ms / 1.00 ms)"
    assert found[COMPILED][0] == found[COMPILED_SUM][0] == "1.00x [1.00, 1.00] its time"
    assert found[BYTES][0] == (
        "dropout kept 0 (0), dropout peak 4.00 (4.00), dropout_add kept 0 (0), dropout_add peak 4.00 (4.00)"
    )
    assert found[OVERHEAD][0] == "1.00 (2^10), 1.19 (2^16 both)"


def test_every_row_is_short_where_it_should(report: dict[str, Any]) -> None:
    dropout, add, launch = report["cells"][0]["contenders"], report["cells"][1]["contenders"], report["cells"][3]
    dropout[STOCK]["times_torchdrop"][1] = 1.19
    dropout[COPY]["times_torchdrop"][1] = 0.84
    dropout[COMPILED_OURS]["times_torch_compiled"][1] = 1.06
    add[STOCK]["times_torchdrop"][1] = 1.49
    add[COMPILED_OURS]["times_torch_compiled"][1] = 1.06
    launch["contenders"][STOCK]["times_torchdrop"] = [1 / 1.21] * 3
    for one in report["memory"]:
        if one["operation"] == "dropout_add" and one["contender"] in (OURS, COMPILED_OURS):
            one["kept"] = 0.125
    assert {verdict for _, verdict in _judged(report).values()} == {"short"}


def test_a_peak_above_the_compiled_ones_is_short(report: dict[str, Any]) -> None:
    (ours,) = [m for m in report["memory"] if m["operation"] == "dropout" and m["contender"] == COMPILED_OURS]
    ours["peak"] = 6.0
    assert [case for case, (_, verdict) in _judged(report).items() if verdict == "short"] == [BYTES]


def test_a_wrong_result_is_short_and_a_missing_rival_is_not_measured(report: dict[str, Any]) -> None:
    cells = report["cells"]
    cells[0]["contenders"][OURS] = {"fault": "wrong: values"}
    cells[0]["contenders"][COMPILED_STOCK] = {"fault": "n/a: RuntimeError: no compiler"}
    cells[1]["contenders"][COMPILED_OURS] = {"fault": "wrong: values"}
    cells[3]["contenders"][STOCK] = {"fault": "wrong: values"}
    for one in report["memory"]:
        if one["contender"] == COMPILED_STOCK:
            one["fault"] = "n/a: RuntimeError"
    found = _judged(report)
    assert found[EAGER] == found[BANDWIDTH] == ("torchdrop wrong: values", "short")
    assert found[COMPILED] == ("torch.nn compiled n/a: RuntimeError: no compiler", "not measured")
    assert found[COMPILED_SUM] == ("torchdrop compiled wrong: values", "short")
    assert found[BYTES] == ("torch.nn compiled n/a: RuntimeError", "not measured")
    assert found[OVERHEAD] == ("torch.nn wrong: values", "not measured")
    assert found[KEPT][1] == "ok"
    assert cuda_summary.memory_row(report["memory"][2])[2:] == ["n/a: RuntimeError", "-"]


def test_a_quick_run_is_not_judged(report: dict[str, Any]) -> None:
    report["quick"] = True
    assert {verdict for _, verdict in _judged(report).values()} == {"-"}


def test_render(report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cuda.json"
    file.write_text(json.dumps(report))
    bench_cuda.main(["--render", str(file)])
    shown = capsys.readouterr().out
    assert shown.startswith(
        "a processor, 8 cores, 2 threads, an OS, NVIDIA H200 (driver 580.95, CUDA 13.0); Python 3.11, "
        "torch 2.13.0+cu130, triton 3.9.0, torchdrop 0.1 at 0123456789; 2026-01-01.\n"
    )
    assert f"| {BANDWIDTH} | at least 85 % of a copy's of the same bytes | 90.0 % (2.15 of 2.39 TB/s) | ok |" in shown
    assert "\nMasks came from the triton backend.\n" in shown
    assert "| dropout, 2^28, forward + backward | 1.00 ms | 1.25 ms | 1.00 ms | 1.00 ms | 900 us |" in shown
    assert "| dropout | torch.nn | 1.00 | 5.00 |" in shown
    assert shown.partition("\n###")[0].strip() == cuda_summary.section(report) == cuda_summary.committed(file)


def test_without_a_run_the_table_says_why(tmp_path: Path) -> None:
    shown = cuda_summary.committed(tmp_path / "cuda.json")
    assert shown == cuda_summary.section(None)
    assert shown.count(" | no GPU was to be had | - |") == len(cuda_summary.ROWS)
    assert shown.startswith("| case | required | measured | verdict |")


def test_the_table_takes_its_place_in_a_file(report: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"before\n\n<!-- cuda -->\n{cuda_summary.section(None)}\n<!-- end of cuda -->\n\nafter\n")
    cuda_summary.fill(file, report)
    filled = file.read_text()
    assert filled == f"before\n\n<!-- cuda -->\n{cuda_summary.section(report)}\n<!-- end of cuda -->\n\nafter\n"
    cuda_summary.fill(file, report)
    assert file.read_text() == filled


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as error:
        bench_cuda.main(arguments)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, swapped = tmp_path / "plain.md", tmp_path / "swapped.md"
    plain.write_text("no place")
    swapped.write_text("<!-- end of cuda -->\n<!-- cuda -->")
    for file in (plain, swapped, tmp_path / "absent.md"):
        message = f"--fill: {file} has no lines <!-- cuda --> and <!-- end of cuda -->"
        assert message in _refused(["--fill", str(file)], capsys)
    good = tmp_path / "good.md"
    good.write_text("<!-- cuda -->\n<!-- end of cuda -->")
    assert "not with --quick or --render" in _refused(["--fill", str(good), "--quick"], capsys)
    assert "not with --quick or --render" in _refused(["--fill", str(good), "--render", "x.json"], capsys)
    message = "--device must be a CUDA device, got cpu: on the CPU, bench_dropout.py measures"
    assert message in _refused(["--device", "cpu"], capsys)


@pytest.mark.parametrize("program", [bench_cuda, bench_dropout])
def test_without_a_device_nothing_is_measured(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(program, "run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as error:
        program.main(["--device", "cuda"])
    assert error.value.code == 2
    assert "there is no CUDA device here, or this build of torch cannot use it" in capsys.readouterr().err


def test_a_run_is_written_and_fills_the_file(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, results = tmp_path / "README.md", tmp_path / "results"
    file.write_text("<!-- cuda -->\n<!-- end of cuda -->\n")
    monkeypatch.setattr(command, "RESULTS", results)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(bench_cuda, "run", lambda device, quick: report | {"quick": quick})
    bench_cuda.main(["--quick"])
    assert not results.exists()
    bench_cuda.main(["--fill", str(file)])
    assert json.loads((results / "cuda.json").read_text()) == report
    assert f"<!-- cuda -->\n{cuda_summary.committed(results / 'cuda.json')}\n<!-- end of cuda -->\n" == file.read_text()


def test_the_card_is_in_the_machines_record(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        name, total_memory = "NVIDIA H200", 150_000_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    facts = machine.describe(torch.device("cuda"))
    assert (facts["device"], facts["gpu"], facts["gpu_memory"]) == ("cuda", "NVIDIA H200", 150_000_000_000)
    assert {"driver", "triton", "cuda", "torch", "commit"} <= set(facts)
    assert "NVIDIA H200" in summary.where(facts)

"""The benchmark on CUDA, as far as it goes without a device: what it measures, refuses, judges and draws."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import bench_cuda
import bench_dropout
import command
import cuda_contenders
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
LARGE, ADD, GELU = (bench_cuda.Cell("large", operation, 2**12) for operation in bench_cuda.LARGE)
BLOCK = bench_cuda.Cell("block", "block", 2**11, shape=(2, 16, 64))


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
    whole = list(bench_cuda.cells("whole"))
    large = [(c.operation, c.elements, c.mode) for c in whole if c.section == "large"]
    assert large == [(name, 2**28, summary.BOTH) for name in ("dropout", "dropout_add", "gelu_dropout_add")]
    (block,) = [c for c in whole if c.section == "block"]
    assert (block.shape, block.elements, block.mode) == ((8, 512, 1024), 2**22, summary.BOTH)
    launches = {(c.elements, c.mode) for c in whole if c.section == "launch"}
    assert launches == {(2**e, mode) for e in (10, 12, 14, 16) for mode in (summary.FORWARD, summary.BOTH)}
    assert len(launches) == cuda_summary.LAUNCHES
    assert max(c.elements for c in bench_cuda.cells("quick")) < 2**28
    assert max(c.elements for c in bench_cuda.cells("tiny")) <= 2**16


def test_steps_are_in_the_order_of_what_matters_and_monte_carlo_has_50_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(bench_cuda.bench_monte_carlo, "measure", lambda case, *_: taken.append(case))
    steps = list(bench_cuda.steps(CPU, "whole"))
    order = [(place, label.partition(",")[0]) for place, label, _ in steps]
    assert [label for _, label in order[:7]] == [
        *bench_cuda.LARGE,
        *(f"bytes of {n}" for n in bench_cuda.LARGE),
        "block",
    ]
    assert [place for place, _ in order[7:]] == ["cells"] * 8 + ["rates"] + ["monte_carlo"] * 3
    for _, _, measured in steps[-3:]:
        measured()
    assert [(case.short, case.samples) for case in taken] == [(short, 50) for short in cuda_summary.MONTE_CARLO]


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
        maps = (
            {OURS: cuda_contenders.fused, STOCK: cuda_contenders.added}
            if cell is ADD
            else {OURS: torchdrop.Dropout(0.5)}
        )
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


def _gelu(x: Tensor, rate: float = 0.5) -> Tensor:
    return F.dropout(F.gelu(x), rate)


def _scaled_gradient(y: Tensor, scale: float) -> Tensor:
    """The same values with another gradient."""
    return y * scale + (y - y * scale).detach()


WRONG_GELU: dict[str, Any] = {
    "two results under one seed": lambda x, r: _gelu(x) + r + torch.rand((), generator=UNSEEDED).to(x.dtype),
    "the same mask in two calls": lambda x, r: _gelu(x) + r if torch.manual_seed(1) else x,
    "a kept fraction": lambda x, r: _gelu(x, 0.4) * 1.2 + r,
    "values other than the residual with 0 or gelu(x)/(1-p)": lambda x, r: F.dropout(F.silu(x), 0.5) + r,
    "a gradient of the residual": lambda x, r: _gelu(x) + _scaled_gradient(r, 2.0),
    "a gradient with another mask": lambda x, r: (_gelu(x) - F.gelu(x)).detach() + F.gelu(x) + r,
    "a gradient other than 0 and gelu's": lambda x, r: _scaled_gradient(_gelu(x), 1.5) + r,
}
UNSEEDED = torch.Generator()


@pytest.mark.parametrize("why", WRONG_GELU)
def test_a_wrong_sum_with_gelu_is_found(why: str) -> None:
    found = bench_cuda.fault(OURS, WRONG_GELU[why], GELU.inputs(CPU), "gelu_dropout_add")
    assert found is not None
    assert found.startswith(f"wrong: {why}")


@pytest.mark.parametrize("operation", ["gelu_dropout_add", "block"])
def test_right_sums_with_gelu_and_blocks_pass(operation: str) -> None:
    """GELU rounded once, as in one kernel, and rounded after each operation."""
    cell = GELU if operation == "gelu_dropout_add" else BLOCK
    ours, stock = cell.pair(CPU)
    for name, function in ((COMPILED_OURS, ours), (STOCK, stock)):
        assert bench_cuda.fault(name, function, cell.inputs(CPU), operation, ours) is None
    if cell is GELU:
        once = lambda x, r: (F.dropout(F.gelu(x.float()), 0.5) + r.float()).to(x.dtype)  # noqa: E731
        assert bench_cuda.fault(STOCK, once, cell.inputs(CPU), operation) is None


class Twice(nn.Dropout):
    """Values under one mask and gradients under another."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + (super().forward(x) - y).detach()


class SameMask(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return super().forward(x)


class Unseeded(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        torch.seed()
        return super().forward(x)


class Often(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2)


WRONG_BLOCK: dict[type[nn.Module], str] = {
    Often: r"wrong: values 2\.\d\d times as far from those without dropout as torch\.nn's",
    nn.Identity: r"wrong: values 0\.00 times as far",
    SameMask: "wrong: the same values in two calls",
    Unseeded: "wrong: two results under one seed: values",
    Twice: "wrong: gradients with other masks than in eager mode",
    nn.Dropout: "wrong: values with other masks than in eager mode",
}


@pytest.mark.parametrize("dropout", WRONG_BLOCK)
def test_a_wrong_block_is_found(dropout: type[nn.Module]) -> None:
    """The compiled one is compared with its function in eager mode: here that has the values that it should have."""
    eager = cuda_contenders.block(RightValues if dropout is Twice else torchdrop.Dropout, 64, CPU)
    function = cuda_contenders.block(dropout, 64, CPU)
    found = bench_cuda.fault(COMPILED_OURS, function, BLOCK.inputs(CPU), "block", eager)
    assert found is not None
    assert re.match(WRONG_BLOCK[dropout], found), found


class RightValues(nn.Dropout):
    """Draws as `Twice` does, and has its values, with their own gradients."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return super().forward(x)


def test_a_blocks_step_has_gradients_of_parameters_and_bytes_kept() -> None:
    ours, stock = BLOCK.pair(CPU)
    x = BLOCK.inputs(CPU)
    gradients = bench_cuda._both(ours, x, torch.ones_like(x[0]))()
    assert len(gradients) == 1 + len(list(ours.parameters()))  # type: ignore[arg-type, attr-defined]
    for own, other in zip(ours.parameters(), stock.parameters(), strict=True):  # type: ignore[attr-defined]
        assert torch.equal(own, other)
    maps = {OURS: ours, STOCK: stock, COMPILED_STOCK: stock, COMPILED_OURS: ours}
    result = bench_cuda.measure(BLOCK, CPU, BRIEF, maps, Ticks())
    assert (result["label"], result["p"]) == ("block, (2, 16, 64), forward + backward", 0.1)
    assert 0 < result["contenders"][COMPILED_OURS]["kept"] < result["contenders"][COMPILED_STOCK]["kept"]
    assert result["contenders"][COMPILED_OURS]["times_torch_compiled"] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("why", WRONG)
def test_a_wrong_sum_is_found_and_gets_no_time(why: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_cuda.measure(ADD, CPU, BRIEF, {OURS: WRONG[why], STOCK: cuda_contenders.added}, Ticks())
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
    monkeypatch.setattr(bench_cuda, "compiled", lambda *_: plain)
    for operation, gelu in (("dropout", 0), ("dropout_add", 0), ("gelu_dropout_add", 2)):
        results = bench_cuda.kept_and_peak(operation, CPU, (2**14, 2**16))
        found = {m["contender"]: m for m in results}
        assert len(found) == len(results) == 4
        assert {m["operation"] for m in results} == {operation}
        assert found[OURS]["kept"] == 0
        assert found[STOCK]["kept"] > 0
        assert found[OURS]["peak"] <= found[STOCK]["peak"]
        assert found[OURS]["peak"] == pytest.approx(4 + gelu, abs=0.01)  # output and gradient; gelu's output
        assert found[COMPILED_OURS]["fault"] == "n/a: RuntimeError"


@pytest.mark.slow
@pytest.mark.parametrize("cell", [LARGE, ADD], ids=["dropout", "dropout_add"])
def test_compiled_contenders_are_measured(cell: bench_cuda.Cell) -> None:
    result = bench_cuda.measure(cell, CPU, BRIEF, None, Ticks())
    assert {OURS, STOCK, COMPILED_STOCK, COMPILED_OURS} <= set(result["contenders"])
    assert not [entry["fault"] for entry in result["contenders"].values() if "fault" in entry]
    assert result["contenders"][COMPILED_OURS]["times_torch_compiled"] == (1.0, 1.0, 1.0)


def test_a_new_rate_is_seen() -> None:
    (found,) = bench_cuda.new_rates(CPU, 2**12)
    assert found["asked"] == (0.9, 0.25, 0.75)
    assert found["recompilations"] == 0
    for asked, kept in zip(found["asked"], found["kept"], strict=True):
        assert kept[0] == kept[1] == pytest.approx(asked, abs=0.05)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a run on the CPU: plain functions in place of the compiled ones, few rounds, no Monte Carlo."""
    cells = [LARGE, ADD, GELU, BLOCK, bench_cuda.Cell("launch", "dropout", 2**10)]
    monkeypatch.setattr(bench_cuda, "cells", lambda size: iter(cells))
    monkeypatch.setattr(
        bench_cuda, "compiled", lambda ours, stock, backend: {COMPILED_STOCK: stock, COMPILED_OURS: ours}
    )
    monkeypatch.setattr(bench_cuda, "Effort", lambda **_: BRIEF)
    monkeypatch.setattr(bench_cuda, "new_rates", lambda *_: [_rates()])
    monkeypatch.setattr(bench_cuda.bench_monte_carlo, "measure", lambda case, *_: _monte_carlo(case.short, 6.0))


@pytest.mark.usefixtures("small")
def test_a_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    saved: list[dict[str, Any]] = []
    report = bench_cuda.run(CPU, "tiny", lambda found: saved.append(json.loads(json.dumps(found))))
    report = json.loads(json.dumps(report))
    assert report == saved[-1]
    assert len(saved) == len(report["took"]) == 12
    assert report["failed"] == {}
    rows = {row["case"]: row for row in report["summary"]}
    assert len(rows) == len(cuda_summary.ROWS)
    assert {row["verdict"] for row in rows.values()} == {"-"}
    assert "-" not in [row["measured"] for row in rows.values() if row["case"] != OVERHEAD]
    assert rows[KEPT]["measured"].startswith("dropout 0, dropout_add 0 (torch")
    assert "bytes an element" in capsys.readouterr().out
    report["quick"] = False
    judged = {row["case"]: row["verdict"] for row in cuda_summary.verdicts(report)}
    assert judged.pop(OVERHEAD) == "not measured"  # one of eight
    assert set(judged.values()) <= {"ok", "short"}
    assert judged[KEPT] == judged[BYTES] == judged[BLOCK_BYTES] == judged[RATES] == judged[MONTE_CARLO] == "ok"
    shown = bench_cuda.render(report)
    assert "| dropout_add, 2^12, forward + backward |" in shown
    assert "| dropout_add | torchdrop compiled | 0 |" in shown
    assert "| block, (2, 16, 64), forward + backward |" in shown


@pytest.mark.usefixtures("small")
def test_a_step_that_fails_ends_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("no graphs")

    monkeypatch.setattr(bench_cuda, "new_rates", failing)
    report = bench_cuda.run(CPU, "tiny")
    assert report["failed"] == {"new keep_prob": "RuntimeError: no graphs"}
    assert [len(report[place]) for place in cuda_summary.PLACES] == [5, 12, 0, 3]
    assert "RuntimeError: no graphs" in capsys.readouterr().err


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
    if operation == "block":
        found[COMPILED_OURS]["kept"], found[COMPILED_STOCK]["kept"] = 30.0, 33.0
    return {
        "section": "block" if operation == "block" else "large", "operation": operation,
        "label": f"{operation}, 2^28, forward + backward",
        "elements": 2**28, "mode": summary.BOTH, "dtype": "bfloat16", "p": 0.5, "rounds": 9, "contenders": found,
    }  # fmt: skip


def _launch(exponent: int, mode: str, stock: float) -> dict[str, Any]:
    found = {OURS: {"seconds": [1e-5] * 3, "calls_per_round": 1}, STOCK: _entry(1e-5 * stock, stock)}
    return {"section": "launch", "label": "", "elements": 2**exponent, "mode": mode, "contenders": found}


def _rates(**changed: Any) -> dict[str, Any]:
    asked = [0.9, 0.25, 0.75]
    kept = [[one, one] for one in asked]
    return {"elements": 2**20, "asked": asked, "kept": kept, "recompilations": 0, "graphs_skipped": 0, **changed}


def _monte_carlo(short: str, ratio: float) -> dict[str, Any]:
    return {"short": short, "contenders": {OURS: {"seconds": [1.0] * 3}, cuda_summary.LOOP: _entry(ratio, ratio)}}


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
        for operation in bench_cuda.LARGE
        for name in kept
    ]
    cells = [_large("dropout", 1.25), _large("dropout_add", 1.55)]
    cells += [_launch(e, mode, 1 / 1.2) for e in (10, 12, 14, 16) for mode in (summary.FORWARD, summary.BOTH)]
    cells += [_large("gelu_dropout_add", 1.0, 1.02), _large("block", 1.0, 1.02)]
    made = {
        "machine": facts, "quick": False, "backend": "triton", "cells": cells, "memory": memory, "rates": [_rates()],
        "monte_carlo": [_monte_carlo("conv", 5.0), _monte_carlo("MLP", 1.0), _monte_carlo("encoder", 1.0)],
    }  # fmt: skip
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
GELU_SUM = "gelu, dropout and add, bf16, 2^28, forward + backward, both compiled"
A_BLOCK = "a transformer's block, bf16, forward + backward, both compiled"
BLOCK_BYTES = "bytes an element kept by the block, both compiled, torch's in brackets"
RATES = 'keep_prob changed under mode="reduce-overhead"'
MONTE_CARLO = "Monte Carlo, T = 50, against the usual loop"
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
        "dropout kept 0 (0), dropout peak 4.00 (4.00), dropout_add kept 0 (0), dropout_add peak 4.00 (4.00), "
        "gelu_dropout_add kept 0 (0), gelu_dropout_add peak 4.00 (4.00)"
    )
    assert found[OVERHEAD][0].startswith("1.20 (2^10), 1.20 (2^10 both), 1.20 (2^12)")
    assert found[GELU_SUM][0] == found[A_BLOCK][0] == "1.02x [1.02, 1.02] its time"
    assert found[BLOCK_BYTES][0] == "30.0 (33.0)"
    assert found[RATES][0] == "kept 0.900 of 0.900, 0.250 of 0.250, 0.750 of 0.750; recompilations: 0"
    assert found[MONTE_CARLO][0] == "conv 5.00x [5.00, 5.00], MLP 1.00x [1.00, 1.00], encoder 1.00x [1.00, 1.00]"


def test_every_row_is_short_where_it_should(report: dict[str, Any]) -> None:
    dropout, add, launch = report["cells"][0]["contenders"], report["cells"][1]["contenders"], report["cells"][3]
    dropout[STOCK]["times_torchdrop"][1] = 1.19
    dropout[COPY]["times_torchdrop"][1] = 0.899
    dropout[COMPILED_OURS]["times_torch_compiled"][1] = 1.021
    add[STOCK]["times_torchdrop"][1] = 1.49
    add[COMPILED_OURS]["times_torch_compiled"][1] = 1.021
    for cell in report["cells"][-2:]:
        cell["contenders"][COMPILED_OURS]["times_torch_compiled"][1] = 1.021
    report["cells"][-1]["contenders"][COMPILED_OURS]["kept"] = 33.1
    report["rates"] = [_rates(recompilations=1)]
    report["monte_carlo"][0] = _monte_carlo("conv", 4.99)
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


def test_what_was_not_come_to_is_not_measured(report: dict[str, Any]) -> None:
    """At each step of a run, as if it had been cut off there."""
    for place in reversed(cuda_summary.PLACES):
        while report[place]:
            report[place].pop()
            assert "short" not in {verdict for _, verdict in _judged(report).values()}
        assert cuda_summary.section(report | {"summary": cuda_summary.verdicts(report)})
    assert set(_judged(report).values()) == {("-", "not measured")}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "ok"),
        ({"recompilations": 1}, "short"),
        ({"kept": [[0.5, 0.5]] * 3}, "short"),
        ({"kept": [[0.9, 0.5], [0.25, 0.25], [0.75, 0.75]]}, "short"),
        ({"kept": [[0.9, 0.9], [0.2524, 0.2524], [0.75, 0.75]]}, "ok"),
        ({"kept": [[0.9, 0.9], [0.2527, 0.2527], [0.75, 0.75]]}, "short"),
        ({"graphs_skipped": 2}, "not measured"),
        ({"graphs_skipped": 2, "kept": [[0.5, 0.5]] * 3}, "short"),
    ],
)
def test_new_rates_are_judged(report: dict[str, Any], changed: dict[str, Any], verdict: str) -> None:
    report["rates"] = [_rates(**changed)]
    assert _judged(report)[RATES][1] == verdict


def test_monte_carlo_is_judged_model_by_model(report: dict[str, Any]) -> None:
    for index, (short, bound) in enumerate(cuda_summary.MONTE_CARLO.items()):
        before, report["monte_carlo"][index] = report["monte_carlo"][index], _monte_carlo(short, 0.99 * bound)
        assert _judged(report)[MONTE_CARLO][1] == "short"
        report["monte_carlo"][index] = before
    report["monte_carlo"][1]["contenders"][cuda_summary.LOOP] = {"fault": "wrong: identical samples"}
    shown, verdict = _judged(report)[MONTE_CARLO]
    assert "MLP: usual loop wrong: identical samples" in shown
    assert verdict == "not measured"
    report["monte_carlo"][1]["contenders"][OURS] = {"fault": "wrong: identical samples"}
    assert _judged(report)[MONTE_CARLO][1] == "short"


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
    assert f"| {BANDWIDTH} | at least 90 % of a copy's of the same bytes | 90.0 % (2.15 of 2.39 TB/s) | ok |" in shown
    assert "\nMasks came from the triton backend.\n" in shown
    assert "| dropout, 2^28, forward + backward | 1.00 ms | 1.25 ms | 1.00 ms | 1.00 ms | 900 us |" in shown
    assert "| dropout | torch.nn | 1.00 | 5.00 |" in shown
    assert shown.partition("\n###")[0].strip() == cuda_summary.section(report) == cuda_summary.committed(file)


def test_without_a_run_the_table_says_why(tmp_path: Path) -> None:
    shown = cuda_summary.committed(tmp_path / "cuda.json")
    assert shown == cuda_summary.section(None)
    assert shown.count(" | no GPU was to be had | - |") == len(cuda_summary.ROWS)
    assert shown.startswith("| case | required | measured | verdict |")


def test_a_report_takes_its_place_in_a_file(report: dict[str, Any], tmp_path: Path) -> None:
    file, run = tmp_path / "README.md", tmp_path / "cuda.json"
    run.write_text(json.dumps(report))
    file.write_text(f"before\n\n<!-- cuda -->\n{cuda_summary.section(None)}\n<!-- end of cuda -->\n\nafter\n")
    for _ in range(2):
        bench_cuda.main(["--render", str(run), "--fill", str(file)])
        section = cuda_summary.section(report)
        assert file.read_text() == f"before\n\n<!-- cuda -->\n{section}\n<!-- end of cuda -->\n\nafter\n"


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
    assert "--fill is for a whole run: not with --quick" in _refused(["--fill", str(good), "--quick"], capsys)
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
    monkeypatch.setattr(bench_cuda, "run", lambda device, size: report | {"quick": size != "whole"})
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

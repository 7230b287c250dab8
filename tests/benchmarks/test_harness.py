"""The benchmarks' own machinery: statistics, checks, the memory measure and what is made of a report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_dropout
import checks
import harness
import memory
import pytest
import summary
import torch
from torch import Tensor

import torchdrop

BRIEF = harness.Effort(budget=0.01, batch=1e-5, min_rounds=3, max_rounds=4)


class FakeMachine:
    """A clock whose time passes only in calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def call(self, name: str, seconds: float) -> harness.Call:
        def run() -> None:
            self.now += seconds
            self.log.append(name)

        return run

    def clock(self, call: harness.Call, count: int) -> float:
        begin = self.now
        for _ in range(count):
            call()
        return self.now - begin


def test_quartiles_interpolate() -> None:
    assert harness.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert harness.quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert harness.quartiles([2.0, 4.0, 8.0]).inverse() == pytest.approx(
        harness.quartiles([1 / 2, 1 / 4, 1 / 8]), rel=0.2
    )
    with pytest.raises(ValueError, match="no samples"):
        harness.quartiles([])


def test_ratio_is_of_pairs_and_not_of_medians() -> None:
    compared = harness.Comparison({"a": [1.0, 10.0, 100.0], "b": [2.0, 20.0, 50.0]})
    assert compared.ratio("b", "a").median == 2.0
    assert compared.seconds("b").median / compared.seconds("a").median == 2.0
    drifting = harness.Comparison({"a": [1.0, 2.0, 3.0], "b": [3.0, 2.0, 9.0]})
    assert drifting.ratio("b", "a").median == 3.0
    assert drifting.seconds("b").median / drifting.seconds("a").median == 1.5


def test_compare_divides_by_the_calls_and_keeps_to_the_budget() -> None:
    machine = FakeMachine()
    effort = harness.Effort(budget=1.0, batch=0.01, min_rounds=3, max_rounds=1000)
    compared = harness.compare(
        {"fast": machine.call("fast", 1e-4), "slow": machine.call("slow", 0.05)},
        effort, machine.clock, elapsed=lambda: machine.now,
    )  # fmt: skip
    assert compared.seconds("fast").median == pytest.approx(1e-4)
    assert compared.seconds("slow").median == pytest.approx(0.05)
    assert compared.ratio("slow", "fast") == pytest.approx((500, 500, 500))
    assert compared.counts["slow"] == 1
    assert compared.counts["fast"] * 1e-4 >= 0.01 * 0.99
    assert 3 <= compared.rounds < 20
    assert machine.now < 1.3


def test_compare_interleaves_in_an_order_that_changes_and_is_repeatable() -> None:
    def log() -> list[str]:
        machine = FakeMachine()
        effort = harness.Effort(budget=0.0, batch=1e-9, min_rounds=20, max_rounds=20)
        harness.compare({n: machine.call(n, 1.0) for n in "abc"}, effort, machine.clock, elapsed=lambda: machine.now)
        return machine.log[-60:]

    first = log()
    rounds = ["".join(first[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3
    assert first == log()


def test_calibration_is_not_misled_by_one_interruption() -> None:
    machine = FakeMachine()
    interruptions = iter([0.02])

    def clock(call: harness.Call, count: int) -> float:
        return machine.clock(call, count) + next(interruptions, 0.0)

    effort = harness.Effort(budget=0.0, batch=0.01, min_rounds=1, max_rounds=1)
    compared = harness.compare({"a": machine.call("a", 1e-4)}, effort, clock, elapsed=lambda: machine.now)
    assert compared.counts["a"] == pytest.approx(100, abs=1)


def test_rotating_passes_over_all_inputs() -> None:
    seen: list[int] = []
    call = harness.rotating([lambda: seen.append(0), lambda: seen.append(1), lambda: seen.append(2)])
    for _ in range(6):
        call()
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]
    x = torch.ones(4, 6).t().requires_grad_()
    several = harness.copies(x, least_bytes=3 * 96)
    assert [(c.stride(), c.requires_grad) for c in several] == [(x.stride(), True)] * 3
    assert harness.copies(x, least_bytes=0) == [x]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(2.5e-9, "2.50 ns"), (9.999e-4, "1.00 ms"), (0.1234, "123 ms"), (12.34, "12.3 s")]
)
def test_duration(seconds: float, shown: str) -> None:
    assert harness.duration(seconds) == shown


class Storing(torch.autograd.Function):
    """Dropout that keeps its mask where no hook sees it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        kept = torch.rand_like(x) < 0.5
        ctx.hidden = {"within": [(kept, "a tensor")]}
        return torch.where(kept, 2 * x, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.where(ctx.hidden["within"][0][0], 2 * grad, 0.0)


class StoringBytes(torch.autograd.Function):
    """Dropout that keeps its mask outside PyTorch's allocator."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        kept = torch.rand_like(x) < 0.5
        held = bytes(kept.numel())
        ctx.hidden = lambda: held
        return torch.where(kept, 2 * x, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def _wants_gradient(n: int) -> Tensor:
    return torch.ones(n).requires_grad_()


def test_saved_bytes_finds_a_hidden_mask() -> None:
    saved = memory.saved_bytes(Storing.apply, _wants_gradient(5000))
    assert saved.hooks == 0
    assert saved.graph == 5000
    assert saved.live == 5000


def test_saved_bytes_finds_a_mask_that_is_no_tensor() -> None:
    saved = memory.saved_bytes(StoringBytes.apply, _wants_gradient(5000))
    assert saved.hooks == 0
    assert saved.live == 0
    assert saved.largest == saved.graph == 5000


def test_saved_bytes_of_the_stock_layer_and_of_a_multiplication() -> None:
    x = _wants_gradient(5000)
    assert memory.saved_bytes(torch.nn.Dropout(0.5), x) == memory.Saved(hooks=20000, graph=20000, live=20000)
    assert memory.saved_bytes(lambda x: x * 2.0, x).largest <= 16


@pytest.mark.parametrize("sizes", [(100, 10000), (50000, 200000)])
def test_torchdrop_saves_nothing_that_grows(sizes: tuple[int, int]) -> None:
    small, large = (memory.saved_bytes(torchdrop.Dropout(0.5), _wants_gradient(n)) for n in sizes)
    assert small == large
    assert 16 <= large.largest <= 64


def test_peak_counts_what_lives_at_once() -> None:
    x = torch.ones(10000)

    def two_at_once() -> Tensor:
        for _ in range(3):
            y = x * 2.0
            del y
        y = x + 1.0
        return y + y

    peak = memory.peak_bytes(two_at_once, torch.device("cpu"))
    assert 80000 <= peak <= 80100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("reserve", [0, 4])
def test_peak_resident_counts_what_the_allocator_does_not_see(reserve: int) -> None:
    size = 2**24
    blocks = [bytearray(b"x") * size for _ in range(reserve)]
    del blocks
    grown = memory.peak_resident(lambda: bytearray(b"x") * size)
    if grown is None:
        pytest.skip("this system does not tell")
    assert grown == pytest.approx(size, rel=0.1)


class OtherMask(torch.autograd.Function):
    """Dropout whose gradient draws another mask."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.where(torch.rand_like(x) < 0.5, 2 * x, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.where(torch.rand_like(grad) < 0.5, 2 * grad, 0.0)


def _kept(x: Tensor, k: float) -> Tensor:
    return torch.rand_like(x) < k


def _wrong_gradient(x: Tensor) -> Tensor:
    y = torch.dropout(x, 0.5, True)
    return (y * 1.5) - (y * 0.5).detach()


_OWN = torch.Generator().manual_seed(5)

WRONG = {
    "a gradient with another mask": OtherMask.apply,
    "a gradient other": _wrong_gradient,
    "values other than 0": lambda x: x * _kept(x, 0.5) * 2.01,
    "a kept fraction of": lambda x: x * _kept(x, 0.45) * 2,
    "the same mask": lambda x: x * _kept(torch.empty_like(x), 0.5) * 2 if torch.manual_seed(1) else x,
    "two results under one seed": lambda x: x * (torch.rand(x.shape, generator=_OWN) < 0.5) * 2,
    "dtype": lambda x: torch.dropout(x, 0.5, True).double(),
    "shape": lambda x: torch.dropout(x, 0.5, True)[None],
    "strides": lambda x: torch.dropout(x.t(), 0.5, True).contiguous().t(),
    "no gradient": lambda x: torch.dropout(x.detach(), 0.5, True),
}


@pytest.mark.parametrize("fault", WRONG)
def test_checks_find_a_wrong_dropout(fault: str) -> None:
    x = checks.sample((100, 400), torch.float32, "cpu").requires_grad_()
    found = checks.dropout_fault(WRONG[fault], x, 0.5)
    assert found is not None
    assert found.startswith(fault)


def test_checks_find_a_mask_that_is_not_shared() -> None:
    x = checks.sample((20, 30, 4, 4), torch.float32, "cpu")
    assert checks.dropout_fault(torch.nn.Dropout(0.5), x, 0.5, channels=2) == "a mask that varies within a channel"
    assert checks.dropout_fault(torch.nn.Dropout2d(0.5), x, 0.5, channels=2) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_checks_pass_what_is_right(p: float, dtype: torch.dtype) -> None:
    x = checks.sample((64, 300), dtype, "cpu").requires_grad_()
    for layer in (torchdrop.Dropout(p), torch.nn.Dropout(p)):
        assert checks.dropout_fault(layer, x, p) is None
    assert checks.scaling_fault(lambda x: x * 1.5, x, 1.5) is None
    assert checks.scaling_fault(lambda x: x * 1.6, x, 1.5) == "values other than x * s"


def test_checks_refuse_an_input_with_zeros() -> None:
    with pytest.raises(ValueError, match="zeros"):
        checks.dropout_fault(torch.nn.Dropout(0.5), torch.zeros(8), 0.5)


def _measured(maps: dict[str, bench_dropout.Map], mode: str = summary.BOTH) -> dict:
    cell = bench_dropout.Cell(mode, (2**12,), mode)
    return bench_dropout.measure(cell, torch.device("cpu"), BRIEF, maps)


def test_a_wrong_contender_gets_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    result = _measured(
        {summary.OURS: OtherMask.apply, summary.STOCK: torch.nn.Dropout(0.5), summary.LIMIT: lambda x: x * 2.0}
    )
    assert result["contenders"][summary.OURS] == {"fault": "wrong: a gradient with another mask"}
    assert "seconds" in result["contenders"][summary.STOCK]
    assert bench_dropout.cell_row(result)[1] == "wrong"
    assert "wrong: a gradient with another mask" in capsys.readouterr().out
    (claim,) = [c for c in summary.CLAIMS if c.case == "forward + backward, 64 to 4,096"]
    row = claim.verdict({"cells": [result]})
    assert (row["measured"], row["verdict"]) == ("wrong", "short")


def test_a_compiler_that_fails_is_not_available() -> None:
    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("no C++ compiler")

    result = _measured({summary.OURS: torchdrop.Dropout(0.5), bench_dropout.COMPILED_STOCK: failing})
    assert result["contenders"][bench_dropout.COMPILED_STOCK] == {"fault": "n/a: RuntimeError: no C++ compiler"}
    assert bench_dropout.cell_row(result)[3] == "n/a"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "every second"])
def test_cells_make_the_layout_that_they_name(layout: str) -> None:
    shape = (2, 3, 4, 4) if layout in ("contiguous", "channels_last") else (6, 8)
    x = bench_dropout.Cell("layouts", shape, layout=layout).input(torch.device("cpu"))
    assert x.shape == shape
    assert x.is_contiguous() == (layout == "contiguous")
    assert x.is_contiguous(memory_format=torch.channels_last) if layout == "channels_last" else True


def _cell(mode: str, exponent: int, stock: float, limit: float = 0.5) -> dict:
    cell = bench_dropout.Cell(mode, (2**exponent,), mode)
    times = {summary.OURS: 1e-6, summary.STOCK: stock * 1e-6, summary.LIMIT: limit * 1e-6}
    contenders = {
        name: {"seconds": [t, t, t], "calls_per_round": 1, "times_torchdrop": [t * 1e6] * 3}
        for name, t in times.items()
    }
    del contenders[summary.OURS]["times_torchdrop"]
    return {
        "section": mode, "label": cell.label(), "mode": mode, "shape": [2**exponent], "elements": 2**exponent, "p": 0.5,
        "dtype": "float32", "layout": "contiguous", "module": "Dropout", "rounds": 3, "contenders": contenders,
    }  # fmt: skip


@pytest.fixture
def report() -> dict:
    machine = {
        "device": "cpu", "cpu": "a processor", "cores": 2, "threads": 2, "os": "an OS", "python": "3.11",
        "torch": "2.13", "torchdrop": "0.1", "commit": "0123456789abcdef", "dirty": True, "date": "2026-01-01",
    }  # fmt: skip
    saved = [{"elements": n, "hooks": 0, "graph": 48, "live": 16, "bytes": 48} for n in (16, 32)]
    kept = {
        "contender": summary.OURS, "module": "Dropout", "elements": 32, "saved": saved, "saved_per_element": 0.0,
        "peak_forward": 128, "peak_both": 256,
    }  # fmt: skip
    cells = [_cell(summary.FORWARD, 18, 60), _cell(summary.FORWARD, 20, 49.9), _cell(summary.FORWARD, 22, 31)]
    cells += [_cell(summary.BOTH, e, 26, 1 / 2.4) for e in range(16, 25, 2)]
    report = {"machine": machine, "cells": cells, "memory": [kept]}
    report["summary"] = summary.verdicts(report)
    return json.loads(json.dumps(report))


def test_verdicts(report: dict) -> None:
    rows = {row["case"]: row for row in report["summary"]}
    assert len(rows) == 9
    assert rows["forward, f32, 2^18 and 2^20"]["measured"] == "60.0 (2^18), 49.9 (2^20)"
    assert rows["forward, f32, 2^18 and 2^20"]["verdict"] == "short"
    assert rows["forward, f32, 2^22"]["verdict"] == "ok"
    assert rows["forward + backward, f32, 2^20"]["verdict"] == "ok"
    limit = rows["forward + backward against x * s, f32, 2^16 to 2^24"]
    assert limit["verdict"] == "ok"
    assert limit["measured"].startswith("2.40 (2^16), 2.40 (2^18)")
    assert rows["saved for backward"]["verdict"] == "ok"
    assert rows["forward, 64 to 4,096"]["verdict"] == "not measured"
    assert "forward, f32, 2^18 and 2^20" in summary.text(report).splitlines()[-1]


def test_verdicts_against_the_limit_and_in_part(report: dict) -> None:
    report["cells"] = [_cell(summary.BOTH, 16, 26, 1 / 2.6)]
    case = "forward + backward against x * s, f32, 2^16 to 2^24"
    assert {r["case"]: r["verdict"] for r in summary.verdicts(report)}[case] == "short"
    report["cells"] = [_cell(summary.BOTH, 16, 26, 1 / 2.4)]
    assert {r["case"]: r["verdict"] for r in summary.verdicts(report)}[case] == "ok, in part"


def test_growth_is_short(report: dict) -> None:
    report["memory"][0]["saved_per_element"] = 0.125
    assert {r["case"]: r["verdict"] for r in summary.verdicts(report)}["saved for backward"] == "short"


def test_nothing_is_judged_off_the_cpu(report: dict) -> None:
    report["machine"]["device"] = "cuda"
    assert {row["verdict"] for row in summary.verdicts(report)} == {"-"}


def test_render(report: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    bench_dropout.main(["--render", str(file)])
    shown = capsys.readouterr().out
    assert shown.startswith(
        "a processor, 2 cores, 2 threads, an OS; Python 3.11, torch 2.13, torchdrop 0.1 at 0123456789 with"
    )
    assert "| forward, f32, 2^22 | 30 times faster | 31.0 | ok |" in shown
    assert "| 2^22 forward | 1.00 us | 31.0 us | - | - | 500 ns | 31.0x [31.0, 31.0] | 2.00x [2.00, 2.00] |" in shown
    tables = [line for line in shown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)

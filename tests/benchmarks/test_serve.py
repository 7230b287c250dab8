"""The benchmark of a server's requests: the ways agree, threads get their own answers, and its verdicts."""

from __future__ import annotations

import threading
from typing import Any

import bench_serve
import pytest
import torch
from torch import Tensor

LOOP, OURS, COMPILED = bench_serve.LOOP, bench_serve.OURS, bench_serve.COMPILED


def test_the_ways_agree() -> None:
    answers = bench_serve.ways(compiled=False)
    assert bench_serve.fault(answers) == ""
    other = bench_serve.torchdrop.MCPredictor(bench_serve.network(), bench_serve.SAMPLES, task="classification", seed=1)
    assert bench_serve.fault(answers | {OURS: other}) == "wrong: MCPredictor is not mc_predict"
    far = lambda x: (torch.full((len(x), 10), 0.2), None)  # noqa: E731
    assert bench_serve.fault(answers | {LOOP: far}).startswith("wrong: the loop's means are")


def test_each_thread_gets_its_own_answers() -> None:
    lock, asked = threading.Lock(), list[Tensor]()

    def answer(x: Tensor) -> Any:
        with lock:
            asked.append(x)
        return type("Answer", (), {"mean": 2 * x})

    latencies, last = bench_serve.from_threads(answer, 5, 1e-4)
    assert (len(latencies), len(asked), len(last)) == (20, 20, bench_serve.CLIENTS)
    assert len({tuple(x.flatten().tolist()) for x in asked}) == bench_serve.CLIENTS
    assert bench_serve.same_answers(answer, last)
    assert not bench_serve.same_answers(answer, last[::-1])


def test_percentiles() -> None:
    assert bench_serve.percentiles([float(one) for one in range(101)]) == (50.0, 99.0)


@pytest.mark.parametrize(
    ("fault", "same", "p99", "expected"),
    [
        ("", True, 1.0, ["ok"] * 6),
        ("", True, 1.1, ["ok"] * 3 + ["short", "ok", "short"]),
        ("", False, 1.0, ["ok"] * 2 + ["short"] * 4),
        ("wrong: ...", True, 1.0, ["short"] * 6),
    ],
)
def test_verdicts(fault: str, same: bool, p99: float, expected: list[str]) -> None:
    report: dict[str, Any] = {
        "fault": fault,
        "cells": [{"way": COMPILED, "rows": rows, "faster": [2.9, 3.0, 3.1]} for rows in bench_serve.ROWS],
        "clients": [
            {"way": way, "kind": kind, "p50": p50, "p99": p99, "same": same}
            for way, p50, p99 in ((LOOP, 3.0, 3.0), (COMPILED, 1.0, p99))
            for kind in bench_serve.PAUSES
        ],
    }
    assert [row["verdict"] for row in bench_serve.verdicts(report)] == expected

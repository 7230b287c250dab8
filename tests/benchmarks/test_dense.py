"""The benchmark of dense outputs: the two ways agree, and what it makes of a report."""

from __future__ import annotations

from typing import Any

import bench_dense
import pytest
import torch


def test_the_ways_agree() -> None:
    assert bench_dense.wrong(20) == ""


def test_the_loop_leaves_the_model_as_it_was() -> None:
    model, x = bench_dense.network(), torch.randn(1, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mean, entropy = bench_dense.loop(model, x, 3)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (mean.shape, entropy.shape) == ((1, 21, 8, 8), (1, 8, 8))


@pytest.mark.parametrize(("seconds", "above", "expected"), [(1.3, 400, ["ok", "ok"]), (1.31, 401, ["short", "short"])])
def test_verdicts(seconds: float, above: int, expected: list[str]) -> None:
    cells = [(bench_dense.LOOP, 1.0), (bench_dense.OURS, seconds)]
    report: dict[str, Any] = {
        "fault": "",
        "cells": [{"way": way, "samples": 20, "seconds": taken} for way, taken in cells],
        "peaks": {bench_dense.LOOP: 150, bench_dense.OURS: 150 + above, "one pass": 100},
    }
    assert [row["verdict"] for row in bench_dense.verdicts(report)] == expected
    assert bench_dense.verdicts(report | {"fault": "wrong"})[0]["verdict"] == "short"

"""benchmarks/bench_export.py: what it compares, and how it judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
import bench_export

CELL: dict[str, Any] = {
    "p": 0.5, "rows": 1, "samples": 50, "difference": 1e-7, "rounds": 9,
    "seconds": {name: [1e-3] * 3 for name in (bench_export.RUNTIME, bench_export.PREDICT, bench_export.PREDICTOR)},
    "of_predict": [0.9, 1.0, 1.1], "of_predictor": [1.8, 2.0, 2.2],
}  # fmt: skip
EQUAL = {"model": "MLP", "runtime": "ONNX Runtime", "export": 1.0, "build": 2.0, "difference": 1e-7}


@pytest.mark.parametrize("name", [name for name in bench_export.MODELS if "BERT" not in name])
def test_models_take_their_data(name: str) -> None:
    make, data = bench_export.MODELS[name]
    with torch.no_grad():
        assert make().eval()(**data(3)).shape[0] == 3


def test_differences_and_times_are_judged() -> None:
    slow, wrong = {**CELL, "of_predict": [2.0, 2.1, 2.2]}, {**CELL, "difference": 1.0}
    report = {"equal": [EQUAL, {**EQUAL, "difference": 1e-4}], "cells": [CELL, slow, wrong]}
    rows = bench_export.verdicts(report)
    assert [row["verdict"] for row in rows] == ["ok", "short", "ok", "short", "short"]
    assert rows[-1]["measured"] == "wrong: 1.0e+00 off"
    assert len(bench_export.row(CELL)) == len(bench_export.HEADER)
    assert len(bench_export.model_row(EQUAL)) == len(bench_export.MODEL_HEADER)


def test_the_largest_difference_is_found() -> None:
    make, data = bench_export.MODELS["MLP 64-256-256-10"]
    model, keys = make(), torch.zeros(2, 2, dtype=torch.int64)

    class Program:
        def keys(self, seed: int) -> torch.Tensor:
            return keys

    def off_by_one(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows, sample = len(given["input"]), int(given["sample"])
        seed = 0 if sample == 0 else -9
        predicted = bench_export.torchdrop.mc_predict(model, given["input"], sample + 2, seed=seed, keep_samples=True)
        return {"output": predicted.samples[sample] + (rows == 64)}

    worst = bench_export.largest_difference(model, data, Program(), off_by_one)  # type: ignore[arg-type]
    assert worst == pytest.approx(1.0, abs=1e-5)

"""Fifteen minutes on a card: the script runs through on the CPU, and a step that is cut off loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.kernels.triton_kernels import needs_kernels

SCRIPT = ROOT / "benchmarks" / "card.sh"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="it is a script for bash"),
    needs_kernels,
]


def card(
    folder: Path, *arguments: str, seconds: int = 400, python: Path | str = sys.executable
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(folder), "PYTHON": str(python), "CARD_SECONDS": str(seconds)}
    return subprocess.run(
        ["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=500
    )


def test_it_runs_through_dry(tmp_path: Path) -> None:
    done = card(tmp_path, "--dry")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    steps = [line.split()[:2] for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert steps == [[name, "0"] for name in ("kernels", "tests", "bench", "family", "train")]
    assert "WRONG" not in (tmp_path / "kernels.log").read_text()
    report = json.loads((tmp_path / "cuda.json").read_text())
    assert report["failed"] == {}
    faults = {
        (result["label"], name): entry["fault"]
        for result in report["cells"]
        for name, entry in result["contenders"].items()
        if "fault" in entry
    }
    assert faults == {}
    assert "-" not in [row["measured"] for row in report["summary"]]
    assert not (tmp_path / "cuda.part").exists()


def test_what_is_cut_off_is_there_as_far_as_it_went(tmp_path: Path) -> None:
    endless = tmp_path / "python"
    endless.write_text("#!/bin/sh\necho begun\nexec sleep 60\n")
    endless.chmod(0o755)
    done = card(tmp_path, "--dry", seconds=5, python=endless)
    assert done.returncode == 1
    assert (tmp_path / "kernels.log").read_text() == "begun\n"
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert lines[0].split()[:2] == ["kernels", "124"]
    assert lines[1:] == [f"{name} not begun" for name in ("tests", "bench", "family", "train")]


def test_unknown_arguments_are_refused(tmp_path: Path) -> None:
    done = card(tmp_path, "--wet")
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "usage: OUT=folder benchmarks/card.sh [--dry]" in done.stderr

"""The table of versions: what is read of a run's tests, and what is made of several runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import versions as bench
from summary import BOTH, FORWARD

SUITE = """<testsuites><testsuite tests="12" failures="2" errors="1" skipped="3" time="1"/></testsuites>"""


def run(torch_version: str, python: str = "3.11.7", **changes: Any) -> dict[str, Any]:
    facts = {
        "torch": torch_version, "python": python, "date": "2026-01-02", "cpu": "a processor", "cores": 2, "threads": 2,
        "os": "an OS", "torchdrop": "0.2.0", "commit": "0" * 40, "dirty": False,
    }  # fmt: skip
    cells = [(2**e, mode) for e in bench.EXPONENTS for mode in (FORWARD, BOTH)]
    speed = [{"elements": n, "mode": mode, "ratio": [59.0, 60.0, 61.0]} for n, mode in cells]
    return {"machine": facts, "tests": {"passed": 1234, "failed": 0, "skipped": 5}, "speed": speed} | changes


def test_tests_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(SUITE)
    assert bench.tests_of(path) == {"passed": 6, "failed": 3, "skipped": 3}


def test_runs_are_in_the_order_of_versions_and_each_version_is_there_once() -> None:
    report: dict[str, Any] = bench.merged(None, run("2.13.0+cpu"))
    for each in (run("2.6.0+cu124"), run("2.13.0", "3.12.1"), run("2.13.0+cu130", tests=None)):
        report = bench.merged(report, each)
    found = [(each["machine"]["torch"], each["machine"]["python"]) for each in report["runs"]]
    assert found == [("2.6.0+cu124", "3.11.7"), ("2.13.0+cu130", "3.11.7"), ("2.13.0", "3.12.1")]
    assert report["runs"][1]["tests"] is None


@pytest.mark.parametrize(
    ("changes", "outcomes"),
    [
        ({}, ["ok", "ok", "ok"]),
        ({"tests": None}, ["not measured", "ok", "ok"]),
        ({"tests": {"passed": 1, "failed": 2, "skipped": 0}}, ["short", "ok", "ok"]),
        ({"speed": [{"elements": 2**6, "mode": BOTH, "ratio": [0.9, 0.99, 1.1]}]}, ["ok", "short", "ok"]),
        ({"speed": [{"elements": 2**20, "mode": FORWARD, "ratio": [48.0, 49.0, 60.0]}]}, ["ok", "ok", "short"]),
        ({"speed": [{"elements": 2**20, "mode": FORWARD, "fault": "wrong: the mask"}]}, ["ok", "ok", "short"]),
    ],
)
def test_one_version_that_falls_short_is_seen(changes: dict[str, Any], outcomes: list[str]) -> None:
    report = bench.merged(bench.merged(None, run("2.13.0")), run("2.6.0", **changes))
    assert [row[-1] for row in bench.verdicts(report)] == outcomes


def test_a_report_is_rendered() -> None:
    shown = bench.render(bench.merged(None, run("2.13.0+cpu")))
    assert "| 2.13.0 | 3.11.7 | 1,234 | 0 | 5 | 60.0x [59.0, 61.0] |" in shown
    assert bench.tested(bench.merged(None, run("2.6.0+cu124"))).endswith("| 2.6.0 | 3.11.7 | 1,234 | 0 | 2026-01-02 |")


@pytest.mark.slow
def test_a_measurement_is_merged_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Effort", lambda: bench.bench_dropout.Effort(budget=0.01, min_rounds=1))
    (tmp_path / "tests.xml").write_text(SUITE)
    output = tmp_path / "versions.json"
    output.write_text(json.dumps(bench.merged(None, run("2.6.0"))))
    bench.main(["--tests", str(tmp_path / "tests.xml"), "--output", str(output)])
    old, new = json.loads(output.read_text())["runs"]
    assert old["machine"]["torch"] == "2.6.0"
    assert new["tests"]["failed"] == 3
    assert all(entry["ratio"][1] > 0 for entry in new["speed"])
    assert len(new["speed"]) == 6

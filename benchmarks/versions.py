"""One version of PyTorch in the table of versions: the tests that it ran, and dropout against its own torch.nn's.

python benchmarks/versions.py [--tests FILE] [--threads 2] [--output FILE]    # with the interpreter of that version
python benchmarks/versions.py --render FILE

`tests/versions.sh --record` calls it for each version. A run takes the place of an older one with the same versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bench_dropout
import command
import machine
import summary
import torch
from harness import Effort, digits, factor, markdown_table, settle_allocator
from summary import BOTH, FORWARD, OURS, STOCK

RESULT = "versions.json"
EXPONENTS = (6, 10, 20)

Run = dict[str, Any]


def tests_of(path: Path) -> dict[str, int]:
    """How many tests of a JUnit file passed, failed and were skipped."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    failed = counts["failures"] + counts["errors"]
    return {"passed": counts["tests"] - failed - counts["skipped"], "failed": failed, "skipped": counts["skipped"]}


def measured(effort: Effort) -> list[Run]:
    """How many times the duration of torchdrop's dropout the one of torch.nn is, over sizes and directions."""
    settle_allocator()
    found = []
    for exponent in EXPONENTS:
        for mode in (FORWARD, BOTH):
            cell = bench_dropout.measure(bench_dropout.Cell(mode, (2**exponent,), mode), torch.device("cpu"), effort)
            contenders = cell["contenders"]
            entry: Run = {"elements": 2**exponent, "mode": mode}
            faults = [contenders[name]["fault"] for name in (OURS, STOCK) if "fault" in contenders[name]]
            found.append(entry | ({"fault": faults[0]} if faults else {"ratio": contenders[STOCK]["times_torchdrop"]}))
    return found


def versions_of(run: Run) -> tuple[list[int], list[int]]:
    """The versions of PyTorch and Python as numbers, for their order."""
    facts = run["machine"]
    torch_version, python_version = facts["torch"].partition("+")[0], facts["python"]
    return [int(part) for part in torch_version.split(".")], [int(part) for part in python_version.split(".")]


def merged(report: dict[str, Any] | None, run: Run) -> dict[str, Any]:
    """The report with a run, in the order of versions. Its machine is that of the newest run."""
    older = [each for each in (report or {"runs": []})["runs"] if versions_of(each) != versions_of(run)]
    return {"machine": run["machine"], "runs": sorted([*older, run], key=versions_of)}


def _ratio(run: Run, elements: int, mode: str) -> str:
    (entry,) = [each for each in run["speed"] if each["elements"] == elements and each["mode"] == mode]
    return entry["fault"].partition(":")[0] if "fault" in entry else factor(entry["ratio"])


def _tests(run: Run) -> list[str]:
    return (
        ["-"] * 3 if run["tests"] is None else [f"{run['tests'][name]:,}" for name in ("passed", "failed", "skipped")]
    )


def _verdict(
    report: dict[str, Any], case: str, required: str, bound: float, covers: Callable[[Run], bool]
) -> list[str]:
    """The least ratio of all versions, and whether it reaches the bound."""
    cells = [each for run in report["runs"] for each in run["speed"] if covers(each)]
    if any("fault" in each for each in cells):
        return [case, required, "wrong", "short"]
    least = min(each["ratio"][1] for each in cells)
    return [case, required, f"{digits(least)} and more", "ok" if least >= bound else "short"]


def verdicts(report: dict[str, Any]) -> list[list[str]]:
    """One row for each thing that must hold on every version."""
    failed = [run["tests"] and run["tests"]["failed"] for run in report["runs"]]
    passed = "not measured" if None in failed else "ok" if not any(failed) else "short"
    return [
        ["tests that fail", "none", "-" if None in failed else str(sum(failed)), passed],
        _verdict(report, "forward and forward + backward, 2^6", "not slower than that version's torch.nn", 1.0,
                 lambda each: each["elements"] == 2**6),
        _verdict(report, "forward, 2^20", "50 times faster", 50.0,
                 lambda each: each["elements"] == 2**20 and each["mode"] == FORWARD),
    ]  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """One row for each version."""
    sizes = [(f"2^{exponent}, {mode}", 2**exponent, mode) for exponent in EXPONENTS for mode in (FORWARD, BOTH)]
    header = ["torch", "Python", "passed", "failed", "skipped", *[name for name, *_ in sizes], "date"]
    rows = [
        [run["machine"]["torch"].partition("+")[0], run["machine"]["python"], *_tests(run),
         *[_ratio(run, elements, mode) for _, elements, mode in sizes], run["machine"]["date"]]
        for run in report["runs"]
    ]  # fmt: skip
    return markdown_table(header, rows)


def tested(report: dict[str, Any]) -> str:
    """What the project's README shows: which versions were tried, with how many tests, and when."""
    header = ["torch", "Python", "tests passed", "failed", "date"]
    rows = []
    for run in report["runs"]:
        facts = run["machine"]
        rows.append([facts["torch"].partition("+")[0], facts["python"], *_tests(run)[:2], facts["date"]])
    return markdown_table(header, rows)


def render(report: dict[str, Any]) -> str:
    """The machine of the newest run, what must hold, and the versions."""
    return "\n\n".join(
        [summary.where(report["machine"]), markdown_table(summary.HEADER, verdicts(report)), table(report)]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, RESULT)
    parser.add_argument(
        "--tests", type=Path, metavar="FILE", help="the tests that were run, as pytest's --junitxml writes them"
    )
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    torch.set_num_threads(options.threads)
    output = options.output or command.RESULTS / RESULT
    before = json.loads(output.read_text(encoding="utf-8")) if output.exists() else None
    run = {"machine": machine.describe(torch.device("cpu")), "tests": options.tests and tests_of(options.tests)}
    report = merged(before, run | {"speed": measured(Effort())})
    print(table(report))
    command.write(report, options, RESULT)


if __name__ == "__main__":
    main()

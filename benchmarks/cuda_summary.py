"""What the benchmark on CUDA must show, read off a report, its tables, and its place in benchmarks/README.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import summary
from harness import digits, duration, factor, markdown_table
from summary import BOTH, HEADER, OURS, STOCK

COMPILED_STOCK, COMPILED_OURS, COPY = "torch.nn compiled", "torchdrop compiled", "copy"
COLUMNS = [OURS, STOCK, COMPILED_STOCK, COMPILED_OURS, COPY]
CELL_HEADER = ["case", *COLUMNS]
MEMORY_HEADER = ["operation", "contender", "kept for backward", "peak of both passes"]

MARKERS = ("<!-- cuda -->", "<!-- end of cuda -->")
"""Between these lines of benchmarks/README.md stands the table."""

ABSENT = "no GPU was to be had"

Report = dict[str, Any]
Measured = tuple[str, bool | None]
"""What is shown, and whether it suffices: None if that cannot be said."""

BYTES = 8
"""Forward and backward of dropout in bfloat16 read and write this many bytes an element at least."""


@dataclass(frozen=True)
class Row:
    """One requirement."""

    case: str
    required: str
    judge: Callable[[Report], Measured]


def _large(report: Report, operation: str) -> dict[str, Any]:
    (cell,) = [c for c in report["cells"] if c["section"] == "large" and c["operation"] == operation]
    return cell["contenders"]


def _fault(found: dict[str, Any], ours: str, other: str) -> Measured | None:
    """Where one of two contenders has no time: what is wrong. A wrong result of ours falls short."""
    for name in (ours, other):
        if "fault" in found[name]:
            return f"{name} {found[name]['fault']}", False if name == ours else None
    return None


def _faster(operation: str, bound: float, report: Report) -> Measured:
    found = _large(report, operation)
    fault = _fault(found, OURS, STOCK)
    if fault:
        return fault
    times = " / ".join(duration(found[name]["seconds"][1]) for name in (STOCK, OURS))
    ratio = found[STOCK]["times_torchdrop"]
    return f"{factor(ratio)} ({times})", ratio[1] >= bound


def _bandwidth(bound: float, report: Report) -> Measured:
    found = _large(report, "dropout")
    fault = _fault(found, OURS, COPY)
    if fault:
        return fault
    (cell,) = [c for c in report["cells"] if c["section"] == "large" and c["operation"] == "dropout"]
    speeds = [BYTES * cell["elements"] / found[name]["seconds"][1] / 1e12 for name in (OURS, COPY)]
    share = found[COPY]["times_torchdrop"][1]
    return f"{100 * share:.1f} % ({' of '.join(map(digits, speeds))} TB/s)", share >= bound


def _memory(report: Report, operation: str, name: str) -> dict[str, Any]:
    (found,) = [m for m in report["memory"] if (m["operation"], m["contender"]) == (operation, name)]
    return found


def _kept(report: Report) -> Measured:
    kept = [_memory(report, operation, OURS)["kept"] for operation in ("dropout", "dropout_add")]
    stock = _memory(report, "dropout", STOCK)["kept"]
    return f"dropout {digits(kept[0])}, dropout_add {digits(kept[1])} (torch.nn: {digits(stock)})", max(kept) == 0


def _compiled_time(operation: str, bound: float, report: Report) -> Measured:
    found = _large(report, operation)
    fault = _fault(found, COMPILED_OURS, COMPILED_STOCK)
    if fault:
        return fault
    ratio = found[COMPILED_OURS]["times_torch_compiled"]
    return f"{factor(ratio)} its time", ratio[1] <= bound


def _compiled_bytes(report: Report) -> Measured:
    shown, held = [], True
    for operation in ("dropout", "dropout_add"):
        ours, stock = (_memory(report, operation, name) for name in (COMPILED_OURS, COMPILED_STOCK))
        for name, found in ((COMPILED_OURS, ours), (COMPILED_STOCK, stock)):
            if "fault" in found:
                return f"{name} {found['fault']}", False if name == COMPILED_OURS else None
        for what in ("kept", "peak"):
            shown.append(f"{operation} {what} {digits(ours[what])} ({digits(stock[what])})")
            held &= ours[what] <= stock[what]
    return ", ".join(shown), held


def _overhead(bound: float, report: Report) -> Measured:
    shown, held = [], []
    for cell in report["cells"]:
        if cell["section"] == "launch":
            fault = _fault(cell["contenders"], OURS, STOCK)
            if fault:
                return fault
            ratio = summary.inverse(cell["contenders"][STOCK]["times_torchdrop"]).median
            place = f"2^{cell['elements'].bit_length() - 1}{' both' if cell['mode'] == BOTH else ''}"
            shown.append(f"{digits(ratio)} ({place})")
            held.append(ratio <= bound)
    return ", ".join(shown), all(held)


_LARGE = "bf16, 2^28, forward + backward"

ROWS = [
    Row(f"dropout, {_LARGE}, against eager", "at least 1.2 times faster", partial(_faster, "dropout", 1.2)),
    Row(f"dropout, {_LARGE}, bandwidth", "at least 85 % of a copy's of the same bytes", partial(_bandwidth, 0.85)),
    Row("bytes an element kept for backward, bf16", "0 (torch.nn: 1)", _kept),
    Row(
        f"dropout_add, {_LARGE}, against eager dropout and add",
        "at least 1.5 times faster",
        partial(_faster, "dropout_add", 1.5),
    ),
    Row(f"dropout, {_LARGE}, both compiled", "at most 1.05 times its time", partial(_compiled_time, "dropout", 1.05)),
    Row(
        f"dropout_add, {_LARGE}, both compiled", "at most 1.05 times its time",
        partial(_compiled_time, "dropout_add", 1.05),
    ),
    Row("bytes an element, both compiled, torch's in brackets", "not more", _compiled_bytes),
    Row(
        "overhead of a call, bf16, 2^10 to 2^16, forward, and with backward",
        "at most 1.2 times torch.nn's eager",
        partial(_overhead, 1.2),
    ),
]  # fmt: skip


def verdicts(report: Report) -> list[dict[str, str]]:
    """One for each row. Nothing is judged of a quick run."""
    made = []
    for row in ROWS:
        measured, held = row.judge(report)
        verdict = "-" if report["quick"] else "not measured" if held is None else "ok" if held else "short"
        made.append({"case": row.case, "required": row.required, "measured": measured, "verdict": verdict})
    return made


def memory_row(result: dict[str, Any]) -> list[str]:
    title = [result["operation"], result["contender"]]
    if "fault" in result:
        return [*title, result["fault"], "-"]
    return [*title, digits(result["kept"]), digits(result["peak"])]


def text(report: Report) -> str:
    return summary.text(report)


def markdown(report: Report, cells: list[list[str]]) -> str:
    """The section of benchmarks/README.md, then times and bytes."""
    rows = [memory_row(result) for result in report["memory"]]
    return "\n\n".join(
        [
            section(report),
            f"### times, bf16\n\n{markdown_table(CELL_HEADER, cells)}",
            f"### bytes an element, bf16\n\n{markdown_table(MEMORY_HEADER, rows)}",
        ]
    )


def section(report: Report | None) -> str:
    """What stands in benchmarks/README.md: the run's, or where there is none the rows with the reason."""
    if report is None:
        return markdown_table(HEADER, [[row.case, row.required, ABSENT, "-"] for row in ROWS])
    return f"{summary.markdown(report)}\n\nMasks came from the {report['backend']} backend."


def committed(results: Path) -> str:
    """`section` of the run in this file, if it is there."""
    return section(json.loads(results.read_text(encoding="utf-8")) if results.exists() else None)


def has_place(file: Path) -> bool:
    """Whether the file has the markers, in their order."""
    if not file.is_file():
        return False
    _, begin, rest = file.read_text(encoding="utf-8").partition(MARKERS[0])
    return bool(begin) and MARKERS[1] in rest


def fill(file: Path, report: Report) -> None:
    """Puts the section between the markers of a file that has them."""
    head, begin, rest = file.read_text(encoding="utf-8").partition(MARKERS[0])
    _, end, tail = rest.partition(MARKERS[1])
    file.write_text(f"{head}{begin}\n{section(report)}\n{end}{tail}", encoding="utf-8")

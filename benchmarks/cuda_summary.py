"""What the benchmark on CUDA must show, read off a report, its tables, and its place in benchmarks/README.md."""

from __future__ import annotations

import json
import math
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

LOOP = "usual loop"
LAUNCHES = 8

MARKERS = ("<!-- cuda -->", "<!-- end of cuda -->")
"""Between these lines of benchmarks/README.md stands the table."""

ABSENT = "no GPU was to be had"

Report = dict[str, Any]
Measured = tuple[str, bool | None]
"""What is shown, and whether it suffices: None if that cannot be said."""

PLACES = ("cells", "memory", "rates", "monte_carlo")
"""Where in a report the results are. A run that was cut off has some of them."""

BYTES = 8
"""Forward and backward of dropout in bfloat16 read and write this many bytes an element at least."""


@dataclass(frozen=True)
class Row:
    """One requirement."""

    case: str
    required: str
    judge: Callable[[Report], Measured]


class NotMeasuredError(Exception):
    """A report lacks what a row needs, since its run was cut off or a part of it failed."""


def _only(found: list[dict[str, Any]]) -> dict[str, Any]:
    if not found:
        raise NotMeasuredError
    (one,) = found
    return one


def _large(report: Report, operation: str) -> dict[str, Any]:
    return _only([c for c in report["cells"] if c["section"] != "launch" and c["operation"] == operation])


def _contenders(report: Report, operation: str) -> dict[str, Any]:
    return _large(report, operation)["contenders"]


def _fault(found: dict[str, Any], ours: str, other: str) -> Measured | None:
    """Where one of two contenders has no time: what is wrong. A wrong result of ours falls short."""
    for name in (ours, other):
        if "fault" in found[name]:
            return f"{name} {found[name]['fault']}", False if name == ours else None
    return None


def _faster(operation: str, bound: float, report: Report) -> Measured:
    found = _contenders(report, operation)
    fault = _fault(found, OURS, STOCK)
    if fault:
        return fault
    times = " / ".join(duration(found[name]["seconds"][1]) for name in (STOCK, OURS))
    ratio = found[STOCK]["times_torchdrop"]
    return f"{factor(ratio)} ({times})", ratio[1] >= bound


def _bandwidth(bound: float, report: Report) -> Measured:
    found = _contenders(report, "dropout")
    fault = _fault(found, OURS, COPY)
    if fault:
        return fault
    elements = _large(report, "dropout")["elements"]
    speeds = [BYTES * elements / found[name]["seconds"][1] / 1e12 for name in (OURS, COPY)]
    share = found[COPY]["times_torchdrop"][1]
    return f"{100 * share:.1f} % ({' of '.join(map(digits, speeds))} TB/s)", share >= bound


def _memory(report: Report, operation: str, name: str) -> dict[str, Any]:
    return _only([m for m in report["memory"] if (m["operation"], m["contender"]) == (operation, name)])


def _kept(report: Report) -> Measured:
    kept = [_memory(report, operation, OURS)["kept"] for operation in ("dropout", "dropout_add")]
    stock = _memory(report, "dropout", STOCK)["kept"]
    return f"dropout {digits(kept[0])}, dropout_add {digits(kept[1])} (torch.nn: {digits(stock)})", max(kept) == 0


def _compiled_time(operation: str, bound: float, report: Report) -> Measured:
    found = _contenders(report, operation)
    fault = _fault(found, COMPILED_OURS, COMPILED_STOCK)
    if fault:
        return fault
    ratio = found[COMPILED_OURS]["times_torch_compiled"]
    return f"{factor(ratio)} its time", ratio[1] <= bound


def _compiled_bytes(report: Report) -> Measured:
    shown, held = [], True
    for operation in ("dropout", "dropout_add", "gelu_dropout_add"):
        ours, stock = (_memory(report, operation, name) for name in (COMPILED_OURS, COMPILED_STOCK))
        for name, found in ((COMPILED_OURS, ours), (COMPILED_STOCK, stock)):
            if "fault" in found:
                return f"{name} {found['fault']}", False if name == COMPILED_OURS else None
        for what in ("kept", "peak"):
            shown.append(f"{operation} {what} {digits(ours[what])} ({digits(stock[what])})")
            held &= ours[what] <= stock[what]
    return ", ".join(shown), held


def _block_bytes(report: Report) -> Measured:
    found = _contenders(report, "block")
    fault = _fault(found, COMPILED_OURS, COMPILED_STOCK)
    if fault:
        return fault
    ours, stock = (found[name]["kept"] for name in (COMPILED_OURS, COMPILED_STOCK))
    return f"{digits(ours)} ({digits(stock)})", ours <= stock


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
    if len(held) < (2 if report["quick"] else LAUNCHES):
        raise NotMeasuredError
    return ", ".join(shown), all(held)


def rates(result: dict[str, Any]) -> Measured:
    """Kept fractions of values and gradients are within 6 standard deviations of what was asked for."""
    held = result["recompilations"] == 0
    shown = []
    for asked, kept in zip(result["asked"], result["kept"], strict=True):
        shown.append(f"{digits(kept[0])} of {digits(asked)}")
        allowed = 6 * math.sqrt(asked * (1 - asked) / result["elements"])
        held &= all(abs(one - asked) <= allowed for one in kept)
    text = f"kept {', '.join(shown)}; recompilations: {result['recompilations']}"
    if result["graphs_skipped"]:
        return f"{text}; no graph was captured", None if held else False
    return text, held


def _rates(report: Report) -> Measured:
    return rates(_only(report["rates"]))


MONTE_CARLO = {"conv": 5.0, "MLP": 1.0, "encoder": 1.0}
"""How many times faster than the usual loop each model must be at least."""


def monte_carlo(result: dict[str, Any]) -> Measured:
    found, short = result["contenders"], result["short"]
    fault = _fault(found, OURS, LOOP)
    if fault:
        return f"{short}: {fault[0]}", fault[1]
    ratio = found[LOOP]["times_torchdrop"]
    return f"{short} {factor(ratio)}", ratio[1] >= MONTE_CARLO[short]


def _monte_carlo(report: Report) -> Measured:
    if not report["monte_carlo"]:
        raise NotMeasuredError
    found = [monte_carlo(result) for result in report["monte_carlo"]]
    held = [one for _, one in found]
    complete = None not in held and len(held) == len(MONTE_CARLO)
    return ", ".join(shown for shown, _ in found), False if False in held else True if complete else None


_LARGE = "bf16, 2^28, forward + backward"

ROWS = [
    Row(f"dropout, {_LARGE}, against eager", "at least 1.2 times faster", partial(_faster, "dropout", 1.2)),
    Row(f"dropout, {_LARGE}, bandwidth", "at least 90 % of a copy's of the same bytes", partial(_bandwidth, 0.9)),
    Row("bytes an element kept for backward, bf16", "0 (torch.nn: 1)", _kept),
    Row(
        f"dropout_add, {_LARGE}, against eager dropout and add",
        "at least 1.5 times faster",
        partial(_faster, "dropout_add", 1.5),
    ),
    Row(f"dropout, {_LARGE}, both compiled", "at most 1.02 times its time", partial(_compiled_time, "dropout", 1.02)),
    Row(
        f"dropout_add, {_LARGE}, both compiled", "at most 1.02 times its time",
        partial(_compiled_time, "dropout_add", 1.02),
    ),
    Row(
        f"gelu, dropout and add, {_LARGE}, both compiled", "at most 1.02 times its time",
        partial(_compiled_time, "gelu_dropout_add", 1.02),
    ),
    Row(
        "a transformer's block, bf16, forward + backward, both compiled", "at most 1.02 times its time",
        partial(_compiled_time, "block", 1.02),
    ),
    Row("bytes an element, both compiled, torch's in brackets", "not more", _compiled_bytes),
    Row("bytes an element kept by the block, both compiled, torch's in brackets", "not more", _block_bytes),
    Row(
        "overhead of a call, bf16, 2^10 to 2^16, forward, and with backward",
        "at most 1.2 times torch.nn's eager",
        partial(_overhead, 1.2),
    ),
    Row('keep_prob changed under mode="reduce-overhead"', "takes effect, no recompilation", _rates),
    Row(
        "Monte Carlo, T = 50, against the usual loop", "5 times faster on the conv body, nowhere slower",
        _monte_carlo,
    ),
]  # fmt: skip


def verdicts(report: Report) -> list[dict[str, str]]:
    """One for each row. Nothing is judged of a quick run."""
    made = []
    for row in ROWS:
        try:
            measured, held = row.judge(report)
        except NotMeasuredError:
            measured, held = "-", None
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

"""What training steps must show, read off a report, and its rendering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import summary
from harness import digits, duration, factor, markdown_table
from training_columns import COLUMNS, IDLE, KEY, NONE, OURS, STOCK
from training_models import BF16, F32, LONG, SMALL

Report = dict[str, Any]
Result = dict[str, Any]

EAGER, COMPILED = "eager", "compiled"

WITHIN = 0.02
"""How far the small model's time may be from that with its modules alone replaced, as a share."""

ABSENT = "not measured"


@dataclass(frozen=True)
class Claim:
    """How long a step may take, in all cells of a model.

    Args:
        model: its name.
        mode: eager or compiled.
        precisions: of the cells.
        most: the largest ratio to the time without dropout; None if it is PyTorch's time that must not be exceeded.
    """

    model: str
    mode: str
    precisions: tuple[str, ...] = (F32, BF16)
    most: float | None = None

    def holds(self, cell: Result) -> bool:
        times = cell.get("times", {})
        if self.most is None:
            return STOCK in times and times[STOCK][1] >= 1.0
        return NONE in times and times[NONE][1] <= self.most

    def verdict(self, report: Report) -> dict[str, str]:
        cells = [
            cell
            for cell in report["cells"]
            if (cell["model"], cell["mode"]) == (self.model, self.mode) and cell["precision"] in self.precisions
        ]
        required = "not slower" if self.most is None else f"at most {self.most:g} times no dropout"
        measured, outcome = ", ".join(map(_measured, cells)), "ok"
        if not cells:
            reasons = [m["skipped"] for m in report["models"] if m["model"] == self.model and "skipped" in m]
            measured, outcome = reasons[0] if reasons else "-", ABSENT
        elif not all(map(self.holds, cells)):
            outcome = "short"
        return _row(f"{self.model}, {self.mode}, {' and '.join(self.precisions)}", required, measured, outcome)


OTHERS = ("Wav2Vec2", "nn.LSTM", "GAT", "ConvNeXt, DropPath")

CLAIMS = [
    Claim("BERT", EAGER, (BF16,), 1.15),
    Claim("BERT", EAGER, (F32,), 1.12),
    *(Claim("BERT", COMPILED, (precision,), 1.1) for precision in (BF16, F32)),
    *(Claim(model, EAGER, most=1.15) for model in ("GPT-2", "ViT", "nn.TransformerEncoder")),
    *(Claim(model, EAGER) for model in OTHERS),
    *(Claim(model, COMPILED, (BF16,)) for model in ("GPT-2", "ViT", "nn.TransformerEncoder", *OTHERS)),
]

MEMORY = 1.03
"""The largest ratio of the peak memory to that without dropout."""


def _row(case: str, required: str, measured: str, verdict: str) -> dict[str, str]:
    return {"case": case, "required": required, "measured": measured, "verdict": verdict}


def _measured(cell: Result) -> str:
    """Times faster than PyTorch's, and the share of a step without dropout that is left."""
    place = f" ({cell['precision']})"
    for name in (OURS, STOCK):
        if "fault" in cell["columns"][name]:
            return f"{name} {cell['columns'][name]['fault'].partition(':')[0]}{place}"
    if "times" not in cell:
        return ABSENT + place
    left = f"; {digits(cell['times'][NONE][1])} times no dropout" if NONE in cell["times"] else ""
    return f"{factor(cell['times'][STOCK])}{left}{place}"


def served(draws: Result) -> tuple[int, int]:
    """The draws that `replace` has served, and those that dropout made before.

    What the model without dropout draws is no dropout. What is left after `replace` from PyTorch is not served.
    """
    other = sum(draws[NONE].values())
    made = sum(draws[STOCK].values()) - other
    left = sum(count for name, count in draws[OURS].items() if name not in (KEY, IDLE)) - other
    return made - left, made


def draws_fault(draws: Result) -> str | None:
    """What is wrong with the counts: integers that the model draws itself, or dropout that is gone without a key."""
    for name in (NONE, STOCK):
        if draws[name].get(KEY):
            return f"{name}: the model draws pairs of integers itself"
    count, keys = served(draws)[0], draws[OURS].get(KEY, 0)
    return f"{count} draws are gone for {keys} keys" if keys < count else None


def _draws(report: Report) -> dict[str, str]:
    case, required = "draws of dropout that are served, eager", "all"
    counted = [model for model in report["models"] if "draws" in model]
    measured, held = [], True
    for model in counted:
        for precision, draws in model["draws"].items():
            count, made = served(draws)
            fault = draws_fault(draws)
            held = held and fault is None and count == made
            if precision == F32 or served(model["draws"].get(F32, draws)) != (count, made):
                place = model["model"] + (f", {precision}" if precision != F32 else "")
                measured.append(f"{fault or f'{count} of {made}'} ({place})")
    return _row(case, required, ", ".join(measured) or "-", ("ok" if held else "short") if counted else ABSENT)


def _small(report: Report) -> dict[str, str]:
    case, required = f"{SMALL.name}, replaced", f"within {WITHIN:.0%} of the time with modules alone replaced"
    if not (found := report.get("small")):
        return _row(case, required, "-", ABSENT)
    if found["fault"]:
        return _row(case, required, found["fault"], "short")
    measured = factor(found["ratio"]) + ("" if found["sites"] else ", both with modules alone")
    held = abs(found["ratio"][1] - 1) <= WITHIN
    return _row(case, required, measured, "ok" if held else "short")


def _long(report: Report) -> list[dict[str, str]]:
    rows = []
    for precision in (F32, BF16):
        case, required = f"{LONG}, eager, {precision}, peak memory", f"at most {MEMORY:g} times no dropout"
        found = report.get("long", {}).get(precision)
        if not found:
            rows.append(_row(case, required, "-", ABSENT))
            continue
        faults = [f"{name} {entry['fault']}" for name, entry in found.items() if "fault" in entry]
        measured = ", ".join(f"{megabytes(entry['peak'])} ({name})" for name, entry in found.items() if "peak" in entry)
        held = not faults and found[OURS]["peak"] <= MEMORY * found[NONE]["peak"]
        rows.append(_row(case, required, "; ".join(faults) or measured, "ok" if held else "short"))
    return rows


def verdicts(report: Report) -> list[dict[str, str]]:
    """One for each row of the table. Of a quick run nothing is judged."""
    rows = [*(claim.verdict(report) for claim in CLAIMS), _draws(report), _small(report), *_long(report)]
    return [{**row, "verdict": "-"} if report["quick"] else row for row in rows]


def megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.0f} MB"


CELL_HEADER = [
    "model", "mode", "precision", *COLUMNS, "torch.nn / replaced", "replaced / no dropout", "torch.nn / no dropout",
]  # fmt: skip
MEMORY_HEADER = ["model", "mode", "precision", *(f"{what}, {name}" for what in ("peak", "kept") for name in COLUMNS)]


def _title(cell: Result) -> list[str]:
    return [cell["model"], cell["mode"], cell["precision"]]


def _entry(entry: Result, show: Callable[[Result], str]) -> str:
    return entry["fault"] if "fault" in entry else show(entry)


def cell_row(cell: Result) -> list[str]:
    """Times and their ratios."""
    times = [_entry(cell["columns"][name], lambda entry: duration(entry["seconds"][1])) for name in COLUMNS]
    found = cell.get("times", {})
    return [*_title(cell), *times, *(factor(found[key]) if key in found else "-" for key in (STOCK, NONE, "before"))]


def memory_row(cell: Result) -> list[str]:
    """Peaks, and the larger count of what is kept for backward."""
    entries = [cell["columns"][name] for name in COLUMNS]
    peaks = [_entry(entry, lambda entry: megabytes(entry["peak"])) for entry in entries]
    kept = [_entry(entry, lambda entry: megabytes(max(entry["saved"], entry["held"]))) for entry in entries]
    return [*_title(cell), *peaks, *kept]


def _draw_rows(report: Report) -> list[list[str]]:
    rows = []
    for model in report["models"]:
        for precision, draws in model.get("draws", {}).items():
            count, made = served(draws)
            left = ", ".join(f"{name} {n}" for name, n in draws[OURS].items() if name not in (KEY, IDLE))
            rows.append([model["model"], precision, str(made), str(count), str(draws[OURS].get(KEY, 0)), left or "-"])
    return rows


def _long_rows(report: Report) -> list[list[str]]:
    shown = (lambda e: megabytes(e["peak"])), (lambda e: megabytes(max(e["saved"], e["held"])))
    resident: Callable[[Result], str] = lambda e: megabytes(e["resident"])  # noqa: E731
    return [
        [precision, name, *(_entry(entry, show) for show in (*shown, resident))]
        for precision, found in report.get("long", {}).items()
        for name, entry in found.items()
    ]


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"### {title}\n\n{markdown_table(header, rows)}"] if rows else []


def render(report: Report) -> str:
    """A report as markdown: machine and summary, then all cells."""
    cells = report["cells"]
    parts = [
        summary.markdown(report),
        *_section("Times of a step", CELL_HEADER, [cell_row(cell) for cell in cells]),
        *_section("Memory of a step", MEMORY_HEADER, [memory_row(cell) for cell in cells]),
        *_section(LONG, ["precision", "column", "peak", "kept", "growth of resident memory"], _long_rows(report)),
        *_section("Draws", ["model", "precision", "made", "served", "keys", "left to PyTorch"], _draw_rows(report)),
    ]
    return "\n\n".join(parts)


def section(report: Report | None) -> str:
    """What stands in benchmarks/README.md: the run's, or where there is none the rows, not measured."""
    if report is not None:
        return summary.markdown(report)
    rows = verdicts({"cells": [], "models": [], "quick": False})
    return markdown_table(summary.HEADER, [[row[name] for name in summary.HEADER] for row in rows])

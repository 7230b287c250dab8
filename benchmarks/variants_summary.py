"""What the benchmark of variants must show, read off a report, and its tables."""

from __future__ import annotations

from typing import Any

import compact
import summary
from harness import digits, duration, factor, markdown_table, text_table
from variants_own import PLAIN, VARIANT
from variants_peers import OURS

Result = dict[str, Any]
Row = dict[str, str]
Table = tuple[str, list[str], list[list[str]]]

RATE_ERROR = 0.001
"""How far a realized keep rate may be from the nominal one, as a share of it."""


def _row(case: str, required: str, measured: str, held: bool | None) -> Row:
    verdict = "not measured" if held is None else "ok" if held else "short"
    return {"case": case, "required": required, "measured": measured, "verdict": verdict}


def _speed_row(report: Result, cell: Result) -> Row:
    shape = "x".join(map(str, cell["shape"]))
    case = f"{cell['label']}, {shape}, forward + backward"
    required = f"{cell['required']:g} times faster" if cell["required"] else "-"
    shown, held = [], []
    for name in cell["peers"]:
        entry = cell["contenders"].get(name)
        if entry is None:
            shown.append(f"{name} {report['peers'][name]['missing']}")
        elif "times_torchdrop" not in entry:
            fault = entry.get("fault") or f"torchdrop {cell['contenders'][OURS]['fault']}"
            shown.append(f"{name} {fault}")
            held += [False] if "fault" in cell["contenders"][OURS] else []
        else:
            shown.append(f"{name} {factor(entry['times_torchdrop'])}")
            held.append(entry["times_torchdrop"][1] >= cell["required"])
    row = _row(case, required, "; ".join(shown), all(held) if held else None)
    return row if cell["required"] else {**row, "verdict": "-"}


def _rates_row(report: Result) -> Row:
    """torchdrop's, with four standard errors allowed for the counting."""
    worst, held = 0.0, []
    for cell in report["rates"]:
        share, error = cell["dropped"][OURS]
        off, keep = abs(share - cell["p"]), 1 - cell["p"]
        worst = max(worst, off / keep)
        held.append(off <= RATE_ERROR * keep + 4 * error)
    sizes = [cell["size"] for cell in report["rates"]]
    blocks = [cell["block"] for cell in report["rates"]]
    case = f"DropBlock2d's keep rate, maps of {min(sizes)} to {max(sizes)}, blocks of {min(blocks)} to {max(blocks)}"
    return _row(case, f"within {100 * RATE_ERROR:g} % of nominal", f"off by {100 * worst:.3f} % at most", all(held))


def _halves_row(report: Result) -> Row:
    ours = [cell["contenders"][OURS] for cell in report["halves"]]
    held = all(one["finite"] and one["kept"] > 0.5 and abs(one["mean"] - 1) < 0.2 for one in ours)
    return _row(f"float16, {len(ours)} variants", "no NaN, not zeroed", "as required" if held else "not so", held)


def verdicts(report: Result) -> list[Row]:
    """One for each row of what must hold. On small inputs nothing is judged."""
    rows = [*(_speed_row(report, cell) for cell in report["speed"]), _rates_row(report), _halves_row(report)]
    rows += [compact.verdict({"steps": report["compact"], "quick": False})]
    if report["quick"]:
        rows = [{**row, "required": "-", "verdict": "-"} for row in rows]
    return rows


def _entry(entry: Result | None) -> str:
    if entry is None:
        return "-"
    if "fault" in entry:
        return str(entry["fault"])
    times = f" ({digits(entry['times_torchdrop'][1])}x)" if "times_torchdrop" in entry else ""
    return f"{duration(entry['seconds'][1])}{times}"


def _speed_table(report: Result) -> Table:
    names = list(dict.fromkeys(name for cell in report["speed"] for name in cell["contenders"]))
    rows = [[cell["label"], *(_entry(cell["contenders"].get(name)) for name in names)] for cell in report["speed"]]
    shape = tuple(report["speed"][0]["shape"])
    versions = ", ".join(f"{name} {fact['version'] or fact['missing']}" for name, fact in report["peers"].items())
    return f"forward + backward, float32, {shape}, as a multiple of torchdrop's in brackets ({versions})", [
        "variant", *names
    ], rows  # fmt: skip


def _rates_table(report: Result) -> Table:
    names = list(report["rates"][0]["dropped"])

    def shown(found: tuple[float, float]) -> str:
        return f"{found[0]:.4f} ± {found[1]:.4f}"

    rows = [
        [f"{cell['size']} x {cell['size']}", str(cell["block"]), *(shown(cell["dropped"][name]) for name in names)]
        for cell in report["rates"]
    ]
    return f"DropBlock2d: the share that is dropped at p = {report['rates'][0]['p']:g}", ["map", "block", *names], rows


def _halves_table(report: Result) -> Table:
    names = list(dict.fromkeys(name for cell in report["halves"] for name in cell["contenders"]))

    def shown(found: Result | None) -> str:
        if found is None:
            return "-"
        if not found["finite"]:
            return "not finite"
        return f"{found['mean']:.3f} ({100 * found['kept']:.1f} % kept)" if found["kept"] else "zeros only"

    rows = [[cell["label"], *(shown(cell["contenders"].get(name)) for name in names)] for cell in report["halves"]]
    return "float16: the mean of what becomes of ones", ["variant", *names], rows


def _own_table(report: Result) -> Table:
    rows = []
    for cell in report["own"]:
        shape = "x".join(map(str, cell["shape"]))
        if "fault" in cell:
            rows.append([cell["label"], shape, cell["operation"], cell["fault"], "-", "-"])
            continue
        seconds = cell["seconds"]
        times = [duration(seconds[name][1]) for name in (VARIANT, PLAIN)]
        rows.append([cell["label"], shape, cell["operation"], *times, factor(cell["times_plain"])])
    return "forward + backward of torchdrop's variants and of the operation without them", [
        "variant", "input", "operation", VARIANT, "operation alone", "variant / operation"
    ], rows  # fmt: skip


def tables(report: Result) -> list[Table]:
    made = [_speed_table(report), _rates_table(report), _halves_table(report), _own_table(report)]
    return [
        *made,
        (compact.STEPS, compact.header(compact.STEPS), [compact.row(compact.STEPS, c) for c in report["compact"]]),
    ]


def text(report: Result) -> str:
    parts = [f"\n{title}\n{text_table(header, rows)}" for title, header, rows in tables(report)]
    return "\n".join([*parts, f"\nsummary, after {report['seconds']:.0f} s", summary.text(report)])


def markdown(report: Result) -> str:
    """A report as markdown: machine, summary, and the tables."""
    parts = [f"### {title}\n\n{markdown_table(header, rows)}" for title, header, rows in tables(report)]
    return "\n\n".join([summary.markdown(report), *parts])

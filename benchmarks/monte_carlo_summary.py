"""What the benchmark of Monte Carlo inference must show, read off a report, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness import digits, duration, factor
from monte_carlo_samplers import LOOP, OURS

Result = dict[str, Any]
Row = dict[str, str]

_MEMORY, _LATIN = 1.1, 2.5


def _row(case: str, required: str, measured: str, held: bool | None) -> Row:
    verdict = "not measured" if held is None else "ok" if held else "short"
    return {"case": case, "required": required, "measured": measured, "verdict": verdict}


def _speed_row(cell: Result) -> Row:
    case = f"{cell['case']}, batch {cell['shape'][0]}, T = {cell['samples']}"
    required = f"{cell['required']:g} times faster than the usual loop"
    wrong = [entry["fault"] for entry in (cell["contenders"][OURS], cell["contenders"][LOOP]) if "fault" in entry]
    if wrong:
        return _row(case, required, wrong[0], False)
    ratio = cell["contenders"][LOOP]["times_torchdrop"]
    return _row(case, required, factor(ratio), ratio[1] >= cell["required"])


def _draws_row(report: Result) -> Row:
    cell = report["speed"][-1]
    measured = f"{cell['draws']} of {cell['train_mode_draws']}"
    return _row(
        f"random draws in a forward of the {cell['short']}", "not fewer than in train mode", measured,
        cell["draws"] >= cell["train_mode_draws"],
    )  # fmt: skip


def _memory_row(found: Result) -> Row:
    (few, first), (many, last) = found["peaks"].items()
    measured = f"{found['ratio']:.3f} ({_mebibytes(last)} and {_mebibytes(first)})"
    case = f"peak memory at T = {many} against T = {few}, memory={_mebibytes(found['bound'])}"
    return _row(case, f"at most {_MEMORY:g} times", measured, found["ratio"] <= _MEMORY)


def _latin_row(found: Result) -> Row:
    case = f"latin against iid, variance of the predictive mean, digits, T = {found['samples']}"
    required = f"{_LATIN:g} times lower"
    picked = [entry for entry in found["networks"] if entry["samples"] == found["samples"]]
    wrong = [entry["fault"] for entry in picked if entry["fault"]]
    if not picked or wrong:
        return _row(case, required, wrong[0] if wrong else found["fault"], False if wrong else None)
    measured = ", ".join(f"{entry['ratio']:.2f} ± {entry['standard_error']:.2f}" for entry in picked)
    return _row(case, required, measured, all(entry["ratio"] >= _LATIN for entry in picked))


def _peer_row(name: str, report: Result) -> Row:
    """Against the fastest of the package's ways in each case; cases in which none samples rightly do not count."""
    variants, measured, held = report["peers"][name]["variants"], [], []
    for cell in report["speed"]:
        entries = [cell["contenders"][variant] for variant in variants if variant in cell["contenders"]]
        ratios = [entry["times_torchdrop"] for entry in entries if "times_torchdrop" in entry]
        if ratios:
            closest = min(ratios, key=lambda ratio: ratio[1])
            measured.append(f"{cell['short']} {factor(closest)}")
            held.append(closest[1] > 1)
        elif entries:
            measured.append(f"{cell['short']} {entries[0].get('fault', 'not measured')}")
    shown = ", ".join(measured) or report["peers"][name]["missing"]
    return _row(f"against {name}, same models, same T", "faster", shown, all(held) if held else None)


def verdicts(report: Result) -> list[Row]:
    """One for each row of what must hold, and one for each package. On smaller models and on CUDA nothing is judged."""
    rows = [
        *map(_speed_row, report["speed"]),
        _draws_row(report),
        _memory_row(report["memory"]),
        _latin_row(report["latin"]),
        *(_peer_row(name, report) for name in report["peers"]),
    ]
    if report["quick"] or report["machine"]["device"] != "cpu":
        rows = [{**row, "required": "-", "verdict": "-"} for row in rows]
    return rows


def _mebibytes(size: float) -> str:
    return f"{digits(size / 2**20)} MiB"


def _speed_cells(cell: Result, names: Sequence[str]) -> list[str]:
    def shown(entry: Result | None) -> str:
        if entry is None:
            return "-"
        times = f" ({digits(entry['times_torchdrop'][1])}x)" if "times_torchdrop" in entry else ""
        return entry["fault"] if "fault" in entry else f"{duration(entry['seconds'][1])}{times}"

    how = f"{cell['strategy']}, {cell['chunk']} at a time"
    return [f"{cell['short']}, T = {cell['samples']}", how, *(shown(cell["contenders"].get(name)) for name in names)]


def _fired_cells(cell: Result, names: Sequence[str]) -> list[str]:
    def shown(way: Result | None) -> str:
        if way is None or "refused" in way:
            return "-" if way is None else f"refused ({way['refused']})"
        notes = [way["fault"]] if way["fault"] else []
        notes += ["changes statistics"] if way["statistics_changed"] else []
        return f"{way['draws']}{' (' + ', '.join(notes) + ')' if notes else ''}"

    return [cell["case"], str(cell["train_mode_draws"]), *(shown(cell["ways"].get(name)) for name in names)]


Table = tuple[str, list[str], list[list[str]]]


def details(report: Result) -> list[Table]:
    """Tables of the rest of what was measured: a title, a header and rows."""
    names = [OURS, LOOP, *(v for peer in report["peers"].values() for v in peer["variants"] if not peer["missing"])]
    versions = "; ".join(f"{name} {p['version'] or p['missing']}" for name, p in report["peers"].items())
    networks = [
        [*(str(n[name]) for name in ("network", "samples", "repeats")), f"{n['accuracy']:.3f}",
         f"{n['iid']:.3g}", f"{n['latin']:.3g}", n["fault"] or f"{n['ratio']:.2f} ± {n['standard_error']:.2f}"]
        for n in report["latin"]["networks"]
    ]  # fmt: skip
    found = report["memory"]
    return [
        (f"times of a prediction, as a multiple of torchdrop's in brackets ({versions})",
         ["model", "torchdrop runs samples", *names], [_speed_cells(cell, names) for cell in report["speed"]]),
        ("random draws in one forward, and what is wrong with the samples' moments",
         ["model", "train mode", *names], [_fired_cells(cell, names) for cell in report["draws"]]),
        (f"peak memory, {found['case']}", ["T", "chunk", "peak"],
         [[t, str(found["chunks"][t]), _mebibytes(peak)] for t, peak in found["peaks"].items()]),
        (f"variance of the predictive mean over seeds, {report['latin']['rows']} digits",
         ["network", "T", "seeds", "accuracy", "iid", "latin", "iid / latin"], networks),
    ]  # fmt: skip

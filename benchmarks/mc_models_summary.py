"""What Monte Carlo inference on many models must show, read off a report: verdicts, tables, sentences."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable
from typing import Any

import summary
from harness import digits, duration, factor, markdown_table
from mc_models_checks import ROUNDING

Result = dict[str, Any]
Row = dict[str, str]

OURS, LOOP = "torchdrop", "loop"
COUNTS = (20, 50)
"""The numbers of samples T."""

_SPEED = {20: 0.9, 50: 1.0}
_PASS = {"BERT": 1.2, "MLP": 2.0}


def measured(report: Result) -> list[Result]:
    """The results of the models whose packages are installed."""
    return [result for result in report["models"] if "skipped" not in result]


def _row(case: str, required: str, shown: str, held: bool | None) -> Row:
    verdict = "-" if required == "-" else "not measured" if held is None else "ok" if held else "short"
    return {"case": case, "required": required, "measured": shown, "verdict": verdict}


def _bounded(
    case: str, required: str, results: list[Result], value: Callable[[Result], float], bound: float, least: bool
) -> Row:
    """The row of a figure that each model must keep. The worst comes first, and the others that fall short follow.

    Nothing falls short of what is not required.
    """
    wrong = [result["model"] for result in results if result["fault"]]
    values = sorted(((value(r), r["model"]) for r in results if not r["fault"]), reverse=not least)
    if not values and not wrong:
        return _row(case, required, "-", None)
    short = [(x, name) for x, name in values if required != "-" and (x < bound if least else x > bound)]
    parts = [f"{name} wrong" for name in wrong] + [f"{digits(x)} ({name})" for x, name in short or values[:1]]
    count = f"{len(short) + len(wrong)} of {len(results)} short: " if short or wrong else ""
    end = "least " if least else "most "
    return _row(case, required, count + (end if not count else "") + ", ".join(parts), not short and not wrong)


def _all(case: str, required: str, results: list[Result], kept: Callable[[Result], bool]) -> Row:
    """The row of a property that each model must have."""
    failed = [result["model"] for result in results if not kept(result)]
    named = f": not {', '.join(failed)}" if failed else ""
    return _row(case, required, f"{len(results) - len(failed)} of {len(results)}{named}", not failed)


def _speed_row(results: list[Result], samples: int, judged: bool) -> Row:
    return _bounded(
        f"speed of the first call against the loop, T = {samples}",
        f"at least {_SPEED[samples]:g} times the loop's" if judged else "-", results,
        lambda result: result["speed"][str(samples)]["ratio"][1], _SPEED[samples], True,
    )  # fmt: skip


def _pass_row(results: list[Result], group: str, judged: bool) -> Row:
    bound = _PASS[group]
    return _bounded(
        f"a pass in mc_dropout against one in eval mode, {group}",
        f"at most {bound:g} times its time" if judged else "-",
        [result for result in results if result["group"] == group],
        lambda result: result["pass"]["times"]["eval"][1], bound, False,
    )  # fmt: skip


def _fired(result: Result) -> bool:
    return result.get("draws", -1) == result.get("train_mode_draws")


def _same_rows(result: Result) -> bool:
    return result.get("rows_apart", float("inf")) <= ROUNDING


def _above(result: Result) -> float:
    return result["memory"][OURS] - result["memory"][LOOP]


def _memory_row(results: list[Result]) -> Row:
    """Nothing is required of it."""
    found = sorted((_above(result), result["model"]) for result in results if "memory" in result)
    if not found:
        return _row(f"peak memory above the loop's, T = {COUNTS[0]}", "-", "-", None)
    middle, (most, name) = statistics.median(value for value, _ in found), found[-1]
    shown = f"median {_size(middle)}, most {_size(most)} ({name})"
    return _row(f"peak memory above the loop's, T = {COUNTS[0]}", "-", shown, None)


def verdicts(report: Result) -> list[Row]:
    """One for each row of what must hold. On a quick run nothing is judged."""
    results, judged = measured(report), not report["quick"]
    rows = [
        *(_speed_row(results, samples, judged) for samples in COUNTS),
        *(_pass_row(results, group, judged) for group in _PASS),
        _all("random draws fire", "all of train mode's", results, _fired),
        _all("means of rows alone, in twos and in one batch", "equal to rounding",
            [result for result in results if result["rows"]], _same_rows),
        _all("parameters, buffers, flags, attributes, generators", "as before, bit for bit", results,
            lambda result: result.get("changed") == []),
        _memory_row(results),
    ]  # fmt: skip
    if not judged:
        rows = [{**row, "required": "-", "verdict": "-"} for row in rows]
    return rows


def _size(value: float) -> str:
    return f"{'-' if value < 0 else ''}{digits(abs(value) / 2**20)} MiB"


DETAILS = [
    "model", "package", "draws", "rows in any batch", "untouched", "pass, eval = 1", "pass, train = 1",
    *(f"loop / torchdrop, T = {samples}" for samples in COUNTS), f"loop, T = {COUNTS[0]}", "samples run",
    f"peak memory above the loop's, T = {COUNTS[0]}",
]  # fmt: skip


def _memory_cell(found: Result) -> str:
    cell = f"{_size(found[OURS] - found[LOOP])} above {_size(found[LOOP])}"
    values = found.get("resident")
    if values is None or None in values.values():
        return cell
    return f"{cell}; resident {_size(values[OURS] - values[LOOP])} above {_size(values[LOOP])}"


def _cells(result: Result) -> list[str]:
    """The model's row, with the reason in the place of times where they were not measured."""
    names = [result["model"], result["package"]]
    if "draws" not in result:
        why = f"skipped: {result['skipped'].partition(' (')[0]}" if "skipped" in result else f"wrong: {result['fault']}"
        return [*names, why, *["-"] * (len(DETAILS) - 3)]
    rows = "-" if not result["rows"] else "equal" if _same_rows(result) else f"off by {digits(result['rows_apart'])}"
    left = ", ".join(result["changed"][:3]) or "yes"
    known = [*names, f"{result['draws']} of {result['train_mode_draws']}", rows, left]
    if result["fault"]:
        return [*known, f"wrong: {result['fault']}", *["-"] * (len(DETAILS) - len(known) - 1)]
    first = result["speed"][str(COUNTS[0])]
    return [
        *known, *(factor(result["pass"]["times"][mode]) for mode in ("eval", "train")),
        *(factor(result["speed"][str(samples)]["ratio"]) for samples in COUNTS),
        duration(first["seconds"][LOOP][1]), result["strategy"], _memory_cell(result["memory"]),
    ]  # fmt: skip


def details(report: Result) -> tuple[list[str], list[list[str]]]:
    """The table of all models: its header and rows."""
    return DETAILS, [_cells(result) for result in report["models"]]


def verdict_table(report: Result) -> str:
    """Where it was measured, and the verdicts, as markdown."""
    return summary.markdown(report)


def _counted(report: Result) -> str:
    skipped = sorted({result["package"] for result in report["models"] if "skipped" in result})
    versions = "; ".join(f"{name} {report['packages'][name]}" for name in report["packages"] if name not in skipped)
    return f"{len(measured(report))} models; {versions}."


def sentences(report: Result) -> str:
    """The main figures, as lines of text for the guide."""
    results = measured(report)
    right = [result for result in results if not result["fault"]]
    if not right:
        return "No model was sampled rightly."
    with_rows = [result for result in results if result["rows"]]
    untouched = sum(result.get("changed") == [] for result in results)
    (first, early), (last, late) = (
        (digits(statistics.median(ratios)), sum(ratio >= _SPEED[t] for ratio in ratios))
        for t, ratios in ((t, [result["speed"][str(t)]["ratio"][1] for result in right]) for t in COUNTS)
    )
    single = digits(statistics.median(result["pass"]["times"]["train"][1] for result in right))
    text = (
        f"Of {len(results)} models of transformers, torch_geometric, torch.nn and torchdrop, in small configurations, "
        f"{sum(map(_fired, results))} make all draws of train mode, {sum(map(_same_rows, with_rows))} of the "
        f"{len(with_rows)} whose inputs have rows give them the same mean in any batch, and {untouched} are left as "
        f"they were, bit for bit. Against a loop of passes in train mode, a first call is {first} times as fast at "
        f"T = {COUNTS[0]} in the median, and on {early} at least {_SPEED[COUNTS[0]]:g} times; at T = {COUNTS[1]} it is "
        f"{last} times as fast, and on {late} not slower. A pass within `mc_dropout` takes {single} times one in train "
        "mode, in the median."
    )
    return "\n".join(textwrap.wrap(text, 118, break_on_hyphens=False, break_long_words=False))


def render(report: Result) -> str:
    """A report as markdown: machine, verdicts, all models, and the sentences of the guide of Monte Carlo inference."""
    tables = [verdict_table(report), _counted(report), markdown_table(*details(report))]
    return "\n\n".join([*tables, f"### In torchdrop/monte_carlo/README.md\n\n{sentences(report)}"])

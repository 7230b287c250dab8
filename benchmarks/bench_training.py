"""A whole training step (forward, loss, backward) without dropout, with PyTorch's, and after `torchdrop.replace`.

Each column has a process of its own; they take turns. Compiling is not timed, and most of the minutes.

python benchmarks/bench_training.py [--threads 2] [--model NAME ...] [--eager-only] [--every-cell] [--quick] [--output FILE]
python benchmarks/bench_training.py --render FILE
"""  # noqa: E501

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Sequence
from typing import Any

import command
import machine
import torch
import training_models
import training_summary
from harness import Call, Effort, compare, settle_allocator
from training_columns import COLUMNS, NONE, OURS, STOCK, ColumnError, Remote, remotes
from training_models import BF16, BRIEF, F32, FULL, LONG, SMALL, Case, Size
from training_summary import COMPILED, EAGER

import torchdrop

Result = dict[str, Any]

RESULT = "training-cpu.json"

QUICK = ("nn.TransformerEncoder", "nn.LSTM", SMALL.name, LONG)
"""The models of a quick run, unless it is told which."""

BRIEFLY = Effort(budget=0.0, batch=1e-4, min_rounds=2, max_rounds=2)


def _clock(call: Call, count: int) -> float:
    """The time of steps as the column's process sees it."""
    assert isinstance(call, Remote)
    return call.ask("seconds", count)


def _prepared(columns: dict[str, Remote], precision: str, compiled: bool) -> dict[str, Result]:
    """Readies all columns at once and checks them one by one."""
    found: dict[str, Result] = {name: {} for name in columns}
    for column in columns.values():
        column.begin("prepare", precision, compiled)
    for name, column in columns.items():
        try:
            found[name]["first"] = column.end()
        except ColumnError as error:
            found[name]["fault"] = f"n/a: {error}"
    for name, column in columns.items():
        if "fault" not in found[name]:
            found[name] |= _checked(column)
    return found


def _checked(column: Remote) -> Result:
    """The fault of a column, or its memory."""
    try:
        fault = column.ask("fault")
        return {"fault": f"wrong: {fault}"} if fault else column.ask("memory")
    except ColumnError as error:
        return {"fault": f"n/a: {error}"}


def measure(case: Case, columns: dict[str, Remote], precision: str, compiled: bool, effort: Effort) -> Result:
    """A cell: times and memory of the columns that are right, and ratios of times within rounds."""
    found = _prepared(columns, precision, compiled)
    right = {name: column for name, column in columns.items() if "fault" not in found[name]}
    result = {"model": case.name, "mode": COMPILED if compiled else EAGER, "precision": precision, "columns": found}
    try:
        compared = compare(dict(right), effort, _clock)
    except ColumnError as error:  # one that has run out of memory stops them all
        found |= {name: {"fault": f"n/a: {error}"} for name in right}
        return result
    for name in right:
        found[name]["seconds"] = compared.seconds(name)
    if OURS in right and STOCK in right:
        result["times"] = {STOCK: compared.ratio(STOCK, OURS)}
        if NONE in right:
            result["times"] |= {NONE: compared.ratio(OURS, NONE), "before": compared.ratio(STOCK, NONE)}
    return result | {"rounds": compared.rounds}


def _facts(columns: dict[str, Remote]) -> Result:
    """The draws of all columns in both precisions, and whether they have one outcome in eval mode."""
    outcomes = {name: column.ask("outcome") for name, column in columns.items()}
    draws = {
        precision: {name: column.ask("draws", precision) for name, column in columns.items()}
        for precision in (F32, BF16)
    }
    same = max(outcomes.values()) - min(outcomes.values()) <= 1e-5 * abs(outcomes[NONE])
    return {"draws": draws, "outcomes": outcomes, "unreached": columns[OURS].ask("rest")} | (
        {} if same else {"fault": f"wrong: losses in eval mode {outcomes}"}
    )


def model_cells(case: Case, size: Size, threads: int, modes: dict[bool, Sequence[str]], quick: bool) -> Result:
    """A model's facts and cells; `modes` has the precisions, eager (False) and compiled (True)."""
    result: Result = {"model": case.name, "package": case.package, "rate": case.rate}
    if reason := case.missing():
        return {"facts": result | {"skipped": reason}, "cells": []}
    cells: list[Result] = []
    with remotes(case.name, size, threads) as columns:
        try:
            result |= _facts(columns)
        except ColumnError as error:
            result["fault"] = f"n/a: {error}"
        if "fault" in result:
            print(result["fault"], flush=True)
            return {"facts": result, "cells": []}
        effort = BRIEFLY if quick else Effort(budget=5.0, min_rounds=case.rounds)
        for compiled, precisions in modes.items():
            for precision in precisions:
                cells.append(measure(case, columns, precision, compiled, effort))
                print("  " + " | ".join(training_summary.cell_row(cells[-1])), flush=True)
    return {"facts": result, "cells": cells}


def long(size: Size, threads: int) -> Result:
    """The memory of eager BERT's step on long rows, in both precisions; a new process for each number."""
    found: Result = {}
    for precision in (F32, BF16):
        found[precision] = {}
        for name in COLUMNS:
            with remotes(LONG, size, threads, [name]) as columns:
                entry = _prepared(columns, precision, False)[name]
                if "fault" not in entry:
                    entry["resident"] = columns[name].ask("resident")
            found[precision][name] = entry
    return found


def small(effort: Effort) -> Result:
    """A small model's step after `replace`, against that with its modules alone replaced. Both are in this process."""
    sites = "sites" in inspect.signature(torchdrop.replace).parameters
    steps, losses = {}, {}
    for name, options in (("all", {}), ("modules", {"sites": False} if sites else {})):
        model, inputs = SMALL.made()
        torchdrop.replace(model, **options)

        def step(model: torch.nn.Module = model, inputs: training_models.Inputs = inputs) -> torch.Tensor:
            loss = model(**inputs)
            loss.backward()
            model.zero_grad(set_to_none=True)
            return loss

        steps[name] = step
        losses[name] = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            losses[name].append(step().item())
    fault = None
    if losses["all"] != losses["modules"]:
        fault = "wrong: other losses than with modules alone"
    elif losses["all"][0] == losses["all"][1]:
        fault = "wrong: the same loss under two seeds"
    compared = compare(dict(steps), effort)
    return {
        "sites": sites,
        "fault": fault,
        "seconds": {name: compared.seconds(name) for name in steps},
        "ratio": compared.ratio("all", "modules"),
        "rounds": compared.rounds,
    }


def run(names: Sequence[str], options: Any) -> Result:
    """Measures the models of these names, says where it is, and writes the result after each."""
    begin, size = time.perf_counter(), BRIEF if options.quick else FULL
    settle_allocator()
    report: Result = {"machine": machine.describe(torch.device("cpu")), "quick": options.quick}
    report |= {"models": [], "cells": []}
    print("\n".join(f"{name}: {value}" for name, value in report["machine"].items()), flush=True)
    busy = report["machine"]["load_before"]
    if busy is not None and busy > 0.3:
        print(f"the machine is not idle (load {busy}): timings on several threads suffer most")
    everything = set(names) == set(choices())
    for name in names:
        print(f"{time.perf_counter() - begin:.0f} s: {name}", flush=True)
        if name == SMALL.name:
            report["small"] = small(BRIEFLY if options.quick else Effort(budget=4.0))
        elif name == LONG:
            report["long"] = long(size, options.threads)
        else:
            case = training_models.found(name, size)
            found = model_cells(case, size, options.threads, modes(case, options), options.quick)
            report["models"].append(found["facts"])
            report["cells"] += found["cells"]
        report["seconds"] = round(time.perf_counter() - begin, 1)
        report["machine"]["load_after"] = machine.load()
        report["summary"] = training_summary.verdicts(report)
        command.write(report, options, RESULT, everything and not (options.quick or options.eager_only))
    return report


def modes(case: Case, options: Any) -> dict[bool, Sequence[str]]:
    """The precisions in which a model's step is measured, eager and compiled."""
    both = (F32, BF16)
    if options.eager_only or (options.quick and not options.every_cell):
        return {False: both}
    return {False: both, True: both if options.every_cell else case.compiled}


def choices() -> list[str]:
    """The names of all models."""
    return [*training_models.cases(FULL), SMALL.name, LONG]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, RESULT, "small models, eager, few rounds, nothing judged")
    parser.add_argument("--model", action="append", choices=choices(), help="measure this one; may be repeated")
    parser.add_argument("--eager-only", action="store_true", help="compile nothing")
    parser.add_argument("--every-cell", action="store_true", help="compile all models in both precisions")
    options = parser.parse_args(arguments)
    if command.rendered(options, training_summary.render):
        return
    torch.set_num_threads(options.threads)
    names = options.model or (QUICK if options.quick else choices())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = run(names, options)
    print(f"\n{training_summary.render(report)}")


if __name__ == "__main__":
    main()

"""Monte Carlo inference on other people's models: what fires, what it leaves behind, and its time against the loop.

python benchmarks/mc_models.py [--threads 2] [--quick] [--output FILE]
python benchmarks/mc_models.py --render FILE
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import command
import machine
import mc_models_summary
import memory
import torch
from harness import Call, Effort, compare, cpu_clock, settle_allocator, text_table
from mc_models_checks import ROUNDING, changes, draws, fault, loop_mean, predicted, rows_apart, trained
from mc_models_packages import MODELS, PACKAGES, QUICK
from mc_models_summary import COUNTS, LOOP, OURS
from mc_models_torch import Inputs, Model, called
from torch import nn

import torchdrop
from torchdrop.monte_carlo import Prediction

Result = dict[str, Any]

RESULT = "mc-models-cpu.json"

FULL = {
    "speed": Effort(budget=1.6, min_rounds=5),
    "large": Effort(budget=1.6, min_rounds=3),
    "pass": Effort(budget=0.8, batch=1e-2, min_rounds=5),
}
BRIEF = dict.fromkeys(FULL, Effort(budget=0.0, batch=1e-4, min_rounds=2, max_rounds=2))
"""How long a full and a quick run take over the times of predictions, of those of a large model, and of passes."""


class _Sampled:
    """A pass within `mc_dropout`, which is entered anew for each batch of passes, and has surveyed the model."""

    def __init__(self, case: Model, model: nn.Module, inputs: Inputs) -> None:
        self._case, self._model, self._inputs = case, model, inputs

    def __call__(self) -> object:
        return called(self._model, self._inputs)

    def clock(self, count: int) -> float:
        with torchdrop.mc_dropout(self._model, seed=0, batch_dim=self._case.batch_dim):
            self()
            return cpu_clock(self, count)


def _clock(call: Call, count: int) -> float:
    """The time of passes. Other passes are slower while a context is entered, so it is not then."""
    return call.clock(count) if isinstance(call, _Sampled) else cpu_clock(call, count)


def passes(case: Model, model: nn.Module, inputs: Inputs, effort: Effort) -> Result:
    """A pass within `mc_dropout` as a multiple of one in eval mode and of one in train mode."""
    with torch.no_grad():
        contenders = {
            OURS: _Sampled(case, model, inputs),
            "eval": partial(called, model, inputs),
            "train": partial(called, trained(model), inputs),
        }
        compared = compare(contenders, effort, _clock)
    return {
        "seconds": {name: compared.seconds(name) for name in contenders},
        "times": {name: compared.ratio(OURS, name) for name in ("eval", "train")},
    }


def speed(loop: Call, ours: Call, effort: Effort) -> Result:
    """The loop's time as a multiple of that of a fresh `mc_predict`."""
    compared = compare({LOOP: loop, OURS: ours}, effort)
    return {
        "seconds": {name: compared.seconds(name) for name in (LOOP, OURS)},
        "ratio": compared.ratio(LOOP, OURS),
        "rounds": compared.rounds,
    }


def ways(case: Model, model: nn.Module, inputs: Inputs, samples: int) -> dict[str, Call]:
    """The two ways to a mean over T samples."""
    return {
        LOOP: partial(loop_mean, trained(model), inputs, samples),
        OURS: partial(predicted, case, model, inputs, samples),
    }


def resident(case: Model, way: str, samples: int, threads: int) -> int | None:
    """The growth of resident memory during a call in a process of its own; None where it cannot be told.

    `getrusage` would not do: a process that is started from a larger one begins with that one's peak.
    """
    begun = [sys.executable, __file__, "--threads", str(threads), "--resident", case.name, way, str(samples)]
    done = subprocess.run(begun, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def peaks(case: Model, model: nn.Module, inputs: Inputs, samples: int) -> Result:
    """The most bytes out from PyTorch's allocator in both ways, and the growth of resident memory if it is large."""
    cpu = torch.device("cpu")
    found: Result = {way: memory.peak_bytes(call, cpu) for way, call in ways(case, model, inputs, samples).items()}
    if case.large:
        threads = torch.get_num_threads()
        found["resident"] = {way: resident(case, way, samples, threads) for way in (LOOP, OURS)}
    return found


def checked(case: Model, model: nn.Module, inputs: Inputs, predict: Callable[..., Prediction], samples: int) -> Result:
    """What must be right before anything is timed: draws, rows, what is left behind, and the samples themselves."""
    found: Result = {"changed": changes(case, model, inputs)}
    found["draws"], found["train_mode_draws"] = draws(case, model, inputs)
    found["rows_apart"] = apart = rows_apart(case, model, inputs)
    wrong = fault(case, model, inputs, samples, predict)
    if found["draws"] != found["train_mode_draws"]:
        wrong = f"{found['draws']} draws of {found['train_mode_draws']}"
    elif apart is not None and not apart <= ROUNDING:
        wrong = f"means of rows differ by {apart:.1g} between batches"
    return found | {"fault": wrong}


def measure(case: Model, efforts: dict[str, Effort] = FULL, predict: Callable[..., Prediction] = predicted) -> Result:
    """The model's result. Times and memory are measured only if its samples are right."""
    result: Result = {"model": case.name, "package": case.package, "group": case.group, "rows": case.rows}
    if case.package in PACKAGES and (reason := PACKAGES[case.package].missing()):
        return result | {"skipped": reason}
    try:
        model, inputs = case.made()
        result |= checked(case, model, inputs, predict, max(COUNTS))
        if result["fault"]:
            return result
        report = predicted(case, model, inputs, COUNTS[0]).report
        result |= {"strategy": report.strategy, "pass": passes(case, model, inputs, efforts["pass"]), "speed": {}}
        for samples in COUNTS:
            pair = ways(case, model, inputs, samples)
            result["speed"][str(samples)] = speed(pair[LOOP], pair[OURS], efforts["large" if case.large else "speed"])
        result["memory"] = peaks(case, model, inputs, COUNTS[0])
    except Exception as error:  # a model that is refused is a result too
        return result | {"fault": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"}
    return result


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(quick: bool) -> Result:
    """Measures all models, and says where it is."""
    begin = time.perf_counter()
    settle_allocator()
    report: Result = {"machine": machine.describe(torch.device("cpu")), "quick": quick, "models": []}
    print("\n".join(f"{name}: {value}" for name, value in report["machine"].items()), flush=True)
    busy = report["machine"]["load_before"]
    if busy is not None and busy > 0.3:
        print(f"the machine is not idle (load {busy}): timings on several threads suffer most")
    report["packages"] = {name: package.version() or package.missing() for name, package in PACKAGES.items()}
    for case in MODELS:
        if quick and case.name not in QUICK:
            continue
        print(f"{time.perf_counter() - begin:.0f} s: {case.package}, {case.name}", flush=True)
        with _no_warnings():
            report["models"].append(measure(case, BRIEF if quick else FULL))
    report["summary"] = mc_models_summary.verdicts(report)
    report["machine"]["load_after"] = machine.load()
    report["seconds"] = round(time.perf_counter() - begin, 1)
    print(f"\n{text_table(*mc_models_summary.details(report), left=2)}")
    print(f"\nsummary, after {report['seconds']:.0f} s")
    return report


def _print_resident(name: str, way: str, samples: str) -> None:
    """Prints the growth of resident memory during a call, as JSON."""
    case = next(case for case in MODELS if case.name == name)
    model, inputs = case.made()
    print(json.dumps(memory.peak_resident(ways(case, model, inputs, int(samples))[way])))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, RESULT, "a few models and few rounds, nothing judged")
    parser.add_argument(
        "--resident", nargs=3, metavar=("MODEL", "WAY", "T"), help="print the growth of memory in one way, and no more"
    )
    options = parser.parse_args(arguments)
    if command.rendered(options, mc_models_summary.render):
        return
    torch.set_num_threads(options.threads)
    if options.resident:
        _print_resident(*options.resident)
        return
    report = run(options.quick)
    print(mc_models_summary.verdict_table(report))
    command.write(report, options, RESULT, not options.quick)


if __name__ == "__main__":
    main()

"""Requests to a server: the latency of Monte Carlo predictions, one after another and from several threads.

The usual loop runs T passes in train mode, and takes the mean and the deviation of their probabilities. `MCPredictor`
makes all statistics of `mc_predict`, with their standard errors, with and without compile=True.

python benchmarks/bench_serve.py [--threads 1] [--quick] [--output FILE]
python benchmarks/bench_serve.py --render FILE
"""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import command
import machine
import summary
import torch
from harness import Effort, Quartiles, compare, digits, markdown_table
from torch import Tensor, nn

import torchdrop

SAMPLES, ROWS, CLIENTS = 30, (1, 16), 4
PAUSES = {"paused": 5e-3, "busy": 0.0}
"""The mean pause in seconds between an answer and the client's next request, exponentially distributed."""

FASTER = 3.0

LOOP, OURS, COMPILED = "train-mode loop", "MCPredictor", "MCPredictor, compile=True"

Answer = Callable[[Tensor], Any]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(256, 10),
    ).eval()  # fmt: skip


def looping() -> Answer:
    """The loop, on a model that stays in train mode, as it may where threads share it."""
    model = network().train()

    @torch.no_grad()
    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = torch.stack([model(x) for _ in range(SAMPLES)]).softmax(-1)
        return probabilities.mean(0), probabilities.std(0)

    return answer


def predicting(compile: bool) -> Answer:
    example = torch.randn(max(ROWS), 64)
    return torchdrop.MCPredictor(network(), SAMPLES, task="classification", seed=0, example=example, compile=compile)


def ways(compiled: bool = True) -> dict[str, Answer]:
    made = {LOOP: looping(), OURS: predicting(False)}
    return made | {COMPILED: predicting(True)} if compiled else made


def fault(answers: dict[str, Answer]) -> str:
    """Says what is wrong with the answers, or "" if nothing is."""
    x = torch.randn(max(ROWS), 64, generator=torch.Generator().manual_seed(1))
    expected = torchdrop.mc_predict(network(), x, SAMPLES, task="classification", seed=0)
    for name, answer in answers.items():
        if name == LOOP:
            apart = (answer(x)[0] - expected.mean).abs() / (2**0.5 * expected.standard_errors["mean"] + 1e-6)
            if apart.max() > 7:
                return f"wrong: the loop's means are {apart.max():.1f} standard errors apart"
        elif not all(torch.allclose(answer(x[:n]).mean, expected.mean[:n], atol=1e-6) for n in ROWS):
            return f"wrong: {name} is not mc_predict"
    return ""


def from_threads(answer: Answer, requests: int, pause: float) -> tuple[list[float], list[Any]]:
    """The latencies in seconds of requests of one row that `CLIENTS` threads make, and the last answers."""
    x = torch.randn(CLIENTS, 64, generator=torch.Generator().manual_seed(1))
    taken: list[list[float]] = [[] for _ in range(CLIENTS)]
    last: list[Any] = [None] * CLIENTS
    ready = threading.Barrier(CLIENTS)

    def client(number: int) -> None:
        pauses = random.Random(number)
        ready.wait()
        for _ in range(requests):
            if pause:
                time.sleep(pauses.expovariate(1 / pause))
            begin = time.perf_counter()
            last[number] = answer(x[number : number + 1])
            taken[number].append(time.perf_counter() - begin)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one for several in taken for one in several], last


def same_answers(answer: Answer, last: Sequence[Any]) -> bool:
    """Whether answers to threads are those that one thread gets, bit for bit."""
    x = torch.randn(CLIENTS, 64, generator=torch.Generator().manual_seed(1))
    return all(torch.equal(answer(x[number : number + 1]).mean, last[number].mean) for number in range(CLIENTS))


def percentiles(latencies: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 99th percentile."""
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return cuts[49], cuts[98]


def asked(answers: dict[str, Answer], kind: str, pause: float, rounds: int, requests: int) -> list[dict[str, Any]]:
    """The percentiles of each way's latencies: medians over rounds, in which the ways take turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in answers}
    same = dict.fromkeys(answers, True)
    for _ in range(rounds):
        for name, answer in answers.items():
            latencies, last = from_threads(answer, requests, pause)
            found[name].append(percentiles(latencies))
            same[name] &= name == LOOP or same_answers(answer, last)
    p50, p99 = ({name: statistics.median(one[place] for one in found[name]) for name in answers} for place in (0, 1))
    return [{"way": name, "kind": kind, "p50": p50[name], "p99": p99[name], "same": same[name]} for name in answers]


def timed(answers: dict[str, Answer], rows: int, effort: Effort) -> list[dict[str, Any]]:
    """The time of a request after another, and how many times faster than the loop that is."""
    x = torch.randn(rows, 64)
    taken = compare({name: (lambda answer=answer: answer(x)) for name, answer in answers.items()}, effort)
    return [
        {"way": name, "rows": rows, "seconds": taken.seconds(name), "faster": taken.ratio(LOOP, name)}
        for name in answers
    ]


def run(quick: bool) -> dict[str, Any]:
    report: dict[str, Any] = {"machine": machine.describe(torch.device("cpu")), "cells": [], "clients": []}
    answers = ways(not quick)
    report["fault"] = fault(answers)
    for rows in ROWS:
        report["cells"] += timed(answers, rows, Effort(budget=0.5 if quick else 15.0, batch=2e-2))
    for kind, pause in PAUSES.items():
        report["clients"] += asked(answers, kind, pause, *((2, 20) if quick else (9, 250)))
    report["summary"] = verdicts(report)
    report["machine"]["load_after"] = machine.load()
    return report


def verdicts(report: dict[str, Any]) -> list[dict[str, str]]:
    """What must hold of the fastest way, and whether it does."""
    best = COMPILED if any(cell["way"] == COMPILED for cell in report["cells"]) else OURS
    rows = []
    for cell in report["cells"]:
        if cell["way"] == best:
            case = f"{cell['rows']} row{'s' if cell['rows'] > 1 else ''}, T = {SAMPLES}, one after another"
            rows.append(_row(report, f"{best}, {case}", _ratio(cell["faster"]), cell["faster"][1]))
    clients = {(one["way"], one["kind"]): one for one in report["clients"]}
    for kind, name in itertools.product(PAUSES, ("p50", "p99")):
        loop, ours = clients[LOOP, kind], clients[best, kind]
        ratio = loop[name] / ours[name]
        row = _row(report, f"{best}, 1 row, {CLIENTS} threads, {kind}, {name}", f"{digits(ratio)}x", ratio)
        if not ours["same"]:
            row |= {"measured": "wrong: other answers than in one thread", "verdict": "short"}
        rows.append(row)
    return rows


def _ratio(quartiles: Sequence[float]) -> str:
    low, median, high = map(digits, quartiles)
    return f"{median}x [{low}, {high}]"


def _row(report: dict[str, Any], case: str, measured: str, ratio: float) -> dict[str, str]:
    held = not report["fault"] and ratio >= FASTER
    required = f"{FASTER:g} times faster than the loop"
    return {
        "case": case,
        "required": required,
        "measured": report["fault"] or measured,
        "verdict": "ok" if held else "short",
    }


def render(report: dict[str, Any]) -> str:
    """A report as markdown: machine, summary, and a table of all ways."""
    clients = {(one["way"], one["kind"]): one for one in report["clients"]}
    rows = []
    for name in dict.fromkeys(way for way, _ in clients):
        cells = [cell for cell in report["cells"] if cell["way"] == name]
        alone = [f"{1e3 * Quartiles(*cell['seconds']).median:.2f} ms, {_ratio(cell['faster'])}" for cell in cells]
        parts = [f"{1e3 * clients[name, kind][part]:.2f} ms" for kind in PAUSES for part in ("p50", "p99")]
        rows.append([name, *alone, *parts])
    names = [f"{n} row{'s' if n > 1 else ''}" for n in ROWS]
    columns = [f"{part}, {kind}" for kind in PAUSES for part in ("p50", "p99")]
    return f"{summary.markdown(report)}\n\n{markdown_table(['way', *names, *columns], rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "serve-cpu.json", "few requests, not compiled")
    parser.set_defaults(threads=1)
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    torch.set_num_threads(options.threads)
    report = run(options.quick)
    print(render(report))
    command.write(report, options, "serve-cpu.json", not options.quick)


if __name__ == "__main__":
    main()

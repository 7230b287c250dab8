"""Dropout and max-norm on MNIST: Srivastava et al.'s networks within a budget of time, and Monte Carlo averaging.

python benchmarks/mnist.py --data FILE [--budget 30] [--threads 2] [--seed 0] [--plot FILE]
python benchmarks/mnist.py --render FILE

Srivastava et al. (JMLR 15, 2014, table 2) report test errors of 1.25 % for a network of 3 x 1024 rectified linear units
with dropout, which keeps 0.8 of the inputs and 0.5 of the hidden units, and 1.06 % with max-norm as well; the 1.60 %
without dropout is another network's, of 2 x 800 logistic units (Simard et al., 2003). This trains the network of
3 x 1024 in all three ways, each for a third of the budget, from the same initial weights and on the same batches, and
follows its test error. Theirs had a million updates; these have what the budget allows, which is more with forward
passes in bfloat16 under torch.autocast; weights, gradients, the loss and every evaluation are in float32. The dropout
network's deterministic pass is then compared with the mean over k stochastic passes (their section 7.5, figure 11).

No setting was chosen with the test set. Learning rates come from trainings of 6 epochs on the first 50,000 training
images, judged by the last 10,000, with momentum 0.95. Errors were 2.65, 1.80 and 1.69 % without dropout at 0.005, 0.02
and 0.05; 2.43, 2.53 and 3.64 % with dropout at 0.02, 0.05 and 0.1, of whose first two, which chance may order, the
larger was taken for the longer training. Max-norm has that rate and the bound 2 of their appendix B.1; in trainings of
16 epochs errors were 2.04 % without and 1.80 % with it. Reported are trainings on all 60,000 images, and of each its
last evaluation, whatever earlier ones were. These trainings were in float32; `--validation --epochs 6 --seed 1` repeats
them in today's precision, which was chosen with held-out training images, too.

The bound is one of the paper's weights, which are rescaled for the test; torchdrop rescales activations in training,
so that the same network has weights and bounds that are keep_prob times theirs: 1.6 for the first layer and 1 for the
rest.

FILE holds MNIST as x_train (60000, 28, 28), y_train (60000), x_test (10000, 28, 28) and y_test (10000), all uint8. This
is Keras' mnist.npz, https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz; the data are from
http://yann.lecun.com/exdb/mnist.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import command
import machine
import numpy as np
import summary
import torch
import torch.nn.functional as F
from harness import markdown_table, settle_allocator
from torch import Tensor, nn

import torchdrop

T = TypeVar("T")

SOURCES = (
    "MNIST can be had as Keras' mnist.npz from https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz, "
    "and in its original form from http://yann.lecun.com/exdb/mnist"
)

PIXELS, CLASSES, HIDDEN = 784, 10, (1024, 1024, 1024)
BATCH = 128
EVALUATIONS = 50
VALIDATION = 10_000

PRECISION = torch.bfloat16
"""Of the trainings' forward passes."""

AVERAGED = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
"""Over how many passes means are taken."""


@dataclass(frozen=True)
class Contender:
    """One way to train the network, and the error in percent that was published for it."""

    name: str
    published: float
    learning_rate: float
    momentum: float
    keep_input: float = 1.0
    keep_hidden: float = 1.0
    max_norm: float | None = None


CONTENDERS = (
    Contender("without dropout", 1.60, learning_rate=0.05, momentum=0.95),
    Contender("dropout", 1.25, learning_rate=0.05, momentum=0.95, keep_input=0.8, keep_hidden=0.5),
    Contender("dropout and max-norm", 1.06, 0.05, momentum=0.95, keep_input=0.8, keep_hidden=0.5, max_norm=2.0),
)
DROPOUT = CONTENDERS[1].name


class Digits(NamedTuple):
    """Images as rows of 784 pixels in [0, 1], float32; labels 0 to 9, int64."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def validation(self) -> Digits:
        """The last training images in place of the test images, which are left out."""
        images, labels = self.images, self.labels
        if len(labels) <= VALIDATION:
            raise ValueError(
                f"there must be more than {VALIDATION} training images to hold some out, got {len(labels)}"
            )
        return Digits(images[:-VALIDATION], labels[:-VALIDATION], images[-VALIDATION:], labels[-VALIDATION:])

    def first(self, rows: int) -> Digits:
        """The first training images, and a third as many test images."""
        return Digits(
            self.images[:rows], self.labels[:rows], self.test_images[: rows // 3], self.test_labels[: rows // 3]
        )


def load(file: Path) -> Digits:
    """The images and labels in `file`.

    Raises:
        FileNotFoundError: there is no such file; says where MNIST can be had.
        ValueError: it is no npz archive, or its arrays are not MNIST's in names, shapes or dtype.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--data must be a file with MNIST, and {file} is none. {SOURCES}")
    if not zipfile.is_zipfile(file):
        raise ValueError(f"--data must be an npz archive, and {file} is none. {SOURCES}")
    with np.load(file) as archive:
        missing = {"x_train", "y_train", "x_test", "y_test"} - set(archive.files)
        if missing:
            raise ValueError(
                f"{file} must hold {', '.join(sorted(missing))}, got {', '.join(archive.files)}. {SOURCES}"
            )
        return Digits(*_part(archive, "train"), *_part(archive, "test"))


def _part(archive: Any, name: str) -> tuple[Tensor, Tensor]:
    images, labels = archive[f"x_{name}"], archive[f"y_{name}"]
    if (
        {images.dtype, labels.dtype} != {np.dtype(np.uint8)}
        or images.shape != (labels.size, 28, 28)
        or labels.ndim != 1
    ):
        raise ValueError(
            f"x_{name} and y_{name} must be uint8 of shapes (N, 28, 28) and (N), "
            f"got {images.dtype} {images.shape} and {labels.dtype} {labels.shape}. {SOURCES}"
        )
    if not labels.size or labels.max() >= CLASSES:
        raise ValueError(f"y_{name} must hold labels 0 to 9, got {sorted(set(labels.tolist()))}. {SOURCES}")
    return torch.from_numpy(images).reshape(-1, PIXELS) / 255, torch.from_numpy(labels).long()


def build(contender: Contender, hidden: Sequence[int], seed: int) -> nn.Sequential:
    """The network with its dropout layers, if it has any. Initial weights (He et al., 2015) depend on `seed` alone."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (inputs, units) in enumerate(pairwise([PIXELS, *hidden, CLASSES])):
        keep = contender.keep_hidden if i else contender.keep_input
        linear = nn.Linear(inputs, units)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [nn.ReLU()] if i else []
        layers += [torchdrop.Dropout(keep_prob=keep)] if keep < 1 else []
        layers.append(linear)
    return nn.Sequential(*layers)


def bounds(network: nn.Sequential, c: float) -> Iterator[tuple[nn.Linear, float]]:
    """The bound c of the paper's weights as one of ours, for each linear layer.

    They rescale weights by keep_prob for the test, torchdrop activations by its reciprocal in training: the weights
    here are keep_prob times theirs, and so are their norms.
    """
    keep_prob = 1.0
    for module in network:
        if isinstance(module, torchdrop.Dropout):
            assert isinstance(module.keep_prob, float)
            keep_prob = module.keep_prob
        elif isinstance(module, nn.Linear):
            yield module, c * keep_prob
            keep_prob = 1.0


class Moment(NamedTuple):
    """How far a training is, after a step."""

    seconds: float
    epoch: float
    share: float


def train(
    network: nn.Module, contender: Contender, digits: Digits, share: Callable[[float, float], float], seed: int
) -> Iterator[Moment]:
    """Gradient descent with momentum on the cross-entropy, one step for each item, until the share done is 1.

    The learning rate falls linearly with the share, and norms are bounded after every step. `seed` alone decides the
    batches. Forward passes are in `PRECISION`, the loss, weights and gradients in float32. Seconds are those of
    training: what the caller does between two items does not count.

    Args:
        share: what share of the training is done after so many seconds and epochs.
    """
    order = torch.Generator().manual_seed(seed)
    bounded = list(bounds(network, contender.max_norm)) if contender.max_norm is not None else []
    optimizer = torch.optim.SGD(
        network.parameters(), lr=contender.learning_rate, momentum=contender.momentum, fused=True
    )
    rows = len(digits.images)
    seconds, seen, done = 0.0, 0, 0.0
    while True:
        for batch in torch.randperm(rows, generator=order).split(BATCH):
            begin = time.perf_counter()
            network.train()
            optimizer.param_groups[0]["lr"] = contender.learning_rate * (1 - done)
            optimizer.zero_grad()
            with torch.autocast("cpu", PRECISION):
                logits = network(digits.images[batch])
            F.cross_entropy(logits.float(), digits.labels[batch]).backward()
            optimizer.step()
            for layer, bound in bounded:
                torchdrop.max_norm_(layer, bound)
            seconds += time.perf_counter() - begin
            seen += len(batch)
            done = min(1.0, share(seconds, seen / rows))
            yield Moment(seconds, seen / rows, done)
            if done == 1.0:
                return


@torch.no_grad()
def mistakes(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images the deterministic pass gets wrong, as bool."""
    network.eval()
    return torch.cat([network(part).argmax(1) for part in images.split(2500)]) != labels


def follow(
    network: nn.Module, contender: Contender, digits: Digits, moments: Iterable[Moment]
) -> tuple[dict[str, Any], Tensor]:
    """Trains through the moments, with evaluations at equal distances, and gives the result and the last mistakes."""
    curve: list[list[float]] = []
    evaluated, evaluation_seconds = 0, 0.0
    wrong = torch.empty(0)
    moment = Moment(0.0, 0.0, 0.0)
    for moment in moments:
        if int(moment.share * EVALUATIONS) <= evaluated:
            continue
        evaluated = int(moment.share * EVALUATIONS)
        begin = time.perf_counter()
        wrong = mistakes(network, digits.test_images, digits.test_labels)
        evaluation_seconds += time.perf_counter() - begin
        curve.append([round(moment.seconds, 2), round(moment.epoch, 3), percent(wrong)])
    error = curve[-1][2]
    late = [point[2] for point in curve if point[1] > 0.9 * curve[-1][1]]
    return {
        **asdict(contender),
        "error": error,
        "standard_error": math.sqrt(error * (100 - error) / len(wrong)),
        "late_error": statistics.fmean(late),
        "late_evaluations": len(late),
        "epochs": moment.epoch,
        "training_seconds": moment.seconds,
        "evaluation_seconds": evaluation_seconds,
        "curve": curve,
    }, wrong


def percent(wrong: Tensor) -> float:
    return 100 * wrong.double().mean().item()


def difference(first: Tensor, second: Tensor) -> dict[str, float]:
    """By how much the first's error is above the second's, in percent, with the standard error over paired images."""
    apart = first.double() - second.double()
    return {
        "difference": 100 * apart.mean().item(),
        "standard_error": 100 * apart.std().item() / math.sqrt(len(apart)),
    }


def verdict(errors: Sequence[float]) -> str:
    """ok if the contenders' last errors are ordered as published: each is below the one before it."""
    return "ok" if all(a > b for a, b in pairwise(errors)) else "short"


def average(network: nn.Module, digits: Digits, passes: int, most: int, seed: int) -> dict[str, Any]:
    """The error of the mean probabilities over k passes, for each k up to `most`, and that of the deterministic pass.

    Disjoint groups of k passes each give an error. Their spread is that of the masks: network and test images are the
    same for all.
    """
    begin = time.perf_counter()
    sets = passes // most
    errors: dict[int, list[float]] = {k: [] for k in AVERAGED if k <= most}
    for part in shown("Monte Carlo", range(sets), lambda part: part / sets):
        images = iter(digits.test_images.split(1000))
        prediction = torchdrop.mc_predict(
            network, images, most, task="classification", scores="logits", seed=seed + part, keep_samples=True
        )
        assert prediction.samples is not None
        for k, found in errors.items():
            means = prediction.samples[: most // k * k].unflatten(0, (-1, k)).mean(1)
            found += [percent(mean.argmax(1) != digits.test_labels) for mean in means]
    return {
        "passes": sets * most,
        "seconds": time.perf_counter() - begin,
        "weight_scaling": percent(mistakes(network, digits.test_images, digits.test_labels)),
        "averaged": [
            {
                "k": k,
                "groups": len(found),
                "error": statistics.fmean(found),
                "standard_error": statistics.stdev(found) / math.sqrt(len(found)),
            }
            for k, found in errors.items()
        ],
    }


def shown(name: str, items: Iterable[T], share: Callable[[T], float]) -> Iterator[T]:
    """The items, with a progress bar of the share that is done, where tqdm is installed (the extra `bench`)."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=100.0, desc=name, bar_format=layout, mininterval=1.0) as bar:
        for item in items:
            bar.update(100 * share(item) - bar.n)
            yield item


def measure(digits: Digits, options: argparse.Namespace) -> dict[str, Any]:
    """Trains all contenders, compares their errors, and averages passes of the dropout network."""
    hidden, most = ((64, 64, 64), 10) if options.quick else (HIDDEN, AVERAGED[-1])
    allowed = 60 * options.budget / len(CONTENDERS)

    def share(seconds: float, epoch: float) -> float:
        return epoch / options.epochs if options.epochs else seconds / allowed

    results, wrong, averaged = [], [], {}
    for contender in CONTENDERS:
        network = build(contender, hidden, options.seed)
        moments = train(network, contender, digits, share, options.seed)
        result, last = follow(network, contender, digits, shown(contender.name, moments, lambda moment: moment.share))
        results.append(result)
        wrong.append(last)
        if contender.name == DROPOUT:
            averaged = average(network, digits, options.passes, most, options.seed)
    return {
        "networks": results,
        "differences": [difference(*pair) for pair in pairwise(wrong)],
        "monte_carlo": averaged,
    }


def run(digits: Digits, options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything, and says where, with what settings and how it was judged."""
    if options.validation:
        digits = digits.validation()
    if options.quick:
        digits = digits.first(600)
    torch.set_num_threads(options.threads)
    settle_allocator()
    report: dict[str, Any] = {
        "machine": machine.describe(torch.device("cpu")),
        "settings": {name: getattr(options, name) for name in ("budget", "epochs", "seed", "quick", "validation")}
        | {
            "batch": BATCH,
            "precision": str(PRECISION).removeprefix("torch."),
            "schedule": "the learning rate falls linearly to 0 over the training; norms are bounded after every step",
            "training_images": len(digits.labels),
            "test_images": len(digits.test_labels),
        },
        **measure(digits, options),
    }
    report["machine"]["load_after"] = machine.load()
    judged = not (options.quick or options.validation)
    return report | {"summary": [order(report["networks"], judged)]}


def order(networks: Sequence[dict[str, Any]], judged: bool) -> dict[str, str]:
    """The row that says whether the errors are ordered as published."""
    published, errors = ([result[kind] for result in networks] for kind in ("published", "error"))
    return {
        "case": f"error in percent: {' > '.join(result['name'] for result in networks)}",
        "required": f"this order; published {', '.join(f'{error:.2f}' for error in published)}",
        "measured": ", ".join(f"{error:.2f}" for error in errors),
        "verdict": verdict(errors) if judged else "not judged",
    }


NETWORKS_HEADER = [
    "network", "published, %", "last evaluation, % ± binomial standard error", "mean over the last 10 % of training, %",
    "epochs", "training, s", "evaluations, s", "learning rate at first", "momentum", "max-norm",
]  # fmt: skip


def network_row(result: dict[str, Any]) -> list[str]:
    return [
        result["name"],
        f"{result['published']:.2f}",
        f"{result['error']:.2f} ± {result['standard_error']:.2f}",
        f"{result['late_error']:.3f} ({result['late_evaluations']} evaluations)",
        f"{result['epochs']:.1f}",
        f"{result['training_seconds']:.0f}",
        f"{result['evaluation_seconds']:.0f}",
        f"{result['learning_rate']:g}",
        f"{result['momentum']:g}",
        "-" if result["max_norm"] is None else f"{result['max_norm']:g}",
    ]


def difference_rows(report: dict[str, Any]) -> list[list[str]]:
    names = [result["name"] for result in report["networks"]]
    return [
        [f"{first} - {second}", f"{found['difference']:+.2f} ± {found['standard_error']:.2f}"]
        for (first, second), found in zip(pairwise(names), report["differences"], strict=True)
    ]


def average_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = [
        [f"mean over {row['k']}", str(row["groups"]), f"{row['error']:.3f} ± {row['standard_error']:.3f}"]
        for row in found["averaged"]
    ]
    return [*rows, ["weight scaling", "-", f"{found['weight_scaling']:.3f}"]]


def render(report: dict[str, Any]) -> str:
    """A report as markdown: where it was measured and the verdict, the networks, their differences, Monte Carlo."""
    settings, averaged = report["settings"], report["monte_carlo"]
    length = (
        f"{settings['epochs']:g} epochs each"
        if settings["epochs"]
        else f"{settings['budget']:g} min of training in all"
    )
    tested_on = "held-out training" if settings["validation"] else "test"
    how = (
        f"{length}, batches of {settings['batch']}, forward passes in {settings['precision']}, seed "
        f"{settings['seed']}, {settings['training_images']} training images; errors, all in float32, on "
        f"{settings['test_images']} {tested_on} images. Evaluations are not in the "
        f"training's time, nor are the {averaged['seconds']:.0f} s of Monte Carlo. The order is judged by the last "
        "evaluations, whatever earlier ones were. The published error without dropout is of 2 x 800 logistic units."
    )
    if settings["quick"]:
        how += " A quick run of small networks on few images: its figures mean nothing."
    tables = [
        (NETWORKS_HEADER, [network_row(result) for result in report["networks"]]),
        (["difference of the last errors", "% ± standard error over paired images"], difference_rows(report)),
        (["dropout network, passes", "groups", "error, % ± standard error over groups"], average_rows(averaged)),
    ]
    return "\n\n".join([summary.markdown(report), how, *(markdown_table(*table) for table in tables)])


def plot(report: dict[str, Any], file: Path) -> None:
    """Draws the errors over the training's time, and those of averaging against weight scaling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    training, averaging = figure.subplots(1, 2)
    for result in report["networks"]:
        seconds, _, errors = zip(*result["curve"], strict=True)
        training.plot(seconds, errors, label=result["name"])
    lowest = min(result["error"] for result in report["networks"])
    training.set(xlabel="seconds of training", ylabel="test error, %", ylim=(0.8 * lowest, 3 * lowest + 0.1))
    training.legend(frameon=False)
    found = report["monte_carlo"]
    k, errors, bars = zip(*((r["k"], r["error"], r["standard_error"]) for r in found["averaged"]), strict=True)
    averaging.errorbar(k, errors, yerr=bars, marker="o", markersize=3, label="mean over k passes ± standard error")
    averaging.axhline(found["weight_scaling"], color="0.4", linestyle="--", label="weight scaling")
    averaging.set(xlabel="k", xscale="log", ylabel="test error of the dropout network, %")
    averaging.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "mnist.json", "small networks on few images; judges and writes nothing")
    parser.add_argument("--data", type=Path, metavar="FILE", help="MNIST; see above for where to have it")
    parser.add_argument(
        "--budget", default=30.0, type=float, metavar="MINUTES", help="of training, for the three networks together"
    )
    parser.add_argument("--epochs", type=float, help="so many for each network, instead of a budget")
    parser.add_argument("--passes", type=int, help="of Monte Carlo, in all: 1000, or 20 with --quick")
    parser.add_argument("--seed", default=0, type=int, help="of weights, batches and masks")
    parser.add_argument(
        "--validation", action="store_true",
        help="hold out the last 10,000 training images and leave the test images alone; judges and writes nothing",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of both curves (needs matplotlib)")
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        if options.plot:
            plot(json.loads(options.render.read_text()), options.plot)
        return
    if options.data is None:
        parser.error(f"--data FILE is needed. {SOURCES}")
    if options.quick:
        options.epochs = options.epochs or 2.0
    for name in ("budget", "epochs"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be positive and finite, got {value:g}")
    options.passes = options.passes or (20 if options.quick else 1000)
    least = 20 if options.quick else 2 * AVERAGED[-1]
    if options.passes < least:
        parser.error(f"--passes must be at least {least}, for two groups of the largest, got {options.passes}")
    try:
        digits = load(options.data)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    report = run(digits, options)
    print(render(report))
    if options.plot:
        plot(report, options.plot)
    command.write(report, options, "mnist.json", not (options.quick or options.validation))


if __name__ == "__main__":
    main()

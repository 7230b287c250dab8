"""Concrete dropout on the published toy problem: the learned rate falls as there are more data.

python benchmarks/concrete.py [--published] [--seeds 0 1 2] [--threads 2] [--quick]
python benchmarks/concrete.py --render FILE

Gal, Hron and Kendall (NeurIPS 2017, section 4.1) learn y = 2 x + 8 + e, with x and e standard normal, from N examples,
N from 10 to 10,000. Their network has three hidden layers of rectified linear units and two outputs, a mean f and a
log-variance s, each layer with concrete dropout of its input; the loss is the mean of exp(-s) (y - f)^2 + s plus the
regularizers with length scale 1e-4. With more data the network should grow surer of itself, that is drop less:
published is a fall of the learned rates from 0.40 at N = 10 to 0.16 at N = 10,000. Its epistemic uncertainty, the
spread of f over stochastic passes, should fall with it, while the aleatoric one, exp(s / 2), should tend to the noise's
standard deviation, 1.

The loss, batches of 20, Adam at 0.001, rates from 0.1 at temperature 0.1 and 20 stochastic passes are theirs. Two
things are not. In their runs Adam moves a logit by about 0.001 an update, and small N have up to 2000 updates where
large ones have 1000, so that where the rates end depends on how far they can go. Here they learn 10 times faster than
the weights, for as many updates at every N. And hidden layers have 256 units, for their 1024. `--published` repeats
their width, updates and single learning rate, in a longer run, for results/concrete-published.json.

A rate is judged by its mean over seeds and over the layers that are judged: those whose input is a hidden layer and
that lead to f. The first layer has a single input, whose entropy weighs next to nothing; the layer of s models the
noise. Both are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import command
import machine
import summary
import torch
from harness import digits, markdown_table, settle_allocator
from torch import Tensor, nn

import torchdrop
from torchdrop import ConcreteLayer, concrete_regularizers, regularization
from torchdrop.layers.concrete.layer import Regularizers

SIZES = (10, 25, 50, 100, 1000, 10_000)
BATCH = 20
LENGTH_SCALE = 1e-4
LEARNING_RATE = 1e-3
START, TEMPERATURE = 0.1, 0.1
PASSES, TESTS = 20, 1000

LAYERS = ("first", "second", "third", "mean", "log-variance")
JUDGED = ("second", "third", "mean")

Loop = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Protocol:
    """The units of hidden layers, the updates at each number of examples, and the rates' learning rate."""

    units: int
    updates: dict[int, int]
    rate_learning_rate: float


OURS = Protocol(256, dict.fromkeys(SIZES, 2000), 1e-2)
PUBLISHED = Protocol(1024, dict(zip(SIZES, (2000, 2000, 1500, 1000, 1000, 1000), strict=True)), LEARNING_RATE)
QUICK = Protocol(32, {10: 100, 1000: 100}, 1e-2)


def sample(examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x and y of shape (examples, 1)."""
    x, noise = (torch.randn(examples, 1, generator=generator) for _ in range(2))
    return x, 2 * x + 8 + noise


class Network(nn.Module):
    """Hidden layers, and the mean and the log-variance of the output, in columns."""

    def __init__(self, units: int, factors: Regularizers) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int) -> ConcreteLayer:
            linear = nn.Linear(inputs, outputs)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            return ConcreteLayer(linear, START, regularizers=factors, temperature=TEMPERATURE)

        self.hidden = nn.ModuleList(layer(inputs, units) for inputs in (1, units, units))
        self.mean, self.log_variance = layer(units, 1), layer(units, 1)

    def forward(self, x: Tensor) -> Tensor:
        for hidden in self.hidden:
            x = hidden(x).relu()
        return torch.cat([self.mean(x), self.log_variance(x)], 1)

    def rates(self) -> list[float]:
        """The rates of `LAYERS`."""
        return [m.dropout.p.item() for m in (*self.hidden, self.mean, self.log_variance)]


def heteroscedastic(output: Tensor, y: Tensor) -> Tensor:
    """Twice the mean negative log-likelihood, up to a constant."""
    mean, log_variance = output.split(1, 1)
    return ((y - mean).square() * torch.exp(-log_variance) + log_variance).mean()


def batches(examples: int, order: torch.Generator) -> Iterator[Tensor]:
    """Indices without end, in a new order in every epoch."""
    while True:
        yield from torch.randperm(examples, generator=order).split(BATCH)


def train(network: Network, x: Tensor, y: Tensor, updates: Iterable[int], pace: float, order: torch.Generator) -> None:
    rates = [parameter for name, parameter in network.named_parameters() if name.endswith("logit_p")]
    weights = [parameter for name, parameter in network.named_parameters() if not name.endswith("logit_p")]
    groups = [{"params": weights, "lr": LEARNING_RATE}, {"params": rates, "lr": pace}]
    optimizer = torch.optim.Adam(groups, fused=True)
    for _, batch in zip(updates, batches(len(x), order), strict=False):
        optimizer.zero_grad()
        (heteroscedastic(network(x[batch]), y[batch]) + regularization(network)).backward()
        optimizer.step()


@torch.no_grad()
def uncertainty(network: Network, x: Tensor, y: Tensor, seed: int) -> dict[str, float]:
    """Standard deviations that stochastic passes show, and the error of their mean."""
    with torchdrop.mc_dropout(network.eval(), seed=seed):
        means, log_variances = torch.stack([network(x) for _ in range(PASSES)]).unbind(-1)
    return {
        "aleatoric": log_variances.exp().mean().sqrt().item(),
        "epistemic": means.var(0).mean().sqrt().item(),
        "rmse": (means.mean(0) - y.squeeze(1)).square().mean().sqrt().item(),
    }


def measure(protocol: Protocol, examples: int, seed: int, loop: Loop) -> dict[str, Any]:
    """One training: the rates that were learned, and the uncertainty on new data."""
    data = torch.Generator().manual_seed(seed)
    (x, y), new = sample(examples, data), sample(TESTS, data)
    torch.manual_seed(seed)
    network = Network(protocol.units, concrete_regularizers(examples, length_scale=LENGTH_SCALE))
    begin = time.perf_counter()
    train(network, x, y, loop(range(protocol.updates[examples])), protocol.rate_learning_rate, data)
    seconds = time.perf_counter() - begin
    return {"seed": seed, "seconds": seconds, "p": network.rates(), **uncertainty(network, *new, seed)}


def judged(run: dict[str, Any]) -> float:
    """The mean rate of the layers that are judged."""
    return statistics.fmean(p for name, p in zip(LAYERS, run["p"], strict=True) if name in JUDGED)


def verdict(report: dict[str, Any]) -> list[dict[str, str]]:
    """The rows that say whether the rate falls at every step of N, and whether the noise is found."""
    means = [statistics.fmean(judged(run) for run in result["runs"]) for result in report["sizes"]]
    noise = [statistics.fmean(run["aleatoric"] for run in result["runs"]) for result in report["sizes"]]
    falls = all(few > many for few, many in pairwise(means))
    rows = [
        {
            "case": f"learned p at N = {', '.join(str(result['examples']) for result in report['sizes'])}",
            "required": "falls at every step; published from 0.40 to 0.16",
            "measured": ", ".join(digits(p) for p in means),
            "verdict": "ok" if falls else "short",
        },
        {
            "case": f"aleatoric standard deviation at N = {report['sizes'][-1]['examples']}",
            "required": "within 10 % of the noise's, 1",
            "measured": digits(noise[-1]),
            "verdict": "ok" if abs(noise[-1] - 1) < 0.1 else "short",
        },
    ]
    return [row | {"verdict": "not judged"} for row in rows] if report["settings"]["quick"] else rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains at every size with every seed, and says where, with what settings and how it was judged."""
    torch.set_num_threads(options.threads)
    settle_allocator()
    protocol = QUICK if options.quick else PUBLISHED if options.published else OURS
    report: dict[str, Any] = {
        "machine": machine.describe(torch.device("cpu")),
        "settings": {
            "seeds": options.seeds,
            "quick": options.quick,
            "units": protocol.units,
            "batch": BATCH,
            "length_scale": LENGTH_SCALE,
            "learning_rate": LEARNING_RATE,
            "rate_learning_rate": protocol.rate_learning_rate,
            "start": START,
            "temperature": TEMPERATURE,
            "passes": PASSES,
        },
        "sizes": [
            {
                "examples": examples,
                "updates": updates,
                "runs": [measure(protocol, examples, seed, shown(examples, seed)) for seed in options.seeds],
            }
            for examples, updates in protocol.updates.items()
        ],
    }
    report["machine"]["load_after"] = machine.load()
    return report | {"summary": verdict(report)}


def shown(examples: int, seed: int) -> Loop:
    """A progress bar over updates where tqdm is installed (the extra `bench`), otherwise nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda updates: updates
    return lambda updates: tqdm(updates, desc=f"N = {examples}, seed {seed}", unit="update", mininterval=1.0)


HEADER = [
    "N", "updates", *(f"p, {name}" for name in LAYERS), "p, judged", "aleatoric", "epistemic", "RMSE", "training, s",
]  # fmt: skip


def row(result: dict[str, Any]) -> list[str]:
    runs = result["runs"]
    rates = [*zip(*(found["p"] for found in runs), strict=True), [judged(found) for found in runs]]
    others = [[found[kind] for found in runs] for kind in ("aleatoric", "epistemic", "rmse")]
    seconds = statistics.fmean(found["seconds"] for found in runs)
    return [
        f"{result['examples']}",
        f"{result['updates']}",
        *(spread(values) for values in [*rates, *others]),
        f"{seconds:.0f}",
    ]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def render(report: dict[str, Any]) -> str:
    """A report as markdown: where it was measured and the verdict, then every size."""
    settings = report["settings"]
    how = (
        f"Three hidden layers of {settings['units']} units, batches of {settings['batch']}, Adam at "
        f"{settings['learning_rate']:g} and for p at {settings['rate_learning_rate']:g}, length scale "
        f"{settings['length_scale']:g}, p from {settings['start']:g} at temperature {settings['temperature']:g}, "
        f"{settings['passes']} stochastic passes; means and standard deviations over the seeds "
        f"{', '.join(map(str, settings['seeds']))}. Judged are the layers {', '.join(JUDGED)}, by their mean."
    )
    if settings["quick"]:
        how += " A quick run of a small network on two sizes: its figures mean nothing."
    return "\n\n".join([summary.markdown(report), how, markdown_table(HEADER, [row(r) for r in report["sizes"]])])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "concrete.json", quick="a small network on two sizes; judges and writes nothing")
    parser.add_argument(
        "--seeds", nargs="+", default=[0, 1, 2], type=int, help="of data, weights and masks: a training for each"
    )
    parser.add_argument("--published", action="store_true", help="their widths, updates and single learning rate")
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    report = run(options)
    print(render(report))
    result = "concrete-published.json" if options.published else "concrete.json"
    command.write(report, options, result, judged=not options.quick)


if __name__ == "__main__":
    main()

"""Uncertainty of networks on MNIST: one pass, Monte Carlo dropout as it is and calibrated, and deep ensembles.

python benchmarks/uncertainty.py --data FILE [--processes 2] [--threads 1]
python benchmarks/uncertainty.py --render FILE
python benchmarks/uncertainty_figure.py    # draws the figure, and fills in the tables of README.md

An MLP and a small CNN with dropout learn 10,000 digits each. The 60,000 training digits are split at random into five
disjoint parts of 12,000: 10,000 to learn, and 2,000 held out to which temperatures and rates are fitted. The five
networks of a group learn the same part, from other initial weights, in another order and with other masks, and form
one deep ensemble (Lakshminarayanan et al., NeurIPS 2017). The groups share no training digit, so they are independent
but for the test digits, which are the same for all.

Scores of one network are the mean over the five of its group, an ensemble's its own. Every standard error is that over
the five groups; differences are paired by group. "better" and "worse" are said of differences of more than 2.78
standard errors, the 97.5 % point of Student's t distribution with four degrees of freedom. There are hundreds of them,
and of those that are nothing but chance one in twenty is called better or worse.

- deterministic: one pass in eval mode. With a temperature: Guo et al., ICML 2017.
- Monte Carlo: 50 passes with independent masks; latin: with sampling="latin". With a temperature, keep probabilities
  at inference, or both, of torchdrop.calibrate. The temperature divides the logits of each sample.
- ensemble: the mean over five deterministic passes. Its temperature divides the logits of each network.
- ensemble of Monte Carlo: the mean over ten passes of each of the five networks, which is 50, as for Monte Carlo.

The test digits are all 10,000. Negative log-likelihood in nats, Brier score, expected calibration error (15 bins),
area under the curve of risk against coverage, and AUROC of errors: the probability that a wrong prediction is more
uncertain than a right one. Uncertainty is the predictive entropy, and for the last column the mutual information. 500
random test digits are turned by 0 to 180 degrees (Ovadia et al., NeurIPS 2019), for which predictive entropy, mutual
information, error and negative log-likelihood (at most 87 for a digit) are reported, and the AUROC of turned against
upright digits by predictive entropy.

Networks are trained by Adam in batches of 128, whose learning rate falls from 0.002 to 0; that and the rate of
dropout, 0.5, were not tuned. There are as many updates as the time allows. On held-out digits of two groups the MLP
has 4.5 % errors and a negative log-likelihood of 0.151 with 1000 updates, 3.6 % and 0.173 with 4000.
FILE is MNIST, see benchmarks/mnist.py.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import command
import machine
import mnist
import torch
import uncertainty_summary
from harness import settle_allocator
from torch import Tensor
from uncertainty_networks import KINDS, RATE, Kind, all_rotations, parts, trained
from uncertainty_scores import ANGLES, Judged, bound, judged, mean_of, over_groups, with_error
from uncertainty_ways import DETERMINISTIC, ENSEMBLE_CALIBRATED, MONTE_CARLO, Inputs, Single, ensembles


@dataclass(frozen=True)
class Sizes:
    """How many groups there are, of how many networks, and how many samples and digits each network has."""

    groups: int = 5
    members: int = 5
    samples: int = 50
    training_images: int = 10_000
    held_out_images: int = 2_000
    turned_images: int = 500


QUICK = Sizes(groups=2, members=2, samples=10, training_images=500, held_out_images=200, turned_images=50)
KINDS_IF_QUICK = tuple(replace(kind, updates=100) for kind in KINDS)


class Found(NamedTuple):
    """What a group of networks gives: the scores in each way, what was fitted, and the processor time it took."""

    judged: dict[str, Judged]
    fitted: dict[str, float]
    cpu_seconds: float


def of_group(digits: mnist.Digits, sizes: Sizes, kind: Kind, group: int) -> Found:
    """Trains the networks of a group, and scores them alone (the mean over them) and together."""
    begin = time.process_time()
    part = parts(digits, sizes.groups, sizes.training_images, sizes.held_out_images)[group]
    inputs, labels, turned_labels = tests(digits, sizes)
    of_members, fitted, members = [], [], []
    for seed in range(group * sizes.members, (group + 1) * sizes.members):
        single = Single(trained(kind, part, seed), part, sizes.samples, seed)
        found, needed = {}, {}
        for way, outputs in single.predictions(inputs):
            found[way] = judged(way, outputs, labels, turned_labels)
            if way in (DETERMINISTIC, MONTE_CARLO):
                needed[way] = outputs
        passes = sizes.samples // sizes.members
        members.append(single.member(needed[DETERMINISTIC], needed[MONTE_CARLO], passes))
        of_members.append(found)
        fitted.append(single.fitted)
        print(f"{kind.name}, network {seed}: error {100 * found[DETERMINISTIC]['scores']['error']:.2f} %", flush=True)
    together, temperature = ensembles(members, part.held_out_labels)
    of_ensembles = {way: judged(way, outputs, labels, turned_labels) for way, outputs in together.items()}
    return Found(
        mean_of(of_members) | of_ensembles,
        mean_of(fitted) | {ENSEMBLE_CALIBRATED: temperature},
        time.process_time() - begin,
    )


def tests(digits: mnist.Digits, sizes: Sizes) -> tuple[Inputs, Tensor, Tensor]:
    """The test digits, with some of them turned, and the labels of the former and of the latter."""
    count = len(digits.test_labels)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: sizes.turned_images]
    turned = all_rotations(digits.test_images[chosen], ANGLES)
    return Inputs(digits.test_images, turned), digits.test_labels, digits.test_labels[chosen]


@dataclass(frozen=True)
class Work:
    """The work on one group, as it is sent to a process."""

    data: Path
    threads: int
    sizes: Sizes
    kind: int
    group: int
    quick: bool = False

    def done(self) -> Found:
        torch.set_num_threads(self.threads)
        settle_allocator()
        kinds = KINDS_IF_QUICK if self.quick else KINDS
        return of_group(load(self.data, self.sizes, self.quick), self.sizes, kinds[self.kind], self.group)


def load(data: Path, sizes: Sizes, quick: bool) -> mnist.Digits:
    digits = mnist.load(data)
    return digits.first(sizes.groups * (sizes.training_images + sizes.held_out_images)) if quick else digits


def measure(data: Path, quick: bool, processes: int, threads: int) -> dict[str, Any]:
    """Trains all networks, and reports the scores of each kind in each way."""
    begin, sizes, kinds = time.perf_counter(), QUICK if quick else Sizes(), KINDS_IF_QUICK if quick else KINDS
    torch.set_num_threads(threads)
    facts = machine.describe(torch.device("cpu"))
    digits = load(data, sizes, quick)
    work = [
        Work(data, threads, sizes, kind, group, quick) for kind in range(len(kinds)) for group in range(sizes.groups)
    ]
    if processes == 1:
        found = told(map(Work.done, work), len(work), begin)
    else:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            found = told(pool.map(Work.done, work), len(work), begin)
    results = []
    for i, kind in enumerate(kinds):
        groups = found[i * sizes.groups : (i + 1) * sizes.groups]
        fitted = {way: with_error([group.fitted[way] for group in groups]) for way in groups[0].fitted}
        scores = over_groups([group.judged for group in groups])
        results.append({"kind": kind.name, "updates": kind.updates, "rate": RATE, **scores, "fitted": fitted})
    settings = {
        **asdict(sizes), "test_images": len(digits.test_labels), "angles": list(ANGLES), "bound": bound(sizes.groups),
        "quick": quick, "processes": processes, "seconds": time.perf_counter() - begin,
        "cpu_seconds": sum(group.cpu_seconds for group in found),
    }  # fmt: skip
    return {"machine": facts, "settings": settings, "networks": results}


def told(groups: Iterable[Found], count: int, begin: float) -> list[Found]:
    """The groups, with a line for each that says how much time has passed and is left."""
    found = []
    for group in groups:
        found.append(group)
        seconds = time.perf_counter() - begin
        left = seconds / len(found) * (count - len(found))
        print(f"{len(found)} of {count} groups, {seconds:.0f} s, about {left:.0f} s left", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "uncertainty.json", "few digits, networks and samples; judges and writes nothing")
    parser.set_defaults(threads=1)
    parser.add_argument("--data", type=Path, metavar="FILE", help="MNIST; see above")
    parser.add_argument("--processes", type=int, default=2, help="how many groups are worked on at a time")
    options = parser.parse_args(arguments)
    if command.rendered(options, uncertainty_summary.render):
        return
    if options.data is None:
        parser.error(f"--data FILE is needed. {mnist.SOURCES}")
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    try:
        report = measure(options.data, options.quick, options.processes, options.threads)
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))
    print(uncertainty_summary.render(report))
    command.write(report, options, "uncertainty.json", not options.quick)


if __name__ == "__main__":
    main()

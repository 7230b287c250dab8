"""Uncertainty of networks on MNIST: one pass, Monte Carlo dropout as it is and calibrated, and deep ensembles.

python benchmarks/uncertainty.py --data FILE [--threads 2]
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
information, error and negative log-likelihood are reported, and the AUROC of turned against upright digits by
predictive entropy.

Networks are trained by Adam in batches of 128, whose learning rate falls from 0.002 to 0; that and the rate of
dropout, 0.5, were not tuned. There are as many updates as the time allows. On held-out digits of two groups the MLP
has 4.5 % errors and a negative log-likelihood of 0.151 with 1000 updates, 3.6 % and 0.173 with 4000.
FILE is MNIST, see benchmarks/mnist.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command
import machine
import mnist
import torch
import uncertainty_summary
from harness import settle_allocator
from uncertainty_networks import KINDS, RATE, Kind, Part, all_rotations, parts, trained
from uncertainty_scores import ANGLES, Judged, bound, judged, mean_of, over_groups, with_error
from uncertainty_ways import DETERMINISTIC, ENSEMBLE_CALIBRATED, MONTE_CARLO, Inputs, Single, ensembles

GROUPS, MEMBERS, SAMPLES, TURNED = 5, 5, 50, 500
TRAINING, HELD_OUT = 10_000, 2_000
UPDATES_IF_QUICK = 100


class Progress:
    """Prints what was done, how long it took and how much is left."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done, self._begin = steps, 0, time.perf_counter()

    def step(self, what: str) -> None:
        self._done += 1
        seconds = time.perf_counter() - self._begin
        left = seconds / self._done * (self._steps - self._done)
        print(f"{what}; {seconds:.0f} s, about {left:.0f} s left", flush=True)


def group(
    kind: Kind,
    part: Part,
    tests: tuple[Inputs, torch.Tensor, torch.Tensor],
    seeds: Sequence[int],
    updates: int,
    samples: int,
    progress: Progress,
) -> tuple[dict[str, Judged], dict[str, float]]:
    """What is found in each way with the networks of a group, and the mean of what was fitted.

    Args:
        tests: the digits, and their labels: of the test digits, and of those that are turned.
        seeds: one for each network.
    """  # fmt: skip
    inputs, *labels = tests
    of_members, fitted, members = [], [], []
    for seed in seeds:
        single = Single(trained(kind, part, seed, updates), part, samples, seed)
        found, needed = {}, {}
        for way, outputs in single.predictions(inputs):
            found[way] = judged(way, outputs, *labels)
            if way in (DETERMINISTIC, MONTE_CARLO):
                needed[way] = outputs
        members.append(single.member(needed[DETERMINISTIC], needed[MONTE_CARLO], max(1, samples // len(seeds))))
        of_members.append(found)
        fitted.append(single.fitted)
        progress.step(f"{kind.name}, network {seed}: error {100 * found[DETERMINISTIC]['scores']['error']:.2f} %")
    together, temperature = ensembles(members, part.held_out_labels)
    of_ensembles = {way: judged(way, outputs, *labels) for way, outputs in together.items()}
    return mean_of(of_members) | of_ensembles, mean_of(fitted) | {ENSEMBLE_CALIBRATED: temperature}


def measure(digits: mnist.Digits, quick: bool) -> dict[str, Any]:
    """Trains all networks, and reports the scores of each kind in each way."""
    begin, cpu = time.perf_counter(), time.process_time()
    facts = machine.describe(torch.device("cpu"))
    groups, members, samples = (2, 2, 10) if quick else (GROUPS, MEMBERS, SAMPLES)
    training, held_out, turned = (500, 200, 50) if quick else (TRAINING, HELD_OUT, TURNED)
    if quick:
        digits = digits.first(groups * (training + held_out))
    chosen = torch.randperm(len(digits.test_labels), generator=torch.Generator().manual_seed(0))[:turned]
    inputs = Inputs(digits.test_images, all_rotations(digits.test_images[chosen], ANGLES))
    tests = (inputs, digits.test_labels, digits.test_labels[chosen])
    progress = Progress(len(KINDS) * groups * members)
    results = []
    for kind in KINDS:
        updates = UPDATES_IF_QUICK if quick else kind.updates
        found = [
            group(kind, part, tests, range(i * members, (i + 1) * members), updates, samples, progress)
            for i, part in enumerate(parts(digits, groups, training, held_out))
        ]
        fitted = [one for _, one in found]
        results.append({
            "kind": kind.name, "updates": updates, "rate": RATE,
            **over_groups([one for one, _ in found]),
            "fitted": {way: with_error([one[way] for one in fitted]) for way in fitted[0]},
        })  # fmt: skip
    settings = {
        "groups": groups, "members": members, "samples": samples, "training_images": training,
        "held_out_images": held_out, "test_images": len(digits.test_labels), "turned_images": turned,
        "angles": list(ANGLES), "bound": bound(groups), "quick": quick, "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip
    return {"machine": facts, "settings": settings, "networks": results}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "uncertainty.json", "few digits, networks and samples; judges and writes nothing")
    parser.add_argument("--data", type=Path, metavar="FILE", help="MNIST; see above")
    options = parser.parse_args(arguments)
    if command.rendered(options, uncertainty_summary.render):
        return
    if options.data is None:
        parser.error(f"--data FILE is needed. {mnist.SOURCES}")
    torch.set_num_threads(options.threads)
    settle_allocator()
    try:
        report = measure(mnist.load(options.data), options.quick)
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))
    print(uncertainty_summary.render(report))
    command.write(report, options, "uncertainty.json", not options.quick)


if __name__ == "__main__":
    main()

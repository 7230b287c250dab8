"""Cross-validation of keep probabilities: all folds and settings trained at once, against one after another.

python benchmarks/bench_search.py [--threads 2] [--quick] [--output FILE]
python benchmarks/bench_search.py --render FILE

The digits of scikit-learn, an MLP 64-256-256-10 with dropout at the input and at both hidden layers, 5 folds x 20
settings on 1438 rows; 359 rows are held out. One after another is what anyone would write: nn.Sequential with
torchdrop's layers, torch.optim.Adam with its defaults, one loop over folds and settings.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import command
import machine
import summary
import torch
import torch.nn.functional as F
from harness import digits, duration, markdown_table, settle_allocator, text_table
from torch import Tensor, nn

import torchdrop
from torchdrop.tune import SearchResult, cross_validate, draws
from torchdrop.tune.folds import divide
from torchdrop.tune.training import mixed

Result = dict[str, Any]
Setting = dict[str, float]

HELD_OUT, FOLDS, BATCH, EPOCHS, SEED = 359, 5, 32, 40, 0
SHARED: Setting = {"*": 0.5}

TIMES = 5.0
"""How many times faster it must be."""

NOISE = 3.0
"""Standard errors that the mean difference of the scores may have: exceeded by chance once in 370."""


def network() -> nn.Sequential:
    return nn.Sequential(
        torchdrop.Dropout(0.5), nn.Linear(64, 256), nn.ReLU(), torchdrop.Dropout(0.5), nn.Linear(256, 256), nn.ReLU(),
        torchdrop.Dropout(0.5), nn.Linear(256, 10),
    )  # fmt: skip


def settings(count: int) -> list[Setting]:
    """One shared 0.5, and the rest at random: the input's rate and each hidden layer's."""
    return [SHARED, *draws({"0": (0.6, 1.0), "3": (0.3, 1.0), "6": (0.3, 1.0)}, count - 1, SEED)]


def load() -> tuple[Tensor, Tensor]:
    """Images as rows of 64 pixels in [0, 1], and labels, in an order from the seed: the last ones are held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    return torch.as_tensor(images / 16, dtype=torch.float32)[order], torch.as_tensor(labels)[order]


def one_after_another(
    x: Tensor, y: Tensor, tried: Sequence[Setting], epochs: int, batch: int, after_fold: Callable[[int], None]
) -> Tensor:
    """Accuracies (settings, folds) in the ordinary way, on the folds and from the parameters of `cross_validate`."""
    scores = torch.zeros(len(tried), FOLDS, dtype=torch.float64)
    for fold, (train, test) in enumerate(divide(len(x), FOLDS, SEED)):
        for number, setting in enumerate(tried):
            torch.manual_seed(mixed(SEED, "model", fold))
            model = network()
            torchdrop.set_keep_prob(model, setting)
            optimizer = torch.optim.Adam(model.parameters())
            for _ in range(epochs):
                order = train[torch.randperm(len(train))]
                for rows in order[: len(order) // batch * batch].split(batch):
                    loss = F.cross_entropy(model(x[rows]), y[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            with torch.no_grad():
                scores[number, fold] = (model.eval()(x[test]).argmax(1) == y[test]).double().mean()
        after_fold(fold)
    return scores


def timed(call: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    out = call()
    return time.perf_counter() - begin, out


def compared(x: Tensor, y: Tensor, tried: Sequence[Setting], epochs: int, batch: int, rounds: int = 1) -> Result:
    """Both ways, all models each: seconds and scores. Three rounds: at once before, amid and after the other way."""

    def at_once() -> SearchResult:
        return cross_validate(network, x, y, tried, folds=FOLDS, epochs=epochs, batch_size=batch, seed=SEED)

    def after_fold(fold: int) -> None:
        if rounds == 3 and fold in (1, FOLDS - 1):
            each.append(timed(at_once)[0])

    first, found = timed(at_once)
    each = [first]
    torch.manual_seed(SEED)
    theirs, scores = timed(lambda: one_after_another(x, y, tried, epochs, batch, after_fold))
    theirs -= sum(each[1:])
    ours = statistics.median(each)
    return {
        "rounds": each,
        "batch": batch, "epochs": epochs, "models": found.scores.numel(), "at_once": found.at_once,
        "seconds": ours, "seconds_one_after_another": theirs, "ratio": theirs / ours,
        "scores": found.scores.tolist(), "scores_one_after_another": scores.tolist(), **noise(found.scores, scores),
    }  # fmt: skip


def noise(ours: Tensor, theirs: Tensor) -> Result:
    """The mean difference of paired scores with its standard error, and the largest differences."""
    apart = (ours - theirs).flatten()
    return {
        "difference": float(apart.mean()),
        "standard_error": float(apart.std()) / math.sqrt(len(apart)),
        "largest": float(apart.abs().max()),
        "largest_of_means": float((ours.mean(1) - theirs.mean(1)).abs().max()),
    }


def replayed(x: Tensor, y: Tensor, tried: Sequence[Setting], epochs: int) -> Result:
    """`cross_validate` at once and in turn, which have the same masks and differ by rounding."""
    runs = [
        cross_validate(network, x, y, tried, folds=FOLDS, epochs=epochs, batch_size=BATCH, seed=SEED, at_once=at_once)
        for at_once in (None, 1)
    ]
    together, alone = (run.scores for run in runs)
    return {"models": together.numel(), "epochs": epochs, "largest": float((together - alone).abs().max())}


def sizes(x: Tensor, y: Tensor, tried: Sequence[Setting], epochs: int, rounds: int) -> list[Result]:
    """Seconds for all models by how many are trained at once, the best of some interleaved rounds."""
    counts = (10, 20, 34, 50, 100)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            arguments = {"folds": FOLDS, "epochs": epochs, "batch_size": BATCH, "seed": SEED, "at_once": count}
            seconds[count].append(timed(lambda: cross_validate(network, x, y, tried, **arguments))[0])  # noqa: B023
    return [{"at_once": count, "epochs": epochs, "seconds": min(seconds[count])} for count in counts]


def held_out(x: Tensor, y: Tensor, chosen: dict[str, Setting], seeds: int, epochs: int) -> Result:
    """The chosen settings and one shared 0.5, trained on all that was cross-validated and scored on the rest.

    The standard error of a difference is over the held-out rows, of each row's mean over seeds: that of the rows there
    might have been, with these trainings.
    """
    names = [*chosen, "shared 0.5"]
    cut = len(x) - HELD_OUT
    split = (torch.arange(cut), torch.arange(cut, len(x)))
    right: list[Tensor] = []

    def score(output: Tensor, target: Tensor) -> float:
        right.append((output.argmax(1) == target).double())
        return float(right[-1].mean())

    found = cross_validate(
        network, x, y, [*chosen.values(), SHARED], folds=[split] * seeds, epochs=epochs, batch_size=BATCH, score=score,
        seed=SEED + 1,
    )  # fmt: skip
    rows = torch.stack(right).view(seeds, len(names), HELD_OUT).transpose(0, 1)
    if not torch.equal(rows.mean(2), found.scores):
        raise AssertionError("the rows of the held-out part are not in the order of the scores")
    return {
        name: {
            "setting": ([*chosen.values(), SHARED])[at],
            "accuracy": float(found.means[at]),
            "by_seed": found.scores[at].tolist(),
            "seeds_apart": float((found.scores[at] - found.scores[-1]).std()) / math.sqrt(seeds),
            **_apart((rows[at] - rows[-1]).mean(0).tolist()),
        }
        for at, name in enumerate(names)
    }


def _apart(differences: Sequence[float]) -> Result:
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return {"difference": mean, "standard_error": error, "reached": mean >= -error}


def run(quick: bool) -> Result:
    begin = time.perf_counter()
    settle_allocator()
    report: Result = {"machine": machine.describe(torch.device("cpu")), "quick": quick}
    print("\n".join(f"{name}: {value}" for name, value in report["machine"].items()), flush=True)
    busy = report["machine"]["load_before"]
    if busy is not None and busy > 0.3:
        print(f"the machine is not idle (load {busy}): operations on two threads wait for each other")
    images, labels = load()
    x, y = images[:-HELD_OUT], labels[:-HELD_OUT]
    tried, epochs, short, seeds = (settings(3), 2, 1, 2) if quick else (settings(20), EPOCHS, 4, 20)

    def say(what: str) -> None:
        print(f"{time.perf_counter() - begin:.0f} s: {what}", flush=True)

    say("both ways")
    compared(x, y, tried[:1], 1, BATCH)  # what is done once in a process is done now
    report["search"] = compared(x, y, tried, epochs, BATCH, 1 if quick else 3)
    say("other batch sizes")
    report["batches"] = [compared(x, y, tried, max(1, epochs // 4), batch) for batch in (64, 128)]
    say("at once and in turn, with the same masks")
    report["replayed"] = replayed(x, y, tried[:2], short)
    say("how many at once")
    report["sizes"] = sizes(x, y, tried, short, 1 if quick else 3)
    found = cross_validate(network, x, y, tried, folds=FOLDS, epochs=epochs, batch_size=BATCH, seed=SEED)
    print(found)
    report["table"] = [
        {"setting": row["setting"], "mean": row["mean"], "standard_error": row["standard_error"]} for row in found.rows
    ]
    say("the held-out part")
    chosen = {"best": found.best, "one standard error": found.one_standard_error}
    report["held_out"] = held_out(images, labels, chosen, seeds, epochs)
    report["summary"] = verdicts(report)
    report["machine"]["load_after"] = machine.load()
    report["seconds"] = round(time.perf_counter() - begin, 1)
    for title, header, rows in details(report):
        print(f"\n{title}\n{text_table(header, rows)}")
    print(f"\nsummary, after {report['seconds']:.0f} s")
    return report


def _row(case: str, required: str, measured: str, held: bool) -> dict[str, str]:
    return {"case": case, "required": required, "measured": measured, "verdict": "ok" if held else "short"}


def verdicts(report: Result) -> list[dict[str, str]]:
    """One for each thing that must hold. A quick run judges nothing."""
    search, kept = report["search"], report["held_out"]
    alone, together = (duration(search[kind]) for kind in ("seconds_one_after_another", "seconds"))
    rounds = ", ".join(f"{seconds:.1f}" for seconds in search["rounds"])
    times = f"{digits(search['ratio'])}x ({alone} / {together}, the median of {rounds})"
    apart = f"{_percent(search['difference'], search['standard_error'])}, largest {100 * search['largest']:.1f} points"
    what = f"{search['models']} models, {search['epochs']} epochs of batches of {search['batch']}"
    rows = [
        _row(f"at once against one after another: {what}", f"{TIMES:g} times faster", times, search["ratio"] >= TIMES),
        _row("scores at once minus one after another, mean", f"within {NOISE:g} standard errors of 0", apart,
             abs(search["difference"]) <= NOISE * search["standard_error"]),
    ]  # fmt: skip
    for name, entry in kept.items():
        if name != "shared 0.5":
            case = f"{name}, {_shown(entry['setting'])}, minus one shared 0.5, on held-out rows"
            measured = _percent(entry["difference"], entry["standard_error"])
            rows.append(_row(case, "not below 0 by more than 1 standard error", measured, entry["reached"]))
    if report["quick"]:
        rows = [{**row, "required": "-", "verdict": "-"} for row in rows]
    return rows


def _percent(value: float, error: float) -> str:
    return f"{100 * value:+.2f} ± {100 * error:.2f} points"


def _shown(setting: Setting) -> str:
    return " ".join(f"{pattern}: {keep_prob:.2f}" for pattern, keep_prob in setting.items())


Table = tuple[str, list[str], list[list[str]]]


def details(report: Result) -> list[Table]:
    """Tables of the rest of what was measured: a title, a header and rows."""
    again = report["replayed"]
    speed = [
        [str(r["batch"]), str(r["epochs"]), str(r["at_once"]), duration(r["seconds"]),
         duration(r["seconds_one_after_another"]), f"{r['ratio']:.2f}x", _percent(r["difference"], r["standard_error"])]
        for r in (report["search"], *report["batches"])
    ]  # fmt: skip
    found = sorted(report["table"], key=lambda row: -row["mean"])
    kept = [
        [name, _shown(entry["setting"]), f"{100 * entry['accuracy']:.2f} %", str(len(entry["by_seed"])),
         _percent(entry["difference"], entry["standard_error"]), f"± {100 * entry['seeds_apart']:.2f}"]
        for name, entry in report["held_out"].items()
    ]  # fmt: skip
    return [
        (f"times of {report['search']['models']} models",
         ["batch", "epochs", "at once", "all at once", "one after another", "ratio", "scores apart"], speed),
        (f"times by how many are trained at once, {report['sizes'][0]['epochs']} epochs of batches of {BATCH}; with "
         f"the same masks, {again['models']} models at once and in turn differ by at most "
         f"{100 * again['largest']:.2f} points after {again['epochs']} epochs",
         ["at once", "seconds"], [[str(row["at_once"]), f"{row['seconds']:.2f}"] for row in report["sizes"]]),
        ("cross-validated accuracy", ["keep_prob", "mean", "standard error"],
         [[_shown(r["setting"]), f"{100 * r['mean']:.2f} %", f"{100 * r['standard_error']:.2f}"] for r in found]),
        (f"accuracy on {HELD_OUT} held-out rows",
         ["choice", "keep_prob", "accuracy", "seeds", "minus shared 0.5, s.e. over rows", "s.e. over seeds"], kept),
    ]  # fmt: skip


def render(report: Result) -> str:
    """A report as markdown: machine, summary, and the tables of details."""
    tables = (f"### {title}\n\n{markdown_table(header, rows)}" for title, header, rows in details(report))
    return "\n\n".join([summary.markdown(report), *tables])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "search-cpu.json", "3 settings and 2 epochs; nothing is judged")
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    torch.set_num_threads(options.threads)
    report = run(options.quick)
    print(summary.markdown(report))
    command.write(report, options, "search-cpu.json", not options.quick)


if __name__ == "__main__":
    main()

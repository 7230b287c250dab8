"""Monte Carlo inference against the usual loop and against other packages: time, memory, variance, and what fires.

python benchmarks/bench_monte_carlo.py [--threads 2] [--quick] [--output FILE]
python benchmarks/bench_monte_carlo.py --render FILE
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import command
import machine
import memory
import monte_carlo_summary
import summary
import torch
from harness import (
    Call,
    Effort,
    clock_for,
    compare,
    markdown_table,
    settle_allocator,
    text_table,
)
from monte_carlo_models import Case, Draws, examined, mlp, statistics_watched, timed, train_mode_draws
from monte_carlo_samplers import (
    LOOP,
    OURS,
    PEERS,
    Maker,
    Moments,
    fault,
    means_apart,
    modules_loop,
    moments,
    ours,
    sampler,
    train_loop,
)
from torch import Tensor, nn

import torchdrop

Result = dict[str, Any]

MEMORY_BOUND, MEMORY_SAMPLES = 4 * 2**20, (10, 1000)
"""Of the bounds on memory a small one, so that it is in force at the smaller number of samples as well."""

LATIN_SAMPLES, LATIN_ROWS, LATIN_EPOCHS = 20, 300, 150
"""The number of epochs is that of the main job, `python -m torchdrop demo`, whose network and training are used."""


def peers() -> dict[str, Maker]:
    """The ways of the packages that are installed."""
    return {name: make for peer in PEERS if not peer.missing() for name, make in peer.variants.items()}


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def _averaged(make: Maker, model: nn.Module, x: Tensor, samples: int) -> Call:
    run = sampler(make, copy.deepcopy(model), x, samples)
    return lambda: moments(run())


def measure(case: Case, device: torch.device, effort: Effort) -> Result:
    """The case's result: the seconds of each contender that samples rightly, and as a multiple of torchdrop's."""
    model, x = case.made(device)
    reference = _averaged(train_loop, model, x, case.samples)()
    _, report = ours(model, x, case.samples)
    makers = {LOOP: modules_loop if case.modules else train_loop, **peers()}
    calls: dict[str, Call] = {OURS: lambda: ours(model, x, case.samples)[0]}
    contenders: dict[str, Result] = {}
    for name in (OURS, *makers):
        try:
            if name in makers:
                calls[name] = _averaged(makers[name], model, x, case.samples)
            found = fault(calls[name](), reference, case.samples)  # type: ignore[arg-type]
        except Exception as error:  # a package that refuses a model is a result too
            if name in (OURS, LOOP):
                raise
            contenders[name] = {"fault": f"n/a: {_failure(error)}"}
        else:
            contenders[name] = {"fault": f"wrong: {found}"} if found else {}
    compared = compare(
        {name: calls[name] for name, entry in contenders.items() if not entry}, effort, clock_for(device)
    )
    for name in compared.samples:
        contenders[name]["seconds"] = compared.seconds(name)
        if name != OURS and OURS in compared.samples:
            contenders[name]["times_torchdrop"] = compared.ratio(name, OURS)
    return {
        "case": case.label, "short": case.short, "shape": list(case.shape), "samples": case.samples,
        "required": case.required, "strategy": report.strategy, "chunk": report.chunk, "draws": report.draws,
        "train_mode_draws": train_mode_draws(model, x), "rounds": compared.rounds, "contenders": contenders,
    }  # fmt: skip


def fired(case: Case, device: torch.device, samples: int = 100) -> Result:
    """How many random calls one forward makes in each way, and what comes of it."""
    model, x = case.made(device)
    reference: Moments = _averaged(train_loop, model, x, samples)()  # type: ignore[assignment]
    with statistics_watched(model) as changed:
        found, report = ours(model, x, samples)
        entry: Result = {"draws": report.draws, "statistics_changed": changed()}
    ways = {OURS: entry | {"fault": fault(found, reference, samples)}}
    for name, make in {LOOP: modules_loop, **peers()}.items():
        own = copy.deepcopy(model)
        try:
            with statistics_watched(own) as changed, Draws() as draws:
                sampler(make, own, x, 1)()
            entry = {"draws": draws.count, "statistics_changed": changed()}
            found = _averaged(make, model, x, samples)()  # type: ignore[assignment]
            ways[name] = entry | {"fault": fault(found, reference, samples)}
        except Exception as error:
            ways[name] = {"refused": _failure(error)}
    return {"case": case.label, "train_mode_draws": train_mode_draws(model, x), "ways": ways}


def peaks(device: torch.device, quick: bool) -> Result:
    """The most bytes out from PyTorch's allocator during a call, at two numbers of samples under one bound."""
    rows = 16 if quick else 64
    case = Case("MLP", "MLP", partial(mlp, 784, 1024, 1024, 10), (rows, 784))
    model, x = case.made(device)
    bound = MEMORY_BOUND * rows // 64
    few, many = MEMORY_SAMPLES[0], MEMORY_SAMPLES[1] // (10 if quick else 1)
    result: Result = {"case": f"MLP, batch {rows}", "bound": bound, "peaks": {}, "chunks": {}}
    for samples in (few, many):
        call = partial(torchdrop.mc_predict, model, x, samples=samples, memory=bound)
        result["chunks"][str(samples)] = call().report.chunk
        result["peaks"][str(samples)] = memory.peak_bytes(call, device)
    first, last = result["peaks"].values()
    return result | {"ratio": last / first}


def _digits_network(seed: int, device: torch.device) -> tuple[nn.Module, Tensor, float]:
    """The main job's network, trained as there; test images; its accuracy."""
    from torchdrop.demo import data, network, training

    images = data.load(device)
    torch.manual_seed(seed)
    model = network.build(network.SIZES, network.RATES).to(device)
    training.train(
        model,
        images.train_images,
        images.train_labels,
        epochs=LATIN_EPOCHS,
        seed=seed,
        schedule={},
        after_epoch=lambda: None,
    )
    with torch.no_grad():
        right = model.eval()(images.test_images).argmax(1) == images.test_labels
    return model, images.test_images[:LATIN_ROWS], float(right.float().mean())


def _means(model: nn.Module, x: Tensor, samples: int, sampling: str, repeats: int) -> Tensor:
    """Predictive means under independent seeds: (repeats, rows, classes)."""
    predict = partial(torchdrop.mc_predict, model, x, samples=samples, task="classification", sampling=sampling)
    return torch.stack([predict(seed=seed).mean for seed in range(repeats)])


def variance_ratio(iid: Tensor, latin: Tensor, resamples: int = 1000) -> Result:
    """Variances over the first dimension, averaged over the others; their ratio and its bootstrap standard error."""
    generator = torch.Generator().manual_seed(0)
    averages, bootstrapped = [], []
    for means in (iid, latin):
        values, n = (means - means.mean(0)).flatten(1).double().cpu(), len(means)
        averages.append(float(values.var(0).mean()))
        chosen = torch.randint(n, (resamples, n), generator=generator)
        weights = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
            1, chosen, torch.full(chosen.shape, 1 / n, dtype=torch.float64)
        )
        bootstrapped.append((weights @ values.square() - (weights @ values).square()).mean(1))
    spread = float((bootstrapped[0] / bootstrapped[1]).std())
    return {"iid": averages[0], "latin": averages[1], "ratio": averages[0] / averages[1], "standard_error": spread}


def latin(device: torch.device, quick: bool) -> Result:
    """The variance of the predictive mean under both samplings, for several networks, and at other T for the first."""
    result: Result = {"samples": LATIN_SAMPLES, "rows": LATIN_ROWS, "repeats": 20 if quick else 200, "networks": []}
    for seed in range(1 if quick else 3):
        try:
            model, x, accuracy = _digits_network(seed, device)
        except ModuleNotFoundError as error:
            return result | {"fault": f"not installed: pip install scikit-learn ({error})"}
        for samples in (LATIN_SAMPLES,) if seed or quick else (4, LATIN_SAMPLES, 100):
            repeats = result["repeats"] // (1 if samples == LATIN_SAMPLES else 4)
            iid, own = (_means(model, x, samples, kind, repeats) for kind in ("iid", "latin"))
            entry = {"network": seed, "samples": samples, "accuracy": accuracy, **variance_ratio(iid, own)}
            apart = means_apart(moments(own), moments(iid), repeats)
            entry["fault"] = f"wrong: means {apart:.1f} standard errors apart" if apart else None
            result["networks"].append(entry | {"repeats": repeats})
    return result


def run(device: torch.device, quick: bool) -> Result:
    """Measures everything, and says where it is."""
    begin = time.perf_counter()
    settle_allocator()
    report: Result = {"machine": machine.describe(device), "quick": quick, "peers": {}}
    print("\n".join(f"{name}: {value}" for name, value in report["machine"].items()), flush=True)
    busy = report["machine"]["load_before"]
    if busy is not None and busy > 0.3:
        print(f"the machine is not idle (load {busy}): timings on several threads suffer most")
    for peer in PEERS:
        report["peers"][peer.name] = {
            "version": peer.version(), "missing": peer.missing(), "variants": list(peer.variants)
        }  # fmt: skip
    effort = Effort(budget=0.5, min_rounds=3) if quick else Effort(budget=15.0)
    steps = {
        "speed": lambda: [measure(case, device, effort) for case in timed(quick)],
        "draws": lambda: [fired(case, device) for case in examined(quick)],
        "memory": lambda: peaks(device, quick),
        "latin": lambda: latin(device, quick),
    }
    for name, step in steps.items():
        print(f"{time.perf_counter() - begin:.0f} s: {name}", flush=True)
        report[name] = step()
    report["summary"] = monte_carlo_summary.verdicts(report)
    report["machine"]["load_after"] = machine.load()
    report["seconds"] = round(time.perf_counter() - begin, 1)
    for title, header, rows in monte_carlo_summary.details(report):
        print(f"\n{title}\n{text_table(header, rows)}")
    print(f"\nsummary, after {report['seconds']:.0f} s")
    return report


def render(report: Result) -> str:
    """A report as markdown: machine, summary, and the tables of details."""
    tables = (
        f"### {title}\n\n{markdown_table(header, rows)}" for title, header, rows in monte_carlo_summary.details(report)
    )
    return "\n\n".join([summary.markdown(report), *tables])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, "monte-carlo-DEVICE.json", "smaller models and fewer rounds")
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu or cuda")
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    torch.set_num_threads(options.threads)
    report = run(options.device, options.quick)
    print(summary.markdown(report))
    command.write(report, options, f"monte-carlo-{options.device.type}.json", not options.quick)


if __name__ == "__main__":
    main()

"""A training step with compact dropout against none, masked dropout and torch.nn's; and Monte Carlo samples.

python benchmarks/compact.py [--threads 2] [--quick] [--output FILE]
python benchmarks/compact.py --render FILE
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import checks
import command
import machine
import torch
import torch.nn.functional as F
from harness import Call, Effort, compare, duration, factor, markdown_table, settle_allocator, text_row, text_table
from torch import Tensor, nn

import torchdrop
from torchdrop import compact

NONE, COMPACT, MASKED, STOCK = "no dropout", "compact", "torchdrop.Dropout", "torch.nn.Dropout"
LOOP, VECTORISED, DENSE = "compact, loop", "compact, vectorized", "masked, vectorized"
REQUIRED = 1.7
"""How many times faster than without dropout the MLP's step must be at keep_prob 0.5."""

RESULT = "compact.json"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A stack of Linear layers and a batch for it."""

    name: str
    widths: tuple[int, ...]
    rows: int
    activation: type[nn.Module] = nn.ReLU
    inner: bool = False
    """Whether it stands amid a network: its input wants a gradient, and its outputs are no classes."""

    def label(self) -> str:
        return f"{self.name} {'-'.join(map(str, self.widths))}, {self.rows} rows"

    def network(self) -> nn.Sequential:
        """Without dropout, from a fixed seed."""
        modules: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for wide, narrow in zip(self.widths, self.widths[1:], strict=False):
                modules += [nn.Linear(wide, narrow), self.activation()]
        return nn.Sequential(*modules[:-1])

    def batch(self) -> tuple[Tensor, Tensor]:
        x = checks.sample((self.rows, self.widths[0]), torch.float32, CPU)
        if self.inner:
            return x.requires_grad_(), checks.sample((self.rows, self.widths[-1]), torch.float32, CPU, seed=1)
        return x, torch.arange(self.rows) % self.widths[-1]

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(outputs, target) if self.inner else F.cross_entropy(outputs, target)


def cases(quick: bool) -> list[Case]:
    """The first is the one that is judged."""
    if quick:
        return [Case("MLP", (20, 64, 64, 10), 16), Case("transformer block", (24, 96, 24), 32, nn.GELU, inner=True)]
    return [
        Case("MLP", (784, 2048, 2048, 2048, 10), 128),
        Case("transformer block", (768, 3072, 768), 1024, nn.GELU, inner=True),
    ]


def with_dropout(network: nn.Sequential, layer: Callable[[float], nn.Module], p: float) -> nn.Sequential:
    """Dropout before every Linear but the first."""
    modules: list[nn.Module] = []
    for module in network:
        modules += [layer(p)] if isinstance(module, nn.Linear) and modules else []
        modules.append(module)
    return nn.Sequential(*modules)


def contenders(case: Case, keep_prob: float) -> dict[str, nn.Module]:
    """Each with parameters of its own, all of the same values."""
    p = 1.0 - keep_prob
    return {
        NONE: case.network(),
        COMPACT: compact(case.network(), keep_prob=keep_prob),
        MASKED: with_dropout(case.network(), torchdrop.Dropout, p),
        STOCK: with_dropout(case.network(), nn.Dropout, p),
    }


def _gradients(case: Case, model: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    x, y = case.batch()
    out = model(x.double())
    loss = case.loss(out, y.double() if case.inner else y)
    return [out.detach(), *torch.autograd.grad(loss, parameters)]


def compact_fault(case: Case, model: nn.Sequential, keep_prob: float) -> str | None:
    """Whether it differs, in float64, from the whole network under the masks that its Dropout layers draw."""
    model = copy.deepcopy(model).double()
    parameters, layers = list(model.parameters()), list(model)
    widths = {one: after.in_features for one, after in itertools.pairwise(layers) if isinstance(one, nn.Dropout)}
    for layer in widths:
        wrong = checks.dropout_fault(layer, torch.ones(2**16), 1.0 - keep_prob)
        if wrong:
            return wrong
    torch.manual_seed(2)
    found = _gradients(case, model, parameters)
    torch.manual_seed(2)
    factors = {layer: layer(torch.ones(1, width, dtype=torch.float64)) for layer, width in widths.items()}

    def masked(x: Tensor) -> Tensor:
        for module in layers:
            x = x * factors[module] if module in factors else module(x)
        return x

    names = ["output", *(f"gradient of {name}" for name, _ in model.named_parameters())]
    for name, one, other in zip(names, found, _gradients(case, masked, parameters), strict=True):
        if not torch.allclose(one, other, rtol=1e-9, atol=1e-12 * float(other.abs().max())):
            return f"another {name} than under masks"
    return None


def fault(case: Case, name: str, model: nn.Sequential, keep_prob: float) -> str | None:
    """Why a contender is not timed, or None."""
    if name == COMPACT:
        return compact_fault(case, model, keep_prob)
    layers = [module for module in model if isinstance(module, nn.Dropout)]
    if len(layers) != (0 if name == NONE else len(case.widths) - 2):
        return f"{len(layers)} layers of dropout"
    x = checks.sample((case.rows, case.widths[1]), torch.float32, CPU)
    return next((found for layer in layers if (found := checks.dropout_fault(layer, x, 1.0 - keep_prob))), None)


def step(case: Case, model: nn.Module) -> Call:
    """Forward, loss, backward, and SGD's update."""
    x, y = case.batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad()
        x.grad = None
        case.loss(model(x), y).backward()
        optimizer.step()

    return run


def compared(calls: dict[str, Call], faults: dict[str, str | None], effort: Effort) -> dict[str, Any]:
    """For each contender its seconds and their ratio to the compact one's, or its fault."""
    for name, why in faults.items():
        if why:
            print(f"    {name}: wrong: {why}", flush=True)
    found = compare({name: call for name, call in calls.items() if not faults[name]}, effort)
    entries: dict[str, Any] = {}
    ours = next(iter(name for name in calls if name.startswith(COMPACT)))
    for name, why in faults.items():
        entries[name] = {"fault": f"wrong: {why}"} if why else {"seconds": found.seconds(name)}
        if not why and not faults[ours] and name != ours:
            entries[name]["times_compact"] = found.ratio(name, ours)
    return {"rounds": found.rounds, "contenders": entries}


def measure(case: Case, keep_prob: float, effort: Effort) -> dict[str, Any]:
    models = contenders(case, keep_prob)
    faults = {name: fault(case, name, model, keep_prob) for name, model in models.items()}
    result = compared({name: step(case, model) for name, model in models.items()}, faults, effort)
    return {"label": f"{case.label()}, keep_prob {keep_prob:g}", "case": case.name, "keep_prob": keep_prob, **result}


def measure_samples(case: Case, keep_prob: float, samples: int, effort: Effort) -> dict[str, Any]:
    """Monte Carlo samples that are one function each, on a whole batch."""
    models = contenders(case, keep_prob)
    x = case.batch()[0].detach()

    def sampled(model: nn.Module, strategy: str) -> Call:
        return lambda: torchdrop.mc_predict(
            model, x, samples, task="regression", masks="shared", seed=1, strategy=strategy
        )

    calls = {
        LOOP: sampled(models[COMPACT].eval(), "loop"),
        VECTORISED: sampled(models[COMPACT], "vectorized"),
        DENSE: sampled(models[MASKED].eval(), "vectorized"),
    }
    means = {name: call().mean for name, call in calls.items()}  # type: ignore[attr-defined]
    faults: dict[str, str | None] = dict.fromkeys(calls)
    if not torch.allclose(means[LOOP], means[VECTORISED], rtol=1e-3, atol=1e-5):
        faults[LOOP] = "another mean than vectorized"
    result = compared(calls, faults, effort)
    label = f"{case.label()}, keep_prob {keep_prob:g}, {samples} samples"
    return {"label": label, "case": case.name, "keep_prob": keep_prob, **result}


STEPS, SAMPLES = "a training step", "Monte Carlo samples with shared masks"
_COLUMNS = {STEPS: [NONE, COMPACT, MASKED, STOCK], SAMPLES: [LOOP, VECTORISED, DENSE]}


def header(section: str) -> list[str]:
    columns = _COLUMNS[section]
    others = [name for name in columns if name not in (COMPACT, LOOP)]
    return ["cell", *columns, *[f"{name} / {COMPACT if section == STEPS else LOOP}" for name in others]]


def row(section: str, result: dict[str, Any]) -> list[str]:
    entries = [result["contenders"][name] for name in _COLUMNS[section]]
    times = [e["fault"].partition(":")[0] if "fault" in e else duration(e["seconds"][1]) for e in entries]
    ours = _COLUMNS[section].index(COMPACT if section == STEPS else LOOP)
    ratios = [e.get("times_compact") for i, e in enumerate(entries) if i != ours]
    return [result["label"], *times, *[factor(ratio) if ratio else "-" for ratio in ratios]]


def verdict(report: dict[str, Any]) -> dict[str, str]:
    """What must hold: the first case's step at keep_prob 0.5."""
    result = report["steps"][0]
    ratio = result["contenders"][NONE].get("times_compact")
    made = {
        "case": f"a step of the {result['label']}, against no dropout",
        "required": f"at least {REQUIRED:g} times faster",
        "measured": factor(ratio) if ratio else "wrong",
        "verdict": "ok" if ratio and ratio[1] >= REQUIRED else "short",
    }
    return {**made, "required": "-", "verdict": "-"} if report["quick"] else made


def run(quick: bool) -> dict[str, Any]:
    """Measures everything, printing as it goes."""
    effort = Effort(budget=0.1, min_rounds=2) if quick else Effort(budget=12.0, min_rounds=15)
    begin = time.perf_counter()
    settle_allocator()
    report: dict[str, Any] = {"machine": machine.describe(CPU), "quick": quick, "steps": [], "samples": []}
    print("\n".join(f"{name}: {value}" for name, value in report["machine"].items()))
    every = cases(quick)
    cells: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
        (STEPS, "steps", lambda case=case, k=k: measure(case, k, effort)) for case in every for k in (0.5, 0.8)
    ]
    cells.append((SAMPLES, "samples", lambda: measure_samples(every[0], 0.5, 4 if quick else 20, effort)))
    section = None
    for title, key, cell in cells:
        widths = [62, *[max(20, len(name)) for name in header(title)[1:]]]
        if title != section:
            section = title
            print(f"\n{title}\n{text_row(header(title), widths)}")
        report[key].append(cell())
        print(text_row(row(title, report[key][-1]), widths), flush=True)
    report["summary"] = [verdict(report)]
    report["seconds"] = round(time.perf_counter() - begin, 1)
    print(f"\nsummary, after {report['seconds']:.0f} s\n{text_table(_SUMMARY, _summary_rows(report), left=4)}")
    return report


_SUMMARY = ["case", "required", "measured", "verdict"]


def _summary_rows(report: dict[str, Any]) -> list[list[str]]:
    return [[line[name] for name in _SUMMARY] for line in report["summary"]]


def render(report: dict[str, Any]) -> str:
    """A report as markdown: machine, summary, and the cells with their ratios."""
    facts = report["machine"]
    code = f"torchdrop {facts['torchdrop']}"
    if facts.get("commit"):
        code += f" at {facts['commit'][:10]}{' with changes' if facts['dirty'] else ''}"
    line = (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['os']}; Python {facts['python']}, "
        f"torch {facts['torch']}, {code}; {facts['date']}."
    )
    parts = [line, markdown_table(_SUMMARY, _summary_rows(report))]
    for title, key in ((STEPS, "steps"), (SAMPLES, "samples")):
        parts.append(f"### {title}\n\n{markdown_table(header(title), [row(title, r) for r in report[key]])}")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, RESULT, "small networks and few rounds")
    options = parser.parse_args(arguments)
    if command.rendered(options, render):
        return
    torch.set_num_threads(options.threads)
    command.write(run(options.quick), options, RESULT, not options.quick)


if __name__ == "__main__":
    main()

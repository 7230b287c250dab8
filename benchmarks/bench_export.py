"""Exported Monte Carlo passes in ONNX Runtime and AOTInductor: their results and their time, against `mc_predict`.

python benchmarks/bench_export.py [--threads 2] [--quick] [--output FILE]
python benchmarks/bench_export.py --render FILE
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import command
import machine
import onnxruntime
import summary
import torch
import torch.nn.functional as F
from harness import Effort, compare, digits, duration, factor, markdown_table, settle_allocator, text_table
from torch import Tensor, nn

import torchdrop
from torchdrop.monte_carlo import MCExport, export

RESULT = "export-cpu.json"
RUNTIME, PREDICT, PREDICTOR = "ONNX Runtime", "mc_predict", "MCPredictor"
AT_MOST, ERROR = 2.0, 1e-5
SAMPLES = 50

Result = dict[str, Any]
Given = dict[str, Tensor]


def mlp(p: float) -> nn.Module:
    torch.manual_seed(0)
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(p), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(*hidden, nn.Linear(256, 10)).eval()


class Convolution(nn.Module):
    """Convolutions with normalization, channel dropout and functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Dropout2d(0.2)
        self.second, self.head = nn.Conv2d(16, 8, 3), nn.Linear(8 * 8 * 8, 5)

    def forward(self, input: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(input)).relu())
        return self.head(F.dropout(self.second(x).flatten(1), 0.5, self.training))


class Recurrent(nn.Module):
    """An LSTM of two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(6, 12, 2, dropout=0.3, batch_first=True), nn.Linear(12, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.body(input)[0][:, -1])


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, num_labels=3, attn_implementation="sdpa",
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def words(rows: int) -> Given:
    lengths = torch.randint(3, 11, (rows, 1), generator=torch.Generator().manual_seed(1))
    numbers = torch.randint(100, (rows, 10), generator=torch.Generator().manual_seed(2))
    return {"input_ids": numbers, "attention_mask": (torch.arange(10) < lengths).long()}


def floats(*shape: int) -> Callable[[int], Given]:
    return lambda rows: {"input": torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Given]]] = {
    "MLP 64-256-256-10": (partial(mlp, 0.5), floats(64)),
    "CNN with Dropout2d and BatchNorm2d": (Convolution, floats(3, 12, 12)),
    "LSTM of 2 layers": (Recurrent, floats(7, 6)),
    "BERT of 2 layers, sdpa": (bert, words),
}


class Session:
    """A program in ONNX Runtime."""

    def __init__(self, program: MCExport, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model = program.onnx().model_proto.SerializeToString()
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._outputs = program.outputs

    def __call__(self, given: Given) -> dict[str, Tensor]:
        found = self._session.run(None, {name: value.numpy() for name, value in given.items()})
        return dict(zip(self._outputs, map(torch.from_numpy, found), strict=True))


def compiled(program: MCExport) -> Callable[[Given], dict[str, Tensor]]:
    """A program in a package of AOTInductor."""
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program.program, package_path=str(Path(folder) / "program.pt2"))
        run = torch._inductor.aoti_load_package(path)

    def call(given: Given) -> dict[str, Tensor]:
        if "input" in given:
            found = run(given["input"], **{name: value for name, value in given.items() if name != "input"})
        else:
            found = run(**given)
        return found if isinstance(found, dict) else {"output": found}

    return call


def largest_difference(
    model: nn.Module, data: Callable[[int], Given], program: MCExport, call: Callable[[Given], dict[str, Tensor]]
) -> float:
    """The largest difference from samples of `mc_predict`, over batches of 1, 7 and 64 rows, seeds and samples."""
    worst = 0.0
    for rows in (1, 7, 64):
        for seed, sample in ((0, 0), (-9, 3)):
            given = data(rows)
            predicted = torchdrop.mc_predict(model, taken(given), sample + 2, seed=seed, keep_samples=True)
            assert predicted.samples is not None
            found = call(given | {"mask_keys": program.keys(seed), "sample": torch.tensor(sample)})["output"]
            worst = max(worst, float((found - predicted.samples[sample]).abs().max()))
    return worst


def taken(given: Given) -> Any:
    return given.get("input", given)


def equalities(quick: bool, threads: int) -> Iterator[Result]:
    """The differences of one pass from that of `mc_predict`, model by model and runtime by runtime."""
    for number, (name, (make, data)) in enumerate(MODELS.items()):
        if quick and number:
            continue
        model = make().eval()
        begin = time.perf_counter()
        program = export(model, taken(data(3)), seed=0)
        exported = time.perf_counter() - begin
        runtimes: dict[str, Callable[[], Callable[[Given], dict[str, Tensor]]]] = {
            RUNTIME: partial(Session, program, threads)
        }
        if not quick:  # a compilation takes minutes
            runtimes["AOTInductor"] = partial(compiled, program)
        for runtime, build in runtimes.items():
            begin = time.perf_counter()
            call = build()
            built = time.perf_counter() - begin
            with torch.no_grad():
                worst = largest_difference(model, data, program, call)
            yield {"model": name, "runtime": runtime, "export": exported, "build": built, "difference": worst}


def timings(quick: bool, threads: int) -> Iterator[Result]:
    """Times of T passes and their statistics in one call."""
    samples = 5 if quick else SAMPLES
    for p in (0.5,) if quick else (0.5, 0.1):
        model, data = mlp(p), floats(64)
        program = export(model, taken(data(3)), samples, task="classification", seed=0)
        session = Session(program, threads)
        for rows in (1, 64):
            x, keys = taken(data(rows)), program.keys()
            how: Any = {"task": "classification", "seed": 0}
            predictor = torchdrop.MCPredictor(model, samples, example=x, standard_errors=False, **how)
            expected = torchdrop.mc_predict(model, x, samples, **how)
            found = session({"input": x, "mask_keys": keys})
            off = max(float((found[name] - getattr(expected, name)).abs().max()) for name in program.outputs)
            calls: dict[str, Callable[[], object]] = {
                RUNTIME: partial(session, {"input": x, "mask_keys": keys}),
                PREDICT: partial(torchdrop.mc_predict, model, x, samples, standard_errors=False, **how),
                PREDICTOR: partial(predictor, x),
            }
            compared = compare(calls, Effort(budget=0.2, min_rounds=3) if quick else Effort(budget=6.0))
            yield {
                "p": p, "rows": rows, "samples": samples, "difference": off, "rounds": compared.rounds,
                "seconds": {name: compared.seconds(name) for name in calls},
                "of_predict": compared.ratio(RUNTIME, PREDICT), "of_predictor": compared.ratio(RUNTIME, PREDICTOR),
            }  # fmt: skip


def verdicts(report: Result) -> list[dict[str, str]]:
    """The rows that say whether programs return what they must, and whether they are as fast as they must be."""
    rows = [
        {
            "case": f"{one['model']}, one pass in {one['runtime']}, batches of 1, 7 and 64 rows",
            "required": f"within {ERROR:g} of mc_predict",
            "measured": f"{one['difference']:.1e}",
            "verdict": "ok" if one["difference"] <= ERROR else "short",
        }
        for one in report["equal"]
    ]
    for cell in report["cells"]:
        right = cell["difference"] <= ERROR
        fits = right and cell["of_predict"][1] <= AT_MOST
        rows.append(
            {
                "case": f"MLP, p = {cell['p']:g}, T = {cell['samples']}, {cell['rows']} rows, {RUNTIME}",
                "required": f"at most {AT_MOST:g} times mc_predict's time",
                "measured": factor(cell["of_predict"]) if right else f"wrong: {cell['difference']:.1e} off",
                "verdict": "ok" if fits else "short",
            }
        )
    return rows


HEADER = ["p", "rows", RUNTIME, PREDICT, PREDICTOR, f"{RUNTIME} / {PREDICT}", f"{RUNTIME} / {PREDICTOR}"]
MODEL_HEADER = ["model", "runtime", "largest difference", "export", "build"]


def row(cell: Result) -> list[str]:
    times = [duration(cell["seconds"][name][1]) for name in (RUNTIME, PREDICT, PREDICTOR)]
    ratios = [f"{digits(cell[name][1])}x" for name in ("of_predict", "of_predictor")]
    return [f"{cell['p']:g}", str(cell["rows"]), *times, *ratios]


def model_row(one: Result) -> list[str]:
    times = [duration(one["export"]), duration(one["build"])]
    return [one["model"], one["runtime"], f"{one['difference']:.1e}", *times]


def run(quick: bool, threads: int) -> Result:
    """Measures everything."""
    begin = time.perf_counter()
    settle_allocator()
    report: Result = {"machine": machine.describe(torch.device("cpu")), "quick": quick}
    report["cells"] = list(timings(quick, threads))
    report["equal"] = list(equalities(quick, threads))
    report["summary"] = verdicts(report)
    report["machine"]["load_after"] = machine.load()
    report["seconds"] = round(time.perf_counter() - begin, 1)
    print(text_table(HEADER, [row(cell) for cell in report["cells"]]))
    print(text_table(MODEL_HEADER, [model_row(one) for one in report["equal"]], left=2))
    print(summary.text(report))
    return report


def render(report: Result) -> str:
    """A report as markdown: machine, summary, times and differences."""
    times = markdown_table(HEADER, [row(cell) for cell in report["cells"]])
    models = markdown_table(MODEL_HEADER, [model_row(one) for one in report["equal"]])
    return f"{summary.markdown(report)}\n\n### times\n\n{times}\n\n### models\n\n{models}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = command.parser(__doc__, RESULT, "few samples, rounds and models, nothing judged").parse_args(arguments)
    if command.rendered(options, render):
        return
    torch.set_num_threads(options.threads)
    command.write(run(options.quick, options.threads), options, RESULT, not options.quick)


if __name__ == "__main__":
    main()

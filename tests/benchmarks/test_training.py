"""The benchmark of training steps: what it counts as a draw, its checks, its memory, and what it makes of a report."""

from __future__ import annotations

import copy
import json
import math
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import bench_training as bench
import pytest
import torch
import torch.nn.functional as F
import training_columns as columns
import training_models as models
import training_summary
from torch import Tensor, nn
from training_columns import KEY, NONE, OURS, STOCK, Column
from training_models import BF16, BRIEF, F32

import torchdrop

LSTM, ENCODER = (models.cases(BRIEF)[name] for name in ("nn.LSTM", "nn.TransformerEncoder"))


def counted(call: Any) -> dict[str, int]:
    with columns.RandomCalls() as calls:
        call()
    return dict(calls.counts)


X, PAIR = torch.ones(2, 3, 4, 8), torch.empty(2, dtype=torch.int64)
BERNOULLI = "aten.bernoulli_.float"

DRAWS: list[tuple[Any, dict[str, int]]] = [
    (lambda: F.dropout(X, 0.1), {BERNOULLI: 1}),
    (lambda: F.dropout(X, 0.1, training=False), {}),
    (lambda: F.dropout(X, 0.0), {}),
    (lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.1), {BERNOULLI: 1}),
    (lambda: F.scaled_dot_product_attention(X, X, X), {}),
    (lambda: nn.LSTM(8, 8, 3, dropout=0.5)(X[0]), {"aten.uniform_.default": 12, BERNOULLI: 2}),
    (lambda: torch.rand([]), {"aten.rand.default": 1}),
    (lambda: torch.rand(4, generator=torch.Generator()), {}),
    (lambda: PAIR.clone().random_(), {KEY: 1}),
    (lambda: torch.empty(3, dtype=torch.int64).random_(), {"aten.random_.default": 1}),
    (lambda: torch.randint(9, (2,)), {"aten.randint.default": 1}),
    (lambda: torchdrop.functional.dropout(X, 0.1), {KEY: 1}),
    (lambda: torchdrop.functional.dropout(X, 0.1, training=False), {}),
]


@pytest.mark.parametrize(("call", "expected"), DRAWS)
def test_operators_that_move_the_generator_are_counted(call: Any, expected: dict[str, int]) -> None:
    assert counted(call) == expected


def test_keys_of_layers_at_rate_0_are_told() -> None:
    body = [torchdrop.Dropout(0.0), torchdrop.Dropout(0.5), torchdrop.Dropout(0.0), torchdrop.Dropout(0.1)]
    case = models.Case("", "torch", 0.5, lambda rate: Layers(body), lambda: {"x": torch.ones(4, 8)})
    column = Column(case, STOCK)
    draws = column.draws(F32)
    assert draws[KEY] == 2
    assert draws.keys() <= {KEY, columns.IDLE}
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in body)
    found = {NONE: {}, STOCK: {BERNOULLI: 3}, OURS: {KEY: 2, columns.IDLE: 5}}
    assert training_summary.draws_fault(found) == "3 draws are gone for 2 keys"


class Layers(nn.Module):
    """A loss behind some layers."""

    def __init__(self, body: list[Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).sum()


def counts(none: int, stock: int, left: int, keys: int) -> dict[str, dict[str, int]]:
    return {NONE: {"rand": none}, STOCK: {"rand": none, BERNOULLI: stock}, OURS: {"rand": none + left, KEY: keys}}


@pytest.mark.parametrize(
    ("draws", "served", "fault"),
    [
        (counts(0, 4, 0, 4), (4, 4), None),
        (counts(1, 4, 0, 4), (4, 4), None),
        (counts(1, 4, 1, 3), (3, 4), None),
        (counts(0, 4, 1, 2), (3, 4), "3 draws are gone for 2 keys"),
        ({NONE: {}, STOCK: {KEY: 1, BERNOULLI: 1}, OURS: {KEY: 2}}, (2, 2), "the model draws pairs of integers itself"),
    ],
)
def test_draws_that_are_gone_are_served_if_there_is_a_key_for_each(
    draws: Any, served: tuple[int, int], fault: str | None
) -> None:
    assert training_summary.served(draws) == served
    found = training_summary.draws_fault(draws)
    assert found is None if fault is None else fault in str(found)


@pytest.fixture(scope="module")
def made() -> dict[str, Column]:
    return {name: Column(LSTM, name) for name in columns.COLUMNS}


@pytest.mark.parametrize("precision", [F32, BF16])
def test_columns_are_one_model_with_and_without_dropout(made: dict[str, Column], precision: str) -> None:
    for column in made.values():
        column.prepare(precision, False)
        assert column.fault() is None
        assert all(p.grad is None for p in column.model.parameters())
    assert len({column.outcome() for column in made.values()}) == 1
    draws = {name: column.draws(precision) for name, column in made.items()}
    assert draws[NONE] == {}
    assert draws[STOCK] == {BERNOULLI: 4}
    assert training_summary.draws_fault(draws) is None
    assert training_summary.served(draws)[0] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", models.cases(BRIEF))
def test_all_models_are_right_in_all_columns(name: str) -> None:
    case = models.found(name, BRIEF)
    if case.missing():
        pytest.skip(case.missing())
    found = {column: Column(case, column) for column in columns.COLUMNS}
    assert [column.fault() for column in found.values()] == [None] * 3
    assert len({column.outcome() for column in found.values()}) == 1
    draws = {name: column.draws(F32) for name, column in found.items()}
    assert training_summary.draws_fault(draws) is None
    assert training_summary.served(draws)[1] > 0


class Wrong(nn.Module):
    """A loss of one parameter, to which the function is applied."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(64)), function

    def forward(self) -> Tensor:
        return self.function(self.weight).sum()


def column_of(function: Any, name: str) -> Column:
    return Column(models.Case("", "torch", 0.5, lambda rate: Wrong(function), dict), name)


@pytest.mark.parametrize(
    ("name", "function", "fault"),
    [
        (STOCK, F.dropout, None),
        (NONE, torch.sin, None),
        (NONE, F.dropout, "another step under another seed, without dropout"),
        (STOCK, torch.sin, "the same step under two seeds: no dropout"),
        (OURS, torch.sin, "the same step under two seeds: no dropout"),
        (STOCK, lambda x: F.dropout(x) * math.inf, "a loss of nan"),
        (STOCK, lambda x: x.detach() + F.dropout(x) * 1e-9, None),
        (NONE, lambda x: (x - 1).sqrt(), "gradients that are not finite"),
    ],
)
def test_steps_that_are_wrong_are_told(name: str, function: Any, fault: str | None) -> None:
    assert column_of(function, name).fault() == fault


@pytest.mark.parametrize("name", [NONE, OURS])
def test_compiled_steps_are_compared_with_eager_ones_where_no_number_is_pytorchs(name: str) -> None:
    plain = torch.sin if name == NONE else torchdrop.functional.dropout
    column = column_of(plain, name)
    column.compiled = True
    assert column.fault() is None
    other = Wrong(lambda x: plain(x) * 1.1)
    other.weight = column.model.weight  # type: ignore[assignment]
    column.call = other
    assert column.fault() == "compiled, another step than eager under the same seed"
    column.model.function = F.dropout  # type: ignore[assignment]
    assert column.fault() is None


class Known(nn.Module):
    """Keeps three tensors of the size of h for backward: h itself, for two functions, and their results."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.body, self.hidden = nn.Linear(16, 64), hidden

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        loss = (h.sin() * h.cos()).sum()
        if self.hidden:
            loss.grad_fn.metadata["kept"] = torch.ones_like(h)
        return loss


@pytest.mark.parametrize("hidden", [False, True])
def test_memory_is_what_is_kept_beyond_parameters_and_data(hidden: bool) -> None:
    case = models.Case("", "torch", 0.0, lambda rate: Known(hidden), lambda: {"x": torch.randn(100, 16)})
    found, each = Column(case, NONE).memory(), 100 * 64 * 4
    assert found["saved"] == 3 * each
    assert found["held"] == pytest.approx((4 if hidden else 3) * each, rel=0.01)
    assert found["held"] < found["peak"] < found["held"] + 4 * each


def entry(seconds: float, size: int = 10**9) -> dict[str, Any]:
    return {"seconds": [seconds] * 3, "peak": size, "saved": size // 2, "held": size // 4, "resident": size}


def report(ratio: float = 1.2, quick: bool = False, left: float = 1.1) -> dict[str, Any]:
    """One of a run in which torch.nn's step takes `ratio` times ours, and ours `left` times that without dropout."""
    facts = {
        "cpu": "a processor", "cores": 2, "threads": 2, "os": "an OS", "python": "3.11", "torch": "2.13",
        "torchdrop": "0.1", "commit": "0123456789abcdef", "dirty": False, "date": "2026-01-01",
    }  # fmt: skip
    sides = {NONE: entry(0.9), STOCK: entry(ratio, 2 * 10**9), OURS: entry(1.0)}
    times = {STOCK: [ratio] * 3, NONE: [left] * 3, "before": [left * ratio] * 3}
    draws = {F32: counts(0, 4, 0, 4), BF16: counts(0, 4, 0, 4)}
    made = {
        "machine": facts,
        "quick": quick,
        "models": [
            *({"model": name, "draws": draws} for name in models.cases(BRIEF) if "ConvNeXt" not in name),
            {"model": "ConvNeXt, DropPath", "skipped": "not installed: pip install timm"},
        ],
        "cells": [
            {"model": name, "mode": mode, "precision": precision, "columns": sides, "times": times}
            for name in models.cases(BRIEF)
            if "ConvNeXt" not in name
            for mode in ("eager", "compiled")
            for precision in (F32, BF16)
        ],
        "small": {"sites": True, "fault": None, "ratio": [1.0, 1.01, 1.02]},
        "long": {F32: sides, BF16: sides},
    }
    return json.loads(json.dumps(made)) | {"summary": training_summary.verdicts(made)}


def verdicts(made: dict[str, Any], *words: str) -> list[tuple[str, str]]:
    rows = training_summary.verdicts(made)
    return [(row["measured"], row["verdict"]) for row in rows if all(word in row["case"] for word in words)]


def test_steps_must_be_near_those_without_dropout_or_not_slower() -> None:
    assert {row["verdict"] for row in report()["summary"] if "ConvNeXt" not in row["case"]} == {"ok"}
    assert verdicts(report(), "ConvNeXt") == [("not installed: pip install timm", "not measured")] * 2
    assert verdicts(report(0.99), "GAT, eager")[0][1] == "short"
    for left, held in ((1.121, [True, False]), (1.151, [False, False])):
        cases = [verdicts(report(left=left), f"BERT, eager, {precision}") for precision in (BF16, F32)]
        assert [case[0][1] == "ok" for case in cases] == held
    assert verdicts(report(left=1.101), "BERT, compiled")[0][1] == "short"
    assert verdicts(report(1.2), "BERT", "eager, bfloat16")[0] == (
        "1.20x [1.20, 1.20]; 1.10 times no dropout (bfloat16)", "ok",
    )  # fmt: skip
    assert {row["verdict"] for row in report(0.5, quick=True)["summary"]} == {"-"}


def test_a_wrong_column_is_short() -> None:
    made = report()
    cell = copy.deepcopy(made["cells"][0])
    cell["columns"][OURS] = {"fault": "wrong: a loss of nan"}
    del cell["times"]
    made["cells"][0] = cell
    assert verdicts(made, "BERT, eager, float32") == [("replaced wrong (float32)", "short")]
    assert "| wrong: a loss of nan |" in training_summary.render(made)


def test_draws_must_all_be_served_under_keys() -> None:
    made = report()
    made["models"][0]["draws"] = {F32: counts(0, 4, 0, 4), BF16: counts(0, 4, 1, 3)}
    made["models"][1]["draws"] = {F32: counts(0, 4, 0, 3)}
    ((measured, verdict),) = verdicts(made, "draws")
    assert measured.startswith("4 of 4 (BERT), 3 of 4 (BERT, bfloat16), 4 draws are gone for 3 keys (GPT-2)")
    assert verdict == "short"


@pytest.mark.parametrize(("median", "verdict"), [(0.979, "short"), (0.981, "ok"), (1.019, "ok"), (1.021, "short")])
def test_a_small_model_must_not_notice(median: float, verdict: str) -> None:
    made = report()
    made["small"]["ratio"] = [0.9, median, 1.1]
    assert verdicts(made, "MLP")[0][1] == verdict
    made["small"]["fault"] = "wrong: other losses than with modules alone"
    assert verdicts(made, "MLP") == [(made["small"]["fault"], "short")]


def test_peaks_must_not_be_higher() -> None:
    made = report()
    made["long"][F32][OURS]["peak"] = 3 * 10**9
    measured = "1,000 MB (no dropout), 2,000 MB (torch.nn), 3,000 MB (replaced)"
    assert verdicts(made, models.LONG, F32) == [(measured, "short")]
    made["long"][BF16][STOCK] = {"fault": "wrong: a loss of nan"}
    assert verdicts(made, models.LONG, BF16) == [("torch.nn wrong: a loss of nan", "short")]


def test_nothing_is_written_to_the_results_unless_everything_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.command, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "model_cells", lambda case, *_: {"facts": {"model": case.name}, "cells": []})
    monkeypatch.setattr(bench, "long", lambda *_: {})
    monkeypatch.setattr(bench, "small", lambda *_: None)
    for arguments in (["--model", "BERT"], ["--eager-only"], ["--quick"]):
        bench.main(arguments)
        assert list(tmp_path.iterdir()) == []
    bench.main([])
    assert [model["model"] for model in json.loads((tmp_path / bench.RESULT).read_text())["models"]] == [
        *models.cases(BRIEF)
    ]


def test_cells_are_those_that_are_asked_for() -> None:
    bert, gpt2 = (models.cases(models.FULL)[name] for name in ("BERT", "GPT-2"))

    def modes(case: models.Case, **options: bool) -> Any:
        return bench.modes(case, Namespace(**{"eager_only": False, "quick": False, "every_cell": False, **options}))

    assert modes(bert) == {False: (F32, BF16), True: (F32, BF16)}
    assert modes(gpt2) == {False: (F32, BF16), True: (BF16,)}
    assert modes(gpt2, every_cell=True) == modes(bert)
    assert modes(bert, eager_only=True) == modes(bert, quick=True) == {False: (F32, BF16)}


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "training.json"
    names = ["--model", "nn.LSTM", "--model", models.SMALL.name]
    bench.main(["--quick", "--threads", "1", *names, "--output", str(output)])
    found = json.loads(output.read_text())
    assert [(cell["model"], cell["mode"], cell["precision"]) for cell in found["cells"]] == [
        ("nn.LSTM", "eager", F32), ("nn.LSTM", "eager", BF16),
    ]  # fmt: skip
    for cell in found["cells"]:
        assert not any("fault" in side for side in cell["columns"].values())
        assert all(side["seconds"][1] > 0 for side in cell["columns"].values())
        assert cell["times"].keys() == {STOCK, NONE, "before"}
    assert found["small"]["fault"] is None
    assert {row["verdict"] for row in found["summary"]} == {"-"}
    capsys.readouterr()
    bench.main(["--render", str(output)])
    rendered = capsys.readouterr().out
    assert "| case | required | measured | verdict |" in rendered
    assert rendered.count("###") == 3


class Pipe:
    """Asks for these methods, and keeps the answers."""

    def __init__(self, *methods: str) -> None:
        self.asked: list[Any] = [*((method, ()) for method in methods), None]
        self.answers: list[tuple[bool, Any]] = []

    def recv(self) -> Any:
        return self.asked.pop(0)

    def send(self, answer: tuple[bool, Any]) -> None:
        self.answers.append(answer)


def test_a_process_answers_until_nothing_more_is_asked_and_says_what_failed() -> None:
    pipe = Pipe("fault", "nothing", "step")
    with warnings.catch_warnings():
        columns.serve(pipe, "nn.LSTM", STOCK, BRIEF, 1)
    failed = (False, "AttributeError: 'Column' object has no attribute 'nothing'")
    assert pipe.answers == [(True, None), failed, (True, None)]
    assert pipe.asked == []


class Dying:
    """A column whose process ends after so many answers."""

    def __init__(self, answers: int) -> None:
        self.left = answers

    def begin(self, method: str, *arguments: Any) -> None:
        pass

    def end(self) -> Any:
        self.left -= 1
        if self.left < 0:
            raise columns.ColumnError("its process has ended")
        return 1.0

    def ask(self, method: str, *arguments: Any) -> Any:
        value = self.end()
        return {"fault": None, "memory": {"peak": 1, "saved": 1, "held": 1}}.get(method, value)

    def __call__(self) -> object:
        return self.ask("step")


@pytest.mark.parametrize("answers", range(6))
def test_a_process_that_ends_is_a_fault_of_its_cell(answers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Remote", Dying)
    sides: Any = {NONE: Dying(99), STOCK: Dying(99), OURS: Dying(answers)}
    cell = bench.measure(LSTM, sides, F32, False, bench.BRIEFLY)
    assert cell["columns"][OURS]["fault"] == "n/a: its process has ended"
    assert ("seconds" in cell["columns"][STOCK]) == (answers < 3)
    assert "n/a: its process has ended" in training_summary.cell_row(cell)

"""Tables, figures and measured numbers of README.md and benchmarks/README.md are those of the committed runs."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import command
import cuda_summary
import overview
import panel as panels
import pytest
import training_summary
import uncertainty_figure
import versions
from harness import digits, duration
from overview import Report, dropout_cells, load, one
from summary import BACKWARD, BOTH, FORWARD, LIMIT, OURS, STOCK

from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")

TABLES = [
    ("speed", "dropout-cpu.json", "bench_dropout.py"),
    ("monte carlo", "monte-carlo-cpu.json", "bench_monte_carlo.py"),
    ("serve", "serve-cpu.json", "bench_serve.py"),
    ("dense", "dense-cpu.json", "bench_dense.py"),
    ("mc models", "mc-models-cpu.json", "mc_models.py"),
    ("search", "search-cpu.json", "bench_search.py"),
    ("mnist", "mnist.json", "mnist.py"),
    ("variants", "variants-cpu.json", "bench_variants.py"),
    ("fused", "fused-cpu.json", "bench_fused.py"),
    ("attention", "attention-cpu.json", "bench_attention.py"),
    ("export", "export-cpu.json", "bench_export.py"),
    ("compact", "compact.json", "compact.py"),
    ("concrete", "concrete.json", "concrete.py"),
    ("sparsity", "sparsity.json", "sparsity.py"),
    ("calibration", "calibration.json", "calibration.py"),
    ("uncertainty", "uncertainty.json", "uncertainty.py"),
    ("language", "language.json", "language.py"),
    ("uci", "uci.json", "uci.py"),
    ("versions", "versions.json", "versions.py"),
]


@pytest.mark.parametrize(("table", "result", "program"), TABLES)
def test_tables_are_the_committed_runs(
    table: str, result: str, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = ROOT / "benchmarks" / "results" / result
    importlib.import_module(program.removesuffix(".py")).main(["--render", str(results)])
    rendered = capsys.readouterr().out
    shown = RESULTS.partition(f"<!-- {table} -->")[2].partition(f"<!-- end of {table} -->")[0]
    assert shown.strip() == rendered.partition("\n###")[0].strip()
    assert "| verdict |" in shown
    assert json.loads(results.read_text(encoding="utf-8"))["machine"]["commit"]


def test_all_runs_are_shown() -> None:
    committed = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert committed <= {result for _, result, _ in TABLES} | {"cuda.json", "training-cpu.json"}


def test_the_readme_says_which_versions_were_tried() -> None:
    shown = README.partition("<!-- versions -->")[2].partition("<!-- end of versions -->")[0]
    report = json.loads((ROOT / "benchmarks" / "results" / "versions.json").read_text(encoding="utf-8"))
    assert shown.strip() == versions.tested(report)


def test_the_cuda_table_is_the_committed_run_or_says_why_there_is_none() -> None:
    shown = RESULTS.partition(cuda_summary.MARKERS[0])[2].partition(cuda_summary.MARKERS[1])[0]
    assert shown.strip() == cuda_summary.committed(ROOT / "benchmarks" / "results" / "cuda.json")


def test_the_table_of_training_steps_is_the_committed_run_or_says_that_there_is_none() -> None:
    shown = RESULTS.partition("<!-- training -->")[2].partition("<!-- end of training -->")[0]
    results = ROOT / "benchmarks" / "results" / "training-cpu.json"
    report = json.loads(results.read_text(encoding="utf-8")) if results.exists() else None
    assert shown.strip() == training_summary.section(report)


class TestOverview:
    def test_table_is_made_of_the_committed_runs(self) -> None:
        assert overview.shown(README) == overview.section()

    def test_figure_is_made_of_the_committed_runs(self) -> None:
        """Made again, it is the committed file, byte for byte."""
        assert overview.FIGURE.read_text(encoding="utf-8") == overview.figure()
        assert f"]({overview.FIGURE.relative_to(ROOT).as_posix()})" in README

    def test_figure_shows_every_cell(self) -> None:
        drawn = [element.tag.rpartition("}")[2] for element in ElementTree.fromstring(overview.figure())]
        cells = [cell for cell in load("dropout-cpu")["cells"] if cell["section"] == FORWARD]
        assert drawn.count("circle") == 3 * len(cells) + len(load("mnist")["monte_carlo"]["averaged"])
        assert drawn.count("polyline") == 5

    def test_points_are_where_the_axes_say(self) -> None:
        panel = panels.Panel(100, (1, 100), (0.1, 10))
        assert panel.place(1, 0.1) == (100, panels.HEIGHT - panels.BOTTOM)
        assert panel.place(10, 1) == (100 + panels.PANEL / 2, (panels.TOP + panels.HEIGHT - panels.BOTTOM) / 2)
        assert panel.place(100, 10) == (100 + panels.PANEL, panels.TOP)
        linear = panels.Panel(100, (1, 100), (0, 4), log=False)
        assert linear.place(1, 2)[1] == panel.place(1, 1)[1]

    def test_points_lie_inside(self) -> None:
        for element in ElementTree.fromstring(overview.figure()):
            if element.tag.endswith("circle"):
                assert panels.TOP <= float(element.attrib["cy"]) <= panels.HEIGHT - panels.BOTTOM
                assert 0 <= float(element.attrib["cx"]) <= overview.WIDTH

    def test_is_filled_in_where_the_markers_are(self, tmp_path: Path) -> None:
        file = tmp_path / "README.md"
        file.write_text("before\n\n<!-- overview -->\nold\n<!-- end of overview -->\n\nafter\n")
        command.fill(file, overview.MARKERS, overview.section())
        assert file.read_text() == (
            f"before\n\n<!-- overview -->\n{overview.section()}\n<!-- end of overview -->\n\nafter\n"
        )
        file.write_text("no place")
        with pytest.raises(ValueError, match="has no lines <!-- overview -->"):
            command.fill(file, overview.MARKERS, overview.section())


def test_the_figure_of_uncertainty_is_made_of_the_committed_run() -> None:
    assert uncertainty_figure.FIGURE.read_text(encoding="utf-8") == uncertainty_figure.figure(load("uncertainty"))
    assert f"](results/{uncertainty_figure.FIGURE.name})" in RESULTS


def times(value: float) -> str:
    return f"{digits(value)} times"


def spread(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{digits(ordered[0])} to {digits(ordered[-1])} times"


def a_call(section: str, contender: str) -> str:
    return duration(dropout_cells(section, elements=2**6)[contender]["seconds"][1])


def an_element(section: str, **fields: object) -> str:
    return duration(dropout_cells(section, elements=2**20, **fields)[STOCK]["seconds"][1] / 2**20)


def strided(mode: str) -> str:
    cells = [cell for cell in load("dropout-cpu")["cells"] if cell["section"] == "layouts" and cell["mode"] == mode]
    return spread(c["contenders"][STOCK]["times_torchdrop"][1] for c in cells if c["layout"] != "contiguous")


def fused(label: str) -> list[Report]:
    return [cell for cell in load("fused-cpu")["cells"] if cell["label"] == label]


def at_a_high_rate(case: str) -> str:
    step = one(load("compact")["steps"], case=case, keep_prob=0.8)
    return times(step["contenders"]["no dropout"]["times_compact"][1])


def draws(way: str) -> str:
    """The counts of the three models whose randomness is not that of nn.Dropout modules alone."""
    first = ("functional dropout", "nn.LSTM", "nn.MultiheadAttention")
    cases = [case for case in load("monte-carlo-cpu")["draws"] if case["case"].startswith(first)]
    assert len(cases) == len(first)
    (count,) = {f"{case['ways'][way]['draws']} of {case['train_mode_draws']}" for case in cases}
    return count


def sentences() -> Iterator[str]:
    """Each measured number with words of its sentence."""
    yield f"At 64 elements torchdrop takes {a_call(BOTH, OURS)}, torch.nn {a_call(BOTH, STOCK)}, and"
    yield f"a multiplication alone {a_call(BOTH, LIMIT)}."
    yield f"`x * s` takes {a_call(FORWARD, LIMIT)} forward and {a_call(BOTH, LIMIT)} with backward"
    yield f"{an_element(FORWARD)} an element at p = 0.5, its default, and {an_element('rate', mode=FORWARD)} at p = 0.1"
    yield f"gain {strided(FORWARD)} in the forward pass and {strided(BOTH)} with backward"
    backward = dropout_cells("channels", layout="channels_last", mode=BACKWARD)[STOCK]
    yield f"torch.nn takes {times(backward['times_torchdrop'][1])} torchdrop's time"
    addition = one(fused("dropout_add"), elements=2**22)["contenders"]["separate"]["times_fused"][1]
    yield f"the addition gains less ({times(addition)} at 2^22 elements)"
    gelu = spread(cell["contenders"]["separate"]["times_fused"][1] for cell in fused("gelu_dropout"))
    yield f"gains nothing ({gelu})"
    for way in ("usual loop", "torch-uncertainty, loop", "baal, loop"):
        yield f"the usual loop and both packages make {draws(way)} random draws"
    yield f"torchdrop makes {draws('torchdrop')}"
    small, large = (one(load("search-cpu")["batches"], batch=batch)["ratio"] for batch in (64, 128))
    yield f"with batches of 64 and 128 it is {times(small)} and {times(large)}"
    own = load("variants-cpu")["own"]
    path, layers = (
        one(own, label=label)["times_plain"][1] for label in ("EfficientStochasticDepth(0.5)", "LayerDrop(0.2)")
    )
    yield f"({digits(path)} and {digits(layers)} of it)"
    yield f"without dropout takes {at_a_high_rate('MLP')} the time of the compact step"
    yield f"{at_a_high_rate('transformer block')} for the block of a transformer"


@pytest.mark.parametrize("words", [*sentences()])
def test_measured_numbers_in_sentences(words: str) -> None:
    assert words in " ".join(RESULTS.split())

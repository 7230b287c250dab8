"""The table and the figure of the project's README, made of committed results; nothing is measured here.

python benchmarks/overview.py    # writes results/overview.svg and fills in the table of README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import command
from command import RESULTS
from harness import digits, factor, markdown_table
from panel import HEIGHT, PANEL, TOP, Panel, svg
from summary import BOTH, FORWARD, LIMIT, OURS, STOCK, where

README = RESULTS.parents[1] / "README.md"
FIGURE = RESULTS / "overview.svg"
MARKERS = ("<!-- overview -->", "<!-- end of overview -->")
"""Between these lines of the README stands the table."""

HEADER = ["what", "against", "times faster", "run"]
RUNS = [
    "dropout-cpu", "fused-cpu", "variants-cpu", "monte-carlo-cpu", "search-cpu", "compact", "attention-cpu",
    "training-cpu", "serve-cpu",
]  # fmt: skip

Report = dict[str, Any]


def load(run: str) -> Report:
    """A committed result."""
    return json.loads((RESULTS / f"{run}.json").read_text(encoding="utf-8"))


def one(entries: Sequence[Report], **fields: Any) -> Report:
    """The only entry with these fields."""
    (found,) = [entry for entry in entries if fields.items() <= entry.items()]
    return found


def dropout_cells(section: str, **fields: Any) -> dict[str, Report]:
    """The contenders of one cell of the benchmark of dropout."""
    return one(load("dropout-cpu")["cells"], section=section, **fields)["contenders"]


def rows() -> list[list[str]]:
    """One row a question, with the cases in which little or nothing is gained."""
    million, speed, samples = 2**20, load("variants-cpu")["speed"], load("monte-carlo-cpu")["speed"]
    add = one(load("fused-cpu")["cells"], label="dropout_add", elements=million, dtype="float32")["contenders"]
    block = one(speed, label="DropBlock2d(0.1, 7)")["contenders"]
    path = one(speed, label="DropPath(0.1)")["contenders"]
    conv, encoder = (one(samples, short=short) for short in ("conv", "encoder"))
    search, step = load("search-cpu")["search"], one(load("compact")["steps"], case="MLP", keep_prob=0.5)
    both, size = "forward + backward", "32x96x28x28"
    weights = one(load("attention-cpu")["cells"], label="(2, 8, 1024, 64)", dtype="float32")["contenders"]

    def dropout(section: str, **fields: Any) -> str:
        return factor(dropout_cells(section, **fields)[STOCK]["times_torchdrop"])

    def trained(against: str) -> str:
        cell = one(load("training-cpu")["cells"], model="BERT", mode="eager", precision="bfloat16")["times"][against]
        return factor(cell if against == STOCK else [1.0 / ratio for ratio in reversed(cell)])

    def sampled(case: Report) -> str:
        return factor(case["contenders"]["usual loop"]["times_torchdrop"])

    table = [
        ("`Dropout`, forward, 2^20 elements", "`torch.nn`", dropout(FORWARD, elements=million), 0),
        (f"`Dropout`, {both}, 2^20", "`torch.nn`", dropout(BOTH, elements=million), 0),
        (f"`Dropout`, {both}, 2^6", "`torch.nn`", dropout(BOTH, elements=64), 0),
        ("`Dropout`, forward, 2^20, bfloat16", "`torch.nn`", dropout("dtypes", dtype="bfloat16", mode=FORWARD), 0),
        (f"`Dropout2d`, {both}, 64x256x14x14", "`torch.nn`", dropout("channels", layout="contiguous", mode=BOTH), 0),
        (f"`DropoutAdd`, {both}, 2^20", "`torch.nn`, not fused", factor(add[STOCK]["times_fused"]), 1),
        (f"`DropoutAdd`, {both}, 2^20", "torchdrop, not fused", factor(add["separate"]["times_fused"]), 1),
        (f"`DropBlock2d`, {both}, {size}", "torchvision", factor(block["torchvision"]["times_torchdrop"]), 2),
        (f"`DropPath`, {both}, {size}", "timm", factor(path["timm"]["times_torchdrop"]), 2),
        (
            f"attention with dropout, {both}, (2, 8, 1024, 64)",
            "`torch.nn`",
            factor(weights[STOCK]["times_torchdrop"]),
            6,
        ),
        ("training step of BERT after `replace`, bfloat16", "`torch.nn`", trained(STOCK), 7),
        ("training step of BERT after `replace`, bfloat16", "no dropout", trained("no dropout"), 7),
        (f"`mc_predict`, convolutional network, {conv['samples']} samples", "a loop", sampled(conv), 3),
        (f"`mc_predict`, transformer encoder, {encoder['samples']} samples", "a loop", sampled(encoder), 3),
        (
            "`MCPredictor(compile=True)`, 1 row, 30 samples",
            "a loop",
            factor(one(load("serve-cpu")["cells"], way="MCPredictor, compile=True", rows=1)["faster"]),
            8,
        ),
        (f"`tune.cross_validate`, {search['models']} small networks", "a loop", f"{digits(search['ratio'])}x", 4),
        (
            "`compact`, training step of an MLP",
            "no dropout",
            factor(step["contenders"]["no dropout"]["times_compact"]),
            5,
        ),
    ]
    return [[what, against, ratio, RUNS[run]] for what, against, ratio, run in table]


def section() -> str:
    """The table, and below it what each run was measured on."""
    used = [f"- {run}: {where(load(run)['machine'])}" for run in RUNS]
    return f"{markdown_table(HEADER, rows())}\n\n" + "\n".join(used)


def shown(text: str) -> str:
    """What stands between the markers of a text."""
    return text.partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip()


# The colors are Okabe and Ito's, which color-blind readers can tell apart.
COLORS = {STOCK: "#D55E00", OURS: "#0072B2", LIMIT: "#666666", "averaged": "#0072B2", "scaled": "#D55E00"}
WIDTH, SIDE = 860, 64


def speed_panel(left: int) -> Panel:
    """Time of a forward pass per element, over sizes."""
    cells = [cell for cell in load("dropout-cpu")["cells"] if cell["section"] == FORWARD]
    panel = Panel(left, (2**6, 2**24), (0.05, 200))
    powers, decades = range(6, 25, 3), (0.1, 1, 10, 100)
    panel.axes(
        "Dropout on the CPU, forward",
        {2**power: f"2^{power}" for power in powers},
        {value: f"{value:g}" for value in decades},
        "elements, float32, p = 0.5",
        "nanoseconds per element",
    )
    names = {STOCK: "torch.nn.Dropout", OURS: "torchdrop.Dropout", LIMIT: "x * s, a multiplication"}
    for row, (contender, name) in enumerate(names.items()):
        points = [(c["elements"], 1e9 * c["contenders"][contender]["seconds"][1] / c["elements"]) for c in cells]
        panel.line(points, COLORS[contender])
        panel.dots(points, COLORS[contender])
        panel.label(left + 172, TOP + 16 + 18 * row, name, COLORS[contender])
    return panel


def monte_carlo_panel(left: int) -> Panel:
    """Error of the average of k Monte Carlo passes of the dropout network on MNIST."""
    found = load("mnist")["monte_carlo"]
    points = [(entry["k"], entry["error"]) for entry in found["averaged"]]
    panel = Panel(left, (0.9, 110), (1.2, 2.7), log=False)
    panel.axes(
        "Monte Carlo dropout on MNIST",
        {k: str(k) for k in (1, 2, 5, 10, 20, 50, 100)},
        {value / 10: f"{value / 10:.1f}" for value in range(12, 28, 3)},
        "passes averaged",
        "test error, %",
    )
    panel.line([(k, found["weight_scaling"]) for k in panel.x], COLORS["scaled"], ' stroke-dasharray="6 4"')
    panel.line(points, COLORS["averaged"])
    panel.dots(points, COLORS["averaged"])
    panel.label(left + 150, TOP + 16, "mean of passes with dropout on", COLORS["averaged"])
    panel.label(left + 150, TOP + 34, "one pass, dropout off", COLORS["scaled"])
    return panel


def figure() -> str:
    """The figure as SVG, which is the same text wherever it is made."""
    panels = [speed_panel(SIDE), monte_carlo_panel(SIDE + PANEL + 96)]
    return svg(WIDTH, HEIGHT, [part for panel in panels for part in panel.parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    FIGURE.write_text(figure(), encoding="utf-8")
    command.fill(README, MARKERS, section())


if __name__ == "__main__":
    main()

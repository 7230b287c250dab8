"""What the benchmark must show, read off a report, and its rendering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness import Quartiles, digits, markdown_table, text_table

OURS, STOCK, LIMIT = "torchdrop", "torch.nn", "x * s"
FORWARD, BOTH, BACKWARD = "forward", "forward + backward", "backward"

Report = dict[str, Any]
Result = dict[str, Any]


def inverse(ratio: Sequence[float]) -> Quartiles:
    return Quartiles(*ratio).inverse()


@dataclass(frozen=True)
class Claim:
    """A ratio of medians that must hold in every cell that `covers` picks.

    The ratio is the other's time over torchdrop's and at least `bound`; against the limit it is torchdrop's over the
    limit's and at most `bound`. `elements` lists the sizes without which the claim has not been measured.
    """

    case: str
    bound: float
    covers: Callable[[Result], bool]
    against: str = STOCK
    elements: tuple[int, ...] = ()
    wording: str = ""

    @property
    def required(self) -> str:
        if self.against == LIMIT:
            return f"at most {self.bound:g} times its time"
        return self.wording or f"{self.bound:g} times faster"

    def verdict(self, report: Report) -> dict[str, str]:
        picked = [cell for cell in report["cells"] if self.covers(cell)]
        measured, held = [], []
        for cell in picked:
            ours, other = cell["contenders"].get(OURS, {}), cell["contenders"].get(self.against, {})
            wrong = [e["fault"].partition(":")[0] for e in (ours, other) if "fault" in e]
            ratio = other.get("times_torchdrop")
            if wrong or ratio is None:
                measured.append(f"{wrong[0] if wrong else 'not measured'}{_place(cell, picked)}")
                held.append(False)
                continue
            value = inverse(ratio).median if self.against == LIMIT else ratio[1]
            measured.append(f"{digits(value)}{_place(cell, picked)}")
            held.append(value <= self.bound if self.against == LIMIT else value >= self.bound)
        missing = set(self.elements) - {cell["elements"] for cell in picked}
        if not picked:
            outcome = "not measured"
        elif not all(held):
            outcome = "short"
        else:
            outcome = "ok, in part" if missing else "ok"
        return {
            "case": self.case,
            "required": self.required,
            "measured": ", ".join(measured) or "-",
            "verdict": outcome,
        }


def _place(cell: Result, among: Sequence[Result]) -> str:
    """What tells a cell from the others of its claim, in brackets."""
    n = cell["elements"]
    parts = []
    if len({c["elements"] for c in among}) > 1:
        parts.append(f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n))
    for field in ("dtype", "layout", "mode"):
        if len({c[field] for c in among}) > 1:
            parts.append(cell[field])
    return f" ({' '.join(parts)})" if parts else ""


def _powers(low: int, high: int, step: int = 2) -> tuple[int, ...]:
    return tuple(2**e for e in range(low, high + 1, step))


def _over_sizes(mode: str, elements: tuple[int, ...]) -> Callable[[Result], bool]:
    return lambda cell: cell["section"] == mode and cell["elements"] in elements


def _halves(cell: Result) -> bool:
    return cell["section"] == "dtypes" and cell["mode"] == FORWARD and cell["dtype"] in ("float16", "bfloat16")


def _channels(cell: Result) -> bool:
    return cell["section"] == "channels" and cell["layout"] == "contiguous" and cell["mode"] in (FORWARD, BACKWARD)


_SMALL, _LARGE = _powers(6, 12), _powers(16, 24)

CLAIMS = [
    Claim("forward, f32, 2^18 and 2^20", 50, _over_sizes(FORWARD, (2**18, 2**20)), elements=(2**18, 2**20)),
    Claim("forward, f32, 2^22", 30, _over_sizes(FORWARD, (2**22,)), elements=(2**22,)),
    Claim("forward + backward, f32, 2^20", 25, _over_sizes(BOTH, (2**20,)), elements=(2**20,)),
    Claim("forward + backward against x * s, f32, 2^16 to 2^24", 2.5, _over_sizes(BOTH, _LARGE), LIMIT, _LARGE),
    Claim("forward, bf16 and f16, 2^20", 40, _halves),
    Claim("forward, 64 to 4,096", 1, _over_sizes(FORWARD, _SMALL), elements=_SMALL, wording="never slower"),
    Claim("forward + backward, 64 to 4,096", 1, _over_sizes(BOTH, _SMALL), elements=_SMALL, wording="never slower"),
    Claim("Dropout2d on (64, 256, 14, 14), forward and backward", 1, _channels, wording="faster"),
]


def _saved(report: Report) -> dict[str, str]:
    found = [r for r in report.get("memory", []) if r["contender"] == OURS]
    grows = any(r["saved_per_element"] > 0 for r in found)
    largest = max((s["bytes"] for r in found for s in r["saved"]), default=0)
    per_element = max((r["saved_per_element"] for r in found), default=0.0)
    return {
        "case": "saved for backward",
        "required": "no tensor that grows with the input",
        "measured": f"{digits(per_element)} bytes an element, at most {largest} bytes in all" if found else "-",
        "verdict": "not measured" if not found else "short" if grows else "ok",
    }


def verdicts(report: Report) -> list[dict[str, str]]:
    """One for each row of the table of what must hold. The bounds are for the CPU: elsewhere nothing is judged."""
    rows = [*(claim.verdict(report) for claim in CLAIMS[:-1]), _saved(report), CLAIMS[-1].verdict(report)]
    if report["machine"]["device"] != "cpu":
        rows = [{**row, "required": "-", "verdict": "-"} for row in rows]
    return rows


HEADER = ["case", "required", "measured", "verdict"]


def _rows(report: Report) -> list[list[str]]:
    return [[row[name] for name in HEADER] for row in report["summary"]]


def text(report: Report) -> str:
    short = [row["case"] for row in report["summary"] if row["verdict"] == "short"]
    last = f"short of what is required: {'; '.join(short)}" if short else "nothing that was measured is short"
    return f"{text_table(HEADER, _rows(report), left=4)}\n{last}"


def where(facts: dict[str, Any]) -> str:
    """The line that says what a result was measured on."""
    code = f"torchdrop {facts['torchdrop']}"
    if facts.get("commit"):
        code += f" at {facts['commit'][:10]}{' with changes' if facts['dirty'] else ''}"
    parts = [facts["cpu"], f"{facts['cores']} cores", f"{facts['threads']} threads", facts["os"]]
    parts += [_card(facts)] if "gpu" in facts else []
    versions = [f"Python {facts['python']}", f"torch {facts['torch']}"]
    versions += [f"triton {facts['triton']}"] if facts.get("triton") else []
    return f"{', '.join(parts)}; {', '.join(versions)}, {code}; {facts['date']}."


def _card(facts: dict[str, Any]) -> str:
    behind = [f"{name} {facts[key]}" for name, key in (("driver", "driver"), ("CUDA", "cuda")) if facts.get(key)]
    return facts["gpu"] + (f" ({', '.join(behind)})" if behind else "")


def markdown(report: Report) -> str:
    return f"{where(report['machine'])}\n\n{markdown_table(HEADER, _rows(report))}"

"""The README's examples run as they stand, one after the other, and its figures come from the committed run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cuda_summary

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import numpy\n" + "\n".join(blocks)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Dropout(p=0.1, inplace=False)" in done.stdout


@pytest.mark.parametrize(
    ("table", "result", "program"),
    [
        ("speed", "dropout-cpu.json", "bench_dropout.py"),
        ("monte carlo", "monte-carlo-cpu.json", "bench_monte_carlo.py"),
        ("search", "search-cpu.json", "bench_search.py"),
        ("mnist", "mnist.json", "mnist.py"),
        ("variants", "variants-cpu.json", "bench_variants.py"),
        ("fused", "fused-cpu.json", "bench_fused.py"),
        ("compact", "compact.json", "compact.py"),
        ("concrete", "concrete.json", "concrete.py"),
        ("sparsity", "sparsity.json", "sparsity.py"),
        ("language", "language.json", "language.py"),
    ],
)
def test_tables_are_the_committed_runs(table: str, result: str, program: str) -> None:
    results = ROOT / "benchmarks" / "results" / result
    rendered = subprocess.run(
        [sys.executable, f"benchmarks/{program}", "--render", str(results)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    shown = README.partition(f"<!-- {table} -->")[2].partition(f"<!-- end of {table} -->")[0]
    assert shown.strip() == rendered.partition("\n###")[0].strip()
    assert "| verdict |" in shown
    assert json.loads(results.read_text(encoding="utf-8"))["machine"]["commit"]


def test_the_test_command_is_what_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "<!-- tests -->" in script
    (command,) = re.findall(r"<!-- tests -->\n```bash\n(.*)\n```", README)
    for part in ("torch==2.13.0", "-e '.[test]'", "ruff check", "mypy", "pytest"):
        assert part in command


def test_the_cuda_table_is_the_committed_run_or_says_why_there_is_none() -> None:
    shown = README.partition(cuda_summary.MARKERS[0])[2].partition(cuda_summary.MARKERS[1])[0]
    assert shown.strip() == cuda_summary.committed(ROOT / "benchmarks" / "results" / "cuda.json")

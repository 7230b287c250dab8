"""What the benchmarks' command lines have in common: threads, a quick run, where the result goes, and its rendering."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None, result: str, quick: str | None = None) -> argparse.ArgumentParser:
    """A parser with the common options.

    Args:
        description: the benchmark's docstring.
        result: the name of its result's file.
        quick: what a quick run does; None if there is none.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", default=2, type=int, help="PyTorch's thread count")
    if quick is not None:
        made.add_argument("--quick", action="store_true", help=quick)
    none = "" if quick is None else ", none with --quick"
    made.add_argument("--output", type=Path, help=f"the JSON file; results/{result}{none}")
    made.add_argument("--render", type=Path, metavar="FILE", help="print a JSON file as markdown and measure nothing")
    return made


def rendered(options: argparse.Namespace, render: Callable[[dict[str, Any]], str]) -> bool:
    """Whether all that was asked for is the rendering of a file, which is printed then."""
    if options.render is None:
        return False
    print(render(json.loads(options.render.read_text())))
    return True


def write(report: dict[str, Any], options: argparse.Namespace, result: str, judged: bool = True) -> None:
    """Writes a report to the file asked for, or to the results if it is one to be judged."""
    output = options.output or (RESULTS / result if judged else None)
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {output.name}")


def fill(file: Path, markers: tuple[str, str], section: str) -> None:
    """Puts a section between the two lines of a file that mark its place.

    Raises:
        ValueError: the file has no such lines.
    """
    head, begin, rest = file.read_text(encoding="utf-8").partition(markers[0])
    _, end, tail = rest.partition(markers[1])
    if not (begin and end):
        raise ValueError(f"{file.name} has no lines {markers[0]} and {markers[1]}")
    file.write_text(f"{head}{begin}\n{section}\n{end}{tail}", encoding="utf-8")

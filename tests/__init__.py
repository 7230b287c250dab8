"""The tests, in folders that mirror the package."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

TORCH = tuple(int(number) for number in importlib.metadata.version("torch").split(".")[:2])
"""The version of PyTorch: (2, 13)."""

ROOT = Path(__file__).resolve().parents[1]
"""The top of the repository."""


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that one process of a test run fills, while the others wait."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = folder.with_suffix(".making")
            making.mkdir()
            make(making)
            making.rename(folder)
    return folder

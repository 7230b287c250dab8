"""Other packages that torchdrop is compared with, and what is said where one is not there."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Package:
    """Another package.

    Args:
        name: of the package, as in tables.
        module: what is imported.
        install: the argument of pip install.
    """

    name: str
    module: str
    install: str

    def load(self) -> Any:
        """The module."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(self.module)

    def missing(self) -> str:
        """Why it cannot be used; "" if it can."""
        try:
            self.load()
        except ModuleNotFoundError as error:
            return f"not installed: pip install {self.install} ({error})"
        except Exception as error:  # what it imports may fail in any way
            return f"n/a: its import fails ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]})"
        return ""

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.module.partition(".")[0])
        except importlib.metadata.PackageNotFoundError:
            return None

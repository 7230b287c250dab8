"""Imports of packages that torchdrop does not depend on, with a message where one is missing, and Axes to draw on."""

from __future__ import annotations

import importlib
from typing import Any

# Okabe and Ito's colors, which color-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"


def optional(module: str, extra: str = "uncertainty") -> Any:
    """Imports a module of a package that torchdrop does not depend on.

    Raises:
        ImportError: it is not installed. The message says what to install.

    Example:
        >>> optional("pandas").__name__
        'pandas'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {module}: pip install 'torchdrop[{extra}]'") from error


def axes_or_new(ax: Any, extra: str = "uncertainty") -> Any:
    """Returns the Axes given, or those of a new Figure that is in no global state.

    Example:
        >>> axes_or_new(None).get_title()
        ''
    """
    if ax is None:
        ax = optional("matplotlib.figure", extra).Figure(figsize=(5, 4), layout="constrained").subplots()
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    return ax

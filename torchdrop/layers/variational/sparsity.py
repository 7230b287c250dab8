"""The number of weights of a model that are zero, layer by layer: `sparsity`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ...core.checks import check_module
from .base import Variational


class Sparsity(Mapping[str, float]):
    """The share of zeros among each layer's weights by name: a mapping that prints as a table.

    Args:
        rows: a plain dict for each layer: name, kind, weights and zeros.

    Attributes:
        rows: the same, with the share of zeros.
        weights: the number of weights in all layers.
        zeros: the number of them that are zero.
        share: zeros / weights, 0 if there are no weights.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows: list[dict[str, Any]] = [{**row, "share": _share(row["zeros"], row["weights"])} for row in rows]
        self.weights: int = sum(row["weights"] for row in rows)
        self.zeros: int = sum(row["zeros"] for row in rows)
        self.share: float = _share(self.zeros, self.weights)

    def __getitem__(self, name: str) -> float:
        for row in self.rows:
            if row["name"] == name:
                return row["share"]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (row["name"] for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        if not self.rows:
            return "no layer has weights"
        lines = [(row["name"] or "(model)", row["kind"], row["weights"], row["zeros"]) for row in self.rows]
        if len(lines) > 1:
            lines.append(("total", "", self.weights, self.zeros))
        cells = [("layer", "kind", "weights", "zero", "share")]
        cells += [
            (name, kind, f"{weights:,}", f"{zeros:,}", f"{100 * _share(zeros, weights):.1f} %")
            for name, kind, weights, zeros in lines
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column in (2, 3) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        )


def _share(zeros: int, weights: int) -> float:
    return zeros / weights if weights else 0.0


def sparsity(model: nn.Module) -> Sparsity:
    """Returns the share of weights of each linear and convolutional layer that are zero in eval mode.

    The pruned weights of a sparse variational layer count as zero, and a parametrized weight counts with its value
    after its parametrizations in eval mode. Biases do not count. A layer that has several names counts once.

    Args:
        model: any module; a compiled one has the names of its original.

    Returns:
        A mapping from name to the share of zeros, in the order of ``model.named_modules()``, which prints as a table
        and has the totals as `weights`, `zeros` and `share`.

    Raises:
        TypeError: `model` is no module.
        ValueError: a layer is lazy and has no weights yet, or has them on the meta device, without values.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10))
        >>> _ = torch.nn.init.ones_(model[0].weight)
        >>> _ = torch.nn.init.eye_(model[2].weight)
        >>> print(torchdrop.sparsity(model))
        layer  kind    weights  zero  share
        0      Linear    1,500     0  0.0 %
        2      Linear      500   490  98.0 %
        total            2,000   490  24.5 %
        >>> torchdrop.sparsity(model)["2"], torchdrop.sparsity(model).share
        (0.98, 0.245)
    """
    check_module("model", model)
    rows = []
    for name, module in getattr(model, "_orig_mod", model).named_modules():
        if isinstance(module, (nn.Linear, _ConvNd)):
            if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
                raise ValueError(f"{name or 'the model'} has no weights yet, it is lazy: run the model once first")
            weight = _eval_weight(module)
            if weight.is_meta:
                raise ValueError(f"{name or 'the model'} has weights without values, on the meta device: load them")
            kind = type(module).__name__.removeprefix("Parametrized")
            zeros = int((weight == 0).sum())
            rows.append({"name": name, "kind": kind, "weights": weight.numel(), "zeros": zeros})
    return Sparsity(rows)


@torch.no_grad()
def _eval_weight(module: nn.Linear | _ConvNd) -> Tensor:
    if isinstance(module, Variational):
        return module.eval_weight()
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight
    parametrizations: Any = module.parametrizations
    parts = list(parametrizations["weight"].modules())
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        return module.weight
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode

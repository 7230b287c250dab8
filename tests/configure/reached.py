"""Models whose modules `replace` reaches for the random calls in their own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Drops in its own code, beside a layer that does."""

    def __init__(self, p: float = 0.25) -> None:
        super().__init__()
        self.fc, self.drop, self.p = nn.Linear(4, 4), nn.Dropout(0.5), p

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.dropout(self.fc(x), self.p, self.training)) + x


def blocks(count: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count)))


def data(rows: int = 9) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def made(forward: Callable[..., Any], **children: nn.Module) -> nn.Module:
    """A module of a class of its own."""
    module: nn.Module = type("Made", (nn.Module,), {"forward": forward, "__module__": __name__})()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def of(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda self, x: function(x)


NAMES = {"0.drop": 0.5, "0.dropout:0": 0.75, "1.drop": 0.5, "1.dropout:0": 0.75}

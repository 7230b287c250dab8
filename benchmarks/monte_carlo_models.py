"""The models that Monte Carlo inference is measured on, and an independent count of what a forward draws."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_NORMS = nn.modules.batchnorm._NormBase


def _generators() -> list[Tensor]:
    """The states of torch's default generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


class Draws(TorchDispatchMode):
    """Counts the operators that move a default generator of torch, whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = _generators()
        out = func(*args, **(kwargs or {}))
        self.count += not all(map(torch.equal, before, _generators()))
        return out


def everything_on(model: nn.Module) -> nn.Module:
    """The model in train mode, but for layers with running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NORMS):
            module.eval()
    return model


def train_mode_draws(model: nn.Module, x: Tensor) -> int:
    """How many random calls a forward in train mode makes."""
    with torch.no_grad(), Draws() as draws:
        everything_on(copy.deepcopy(model))(x)
    return draws.count


@contextmanager
def statistics_watched(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether a buffer has changed since."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield lambda: not all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


@dataclass(frozen=True)
class Case:
    """A model, its data, and how it is sampled.

    Args:
        label: in tables.
        short: where several are named in one cell.
        build: makes the model.
        shape: of a batch.
        samples: T.
        modules: whether the usual loop is in eval mode with nn.Dropout's modules in train mode; else all in train mode.
        required: how many times faster than the usual loop; None where nothing is.
    """

    label: str
    short: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int = 50
    modules: bool = True
    required: float | None = None

    def made(self, device: torch.device, seed: int = 0) -> tuple[nn.Module, Tensor]:
        """Model, in eval mode, and data."""
        torch.manual_seed(seed)
        model = self.build()
        settle_statistics(model)
        return model.to(device).eval(), torch.randn(self.shape).to(device)


def settle_statistics(model: nn.Module) -> None:
    """Running statistics other than 0 and 1, as after training."""
    for module in model.modules():
        if isinstance(module, _NORMS):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def conv_body(size: int) -> nn.Module:
    """Four stages of convolution, BatchNorm and ReLU; dropout in the two-layer head only."""
    channels = (3, 32, 64, 128, 256)
    stages = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
        for a, b in itertools.pairwise(channels)
    ]
    features = channels[-1] * (size // 16) ** 2
    head = [nn.Dropout(0.5), nn.Linear(features, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 10)]
    return nn.Sequential(*stages, nn.Flatten(), *head)


def mlp(*sizes: int, input_rate: float = 0.2, rate: float = 0.5) -> nn.Module:
    """Linear layers with ReLU between them and dropout before each."""
    layers: list[nn.Module] = [nn.Dropout(input_rate), nn.Linear(sizes[0], sizes[1])]
    for a, b in itertools.pairwise(sizes[1:]):
        layers += [nn.ReLU(), nn.Dropout(rate), nn.Linear(a, b)]
    return nn.Sequential(*layers)


def encoder(layers: int = 4, width: int = 256) -> nn.Module:
    """torch.nn's transformer encoder with its own rate of 0.1 everywhere."""
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


class Functional(nn.Module):
    """Two blocks with functional dropout and BatchNorm, and a head with nn.Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()) for _ in range(2))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.dropout(block(x), 0.3, self.training)
        return self.head(x)


class Recurrent(nn.Module):
    """nn.LSTM of three layers with dropout between them, and a head with nn.Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, 3, dropout=0.3, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """nn.MultiheadAttention, scaled_dot_product_attention with a rate in train mode, and a head with nn.Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.3, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + F.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if self.training else 0.0)
        return self.head(x.mean(1))


def timed(quick: bool) -> list[Case]:
    """What is timed against the usual loop and against the peers. What is required is for the full size."""
    size, rows, t = (32, 16, 10) if quick else (64, 64, 50)
    conv, dense = partial(conv_body, size), partial(mlp, 784, 1024, 1024, 10)
    cases = [
        Case("conv body, dropout in a two-layer head", "conv", conv, (rows, 3, size, size), t),
        Case("MLP 784-1024-1024-10, dropout from the input on", "MLP", dense, (rows, 784), t),
        Case("transformer encoder, 4 layers, d = 256, dropout everywhere", "encoder", encoder, (rows // 4, 32, 256),
            8 if quick else 32, modules=False),
    ]  # fmt: skip
    return [replace(case, required=bound) for case, bound in zip(cases, (10, 1.8, 1.3), strict=True)]


def examined(quick: bool) -> list[Case]:
    """What the draws are counted on: small batches of the timed models, and three more."""
    rows = 16
    return [
        *(Case(c.label, c.short, c.build, (rows // 4, *c.shape[1:])) for c in timed(quick)),
        Case("functional dropout, BatchNorm", "functional", Functional, (rows, 32)),
        Case("nn.LSTM with dropout", "LSTM", Recurrent, (rows, 12, 16)),
        Case("nn.MultiheadAttention, scaled_dot_product_attention", "attention", Attention, (rows, 12, 32)),
    ]

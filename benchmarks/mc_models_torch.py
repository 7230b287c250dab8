"""Models of torch.nn's and of torchdrop's layers, on which Monte Carlo inference is compared with the loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from monte_carlo_models import Attention, Functional, settle_statistics
from torch import Tensor, nn

import torchdrop

Inputs = dict[str, Tensor] | tuple[Tensor, ...]
"""Named or positional arguments of a model."""


@dataclass(frozen=True)
class Model:
    """A model and its inputs.

    Args:
        name: of the model, in tables.
        package: where its layers come from.
        build: makes it.
        inputs: makes its inputs.
        rows: whether the inputs have rows of data in dimension 0; otherwise they are one whole, as a graph is.
        group: the name that a bound on the time of a pass goes by; None where nothing is required.
        large: whether it is measured in a process of its own as well.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    rows: bool = True
    group: str | None = None
    large: bool = False

    @property
    def batch_dim(self) -> int | None:
        return 0 if self.rows else None

    def made(self) -> tuple[nn.Module, Inputs]:
        """The model, in eval mode and called once, since some set attributes in their first call, and its inputs."""
        torch.manual_seed(0)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model, inputs = self.build().eval(), self.inputs()
            settle_statistics(model)
            called(model, inputs)
        return model, inputs


def called(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


class Last(nn.Module):
    """A recurrent layer, and a linear one on its last output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Residual(nn.Module):
    """x + drop(f(x)), where f has a normalization, two linear layers and GELU."""

    def __init__(self, width: int, drop: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.body(x))


class Stack(nn.Module):
    """Layers of which each may be skipped, and a head with dropout."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
        self.layers, self.head = torchdrop.LayerDrop(layers, 0.2), nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def small_mlp() -> nn.Module:
    """A network for tables: 64-256-256-10 with dropout after each ReLU."""
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10),
    )  # fmt: skip


def _convolution(channels: int, features: int, drop: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, features, 3, padding=1), nn.BatchNorm2d(features), nn.ReLU(), drop)


def convolutional(drop: Callable[[], nn.Module]) -> nn.Module:
    """Two convolutions with BatchNorm, and dropout of some kind after each."""
    first, second = _convolution(3, 16, drop()), _convolution(16, 32, drop())
    return nn.Sequential(first, nn.MaxPool2d(2), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def segmenter() -> nn.Module:
    """An output for each of 21 classes and each pixel."""
    return nn.Sequential(_convolution(3, 16, nn.Dropout2d(0.3)), _convolution(16, 16, nn.Dropout2d(0.3)),
        nn.Conv2d(16, 21, 1))  # fmt: skip


class _Encoder(nn.TransformerEncoder):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Without its two other arguments, so that it can stand among other modules."""
        return super().forward(x)


def encoder(layer: nn.Module | None = None) -> nn.Module:
    """torch.nn's encoder of two layers."""
    return _Encoder(nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True), 2, enable_nested_tensor=False)


class EncoderDecoder(nn.Module):
    """nn.Transformer of one sequence, as source and as target."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(32, 4, 2, 2, 64, 0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, x)


class Tagger(nn.Module):
    """Words, some of which are dropped, a bidirectional LSTM, functional dropout, and an output for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 32)
        self.lstm = nn.LSTM(32, 16, bidirectional=True, batch_first=True)
        self.out = nn.Linear(32, 5)

    def forward(self, words: Tensor) -> Tensor:
        x = F.dropout1d(self.embed(words), 0.2, self.training)
        return self.out(F.dropout(self.lstm(x)[0], 0.5, self.training))


def normal(*shape: int) -> Callable[[], Inputs]:
    """Makes a tensor of standard normal numbers, the only argument."""
    return lambda: (torch.randn(shape),)


def _words() -> Inputs:
    return (torch.randint(0, 99, (8, 12)),)


TORCH = [
    Model("MLP 64-256-256-10", "torch.nn", small_mlp, normal(32, 64), group="MLP"),
    Model("CNN, Dropout2d, BatchNorm", "torch.nn", lambda: convolutional(lambda: nn.Dropout2d(0.2)),
        normal(8, 3, 16, 16)),
    Model("segmenter, Dropout2d", "torch.nn", segmenter, normal(2, 3, 32, 32)),
    Model("functional dropout, BatchNorm", "torch.nn", Functional, normal(16, 32)),
    Model("TransformerEncoder", "torch.nn", encoder, normal(8, 12, 32)),
    Model("Transformer", "torch.nn", EncoderDecoder, normal(8, 12, 32)),
    Model("MultiheadAttention", "torch.nn", Attention, normal(8, 12, 32)),
    Model("LSTM", "torch.nn", lambda: Last(nn.LSTM(16, 32, 2, dropout=0.3, batch_first=True)), normal(8, 12, 16)),
    Model("GRU", "torch.nn", lambda: Last(nn.GRU(16, 32, 2, dropout=0.3, batch_first=True)), normal(8, 12, 16)),
    Model("LSTM of words", "torch.nn", Tagger, _words),
]  # fmt: skip

TORCHDROP = [
    Model("DropPath", "torchdrop",
        lambda: nn.Sequential(*(Residual(32, torchdrop.DropPath(0.2)) for _ in range(4)), nn.Linear(32, 10)),
        normal(16, 32)),
    Model("Dropout", "torchdrop",
        lambda: nn.Sequential(*(Residual(32, torchdrop.Dropout(0.2)) for _ in range(4)), nn.Linear(32, 10)),
        normal(16, 32)),
    Model("DropBlock", "torchdrop", lambda: convolutional(lambda: torchdrop.DropBlock2d(0.2, block_size=3)),
        normal(8, 3, 16, 16)),
    Model("LayerDrop", "torchdrop", lambda: Stack(32, 4), normal(16, 32)),
    Model("zoneout LSTM", "torchdrop", lambda: Last(torchdrop.ZoneoutLSTM(16, 32, batch_first=True)),
        normal(8, 12, 16)),
]  # fmt: skip

"""What the tests of seeds share: every layer, its mask under a seed, gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
import torchdrop.functional as F
from torchdrop.kernels import native

FAMILY: dict[str, tuple[type[nn.Module], Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "dropout": (torchdrop.Dropout, F.dropout, (64,), (33_000,)),
    "dropout1d": (torchdrop.Dropout1d, F.dropout1d, (8, 16, 3), (33, 1000, 2)),
    "dropout2d": (torchdrop.Dropout2d, F.dropout2d, (8, 16, 2, 2), (33, 1000, 1, 2)),
    "dropout3d": (torchdrop.Dropout3d, F.dropout3d, (8, 16, 2, 1, 2), (33, 1000, 1, 1, 2)),
    "alpha_dropout": (torchdrop.AlphaDropout, F.alpha_dropout, (64,), (33_000,)),
    "feature_alpha_dropout": (torchdrop.FeatureAlphaDropout, F.feature_alpha_dropout, (8, 16, 3), (33, 1000, 2)),
    "gaussian_dropout": (torchdrop.GaussianDropout, F.gaussian_dropout, (64,), (33_000,)),
}
"""Module, function, a small shape and one beyond the size below which a single thread works."""

every_layer = pytest.mark.parametrize("name", FAMILY)
small_and_large = pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
reentrant_or_not = pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensors", "reentrant"])


def shape_of(name: str, large: bool = False) -> tuple[int, ...]:
    shape = FAMILY[name][3 if large else 2]
    assert (torch.Size(shape).numel() >= native.SERIAL) == large
    return shape


def seeded(seed: int, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    torch.manual_seed(seed)
    return call(*args, **options)


def multiplier(seed: int, shape: tuple[int, ...], p: float = 0.5, dtype: torch.dtype = torch.float64) -> Tensor:
    """What dropout multiplies by under this seed. At p = 0.5 every factor is 0 or 2, so products with it are exact."""
    m = seeded(seed, F.dropout, torch.ones(shape, dtype=dtype), p)
    assert 0 < (m == 0).sum() < m.numel()
    return m


class Segment(nn.Module):
    """Something non-linear comes after each dropout, so that what is recomputed depends on the mask."""

    def __init__(self, shape: tuple[int, ...], module: type[nn.Module] = torchdrop.Dropout) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, torch.Size(shape).numel(), dtype=torch.float64))
        self.shape, self.first, self.second, self.runs = shape, module(0.5), module(0.25), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        h = torch.tanh(self.first(x) * self.weight.reshape(self.shape))
        return torch.sin(self.second(h) + x)


def gradients(call: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The output, and by backward() (reentrant checkpointing needs that) the gradients of its square's sum."""
    x, weight.grad = x.detach().clone().requires_grad_(), None
    y = call(x)
    y.square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad.clone()


def agree(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    """Up to the order in which gradients were added up."""
    return all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(left, right, strict=True))


def row_masks(y: Tensor) -> set[tuple[bool, ...]]:
    """The different masks among the rows of a dropped tensor of ones."""
    return {tuple(row.tolist()) for row in (y != 0).flatten(1)}


def in_threads(work: Callable[[int], Any], count: int = 2) -> list[Any]:
    results: list[Any] = [None] * count

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results

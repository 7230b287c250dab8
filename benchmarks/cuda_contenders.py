"""The operations timed on CUDA, with torch.nn's dropout and with torchdrop's, and checks of what they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import checks
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from torchdrop import functional as TF

P, BLOCK_P = 0.5, 0.1
DTYPE = torch.bfloat16
SEED = 2026

Map = Callable[..., Tensor]
Pair = tuple[Tensor, Tensor]


def quarters(n: int, device: torch.device, seed: int) -> Tensor:
    """Multiples of 1/4 other than 0. A million of them, over and over: the host takes long to draw more."""
    period = min(n, 2**20)
    x = (checks.sample((period,), torch.float32, "cpu", seed) * 4).round().clamp(-8, 8) / 4
    return torch.where(x == 0, 0.25, x).to(device, DTYPE).repeat(n // period)


def added(x: Tensor, residual: Tensor) -> Tensor:
    """What is written where there is no fused operator."""
    return F.dropout(x, P) + residual


def fused(x: Tensor, residual: Tensor) -> Tensor:
    return TF.dropout_add(x, residual, P)


def stock_gelu_added(x: Tensor, residual: Tensor) -> Tensor:
    return F.dropout(F.gelu(x), P) + residual


def own_gelu_added(x: Tensor, residual: Tensor) -> Tensor:
    return TF.dropout(F.gelu(x), P) + residual


class Block(nn.Module):
    """A transformer's block whose dropout is of this class."""

    def __init__(self, dropout: type[nn.Module], width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second, self.third = (dropout(BLOCK_P) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        x = x + self.first(self.attention(h, h, h, need_weights=False)[0])
        return x + self.third(self.down(self.second(F.gelu(self.up(self.after(x))))))


def block(dropout: type[nn.Module], width: int, device: torch.device) -> nn.Module:
    """With the same parameters each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Block(dropout, width).to(device, DTYPE)


def pair(operation: str, width: int, device: torch.device) -> tuple[Map, Map]:
    """torchdrop's and torch.nn's."""
    if operation == "block":
        return block(torchdrop.Dropout, width, device), block(nn.Dropout, width, device)
    return {
        "dropout": (torchdrop.Dropout(P), nn.Dropout(P)),
        "dropout_add": (fused, added),
        "gelu_dropout_add": (own_gelu_added, stock_gelu_added),
    }[operation]


def wrong(operation: str, function: Map, inputs: Sequence[Tensor], eager: Map | None = None) -> str | None:
    """What is wrong with a contender, or None.

    Args:
        operation: what it should compute.
        function: the contender.
        inputs: what it is timed on.
        eager: the function that it is the compilation of, where both should draw the same masks under one seed.
    """
    if operation == "dropout":
        return checks.dropout_fault(function, inputs[0], P)
    if operation == "block":
        return block_fault(function, inputs[0], eager)
    return (sum_fault if operation == "dropout_add" else gelu_fault)(function, *inputs)


def sum_fault(function: Map, x: Tensor, residual: Tensor) -> str | None:
    """A residual can be taken off again, since all of it is exact."""
    held = residual.detach()
    found = checks.dropout_fault(lambda x: function(x, held) - held, x, P)
    if found or not residual.requires_grad:
        return found
    g = torch.full_like(held, 0.75)
    (gradient,) = torch.autograd.grad(function(x.detach(), residual), residual, g)
    return None if torch.equal(gradient, g) else "a gradient of the residual other than g"


def _near(a: Tensor, b: Tensor, size: Tensor) -> bool:
    """Within the rounding of results and parts as large as `size`."""
    return bool(((a.float() - b).abs() <= torch.finfo(a.dtype).eps * size).all())


def gelu_fault(function: Map, x: Tensor, residual: Tensor) -> str | None:
    """Each element is the residual itself, or the residual and gelu(x)/(1-p), which is at least 0.09 here.

    The gradient with respect to x is that of gelu(x)/(1-p) where the output is of the second kind, and 0 elsewhere.
    """
    torch.manual_seed(SEED)
    y = function(x, residual)
    again = function(x, residual).detach()
    torch.manual_seed(SEED)
    if not torch.equal(y.detach(), function(x, residual).detach()):
        return "two results under one seed"
    if (y.shape, y.dtype) != (x.shape, x.dtype):
        return f"{y.dtype} of shape {tuple(y.shape)}"
    kept = y.detach() != residual.detach()
    if torch.equal(kept, again != residual.detach()):
        return "the same mask in two calls"
    apart = abs(float(kept.float().mean(dtype=torch.float64)) - (1 - P))
    if apart > 6 * (P * (1 - P) / x.numel()) ** 0.5:
        return f"a kept fraction {apart:.6f} off"
    with torch.enable_grad():
        alone = x.detach().float().requires_grad_()
        values = F.gelu(alone) / (1 - P)
        (slope,) = torch.autograd.grad(values.sum(), alone)
    values, base = values.detach() * kept, residual.detach().float()
    if not _near(y.detach(), values + base, values.abs() + base.abs()):
        return "values other than the residual with 0 or gelu(x)/(1-p)"
    del values, base, again
    g = quarters(x.numel(), x.device, 3).view_as(x)
    gradients = torch.autograd.grad(y, (x, residual), g)
    if not torch.equal(gradients[1], g):
        return "a gradient of the residual other than g"
    told = slope.abs() > 0.05  # gelu has a minimum near -0.75
    if not torch.equal((gradients[0] != 0)[told], kept[told]):
        return "a gradient with another mask"
    expected = slope * kept * g
    return None if _near(gradients[0], expected, expected.abs() + 0.1 * kept) else "a gradient other than 0 and gelu's"


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).square().mean())


def block_fault(function: Map, x: Tensor, eager: Map | None = None) -> str | None:
    """Output and gradient of x are as far from those without dropout as with nn.Dropout, and follow the seed.

    With `eager` they are its own under the same seed, so backward has forward's masks.
    """
    stock = block(nn.Dropout, x.shape[-1], x.device)
    g = quarters(x.numel(), x.device, 3).view_as(x)

    def both(run: Map, seed: int | None = None) -> Pair:
        if seed is not None:
            torch.manual_seed(seed)
        y = run(x)
        return y.detach(), torch.autograd.grad(y, x, g)[0]

    rates = both(stock, SEED)
    without = both(stock.eval())
    found, again, repeated = both(function, SEED), both(function), both(function, SEED)
    same = found if eager is None else both(eager, SEED)
    for index, name in enumerate(("values", "gradients")):
        if (found[index].shape, found[index].dtype) != (x.shape, x.dtype):
            return f"{name} of {found[index].dtype} and shape {tuple(found[index].shape)}"
        spread, expected = (_apart(one[index], without[index]) for one in (found, rates))
        if not 0.75 <= spread / expected <= 1.33:  # not finite is not between them either
            return f"{name} {spread / expected:.2f} times as far from those without dropout as torch.nn's"
        if _apart(found[index], again[index]) < 0.5 * expected:
            return f"the same {name} in two calls"
        if _apart(found[index], repeated[index]) > 0.05 * expected:  # attention's backward adds in any order
            return f"two results under one seed: {name}"
        if _apart(found[index], same[index]) > 0.05 * expected:
            return f"{name} with other masks than in eager mode"
    return None

"""Whether a contender computes what it is timed for."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]

_SIGMAS = 6.0
_SEED = 2026


def without_zeros(x: Tensor) -> Tensor:
    """x with its zeros replaced by ones, so that a zero in dropout's output means a dropped element."""
    return torch.where(x == 0, torch.ones_like(x), x)


def sample(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = _SEED) -> Tensor:
    """Standard normal numbers without zeros."""
    generator = torch.Generator().manual_seed(seed)
    return without_zeros(torch.randn(shape, generator=generator).to(dtype)).to(device)


def _scaled(x: Tensor, scale: float) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute) * scale).to(x.dtype)


def _close(a: Tensor, b: Tensor, scale: float) -> bool:
    """Within what rounding explains: of the mask's dtype, of the result, and of a keep probability to 2**-32."""
    allowed = 4 * torch.finfo(a.dtype).eps + scale * 2.0**-32
    return bool(torch.isfinite(a).all()) and bool(((a - b).abs() <= allowed * b.abs()).all())


def _like(y: Tensor, x: Tensor) -> str | None:
    if y.shape != x.shape:
        return f"shape {tuple(y.shape)} for an input of {tuple(x.shape)}"
    if y.dtype != x.dtype:
        return f"dtype {y.dtype} for an input of {x.dtype}"
    if y.stride() != torch.empty_like(x).stride():
        return f"strides {y.stride()} for an input with strides {x.stride()}"
    return None


def dropout_fault(function: Map, x: Tensor, p: float, channels: int | None = None) -> str | None:
    """What is wrong with `function` as dropout of x at rate p, or None.

    Shape, dtype and strides; values that are 0 or x/(1-p); the kept fraction within 6 standard deviations; one result
    under one seed and another without; and, if x wants a gradient, that the gradient has the output's mask.

    Args:
        x: without zeros.
        channels: how many leading dimensions the mask varies over, where it is shared over the others.
    """
    if bool((x == 0).any()):
        raise ValueError("x has zeros, so dropped elements cannot be told")
    k = 1.0 - p
    scale = 1.0 / k
    torch.manual_seed(_SEED)
    y = function(x)
    again = function(x).detach()
    torch.manual_seed(_SEED)
    repeated = function(x).detach()
    fault = _like(y, x)
    if fault:
        return fault
    out = y.detach()
    if not torch.equal(out, repeated):
        return "two results under one seed"
    kept = out != 0
    if 0 < p < 1 and torch.equal(kept, again != 0):
        return "the same mask in two calls"
    if not _close(out, torch.where(kept, _scaled(x.detach(), scale), torch.zeros_like(out)), scale):
        return "values other than 0 and x/(1-p)"
    mask = kept
    if channels is not None:
        mask = kept.flatten(channels)[..., 0]
        if not torch.equal(kept, mask.reshape(*mask.shape, *[1] * (x.dim() - channels)).expand_as(kept)):
            return "a mask that varies within a channel"
    fraction, allowed = int(mask.count_nonzero()) / mask.numel(), _SIGMAS * math.sqrt(k * p / mask.numel())
    if abs(fraction - k) > allowed:
        return f"a kept fraction of {fraction:.6f} for {k:g}"
    if not y.requires_grad:
        return "no gradient" if x.requires_grad else None
    g = without_zeros(torch.empty_like(out).copy_(sample(tuple(x.shape), x.dtype, x.device, _SEED + 1)))
    (grad,) = torch.autograd.grad(y, x, g)
    if not torch.equal(grad != 0, kept):
        return "a gradient with another mask"
    if not _close(grad, torch.where(kept, _scaled(g, scale), torch.zeros_like(g)), scale):
        return "a gradient other than 0 and g/(1-p)"
    return None


def scaling_fault(function: Map, x: Tensor, scale: float) -> str | None:
    """What is wrong with `function` as ``x * scale``, or None."""
    y = function(x)
    fault = _like(y, x)
    if fault:
        return fault
    if not _close(y.detach(), _scaled(x.detach(), scale), scale):
        return "values other than x * s"
    if x.requires_grad:
        g = torch.ones_like(x)
        if not _close(torch.autograd.grad(y, x, g)[0], _scaled(g, scale), scale):
            return "a gradient other than g * s"
    return None

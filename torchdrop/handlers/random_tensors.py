"""Random tensors: torch.rand, torch.bernoulli and similar functions, served with numbers of ours.

Other packages' DropPath, StochasticDepth, DropBlock and LayerDrop are made of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.mask_params import params_tensor, threshold
from .calls import Mode, RandomCall, Slot
from .masks import written


def random_tensor(
    kind: str, make: Callable[..., Tensor], values: Callable[..., Tensor], inplace: bool = False
) -> Callable[..., RandomCall]:
    """Describes a random tensor. `make` returns an empty one for the same arguments, and `values` its numbers."""

    def describe(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> RandomCall:
        def original() -> Any:
            return func(*args, **kwargs)

        sized = {name: value for name, value in kwargs.items() if name != "generator"}
        target = args[0] if inplace else make(*args, **sized)
        parameters = args[1:] if inplace else args
        named = {name: value for name, value in sized.items() if name in ("p", "from", "to", "mean", "std", "lambd")}

        def served(slot: Slot, _: float) -> Tensor:
            with torch.no_grad():  # as for torch, numbers are constants, whatever the parameters are
                drawn = values(slot, target, *parameters, **named)
            if inplace:
                return written(target, drawn)
            return drawn.requires_grad_() if target.requires_grad else drawn

        if target.is_complex():
            loose = "torch's own complex numbers"
            return RandomCall(kind, None, True, target.shape, original, original, None, flagged=True, loose=loose)
        return RandomCall(kind, None, True, target.shape, original, original, served, flagged=True)

    return describe


def bernoulli_values(slot: Slot, target: Tensor, p: Any = 0.5) -> Tensor:
    words = slot.words(target)
    below = params_tensor(p)[..., 0].to(torch.int64).to(words.device) if isinstance(p, Tensor) else threshold(float(p))
    return (words < below).to(target.dtype)


def uniform_values(slot: Slot, target: Tensor, *limits: Any, **named: Any) -> Tensor:
    low = limits[0] if limits else named.get("from", 0.0)
    high = limits[1] if len(limits) > 1 else named.get("to", 1.0)
    return slot.uniform(target) * (high - low) + low


def unit_values(slot: Slot, target: Tensor, *_: Any, **__: Any) -> Tensor:
    return slot.uniform(target)


def normal_values(slot: Slot, target: Tensor, mean: Any = 0.0, std: Any = 1.0) -> Tensor:
    return slot.normal(target) * std + mean


def normal_target(mean: Any, std: Any = 1.0, size: Sequence[int] | None = None, **kwargs: Any) -> Tensor:
    if size is not None:
        return torch.empty(size, **kwargs)
    return torch.empty_like(torch.add(mean, std))


def parted_values(slot: Slot, target: Tensor, mean: Any, std: Any = 1.0, *_: Any, **__: Any) -> Tensor:
    return normal_values(slot, target, mean, std)


def standard_values(slot: Slot, target: Tensor, *_: Any, **__: Any) -> Tensor:
    return slot.normal(target)


def exponential_values(slot: Slot, target: Tensor, lambd: float = 1.0) -> Tensor:
    return -torch.log1p(-slot.uniform(target)) / lambd


def from_probabilities(slot: Slot, target: Tensor, input: Tensor, p: Any = None, **_: Any) -> Tensor:
    return bernoulli_values(slot, target, input if p is None else p)


def empty_like(input: Tensor, *_: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(input, **{name: value for name, value in kwargs.items() if name != "p"})

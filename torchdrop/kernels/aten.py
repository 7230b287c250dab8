"""For devices with no kernel of their own: PyTorch's random numbers, from a generator that the key seeds.

Masks are exact in rate, and the same key gives the same mask on one device and version of PyTorch, so nothing is kept
for backward here either. They are not the masks of the other backends. Reading the key costs accelerators a
synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .law import ONE, Law
from .masking import COMPUTE_DTYPE, WHOLE, Part, apply_mask, trailing

NAME = "aten"

_MIX = 0x9E3779B97F4A7C15


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = [] if dtype in COMPUTE_DTYPE else [f"it takes {', '.join(map(str, COMPUTE_DTYPE))}, not {dtype}"]
    try:
        torch.Generator(device=device)
    except RuntimeError:
        reasons.append(f"PyTorch has no random generator for {device.type}")
    return reasons


def _for_each_key(key: Tensor, make: Callable[[torch.Generator], Tensor]) -> Tensor:
    made = []
    for seed, stream in key.reshape(-1, 2).tolist():
        generator = torch.Generator(device=key.device)
        generator.manual_seed((seed ^ (stream * _MIX)) % 2**63)
        made.append(make(generator))
    return torch.stack(made).reshape((*key.shape[:-1], *made[0].shape))


def _only_whole(part: Part) -> None:
    if part != WHOLE:
        raise ValueError(
            f"the aten backend draws whole masks, got a part that starts at {part.start}: use another backend"
        )


def draws(shape: Sequence[int], key: Tensor, part: Part = WHOLE) -> Tensor:
    _only_whole(part)
    return _for_each_key(key, lambda g: torch.randint(ONE, tuple(shape), generator=g, device=key.device))


def standard_normal(shape: Sequence[int], key: Tensor, part: Part = WHOLE) -> Tensor:
    _only_whole(part)
    return _for_each_key(key, lambda g: torch.randn(tuple(shape), generator=g, dtype=torch.float64, device=key.device))


def keep_mask(shape: Sequence[int], key: Tensor, law: Law | Tensor, part: Part = WHOLE) -> Tensor:
    return draws(shape, key, part) < trailing(law, key.device)[0]


def masked(
    x: Tensor, key: Tensor, law: Law | Tensor, shape: Sequence[int], part: Part = WHOLE, out: Tensor | None = None
) -> Tensor:
    return apply_mask(x, keep_mask(shape, key, law, part), law, out)

"""Every mask of a small shape, forced one after another, so that expectations are sums and not estimates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from torchdrop import kernels
from torchdrop.core import sites
from torchdrop.kernels.mask_params import ONE, mask_params
from torchdrop.ops import fast_path

KEYS = torch.stack([torch.arange(20_000), torch.full((20_000,), 7)], -1)


def force(patch: pytest.MonkeyPatch, key: Tensor) -> None:
    """From now on every layer draws this key."""
    patch.setattr(sites, "draw_key", lambda *_: key)
    patch.setattr(fast_path, "_row", None)  # the fast paths draw theirs as bytes


def masks(patch: pytest.MonkeyPatch, shape: Sequence[int], keep_prob: float) -> Iterator[tuple[Tensor, float]]:
    """Forces each mask of this shape in turn: yields it with its probability."""
    given = mask_params(keep_prob)
    size = torch.Size(shape).numel()
    found = kernels.keep_mask(shape, KEYS, given)
    codes = (found.flatten(1).long() << torch.arange(size)).sum(1)
    k = given.threshold / ONE
    for code in range(2**size):
        at = int((codes == code).nonzero()[0])
        force(patch, KEYS[at])
        kept = int(found[at].sum())
        yield found[at], k**kept * (1 - k) ** (size - kept)


def expectation(values: Iterator[tuple[Tensor, float]]) -> Tensor:
    """The sum of values times their probabilities, which must add up to 1."""
    listed = list(values)
    assert sum(weight for _, weight in listed) == pytest.approx(1.0, abs=1e-12)
    return torch.stack([value.detach().double() * weight for value, weight in listed]).sum(0)

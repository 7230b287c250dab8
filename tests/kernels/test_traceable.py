"""The masks of traced graphs, in integer operations that other runtimes have: those of the reference, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchdrop.kernels import reference, traceable
from torchdrop.kernels.mask_params import ONE, MaskParams, alpha, mask_params, threshold
from torchdrop.kernels.masking import masked_values

SEEDS = [0, -1, 2**63 - 1, -(2**63), 123456789123456789]
SHAPES = [(), (0,), (1,), (8,), (5, 7), (3, 1, 9), (256,)]


def keys(seed: int, samples: list[int], rows: int | None) -> tuple[Tensor, traceable.Key]:
    """The same keys for the reference and for traced graphs, of shape (samples, rows) or (samples,)."""
    numbers = torch.tensor(samples)
    high = numbers if rows is None else numbers.unsqueeze(-1)
    low = torch.zeros((), dtype=torch.int64) if rows is None else torch.arange(rows)
    stream = (high << 32) | low
    words = traceable.schedule(torch.tensor([traceable.seed_words(seed)]))[0]
    return torch.stack([torch.full_like(stream, seed), stream], -1), traceable.Key(words, low, high)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows", [4, None])
def test_bits_and_masks_are_those_of_the_reference(seed: int, rows: int | None) -> None:
    for shape in SHAPES:
        expected, traced = keys(seed, [0, 1, 77, 2**32 - 1], rows)
        bits = reference.random_bits(shape, expected)
        assert torch.equal(traceable.random_bits(shape, traced), bits)
        for below in (0, 1, ONE - 1, ONE, *map(threshold, (0.1, 0.25, 0.5, 0.9))):
            assert torch.equal(traceable.keep_mask(shape, traced, below), bits < below)
        rates = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        below = (rates * ONE).to(torch.int64)
        assert torch.equal(traceable.keep_mask(shape, traced, below), bits < below)


def test_open_elements_are_decided_by_their_lower_bits() -> None:
    """Of 2**20 elements about 16 have the upper 16 bits of the threshold."""
    expected, traced = keys(3, [0, 5], 8)
    bits, below = reference.random_bits((2**16,), expected), threshold(0.7)
    open_ = bits >> 16 == below >> 16
    assert 4 <= int(open_.sum()) <= 40
    assert (bits < below)[open_].any()
    assert not (bits < below)[open_].all()
    assert torch.equal(traceable.keep_mask((2**16,), traced, below), bits < below)
    for number in bits.flatten()[:4].tolist():  # an element is not below its own bits
        assert torch.equal(traceable.keep_mask((2**16,), traced, number), bits < number)


def test_normal_variates_are_those_of_the_reference_up_to_rounding() -> None:
    for shape in SHAPES:
        expected, traced = keys(5, [0, 9], 3)
        assert torch.allclose(
            traceable.standard_normal(shape, traced), reference.standard_normal(shape, expected), rtol=0, atol=1e-13
        )


def test_normal_quantiles() -> None:
    ends = torch.arange(1000)
    words = torch.cat([ends, torch.arange(0, ONE, 2**12 + 1), ONE - 1 - ends])
    expected = torch.special.ndtri((words.double() + 0.5) / ONE)
    assert torch.allclose(traceable.normal_of(words), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("params", [mask_params(0.3), mask_params(0.3, alpha), mask_params(0.3).tensor()], ids=str)
def test_values_are_those_of_a_select(params: MaskParams | Tensor) -> None:
    x = torch.tensor([1.5, -2.0, 0.0, math.inf, -math.inf, 7.0]).repeat(2)
    kept = torch.arange(12) < 6
    assert torch.equal(traceable.masked_values(x, kept, params), masked_values(x, kept, params))

"""Gaussian dropout: the moments of Bernoulli dropout, the noise of forward in backward."""

from __future__ import annotations

import math

import pytest
import torch

import torchdrop
from torchdrop import functional as TF
from torchdrop import kernels
from torchdrop.kernels import reference
from torchdrop.kernels.mask_params import gaussian, mask_params


@pytest.mark.slow
@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_first_two_moments_are_those_of_inverted_dropout(k: float, device: torch.device) -> None:
    n = 2**21
    y = TF.gaussian_dropout(torch.ones(n, dtype=torch.float64, device=device), keep_prob=k)
    variance = (1 - k) / k
    # P(|z| > 6.2) < 1e-9 for the mean; the sum of squares is chi-squared (Laurent and Massart, 2000, lemma 1).
    assert abs(y.mean().item() - 1) < 6.2 * math.sqrt(variance / n)
    t = math.log(2e9)
    assert abs(((y - 1) ** 2).mean().item() / variance - 1) < 2 * math.sqrt(t / n) + 2 * t / n


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(200,), (50_000,), (3, 4, 5, 6)])
def test_backward_has_the_noise_of_forward(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True, device=device)
    y = torchdrop.GaussianDropout(0.3)(x)
    assert y.unique().numel() > 50
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())


def test_the_noise_does_not_depend_on_the_device(device: torch.device) -> None:
    """On accelerators a last bit may differ, where a library rounds a square root otherwise."""
    key, drawn = torch.tensor([3, -4]), mask_params(0.7, gaussian)
    x = torch.randn(70, 33)
    z = kernels.standard_normal((5000,), key.to(device))
    assert z.device.type == device.type
    torch.testing.assert_close(z.cpu(), reference.standard_normal((5000,), key), rtol=1e-14, atol=1e-15)
    with torchdrop.use_backend("reference"):
        expected = kernels.gaussian(x, key, drawn, (70, 1))
    y = kernels.gaussian(x.to(device), key.to(device), drawn, (70, 1))
    torch.testing.assert_close(y.cpu(), expected, rtol=3e-7, atol=0)


def test_rates_can_be_a_tensor(device: torch.device) -> None:
    x = torch.ones(3, 10_000, device=device)
    k = torch.tensor([[1.0], [0.5], [0.01]], device=device)
    y = TF.gaussian_dropout(x, keep_prob=k)
    assert torch.equal(y[0], x[0])
    assert 0.9 < y[1].std() < 1.1
    assert 9 < y[2].std() < 11


def test_nothing_kept_is_refused() -> None:
    message = r"^keep_prob must be in \(0, 1\] for Gaussian dropout, got 0.0: its noise would be infinite$"
    with pytest.raises(ValueError, match=message):
        torchdrop.GaussianDropout(1.0)
    with pytest.raises(ValueError, match=message):
        TF.gaussian_dropout(torch.ones(2), keep_prob=0)
    layer = torchdrop.GaussianDropout(0.5)
    with pytest.raises(ValueError, match=message):
        layer.p = 1
    assert layer.p == 0.5

"""Alpha dropout: its two values, its moments, its in-place form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchdrop
from torchdrop import functional as TF
from torchdrop.kernels.mask_params import alpha, mask_params


@pytest.mark.parametrize("k", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elements_take_the_scaled_or_the_saturated_value(k: float, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(1000, dtype=dtype, device=device)
    y = TF.alpha_dropout(x, keep_prob=k, training=True)
    drawn = mask_params(k, alpha)
    kept = x * drawn.scale + drawn.shift
    fill = torch.full_like(x, drawn.fill)
    assert torch.equal(torch.where(y == fill, fill, kept), y)
    assert 0 < (y == fill).sum() < 1000


def test_values_equal_torch_nns(device: torch.device) -> None:
    x = torch.randn(2000, dtype=torch.float64, device=device)
    theirs = nn.AlphaDropout(0.3)(x)
    drawn = mask_params(0.7, alpha)
    saturated = (theirs - drawn.fill).abs() < 1e-8
    torch.testing.assert_close(theirs[~saturated], (x * drawn.scale + drawn.shift)[~saturated], rtol=1e-8, atol=1e-8)
    assert 400 < saturated.sum() < 800


def test_in_place_works_where_torch_nns_flag_is_ignored() -> None:
    x = torch.randn(100)
    assert torchdrop.AlphaDropout(0.5, inplace=True)(x) is x
    assert nn.AlphaDropout(0.5, inplace=True)(x) is not x


def test_nothing_kept_gives_zero_as_in_torch_nn(device: torch.device) -> None:
    x = torch.randn(100, device=device)
    assert torch.equal(TF.alpha_dropout(x, 1.0, training=True), nn.AlphaDropout(1.0)(x))


def test_backward_uses_the_mask_and_the_scale(device: torch.device) -> None:
    x = torch.randn(1000, requires_grad=True, device=device)
    y = TF.alpha_dropout(x, 0.4, training=True)
    drawn = mask_params(0.6, alpha)
    (grad,) = torch.autograd.grad(y.sum(), x)
    fill, scale = torch.tensor([drawn.fill, drawn.scale], device=device)
    expected = torch.where(y == fill, torch.zeros_like(scale), scale)
    assert torch.equal(grad, expected)

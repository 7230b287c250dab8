"""The Triton backend's fused kernels against their definitions, and its path through the public functions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchdrop
from tests.kernels.triton_kernels import (  # noqa: F401
    KEY,
    added,
    here,
    identical,
    lengths,
    needs_kernels,
    programs_of_the_devices_size,
    quiet,
    some_rates,
)
from tests.strategies import DTYPES, dtypes
from torchdrop.kernels import reference
from torchdrop.kernels import triton as backend
from torchdrop.kernels.mask_params import ONE, MaskParams, mask_params
from torchdrop.kernels.masking import COMPUTE_DTYPE

pytestmark = quiet


@needs_kernels
@settings(max_examples=25)
@given(
    dtypes, st.sampled_from([(1, 1), (3, 5), (30, 70), (4, 512), (2, 1025), (5, 8), (0, 4)]), some_rates, st.booleans()
)
def test_dropout_add_is_its_definition(dtype: torch.dtype, shape: tuple[int, int], k: float, biased: bool) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    residual[:, ::3] = -0.0
    bias = torch.randn(shape[-1]).to(dtype) if biased else None
    for given_params in (mask_params(k), mask_params(k).tensor()):
        got = backend.dropout_add(here(x), here(bias), here(residual), here(KEY), given_params)
        assert got is not None
        assert identical(got, added(x, bias, residual, mask_params(k)))


@needs_kernels
@settings(max_examples=25)
@given(dtypes, lengths, some_rates)
def test_relu_and_its_gradient_are_their_definitions(dtype: torch.dtype, n: int, k: float) -> None:
    wide = COMPUTE_DTYPE[dtype]
    x, grad = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    x[::7], x[1::7], x[2::7] = math.nan, math.inf, -math.inf
    kept, scale = reference.keep_mask((n,), KEY, mask_params(k)), mask_params(k).scale
    y = backend.activation_dropout(here(x), here(KEY), mask_params(k), "relu")
    assert y is not None
    expected = torch.where(kept, torch.relu(x.to(wide)) * scale, 0).to(dtype)
    assert torch.equal(y.cpu().isnan(), expected.isnan())
    assert identical(y.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))
    got = backend.activation_dropout_backward(here(grad), y, here(KEY), mask_params(k), "relu")
    assert got is not None
    assert identical(got, torch.where(expected <= 0, 0, grad.to(wide) * scale).to(dtype))


def exact_gelu(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """GELU and its derivative, in float64 and from formulas without cancellation."""
    x = x.double()
    if approximate == "none":
        share = 0.5 * torch.special.erfc(-x / math.sqrt(2))
        return x * share, share + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    share = torch.sigmoid(2 * u)
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return x * share, share + 2 * x * share * torch.sigmoid(-2 * u) * inner


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_and_its_gradient_are_within_a_few_units_in_the_last_place(dtype: torch.dtype, activation: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([0.0, -0.0, 1e-30, -1e-6, 90.0, -90.0])]).to(dtype)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    k = 0.7
    kept, scale = reference.keep_mask(x.shape, KEY, mask_params(k)), mask_params(k).scale
    value, slope = exact_gelu(x, "tanh" if activation == "gelu_tanh" else "none")
    y = backend.activation_dropout(here(x), here(KEY), mask_params(k), activation)
    g = backend.activation_dropout_backward(here(grad), here(x), here(KEY), mask_params(k), activation)
    unit = torch.finfo(COMPUTE_DTYPE[dtype]).eps
    for got, expected, size in ((y, value * scale, x.abs()), (g, slope * grad * scale, grad.abs())):
        assert got is not None
        assert torch.equal(got.cpu() == 0, ~kept | (got.cpu() == 0))
        assert not got.cpu()[~kept].any()
        allowed = 4 * unit * scale * size.double() + torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).tiny
        assert bool(((got.cpu().double() - expected).abs() <= allowed)[kept].all())


@needs_kernels
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_of_what_is_not_finite_is_pytorchs(activation: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30])
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    y = backend.activation_dropout(here(x), here(KEY), MaskParams(ONE, 1.0), activation)
    assert y is not None
    expected = F.gelu(x.double(), approximate=approximate).float()
    torch.testing.assert_close(y.cpu(), expected, equal_nan=True, rtol=0, atol=0)
    assert not backend.activation_dropout(here(x), here(KEY), MaskParams(0, 1.0), activation).cpu().any()  # type: ignore[union-attr]


@needs_kernels
def test_fused_kernels_decline_what_is_not_contiguous() -> None:
    x, whole = here(torch.randn(6, 8)).t(), here(torch.randn(8, 6))
    half, bias = mask_params(0.5), here(torch.randn(12))[::2]
    assert backend.dropout_add(x, None, whole, here(KEY), half) is None
    assert backend.dropout_add(whole, None, x, here(KEY), half) is None
    assert backend.dropout_add(whole, bias, whole, here(KEY), half) is None
    for activation in ("relu", "gelu", "gelu_tanh"):
        assert backend.activation_dropout(x, here(KEY), half, activation) is None
        assert backend.activation_dropout_backward(x, whole, here(KEY), half, activation) is None
        assert backend.activation_dropout_backward(whole, x, here(KEY), half, activation) is None


@needs_kernels
def test_a_bias_that_32_bits_might_not_count_is_declined() -> None:
    x, bias = torch.empty((1, 2**30), device="meta"), torch.empty(2**30, device="meta")
    assert backend.dropout_add(x, bias, x, here(KEY), mask_params(0.5)) is None


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "name", ["dropout", "dropout2d", "alpha_dropout", "drop_path", "dropout_add", "bias_dropout_add", "relu_dropout"]
)
def test_functions_and_their_gradients_are_those_of_the_reference(name: str, dtype: torch.dtype) -> None:
    x, bias, residual = (torch.randn(size).to(dtype) for size in ((3, 4, 5, 30), (30,), (3, 4, 5, 30)))
    beside = {"dropout_add": [residual], "bias_dropout_add": [bias, residual]}.get(name, [])
    results = []
    for backend_name in ("triton", "reference"):
        with torchdrop.use_backend(backend_name):
            operands = [here(tensor).clone().requires_grad_() for tensor in (x, *beside)]
            torch.manual_seed(5)
            y = getattr(torchdrop.functional, name)(*operands, 0.3)
            results.append([y, *torch.autograd.grad(y, operands, torch.ones_like(y))])
    for got, expected in zip(*results, strict=True):
        assert identical(got, expected.cpu())

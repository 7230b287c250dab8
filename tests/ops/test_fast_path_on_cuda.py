"""The fast path of CUDA tensors. Without a CUDA device it is shown tensors that Triton's interpreter takes."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchdrop
from tests.kernels.triton_kernels import (  # noqa: F401
    DEVICE,
    here,
    identical,
    lengths,
    needs_kernels,
    programs_of_the_devices_size,
    quiet,
    some_rates,
)
from tests.strategies import DTYPES
from torchdrop import kernels, random
from torchdrop.kernels import triton as backend
from torchdrop.kernels.mask_params import mask_params
from torchdrop.ops import fast_path, operators

pytestmark = [needs_kernels, quiet]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What the kernels are given on this path."""
    rows: list[Tensor] = []

    def masked_row(x: Tensor, *rest: Any) -> Tensor:
        rows.append(x)
        return backend.masked_row(x, *rest)

    if DEVICE.type == "cpu":
        monkeypatch.setattr(fast_path, "_served_element_type", lambda x: None)
        monkeypatch.setitem(torchdrop.random._keys, -1, torch.empty(2, dtype=torch.int64))
        monkeypatch.setattr(
            fast_path,
            "_is_served_row",
            lambda x: x.is_contiguous() and not (random.frozen or kernels._forced or fast_path.is_observed()),
        )
    # Not in the backend itself, which the general path uses, too.
    monkeypatch.setattr(fast_path, "triton", types.SimpleNamespace(masked_row=masked_row, served=backend.served))
    for dtype in DTYPES:
        assert kernels.available_backends(DEVICE, dtype)["triton"] == []  # where it is CUDA, that is when it is tried
    yield rows
    rows.clear()


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths.filter(bool), some_rates, st.sampled_from(DTYPES), st.booleans())
def test_it_gives_what_the_general_path_gives(
    served: list[Tensor], n: int, k: float, dtype: torch.dtype, twice: bool
) -> None:
    x, layer = here(torch.randn(2, n, dtype=dtype)).requires_grad_(), torchdrop.Dropout(keep_prob=k)
    found = []
    for general in (False, True):
        torch.manual_seed(n)
        served.clear()
        if general:
            key = torchdrop.random.draw_key(DEVICE)
            y = operators.masked(x, key, mask_params(k), x.shape) if k < 1 else x
        else:
            y = layer(x)
            assert len(served) == (k < 1)
        drawn = torch.rand(1, device=DEVICE)
        gradients = torch.autograd.grad((y * y).sum(), x, create_graph=twice)
        if twice:
            gradients += torch.autograd.grad(gradients[0].sum(), x)
        found.append([y, drawn, *gradients])
    assert all(identical(a.cpu(), b.cpu()) for a, b in zip(*found, strict=True))


def test_backward_takes_it_for_what_lies_in_a_row_and_no_other_gradient(served: list[Tensor]) -> None:
    x = here(torch.randn(6, 4)).requires_grad_()
    y, g = torchdrop.Dropout(0.5)(x), here(torch.randn(6, 4))
    expected = torch.where(y == 0, 0.0, 2 * g)
    for gradient in (g, g.t().contiguous().t(), g[0].expand(6, 4)):
        served.clear()
        (found,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
        assert torch.equal(found, torch.where(y == 0, 0.0, 2 * gradient))
        assert len(served) == gradient.is_contiguous()
    served.clear()
    (batched,) = torch.autograd.grad(y, x, torch.stack([g, g]), is_grads_batched=True)
    assert torch.equal(batched, torch.stack([expected, expected]))
    assert not served


def test_without_a_gradient_nothing_is_recorded(served: list[Tensor]) -> None:
    layer, x = torchdrop.Dropout(0.5), here(torch.randn(50)).requires_grad_()
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert not layer(x.detach()).requires_grad
    assert not torchdrop.functional.dropout(x.detach(), 0.5).requires_grad
    assert layer(x).grad_fn is not None
    assert len(served) == 4


def test_it_is_not_taken_where_something_watches(served: list[Tensor]) -> None:
    layer, x = torchdrop.Dropout(0.5), here(torch.randn(50))
    with torchdrop.frozen_masks(layer):
        layer(x)
    with torchdrop.use_backend("reference"):
        layer(x)
    with torchdrop.mc_dropout(layer, seed=1):
        layer(x)
    torch.func.vmap(layer, randomness="different")(x)
    torch.func.jvp(layer, (x,), (x,))
    assert not served
    layer(x)
    assert len(served) == 1


def test_memory_that_is_not_there_is_left_to_the_general_path(served: list[Tensor]) -> None:
    layer = torchdrop.Dropout(0.5)
    assert layer(here(torch.empty(0, 3))).shape == (0, 3)
    zeros = here(torch.ones(4)).requires_grad_()
    y = layer(zeros)
    (gradient,) = torch.autograd.grad(y, zeros, torch._efficientzerotensor((4,), device=DEVICE))
    assert torch.equal(gradient, torch.zeros_like(zeros))
    assert len(served) == 1 + (DEVICE.type == "cpu")  # forward, and nothing where there is nothing

"""The run through time with a backward pass of its own, against autograd through the same steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchdrop.layers.recurrent.cells import Noise, State, Weights, run
from torchdrop.layers.recurrent.lstm_gru import ZoneoutLSTM
from torchdrop.layers.recurrent.through_time import run_fast

B, F, H = 4, 3, 5

SIZES = {"padded": [4, 4, 4, 4], "packed": [4, 3, 3, 1], "one step": [4]}
NOISES = ["none", "hidden", "cell", "candidate", "all"]

kinds = pytest.mark.parametrize("kind", ["LSTM", "GRU"])
shapes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
directions = pytest.mark.parametrize("backwards", [False, True])


def noise_of(name: str, steps: int) -> Noise:
    def mask(kind: str) -> Tensor | None:
        return torch.rand(B, steps, H) < 0.6 if name in (kind, "all") else None

    return Noise(mask("hidden"), mask("cell"), mask("candidate"), 1.0 / 0.6)


def case(kind: str, sizes: list[int], bias: bool = True) -> tuple[Tensor, Weights, State]:
    """Inputs of a layer, all of which want gradients."""
    gates, options = (4 if kind == "LSTM" else 3) * H, {"dtype": torch.float64, "requires_grad": True}
    biases = [torch.randn(gates, **options) if bias else None for _ in range(2)]
    weights = Weights(torch.randn(gates, F, **options), torch.randn(gates, H, **options), *biases)
    state = tuple(torch.randn(B, H, **options) for _ in range(2 if kind == "LSTM" else 1))
    return torch.randn(sum(sizes), F, **options), weights, state


def loss(hidden: Tensor, final: State) -> Tensor:
    parts = [hidden, *final]
    return sum((part * torch.linspace(-1, 2, part.numel()).reshape(part.shape)).sin().sum() for part in parts)


@kinds
@shapes
@directions
@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_autograd(
    kind: str, sizes: list[int], backwards: bool, name: str, bias: bool
) -> None:
    data, weights, state = case(kind, sizes, bias)
    noise = noise_of(name, len(sizes))
    fast, plain = (path(data, sizes, weights, state, noise, backwards) for path in (run_fast, run))
    assert "Recorded" in fast[0].grad_fn.name()
    assert "Recorded" not in plain[0].grad_fn.name()
    for a, b in zip([fast[0], *fast[1]], [plain[0], *plain[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    leaves = [data, *(weight for weight in weights if weight is not None), *state]
    ours, theirs = (torch.autograd.grad(loss(*result), leaves) for result in (fast, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@kinds
@shapes
def test_second_derivatives_are_those_of_autograd(kind: str, sizes: list[int]) -> None:
    data, weights, state = case(kind, sizes)
    noise, found = noise_of("all", len(sizes)), []
    for path in (run_fast, run):
        leaves = [data, weights.weight_hh, *state]
        first = torch.autograd.grad(loss(*path(data, sizes, weights, state, noise, False)), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum((one**2).sum() for one in first), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@kinds
def test_batches_of_gradients(kind: str) -> None:
    data, weights, state = case(kind, SIZES["packed"])
    hidden = run_fast(data, SIZES["packed"], weights, state, noise_of("all", 4), False)[0]
    vectors = torch.randn(3, *hidden.shape, dtype=torch.float64)
    leaves = [data, weights.weight_hh]
    batched = torch.autograd.grad(hidden, leaves, vectors, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        for a, b in zip(batched, torch.autograd.grad(hidden, leaves, vectors[n], retain_graph=True), strict=True):
            torch.testing.assert_close(a[n], b)


@kinds
def test_frozen_weights_and_unused_results(kind: str) -> None:
    data, weights, state = case(kind, SIZES["padded"])
    noise = noise_of("all", 4)
    frozen = Weights(*(weight.detach() for weight in weights if weight is not None))
    for fixed in (weights, frozen):
        start = data.detach() if fixed is weights else data
        found = []
        for path in (run_fast, run):
            final = path(start, SIZES["padded"], fixed, state, noise, False)[1]
            leaf = weights.weight_ih if fixed is weights else data
            found.append(torch.autograd.grad(final[-1].sum(), leaf)[0])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@kinds
@pytest.mark.parametrize("why", ["half", "no grad", "expectation", "vmap", "autocast", "dual"])
def test_other_cases_take_the_general_road(kind: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, weights, state = case(kind, SIZES["padded"])
    noise: Any = noise_of("all", 4)
    if why == "half":
        data, state = data.detach().half().requires_grad_(), tuple(part.half() for part in state)
        weights = Weights(*(weight.half() for weight in weights if weight is not None))
    if why == "expectation":
        noise = Noise(hidden=0.7)

    def call(data: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"):
            hidden, _ = run_fast(data, SIZES["padded"], weights, state, noise, False)
        assert hidden.grad_fn is None or "Recorded" not in hidden.grad_fn.name()
        return hidden

    if why == "no grad":
        with torch.no_grad():
            call(data)
    elif why == "vmap":
        torch.func.vmap(call)(data.detach()[None])
    elif why == "dual":
        torch.func.jvp(call, (data.detach(),), (torch.ones_like(data),))
    else:
        call(data)


def test_projections_take_the_general_road() -> None:
    layer = ZoneoutLSTM(F, H, proj_size=2)
    output, _ = layer(torch.randn(2, B, F))
    output.sum().backward()
    assert layer.weight_hr_l0.grad.any()


@kinds
def test_gradients_that_are_not_finite_stay_in_their_rows(kind: str) -> None:
    """A row of the batch is its own: what overflows in one does not reach another."""
    data, weights, state = case(kind, SIZES["padded"])
    hidden, _ = run_fast(data, SIZES["padded"], weights, state, noise_of("all", 4), False)
    vector = torch.ones_like(hidden)
    vector[-B] = torch.inf  # row 0 of the last step
    (found,) = torch.autograd.grad(hidden, data, vector)
    assert found.unflatten(0, (4, B))[:, 1:].isfinite().all()
    assert not found.unflatten(0, (4, B))[:, 0].isfinite().all()

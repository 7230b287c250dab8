"""Dropout with a residual addition: `dropout_add`, `bias_dropout_add` and their modules."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.enumeration import expectation, masks
from tests.seeding import seeded
from tests.strategies import DTYPES
from torchdrop import functional as TF
from torchdrop import kernels


def add(x: Tensor, residual: Tensor, bias: Tensor | None = None, **rate: Any) -> Tensor:
    if bias is None:
        return TF.dropout_add(x, residual, **rate)
    return TF.bias_dropout_add(x, bias, residual, **rate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_composition_of_the_parts_under_the_same_seed(
    dtype: torch.dtype, biased: bool, device: torch.device
) -> None:
    """Of half types, in float32 with one rounding."""
    wide = kernels.COMPUTE_DTYPE[dtype]
    x, residual, bias = (torch.randn(s).to(device, dtype).requires_grad_() for s in ((50, 33), (50, 33), (33,)))
    y = seeded(3, add, x, residual, bias if biased else None, p=0.3)
    whole = x.to(wide) + bias.to(wide) if biased else x.to(wide)
    assert torch.equal(y, (residual.to(wide) + seeded(3, TF.dropout, whole, 0.3)).to(dtype))
    parts = residual + seeded(3, TF.dropout, x + bias if biased else x, 0.3)
    g, wanted = torch.randn_like(y), [x, residual, bias][: 2 + biased]
    for ours, theirs in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(parts, wanted, g), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("biased", [False, True])
def test_expectation_is_the_sum_by_enumeration(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual, bias = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    given = bias if biased else None
    found = expectation((add(x, residual, given, p=0.4), weight) for _, weight in masks(monkeypatch, (4,), 0.6))
    torch.testing.assert_close(found, residual + x + (bias if biased else 0), rtol=1e-12, atol=1e-12)


def test_the_gradient_has_forwards_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    for kept, _ in masks(monkeypatch, (4,), 0.6):
        x = torch.ones(4, dtype=torch.float64, requires_grad=True)
        y = TF.dropout_add(x, torch.zeros_like(x), keep_prob=0.6)
        (g,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y != 0, kept)
        assert torch.equal(g, y.detach())


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_rates_zero_and_one_and_eval_mode(p: float) -> None:
    x, residual, bias = torch.randn(20, 4), torch.randn(20, 4), torch.randn(4)
    plain, biased = torchdrop.DropoutAdd(p), torchdrop.BiasDropoutAdd(p)
    assert torch.equal(plain.eval()(x, residual), residual + x)
    assert torch.equal(biased.eval()(x, bias, residual), residual + (x + bias))
    assert torch.equal(TF.dropout_add(x, residual, p, False), residual + x)
    if p == 0.0:
        assert torch.equal(plain.train()(x, residual), residual + x)
    if p == 1.0:
        assert torch.equal(plain.train()(x, residual), residual)
        assert torch.equal(biased.train()(x, bias, residual), residual)


def test_a_dropped_element_is_the_residual_whatever_it_was(device: torch.device) -> None:
    x, residual = torch.tensor([math.inf, math.nan] * 500, device=device), torch.randn(1000, device=device)
    y = TF.dropout_add(x, residual)
    dropped = y.isfinite()
    assert 300 < dropped.sum() < 700
    assert torch.equal(y[dropped], residual[dropped])


def test_a_key_is_drawn_at_every_rate() -> None:
    x, after = torch.randn(8), []
    for p in (0.0, 0.5, 1.0):
        seeded(1, TF.dropout_add, x, x, p)
        after.append(torch.get_rng_state())
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[1], after[2])
    generator = torch.Generator().manual_seed(2)
    state = torch.get_rng_state()
    first = TF.dropout_add(x, x, generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, TF.dropout_add(x, x, generator=generator.manual_seed(2)))


@pytest.mark.parametrize("bias_shape", [(), (1,), (5,), (4, 1), (3, 4, 5), (1, 1, 5)])
def test_a_bias_broadcasts(bias_shape: tuple[int, ...]) -> None:
    x, residual, bias = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(bias_shape, requires_grad=True)
    y = seeded(1, TF.bias_dropout_add, x, bias, residual)
    expected = residual + seeded(1, TF.dropout, x + bias)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, bias, g)[0], torch.autograd.grad(expected, bias, g)[0])


def test_rates_can_be_a_tensor() -> None:
    x, residual = torch.ones(100, 3), torch.zeros(100, 3)
    y = torchdrop.DropoutAdd(keep_prob=torch.tensor([0.0, 0.5, 1.0]))(x, residual)
    assert torch.equal(y[:, 0], residual[:, 0])
    assert sorted(y[:, 1].unique().tolist()) == [0.0, 2.0]
    assert torch.equal(y[:, 2], x[:, 2])


@pytest.mark.parametrize("biased", [False, True])
def test_under_autocast_all_are_brought_to_the_widest_dtype(biased: bool) -> None:
    x, residual, bias = torch.randn(6, 8).bfloat16(), torch.randn(6, 8), torch.randn(8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = seeded(1, add, x, residual, bias if biased else None, p=0.5)
    assert y.dtype == torch.float32
    whole = x.float() + bias.float() if biased else x.float()
    assert torch.equal(y, residual + seeded(1, TF.dropout, whole, 0.5))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_finds_its_mask_again(use_reentrant: bool, device: torch.device) -> None:
    layer, x = torchdrop.DropoutAdd(0.5), torch.randn(200, device=device, requires_grad=True)

    def segment(x: Tensor) -> Tensor:
        return torch.tanh(layer(x.sin(), x)).cos()

    plain = seeded(1, segment, x)
    again = seeded(1, checkpoint, segment, x, use_reentrant=use_reentrant)
    assert torch.equal(plain, again)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    again.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


def test_frozen_masks_monte_carlo_and_disabled_reach_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), torchdrop.BiasDropoutAdd(0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.second(torch.relu(self.first(x)))
            return self.drop(h, self.second.bias, x)

    model, x = Block(), torch.randn(5, 8)
    with torchdrop.frozen_masks(model, seed=1):
        assert torch.equal(model(x), model(x))
    model.eval()
    with torchdrop.mc_dropout(model, seed=1) as report:
        first, second, fewer = model(x), model(x), model(x[:2])
    assert [(source.kind, source.replayable) for source in report.sources] == [("torchdrop", True)]
    assert not torch.equal(first, second)
    assert not torch.equal(first, model(x))
    runs = [torchdrop.mc_predict(model, data, samples=6, seed=2, keep_samples=True).samples for data in (x, x[:3])]
    assert runs[0] is not None
    assert runs[1] is not None
    torch.testing.assert_close(runs[0][:, :3], runs[1])
    assert fewer.shape == (2, 8)
    expected = model(x)
    model.train()
    with torchdrop.disabled(model):
        assert torch.equal(model(x), expected)


def test_rates_are_set_by_name_and_copies_are_independent() -> None:
    model = nn.ModuleDict({"a": torchdrop.DropoutAdd(0.5), "b": torchdrop.BiasDropoutAdd(0.5)})
    assert list(torchdrop.keep_probs(model)) == ["a", "b"]
    twin = copy.deepcopy(model)
    torchdrop.set_keep_prob(model, {"*": 0.9})
    assert [round(layer.p, 6) for layer in model.values()] == [0.1, 0.1]
    assert [layer.p for layer in twin.values()] == [0.5, 0.5]
    assert not model.state_dict()
    assert repr(model["a"]) == "DropoutAdd(p=0.1)"
    assert isinstance(model["a"], nn.modules.dropout._DropoutNd)


def test_vmap_has_its_randomness_modes() -> None:
    x = torch.ones(6, 300)
    different = torch.func.vmap(lambda x: TF.dropout_add(x, x), randomness="different")(x)
    same = torch.func.vmap(lambda x: TF.dropout_add(x, x), randomness="same")(x)
    assert len({tuple(row.tolist()) for row in different}) == 6
    assert len({tuple(row.tolist()) for row in same}) == 1


X = torch.randn(4, 6)


def under_autocast(f: Any, *args: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return f(*args)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TF.dropout_add(X, X[:2]), ValueError, r"residual must have the input's shape \(4, 6\), got \(2, 6\)"),
        (lambda: TF.dropout_add(X, X[0]), ValueError, r"residual must have the input's shape \(4, 6\), got \(6,\)"),
        (
            lambda: TF.dropout_add(X, X.double()),
            ValueError,
            r"dropout_add: residual must have the input's dtype torch.float32, got torch.float64: convert one of them",
        ),
        (lambda: TF.dropout_add(X, 1.0), TypeError, "residual must be a tensor, got float"),
        (
            lambda: TF.dropout_add(X, X.to_sparse()),
            TypeError,
            "dropout_add: residual must be a strided tensor, got the layout torch.sparse_coo",
        ),
        (lambda: TF.bias_dropout_add(X, X.to_mkldnn(), X), TypeError, "bias must be a strided tensor, got the layout"),
        (lambda: TF.dropout_add(X.to_mkldnn(), X), TypeError, "dropout_add takes strided tensors, got the layout"),
        *[
            (
                lambda dtype=dtype: under_autocast(TF.dropout_add, X, X.to(dtype)),
                ValueError,
                rf"residual must have the input's dtype torch.float32, got {dtype}: convert it with residual.to\(",
            )
            for dtype in (torch.complex64, torch.int64, torch.bool)
        ],
        (lambda: TF.dropout_add([1.0], X), TypeError, "must be Tensor, not list"),
        (lambda: TF.dropout_add(X.int(), X.int()), RuntimeError, "result type Float can't be cast"),
        (
            lambda: TF.dropout_add(X, X.to("meta")),
            RuntimeError,
            "Expected all tensors to be on the same device, but dropout_add got residual on meta for an input on cpu: "
            r"move it with residual.to\('cpu'\)",
        ),
        (
            lambda: TF.bias_dropout_add(X, torch.ones(6, device="meta"), X),
            RuntimeError,
            r"got bias on meta for an input on cpu: move it with bias.to\('cpu'\)",
        ),
        (
            lambda: TF.bias_dropout_add(X, torch.ones(4), X),
            ValueError,
            r"bias must broadcast against the input's shape \(4, 6\), got \(4,\)",
        ),
        (lambda: TF.bias_dropout_add(X, torch.ones(2, 4, 6), X), ValueError, r"got \(2, 4, 6\)"),
        (lambda: TF.bias_dropout_add(X, torch.ones(6).half(), X), ValueError, "bias must have the input's dtype"),
        (lambda: TF.bias_dropout_add(X, None, X), TypeError, "bias must be a tensor, got NoneType"),
        (lambda: TF.dropout_add(X, X, 1.5), ValueError, "has to be between 0 and 1, but got 1.5"),
        (lambda: TF.dropout_add(X, X, 0.5, keep_prob=0.5), TypeError, "not both"),
        (lambda: torchdrop.DropoutAdd(-1), ValueError, "has to be between 0 and 1, but got -1"),
        (lambda: torchdrop.DropoutAdd(0.5, generator=3), TypeError, "generator must be a torch.Generator or None"),
        (
            lambda: TF.dropout_add(X.to("meta"), X.to("meta"), generator=torch.Generator()),
            ValueError,
            r"generator must be on the input's device, got a generator on cpu for an input on meta",
        ),
    ],
)
def test_wrong_arguments_are_answered_and_nothing_is_drawn(call: Any, error: type[Exception], message: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(torch.get_rng_state(), state)

"""dropout and its channel forms against torch.nn's with the same mask; shared axes; rates; messages."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchdrop
from tests.statistical import check_rate, draws_for
from tests.strategies import DTYPES, keep_probs, keys, on, shared, tensors
from torchdrop import functional as TF
from torchdrop import kernels
from torchdrop.kernels import native, reference
from torchdrop.kernels.mask_params import ONE, MaskParams, alpha, inverted, mask_params, original
from torchdrop.kernels.masking import apply_mask
from torchdrop.ops import operators

RANKS = {
    "Dropout": range(7),
    "Dropout1d": range(7),
    "Dropout2d": range(7),
    "Dropout3d": range(7),
    "AlphaDropout": range(4),
}
RANKS["FeatureAlphaDropout"] = range(6)


def outcome(f: Any) -> tuple[str, str, list[tuple[type, str]]]:
    """Result or error of a call, and its warnings, by class and leading text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = "returns", str(tuple(f().shape))
        except Exception as error:
            result = type(error).__name__, str(error)
    return *result, [(w.category, str(w.message)) for w in caught]


def native_apply(x: Tensor, kept: Tensor, drawn: MaskParams) -> Tensor:
    """The C kernel, with a mask that it did not draw."""
    return native.select(x, kept, drawn, torch.empty_like(x))


@settings(max_examples=100)
@given(tensors(), st.floats(0.0, 0.99), st.integers(0, 2**32))
def test_with_the_stock_layers_mask_output_and_gradient_are_the_stock_layers(x: Tensor, p: float, seed: int) -> None:
    """The mask is taken from torch.nn.Dropout and given to the linear map that our kernels apply."""
    layer, leaf = nn.Dropout(p), x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    theirs = layer(leaf)
    g = torch.randn(x.shape).to(x.dtype)
    (their_grad,) = torch.autograd.grad(theirs, leaf, g) if x.numel() else (torch.zeros_like(x),)
    mask = theirs != 0

    drawn = mask_params(1 - p)
    # torch.nn rounds 1 / (1 - p) to the element type first; we multiply in float32 and round once. The threshold is
    # within 2**-32 of the nominal keep probability.
    rounding = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 5e-7, torch.float64: 1e-15}[x.dtype]
    for apply in (apply_mask, native_apply) if native.library is not None else (apply_mask,):
        for mine, stock in ((apply(x, mask, drawn), theirs), (apply(g, mask, drawn), their_grad)):
            assert mine.dtype == stock.dtype
            finite = stock.isfinite() & mine.isfinite()
            torch.testing.assert_close(mine[finite], stock[finite], rtol=rounding + 2.0**-32 / (1 - p), atol=0)
            assert torch.equal(mine == 0, ~mask | (stock == 0))


@settings(max_examples=100)
@given(tensors(), st.floats(0.0, 1.0), st.integers(0, 2**32))
def test_backward_uses_the_mask_of_forward(device: torch.device, x: Tensor, k: float, seed: int) -> None:
    x = on(device, x)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    y = TF.dropout(leaf, keep_prob=k)
    g = torch.where(torch.randn(x.shape) < 0, -1.5, 0.75).to(x)
    (grad,) = torch.autograd.grad(y, leaf, g)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    kept = y != 0 if k else torch.zeros_like(y, dtype=torch.bool)
    assert torch.equal(grad, torch.where(kept, (g.to(wide) * mask_params(k).scale).to(x.dtype), 0))
    assert torch.equal(y, torch.where(kept, (x.to(wide) * mask_params(k).scale).to(x.dtype), 0))


@given(st.data(), tensors(), keep_probs, st.sampled_from([inverted, original, alpha]))
def test_masks_and_outputs_do_not_depend_on_the_device(
    device: torch.device, data: st.DataObject, x: Tensor, k: float, formula: Any
) -> None:
    key, shape = data.draw(keys()), data.draw(shared(tuple(x.shape)))
    there = key.to(device)
    for drawn in (mask_params(k, formula), mask_params(k, formula).tensor()):
        kept = kernels.keep_mask(shape, there, drawn)
        assert kept.device.type == device.type
        assert torch.equal(kept.cpu(), reference.keep_mask(shape, key, drawn))
        y = kernels.masked(on(device, x), there, drawn, shape)
        assert y.device.type == device.type
        assert torch.equal(y.cpu(), reference.masked(x, key, drawn, shape))


def enumerate_masks(k: float, n: int) -> list[tuple[Tensor, float]]:
    """All masks of n elements with the probability that each has at the keep probability that is realized."""
    q = mask_params(k).threshold / ONE
    found = []
    for bits in itertools.product([0.0, 1.0], repeat=n):
        kept = sum(bits)
        found.append((torch.tensor(bits, dtype=torch.float64), q**kept * (1 - q) ** (n - kept)))
    return found


@pytest.mark.parametrize("k", [0.1, 0.5, 0.8, 1 / 3])
def test_expectation_and_variance_by_enumeration(k: float) -> None:
    x, q = torch.tensor([1.5, -2.0, 0.25, 3.0], dtype=torch.float64), mask_params(k).threshold / ONE
    ys = [(m * x * mask_params(k).scale, w) for m, w in enumerate_masks(k, 4)]
    mean = sum(w * y for y, w in ys)
    torch.testing.assert_close(mean, x, rtol=1e-12, atol=0)
    second = sum(w * y**2 for y, w in ys)
    torch.testing.assert_close(second - mean**2, x**2 * (1 - q) / q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [0.3, 0.5, 0.9])
def test_linear_regression_gets_the_published_l2_penalty(k: float) -> None:
    """E||y - (X o M / k) w||^2 = ||y - X w||^2 + (p / k) w' diag(X'X) w (Srivastava et al., 2014, section 9.1)."""
    generator = torch.Generator().manual_seed(1)
    X, w, y = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((3, 4), (4,), (3,)))
    q = mask_params(k).threshold / ONE
    cost = sum(
        weight * ((y - (X * m.reshape(3, 4) * mask_params(k).scale) @ w) ** 2).sum()
        for m, weight in enumerate_masks(k, 12)
    )
    penalty = (1 - q) / q * (w**2 * (X**2).sum(0)).sum()
    torch.testing.assert_close(cost, ((y - X @ w) ** 2).sum() + penalty, rtol=1e-9, atol=0)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.95])
def test_the_layer_draws_each_mask_as_often_as_enumeration_says(k: float, device: torch.device) -> None:
    """Joint distribution of three neighbors, bounded error rates."""
    n = max(draws_for(w, 0.2 * w) for _, w in enumerate_masks(k, 3) if w > 0.005)
    kept = (TF.dropout(torch.ones(n, 3, device=device), keep_prob=k) != 0).double().cpu()
    for mask, w in enumerate_masks(k, 3):
        if w > 0.005:
            check_rate(int((kept == mask).all(1).sum()), n, w, 0.2 * w)


def test_original_formulation_has_its_expectation_in_eval_mode() -> None:
    x = torch.randn(50, dtype=torch.float64)
    layer = torchdrop.Dropout(keep_prob=0.3, inverted=False)
    y = layer(x)
    assert torch.equal(y[y != 0], x[y != 0])
    q = mask_params(0.3, original).threshold / ONE
    assert torch.equal(layer.eval()(x), x * q)
    assert torch.equal(TF.dropout(x, keep_prob=0.3, training=False, inverted=False), x * q)
    z = x.clone()
    assert TF.dropout(z, 0.7, False, True, inverted=False) is z
    torch.testing.assert_close(z, x * q)
    half = x.half()
    assert layer(half).dtype == torch.float16
    channels = torchdrop.Dropout2d(0.5, inverted=False)
    assert set(channels(torch.ones(4, 8, 2, 2)).unique().tolist()) == {0.0, 1.0}
    assert torch.equal(channels.eval()(torch.ones(1, 2, 2, 2)), torch.full((1, 2, 2, 2), 0.5))
    assert repr(channels) == "Dropout2d(p=0.5, inplace=False, inverted=False)"


@pytest.mark.parametrize("name", list(RANKS))
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_ranks_warnings_and_errors_are_those_of_torch_nn(name: str, train: bool, inplace: bool) -> None:
    for rank in RANKS[name]:
        theirs = outcome(lambda: getattr(nn, name)(0.5, inplace).train(train)(torch.ones([2] * rank)))  # noqa: B023
        ours = outcome(lambda: getattr(torchdrop, name)(0.5, inplace).train(train)(torch.ones([2] * rank)))  # noqa: B023
        assert ours[0] == theirs[0], rank
        leading = len("dropout1d: Expected 2D or 3D input, but received a 0D input") if ours[0] != "returns" else None
        assert ours[1][:leading] == theirs[1][:leading]
        assert [w for w, _ in ours[2]] == [w for w, _ in theirs[2]]
        for (_, mine), (_, stock) in zip(ours[2], theirs[2], strict=True):
            assert mine[:50] == stock[:50]


@pytest.mark.parametrize("rank", range(2, 7))
@pytest.mark.parametrize("name", ["Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"])
def test_channels_share_a_mask_over_the_same_axes_as_torch_nn(name: str, rank: int, device: torch.device) -> None:
    x = torch.ones([11, 12, 3, 2, 2, 2][:rank], device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = getattr(nn, name)(0.5)(x)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                getattr(torchdrop, name)(0.5)(x)
            return
        ours = getattr(torchdrop, name)(0.5)(x)
    for axis in range(rank):
        constant = [torch.equal(y, y.narrow(axis, 0, 1).expand_as(y)) for y in (ours, theirs)]
        assert constant[0] == constant[1], axis


@given(st.data(), tensors(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)))
def test_shared_axes_are_constant_and_noise_shape_says_the_same(
    device: torch.device, data: st.DataObject, x: Tensor
) -> None:
    x = on(device, x)
    axes = data.draw(st.lists(st.integers(-x.dim(), x.dim() - 1), unique_by=lambda a: a % x.dim()))
    torch.manual_seed(1)
    y = TF.dropout(x, 0.5, shared_axes=axes)
    kept = y != 0
    for axis in axes:
        assert torch.equal(kept, kept.narrow(axis, 0, 1).expand_as(kept))
    noise_shape = [1 if d in [a % x.dim() for a in axes] else None for d in range(x.dim())]
    torch.manual_seed(1)
    assert torch.equal(torchdrop.Dropout(0.5, noise_shape=noise_shape)(x), y)
    torch.manual_seed(1)
    assert torch.equal(torchdrop.Dropout(0.5, shared_axes=axes)(x), y)


def test_masks_are_independent_across_what_is_not_shared(device: torch.device) -> None:
    kept = TF.dropout(torch.ones(40, 30, 20, device=device), 0.5, shared_axes=1)[:, 0] != 0
    assert len({tuple(row.tolist()) for row in kept}) == 40
    kept = TF.dropout(torch.ones(100_000, 2, device=device), 0.5, shared_axes=1)[:, 0] != 0
    check_rate(int(kept.sum()), 100_000, 0.5, 0.05)


@pytest.mark.parametrize("shape", [(5000,), (3, 5000), (5000, 3)])
def test_a_tensor_of_rates_broadcasts_and_each_element_has_its_own(
    shape: tuple[int, ...], device: torch.device
) -> None:
    x = torch.ones(shape, requires_grad=True, device=device)
    rates = torch.rand(shape, dtype=torch.float64).to(device)
    for k in (rates, rates[..., :1], rates[:1], rates[:1].flatten()[: shape[-1]], torch.tensor(0.25), rates.float()):
        if k.dim() == 1 and len(shape) == 2 and k.shape[0] not in (1, shape[1]):
            continue
        torch.manual_seed(5)
        y = torchdrop.Dropout(keep_prob=k)(x)
        full = k.double().to(device).expand(shape)
        expected = torch.tensor([mask_params(q).scale for q in full.flatten().tolist()], device=device).reshape(shape)
        kept = y != 0
        assert torch.equal(y, torch.where(kept, expected, 0))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())
        torch.manual_seed(5)
        everywhere = TF.dropout(x, keep_prob=0.5) != 0
        assert torch.equal(kept & everywhere, torch.where(full < 0.5, kept, everywhere))


def test_a_rate_for_each_channel_or_sample_of_channel_dropout(device: torch.device) -> None:
    x = torch.ones(4096, 4, 2, 2, requires_grad=True, device=device)
    channels = torch.tensor([0.0, 0.25, 0.5, 1.0], device=device)
    y = torchdrop.Dropout2d(keep_prob=channels.reshape(4, 1, 1))(x)
    assert torch.equal(y, y[..., :1, :1].expand_as(y))
    kept = y[..., 0, 0] != 0
    check_rate(int(kept[:, 1].sum()), 4096, 0.25, 0.1)
    check_rate(int(kept[:, 2].sum()), 4096, 0.5, 0.12)
    assert not kept[:, 0].any()
    assert kept[:, 3].all()
    assert y[:, 1].unique().tolist() == [0.0, 4.0]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    samples = torch.linspace(0, 1, 4096, device=device).reshape(4096, 1, 1, 1)
    z = torchdrop.functional.dropout2d(x, keep_prob=samples)
    assert not z[0].any()
    assert z[-1].eq(1).all()


def test_rates_zero_and_one_within_a_tensor(device: torch.device) -> None:
    k = torch.tensor([[0.0], [1.0], [0.5]], device=device)
    y = TF.dropout(torch.full((3, 1000), math.nan, device=device), keep_prob=k)
    assert y[0].eq(0).all()
    assert y[1].isnan().all()
    assert 300 < y[2].isnan().sum() < 700


def test_p_and_keep_prob_are_two_views_of_one_value() -> None:
    layer = torchdrop.Dropout(0.1)
    assert (layer.p, layer.keep_prob) == (0.1, 0.9)
    layer.keep_prob = 0.8
    assert (layer.p, layer.keep_prob) == (0.2, 0.8)
    layer.p = 0.3
    assert (layer.p, layer.keep_prob) == (0.3, 0.7)
    assert repr(layer) == "Dropout(p=0.3, inplace=False)"
    assert torchdrop.Dropout(keep_prob=0.9).p == 0.1
    assert torchdrop.Dropout().p == 0.5
    layer.keep_prob = torch.tensor([0.25, 0.5])
    assert torch.equal(layer.p, torch.tensor([0.75, 0.5]))  # type: ignore[arg-type]
    assert repr(layer) == "Dropout(p=<tensor of shape (2,)>, inplace=False)"
    torch.manual_seed(0)
    assert torch.equal(layer(torch.ones(2)) % 2, torch.zeros(2))


def test_eval_mode_and_keep_prob_one_return_the_input_itself() -> None:
    x = torch.randn(2, 3, 4, 5)
    for layer in (torchdrop.Dropout, torchdrop.Dropout2d, torchdrop.AlphaDropout, torchdrop.GaussianDropout):
        state = torch.get_rng_state()
        assert layer(0.5).eval()(x) is x  # type: ignore[attr-defined]
        assert torch.equal(torch.get_rng_state(), state)
        assert layer(0.0)(x) is x  # type: ignore[attr-defined]
        assert not torch.equal(torch.get_rng_state(), state)


def test_a_layers_rate_does_not_change_the_masks_of_the_next(device: torch.device) -> None:
    x = torch.ones(2, 100, device=device)
    following = []
    for k in (0.2, 1.0):
        torch.manual_seed(0)
        torchdrop.Dropout(keep_prob=k)(x)
        following.append(torchdrop.Dropout(0.5)(x))
    assert torch.equal(*following)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [100, 50_000])
def test_in_place_writes_what_out_of_place_returns(dtype: torch.dtype, n: int, device: torch.device) -> None:
    for layer in (torchdrop.Dropout, torchdrop.AlphaDropout, torchdrop.GaussianDropout):
        x = torch.randn(n).to(device, dtype)
        torch.manual_seed(1)
        expected = layer(0.3)(x)  # type: ignore[attr-defined]
        torch.manual_seed(1)
        y = x.clone()
        assert layer(0.3, inplace=True)(y) is y  # type: ignore[attr-defined]
        assert torch.equal(y, expected)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        z = leaf * 1
        assert layer(0.3, True)(z) is z  # type: ignore[attr-defined]
        torch.manual_seed(1)
        other = x.clone().requires_grad_()
        layer(0.3)(other).sum().backward()  # type: ignore[attr-defined]
        z.sum().backward()
        assert torch.equal(leaf.grad, other.grad)  # type: ignore[arg-type]


RATES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"p": 1.5}, ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
    ({"p": -0.1}, ValueError, "dropout probability has to be between 0 and 1, but got -0.1"),
    ({"p": math.nan}, ValueError, "dropout probability has to be between 0 and 1, but got nan"),
    ({"p": "a"}, TypeError, "p must be a number or a tensor, got str"),
    ({"p": None}, TypeError, "give the rate as p or as keep_prob, got None for both"),
    ({"keep_prob": 1.5}, ValueError, "keep_prob must be in [0, 1], got 1.5"),
    ({"keep_prob": math.nan}, ValueError, "keep_prob must be in [0, 1], got nan"),
    ({"keep_prob": "0.5"}, TypeError, "keep_prob must be a number or a tensor, got str"),
    (
        {"p": 0.5, "keep_prob": 0.5},
        TypeError,
        "give the rate as p or as keep_prob, not both: got p=0.5 and keep_prob=0.5",
    ),
    ({"keep_prob": torch.tensor([0.5, 2.0])}, ValueError, "keep_prob must be in [0, 1], got 2.0"),
    ({"p": torch.tensor([-1.0])}, ValueError, "dropout probability has to be between 0 and 1, but got -1.0"),
    ({"keep_prob": torch.tensor([math.nan])}, ValueError, "keep_prob must be in [0, 1], got nan"),
    ({"keep_prob": torch.tensor([1])}, ValueError, "keep_prob must be a floating-point tensor, got torch.int64"),
    (
        {"keep_prob": torch.tensor(0.5, requires_grad=True)},
        ValueError,
        "keep_prob gets no gradient through a mask: pass keep_prob.detach()",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), RATES)
@pytest.mark.parametrize("name", [*RANKS, "GaussianDropout"])
def test_bad_rates(name: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    snake = {"AlphaDropout": "alpha_dropout", "FeatureAlphaDropout": "feature_alpha_dropout"}
    function = getattr(TF, snake.get(name, "gaussian_dropout" if name == "GaussianDropout" else name.lower()))
    state = torch.get_rng_state()
    for call in (lambda: getattr(torchdrop, name)(**arguments), lambda: function(torch.ones(2, 3, 4), **arguments)):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == message
    layer = getattr(torchdrop, name)(0.25)
    for view, value in arguments.items():
        if len(arguments) == 1:
            with pytest.raises(error):
                setattr(layer, view, value)
    assert (layer.p, layer.keep_prob) == (0.25, 0.75)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_keep_prob_cannot_be_set() -> None:
    layer = torchdrop.Dropout(0.25)
    with pytest.raises(TypeError, match=r"^keep_prob must be a number or a tensor, got NoneType$"):
        layer.keep_prob = None
    assert layer.p == 0.25


INPUTS: list[tuple[Any, type[Exception], str]] = [
    (
        torch.ones(2, 3, dtype=torch.int64),
        RuntimeError,
        "result type Float can't be cast to the desired output type Long: {} takes float16, bfloat16, float32, float64 "
        "tensors; convert the input with .float() first",
    ),
    (
        torch.ones(2, 3, dtype=torch.bool),
        RuntimeError,
        "result type Float can't be cast to the desired output type Bool: {} takes float16, bfloat16, float32, float64 "
        "tensors; convert the input with .float() first",
    ),
    (
        torch.ones(2, 3).to(torch.float8_e5m2),
        NotImplementedError,
        "{} is not implemented for torch.float8_e5m2: it takes float16, bfloat16, float32, float64 tensors",
    ),
    ([1.0, 2.0], TypeError, "{}(): argument 'input' (position 1) must be Tensor, not list"),
    (
        torch.eye(3).to_sparse(),
        TypeError,
        "{} takes strided tensors, got the layout torch.sparse_coo: apply it to the tensor of values",
    ),
]


@pytest.mark.parametrize(("x", "error", "message"), INPUTS)
@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (torchdrop.Dropout(), "dropout"),
        (torchdrop.Dropout(shared_axes=0), "dropout"),
        (torchdrop.Dropout1d(), "dropout1d"),
        (torchdrop.AlphaDropout(), "alpha_dropout"),
        (torchdrop.FeatureAlphaDropout(), "feature_alpha_dropout"),
        (torchdrop.GaussianDropout(), "gaussian_dropout"),
    ],
)
def test_bad_inputs(layer: nn.Module, name: str, x: Any, error: type[Exception], message: str) -> None:
    state = torch.get_rng_state()
    for call in (lambda: layer(x), lambda: getattr(TF, name)(x, training=True)):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == message.format(name)
    assert torch.equal(torch.get_rng_state(), state)
    if error is RuntimeError:
        with pytest.raises(RuntimeError, match=r"result type Float can't be cast"):
            nn.Dropout()(x)


AXES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"shared_axes": 2}, ValueError, "shared_axes must be in [-2, 2) for a 2-D input, got 2"),
    ({"shared_axes": [0, -2]}, ValueError, "shared_axes must name each axis once, got (0, -2)"),
    ({"shared_axes": [0.5]}, TypeError, "shared_axes must be integers, got 0.5"),
    ({"shared_axes": 0, "noise_shape": (1, 3)}, TypeError, "give shared_axes or noise_shape, not both"),
    (
        {"noise_shape": (1,)},
        ValueError,
        "noise_shape must have a size for each of the input's 2 dimensions, got (1,)",
    ),
    (
        {"noise_shape": (2, 2)},
        ValueError,
        "noise_shape must hold 1, None or the input's size: (2, 2) for an input of (2, 3)",
    ),
    (
        {"keep_prob": torch.full((4,), 0.5)},
        ValueError,
        "keep_prob of shape (4,) does not broadcast against the mask's shape (2, 3)",
    ),
    (
        {"keep_prob": torch.full((3,), 0.5), "shared_axes": 1},
        ValueError,
        "keep_prob of shape (3,) does not broadcast against the mask's shape (2, 1)",
    ),
    (
        {"keep_prob": torch.full((1, 1, 1), 0.5)},
        ValueError,
        "keep_prob of shape (1, 1, 1) does not broadcast against the mask's shape (2, 3)",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), AXES)
def test_bad_axes_and_shapes(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    x, state = torch.ones(2, 3), torch.get_rng_state()
    for call in (lambda: TF.dropout(x, **arguments), lambda: torchdrop.Dropout(**arguments)(x)):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == message
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layer", [torchdrop.Dropout(0.5, True), torchdrop.GaussianDropout(0.5, True)])
@pytest.mark.parametrize("n", [10, 50_000])
def test_what_must_not_be_written_to_is_left_alone(layer: nn.Module, n: int) -> None:
    leaf = torch.ones(n, 2, requires_grad=True)
    cases = [
        (leaf, "a leaf Variable that requires grad is being used in an in-place operation."),
        (leaf[0], "a view of a leaf Variable that requires grad is being used in an in-place operation."),
        (torch.ones(1).expand(n), "unsupported operation: more than one element of the written-to tensor refers to"),
    ]
    state = torch.get_rng_state()
    for x, message in cases:
        with pytest.raises(RuntimeError) as raised:
            layer(x)
        assert str(raised.value).startswith(message)
        assert x.eq(1).all()
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng(devices=[]), pytest.raises(RuntimeError, match=re.escape(message[:40])):
            nn.Dropout(0.5, True)(x)


def test_an_overwritten_tensor_that_backward_needs_is_noticed(device: torch.device) -> None:
    for grad_enabled in (True, False):
        a = torch.randn(10, requires_grad=True, device=device)
        y = a.exp()
        with torch.set_grad_enabled(grad_enabled):
            torchdrop.Dropout(0.5, inplace=True)(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_empty_and_scalar_tensors(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, requires_grad=True)
    for layer in (torchdrop.Dropout(0.5), torchdrop.AlphaDropout(0.5), torchdrop.GaussianDropout(0.5)):
        y = layer(x)
        assert y.shape == x.shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("name", list(RANKS))
def test_layers_are_found_by_those_who_look_for_torch_nns(name: str) -> None:
    layer = getattr(torchdrop, name)(0.5)
    assert isinstance(layer, getattr(nn, name))
    assert isinstance(layer, nn.modules.dropout._DropoutNd)
    assert not list(layer.parameters())
    assert not list(layer.buffers())
    assert not layer.state_dict()


def test_memory_formats_are_kept(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    for layer in (torchdrop.Dropout(), torchdrop.Dropout2d(), torchdrop.AlphaDropout(), torchdrop.GaussianDropout()):
        torch.manual_seed(0)
        y = layer(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.manual_seed(0)
        assert torch.equal(layer(x.contiguous()), y)


def test_the_key_alone_decides_the_mask(device: torch.device) -> None:
    x, key = torch.randn(64, 33, device=device), torch.tensor([5, 6], device=device)
    y = operators.masked(x, key, mask_params(0.5, inverted), x.shape)
    torch.rand(7, device=device)
    assert torch.equal(operators.masked(x, key.clone(), mask_params(0.5, inverted), x.shape), y)
    for step in ([1, 0], [0, 1]):
        other = key + torch.tensor(step, device=device)
        assert not torch.equal(operators.masked(x, other, mask_params(0.5, inverted), x.shape), y)

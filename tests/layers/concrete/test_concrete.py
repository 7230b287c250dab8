"""Concrete dropout: the limit, the gradient in the rate, the bias and its correction, and what every layer must do."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.seeding import seeded
from torchdrop import functional as TF
from torchdrop.core import sites
from torchdrop.layers.concrete.concrete import ConcreteDropout, concrete_dropout

HALVES = [torch.float16, torch.bfloat16]


def logit(p: float) -> float:
    return math.log(p) - math.log(1 - p)


def evenly(monkeypatch: pytest.MonkeyPatch, n: int) -> Tensor:
    """An input of n ones whose uniforms are the midpoints of n equal parts of (0, 1): a mean is an integral over u."""
    words = (torch.arange(n) * 2 + 1) * 2**31 // n
    monkeypatch.setattr(sites, "random_bits", lambda *_: words)
    return torch.ones(n, dtype=torch.float64)


def mean_gate(p: float, t: float, n: int = 2**18) -> float:
    """E[1 - z] by the midpoint rule in u: another integral than the one in the package."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.sigmoid(-(logit(p) + torch.logit(u)) / t).mean().item()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_definition(p: float) -> None:
    x = torch.randn(50, 8, dtype=torch.float64)
    u = seeded(3, sites.uniform, x, x.shape)
    z = 1 / (1 + (p / (1 - p) * u / (1 - u)) ** (-1 / 0.7))
    y = seeded(3, concrete_dropout, x, logit(p), temperature=0.7)
    torch.testing.assert_close(y, x * (1 - z) / (1 - p), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_temperature_to_zero_gives_bernoulli_with_the_mask_of_dropout(dtype: torch.dtype, p: float) -> None:
    x = torch.ones(4000, dtype=dtype)
    hard = seeded(3, TF.dropout, x, p)
    soft = {t: seeded(3, concrete_dropout, x, logit(p), temperature=t) for t in (1.0, 0.3, 0.1, 1e-2, 1e-6)}
    distances = [(y - hard).abs().mean().item() for y in soft.values()]
    assert all(near < far for far, near in pairwise(distances))
    torch.testing.assert_close(soft[1e-6], hard, rtol=1e-6, atol=1e-6)
    assert torch.equal(soft[0.1] * (1 - p) > 0.5, hard > 0), "the relaxed mask is nearer to the hard one than to none"


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("p", "t"), [(0.02, 2 / 3), (0.5, 0.1), (0.9, 2 / 3)])
def test_gradients_in_p_against_finite_differences(p: float, t: float, unbiased: bool) -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([[p], [p / 2], [p]], dtype=torch.float64).logit().requires_grad_()

    def f(x: Tensor, rate: Tensor) -> Tensor:
        return seeded(3, concrete_dropout, x, rate, temperature=t, unbiased=unbiased)

    assert torch.autograd.gradcheck(f, (x, rate))
    scalar = torch.tensor(logit(p), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: f(x.detach(), s), scalar)
    assert torch.autograd.gradgradcheck(f, (x[:1].detach().requires_grad_(), scalar), fast_mode=True)


def test_backward_has_the_mask_of_forward() -> None:
    x = torch.ones(500, requires_grad=True)
    y = ConcreteDropout(0.3)(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())


@pytest.mark.parametrize("unbiased", [False, True])
def test_what_backward_keeps(unbiased: bool) -> None:
    x, rate = torch.ones(1000, 16, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = concrete_dropout(x, rate, unbiased=unbiased)
    kept.pop(x.data_ptr())
    assert 8 * x.numel() <= sum(kept.values()) < 8 * x.numel() + 10_000
    y.sum().backward()


def test_the_relaxations_bias_is_that_of_numerical_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    x = evenly(monkeypatch, 2**18)
    mean = concrete_dropout(x, logit(0.3), temperature=2 / 3).mean().item()
    assert 0.945 < mean < 0.946
    assert mean == pytest.approx(mean_gate(0.3, 2 / 3, 2**19) / 0.7, abs=1e-6)
    assert concrete_dropout(x, 0.0, temperature=2 / 3).mean().item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("t", [0.05, 0.1, 2 / 3, 1.0])
@pytest.mark.parametrize("p", [0.001, 0.3, 0.5, 0.97])
def test_unbiased_keeps_the_expectation(monkeypatch: pytest.MonkeyPatch, p: float, t: float) -> None:
    x = evenly(monkeypatch, 2**18)
    y = concrete_dropout(x, logit(p), temperature=t, unbiased=True)
    assert y.mean().item() == pytest.approx(1.0, abs=3e-6)
    plain = concrete_dropout(x, logit(p), temperature=t)
    torch.testing.assert_close(y, plain * ((1 - p) / mean_gate(p, t)), rtol=3e-6, atol=0)


def test_the_correction_is_accurate_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """At t = 1 the integral is elementary: with a = e^(logit p), E[1 - z] = (a ln a - a + 1) / (a - 1)^2."""
    for p in (1e-6, 0.01, 0.3, 0.8, 0.9999):
        a = p / (1 - p)
        expected = (a * math.log(a) - a + 1) / (a - 1) ** 2
        monkeypatch.setattr(sites, "random_bits", lambda like, shape, _: torch.full(shape, 2**31))
        x = torch.ones(1, dtype=torch.float64)
        ratio = concrete_dropout(x, logit(p), temperature=1.0) / concrete_dropout(
            x, logit(p), temperature=1.0, unbiased=True
        )
        assert ratio.item() * (1 - p) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-1000.0, -60.0, 60.0, 1000.0])
def test_extreme_logits_stay_finite(value: float, dtype: torch.dtype, unbiased: bool) -> None:
    rate = torch.tensor(value, dtype=dtype, requires_grad=True)
    for t in (0.01, 0.1, 1.0):
        y = concrete_dropout(torch.ones(5000, dtype=dtype), rate, temperature=t, unbiased=unbiased)
        (slope,) = torch.autograd.grad(y.sum(), rate)
        assert y.isfinite().all()
        assert slope.isfinite()
        if value < 0:
            torch.testing.assert_close(y, torch.ones_like(y))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("unbiased", [False, True])
def test_half_types_are_computed_in_float32_and_rounded_once(dtype: torch.dtype, unbiased: bool) -> None:
    x = torch.randn(3000).to(dtype)
    rate = torch.tensor(-1.0, requires_grad=True)
    y = seeded(3, concrete_dropout, x, rate, unbiased=unbiased)
    assert y.dtype == dtype
    assert torch.equal(y, seeded(3, concrete_dropout, x.float(), rate, unbiased=unbiased).to(dtype))
    assert y.isfinite().all()
    assert (y != 0).float().mean() > 0.6
    assert torch.autograd.grad(y.float().sum(), rate)[0].isfinite()
    layer = ConcreteDropout(0.3).to(dtype)
    assert layer(x).dtype == dtype


def test_a_mask_can_be_shared_and_is_laid_out_like_the_input() -> None:
    x = torch.randn(4, 6, 5, 3)
    strided = x.contiguous(memory_format=torch.channels_last)
    for options in ({}, {"shared_axes": (-2, -1)}, {"noise_shape": (None, None, 1, 1)}, {"shared_axes": 0}):
        y = seeded(3, concrete_dropout, x, -1.0, **options)
        z = seeded(3, concrete_dropout, strided, -1.0, **options)
        assert torch.equal(y, z)
        assert y.is_contiguous()
        assert z.is_contiguous(memory_format=torch.channels_last)
    gate = seeded(3, concrete_dropout, torch.ones_like(x), -1.0, temperature=1.0, shared_axes=(2, 3))
    assert torch.equal(gate, gate[:, :, :1, :1].expand_as(gate))
    assert gate[:, :, 0, 0].unique().numel() == 24
    permuted = torch.randn(5, 4).t()
    assert torch.equal(
        seeded(3, concrete_dropout, permuted, 0.0), seeded(3, concrete_dropout, permuted.contiguous(), 0.0)
    )


def test_eval_mode_returns_the_input_itself_and_draws_nothing() -> None:
    x = torch.randn(5)
    layer = ConcreteDropout(0.4).eval()
    before = torch.get_rng_state()
    assert layer(x) is x
    assert concrete_dropout(x, 0.0, False) is x
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(0, 4), ()])
def test_empty_inputs_and_scalars(shape: tuple[int, ...]) -> None:
    assert concrete_dropout(torch.ones(shape), 0.0).shape == shape


def test_seeds_generators_and_frozen_masks() -> None:
    x, layer = torch.ones(40), ConcreteDropout(0.5)
    assert torch.equal(seeded(3, layer, x), seeded(3, layer, x))
    assert not torch.equal(layer(x), layer(x))
    own = ConcreteDropout(0.5, generator=torch.Generator().manual_seed(1))
    first = own(x)
    assert torch.equal(concrete_dropout(x, own.logit_p, generator=torch.Generator().manual_seed(1)), first)
    with torchdrop.frozen_masks(layer, seed=1):
        y, again, fewer = layer(x), layer(x), layer(x[:7])
    assert torch.equal(y, again)
    torch.testing.assert_close(y[:7], fewer)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(randomness: str) -> None:
    layer = ConcreteDropout(0.5)
    out = vmap(layer, randomness=randomness)(torch.ones(3, 50))
    assert torch.equal(out[0], out[1]) == (randomness == "same")


def test_vmap_over_models_with_rates_of_their_own() -> None:
    layers = [ConcreteDropout(p, temperature=1.0).double() for p in (0.1, 0.5, 0.9)]
    parameters, buffers = stack_module_state(layers)  # type: ignore[arg-type]
    x = torch.ones(60, dtype=torch.float64)
    out = vmap(lambda p, b: functional_call(layers[0], (p, b), x), randomness="same")(parameters, buffers)
    rates = parameters["logit_p"].unsqueeze(1)
    noise = -torch.logit(out * torch.sigmoid(-rates)) - rates
    torch.testing.assert_close(noise, noise[:1].expand(3, 60), rtol=1e-6, atol=1e-6)
    assert noise[0].unique().numel() == 60


def test_functional_gradients_and_checkpointing() -> None:
    layer, x = ConcreteDropout(0.5), torch.ones(30)
    rate = layer.logit_p.detach()
    slope = seeded(3, grad(lambda s: concrete_dropout(x, s).sum()), rate)
    seeded(3, layer, x).sum().backward()
    torch.testing.assert_close(slope, layer.logit_p.grad)
    recomputed = torch.autograd.grad(seeded(3, checkpoint, layer, x, use_reentrant=False).sum(), layer.logit_p)
    assert torch.equal(recomputed[0], layer.logit_p.grad)


@pytest.mark.slow
def test_compiles_once_for_all_rates_with_the_masks_of_eager_mode() -> None:
    for unbiased in (False, True):
        torch._dynamo.reset()
        layer, x = ConcreteDropout(0.5, unbiased=unbiased), torch.randn(8, 16)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for p in (0.2, 0.5, 0.9):
            layer.p = p
            (torch.manual_seed(3), compiled(x).sum().backward())
            slope, layer.logit_p.grad = layer.logit_p.grad, None
            torch.testing.assert_close(seeded(3, compiled, x), seeded(3, layer, x))
            (torch.manual_seed(3), layer(x).sum().backward())
            torch.testing.assert_close(slope, layer.logit_p.grad)
            layer.logit_p.grad = None
        assert counter.frame_count == 1


@pytest.mark.parametrize("layer", [ConcreteDropout(0.5), ConcreteDropout(0.5, temperature=2 / 3, unbiased=True)])
def test_monte_carlo_fires_with_relaxed_masks_row_by_row(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Identity(), layer).eval()
    x = torch.ones(7, 30)
    with torchdrop.mc_dropout(model, seed=1) as report:
        first, second = model(x), model(x)
        assert len(report.active) == 1
    with torchdrop.mc_dropout(model, seed=1):
        fewer = model(x[:2])
    torch.testing.assert_close(first[:2], fewer)
    assert not torch.equal(first, second)
    assert first.unique().numel() > 100, "relaxed, not hard"
    assert model(x) is x
    means = [
        torchdrop.mc_predict(model, x, samples=32, seed=3, strategy=s, chunk=c, task="regression").mean
        for s, c in (("loop", None), ("auto", 8), ("auto", None))
    ]
    torch.testing.assert_close(means[1], means[0])
    torch.testing.assert_close(means[2], means[0])


def test_disabled_turns_it_off() -> None:
    model, x = nn.Sequential(ConcreteDropout(0.5)), torch.ones(9)
    with torchdrop.disabled(model):
        assert torch.equal(model(x), x)
    assert not torch.equal(model(x), x)


def test_a_learned_rate_is_no_rate_to_set_by_name() -> None:
    model = nn.Sequential(ConcreteDropout(0.5), torchdrop.Dropout(0.2))
    assert torchdrop.keep_probs(model) == {"1": 0.8}
    torchdrop.set_keep_prob(model, {"*": 0.6})
    assert torchdrop.keep_probs(model) == {"1": 0.6}
    assert model[0].p.item() == 0.5
    with pytest.raises(ValueError, match="'0'"):
        torchdrop.set_keep_prob(model, {"0": 0.3})


def test_p_and_keep_prob_are_two_views_of_the_parameter() -> None:
    layer = ConcreteDropout(0.2)
    assert layer.p.item() == pytest.approx(0.2)
    assert layer.keep_prob.item() == pytest.approx(0.8)
    assert list(layer.state_dict()) == ["logit_p"]
    parameter = layer.logit_p
    layer.keep_prob = 0.9
    assert layer.logit_p is parameter
    assert layer.p.item() == pytest.approx(0.1)
    layer.p = torch.tensor(0.75)
    assert layer.logit_p.item() == pytest.approx(math.log(3))
    layer.p.backward()
    assert layer.logit_p.grad is not None
    assert layer.logit_p.grad.item() == pytest.approx(0.75 * 0.25)
    assert ConcreteDropout().p.item() == pytest.approx(0.1)
    assert ConcreteDropout(1e-20).p.item() == pytest.approx(1e-20)


def test_rates_can_be_one_for_each_feature() -> None:
    layer, x = ConcreteDropout(torch.tensor([0.01, 0.5, 0.99]), temperature=1e-3), torch.ones(4000, 3)
    kept = (layer(x) > 0).float().mean(0)
    assert kept[0] > 0.97
    assert 0.4 < kept[1] < 0.6
    assert kept[2] < 0.03
    layer(x).sum().backward()
    assert layer.logit_p.grad.shape == (3,)
    layer.p = 0.25
    torch.testing.assert_close(layer.p, torch.full((3,), 0.25))
    assert repr(layer) == "ConcreteDropout(p=<tensor of shape (3,)>, temperature=0.001)"


def test_copies_pickles_and_states() -> None:
    layer = ConcreteDropout(0.3, temperature=0.5, shared_axes=1, unbiased=True)
    x = torch.ones(4, 5)
    other = ConcreteDropout(0.9, temperature=0.5, shared_axes=1, unbiased=True)
    other.load_state_dict(layer.state_dict())
    expected = seeded(3, concrete_dropout, x, layer.logit_p, temperature=0.5, shared_axes=1, unbiased=True)
    assert torch.equal(seeded(3, layer, x), expected)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(seeded(3, copied, x), seeded(3, layer, x))
    assert repr(layer) == "ConcreteDropout(p=0.3, temperature=0.5, shared_axes=1, unbiased=True)"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ConcreteDropout(0.0), ValueError, r"^p must be strictly between 0 and 1 to be learned, got 0.0"),
        (lambda: ConcreteDropout(keep_prob=1), ValueError, r"^keep_prob must be strictly between 0 and 1 to be"),
        (lambda: ConcreteDropout(torch.tensor([0.5, 0.0])), ValueError, r"got a tensor from 0.0 to 0.5: its logit"),
        (lambda: ConcreteDropout(1.5), ValueError, r"^dropout probability has to be between 0 and 1, but got 1.5$"),
        (lambda: ConcreteDropout(keep_prob=math.nan), ValueError, r"^keep_prob must be in \[0, 1\], got nan$"),
        (lambda: ConcreteDropout("a"), TypeError, r"^p must be a number or a tensor, got str$"),
        (lambda: ConcreteDropout(0.1, keep_prob=0.9), TypeError, r"^give the rate as p or as keep_prob, not both"),
        (lambda: ConcreteDropout(temperature=0.0), ValueError, r"^temperature must be in \(0, 1\], got 0.0: ab"),
        (lambda: ConcreteDropout(temperature=1.5), ValueError, r"^temperature must be in \(0, 1\], got 1.5"),
        (lambda: ConcreteDropout(temperature="a"), TypeError, r"^temperature must be a number, got str$"),
        (
            lambda: ConcreteDropout(shared_axes=1, noise_shape=(1,)),
            TypeError,
            r"^give shared_axes or noise_shape, not",
        ),
        (lambda: ConcreteDropout(generator=3), TypeError, r"^generator must be a torch.Generator or None, got int$"),
        (lambda: concrete_dropout(torch.ones(2), "a"), TypeError, r"^logit_p must be a number or a tensor, got str$"),
        (lambda: concrete_dropout(torch.ones(2), math.inf), ValueError, r"^logit_p must be finite, got inf$"),
        (lambda: concrete_dropout(torch.ones(2), torch.ones(2).long()), ValueError, r"must be a floating-point tensor"),
        (
            lambda: concrete_dropout(torch.ones(2, 3), torch.ones(2)),
            ValueError,
            r"^logit_p of shape \(2,\) does not broadcast against the mask's shape \(2, 3\)$",
        ),
        (lambda: concrete_dropout(torch.ones(2), torch.ones(1, 1)), ValueError, r"does not broadcast against the mask"),
        (
            lambda: concrete_dropout(torch.ones(2, 3), torch.ones(3), shared_axes=1),
            ValueError,
            r"^logit_p of shape \(3,\) does not broadcast against the mask's shape \(2, 1\)$",
        ),
        (lambda: concrete_dropout(torch.ones(2).long(), 0.0), RuntimeError, r"^result type Float can't be cast to"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_drawn(call: Any, error: type[Exception], message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bad_rate_leaves_the_layer_as_it_was() -> None:
    layer = ConcreteDropout(0.25)
    for value in (0.0, 1, math.nan, torch.tensor([0.5]), None):
        with pytest.raises((ValueError, TypeError)):
            layer.p = value
        with pytest.raises((ValueError, TypeError)):
            layer.keep_prob = value
    assert layer.p.item() == 0.25

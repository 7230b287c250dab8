"""Standout: eval mode is the expectation of training, masks follow the layer's own response."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.seeding import seeded
from tests.statistical import check_rate, draws_for
from torchdrop import functional as TF
from torchdrop import kernels, random
from torchdrop.core import sites
from torchdrop.kernels.mask_params import mask_params, params_tensor
from torchdrop.layers.standout import Standout, _thresholds, standout


def test_eval_is_the_expectation_of_training_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Standout(nn.Linear(3, 4), alpha=1.5, beta=-0.5).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    a = layer.layer(x)
    pi = 1 / (1 + torch.exp(-(1.5 * a - 0.5)))
    mean, total = torch.zeros(2, 4, dtype=torch.float64), 0.0
    for bits in itertools.product((False, True), repeat=8):
        mask = torch.tensor(bits).reshape(2, 4)
        words = torch.where(mask, 0, 2**32 - 1)
        monkeypatch.setattr(sites, "random_bits", lambda *_, words=words: words)
        weight = torch.where(mask, pi, 1 - pi).prod().item()
        mean, total = mean + weight * layer(x), total + weight
    assert total == pytest.approx(1.0)
    torch.testing.assert_close(mean, layer.eval()(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mean, a.relu() * pi, rtol=1e-12, atol=1e-14)


def test_each_element_is_kept_with_its_own_probability(backend: str) -> None:
    """Exactly: where its draw is below the probability times 2**32."""
    x = torch.ones(40, 30)
    pi = torch.rand(40, 30)
    pi[0], pi[1] = 0.0, 1.0
    y = seeded(3, standout, x, keep_prob=pi)
    torch.manual_seed(3)
    draws = kernels.random_bits((40, 30), random.draw_key(x.device))
    assert torch.equal(y, (draws < (pi.double() * 2**32).round()).float())
    assert torch.equal(y[0], torch.zeros(30))
    assert torch.equal(y[1], torch.ones(30))


def test_thresholds_are_those_of_laws() -> None:
    rates = [0.0, 1e-300, 2.0**-33, 2.0**-32, 0.3, 0.5, 1 - 2.0**-24, 1 - 2.0**-33, 1 - 2.0**-53, 1.0]
    expected = params_tensor(torch.tensor(rates, dtype=torch.float64))[:, 0]
    assert torch.equal(_thresholds(torch.tensor(rates, dtype=torch.float64), expected.device), expected)
    assert _thresholds(torch.tensor([0.0, 1.0]), expected.device).tolist() == [0, 2**32]
    assert expected.tolist() == [mask_params(rate).threshold for rate in rates]


@pytest.mark.slow
def test_rates_of_many_draws() -> None:
    n = draws_for(0.3, 0.01)
    pi = torch.tensor([0.05, 0.3, 0.9])
    kept = standout(torch.ones(n, 3), keep_prob=pi).sum(0)
    for column, rate in enumerate(pi.tolist()):
        check_rate(int(kept[column]), n, rate, 0.01)


def test_with_alpha_zero_it_is_dropout_in_its_original_formulation() -> None:
    layer = Standout(nn.Linear(5, 50), alpha=0.0, beta=math.log(3))
    x = torch.randn(8, 5)
    h = layer.layer(x).relu()
    expected = seeded(3, TF.dropout, h, keep_prob=torch.tensor(3.0).log().sigmoid().item(), inverted=False)
    assert torch.equal(seeded(3, layer, x), expected)
    torch.testing.assert_close(layer.eval()(x), 0.75 * h)


def test_strong_responses_are_kept_more_often() -> None:
    layer = Standout(nn.Identity(), alpha=2.0, activation=torch.ones_like)
    kept = layer(torch.linspace(-2, 2, 5).expand(4000, 5)).mean(0)
    assert (kept.diff() > 0.02).all()
    negative = Standout(nn.Identity(), alpha=-2.0, activation=torch.ones_like)
    assert (negative(torch.linspace(-2, 2, 5).expand(4000, 5)).mean(0).diff() < -0.02).all()


def test_backward_has_the_mask_of_forward_and_pi_gets_no_gradient() -> None:
    x = torch.ones(300, requires_grad=True)
    pi = torch.full((300,), 0.5, requires_grad=True)
    y = standout(x, keep_prob=pi)
    gradients = torch.autograd.grad(y.sum(), (x, pi), allow_unused=True)
    assert torch.equal(gradients[0], y.detach())
    assert gradients[1] is None
    layer = Standout(nn.Linear(3, 20), alpha=7.0)
    z = torch.randn(4, 3)
    y = layer(z)
    (slope,) = torch.autograd.grad(y.sum(), layer.layer.weight)
    expected = ((y != 0).to(z.dtype).t() @ z).detach()
    torch.testing.assert_close(slope, expected)


def test_one_byte_an_element_stays_for_backward() -> None:
    x, pi = torch.ones(1000, 16, requires_grad=True), torch.rand(1000, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        y = standout(x, keep_prob=pi)
    assert sum(saved.untyped_storage().nbytes() for saved in kept) <= x.numel() + 8
    y.sum().backward()


def test_gradients_against_finite_differences() -> None:
    layer = Standout(nn.Linear(3, 4), activation=torch.tanh).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    mask = layer(x) != 0
    fixed = torch.where(mask, torch.tanh(layer.layer(x)), 0.0)
    torch.testing.assert_close(
        torch.autograd.grad(seeded(3, layer, x).square().sum(), x), torch.autograd.grad(fixed.square().sum(), x)
    )
    assert torch.autograd.gradcheck(layer.eval(), x)
    pi = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, pi: standout(x, False, keep_prob=pi), (x, pi))
    assert torch.autograd.gradcheck(lambda x: seeded(3, standout, x, keep_prob=pi), x)


def test_a_dropped_element_is_zero_whatever_it_was() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    assert torch.equal(standout(x, keep_prob=0.0), torch.zeros(4))
    assert torch.equal(standout(x, keep_prob=torch.ones(4))[[0, 1, 3]], x[[0, 1, 3]])


def test_a_response_that_is_nan_is_not_hidden() -> None:
    layer = Standout(nn.Linear(3, 4))
    for training in (True, False):
        assert layer.train(training)(torch.full((2, 3), math.nan)).isnan().all()


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_probabilities_follow_the_response_also_if_the_activation_works_in_place(mode: str) -> None:
    inner, x = nn.Linear(4, 200), torch.randn(3, 4)
    plain, inplace = (Standout(inner, activation=nn.ELU(inplace=flag)).train(mode == "train") for flag in (False, True))
    with torch.set_grad_enabled(mode == "train"):
        assert torch.equal(seeded(3, inplace, x), seeded(3, plain, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    layer = Standout(nn.Linear(6, 500), alpha=30.0).to(dtype)
    x = torch.randn(4, 6).to(dtype)
    a = layer.layer(x)
    pi = torch.sigmoid(30.0 * a.float())
    y = layer(x)
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert 0.2 < (y != 0).float().mean() < 0.7
    assert torch.equal(layer.eval()(x), (a.relu().float() * pi).to(dtype))


def test_images_are_laid_out_like_the_input() -> None:
    x = torch.randn(4, 6, 5, 3)
    pi = torch.rand(6, 1, 1)
    for training in (True, False):
        y = seeded(3, standout, x, training, keep_prob=pi)
        z = seeded(3, standout, x.contiguous(memory_format=torch.channels_last), training, keep_prob=pi)
        assert torch.equal(y, z)
        assert y.is_contiguous()
        assert z.is_contiguous(memory_format=torch.channels_last)
    volume = torch.randn(2, 3, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d)
    assert standout(volume, keep_prob=0.5).is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(
        seeded(3, standout, x.transpose(0, 3), keep_prob=0.5),
        seeded(3, standout, x.transpose(0, 3).contiguous(), keep_prob=0.5),
    )


def test_convolutions_modules_as_activations_and_empty_batches() -> None:
    layer = Standout(nn.Conv2d(3, 4, 3), activation=nn.LeakyReLU(0.1))
    assert layer(torch.randn(2, 3, 6, 6)).shape == (2, 4, 4, 4)
    assert layer(torch.randn(0, 3, 6, 6)).shape == (0, 4, 4, 4)
    assert layer.eval()(torch.randn(0, 3, 6, 6)).shape == (0, 4, 4, 4)
    assert standout(torch.ones(()), keep_prob=torch.tensor(1.0)).shape == ()


def test_seeds_generators_and_frozen_masks() -> None:
    layer, x = Standout(nn.Linear(4, 60)), torch.randn(5, 4)
    assert torch.equal(seeded(3, layer, x), seeded(3, layer, x))
    assert not torch.equal(layer(x), layer(x))
    h, pi = torch.ones(60), torch.full((60,), 0.5)
    first, second = (standout(h, keep_prob=pi, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    own = Standout(nn.Identity(), generator=torch.Generator().manual_seed(1), activation=torch.ones_like)
    assert torch.equal(own(torch.zeros(60)), first)
    with torchdrop.frozen_masks(layer, seed=1):
        y, again, fewer = layer(x), layer(x), layer(x[:2])
    assert torch.equal(y, again)
    torch.testing.assert_close(y[:2], fewer)


def test_checkpointing_has_the_same_masks() -> None:
    layer, x = Standout(nn.Linear(4, 60)), torch.randn(5, 4)
    (plain,) = torch.autograd.grad(seeded(3, layer, x).sum(), layer.layer.weight)
    again = torch.autograd.grad(seeded(3, checkpoint, layer, x, use_reentrant=False).sum(), layer.layer.weight)
    assert torch.equal(again[0], plain)


def test_vmap_of_images() -> None:
    layer, x = Standout(nn.Conv2d(2, 3, 3)), torch.randn(4, 1, 2, 5, 5)
    same = vmap(layer, randomness="same")(x[:1].expand_as(x))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(*vmap(layer, randomness="different")(x[:1].expand(2, 1, 2, 5, 5)))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(randomness: str) -> None:
    x, pi = torch.ones(3, 50), torch.full((50,), 0.5)
    out = vmap(lambda x: standout(x, keep_prob=pi), randomness=randomness)(x)
    assert torch.equal(out[0], out[1]) == (randomness == "same")
    layer = Standout(nn.Linear(4, 60))
    z = torch.randn(1, 4).expand(3, 4)
    out = vmap(layer, randomness=randomness)(z)
    assert torch.equal(out[0] != 0, out[1] != 0) == (randomness == "same")
    torch.testing.assert_close(vmap(layer.eval())(z), layer(z))


@pytest.mark.slow
def test_compiles_once_with_the_masks_of_eager_mode() -> None:
    torch._dynamo.reset()
    layer, x = Standout(nn.Linear(4, 60)), torch.randn(5, 4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for shift in (-2.0, 0.0, 2.0):
        nn.init.constant_(layer.layer.bias, shift)
        y = seeded(3, compiled, x)
        torch.testing.assert_close(y, seeded(3, layer, x))
        y.sum().backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled.eval()(x), layer.eval()(x))


def test_monte_carlo_fires_row_by_row() -> None:
    model = nn.Sequential(Standout(nn.Linear(4, 60)), nn.Identity()).eval()
    x = torch.randn(7, 4)
    h = model[0].layer(x).relu()
    with torchdrop.mc_dropout(model, seed=1) as report:
        first, second = model(x), model(x)
        assert len(report.active) == 1
    with torchdrop.mc_dropout(model, seed=1):
        fewer = model(x[:2])
    assert ((first == 0) | (first == h)).all()
    assert not torch.equal(first, second)
    torch.testing.assert_close(fewer, first[:2])
    expected = model(x)
    means = [
        torchdrop.mc_predict(model, x, samples=256, seed=3, strategy=s, chunk=c, task="regression").mean
        for s, c in (("loop", None), ("auto", 64), ("auto", None))
    ]
    torch.testing.assert_close(means[1], means[0])
    torch.testing.assert_close(means[2], means[0])
    assert (means[0] - expected).abs().max() < 6 * 0.5 * h.max() / 16


def test_disabled_gives_the_form_of_eval_mode() -> None:
    model, x = nn.Sequential(Standout(nn.Linear(4, 60))), torch.randn(5, 4)
    with torchdrop.disabled(model):
        y = model(x)
    assert torch.equal(y, model.eval()(x))


def test_states_copies_and_names() -> None:
    layer, x = Standout(nn.Linear(4, 60), 2.0, 0.5, nn.PReLU()), torch.randn(5, 4)
    assert list(layer.state_dict()) == ["layer.weight", "layer.bias", "activation.weight"]
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(seeded(3, copied, x), seeded(3, layer, x))
    assert layer.extra_repr() == "alpha=2, beta=0.5"
    assert Standout(nn.Identity()).extra_repr() == "alpha=1, beta=0, activation=relu"
    assert torchdrop.keep_probs(nn.Sequential(layer, torchdrop.Dropout(0.5))) == {"1": 0.5}


def of(input: Any, keep_prob: Any, training: bool = True) -> Callable[[], Tensor]:
    return lambda: standout(input, training, keep_prob=keep_prob)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (of(ONES, 1.5), ValueError, r"^keep_prob must be in \[0, 1\], got 1.5$"),
        (of(ONES, torch.tensor([0.1, -0.5, 1.0])), ValueError, r"^keep_prob must be in \[0, 1\], got -0.5$"),
        (of(ONES, ONES.long()), ValueError, r"^keep_prob must be a floating-point tensor, got torch.int64$"),
        (of(ONES, "a"), TypeError, r"^keep_prob must be a number or a tensor, got str$"),
        (
            of(ONES, torch.ones(2)),
            ValueError,
            r"^keep_prob of shape \(2,\) does not broadcast against the input of \(2, 3\)$",
        ),
        (of(ONES, torch.ones(2), False), ValueError, r"does not broadcast against the input"),
        (of(ONES, torch.ones(1, 1, 1), False), ValueError, r"does not broadcast against the input"),
        (of(ONES[0], ONES), ValueError, r"does not broadcast against the input"),
        (of(ONES.long(), 0.5), RuntimeError, r"^result type Float can't be cast to the desired output type Long: stan"),
        (of([1.0], 0.5), TypeError, r"^standout\(\): argument 'input' \(position 1\) must be Tensor, not list$"),
        (of(ONES, None), TypeError, r"^keep_prob must be a number or a tensor, got NoneType$"),
        (
            lambda: Standout(nn.AdaptiveMaxPool1d(1, return_indices=True))(ONES),
            TypeError,
            r"^layer must return one tensor, got tuple from AdaptiveMaxPool1d$",
        ),
        (lambda: Standout(torch.relu), TypeError, r"^layer must be a torch.nn.Module, got builtin_function_or_method$"),
        (lambda: Standout(nn.Identity(), "a"), TypeError, r"^alpha must be a number, got str$"),
        (lambda: Standout(nn.Identity(), beta=math.nan), ValueError, r"^beta must be finite, got nan$"),
        (
            lambda: Standout(nn.Identity(), activation=3),
            TypeError,
            r"^activation must be a function or a module",
        ),
        (lambda: Standout(nn.Identity(), generator=3), TypeError, r"^generator must be a torch.Generator or None"),
        (lambda: Standout(nn.Identity())(ONES.long()), RuntimeError, r"^result type Float can't be cast"),
        (lambda: Standout(nn.Identity(), activation=torch.sum)(ONES), ValueError, r"does not broadcast against the in"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_drawn(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(torch.get_rng_state(), before)

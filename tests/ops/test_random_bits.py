"""Masks and numbers for layers with masks of their own: one set of numbers on every path, seen by every mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import torchdrop
from torchdrop import kernels, random
from torchdrop.core import rate as _rate
from torchdrop.core import sites
from torchdrop.kernels.mask_params import inverted, mask_params, params_tensor
from torchdrop.ops import random_bits

KEY = torch.tensor([3, 4])

NUMBERS = {
    "keep_mask": (random_bits.keep_mask, mask_params(0.3)),
    "random_bits": (random_bits.random_bits, None),
    "standard_normal": (random_bits.standard_normal, None),
}


def direct(name: str, key: Tensor, shape: tuple[int, ...]) -> Tensor:
    if name == "keep_mask":
        return kernels.keep_mask(shape, key, mask_params(0.3))
    return getattr(kernels, name)(shape, key)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 1, 4)])
def test_operators_give_the_kernels_numbers(name: str, shape: tuple[int, ...], backend: str) -> None:
    numbers, given = NUMBERS[name]
    for key in (KEY, torch.arange(8).reshape(2, 2, 2)):
        out = numbers(key, shape, given)
        assert out.shape == (*key.shape[:-1], *shape)
        assert torch.equal(out, direct(name, key, shape))


@pytest.mark.parametrize("name", NUMBERS)
def test_operators_pass_opcheck(name: str) -> None:
    _, given = NUMBERS[name]
    operator = getattr(torch.ops.torchdrop, name).default
    torch.library.opcheck(operator, (KEY, [3, 4], None if given is None else given.tensor()))


@pytest.mark.parametrize("name", NUMBERS)
def test_vmap_over_keys_gives_what_a_loop_gives(name: str) -> None:
    numbers, given = NUMBERS[name]
    keys = torch.arange(10).reshape(5, 2)
    expected = torch.stack([numbers(key, (2, 3), given) for key in keys])
    assert torch.equal(vmap(lambda key: numbers(key, (2, 3), given))(keys), expected)
    nested = vmap(vmap(lambda key: numbers(key, (2, 3), given)), in_dims=1, out_dims=1)(keys.reshape(5, 1, 2))
    assert torch.equal(nested[:, 0], expected)


def test_vmap_over_laws_and_keys_in_any_combination() -> None:
    rates = torch.tensor([0.1, 0.5, 0.9])
    params_of_each = params_tensor(rates)
    keys = torch.arange(6).reshape(3, 2)
    both = vmap(lambda key, given: random_bits.keep_mask(key, (4, 5), given))(keys, params_of_each)
    one = vmap(lambda given: random_bits.keep_mask(KEY, (4, 5), given))(params_of_each)
    for n, rate in enumerate(rates.tolist()):
        assert torch.equal(both[n], kernels.keep_mask((4, 5), keys[n], mask_params(rate)))
        assert torch.equal(one[n], kernels.keep_mask((4, 5), KEY, mask_params(rate)))
    columns = params_tensor(torch.tensor([[0.1, 0.5, 0.9, 0.2, 0.3]]))
    over_columns = vmap(lambda key: random_bits.keep_mask(key, (4, 5), columns))(keys)
    for n in range(3):
        assert torch.equal(over_columns[n], kernels.keep_mask((4, 5), keys[n], columns))


def draws_of_everything(x: Tensor) -> list[Tensor]:
    return [
        sites.keep_mask(x, _rate.params_for(0.3, inverted, x.shape), x.shape),
        sites.random_bits(x, x.shape),
        sites.uniform(x, x.shape),
        sites.standard_normal(x, x.shape),
    ]


@pytest.mark.slow
def test_compiled_code_draws_what_eager_code_draws() -> None:
    x = torch.randn(4, 6)
    torch.manual_seed(1)
    eager = draws_of_everything(x)
    torch.manual_seed(1)
    compiled = torch.compile(draws_of_everything, fullgraph=True)(x)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniforms_lie_strictly_inside_and_symmetric(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([0, 2**32 - 1])
    monkeypatch.setattr(sites, "random_bits", lambda *_: ends)
    u = sites.uniform(torch.empty(2, dtype=dtype), (2,))
    assert u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert 0 < u[0] < 1
    assert u[0] == 1 - u[1]
    assert (torch.log(u) - torch.log1p(-u)).isfinite().all()


def test_every_draw_takes_a_new_key_and_generators_are_obeyed() -> None:
    x = torch.empty(50)
    assert not torch.equal(sites.random_bits(x, (50,)), sites.random_bits(x, (50,)))
    first, second = (sites.random_bits(x, (50,), torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(5)
    key = random.draw_key(x.device)
    torch.manual_seed(5)
    assert torch.equal(sites.random_bits(x, (50,)), kernels.random_bits((50,), key))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmaps_randomness_modes(randomness: str) -> None:
    def f(x: Tensor) -> Tensor:
        return sites.random_bits(x, x.shape)

    out = vmap(f, randomness=randomness)(torch.zeros(3, 40))
    assert torch.equal(out[0], out[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="random"):
        vmap(f)(torch.zeros(3, 40))
    assert (
        grad(lambda x: (x * sites.keep_mask(x, mask_params(0.5), x.shape)).sum())(torch.ones(30)).unique().numel() == 2
    )


class Replaced(_rate.Rated):
    """A layer that puts -1 where it drops: it makes its mask itself."""

    def forward(self, input: Tensor) -> Tensor:
        return replaced(input, self.rate.params_for(input.shape), self.training)


def replaced(input: Tensor, given: object, training: bool) -> Tensor:
    if not sites.is_on(training):
        return input
    kept = sites.keep_mask(input, given, input.shape)  # type: ignore[arg-type]
    return input if kept is None else torch.where(kept, input, -1.0)


class Functional(nn.Module):
    """The same by a function that is always on."""

    def __init__(self, training: bool | None = True) -> None:
        super().__init__()
        self.always = training

    def forward(self, input: Tensor) -> Tensor:
        return replaced(input, mask_params(0.5), self.training if self.always is None else True)


@pytest.mark.parametrize("layer", [Replaced(0.5), Functional(), Functional(None)])
@pytest.mark.parametrize("sampling", ["iid", "latin"])
def test_monte_carlo_turns_layers_on_row_by_row(layer: nn.Module, sampling: str) -> None:
    model = nn.Sequential(nn.Identity(), layer).eval()
    x = torch.ones(7, 30)
    with torchdrop.mc_dropout(model, seed=1) as report:
        first = model(x)
        model(x)
        assert len(report.sources) == 1
    with torchdrop.mc_dropout(model, seed=1):
        again = model(x[:2])
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(first[:2], again)
    means = [
        torchdrop.mc_predict(
            model, x, samples=64, seed=3, sampling=sampling, strategy=strategy, chunk=chunk, task="regression"
        ).mean
        for strategy, chunk in (("loop", None), ("auto", 16), ("auto", None))
    ]
    assert all(torch.allclose(means[0], mean, atol=1e-6) for mean in means[1:])
    assert means[0].abs().max() < (0.8 if sampling == "iid" else 1e-6)


def test_monte_carlo_leaves_what_is_not_chosen() -> None:
    model = nn.ModuleDict({"a": Functional(), "b": Functional()})
    model.forward = lambda x: model["b"](model["a"](x) * 2)  # type: ignore[method-assign]
    with torchdrop.mc_dropout(model, seed=1, sources="a"):
        assert set(model(torch.ones(2, 40)).unique().tolist()) == {-2.0, 2.0}


def test_disabled_reaches_layers_and_functions() -> None:
    x = torch.ones(2, 40)
    for layer in (Replaced(0.5), Functional(), Functional(None)):
        model = nn.Sequential(layer)
        with torchdrop.disabled(model):
            assert torch.equal(model(x), x)
        assert not torch.equal(model(x), x)


def test_frozen_masks_hold_them() -> None:
    model = nn.Sequential(Replaced(0.5))
    with torchdrop.frozen_masks(model):
        assert torch.equal(model(torch.ones(3, 9)), model(torch.ones(3, 9)))

"""Compact dropout: the cut network is the masked one, forward and gradient; and it is what one can put in its place."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.flop_counter import FlopCounterMode

import torchdrop
from tests.statistical import check_rate, draws_for
from torchdrop.layers.compact import sequential as family
from torchdrop.layers.compact.sequential import CompactSequential, compact


class Fixed(nn.Dropout):
    """Dropout with factors that are given, m / k."""

    def __init__(self, factors: Tensor | list[float]) -> None:
        super().__init__(0.5)
        self.factors = torch.as_tensor(factors, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        return input * self.factors.to(input.dtype) if self.training else input


def factors(units: int, seed: int, k: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(units, generator=generator) < k).double() / k


def stacks() -> dict[str, list[nn.Module]]:
    """Stacks of 6 inputs and 3 outputs."""
    return {
        "hidden": [nn.Linear(6, 9), nn.ReLU(), Fixed(factors(9, 1)), nn.Linear(9, 3)],
        "two hidden": [
            nn.Linear(6, 9), nn.GELU(), Fixed(factors(9, 1)), nn.Linear(9, 8), nn.Tanh(), Fixed(factors(8, 2, 0.7)),
            nn.Linear(8, 3),
        ],
        "input": [Fixed(factors(6, 3, 0.8)), nn.Linear(6, 9), nn.Sigmoid(), Fixed(factors(9, 4)), nn.Linear(9, 3)],
        "no bias": [nn.Linear(6, 9, bias=False), nn.ELU(), Fixed(factors(9, 5)), nn.Linear(9, 3, bias=False)],
        "without an activation": [nn.Linear(6, 9), Fixed(factors(9, 6)), nn.Linear(9, 3)],
        "before the activation": [nn.Linear(6, 9), Fixed(factors(9, 7)), nn.GELU(), nn.Linear(9, 3)],
        "around the activation": [
            nn.Linear(6, 9), Fixed(factors(9, 8, 0.8)), nn.SiLU(), Fixed(factors(9, 9, 0.7)), nn.Linear(9, 3)
        ],
        "normalized": [nn.Linear(6, 9), nn.LayerNorm(9), nn.ReLU(), Fixed(factors(9, 10)), nn.Linear(9, 3)],
        "at the end": [nn.Linear(6, 9), nn.ReLU(), Fixed(factors(9, 11)), nn.Linear(9, 3), Fixed(factors(3, 12))],
        "PReLU": [nn.Linear(6, 9), nn.PReLU(), Fixed(factors(9, 13)), nn.Linear(9, 3)],
        "all kept": [nn.Linear(6, 9), nn.ReLU(), Fixed([2.0] * 9), nn.Linear(9, 3)],
        "all dropped": [nn.Linear(6, 9), nn.ReLU(), Fixed([0.0] * 9), nn.Linear(9, 3), nn.ReLU(), nn.Linear(3, 3)],
        "wide": [nn.Linear(6, 200), nn.Tanh(), Fixed(factors(200, 15)), nn.Linear(200, 3)],
        "wide, two masks": [
            Fixed(factors(6, 16)), nn.Linear(6, 300), Fixed(factors(300, 17, 0.8)), nn.SiLU(),
            Fixed(factors(300, 18, 0.8)), nn.Linear(300, 3),
        ],
        "wide, almost all kept": [nn.Linear(6, 200), nn.Tanh(), Fixed([0.0] * 3 + [1.5] * 197), nn.Linear(200, 3)],
        "in place": [nn.Linear(6, 9), nn.ReLU(inplace=True), Fixed(factors(9, 14)), nn.Linear(9, 3)],
    }  # fmt: skip


every_stack = pytest.mark.parametrize("name", stacks())


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of a loss that is not symmetric in the outputs."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    (y.square() * torch.linspace(1, 2, y.shape[-1], dtype=y.dtype)).sum().backward()
    return {"output": y.detach(), "input": x.grad, **{n: p.grad for n, p in model.named_parameters()}}


def both(modules: list[nn.Module], dtype: torch.dtype) -> tuple[nn.Sequential, CompactSequential]:
    dense = nn.Sequential(*modules).to(dtype)
    return dense, CompactSequential(*copy.deepcopy(modules)).to(dtype)


@every_stack
@pytest.mark.parametrize("shape", [(5, 6), (6,), (2, 3, 6), (0, 6)])
def test_equals_masking_with_that_mask_forward_and_gradient(name: str, shape: tuple[int, ...]) -> None:
    dense, cut = both(stacks()[name], torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    expected, found = run(dense, x), run(cut, x)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@every_stack
def test_equals_masking_in_float32_up_to_rounding(name: str) -> None:
    dense, cut = both(stacks()[name], torch.float32)
    x = torch.randn(5, 6)
    expected, found = run(dense, x), run(cut, x)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


def test_gradient_of_what_is_cut_is_exactly_zero() -> None:
    _, cut = both(stacks()["two hidden"], torch.float32)
    run(cut, torch.randn(5, 6))
    first, second, third = (cut[i] for i in (0, 3, 6))
    one, two = cut[2].factors == 0, cut[5].factors == 0
    assert 0 < one.sum() < 9
    assert 0 < two.sum() < 8
    assert not first.weight.grad[one].any()
    assert not first.bias.grad[one].any()
    assert not second.weight.grad[:, one].any()
    assert not second.weight.grad[two].any()
    assert not second.bias.grad[two].any()
    assert not third.weight.grad[:, two].any()
    assert third.weight.grad[:, ~two].all()
    assert second.weight.grad[~two][:, ~one].count_nonzero() > 0


def test_products_shrink() -> None:
    modules = [nn.Linear(6, 10), nn.ReLU(), Fixed([2.0] * 4 + [0.0] * 6), nn.Linear(10, 20)]
    modules += [nn.ReLU(), Fixed([0.0] * 15 + [4.0] * 5), nn.Linear(20, 3)]
    counts = []
    for model in both(modules, torch.float32):
        with FlopCounterMode(display=False) as counter:
            run(model, torch.randn(7, 6))
        counts.append(counter.get_total_flops())
    dense, cut = 60 + 200 + 60, 4 * 6 + 5 * 4 + 3 * 5
    assert counts == [3 * 2 * 7 * dense, 3 * 2 * 7 * cut]


def test_wide_layers_keep_multiples_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cuts(monkeypatch)
    for dropped, kept in ((0, []), (3, []), (8, [192]), (12, [192]), (73, [128]), (200, [0])):
        made.clear()
        mask = torch.ones(200).index_fill_(0, torch.randperm(200)[:dropped], 0.0)
        CompactSequential(Fixed(mask), nn.Linear(200, 3))(torch.randn(5, 200))
        assert [columns.numel() for _, columns in made[:1]] == kept
        assert all(set(mask.nonzero().squeeze(1).tolist()) <= set(columns.tolist()) for _, columns in made)


def test_what_is_dropped_may_be_infinite_or_nan() -> None:
    for units in (9, 200):
        mask = torch.full((units,), 2.0).index_fill_(0, torch.randperm(units)[: units // 2 + 1], 0.0)
        model, x = CompactSequential(Fixed(mask), nn.Linear(units, 3)).double(), torch.randn(2, units).double()
        for way in (model, vmap(model)):
            expected = way(x)
            for value in (torch.inf, torch.nan):
                assert torch.equal(way(x.masked_fill(mask == 0, value)), expected)


def test_expectation_is_the_next_layer_by_enumeration_of_all_masks() -> None:
    k, linear = 0.75, nn.Linear(4, 3).double()
    x, total = torch.randn(5, 4, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    for mask in itertools.product([0.0, 1.0], repeat=4):
        kept = sum(mask)
        model = CompactSequential(Fixed([m / k for m in mask]), linear)
        total += k**kept * (1 - k) ** (4 - kept) * model(x).detach()
    torch.testing.assert_close(total, linear(x).detach(), rtol=1e-12, atol=1e-12)


def test_bias_is_what_is_left_where_all_units_are_dropped() -> None:
    model = CompactSequential(nn.Linear(4, 8), nn.ReLU(), torchdrop.Dropout(1.0), nn.Linear(8, 3))
    out = run(model, torch.randn(5, 4))
    assert torch.equal(out["output"], model[3].bias.detach().expand(5, 3))
    assert not out["0.weight"].any()
    assert not out["3.weight"].any()
    assert out["3.bias"].all()
    bare = CompactSequential(torchdrop.Dropout(1.0), nn.Linear(8, 3, bias=False))
    assert torch.equal(bare(torch.full((5, 8), torch.nan)), torch.zeros(5, 3))


@pytest.mark.parametrize("name", ["two hidden", "input", "normalized", "all dropped", "around the activation"])
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    _, cut = both(stacks()[name], torch.float64)
    for module in cut:
        if isinstance(module, nn.ReLU):
            cut[list(cut).index(module)] = nn.Tanh()
    parameters = {n: p.detach().requires_grad_() for n, p in cut.named_parameters()}
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(cut, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters.values()), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *parameters.values()), fast_mode=True)


def mlp(width: int = 64, p: float = 0.5, layer: Callable[[float], nn.Module] = torchdrop.Dropout) -> CompactSequential:
    return CompactSequential(
        nn.Linear(6, width), nn.Tanh(), layer(p), nn.Linear(width, width), nn.Tanh(), layer(p), nn.Linear(width, 3)
    )


def drawn(model: CompactSequential) -> list[Tensor]:
    """The factors that the model's Dropout layers make next, in order."""
    widths = [model[i + 1].in_features for i, m in enumerate(model) if isinstance(m, nn.Dropout)]
    layers = [m for m in model if isinstance(m, nn.Dropout)]
    return [layer(torch.ones(1, n)).squeeze(0) for layer, n in zip(layers, widths, strict=True)]


@pytest.mark.parametrize("layer", [torchdrop.Dropout, nn.Dropout])
def test_masks_are_those_of_the_dropout_layers(layer: Callable[[float], nn.Module]) -> None:
    model, x = mlp(layer=layer), torch.randn(5, 6)
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    one, two = drawn(model)
    assert 0 < (one == 0).sum() < 64
    assert not torch.equal(one, two)
    hidden = torch.tanh(model[0](x)) * one
    hidden = torch.tanh(model[3](hidden)) * two
    torch.testing.assert_close(y, model[6](hidden))
    assert not torch.equal(y, model(x))


@pytest.mark.slow
def test_units_are_kept_at_their_rate() -> None:
    k, n, count = 0.8, 1000, 0
    model = CompactSequential(torchdrop.Dropout(keep_prob=k), nn.Linear(n, 1, bias=False))
    nn.init.ones_(model[1].weight)
    forwards = -(-draws_for(k, 0.01) // n)
    for _ in range(forwards):
        count += round(float(model(torch.ones(1, n)).detach()) * k)
    check_rate(count, forwards * n, k, 0.01)


def test_a_rate_for_each_unit() -> None:
    rates = torch.tensor([0.0, 1.0, 0.5] * 4)
    model = CompactSequential(
        nn.Linear(6, 12), torchdrop.Dropout(keep_prob=rates), nn.Linear(12, 3, bias=False)
    ).double()
    torch.manual_seed(1)
    y = model(torch.ones(2, 6, dtype=torch.float64))
    torch.manual_seed(1)
    m = model[1](torch.ones(1, 12, dtype=torch.float64))
    assert set(m[0, 1::3].tolist()) == {1.0}
    assert not m[0, ::3].any()
    torch.testing.assert_close(y, model[2](model[0](torch.ones(2, 6, dtype=torch.float64)) * m))


def test_dropout_in_place_and_the_original_formulation() -> None:
    for layer in (torchdrop.Dropout(0.5, inplace=True), nn.Dropout(0.5, inplace=True)):
        model, x = CompactSequential(layer, nn.Linear(40, 3)), torch.randn(5, 40)
        torch.manual_seed(1)
        y, before = model(x), x.clone()
        assert torch.equal(x, before)
        torch.manual_seed(1)
        torch.testing.assert_close(y, model[1](x * layer(torch.ones(1, 40))))
    original = CompactSequential(torchdrop.Dropout(0.75, inverted=False), nn.Linear(40, 3, bias=False)).eval()
    torch.testing.assert_close(original(x), original[1](x) / 4)
    torch.manual_seed(1)
    y = original.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, original[1](x * (original[0](torch.ones(1, 40)))))


def test_eval_mode_is_the_plain_modules_and_draws_nothing() -> None:
    model, x = mlp().eval(), torch.randn(5, 6)
    before = torch.get_rng_state()
    assert torch.equal(model(x), nn.Sequential(*model)(x))
    assert torch.equal(before, torch.get_rng_state())
    model[2].train()
    assert not torch.equal(model(x), nn.Sequential(*model).eval()(x))


def test_keep_prob_one_drops_nothing_and_still_draws() -> None:
    model, x = mlp(p=0.0), torch.randn(5, 6)
    torch.manual_seed(1)
    y = model(x)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    drawn(model)
    assert torch.equal(after, torch.get_rng_state())
    torch.testing.assert_close(y, nn.Sequential(*model).eval()(x))


def test_seeds_generators_and_frozen_masks() -> None:
    model, x = mlp(), torch.randn(5, 6)
    torch.manual_seed(2)
    first = model(x)
    torch.manual_seed(2)
    assert torch.equal(first, model(x))
    with torchdrop.frozen_masks(model):
        assert torch.equal(model(x), model(x))
    own = [
        compact([model[0], model[1], model[3]], 0.5, generator=torch.Generator().manual_seed(7))(x) for _ in range(2)
    ]
    assert torch.equal(*own)


def cuts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list of the indices of all cuts that are made from now on."""
    made: list[Any] = []
    plain = family.cut

    def counted(matrix: Tensor, rows: Any, columns: Any) -> Tensor:
        if rows is not None or columns is not None:
            made.append((rows, columns))
        return plain(matrix, rows, columns)

    monkeypatch.setattr(family, "cut", counted)
    return made


class Custom(nn.Module):
    elementwise = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x)


def test_a_module_that_says_so_is_elementwise(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cuts(monkeypatch)
    modules = [nn.Linear(6, 9), Custom(), Fixed(factors(9, 1)), nn.Linear(9, 3)]
    dense, cut = both(modules, torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(cut(x), dense(x))
    assert made[0][0] is not None
    modules[1] = nn.Softmax(-1)
    dense, cut = both(modules, torch.float64)
    made.clear()
    torch.testing.assert_close(cut(x), dense(x))
    assert [rows for rows, _ in made] == [None, None]


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            [nn.Linear(6, 9), torchdrop.Dropout(), nn.Sigmoid(), nn.Linear(9, 3)],
            "Dropout '1' cannot be cut out: Sigmoid '2' lies between it and Linear '3', and does not give 0",
        ),
        ([torchdrop.Dropout(), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 3)], "LayerNorm '1' lies between"),
        ([torchdrop.Dropout(), OwnForward(6, 9), nn.Linear(9, 3)], "OwnForward '1' lies between it and Linear '2'"),
        (
            [torchdrop.Dropout(shared_axes=1), nn.Linear(6, 9)],
            "shared_axes must be None in compact dropout, whose mask is over the units alone, got 1 in Dropout '0'",
        ),
        ([torchdrop.Dropout(noise_shape=(1, None)), nn.Linear(6, 9)], "noise_shape must be None in compact dropout"),
        (
            [torchdrop.Dropout(shard=torchdrop.Shard(1, 0, 9)), nn.Linear(6, 9)],
            "shard must be None in compact dropout",
        ),
        (
            [nn.Linear(6, 9), nn.ReLU(), torchdrop.Dropout(), nn.Linear(8, 3)],
            "Linear '3' must take as many inputs as Linear '0' gives, got 8 and 9",
        ),
        ([torchdrop.Dropout(), nn.LazyLinear(3)], "Linear '1' is not initialized: run the model once"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_what_cannot_be_cut_is_refused(modules: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompactSequential(*modules)
    model = CompactSequential(*modules[:1])
    for module in modules[1:-1]:
        model.append(module)
    model.append(modules[-1])
    with pytest.raises(ValueError, match=message):  # also where it was put in later
        model(torch.randn(2, 6))


def test_bad_calls() -> None:
    model = mlp()
    with pytest.raises(
        ValueError, match=r"the rates are those of the Dropout layers, got p=0.5 and keep_prob=None .*'2'"
    ):
        compact(model, 0.5)
    with pytest.raises(TypeError, match="not both"):
        compact([nn.Linear(2, 2), nn.Linear(2, 2)], 0.5, keep_prob=0.5)
    with pytest.raises(ValueError, match=r"nothing can be cut: .* got no modules"):
        compact([])
    with pytest.raises(ValueError, match=r"nothing can be cut: .* got Linear, ReLU, Linear"):
        compact([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"dropout probability has to be between 0 and 1, but got 1.5"):
        compact([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)], 1.5)
    with pytest.raises(TypeError, match=r"modules must be an nn.Sequential, .* or a list of modules, got Linear"):
        compact(nn.Linear(2, 2), 0.5)
    with pytest.raises(TypeError, match="modules must be modules, got function as '1'"):
        compact([nn.Linear(2, 2), F.relu, nn.Linear(2, 2)], 0.5)
    own = type("Own", (nn.Sequential,), {"forward": lambda self, x: x})
    with pytest.raises(TypeError, match="got Own with a forward of its own"):
        compact(own(nn.Linear(2, 2), nn.Linear(2, 2)), 0.5)
    for shape in ((5, 7), (5, 5), ()):
        for first in (nn.Linear(6, 9), torchdrop.Dropout(0.5)):
            small = CompactSequential(first, *([torchdrop.Dropout(0.5)] if shape else []), nn.Linear(9, 3))
            small = small if isinstance(first, nn.Linear) else CompactSequential(first, nn.Linear(6, 3))
            with pytest.raises(RuntimeError, match=r"mat1 and mat2|both arguments to linear|size mismatch"):
                small(torch.randn(shape))
    with pytest.raises(RuntimeError, match="result type Float can't be cast to the desired output type Long"):
        model(torch.ones(2, 6, dtype=torch.long))

"""Targeted dropout: which weights it may touch, on layers and models, and what is left after pruning."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

import torchdrop
from tests.statistical import check_rate, draws_for
from torchdrop.core import sites
from torchdrop.layers.variational.sparsity import sparsity
from torchdrop.layers.weights.targeted import (
    TargetedDropout,
    apply_targeted_dropout,
    prune_targeted_dropout,
    remove_targeted_dropout,
    targeted_dropout,
)
from torchdrop.layers.weights.targets import Choice

SMALL = torch.tensor([[0.1, -3.0, 0.2, 4.0], [5.0, -0.6, 7.0, 0.8]], dtype=torch.float64)


def smallest(weight: Tensor, count: int) -> Tensor:
    """Where the `count` smallest of each row are, the first of equal ones first."""
    rows = [sorted(range(len(row)), key=lambda i, row=row: (abs(row[i]), i)) for row in weight.flatten(1).tolist()]
    found = torch.zeros(len(rows), weight[0].numel(), dtype=torch.bool)
    for row, order in zip(found, rows, strict=True):
        row[order[:count]] = True
    return found.reshape(weight.shape)


@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.floats(0.0, 1.0),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(0, 10**6),
)
def test_targets_are_exactly_the_floor_of_gamma_n_smallest_of_each_unit(
    rows: int, columns: int, fraction: float, dtype: torch.dtype, seed: int
) -> None:
    weight = torch.randint(-3, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)) + 0.5
    weight = weight.to(dtype)  # with many ties
    keep_prob = 0.0 if fraction < 1 else 1e-30
    out = targeted_dropout(weight, keep_prob=keep_prob, target_fraction=fraction)
    assert out.dtype == dtype
    assert torch.equal(out == 0, smallest(weight, math.floor(fraction * columns + 1e-9)))
    assert torch.equal(out[out != 0], weight[out != 0])


def test_the_fraction_counts_as_it_is_written() -> None:
    for percent in range(100):
        out = targeted_dropout(torch.randn(2, 100), 1.0, target_fraction=percent / 100)
        assert (out == 0).sum(1).tolist() == [percent, percent]


def test_units_are_ranked_by_their_norm() -> None:
    weight = (
        torch.randn(6, 3, 2, 2).half() * torch.tensor([5.0, 1.0, 300.0, 0.01, 2.0, 0.1]).reshape(-1, 1, 1, 1).half()
    )
    out = targeted_dropout(weight, 1.0, target_fraction=0.5, units=True)
    dropped = torch.tensor([False, True, False, True, False, True])
    assert torch.equal(out[~dropped], weight[~dropped])
    assert out[dropped].eq(0).all()
    equal = targeted_dropout(torch.ones(6, 2), 1.0, target_fraction=0.5, units=True)
    assert equal[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    huge = torch.full((2, 4), 60000.0, dtype=torch.float16)
    huge[1] = 50000.0
    assert targeted_dropout(huge, 1.0, target_fraction=0.5, units=True)[:, 0].tolist() == [60000.0, 0.0]


@pytest.mark.parametrize("dim", [1, -1, 2])
@pytest.mark.parametrize("units", [False, True])
def test_dim_is_the_axis_of_units(dim: int, units: bool) -> None:
    weight = torch.randn(4, 5, 6)
    options: dict[str, Any] = {"target_fraction": 0.6, "units": units}
    out = targeted_dropout(weight, 1.0, dim=dim, **options)
    assert torch.equal(out, targeted_dropout(weight.movedim(dim, 0), 1.0, **options).movedim(0, dim))
    torch.manual_seed(1)
    some = targeted_dropout(weight, 0.5, dim=dim, **options)
    assert torch.equal(some[out != 0], weight[out != 0])
    if units:
        zeros = (some == 0).movedim(dim, 0).flatten(1)
        assert torch.equal(zeros.all(1), zeros.any(1))


@pytest.mark.parametrize("units", [False, True])
def test_expectation_by_enumeration_is_rescaled_nowhere(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p, shape = 0.3, (2, 1) if units else (2, 4)
    targets = torch.tensor([[True], [False]]) if units else smallest(SMALL, 2)
    total = torch.zeros_like(SMALL)
    for bits in itertools.product([False, True], repeat=math.prod(shape)):
        kept = torch.tensor(bits).reshape(shape)
        monkeypatch.setattr(sites, "keep_mask", lambda like, params, given, *_, kept=kept: kept.reshape(given))
        probability = math.prod(1 - p if bit else p for bit in bits)
        out = targeted_dropout(SMALL, p, target_fraction=0.5, units=units)
        assert torch.equal(out, torch.where(targets & ~kept, 0.0, SMALL))
        total += probability * out
    assert torch.allclose(total, torch.where(targets, (1 - p) * SMALL, SMALL), atol=1e-12)


@pytest.mark.slow
def test_a_target_is_dropped_with_rate_p() -> None:
    p, error = 0.3, 0.005
    n = draws_for(p, error)
    weight = torch.randn(64, math.ceil(n / 32))
    out = targeted_dropout(weight, p, target_fraction=0.5)
    check_rate(int((out == 0).sum()), weight.numel() // 2, p, error)


def test_never_touches_the_others_and_a_dropped_weight_gets_no_gradient() -> None:
    weight = torch.randn(20, 30, dtype=torch.float64, requires_grad=True)
    targets = smallest(weight.detach(), 22)
    seen = torch.zeros_like(targets)
    for _ in range(40):
        out = targeted_dropout(weight, 0.5, target_fraction=0.75)
        (gradient,) = torch.autograd.grad((out * 3).sum(), weight)
        assert torch.equal(out[~targets], weight[~targets])
        assert torch.equal(gradient, 3.0 * (out != 0))
        seen |= out == 0
    assert torch.equal(seen, targets)

    def call(weight: Tensor) -> Tensor:
        torch.manual_seed(1)
        return targeted_dropout(weight, 0.5)

    assert torch.autograd.gradcheck(call, SMALL.clone().requires_grad_())


def test_a_dropped_infinity_is_0_and_nan_is_never_a_target() -> None:
    weight = torch.tensor([[math.inf, math.inf], [math.nan, 1.0]])
    out = targeted_dropout(weight, 1.0, target_fraction=0.5)
    assert out[0].tolist() == [0.0, math.inf]
    assert out[1, 0].isnan()
    assert out[1, 1] == 0


def test_eval_is_the_weight_itself_or_pruned() -> None:
    weight = torch.randn(3, 8)
    assert targeted_dropout(weight, training=False) is weight
    pruned = targeted_dropout(weight, 0.1, False, target_fraction=0.25, pruned=True)
    assert torch.equal(pruned == 0, smallest(weight, 2))
    module = TargetedDropout(0.5, 0.25)
    assert module.eval()(weight) is weight
    module.pruned = True
    assert torch.equal(module(weight), pruned)
    assert torch.equal(targeted_dropout(weight, 0.0), weight)
    assert targeted_dropout(torch.zeros(0, 4)).shape == (0, 4)
    assert targeted_dropout(torch.zeros(4, 0)).shape == (4, 0)


def test_survives_pruning() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    plain = copy.deepcopy(model)
    apply_targeted_dropout(model, "*.weight", 0.5, 0.6, pruned=True)
    x = torch.randn(5, 3, 6, 6)
    model.eval()
    expected = model(x)
    weights = [model[0].parametrizations.weight.original, model[3].parametrizations.weight.original]
    assert prune_targeted_dropout(model) is model
    assert torch.equal(model(x), expected)
    assert torch.equal(model.train()(x), expected)
    assert [type(layer) for layer in model] == [type(layer) for layer in plain]
    assert (model[0].weight is weights[0], model[3].weight is weights[1]) == (True, True)
    for layer, own in ((model[0], plain[0]), (model[3], plain[3])):
        count = math.floor(0.6 * own.weight[0].numel())
        assert torch.equal(layer.weight, torch.where(smallest(own.weight.detach(), count), 0.0, own.weight))
    again = apply_targeted_dropout(copy.deepcopy(model), "*.weight", 0.5, 0.6)
    assert torch.equal(again(x), expected)
    assert sparsity(prune_targeted_dropout(again)).zeros == sparsity(model).zeros


def test_apply_and_remove_are_one_line_each() -> None:
    layer = nn.Linear(10, 6)
    weight, keys = layer.weight, set(layer.state_dict())
    assert apply_targeted_dropout(layer, p=1.0, target_fraction=0.5) is layer
    assert set(layer.state_dict()) == {"parametrizations.weight.original", "bias"}
    x = torch.randn(3, 10)
    for _ in range(50):
        layer(x).sum().backward()
    assert (layer.weight == 0).sum(1).tolist() == [5] * 6
    assert torch.equal(layer.parametrizations.weight.original, weight)
    layer.eval()
    assert torch.equal(layer.weight, weight)
    remove_targeted_dropout(layer)
    assert layer.weight is weight
    assert (type(layer), set(layer.state_dict())) == (nn.Linear, keys)


def test_rates_and_schedules_reach_it_by_name() -> None:
    model = nn.Sequential(apply_targeted_dropout(nn.Linear(4, 4), p=0.25, target_fraction=0.5))
    name = "0.parametrizations.weight.0"
    assert dict(torchdrop.keep_probs(model)) == {name: 0.75}
    torchdrop.set_keep_prob(model, {name: 0.0})
    assert (model[0].weight == 0).sum() == 8
    scheduler = torchdrop.KeepProbScheduler(model, {"0": torchdrop.schedules.linear(1.0, 0.0, steps=2)})
    counts = []
    for _ in range(3):
        counts.append(model[0].parametrizations.weight[0].p)
        scheduler.step()
    assert counts == [0.0, 0.5, 1.0]
    with torchdrop.disabled(model):
        assert (model[0].weight != 0).all()


def test_a_tensor_of_rates() -> None:
    keep_prob = torch.tensor([[1.0], [0.0]])
    for units in (False, True):
        out = targeted_dropout(torch.ones(2, 6), keep_prob=keep_prob, target_fraction=0.5, units=units)
        assert (out == 0).sum(1).tolist() == [0, 0 if units else 3]
    layer = apply_targeted_dropout(nn.Linear(6, 2), keep_prob=keep_prob, target_fraction=0.5)
    assert (layer.weight == 0).sum(1).tolist() == [0, 3]


def test_seeds_generators_frozen_masks_and_vmap() -> None:
    weight = torch.randn(10, 10)
    module = TargetedDropout(0.5, generator=torch.Generator().manual_seed(3))
    first = module(weight)
    assert not torch.equal(module(weight), first)
    module.generator.manual_seed(3)
    assert torch.equal(module(weight), first)
    torch.manual_seed(3)
    drawn = targeted_dropout(weight)
    torch.manual_seed(3)
    assert torch.equal(targeted_dropout(weight), drawn)
    layer = apply_targeted_dropout(nn.Linear(20, 20))
    with torchdrop.frozen_masks(layer):
        assert torch.equal(layer(weight.flatten()[:20]), layer(weight.flatten()[:20]))
    for randomness in ("same", "different"):
        out = vmap(targeted_dropout, randomness=randomness)(weight.expand(3, 10, 10))
        assert torch.equal(out[0], out[1]) == (randomness == "same")
        assert (out == 0).sum((1, 2)).max() <= 50
    assert grad(lambda w: targeted_dropout(w, 1.0).sum())(weight).sum() == 50


def test_monte_carlo_turns_it_on() -> None:
    layer = apply_targeted_dropout(nn.Linear(30, 5, bias=False), p=0.5, target_fraction=0.8).eval()
    x = torch.eye(30)
    whole = layer(x).T
    targets = smallest(whole.detach(), 24)
    with torchdrop.mc_dropout(layer, seed=1):
        one, two = layer(x).T, layer(x).T
    assert not torch.equal(one, two)
    assert torch.equal(one[~targets], whole[~targets])
    assert 0 < (one == 0).sum() < targets.sum()
    found = torchdrop.mc_predict(layer, x, samples=400, seed=1, task="regression").mean.T
    assert torch.allclose(found[~targets], whole[~targets])
    assert ((found / whole)[targets] - 0.5).abs().max() < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("units", [False, True])
def test_compiled_once_for_all_rates_and_fractions_with_the_masks_of_eager_code(units: bool) -> None:
    layer = apply_targeted_dropout(nn.Linear(20, 10), units=units)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    targeted, x = layer.parametrizations.weight[0], torch.randn(3, 20)
    for p, fraction in ((0.5, 0.5), (0.2, 0.75), (1.0, 0.29)):
        targeted.p, targeted.target_fraction = p, fraction
        outputs = []
        for call in (layer, compiled):
            torch.manual_seed(2)
            outputs.append(call(x))
        assert torch.allclose(*outputs)
    assert counter.frame_count == 1


def test_copies_have_rates_of_their_own() -> None:
    layer = apply_targeted_dropout(nn.Linear(8, 2), p=1.0, target_fraction=0.5)
    other = copy.deepcopy(layer)
    other.parametrizations.weight[0].target_fraction = 0.25
    assert ((layer.weight == 0).sum(), (other.weight == 0).sum()) == (8, 4)
    remove_targeted_dropout(other)
    assert (layer.weight == 0).sum() == 8
    assert repr(layer.parametrizations.weight[0]) == (
        "TargetedDropout(p=1.0, target_fraction=0.5, units=False, dim=0, pruned=False)"
    )


@pytest.mark.parametrize("units", [False, True])
def test_the_choice_in_compiled_code_is_made_where_the_weight_is(units: bool) -> None:
    fraction = torch.tensor([0.5], dtype=torch.float64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        targets = Choice(fraction, units, 0).targets(torch.empty(4, 6, device="cuda"))
    assert (targets.device.type, tuple(targets.shape)) == ("cuda", (4, 1) if units else (4, 6))


def test_the_memory_format_of_images_stays() -> None:
    weight = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    for out in (targeted_dropout(weight), targeted_dropout(weight, training=False, pruned=True)):
        assert out.is_contiguous(memory_format=torch.channels_last)

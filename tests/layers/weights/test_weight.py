"""Weight dropout on layers that read their weight themselves: linear and convolutional ones."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.enumeration import expectation, force, masks
from tests.statistical import check_rate, draws_for
from tests.strategies import DTYPES
from torchdrop import kernels, random
from torchdrop.kernels.mask_params import mask_params
from torchdrop.layers.weights.weight import WeightDropout, apply_weight_dropout, remove_weight_dropout, weight_dropout


def raw(module: Any, name: str = "weight") -> Tensor:
    return module.parametrizations[name].original


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.LayerNorm(40), nn.Linear(40, 3))


class TestDefinition:
    @pytest.mark.parametrize("k", [0.5, 0.7])
    def test_expectation_is_the_weight_by_enumeration(self, k: float, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = torch.randn(2, 3, dtype=torch.float64)
        found = expectation(
            (weight_dropout(weight, keep_prob=k), chance) for _, chance in masks(monkeypatch, (2, 3), k)
        )
        assert torch.allclose(found, weight, rtol=1e-12, atol=0)

    def test_expected_output_is_that_of_the_weight_by_enumeration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = nn.Linear(3, 2).double()
        x = torch.randn(4, 3, dtype=torch.float64)
        expected = layer(x)
        apply_weight_dropout(layer, p=0.3)
        found = expectation((layer(x), chance) for _, chance in masks(monkeypatch, (2, 3), 0.7))
        assert torch.allclose(found, expected, rtol=1e-10)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_elements_are_dropped_or_scaled_by_the_mask(self, dtype: torch.dtype) -> None:
        weight = torch.randn(30, 20).to(dtype)
        weight[0, 0] = math.inf
        torch.manual_seed(3)
        out = weight_dropout(weight, 0.25)
        torch.manual_seed(3)
        kept = kernels.keep_mask(weight.shape, random.draw_key(weight.device), mask_params(0.75))
        wide = weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(out, torch.where(kept, wide * mask_params(0.75).scale, 0.0).to(dtype))
        assert out.dtype == dtype

    def test_ends_of_the_rate_and_eval(self) -> None:
        weight = torch.randn(5, 4)
        assert weight_dropout(weight, 0.0) is weight
        assert torch.equal(weight_dropout(weight, 1.0), torch.zeros(5, 4))
        assert weight_dropout(weight, 0.5, training=False) is weight
        layer = apply_weight_dropout(nn.Linear(4, 5), p=0.9).eval()
        assert layer.weight is raw(layer)

    def test_shared_axes_drop_input_units(self) -> None:
        out = weight_dropout(torch.ones(9, 50), 0.5, shared_axes=0)
        assert torch.equal(out, out[:1].expand(9, 50))
        assert out[0].unique().tolist() == [0.0, 2.0]
        layer = apply_weight_dropout(nn.Linear(50, 9), p=0.5, shared_axes=0)
        assert ((layer.weight == 0).sum(0) % 9 == 0).all()
        assert "shared_axes=0" in repr(layer)

    def test_keep_prob_can_be_a_tensor(self) -> None:
        rates = torch.tensor([[0.0], [0.5], [1.0]])
        layer = apply_weight_dropout(nn.Linear(100, 3), keep_prob=rates)
        weight = layer.weight
        assert torch.equal(weight[0], torch.zeros(100))
        assert 20 < (weight[1] == 0).sum() < 80
        assert torch.equal(weight[2], raw(layer)[2])

    def test_empty_weights(self) -> None:
        assert weight_dropout(torch.ones(0, 3)).shape == (0, 3)

    @pytest.mark.slow
    def test_rate(self) -> None:
        n = draws_for(0.3, 0.01)
        check_rate(int((weight_dropout(torch.ones(n), keep_prob=0.3) != 0).sum()), n, 0.3, 0.01)


class TestGradients:
    def test_raw_weight_gets_the_gradient_under_the_mask_of_forward(self) -> None:
        layer = apply_weight_dropout(nn.Linear(30, 4), p=0.4)
        weight = raw(layer)
        with parametrize.cached():
            drawn = layer.weight
            layer(torch.ones(2, 30)).sum().backward()
        factor = torch.where(drawn == 0, 0.0, torch.tensor(1 / 0.6))
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        assert torch.allclose(weight.grad, 2 * factor)
        assert 0 < (factor == 0).sum() < factor.numel()

    def test_gradcheck_with_the_key_fixed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, torch.tensor([1, 2]))
        x = torch.randn(3, 4, dtype=torch.float64)
        weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda w: (x @ weight_dropout(w, 0.5).T).sin(), weight)
        assert torch.autograd.gradgradcheck(lambda w: (x @ weight_dropout(w, 0.5).T).sin(), weight)

    def test_weight_is_bit_equal_after_many_forwards(self) -> None:
        model = apply_weight_dropout(mlp(), "*.weight", 0.5, layers=nn.Linear)
        before = copy.deepcopy(model.state_dict())
        for _ in range(20):
            model(torch.randn(4, 6)).sum().backward()
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())

    def test_optimizer_that_knew_the_parameter_trains_it(self) -> None:
        layer = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        weight = layer.weight
        apply_weight_dropout(layer, p=0.5)
        assert raw(layer) is weight
        before = weight.detach().clone()
        for _ in range(10):
            optimizer.zero_grad()
            layer(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        assert (weight != before).all()

    def test_checkpointing_runs_under_the_same_mask(self) -> None:
        layer = apply_weight_dropout(nn.Linear(20, 20), p=0.5)
        x = torch.randn(3, 20)
        grads = []
        for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
            torch.manual_seed(4)
            raw(layer).grad = None
            run(x).square().sum().backward()
            grads.append(raw(layer).grad)
        assert torch.equal(*grads)


class TestLayers:
    @pytest.mark.parametrize(
        ("layer", "x"),
        [
            (nn.Linear(8, 6), torch.randn(2, 8)),
            (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
            (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)),
            (nn.ConvTranspose2d(4, 6, 3), torch.randn(2, 4, 5, 5)),
            (nn.Bilinear(4, 4, 3), torch.randn(2, 4)),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_works_on(self, layer: nn.Module, x: Tensor) -> None:
        args = (x, x) if isinstance(layer, nn.Bilinear) else (x,)
        plain = layer.eval()(*args)
        apply_weight_dropout(layer, p=0.5)
        assert torch.equal(layer(*args), plain)
        layer.train()
        assert not torch.equal(layer(*args), layer(*args))
        with parametrize.cached():
            assert torch.equal(layer(*args), layer(*args))
        remove_weight_dropout(layer)
        assert torch.equal(layer(*args), plain)

    def test_works_with_functional_call_and_transforms(self) -> None:
        layer = apply_weight_dropout(nn.Linear(40, 1, bias=False), p=0.5)
        name = "parametrizations.weight.original"
        values, x = {name: torch.ones(1, 40)}, torch.ones(6, 40)
        slope = grad(lambda given: functional_call(layer, given, (x[:1],)).sum())(values)[name]
        assert set(slope.unique().tolist()) == {0.0, 2.0}
        for randomness in ("same", "different"):
            out = vmap(lambda row: functional_call(layer, values, (row,)), randomness=randomness)(x)
            assert (out.unique().numel() == 1) == (randomness == "same")

    def test_cells_keep_a_mask_over_time_steps_within_cached(self) -> None:
        cell, x = apply_weight_dropout(nn.GRUCell(4, 20), "weight_hh", 0.5), torch.ones(1, 4)
        state = torch.ones(1, 20)
        assert not torch.equal(cell(x, state), cell(x, state))
        with parametrize.cached():
            assert torch.equal(cell(x, state), cell(x, state))


class TestPackage:
    def test_torch_finds_a_dropout_layer(self) -> None:
        assert isinstance(WeightDropout(), nn.modules.dropout._DropoutNd)

    def test_seeds(self) -> None:
        layer, x = apply_weight_dropout(nn.Linear(40, 3), p=0.5), torch.randn(2, 40)
        torch.manual_seed(1)
        first = layer(x)
        torch.manual_seed(1)
        assert torch.equal(layer(x), first)
        with torchdrop.frozen_masks(layer, seed=3):
            assert torch.equal(layer(x), layer(x))
        given = [weight_dropout(torch.ones(50), generator=torch.Generator().manual_seed(5)) for _ in range(2)]
        assert torch.equal(*given)
        own = apply_weight_dropout(nn.Linear(40, 3), p=0.5, generator=torch.Generator().manual_seed(5))
        a = own(x)
        own.parametrizations.weight[0].generator.manual_seed(5)
        assert torch.equal(own(x), a)

    def test_rates_by_name_and_schedules(self) -> None:
        model = apply_weight_dropout(mlp(), "*.weight", 0.5, layers=nn.Linear)
        torchdrop.set_keep_prob(model, {"0": 1.0, "3.parametrizations.weight.0": 0.0})
        assert model[0].weight is raw(model[0])
        assert torch.equal(model[3].weight, torch.zeros(3, 40))
        scheduler = torchdrop.KeepProbScheduler(model, {"*": torchdrop.schedules.linear(1.0, 0.5, steps=2)})
        scheduler.step()
        assert dict(torchdrop.keep_probs(model)) == dict.fromkeys(
            ("0.parametrizations.weight.0", "3.parametrizations.weight.0"), 0.75
        )
        x = torch.randn(2, 6)
        with torchdrop.disabled(model):
            on = model(x)
        assert torch.equal(on, model.eval()(x))

    @pytest.mark.parametrize("sampling", ["iid", "latin"])
    def test_monte_carlo_fires_it(self, sampling: str) -> None:
        model = apply_weight_dropout(mlp(), "*.weight", 0.5, layers=nn.Linear).eval()
        x = torch.randn(7, 6)
        with torchdrop.mc_dropout(model, seed=1) as report:
            first, second = model(x), model(x)
        assert len(report.active) == 2
        assert not torch.equal(first, second)
        with torchdrop.mc_dropout(model, seed=1):
            assert torch.allclose(model(x[:2]), first[:2], atol=1e-6)
        results = [
            torchdrop.mc_predict(model, x, samples=20, seed=2, task="regression", strategy=strategy, sampling=sampling)
            for strategy in ("loop", "vectorized")
        ]
        assert torch.allclose(results[0].mean, results[1].mean, atol=1e-6)
        assert (results[0].std > 0).all()
        assert torch.equal(model(x), model(x))

    @pytest.mark.slow
    def test_compiles_once_for_all_rates_with_the_masks_of_eager_code(self) -> None:
        from torch._dynamo.testing import CompileCounterWithBackend

        model = apply_weight_dropout(mlp(), "*.weight", 0.5, layers=nn.Linear)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        x = torch.randn(4, 6)
        for k in (0.5, 0.9, 1.0):
            torchdrop.set_keep_prob(model, {"*": k})
            torch.manual_seed(2)
            expected = model(x)
            torch.manual_seed(2)
            assert torch.allclose(compiled(x), expected, atol=1e-6)
        assert counter.frame_count == 1

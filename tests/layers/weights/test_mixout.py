"""Mixout: the published formula, what it preserves, and its parametrization."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.utils import parametrize

import torchdrop
from tests.enumeration import expectation, force, masks
from tests.strategies import DTYPES
from torchdrop.kernels.mask_params import ONE, mask_params
from torchdrop.kernels.masking import COMPUTE_DTYPE
from torchdrop.layers.weights.mixout import Mixout, apply_mixout, mixout, remove_mixout
from torchdrop.layers.weights.weight import apply_weight_dropout, weight_dropout


def published(w: Tensor, u: Tensor, kept: Tensor, keep_prob: float) -> Tensor:
    """((1 - m) u + m w - p u) / (1 - p), with the p that the threshold really has."""
    k = mask_params(keep_prob).threshold / ONE
    m = kept.to(w.dtype)
    return ((1 - m) * u + m * w - (1 - k) * u) / k


def trained(layer: nn.Linear, **options: Any) -> nn.Linear:
    """A layer under mixout whose weight has moved by 1 since."""
    apply_mixout(layer, **options)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(1.0)
    return layer


class TestDefinition:
    @pytest.mark.parametrize("k", [0.5, 0.3])
    def test_is_the_published_formula_and_keeps_the_expectation_by_enumeration(
        self, k: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        w, u = torch.randn(2, 2, 3, dtype=torch.float64)

        def outputs() -> Any:
            for kept, chance in masks(monkeypatch, (2, 3), k):
                out = mixout(w, u, keep_prob=k)
                assert torch.allclose(out, published(w, u, kept, k), rtol=1e-12, atol=1e-12)
                assert torch.equal(out[~kept], u[~kept])
                yield out, chance

        assert torch.allclose(expectation(outputs()), w, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_target_is_a_fixed_point_bit_for_bit(self, dtype: torch.dtype) -> None:
        w = torch.randn(40, 30).to(dtype)
        assert torch.equal(mixout(w, w.clone(), 0.37), w)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_half_types_are_rounded_once(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, torch.tensor([3, 4]))
        w, u = torch.randn(40, 30).to(dtype), torch.randn(40, 30).to(dtype)
        kept = mixout(w, u, 0.4) != u
        exact = published(w.double(), u.double(), kept, 0.6)
        out = mixout(w, u, 0.4)
        assert out.dtype == dtype
        assert 0.4 < kept.float().mean() < 0.8
        inside = torch.finfo(COMPUTE_DTYPE[dtype]).eps * 8 * (w.double().abs() + u.double().abs())
        once = torch.finfo(dtype).eps / 2 * exact.abs()
        assert ((out.double() - exact).abs() <= once + inside).all()

    def test_target_zero_is_dropout_of_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, torch.tensor([3, 4]))
        w = torch.randn(20, 20)
        assert torch.equal(mixout(w, torch.zeros(20, 20), 0.4), weight_dropout(w, 0.4))

    def test_ends_of_the_rate_and_eval(self) -> None:
        w, u = torch.randn(2, 5, 4)
        assert mixout(w, u, 0.0) is w
        assert torch.equal(mixout(w, u, 1.0), u)
        assert mixout(w, u, 0.5, training=False) is w
        assert torch.equal(mixout(w, u, keep_prob=torch.tensor(1.0)), w)
        layer = trained(nn.Linear(4, 5)).eval()
        assert layer.weight is layer.parametrizations.weight.original

    def test_keep_prob_can_be_a_tensor(self) -> None:
        w, u = torch.randn(2, 3, 50)
        out = mixout(w, u, keep_prob=torch.tensor([[0.0], [0.5], [1.0]]))
        assert torch.equal(out[0], u[0])
        assert torch.equal(out[2], w[2])
        assert 0 < (out[1] == u[1]).sum() < 50

    def test_shared_axes_replace_input_units(self) -> None:
        w, u = torch.randn(2, 9, 50)
        dropped = mixout(w, u, 0.5, shared_axes=0) == u
        assert torch.equal(dropped, dropped[:1].expand(9, 50))
        assert 0 < dropped[0].sum() < 50
        layer = trained(nn.Linear(50, 9), p=0.5, shared_axes=0)
        moved = layer.weight - layer.parametrizations.weight[0].target
        assert (((moved.abs() < 0.5).sum(0)) % 9 == 0).all()

    def test_dropped_infinity_is_the_target(self) -> None:
        out = mixout(torch.full((100,), math.inf), torch.ones(100), 0.5)
        assert set(out.tolist()) == {1.0, math.inf}

    def test_empty(self) -> None:
        assert mixout(torch.ones(0, 3), torch.ones(0, 3)).shape == (0, 3)


class TestGradients:
    def test_gradcheck_with_the_key_fixed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, torch.tensor([1, 2]))
        w, u = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(lambda w, u: mixout(w, u, 0.5).sin(), (w, u))
        assert torch.autograd.gradgradcheck(lambda w, u: mixout(w, u, 0.5).sin(), (w, u))

    def test_raw_weight_gets_the_gradient_and_the_start_none(self) -> None:
        layer = trained(nn.Linear(30, 4), p=0.5)
        with parametrize.cached():
            kept = layer.weight != layer.parametrizations.weight[0].target
            layer(torch.ones(1, 30)).sum().backward()
        weight = layer.parametrizations.weight.original
        assert torch.equal(weight.grad, torch.where(kept, 2.0, 0.0))
        assert [name for name, _ in layer.named_parameters()] == ["bias", "parametrizations.weight.original"]

    def test_transforms(self) -> None:
        w, u = torch.randn(2, 40)
        assert set(grad(lambda w: mixout(w, u, 0.5).sum())(w).unique().tolist()) == {0.0, 2.0}
        rows = vmap(lambda w: mixout(w, u, 0.5) == u, randomness="different")(w.expand(6, 40))
        assert not torch.equal(rows[0], rows[1])
        rows = vmap(lambda w: mixout(w, u, 0.5) == u, randomness="same")(w.expand(6, 40))
        assert torch.equal(rows[0], rows[1])


class TestParametrization:
    def test_model_computes_as_before_until_it_is_trained(self) -> None:
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        x = torch.randn(3, 6)
        plain = model(x)
        apply_mixout(model, "*.weight", 0.9, layers=nn.Linear)
        assert torch.equal(model(x), plain)
        assert len(torchdrop.keep_probs(model)) == 2
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))

    def test_start_persists_in_the_state_dict(self) -> None:
        layer = trained(nn.Linear(4, 3), p=0.5)
        keys = ["bias", "parametrizations.weight.original", "parametrizations.weight.0.target"]
        assert list(layer.state_dict()) == keys
        other = apply_mixout(nn.Linear(4, 3), p=0.5)
        other.load_state_dict(layer.state_dict())
        torch.manual_seed(1)
        out = layer(torch.ones(1, 4))
        torch.manual_seed(1)
        assert torch.equal(other(torch.ones(1, 4)), out)
        with pytest.raises(RuntimeError, match=r"Missing key.*parametrizations\.weight\.0\.target"):
            other.load_state_dict(nn.Linear(4, 3).state_dict())

    def test_start_is_a_copy_and_moves_with_the_layer(self) -> None:
        layer = trained(nn.Linear(4, 3), p=1.0)
        start = layer.parametrizations.weight[0].target
        assert torch.allclose(layer.parametrizations.weight.original - start, torch.ones(3, 4))
        assert torch.equal(layer.weight, start)
        layer.half()
        assert layer.weight.dtype == torch.half
        other = copy.deepcopy(layer)
        remove_mixout(other)
        assert torch.equal(layer.weight, layer.parametrizations.weight[0].target)

    def test_removal_leaves_what_was_trained(self) -> None:
        layer = nn.Linear(4, 3)
        weight = layer.weight
        trained(layer, p=0.5)
        now = weight.detach().clone()
        remove_mixout(layer)
        assert layer.weight is weight
        assert torch.equal(weight, now)
        assert type(layer) is nn.Linear

    def test_rates_seeds_and_monte_carlo(self) -> None:
        model = nn.Sequential(trained(nn.Linear(6, 30), p=0.5), nn.ReLU(), nn.Linear(30, 1))
        x = torch.randn(4, 6)
        torch.manual_seed(1)
        first = model(x)
        torch.manual_seed(1)
        assert torch.equal(model(x), first)
        with torchdrop.frozen_masks(model):
            assert torch.equal(model(x), model(x))
        with torchdrop.disabled(model):
            off = model(x)
        assert torch.equal(off, model.eval()(x))
        results = [
            torchdrop.mc_predict(model, x, samples=8, seed=2, task="regression", strategy=strategy)
            for strategy in ("loop", "vectorized")
        ]
        assert torch.allclose(results[0].mean, results[1].mean, atol=1e-5)
        assert (results[0].std > 0).all()
        torchdrop.set_keep_prob(model, {"0": 0.0})
        start = model[0].parametrizations.weight[0].target
        assert torch.equal(model.train()[0].weight, start)

    @pytest.mark.slow
    def test_compiles_once_for_all_rates_with_the_masks_of_eager_code(self) -> None:
        from torch._dynamo.testing import CompileCounterWithBackend

        layer = trained(nn.Linear(6, 30), p=0.5)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        x = torch.randn(4, 6)
        for k in (0.5, 0.9, 1.0):
            torchdrop.set_keep_prob(layer, {"*": k})
            torch.manual_seed(2)
            expected = layer(x)
            torch.manual_seed(2)
            assert torch.allclose(compiled(x), expected, atol=1e-5)
        assert counter.frame_count == 1


class TestErrors:
    @pytest.mark.parametrize(
        ("target", "error", "message"),
        [
            (3.0, TypeError, "target must be a tensor, got float"),
            (torch.ones(3), ValueError, "target must have the input's shape, (2, 3), got (3,)"),
            (torch.ones(2, 3).double(), ValueError, "target must have the input's dtype, torch.float32, got torch.fl"),
            (torch.ones(2, 3, device="meta"), ValueError, "target must have the input's device, cpu, got meta"),
        ],
    )
    def test_targets(self, target: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            mixout(torch.ones(2, 3), target)

    def test_other_arguments(self) -> None:
        with pytest.raises(TypeError, match=r"^target must be a tensor, got float$"):
            Mixout(1.0)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=r"^result type Float can't be cast to the desired output type Long"):
            mixout(torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"^dropout probability has to be between 0 and 1, but got -0.1$"):
            mixout(torch.ones(3), torch.ones(3), -0.1)
        with pytest.raises(ValueError, match=r"does not broadcast against the mask's shape \(5, 4\), for 'weight'$"):
            apply_mixout(nn.Linear(4, 5), keep_prob=torch.ones(3))

    def test_parametrizing_twice_and_removing_what_is_not_there(self) -> None:
        layer = apply_mixout(nn.Linear(3, 3))
        for again in (apply_mixout, apply_weight_dropout):
            with pytest.raises(ValueError, match=r"^weight is under Mixout already: change its rate with"):
                again(layer)
        with pytest.raises(ValueError, match=r"^'bias' names no parameter under Mixout of the Linear"):
            remove_mixout(layer, "bias")
        remove_mixout(layer)
        with pytest.raises(ValueError, match=r"^'\*' names no parameter under Mixout of the Linear: there are none$"):
            remove_mixout(layer)

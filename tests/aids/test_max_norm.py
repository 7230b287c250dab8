"""The constraint on the norms of incoming weights, as a parametrization and as a step after the optimizer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.strategies import DTYPES
from torchdrop.aids.max_norm import MaxNorm, Units, max_norm, max_norm_


def in_place(module: nn.Module, c: float, dim: int | None = None) -> Tensor:
    max_norm_(module, c, dim)
    return module.weight.detach()  # type: ignore[union-attr, operator]


def parametrized(module: nn.Module, c: float, dim: int | None = None) -> Tensor:
    return max_norm(module, c, dim).weight.detach()  # type: ignore[union-attr, operator]


both = pytest.mark.parametrize("form", [in_place, parametrized])


def linear(weight: Tensor) -> nn.Linear:
    """A layer with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def exact(weight: Tensor, c: float) -> Tensor:
    """The definition, in float64."""
    wide = weight.double()
    return wide * (c / wide.norm(dim=1, keepdim=True)).clamp(max=1)


class TestDefinition:
    @both
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("columns", [1, 7, 255, 256, 257, 1000, 70_000])
    def test_norms_and_weights(self, form: Any, dtype: torch.dtype, columns: int) -> None:
        weight = (torch.randn(5, columns) * torch.tensor([0.0, 0.01, 0.5, 1.0, 30.0])[:, None]).to(dtype)
        c = weight[2].double().norm().item() * 1.2
        found = form(linear(weight), c)
        eps = torch.finfo(dtype).eps
        assert found.dtype == dtype
        assert (found.double().norm(dim=1) <= c * (1 + 4 * eps)).all()
        over = weight.double().norm(dim=1) > c
        assert over.any()
        assert not over.all()
        assert torch.equal(found[~over], weight[~over])
        tiny = torch.finfo(dtype).smallest_normal * eps
        assert torch.allclose(found.double(), exact(weight, c), rtol=max(4 * eps, 1e-12), atol=tiny)

    @both
    def test_many_equal_weights_lose_no_digits(self, form: Any) -> None:
        """One long sum in float32 is off by 0.2 % here."""
        found = form(linear(torch.full((1, 4_000_000), 0.1)), 1.0)
        assert found.double().norm().item() == pytest.approx(1.0, rel=1e-6)

    @both
    @given(data=st.data())
    def test_of_any_size(self, form: Any, data: st.DataObject) -> None:
        """From the smallest to the largest that float32 and float64 hold."""
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        limits = torch.finfo(dtype)
        least, most = math.log10(limits.tiny) + 8, math.log10(limits.max) - 1
        size = 10 ** data.draw(st.floats(least, most))
        c = 10 ** data.draw(st.floats(least, most))
        weight = (torch.tensor([[1.0, -0.5, 0.0], [0.6, 0.0, 0.8], [0.0, 0.0, 0.0]], dtype=torch.float64) * size).to(
            dtype
        )
        found = form(linear(weight), c).double()
        norms = torch.tensor([math.hypot(*row) for row in weight.tolist()], dtype=torch.float64)
        expected = weight.double()
        expected[norms > c] = expected[norms > c] / norms[norms > c, None] * c
        assert torch.allclose(found, expected, rtol=1e-5, atol=float(limits.tiny))
        within = norms <= c
        assert torch.equal(found[within], weight.double()[within])

    @both
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_largest_numbers(self, form: Any, dtype: torch.dtype) -> None:
        most = torch.finfo(dtype).max
        found = form(linear(torch.full((2, 4), most, dtype=dtype)), 2.0)
        assert torch.equal(found, torch.ones(2, 4, dtype=dtype))

    @both
    def test_bound_below_what_squares_hold(self, form: Any) -> None:
        found = form(linear(torch.tensor([[3e-25, 4e-25], [3e-31, 4e-31]])), 5e-30)
        assert torch.allclose(found, torch.tensor([[3e-30, 4e-30], [3e-31, 4e-31]]), rtol=1e-6, atol=0)

    @both
    def test_infinite_and_nan_rows_stay_seen(self, form: Any) -> None:
        weight = torch.tensor([[math.inf, 1.0], [math.nan, 1.0], [3.0, 4.0]])
        found = form(linear(weight), 1.0)
        assert torch.equal(found[:2].nan_to_num(nan=-1), weight[:2].nan_to_num(nan=-1))
        assert torch.allclose(found[2], torch.tensor([0.6, 0.8]))

    @both
    @pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    def test_empty(self, form: Any, shape: tuple[int, int]) -> None:
        assert form(linear(torch.zeros(shape)), 1.0).shape == shape

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_was_rescaled_stays(self, dtype: torch.dtype) -> None:
        layer = linear((10 * torch.randn(200, 300)).to(dtype))
        assert max_norm_(layer, 1.7) == 200
        once = layer.weight.detach().clone()
        assert max_norm_(layer, 1.7) == 0
        assert torch.equal(layer.weight, once)
        assert torch.equal(parametrized(layer, 1.7), once)

    def test_count_and_signed_zeros(self) -> None:
        layer = linear(torch.tensor([[-0.0, 1.0], [3.0, -0.0], [0.0, 5.0]]))
        assert max_norm_(layer, 2.0) == 2
        assert layer.weight.signbit().tolist() == [[True, False], [False, True], [False, False]]

    @both
    def test_forms_agree_with_renorm(self, form: Any) -> None:
        weight = torch.randn(20, 30)
        assert torch.allclose(form(linear(weight), 5.0), weight.renorm(2, 0, 5.0), rtol=1e-6)


class TestUnits:
    @both
    @pytest.mark.parametrize("dim", [0, 1, -1, -2])
    def test_dim_is_that_of_renorm(self, form: Any, dim: int) -> None:
        weight = torch.randn(6, 9)
        assert torch.allclose(form(linear(weight), 2.0, dim), weight.renorm(2, dim, 2.0), rtol=1e-6)

    @both
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_convolutions(self, form: Any, dims: int) -> None:
        layer = getattr(nn, f"Conv{dims}d")(4, 6, 3, groups=2)
        weight = layer.weight.detach().clone()
        c = weight.flatten(1).norm(dim=1).median().item()
        assert torch.allclose(form(layer, c), weight.renorm(2, 0, c), rtol=1e-6)

    @both
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("dims", [1, 2])
    def test_transposed_convolutions(self, form: Any, dims: int, groups: int) -> None:
        """Each output channel of each group by itself: a unit's output is 0 if and only if its weights are."""
        layer = getattr(nn, f"ConvTranspose{dims}d")(4, 6, 3, groups=groups)
        weight = layer.weight.detach().clone()
        parts = weight.chunk(groups, 0)
        norms = torch.cat([part.transpose(0, 1).flatten(1).norm(dim=1) for part in parts])
        assert norms.shape == (6,)
        c = norms.median().item()
        expected = torch.cat([part.renorm(2, 1, c) for part in parts])
        assert torch.allclose(form(layer, c), expected, rtol=1e-6)
        assert not torch.allclose(expected, weight)

    def test_units_of_a_transposed_convolution_are_its_output_channels(self) -> None:
        layer = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)
        units = Units(1, 2)
        x = torch.randn(1, 4, 5)
        for unit in range(6):
            with torch.no_grad():
                layer.weight.copy_(torch.ones_like(layer.weight))
                split = units.split(layer.weight)
                split.mul_(units.spread(torch.arange(6) != unit, split))
            silent = (layer(x)[0] == 0).all(1)
            assert silent.tolist() == [other == unit for other in range(6)]

    @both
    def test_embedding_has_rows(self, form: Any) -> None:
        layer = nn.Embedding(5, 8, max_norm=1.0)
        mine = copy.deepcopy(layer)
        mine.max_norm = None
        layer(torch.arange(5))
        assert torch.allclose(form(mine, 1.0), layer.weight, rtol=1e-6)

    @both
    def test_channels_last(self, form: Any) -> None:
        layer = nn.Conv2d(4, 6, 3)
        expected = form(copy.deepcopy(layer), 0.3)
        found = form(layer.to(memory_format=torch.channels_last), 0.3)
        assert torch.allclose(found, expected, rtol=1e-6)
        assert found.is_contiguous(memory_format=torch.channels_last)

    @both
    def test_noncontiguous(self, form: Any) -> None:
        weight = torch.randn(700, 4).T
        layer = nn.Linear(700, 4)
        layer.weight = nn.Parameter(weight)
        expected = weight.clone().renorm(2, 0, 3.0)
        assert not layer.weight.is_contiguous()
        assert torch.allclose(form(layer, 3.0), expected, rtol=1e-6)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.PReLU(4),
        nn.Flatten(),
        nn.Linear(4 * 36, 10),
        nn.LayerNorm((2, 5)[1:]),
    )


class TestModels:
    def test_parametrizes_matrices_alone(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(7, 4)
                self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm((6, 6)), nn.Bilinear(6, 6, 2))
                self.norms = nn.ModuleList([nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.RMSNorm((3, 3))])
                self.slope = nn.PReLU(3)

        model = Net()
        assert max_norm(model, 1e-3) is model
        constrained = [name for name, one in model.named_modules() if parametrize.is_parametrized(one)]
        assert constrained == ["embedding", "body.0", "body.2"]
        assert all(one.weight.flatten(1).norm(dim=1).max() <= 1.00001e-3 for one in (model.embedding, model.body[2]))
        other = Net()
        before = {name: value.clone() for name, value in other.state_dict().items()}
        assert max_norm_(other, 1e-3) == 7 + 6 + 2
        changed = [name for name, value in other.state_dict().items() if not torch.equal(value, before[name])]
        assert changed == ["embedding.weight", "body.0.weight", "body.2.weight"]

    def test_tied_weights_stay_tied_and_count_once(self) -> None:
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
        model[1].weight = model[0].weight
        with torch.no_grad():
            model[0].weight.mul_(100)
        assert max_norm_(copy.deepcopy(model), 1.0) == 7
        max_norm(model, 1.0)
        assert model[0].parametrizations.weight.original is model[1].parametrizations.weight.original
        assert torch.allclose(model[1].weight.norm(dim=1), torch.ones(7))
        assert len(list(model.parameters())) == 2

    def test_shared_module(self) -> None:
        layer = nn.Linear(3, 3)
        model = max_norm(nn.Sequential(layer, layer), 1.0)
        assert len(model[0].parametrizations.weight) == 1

    def test_another_name(self) -> None:
        lstm = nn.LSTM(3, 4)
        with torch.no_grad():
            lstm.weight_hh_l0.fill_(3.0)
        assert max_norm_(lstm, 2.0, name="weight_hh_l0") == 16
        assert torch.allclose(lstm.weight_hh_l0, torch.ones(16, 4))
        attention = nn.MultiheadAttention(4, 2)
        max_norm(attention, 0.1, name="in_proj_weight")
        assert attention.in_proj_weight.norm(dim=1).max() <= 0.1 * (1 + 1e-6)
        assert not parametrize.is_parametrized(attention.out_proj)

    def test_constrains_what_a_recurrent_layer_computes(self) -> None:
        lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
        mine = max_norm(copy.deepcopy(lstm), 0.2, name="weight_ih_l0")
        assert max_norm_(lstm, 0.2, name="weight_ih_l0") == 16
        assert torch.allclose(mine(x)[0], lstm(x)[0], atol=1e-6)

    def test_training_under_it(self) -> None:
        """Both keep the bound while an optimizer pushes against it."""
        x, y = torch.randn(30, 5), 50 * torch.randn(30, 3)
        for step in (False, True):
            layer = nn.Linear(5, 3) if step else max_norm(nn.Linear(5, 3), 0.5)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            rescaled = 0
            for _ in range(20):
                optimizer.zero_grad()
                (layer(x) - y).square().mean().backward()
                optimizer.step()
                rescaled += max_norm_(layer, 0.5) if step else 0
                assert (layer.weight.norm(dim=1) <= 0.5 * (1 + 1e-6)).all()
            assert torch.allclose(layer.weight.norm(dim=1), torch.full((3,), 0.5))
            assert rescaled > 30 or not step

    def test_in_place_is_seen_by_autograd(self) -> None:
        layer, x = linear(10 * torch.ones(1, 2)), torch.ones(1, 2, requires_grad=True)
        out = layer(x).sum()
        max_norm_(layer, 1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()

    def test_compiles_whole(self) -> None:
        layer, x = max_norm(nn.Linear(6, 4), 0.3), torch.randn(3, 6)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x), layer(x))


class TestParametrization:
    def test_gradient(self) -> None:
        """Units within, over, at 0; each rescaled one feels the direction alone."""
        weight = torch.tensor(
            [[0.1, 0.2, 0.0], [3.0, -1.0, 2.0], [0.0, 0.0, 0.0], [0.0, 7.0, 0.0]], dtype=torch.float64
        )
        form = MaxNorm(1.5, Units(0, 1))
        assert torch.autograd.gradcheck(form, weight.requires_grad_())
        assert torch.autograd.gradgradcheck(form, weight)
        jacobian = torch.autograd.functional.jacobian(form, weight)
        assert torch.equal(jacobian[2, :, 2], torch.eye(3, dtype=torch.float64))
        assert (jacobian[1, :, 1] @ weight[1]).abs().max() < 1e-15

    @pytest.mark.parametrize("units", [Units(1, 1), Units(1, 2), Units(2, 1)])
    def test_gradient_by_other_units(self, units: Units) -> None:
        weight = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
        norms = units.rows(units.split(weight)).norm(dim=1)
        assert torch.autograd.gradcheck(MaxNorm(norms.median().item() * 1.01, units), weight)

    def test_gradient_of_extreme_weights_is_finite(self) -> None:
        weight = torch.tensor([[1e30, 1e30], [1e-40, 0.0], [0.0, 0.0], [math.inf, 1.0]], requires_grad=True)
        (slope,) = torch.autograd.grad(MaxNorm(1.0, Units(0, 1))(weight).sum(), weight)
        assert slope.isfinite().all()
        assert torch.equal(slope[1:], torch.ones(3, 2))

    def test_state_dict_holds_the_unconstrained_weight(self) -> None:
        layer = nn.Linear(3, 2)
        weight = (10 * layer.weight).detach()
        layer.weight = nn.Parameter(weight.clone())
        max_norm(layer, 1.0)
        assert list(layer.state_dict()) == ["bias", "parametrizations.weight.original"]
        assert torch.equal(layer.parametrizations.weight.original, weight)
        again = max_norm(nn.Linear(3, 2), 1.0)
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again.weight, layer.weight)
        assert "MaxNorm(c=1.0, dim=0)" in repr(layer)

    def test_undoing_leaves_the_constrained_weight(self) -> None:
        layer = linear(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        max_norm(layer, 1.0)
        parametrize.remove_parametrizations(layer, "weight")
        assert list(layer.state_dict()) == ["weight"]
        assert torch.allclose(layer.weight, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
        max_norm(layer, 0.5)
        assert layer.weight.norm(dim=1).max() <= 0.5 * (1 + 1e-6)

    def test_assigning(self) -> None:
        layer = max_norm(nn.Linear(2, 1), 1.0)
        layer.weight = torch.tensor([[3.0, 4.0]])
        assert torch.equal(layer.parametrizations.weight.original, torch.tensor([[3.0, 4.0]]))
        assert torch.allclose(layer.weight, torch.tensor([[0.6, 0.8]]))

    def test_on_top_of_another(self) -> None:
        layer = max_norm(parametrizations.weight_norm(nn.Linear(30, 4)), 0.1)
        assert torch.allclose(layer.weight.norm(dim=1), torch.full((4,), 0.1))

    def test_deep_copies(self) -> None:
        layer = max_norm(nn.Linear(30, 4), 0.1)
        assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


class TestRefusals:
    @pytest.mark.parametrize("function", [max_norm, max_norm_])
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"c": 0}, ValueError, "c must be positive and finite, got 0"),
            ({"c": -1.0}, ValueError, "c must be positive and finite, got -1.0"),
            ({"c": math.nan}, ValueError, "c must be positive and finite, got nan"),
            ({"c": math.inf}, ValueError, "c must be positive and finite, got inf"),
            ({"c": "3"}, TypeError, "c must be a number, got str"),
            ({"c": True}, TypeError, "c must be a number, got bool"),
            ({"c": torch.tensor(1.0)}, TypeError, "c must be a number, got Tensor"),
            ({"dim": 2}, ValueError, r"dim must be in \[-2, 2\) for weight of shape \(2, 3\), got 2"),
            ({"dim": -3}, ValueError, r"dim must be in \[-2, 2\) for weight of shape \(2, 3\), got -3"),
            ({"dim": 1.0}, TypeError, "dim must be an integer or None, got float"),
            ({"dim": True}, TypeError, "dim must be an integer or None, got bool"),
            ({"name": 3}, TypeError, "name must be a string such as 'weight', got int"),
            (
                {"name": "wieght"},
                ValueError,
                "module must have a parameter named 'wieght' of two .*, got Linear without",
            ),
            ({"name": "bias"}, ValueError, "module must have a parameter named 'bias' of two dimensions or more"),
            ({"module": nn.Linear(2, 2).weight}, TypeError, "module must be a torch.nn.Module, got Parameter"),
            ({"module": nn.ReLU()}, ValueError, "got ReLU without one"),
            ({"module": nn.LayerNorm((2, 3))}, ValueError, "got LayerNorm without one"),
            (
                {"module": nn.LazyLinear(3)},
                ValueError,
                "weight has no shape yet, its layer is lazy: run the model once",
            ),
        ],
    )
    def test_arguments(self, function: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        usual = {"module": nn.Linear(3, 2), "c": 1.0}
        with pytest.raises(error, match=message):
            function(**usual | arguments)

    def test_integer_weight(self) -> None:
        layer = nn.Linear(3, 2)
        layer.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int64), requires_grad=False)
        with pytest.raises(ValueError, match=r"weight must be a floating-point tensor, got torch.int64"):
            max_norm_(layer, 1.0)

    def test_twice_changes_nothing(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), max_norm(nn.Linear(3, 2), 1.0))
        with pytest.raises(ValueError, match=r"1\.weight is under a maximum norm already: undo that first"):
            max_norm(model, 2.0)
        assert not parametrize.is_parametrized(model[0])

    @pytest.mark.parametrize("by", [parametrizations.weight_norm, lambda layer: max_norm(layer, 2.0)])
    def test_in_place_under_a_parametrization_changes_nothing(self, by: Any) -> None:
        model = nn.Sequential(nn.Linear(3, 3), by(nn.Linear(3, 2)))
        before = model[0].weight.detach().clone()
        with pytest.raises(
            ValueError, match=r"1\.weight is parametrized, so it cannot be rescaled in place: use max_norm"
        ):
            max_norm_(model, 0.01)
        assert torch.equal(model[0].weight, before)

    def test_dim_that_one_of_many_lacks_changes_nothing(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(3, 3))
        with pytest.raises(ValueError, match=r"dim must be in \[-2, 2\) for 1.weight"):
            max_norm(model, 1.0, 3)
        assert not parametrize.is_parametrized(model[0])

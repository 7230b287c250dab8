"""The penalty that dropout amounts to, against sums over all masks and against the published formulas."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchdrop
from torchdrop.aids.penalty import equivalent_l2
from torchdrop.core.rate import realized

RATES = [0.1, 0.5, 0.8, 0.97]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def realized_number(keep_prob: float) -> float:
    k = realized(keep_prob)
    assert isinstance(k, float)
    return k


def expectation(function: Callable[[Tensor], Tensor], shape: tuple[int, ...], k: float) -> Tensor:
    """E[function(mask / k)], by a sum over all masks."""
    total = torch.zeros(())
    for bits in itertools.product((0.0, 1.0), repeat=math.prod(shape)):
        kept = sum(bits)
        mask = torch.tensor(bits).reshape(shape)
        total = total + k**kept * (1 - k) ** (len(bits) - kept) * function(mask / k)
    return total


def negative_log_likelihood(loss: str, z: Tensor, y: Tensor) -> Tensor:
    if loss == "squared":
        return (y - z).square().sum()
    if loss == "bernoulli":
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum")
    if loss == "poisson":
        return (z.exp() - y * z).sum()
    return F.cross_entropy(z, y, reduction="sum")


def targets(loss: str, shape: tuple[int, ...]) -> Tensor:
    if loss == "squared":
        return torch.randn(shape)
    if loss == "bernoulli":
        return torch.randint(0, 2, shape).double()
    if loss == "poisson":
        return torch.randint(0, 4, shape).double()
    return torch.randint(0, shape[1], (shape[0], *shape[2:]))


class TestExact:
    @pytest.mark.parametrize("k", RATES)
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_linear_regression_by_all_masks(self, k: float, outputs: int) -> None:
        """All 2^(n d) masks at once, of a matrix of n rows and d columns."""
        x, y, layer = torch.randn(3, 3), torch.randn(3, outputs), nn.Linear(3, outputs)
        q = realized_number(k)
        with torch.no_grad():
            noisy = expectation(lambda gates: (y - layer(x * gates)).square().sum(), (3, 3), q)
            expected = noisy - (y - layer(x)).square().sum()
        formula = (1 - q) / q * (layer.weight.square().sum(0) * x.square().sum(0)).sum()
        for found in (
            equivalent_l2(nn.Sequential(torchdrop.Dropout(keep_prob=k), layer), x).total,
            equivalent_l2(layer, x, keep_prob=k).total,
        ):
            assert found.item() == pytest.approx(expected.item(), rel=1e-12)
            assert found.item() == pytest.approx(formula.item(), rel=1e-13)

    def test_torchs_layer_has_its_nominal_rate(self) -> None:
        x, layer = torch.randn(4, 3), nn.Linear(3, 1)
        p = 1 / 3
        found = equivalent_l2(nn.Sequential(nn.Dropout(p), layer), x).total
        expected = p / (1 - p) * (layer.weight.square() * x.square().sum(0)).sum()
        assert found.item() == pytest.approx(expected.item(), rel=1e-14)

    def test_the_realized_rate_counts(self) -> None:
        """At a keep_prob of 1e-9 the threshold is a whole number of 2**-32s, 7 % off."""
        x, layer = torch.ones(1, 1), nn.Linear(1, 1)
        q = realized_number(1e-9)
        assert abs(q / 1e-9 - 1) > 0.01
        found = equivalent_l2(nn.Sequential(torchdrop.Dropout(keep_prob=1e-9), layer), x).total
        assert found.item() == pytest.approx((1 - q) / q * layer.weight.item() ** 2, rel=1e-12)

    @pytest.mark.parametrize("ours", [False, True])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_channels_on_convolutions(self, dims: int, ours: bool) -> None:
        k = 0.75
        source: Any = torchdrop if ours else nn
        dropout = getattr(source, f"Dropout{dims}d")(1 - k)
        conv = getattr(nn, f"Conv{dims}d")(3, 2, 2)
        x = torch.randn(2, 3, *[3] * dims)
        y = torch.randn(2, 2, *[2] * dims)
        with torch.no_grad():
            noisy = expectation(lambda gates: (y - conv(x * gates)).square().sum(), (2, 3, *[1] * dims), k)
            expected = noisy - (y - conv(x)).square().sum()
        found = equivalent_l2(nn.Sequential(dropout, conv), x)
        assert found.total.item() == pytest.approx(expected.item(), rel=1e-12)
        elementwise = equivalent_l2(nn.Sequential(nn.Dropout(1 - k), conv), x).total
        assert abs(elementwise.item() / expected.item() - 1) > 1e-3

    @pytest.mark.parametrize(
        ("arguments", "mask"),
        [
            ({"shared_axes": 1}, (2, 1, 2)),
            ({"shared_axes": 0}, (1, 3, 2)),
            ({"shared_axes": (0, 2)}, (1, 3, 1)),
            ({"noise_shape": (None, 1, 1)}, (2, 1, 1)),
        ],
    )
    def test_shared_masks(self, arguments: dict[str, Any], mask: tuple[int, ...]) -> None:
        k = 0.5
        x, y = torch.randn(2, 3, 2), torch.randn(2, 2)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
        with torch.no_grad():
            noisy = expectation(lambda gates: (y - linear(x * gates)).square().sum(), mask, k)
            expected = noisy - (y - linear(x)).square().sum()
        model = nn.Sequential(torchdrop.Dropout(keep_prob=k, **arguments), linear)
        assert equivalent_l2(model, x).total.item() == pytest.approx(expected.item(), rel=1e-12)

    @pytest.mark.parametrize("unbatched", ["Dropout1d", "Dropout3d"])
    def test_without_a_batch(self, unbatched: str) -> None:
        dims = int(unbatched[-2])
        x = torch.randn(3, *[2] * dims)
        conv = getattr(nn, f"Conv{dims}d")(3, 1, 2)
        with torch.no_grad():
            noisy = expectation(lambda gates: conv(x * gates).square().sum(), (3, *[1] * dims), 0.5)
            expected = noisy - conv(x).square().sum()
        found = equivalent_l2(nn.Sequential(getattr(nn, unbatched)(0.5), conv), x).total
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)

    @pytest.mark.parametrize("outputs", [1, 3])
    def test_one_row_without_a_batch(self, outputs: int) -> None:
        x, layer = torch.randn(3), nn.Linear(3, outputs)
        found = equivalent_l2(layer, x, keep_prob=0.5).total
        assert found.item() == pytest.approx((layer.weight * x).square().sum().item(), rel=1e-12)

    def test_scalar_input_and_output(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dropout = nn.Dropout(0.2)

            def forward(self, x: Tensor) -> Tensor:
                return 3 * self.dropout(x)

        assert equivalent_l2(Scaled(), torch.tensor(2.0)).total.item() == pytest.approx(0.25 * 36)

    def test_rate_that_is_a_tensor(self) -> None:
        ks = torch.tensor([0.5, 0.25, 1.0])
        x, layer = torch.randn(4, 3), nn.Linear(3, 2)
        expected = ((1 - ks) / ks * layer.weight.square().sum(0) * x.square().sum(0)).sum()
        for dropout in (torchdrop.Dropout(keep_prob=ks), torchdrop.Dropout(keep_prob=ks[None], shared_axes=0)):
            found = equivalent_l2(nn.Sequential(dropout, layer), x).total
            assert found.item() == pytest.approx(expected.item(), rel=1e-8)
        assert equivalent_l2(layer, x, keep_prob=ks).total.item() == pytest.approx(expected.item(), rel=1e-8)

    def test_gaussian_dropout_has_the_same_moments(self) -> None:
        x, layer = torch.randn(4, 3), nn.Linear(3, 1)
        found = equivalent_l2(nn.Sequential(torchdrop.GaussianDropout(keep_prob=0.7), layer), x).total
        assert found.item() == pytest.approx(equivalent_l2(layer, x, keep_prob=0.7).total.item(), rel=1e-9)

    def test_original_formulation(self) -> None:
        """Not scaled in training: the outputs are k z in the mean, and vary around that."""
        x, y, layer = torch.randn(2, 3), torch.randn(2, 1), nn.Linear(3, 1)
        k = 0.75
        with torch.no_grad():
            noisy = expectation(lambda gates: (y - layer(x * gates * k)).square().sum(), (2, 3), k)
            expected = noisy - (y - layer(k * x)).square().sum()
        found = equivalent_l2(nn.Sequential(torchdrop.Dropout(keep_prob=k, inverted=False), layer), x).total
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)


GLMS = ["bernoulli", "poisson", "categorical"]


class TestGeneralizedLinearModels:
    @pytest.mark.parametrize("k", RATES)
    def test_wager_for_one_output(self, k: float) -> None:
        """R = 1/2 sum_i A''(x_i b) Var[x~_i b], with Var = (1 - k) / k sum_j x_ij^2 b_j^2."""
        x, layer = torch.randn(7, 5), nn.Linear(5, 1)
        q = realized_number(k)
        variance = (1 - q) / q * x.square() @ layer.weight[0].square()
        z = layer(x)[:, 0]
        p = 1 / (1 + (-z).exp())
        for loss, curvature in (("bernoulli", p * (1 - p)), ("poisson", z.exp())):
            found = equivalent_l2(layer, x, loss=loss, keep_prob=k).total
            assert found.item() == pytest.approx((curvature * variance).sum().item() / 2, rel=1e-12)

    def test_softmax_by_its_hessian(self) -> None:
        x, layer = torch.randn(6, 4), nn.Linear(4, 3)
        expected = 0.0
        for row in x:
            p = layer(row).softmax(0)
            hessian = p.diag() - p.outer(p)
            covariance = layer.weight @ row.square().diag() @ layer.weight.T  # (1 - k) / k is 1
            expected += (hessian * covariance).sum().item() / 2
        assert equivalent_l2(layer, x, loss="categorical", keep_prob=0.5).total.item() == pytest.approx(expected)

    def test_softmax_of_one_row_without_a_batch(self) -> None:
        x, layer = torch.randn(4), nn.Linear(4, 3)
        one = equivalent_l2(layer, x, loss="categorical", keep_prob=0.5).total
        row = equivalent_l2(layer, x[None], loss="categorical", keep_prob=0.5).total
        assert one.item() == pytest.approx(row.item(), rel=1e-12)
        assert one.item() > 0

    def test_two_classes_are_one_logit(self) -> None:
        x, layer = torch.randn(6, 4), nn.Linear(4, 2)
        both = equivalent_l2(layer, x, loss="categorical", keep_prob=0.6).total
        difference = nn.Linear(4, 1)
        with torch.no_grad():
            difference.weight.copy_(layer.weight[1:] - layer.weight[:1])
            difference.bias.copy_(layer.bias[1:] - layer.bias[:1])
        one = equivalent_l2(difference, x, loss="bernoulli", keep_prob=0.6).total
        assert both.item() == pytest.approx(one.item(), rel=1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize("loss", GLMS)
    def test_approaches_the_sum_over_all_masks(self, loss: str) -> None:
        """At keep_prob 0.5 gates are symmetric: the remainder is two orders in the weights above the penalty."""
        x = torch.randn(2, 3)
        layer = nn.Linear(3, 3 if loss == "categorical" else 1)
        y = targets(loss, (2, 3) if loss == "categorical" else (2, 1))
        with torch.no_grad():
            layer.weight.mul_(0.02)
        relative = []
        for size in (1.0, 0.5, 0.25):
            small = nn.Linear(3, layer.out_features)
            with torch.no_grad():
                small.weight.copy_(size * layer.weight)
                small.bias.copy_(layer.bias)
                clean = negative_log_likelihood(loss, small(x), y)
                noisy = expectation(lambda g, s=small: negative_log_likelihood(loss, s(x * g), y), (2, 3), 0.5)
            found = equivalent_l2(small, x, loss=loss, keep_prob=0.5).total.item()
            relative.append(abs(found / (noisy - clean).item() - 1))
        assert relative[0] < 2e-3
        assert relative[0] / relative[1] == pytest.approx(4, rel=0.1)
        assert relative[1] / relative[2] == pytest.approx(4, rel=0.1)

    @pytest.mark.parametrize("loss", GLMS)
    def test_remainder_is_of_third_order_where_gates_are_skewed(self, loss: str) -> None:
        x = torch.rand(2, 2) + 0.5
        layer = nn.Linear(2, 3 if loss == "categorical" else 1)
        y = targets(loss, (2, layer.out_features))
        direction = torch.rand_like(layer.weight) + 0.5
        if loss == "categorical":
            direction[1:] = 0
        relative = []
        for size in (0.02, 0.01):
            with torch.no_grad():
                layer.weight.copy_(size * direction)
                layer.bias.copy_(torch.linspace(0.7, 0.1, layer.out_features))
                clean = negative_log_likelihood(loss, layer(x), y)
                noisy = expectation(lambda g: negative_log_likelihood(loss, layer(x * g), y), (2, 2), 0.8)
            found = equivalent_l2(layer, x, loss=loss, keep_prob=0.8).total.item()
            relative.append(abs(found / (noisy - clean).item() - 1))
        assert relative[0] < 0.02
        assert relative[0] / relative[1] == pytest.approx(2, rel=0.1)

    @pytest.mark.parametrize("loss", ["squared", *GLMS])
    def test_gradient_in_the_parameters(self, loss: str) -> None:
        """The Hessian depends on them, and that part of the gradient is there."""
        x, layer = torch.randn(3, 2), nn.Linear(2, 3)

        def penalty(weight: Tensor, bias: Tensor) -> Tensor:
            model = nn.Linear(2, 3)
            del model.weight, model.bias
            model.weight, model.bias = weight, bias  # type: ignore[assignment]
            return equivalent_l2(model, x, loss=loss, keep_prob=0.5).total  # type: ignore[arg-type]

        weight, bias = (one.detach().requires_grad_() for one in (layer.weight, layer.bias))
        assert torch.autograd.gradcheck(penalty, (weight, bias))
        (by_bias,) = torch.autograd.grad(penalty(weight, bias), bias, allow_unused=True)
        assert (by_bias is not None and by_bias.abs().max() > 1e-3) == (loss != "squared")

    @pytest.mark.parametrize("loss", GLMS)
    def test_gradient_where_the_curvature_vanishes(self, loss: str) -> None:
        layer = nn.Linear(1, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[-2000.0], [-3000.0]]))
        total = equivalent_l2(layer, torch.ones(1, 1), loss=loss, keep_prob=0.5).total  # type: ignore[arg-type]
        slopes = torch.autograd.grad(total, list(layer.parameters()))
        assert total.item() == 0
        assert all(slope.isfinite().all() for slope in slopes)


class TestNetworks:
    def model(self) -> nn.Sequential:
        return nn.Sequential(
            nn.Dropout(0.2), nn.Linear(3, 4), nn.Tanh(), torchdrop.Dropout(keep_prob=0.5), nn.Linear(4, 2)
        )

    def test_gauss_newton_by_jacobians(self) -> None:
        model, x = self.model(), torch.randn(5, 3)
        found = equivalent_l2(model, x, loss="categorical")
        expected = {"0": 0.0, "3": 0.0}
        for row in x:
            hidden = model[1:3](row)
            p = model[4](hidden).softmax(0)
            hessian = p.diag() - p.outer(p)
            for name, h, rest, ratio in (("0", row, model[1:3] + model[4:], 0.25), ("3", hidden, model[4], 1.0)):
                jacobian = torch.autograd.functional.jacobian(rest, h)
                expected[name] += ratio / 2 * (hessian * (jacobian @ h.square().diag() @ jacobian.T)).sum().item()
        assert list(found.by_layer) == ["0", "3"]
        for name, value in expected.items():
            assert found.by_layer[name].item() == pytest.approx(value, rel=1e-12)
        assert found.total.item() == pytest.approx(sum(expected.values()), rel=1e-12)

    def test_layers_without_a_curve_in_between_are_exact_together_to_first_order(self) -> None:
        """Two layers of dropout on one linear map: the penalty lacks their product alone."""
        x, w = torch.randn(2, 2), nn.Linear(2, 1)
        model = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.2), w)
        found = equivalent_l2(model, x)
        second = (w.weight.square() * x.square().sum(0)).sum().item()
        assert found.by_layer["0"].item() == pytest.approx(0.1 / 0.9 * second)
        assert found.by_layer["1"].item() == pytest.approx(0.25 * second)

    @pytest.mark.parametrize("loss", ["squared", *GLMS])
    def test_gradient(self, loss: str) -> None:
        model, x = self.model(), torch.randn(3, 3)
        names, values = zip(*model.named_parameters(), strict=True)

        def penalty(*parameters: Tensor) -> Tensor:
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), parameters, strict=True):
                    parameter.copy_(value)
            return equivalent_l2(model, x, loss=loss).total  # type: ignore[arg-type]

        slopes = torch.autograd.grad(penalty(*values), list(model.parameters()), allow_unused=True)
        start = [value.detach().clone() for value in values]
        assert len(names) == 4
        for i, slope in enumerate(slopes):
            for place in range(start[i].numel()):
                moved = []
                for step in (1e-5, -1e-5):
                    shifted = [value.clone() for value in start]
                    shifted[i].view(-1)[place] += step
                    moved.append(penalty(*shifted).item())
                expected = (moved[0] - moved[1]) / 2e-5
                got = 0.0 if slope is None else slope.reshape(-1)[place].item()
                assert got == pytest.approx(expected, rel=1e-5, abs=1e-8)

    def test_layer_called_twice_adds_up(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dropout, self.a, self.b = nn.Dropout(0.5), nn.Linear(3, 1), nn.Linear(3, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.a(self.dropout(x)) + self.b(self.dropout(x))

        model, x = Twice(), torch.randn(4, 3)
        expected = ((model.a.weight.square() + model.b.weight.square()) * x.square().sum(0)).sum()
        found = equivalent_l2(model, x)
        assert list(found.by_layer) == ["dropout"]
        assert found.total.item() == pytest.approx(expected.item(), rel=1e-12)

    def test_residual_branch_is_not_gated(self) -> None:
        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dropout, self.f = nn.Dropout(0.5), nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return x + self.f(self.dropout(x))

        model, x = Residual(), torch.randn(4, 3, requires_grad=True)
        expected = (model.f.weight.square().sum(0) * x.square().sum(0)).sum()
        assert equivalent_l2(model, x).total.item() == pytest.approx(expected.item(), rel=1e-12)

    def test_what_follows_may_write_in_place(self) -> None:
        x, layer = torch.randn(4, 3), nn.Linear(3, 1)
        found = equivalent_l2(nn.Sequential(nn.Dropout(0.5), nn.ReLU(inplace=True), layer), x).total
        expected = (layer.weight.square() * x.relu().square().sum(0)).sum()
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)

    def test_a_layer_never_called_has_no_share(self) -> None:
        model = self.model()
        model.spare = nn.Dropout(0.5)
        model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))  # type: ignore[method-assign]
        found = equivalent_l2(model, torch.randn(2, 3))
        assert found.by_layer["spare"].item() == 0
        assert found.by_layer["0"].item() > 0

    def test_nothing_dropped_is_no_penalty(self) -> None:
        found = equivalent_l2(nn.Sequential(nn.Dropout(0.0), nn.Linear(3, 2)), torch.randn(4, 3))
        assert found.total.item() == 0
        assert equivalent_l2(nn.Linear(3, 2), torch.randn(0, 3), keep_prob=0.5).total.item() == 0


class TestRowsThatDependOnEachOther:
    """The outputs of each row by themselves give the same as one pass for each output, or else that is not done."""

    def brute(self, model: nn.Module, x: Tensor, gates: Tensor, forward: Callable[[Tensor, Tensor], Tensor]) -> float:
        jacobian = torch.autograd.functional.jacobian(lambda g: forward(x, g), gates)
        return jacobian.square().sum().item()

    def test_time_before_batch(self) -> None:
        lstm = nn.LSTM(2, 3)

        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dropout, self.lstm = nn.Dropout(0.5), lstm

            def forward(self, x: Tensor) -> Tensor:
                return self.lstm(self.dropout(x))[0]

        for time in (2, 3):
            x = torch.randn(time, 2, 2)
            expected = self.brute(lstm, x, torch.ones_like(x), lambda x, g: lstm(x * g)[0])
            assert equivalent_l2(Last(), x).total.item() == pytest.approx(expected, rel=1e-10)

    def test_the_future_may_act_on_the_past(self) -> None:
        class Backwards(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dropout = nn.Dropout(0.5)

            def forward(self, x: Tensor) -> Tensor:
                return self.dropout(x).flip(0).cumsum(0).flip(0)

        x = torch.tensor([2.0, 3.0])
        assert equivalent_l2(Backwards(), x).total.item() == pytest.approx(4 + 9 + 9)

    def test_dropout_of_what_all_rows_share(self) -> None:
        """As on positional embeddings, or on weights."""

        class Shared(nn.Module):
            def __init__(self, batch: int) -> None:
                super().__init__()
                self.dropout, self.weight = nn.Dropout(0.5), nn.Parameter(torch.randn(batch, 3))

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.dropout(self.weight).T

        for batch in (5, 4):
            model, x = Shared(batch), torch.randn(4, 3)
            expected = (x[:, None] * model.weight).square().sum().item()
            assert equivalent_l2(model, x).total.item() == pytest.approx(expected, rel=1e-12)

    def test_one_mask_for_all_rows_of_time(self) -> None:
        """A mask shared over dimension 0, which is not that of rows."""

        class Summed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dropout = torchdrop.Dropout(keep_prob=0.5, shared_axes=0)

            def forward(self, x: Tensor) -> Tensor:
                return self.dropout(x).sum(0)

        x = torch.randn(3, 2)
        expected = x.sum(0).square().sum().item()
        assert equivalent_l2(Summed(), x).total.item() == pytest.approx(expected, rel=1e-12)

    def test_halves_side_by_side(self) -> None:
        """Twice as many rows of activations as of outputs, of which even ones act on even ones."""

        class Halves(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dropout = nn.Dropout(0.5)

            def forward(self, x: Tensor) -> Tensor:
                a, b = self.dropout(torch.cat([x, 2 * x])).chunk(2)
                return a + b

        x = torch.tensor([0.1, -0.7, 1.1, 0.4])
        expected = ((3 * x).exp() * 5 * x.square()).sum().item() / 2
        assert equivalent_l2(Halves(), x, loss="poisson").total.item() == pytest.approx(expected, rel=1e-12)

    def test_mixed_gates(self) -> None:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rows, self.all = nn.Dropout(0.5), nn.Dropout(0.2)
                self.weight = nn.Parameter(torch.randn(3))

            def forward(self, x: Tensor) -> Tensor:
                return self.rows(x) @ self.all(self.weight)

        model, x = Both(), torch.randn(4, 3)
        found = equivalent_l2(model, x)
        terms = (x * model.weight).square().sum().item()
        assert found.by_layer["rows"].item() == pytest.approx(terms)
        assert found.by_layer["all"].item() == pytest.approx(0.25 * terms)

    def test_sequences_of_classes(self) -> None:
        """Logits (B, C, T), in which each position has a loss of its own."""
        conv = nn.Conv1d(2, 3, 2)
        x = torch.randn(2, 2, 3)
        found = equivalent_l2(nn.Sequential(nn.Dropout(0.5), conv), x, loss="categorical").total
        expected = 0.0
        for row in x:
            p = conv(row).softmax(0)
            jacobian = torch.autograd.functional.jacobian(conv, row)
            for t in range(2):
                hessian = p[:, t].diag() - p[:, t].outer(p[:, t])
                j = (jacobian[:, t] * row).flatten(1)
                expected += (hessian * (j @ j.T)).sum().item() / 2
        assert found.item() == pytest.approx(expected, rel=1e-12)


class TestState:
    def test_flags_hooks_and_statistics_stay(self) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        model[2].eval()
        flags = [one.training for one in model.modules()]
        buffers = [one.clone() for one in model.buffers()]
        x = torch.randn(5, 3)
        random = torch.get_rng_state()
        equivalent_l2(model, x)
        assert [one.training for one in model.modules()] == flags
        assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
        assert torch.equal(torch.get_rng_state(), random)
        assert not any(one._forward_hooks for one in model.modules())
        assert all(one.grad is None for one in model.parameters())
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            equivalent_l2(model, torch.randn(5, 7))
        assert [one.training for one in model.modules()] == flags
        assert not any(one._forward_hooks for one in model.modules())

    def test_normalization_uses_running_statistics(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
        model(5 + torch.randn(50, 3))
        x = torch.randn(4, 3)
        h = model[0].eval()(x).detach()
        expected = (model[2].weight.square() * h.square().sum(0)).sum()
        assert equivalent_l2(model.train(), x).total.item() == pytest.approx(expected.item(), rel=1e-12)

    def test_can_be_added_to_a_loss(self) -> None:
        layer, x = nn.Linear(3, 1), torch.randn(4, 3)
        penalty = equivalent_l2(layer, x, keep_prob=0.5)
        (layer(x).square().sum() + penalty.total).backward()
        alone = layer.weight.grad
        assert alone is not None
        direct = 2 * (layer(x).T @ x + layer.weight * x.square().sum(0))
        assert torch.allclose(alone, direct)

    def test_without_gradients(self) -> None:
        layer, x = nn.Linear(3, 1), torch.randn(4, 3)
        with torch.no_grad():
            found = equivalent_l2(layer, x, keep_prob=0.5)
        assert not found.total.requires_grad
        assert not found.by_layer["inputs"].requires_grad
        assert found.total.item() == equivalent_l2(layer, x, keep_prob=0.5).total.item()

    def test_frozen_model(self) -> None:
        layer, x = nn.Linear(3, 1).requires_grad_(False), torch.randn(4, 3)
        expected = (layer.weight.square() * x.square().sum(0)).sum()
        assert equivalent_l2(layer, x, keep_prob=0.5).total.item() == pytest.approx(expected.item())

    def test_half_precision_sums_in_single(self) -> None:
        layer, x = nn.Linear(20, 1).half(), 4000 * torch.ones(10, 20, dtype=torch.float16)
        found = equivalent_l2(layer, x, keep_prob=0.5).total
        assert found.dtype == torch.float32
        expected = (layer.weight.double().square().sum() * 10 * 4000**2).item()
        assert found.item() == pytest.approx(expected, rel=2e-3)

    def test_transformer_serves_its_layers_and_names_what_it_leaves_out(self) -> None:
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True).requires_grad_(False)
        x = torch.randn(2, 3, 4)
        with pytest.warns(UserWarning, match="dropout inside self_attn is not in the penalty"):
            found = equivalent_l2(layer, x)
        assert found.left_out == ("self_attn",)
        assert set(found.by_layer) == {"dropout", "dropout1", "dropout2"}
        assert all(share.item() > 0 for share in found.by_layer.values())
        assert "left out, as they draw inside themselves: self_attn" in str(found)

    def test_transformer_with_gradients(self) -> None:
        """Through an attention behind the gates, whose fast kernels have no second derivative."""
        model = nn.Sequential(*[nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True) for _ in range(2)])
        for layer in model:
            layer.self_attn.dropout = 0.0
        found = equivalent_l2(model, torch.randn(2, 3, 4))
        assert found.left_out == ()
        found.total.backward()
        assert model[0].linear1.weight.grad is not None

    def test_arguments_and_outputs_in_structures(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dropout, self.out = nn.Dropout(0.5), nn.Linear(3, 1)

            def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
                return {"loss": None, "logits": scale * self.out(self.dropout(x))}

        model, x = Named(), torch.randn(4, 3)
        one = equivalent_l2(model, x).total.item()
        assert equivalent_l2(model, (x, 2.0)).total.item() == pytest.approx(4 * one)
        assert equivalent_l2(model, {"x": x, "scale": 3.0}).total.item() == pytest.approx(9 * one)
        assert equivalent_l2(model.out, (x,), keep_prob=0.5).total.item() == pytest.approx(one)

    def test_a_dropout_layer_alone(self) -> None:
        x = torch.randn(4, 3)
        found = equivalent_l2(nn.Dropout(0.5), x)
        assert list(found.by_layer) == ["(model)"]
        assert found.total.item() == pytest.approx(x.square().sum().item())

    def test_table(self) -> None:
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1), nn.Dropout(0.5), nn.Linear(1, 1))
        with torch.no_grad():
            for one in (1, 3):
                model[one].weight.fill_(1.0)
                model[one].bias.fill_(float(one == 1))
        lines = str(equivalent_l2(model, torch.ones(1, 1))).splitlines()
        assert lines[0] == "Penalty equivalent to dropout"
        assert [line.split() for line in lines[1:]] == [
            ["layer", "penalty", "share"], ["0", "1", "20", "%"], ["2", "4", "80", "%"], ["total", "5", "100", "%"],
        ]  # fmt: skip
        assert "nan" not in str(equivalent_l2(nn.Linear(1, 1), torch.ones(1, 1), keep_prob=1.0))

    def test_result_is_frozen(self) -> None:
        found = equivalent_l2(nn.Linear(1, 1), torch.ones(1, 1), keep_prob=0.5)
        with pytest.raises(AttributeError, match="cannot assign"):
            found.total = torch.zeros(())  # type: ignore[misc]


class Mine(nn.modules.dropout._DropoutNd):
    def forward(self, x: Tensor) -> Tensor:
        return x


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"module": "net"}, TypeError, "module must be a torch.nn.Module, got str"),
            ({"loss": "hinge"}, ValueError, "loss must be one of 'squared', 'bernoulli', .*, got 'hinge'"),
            ({"inputs": [[1.0]]}, TypeError, "inputs must be a tensor, a tuple .* mapping of named ones, got list"),
            ({"keep_prob": None}, TypeError, "keep_prob must be given for a module without .*, such as this Linear"),
            ({"keep_prob": 0.0}, ValueError, r"keep_prob must be in \(0, 1\], got 0.0: with nothing kept"),
            ({"keep_prob": 1.5}, ValueError, r"keep_prob must be in \[0, 1\], got 1.5"),
            ({"keep_prob": math.nan}, ValueError, r"keep_prob must be in \[0, 1\], got nan"),
            ({"keep_prob": "0.5"}, TypeError, "keep_prob must be a number or a tensor, got str"),
            ({"keep_prob": torch.tensor([0.5, 0.0, 1.0])}, ValueError, r"keep_prob must be in \(0, 1\], got 0.0"),
            ({"keep_prob": torch.full((2,), 0.5)}, ValueError, r"keep_prob of shape \(2,\) does not broadcast"),
            ({"inputs": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "floating-point tensor .*, got torch.int64"),
            ({"inputs": {"input": torch.ones(2, 3)}}, TypeError, "inputs must be one tensor where keep_prob is given"),
            ({"module": nn.Sequential(nn.Dropout())}, TypeError, "keep_prob is for a module without .* has '0': leave"),
            ({"module": nn.Dropout(1.0), "keep_prob": None}, ValueError, r"keep_prob of \(model\) must be in \(0, 1\]"),
            (
                {"module": nn.Sequential(torchdrop.Dropout(keep_prob=0)), "keep_prob": None},
                ValueError,
                r"keep_prob of 0 must be in \(0, 1\], got 0.0",
            ),
            ({"module": nn.AlphaDropout(), "keep_prob": None}, ValueError, r"\(model\) is AlphaDropout, which changes"),
            ({"module": torchdrop.FeatureAlphaDropout(), "keep_prob": None}, ValueError, "is FeatureAlphaDropout"),
            ({"module": Mine(), "keep_prob": None}, TypeError, r"is Mine, whose noise is not known here: Dropout, "),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        usual = {"module": nn.Linear(3, 1), "inputs": torch.ones(2, 3), "keep_prob": 0.5}
        with pytest.raises(error, match=message):
            equivalent_l2(**usual | arguments)

    def test_inference_mode(self) -> None:
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside torch.inference_mode\(\)"):
            equivalent_l2(nn.Linear(3, 1), torch.ones(2, 3), keep_prob=0.5)

    def test_outputs(self) -> None:
        class Returns(nn.Module):
            def __init__(self, what: Callable[[Tensor], Any]) -> None:
                super().__init__()
                self.dropout, self.what = nn.Dropout(), what

            def forward(self, x: Tensor) -> Any:
                return self.what(self.dropout(x))

        x = torch.ones(2, 3)
        with pytest.raises(TypeError, match=r"must return a floating-point tensor, got torch\.int64"):
            equivalent_l2(Returns(lambda h: h.long()), x)
        with pytest.raises(TypeError, match="outputs must be one tensor, got Tensor, Tensor"):
            equivalent_l2(Returns(lambda h: (h, h)), x)
        with pytest.raises(RuntimeError, match="must be differentiable, and depend on a dropout layer"):
            equivalent_l2(Returns(lambda h: h.detach()), x)

    def test_no_warning_without_a_reason(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            equivalent_l2(nn.Linear(3, 1), torch.ones(2, 3), keep_prob=0.5)

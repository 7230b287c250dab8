"""The divergence from the log-uniform prior against its integral, and what it does to weights that nothing holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchdrop.core.regularization import regularization
from torchdrop.layers.variational.sparse import SparseVariationalConv2d, SparseVariationalLinear, sparse_variational_kl
from torchdrop.layers.variational.sparsity import sparsity
from torchdrop.layers.variational.variational import CONSTANT, VariationalConv1d, VariationalLinear, variational_kl


def divergence(log_alpha: float) -> float:
    """KL(N(1, alpha) || 1 / |w|) = E ln|w| - 1/2 ln alpha + constant: the trapezoidal rule over u = ln|w|."""
    deviation = math.exp(log_alpha / 2)
    u = torch.linspace(-45.0, math.log(1 + 12 * deviation), 40_001, dtype=torch.float64)
    density = sum(torch.exp(-(((sign * u.exp() - 1) / deviation) ** 2) / 2 + u) for sign in (1, -1))
    integrand = density / (deviation * math.sqrt(2 * math.pi))
    assert torch.trapezoid(integrand, u).item() == pytest.approx(1.0, abs=1e-9)
    value, coarse = (torch.trapezoid((u * integrand)[::step], u[::step]).item() for step in (1, 2))
    assert value == pytest.approx(coarse, abs=1e-8)
    return value - log_alpha / 2 + CONSTANT


def deviations(approximation: Tensor, log_alphas: Tensor) -> Tensor:
    return approximation - torch.tensor([divergence(a) for a in log_alphas.tolist()], dtype=torch.float64)


def test_sparse_kl_is_within_0_009_of_the_numerical_integral() -> None:
    log_alphas = torch.linspace(-9, 9, 145, dtype=torch.float64)
    assert deviations(sparse_variational_kl(log_alphas), log_alphas).abs().max() < 0.009


def test_gaussian_kl_follows_the_numerical_integral_for_alpha_up_to_1() -> None:
    log_alphas = torch.linspace(-9, 0, 73, dtype=torch.float64)
    off = deviations(variational_kl(log_alphas), log_alphas)
    assert off.abs().max() < 0.041
    upper = off[log_alphas > math.log(0.1)]
    assert (upper.max() - upper.min()) / 2 < 0.0045


def test_both_kinds_of_kl_agree_where_both_hold() -> None:
    log_alphas = torch.linspace(-8, 0, 50)
    assert (variational_kl(log_alphas) - sparse_variational_kl(log_alphas)).abs().max() < 0.05


@pytest.mark.parametrize("kl", [variational_kl, sparse_variational_kl])
def test_kl_falls_with_alpha_and_has_its_own_gradient(kl: object) -> None:
    assert callable(kl)
    log_alphas = torch.linspace(-30, -0.1, 50, dtype=torch.float64, requires_grad=True)
    assert (kl(log_alphas).diff() < 0).all()
    assert torch.autograd.gradcheck(kl, log_alphas)
    assert kl(torch.tensor([-1.0], dtype=torch.float16)).dtype == torch.float32
    with pytest.raises(RuntimeError, match="can't be cast"):
        kl(torch.tensor([1]))


def test_sparse_kl_is_finite_and_vanishes_for_boundless_alpha() -> None:
    far = torch.tensor([-200.0, 50.0, 1e30, math.inf], requires_grad=True)
    value = sparse_variational_kl(far)
    assert value[0].item() == pytest.approx(100 + 0.63576, rel=1e-6)
    assert value[1:].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-20)
    assert torch.autograd.grad(value.sum(), far)[0][:3].isfinite().all()


def test_regularizer_counts_each_weight() -> None:
    linear = VariationalLinear(5, 4, keep_prob=0.8)
    one = variational_kl(torch.tensor(0.25).log())
    assert linear.regularizer().item() == pytest.approx(20 * one.item(), rel=1e-5)
    for rates in ("unit", "weight"):
        conv = VariationalConv1d(4, 6, 3, groups=2, keep_prob=0.8, rates=rates)
        assert conv.regularizer().item() == pytest.approx(conv.weight.numel() * one.item(), rel=1e-5)
    pruning = SparseVariationalLinear(5, 4)
    alpha = pruning.log_sigma2.exp() / pruning.weight**2
    assert pruning.regularizer().item() == pytest.approx(sparse_variational_kl(alpha.log()).sum().item(), rel=1e-4)
    model = nn.ModuleList([linear, pruning, linear])
    assert regularization(model).item() == pytest.approx((linear.regularizer() + pruning.regularizer()).item())
    regularization(model).backward()
    assert all(p.grad is not None for p in (linear.logit_alpha, pruning.weight, pruning.log_sigma2))


def test_eval_leaves_out_weights_whose_log_alpha_is_above_the_threshold() -> None:
    layer = SparseVariationalLinear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.1, 0.0]]))
        layer.log_sigma2.copy_(torch.tensor([[2.9, 3.1, -9.0], [-1.7, -1.5, -9.0]]))
    assert torch.allclose(layer.log_alpha[0], torch.tensor([2.9, 3.1, -9.0]))
    expected = torch.tensor([[1.0, 0.0, 1.0], [0.1, 0.0, 0.0]])
    layer.eval()
    assert torch.equal(layer(torch.eye(3)).T, expected)
    assert torch.equal(layer.to_module().weight, expected)
    assert sparsity(layer).zeros == 3
    layer.threshold = 5.0
    assert torch.equal(layer.eval_weight(), layer.weight)
    layer.threshold = -math.inf
    assert layer.eval_weight().eq(0).all()


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda **to: SparseVariationalLinear(4, 3, log_sigma2=-8.0, **to), -8.0),
        (lambda **to: SparseVariationalConv2d(4, 3, 2, log_sigma2=-8.0, **to), -8.0),
        (lambda **to: VariationalLinear(4, 3, keep_prob=0.75, rates="unit", **to), -math.log(2)),
        (lambda **to: VariationalLinear(4, 3, keep_prob=0.75, rates="weight", **to), -math.log(2)),
    ],
)
def test_reset_parameters_starts_the_noise_anew(make: Any, first: float) -> None:
    layer = make()
    parameters, noise = dict(layer.named_parameters()), layer.get_parameter(layer.learned)
    before = layer.weight.clone()
    with torch.no_grad():
        noise.fill_(5.0)
    layer.reset_parameters()
    assert torch.allclose(noise, torch.full_like(noise, first))
    assert not torch.equal(layer.weight, before)
    assert all(layer.get_parameter(name) is parameter for name, parameter in parameters.items())
    late = make(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        late.get_parameter(layer.learned).fill_(5.0)
    late.reset_parameters()
    assert torch.equal(late.get_parameter(layer.learned), noise)


def trained(layer: nn.Module, x: Tensor, y: Tensor, steps: int = 400) -> list[float]:
    """The shares of zeros while the layer learns y = f(x), with the evidence lower bound as the objective."""
    torch.set_num_threads(1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    shares = []
    for step in range(steps):
        if step % (steps // 4) == 0:
            shares.append(sparsity(layer).share)
        likelihood = F.mse_loss(layer(x), y, reduction="sum") / (2 * 0.1**2)
        loss = (likelihood + min(1.0, 2 * step / steps) * regularization(layer)) / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*shares, sparsity(layer).share]


def test_sparsity_grows_on_data_with_idle_inputs() -> None:
    x = torch.randn(200, 20)
    x[:, 3:] = 0.0
    w = torch.tensor([[2.0, -1.0], [0.5, 1.0], [-1.5, 3.0]])
    layer = SparseVariationalLinear(20, 2)
    shares = trained(layer, x, x[:, :3] @ w + 0.1 * torch.randn(200, 2))
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert torch.equal(layer.eval_weight() == 0, (torch.arange(20) >= 3).expand(2, 20))
    assert (layer.eval_weight()[:, :3].T - w).abs().max() < 0.1
    assert shares[-1] == pytest.approx(34 / 40)


def test_sparsity_grows_on_images_with_an_idle_channel() -> None:
    x = torch.randn(16, 2, 6, 6)
    x[:, 1] = 0.0
    kernel = torch.tensor([[1.0, -2.0], [0.5, 1.5]])
    y = F.conv2d(x[:, :1], kernel.reshape(1, 1, 2, 2))
    layer = SparseVariationalConv2d(2, 1, 2)
    shares = trained(layer, x, y + 0.1 * torch.randn(y.shape))
    assert shares[0] == 0.0
    assert layer.eval_weight()[0, 1].eq(0).all()
    assert (layer.eval_weight()[0, 0] - kernel).abs().max() < 0.1
    assert shares[-1] == 0.5


def test_learned_rates_rise_where_nothing_holds_them() -> None:
    x = torch.randn(200, 3)
    x[:, 1:] = 0.0
    y = x[:, :1] + 0.1 * torch.randn(200, 1)
    layer = VariationalLinear(3, 1, rates="unit", keep_prob=0.8)
    trained(layer, x, y)
    assert layer.alpha[0] < 0.05
    assert layer.alpha[1:].min() > 0.5

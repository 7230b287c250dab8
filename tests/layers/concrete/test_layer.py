"""`ConcreteLayer`: dropout before the layer, the published regularizer, and a rate that data move."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import torchdrop
from tests.seeding import seeded
from torchdrop.core.regularization import regularization
from torchdrop.layers.concrete.concrete import ConcreteDropout, concrete_dropout
from torchdrop.layers.concrete.layer import ConcreteLayer, Regularizers, concrete_regularizers

FACTORS = (0.01, 0.2)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(6, 3), (5, 6), 6),
    "linear with time": (lambda: nn.Linear(6, 3), (5, 2, 6), 6),
    "conv1d": (lambda: nn.Conv1d(4, 2, 3), (5, 4, 9), 4),
    "conv2d": (lambda: nn.Conv2d(4, 2, 3, padding=1), (5, 4, 6, 6), 4),
    "one image": (lambda: nn.Conv2d(4, 2, 3), (4, 6, 6), 4),
    "groups": (lambda: nn.Conv2d(4, 2, 3, groups=2), (5, 4, 6, 6), 4),
    "conv3d": (lambda: nn.Conv3d(4, 2, 1), (2, 4, 3, 3, 3), 4),
    "transposed": (lambda: nn.ConvTranspose2d(4, 2, 3), (5, 4, 3, 3), 4),
}
"""What makes a layer, an input's shape, and K."""


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_comes_before_the_layer_and_drops_whole_channels_of_images(name: str) -> None:
    make, shape, _ = LAYERS[name]
    inner, x = make(), torch.randn(shape)
    layer = ConcreteLayer(inner, 0.4, regularizers=FACTORS, temperature=1.0)
    axes = None if isinstance(inner, nn.Linear) else tuple(range(-len(inner.kernel_size), 0))
    noisy = seeded(3, lambda: concrete_dropout(x, layer.dropout.logit_p, temperature=1.0, shared_axes=axes))
    assert torch.equal(seeded(3, layer, x), inner(noisy))
    assert torch.equal(layer.eval()(x), inner(x))
    if axes is not None:
        gate = seeded(3, layer.train().dropout, torch.ones(shape))
        assert torch.equal(gate, gate.amax(axes, keepdim=True).expand_as(gate))
        assert gate.unique().numel() == math.prod(shape[: -len(axes)])


@pytest.mark.parametrize("p", [0.01, 0.3, 0.95])
@pytest.mark.parametrize("name", LAYERS)
def test_the_regularizer_is_the_published_one(name: str, p: float) -> None:
    make, _, inputs = LAYERS[name]
    inner = make().double()
    layer = ConcreteLayer(inner, p, regularizers=FACTORS).double()
    layer.dropout.p = p
    squares = sum(w**2 for w in inner.weight.flatten().tolist())
    entropy = p * math.log(p) + (1 - p) * math.log(1 - p)
    expected = 0.01 * squares / (1 - p) + 0.2 * inputs * entropy
    assert layer.regularizer().item() == pytest.approx(expected, rel=1e-7)
    assert regularization(nn.Sequential(layer, nn.ReLU(), layer)).item() == pytest.approx(expected, rel=1e-7)


def test_the_regularizers_gradients() -> None:
    layer = ConcreteLayer(nn.Linear(4, 3), 0.3, regularizers=FACTORS).double()

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self) -> Tensor:
            return regularization(self)

    def value(weight: Tensor, rate: Tensor) -> Tensor:
        given = {"inner.layer.weight": weight, "inner.dropout.logit_p": rate}
        return functional_call(Sum(), given, ())

    start = (layer.layer.weight.detach().requires_grad_(), layer.dropout.logit_p.detach().requires_grad_())
    assert torch.autograd.gradcheck(value, start)
    layer.regularizer().backward()
    assert layer.layer.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_do_not_overflow(dtype: torch.dtype) -> None:
    layer = ConcreteLayer(nn.Linear(300, 300), 0.3, regularizers=FACTORS).to(dtype)
    nn.init.constant_(layer.layer.weight, 2.0)
    term = layer.regularizer()
    assert term.dtype == torch.float32
    k = layer.dropout.keep_prob.item()
    assert term.item() == pytest.approx(0.01 * 360_000 / k, rel=2e-2)
    assert layer(torch.randn(4, 300).to(dtype)).isfinite().all()


@pytest.mark.parametrize("value", [-1000.0, 80.0])
def test_extreme_rates_stay_finite(value: float) -> None:
    layer = ConcreteLayer(nn.Linear(4, 3), regularizers=FACTORS)
    with torch.no_grad():
        layer.dropout.logit_p.fill_(value)
    term = layer.regularizer()
    term.backward()
    assert term.isfinite()
    assert layer.dropout.logit_p.grad.isfinite()


def test_the_factors() -> None:
    assert concrete_regularizers(100, length_scale=0.1, precision=2.0) == pytest.approx((5e-5, 0.01))
    assert concrete_regularizers(100, length_scale=0.1, loss="cross_entropy") == pytest.approx((1e-4, 0.01))
    assert concrete_regularizers(200).dropout == concrete_regularizers(100).dropout / 2
    layer = ConcreteLayer(nn.Linear(1, 1), regularizers=concrete_regularizers(10))
    assert layer.regularizers == Regularizers(1e-5, 0.2)


@pytest.mark.parametrize("rate", [{"p": 0.2}, {"keep_prob": torch.tensor([0.8, 0.8])}])
def test_reset_parameters_starts_the_rate_anew(rate: dict[str, Any]) -> None:
    dropout = ConcreteDropout(**rate)
    logit_p = dropout.logit_p
    dropout.p = 0.5
    for module in torch.nn.Sequential(dropout, nn.Linear(2, 2)).children():
        module.reset_parameters()  # type: ignore[operator]
    assert dropout.logit_p is logit_p
    assert torch.allclose(dropout.p, torch.tensor(0.2))
    with torch.device("meta"):
        late = ConcreteDropout(0.2)
    late.to_empty(device="cpu").reset_parameters()
    assert math.isclose(late.p.item(), 0.2, rel_tol=1e-6)


def test_states_names_and_copies() -> None:
    layer = ConcreteLayer(nn.Linear(4, 3), 0.2, regularizers=FACTORS, temperature=0.5, unbiased=True)
    assert list(layer.state_dict()) == ["layer.weight", "layer.bias", "dropout.logit_p"]
    other = ConcreteLayer(nn.Linear(4, 3), 0.7, regularizers=FACTORS, temperature=0.5, unbiased=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4)
    for copied in (other, copy.deepcopy(layer)):
        assert torch.equal(seeded(3, copied, x), seeded(3, layer, x))
    assert isinstance(layer.dropout, ConcreteDropout)
    assert repr(layer.dropout) == "ConcreteDropout(p=0.2, temperature=0.5, unbiased=True)"
    assert torchdrop.keep_probs(nn.Sequential(layer, torchdrop.Dropout(0.5))) == {"1": 0.5}


def test_layers_that_are_still_lazy() -> None:
    layer = ConcreteLayer(nn.LazyLinear(3), 0.3, regularizers=(0.0, 1.0))
    layer(torch.randn(2, 7))
    entropy = 0.3 * math.log(0.3) + 0.7 * math.log(0.7)
    assert layer.regularizer().item() == pytest.approx(7 * entropy)


def test_monte_carlo_inference_and_its_eval_mode() -> None:
    model = nn.Sequential(
        ConcreteLayer(nn.Conv2d(2, 4, 3), 0.3, regularizers=FACTORS),
        nn.Flatten(),
        ConcreteLayer(nn.Linear(64, 2), 0.3, regularizers=FACTORS),
    ).eval()
    x = torch.randn(3, 2, 6, 6)
    with torchdrop.mc_dropout(model, seed=1) as report:
        first, second = model(x), model(x)
        assert [source.module for source in report.active] == ["0.dropout", "2.dropout"]
    with torchdrop.mc_dropout(model, seed=1):
        torch.testing.assert_close(model(x[:2]), first[:2])
    assert not torch.allclose(first, second)
    assert torch.equal(model(x), model(x))


@pytest.mark.slow
def test_a_step_compiles_without_breaks() -> None:
    model = nn.Sequential(ConcreteLayer(nn.Linear(4, 3), 0.3, regularizers=FACTORS))
    x = torch.randn(5, 4)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean() + regularization(model)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(seeded(3, compiled, x), seeded(3, loss, x))


def learned(p: float, examples: int) -> float:
    """The rate after a training on a regression whose noise has variance 1."""
    torch.manual_seed(0)
    x = torch.randn(examples, 8)
    y = x.sum(1, keepdim=True) + torch.randn(examples, 1)
    model = ConcreteLayer(nn.Linear(8, 1), p, regularizers=concrete_regularizers(examples, length_scale=1e-2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + regularization(model)).backward()
        optimizer.step()
    return model.dropout.p.item()


@pytest.mark.slow
def test_more_data_teach_a_smaller_rate_whatever_the_start() -> None:
    few, many = ([learned(p, examples) for p in (0.1, 0.5)] for examples in (5, 500))
    assert max(many) < 0.5 * min(few)
    assert few[0] == pytest.approx(few[1], rel=0.2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ConcreteLayer(nn.ReLU(), regularizers=FACTORS),
            TypeError,
            r"^layer must be an nn.Linear or a convolution of torch.nn, got ReLU: put ConcreteDropout before other la",
        ),
        (lambda: ConcreteLayer(nn.Linear(1, 1)), TypeError, r"regularizers"),
        (
            lambda: ConcreteLayer(nn.Linear(1, 1), regularizers=0.1),
            TypeError,
            r"^regularizers must be two numbers, lambda_w and lambda_d, got 0.1: see concrete_regularizers$",
        ),
        (lambda: ConcreteLayer(nn.Linear(1, 1), regularizers=(1.0,)), TypeError, r"got \(1.0,\): see"),
        (
            lambda: ConcreteLayer(nn.Linear(1, 1), regularizers=("a", 1.0)),
            TypeError,
            r"must be two numbers",
        ),
        (
            lambda: ConcreteLayer(nn.Linear(1, 1), regularizers=(1.0, -1.0)),
            ValueError,
            r"^regularizers must be finite and not negative, got \(1.0, -1.0\)$",
        ),
        (
            lambda: ConcreteLayer(nn.Linear(1, 1), regularizers=(math.nan, 1.0)),
            ValueError,
            r"must be finite and",
        ),
        (
            lambda: ConcreteLayer(nn.Linear(2, 1), torch.tensor([0.1, 0.2]), regularizers=FACTORS),
            ValueError,
            r"^a wrapped layer has a single rate, got a tensor of shape \(2,\)$",
        ),
        (lambda: ConcreteLayer(nn.Linear(1, 1), 0.0, regularizers=FACTORS), ValueError, r"^p must be strictly between"),
        (lambda: concrete_regularizers(0), ValueError, r"^examples must be positive and finite, got 0$"),
        (lambda: concrete_regularizers("9"), TypeError, r"^examples must be a number, got str$"),
        (
            lambda: concrete_regularizers(9, precision=math.inf),
            ValueError,
            r"^precision must be positive and finite",
        ),
        (lambda: concrete_regularizers(9, length_scale=-1), ValueError, r"^length_scale must be positive and finite"),
        (
            lambda: concrete_regularizers(9, loss="mse"),
            ValueError,
            r"^loss must be one of 'squared', 'cross_entropy', got 'mse'$",
        ),
    ],
)
def test_bad_arguments_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

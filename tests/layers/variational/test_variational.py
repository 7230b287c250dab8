"""Variational layers: the variance of their outputs, their noise, and the way from and to plain layers."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import jacrev, vmap

import torchdrop
from torchdrop.core import sites
from torchdrop.core.regularization import regularization
from torchdrop.layers.variational import sparse
from torchdrop.layers.variational import variational as gaussian
from torchdrop.layers.variational.base import Variational, local_reparameterization

PLAIN: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Linear": (lambda **to: nn.Linear(5, 4, **to), (6, 5)),
    "Conv1d": (lambda **to: nn.Conv1d(4, 6, 3, groups=2, stride=2, **to), (3, 4, 9)),
    "Conv2d": (lambda **to: nn.Conv2d(2, 4, (3, 2), padding=1, padding_mode="reflect", bias=False, **to), (2, 2, 5, 5)),
    "Conv3d": (lambda **to: nn.Conv3d(2, 2, 2, dilation=2, padding="same", **to), (2, 2, 3, 4, 3)),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "sparse": {"log_sigma2": -2.0},
    "layer": {"rates": "layer", "keep_prob": 0.7},
    "unit": {"rates": "unit", "keep_prob": 0.6},
    "weight": {"rates": "weight", "keep_prob": 0.9},
}

every_plain = pytest.mark.parametrize("kind", PLAIN)
every_form = pytest.mark.parametrize("form", SETTINGS)


def class_of(kind: str, form: str) -> type[Variational]:
    return getattr(sparse, f"SparseVariational{kind}") if form == "sparse" else getattr(gaussian, f"Variational{kind}")


def make(kind: str, form: str, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Variational, Tensor]:
    """A layer with noise that differs between weights, and an input."""
    plain, shape = PLAIN[kind]
    layer = class_of(kind, form).from_module(plain(dtype=dtype), **{**SETTINGS[form], **settings})
    with torch.no_grad():
        noise = layer.log_sigma2 if form == "sparse" else layer.logit_alpha
        noise += torch.randn_like(noise)
    return layer, torch.randn(shape, dtype=torch.float32).to(dtype)


def by_plain(layer: Variational, x: Tensor) -> Tensor:
    """The layer of torch.nn with the same weights, none of which is left out."""
    plain = layer.to_module()
    plain.weight = layer.weight
    return plain(x)


def alpha_of_each_weight(layer: Variational, form: str) -> Tensor:
    alpha = layer.alpha
    if form == "unit":
        groups = getattr(layer, "groups", 1)
        rows = torch.arange(len(layer.weight)) // (len(layer.weight) // groups)
        columns = torch.arange(layer.weight.shape[1])
        alpha = alpha[rows[:, None] * len(columns) + columns].reshape(
            *layer.weight.shape[:2], *[1] * (layer.weight.dim() - 2)
        )
    return alpha.expand_as(layer.weight)


@every_plain
@every_form
def test_variance_of_y_is_that_of_independent_gaussian_weights(
    kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = make(kind, form)
    monkeypatch.setattr(sites, "standard_normal", lambda like, shape, *_: like.new_ones(shape))
    deviation = layer(x) - by_plain(layer, x)
    variance = alpha_of_each_weight(layer, form) * layer.weight**2
    slopes = jacrev(lambda w: layer._map(x, w, None))(layer.weight)
    expected = (slopes**2 * variance).flatten(x.dim()).sum(-1)
    assert torch.allclose(deviation**2, expected, rtol=1e-6, atol=1e-12)
    assert expected.min() > 0


@every_plain
@every_form
def test_noise_is_added_once_an_output_and_has_mean_the_plain_output(
    kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = make(kind, form)
    z = torch.randn(layer(x).shape, dtype=torch.float64)
    outputs = []
    for sign in (1, -1):
        monkeypatch.setattr(sites, "standard_normal", lambda like, shape, *_, s=sign: s * z.reshape(shape))
        outputs.append(layer(x))
    assert torch.allclose(sum(outputs) / 2, by_plain(layer, x), atol=1e-12)
    assert torch.allclose((outputs[0] - outputs[1]) / 2, outputs[0] - by_plain(layer, x), atol=1e-12)


@pytest.mark.slow
def test_moments_of_y_over_many_rows() -> None:
    n = 2**18
    layer = sparse.SparseVariationalLinear(3, 2, dtype=torch.float64, log_sigma2=1.0)
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    z = (layer(x.expand(n, 3)) - by_plain(layer, x)) / (math.e * (x**2).sum()).sqrt()
    # P(|z| > 6.2) < 1e-9 for each mean; the sums of squares are chi-squared (Laurent and Massart, 2000, lemma 1).
    assert z.mean(0).abs().max() < 6.2 / math.sqrt(n)
    t = math.log(4e9)
    assert ((z**2).mean(0) - 1).abs().max() < 2 * math.sqrt(t / n) + 2 * t / n
    assert (z[:, 0] * z[:, 1]).mean().abs() < 6.5 / math.sqrt(n)
    assert (z[1:] * z[:-1]).mean(0).abs().max() < 6.5 / math.sqrt(n)


@every_plain
@every_form
def test_eval_is_the_plain_layer_and_so_is_to_module(kind: str, form: str) -> None:
    plain, shape = PLAIN[kind]
    trained, x = plain(), torch.randn(shape)
    layer = class_of(kind, form).from_module(trained, **{"log_sigma2": -60.0} if form == "sparse" else {}).eval()
    assert torch.equal(layer(x), trained(x))
    back = layer.to_module()
    assert type(back) is type(trained)
    assert repr(back) == repr(trained)
    assert not back.training
    assert torch.equal(back(x), trained(x))
    assert back.weight is not layer.weight
    assert set(dict(back.named_parameters())) == set(dict(trained.named_parameters()))


@every_plain
def test_from_module_copies_and_draws_nothing(kind: str) -> None:
    plain = PLAIN[kind][0]().eval().requires_grad_(False)
    state = torch.get_rng_state()
    layer = class_of(kind, "sparse").from_module(plain, threshold=2.0, log_sigma2=-5.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer.weight, plain.weight)
    assert layer.weight.data_ptr() != plain.weight.data_ptr()
    assert (layer.training, layer.weight.requires_grad, layer.log_sigma2.requires_grad) == (False, False, True)
    assert layer.log_sigma2.eq(-5.0).all()
    assert f"{plain.extra_repr()}, threshold=2.0" == layer.extra_repr()


@every_plain
@every_form
def test_a_constructor_takes_what_torch_nn_takes(kind: str, form: str) -> None:
    arguments = (3, 4) if kind == "Linear" else (4, 6, 3, 2, 1, 1, 2, False, "zeros")
    torch.manual_seed(1)
    layer = class_of(kind, form)(*arguments, dtype=torch.float64, **SETTINGS[form])
    torch.manual_seed(1)
    plain = getattr(nn, kind)(*arguments, dtype=torch.float64)
    assert isinstance(layer, getattr(nn, kind))
    assert torch.equal(layer.weight, plain.weight)
    noise = {"log_sigma2"} if form == "sparse" else {"logit_alpha"}
    assert set(layer.state_dict()) - set(plain.state_dict()) == noise
    assert all(p.dtype == torch.float64 for p in layer.parameters())
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert (set(missing), unexpected) == (noise, [])


@pytest.mark.parametrize(
    ("kind", "form"), [*(("Linear", form) for form in SETTINGS), ("Conv1d", "unit"), ("Conv2d", "sparse")]
)
def test_gradients_are_those_of_the_formula(kind: str, form: str) -> None:
    layer, x = make(kind, form)
    parameters = dict(layer.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters.values()))


@every_form
def test_gradients_are_finite_where_there_is_no_variance(form: str) -> None:
    layer, _ = make("Linear", form, torch.float32)
    with torch.no_grad():
        layer.weight[0] = 0.0
    x = torch.zeros(3, 5)
    x[0] = 1e-20
    x[1, 1] = 1.0
    x.requires_grad_()
    y = layer(x)
    (y.square().sum() + regularization(layer)).backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert torch.equal(y[2], layer.bias)


def test_a_variance_that_is_rounded_below_0_is_none_and_nan_stays() -> None:
    mean, variance = torch.ones(3), torch.tensor([-1e-9, 0.0, math.nan])
    y = local_reparameterization(mean, variance)
    assert y[:2].tolist() == [1.0, 1.0]
    assert y[2].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_form
def test_half_types_square_in_float32(dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make("Linear", form, dtype)
    x = x.sign() * 1000  # whose square is infinite in float16
    with torch.no_grad():
        layer.weight.mul_(0.01)
    monkeypatch.setattr(sites, "standard_normal", lambda like, shape, *_: torch.ones(shape))
    y = layer(x)
    assert y.dtype == dtype
    wide = copy.deepcopy(layer).float()(x.float())
    assert torch.allclose(y.float(), wide, rtol=0.02, atol=0.2)
    assert not torch.allclose(y, layer.eval()(x), rtol=0.02, atol=0.2)


def test_autocast_leaves_squares_alone() -> None:
    layer, x = make("Linear", "sparse", torch.float32)
    x = x * 1e20
    with torch.autocast("cpu", torch.float16):
        mean, variance = layer._map(x / 1e20, layer.weight, layer.bias), layer(x / 1e20)
        assert mean.dtype == variance.dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x * 1e-2)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@every_form
def test_memory_formats_and_strides_do_not_matter(form: str) -> None:
    layer, x = make("Conv2d", form)
    flat, wide = make("Linear", form)[0], torch.randn(5, 12, dtype=torch.float64)
    for module, first, second in (
        (layer, x, x.contiguous(memory_format=torch.channels_last)),
        (flat, wide.T[::2].contiguous(), wide.T[::2]),
    ):
        outputs = []
        for one in (first, second):
            torch.manual_seed(5)
            outputs.append(module(one))
        assert torch.allclose(*outputs, atol=1e-12)


def test_an_unbatched_image_and_an_empty_batch() -> None:
    layer, x = make("Conv2d", "sparse")
    assert layer(x[0]).shape == layer(x).shape[1:]
    assert layer(x[:0]).shape == (0, *layer(x).shape[1:])
    assert make("Linear", "unit")[0](torch.zeros(0, 5, dtype=torch.float64)).shape == (0, 4)


def test_seeds_generators_and_frozen_masks() -> None:
    layer, x = make("Linear", "sparse")
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    layer.generator = torch.Generator().manual_seed(2)
    drawn = layer(x)
    layer.generator.manual_seed(2)
    assert torch.equal(layer(x), drawn)
    layer.generator = None
    with torchdrop.frozen_masks(layer):
        assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmaps_randomness_modes(randomness: str) -> None:
    layer, x = make("Linear", "weight")
    out = vmap(layer, randomness=randomness)(x[:1].expand(3, 5))
    assert torch.allclose(out[0], out[1], atol=1e-12) == (randomness == "same")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@every_form
def test_compiled_code_has_the_noise_of_eager_code(kind: str, form: str) -> None:
    layer, x = make(kind, form)
    torch._dynamo.reset()  # all these layers share one forward
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    outputs = []
    for module in (layer, compiled):
        torch.manual_seed(4)
        y = module(x)
        outputs.append((y, *torch.autograd.grad(y.sum() + layer.regularizer(), layer.parameters())))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*outputs, strict=True))
    assert counter.frame_count == 1
    layer.eval()
    assert torch.allclose(compiled(x), layer(x))


@every_form
def test_monte_carlo_turns_them_on_row_by_row(form: str) -> None:
    layer, x = make("Linear", form)
    model = nn.Sequential(layer, nn.ReLU()).eval()
    with torchdrop.mc_dropout(model, seed=1):
        many = model(x)
    with torchdrop.mc_dropout(model, seed=1):
        few = model(x[:2])
    assert torch.allclose(many[:2], few, atol=1e-12)
    assert not torch.allclose(many, model(x))
    found = torchdrop.mc_predict(layer, x, samples=200, seed=1, task="regression")
    deviation = layer._map(x**2, layer._weight_variance(), None).sqrt()
    assert ((found.mean - by_plain(layer, x)).abs() < 6 * deviation / math.sqrt(200)).all()


def test_disabled_takes_the_noise_and_no_weights_away() -> None:
    layer, x = make("Linear", "sparse", log_sigma2=20.0)
    with torchdrop.disabled(layer):
        assert torch.equal(layer(x), by_plain(layer, x))
    assert torch.equal(layer.eval()(x), layer.bias.expand(6, 4))


@every_form
def test_copies_and_pickles_go_on_alike(form: str) -> None:
    layer, x = make("Linear", form)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        torch.manual_seed(2)
        y = layer(x)
        torch.manual_seed(2)
        assert torch.equal(other(x), y)


def test_keep_prob_is_that_of_noise_of_the_same_variance() -> None:
    layer = gaussian.VariationalLinear(3, 2, keep_prob=0.8, rates="unit")
    assert torch.allclose(layer.alpha, torch.full((3,), 0.25))
    assert torch.allclose(layer.keep_prob, torch.full((3,), 0.8))
    assert torch.allclose(layer.p + layer.keep_prob, torch.ones(3))
    pruned = sparse.SparseVariationalLinear(3, 2, log_sigma2=1e4)
    assert pruned.keep_prob.eq(0).all()
    assert not pruned.p.requires_grad


def test_local_reparameterization_as_a_function() -> None:
    mean, variance = torch.randn(4, 3), torch.rand(4, 3)
    assert local_reparameterization(mean, variance, training=False) is mean
    torch.manual_seed(1)
    y = local_reparameterization(mean, variance)
    torch.manual_seed(1)
    assert torch.equal(y, mean + variance.sqrt() * sites.standard_normal(mean, mean.shape))
    with pytest.raises(ValueError, match=r"variance must have the mean's shape, got \(3,\) for a mean of \(4, 3\)"):
        local_reparameterization(mean, variance[0])
    with pytest.raises(RuntimeError, match="can't be cast to the desired output type Long"):
        local_reparameterization(mean.long(), variance)
    with pytest.raises(TypeError, match="must be Tensor, not float"):
        local_reparameterization(mean, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gaussian.VariationalLinear(2, 2, keep_prob=0.5), ValueError, r"number in \(1/2, 1\).* got 0.5"),
        (lambda: gaussian.VariationalConv1d(2, 2, 1, keep_prob=1), ValueError, r"number in \(1/2, 1\).* got 1"),
        (lambda: gaussian.VariationalLinear(2, 2, keep_prob=2), ValueError, r"keep_prob must be in \[0, 1\], got 2"),
        (lambda: gaussian.VariationalLinear(2, 2, keep_prob="a"), TypeError, "number or a tensor, got str"),
        (lambda: gaussian.VariationalLinear(2, 2, rates="all"), ValueError, "'layer', 'unit' or 'weight', got 'all'"),
        (lambda: gaussian.VariationalLinear(2, 2, generator=1), TypeError, "torch.Generator or None, got int"),
        (lambda: sparse.SparseVariationalLinear(2, 2, threshold=math.nan), ValueError, "bound of ln alpha, got nan"),
        (lambda: sparse.SparseVariationalConv3d(2, 2, 1, threshold="3"), TypeError, "threshold must be a number"),
        (lambda: sparse.SparseVariationalLinear(2, 2, log_sigma2=math.inf), ValueError, "finite, got inf"),
        (lambda: sparse.SparseVariationalLinear(2, 2, log_sigma2=None), TypeError, "number, got NoneType"),
        (
            lambda: sparse.SparseVariationalLinear.from_module(nn.Conv1d(2, 2, 1)),
            TypeError,
            "SparseVariationalLinear.from_module takes a torch.nn.Linear, got Conv1d",
        ),
        (
            lambda: gaussian.VariationalConv2d.from_module(nn.LazyConv2d(2, 1)),
            ValueError,
            "got a lazy LazyConv2d that has none yet: run the model once first",
        ),
    ],
)
def test_what_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_wrong_inputs_are_torch_nns_errors() -> None:
    layer = sparse.SparseVariationalLinear(5, 4)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError) as ours:
        layer(torch.ones(2, 3))
    with pytest.raises(RuntimeError) as theirs:
        F.linear(torch.ones(2, 3), layer.weight, layer.bias)
    assert str(ours.value) == str(theirs.value)
    assert torch.equal(torch.get_rng_state(), state)

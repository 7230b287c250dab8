"""DropBlock as functions and modules: masks, gradients, element types and layouts, seeds, modes, errors."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from tests.seeding import seeded
from torchdrop.layers.drop_block.drop_block import (
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    drop_block1d,
    drop_block2d,
    drop_block3d,
)
from torchdrop.layers.dropout import dropout

FAMILY: dict[int, tuple[Callable[..., Tensor], type[DropBlock2d], tuple[int, ...]]] = {
    1: (drop_block1d, DropBlock1d, (4, 3, 20)),
    2: (drop_block2d, DropBlock2d, (4, 3, 9, 12)),
    3: (drop_block3d, DropBlock3d, (2, 3, 6, 7, 5)),
}

every_form = pytest.mark.parametrize("spatial", FAMILY)
every_scaling = pytest.mark.parametrize("scaling", ["mean", "marginal"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])


@every_form
def test_function_and_module_are_one(spatial: int) -> None:
    function, module, shape = FAMILY[spatial]
    x = torch.randn(shape)
    y = seeded(1, function, x, 0.2, 3)
    assert torch.equal(seeded(1, module(0.2, 3), x), y)
    assert torch.equal(seeded(1, module(keep_prob=0.8, block_size=3), x), y)
    assert torch.equal(seeded(1, function, x, keep_prob=0.8, block_size=3), y)
    assert 0 < (y == 0).sum() < y.numel()
    assert torch.equal(seeded(1, function, x[0], 0.2, 3), y[0])


@every_form
def test_dropped_is_in_blocks_and_the_rest_has_one_scale(spatial: int) -> None:
    function, _, shape = FAMILY[spatial]
    y = function(torch.ones(shape), 0.2, 3)
    assert y.unique().numel() == 2
    dropped = (y == 0).float().flatten(0, 1).unsqueeze(1)
    window = torch.ones(1, 1, *[3] * spatial)
    convolve = getattr(nn.functional, f"conv{spatial}d")
    whole = (convolve(dropped, window) == window.numel()).float()
    covered = getattr(nn.functional, f"conv_transpose{spatial}d")(whole, window) > 0
    assert torch.equal(covered, dropped > 0)


def test_no_scale_comes_from_the_drawn_mask() -> None:
    scales = {drop_block2d(torch.ones(2, 1, 8, 8), 0.3, 3).max().item() for _ in range(20)} - {0.0}
    assert len(scales) == 1


def test_blocks_of_one_are_dropout() -> None:
    x = torch.randn(4, 3, 9, 12)
    assert torch.equal(seeded(1, drop_block2d, x, 0.3, 1), seeded(1, dropout, x, 0.3))
    assert torch.equal(seeded(1, drop_block2d, x, 0.3, 1, scaling="marginal"), seeded(1, dropout, x, 0.3))


@every_scaling
def test_nothing_and_everything_is_kept(scaling: str) -> None:
    x = torch.full((2, 3, 7, 7), float("inf"), requires_grad=True)
    assert drop_block2d(x, 0.0, 7, scaling=scaling) is x
    assert DropBlock2d(keep_prob=1, scaling=scaling)(x) is x
    y = drop_block2d(x, 1.0, 3, scaling=scaling)
    assert torch.equal(y, torch.zeros_like(x))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))
    after = [seeded(1, lambda p: (drop_block2d(x, p, 3), torch.rand(3))[1], p) for p in (0.0, 0.5)]
    assert torch.equal(*after)


@every_form
@every_scaling
@every_dtype
def test_gradient_has_the_mask_of_forward(spatial: int, scaling: str, dtype: torch.dtype) -> None:
    function, _, shape = FAMILY[spatial]
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = function(x, 0.3, 2, scaling=scaling)
    assert y.dtype == dtype
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())
    assert (y.unique().numel() == 2) == (scaling == "mean")


@every_scaling
def test_gradcheck_with_the_key_fixed(scaling: str) -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return seeded(3, drop_block2d, x, 0.3, 2, scaling=scaling)

    assert torch.autograd.gradcheck(call, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, x)


@every_scaling
@every_dtype
def test_transforms_give_what_plain_calls_give(scaling: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 9, 12).to(dtype)
    g = torch.randn_like(x)
    plain = x.clone().requires_grad_()
    y = seeded(5, drop_block2d, plain, 0.3, 4, scaling=scaling)
    transformed, pull = seeded(5, torch.func.vjp, partial(drop_block2d, p=0.3, block_size=4, scaling=scaling), x)
    assert torch.equal(transformed, y)
    assert torch.equal(pull(g)[0], torch.autograd.grad(y, plain, g)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_scaling
def test_half_types_have_no_nan_and_are_not_zeroed(dtype: torch.dtype, scaling: str) -> None:
    x = torch.ones(64, 32, 14, 14, dtype=dtype, requires_grad=True)  # more elements than float16 can count
    y = drop_block2d(x, 0.1, 7, scaling=scaling)
    y.sum(dtype=torch.float32).backward()
    assert x.grad is not None
    for values in (y.detach(), x.grad):
        assert values.isfinite().all()
        assert 0.95 < values.float().mean() < 1.05
    single = seeded(1, drop_block2d, x.detach(), 0.1, 7, scaling=scaling)
    assert torch.equal(single, seeded(1, drop_block2d, x.detach().float(), 0.1, 7, scaling=scaling).to(dtype))


@every_scaling
@pytest.mark.parametrize("function_mode", [False, True])
def test_channels_last_and_strides_equal_contiguous_and_are_kept(scaling: str, function_mode: bool) -> None:
    x = torch.randn(3, 4, 8, 9)
    y = seeded(1, drop_block2d, x, 0.3, 3, scaling=scaling)
    stepped = torch.randn(3, 4, 8, 18)[..., ::2].copy_(x)
    for other in (x.contiguous(memory_format=torch.channels_last), stepped, x.transpose(2, 3).contiguous().mT):
        leaf = other.detach().requires_grad_()
        with torch.overrides.BaseTorchFunctionMode() if function_mode else torch.enable_grad():
            z = seeded(1, drop_block2d, leaf, 0.3, 3, scaling=scaling)
        assert torch.equal(z, y)
        assert z.stride() == torch.empty_like(other).stride()
        nn.functional.relu_(z).sum().backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad != 0, y > 0)


def test_backends_agree(backend: str) -> None:
    x = torch.randn(3, 4, 8, 9)
    y = seeded(1, drop_block2d, x, 0.3, 3)
    assert torch.equal(y, seeded(1, drop_block2d, x, 0.3, 3))
    with torchdrop.use_backend("reference"):
        reference = seeded(1, drop_block2d, x, 0.3, 3)
    assert torch.equal(y, reference)


def test_eval_mode_returns_the_input_itself() -> None:
    x = torch.randn(2, 3, 4)
    for function, module, _ in FAMILY.values():
        assert module(0.5, 99).eval()(x) is x
        assert function(x, 0.5, 99, training=False) is x


def test_in_place_writes_into_the_input() -> None:
    x = torch.randn(2, 3, 8, 8)
    expected = seeded(1, drop_block2d, x, 0.3, 3)
    y = seeded(1, DropBlock2d(0.3, 3, True), x)
    assert y is x
    assert torch.equal(x, expected)
    leaf = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = seeded(1, drop_block2d, hidden := leaf * 1, 0.3, 3, inplace=True)
    assert y is hidden
    y.sum().backward()
    assert torch.equal(leaf.grad != 0, y != 0)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        drop_block2d(leaf, 0.3, 3, inplace=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_can_be_a_tensor_for_each_sample_or_channel() -> None:
    x = torch.randn(4, 3, 8, 9)
    rates = [1.0, 0.9, 0.3, 0.0]
    y = seeded(1, drop_block2d, x, keep_prob=torch.tensor(rates).reshape(4, 1, 1, 1), block_size=3)
    for n, rate in enumerate(rates):
        assert torch.allclose(y[n], seeded(1, drop_block2d, x, keep_prob=rate, block_size=3)[n], rtol=1e-6)
    k = torch.tensor([0.9, 0.6, 0.8]).reshape(3, 1, 1)
    y = seeded(1, drop_block2d, x, keep_prob=k, block_size=3, scaling="marginal")
    alone = seeded(1, drop_block2d, x, keep_prob=k[1, 0, 0], block_size=3, scaling="marginal")
    assert torch.equal(y[:, 1], alone[:, 1])
    with pytest.raises(ValueError, match=r"keep_prob of shape \(8, 9\) does not broadcast against .* \(4, 3, 1, 1\)"):
        drop_block2d(x, keep_prob=torch.full((8, 9), 0.5), block_size=3)


@every_scaling
def test_masks_are_shared_over_the_axes_that_are_named(scaling: str) -> None:
    x = torch.ones(4, 3, 8, 9, requires_grad=True)
    y = drop_block2d(x, 0.3, 3, shared_axes=1, scaling=scaling)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert not torch.equal(y[0], y[1])
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())
    y = DropBlock2d(0.3, 3, shared_axes=(0, 1), scaling=scaling)(x)
    assert torch.equal(y, y[:1, :1].expand_as(y))
    z = DropBlock2d(0.3, 3)(x)
    assert not torch.equal(z[:, 0], z[:, 1])
    with pytest.raises(ValueError, match=r"shared_axes must not be those of the feature map, \(H, W\), got -1"):
        drop_block2d(x, 0.3, 3, shared_axes=-1)


def test_a_byte_an_element_is_kept_for_backward() -> None:
    kept: list[Tensor] = []
    x = torch.randn(4, 8, 14, 14, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        drop_block2d(x, 0.1, 7)
    assert sum(t.numel() * t.element_size() for t in kept) == x.numel()


def test_seeds_replay_masks() -> None:
    x, layer = torch.ones(4, 3, 8, 9), DropBlock2d(0.3, 3)
    assert torch.equal(seeded(1, layer, x), seeded(1, layer, x))
    assert not torch.equal(layer(x), layer(x))
    layers = [DropBlock2d(0.3, 3, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(layers[0](x), layers[1](x))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    with torchdrop.frozen_masks(model, seed=1):
        first, fewer = model(x), model(x[:2])
        assert torch.equal(first, model(x))
    assert torch.equal(first[:2] == 0, fewer == 0)


def test_activation_checkpointing_finds_its_mask() -> None:
    x = torch.randn(4, 3, 8, 9, requires_grad=True)
    layer = DropBlock2d(0.3, 3)
    y = seeded(1, lambda: torch.utils.checkpoint.checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False))
    z = seeded(1, lambda: layer(x).sin())
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(z.sum(), x)[0])


@every_scaling
def test_vmap_randomness_modes(scaling: str) -> None:
    x = torch.ones(5, 3, 8, 9)
    call = partial(drop_block2d, p=0.3, block_size=3, scaling=scaling)
    different = torch.vmap(call, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    same = torch.vmap(call, randomness="same")(x)
    assert torch.equal(same, same[:1].expand_as(same))
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(call)(x)
    assert torch.equal(torch.vmap(partial(call, p=0.0))(x), x)
    ensemble = torch.vmap(lambda k: drop_block2d(x, keep_prob=k, block_size=3), randomness="same")
    assert (ensemble(torch.tensor([1.0, 0.0])) == torch.stack([x, 0 * x])).all()


@pytest.mark.slow
@every_scaling
def test_compiled_code_has_the_masks_of_eager_code_and_one_compilation(scaling: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    layer = DropBlock2d(0.1, 3, scaling=scaling)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(4, 3, 8, 9, requires_grad=True)
    g = torch.randn_like(x)
    for p in (0.1, 0.25, 0.4, 0.0):
        layer.p = p
        y, z = seeded(1, compiled, x), seeded(1, layer, x)
        assert torch.equal(y, z)
        if p:
            assert torch.equal(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(z, x, g)[0])
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_has_the_masks_of_eager_code() -> None:
    torch.compiler.reset()
    layer, x = DropBlock2d(0.2, 5, shared_axes=1), torch.randn(4, 3, 9, 8)
    assert torch.equal(seeded(1, torch.compile(layer, fullgraph=True), x), seeded(1, layer, x))


@every_scaling
def test_monte_carlo_turns_it_on_row_by_row(scaling: str) -> None:
    model = nn.Sequential(nn.Identity(), DropBlock2d(0.3, 3, scaling=scaling)).eval()
    x = torch.ones(5, 3, 8, 9)
    with torchdrop.mc_dropout(model, seed=1) as report:
        first = model(x)
        assert len(report.sources) == 1
    with torchdrop.mc_dropout(model, seed=1):
        again = model(x[:2])
    assert torch.equal(first[:2], again)
    assert not torch.equal(first[0], first[1])
    means = [
        torchdrop.mc_predict(model, x, samples=64, seed=3, strategy=strategy, task="regression").mean
        for strategy in ("loop", "auto")
    ]
    assert torch.allclose(*means, rtol=1e-6)
    assert 0.9 < means[0].mean() < 1.1


class Always(nn.Module):
    """The function, whatever the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return drop_block2d(x, 0.3, 3)


def test_modes_switch_the_function_off_too() -> None:
    model, x = nn.Sequential(Always(), nn.Identity()), torch.ones(4, 3, 8, 9)
    with torchdrop.disabled(model):
        assert torch.equal(model(x), x)
    assert not torch.equal(model(x), x)


def test_rates_are_set_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), DropBlock2d(0.1, 3))
    torchdrop.set_keep_prob(model, {"1": 0.7})
    assert (model[1].keep_prob, model[1].p) == (0.7, 0.3)
    with torchdrop.disabled(model):
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(model(x), model[0](x))
    assert isinstance(model[1], nn.modules.dropout._DropoutNd)


def test_copies_and_states() -> None:
    layer = DropBlock2d(0.3, 3, scaling="marginal", shared_axes=1)
    x = torch.ones(2, 3, 8, 8)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(seeded(1, other, x), seeded(1, layer, x))
    assert not layer.state_dict()
    assert repr(layer) == "DropBlock2d(p=0.3, block_size=3, inplace=False, scaling='marginal', shared_axes=1)"
    assert repr(DropBlock3d(0.1, 5)) == "DropBlock3d(p=0.1, block_size=5, inplace=False)"


def test_calls_written_for_torchvision_mean_the_same() -> None:
    for function in (drop_block2d, drop_block3d):
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:6] == ["input", "p", "block_size", "inplace", "eps", "training"]
        assert [parameters[name].default for name in ("inplace", "eps", "training")] == [False, 1e-6, True]
    for module in (DropBlock2d, DropBlock3d):
        assert list(inspect.signature(module).parameters)[:4] == ["p", "block_size", "inplace", "eps"]
        layer = module(p=0.1, block_size=5, inplace=True, eps=1e-3)
        assert (layer.p, layer.block_size, layer.inplace, layer.eps) == (0.1, 5, True, 1e-3)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(seeded(1, drop_block2d, x, 0.3, 3, False, 1e-3, True), seeded(1, drop_block2d, x, 0.3, 3))
    assert torch.equal(seeded(1, DropBlock2d(0.3, 3, False, 1e-3), x), seeded(1, drop_block2d, x, 0.3, 3))


@every_form
def test_empty_batches(spatial: int) -> None:
    function, _, shape = FAMILY[spatial]
    x = torch.ones(0, *shape[1:], requires_grad=True)
    y = function(x, 0.3, 3)
    assert y.shape == x.shape
    y.sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: drop_block2d(x, 0.1, 9), ValueError, r"block_size must be at most the smallest side of the feature "
         r"map, got 9 for an input of \(2, 3, 8, 9\): choose a smaller block_size"),
        (lambda x: DropBlock2d(0.1, 9)(x), ValueError, r"^block_size must be at most the smallest side"),
        (lambda x: drop_block2d(x, 0.1, 0), ValueError, "^block_size must be at least 1, got 0$"),
        (lambda x: DropBlock3d(0.1, -1), ValueError, "^block_size must be at least 1, got -1$"),
        (lambda x: DropBlock2d(0.1, 3.0), TypeError, r"^block_size must be an integer, got float$"),
        (lambda x: drop_block2d(x, 0.1, True), TypeError, "^block_size must be an integer, got bool$"),
        (lambda x: drop_block2d(x[0, 0], 0.1, 3), ValueError, r"^input should be 4 dimensional. Got 2 dimensions: "
         r"drop_block2d takes \(N, C, H, W\), or \(C, H, W\) for one sample$"),
        (lambda x: drop_block1d(x, 0.1, 3), ValueError, r"^input should be 3 dimensional. Got 4 .* \(N, C, L\)"),
        (lambda x: drop_block3d(x[0], 0.1, 3), ValueError, r"^input should be 5 dimensional. Got 3 .*\(C, D, H, W\)"),
        (lambda x: DropBlock2d(), TypeError, "^give the rate as p or as keep_prob, got None for both$"),
        (lambda x: drop_block2d(x, 0.1, 3, keep_prob=0.9), TypeError, "not both"),
        (lambda x: drop_block2d(x, 1.5, 3), ValueError, "^drop probability has to be between 0 and 1, but got 1.5$"),
        (lambda x: DropBlock2d(-1), ValueError, "^drop probability has to be between 0 and 1, but got -1$"),
        (lambda x: DropBlock2d(keep_prob=float("nan")), ValueError, r"keep_prob must be in \[0, 1\], got nan"),
        (lambda x: DropBlock2d(0.1, scaling="batch"), ValueError, "^scaling must be 'mean' or 'marginal', got 'batch'"),
        (lambda x: drop_block2d(x, 0.9, 3, scaling="marginal"), ValueError, r"would multiply the center of a map of "
         r"\(8, 9\) with block_size=3 by [\d.e+]+, and 10 is the most it may: use a larger keep_prob"),
        (lambda x: drop_block2d(x.int(), 0.1, 3), RuntimeError, "result type Float can't be cast"),
        (lambda x: drop_block2d([1.0], 0.1, 3), TypeError, "must be Tensor, not list"),
        (lambda x: DropBlock2d(0.1, generator=3), TypeError, "generator must be a torch.Generator or None, got int"),
        (lambda x: drop_block2d(x, 0.1, 7, 1.0), TypeError, "^inplace must be True or False, got 1.0$"),
        (lambda x: DropBlock2d(0.1, 7, 1.0), TypeError, "^inplace must be True or False, got 1.0$"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong_and_change_nothing(call: Any, error: Any, message: str) -> None:
    x = torch.randn(2, 3, 8, 9)
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        call(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rate_that_is_refused_changes_nothing() -> None:
    layer = DropBlock2d(0.1, 3)
    with pytest.raises(ValueError, match=r"keep_prob must be in \[0, 1\], got 2"):
        layer.keep_prob = 2
    assert layer.p == 0.1

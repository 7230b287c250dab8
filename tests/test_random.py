"""Where masks come from: PyTorch's generators, the machinery that governs them, and `frozen_masks`."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import torchdrop
import torchdrop.functional as F
from torchdrop import random
from torchdrop.kernels import native

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
"""What PyTorch itself does at the first use of forward mode and of the compiler."""

FAMILY: dict[str, tuple[type[nn.Module], Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "dropout": (torchdrop.Dropout, F.dropout, (64,), (33_000,)),
    "dropout1d": (torchdrop.Dropout1d, F.dropout1d, (8, 16, 3), (33, 1000, 2)),
    "dropout2d": (torchdrop.Dropout2d, F.dropout2d, (8, 16, 2, 2), (33, 1000, 1, 2)),
    "dropout3d": (torchdrop.Dropout3d, F.dropout3d, (8, 16, 2, 1, 2), (33, 1000, 1, 1, 2)),
    "alpha_dropout": (torchdrop.AlphaDropout, F.alpha_dropout, (64,), (33_000,)),
    "feature_alpha_dropout": (torchdrop.FeatureAlphaDropout, F.feature_alpha_dropout, (8, 16, 3), (33, 1000, 2)),
    "gaussian_dropout": (torchdrop.GaussianDropout, F.gaussian_dropout, (64,), (33_000,)),
}
"""Module, function, a small shape and one beyond the size below which a single thread works."""

every_layer = pytest.mark.parametrize("name", FAMILY)
small_and_large = pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
reentrant_or_not = pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensors", "reentrant"])


def shape_of(name: str, large: bool = False) -> tuple[int, ...]:
    shape = FAMILY[name][3 if large else 2]
    assert (torch.Size(shape).numel() >= native.SERIAL) == large
    return shape


def seeded(seed: int, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    torch.manual_seed(seed)
    return call(*args, **options)


def multiplier(seed: int, shape: tuple[int, ...], p: float = 0.5, dtype: torch.dtype = torch.float64) -> Tensor:
    """What dropout multiplies by under this seed. At p = 0.5 every factor is 0 or 2, so products with it are exact."""
    m = seeded(seed, F.dropout, torch.ones(shape, dtype=dtype), p)
    assert 0 < (m == 0).sum() < m.numel()
    return m


class TestManualSeed:
    @every_layer
    @small_and_large
    def test_replays(self, name: str, large: bool) -> None:
        layer, x = FAMILY[name][0](), torch.randn(shape_of(name, large))
        torch.manual_seed(7)
        first, second = layer(x), layer(x)
        torch.manual_seed(7)
        assert torch.equal(layer(x), first)
        assert torch.equal(layer(x), second)
        assert not torch.equal(first, second)
        assert not torch.equal(seeded(8, layer, x), first)

    @every_layer
    @small_and_large
    def test_module_and_function_draw_alike(self, name: str, large: bool) -> None:
        module, function, *_ = FAMILY[name]
        x = torch.randn(shape_of(name, large))
        y = seeded(7, module(0.3), x)
        state = torch.get_rng_state()
        assert torch.equal(seeded(7, function, x, 0.3, True), y)
        assert torch.equal(torch.get_rng_state(), state)

    @small_and_large
    @pytest.mark.parametrize("road", ["_ShortBackward", "RecordedBackward"])
    def test_backward_replays_the_mask_on_both_roads(self, road: str, large: bool) -> None:
        """The road is short for contiguous inputs whose mask is not shared."""
        if road == "_ShortBackward" and native.library is None:
            pytest.skip("no native kernels")
        x = torch.randn(shape_of("dropout", large), dtype=torch.float64, requires_grad=True)
        y = seeded(7, torchdrop.Dropout(shared_axes=None if road == "_ShortBackward" else ()), x)
        assert type(y.grad_fn).__name__ == road
        y.backward(torch.full_like(y, 3.0))
        m = multiplier(7, tuple(x.shape))
        assert torch.equal(y, x * m)
        assert x.grad is not None
        assert torch.equal(x.grad, 3.0 * m)

    @every_layer
    def test_number_of_draws_does_not_depend_on_the_rate(self, name: str) -> None:
        module, function, *_ = FAMILY[name]
        x = torch.randn(shape_of(name))
        states = []
        for p in (0.0, 0.3) if name == "gaussian_dropout" else (0.0, 0.3, 1.0):
            seeded(7, module(p), x)
            states.append(torch.get_rng_state())
            seeded(7, function, x, p, True)
            states.append(torch.get_rng_state())
            seeded(7, function, x, torch.tensor(p), True)
            states.append(torch.get_rng_state())
        torch.manual_seed(7)
        assert not torch.equal(states[0], torch.get_rng_state())
        assert all(torch.equal(state, states[0]) for state in states)

    @every_layer
    def test_eval_draws_nothing(self, name: str) -> None:
        module, function, *_ = FAMILY[name]
        x = torch.randn(shape_of(name))
        before = torch.get_rng_state()
        assert module().eval()(x) is x
        assert function(x, 0.5, False) is x
        assert torch.equal(torch.get_rng_state(), before)

    @small_and_large
    def test_mask_does_not_depend_on_the_number_of_threads(self, large: bool) -> None:
        x = torch.ones(shape_of("dropout", large))
        two = seeded(7, F.dropout, x)
        torch.set_num_threads(1)
        assert torch.equal(seeded(7, F.dropout, x), two)

    @every_layer
    def test_fork_rng(self, name: str) -> None:
        layer, x = FAMILY[name][0](), torch.randn(shape_of(name))
        before = torch.get_rng_state()
        with torch.random.fork_rng(devices=[]):
            inside = layer(x)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(layer(x), inside)
        assert not torch.equal(layer(x), inside)

    @every_layer
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_grad_modes_do_not_change_the_mask(self, name: str, mode: Callable[[], Any]) -> None:
        layer, x = FAMILY[name][0](), torch.randn(shape_of(name), requires_grad=True)
        y = seeded(7, layer, x)
        with mode():
            silent = seeded(7, layer, x)
            in_place = seeded(7, FAMILY[name][1], x.clone(), 0.5, True, True)
        assert y.requires_grad
        assert not silent.requires_grad
        assert silent.is_inference() == (mode is torch.inference_mode)
        assert torch.equal(silent, y)
        assert torch.equal(in_place, y)

    @pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
    def test_what_was_made_under_inference_mode_serves_training(self, rate: Any) -> None:
        """In a new thread, where the buffer for keys is made under inference mode, too."""

        def work(_: int) -> list[Tensor | None]:
            with torch.inference_mode():
                layer = torchdrop.Dropout(keep_prob=rate if isinstance(rate, float) else rate.clone())
                layer(torch.ones(8))
                assert not torchdrop.kernels.Law(1, 1.0).tensor().is_inference()
            inputs = [torch.ones(2, 64, requires_grad=True) for _ in range(2)]
            layer(inputs[0]).sum().backward()
            vmap(layer, randomness="different")(inputs[1]).sum().backward()
            return [x.grad for x in inputs]

        (slopes,) = in_threads(work, 1)
        assert all(slope is not None and set(slope.unique().tolist()) == {0.0, 2.0} for slope in slopes)


class TestGenerator:
    @every_layer
    @small_and_large
    def test_governs_alone(self, name: str, large: bool) -> None:
        module, function, *_ = FAMILY[name]
        x = torch.randn(shape_of(name, large))
        generator = torch.Generator().manual_seed(5)
        layer = module(generator=generator)
        before = torch.get_rng_state()
        first, second = layer(x), layer(x)
        assert not torch.equal(first, second)
        generator.manual_seed(5)
        assert torch.equal(function(x, 0.5, True, generator=generator), first)
        assert torch.equal(function(x, 0.5, True, generator=generator), second)
        assert torch.equal(torch.get_rng_state(), before)

    def test_draws_what_the_default_generator_would(self) -> None:
        x = torch.ones(64)
        explicit = F.dropout(x, generator=torch.Generator().manual_seed(5))
        assert torch.equal(seeded(5, F.dropout, x), explicit)

    @every_layer
    def test_eval_leaves_it_alone(self, name: str) -> None:
        generator = torch.Generator().manual_seed(5)
        before = generator.get_state()
        FAMILY[name][0](generator=generator).eval()(torch.ones(shape_of(name)))
        assert torch.equal(generator.get_state(), before)

    @pytest.mark.parametrize("wrong", [5, "cpu", torch.random])
    @every_layer
    def test_wrong_type(self, name: str, wrong: Any) -> None:
        module, function, *_ = FAMILY[name]
        message = f"^generator must be a torch.Generator or None, got {type(wrong).__name__}$"
        before = torch.get_rng_state()
        with pytest.raises(TypeError, match=message):
            module(generator=wrong)
        with pytest.raises(TypeError, match=message):
            function(torch.ones(shape_of(name)), 0.5, True, generator=wrong)
        assert torch.equal(torch.get_rng_state(), before)

    def test_of_another_device(self) -> None:
        generator = torch.Generator()
        before = generator.get_state()
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole text is compared below)
            F.dropout(torch.ones(3, device="meta"), generator=generator)
        assert str(caught.value) == (
            "generator must be on the input's device, got a generator on cpu for an input on meta: "
            "create it with torch.Generator(device='meta')"
        )
        assert torch.equal(generator.get_state(), before)


class TestCopies:
    COPIES = pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
    )

    @COPIES
    @every_layer
    def test_layer(self, name: str, duplicate: Callable[[Any], Any]) -> None:
        layer, x = FAMILY[name][0](keep_prob=0.3), torch.randn(shape_of(name))
        twin = duplicate(layer)
        assert type(twin) is type(layer)
        assert twin.keep_prob == 0.3
        assert torch.equal(seeded(7, twin, x), seeded(7, layer, x))
        twin.keep_prob = 0.9
        assert layer.keep_prob == 0.3

    @COPIES
    @every_layer
    def test_generator_is_copied_in_its_state(self, name: str, duplicate: Callable[[Any], Any]) -> None:
        generator = torch.Generator().manual_seed(5)
        layer, x = FAMILY[name][0](generator=generator), torch.randn(shape_of(name))
        layer(x)
        twin = duplicate(layer)
        assert twin.generator is not generator
        before = generator.get_state()
        first = twin(x)
        assert torch.equal(generator.get_state(), before)
        assert torch.equal(layer(x), first)

    @COPIES
    def test_tensor_rates_and_shared_axes(self, duplicate: Callable[[Any], Any]) -> None:
        layer = torchdrop.Dropout(keep_prob=torch.tensor([0.2, 0.9]), shared_axes=0, inverted=False, inplace=True)
        twin = duplicate(layer)
        assert torch.equal(twin.keep_prob, layer.keep_prob)
        assert twin.keep_prob is not layer.keep_prob
        assert (twin.shared_axes, twin.inverted, twin.inplace) == (0, False, True)
        assert torch.equal(seeded(7, twin, torch.ones(8, 2)), seeded(7, layer, torch.ones(8, 2)))


class Segment(nn.Module):
    """Something non-linear comes after each dropout, so that what is recomputed depends on the mask."""

    def __init__(self, shape: tuple[int, ...], module: type[nn.Module] = torchdrop.Dropout) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, torch.Size(shape).numel(), dtype=torch.float64))
        self.shape, self.first, self.second, self.runs = shape, module(0.5), module(0.25), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        h = torch.tanh(self.first(x) * self.weight.reshape(self.shape))
        return torch.sin(self.second(h) + x)


def gradients(call: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The output, and by backward() (reentrant checkpointing needs that) the gradients of its square's sum."""
    x, weight.grad = x.detach().clone().requires_grad_(), None
    y = call(x)
    y.square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad.clone()


def agree(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    """Up to the order in which gradients were added up."""
    return all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(left, right, strict=True))


class TestCheckpoint:
    @reentrant_or_not
    @small_and_large
    @every_layer
    def test_gradient_is_that_of_the_plain_run(self, name: str, large: bool, use_reentrant: bool) -> None:
        shape = shape_of(name, large)
        segment, x = Segment(shape, FAMILY[name][0]), torch.randn(shape, dtype=torch.float64)
        plain = seeded(7, gradients, segment, segment.weight, x)
        segment.runs = 0
        run = lambda x: checkpoint(segment, x, use_reentrant=use_reentrant)  # noqa: E731
        assert agree(seeded(7, gradients, run, segment.weight, x), plain)
        assert segment.runs == 2

    @reentrant_or_not
    def test_the_check_above_would_see_another_mask(self, use_reentrant: bool) -> None:
        segment, x = Segment((64,)), torch.randn(64, dtype=torch.float64)
        plain = seeded(7, gradients, segment, segment.weight, x)
        run = lambda x: checkpoint(segment, x, use_reentrant=use_reentrant, preserve_rng_state=False)  # noqa: E731
        other = seeded(7, gradients, run, segment.weight, x)
        assert torch.equal(other[0], plain[0])
        assert not torch.equal(other[1], plain[1])

    @reentrant_or_not
    def test_two_segments_one_layer(self, use_reentrant: bool) -> None:
        segment, x = Segment((64,)), torch.randn(64, dtype=torch.float64)
        run = lambda x: checkpoint(segment, x, use_reentrant=use_reentrant)  # noqa: E731
        plain = seeded(7, gradients, lambda x: segment(segment(x)), segment.weight, x)
        assert agree(seeded(7, gradients, lambda x: run(run(x)), segment.weight, x), plain)


def row_masks(y: Tensor) -> set[tuple[bool, ...]]:
    """The different masks among the rows of a dropped tensor of ones."""
    return {tuple(row.tolist()) for row in (y != 0).flatten(1)}


class TestVmap:
    @every_layer
    @small_and_large
    def test_same(self, name: str, large: bool) -> None:
        layer, x = FAMILY[name][0](), torch.randn(shape_of(name, large))
        y = vmap(layer, randomness="same")(torch.stack([x, x, x]))
        assert torch.equal(y[0], y[1])
        assert torch.equal(y[0], y[2])
        assert not torch.equal(y[0], x)

    @every_layer
    @small_and_large
    def test_different(self, name: str, large: bool) -> None:
        layer, x = FAMILY[name][0](), torch.randn(shape_of(name, large))
        run = vmap(layer, randomness="different")
        y = seeded(7, run, torch.stack([x, x, x]))
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(y, 2))
        assert torch.equal(seeded(7, run, torch.stack([x, x, x])), y)
        assert not torch.equal(run(torch.stack([x, x, x])), y)

    @every_layer
    def test_error(self, name: str) -> None:
        layer, x = FAMILY[name][0](), torch.randn(3, *shape_of(name))
        for run in (vmap(layer), vmap(layer, randomness="error")):
            with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
                run(x)

    @every_layer
    def test_error_spares_what_drops_nothing(self, name: str) -> None:
        x = torch.randn(3, *shape_of(name))
        assert torch.equal(vmap(FAMILY[name][0](0.0))(x), x)
        assert torch.equal(vmap(FAMILY[name][0](0.5).eval())(x), x)

    def test_values_are_the_inputs_or_nothing(self) -> None:
        x = torch.randn(5, 64)
        y = vmap(F.dropout, randomness="different")(x)
        assert torch.equal(y, torch.where(y == 0, 0.0, 2.0 * x))
        assert len(row_masks(y)) == 5

    @pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
    @pytest.mark.parametrize("out_dim", [0, 1])
    def test_dimensions(self, in_dim: int, out_dim: int) -> None:
        x = torch.randn(4, 6, 40)
        first = seeded(7, vmap(F.dropout, randomness="different"), x)
        moved = x.movedim(0, in_dim)
        other = seeded(7, vmap(F.dropout, in_dims=in_dim, out_dims=out_dim, randomness="different"), moved)
        assert torch.equal(other.movedim(out_dim, 0), first)

    def test_channels_with_another_batch_dimension(self) -> None:
        x = torch.ones(5, 8, 3, 4, 4)  # (N, C, samples, H, W)
        y = vmap(F.dropout2d, in_dims=2, out_dims=2, randomness="different")(x)
        assert y.shape == x.shape
        assert torch.equal(y, y[..., :1, :1].expand_as(y))
        assert len(row_masks(y.movedim(2, 0))) == 3

    @pytest.mark.parametrize("layer", [F.dropout, torchdrop.Dropout()], ids=["function", "module"])
    def test_data_that_is_not_batched(self, layer: Callable[[Tensor], Tensor]) -> None:
        """Another mask for each sample of a closed-over tensor, and the same three modes."""
        x, samples = torch.ones(64), torch.zeros(5)
        y = vmap(lambda _: layer(x), randomness="different")(samples)
        assert y.shape == (5, 64)
        assert len(row_masks(y)) == 5
        assert len(row_masks(vmap(lambda _: layer(x), randomness="same")(samples))) == 1
        with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
            vmap(lambda _: layer(x))(samples)

    def test_key_that_is_not_batched(self) -> None:
        """A closed-over key meets batched data: one mask for all."""
        x, key = torch.randn(5, 64), torch.tensor([1, 2])
        law = torchdrop.kernels.Law(2**31, 2.0)
        y = vmap(lambda row: torchdrop.kernels.operators.masked(row, key, law, row.shape))(x)
        kept = torchdrop.kernels.keep_mask((64,), key, law)
        assert torch.equal(y, torch.where(kept, 2.0 * x, 0.0))

    @pytest.mark.parametrize("outer", ["same", "different"])
    @pytest.mark.parametrize("inner", ["same", "different"])
    def test_nested(self, outer: str, inner: str) -> None:
        run = vmap(vmap(F.dropout, randomness=inner), randomness=outer)
        y = run(torch.ones(3, 4, 64))
        assert len(row_masks(y)) == (3 if outer == "different" else 1)
        assert len(row_masks(y[0])) == (4 if inner == "different" else 1)
        assert len(row_masks(y.flatten(0, 1))) == (3 if outer == "different" else 1) * (
            4 if inner == "different" else 1
        )

    def test_over_keep_prob(self) -> None:
        x, k = torch.ones(3, 1000), torch.tensor([0.0, 0.5, 1.0])
        y = vmap(lambda x, k: F.dropout(x, keep_prob=k), randomness="different")(x, k)
        assert [set(row.unique().tolist()) for row in y] == [{0.0}, {0.0, 2.0}, {1.0}]

    def test_over_keep_prob_alone(self) -> None:
        """With one key, a mask of a lower rate lies within that of a higher one."""
        k = torch.tensor([0.25, 0.5, 0.75])
        kept = vmap(lambda k: F.dropout(torch.ones(1000), keep_prob=k), randomness="same")(k) != 0
        assert torch.equal(kept[0] & kept[1], kept[0])
        assert torch.equal(kept[1] & kept[2], kept[1])
        assert kept[0].sum() < kept[1].sum() < kept[2].sum()

    def test_over_keep_prob_of_each_column(self) -> None:
        k = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        y = vmap(lambda k: F.dropout(torch.ones(3, 2), keep_prob=k), randomness="different")(k)
        assert torch.equal(y, k[:, None, :].expand(2, 3, 2))

    @pytest.mark.parametrize("randomness", ["same", "different", "error"])
    def test_generator(self, randomness: str) -> None:
        """As torch's own functions that take one, such as torch.randint."""
        generator = torch.Generator().manual_seed(5)
        run = vmap(lambda x: F.dropout(x, generator=generator), randomness=randomness)
        if randomness == "error":
            with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
                run(torch.ones(3, 64))
            return
        before = torch.get_rng_state()
        y = run(torch.ones(3, 64))
        assert len(row_masks(y)) == (3 if randomness == "different" else 1)
        generator.manual_seed(5)
        assert torch.equal(run(torch.ones(3, 64)), y)
        assert torch.equal(torch.get_rng_state(), before)

    @every_layer
    def test_gradient_of_each_sample(self, name: str) -> None:
        """The gradient of x -> <y, y> / 2 is y dy/dx, and the layers without a shift have y = x dy/dx."""
        layer, x = FAMILY[name][0](), torch.randn(3, *shape_of(name), dtype=torch.float64)

        def cost(x: Tensor) -> tuple[Tensor, Tensor]:
            y = layer(x)
            return y.square().sum() / 2, y

        slope, y = vmap(grad(cost, has_aux=True), randomness="different")(x)
        if "alpha" in name:
            (factor,) = {round(v, 12) for v in (slope / y)[slope != 0].unique().tolist()}
            assert torch.equal(slope, torch.where(slope == 0, 0.0, slope))
            assert torch.allclose(slope[slope != 0], factor * y[slope != 0], rtol=1e-11)
        else:
            assert torch.allclose(slope * x, y * y, rtol=1e-12)
        assert not torch.equal(slope[0] == 0, slope[1] == 0) or name == "gaussian_dropout"


def cubed(x: Tensor) -> Tensor:
    return F.dropout(x).pow(3).sum()


class TestFunctionTransforms:
    SHAPE = (6, 20)

    def test_grad(self) -> None:
        x = torch.randn(self.SHAPE, dtype=torch.float64)
        assert torch.equal(
            seeded(7, grad(cubed), x), 3 * (x * multiplier(7, self.SHAPE)) ** 2 * multiplier(7, self.SHAPE)
        )

    def test_vjp(self) -> None:
        x, v = torch.randn(2, *self.SHAPE, dtype=torch.float64)
        y, pull = seeded(7, vjp, F.dropout, x)
        m = multiplier(7, self.SHAPE)
        assert torch.equal(y, x * m)
        assert torch.equal(pull(v)[0], v * m)

    @pytest.mark.parametrize("layer", [F.dropout, torchdrop.Dropout(), torchdrop.Dropout(inplace=True)])
    def test_jvp(self, layer: Callable[[Tensor], Tensor]) -> None:
        x, v = torch.randn(2, *self.SHAPE, dtype=torch.float64)
        m = multiplier(7, self.SHAPE)
        y, tangent = seeded(7, jvp, lambda x: layer(x * 1.0), (x,), (v,))
        assert torch.equal(y, x * m)
        assert torch.equal(tangent, v * m)

    @pytest.mark.parametrize(
        "second", [lambda f: jacrev(jacrev(f)), lambda f: lambda x: torch.autograd.functional.hessian(f, x)]
    )
    def test_hessian_in_reverse_mode(self, second: Callable[..., Any]) -> None:
        x = torch.randn(20, dtype=torch.float64)
        m = multiplier(7, (20,))
        assert torch.equal(seeded(7, second(cubed), x), torch.diag(6 * (x * m) * m * m))

    def test_hessian_in_forward_mode(self) -> None:
        """torch.func.hessian itself maps over the function and takes no `randomness`: an error, as with torch.nn."""
        x = torch.randn(20, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
            hessian(cubed)(x)

        def valued(x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.dropout(x)
            return y.pow(3).sum(), y

        second, y = jacfwd(jacrev(valued, has_aux=True), has_aux=True, randomness="same")(x)
        m = torch.where(y == 0, 0.0, 2.0).double()
        assert 0 < (m == 0).sum() < 20
        assert torch.equal(second, torch.diag(6 * (x * m) * m * m))

    def test_nested_grad(self) -> None:
        x = torch.tensor([1.0, 2.0, 3.0, 4.0] * 8, dtype=torch.float64)
        m = multiplier(7, (32,))
        second = grad(lambda x: grad(cubed)(x).sum())
        assert torch.equal(seeded(7, second, x), 6 * x * m**3)

    @every_layer
    @pytest.mark.parametrize("inplace", [False, True])
    def test_derivatives_of_every_order_and_mode(self, name: str, inplace: bool) -> None:
        layer = FAMILY[name][0](0.4, inplace)
        x = torch.randn((2, 2, 2, 1, 1)[: max(2, len(shape_of(name)))], dtype=torch.float64, requires_grad=True)
        draw = lambda x: seeded(7, layer, x * 1.0).sin()  # noqa: E731
        options = {"check_batched_grad": True, "check_fwd_over_rev": True}
        assert torch.autograd.gradcheck(draw, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(draw, x, **options)

    @small_and_large
    @pytest.mark.parametrize("layer", [F.dropout, torchdrop.Dropout()], ids=["function", "module"])
    def test_double_backward(self, layer: Callable[[Tensor], Tensor], large: bool) -> None:
        shape = shape_of("dropout", large)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        m = multiplier(7, shape)
        (slope,) = torch.autograd.grad(seeded(7, layer, x).pow(3).sum(), x, create_graph=True)
        assert torch.equal(slope, 3 * (x * m) ** 2 * m)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        assert torch.equal(curvature, 6 * (x * m) * m * m)

    @small_and_large
    @pytest.mark.parametrize("inplace", [False, True])
    @every_layer
    def test_dual_tensors(self, name: str, inplace: bool, large: bool) -> None:
        """A layer is affine in its input, so the tangent's image is a difference of two outputs under one mask."""
        layer, shape = FAMILY[name][0](0.5, inplace), shape_of(name, large)
        x, v = torch.randn(2, *shape, dtype=torch.float64)
        difference = seeded(7, layer, x + v) - seeded(7, layer, x.clone())
        with forward_ad.dual_level():
            y = seeded(7, layer, forward_ad.make_dual(x * 1.0, v))
            primal, tangent = forward_ad.unpack_dual(y)
        assert torch.equal(primal, seeded(7, layer, x * 1.0))
        assert tangent is not None
        assert torch.allclose(tangent, difference, rtol=1e-10, atol=1e-12)

    @small_and_large
    @every_layer
    def test_batched_gradients(self, name: str, large: bool) -> None:
        layer, shape = FAMILY[name][0](), shape_of(name, large)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = seeded(7, layer, x)
        v = torch.randn(3, *shape, dtype=torch.float64)
        (together,) = torch.autograd.grad(y, x, v, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in v]
        assert torch.equal(together, torch.stack(one_by_one))
        assert not torch.equal(together, v)

    def test_model_under_functional_call(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), torchdrop.Dropout(), nn.Tanh(), nn.Linear(8, 1)).double()
        parameters, x = dict(model.named_parameters()), torch.randn(5, 8, dtype=torch.float64)
        slopes = seeded(7, grad(lambda p: functional_call(model, p, x).sum()), parameters)
        seeded(7, model, x).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(slopes[name], parameter.grad, rtol=1e-12), name
        assert slopes["0.weight"].abs().sum() > 0


class TestAutocast:
    @every_layer
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @small_and_large
    def test_output_keeps_the_inputs_type_and_mask(self, name: str, dtype: torch.dtype, large: bool) -> None:
        layer, x = FAMILY[name][0](), torch.randn(shape_of(name, large)).to(dtype)
        outside = seeded(7, layer, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = seeded(7, layer, x)
        assert inside.dtype == outside.dtype == dtype
        assert torch.equal(inside, outside)

    def test_follows_what_came_before_as_stock_dropout_does(self) -> None:
        linear, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torchdrop.Dropout()(linear(x))
            assert y.dtype == nn.Dropout()(linear(x)).dtype == torch.bfloat16
        y.float().sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        assert linear.weight.grad is not None


class TestInPlace:
    @small_and_large
    @every_layer
    def test_overwriting_a_saved_tensor_is_detected(self, name: str, large: bool) -> None:
        y = torch.randn(shape_of(name, large), requires_grad=True).exp()
        version = y._version
        out = FAMILY[name][0](0.5, True)(y)
        assert out is y
        assert y._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @small_and_large
    @every_layer
    def test_without_gradients_the_version_counts_too(self, name: str, large: bool) -> None:
        x = torch.randn(shape_of(name, large))
        weight = torch.ones_like(x, requires_grad=True)
        product = x * weight
        FAMILY[name][1](x, 0.5, True, True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


class TestLazyTensors:
    """Real tensors whose memory does not hold their values: PyTorch negates them, or makes up zeros, when read."""

    @staticmethod
    def negative(x: Tensor) -> Tensor:
        view = torch.complex(torch.zeros_like(x), x).conj().imag
        assert view.is_neg()
        return view

    @every_layer
    @small_and_large
    @pytest.mark.parametrize("contiguous", [False, True])
    def test_negative_views(self, name: str, large: bool, contiguous: bool) -> None:
        layer, x = FAMILY[name][0](), torch.randn(shape_of(name, large))
        view = torch._neg_view(x) if contiguous else self.negative(x)
        assert view.is_neg()
        assert view.is_contiguous() == contiguous
        assert torch.equal(seeded(7, layer, view), seeded(7, layer, -x))

    @every_layer
    def test_negative_views_in_place(self, name: str) -> None:
        layer, x = FAMILY[name][0](), torch.randn(shape_of(name))
        view, expected = torch._neg_view(x.clone()), seeded(7, layer, -x)
        layer.inplace = True
        assert torch.equal(seeded(7, layer, view), expected)

    @every_layer
    @small_and_large
    def test_negative_gradients(self, name: str, large: bool) -> None:
        x = torch.randn(shape_of(name, large), requires_grad=True)
        y = seeded(7, FAMILY[name][0](), x)
        (slope,) = torch.autograd.grad(y, x, -torch.ones_like(x), retain_graph=True)
        assert torch.equal(torch.autograd.grad(y, x, torch._neg_view(torch.ones_like(x)))[0], slope)

    @pytest.mark.slow
    def test_zero_tensors(self) -> None:
        """In another process, which may crash."""
        script = (
            "import torch, torchdrop; x = torch._efficientzerotensor(100_000); assert x._is_zerotensor();"
            "assert torchdrop.Dropout()(x).eq(0).all() and torchdrop.functional.dropout(x, 0.5).eq(0).all()"
        )
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr


def in_threads(work: Callable[[int], Any], count: int = 2) -> list[Any]:
    results: list[Any] = [None] * count

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class TestThreads:
    def test_own_generators_give_what_serial_runs_give(self) -> None:
        def work(i: int) -> Tensor:
            generator = torch.Generator().manual_seed(i)
            layers = [FAMILY[name][0](generator=generator) for name in FAMILY]
            inputs = [torch.ones(shape_of(name, large)) for large in (False, True) for name in FAMILY]
            outputs = [layer(x) for _ in range(4) for layer, x in zip(layers * 2, inputs, strict=True)]
            return torch.cat([y.flatten() for y in outputs])

        serial = [work(0), work(1)]
        assert not torch.equal(*serial)
        for threaded, alone in zip(in_threads(work), serial, strict=True):
            assert torch.equal(threaded, alone)

    def test_default_generator_gives_every_call_its_own_key(self) -> None:
        """Threads that take turns as often as they can: no key is given twice, so no two masks of 256 are equal."""
        layer = torchdrop.Dropout()

        def work(i: int) -> list[Tensor]:
            masks = []
            for _ in range(400):
                x = torch.ones(256, requires_grad=True)
                y = layer(x)
                y.sum().backward()
                assert x.grad is not None
                assert torch.equal(x.grad, y)
                masks.append(y.detach())
            return masks

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            masks = torch.stack([mask for result in in_threads(work, 4) for mask in result])
        finally:
            sys.setswitchinterval(interval)
        assert set(masks.unique().tolist()) == {0.0, 2.0}
        assert len({mask.numpy().tobytes() for mask in masks}) == 1600

    def test_large_tensors_at_once(self) -> None:
        def work(i: int) -> None:
            for _ in range(20):
                x = torch.ones(shape_of("dropout", large=True), requires_grad=True)
                y = F.dropout(x)
                y.sum().backward()
                assert x.grad is not None
                assert torch.equal(x.grad, y)
                assert set(y.unique().tolist()) == {0.0, 2.0}

        in_threads(work)


@functools.cache
def ones() -> tuple[Tensor, Tensor]:
    """A small and a large tensor. A forked child inherits them: there PyTorch itself would hang in making the large."""
    return torch.ones(shape_of("dropout")), torch.ones(shape_of("dropout", large=True))


def draw_in_child(seed: int) -> tuple[bytes, bytes, int]:
    """Both tensors after dropout, and the threads at work."""
    layer = torchdrop.Dropout()
    torch.manual_seed(seed)
    small, large = (layer(x).numpy().tobytes() for x in ones())
    return small, large, native.threads()


def send_draw(seed: int, pipe: Any) -> None:
    pipe.send(draw_in_child(seed))


def draw_in_process(method: str, seed: int) -> Any:
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send_draw, args=(seed, there))
    process.start()
    try:
        if not here.poll(60):
            pytest.fail(f"the child process ({method}) gave no answer within 60 s")
        return here.recv()
    finally:
        process.kill()
        process.join()


fork_is_there = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")


class Noisy(torch.utils.data.Dataset[Tensor]):
    """Augments each item with dropout, on the short and the general road."""

    def __init__(self, size: int = 8) -> None:
        self.size, self.layer = size, torchdrop.Dropout()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        assert torch.utils.data.get_worker_info() is not None
        return torch.cat([self.layer(torch.ones(64)), F.dropout(torch.ones(shape_of("dropout", large=True)))])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestProcesses:
    @fork_is_there
    @pytest.mark.skipif(native.library is None, reason="no native kernels")
    def test_fork_after_the_parent_used_its_threads(self) -> None:
        mine = draw_in_child(7)
        assert native.threads() == mine[2] == 2
        child = draw_in_process("fork", 7)
        assert child[:2] == mine[:2] != draw_in_child(8)[:2]
        assert child[2] == 1

    @pytest.mark.slow
    def test_spawn(self) -> None:
        assert draw_in_process("spawn", 7)[:2] == draw_in_child(7)[:2] != draw_in_child(8)[:2]

    @fork_is_there
    def test_data_loader_workers(self) -> None:
        def load(seed: int) -> Tensor:
            loader = torch.utils.data.DataLoader(
                Noisy(), num_workers=2, generator=torch.Generator().manual_seed(seed), multiprocessing_context="fork",
                timeout=60,
            )  # fmt: skip
            return torch.cat(list(loader))

        F.dropout(torch.ones(shape_of("dropout", large=True)))
        first = load(1)
        assert set(first.unique().tolist()) == {0.0, 2.0}
        assert len(row_masks(first)) == len(row_masks(first[:, :64])) == 8
        assert torch.equal(load(1), first)
        assert not torch.equal(load(2), first)


class Twice(nn.Module):
    """One layer called twice, another once, a function, and something non-linear after each."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.drop, self.other = torchdrop.Dropout(0.5), torchdrop.Dropout(0.5)
        self.use_reentrant, self.runs = use_reentrant, 0

    def first(self, x: Tensor) -> Tensor:
        self.runs += 1
        return torch.tanh(self.linear(self.drop(x))) + 1.0

    def second(self, x: Tensor) -> Tensor:
        self.runs += 1
        return torch.sin(self.linear(self.drop(F.dropout(self.other(x), 0.25)))) + 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.second(self.first(x))
        x = checkpoint(self.first, x, use_reentrant=self.use_reentrant)
        return checkpoint(self.second, x, use_reentrant=self.use_reentrant)


class Calls(nn.Module):
    """What every dropout of a forward makes of ones: one layer twice and a function twice."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = torchdrop.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.drop(x), self.drop(x), F.dropout(x), F.dropout(x)], 1)


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing of `frozen_masks` stays behind."""
    assert not random._frozen
    yield
    assert not random._frozen


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._forward_hooks_always_called) for m in model.modules()
    )


@pytest.mark.usefixtures("clean")
class TestFrozen:
    @every_layer
    @small_and_large
    def test_same_masks_in_every_forward(self, name: str, large: bool) -> None:
        model, x = nn.Sequential(FAMILY[name][0]()), torch.randn(shape_of(name, large))
        with torchdrop.frozen_masks(model, seed=1):
            y, again = model(x), model(x)
        assert torch.equal(y, again)
        assert not torch.equal(y, x)
        assert not torch.equal(model(x), y)

    def test_does_not_depend_on_the_generators_state(self) -> None:
        model, x = Twice(), torch.randn(4, 16)
        with torchdrop.frozen_masks(model, seed=1):
            y = seeded(7, model, x)
            assert torch.equal(seeded(8, model, x), y)
        with torchdrop.frozen_masks(model, seed=1):
            assert torch.equal(model(x), y)

    @pytest.mark.parametrize(("seed", "other"), [(1, 2), (0, -1), (0, 2**32), (1, 2**63), (2**63 - 1, -(2**63))])
    def test_seeds_differ(self, seed: int, other: int) -> None:
        model, outputs = Calls(), []
        for number in (seed, other):
            with torchdrop.frozen_masks(model, seed=number):
                outputs.append(model(torch.ones(2, 64)))
        assert not any(torch.equal(a, b) for a, b in zip(*(y.unbind(1) for y in outputs), strict=True))

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [(torchdrop.Dropout(), (64, 24)), (torchdrop.Dropout2d(), (64, 24, 2, 2)), (torchdrop.AlphaDropout(), (64, 24)),
         (torchdrop.GaussianDropout(), (64, 24)), (torchdrop.Dropout(), (64, 1024))],
    )  # fmt: skip
    def test_a_smaller_batch_has_the_first_masks(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        model, x = nn.Sequential(layer), torch.randn(shape)
        with torchdrop.frozen_masks(model, seed=1):
            y = model(x)
            for size in (1, 7, 64):
                assert torch.equal(model(x[:size]), y[:size])
        assert len(row_masks(y)) == 64 or isinstance(layer, (torchdrop.GaussianDropout, torchdrop.AlphaDropout))

    def test_every_call_in_a_forward_has_its_own_mask(self) -> None:
        model, x = Calls(), torch.ones(2, 64)
        with torchdrop.frozen_masks(model, seed=1):
            y, again = model(x), model(x)
        assert torch.equal(y, again)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(y.unbind(1), 2))

    def test_submodule_called_directly(self) -> None:
        model, x = Calls(), torch.ones(2, 64)
        with torchdrop.frozen_masks(model, seed=1):
            y = model.drop(x)
            model(x)
            assert torch.equal(model.drop(x), y)
            assert torch.equal(model.drop(x[:1]), y[:1])

    def test_modules_differ_by_their_names(self) -> None:
        model, x = nn.ModuleDict({"a": torchdrop.Dropout(), "b": torchdrop.Dropout()}), torch.ones(64)
        with torchdrop.frozen_masks(model, seed=1):
            assert not torch.equal(model["a"](x), model["b"](x))

    def test_layer_itself_as_the_model(self) -> None:
        layer, x = torchdrop.Dropout(), torch.ones(64)
        with torchdrop.frozen_masks(layer):
            assert torch.equal(layer(x), layer(x))

    def test_what_is_outside_the_model_stays_random(self) -> None:
        model, x = Calls(), torch.ones(1, 64)
        with torchdrop.frozen_masks(model, seed=1):
            model(x)
            assert not torch.equal(F.dropout(x), F.dropout(x))
            assert torch.equal(seeded(7, torchdrop.Dropout(), x), seeded(7, torchdrop.Dropout(), x))

    def test_layers_with_a_generator_follow_that(self) -> None:
        layer = torchdrop.Dropout(generator=torch.Generator().manual_seed(5))
        model, x = nn.Sequential(layer, torchdrop.Dropout(0.0)), torch.ones(64)
        with torchdrop.frozen_masks(model, seed=1):
            y, again = model(x), model(x)
        assert not torch.equal(y, again)
        layer.generator.manual_seed(5)
        assert torch.equal(layer(x), y)

    def test_changing_a_rate_changes_no_other_mask(self) -> None:
        model, x = nn.Sequential(torchdrop.Dropout(0.0), torchdrop.Dropout(0.5)), torch.ones(64)
        with torchdrop.frozen_masks(model, seed=1):
            second = model(x)
            model[0].p = 0.3
            both = model(x)
        assert torch.equal((both != 0) & (second != 0), both != 0)
        assert not torch.equal(both != 0, second != 0)

    def test_inner_context_wins(self) -> None:
        model, x = Calls(), torch.ones(1, 64)
        with torchdrop.frozen_masks(model, seed=2):
            alone = model(x)
        with torchdrop.frozen_masks(model, seed=1):
            outer = model(x)
            with torchdrop.frozen_masks(model, seed=2):
                assert torch.equal(model(x), alone)
            assert torch.equal(model(x), outer)
        assert not torch.equal(outer, alone)

    def test_two_models(self) -> None:
        left, right, x = Calls(), Calls(), torch.ones(1, 64)
        with torchdrop.frozen_masks(left, seed=1), torchdrop.frozen_masks(right, seed=2):
            outputs = [left(x), right(x), left(x), right(x)]
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[3])
        assert not torch.equal(outputs[0], outputs[1])
        with torchdrop.frozen_masks(left, seed=2):
            assert torch.equal(left(x), outputs[1])

    def test_a_part_of_a_model(self) -> None:
        model = nn.Sequential(nn.Sequential(torchdrop.Dropout()), nn.Sequential(torchdrop.Dropout()))
        x = torch.ones(256)
        with torchdrop.frozen_masks(model[0]):
            inner = [model[0](x), model[0](x)]
            whole = [model(x), model(x)]
        assert torch.equal(*inner)
        assert all(torch.equal((y != 0) & (inner[0] != 0), y != 0) for y in whole)
        assert not torch.equal(*whole)

    def test_restores_after_an_exception_inside(self) -> None:
        model, x = Calls(), torch.ones(1, 64)
        with pytest.raises(IndexError), torchdrop.frozen_masks(model):
            model(x)[1]
        assert hooks_of(model) == 0
        assert not torch.equal(model(x), model(x))

    def test_removes_its_hooks_and_leaves_others(self) -> None:
        model = Calls()
        model.register_forward_hook(lambda *_: None)
        with torchdrop.frozen_masks(model):
            assert hooks_of(model) > 1
            model(torch.ones(1, 8))
        assert hooks_of(model) == 1
        assert set(model.state_dict()) == set()

    def test_forward_that_fails_does_not_disturb_the_next(self) -> None:
        class Fragile(Calls):
            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                if x.dim() == 1:
                    raise KeyError
                return y

        model, x = nn.Sequential(Fragile()), torch.ones(1, 64)
        with torchdrop.frozen_masks(model, seed=1):
            y = model(x)
            with pytest.raises((KeyError, IndexError)):
                model(x[0])
            assert torch.equal(model(x), y)

    def test_hook_that_fails_before_ours_does_not_disturb_the_rest_of_the_forward(self) -> None:
        class Forgiving(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fragile, self.drop = nn.Identity(), torchdrop.Dropout()

            def forward(self, x: Tensor) -> Tensor:
                with contextlib.suppress(KeyError):
                    x = self.fragile(x)
                return torch.stack([self.drop(x), F.dropout(x)])

        def fail(module: nn.Module, args: Any) -> None:
            raise KeyError

        model, x = Forgiving(), torch.ones(64)
        with torchdrop.frozen_masks(model, seed=1):
            y = model(x)
            model.fragile.register_forward_pre_hook(fail, prepend=True)
            assert torch.equal(model(x), y)
            assert torch.equal(model(x), y)

    def test_gradient_agrees_with_finite_differences(self) -> None:
        model = nn.Sequential(
            nn.Linear(6, 5), torchdrop.GaussianDropout(0.2), nn.Tanh(), torchdrop.AlphaDropout(0.3), nn.Linear(5, 3),
            torchdrop.Dropout(), nn.Sigmoid(),
        ).double()  # fmt: skip
        x = torch.randn(4, 6, dtype=torch.float64)
        names, values = zip(*model.named_parameters(), strict=True)

        def cost(*values: Tensor) -> Tensor:
            return functional_call(model, dict(zip(names, values, strict=True)), (x,)).square().sum()

        with torchdrop.frozen_masks(model, seed=1):
            assert torch.autograd.gradcheck(cost, values)
            assert torch.autograd.gradgradcheck(cost, values)
            model.zero_grad()
            model(x).square().sum().backward()
            frozen = torch.cat([p.grad.flatten() for p in values if p.grad is not None])
            assert frozen.numel() == sum(p.numel() for p in values)
            slopes = torch.func.grad(cost, argnums=tuple(range(len(values))))(*values)
            assert torch.allclose(torch.cat([s.flatten() for s in slopes]), frozen, rtol=1e-12)

    def test_vmap_shares_the_masks(self) -> None:
        model, x = Calls(), torch.ones(5, 1, 64)
        with torchdrop.frozen_masks(model, seed=1):
            y = model(x[0])
            for randomness in ("same", "different", "error"):
                assert torch.equal(vmap(model, randomness=randomness)(x), y.expand(5, *y.shape))
            assert torch.equal(model(x[0]), y)

    def test_gradient_of_each_sample(self) -> None:
        model, x = Twice().double(), torch.randn(3, 1, 16, dtype=torch.float64)
        parameters = dict(model.named_parameters())

        def cost(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, p, x).sum()

        with torchdrop.frozen_masks(model, seed=1):
            slopes = vmap(grad(cost), in_dims=(None, 0))(parameters, x)["linear.weight"]
            for i in range(3):
                (expected,) = torch.autograd.grad(model(x[i]).sum(), model.linear.weight)
                assert torch.allclose(slopes[i], expected, rtol=1e-12)

    def test_eval_draws_nothing_and_says_so(self) -> None:
        model, x = nn.Sequential(torchdrop.Dropout()).eval(), torch.ones(8)
        message = "^frozen_masks: no mask was drawn in this context"
        with pytest.warns(UserWarning, match=message), torchdrop.frozen_masks(model):
            assert model(x) is x

    @pytest.mark.parametrize("model", [nn.Linear(8, 8), torchdrop.Dropout()])
    def test_warns_at_the_callers_line_where_no_mask_was_drawn(self, model: nn.Module) -> None:
        with pytest.warns(UserWarning, match="no mask was drawn") as caught, torchdrop.frozen_masks(model):
            F.dropout(torch.ones(8))
        assert [warning.filename for warning in caught] == [__file__]

    def test_refuses_stock_dropout_by_name(self) -> None:
        model = nn.Sequential(torchdrop.Dropout(), nn.Sequential(nn.Dropout(), nn.AlphaDropout()))
        with (
            pytest.raises(ValueError, match=r"torch\.nn, whose masks cannot be frozen: 1\.0, 1\.1\. Put torchdrop's"),
            torchdrop.frozen_masks(model),
        ):
            pass
        assert hooks_of(model) == 0

    @pytest.mark.parametrize("wrong", [None, 3, F.dropout, nn.Dropout])
    def test_model_of_the_wrong_type(self, wrong: Any) -> None:
        with (
            pytest.raises(TypeError, match=f"^model must be a torch.nn.Module, got {type(wrong).__name__}$"),
            torchdrop.frozen_masks(wrong),
        ):
            pass

    @pytest.mark.parametrize("wrong", [None, 1.0, "1", True, torch.tensor(1)])
    def test_seed_of_the_wrong_type(self, wrong: Any) -> None:
        with (
            pytest.raises(TypeError, match=f"^seed must be an integer, got {type(wrong).__name__}$"),
            torchdrop.frozen_masks(Calls(), seed=wrong),
        ):
            pass

    def test_any_integer_is_a_seed(self) -> None:
        x = torch.ones(2, 64)
        for seed in (2**64, -(2**63) - 1, 10**40):
            model = Calls()
            with torchdrop.frozen_masks(model, seed=seed):
                assert torch.equal(model(x), model(x))

    def test_shapes_alone(self) -> None:
        model = nn.Sequential(torchdrop.Dropout())
        with torchdrop.frozen_masks(model):
            assert model(torch.ones(4, 8, device="meta")).shape == (4, 8)

    @pytest.mark.slow
    def test_compiled_model_given_as_compiled(self) -> None:
        model = torch.compile(nn.Sequential(nn.Linear(64, 64), torchdrop.Dropout(), nn.Tanh(), torchdrop.Dropout()))
        x = torch.randn(4, 64)
        with torchdrop.frozen_masks(model, seed=1):
            y, again = model(x), model(x)
        with torchdrop.frozen_masks(model, seed=2):
            other = model(x)
        assert torch.equal(y, again)
        assert (y == 0).any()
        assert not torch.equal(y, other)


def several_costs(how: str, model: Twice, x: Tensor) -> tuple[Tensor, ...]:
    """Gradients at x and at the weight, in the ways in which forwards and backwards take turns."""
    x, model.linear.weight.grad = x.detach().clone().requires_grad_(), None
    with torchdrop.frozen_masks(model, seed=1):
        cost = model(x).square().sum()
        if how == "a forward without gradients between":
            with torch.no_grad():
                model(3.0 * x)
        elif how == "two forwards, one backward":
            cost = cost + model(2.0 * x).square().sum()
        elif how == "two forwards, two backwards":
            other = model(2.0 * x).square().sum()
            cost.backward()
            cost = other
        elif how == "steps":
            cost.backward()
            cost = model(2.0 * x).square().sum()
        if how != "backward after the context":
            cost.backward()
    if how == "backward after the context":
        cost.backward()
    assert x.grad is not None
    assert model.linear.weight.grad is not None
    return cost.detach(), x.grad, model.linear.weight.grad.clone()


@pytest.mark.usefixtures("clean")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
class TestFrozenCheckpoint:
    @reentrant_or_not
    @pytest.mark.parametrize(
        "how",
        ["one", "steps", "a forward without gradients between", "two forwards, one backward",
         "two forwards, two backwards", "backward after the context"],
    )  # fmt: skip
    def test_gradient_is_that_of_the_plain_run(self, how: str, use_reentrant: bool) -> None:
        x = torch.randn(4, 16, dtype=torch.float64)
        plain, saving = Twice().double(), Twice(use_reentrant).double()
        saving.load_state_dict(plain.state_dict())
        expected = several_costs(how, plain, x)
        assert agree(several_costs(how, saving, x), expected)
        assert saving.runs > plain.runs

    @reentrant_or_not
    def test_a_layer_or_the_model_checkpointed_from_outside(self, use_reentrant: bool) -> None:
        model, x = Twice().double(), torch.randn(4, 16, dtype=torch.float64)
        with torchdrop.frozen_masks(model, seed=1):
            for part in (model, lambda x: model.drop(x * model.linear.weight.sum()).sin()):
                expected = gradients(part, model.linear.weight, x)
                run = lambda x: checkpoint(part, x, use_reentrant=use_reentrant)  # noqa: B023, E731
                assert agree(gradients(run, model.linear.weight, x), expected)

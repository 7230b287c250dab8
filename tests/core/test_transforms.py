"""Seeds under vmap and the other function transforms, autocast, in place, and on lazy tensors."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import torchdrop
import torchdrop.functional as F
from tests.seeding import (
    FAMILY,
    every_layer,
    multiplier,
    row_masks,
    seeded,
    shape_of,
    small_and_large,
)

"""What PyTorch itself does at the first use of forward mode and of the compiler."""


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
        params = torchdrop.kernels.MaskParams(2**31, 2.0)
        y = vmap(lambda row: torchdrop.ops.operators.masked(row, key, params, row.shape))(x)
        kept = torchdrop.kernels.keep_mask((64,), key, params)
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

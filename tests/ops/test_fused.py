"""The fused operators: kernels against plain parts, paths, derivatives, what is kept for backward."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode

from tests.strategies import DTYPES, keep_probs, keys, tensors
from torchdrop import functional as TF
from torchdrop import kernels
from torchdrop.kernels import native
from torchdrop.kernels.mask_params import inverted, mask_params, params_tensor
from torchdrop.ops import fast_path, fused

KEY = torch.tensor([5, -6])
HALF = mask_params(0.5)
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def wide(x: Tensor) -> Tensor:
    return x.to(kernels.COMPUTE_DTYPE[x.dtype])


def parts_add(x: Tensor, bias: Tensor | None, residual: Tensor, kept: Tensor, scale: float) -> Tensor:
    """In plain operations, rounded once."""
    whole = wide(x) if bias is None else wide(x) + wide(bias)
    return (torch.where(kept, whole * scale, 0.0) + wide(residual)).to(x.dtype)


def beside(x: Tensor, seed: int = 1) -> Tensor:
    """Another tensor of the same kind and layout."""
    other = torch.empty_like(x)
    return other.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))


def steps(x: Tensor) -> list[int]:
    """Strides, but for dimensions in which no step is made."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for what a NaN's bits are."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def near(a: Tensor, b: Tensor, size: Tensor) -> bool:
    """Zero in the same places, and apart by what rounding does to numbers of this size.

    torch's GELU of vectors rounds otherwise than that of scalars, and which is taken depends on the layout.
    """
    allowed = 4 * torch.finfo(a.dtype).eps * (b.abs().double() + size.abs().double())
    return torch.equal(a == 0, b == 0) and bool(((a.double() - b.double()).abs() <= allowed).all())


@given(st.data(), tensors(), keep_probs, st.booleans())
def test_the_addition_is_that_of_the_parts(data: st.DataObject, x: Tensor, k: float, biased: bool) -> None:
    key, residual = data.draw(keys()), beside(x)
    bias = beside(x, 2)[(0,) * (x.dim() - 1)] if biased and x.dim() and x.numel() else None
    kept = kernels.keep_mask(x.shape, key, mask_params(k))
    y = fused.dropout_add(x, bias, residual, key, mask_params(k))
    assert torch.equal(y, parts_add(x, bias, residual, kept, mask_params(k).scale))
    assert y.dtype == x.dtype
    assert steps(y) == steps(torch.empty_like(x))


@given(st.data(), tensors(), keep_probs, st.sampled_from(sorted(ACTIVATIONS)))
def test_the_activation_is_that_of_the_parts(data: st.DataObject, x: Tensor, k: float, activation: str) -> None:
    key, g = data.draw(keys()), beside(x)
    kept, scale = kernels.keep_mask(x.shape, key, mask_params(k)), mask_params(k).scale
    if activation != "relu":  # GELU's parts are rounded each, so that a half type may overflow between them
        assume(all(bool((one.double() * scale).abs().le(torch.finfo(x.dtype).max).all()) for one in (x, g)))
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = fused.activation_dropout(leaf, key, mask_params(k), activation)
    whole = wide(leaf.detach()).requires_grad_()
    parts = torch.where(kept, ACTIVATIONS[activation](whole) * scale, 0.0)
    expected = parts.to(x.dtype)
    assert torch.equal(y, expected) if activation == "relu" else near(y, expected, x.double() * scale)
    assert y.dtype == x.dtype
    assert steps(y) == steps(torch.empty_like(x))
    (ours,) = torch.autograd.grad(y, leaf, g)
    (theirs,) = torch.autograd.grad(parts, whole, wide(g))
    expected = theirs.to(x.dtype)
    assert torch.equal(ours, expected) if activation == "relu" else near(ours, expected, g.double() * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 8, 255, 256, 257, 1000, native.SERIAL + 5])
def test_every_backend_gives_the_same(backend: str, dtype: torch.dtype, n: int) -> None:
    if backend == "triton" and n > 1000:
        n = 1001
    x, residual = torch.randn(3, n).to(dtype), torch.randn(3, n).to(dtype)
    bias, drawn = torch.randn(n).to(dtype), mask_params(0.7)
    kept = kernels.keep_mask(x.shape, KEY, drawn)
    for given_bias in (None, bias):
        y = fused.dropout_add(x, given_bias, residual, KEY, drawn)
        assert torch.equal(y, parts_add(x, given_bias, residual, kept, drawn.scale))
    y = fused.activation_dropout(x, KEY, drawn, "relu")
    assert torch.equal(y, torch.where(kept, wide(x).relu() * drawn.scale, 0.0).to(dtype))
    for activation in ("gelu", "gelu_tanh"):
        y = fused.activation_dropout(x, KEY, drawn, activation)
        expected = torch.where(kept, ACTIVATIONS[activation](wide(x)) * drawn.scale, 0.0).to(dtype)
        torch.testing.assert_close(y, expected)
        assert torch.equal(y == 0, expected == 0)


@pytest.mark.skipif(native.library is None, reason="the C kernels are not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0.5, 0.9, 1 / 3])
def test_threads_and_vector_width_do_not_change_a_bit(dtype: torch.dtype, k: float) -> None:
    assert native.library is not None
    n, drawn = 100_003, mask_params(k)
    x, other, bias = (torch.randn(size).to(dtype) for size in (n, n, 77))
    kept, element_type = kernels.keep_mask((n,), KEY, drawn), native.ELEMENT_TYPES[dtype]
    operations = native.Operation
    sum_ = parts_add(x, bias.repeat(-(-n // 77))[:n], other, kept, drawn.scale)
    gradient = torch.where(other > 0, wide(x) * drawn.scale, 0.0).to(dtype)
    rectified = torch.where(kept, wide(x).relu() * drawn.scale, 0.0).to(dtype)
    for width in (0, 2, 512):
        for threads in (1, 2, 3, 7):
            out = torch.empty_like(x)
            given_ = (out.data_ptr(), x.data_ptr(), bias.data_ptr(), 77, other.data_ptr(), n)
            native.library.fused(
                operations.DROPOUT_ADD, element_type, *given_, native.key_bytes(KEY), drawn.address, threads, width
            )
            assert torch.equal(out, sum_), (width, threads)
            native.library.fused(
                operations.RELU_DROPOUT_BACKWARD, element_type, *given_, native.NO_KEY, drawn.address, threads, width
            )
            assert torch.equal(out, gradient), (width, threads)
            native.library.rows(
                operations.RELU_DROPOUT, element_type, out.data_ptr(), x.data_ptr(), 1, n, 1, 0, n, KEY.data_ptr(),
                drawn.address, 0, threads, width,
            )  # fmt: skip
            assert torch.equal(out, rectified), (width, threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_dropped_may_be_anything_and_what_is_kept_stays_what_it_is(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 0.0, 1.5, -1.5] * 60).to(dtype)
    kept = kernels.keep_mask(x.shape, KEY, HALF)
    y = fused.dropout_add(x, None, torch.full_like(x, 3.0), KEY, HALF)
    assert torch.equal(y[~kept], torch.full_like(y[~kept], 3.0))
    assert same(y[kept], 3.0 + 2 * x[kept])
    y = fused.activation_dropout(x, KEY, HALF, "relu")
    assert torch.equal(y[~kept], torch.zeros_like(y[~kept]))
    assert same(y[kept], 2 * x[kept].relu())
    leaf = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad(fused.activation_dropout(leaf, KEY, HALF, "relu").sum(), leaf)
    (theirs,) = torch.autograd.grad((leaf.relu() * (2.0 * kept)).sum(), leaf)
    assert torch.equal(ours, theirs)  # a NaN that is kept lets the gradient pass, as torch's rectifier does


def functions(k: float = 0.6) -> dict[str, tuple[Callable[..., Tensor], int]]:
    """Each operator as a function of its operands."""
    drawn = mask_params(k)
    return {
        "dropout_add": (lambda x, r: fused.dropout_add(x, None, r, KEY, drawn), 2),
        "bias_dropout_add": (lambda x, r, b: fused.dropout_add(x, b, r, KEY, drawn), 3),
        **{
            name: (lambda x, name=name: fused.activation_dropout(x, KEY, drawn, name), 1)  # type: ignore[misc]
            for name in ACTIVATIONS
        },
    }


def operands(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(4, 3), (4, 3), (3,)][:count]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("name", functions())
def test_derivatives_of_every_order_by_finite_differences(name: str) -> None:
    f, count = functions()[name]
    given_ = operands(count)
    assert torch.autograd.gradcheck(f, given_, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda *x: f(*x) ** 3, given_)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", functions())
def test_all_paths_give_the_same(name: str, dtype: torch.dtype) -> None:
    f, count = functions()[name]
    given_ = operands(count, dtype)
    y = f(*given_)
    g = torch.randn_like(y)
    plain = torch.autograd.grad(y, given_, g)
    transformed, pull = torch.func.vjp(f, *[x.detach() for x in given_])
    assert torch.equal(transformed, y)
    again = torch.autograd.grad(f(*given_), given_, g, create_graph=True)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    found = compiled(*given_)
    assert torch.equal(found, y)
    for others in (pull(g), again, torch.autograd.grad(found, given_, g)):
        assert all(torch.equal(a, b) for a, b in zip(plain, others, strict=True))
    batched = torch.func.vmap(f)(*[torch.stack([x, 2 * x]).detach() for x in given_])
    assert torch.equal(batched[0], y)
    assert torch.equal(batched[1], f(*[2 * x for x in given_]))


@pytest.mark.slow
@pytest.mark.parametrize("approximation", sorted(ACTIVATIONS))
def test_opcheck_of_activations(approximation: str) -> None:
    x, drawn = torch.randn(5, 4, requires_grad=True), mask_params(0.6).tensor()
    torch.library.opcheck(torch.ops.torchdrop.activation_dropout.default, (x, KEY, drawn, approximation))
    arguments = (x.detach(), x.detach(), KEY, drawn, approximation)
    torch.library.opcheck(torch.ops.torchdrop.activation_dropout_backward.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck_of_the_addition(biased: bool) -> None:
    x, residual = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    bias = torch.randn(4, requires_grad=True) if biased else None
    torch.library.opcheck(torch.ops.torchdrop.dropout_add.default, (x, bias, residual, KEY, mask_params(0.6).tensor()))


def layouts(shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Tensors of one shape, contiguous and not."""
    return [
        torch.randn(shape),
        torch.randn(shape).contiguous(memory_format=torch.channels_last),
        torch.randn(shape[::-1]).permute(3, 2, 1, 0),
        torch.randn(*shape[:-1], 1).expand(shape),
        torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    ]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 1, 1)])
def test_strides_are_those_that_compiled_code_is_told(shape: tuple[int, int, int, int]) -> None:
    """It refuses others at run time: of a network in channels_last, the gradient that comes from ``flatten``."""
    ops, drawn = torch.ops.torchdrop, HALF.tensor()
    for x, other in itertools.product(layouts(shape), repeat=2):
        promised = torch.empty_like(x).stride()
        for bias in (None, torch.randn(shape[-1]), torch.randn(shape)):
            assert ops.dropout_add(x, bias, other, KEY, drawn).stride() == promised
        for name in ACTIVATIONS:
            assert ops.activation_dropout(x, KEY, drawn, name).stride() == promised
            assert ops.activation_dropout_backward(x, other, KEY, drawn, name).stride() == promised


def kept_for_backward(f: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return f(), saved


def test_no_mask_is_kept_for_backward() -> None:
    x, residual = (torch.randn(1000, requires_grad=True) for _ in range(2))
    _, saved = kept_for_backward(lambda: fused.dropout_add(x, None, residual, KEY, HALF))
    assert saved == []
    y, saved = kept_for_backward(lambda: fused.activation_dropout(x, KEY, HALF, "relu"))
    assert [s.data_ptr() for s in saved] == [y.data_ptr()]
    y, saved = kept_for_backward(lambda: fused.activation_dropout(x, KEY, HALF, "gelu"))
    assert [s.data_ptr() for s in saved] == [x.data_ptr()]


def test_only_wanted_gradients_are_made_and_the_residuals_is_the_outputs() -> None:
    x, residual = torch.randn(10, requires_grad=True), torch.randn(10, requires_grad=True)
    bias, g = torch.randn(10, requires_grad=True), torch.randn(10)
    y = fused.dropout_add(x.detach(), None, residual, KEY, HALF)
    assert torch.autograd.grad(y, residual, g)[0].data_ptr() == g.data_ptr()
    y = fused.dropout_add(x.detach(), bias, residual.detach(), KEY, HALF)
    kept = kernels.keep_mask((10,), KEY, HALF)
    assert torch.equal(torch.autograd.grad(y, bias, g)[0], torch.where(kept, 2 * g, 0.0))
    assert not fused.dropout_add(x.detach(), None, residual.detach(), KEY, HALF).requires_grad


def test_an_output_that_was_written_to_is_not_used_for_the_gradient() -> None:
    x = torch.randn(10, requires_grad=True)
    y = fused.activation_dropout(x, KEY, HALF, "relu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@example(shape=(3, 0), k=0.5)
@given(st.sampled_from([(), (0,), (3, 0), (1,), (2, 3, 5)]), keep_probs)
def test_rates_that_vary_are_composed(shape: tuple[int, ...], k: float) -> None:
    x, residual = torch.randn(shape), torch.randn(shape)
    rates = params_tensor(torch.full(shape, k, dtype=torch.float64), inverted)
    assert torch.equal(
        fused.dropout_add(x, None, residual, KEY, rates), fused.dropout_add(x, None, residual, KEY, mask_params(k))
    )
    for name in ACTIVATIONS:
        assert torch.equal(
            fused.activation_dropout(x, KEY, rates, name), fused.activation_dropout(x, KEY, mask_params(k), name)
        )


def test_the_kernel_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library is None:
        pytest.skip("the C kernels are not built")
    ran: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(native, name)

        def call(*args: Any) -> Tensor | None:
            out = original(*args)
            ran.append(name if out is not None else "none")
            return out

        return call

    for name in ("dropout_add", "activation_dropout", "activation_dropout_backward"):
        monkeypatch.setattr(native, name, counted(name))
    x = torch.randn(4, 6, requires_grad=True)
    fused.dropout_add(x, torch.randn(6), x, KEY, HALF)
    fused.activation_dropout(x, KEY, HALF, "relu").sum().backward()
    assert ran == ["dropout_add", "activation_dropout", "none"]
    fused.activation_dropout(x, KEY, HALF, "relu").backward(torch.ones(4, 6))
    assert ran[3:] == ["activation_dropout", "activation_dropout_backward"]
    fused.dropout_add(x.t(), None, x.t(), KEY, HALF)
    assert ran[5:] == ["none"]


@pytest.mark.skipif(native.library is None, reason="the C kernels are not built")
@given(st.integers(1, 3000) | st.just(native.SERIAL + 77), st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.booleans())
def test_the_fast_paths_give_what_the_general_ones_give(n: int, k: float, twice: bool) -> None:
    given_ = [torch.randn(2, n, requires_grad=True), torch.randn(n, requires_grad=True)]
    given_.append(torch.randn(2, n, requires_grad=True))
    x, bias, residual = given_
    paths: list[tuple[Callable[[], Tensor | None], Callable[[], Tensor]]] = [
        (
            lambda: fast_path.fast_dropout_add(x, None, residual, mask_params(k)),
            lambda: TF.dropout_add(x, residual, keep_prob=k),
        ),
        (
            lambda: fast_path.fast_dropout_add(x, bias, residual, mask_params(k)),
            lambda: TF.bias_dropout_add(x, bias, residual, keep_prob=k),
        ),
        (lambda: fast_path.fast_activation_dropout(x, mask_params(k), "relu"), lambda: TF.relu_dropout(x, keep_prob=k)),
        (lambda: fast_path.fast_activation_dropout(x, mask_params(k), "gelu"), lambda: TF.gelu_dropout(x, keep_prob=k)),
        (
            lambda: fast_path.fast_activation_dropout(x, mask_params(k), "gelu_tanh"),
            lambda: TF.gelu_dropout(x, keep_prob=k, approximate="tanh"),
        ),
    ]
    for short, general in paths:
        found = []
        for path, backend in ((short, None), (general, "native")):
            torch.manual_seed(n)
            with kernels.use_backend(backend) if backend else contextlib.nullcontext():
                y = path()
            assert y is not None
            gradients = torch.autograd.grad((y**2).sum(), given_, create_graph=twice, allow_unused=True)
            if twice:
                total = torch.stack([g.sum() for g in gradients if g is not None]).sum()
                gradients += torch.autograd.grad(total, given_, allow_unused=True)
            found.append([y, *(g for g in gradients if g is not None)])
        assert len(found[0]) == len(found[1])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_fast_paths_are_not_taken_where_something_watches() -> None:
    x, bias, half = torch.ones(8, 8), torch.ones(8), mask_params(0.5)
    paths = [
        lambda x: fast_path.fast_dropout_add(x, None, x, half),
        lambda x: fast_path.fast_dropout_add(x, bias, x, half),
        lambda x: fast_path.fast_activation_dropout(x, half, "relu"),
        lambda x: fast_path.fast_activation_dropout(x, half, "gelu"),
    ]
    for path in paths:
        assert (path(x) is None) == (native.library is None)
        assert path(x.t()[1:]) is None
        assert path(torch.ones(8, 8, device="meta")) is None
        assert torch.func.vmap(lambda x, path=path: x * (path(x) is None))(torch.ones(2, 8, 8)).all()
        with kernels.use_backend("reference"):
            assert path(x) is None
        with torch.autograd.forward_ad.dual_level():
            assert path(x) is None
        with BaseTorchFunctionMode():
            assert path(x) is None
    for other in (x.double(), x[:4], x.t(), 1.0, x.to("meta")):
        assert fast_path.fast_dropout_add(x, None, other, half) is None  # type: ignore[arg-type]
        assert fast_path.fast_dropout_add(x, other, x, half) is None  # type: ignore[arg-type]

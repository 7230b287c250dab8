"""scaled_dot_product_attention: the mask is dropout's, bit for bit, and nothing of the size of the weights is kept."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchdrop
from tests.seeding import seeded
from torchdrop import kernels
from torchdrop.functional import dropout, scaled_dot_product_attention
from torchdrop.kernels import attention as blockwise
from torchdrop.kernels import native, native_attention
from torchdrop.kernels.mask_params import mask_params
from torchdrop.ops import attention as operators
from torchdrop.ops.attention import composed

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS = ("none", "bool", "float", "keys", "causal", "both", "gqa", "strided")
ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 8, torch.float16: 8}
"""How many units in the last place of the largest element results may be off. The half types round each weight and each
gradient of a weight once, independently, and the result."""


@pytest.fixture(scope="module", autouse=True)
def _blocks_for_few_weights() -> Iterator[None]:
    with mock.patch.object(operators, "FEW", 0):
        yield


needs_native = pytest.mark.skipif(native.library is None, reason="the C kernels are not built")


def operands(
    kind: str, dtype: torch.dtype, queries: int, keys: int, features: int = 8, heads: int = 4
) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, key and value of two samples that want gradients, and the other arguments."""
    shapes = [(2, heads, n, features) for n in (queries, keys, keys)]
    if kind == "gqa":
        shapes = [shapes[0], (2, heads // 2, keys, features), (2, heads // 2, keys, features)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    if kind == "strided":
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    mask = {
        "bool": torch.rand(2, 1, queries, keys) > 0.3,
        "both": torch.rand(2, 1, queries, keys) > 0.3,
        "float": torch.randn(queries, keys).to(dtype),
        "keys": torch.rand(2, 1, 1, keys) > 0.3,
    }.get(kind)
    if kind == "bool":
        mask[0, 0, 1] = False  # type: ignore[index]
    given = {"attn_mask": mask, "is_causal": kind in ("causal", "both"), "enable_gqa": kind == "gqa"}
    return [t.requires_grad_() for t in tensors], given


def in_float64(tensors: list[Tensor], attn_mask: Tensor | None, is_causal: bool, **_: Any) -> Callable[[Any], Tensor]:
    """Attention as a softmax, and then a function of the weights."""
    if attn_mask is not None:
        if is_causal:
            attn_mask, is_causal = attn_mask & torch.ones(attn_mask.shape[-2:], dtype=torch.bool).tril(), False
        attn_mask = attn_mask if attn_mask.dtype is torch.bool else attn_mask.double()
    q, k, v = tensors
    return lambda drop: composed(q, k, v, attn_mask, is_causal, q.shape[-1] ** -0.5, drop)


def results(function: Callable[..., Tensor], tensors: list[Tensor], *args: Any, **options: Any) -> list[Tensor]:
    """Output and gradients under one seed."""
    y = seeded(3, function, *tensors, *args, **options)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return [y, *torch.autograd.grad(y, tensors, g)]


@pytest.fixture(params=["native", "aten"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and native.library is None:
        pytest.skip("the C kernels are not built")
    with torchdrop.use_backend(request.param):
        yield request.param


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that there are several of them in small problems."""
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", 2**12)


def mask_of(kind: str, dtype: torch.dtype, queries: int, keys: int, p: float) -> tuple[Tensor, Tensor]:
    """Which weights attention keeps under a seed, and which dropout keeps: values are unit vectors."""
    (q, k, v), given = operands(kind, dtype, queries, keys, keys)
    v = torch.eye(keys, dtype=dtype).expand(v.shape)
    kept = seeded(5, scaled_dot_product_attention, q * 0, k, v, dropout_p=p, **{**given, "attn_mask": None}) != 0
    return kept, seeded(5, dropout, torch.ones(2, 4, queries, keys, dtype=dtype), p) != 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 40), (33, 17), (3, 300)])
@pytest.mark.parametrize("kind", ["none", "gqa", "causal"])
def test_the_mask_is_that_of_dropout_on_the_weights(
    kind: str, queries: int, keys: int, dtype: torch.dtype, backend: str, small_blocks: None
) -> None:
    kept, expected = mask_of(kind, dtype, queries, keys, 0.3)
    if kind == "causal":
        expected &= torch.ones(queries, keys, dtype=torch.bool).tril()
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 9), (70, 67), (16, 300)])
@pytest.mark.parametrize("kind", KINDS)
def test_native_is_softmax_then_dropout(kind: str, queries: int, keys: int, dtype: torch.dtype) -> None:
    tensors, given = operands(kind, dtype, queries, keys)
    for p in (0.1, 0.0, 1.0):
        got = results(scaled_dot_product_attention, tensors, dropout_p=p, **given)
        wide = [t.detach().double().requires_grad_() for t in tensors]
        right = results(lambda *t, p=p: in_float64(list(t), **given)(lambda w: dropout(w, p)), wide)
        for found, expected in zip(got, right, strict=True):
            assert found.dtype == dtype
            allowed = ROUNDINGS[dtype] * torch.finfo(dtype).eps * (1 + expected.abs().max())
            assert (found.double() - expected).abs().max() <= allowed
        if p == 1.0:
            assert not any(t.any() for t in got)
        if kind == "bool" and p < 1.0:
            assert not got[0][0, :, 1].any()  # a query that may see no key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_native_in_small_blocks_is_the_same(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, given = operands(kind, dtype, 70, 67)
    whole = results(scaled_dot_product_attention, tensors, dropout_p=0.2, **given)
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", 2**12)
    shape, at_once = (2, 4, 70, 67), 2**12 // (67 * (8 if dtype is torch.float64 else 4))
    assert len(list(blockwise._blocks(shape, given["is_causal"], at_once))) > 16
    for a, b in zip(whole, results(scaled_dot_product_attention, tensors, dropout_p=0.2, **given), strict=True):
        assert (a - b).abs().max() <= ROUNDINGS[dtype] * torch.finfo(dtype).eps * (1 + a.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_pytorchs_operations_give_what_native_gives(kind: str, small_blocks: None) -> None:
    tensors, given = operands(kind, torch.float32, 12, 40)
    found = []
    for name in ("aten", "reference", "native")[: 3 if native.library else 2]:
        with torchdrop.use_backend(name):
            found.append(results(scaled_dot_product_attention, tensors, dropout_p=0.2, **given))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal"])
def test_native_does_not_depend_on_threads_and_vector_width(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    (q, k, v), given = operands(kind, dtype, 45, 300)
    mask = given["attn_mask"]
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(kernels.COMPUTE_DTYPE[dtype])
    shape = (2, 4, 45, 300)
    bias = None if mask is None else mask.expand(shape)
    problem = blockwise.Problem(
        q, k, v, bias, given["is_causal"], 0.4, torch.tensor([2**60 + 1, -3]), mask_params(0.7)
    )  # fmt: skip
    block = blockwise.Block(0, slice(0, 4), slice(0, 45), 300)
    wide = kernels.COMPUTE_DTYPE[dtype]
    scores, gradients = torch.randn(4, 45, 300).to(wide), torch.randn(4, 45, 300).to(dtype)
    inner, found = torch.randn(shape[:3]).to(wide), []
    for width in (0, 2, 512):
        for threads in (1, 3):
            monkeypatch.setattr(native, "ANY_WIDTH", width)
            monkeypatch.setattr(native, "threads", lambda n=threads: n)
            logsumexp = torch.zeros(shape[:3], dtype=wide)
            kernel = native_attention.Native(problem, logsumexp, inner)
            weights = kernel.weights(block, scores.clone()).clone()
            again, of_scores = kernel.gradients(block, scores.clone(), gradients.clone())
            found.append((weights, logsumexp, again.clone(), of_scores))
            assert torch.equal(weights != 0, again != 0)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_native
@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -87.0), (torch.float64, -708.0)])
def test_native_weights_are_exact_to_a_few_roundings(dtype: torch.dtype, lowest: float) -> None:
    """Scores are multiples of 2**-10, so the distance to the highest is exact. exp, the division and the sum of 64
    numbers are off by at most 11 halves of a unit in the last place together."""
    rows = 2000
    scores = (torch.rand(1, rows, 64, dtype=torch.float64) * lowest * 1024).round() / 1024
    scores[:, :, 5] = 0.0
    like = torch.empty(1, 1, rows, 1, dtype=dtype)
    keys = torch.empty(1, 1, 64, 1, dtype=dtype)
    problem = blockwise.Problem(like, keys, keys, None, False, 1.0, torch.tensor([1, 2]), mask_params(1.0))
    logsumexp = torch.empty(1, 1, rows, dtype=dtype)
    block = blockwise.Block(0, slice(0, 1), slice(0, rows), 64)
    got = native_attention.Native(problem, logsumexp, None).weights(block, scores.clone().to(dtype))
    exact = np.exp(scores[0].numpy().astype(np.longdouble))
    total = exact.sum(-1, keepdims=True)
    assert np.max(np.abs(got[0].numpy() / (exact / total) - 1)) <= 6 * torch.finfo(dtype).eps
    assert np.max(np.abs(logsumexp[0, 0].numpy() - np.log(total[:, 0]))) <= 6 * torch.finfo(dtype).eps


@needs_native
def test_native_passes_on_nan_and_drops_what_is_not_finite() -> None:
    q, k, v = torch.randn(3, 1, 1, 4, 4).unbind()
    k[..., 2, :] = math.nan
    assert scaled_dot_product_attention(q, k, v, dropout_p=0.1).isnan().all()
    mask = torch.tensor([True, True, False, True])
    y = scaled_dot_product_attention(q, k, v, mask, dropout_p=0.1)
    assert y.isfinite().all()  # the product of a NaN with what is masked by a bool is masked


@pytest.mark.parametrize("kind", ["none", "float", "causal", "gqa"])
def test_derivatives(kind: str) -> None:
    tensors, given = operands(kind, torch.float64, 4, 5, 3, heads=2)

    def fixed(*tensors: Tensor) -> Tensor:
        return seeded(0, scaled_dot_product_attention, *tensors, dropout_p=0.4, **given)

    assert torch.autograd.gradcheck(fixed, tensors)
    assert torch.autograd.gradgradcheck(fixed, tensors)


def test_a_bias_gets_a_gradient() -> None:
    (q, k, v), _ = operands("none", torch.float64, 4, 5, 3, heads=2)
    bias = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: seeded(0, scaled_dot_product_attention, q, k, v, b, 0.4), (bias,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_for_backward_grows_with_the_length(dtype: torch.dtype) -> None:
    queries, keys = 64, 640
    (q, k, v), _ = operands("none", dtype, queries, keys)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = scaled_dot_product_attention(q, k, v, dropout_p=0.1)
    wide = 8 if dtype is torch.float64 else 4
    expected = sum(t.numel() * t.element_size() for t in (q, k, v, y)) + 2 * 4 * queries * wide
    assert sum(t.numel() * t.element_size() for t in kept) == expected
    node = y.grad_fn
    held = [value for value in vars(node).values() if isinstance(value, Tensor)]
    assert sum(t.numel() * t.element_size() for t in held) == 16  # the mask's key


def test_without_dropout_it_is_pytorchs_function() -> None:
    (q, k, v), given = operands("bool", torch.float32, 7, 9)
    assert torch.equal(scaled_dot_product_attention(q, k, v, given["attn_mask"]),
                       F.scaled_dot_product_attention(q, k, v, given["attn_mask"]))  # fmt: skip
    assert torch.equal(scaled_dot_product_attention(q, k, v, keep_prob=1.0, is_causal=True, scale=0.2),
                       F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_takes_it_as_it_takes_pytorchs(p: float, dtype: torch.dtype) -> None:
    (q, k, v), _ = operands("none", dtype, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v).dtype
        y = seeded(0, scaled_dot_product_attention, q, k, v, dropout_p=p)
    assert y.dtype == expected
    y.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == dtype


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_one_key_is_drawn_whatever_the_rate(p: float) -> None:
    (q, k, v), _ = operands("none", torch.float32, 4, 4)
    seeded(0, scaled_dot_product_attention, q, k, v, dropout_p=p)
    after = torch.rand(())
    seeded(0, torchdrop.functional.dropout, q, 0.5)
    assert torch.equal(after, torch.rand(()))


def test_rates_and_generators() -> None:
    (q, k, v), _ = operands("none", torch.float32, 6, 6)
    by_p = seeded(1, scaled_dot_product_attention, q, k, v, dropout_p=0.25)
    for options in ({"keep_prob": 0.75}, {"dropout_p": torch.tensor(0.25)}, {"keep_prob": torch.full((6, 6), 0.75)}):
        torch.testing.assert_close(by_p, seeded(1, scaled_dot_product_attention, q, k, v, **options))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(by_p, scaled_dot_product_attention(q, k, v, dropout_p=0.25, generator=generator))


@given(
    st.sampled_from([(5, 4), (3, 5, 4), (2, 3, 5, 4), (2, 1, 3, 5, 4), (0, 3, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0)]),
    st.integers(0, 9),
    st.booleans(),
)
def test_any_number_of_dimensions(shape: tuple[int, ...], keys: int, is_causal: bool) -> None:
    q = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, *shape[:-2], keys, shape[-1], dtype=torch.float64, requires_grad=True).unbind()
    got = results(scaled_dot_product_attention, [q, k, v], dropout_p=0.3, is_causal=is_causal)
    scale = max(shape[-1], 1) ** -0.5
    right = results(lambda *t: composed(*t, None, is_causal, scale, lambda w: dropout(w, 0.3)), [q, k, v])
    for found, expected in zip(got, right, strict=True):
        torch.testing.assert_close(found, expected)


def test_batches_of_one_are_broadcast() -> None:
    q, k = torch.randn(2, 3, 5, 4), torch.randn(1, 1, 6, 4)
    y = seeded(0, scaled_dot_product_attention, q, k, k, dropout_p=0.2)
    torch.testing.assert_close(
        y, seeded(0, scaled_dot_product_attention, q, *[k.expand(2, 3, 6, 4)] * 2, dropout_p=0.2)
    )


class Attending(nn.Module):
    """Attention like that of a model of one's own: its rate is 0 in eval mode."""

    def __init__(self, function: Callable[..., Tensor] = scaled_dot_product_attention) -> None:
        super().__init__()
        self.project, self.function = nn.Linear(6, 18), function

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4).unbind()
        return self.function(q, k, v, dropout_p=0.4 if self.training else 0.0).transpose(1, 2).flatten(2)


def test_monte_carlo_inference_draws_what_it_draws_for_pytorchs_function() -> None:
    x, ours, stock = torch.randn(3, 5, 6), Attending(), Attending(F.scaled_dot_product_attention)
    stock.load_state_dict(ours.state_dict())
    mean, other = (torchdrop.mc_predict(model.eval(), x, 8, seed=3, task=None).mean for model in (ours, stock))
    torch.testing.assert_close(mean, other)
    assert not torch.allclose(mean, ours(x), atol=1e-3)


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["default", "own"])
def test_disabled_leaves_the_mask_out(generator: torch.Generator | None) -> None:
    model = Attending(functools.partial(scaled_dot_product_attention, generator=generator))
    x = torch.randn(3, 5, 6)
    with torchdrop.disabled(model):
        torch.testing.assert_close(model(x), model.eval()(x))
    assert not torch.allclose(model.train()(x), model.eval()(x), atol=1e-3)


def test_frozen_masks_repeat_it() -> None:
    model, x = Attending(), torch.randn(3, 5, 6)
    with torchdrop.frozen_masks(model, 3):
        assert torch.equal(model(x), model(x))
    assert not torch.equal(model(x), model(x))


def test_transforms() -> None:
    q = torch.randn(3, 2, 4, 5)
    call = lambda t: scaled_dot_product_attention(t, t, t, dropout_p=0.5)  # noqa: E731
    same = torch.vmap(call, randomness="same")(q[:1].expand(3, 2, 4, 5))
    assert torch.equal(same[0], same[1])
    different = torch.vmap(call, randomness="different")(q[:1].expand(3, 2, 4, 5))
    assert not torch.equal(different[0], different[1])
    slope = torch.func.grad(lambda t: seeded(0, call, t).sum())(q)
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(seeded(0, call, leaf).sum(), leaf)[0])
    _, tangent = torch.func.jvp(lambda t: seeded(0, call, t), (q,), (torch.ones_like(q),))
    assert tangent.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "keys", "causal", "gqa"])
def test_compiled_results_are_those_of_eager_mode(kind: str) -> None:
    tensors, given = operands(kind, torch.float32, 16, 16)
    backend = "inductor" if kind == "none" else "aot_eager"
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend=backend)
    for p in (0.1, 0.4):
        found, right = (results(f, tensors, dropout_p=p, **given) for f in (compiled, scaled_dot_product_attention))
        assert all(map(torch.equal, found, right))


@pytest.mark.slow
def test_a_rate_that_is_a_tensor_is_compiled_once() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    (q, k, v), _ = operands("none", torch.float32, 4, 4)
    compiled = torch.compile(
        lambda p: scaled_dot_product_attention(q, k, v, dropout_p=p), fullgraph=True, backend=counter
    )
    for p in (0.1, 0.2, 0.3):
        y = seeded(0, compiled, torch.tensor(p))
        assert torch.equal(y, seeded(0, scaled_dot_product_attention, q, k, v, dropout_p=torch.tensor(p)))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "float", "gqa"])
def test_the_operators_pass_opcheck(kind: str) -> None:
    tensors, given = operands(kind, torch.float32, 6, 8)
    key, params = torch.tensor([1, 2]), mask_params(0.5).tensor()
    rest = (given["attn_mask"], key, params, False, 0.3)
    torch.library.opcheck(torch.ops.torchdrop.attention.default, (*tensors, *rest))
    plain = [t.detach() for t in tensors]
    out, logsumexp = torch.ops.torchdrop.attention(*plain, *rest)
    args = (torch.randn_like(out), *plain, out, logsumexp, *rest)
    torch.library.opcheck(torch.ops.torchdrop.attention_backward.default, args)


def test_each_road_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("composed", "_forward", "_record"):
        before = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *a, n=name, f=before: taken.append(n) or f(*a))
    (q, k, v), _ = operands("none", torch.float32, 4, 4)
    scaled_dot_product_attention(q, k, v, dropout_p=0.1)
    with torch.no_grad():
        scaled_dot_product_attention(q, k, v, dropout_p=0.1)
    scaled_dot_product_attention(q, k, v, torch.zeros(4, 4, requires_grad=True), 0.1)
    assert taken == ["_record", "_forward", "_forward", "composed"]


def test_few_weights_are_computed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), _ = operands("none", torch.float32, 4, 5)
    expected = seeded(3, scaled_dot_product_attention, q, k, v, dropout_p=0.5)
    taken: list[int] = []
    composed = operators.composed
    monkeypatch.setattr(operators, "composed", lambda *a: taken.append(1) or composed(*a))
    for few, roads in ((2 * 4 * 4 * 5 - 1, 0), (2 * 4 * 4 * 5, 1)):
        monkeypatch.setattr(operators, "FEW", few)
        out = seeded(3, scaled_dot_product_attention, q, k, v, dropout_p=0.5)
        assert torch.allclose(out, expected, atol=1e-5)
        assert len(taken) == roads


Q = torch.zeros(2, 3, 4, 8)

ERRORS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((Q, Q, Q, torch.ones(5, 5)), {}, RuntimeError, r"attn_mask must broadcast .* \(2, 3, 4, 4\), got \(5, 5\)"),
    ((Q, Q, Q, torch.ones(1, 2, 3, 4, 4)), {}, RuntimeError, r"attn_mask must broadcast .* got \(1, 2, 3, 4, 4\)"),
    ((Q, Q, Q, torch.ones(4, 4, dtype=torch.long)), {}, RuntimeError, "Expected attn_mask dtype to be bool or float"),
    ((Q, Q, Q, [1]), {}, TypeError, "argument 'attn_mask' must be Tensor, not list"),
    (([1], Q, Q), {}, TypeError, "argument 'query' must be Tensor, not list"),
    ((Q[0, 0, 0], Q, Q), {}, RuntimeError, r"query must have the shape \(..., time, features\), got \(8,\)"),
    ((Q, Q.double(), Q), {}, RuntimeError, "one dtype .* a query of torch.float32 .* a key of torch.float64"),
    ((Q, Q, Q.to("meta")), {}, RuntimeError, "on one device, got a query .* on cpu and a value .* on meta"),
    ((Q.long(), Q.long(), Q.long()), {}, RuntimeError, "result type Float can't be cast"),
    ((Q, Q[..., :4], Q), {}, RuntimeError, "query and key must have as many features"),
    ((Q, Q, Q[:, :, :2]), {}, RuntimeError, "key and value as many positions"),
    ((Q, Q[:, :2], Q[:, :2]), {}, RuntimeError, "must broadcast against each other"),
    ((Q, Q[:, :2], Q[:, :2]), {"enable_gqa": True}, RuntimeError, "must divide those of query, got 3 heads"),
    ((Q, Q, Q), {"dropout_p": 1.5}, RuntimeError, "dropout probability has to be between 0 and 1, but got 1.5"),
    ((Q, Q, Q), {"dropout_p": math.nan}, RuntimeError, "between 0 and 1, but got nan"),
    ((Q, Q, Q), {"dropout_p": "a"}, TypeError, "dropout_p must be a number or a tensor, got str"),
    ((Q, Q, Q), {"keep_prob": -0.1}, ValueError, r"keep_prob must be in \[0, 1\], got -0.1"),
    ((Q, Q, Q), {"keep_prob": 0.5, "dropout_p": 0.5}, TypeError, "dropout_p or as keep_prob, not both"),
    ((Q, Q, Q), {"keep_prob": torch.full((5,), 0.5)}, ValueError, "does not broadcast against the mask's shape"),
    ((Q, Q, Q), {"dropout_p": 0.5, "generator": 3}, TypeError, "generator must be a torch.Generator"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS)
def test_errors(args: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        scaled_dot_product_attention(*args, **options)
    assert torch.equal(before, torch.get_rng_state())


OPERATOR_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": Q.long()}, TypeError, "query must be one of"),
    ({"key": Q.double()}, TypeError, "key must have the first tensor's dtype"),
    ({"value": Q[0]}, ValueError, "must have as many dimensions"),
    ({"key": Q[:, :2], "value": Q[:, :2]}, ValueError, "the heads of key must divide those of query, got 2"),
    ({"value": Q[:, :, :3]}, ValueError, "must go together"),
    ({"key": Q[..., :3]}, ValueError, "must go together"),
    ({"bias": torch.zeros(3, 4)}, ValueError, r"bias must broadcast against \(2, 3, 4, 4\), got \(3, 4\)"),
    ({"bias": torch.zeros(4, 4, dtype=torch.int32)}, TypeError, "bias must be bool or floating point"),
    ({"mask_key": torch.zeros(3, 2, dtype=torch.long)}, ValueError, "one key"),
    ({"params": torch.zeros(4)}, TypeError, "params must be a strided float64 tensor"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), OPERATOR_ERRORS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors_of_the_operator(wrong: dict[str, Any], kind: type[Exception], message: str, device: str) -> None:
    right = {
        "query": Q, "key": Q, "value": Q, "bias": None, "mask_key": torch.zeros(2, dtype=torch.long),
        "params": mask_params(0.5).tensor(), "is_causal": False, "scale": 1.0,
    }  # fmt: skip
    args = {**right, **wrong}
    if device == "meta":
        args = {name: v.to("meta") if isinstance(v, Tensor) and name != "params" else v for name, v in args.items()}
    with pytest.raises(kind, match=message):
        torch.ops.torchdrop.attention(**args)

"""The registered operators: schema, fake tensors, autograd of every order, vmap, compile, export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.strategies import keys, shared, tensors
from torchdrop.functional import dropout
from torchdrop.kernels import native
from torchdrop.kernels.mask_params import alpha, gaussian, inverted, mask_params, params_tensor
from torchdrop.ops import fast_path, operators

KEY = torch.tensor([3, 4])
CASES = [(operators.masked, inverted), (operators.masked, alpha), (operators.gaussian, gaussian)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked", "gaussian"])
@pytest.mark.parametrize("shape", [[5, 4], [5, 1], [1, 1]])
def test_opcheck(name: str, shape: list[int]) -> None:
    x = torch.randn(5, 4, requires_grad=True)
    torch.library.opcheck(getattr(torch.ops.torchdrop, name).default, (x, KEY, mask_params(0.6).tensor(), shape))


@pytest.mark.slow
def test_opcheck_of_batched_keys_and_laws() -> None:
    x, key = torch.randn(5, 4, requires_grad=True), torch.arange(10).reshape(5, 2)
    params_of_each = params_tensor(torch.rand(5, 1))
    torch.library.opcheck(torch.ops.torchdrop.masked.default, (x, key, params_of_each, [4]))


def test_opcheck_of_the_key() -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.torchdrop.draw_key.default, (torch.empty(2),), {"device": torch.device("cpu")}, test_utils=checks
    )


@pytest.mark.parametrize(("operator", "formula"), CASES)
@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (4, 1)])
def test_derivatives_of_every_order_by_finite_differences(operator: Any, formula: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return operator(x, KEY, mask_params(0.6, formula), shape)

    assert torch.autograd.gradcheck(
        f, (x,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(lambda x: f(x) ** 3, (x,), check_fwd_over_rev=True)


@pytest.mark.slow
@given(st.data(), tensors())
def test_all_paths_give_the_same(data: st.DataObject, x: Tensor) -> None:
    key, shape = data.draw(keys()), data.draw(shared(tuple(x.shape)))
    for operator, formula in CASES:
        drawn = mask_params(0.7, formula)
        plain = operator(x, key, drawn, shape)
        registered = getattr(torch.ops.torchdrop, "gaussian" if operator is operators.gaussian else "masked")
        assert torch.equal(registered(x, key, drawn.tensor(), shape), plain)
        transformed = torch.func.vjp(lambda x, o=operator, d=drawn: o(x, key, d, shape), x)
        assert torch.equal(transformed[0], plain)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        recorded = operator(leaf, key, drawn, shape)
        assert torch.equal(recorded, plain)
        assert recorded.stride() == plain.stride() == torch.empty_like(x).stride()
        g = torch.ones_like(recorded)
        (grad,) = torch.autograd.grad(recorded, leaf, g)
        assert torch.equal(grad, transformed[1](g)[0])
        assert grad.stride() == torch.empty_like(g).stride()


@pytest.mark.skipif(native.library is None, reason="the C kernels are not built")
@given(st.integers(1, 3000) | st.just(native.SERIAL + 77), st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.booleans())
def test_the_fast_path_gives_what_the_general_one_gives(n: int, k: float, twice: bool) -> None:
    x = torch.randn(n, requires_grad=True)
    taken: list[Tensor | None] = []

    def both(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(n)
        y = f(x)
        (g,) = torch.autograd.grad((y**2).sum(), x, create_graph=twice)
        (h,) = torch.autograd.grad(g.sum(), x) if twice else (g,)
        return y, g, h

    def short(x: Tensor) -> Tensor:
        taken.append(fast_path.fast_dropout(x, mask_params(k)))
        assert taken[0] is not None
        return taken[0]

    for a, b in zip(both(short), both(lambda x: dropout(x, keep_prob=k, shared_axes=())), strict=True):
        assert torch.equal(a, b)


def test_the_fast_path_is_not_taken_where_something_watches() -> None:
    x, half = torch.ones(8), mask_params(0.5)
    assert fast_path.fast_dropout(x, half) is not None
    assert fast_path.fast_dropout(torch.ones(8, 8).t()[1:], half) is None
    assert fast_path.fast_dropout(torch.ones(8, device="meta"), half) is None
    assert torch.func.vmap(lambda x: x * (fast_path.fast_dropout(x, half) is None))(torch.ones(2, 3)).all()
    with torchdrop.use_backend("reference"):
        assert fast_path.fast_dropout(x, half) is None
    with torch.autograd.forward_ad.dual_level():
        assert fast_path.fast_dropout(x, half) is None
    with BaseTorchFunctionMode():
        assert fast_path.fast_dropout(x, half) is None


@pytest.mark.parametrize("n", [100, 50_000])
@pytest.mark.parametrize("layer", [torchdrop.Dropout(0.5), torchdrop.AlphaDropout(0.5), torchdrop.GaussianDropout(0.5)])
def test_nothing_that_grows_with_the_input_is_saved_for_backward(n: int, layer: nn.Module) -> None:
    saved: list[int] = []
    x = torch.randn(n, requires_grad=True)

    def pack(t: Tensor) -> Tensor:
        saved.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    held = [v for name, v in vars(y.grad_fn).items() if not name.startswith("__")]
    while any(isinstance(v, tuple) for v in held):
        held = [w for v in held for w in (v if isinstance(v, tuple) else (v,))]
    assert held
    saved += [v.numel() * v.element_size() for v in held if isinstance(v, Tensor)]
    saved += [len(v) for v in held if isinstance(v, bytes)]
    assert sum(saved) == 16


def test_meta_and_fake_tensors_keep_shape_dtype_and_strides() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.randn(2, 3, 4, 5).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    for layer in (torchdrop.Dropout(), torchdrop.Dropout2d(), torchdrop.GaussianDropout()):
        y = layer(x.to("meta"))
        assert (y.device.type, y.shape, y.dtype, y.stride()) == ("meta", x.shape, x.dtype, x.stride())
        with FakeTensorMode() as mode:
            z = layer(mode.from_tensor(x))
        assert (z.shape, z.dtype, z.stride()) == (x.shape, x.dtype, x.stride())


def test_a_mode_sees_the_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        torchdrop.Dropout(0.5)(torch.ones(10))
    assert "torchdrop.masked.default" in seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_element_type_alone(dtype: torch.dtype) -> None:
    layer, stock = torchdrop.Dropout(0.5), nn.Dropout(0.5)
    with torch.autocast("cpu", dtype=dtype):
        for x in (torch.randn(20), torch.randn(20).to(dtype)):
            assert layer(x).dtype == stock(x).dtype == x.dtype
            assert torch.ops.torchdrop.masked(x, KEY, mask_params(0.5).tensor(), [20]).dtype == x.dtype
        assert layer(torch.randn(2, 2) @ torch.randn(2, 2)).dtype == dtype


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 24)
        self.drops = nn.ModuleList(
            [
                torchdrop.Dropout(0.5),
                torchdrop.Dropout(0.5, shared_axes=0),
                torchdrop.AlphaDropout(0.1),
                torchdrop.GaussianDropout(0.2),
                torchdrop.Dropout1d(0.3),
                torchdrop.FeatureAlphaDropout(0.1),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x).unflatten(1, (6, 4))
        for drop in self.drops:
            x = drop(torch.tanh(x))
        return dropout(x, 0.25).flatten(1)


def same_masks(compiled: Callable[..., Tensor], eager: Callable[..., Tensor], seed: int, *args: Any) -> None:
    """Asserts that both give the same output and gradient under one seed."""
    x = args[0]
    results = []
    for f in (compiled, eager):
        torch.manual_seed(seed)
        y = f(*args)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a == 0, b == 0)
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiled_and_eager_have_the_same_masks_and_100_rates_take_one_compilation() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    x = torch.randn(9, 20, requires_grad=True)
    for step in range(100):
        for j, drop in enumerate(net.drops):
            drop.keep_prob = 1.0 - (step + j) / 120  # type: ignore[assignment]
        same_masks(compiled, net, step, x)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_layers_in_one_graph_have_masks_of_their_own(backend: str) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(torchdrop.Dropout(0.5), torchdrop.Dropout(0.5))
    x = torch.ones(10_000, requires_grad=True)
    kept = torch.compile(net, fullgraph=True, backend=backend)(x).ne(0).float().mean().item()
    assert 0.2 < kept < 0.3
    kept = (
        torch.compile(lambda x: dropout(x) * dropout(x), fullgraph=True, backend=backend)(x).ne(0).float().mean().item()
    )
    assert 0.2 < kept < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_compiled_checkpointing_repeats_the_masks(reentrant: bool) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(20, 20), torchdrop.Dropout(0.5), nn.Tanh(), torchdrop.Dropout(0.5))
    x = torch.randn(7, 20, requires_grad=True)
    if reentrant:
        compiled = torch.compile(net, fullgraph=True)
        torch.manual_seed(1)
        y = checkpoint(compiled, x, use_reentrant=True)
        y.square().sum().backward()
        torch.manual_seed(1)
        z = net(x)
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(x.grad, torch.autograd.grad(z.square().sum(), x)[0])
    else:
        compiled = torch.compile(lambda x: checkpoint(net, x, use_reentrant=False), fullgraph=True)
        same_masks(compiled, net, 1, x)


@pytest.mark.slow
def test_compiled_functions_with_a_rate_as_tensor_and_in_place() -> None:
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(lambda x, k: dropout(x, keep_prob=k), fullgraph=True, backend=counter)
    x = torch.ones(3000, requires_grad=True)
    for step in range(1, 20):
        k = torch.tensor(step / 20, dtype=torch.float64)
        same_masks(compiled, lambda x, k: dropout(x, keep_prob=k), step, x, k)
    assert counter.frame_count == 1
    z = torch.ones(3000)
    written = torch.compile(lambda z: dropout(z, 0.5, True, True), fullgraph=True)(z)
    assert torch.equal(written, z)
    assert set(z.unique().tolist()) == {0.0, 2.0}
    layer = torchdrop.Dropout(0.5, inplace=True)

    def hidden(x: Tensor) -> Tensor:
        return layer(torch.sin(x))

    same_masks(torch.compile(hidden, fullgraph=True), hidden, 1, x)
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad is being used in an in-place"):
        torch.compile(lambda x: layer(x.view(30, 100)))(x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: dropout(x, 0.4),
    "a rate for each feature": lambda x: dropout(x, keep_prob=torch.linspace(0.1, 0.9, 8)),
    "shard": lambda x: dropout(x, 0.4, shard=torchdrop.Shard(-1, 3, 12)),
    "alpha": lambda x: torchdrop.functional.alpha_dropout(x, 0.4),
    "gaussian": lambda x: torchdrop.functional.gaussian_dropout(x, 0.4),
    "relu": lambda x: torchdrop.functional.relu_dropout(x, 0.4),
}
WITH_ALL = ("dropout", "shard", "relu")
"""One function for each form of an operator: a whole mask, a part of one, a fused kernel."""

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "grad of grad": lambda f, x: torch.func.grad(
        lambda x: torch.func.grad(lambda x: (f(x) ** 3).sum())(x).square().sum()
    )(x),
    "jvp": lambda f, x: torch.func.jvp(lambda x: f(x).square(), (x,), (torch.cos(x),))[1],
    "vmap of grad": lambda f, x: torch.func.vmap(
        torch.func.grad(lambda x: f(x).square().sum()), randomness="different"
    )(x),
    "grad of vmap": lambda f, x: torch.func.grad(
        lambda x: torch.func.vmap(f, randomness="different")(x).square().sum()
    )(x),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in FUNCTIONS for how in TRANSFORMS if name in WITH_ALL or how in ("grad", "jvp")],
)
def test_transforms_inside_compiled_code(name: str, how: str) -> None:
    torch.compiler.reset()
    x = torch.randn(5, 4, 8, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return TRANSFORMS[how](FUNCTIONS[name], x)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        same_masks(compiled, f, seed, x)


@pytest.mark.slow
def test_inductor_draws_what_eager_draws_under_a_derivative() -> None:
    torch.compiler.reset()
    f = torch.func.grad(lambda x: dropout(x, 0.4).square().sum())
    same_masks(torch.compile(f, fullgraph=True), f, 1, torch.randn(5, 8, requires_grad=True))


@pytest.mark.slow
@pytest.mark.parametrize(("randomness", "different"), [("different", 6), ("same", 1)])
def test_compiled_vmap_obeys_its_randomness(randomness: str, different: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.vmap(dropout, randomness=randomness))
    rows = compiled(torch.ones(6, 100))
    assert len({tuple(row.tolist()) for row in rows}) == different
    assert set(rows.unique().tolist()) == {0.0, 2.0}


@pytest.mark.slow
def test_export_in_eval_mode_leaves_no_trace() -> None:
    net = Net().eval()
    graph = torch.export.export(nn.Sequential(nn.Linear(20, 20), *net.drops[:1]).eval(), (torch.ones(2, 20),)).graph
    assert [node.op for node in graph.nodes if node.op == "call_function"] == ["call_function"]
    assert "torchdrop" not in str(graph)
    trained = torch.export.export(nn.Sequential(torchdrop.Dropout(0.5)), (torch.ones(2, 20),))
    assert "torchdrop.masked" in str(trained.graph)
    torch.manual_seed(0)
    exported = trained.module()(torch.ones(2, 20))
    torch.manual_seed(0)
    assert torch.equal(exported, dropout(torch.ones(2, 20)))


@settings(max_examples=20)
@given(st.data(), st.sampled_from(["different", "same"]), st.integers(0, 2))
def test_vmap_equals_a_loop_over_keys(data: st.DataObject, randomness: str, dim: int) -> None:
    """The batching rule, against one call for each sample."""
    batched = randomness == "different"
    x = torch.randn(4, 5, 6)
    key = data.draw(keys((x.shape[dim],))) if batched else KEY
    params_of_each = params_tensor(torch.rand(x.shape[dim]))
    for operator, _ in CASES:
        in_dims = (dim, 0 if batched else None, 0)
        rest = [size for d, size in enumerate(x.shape) if d != dim]
        shape = [rest[0], 1]
        got = torch.func.vmap(lambda x, k, w, o=operator, s=shape: o(x, k, w, s), in_dims=in_dims)(
            x, key, params_of_each
        )
        for i in range(x.shape[dim]):
            alone = operator(x.select(dim, i), key[i] if batched else key, params_of_each[i], shape)
            assert torch.equal(got[i], alone)


@pytest.mark.slow
def test_a_rate_for_each_feature_in_code_compiled_for_any_size() -> None:
    torch.compiler.reset()
    layer = torchdrop.Dropout(keep_prob=torch.linspace(0.1, 0.9, 30))
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.ones(5, 30)
    torch._dynamo.maybe_mark_dynamic(x, 1)
    torch.manual_seed(1)
    eager = layer(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), eager)

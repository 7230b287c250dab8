"""torch.compile: eager's masks in forward and backward, recomputed or not, and one compilation for all rates and sizes.

Also what PyTorch's issues 198333 and 190717 describe of its own dropout: masks that groups of channels share, and
backward passes under another mask than the forward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import torchdrop
from tests import TORCH
from tests.seeding import seeded
from tests.statistical import FALSE_ALARM, check_rate, deviation, draws_for
from torchdrop import functional as TF

pytestmark = pytest.mark.slow

compilers = pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


class Each(nn.Module):
    """Several functions or layers, each with operands of its own."""

    def __init__(self, calls: dict[str, Callable[..., Tensor]]) -> None:
        super().__init__()
        self.calls = list(calls.values())
        self.layers = nn.ModuleList(call for call in self.calls if isinstance(call, nn.Module))

    def forward(self, operands: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [call(*given) for call, given in zip(self.calls, operands, strict=True)]


def family() -> dict[str, Callable[..., Tensor]]:
    return {
        "dropout": torchdrop.Dropout(0.25),
        "shared axes": torchdrop.Dropout(0.25, shared_axes=(0, 2)),
        "a rate for each feature": torchdrop.Dropout(keep_prob=torch.linspace(0.1, 0.9, 12)),
        "channels": torchdrop.Dropout1d(0.25),
        "images": torchdrop.Dropout2d(0.25),
        "alpha": torchdrop.AlphaDropout(0.25),
        "channels, alpha": torchdrop.FeatureAlphaDropout(0.25),
        "gaussian": torchdrop.GaussianDropout(0.25),
        "rows": torchdrop.DropPath(0.25),
        "function": lambda x: TF.dropout(x, 0.25),
        "function, channels": lambda x: TF.dropout2d(x, keep_prob=0.75),
        "add": torchdrop.DropoutAdd(0.25),
        "bias and add": torchdrop.BiasDropoutAdd(0.5),
        "relu": torchdrop.ReLUDropout(0.25),
        "gelu": torchdrop.GELUDropout(0.25),
        "function, add": lambda x, residual: TF.dropout_add(x, residual, 0.25),
        "function, bias and add": lambda x, bias, residual: TF.bias_dropout_add(x, bias, residual, 0.5),
        "function, relu": lambda x: TF.relu_dropout(x, 0.25),
        "function, gelu": lambda x: TF.gelu_dropout(x, 0.25),
    }


def operands_for(names: list[str], device: torch.device, rows: int = 5) -> list[tuple[Tensor, ...]]:
    """Without zeros, and each an operand of one layer only, so that its gradient is not a sum."""

    def made(*shape: int) -> Tensor:
        x = torch.randn(shape)
        return torch.where(x.abs() < 0.01, 0.5, x).to(device).requires_grad_()

    found: list[tuple[Tensor, ...]] = []
    for name in names:
        shape = (rows, 6, 4, 3) if name in ("images", "function, channels") else (rows, 7, 12)
        x = made(*shape)
        if name == "images":
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        bias, residual = [made(12)] if "bias" in name else [], [made(*shape)] if "add" in name else []
        found.append((x, *bias, *residual))
    return found


def outcome(
    model: Callable[..., list[Tensor]], operands: list[tuple[Tensor, ...]], seed: int
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Outputs, and the gradients of their sum, which are exact however they are added up over a bias."""
    torch.manual_seed(seed)
    outputs = model(operands)
    leaves = [x for given in operands for x in given]
    return outputs, torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])


@compilers
def test_outputs_and_gradients_are_eagers_bit_for_bit(device: torch.device, compiler: str) -> None:
    calls = family()
    model, operands = Each(calls).to(device), operands_for(list(calls), device)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    masks = []
    for seed in (1, 2):
        (ys, gs), (expected, gradients) = (outcome(f, operands, seed) for f in (compiled, model))
        for name, y, z in zip(calls, ys, expected, strict=True):
            assert torch.equal(y, z), name
            assert y.stride() == z.stride(), name
        assert all(torch.equal(g, h) for g, h in zip(gs, gradients, strict=True))
        masks.append(ys)
    assert not any(torch.equal(y, z) for y, z in zip(*masks, strict=True))


@compilers
def test_calls_in_one_graph_have_masks_of_their_own(device: torch.device, compiler: str) -> None:
    """Also equal calls, which a compiler would otherwise merge. Ten is large enough for GELU to leave it alone."""
    n = draws_for(0.5, 0.05)
    x, nothing = torch.full((n,), 10.0, device=device), torch.zeros(n, device=device)
    add, relu, gelu = torchdrop.DropoutAdd(0.5), torchdrop.ReLUDropout(0.5), torchdrop.GELUDropout(0.5)

    def model(x: Tensor, nothing: Tensor) -> list[Tensor]:
        found = [TF.dropout(x), TF.dropout(x), add(x, nothing), add(x, nothing)]
        return [*found, relu(x), relu(x), gelu(x), gelu(x), TF.relu_dropout(x), TF.gelu_dropout(x)]

    kept = [y != 0 for y in torch.compile(model, fullgraph=True, backend=compiler)(x, nothing)]
    for a, b in itertools.combinations(kept, 2):
        check_rate(int((a == b).sum()), n, 0.5, 0.05)


RATED = {name: layer for name, layer in family().items() if isinstance(layer, nn.Module) and "each" not in name}


@pytest.mark.parametrize("name", RATED)
def test_a_new_rate_does_not_recompile_a_layer(name: str, device: torch.device) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    layer, counter = family()[name], CompileCounterWithBackend("aot_eager")
    model, operands = Each({name: layer}), operands_for([name], device)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step, keep_prob in enumerate((0.5, 0.9, 1.0, 0.3, 0.7)):
        layer.keep_prob = keep_prob  # type: ignore[attr-defined]
        (ys, gs), (expected, gradients) = (outcome(f, operands, step) for f in (compiled, model))
        torch.testing.assert_close(ys, expected)
        torch.testing.assert_close(gs, gradients)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", [name for name in family() if name.startswith("function")])
def test_a_new_number_recompiles_a_function_once_at_most(name: str, device: torch.device) -> None:
    """For the second number the compiler makes code for any: it does so with every Python number."""
    from torch._dynamo.testing import CompileCounterWithBackend

    functions: dict[str, Callable[..., Tensor]] = {
        "function": TF.dropout, "function, channels": TF.dropout2d, "function, add": TF.dropout_add,
        "function, bias and add": TF.bias_dropout_add, "function, relu": TF.relu_dropout,
        "function, gelu": TF.gelu_dropout,
    }  # fmt: skip
    ((*operands,),) = operands_for([name], device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functions[name], fullgraph=True, backend=counter)
    for step, p in enumerate((0.5, 0.25, 0.1, 0.7, 0.9, 0.35)):
        ys = []
        for f in (compiled, functions[name]):
            torch.manual_seed(step)
            ys.append(f(*operands, p))
        torch.testing.assert_close(*ys)
    assert counter.frame_count <= 2


@compilers
def test_one_compilation_serves_all_sizes(device: torch.device, compiler: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    calls, counter = family(), CompileCounterWithBackend(compiler)
    model = Each(calls).to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 11, 64, 3):
        operands = operands_for(list(calls), device, rows)
        (ys, gs), (expected, gradients) = (outcome(f, operands, rows) for f in (compiled, model))
        for name, y, z in zip(calls, ys, expected, strict=True):
            assert torch.equal(y, z), name
        assert all(torch.equal(g, h) for g, h in zip(gs, gradients, strict=True))
    assert counter.frame_count == 1


class Squared(nn.Module):
    """What it saves for backward hangs on masks: for ones the gradient is twice the output, if both have the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torchdrop.Dropout(0.5), torchdrop.Dropout(0.5, shared_axes=0)
        self.third, self.fourth = torchdrop.ReLUDropout(0.5), torchdrop.DropoutAdd(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.third(self.second(h * h))
        return self.fourth(h, torch.zeros_like(h))


def _selective(save: list[Any]) -> Any:
    return partial(create_selective_checkpoint_contexts, save)


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "none": {},
    "recomputed": {"use_reentrant": False},
    "selective, the product saved": {
        "use_reentrant": False,
        "context_fn": _selective([torch.ops.aten.mul.Tensor]),
    },
    "selective, a mask's result saved": {
        "use_reentrant": False,
        "context_fn": _selective([torch.ops.torchdrop.masked.default]),
    },
}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_backward_has_the_masks_of_forward_whatever_is_recomputed(
    device: torch.device, compiler: str, how: str
) -> None:
    model, x = Squared(), torch.ones(16, 9, 11, device=device, requires_grad=True)
    options = CHECKPOINTS[how]

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, **options) if options else model(x)

    compiled = run if compiler == "eager" else torch.compile(run, fullgraph=True, backend=compiler)
    for seed in (1, 2):
        torch.manual_seed(seed)
        y = compiled(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.manual_seed(seed)
        assert torch.equal(y, model(x))
        assert set(y.unique().tolist()) == {0.0, 32.0}
        assert torch.equal(gradient, 2 * y)


@compilers
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_compiled_code(device: torch.device, compiler: str, reentrant: bool) -> None:
    model, x = Squared(), torch.ones(16, 9, 11, device=device, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    torch.manual_seed(4)
    y = checkpoint(compiled, x, use_reentrant=reentrant)
    y.sum().backward()
    torch.manual_seed(4)
    assert torch.equal(y, model(x))
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * y)


def test_a_budget_of_memory_is_refused_where_gradients_would_have_other_masks(device: torch.device) -> None:
    """PyTorch's issue 190717: what its partitioner recomputes draws anew. Without gradients nothing is recomputed."""
    model, x = Squared(), torch.ones(16, 9, 11, device=device, requires_grad=True)
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        with pytest.raises(
            RuntimeError, match=r"activation_memory_budget is 0\.5: below 1 .* Set it to 1 and recompute"
        ):
            torch.compile(model, fullgraph=True)(x)
        with torch.no_grad():
            assert set(torch.compile(model, fullgraph=True)(x).unique().tolist()) == {0.0, 32.0}
        assert torch.equal(torch.compile(nn.Sequential(torchdrop.Dropout()).eval())(x), x)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [("aggressive_recomputation", True, False), ("ban_recompute_not_in_allowlist", False, True)],
)
def test_other_settings_that_recompute_masks_are_refused(name: str, value: bool, instead: bool) -> None:
    model, x = Squared(), torch.ones(16, 9, 11, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    message = rf"torch\._functorch\.config\.{name} is {value}: .* other masks .* Set it to {instead} and recompute"
    with torch._functorch.config.patch({name: value}), pytest.raises(RuntimeError, match=message):
        compiled(x)


@pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "region_activation_memory_budget"), reason="this PyTorch has no such region"
)
def test_a_region_with_a_budget_is_refused() -> None:
    model, x = Squared(), torch.ones(16, 9, 11, requires_grad=True)
    region = torch.autograd.graph.region_activation_memory_budget

    def half(x: Tensor) -> Tensor:
        with region(0.5):
            return model(x)

    def whole(x: Tensor) -> Tensor:
        with region(1.0):
            return model(x)

    with pytest.raises(RuntimeError, match=r"region_activation_memory_budget is 0\.5: below 1 .* Set it to 1 and"):
        torch.compile(half, fullgraph=True, backend="aot_eager")(x)
    y = torch.compile(whole, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * y)


@pytest.mark.skipif(not hasattr(torch.compiler, "nested_compile_region"), reason="this PyTorch has no such region")
@compilers
def test_a_region_that_is_compiled_once_draws_anew_in_each_call(compiler: str) -> None:
    layer, x = torchdrop.Dropout(0.5), torch.ones(16, 9, 11, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        h = layer(x)
        return TF.dropout(h * h)

    region = torch.compiler.nested_compile_region(model)

    def run(x: Tensor, region: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return region(x), region(x)

    torch.manual_seed(1)
    y, z = torch.compile(run, fullgraph=True, backend=compiler)(x, region)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip((y, z), run(x, model), strict=True))
    assert not torch.equal(y, z)
    assert torch.equal(torch.autograd.grad(y.sum() + z.sum(), x)[0], 2 * (y + z))


def test_captured_graphs_draw_new_masks(device: torch.device) -> None:
    """On CUDA, calls after the first ones replay a graph."""
    model, x = Squared(), torch.ones(16, 9, 11, device=device, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    found = []
    for seed in (1, 1, 1, 2, 2, 2):
        torch.compiler.cudagraph_mark_step_begin()
        torch.manual_seed(seed)
        y = compiled(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, 2 * y)
        found.append(y.detach().clone())
    assert all(torch.equal(found[i], found[i + 1]) for i in (0, 1, 3, 4))
    assert not torch.equal(found[2], found[3])


# PyTorch's issue 198333: after a materialised transposition, groups of 4 channels had one mask.

BATCH, TIME, CHANNELS = 8, 4096, 64


def check_independent(kept: Tensor) -> None:
    """Asserts that no two channels of a sample, and no neighbors in time, agree beyond chance.

    Each of the twelve checks fails a correct mask with probability FALSE_ALARM at most. Two channels that agree in 62
    of 100 places are missed with probability 1e-6 at most, equal ones never.
    """
    pairs = BATCH * CHANNELS * (CHANNELS - 1) // 2
    signs = kept.float() * 2 - 1
    products = torch.matmul(signs, signs.transpose(1, 2)).triu(1)  # agreements minus disagreements
    furthest = 2 * deviation(TIME, 0.25, FALSE_ALARM / pairs)
    assert products.abs().max().item() <= furthest, "two channels agree beyond chance"
    for lag in (1, 2, 3, 4, 8):
        for a, b in ((kept[:, lag:], kept[:, :-lag]), (kept[..., lag:], kept[..., :-lag])):
            check_rate(int((a == b).sum()), a.numel(), 0.5, 0.01)
    check_rate(int(kept.sum()), kept.numel(), 0.5, 0.01)


def test_the_check_sees_the_masks_of_the_issue() -> None:
    kept = torch.rand(BATCH, CHANNELS, TIME) < 0.5
    check_independent(kept)
    with pytest.raises(AssertionError, match="two channels agree beyond chance"):
        check_independent(kept[:, ::4].repeat_interleave(4, 1))
    twice = kept.clone()
    twice[3, 17] = twice[3, 16]
    with pytest.raises(AssertionError, match="two channels agree beyond chance"):
        check_independent(twice)
    with pytest.raises(AssertionError, match="rate"):
        check_independent(kept[..., ::2].repeat_interleave(2, 2))


TRANSPOSED: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "dropout": lambda: torchdrop.Dropout(0.5),
    "function": lambda: lambda x: TF.dropout(x, 0.5),
    "add": lambda: lambda x: TF.dropout_add(x, torch.zeros_like(x), 0.5),
    "relu": lambda: torchdrop.ReLUDropout(0.5),
}


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("how", ["none", "inside", "around", "around, reentrant"])
def test_channels_of_a_transposed_tensor_have_masks_of_their_own(device: torch.device, name: str, how: str) -> None:
    layer = TRANSPOSED[name]()

    def model(x: Tensor) -> Tensor:
        return layer(x.transpose(1, 2).contiguous())

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    x = torch.ones(BATCH, TIME, CHANNELS, device=device, requires_grad=True)
    compiled = torch.compile(recomputed if how == "inside" else model, fullgraph=True)
    torch.manual_seed(5)
    y = checkpoint(compiled, x, use_reentrant="reentrant" in how) if "around" in how else compiled(x)
    y.backward(torch.ones_like(y))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert x.grad is not None
    assert torch.equal(x.grad.transpose(1, 2), y)
    check_independent(y != 0)
    torch.manual_seed(5)
    assert torch.equal(model(x), y)


def test_more_kinds_of_layers_than_dynamo_compiles_of_one_function_are_each_compiled_alone() -> None:
    """Their wrappers for torch.fx are one piece of source, of which each layer needs a code object of its own."""
    kinds = (
        torchdrop.Dropout2d, torchdrop.DropPath, torchdrop.GaussianDropout, torchdrop.ReLUDropout,
        torchdrop.GELUDropout, torchdrop.AlphaDropout, torchdrop.FeatureAlphaDropout, torchdrop.DropHead,
        torchdrop.DropBlock2d, torchdrop.StochasticDepth, torchdrop.DropMessage,
    )  # fmt: skip
    config = torch._dynamo.config
    assert len(kinds) > (config.recompile_limit if TORCH >= (2, 7) else config.cache_size_limit)
    for kind in kinds:
        layer, x = kind(0.3), torch.randn(4, 6, 8, 8)
        x = x[0, 0] if kind is torchdrop.DropMessage else x
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(seeded(3, compiled, x), seeded(3, layer, x))

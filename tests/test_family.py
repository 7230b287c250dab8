"""What holds for every variant: seeds, eval mode, rates by name, frozen masks, Monte Carlo, half types, compilation."""

from __future__ import annotations

import ast
import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.family import VARIANTS, built, gradients, inputs
from tests.seeding import seeded
from torchdrop import KeepProbScheduler, schedules

LAYERS = Path(torchdrop.__file__).parent / "layers"

every = pytest.mark.parametrize("name", VARIANTS)
rated = pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.names])


def same(left: Any, right: Any) -> bool:
    return all(
        a is b is None or torch.allclose(a, b, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]
        for a, b in zip(left, right, strict=True)
    )


@every
def test_a_seed_replays_forward_and_backward(name: str, device: torch.device) -> None:
    model, x = built(name, device), inputs(VARIANTS[name], device)
    first, again = seeded(3, model, x), seeded(3, model, x)
    assert torch.equal(first, again)
    assert same(gradients(model, first), gradients(model, again))
    others = [seeded(seed, model, x) for seed in range(4, 12)]
    assert not VARIANTS[name].draws or any(o.shape != first.shape or not torch.equal(o, first) for o in others)


class Draws(TorchDispatchMode):
    """The random operators that run, without those that could have dropout of their own and are not asked to."""

    others = ("scaled_dot_product", "_cudnn_rnn")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not any(name in func.__name__ for name in self.others):
            self.seen.append((func.__name__, tuple(args[0].shape) if args and isinstance(args[0], Tensor) else None))
        return func(*args, **(kwargs or {}))


@every
def test_all_randomness_is_a_key_of_two_words(name: str, device: torch.device) -> None:
    model, x = built(name, device), inputs(VARIANTS[name], device)
    with Draws() as draws:
        model(x)
    assert {shape for _, shape in draws.seen} <= {(2,)}
    assert bool(draws.seen) == VARIANTS[name].draws
    model.eval()
    with Draws() as draws:
        assert torch.equal(model(x), model(x))
    assert not draws.seen


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.reads])
def test_no_device_is_waited_for_and_none_meets_another(name: str) -> None:
    """On a device whose numbers cannot be read, and which takes no other's tensors. Two read theirs: LayerDrop that
    skips layers, to know which, and DropEdge, to know how many edges are left."""
    model, x = built(name, torch.device("meta")), inputs(VARIANTS[name], torch.device("meta"))
    y = model(x)
    assert y.is_meta
    assert all(g is None or g.is_meta for g in gradients(model, y))
    assert model.eval()(x).is_meta
    if not list(model.buffers()):  # which are compared, so that a survey leaves them as they were
        with torchdrop.mc_dropout(model, seed=1):
            assert model(x).is_meta


def test_no_layer_calls_torchs_random_functions() -> None:
    wrong = {"rand", "randn", "rand_like", "randn_like", "bernoulli", "bernoulli_", "uniform_", "normal_", "normal"}
    wrong |= {"randperm", "randint", "multinomial", "exponential_", "Generator", "manual_seed"}
    found = [
        f"{path.name}:{node.lineno} {node.func.attr}"
        for path in [*LAYERS.rglob("*.py"), *LAYERS.with_name("core").glob("*.py")]
        if path.name != "portable.py"  # which draws for graphs that know no operators of ours
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in wrong
    ]
    assert found == []


@rated
def test_rates_go_by_name(name: str, device: torch.device) -> None:
    model, x = built(name, device), inputs(VARIANTS[name], device)
    assert set(VARIANTS[name].names) <= set(torchdrop.keep_probs(model))
    scheduler = KeepProbScheduler(model, {"*": schedules.linear(0.9, 0.5, 4)})
    for step in range(1, 5):
        scheduler.step()
        assert all(rate == pytest.approx(0.9 - 0.1 * step) for rate in torchdrop.keep_probs(model).values())
        model(x)


@rated
def test_keep_prob_1_and_disabled_are_the_model_without_dropout(name: str, device: torch.device) -> None:
    if not VARIANTS[name].whole:
        pytest.skip("eval mode is another function")
    model, x = built(name, device), inputs(VARIANTS[name], device)
    whole = copy.deepcopy(model).eval()
    torchdrop.set_keep_prob(whole, {"*": 1.0})
    plain = whole(x)
    with torchdrop.disabled(model):
        assert torch.allclose(model(x), plain, atol=1e-6)
    torchdrop.set_keep_prob(model, {"*": 1.0})
    assert torch.allclose(model(x), plain, atol=1e-6)


@rated
def test_what_is_drawn_after_a_layer_does_not_depend_on_its_rate(name: str, device: torch.device) -> None:
    if VARIANTS[name].reads:
        pytest.skip("layers that are skipped and edges that are gone draw nothing")
    model, x, after = built(name, device), inputs(VARIANTS[name], device), []
    for rate in (1.0, 0.6):
        torchdrop.set_keep_prob(model, {"*": rate})
        seeded(0, model, x)
        after.append(torch.rand(3, device=device))
    assert torch.equal(*after)


@every
def test_frozen_masks_are_frozen(name: str, device: torch.device) -> None:
    model, x = built(name, device), inputs(VARIANTS[name], device)
    with torchdrop.frozen_masks(model, seed=2) if VARIANTS[name].draws else torch.no_grad():
        assert torch.equal(model(x), model(x))


@every
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_has_the_masks_of_forward(name: str, device: torch.device, use_reentrant: bool) -> None:
    model, x = built(name, device), inputs(VARIANTS[name], device)
    direct = gradients(model, seeded(0, model, x))
    if use_reentrant and not x.is_floating_point():
        pytest.skip("reentrant checkpoints need an input with a gradient")
    x = x.requires_grad_() if x.is_floating_point() else x
    torch.manual_seed(0)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert same(direct, [p.grad for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.draws])
def test_monte_carlo_fires_and_replays(name: str, device: torch.device) -> None:
    model, x = built(name, device).eval(), inputs(VARIANTS[name], device)
    plain = model(x)
    with torchdrop.mc_dropout(model, seed=1, batch_dim=VARIANTS[name].batch_dim) as report:
        outputs = [model(x) for _ in range(5)]
    assert report.draws > 0
    assert any(y.shape != plain.shape or not torch.equal(y, plain) for y in outputs)
    with torchdrop.mc_dropout(model, seed=1, batch_dim=VARIANTS[name].batch_dim):
        again = [model(x) for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.draws])
def test_monte_carlo_masks_depend_on_neither_device_nor_backend(name: str, device: torch.device) -> None:
    def output(where: torch.device) -> Tensor:
        model = built(name, where).eval()
        with torchdrop.mc_dropout(model, seed=1, batch_dim=VARIANTS[name].batch_dim):
            return model(inputs(VARIANTS[name], where)).cpu()

    with torchdrop.use_backend("reference"):
        expected = output(torch.device("cpu"))
    assert torch.allclose(output(device), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.own_rows])
def test_monte_carlo_masks_follow_the_row_and_not_the_batch(name: str, device: torch.device) -> None:
    model, x = built(name, device).eval(), inputs(VARIANTS[name], device)
    with torchdrop.mc_dropout(model, seed=1) as report:
        outputs = [model(x) for _ in range(3)]
    assert report.replayable, report
    with torchdrop.mc_dropout(model, seed=1):
        fewer = [model(x[:4]) for _ in range(3)]
    assert all(torch.allclose(a[:4], b, atol=1e-6) for a, b in zip(outputs, fewer, strict=True))


@every
def test_predictions_do_not_depend_on_the_strategy(name: str, device: torch.device) -> None:
    variant = VARIANTS[name]
    if not (variant.draws and variant.independent) or variant.subset:
        pytest.skip("rows that are one whole, no draws, or outputs without a fixed meaning")
    model, x = built(name, device).eval(), inputs(VARIANTS[name], device)
    means = [
        torchdrop.mc_predict(model, x, samples=6, seed=1, task="regression", strategy=strategy).mean
        for strategy in ("loop", "auto")
    ]
    assert torch.allclose(*means, atol=1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_stay_finite_and_alive(name: str, device: torch.device, dtype: torch.dtype) -> None:
    model, x = built(name, device).to(dtype), inputs(VARIANTS[name], device)
    x = x.to(dtype) if x.is_floating_point() else x
    y = model(x)
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert (y != 0).any()
    assert all(g is None or g.isfinite().all() for g in gradients(model, y))


@every
def test_copies_and_states(name: str, device: torch.device) -> None:
    model, x = built(name, device), inputs(VARIANTS[name], device)
    twin = copy.deepcopy(model)
    assert torch.equal(seeded(0, model, x), seeded(0, twin, x))
    other = VARIANTS[name].make().to(device)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))


@every
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmaps_randomness_modes(name: str, device: torch.device, randomness: str) -> None:
    if not VARIANTS[name].vmap:
        pytest.skip("its shapes or its control flow follow from what is drawn")
    model, x = built(name, device), inputs(VARIANTS[name], device)
    out = vmap(lambda _: model(x), randomness=randomness)(torch.zeros(6))
    assert out.shape[0] == 6
    if VARIANTS[name].draws:
        assert all(torch.equal(y, out[0]) for y in out[1:]) == (randomness == "same")


@every
def test_an_empty_batch(name: str, device: torch.device) -> None:
    if not VARIANTS[name].empty:
        pytest.skip("its edges name nodes, or it is nn.LSTM, which refuses it")
    model, x = built(name, device), inputs(VARIANTS[name], device)
    assert model(x[:0]).shape[0] == 0


@every
def test_audit_is_quiet(name: str, device: torch.device) -> None:
    if not VARIANTS[name].independent:
        pytest.skip("it is for models of rows")
    model = nn.Sequential(*built(name, device), nn.Tanh())
    found = torchdrop.audit(model, inputs(VARIANTS[name], device))
    noise = {"realized rate", "active in eval mode", "ignores training", "never called", "rate captured elsewhere"}
    assert [finding for finding in found.findings if finding.code in noise] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.compiles])
def test_compiled_in_one_piece_with_the_masks_of_eager_and_once_for_all_rates(name: str, device: torch.device) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, x = built(name, device), inputs(VARIANTS[name], device)
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    counted = not VARIANTS[name].sized_by_rate
    for rate in (0.8, 0.6, 0.7) if counted else (0.6,):
        if VARIANTS[name].names:
            torchdrop.set_keep_prob(model, {"*": rate})
        eager, ours = seeded(0, model, x), seeded(0, compiled, x)
        assert torch.allclose(eager, ours, atol=1e-5)
        assert same(gradients(model, eager), gradients(model, ours))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
@pytest.mark.parametrize(
    "name", [name for name, variant in VARIANTS.items() if not variant.skips]
)  # whose choice is data
def test_functionalized_with_the_same_masks(name: str, device: torch.device) -> None:
    model, x = built(name, device), inputs(VARIANTS[name], device)
    assert torch.allclose(seeded(0, torch.func.functionalize(model), x), seeded(0, model, x), atol=1e-5)
    if not VARIANTS[name].ids:
        importlib.import_module("torch._dynamo")  # PyTorch 2.8 needs it under functionalize, and cannot import it there
        slope = torch.func.grad(lambda x: model(x).square().sum())
        functional = torch.func.functionalize(slope)
        assert torch.allclose(seeded(0, functional, x), seeded(0, slope, x), atol=1e-5)

"""torch.export: programs that draw eager's masks, and a mask for each call, whatever compiles them again."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests import ROOT, TORCH, made_once
from tests.statistical import check_rate, draws_for
from torchdrop import functional as TF

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")]

ERROR = 0.09
"""By which masks under one key agree more often than independent ones do, for all pairs of the rates below."""

RATES = (0.5, 0.25, 0.65)
SIZE = max(draws_for(a * b + (1 - a) * (1 - b), ERROR) for a, b in itertools.combinations_with_replacement(RATES, 2))
TAKES_MORE = ("aot_eager", "fallback_random")
"""Where dropout with p = 1, by which an exported program knows its mode, takes a number from the generator."""

compilers = pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
compiles_programs = pytest.mark.skipif(TORCH < (2, 9), reason="PyTorch 2.8 does not compile exported modules whole")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


def exported(model: nn.Module, *inputs: Tensor, **options: Any) -> nn.Module:
    return torch.export.export(model, inputs, **options).module()


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return TF.dropout(x, 0.5), TF.dropout(x, 0.75)


def programs() -> list[tuple[nn.Module, tuple[int, ...], tuple[float, ...]]]:
    """Models, the shape of an input whose first `SIZE` draws are of one mask, and the masks' keep probabilities."""
    row, rows = (SIZE,), (2, SIZE)
    return [
        (torchdrop.Dropout(0.5), row, (0.5,)),
        (torchdrop.Dropout(0.5), rows, (0.5,)),
        (torchdrop.Dropout(0.75), row, (0.25,)),
        (torchdrop.Dropout(0.5, shared_axes=0), rows, (0.5,)),
        (torchdrop.AlphaDropout(0.35), row, (0.65,)),
        (torchdrop.ReLUDropout(0.5), rows, (0.5,)),
        (torchdrop.Dropout1d(keep_prob=0.65), (1, SIZE, 3), (0.65,)),
        (Twice(), row, (0.5, 0.25)),
    ]


def save_programs(folder: str, name: str) -> None:
    """In a process of its own."""
    for number, (model, shape, _) in enumerate(programs()):
        program = torch.export.export(model, (torch.ones(shape),), strict=bool(number % 2))
        torch.export.save(program, Path(folder) / f"{name}{number}.pt2")


@pytest.fixture(scope="module")
def saved(shared_folder: Path) -> Path:
    """A folder with the programs of two processes."""

    def make(folder: Path) -> None:
        started = []
        for name in "ab":
            code = f"from tests.core.test_exported import save_programs as s; s({str(folder)!r}, {name!r})"
            started.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT))
        assert [process.wait(240) for process in started] == [0, 0]

    return made_once(shared_folder / "programs", make)


def kept(y: Tensor) -> Tensor:
    """The first draws of a mask that was applied to ones."""
    first = y.detach().select(-1, 0).flatten() if y.dim() == 3 else y.detach().flatten()
    return first[:SIZE] > (y.max() + y.min()) / 2


def check_masks_of_their_own(masks: list[Tensor], rates: list[float]) -> int:
    """Returns the number of pairs."""
    pairs = list(itertools.combinations(zip(masks, rates, strict=True), 2))
    for (a, p), (b, q) in pairs:
        check_rate(int((a == b).sum()), SIZE, p * q + (1 - p) * (1 - q), ERROR)
    return len(pairs)


def test_the_check_sees_masks_under_one_key() -> None:
    draws = torch.rand(SIZE)
    for p, q in itertools.combinations_with_replacement(RATES, 2):
        check_masks_of_their_own([draws < p, torch.rand(SIZE) < q], [p, q])
        with pytest.raises(AssertionError, match="rate"):
            check_masks_of_their_own([draws < p, draws < q], [p, q])


@compiles_programs
@pytest.mark.parametrize(("compiler", "gradients"), [("inductor", True), ("inductor", False), ("aot_eager", False)])
def test_programs_of_two_processes_have_masks_of_their_own(saved: Path, compiler: str, gradients: bool) -> None:
    """All pairs of 16 programs in one compiled function: 120 pairs of programs, each with all its draws."""
    calls: list[Callable[[Tensor], Any]] = []
    inputs, rates = [], []
    for name, (number, (_, shape, keep_probs)) in itertools.product("ab", enumerate(programs())):
        calls.append(torch.export.load(saved / f"{name}{number}.pt2").module())
        inputs.append(torch.ones(shape, requires_grad=gradients))
        rates += keep_probs

    def model(inputs: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for call, x in zip(calls, inputs, strict=True):
            y = call(x * 1.0)
            found += y if isinstance(y, tuple) else [y]
        return found

    assert len(calls) == 16
    for seed in (1, 2):
        torch.manual_seed(seed)
        ys = torch.compile(model, fullgraph=True, backend=compiler)(inputs)
        assert check_masks_of_their_own([kept(y) for y in ys], rates) == 18 * 17 // 2
        torch.manual_seed(seed)
        assert compiler in TAKES_MORE or all(torch.equal(y, z) for y, z in zip(ys, model(inputs), strict=True))


@compiles_programs
@compilers
@pytest.mark.parametrize("strict", [True, False])
def test_calls_of_one_program_have_masks_of_their_own(device: torch.device, compiler: str, strict: bool) -> None:
    g = exported(torchdrop.Dropout(0.5), torch.ones(SIZE, device=device), strict=strict)
    x = torch.ones(SIZE, device=device, requires_grad=True)
    ys = torch.compile(lambda x: (g(x), g(x * 1.0), g(x)), fullgraph=True, backend=compiler)(x)
    check_masks_of_their_own([kept(y) for y in ys], [0.5] * 3)
    (gradient,) = torch.autograd.grad(sum(y.sum() for y in ys), x)
    assert torch.equal(gradient, sum(ys))


def test_no_pass_takes_two_draws_for_one() -> None:
    """Those that exported programs meet in other hands: decompositions, a second export, merging of equal nodes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = exported(torchdrop.Dropout(0.5), torch.ones(SIZE))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.first(x), self.first(x), TF.dropout(x), TF.dropout(x)

    x = torch.ones(SIZE)
    program = torch.export.export(Model(), (x,))
    again = program.run_decompositions()
    merged = CSEPass(get_CSE_banned_ops())(again.graph_module).graph_module
    for graph in (program.graph, again.graph, merged.graph):
        assert sum("draw_key" in str(node.target) for node in graph.nodes) == 4
    torch.manual_seed(1)
    expected = Model()(x)
    torch.manual_seed(1)
    assert all(torch.equal(y, z) for y, z in zip(program.module()(x), expected, strict=True))
    for ys in (expected, again.module()(x)):
        check_masks_of_their_own([kept(y) for y in ys], [0.5] * 4)


@compiles_programs
@pytest.mark.parametrize("setting", ["freezing", "fallback_random", "deterministic"])
def test_settings_of_inductor_leave_every_draw(setting: str) -> None:
    g, x = exported(torchdrop.Dropout(0.5), torch.ones(SIZE)), torch.ones(SIZE)

    def model(x: Tensor) -> tuple[Tensor, ...]:
        return g(x), g(x), TF.dropout(x), TF.dropout(x)

    changes = {} if setting == "deterministic" else {setting: True}
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(setting == "deterministic")
    try:
        with torch._inductor.config.patch(changes), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what freezing does not take
            torch.manual_seed(1)
            ys = torch.compile(model, fullgraph=True)(x)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    check_masks_of_their_own([kept(y) for y in ys], [0.5] * 4)
    torch.manual_seed(1)
    assert setting in TAKES_MORE or all(torch.equal(y, z) for y, z in zip(ys, model(x), strict=True))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("where", ["inside", "around"])
def test_checkpoints_repeat_the_masks_of_a_program(device: torch.device, compiler: str, where: str) -> None:
    x = torch.ones(SIZE, device=device, requires_grad=True)
    g = exported(torchdrop.Dropout(0.5), torch.ones(SIZE, device=device))

    def model(x: Tensor) -> Tensor:
        h = g(x)
        return g(h * h)

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    if TORCH < (2, 9) and compiler != "eager":
        pytest.skip(compiles_programs.kwargs["reason"])
    inner = recomputed if where == "inside" else model
    call = inner if compiler == "eager" else torch.compile(inner, fullgraph=True, backend=compiler)
    torch.manual_seed(1)
    y = checkpoint(call, x, use_reentrant=False) if where == "around" else call(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.manual_seed(1)
    assert compiler in TAKES_MORE or torch.equal(y, model(x))
    assert torch.equal(gradient, 2 * y)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize(("randomness", "different"), [("different", 6), ("same", 1)])
def test_vmap_over_a_program_obeys_its_randomness(compiler: str, randomness: str, different: int) -> None:
    if TORCH < (2, 9) and compiler != "eager" and randomness == "same":
        pytest.skip("Dynamo of PyTorch 2.8 enters the kernel beyond the program, and fails there")
    g = exported(torchdrop.Dropout(0.5), torch.ones(SIZE))
    batched = torch.func.vmap(g, randomness=randomness)
    rows = (batched if compiler == "eager" else torch.compile(batched, backend=compiler))(torch.ones(6, SIZE))
    assert len({tuple(row.tolist()) for row in rows}) == different
    assert set(rows.unique().tolist()) == {0.0, 2.0}
    with pytest.raises(RuntimeError, match="random operation while in randomness error mode"):
        torch.func.vmap(g)(torch.ones(6, SIZE))


def test_frozen_masks_serve_a_program() -> None:
    layer, x = torchdrop.Dropout(0.5), torch.ones(SIZE)
    model = nn.Sequential(exported(layer, x))
    with torchdrop.frozen_masks(model, seed=1):
        rows = torch.func.vmap(model, randomness="different")(x.expand(6, SIZE))
        assert all(torch.equal(row, model(x)) for row in rows)


def test_a_budget_of_memory_is_refused_to_a_program_too() -> None:
    g, x = exported(torchdrop.Dropout(0.5), torch.ones(SIZE)), torch.ones(SIZE, requires_grad=True)
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        with pytest.raises(RuntimeError, match=r"activation_memory_budget is 0\.5: below 1 .* Set it to 1 and"):
            torch.compile(g, fullgraph=True, backend="aot_eager")(x)
        with torch.no_grad():
            assert set(torch.compile(g, fullgraph=True, backend="aot_eager")(x).unique().tolist()) == {0.0, 2.0}

"""LayerDrop: a ModuleList whose iteration skips layers, the mode that keeps the graph, pruning."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchdrop
from tests.seeding import seeded
from tests.statistical import check_rate, draws_for
from torchdrop.core import sites
from torchdrop.layers.layer_drop import LayerDrop


def linears(count: int, size: int = 3) -> list[nn.Module]:
    return [nn.Linear(size, size) for _ in range(count)]


class Stack(nn.Module):
    """Layers in a row, behind something that drops nothing."""

    def __init__(self, count: int = 6, p: float = 0.5, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.layers = LayerDrop(linears(count), p, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) if not self.layers.keep_graph else layer(x)
        return x


def skipped(stack: LayerDrop) -> tuple[bool, ...]:
    kept = {id(layer) for layer in list(stack)}
    return tuple(id(stack[i]) not in kept for i in range(len(stack)))


def test_iteration_skips_in_training_and_nothing_else_does() -> None:
    layers = linears(20)
    stack = LayerDrop(layers, 0.5)
    kept = list(stack)
    assert 0 < len(kept) < 20
    assert [layers.index(layer) for layer in kept] == sorted(layers.index(layer) for layer in kept)
    assert len({skipped(stack) for _ in range(20)}) == 20
    assert len(stack) == 20
    assert all(stack[i] is layers[i] and stack[i - 20] is layers[i] for i in range(20))
    assert all(layer in stack for layer in layers)
    assert nn.Linear(1, 1) not in stack
    assert list(reversed(stack)) == layers[::-1]
    assert list(stack.children()) == layers
    assert repr(stack).count("Linear(") == 20
    assert repr(LayerDrop(linears(1), 0.2, keep_graph=True)).startswith("LayerDrop(\n  p=0.2, keep_graph=True\n")
    assert list(stack.eval()) == layers


def test_number_of_skipped_layers_is_binomial_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination of skipped layers is as probable as independent layers have it."""
    stack, k = LayerDrop(linears(3), keep_prob=0.75), 0.75
    outcomes = list(itertools.product((True, False), repeat=3))
    seen: Counter[int] = Counter()
    for outcome in outcomes:
        monkeypatch.setattr(
            sites, "keep_mask", lambda like, params, shape, generator, outcome=outcome: torch.tensor(outcome)
        )
        assert skipped(stack) == tuple(not kept for kept in outcome)
        seen[sum(skipped(stack))] += 1
    assert [seen[n] * k ** (3 - n) * (1 - k) ** n for n in range(4)] == [27 / 64, 27 / 64, 9 / 64, 1 / 64]


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_count_is_binomial(p: float) -> None:
    count, error = 4, 0.05
    stack = LayerDrop(linears(count), p)
    n = draws_for(0.4, error)
    counts = Counter(len(list(stack)) for _ in range(n))
    for kept in range(count + 1):
        rate = [1, 4, 6, 4, 1][kept] * (1 - p) ** kept * p ** (count - kept)
        check_rate(counts[kept], n, rate, error)


def test_all_or_no_layers() -> None:
    layers = linears(5)
    assert list(LayerDrop(layers, 0.0)) == layers
    assert list(LayerDrop(layers, 1.0)) == []
    assert list(LayerDrop([], 0.5)) == []
    assert len(LayerDrop(p=0.5)) == 0
    stack = Stack(p=1.0)
    x = torch.ones(2, 3)
    assert torch.equal(stack(x), stack.first(x))
    after = [seeded(1, lambda p: (list(LayerDrop(layers, p)), torch.rand(2))[1], p) for p in (0.0, 0.5)]
    assert torch.equal(*after)


def test_checkpoints_load_in_both_directions() -> None:
    plain, stack = nn.ModuleList(linears(4)), LayerDrop(linears(4), 0.5)
    assert list(stack.state_dict()) == list(plain.state_dict())
    stack.load_state_dict(plain.state_dict())
    assert all(torch.equal(stack[i].weight, plain[i].weight) for i in range(4))
    plain.load_state_dict(LayerDrop(linears(4), 0.5).state_dict())
    assert dict(stack.named_parameters()).keys() == dict(plain.named_parameters()).keys()


def test_it_changes_as_a_module_list_does() -> None:
    layers = linears(6)
    stack = LayerDrop(layers[:2], 0.5)
    stack.append(layers[2])
    stack += layers[3:5]
    stack.insert(0, layers[5])
    assert list(stack.children()) == [layers[5], *layers[:5]]
    assert stack.pop(0) is layers[5]
    del stack[1]
    stack[0] = layers[5]
    assert list(stack.children()) == [layers[5], *layers[2:5]]
    for longer in (stack + [layers[0]], stack + LayerDrop([layers[0]], 1.0), LayerDrop(stack, 0.5).extend([layers[0]])):
        assert isinstance(longer, LayerDrop)
        assert list(longer.children()) == [layers[5], *layers[2:5], layers[0]]
    assert list(LayerDrop(stack, 0.5).children()) == list(stack.children())


def test_all_layers_are_added_to_a_module_list() -> None:
    stack, others = LayerDrop(linears(4), 1.0), nn.ModuleList(linears(2))
    both = others + stack
    assert type(both) is nn.ModuleList
    assert list(both) == [*others, *stack.children()]
    with pytest.raises(TypeError):
        linears(2) + stack


def test_slices_have_the_rate_and_the_mode() -> None:
    stack = LayerDrop(linears(8), 0.25, generator=torch.Generator(), keep_graph=True)
    stack[3].eval()
    part = stack[2:6]
    assert isinstance(part, LayerDrop)
    assert (part.p, part.keep_graph, part.generator) == (0.25, True, stack.generator)
    assert list(part.children()) == [stack[i] for i in range(2, 6)]
    assert (part.training, part[1].training, part[0].training) == (True, False, True)
    assert list(stack.eval()[2:6]) == [stack[i] for i in range(2, 6)]
    each = LayerDrop(linears(4), keep_prob=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    backwards = each[::-1]
    assert backwards[0] is each[3]
    assert list(backwards) == [each[2], each[0]]
    assert list(each) == [each[0], each[2]]
    assert list(each[1:3]) == [each[2]]
    with pytest.raises(ValueError, match="does not broadcast"):
        list(each.append(nn.Identity()))


def test_pruning_leaves_out_every_nth_layer() -> None:
    layers = linears(12)
    stack = LayerDrop(layers, 0.5)
    for n in range(2, 13):
        pruned = stack.pruned(n)
        assert type(pruned) is nn.ModuleList
        assert list(pruned) == [layers[d - 1] for d in range(1, 13) if d % n]
    for n in (1, 0, -2, 13):
        with pytest.raises(ValueError, match=rf"^n must be between 2 and the number of layers, 12, got {n}$"):
            stack.pruned(n)
    with pytest.raises(TypeError, match=r"^n must be an integer, got float$"):
        stack.pruned(2.0)  # type: ignore[arg-type]


def test_skipped_layers_get_no_gradient_and_selected_ones_zeros() -> None:
    for keep_graph in (False, True):
        stack = Stack(8, keep_graph=keep_graph)
        generator = torch.Generator().manual_seed(3)
        stack.layers.generator = generator
        dropped = skipped(LayerDrop(stack.layers, 0.5, generator=torch.Generator().manual_seed(3)))
        assert 0 < sum(dropped) < 8
        stack(torch.randn(2, 3)).square().sum().backward()
        for i, drop in enumerate(dropped):
            grad = stack.layers[i].weight.grad
            if not drop:
                assert grad.abs().sum() > 0
            elif keep_graph:
                assert torch.equal(grad, torch.zeros(3, 3))
            else:
                assert grad is None


def test_both_modes_compute_the_same() -> None:
    layers, x = [nn.Sequential(layer, nn.Tanh()) for layer in linears(9)], torch.randn(4, 3)

    def run(keep_graph: bool) -> tuple[Tensor, Tensor]:
        y = x.clone().requires_grad_()
        z = y
        for layer in LayerDrop(layers, 0.5, keep_graph=keep_graph):
            z = layer(z)
        return z, torch.autograd.grad(z.sum(), y)[0]

    for a, b in zip(seeded(4, run, False), seeded(4, run, True), strict=True):
        assert torch.equal(a, b)


def test_dropped_infinities_are_not_seen() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0

    x = torch.ones(3)
    for layer in LayerDrop([Broken()], 1.0, keep_graph=True):
        assert torch.equal(layer(x), x)


def test_layers_of_any_kind_where_they_are_skipped_and_clear_errors_where_selected() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, scale: float, *, mask: Tensor) -> tuple[Tensor, Tensor]:
            return x * scale, mask

    x = torch.ones(3)
    for layer in LayerDrop([Pair() for _ in range(9)], 0.5):
        x, _ = layer(x, 2.0, mask=x)
    assert x[0] in [2.0**n for n in range(10)]
    for layer in LayerDrop([Pair()], 0.0, keep_graph=True):
        message = (
            r"^LayerDrop with keep_graph=True gives .* tensors, got Tensor and tuple from Pair: use keep_graph=False"
        )
        with pytest.raises(TypeError, match=message):
            layer(x, 2.0, mask=x)
    for layer in LayerDrop([nn.Linear(3, 2)], 0.0, keep_graph=True):
        with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(2,\) from Linear$"):
            layer(x)
        with pytest.raises(TypeError, match=r"first argument .*: give it by position, got input for Linear$"):
            layer(input=x)
        assert layer.weight is layer.layer.weight
        assert layer.in_features == 3
    drop = LayerDrop([nn.Bilinear(3, 3, 3)], 0.0, keep_graph=True)
    for layer in drop:
        torch.testing.assert_close(layer(x, input2=x), drop[0](x, x))


@pytest.mark.parametrize("keep_graph", [False, True])
def test_it_stands_in_a_transformer_encoder(keep_graph: bool) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 6)
    plain = copy.deepcopy(encoder)
    encoder.layers = LayerDrop(encoder.layers, 0.5, keep_graph=keep_graph)
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    y = seeded(1, encoder, x, src_key_padding_mask=padding)
    dropped = seeded(1, skipped, LayerDrop(plain.layers, 0.5))
    assert 0 < sum(dropped) < 6
    plain.layers = nn.ModuleList(layer for layer, drop in zip(plain.layers, dropped, strict=True) if not drop)
    torch.testing.assert_close(y, plain(x, src_key_padding_mask=padding))
    plain.layers = nn.ModuleList(encoder.layers.children())
    torch.testing.assert_close(encoder.eval()(x), plain.eval()(x))
    assert list(encoder.state_dict()) == list(plain.state_dict())
    encoder.layers = encoder.layers.pruned(2)
    assert encoder(x).shape == x.shape


def test_ranks_agree_under_a_shared_seed() -> None:
    first, second = (LayerDrop(linears(12), 0.5, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    for step in range(30):
        torch.manual_seed(step)
        outcome = skipped(first)
        torch.manual_seed(100 + step)
        assert skipped(second) == outcome
    stack = LayerDrop(linears(12), 0.5)
    assert seeded(3, skipped, stack) == seeded(3, skipped, LayerDrop(linears(12), 0.5))


def _train(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    torch.manual_seed(0)
    model = Stack(4, keep_graph=True, generator=torch.Generator().manual_seed(5))
    parallel = DistributedDataParallel(model)
    torch.manual_seed(rank + 1)
    outcomes = []
    for _ in range(6):
        parallel(torch.randn(2, 3)).square().sum().backward()
        outcomes.append([bool((layer.weight.grad == 0).all()) for layer in model.layers.children()])
        parallel.zero_grad()
    torch.save(outcomes, Path(folder) / f"{rank}.pt")
    del parallel  # its end, if it comes last, holds the interpreter and waits for a thread of the group that wants it
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_with_all_parameters_in_the_graph(tmp_path: Path) -> None:
    mp.spawn(_train, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert 0 < sum(map(sum, first)) < 24


def test_rates_by_name_and_what_looks_for_dropout_layers() -> None:
    model = Stack(p=0.2)
    assert torchdrop.keep_probs(model) == {"layers": 0.8}
    torchdrop.set_keep_prob(model, {"layers": 0.9})
    assert model.layers.p == 0.1
    scheduler = torchdrop.KeepProbScheduler(model, {"layers": torchdrop.schedules.linear(1.0, 0.5, 2)})
    scheduler.step()
    assert model.layers.keep_prob == 0.75
    with torchdrop.disabled(model):
        assert all(torch.equal(*(model(torch.ones(2, 3)) for _ in range(2))) for _ in range(5))
    model.append = nn.Dropout(0.5)
    swap = torchdrop.replace(model)
    assert swap.done == ["append"]
    swap.undo()
    found = torchdrop.audit(Stack(p=0.2), torch.randn(5, 3))
    assert found.findings == []
    with pytest.raises(ValueError, match=r"'layers' is a torchdrop's LayerDrop, for which torch.nn has no layer"):
        torchdrop.replace(model, to="torch")
    assert isinstance(model.layers, nn.modules.dropout._DropoutNd)
    assert isinstance(model.layers, nn.ModuleList)


def test_copies_and_frozen_masks() -> None:
    model, x = Stack(12), torch.randn(4, 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(seeded(1, twin, x), seeded(1, model, x))
    assert len({model(x).sum().item() for _ in range(5)}) == 5
    with torchdrop.frozen_masks(model, seed=1):
        assert len({model(x).sum().item() for _ in range(5)}) == 1


@pytest.mark.parametrize("keep_graph", [False, True])
def test_monte_carlo_makes_it_fire(keep_graph: bool) -> None:
    model, x = Stack(8, keep_graph=keep_graph).eval(), torch.randn(5, 3)
    with torchdrop.mc_dropout(model, seed=1) as report:
        first = model(x)
        assert [source.module for source in report.sources if source.active] == [""]
        assert report.replayable
        assert not torch.equal(model(x), first)
    with torchdrop.mc_dropout(model, seed=1):
        torch.testing.assert_close(model(x[:2]), first[:2])
    loop = torchdrop.mc_predict(model, x, samples=12, seed=3, strategy="loop", task="regression").mean
    auto = torchdrop.mc_predict(model, x, samples=12, seed=3, task="regression").mean
    torch.testing.assert_close(auto, loop)
    if keep_graph:
        strategy: Any = "vectorized"
        fast = torchdrop.mc_predict(model, x, samples=12, seed=3, strategy=strategy, task="regression").mean
        torch.testing.assert_close(fast, loop)
    assert not torch.allclose(loop, model(x))


def test_vmap() -> None:
    x = torch.randn(1, 3).expand(6, 3)
    select, skip = Stack(8, keep_graph=True), Stack(8)
    assert len(torch.func.vmap(select, randomness="different")(x)[:, 0].unique()) > 2
    for model in (select, skip):
        y = torch.func.vmap(model, randomness="same")(x)
        assert torch.equal(y, y[:1].expand_as(y))
    with pytest.raises(RuntimeError, match=r"^LayerDrop cannot skip layers under vmap.*use keep_graph=True"):
        torch.func.vmap(skip, randomness="different")(x)
    for model in (select, skip):
        torchdrop.set_keep_prob(model, {"*": 1.0})
        torch.testing.assert_close(torch.func.vmap(model)(x), model(x))


def test_wrong_arguments() -> None:
    message = r"^layers must be an iterable of modules, got float: the order is LayerDrop\(layers, p\)$"
    with pytest.raises(TypeError, match=message):
        LayerDrop(0.2, linears(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dropout probability has to be between 0 and 1, but got 1.5"):
        LayerDrop(linears(2), 1.5)
    with pytest.raises(TypeError, match="give the rate as p or as keep_prob"):
        LayerDrop(linears(2), 0.5, keep_prob=0.5)
    with pytest.raises(TypeError, match=r"^keep_graph must be True or False, got 'no'$"):
        LayerDrop(linears(2), 0.5, keep_graph="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is not a Module subclass"):
        LayerDrop([1, 2], 0.5)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None"):
        LayerDrop(linears(2), 0.5, generator=1)  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled_without_breaks_and_rates_without_recompilation() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, x = Stack(5, keep_graph=True), torch.randn(6, 3, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    outputs = set()
    for step, p in enumerate((0.5, 0.2, 0.9, 0.5, 0.5)):
        model.layers.p = p
        y = seeded(step, compiled, x)
        torch.testing.assert_close(y, seeded(step, model, x))
        outputs.add(y.sum().item())
    assert counter.frame_count == 1
    assert len(outputs) > 2
    y.sum().backward()
    assert all(layer.weight.grad is not None for layer in model.layers.children())
    skip = Stack(5)
    broken = torch.compile(skip, backend="aot_eager")
    for step in range(4):
        torch.testing.assert_close(seeded(step, broken, x), seeded(step, skip, x))


class Around(nn.Module):
    """Any stack, one layer after the other."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_monte_carlo_knows_the_dropout_in_layers_that_its_survey_skipped() -> None:
    layers = [
        nn.Sequential(nn.Linear(6, 6), torchdrop.Dropout(0.5), nn.Tanh(), torchdrop.Dropout(0.2)) for _ in range(8)
    ]
    model = Around(LayerDrop(layers, 0.5)).eval()
    x = torch.randn(9, 6)
    with torchdrop.mc_dropout(model, seed=3) as report:
        outputs = [model(x) for _ in range(6)]
    inside = [source for source in report.sources if source.module.startswith("layers.")]
    assert len(inside) == 16
    assert all(source.active and not source.reason for source in inside)
    with torchdrop.mc_dropout(model, seed=3):
        fewer = [model(x[:4]) for _ in range(6)]
    assert all(torch.allclose(a[:4], b, atol=1e-6) for a, b in zip(outputs, fewer, strict=True))

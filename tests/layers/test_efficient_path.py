"""Efficient stochastic depth: an exact count of rows, exact expectation over subsets, no work for the others."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.seeding import seeded
from tests.statistical import check_rate, draws_for
from torchdrop.core import sites
from torchdrop.core.choices import subset
from torchdrop.layers.efficient_path import EfficientStochasticDepth, efficient_stochastic_depth


class Counting(nn.Module):
    """A branch that keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return torch.tanh(x @ self.weight)


def force(monkeypatch: pytest.MonkeyPatch, words: Tensor) -> None:
    monkeypatch.setattr(sites, "random_bits", lambda like, shape, generator=None: words.reshape(shape))


@pytest.mark.parametrize("k", [0.2, 0.4, 0.6, 0.8])
def test_expectation_is_exact_over_all_subsets_of_a_batch_of_five(k: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, branch, count = torch.randn(5, 4, dtype=torch.float64), Counting(), round(5 * k)
    outputs = []
    for chosen in itertools.combinations(range(5), count):
        words = torch.full((5,), 7)
        words[list(chosen)] = 3
        force(monkeypatch, words)
        outputs.append(efficient_stochastic_depth(x, branch, keep_prob=k))
        assert torch.equal(branch.seen[-1], x[list(chosen)])
        rest = [b for b in range(5) if b not in chosen]
        assert torch.equal(outputs[-1][rest], x[rest])
    torch.testing.assert_close(torch.stack(outputs).mean(0), x + branch(x), rtol=1e-12, atol=1e-12)


def test_every_subset_belongs_to_equally_many_orders_of_the_draws() -> None:
    for count in range(6):
        found = Counter(
            tuple(subset(torch.tensor(order), count).tolist()) for order in itertools.permutations(range(5))
        )
        assert set(found) == set(itertools.combinations(range(5), count))
        assert len(set(found.values())) == 1


@pytest.mark.slow
def test_subsets_are_uniform() -> None:
    subsets = list(itertools.combinations(range(4), 2))
    n = draws_for(1 / 6, 0.01)
    words = sites.random_bits(torch.empty(0), (n, 4))
    found = Counter(map(tuple, subset(words, 2).tolist()))
    for one in subsets:
        check_rate(found[one], n, 1 / 6, 0.01)


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 64])
@pytest.mark.parametrize("k", [0.01, 0.3, 0.5, 0.75, 0.99, 1.0])
def test_the_branch_sees_its_share_of_rows_and_one_at_least(rows: int, k: float) -> None:
    branch = Counting()
    x = torch.randn(rows, 4, dtype=torch.float64)
    y = efficient_stochastic_depth(x, branch, keep_prob=k)
    (seen,) = branch.seen
    assert len(seen) == max(1, round(rows * k))
    changed = (y != x).any(1)
    assert int(changed.sum()) == len(seen)
    assert torch.equal(x[changed], seen)
    expected = x[changed] + torch.tanh(seen @ branch.weight) * (rows / len(seen))
    torch.testing.assert_close(y[changed], expected, rtol=1e-14, atol=1e-14)


def test_gradients_come_from_the_subset_alone() -> None:
    x, branch = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), Counting()

    def f(x: Tensor, weight: Tensor) -> Tensor:
        return seeded(1, efficient_stochastic_depth, x, lambda part: torch.tanh(part @ weight), 0.5)

    y = f(x, branch.weight)
    changed = (y != x).any(1)
    grads = torch.autograd.grad(y.sum(), (x, branch.weight))
    assert torch.equal(grads[0][~changed], torch.ones(3, 4, dtype=torch.float64))
    assert not torch.equal(grads[0][changed], torch.ones(3, 4, dtype=torch.float64))
    seen = x[changed].detach()
    direct = (torch.tanh(seen @ branch.weight) * 2.0).sum()
    torch.testing.assert_close(grads[1], torch.autograd.grad(direct, branch.weight)[0])
    assert torch.autograd.gradcheck(f, (x, branch.weight))
    assert torch.autograd.gradgradcheck(f, (x, branch.weight))


def test_eval_and_keep_prob_one_are_the_residual_sum() -> None:
    x, branch = torch.randn(6, 4, dtype=torch.float64), Counting()
    expected = x + branch(x)
    layer = EfficientStochasticDepth(0.5).eval()
    assert torch.equal(layer(x, branch), expected)
    assert torch.equal(efficient_stochastic_depth(x, branch, 0.5, False), expected)
    assert torch.equal(efficient_stochastic_depth(x, branch, 0.0), expected)
    assert torch.equal(seeded(1, layer.train(), x, branch), seeded(1, efficient_stochastic_depth, x, branch))
    assert efficient_stochastic_depth(x[:0], branch, 0.5).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once_and_types_promote_as_in_the_sum(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 16 * 99).reshape(16, 99).to(dtype)
    y = seeded(1, efficient_stochastic_depth, x, torch.sin, keep_prob=0.3)
    wide = seeded(
        1, efficient_stochastic_depth, x.float(), lambda part: torch.sin(part.to(dtype)).float(), keep_prob=0.3
    )
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert torch.equal(y, wide.to(dtype))
    assert efficient_stochastic_depth(x, lambda part: torch.sin(part.float())).dtype == torch.float32
    assert efficient_stochastic_depth(x.float(), lambda part: torch.sin(part.to(dtype))).dtype == torch.float32


def test_strides_do_not_matter() -> None:
    x = torch.randn(6, 4, 5, 3)
    expected = seeded(1, efficient_stochastic_depth, x, torch.sin)
    last = seeded(1, efficient_stochastic_depth, x.contiguous(memory_format=torch.channels_last), torch.sin)
    assert torch.equal(last, expected)
    assert torch.equal(seeded(1, efficient_stochastic_depth, x.repeat_interleave(2, 3)[..., ::2], torch.sin), expected)


def test_seeds_generators_frozen_masks_and_checkpointing() -> None:
    x = torch.randn(20, 4, requires_grad=True)
    first, second = (
        efficient_stochastic_depth(x, torch.sin, generator=torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert len({tuple((efficient_stochastic_depth(x, torch.sin) != x)[:, 0].tolist()) for _ in range(9)}) > 1
    layer = EfficientStochasticDepth(generator=torch.Generator().manual_seed(4))
    assert torch.equal(layer(x, torch.sin), first)
    block = Block()
    with torchdrop.frozen_masks(block, seed=2):
        assert torch.equal(block(x), block(x))
    saved = seeded(3, lambda: checkpoint(block, x, use_reentrant=False))
    plain = seeded(3, lambda: block(x))
    assert torch.equal(saved, plain)
    grads = [torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) for y in (saved, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_for_each_or_for_all(randomness: str) -> None:
    y = vmap(lambda x: efficient_stochastic_depth(x, lambda part: part * 0 + 1), randomness=randomness)(
        torch.zeros(20, 8, 3)
    )
    assert ((y == 2).all(2).sum(1) == 4).all()
    assert torch.equal(y, y[:1].expand_as(y)) == (randomness == "same")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.drop = EfficientStochasticDepth(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x, self.mlp)


def test_nothing_is_in_the_state_and_copies_and_names_work() -> None:
    block, x = Block(), torch.randn(10, 4)
    assert list(block.state_dict()) == ["mlp.0.weight", "mlp.0.bias"]
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(seeded(1, twin, x), seeded(1, block, x))
    torchdrop.set_keep_prob(block, {"drop": 0.2})
    assert str(block.drop) == "EfficientStochasticDepth(p=0.8)"
    assert int((block(x) != x).any(1).sum()) == 2
    scheduler = torchdrop.KeepProbScheduler(block, {"*": torchdrop.schedules.linear(1.0, 0.5, 2)})
    for _ in range(2):
        scheduler.step()
    assert block.drop.keep_prob == 0.5
    with torchdrop.disabled(block):
        assert torch.equal(block(x), x + block.mlp(x))


def test_monte_carlo_keeps_each_row_on_its_own() -> None:
    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(20, 4)
    with torchdrop.mc_dropout(model, seed=1) as report:
        whole = model(x)
    with torchdrop.mc_dropout(model, seed=1):
        assert torch.allclose(model(x[:7]), whole[:7], atol=1e-6)
    assert len(report.active) == 2
    assert report.replayable
    kept = (whole != x).any(1)
    assert 0 < int(kept.sum()) < 20
    means = [
        torchdrop.mc_predict(model, x, samples=16, seed=3, strategy=strategy, chunk=chunk, task="regression").mean
        for strategy, chunk in (("loop", None), ("auto", None), ("auto", 5))
    ]
    assert all(torch.allclose(means[0], mean, atol=1e-5) for mean in means[1:])


def test_monte_carlos_row_is_x_plus_f_over_keep_prob_or_x() -> None:
    block, x = Block().eval(), torch.randn(30, 4)
    torchdrop.set_keep_prob(block, {"drop": 0.25})
    with torchdrop.mc_dropout(block, seed=2):
        y = block(x)
    kept = (y != x).any(1)
    assert 0 < int(kept.sum()) < 30
    torch.testing.assert_close(y[kept], (x + block.mlp(x) / 0.25)[kept])


@pytest.mark.slow
def test_compiled_subsets_are_those_of_eager_in_one_graph() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for seed, rows in enumerate((8, 8, 12, 20, 32)):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(seeded(seed, compiled, x), seeded(seed, block, x))
    assert counter.frame_count == 2  # the second is for batches of any size


def test_errors() -> None:
    x = torch.ones(4, 3)
    zero = r"^keep_prob must be in \(0, 1\] for efficient stochastic depth, got 0.0: at least one must be kept$"
    for call in (lambda: EfficientStochasticDepth(1.0), lambda: efficient_stochastic_depth(x, torch.sin, keep_prob=0)):
        with pytest.raises(ValueError, match=zero):
            call()
    layer = EfficientStochasticDepth(0.5)
    with pytest.raises(ValueError, match=zero):
        layer.p = 1
    with pytest.raises(ValueError, match=r"at least one must be kept, for 'drop'$"):
        torchdrop.set_keep_prob(Block(), {"drop": 0.0})
    assert layer.keep_prob == 0.5
    tensor = (
        r"^keep_prob must be a number for efficient stochastic depth, which keeps a fixed count of them, got a tensor$"
    )
    for given in (torch.tensor(0.5), torch.tensor([0.5])):
        with pytest.raises(TypeError, match=tensor):
            EfficientStochasticDepth(keep_prob=given)
        with pytest.raises(TypeError, match=tensor):
            efficient_stochastic_depth(x, torch.sin, keep_prob=given)
    with pytest.raises(ValueError, match=r"^branch must keep the shape of its input, got \(2, 1\) for \(2, 3\)$"):
        layer(x, lambda part: part[:, :1])
    for drop in (layer, EfficientStochasticDepth(0.0), EfficientStochasticDepth(0.5).eval()):
        with pytest.raises(ValueError, match=r"^branch must keep the shape of its input, got \(\d, 1\) for \(\d, 3\)$"):
            drop(x, lambda part: part[:, :1])
        with pytest.raises(TypeError, match=r"^branch must return a tensor, got tuple$"):
            drop(x, lambda part: (part, part))
        with pytest.raises(TypeError, match=r"^branch must be a module or function, got Tensor$"):
            drop(x, x)
    with pytest.raises(ValueError, match=r"^efficient_stochastic_depth: input must have its samples in the first"):
        layer(torch.tensor(1.0), torch.sin)
    with pytest.raises(RuntimeError, match=r"^result type Float can't be cast to the desired output type Long"):
        layer(torch.ones(4, dtype=torch.int64), torch.sin)
    with pytest.raises(TypeError, match=r"^give the rate as p or as keep_prob, not both"):
        EfficientStochasticDepth(0.3, keep_prob=0.7)

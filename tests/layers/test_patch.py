"""PatchDropout: an exact number of tokens, prefix tokens always, a subset of its own for each sample."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.seeding import seeded
from tests.statistical import check_rate, draws_for
from torchdrop.core import sites
from torchdrop.layers.patch import PatchDropout, patch_dropout, patch_dropout_indices


def numbered(samples: int, tokens: int, features: int = 2) -> Tensor:
    """Tokens that tell their sample and their place."""
    places = torch.arange(samples * tokens, dtype=torch.float64).reshape(samples, tokens, 1)
    return places.expand(-1, -1, features).contiguous()


@given(
    samples=st.integers(0, 5),
    prefix=st.integers(0, 3),
    patches=st.integers(0, 40),
    keep_prob=st.floats(0.01, 1.0),
    seed=st.integers(0, 100),
)
def test_exact_count_prefix_and_order(samples: int, prefix: int, patches: int, keep_prob: float, seed: int) -> None:
    x = numbered(samples, prefix + patches)
    y = seeded(seed, patch_dropout, x, num_prefix_tokens=prefix, keep_prob=keep_prob)
    count = min(patches, max(1, math.floor(patches * keep_prob + 1e-6)))
    assert y.shape == (samples, prefix + count, 2)
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    assert (y[..., 0].diff(dim=1) > 0).all()
    for row in range(samples):
        assert set(y[row, :, 0].tolist()) <= set(x[row, :, 0].tolist())


@pytest.mark.parametrize(
    ("p", "patches", "count"),
    [(0.5, 196, 98), (0.9, 100, 10), (0.7, 10, 3), (0.4, 196, 117), (0.99, 5, 1), (0.1, 3, 2), (0.25, 1, 1)],
)
def test_the_count_is_the_integer_part_and_one_at_least(p: float, patches: int, count: int) -> None:
    assert patch_dropout(numbered(2, 1 + patches), p).shape[1] == 1 + count


def test_every_subset_belongs_to_equally_many_orders_of_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = torch.tensor(list(itertools.permutations(range(5))))
    monkeypatch.setattr(sites, "random_bits", lambda like, shape, generator=None: orders)
    kept = patch_dropout_indices(torch.empty(120, 7, 1), 0.6, num_prefix_tokens=2)
    assert torch.equal(kept[:, :2], torch.tensor([0, 1]).expand(120, 2))
    found = Counter(map(tuple, (kept[:, 2:] - 2).tolist()))
    assert found == dict.fromkeys(itertools.combinations(range(5), 2), 12)


@pytest.mark.slow
def test_subsets_are_uniform_and_differ_between_samples() -> None:
    n = draws_for(1 / 6, 0.01)
    kept = patch_dropout_indices(torch.empty(n, 4, 1), 0.5, num_prefix_tokens=0)
    found = Counter(map(tuple, kept.tolist()))
    for one in itertools.combinations(range(4), 2):
        check_rate(found[one], n, 1 / 6, 0.01)
    agree = (kept[0::2] == kept[1::2]).all(1)
    check_rate(int(agree.sum()), n // 2, 1 / 6, 0.02)


def test_samples_have_subsets_of_their_own() -> None:
    kept = patch_dropout_indices(torch.empty(30, 50, 1), 0.5)
    assert len(set(map(tuple, kept.tolist()))) == 30


def test_nothing_is_scaled_and_indices_are_those_of_the_tokens() -> None:
    x, positions = torch.randn(4, 17, 3), torch.randn(4, 17, 2, 2)
    kept = seeded(5, patch_dropout_indices, x, 0.75)
    assert kept.dtype == torch.int64
    assert torch.equal(seeded(5, patch_dropout, x, 0.75), x.gather(1, kept.unsqueeze(-1).expand(-1, -1, 3)))
    assert torch.equal(seeded(5, PatchDropout(0.75), x), x.gather(1, kept.unsqueeze(-1).expand(-1, -1, 3)))
    assert torch.equal(seeded(5, patch_dropout, positions, 0.75), positions[torch.arange(4).unsqueeze(1), kept])
    assert torch.equal(seeded(5, patch_dropout_indices, torch.zeros(4, 17, 1, dtype=torch.int64), 0.75), kept)


def test_eval_and_keep_prob_one_give_the_input_itself() -> None:
    x = torch.randn(3, 9, 4)
    everything = torch.arange(9).expand(3, 9)
    assert PatchDropout(0.5).eval()(x) is x
    assert patch_dropout(x, 0.5, False) is x
    assert patch_dropout(x, 0.0) is x
    assert patch_dropout(x[:, :1], 0.5).shape == (3, 1, 4)
    assert torch.equal(patch_dropout_indices(x, 0.5, False), everything)
    assert torch.equal(patch_dropout_indices(x, 0.0), everything)


def test_gradients_go_to_the_kept_tokens() -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return seeded(0, patch_dropout, x, 0.5)

    kept = seeded(0, patch_dropout_indices, x, 0.5)
    grad = torch.autograd.grad(f(x).sum(), x)[0]
    assert torch.equal(grad, torch.zeros(2, 7).scatter(1, kept, 1.0).unsqueeze(2).expand(2, 7, 3).double())
    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_and_strides_do_not_matter(dtype: torch.dtype) -> None:
    x = torch.randn(3, 9, 4).to(dtype)
    expected = seeded(1, patch_dropout, x)
    assert expected.dtype == dtype
    assert torch.equal(seeded(1, patch_dropout, x.double()).to(dtype), expected)
    assert torch.equal(seeded(1, patch_dropout, x.transpose(1, 2).contiguous().transpose(1, 2)), expected)
    assert torch.equal(seeded(1, patch_dropout, x.repeat_interleave(2, 1)[:, ::2]), expected)


def test_seeds_generators_frozen_masks_and_checkpointing() -> None:
    x = torch.randn(5, 20, 3, requires_grad=True)
    first, second = (patch_dropout(x, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(PatchDropout(generator=torch.Generator().manual_seed(4))(x), first)
    assert not torch.equal(patch_dropout(x), patch_dropout(x))
    model = nn.Sequential(PatchDropout(0.5))
    with torchdrop.frozen_masks(model, seed=2):
        y = model(x)
        assert torch.equal(model(x), y)
        assert torch.equal(model(x[:3]), y[:3])
    saved, plain = (seeded(1, f) for f in (lambda: checkpoint(model, x, use_reentrant=False), lambda: model(x)))
    assert torch.equal(saved, plain)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (saved, plain)))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_for_each_or_for_all(randomness: str) -> None:
    x = numbered(1, 20).expand(6, 2, 20, 2)
    y = vmap(patch_dropout, randomness=randomness)(x)
    assert y.shape == (6, 2, 10, 2)
    assert torch.equal(y, y[:1].expand_as(y)) == (randomness == "same")


class Tokens(nn.Module):
    """The mean over the tokens that are left."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = PatchDropout(0.5, num_prefix_tokens=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x).mean(1)


def test_names_schedules_copies_and_state() -> None:
    model, x = Tokens(), torch.randn(3, 22, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(seeded(1, twin, x), seeded(1, model, x))
    assert not model.state_dict()
    torchdrop.set_keep_prob(model, {"drop": 0.25})
    assert str(model.drop) == "PatchDropout(p=0.75, num_prefix_tokens=2)"
    assert model.drop(x).shape[1] == 2 + 5
    scheduler = torchdrop.KeepProbScheduler(model, {"*": torchdrop.schedules.linear(1.0, 0.5, 2)})
    assert model.drop(x) is x
    for _ in range(2):
        scheduler.step()
    assert model.drop(x).shape[1] == 2 + 10
    with torchdrop.disabled(model):
        assert model.drop(x) is x


def test_monte_carlo_gives_each_row_its_tokens_in_any_batch() -> None:
    model, x = Tokens().eval(), torch.randn(12, 22, 4)
    with torchdrop.mc_dropout(model, seed=1) as report:
        whole = model(x)
    with torchdrop.mc_dropout(model, seed=1):
        assert torch.allclose(model(x[:5]), whole[:5], atol=1e-6)
    assert len(report.active) == 1
    assert report.replayable
    assert not torch.allclose(whole, model(x))
    means = [
        torchdrop.mc_predict(model, x, samples=16, seed=3, strategy=strategy, chunk=chunk, task="regression").mean
        for strategy, chunk in (("loop", None), ("auto", None), ("auto", 5))
    ]
    assert all(torch.allclose(means[0], mean, atol=1e-5) for mean in means[1:])


@pytest.mark.slow
def test_compiled_subsets_are_those_of_eager_in_one_graph() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Tokens()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed, shape in enumerate([(4, 22, 3), (6, 22, 3), (6, 34, 3), (9, 50, 3)]):
        x = torch.randn(shape)
        torch.testing.assert_close(seeded(seed, compiled, x), seeded(seed, model, x))
    assert counter.frame_count <= 3  # then batches and token counts of any size
    indices = torch.compile(lambda x: patch_dropout_indices(x, 0.5), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 22, 4)
    assert torch.equal(seeded(7, indices, x), seeded(7, lambda: patch_dropout_indices(x, 0.5)))


def test_errors() -> None:
    x = torch.ones(2, 5, 3)
    zero = r"^keep_prob must be in \(0, 1\] for patch dropout, got 0.0: at least one must be kept$"
    for call in (
        lambda: PatchDropout(1.0),
        lambda: patch_dropout(x, 1.0),
        lambda: patch_dropout_indices(x, keep_prob=0),
    ):
        with pytest.raises(ValueError, match=zero):
            call()
    layer = PatchDropout(0.5)
    with pytest.raises(ValueError, match=zero):
        layer.keep_prob = 0.0
    assert layer.keep_prob == 0.5
    tensor = r"^keep_prob must be a number for patch dropout, which keeps a fixed count of them, got a tensor$"
    with pytest.raises(TypeError, match=tensor):
        PatchDropout(keep_prob=torch.tensor(0.5))
    for call in (lambda: patch_dropout(x[0]), lambda: patch_dropout_indices(x[0]), lambda: layer.eval()(x[0])):
        with pytest.raises(ValueError, match=r"^input must be \(B, N, D\), got the shape \(5, 3\)$"):
            call()
    with pytest.raises(
        ValueError, match=r"^num_prefix_tokens must be at most the number of tokens, got 6 for an input"
    ):
        patch_dropout(x, num_prefix_tokens=6)
    with pytest.raises(ValueError, match=r"^num_prefix_tokens must not be negative, got -1$"):
        PatchDropout(0.5, -1)
    layer.num_prefix_tokens = -2
    with pytest.raises(ValueError, match=r"^num_prefix_tokens must not be negative, got -2$"):
        layer.train()(x)
    with pytest.raises(TypeError, match=r"^num_prefix_tokens must be an integer, got float$"):
        PatchDropout(0.5, 1.5)  # type: ignore[arg-type]
    with pytest.raises(
        RuntimeError, match=r"^result type Float can't be cast to the desired output type Long: patch_dr"
    ):
        patch_dropout(x.long())
    with pytest.raises(
        TypeError, match=r"^patch_dropout\(\): argument 'input' \(position 1\) must be Tensor, not list$"
    ):
        patch_dropout([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^dropout probability has to be between 0 and 1, but got 1.5$"):
        PatchDropout(1.5)

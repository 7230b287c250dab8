"""Multi-sample dropout: the mean of the loss over K masks, and what that does to the gradient's variance."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.seeding import seeded
from torchdrop.core import formulations
from torchdrop.functional import dropout
from torchdrop.layers import dropout as bernoulli
from torchdrop.layers.multi_sample import MultiSampleDropout, multi_sample_dropout, multi_sample_loss


class Head(nn.Module):
    """Counts the rows that it sees."""

    def __init__(self, features: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes, dtype=torch.float64)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return torch.tanh(self.linear(x))


def force(monkeypatch: pytest.MonkeyPatch, mask: Tensor, k: float) -> None:
    """Dropout multiplies by this mask over k."""
    monkeypatch.setattr(bernoulli, "fast_dropout", lambda *_: None)
    monkeypatch.setattr(formulations, "apply", lambda operator, input, *_: input * mask / k)


def test_gradient_variance_falls_as_1_over_k_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([[0.7, -1.3]], dtype=torch.float64)
    weight = torch.tensor([0.4, 0.9], dtype=torch.float64, requires_grad=True)
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)), dtype=torch.float64)

    def gradients(samples: int) -> Tensor:
        """Under every tuple of masks: at keep_prob 1/2 they are equally likely."""
        found = []
        for choice in itertools.product(range(4), repeat=samples):
            force(monkeypatch, masks[list(choice)].unsqueeze(1), 0.5)
            loss = multi_sample_loss(x, lambda h: h @ weight, lambda y: (y - 1).square().mean(), samples=samples)
            found.append(torch.autograd.grad(loss, weight)[0])
        return torch.stack(found)

    single = gradients(1)
    assert (single.var(0) > 0.1).all()
    for samples in (2, 3, 4):
        several = gradients(samples)
        torch.testing.assert_close(several.mean(0), single.mean(0), rtol=1e-12, atol=1e-12)
        covariance = torch.cov(several.T, correction=0)
        torch.testing.assert_close(covariance, torch.cov(single.T, correction=0) / samples, rtol=1e-12, atol=1e-12)


def test_one_sample_is_plain_dropout_under_the_same_key() -> None:
    x, head, target = torch.randn(7, 6, dtype=torch.float64), Head(), torch.arange(7) % 3
    expected = seeded(1, lambda: head(dropout(x, 0.3)))
    assert torch.equal(seeded(1, multi_sample_dropout, x, head, 0.3, samples=1), expected)
    assert torch.equal(seeded(1, MultiSampleDropout(head, 0.3, 1), x), expected)
    loss = seeded(1, multi_sample_loss, x, head, lambda y: F.cross_entropy(y, target), 0.3, samples=1)
    assert torch.equal(loss, F.cross_entropy(expected, target))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_the_mean_of_the_losses_under_masks_of_one_draw(reduction: str) -> None:
    x, head, target = torch.randn(7, 6, dtype=torch.float64), Head(), torch.arange(7) % 3

    def loss(y: Tensor) -> Tensor:
        return F.cross_entropy(y, target, reduction=reduction)

    dropped = seeded(3, dropout, x.expand(5, 7, 6), keep_prob=0.7)
    outputs = [head(part) for part in dropped]
    head.seen.clear()
    expected = torch.stack([loss(y) for y in outputs]).mean(0)
    module = MultiSampleDropout(head, samples=5, keep_prob=0.7)
    function = seeded(3, multi_sample_loss, x, head, loss, samples=5, keep_prob=0.7)
    torch.testing.assert_close(function, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(seeded(3, module.loss, x, loss), function)
    mean = seeded(3, multi_sample_dropout, x, head, samples=5, keep_prob=0.7)
    torch.testing.assert_close(mean, torch.stack(outputs).mean(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(seeded(3, module, x), mean)
    assert head.seen == [35] * 4  # one call of the head each
    grads = [torch.autograd.grad(y.sum(), head.linear.weight)[0] for y in (function, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_masks_differ_between_the_samples_and_rows() -> None:
    seen: list[Tensor] = []
    multi_sample_dropout(torch.ones(10, 40), lambda h: seen.append(h) or h, samples=6)  # type: ignore[func-returns-value]
    assert len(set(map(tuple, seen[0].tolist()))) == 60


def test_eval_is_the_head() -> None:
    x, head = torch.randn(4, 6, dtype=torch.float64), Head()
    module = MultiSampleDropout(head, 0.5).eval()
    assert torch.equal(module(x), head(x))
    assert torch.equal(module.loss(x, torch.sum), head(x).sum())
    assert torch.equal(multi_sample_dropout(x, head, 0.5, False), head(x))
    assert torch.equal(multi_sample_loss(x, head, torch.sum, 0.5, False), head(x).sum())
    assert head.seen == [4] * 8


def test_keep_prob_one_and_zero_and_empty_batches() -> None:
    x, head = torch.randn(4, 6, dtype=torch.float64), Head()
    torch.testing.assert_close(multi_sample_dropout(x, head, 0.0), head(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(multi_sample_dropout(x, head, 1.0), head(x * 0), rtol=1e-12, atol=1e-12)
    assert multi_sample_dropout(x[:0], head, 0.5).shape == (0, 3)


def test_gradcheck_with_the_key_fixed() -> None:
    x, head = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), Head()
    assert torch.autograd.gradcheck(
        lambda x, _: seeded(0, multi_sample_loss, x, head, torch.square, 0.4, samples=3), (x, head.linear.weight)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    x = torch.full((5, 200), 20000.0).to(dtype)
    y = multi_sample_dropout(x, lambda h: h, 0.5, samples=4)
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert (y != 0).float().mean() > 0.8


def test_features_of_any_shape_and_strides() -> None:
    x = torch.randn(4, 3, 5, 2)
    head = nn.Sequential(nn.Flatten(), nn.Linear(30, 2))
    expected = seeded(1, multi_sample_dropout, x, head, samples=3)
    last = seeded(1, multi_sample_dropout, x.contiguous(memory_format=torch.channels_last), head, samples=3)
    assert torch.equal(last, expected)


def test_seeds_generators_frozen_masks_and_checkpointing() -> None:
    x, head = torch.randn(6, 6, dtype=torch.float64, requires_grad=True), Head()
    first, second = (multi_sample_dropout(x, head, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(MultiSampleDropout(head, generator=torch.Generator().manual_seed(4))(x), first)
    model = MultiSampleDropout(head, 0.5, 3)
    assert not torch.equal(model(x), model(x))
    with torchdrop.frozen_masks(model, seed=2):
        assert torch.equal(model(x), model(x))
    saved, plain = (seeded(1, f) for f in (lambda: checkpoint(model, x, use_reentrant=False), lambda: model(x)))
    assert torch.equal(saved, plain)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (saved, plain)))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_for_each_or_for_all(randomness: str) -> None:
    x = torch.ones(5, 4, 20)
    y = vmap(lambda x: multi_sample_dropout(x, lambda h: h, samples=3), randomness=randomness)(x)
    assert y.shape == x.shape
    assert torch.equal(y, y[:1].expand_as(y)) == (randomness == "same")


def test_names_schedules_copies_and_state() -> None:
    model = nn.ModuleDict({"classifier": MultiSampleDropout(nn.Linear(6, 3), 0.5, 4)})
    classifier, x = model["classifier"], torch.randn(5, 6)
    assert list(model.state_dict()) == ["classifier.head.weight", "classifier.head.bias"]
    for twin in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert torch.equal(seeded(1, twin, x), seeded(1, classifier, x))
    assert dict(torchdrop.keep_probs(model)) == {"classifier.dropout": 0.5}
    torchdrop.set_keep_prob(model, {"classifier": 0.9})
    assert (classifier.keep_prob, classifier.p) == (0.9, 0.1)
    classifier.p = 0.25
    assert classifier.dropout.keep_prob == 0.75  # type: ignore[union-attr]
    classifier.keep_prob = 0.5
    assert classifier.dropout.p == 0.5  # type: ignore[union-attr]
    scheduler = torchdrop.KeepProbScheduler(model, {"*": torchdrop.schedules.linear(1.0, 0.7, 2)})
    for _ in range(2):
        scheduler.step()
    assert classifier.keep_prob == pytest.approx(0.7)
    with torchdrop.disabled(model):
        torch.testing.assert_close(classifier(x), classifier.head(x))  # type: ignore[operator]
    assert "samples=4" in str(classifier)


def test_monte_carlo_takes_one_mask_a_sample_and_row() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), MultiSampleDropout(nn.Identity(), 0.5, 4)).eval()
    x = torch.randn(12, 3)
    with torchdrop.mc_dropout(model, seed=1) as report:
        whole = model(x)
    with torchdrop.mc_dropout(model, seed=1):
        assert torch.allclose(model(x[:5]), whole[:5], atol=1e-6)
    assert len(report.active) == 1
    assert report.replayable  # row by row
    features = model[1](model[0](x))
    ratio = whole / features
    assert torch.allclose(ratio, torch.where(ratio > 1, 2.0, 0.0), atol=1e-5)
    assert 0.2 < (whole == 0).float().mean() < 0.8
    means = [
        torchdrop.mc_predict(model, x, samples=16, seed=3, strategy=strategy, chunk=chunk, task="regression").mean
        for strategy, chunk in (("loop", None), ("auto", None), ("auto", 5))
    ]
    assert all(torch.allclose(means[0], mean, atol=1e-5) for mean in means[1:])


@pytest.mark.slow
def test_compiled_masks_are_those_of_eager_and_rates_do_not_recompile() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, x = MultiSampleDropout(nn.Linear(6, 3), 0.5, 4), torch.randn(5, 6)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for k in (0.5, 0.9, 1.0):
        model.keep_prob = k
        torch.testing.assert_close(seeded(2, compiled, x), seeded(2, model, x))
    assert counter.frame_count == 1


def test_errors() -> None:
    x, head = torch.ones(4, 6), nn.Linear(6, 3)
    for call in (lambda: MultiSampleDropout(head, 0.5, 0), lambda: multi_sample_dropout(x, head, samples=0)):
        with pytest.raises(ValueError, match=r"^samples must be at least 1, got 0$"):
            call()
    for call in (lambda: MultiSampleDropout(head, 0.5, 2.0), lambda: multi_sample_dropout(x, head, samples=2.0)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^samples must be an integer, got float$"):
            call()
    with pytest.raises(TypeError, match=r"^head must be a torch.nn.Module, got builtin_function_or_method$"):
        MultiSampleDropout(torch.sin, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^head must give a row for each of 8 rows, got \(\)$"):
        multi_sample_dropout(x, torch.mean, samples=2)
    with pytest.raises(ValueError, match=r"^head must give a row for each of 4 rows, got \(\)$"):
        multi_sample_dropout(x, torch.mean, training=False)
    for training in (True, False):
        with pytest.raises(ValueError, match=r"^input must have its samples in the first dimension, \(B, ...\), got a"):
            multi_sample_dropout(torch.tensor(1.0), head, training=training)
        with pytest.raises(
            TypeError, match=r"^multi_sample_dropout\(\): argument 'input' .* must be Tensor, not list$"
        ):
            multi_sample_dropout([1.0], head, training=training)
        with pytest.raises(TypeError, match=r"^head must return a tensor, got tuple$"):
            multi_sample_dropout(x, lambda rows: (rows, rows), training=training)
        with pytest.raises(TypeError, match=r"^head must be a module or function, got Tensor$"):
            multi_sample_dropout(x, x, training=training)
        with pytest.raises(TypeError, match=r"^loss must return a tensor, got float$"):
            multi_sample_loss(x, head, lambda y: y.sum().item(), training=training)
    with pytest.raises(
        RuntimeError, match=r"^result type Float can't be cast to the desired output type Long: multi_sa"
    ):
        multi_sample_dropout(x.long(), head)
    with pytest.raises(ValueError, match=r"^dropout probability has to be between 0 and 1, but got 1.5$"):
        MultiSampleDropout(head, 1.5)
    with pytest.raises(TypeError, match=r"^give the rate as p or as keep_prob, not both"):
        multi_sample_loss(x, head, torch.sum, 0.3, keep_prob=0.7)
    module = MultiSampleDropout(head, 0.3)
    with pytest.raises(ValueError, match=r"^keep_prob must be in \[0, 1\], got 2.0$"):
        module.keep_prob = 2
    assert module.p == 0.3

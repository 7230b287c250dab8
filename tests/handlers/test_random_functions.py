"""Random functions one by one: attention against its formula, layers that are skipped, numbers that torch draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torchdrop
from tests.mc_models import (
    WARNINGS_OF_TORCH,
    Of,
    apart,
    check_draws,
    equal,
    heads,
    images,
    layer_drop,
    sdpa,
    served_masks,
    torchvision_depth,
    train_draws,
    unchanged,
)
from tests.statistical import check_rate

pytestmark = [pytest.mark.usefixtures("one_thread"), *WARNINGS_OF_TORCH]


ATTENTIONS: dict[str, Callable[[], tuple[dict[str, Any], int]]] = {
    "plain": lambda: ({}, 4),
    "causal": lambda: ({"is_causal": True}, 4),
    "bool": lambda: ({"attn_mask": torch.rand(7, 9) > 0.5}, 4),
    "bool, blind queries": lambda: ({"attn_mask": torch.arange(7).view(7, 1).expand(7, 9) > 2}, 4),
    "float": lambda: ({"attn_mask": torch.randn(4, 1, 9)}, 4),
    "float, infinite": lambda: ({"attn_mask": torch.zeros(7, 9).masked_fill(torch.rand(7, 9) > 0.5, -torch.inf)}, 4),
    "scale": lambda: ({"scale": 0.7}, 4),
    "grouped": lambda: ({"enable_gqa": True, "is_causal": True}, 2),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_scaled_dot_product_attention(name: str) -> None:
    """softmax(q k / scale + mask) with its elements dropped, and what is kept divided by the keep probability."""
    settings, keys = ATTENTIONS[name]()
    query, key, value = heads(keys)
    identity = torch.eye(9).expand(5, keys, 9, 9)
    model = sdpa(**settings).eval()
    weights = model(query, key, identity)
    with torchdrop.mc_dropout(model, seed=0) as report:
        dropped = torch.stack([model(query, key, identity) for _ in range(20)])
    with torchdrop.mc_dropout(model, seed=0):
        served = torch.stack([model(query, key, value) for _ in range(20)])
    assert [(s.kind, s.rate, s.active) for s in report.sources] == [("attention", 0.4, True)]
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, weights / 0.6, 0.0))
    seen = (weights != 0).expand_as(kept)
    assert (kept & ~seen).sum() == 0
    check_rate(int(kept[seen].sum()), int(seen.sum()), 0.6, 0.1)
    torch.testing.assert_close(served, dropped @ value.repeat_interleave(4 // keys, 1))


def test_attention_with_a_mask_of_another_dtype() -> None:
    """Float32 masks go with bfloat16 queries in torch, so they do here."""
    query = torch.randn(2, 2, 5, 8, dtype=torch.bfloat16)
    model = sdpa(attn_mask=torch.randn(5, 5)).eval()
    plain = model(query, query, query)
    with torchdrop.mc_dropout(model, seed=0) as report:
        served = model(query, query, query)
    assert report.draws == 1
    assert served.dtype == plain.dtype
    assert not torch.equal(served, plain)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_not_chosen_is_that_of_eval_mode(name: str) -> None:
    settings, keys = ATTENTIONS[name]()
    model = Of(lambda self, *x: (self.attention(*x), self.other(x[0])), attention=sdpa(**settings), other=nn.Dropout())
    inputs = heads(keys)
    expected = model.eval().attention(*inputs)
    with torchdrop.mc_dropout(model, seed=0, sources="other") as report:
        attended, other = model(*inputs)
    assert torch.equal(attended, expected)
    assert not torch.equal(other, inputs[0])
    assert [(s.module, s.reason) for s in report.inactive] == [("attention", "not chosen by the patterns of `sources`")]


def test_layer_drop() -> None:
    """Each forward has as many layers as its decisions say; each of them draws."""
    layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3)) for _ in range(3))
    model, x = Of(layer_drop, layers=layers).eval(), torch.randn(5, 6)
    drawn, outputs = [], []
    with unchanged(model), torch.no_grad(), torchdrop.mc_dropout(model, seed=0) as report:
        outputs.append(model(x))
        drawn.append(report.draws)
        for _ in range(59):
            with served_masks() as served:
                outputs.append(model(x))
            drawn.append(len(served))
            assert report.draws == drawn[-1]
    assert set(drawn) == {3, 4, 5, 6}
    assert report.expected == 6
    found = [s.module for s in report.active if s.kind == "dropout"]  # in the order of their first draws
    assert sorted(found) == ["layers.0.1", "layers.1.1", "layers.2.1"]
    assert torch.equal(outputs[drawn.index(3)], x)
    result = torchdrop.mc_predict(model, x, samples=60, seed=0, keep_samples=True)
    assert result.report.strategy == "loop"
    assert apart(result.samples, torch.stack(outputs)) < 1e-5


def test_depth_of_the_batch() -> None:
    """Stochastic depth by batch: one decision for all rows, in any batch."""
    model, x = Of(lambda self, x: torchvision_depth(self, x, rows=False)).eval(), images()
    check_draws(model, x)
    result = torchdrop.mc_predict(model, x, samples=40, seed=0, keep_samples=True)
    single = torchdrop.mc_predict(model, iter(x.split(2)), samples=40, seed=0, keep_samples=True)
    assert torch.equal(result.samples, single.samples)
    gone = (result.samples == 0).flatten(1)
    assert bool((gone == gone[:, :1]).all())
    assert 0 < int(gone[:, 0].sum()) < 40
    torch.testing.assert_close(result.samples[~gone[:, 0]], (x / 0.6).expand(40, *x.shape)[~gone[:, 0]])


@pytest.mark.filterwarnings("ignore:mc_predict. A row's outputs depend on the other rows")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind: type[nn.RNNBase]) -> None:
    """They draw, and replay with the batch; the report says that rows of another batch would have other masks."""

    def run(self: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=6)[0]

    model = Of(run, rnn=kind(8, 6, 3, dropout=0.4, batch_first=True)).eval()
    inputs = (torch.randn(5, 6, 8), torch.tensor([3, 6, 2, 5, 1]))
    assert len(train_draws(model, inputs)) == 2
    with unchanged(model), torchdrop.mc_dropout(model, seed=0) as report:
        first = model(*inputs)
        with served_masks() as served:
            second = model(*inputs)
        own = [source.replayable for source in report.active]
    assert report.draws == report.expected == 2
    assert len(served) in (0, 2)
    assert not equal(first, second)
    with torchdrop.mc_dropout(model, seed=0):
        assert equal(first, model(*inputs))
    parts = [tuple(t[a : a + 2] for t in inputs) for a in (0, 2, 4)]
    whole = torchdrop.mc_predict(model, inputs, samples=6, seed=0)
    batched = torchdrop.mc_predict(model, iter(parts), samples=6, seed=0, select=lambda batch: batch)
    assert apart(batched.mean, whole.mean) > 1e-4
    assert not whole.report.replayable
    assert not any(own)
    assert "not replayable" in str(whole.report)


@pytest.mark.filterwarnings("ignore:mc_predict. A row's outputs depend on the other rows")
@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("randperm", lambda self, x: x + x[torch.randperm(x.shape[0])] if self.training else x),
        ("multinomial", lambda self, x: x[:, torch.multinomial(torch.ones(8), 8)] if self.training else x),
        ("randint", lambda self, x: x + torch.randint(0, 5, x.shape) if self.training else x),
        ("poisson", lambda self, x: torch.poisson(x.abs()) if self.training else x),
        ("native_dropout", lambda self, x: torch.native_dropout(x, 0.3, self.training)[0]),
    ],
)
def test_numbers_of_torch(kind: str, function: Callable[..., Tensor]) -> None:
    """What cannot be served fires with torch's own numbers: reported, one sample after another, replayed by seed."""
    model, x = Of(function, linear=nn.Linear(8, 8)).eval(), torch.randn(5, 8)
    assert len(train_draws(model, x)) == 1
    with unchanged(model):
        results = [torchdrop.mc_predict(model, x, samples=6, seed=1, keep_samples=True) for _ in range(2)]
        with torchdrop.mc_dropout(model, seed=1) as report:
            passes = torch.stack([model(x) for _ in range(6)])
    assert torch.equal(results[0].samples, results[1].samples)
    assert torch.equal(passes, results[0].samples)
    assert len(passes.unique(dim=0)) == 6
    for found in (report, results[0].report):
        assert [(s.kind, s.active, s.replayable) for s in found.sources] == [(kind, True, False)]
        assert "torch's own numbers" in found.sources[0].reason
        assert not found.replayable
        assert "not replayable" in str(found)
    assert results[0].report.strategy == "loop"


def test_draws_of_an_unknown_function() -> None:
    """A draw that is not served is not passed over: it is among the sources, or in a note."""
    model, x = Of(lambda self, x: torch._standard_gamma(x.abs() + 1) if self.training else x).eval(), torch.randn(5, 8)
    model = nn.Sequential(model, nn.Dropout(0.5)).eval()
    assert train_draws(model, x) == ["aten._standard_gamma.default", "aten.bernoulli_.float"]
    with torchdrop.mc_dropout(model, seed=0) as report:
        model(x)
    assert len(report.sources) == 2 or "gamma" in str(report)


def test_other_random_tensors() -> None:
    """The ways to call torch.rand, bernoulli and their kin, each with its distribution's range and mean."""
    calls: dict[str, tuple[Callable[[Tensor], Tensor], float, float, float]] = {
        "rand": (lambda x: torch.rand(x.shape), 0, 1, 0.5),
        "rand, sizes": (lambda x: torch.rand(x.shape[0], 400), 0, 1, 0.5),
        "rand, size": (lambda x: torch.rand(size=x.shape, dtype=torch.float64), 0, 1, 0.5),
        "rand_like": (torch.rand_like, 0, 1, 0.5),
        "uniform_": (lambda x: torch.empty_like(x).uniform_(-1, 2), -1, 2, 0.5),
        "uniform_, named": (lambda x: torch.empty_like(x).uniform_(to=3.0), 0, 3, 1.5),
        "bernoulli": (lambda x: torch.bernoulli(torch.full_like(x, 0.3)), 0, 1, 0.3),
        "bernoulli, p": (lambda x: torch.bernoulli(x, 0.3), 0, 1, 0.3),
        "method": (lambda x: x.bernoulli(p=0.3), 0, 1, 0.3),
        "bernoulli_": (lambda x: torch.empty_like(x).bernoulli_(torch.full_like(x, 0.3)), 0, 1, 0.3),
        "bernoulli_, default": (lambda x: torch.empty_like(x).bernoulli_(), 0, 1, 0.5),
        "randn": (lambda x: torch.randn(*x.shape), -7, 7, 0),
        "randn_like": (torch.randn_like, -7, 7, 0),
        "normal_": (lambda x: torch.empty_like(x).normal_(2, 0.5), -1.5, 5.5, 2),
        "normal": (lambda x: torch.normal(x, torch.full_like(x, 0.5)), -3.5, 3.5, 0),
        "normal, mean and size": (lambda x: torch.normal(2.0, 0.5, x.shape), -1.5, 5.5, 2),
        "exponential_": (lambda x: torch.empty_like(x).exponential_(2.0), 0, 16, 0.5),
    }
    x = torch.zeros(25, 400)
    for name, (draw, low, high, mean) in calls.items():
        model = Of(lambda self, x, draw=draw: draw(x) if self.training else x).eval()
        check_draws(model, x)
        with torchdrop.mc_dropout(model, seed=0):
            values = model(x)
        assert values.shape == x.shape
        assert low <= float(values.min()) < float(values.max()) <= high, name
        assert float(values.mean()) == pytest.approx(mean, abs=(high - low) * 0.04), name
        assert len(values.unique(dim=0)) == 25, f"{name}: rows have draws of their own"

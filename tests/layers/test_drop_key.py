"""DropKey: rows that add up to 1, a key that always stays, the masks for scaled_dot_product_attention."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.seeding import seeded
from tests.statistical import check_rate, draws_for
from torchdrop.core import sites
from torchdrop.kernels.mask_params import ONE
from torchdrop.layers.drop_key import DropKey, drop_key, drop_key_mask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def every_draw(monkeypatch: pytest.MonkeyPatch, keys: int, levels: int) -> Tensor:
    """Makes the draws of row n the n-th of all combinations of `levels` equidistant ones; gives these, as levels."""
    grid = torch.tensor(list(itertools.product(range(levels), repeat=keys)))
    monkeypatch.setattr(sites, "random_bits", lambda like, shape, generator: (grid * (ONE // levels)).reshape(shape))
    return grid


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2.0**-32, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("masking", ["none", "inf", "min"])
def test_rows_sum_to_one_and_no_row_is_fully_masked(dtype: torch.dtype, k: float, masking: str) -> None:
    logits = torch.randn(8, 4, 10, 10).to(dtype)
    allowed = torch.ones(10, 10, dtype=torch.bool).tril().expand(logits.shape)
    if masking == "inf":
        logits = logits.masked_fill(~allowed, -math.inf)
    elif masking == "min":
        logits = logits + torch.zeros((10, 10), dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    else:
        allowed = torch.ones_like(allowed)
    y = drop_key(logits, keep_prob=k)
    attention = y.softmax(-1)
    assert y.dtype == dtype
    assert not attention.isnan().any()
    torch.testing.assert_close(attention.sum(-1, dtype=torch.float64), torch.ones(8, 4, 10, dtype=torch.float64),
                               rtol=0, atol=16 * torch.finfo(dtype).eps)  # fmt: skip
    assert (attention[~allowed] == 0).all()
    kept = y.isfinite() & allowed
    assert kept.any(-1).all()
    assert torch.equal(y[kept], logits[kept])
    assert (y[~kept & allowed] == -math.inf).all()
    if k == 2.0**-32:
        assert (kept.sum(-1) == 1).all()


@pytest.mark.parametrize("k", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("seen", [(0, 1, 2), (1, 2), (2,), ()])
def test_key_with_the_smallest_draw_stays_by_enumeration(
    k: float, seen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = every_draw(monkeypatch, 3, 4)
    logits = torch.full((len(grid), 3), -math.inf)
    logits[:, list(seen)] = 1.0
    kept = drop_key(logits, keep_prob=k).isfinite()
    for draws, row in zip(grid.tolist(), kept.tolist(), strict=True):
        least = min((draws[i] for i in seen), default=None)
        assert row == [i in seen and (draws[i] < 4 * k or draws[i] == least) for i in range(3)]


def test_it_is_not_unbiased_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = every_draw(monkeypatch, 2, 4)
    logits = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64).expand(len(grid), 2)
    mean = drop_key(logits, keep_prob=0.5).softmax(-1).mean(0)
    either = torch.softmax(logits[0], -1)
    different = (grid[:, 0] != grid[:, 1]) & (grid >= 2).any(1)
    expected = torch.where(different[:, None], torch.eye(2, dtype=torch.float64)[grid.argmin(1)], either).mean(0)
    torch.testing.assert_close(mean, expected)
    assert (mean - either).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_rate_is_k(k: float) -> None:
    n = draws_for(k, 0.005)
    rows = -(-n // 256)
    kept = drop_key(torch.zeros(rows, 256), keep_prob=k).isfinite()  # one that is saved among 256: below 1e-24
    check_rate(int(kept.sum()), kept.numel(), k, 0.005)


def test_draws_can_be_shared_over_queries_and_heads() -> None:
    x = torch.zeros(3, 4, 5, 30)
    for axes, other in ((-2, (0, 1)), (1, (0, 2)), ((1, -2), (0,)), (0, (1, 2))):
        kept = drop_key(x, 0.5, shared_axes=axes).isfinite()
        for axis in (axes,) if isinstance(axes, int) else axes:
            assert torch.equal(kept, kept.narrow(axis, 0, 1).expand_as(kept))
        for axis in other:
            assert not torch.equal(kept, kept.narrow(axis, 0, 1).expand_as(kept))
    causal = torch.zeros(30, 30).masked_fill(torch.ones(30, 30, dtype=torch.bool).triu(1), -math.inf)
    kept = drop_key(causal.expand(6, 30, 30), 0.7, shared_axes=-2).isfinite()
    assert kept.any(-1).all()
    assert (kept[:, -1:] | ~kept)[:, 29:].all()
    columns = [kept[:, j:, j].float().mean(1) for j in range(29)]  # a key is dropped for all that need not keep it
    assert sum(((c > 0) & (c < 1)).sum() for c in columns) < 40


def test_gradients_are_those_of_the_keys_that_stay() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = seeded(1, drop_key, x, 0.5)
    kept = y.isfinite()
    assert torch.equal(torch.autograd.grad(y[kept].sum(), x, retain_graph=True)[0], kept.double())
    (grad,) = torch.autograd.grad((y.softmax(-1) ** 2).sum(), x)
    assert (grad[~kept] == 0).all()
    assert not grad.isnan().any()
    few = x[0, :2, 0].detach().requires_grad_()
    assert 0 < seeded(1, drop_key, few, 0.5).isfinite().sum() < few.numel()
    assert torch.autograd.gradcheck(lambda x: seeded(1, drop_key, x, 0.5).softmax(-1), few)
    assert torch.autograd.gradgradcheck(lambda x: seeded(1, drop_key, x, 0.5).softmax(-1), few)


def manual(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: Any) -> Tensor:
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else logits + mask
    return layer(logits).softmax(-1) @ v


def masks() -> dict[str, tuple[Tensor | None, bool]]:
    padding = torch.ones(3, 1, 1, 6, dtype=torch.bool)
    padding[1, ..., 2:] = False
    bias = torch.randn(2, 6, 6).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(2), -math.inf)
    return {"none": (None, False), "padding": (padding, False), "bias": (bias, False), "causal": (None, True),
            "both": (padding, True), "causal-bias": (bias, True)}  # fmt: skip


@pytest.mark.parametrize("shared_axes", [None, -2, (1, 2)])
@pytest.mark.parametrize("name", masks())
def test_mask_for_attention_is_what_drop_key_does_to_its_logits(name: str, shared_axes: Any) -> None:
    mask, is_causal = masks()[name]
    q, k, v = torch.randn(3, 3, 2, 6, 4).unbind()
    layer = DropKey(0.6, shared_axes=shared_axes)
    made = seeded(5, layer.attn_mask, q, k, mask, is_causal)
    assert made is not None
    assert made.dtype == (torch.bool if mask is None else mask.dtype)
    function = seeded(5, drop_key_mask, q, k, 0.6, attn_mask=mask, is_causal=is_causal, shared_axes=shared_axes)
    assert torch.equal(made, function)
    whole = mask
    if is_causal:
        tril = torch.ones(6, 6, dtype=torch.bool).tril()
        whole = (
            tril if mask is None else mask & tril if mask.dtype is torch.bool else mask.masked_fill(~tril, -math.inf)
        )
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, k, v, attn_mask=made), seeded(5, manual, q, k, v, whole, layer)
    )


def test_mask_where_nothing_is_dropped_is_the_one_given() -> None:
    q = torch.randn(2, 3, 4, 5)
    mask = torch.ones(4, 4, dtype=torch.bool)
    tril = mask.tril()
    for options in ({"training": False}, {"p": 0.0}):
        assert drop_key_mask(q, q, **options) is None
        assert drop_key_mask(q, q, attn_mask=mask, **options) is mask
        made = drop_key_mask(q, q, attn_mask=mask, is_causal=True, **options)
        assert made is not None
        assert torch.equal(made, tril)
    assert DropKey(0.5).eval().attn_mask(q, q, mask) is mask


def test_gradient_of_a_bias_given_as_mask() -> None:
    q = torch.randn(2, 3, 4, 5)
    bias = torch.randn(3, 4, 4, requires_grad=True)
    made = drop_key_mask(q, q, 0.5, attn_mask=bias)
    assert made is not None
    made[made.isfinite()].sum().backward()
    assert torch.equal(bias.grad, made.isfinite().sum(0).float())


def test_eval_and_keep_prob_one_return_the_input_itself() -> None:
    x = torch.randn(3, 4, 2, 2)
    assert drop_key(x, 0.5, training=False) is x
    assert DropKey(0.5).eval()(x) is x
    assert drop_key(x, 0.0) is x
    after = [seeded(1, lambda k: (drop_key(x, keep_prob=k), torch.rand(2))[1], k) for k in (1.0, 0.5)]
    assert torch.equal(*after)


def test_rows_without_a_key_to_see_stay_as_they_are() -> None:
    x = torch.full((2, 5), -math.inf)
    assert torch.equal(drop_key(x, 0.9), x)
    least = torch.full((2, 5), torch.finfo(torch.float32).min)
    assert torch.equal(drop_key(least, 0.9), least)
    assert drop_key(torch.ones(3, 0), 0.5).shape == (3, 0)
    assert drop_key(torch.ones(0, 3), 0.5).shape == (0, 3)


def test_nothing_kept_is_refused() -> None:
    message = r"^keep_prob must be in \(0, 1\] for drop_key, got 0.0: at least one key stays$"
    x = torch.ones(2, 3)
    for call in (
        lambda: DropKey(1.0),
        lambda: drop_key(x, keep_prob=0),
        lambda: drop_key_mask(x, x, 1.0),
        lambda: drop_key(x, keep_prob=torch.tensor([0.5, 0.0, 1.0])),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_rates_can_be_a_tensor() -> None:
    k = torch.tensor([1.0, 0.5, 1e-9]).reshape(3, 1)
    kept = drop_key(torch.ones(3, 1000), keep_prob=k).isfinite().sum(1)
    assert kept[0] == 1000
    assert 350 < kept[1] < 650
    assert kept[2] == 1


def test_wrong_inputs() -> None:
    x = torch.ones(2, 3, 4, 5)
    with pytest.raises(
        ValueError, match=r"^shared_axes must leave the last dimension, the keys, to themselves, got -1$"
    ):
        drop_key(x, shared_axes=-1)
    with pytest.raises(ValueError, match=r"^shared_axes must be in \[-4, 4\)"):
        drop_key(x, shared_axes=4)
    with pytest.raises(
        ValueError, match=r"^drop_key takes logits with the keys in the last dimension, got a 0-D tensor$"
    ):
        drop_key(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="result type Float"):
        drop_key(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^key must be a tensor of shape \(..., time, features\), got \(5,\)$"):
        drop_key_mask(x, torch.ones(5))
    with pytest.raises(ValueError, match=r"^query must be a tensor of shape \(..., time, features\), got NoneType$"):
        drop_key_mask(None, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^attn_mask must be a tensor or None, got list$"):
        drop_key_mask(x, x, attn_mask=[True])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^attn_mask must be bool, .* got torch.int64$"):
        drop_key_mask(x, x, attn_mask=torch.ones(4, 4, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"^attn_mask must broadcast against the logits' shape \(2, 3, 4, 4\), got \(3,\)"
    ):
        drop_key_mask(x, x, attn_mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="give the rate as p or as keep_prob"):
        drop_key(x, 0.5, keep_prob=0.5)


def test_seeds_generators_frozen_masks_and_copies() -> None:
    x = torch.randn(4, 8, 9)
    assert torch.equal(seeded(2, drop_key, x), seeded(2, DropKey(), x))
    first, second = (drop_key(x, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(drop_key(x), drop_key(x))
    model = nn.Sequential(DropKey(0.3, shared_axes=-2))
    with torchdrop.frozen_masks(model, seed=1):
        assert torch.equal(model(x), model(x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(seeded(1, twin, x), seeded(1, model, x))
    torchdrop.set_keep_prob(model, {"0": 0.9})
    assert torchdrop.keep_probs(model) == {"0": 0.9}
    assert model.state_dict() == {}
    assert repr(model[0]) == "DropKey(p=0.1, shared_axes=-2)"


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(randomness: str) -> None:
    kept = torch.func.vmap(lambda x: drop_key(x, 0.5), randomness=randomness)(torch.ones(3, 4, 20)).isfinite()
    assert torch.equal(kept[0], kept[1]) == (randomness == "same")
    q = torch.ones(3, 4, 20, 2)
    made = torch.func.vmap(lambda q: drop_key_mask(q, q, 0.5, is_causal=True), randomness=randomness)(q)
    assert torch.equal(made[0], made[1]) == (randomness == "same")
    assert made.any(-1).all()
    assert torch.func.vmap(lambda x: drop_key(x, 0.0))(torch.ones(3, 4, 20)).isfinite().all()
    whole = torch.func.vmap(lambda q: drop_key_mask(q, q, 0.0, is_causal=True))(q)
    assert torch.equal(whole, torch.ones(4, 20, 20, dtype=torch.bool).tril()[:3])


@pytest.mark.parametrize("queries", [(1, 4, 7, 8), (4, 7, 8), (7, 8)])
def test_the_mask_has_the_shape_of_the_logits_where_all_samples_share_their_queries(queries: tuple[int, ...]) -> None:
    query, key = torch.randn(queries), torch.randn(3, 4, 9, 8)
    mask = drop_key_mask(query, key, 0.5, attn_mask=torch.ones(3, 1, 7, 9, dtype=torch.bool))
    assert mask is not None
    assert mask.shape == (query @ key.mT).shape
    assert not torch.equal(mask[0], mask[1])
    logits = seeded(1, drop_key, query @ key.mT, 0.5)
    assert torch.equal(logits.isfinite(), seeded(1, drop_key_mask, query, key, 0.5))


def test_keys_of_fewer_heads_than_queries() -> None:
    mask = drop_key_mask(torch.randn(2, 8, 5, 4), torch.randn(2, 2, 6, 4), 0.5)
    assert mask is not None
    assert mask.shape == (2, 8, 5, 6)


class Attention(nn.Module):
    def __init__(self, by_mask: bool) -> None:
        super().__init__()
        self.by_mask, self.drop_key, self.qkv = by_mask, DropKey(0.5), nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.by_mask:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.drop_key.attn_mask(q, k))
        return self.drop_key(q @ k.mT / 2).softmax(-1) @ v


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
@pytest.mark.parametrize("by_mask", [False, True])
def test_monte_carlo_fires_with_masks_that_do_not_depend_on_the_batch(by_mask: bool) -> None:
    model, x = Attention(by_mask).eval(), torch.randn(7, 5, 4)
    with torchdrop.mc_dropout(model, seed=1) as report:
        first = model(x)
        assert [s.module for s in report.sources if s.active] == ["" if by_mask else "drop_key"]
    with torchdrop.mc_dropout(model, seed=1):
        torch.testing.assert_close(model(x[:2]), first[:2])
    results = [
        torchdrop.mc_predict(model, x, samples=12, seed=3, strategy=strategy, task="regression").mean
        for strategy in ("loop", "vectorized", "repeated")
    ]
    assert not torch.allclose(results[0], model(x))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.slow
@pytest.mark.parametrize("by_mask", [False, True])
def test_compiled_without_breaks_and_rates_without_recompilation(by_mask: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, x = Attention(by_mask), torch.randn(6, 5, 4, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for p in (0.5, 0.2, 0.9):
        model.drop_key.p = p
        torch.testing.assert_close(seeded(1, compiled, x), seeded(1, model, x))
    assert counter.frame_count == 1
    function = torch.compile(lambda x: drop_key(x, 0.3, shared_axes=-2), fullgraph=True)
    torch.testing.assert_close(seeded(1, function, x), seeded(1, drop_key, x, 0.3, shared_axes=-2))

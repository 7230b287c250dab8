"""DropHead: the expectation, the sum of scales, at least one head, and the package's common behavior."""

from __future__ import annotations

import copy
import itertools
import pickle
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.seeding import seeded
from tests.statistical import check_rate, draws_for
from torchdrop.core import sites
from torchdrop.kernels.mask_params import ONE
from torchdrop.layers.drop_head import DropHead, drop_head


def every_draw(monkeypatch: pytest.MonkeyPatch, heads: int, levels: int) -> int:
    """Makes the draws of sample n the n-th of all combinations of `levels` equidistant ones; gives their number."""
    grid = torch.tensor(list(itertools.product(range(levels), repeat=heads))) * (ONE // levels)
    monkeypatch.setattr(sites, "random_bits", lambda like, shape, generator: grid.reshape(shape))
    return len(grid)


def heads_kept(y: Tensor) -> Tensor:
    """Of (samples, heads, time, features), after a check that a head is dropped as a whole."""
    kept = (y != 0).flatten(2)
    assert torch.equal(kept.all(-1), kept.any(-1))
    return kept.all(-1)


@pytest.mark.parametrize(
    ("heads", "levels", "k"), [(2, 8, 0.125), (3, 4, 0.5), (4, 4, 0.25), (4, 4, 0.75), (1, 4, 0.5)]
)
def test_expectation_is_the_input_by_enumeration(
    heads: int, levels: int, k: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = every_draw(monkeypatch, heads, levels)
    y = drop_head(torch.ones(samples, heads, 2, 1, dtype=torch.float64), keep_prob=k)
    kept = heads_kept(y)
    for head in range(heads):
        scales = (Fraction(heads, int(row.sum())) for row in kept if row[head])
        assert sum(scales) == samples
    expected = kept * heads / kept.sum(1, keepdim=True).double()
    assert torch.equal(y, expected[..., None, None].expand_as(y))


@pytest.mark.parametrize(("heads", "k"), [(2, 0.125), (3, 0.5), (4, 0.75)])
def test_probability_of_a_head_by_enumeration(heads: int, k: float, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = 8
    samples = every_draw(monkeypatch, heads, levels)
    kept = heads_kept(drop_head(torch.ones(samples, heads, 1, 1), keep_prob=k))
    grid = torch.tensor(list(itertools.product(range(levels), repeat=heads)))
    ties = (grid == grid.amin(1, keepdim=True)).sum(1) > 1
    alone = kept[~ties].double().mean(0)
    below = (grid < k * levels)[~ties].double()
    none = (below.sum(1) == 0).double().mean() / heads
    assert torch.allclose(alone, below.mean(0) + none, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sum_of_scales_is_exact(dtype: torch.dtype) -> None:
    heads = 12
    y = drop_head(torch.ones(200, heads, 1, 1, dtype=dtype), keep_prob=0.3)[..., 0, 0]
    number = (y != 0).sum(1)
    assert number.unique().numel() > 4
    exact = torch.tensor([heads / n for n in number.tolist()], dtype=torch.float64).to(dtype)
    assert torch.equal(y.amax(1), exact)
    assert torch.equal((y != 0) * exact[:, None], y)


@pytest.mark.parametrize("k", [2.0**-32, 1e-6, 0.1, 0.5])
def test_never_all_heads(k: float) -> None:
    kept = heads_kept(drop_head(torch.ones(4000, 4, 1, 1), keep_prob=k))
    assert kept.any(1).all()
    if k <= 1e-6:
        assert kept.sum(1).max() == 1
        assert kept.any(0).all()


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "k"), [(2, 0.1), (4, 0.5), (8, 0.9)])
def test_rate_of_a_head_is_k_plus_its_share_of_the_rescue(heads: int, k: float) -> None:
    rate = k + (1 - k) ** heads / heads
    n = draws_for(rate, 0.01)
    kept = heads_kept(drop_head(torch.ones(n, heads, 1, 1), keep_prob=k))
    for head in range(heads):
        check_rate(int(kept[:, head].sum()), n, rate, 0.01)


def test_masks_differ_between_samples_and_calls() -> None:
    x = torch.ones(64, 8, 3, 2)
    first, second = heads_kept(drop_head(x)), heads_kept(drop_head(x))
    assert not torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) > 20


def test_layouts_give_the_same_masks() -> None:
    x = torch.randn(6, 4, 5, 3)
    y = seeded(1, drop_head, x, 0.4)
    assert torch.equal(seeded(1, drop_head, x.transpose(1, 2), 0.4, dim=2), y.transpose(1, 2))
    assert torch.equal(seeded(1, drop_head, x.transpose(1, 2), 0.4, dim=-2), y.transpose(1, 2))
    side_by_side = x.transpose(1, 2).flatten(2)
    assert torch.equal(seeded(1, drop_head, side_by_side, 0.4, heads=4), y.transpose(1, 2).flatten(2))
    assert torch.equal(seeded(1, DropHead(0.4, heads=4), side_by_side), y.transpose(1, 2).flatten(2))
    one = seeded(1, drop_head, x[0], 0.4, dim=0)
    assert torch.equal(one[None], seeded(1, drop_head, x[:1], 0.4))
    strided = torch.empty(6, 5, 3, 4).permute(0, 3, 1, 2).copy_(x)
    assert torch.equal(seeded(1, drop_head, strided, 0.4), y)


def test_gradient_has_the_mask_and_scale_of_forward() -> None:
    x = torch.randn(5, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    factor = seeded(3, drop_head, torch.ones_like(x), 0.5)
    assert 0 < (factor == 0).sum() < factor.numel()
    y = seeded(3, drop_head, x, 0.5)
    assert torch.equal(y, x * factor)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], factor)
    few = x[:2, :, :1, :1].detach().requires_grad_()
    assert 0 < (seeded(3, drop_head, few, 0.5) == 0).sum() < few.numel()
    assert torch.autograd.gradcheck(lambda x: seeded(3, drop_head, x, 0.5), few)
    assert torch.autograd.gradgradcheck(lambda x: seeded(3, drop_head, x.sin(), 0.5), few)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once_and_dropped_infinities_are_zero(dtype: torch.dtype) -> None:
    x = torch.randn(50, 7, 3, 2).to(dtype)
    y, wide = seeded(1, drop_head, x, 0.4), seeded(1, drop_head, x.float(), 0.4)
    assert y.dtype == dtype
    assert torch.equal(y, wide.to(dtype))
    worst = torch.full((50, 7, 3, 2), torch.inf, dtype=dtype)
    worst[::2] = torch.nan
    y = drop_head(worst, 0.5)
    assert set(y[1::2].unique().tolist()) == {0.0, torch.inf}
    assert (y[::2] == 0).any()
    x.requires_grad_()
    (seeded(1, drop_head, x, 0.4).float() * torch.inf).sum().backward()
    assert x.grad is not None
    assert not x.grad.isnan().any()


def test_eval_and_keep_prob_one_return_the_input_itself() -> None:
    x = torch.randn(3, 4, 2, 2)
    assert drop_head(x, 0.5, training=False) is x
    assert DropHead(0.5).eval()(x) is x
    assert drop_head(x, 0.0) is x
    after = [seeded(1, lambda k: (drop_head(x, keep_prob=k), torch.rand(2))[1], k) for k in (1.0, 0.5)]
    assert torch.equal(*after)


def test_nothing_kept_is_refused() -> None:
    message = r"^keep_prob must be in \(0, 1\] for drop_head, got 0.0: at least one head stays$"
    x = torch.ones(2, 3, 1, 1)
    for call in (
        lambda: DropHead(1.0),
        lambda: drop_head(x, keep_prob=0),
        lambda: drop_head(x, keep_prob=torch.tensor([0.5, 0.0]).reshape(2, 1, 1, 1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    layer = DropHead(0.5)
    with pytest.raises(ValueError, match=message):
        layer.p = 1
    assert layer.p == 0.5


def test_rates_of_each_sample() -> None:
    k = torch.tensor([1.0, 0.5, 1e-9]).reshape(3, 1, 1, 1)
    kept = heads_kept(drop_head(torch.ones(3, 200, 1, 1), keep_prob=k)).sum(1)
    assert kept[0] == 200
    assert 60 < kept[1] < 140
    assert kept[2] == 1
    with pytest.raises(ValueError, match=r"^keep_prob must be the same for all heads of a sample, got one that varies"):
        drop_head(torch.ones(3, 2, 1, 1), keep_prob=torch.tensor([0.5, 0.6]).reshape(2, 1, 1))
    with pytest.raises(ValueError, match="does not broadcast"):
        drop_head(torch.ones(3, 2, 1, 1), keep_prob=torch.full((3, 1, 4, 1), 0.5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 1, "heads": 2}, TypeError, "^give dim or heads, not both: got dim=1 and heads=2$"),
        ({"dim": 1.0}, TypeError, "^dim must be an integer, got float$"),
        ({"heads": True}, TypeError, "^heads must be an integer, got bool$"),
        ({"heads": 0}, ValueError, "^heads must be at least 1, got 0$"),
        ({"p": 0.5, "keep_prob": 0.5}, TypeError, "give the rate as p or as keep_prob"),
        ({"p": 1.5}, ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        drop_head(torch.ones(2, 4, 1, 6), **options)
    with pytest.raises(error, match=message):
        DropHead(**options)


def test_wrong_inputs() -> None:
    with pytest.raises(ValueError, match=r"^dim must be in \[-2, 2\) for a 2-D input, got 2$"):
        drop_head(torch.ones(2, 4), dim=2)
    with pytest.raises(ValueError, match=r"^dim must be in \[-1, 1\) for a 1-D input, got 1$"):
        drop_head(torch.ones(2))
    for shape in ((2, 3, 10), (8,)):
        with pytest.raises(ValueError, match=r"^heads must divide the last dimension of a .*: 4 for an input of \("):
            drop_head(torch.ones(shape), heads=4)
    with pytest.raises(RuntimeError, match="result type Float"):
        drop_head(torch.ones(2, 4, 1, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="must be Tensor"):
        drop_head([1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 4, 0, 3), (2, 0, 2, 3)])
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, requires_grad=True)
    y = drop_head(x, 0.5)
    y.sum().backward()
    assert y.shape == shape
    assert drop_head(torch.ones(2, 0, 8), heads=4).shape == (2, 0, 8)


def test_seeds_generators_frozen_masks_and_checkpointing() -> None:
    x = torch.randn(16, 8, 2, 3)
    assert torch.equal(seeded(2, drop_head, x), seeded(2, DropHead(), x))
    first, second = (drop_head(x, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    model = nn.Sequential(DropHead(0.5))
    with torchdrop.frozen_masks(model, seed=1):
        assert torch.equal(model(x), model(x))
    leaf = x.clone().requires_grad_()
    y = checkpoint(lambda x: model(x).sin(), leaf, use_reentrant=False)
    factor = torch.where(y == 0, 0.0, 1.0)
    y.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad == 0, factor == 0)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(randomness: str) -> None:
    kept = torch.func.vmap(lambda x: drop_head(x, 0.5), randomness=randomness)(torch.ones(5, 8, 6, 1, 1)) != 0
    assert torch.equal(kept[0], kept[1]) == (randomness == "same")
    assert torch.func.vmap(lambda x: drop_head(x, 0.0))(torch.ones(3, 8, 6, 1, 1)).all()
    factor = torch.func.grad(lambda x: drop_head(x, 0.5).sum())(torch.ones(20, 4, 1, 1))
    assert torch.allclose(factor.sum(1), torch.full((20, 1, 1), 4.0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.drop_head = DropHead(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 2)).movedim(-3, 0).transpose(-3, -2)
        y = self.drop_head(F.scaled_dot_product_attention(q, k, v))
        return self.out(y.transpose(-3, -2).flatten(-2))


def test_monte_carlo_fires_with_masks_that_do_not_depend_on_the_batch() -> None:
    model = Attention().eval()
    x = torch.randn(7, 5, 8)
    with torchdrop.mc_dropout(model, seed=1) as report:
        first = model(x)
        assert [source.module for source in report.sources if source.active] == ["drop_head"]
    with torchdrop.mc_dropout(model, seed=1):
        torch.testing.assert_close(model(x[:2]), first[:2])
    assert not torch.allclose(first, model(x))
    results = [
        torchdrop.mc_predict(model, x, samples=12, seed=3, strategy=strategy, task="regression").mean
        for strategy in ("loop", "vectorized", "repeated")
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_rates_by_name_schedules_and_copies() -> None:
    model = Attention()
    torchdrop.set_keep_prob(model, {"drop_head": 0.9})
    assert torchdrop.keep_probs(model) == {"drop_head": 0.9}
    scheduler = torchdrop.KeepProbScheduler(model, {"drop_head": torchdrop.schedules.v_shaped(0.8, 1.0, 4)})
    seen = []
    for _ in range(5):
        seen.append(round(model.drop_head.p, 6))  # type: ignore[arg-type]
        scheduler.step()
    assert seen == [0.2, 0.1, 0.0, 0.1, 0.2]
    layer = DropHead(0.3, heads=2)
    x = torch.randn(9, 3, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(seeded(1, twin, x), seeded(1, layer, x))
    assert layer.state_dict() == {}
    assert isinstance(layer, nn.modules.dropout._DropoutNd)
    assert repr(layer) == "DropHead(p=0.3, heads=2)"
    assert repr(DropHead(0.3)) == "DropHead(p=0.3, dim=1)"


def test_before_the_projection_of_a_model_that_exists() -> None:
    model = Attention()
    model.drop_head = nn.Identity()  # type: ignore[assignment]
    model.dropped = DropHead(0.5, heads=4)  # type: ignore[assignment]
    model.out.register_forward_pre_hook(lambda _, args: (model.dropped(args[0]),))
    own, x = Attention(), torch.randn(3, 5, 8)
    own.load_state_dict(model.state_dict())
    torch.testing.assert_close(seeded(1, model, x), seeded(1, own, x))
    assert torchdrop.keep_probs(model) == {"dropped": 0.5}


@pytest.mark.slow
def test_compiled_without_breaks_and_rates_without_recompilation() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Attention()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(6, 5, 8, requires_grad=True)
    for p in (0.5, 0.2, 0.9, 0.0):
        model.drop_head.p = p
        torch.testing.assert_close(seeded(1, compiled, x), seeded(1, model, x))
    assert counter.frame_count == 1
    function = torch.compile(lambda x: drop_head(x, 0.3), fullgraph=True)
    x = torch.randn(6, 4, 3, 2)
    torch.testing.assert_close(seeded(1, function, x), seeded(1, drop_head, x, 0.3))

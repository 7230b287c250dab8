"""Masksembles: fixed masks that are saved, batches of any size, and a mean over the masks that is the input."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap

import torchdrop
from tests.statistical import deviation
from torchdrop.layers.masksembles import Masksembles, masksembles, masksembles_masks, masksembles_predict


def blocks(layer: Masksembles, x: Tensor) -> Tensor:
    """What every mask makes of x: (n, B, ...)."""
    return layer(torch.cat([x] * layer.n)).unflatten(0, (layer.n, len(x)))


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 4.0, 50.0])
@pytest.mark.parametrize(("channels", "n"), [(16, 4), (10, 3), (37, 8), (7, 7)])
def test_expectation_over_the_masks_is_the_input_in_every_channel(channels: int, n: int, scale: float) -> None:
    layer = Masksembles(channels, n, scale)
    x = torch.randn(3, channels, 2, dtype=torch.float64)
    torch.testing.assert_close(blocks(layer, x).mean(0), x, rtol=1e-14, atol=1e-14)
    values = blocks(layer, torch.ones(1, channels, dtype=torch.float64))[:, 0]
    assert torch.equal(values != 0, layer.masks)


def test_a_saved_model_has_the_same_masks() -> None:
    model = nn.Sequential(nn.Linear(3, 16), Masksembles(16, 4), nn.Linear(16, 2))
    other = nn.Sequential(nn.Linear(3, 16), Masksembles(16, 4), nn.Linear(16, 2))
    assert not torch.equal(model[1].masks, other[1].masks)  # type: ignore[arg-type]
    assert list(model[1].state_dict()) == ["masks"]
    other.load_state_dict(model.state_dict())
    x = torch.randn(9, 3)
    assert torch.equal(model(x), other(x))
    assert torch.equal(model[1].masks, other[1].masks)  # type: ignore[arg-type]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.masks"):
        other.load_state_dict(nn.Sequential(nn.Linear(3, 16), Masksembles(16, 5), nn.Linear(16, 2)).state_dict())


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 7, 8, 12, 30])
def test_any_batch_size_is_cut_into_blocks_that_differ_by_one_at_most(batch: int) -> None:
    layer = Masksembles(12, 4)
    y = layer(torch.ones(batch, 12))
    members = [i * 4 // batch for i in range(batch)]
    assert torch.equal(y != 0, layer.masks[members])
    counts = [members.count(j) for j in range(4)]
    assert max(counts) - min(counts) <= 1
    assert torch.equal(layer.eval()(torch.ones(batch, 12)), y)


def test_where_n_divides_the_batch_the_blocks_are_those_of_the_authors_code() -> None:
    layer, x = Masksembles(12, 4), torch.randn(20, 12, dtype=torch.float64)
    scale = 4 / layer.masks.sum(0).double()
    expected = [part * mask * scale for part, mask in zip(x.split(5), layer.masks, strict=True)]
    torch.testing.assert_close(layer(x), torch.cat(expected))


def test_eval_mode_cycles_the_masks() -> None:
    layer, x = Masksembles(12, 4), torch.ones(4, 12)
    assert torch.equal(layer.eval()(x), layer.train()(x))
    assert torch.equal(layer(x) != 0, layer.masks)


@given(channels=st.integers(1, 60), n=st.integers(1, 9), scale=st.floats(1.0, 30.0), seed=st.integers(0, 99))
def test_every_mask_keeps_as_many_channels_and_every_channel_has_a_mask(
    channels: int, n: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    try:
        masks = masksembles_masks(channels, n, scale)
    except ValueError:
        reject()
    assert masks.shape == (n, channels)
    assert masks.dtype == torch.bool
    published = channels / (scale * (1 - (1 - 1 / scale) ** n))
    kept = masks.sum(1)
    assert (kept == kept[0]).all()
    assert kept[0] == max(-(-channels // n), round(published))
    assert masks.any(0).all()


def overlap(channels: int, n: int, kept: float) -> float:
    """The expected number of channels that two masks share, each with its own and a random subset of the others."""
    own = channels / n
    q = (kept - own) / (channels - own)
    return 2 * own * q + (channels - 2 * own) * q * q


@pytest.mark.parametrize(("n", "scale"), [(4, 1.5), (4, 2.0), (4, 3.0), (8, 2.0), (5, 6.0), (16, 4.0)])
def test_the_overlap_is_that_of_the_paper_up_to_five_per_cent(n: int, scale: float) -> None:
    kept = 120 / (scale * (1 - (1 - 1 / scale) ** n))
    assert 0.95 < overlap(120, n, kept) / (kept / scale) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("n", "scale"), [(4, 2.0), (5, 6.0)])
def test_masks_overlap_as_random_subsets_do(n: int, scale: float) -> None:
    channels, repeats, shared = 120, 2000, 0
    for _ in range(repeats):
        masks = masksembles_masks(channels, n, scale)
        shared += int((masks[0] & masks[1]).sum())
    kept = int(masks[0].sum())
    # Two hypergeometric numbers a pair, each at least as concentrated as its binomial one (Hoeffding, 1963).
    slack = 2 * deviation(repeats * (kept - channels // n), 0.25, 1e-9 / 2) / repeats
    assert abs(shared / repeats - overlap(channels, n, kept)) < slack < 1


def test_channels_and_masks_are_treated_alike() -> None:
    total = torch.zeros(4, 10)
    for _ in range(500):
        total += masksembles_masks(10, 4, 2.0)
    kept = int(masksembles_masks(10, 4, 2.0)[0].sum())
    slack = deviation(500, 0.25, 1e-9 / 40) / 500
    assert (total / 500 - kept / 10).abs().max() < slack


def test_extremes_of_the_scale() -> None:
    assert masksembles_masks(20, 4, 1.0).all()
    assert masksembles_masks(20, 1, 3.0).all()
    separate = masksembles_masks(20, 4, 1e300)
    assert torch.equal(separate.sum(0), torch.ones(20, dtype=torch.int64))
    assert torch.equal(separate.sum(1), torch.full((4,), 5))


def test_seeds_and_generators_govern_the_masks() -> None:
    torch.manual_seed(3)
    first = masksembles_masks(64, 4)
    assert not torch.equal(masksembles_masks(64, 4), first)
    torch.manual_seed(3)
    assert torch.equal(Masksembles(64, 4).masks, first)
    made = [Masksembles(64, 4, generator=torch.Generator().manual_seed(5)).masks for _ in range(2)]
    assert torch.equal(*made)
    with torch.device("meta"):
        assert Masksembles(64, 4).masks.device.type == "cpu"


@pytest.mark.parametrize(
    ("channels", "n", "scale"), [(16, 4, 1.1), (8, 28, 5.0), (5, 10, 2.0), (3, 3, 2.0), (4, 3, 5.0)]
)
def test_masks_all_differ_where_that_is_possible(channels: int, n: int, scale: float) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        masks = masksembles_masks(channels, n, scale)
        assert len(masks.unique(dim=0)) == n
        assert masks.any(0).all()
        assert len(masks.sum(1).unique()) == 1


def test_masks_are_made_on_the_default_device_and_follow_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        assert Masksembles(16, 4)(torch.ones(3, 16)).shape == (3, 16)
    masks = masksembles_masks(16, 4)
    assert masksembles(torch.ones(3, 16, device="meta"), masks).device.type == "meta"
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: sent.append(device) or tensor)
    sent: list[Any] = []
    Masksembles(16, 4)
    assert sent == [torch.device("cuda", 1)]


def test_channels_may_be_in_any_dimension_but_the_first() -> None:
    layer = Masksembles(6, 3)
    last = Masksembles(6, 3, dim=-1)
    last.load_state_dict(layer.state_dict())
    x = torch.randn(9, 6, 4, 5)
    assert torch.equal(last(x.movedim(1, -1)), layer(x).movedim(1, -1))
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))
    assert torch.equal(layer(x.repeat_interleave(2, 3)[..., ::2]), layer(x))
    tokens = masksembles(x.flatten(2).transpose(1, 2), layer.masks, dim=2)
    assert torch.equal(tokens.transpose(1, 2).unflatten(2, (4, 5)), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_converted_models(dtype: torch.dtype) -> None:
    layer = Masksembles(16, 4).to(dtype)
    assert layer.masks.dtype == torch.bool
    x = torch.linspace(-15000, 15000, 12 * 16).reshape(12, 16).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert torch.equal(y, layer(x.float()).to(dtype))


def test_what_is_masked_is_exactly_zero_and_gradients_pass_the_mask() -> None:
    layer = Masksembles(8, 4)
    y = layer(torch.full((4, 8), torch.inf))
    assert torch.equal(y == 0, ~layer.masks)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], layer(torch.ones_like(x)))
    assert torch.autograd.gradcheck(layer, (x,))


def test_members_are_predicted_in_one_forward() -> None:
    model = nn.Sequential(nn.Linear(3, 16), Masksembles(16, 4), nn.ReLU(), nn.Linear(16, 12), Masksembles(12, 4))
    x = torch.randn(5, 3)
    members = masksembles_predict(model.eval(), x)
    assert members.shape == (4, 5, 12)
    for j in range(4):
        alone = model[0](x)
        alone = torch.where(model[1].masks[j], alone * (4 / model[1].masks.sum(0)), 0)  # type: ignore[index, operator]
        alone = model[3](model[2](alone))
        alone = torch.where(model[4].masks[j], alone * (4 / model[4].masks.sum(0)), 0)  # type: ignore[index, operator]
        torch.testing.assert_close(members[j], alone)
    assert (members.var(0) > 0).any()


def test_vmap_over_batches() -> None:
    layer, x = Masksembles(6, 3), torch.randn(4, 9, 6)
    assert torch.equal(vmap(layer)(x), torch.stack([layer(part) for part in x]))


def test_monte_carlo_and_frozen_masks_leave_them_alone() -> None:
    model, x = nn.Sequential(Masksembles(8, 4), torchdrop.Dropout(0.5)).eval(), torch.ones(8, 8)
    with torchdrop.mc_dropout(model, seed=1) as report:
        y = model(x)
    assert len(report.active) == 1
    assert not y[model(x) == 0].any()


@pytest.mark.slow
def test_compiled_in_one_graph_for_all_batch_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = Masksembles(8, 4)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch in (8, 6, 11, 30):
        x = torch.randn(batch, 8)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 2  # the second is for batches of any size


def test_impossible_masks() -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        ((0, 4, 2.0), ValueError, r"^channels must be at least 1, got 0$"),
        ((16, 0, 2.0), ValueError, r"^n must be at least 1, got 0$"),
        ((16.0, 4, 2.0), TypeError, r"^channels must be an integer, got float$"),
        ((16, True, 2.0), TypeError, r"^n must be an integer, got bool$"),
        ((16, 4, "2"), TypeError, r"^scale must be a number, got str$"),
        ((16, 4, 0.9), ValueError, r"^scale must be finite and at least 1, got 0.9$"),
        ((16, 4, float("inf")), ValueError, r"^scale must be finite and at least 1, got inf$"),
        ((16, 4, float("nan")), ValueError, r"^scale must be finite and at least 1, got nan$"),
        (
            (16, 4, 1.01),
            ValueError,
            r"^scale must be larger, or channels more, for masks that differ: with 16 channels",
        ),
        ((1, 2, 2.0), ValueError, r"^scale must be larger, or channels more, for masks that differ"),
        (
            (4, 9, 6.0),
            ValueError,
            r"^n must be at most 4 for 4 channels of which each mask keeps 1 \(scale 6.0\), got 9",
        ),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            Masksembles(*arguments)
    with pytest.raises(TypeError, match=r"^generator must be a torch.Generator or None, got int$"):
        masksembles_masks(16, 4, generator=3)  # type: ignore[arg-type]


def test_other_errors() -> None:
    layer, masks = Masksembles(6, 3), torch.ones(3, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^input must have 6 channels in dimension 1, got 5 in the shape \(4, 5\)$"):
        layer(torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"^input must have its channels in dimension 1, got the shape \(6,\)$"):
        layer(torch.ones(6))
    with pytest.raises(ValueError, match=r"^input must have its channels in dimension -2, got the shape \(6, 3\)$"):
        masksembles(torch.ones(6, 3), masks, dim=-2)
    with pytest.raises(ValueError, match=r"^dim must not be 0, the dimension of the samples$"):
        Masksembles(6, 3, dim=0)
    with pytest.raises(TypeError, match=r"^dim must be an integer, got NoneType$"):
        Masksembles(6, 3, dim=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^masks must be a tensor of bools, got torch.float32$"):
        masksembles(torch.ones(6, 6), masks.float())
    with pytest.raises(ValueError, match=r"^masks must be \(n, channels\), got the shape \(6,\)$"):
        masksembles(torch.ones(6, 6), masks[0])
    with pytest.raises(RuntimeError, match=r"^result type Float can't be cast to the desired output type Long"):
        layer(torch.ones(3, 6, dtype=torch.int64))
    model = nn.Sequential(Masksembles(6, 3), Masksembles(6, 2))
    with pytest.raises(ValueError, match=r"^model must have Masksembles layers of one n, got n = 2, 3$"):
        masksembles_predict(model, torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"^model must have Masksembles layers of one n, got none$"):
        masksembles_predict(nn.Linear(6, 2), torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"^model must give a tensor with a row for each of 6 samples, got \(\)$"):
        masksembles_predict(nn.Sequential(layer, Mean()), torch.ones(2, 6))
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got function$"):
        masksembles_predict(masksembles, torch.ones(2, 6))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^input must be a Tensor, got list$"):
        masksembles_predict(layer, [1.0])  # type: ignore[arg-type]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()

"""Locked dropout: one mask for each sequence, whatever the layout; packed sequences; rates, seeds, messages."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import torchdrop
from tests.seeding import seeded
from tests.strategies import DTYPES
from torchdrop.core import sites
from torchdrop.kernels.mask_params import ONE, mask_params
from torchdrop.layers.locked import LockedDropout, locked_dropout

T, B, F = 5, 4, 6

layouts = pytest.mark.parametrize("batch_first", [False, True])


def ones(batch_first: bool = False, features: int = F) -> Tensor:
    return torch.ones((B, T, features) if batch_first else (T, B, features))


def packed(x: Tensor, lengths: list[int], batch_first: bool = False) -> PackedSequence:
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=False)


def padded(x: PackedSequence, batch_first: bool = False) -> Tensor:
    return pad_packed_sequence(x, batch_first=batch_first)[0]


@layouts
def test_mask_is_constant_over_time_different_per_sample_and_per_forward(batch_first: bool) -> None:
    layer = LockedDropout(0.5, batch_first=batch_first)
    x = ones(batch_first, 100)
    y, again = layer(x), layer(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    by_sample = y if batch_first else y.transpose(0, 1)
    assert torch.equal(by_sample, by_sample[:, :1].expand_as(by_sample))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(by_sample[:, 0], 2))
    assert not torch.equal(y, again)


def test_layouts_have_the_same_masks() -> None:
    y = seeded(1, locked_dropout, ones(False))
    assert torch.equal(seeded(1, locked_dropout, ones(True), batch_first=True), y.transpose(0, 1))


@pytest.mark.parametrize("k", [0.25, 0.5, 0.9])
def test_expectation_is_the_input_by_enumeration(k: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of packed sequences, whose masks can be put in."""
    q = mask_params(k).threshold / ONE
    x = pack_sequence([torch.tensor([[1.5, -2.0]] * 3).double(), torch.tensor([[3.0, 0.25]]).double()])
    mean = torch.zeros_like(x.data)
    for bits in itertools.product([False, True], repeat=4):
        monkeypatch.setattr(sites, "keep_mask", lambda *_, bits=bits: torch.tensor(bits).reshape(2, 2))
        weight = q ** sum(bits) * (1 - q) ** (4 - sum(bits))
        mean += weight * locked_dropout(x, keep_prob=k).data
    torch.testing.assert_close(mean, x.data, rtol=1e-12, atol=0)


def test_one_sequence_has_one_mask_in_either_layout() -> None:
    for batch_first in (False, True):
        y = LockedDropout(0.5, batch_first=batch_first)(torch.ones(T, 200))
        assert torch.equal(y, y[:1].expand_as(y))
        assert set(y.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [2, 5, 1, 3], [1, 2, 3, 5]])
@layouts
def test_packed_sequences_have_the_masks_of_padded_ones(lengths: list[int], batch_first: bool) -> None:
    x = torch.randn(ones(batch_first).shape)
    expected = packed(seeded(3, locked_dropout, x, 0.3, batch_first=batch_first), lengths, batch_first)
    y = seeded(3, LockedDropout(0.3, batch_first=batch_first), packed(x, lengths, batch_first))
    assert torch.equal(y.data, expected.data)
    for own, other in zip(y[1:], expected[1:], strict=True):
        assert torch.equal(own, other)


def test_packed_sequences_without_indices() -> None:
    x = pack_sequence([torch.ones(5, 50), torch.ones(3, 50)])
    assert x.sorted_indices is None
    y = padded(locked_dropout(x, 0.5))
    assert torch.equal(y[:, 0], y[:1, 0].expand(5, 50))
    assert torch.equal(y[:3, 1], y[:1, 1].expand(3, 50))
    assert not torch.equal(y[0, 0], y[0, 1])


@pytest.mark.parametrize("is_packed", [False, True])
def test_backward_uses_the_mask_of_forward(is_packed: bool) -> None:
    x = torch.randn(T, B, F, dtype=torch.float64, requires_grad=True)
    given = packed(x, [2, 5, 1, 3]) if is_packed else x
    y = locked_dropout(given, 0.5)
    y = y.data if isinstance(y, PackedSequence) else y
    data = given.data if isinstance(given, PackedSequence) else given
    (gradient,) = torch.autograd.grad(y.sum(), data)
    assert torch.equal(gradient, torch.where(y != 0, 2.0, 0.0).double())

    def fixed(z: Tensor) -> Tensor:
        out = seeded(1, locked_dropout, given._replace(data=z) if is_packed else z, 0.5)  # type: ignore[union-attr]
        return out.data if isinstance(out, PackedSequence) else out

    start = data.detach().requires_grad_()
    assert torch.autograd.gradcheck(fixed, start)
    assert torch.autograd.gradgradcheck(fixed, start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_packed", [False, True])
def test_half_types_are_rounded_once_and_what_is_dropped_is_zero(dtype: torch.dtype, is_packed: bool) -> None:
    x = torch.randn(T, B, 50).to(dtype)
    x[0, 0, :20] = torch.inf
    x[0, 1, :20] = torch.nan
    given = packed(x, [5] * B) if is_packed else x
    y = locked_dropout(given, keep_prob=0.3)
    y = padded(y) if isinstance(y, PackedSequence) else y
    assert y.dtype == dtype
    kept = y != 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(y[kept].nan_to_num(), (x.to(wide) * mask_params(0.3).scale).to(dtype)[kept].nan_to_num())
    assert not kept.all()


def test_eval_mode_and_keeping_all_return_the_input_itself() -> None:
    x, seq = ones(), packed(ones(), [2, 5, 1, 3])
    for given in (x, seq):
        assert LockedDropout(0.5).eval()(given) is given
        assert locked_dropout(given, 0.5, False) is given
        assert locked_dropout(given, 0.0) is given
    assert not locked_dropout(x, 1.0).any()
    assert not locked_dropout(seq, 1.0).data.any()


@pytest.mark.parametrize("is_packed", [False, True])
def test_what_later_layers_draw_does_not_depend_on_the_rate(is_packed: bool) -> None:
    x = packed(ones(), [2, 5, 1, 3]) if is_packed else ones()
    later = []
    for p in (0.0, 0.5):
        seeded(1, locked_dropout, x, p)
        later.append(torch.rand(()))
    assert later[0] == later[1]


def test_seeds() -> None:
    x = ones()
    assert torch.equal(seeded(1, locked_dropout, x), seeded(1, locked_dropout, x))
    first, second = (locked_dropout(x, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    own = [LockedDropout(generator=torch.Generator().manual_seed(4))(packed(x, [5] * B)) for _ in range(2)]
    assert torch.equal(own[0].data, own[1].data)
    model = nn.Sequential(LockedDropout(0.5))
    with torchdrop.frozen_masks(model):
        assert torch.equal(model(x), model(x))


@layouts
def test_rates_can_be_a_tensor(batch_first: bool) -> None:
    k = torch.tensor([1.0, 0.0, 0.5])
    y = locked_dropout(ones(batch_first, 3), keep_prob=k, batch_first=batch_first)
    assert (y[..., 0] == 1).all()
    assert not y[..., 1].any()
    seq = seeded(1, locked_dropout, packed(ones(False, 3), [2, 5, 1, 3]), keep_prob=k)
    number = seeded(1, locked_dropout, packed(ones(False, 3), [2, 5, 1, 3]), keep_prob=0.5)
    assert torch.equal(seq.data[:, 2], number.data[:, 2])
    assert (seq.data[:, 0] == 1).all()
    assert not seq.data[:, 1].any()


def test_inplace() -> None:
    x = torch.ones(T, B, F)
    assert LockedDropout(0.5, inplace=True)(x) is x
    assert (x == 0).any()
    seq = packed(ones(), [2, 5, 1, 3])
    with pytest.raises(ValueError, match=r"^inplace must be False for a PackedSequence: its data are copied$"):
        locked_dropout(seq, inplace=True)


def test_empty_batches() -> None:
    assert locked_dropout(torch.ones(T, 0, F)).shape == (T, 0, F)
    assert locked_dropout(torch.ones(0, T, F), batch_first=True).shape == (0, T, F)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap(randomness: str) -> None:
    y = torch.func.vmap(locked_dropout, randomness=randomness)(torch.ones(3, T, B, 50))
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert torch.equal(y[0], y[1]) == (randomness == "same")


class Packing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = LockedDropout(0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        seq = packed(x, [3 if n % 2 else 5 for n in range(len(x))], True)
        return pad_packed_sequence(self.drop(seq), batch_first=True, total_length=x.shape[1])[0]


@pytest.mark.parametrize("model", [nn.Sequential(LockedDropout(0.5, batch_first=True)), Packing()])
def test_monte_carlo_fires_with_masks_that_belong_to_rows(model: nn.Module) -> None:
    x = torch.ones(7, 5, 40)
    with torchdrop.mc_dropout(model.eval(), seed=1) as report:
        first = model(x)
        assert len(report.sources) == 1
    with torchdrop.mc_dropout(model, seed=1):
        again = model(x[:2])
    assert torch.equal(first[:2], again)
    y = first[:, :3]
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert not torch.equal(y[0], y[1])
    mean = torchdrop.mc_predict(model, x, samples=64, seed=2, task="regression").mean
    assert (mean[:, :3] - 1).abs().max() < 0.8


def test_rates_by_name_and_disabled() -> None:
    model = nn.Sequential(LockedDropout(0.5))
    torchdrop.set_keep_prob(model, {"0": 0.75})
    assert model[0].p == 0.25
    assert dict(torchdrop.keep_probs(model)) == {"0": 0.75}
    with torchdrop.disabled(model):
        assert torch.equal(model(ones()), ones())
    assert isinstance(model[0], nn.modules.dropout._DropoutNd)
    assert model.state_dict() == {}


def test_copies_and_pickles() -> None:
    layer = LockedDropout(keep_prob=0.75, batch_first=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer) == "LockedDropout(p=0.25, inplace=False, batch_first=True)"
        assert torch.equal(seeded(1, other, ones(True)), seeded(1, layer, ones(True)))


@pytest.mark.slow
def test_compiled_code_has_eager_masks_and_is_not_compiled_again_for_another_rate() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = LockedDropout(0.5)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for p in (0.5, 0.2, 0.7):
        layer.p = p
        assert torch.equal(seeded(1, compiled, ones()), seeded(1, layer, ones()))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiled_code_takes_packed_sequences_with_a_graph_break() -> None:
    layer, seq = LockedDropout(0.5), packed(ones(), [2, 5, 1, 3])
    y, expected = (seeded(1, call, seq) for call in (torch.compile(layer, backend="aot_eager"), layer))
    assert isinstance(y, PackedSequence)
    assert torch.equal(y.data, expected.data)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: locked_dropout(torch.ones(4)),
            ValueError,
            r"^locked_dropout takes sequences \(T, B, F\) with batch_first=False, or one sequence \(T, F\), got an "
            r"input of \(4,\): for other shapes name the time axes as dropout's shared_axes$",
        ),
        (
            lambda: LockedDropout(batch_first=True).eval()(torch.ones(2, 3, 4, 5)),
            ValueError,
            r"^locked_dropout takes sequences \(B, T, F\) with batch_first=True, .* got an input of \(2, 3, 4, 5\)",
        ),
        (
            lambda: locked_dropout(torch.ones(2, 3, 4), batch_first="no"),  # type: ignore[arg-type]
            TypeError,
            r"^batch_first must be True or False, got 'no'$",
        ),
        (
            lambda: locked_dropout([torch.ones(2)]),  # type: ignore[type-var]
            TypeError,
            r"^input must be a tensor or a PackedSequence, got list$",
        ),
        (
            lambda: locked_dropout(torch.ones(2, 3).long()),
            RuntimeError,
            "can't be cast to the desired output type Long",
        ),
        (lambda: LockedDropout(1.5), ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
        (lambda: LockedDropout(0.5, keep_prob=0.5), TypeError, "give the rate as p or as keep_prob, not both"),
        (lambda: LockedDropout(0.5, batch_first=1), TypeError, r"^batch_first must be True or False, got 1$"),
        (lambda: locked_dropout(ones(), keep_prob=torch.ones(5)), ValueError, "does not broadcast"),
    ],
)
def test_what_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

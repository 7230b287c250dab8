"""The noise in LSTM and GRU layers: what it does to each step, its expectation, its masks, seeds and rates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.seeding import seeded
from torchdrop.core import sites
from torchdrop.kernels.mask_params import ONE, mask_params
from torchdrop.layers.recurrent.lstm_gru import (
    RecurrentDropoutGRU,
    RecurrentDropoutLSTM,
    ZoneoutGRU,
    ZoneoutLSTM,
)

T, B, F, H = 5, 4, 3, 6
LENGTHS = [2, 5, 1, 3]

LAYERS: dict[str, Callable[..., Any]] = {
    "ZoneoutLSTM": lambda *a, **k: ZoneoutLSTM(*a, zoneout_hidden=0.3, zoneout_cell=0.5, **k),
    "ZoneoutGRU": lambda *a, **k: ZoneoutGRU(*a, zoneout_hidden=0.5, **k),
    "RecurrentDropoutLSTM": lambda *a, **k: RecurrentDropoutLSTM(*a, recurrent_dropout=0.5, **k),
    "RecurrentDropoutGRU": lambda *a, **k: RecurrentDropoutGRU(*a, recurrent_dropout=0.5, **k),
}

every = pytest.mark.parametrize("name", LAYERS)
paths = pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "plain"])  # with gradients, and without


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Those that layers draw in this test."""
    drawn: list[Tensor] = []
    original = sites.keep_mask

    def kept(*args: Any) -> Tensor:
        drawn.append(original(*args))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(sites, "keep_mask", kept)
    return drawn


def put_in(monkeypatch: pytest.MonkeyPatch, bits: Iterator[bool]) -> None:
    """Makes these the masks that layers draw."""

    def kept(like: Tensor, params: Any, shape: Any, generator: Any) -> Tensor:
        return torch.tensor([next(bits) for _ in range(torch.Size(shape).numel())]).reshape(tuple(shape))

    monkeypatch.setattr(sites, "keep_mask", kept)


def states(layer: Any, *batch: int) -> Any:
    h, c = torch.randn(2, 1, *batch, layer.hidden_size, dtype=layer.weight_hh_l0.dtype)
    return (h, c) if layer.mode == "LSTM" else h


def reference(layer: Any, x: Tensor, hx: Any, masks: list[Tensor]) -> tuple[Tensor, Any]:
    """One layer, step by step, from the definitions; masks have dimensions (batch, time, units)."""
    w, u, a, b = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0
    h, c = (hx[0][0], hx[1][0]) if layer.mode == "LSTM" else (hx[0], None)
    outputs = []
    for t, now in enumerate(x):
        step = [mask.expand(-1, len(x), -1)[:, t] for mask in masks]
        xs, hs = (now @ w.t() + a).chunk(w.shape[0] // H, 1), (h @ u.t() + b).chunk(w.shape[0] // H, 1)
        if layer.mode == "LSTM":
            i, f, g, o = (p + q for p, q in zip(xs, hs, strict=True))
            g = g.tanh()
        else:
            r, z = (xs[0] + hs[0]).sigmoid(), (xs[1] + hs[1]).sigmoid()
            g = (xs[2] + r * hs[2]).tanh()
        if isinstance(layer, (RecurrentDropoutLSTM, RecurrentDropoutGRU)):
            g = g * step[0] / (1 - layer.recurrent_dropout.p)
        if layer.mode == "LSTM":
            new = f.sigmoid() * c + i.sigmoid() * g
            state = o.sigmoid() * new.tanh()
        else:
            state = z * h + (1 - z) * g
        if isinstance(layer, (ZoneoutLSTM, ZoneoutGRU)):
            state = step[0] * state + ~step[0] * h
        if isinstance(layer, ZoneoutLSTM):
            new = step[1] * new + ~step[1] * c
        h, c = state, new if layer.mode == "LSTM" else None
        outputs.append(h)
    return torch.stack(outputs), (h[None], c[None]) if c is not None else h[None]


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [one for part in result for one in flat(part)]


@every
def test_outputs_and_gradients_are_those_of_the_definition(name: str, masks: list[Tensor]) -> None:
    layer = LAYERS[name](F, H, dtype=torch.float64)
    x, hx = torch.randn(T, B, F, dtype=torch.float64, requires_grad=True), states(layer, B)
    with torch.no_grad():
        plain = layer(x, hx)
        for a, b in zip(flat(plain), flat(reference(layer, x, hx, list(masks))), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    masks.clear()
    found = layer(x, hx)
    expected = reference(layer, x, hx, list(masks))
    assert 0 < torch.cat([mask.flatten() for mask in masks]).double().mean() < 1
    leaves = [x, *layer.parameters()]
    for a, b in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    weights = torch.randn(T, B, H, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((r[0] * weights).sum(), leaves) for r in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def enumerated(layer: Any, units: int, kept: list[float], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], Any]:
    """The mean over all masks of one step's final states, and those of eval mode, from given states."""
    x, hx = torch.randn(1, 1, F, dtype=torch.float64), states(layer, 1)
    means = [torch.zeros_like(part) for part in flat(hx)]
    for bits in itertools.product([False, True], repeat=units * len(kept)):
        put_in(monkeypatch, iter(bits))
        weight = 1.0
        for bit, k in zip(bits, [k for k in kept for _ in range(units)], strict=True):
            q = mask_params(k).threshold / ONE
            weight *= q if bit else 1 - q
        means = [mean + weight * part for mean, part in zip(means, flat(layer.train()(x, hx)[1]), strict=True)]
    return means, flat(layer.eval()(x, hx)[1])


@paths
@pytest.mark.parametrize("kind", [ZoneoutLSTM, ZoneoutGRU])
def test_eval_is_the_expectation_of_training_by_enumeration(
    kind: Any, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one step from given states, of h and of c."""
    rates = {"zoneout_hidden": 0.3, **({"zoneout_cell": 0.45} if kind is ZoneoutLSTM else {})}
    layer = kind(F, 3, dtype=torch.float64, **rates)
    with torch.set_grad_enabled(recorded):
        means, evaluated = enumerated(layer, 3, [1 - p for p in rates.values()], monkeypatch)
    for mean, part in zip(means, evaluated, strict=True):
        torch.testing.assert_close(mean, part, rtol=1e-12, atol=1e-13)


@paths
@pytest.mark.parametrize("kind", [RecurrentDropoutLSTM, RecurrentDropoutGRU])
def test_expectation_of_the_memory_is_that_without_dropout_by_enumeration(
    kind: Any, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = kind(F, 3, recurrent_dropout=0.3, dtype=torch.float64)
    with torch.set_grad_enabled(recorded):
        means, evaluated = enumerated(layer, 3, [0.7], monkeypatch)
    torch.testing.assert_close(means[-1], evaluated[-1], rtol=1e-9, atol=1e-10)  # c, or a GRU's h


@paths
def test_memory_is_never_masked(recorded: bool) -> None:
    """With every candidate dropped what remains is f c' in an LSTM and z h' in a GRU, in every unit."""
    x = torch.randn(1, B, F)
    for kind in (RecurrentDropoutLSTM, RecurrentDropoutGRU):
        layer = kind(F, H, recurrent_dropout=1.0)
        hx = states(layer, B)
        h, memory = hx if layer.mode == "LSTM" else (hx, hx)
        gates = x[0] @ layer.weight_ih_l0.t() + layer.bias_ih_l0 + h[0] @ layer.weight_hh_l0.t() + layer.bias_hh_l0
        gate = gates[:, H : 2 * H].sigmoid()  # f, or z
        with torch.set_grad_enabled(recorded):
            found = flat(layer(x, hx)[1])[-1]
        assert (found.grad_fn is not None) == recorded
        torch.testing.assert_close(found[0], gate * memory[0])
        assert (found != 0).all()


def test_with_rate_1_zoneout_never_changes_a_state() -> None:
    lstm = ZoneoutLSTM(F, H, zoneout_hidden=1.0, zoneout_cell=1.0)
    for training in (True, False):
        hx = states(lstm, B)
        output, (h, c) = lstm.train(training)(torch.randn(T, B, F), hx)
        assert torch.equal(h, hx[0])
        assert torch.equal(c, hx[1])
        assert torch.equal(output, hx[0].expand_as(output))


@every
def test_eval_mode_is_deterministic_and_that_of_torch_for_recurrent_dropout(name: str) -> None:
    layer, x = LAYERS[name](F, H).eval(), torch.randn(T, B, F)
    before = torch.get_rng_state()
    output = layer(x)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(layer(x)[0], output)
    stock = (nn.LSTM if layer.mode == "LSTM" else nn.GRU)(F, H)
    stock.load_state_dict(layer.state_dict())
    assert torch.allclose(stock(x)[0], output, atol=1e-6) == name.startswith("Recurrent")


@every
def test_one_mask_is_drawn_for_all_steps_of_each_layer_and_direction(name: str, masks: list[Tensor]) -> None:
    LAYERS[name](F, H, 2, bidirectional=True)(torch.randn(T, B, F))
    assert {tuple(mask.shape) for mask in masks} == {(B, T, H)}
    assert len(masks) == 4 * (2 if name == "ZoneoutLSTM" else 1)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("kind", [RecurrentDropoutLSTM, RecurrentDropoutGRU])
def test_one_mask_for_a_whole_sequence(kind: Any, masks: list[Tensor]) -> None:
    layer = kind(F, H, recurrent_dropout=0.5, per_step=False, dtype=torch.float64)
    x, hx = torch.randn(T, B, F).double(), states(layer, B)
    found = layer(x, hx)
    assert [tuple(mask.shape) for mask in masks] == [(B, 1, H)]
    for a, b in zip(flat(found), flat(reference(layer, x, hx, masks)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@every
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_have_the_masks_of_padded_ones(name: str, bidirectional: bool) -> None:
    layer = LAYERS[name](F, H, bidirectional=bidirectional)
    x = torch.randn(T, B, F)
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    found, last = seeded(3, layer, packed)
    found = pad_packed_sequence(found)[0]
    whole = seeded(3, layer, x)[0]
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[:length, row, :H], whole[:length, row, :H])
        torch.testing.assert_close(flat(last)[0][0, row], whole[length - 1, row, :H])
    if bidirectional:  # the longest one is not padded
        torch.testing.assert_close(found[:, 1], whole[:, 1])


@every
def test_masks_of_states_do_not_depend_on_the_size_of_the_batch(name: str) -> None:
    layer, x = LAYERS[name](F, H, 2, bidirectional=True), torch.randn(T, B, F)
    torch.testing.assert_close(seeded(3, layer, x[:, :2])[0], seeded(3, layer, x)[0][:, :2])


@every
def test_layouts_have_the_same_masks(name: str) -> None:
    layer, x = LAYERS[name](F, H), torch.randn(T, 1, F)
    expected = seeded(1, layer, x)[0]
    torch.testing.assert_close(seeded(1, layer, x[:, 0])[0], expected[:, 0])
    layer.batch_first = True
    torch.testing.assert_close(seeded(1, layer, x.transpose(0, 1))[0], expected.transpose(0, 1))


@every
def test_gradients_against_finite_differences(name: str) -> None:
    layer = LAYERS[name](1, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(2, 2, 1, dtype=torch.float64, requires_grad=True)

    def packed(x: Tensor) -> Tensor:
        given = pack_padded_sequence(x, torch.tensor([1, 2]), enforce_sorted=False)
        return seeded(1, layer, given)[0].data

    for call in (lambda x: seeded(1, layer, x)[0], packed):
        assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(packed, x)


@every
def test_activation_checkpointing_finds_its_masks(name: str) -> None:
    layer, x = LAYERS[name](F, H), torch.randn(T, B, F)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        seeded(1, run, x)[0].sum().backward()
        grads.append(layer.weight_hh_l0.grad.clone())
    torch.testing.assert_close(*grads)


@every
def test_seeds(name: str) -> None:
    layer, x = LAYERS[name](F, H), torch.randn(T, B, F)
    assert torch.equal(seeded(1, layer, x)[0], seeded(1, layer, x)[0])
    assert not torch.equal(layer(x)[0], layer(x)[0])
    with torchdrop.frozen_masks(layer):
        assert torch.equal(layer(x)[0], layer(x)[0])
    outputs = []
    for _ in range(2):
        own = seeded(5, LAYERS[name], F, H, 2, dropout=0.5, generator=torch.Generator().manual_seed(7))
        torch.rand(())
        outputs.append(own(x)[0])
    assert torch.equal(*outputs)


@every
def test_what_later_layers_draw_does_not_depend_on_the_rates(name: str) -> None:
    layer, x, later = LAYERS[name](F, H, 2), torch.randn(T, B, F), []
    for k in (0.5, 1.0):
        torchdrop.set_keep_prob(layer, {"*": k})
        seeded(1, layer, x)
        later.append(torch.rand(()))
    assert later[0] == later[1]


@every
def test_rates_by_name_schedules_and_disabled(name: str) -> None:
    model, x = nn.ModuleDict({"rnn": LAYERS[name](F, H)}), torch.randn(T, B, F)
    noise = ["zoneout_hidden", "zoneout_cell"] if name == "ZoneoutLSTM" else [
        "zoneout_hidden" if name == "ZoneoutGRU" else "recurrent_dropout"
    ]  # fmt: skip
    assert list(torchdrop.keep_probs(model)) == [f"rnn.{one}" for one in noise]
    model.forward = lambda x: model["rnn"](x)[0]  # type: ignore[method-assign]
    with torchdrop.disabled(model):
        plain = model(x)
    scheduler = torchdrop.KeepProbScheduler(model, {"rnn.*": torchdrop.schedules.linear(1.0, 0.5, 2)})
    torch.testing.assert_close(model(x), plain)
    for _ in range(2):
        scheduler.step()
    assert getattr(model["rnn"], noise[0]).p == 0.5
    assert not torch.allclose(model(x), plain)
    stock = (nn.LSTM if model["rnn"].mode == "LSTM" else nn.GRU)(F, H)
    stock.load_state_dict(model["rnn"].state_dict())
    torch.testing.assert_close(stock(x)[0], plain)


@every
def test_rates_can_be_a_tensor(name: str) -> None:
    layer, x = LAYERS[name](F, 3), torch.randn(T, B, F)
    plain = layer.eval()(x)[0] if name.startswith("Recurrent") else None
    k = torch.tensor([1.0, 0.5, 0.0])
    for child in layer.children():
        child.keep_prob = k
    assert layer.train()(x)[0].isfinite().all()
    output = layer.eval()(x)[0]
    if plain is not None:
        assert torch.equal(output, plain)
    else:
        assert not output[..., 2].any()
        assert output[..., 0].any()
    for training in (True, False):
        layer.train(training)
        lengths = torch.tensor(LENGTHS)
        packed = seeded(1, layer, pack_padded_sequence(x, lengths, enforce_sorted=False))[0]
        torch.testing.assert_close(pad_packed_sequence(packed)[0][:2, 0], seeded(1, layer, x)[0][:2, 0])

"""LSTM and GRU layers with noise against nn.LSTM and nn.GRU: with rates 0 they are the same in every configuration."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import torchdrop
from tests import TORCH
from tests.seeding import seeded
from torchdrop.layers.recurrent.lstm_gru import RecurrentDropoutGRU, RecurrentDropoutLSTM, ZoneoutGRU, ZoneoutLSTM

T, B, F, H = 5, 4, 3, 6
LENGTHS = [2, 5, 1, 3]

NONE: dict[type[nn.Module], dict[str, float]] = {
    ZoneoutLSTM: {"zoneout_hidden": 0.0, "zoneout_cell": 0.0},
    ZoneoutGRU: {"zoneout_hidden": 0.0},
    RecurrentDropoutLSTM: {"recurrent_dropout": 0.0},
    RecurrentDropoutGRU: {"recurrent_dropout": 0.0},
}
"""Each layer's rates, all 0."""

every = pytest.mark.parametrize("kind", NONE, ids=lambda kind: kind.__name__)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def stock_of(kind: type[nn.Module]) -> type[nn.RNNBase]:
    return nn.LSTM if kind.__name__.endswith("LSTM") else nn.GRU


def pair(kind: type[nn.Module], *args: Any, **options: Any) -> tuple[Any, Any]:
    """The layer with rates 0 and torch.nn's, under the same seed."""
    return seeded(1, kind, *args, **options, **NONE[kind]), seeded(1, stock_of(kind), *args, **options)


def tensors(result: Any) -> list[Tensor]:
    """All that a layer returns, flat."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in tensors(part)]


def leaves(layer: nn.Module, result: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    loss = sum((out.double() ** 2).sum() * (n + 1) for n, out in enumerate(tensors(result)) if out.is_floating_point())
    return torch.autograd.grad(loss, [*inputs, *layer.parameters()])


def agree(kind: type[nn.Module], options: dict[str, Any], x: Tensor, training: bool, given: bool, packed: bool) -> None:
    """Outputs, final states and gradients, in double precision."""
    ours, stock = (layer.double().train(training) for layer in pair(kind, F, H, **options))
    x = x.double().requires_grad_()
    layers = (2 if options.get("bidirectional") else 1) * options.get("num_layers", 1)
    batch = [] if x.dim() == 2 else [B]
    sizes = [options.get("proj_size") or H, *([H] if stock_of(kind) is nn.LSTM else [])]
    hx = [torch.randn(layers, *batch, size, dtype=torch.float64, requires_grad=True) for size in sizes]
    state: Any = None if not given else tuple(hx) if len(hx) > 1 else hx[0]

    def run(layer: nn.Module) -> Any:
        if not packed:
            return layer(x, state)
        first = options.get("batch_first", False)
        return layer(pack_padded_sequence(x, torch.tensor(LENGTHS), first, enforce_sorted=False), state)

    mine, theirs = run(ours), run(stock)
    assert type(mine[0]) is type(theirs[0])
    assert type(mine[1]) is type(theirs[1])
    for a, b in zip(tensors(mine), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert a.shape == b.shape
    inputs = [x, *(hx if given else [])]
    for a, b in zip(leaves(ours, mine, *inputs), leaves(stock, theirs, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every
@modes
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("form", ["time first", "batch first", "one", "packed", "packed batch first"])
@pytest.mark.slow
def test_with_rates_0_layers_are_torchs_in_every_form(
    kind: type[nn.Module], training: bool, given: bool, form: str
) -> None:
    first = form.endswith("batch first")
    x = torch.randn(T, F) if form == "one" else torch.randn(B, T, F) if first else torch.randn(T, B, F)
    agree(kind, {"batch_first": first}, x, training, given, form.startswith("packed"))


@every
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 3},
        {"bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bias": False},
        {"bias": False, "num_layers": 2, "bidirectional": True},
        {"proj_size": 2},
        {"proj_size": 2, "num_layers": 2, "bidirectional": True, "bias": False},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.slow
def test_with_rates_0_layers_are_torchs_in_every_configuration(
    kind: type[nn.Module], options: dict[str, Any], packed: bool
) -> None:
    if "proj_size" in options and stock_of(kind) is nn.GRU:
        with pytest.raises(TypeError, match="proj_size"):
            kind(F, H, **options)
        return
    x = torch.randn(B, T, F) if options.get("batch_first") else torch.randn(T, B, F)
    agree(kind, options, x, True, True, packed)


@every
def test_parameters_have_torchs_names_shapes_and_initial_values(kind: type[nn.Module]) -> None:
    ours, stock = pair(kind, F, H, 2, bidirectional=True)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    other = kind(F, H, 2, bidirectional=True)
    other.load_state_dict(stock.state_dict())
    stock.load_state_dict(kind(F, H, 2, bidirectional=True).state_dict())
    assert torch.equal(other.weight_hh_l1_reverse, ours.weight_hh_l1_reverse)
    assert not torch.equal(stock.weight_hh_l1_reverse, ours.weight_hh_l1_reverse)


@every
def test_all_arguments_of_torchs_are_taken_in_their_order(kind: type[nn.Module]) -> None:
    tail = (0, "cpu", torch.float64) if stock_of(kind) is nn.LSTM else ("cpu", torch.float64)
    ours = kind(F, H, 2, False, True, 0.25, True, *tail)
    # nn.GRU takes the two last ones by name only: in its place for `device` it would read another argument
    stock = stock_of(kind)(F, H, 2, False, True, 0.25, True, device="cpu", dtype=torch.float64)
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional",
                 "proj_size", "mode"):  # fmt: skip
        assert getattr(ours, name) == getattr(stock, name), name
    assert ours.weight_ih_l0.dtype == torch.float64
    assert isinstance(ours, nn.RNNBase)


@every
def test_float32_agrees_to_rounding(kind: type[nn.Module]) -> None:
    ours, stock = pair(kind, F, 40, 2)
    x = torch.randn(20, B, F)
    for a, b in zip(tensors(ours(x)), tensors(stock(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(kind: type[nn.Module], dtype: torch.dtype) -> None:
    layer, x = kind(F, H, 2, dtype=dtype), torch.randn(T, B, F).to(dtype)
    exact = copy.deepcopy(layer).float()
    for training in (True, False):
        mine = seeded(1, layer.train(training), x)
        wide = seeded(1, exact.train(training), x.float())
        for a, b in zip(tensors(mine), tensors(wide), strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


@every
@modes
@pytest.mark.filterwarnings("ignore:.*CPU autocast.*")
def test_autocast(kind: type[nn.Module], training: bool) -> None:
    layer, x = kind(F, H).train(training), torch.randn(T, B, F)
    expected = seeded(1, layer, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = seeded(1, layer, x)[0]
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    output.float().sum().backward()


@modes
@pytest.mark.parametrize("given", [None, torch.float32, torch.bfloat16])
def test_autocast_of_projections(training: bool, given: torch.dtype | None) -> None:
    layer, x = ZoneoutLSTM(F, H, proj_size=2).train(training), torch.randn(T, B, F)
    hx = None if given is None else (torch.zeros(1, B, 2, dtype=given), torch.zeros(1, B, H, dtype=given))
    expected = seeded(1, layer, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = seeded(1, layer, x, hx)[0]
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@every
def test_dropout_between_layers_is_torchdrops(kind: type[nn.Module]) -> None:
    layer = kind(F, H, 3, dropout=0.5, **NONE[kind])
    assert layer.dropout == 0.5
    layer.dropout = 0.25
    assert torchdrop.keep_probs(layer)["layer_dropout"] == 0.75
    x = torch.randn(T, B, F)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.layer_dropout.p = 0.0
    assert torch.equal(layer(x)[0], layer(x)[0])
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        kind(F, H, 1, dropout=0.5)


@every
def test_a_layer_for_dropout_between_layers_is_there_only_where_it_acts(kind: type[nn.Module]) -> None:
    x, generator = torch.randn(T, B, F), torch.Generator().manual_seed(2)
    one, stack = kind(F, H), kind(F, H, 2, generator=generator)
    for layer in (one, stack):
        assert layer.dropout == 0.0
        assert not hasattr(layer, "layer_dropout")
    one.dropout = 0.25
    assert one.dropout == 0.25  # as nn.LSTM's, which does nothing with it in one layer
    assert not hasattr(one, "layer_dropout")
    stack.eval().dropout = 0.25
    assert not stack.layer_dropout.training
    assert stack.layer_dropout.generator is generator
    torchdrop.set_keep_prob(stack, {"layer_dropout": 0.5})
    assert stack.dropout == 0.5
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), copy.deepcopy(one)):
        assert other.dropout == (0.25 if other.num_layers == 1 else 0.5)
        assert other.load_state_dict(other.state_dict()).missing_keys == []
        other(x)
    stack.dropout = 0.0
    assert stack.layer_dropout.p == 0.0  # where a schedule may look for it
    del stack.layer_dropout
    assert stack.dropout == 0.0
    assert stack(x)[0].shape == (T, B, H)
    stack.dropout = torch.tensor(0.25)
    assert stack.layer_dropout.keep_prob == 0.75


class Sequences(nn.Module):
    """A classifier of sequences, with dropout of whole features before the recurrent layer."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.locked, self.rnn, self.head = torchdrop.LockedDropout(0.3), rnn, nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.locked(x))[0].tanh())


@every
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_audit_finds_nothing(kind: type[nn.Module], dropout: float) -> None:
    """Noise of the states is no dropout of inputs that have been dropped from."""
    found = torchdrop.audit(Sequences(kind(F, H, 2, dropout=dropout)), torch.randn(T, B, F))
    assert found.findings == []


@every
def test_surgery_leaves_it_as_it_is(kind: type[nn.Module]) -> None:
    model = Sequences(kind(F, H, 2, dropout=0.3))
    with pytest.warns(UserWarning, match="no dropout layers of torch.nn to replace"):
        assert torchdrop.replace(model).unreached == []
    before = repr(model)
    with pytest.raises(ValueError, match="no layer"):
        torchdrop.replace(model, to="torch")
    with pytest.raises(TypeError, match="whose noise is not known here"):
        torchdrop.equivalent_l2(model.rnn, torch.randn(T, B, F))
    assert repr(model) == before


@every
def test_empty_batches_are_as_torchs(kind: type[nn.Module]) -> None:
    ours, stock = pair(kind, F, H)
    for a, b in zip(tensors(ours(torch.ones(T, 0, F))), tensors(stock(torch.ones(T, 0, F))), strict=True):
        assert a.shape == b.shape


@every
def test_parametrized_and_replaced_weights_are_used(kind: type[nn.Module]) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    ours, x = kind(F, H, **NONE[kind]), torch.randn(T, B, F)
    plain = copy.deepcopy(ours)
    with torch.no_grad():
        plain.weight_hh_l0 *= 2
    nn.utils.parametrize.register_parametrization(ours, "weight_hh_l0", Doubled())
    assert torch.equal(ours(x)[0], plain(x)[0])
    nn.utils.parametrize.remove_parametrizations(ours, "weight_hh_l0", leave_parametrized=False)
    values = {name: 2 * value for name, value in ours.named_parameters()}
    called = torch.func.functional_call(ours, values, (x,))[0]
    with torch.no_grad():
        for value in ours.parameters():
            value *= 2
    assert torch.equal(ours(x)[0], called)


@every
def test_copies_and_pickles(kind: type[nn.Module]) -> None:
    layer, x = kind(F, H, 2, bidirectional=True), torch.randn(T, B, F)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    for other in others:
        assert repr(other) == repr(layer)
        assert torch.equal(seeded(1, other, x)[0], seeded(1, layer, x)[0])
        other.weight_hh_l0.data.zero_()
    assert layer.weight_hh_l0.any()


def test_representation() -> None:
    layer = ZoneoutLSTM(3, 6, 2, batch_first=True, dropout=0.1, zoneout_cell=0.25)
    assert repr(layer) == (
        "ZoneoutLSTM(\n"
        "  3, 6, num_layers=2, batch_first=True\n"
        "  (layer_dropout): Dropout(p=0.1, inplace=False)\n"
        "  (zoneout_hidden): ZoneoutSteps(p=0.05)\n"
        "  (zoneout_cell): ZoneoutSteps(p=0.25)\n"
        ")"
    )
    assert "RecurrentDropoutSteps(p=0.25, per_step=False)" in repr(RecurrentDropoutGRU(3, 6, per_step=False))


LSTM, GRU = ZoneoutLSTM(F, H), ZoneoutGRU(F, H)
X = torch.ones(T, B, F)


# PyTorch 2.8 leaves the check to the code behind it.
WRONG_TYPE = (
    "RNN input dtype (torch.float64) does not match weight dtype"
    if TORCH >= (2, 9)
    else "input must have the type torch.float32, got type torch.float64"
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LSTM(X[None]), ValueError, "LSTM: Expected input to be 2D or 3D, got 4D instead"),
        (lambda: GRU(X[None]), ValueError, "GRU: Expected input to be 2D or 3D, got 4D instead"),
        (lambda: LSTM(X.double()), ValueError, WRONG_TYPE),
        (lambda: LSTM(X[..., :2]), RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 2"),
        (lambda: LSTM(X[:0]), RuntimeError, "Expected sequence length to be larger than 0 in RNN"),
        (lambda: LSTM([1.0]), TypeError, "input must be a tensor or a PackedSequence, got list"),
        (lambda: LSTM(X, X), TypeError, "hx must be a tuple (h_0, c_0) of tensors, got Tensor"),
        (lambda: GRU(X, (X, X)), TypeError, "hx must be a tensor h_0, got tuple"),
        (
            lambda: LSTM(X, (torch.ones(1, B, H + 1), torch.ones(1, B, H))),
            RuntimeError,
            "Expected hidden[0] size (1, 4, 6), got [1, 4, 7]",
        ),
        (
            lambda: LSTM(X, (torch.ones(1, B, H), torch.ones(1, B + 1, H))),
            RuntimeError,
            "Expected hidden[1] size (1, 4, 6), got [1, 5, 6]",
        ),
        (lambda: GRU(X, torch.ones(2, B, H)), RuntimeError, "Expected hidden size (1, 4, 6), got [2, 4, 6]"),
        (
            lambda: LSTM(X, (torch.ones(1, H), torch.ones(1, H))),
            RuntimeError,
            "For batched 3-D input, hx and cx should also be 3-D but got (2-D, 2-D) tensors",
        ),
        (
            lambda: GRU(X[:, 0], torch.ones(1, B, H)),
            RuntimeError,
            "For unbatched 2-D input, hx should also be 2-D but got 3-D tensor",
        ),
        (
            lambda: LSTM(X[:1], (torch.ones(1, B, H), torch.ones(1, B, H, dtype=torch.float64))),
            RuntimeError,
            "hidden[1] must have the input's dtype, torch.float32, got torch.float64",
        ),
        (
            lambda: GRU(X, torch.ones(1, B, H).half()),
            RuntimeError,
            "hidden must have the input's dtype, torch.float32, got torch.float16",
        ),
        (lambda: setattr(GRU, "dropout", -1), ValueError, "dropout: dropout probability has to be between 0 and 1"),
        (lambda: ZoneoutLSTM(F, 0), ValueError, "hidden_size must be greater than zero"),
        (lambda: ZoneoutGRU(F, H, zoneout_hidden="a"), TypeError, "zoneout_hidden: p must be a number or a tensor"),
        (
            lambda: ZoneoutLSTM(F, H, zoneout_cell=1.5),
            ValueError,
            "zoneout_cell: dropout probability has to be between 0 and 1, but got 1.5",
        ),
        (
            lambda: RecurrentDropoutLSTM(F, H, recurrent_dropout=-1),
            ValueError,
            "recurrent_dropout: dropout probability has to be between 0 and 1, but got -1",
        ),
        (lambda: RecurrentDropoutGRU(F, H, per_step=1), TypeError, "per_step must be True or False, got 1"),
        (lambda: ZoneoutGRU(F, H, 2, dropout=1.5), ValueError, "has to be between 0 and 1, but got 1.5"),
        (lambda: ZoneoutGRU(F, H, generator=1), TypeError, "generator must be a torch.Generator or None, got int"),
    ],
)
def test_what_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_packed_output_is_packed_as_the_input() -> None:
    seq = pack_padded_sequence(torch.randn(T, B, F), torch.tensor(LENGTHS), enforce_sorted=False)
    output, _ = LSTM(seq)
    assert isinstance(output, PackedSequence)
    assert pad_packed_sequence(output)[1].tolist() == LENGTHS

"""What is random in torch's own modules and functions, and in those of other packages: each source is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.mc_models import (
    WARNINGS_OF_TORCH,
    Of,
    apart,
    call,
    check_draws,
    check_rows,
    drop_block,
    heads,
    huggingface_path,
    images,
    main,
    sdpa,
    served_units,
    timm_path,
    torchvision_depth,
    train_sizes,
    unchanged,
)
from tests.statistical import check_rate, draws_for
from torchdrop import functional

pytestmark = [pytest.mark.usefixtures("one_thread"), *WARNINGS_OF_TORCH]


def encoder(batch_first: bool, **settings: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, **settings)
    return nn.TransformerEncoder(layer, 2)


def attention(weights: bool, **settings: Any) -> nn.Module:
    whole = nn.MultiheadAttention(16, 2, dropout=0.3, **settings)
    return Of(lambda self, x: self.attention(x, x, x, need_weights=weights)[0], attention=whole)


def words(first: bool = True) -> Tensor:
    return torch.randn(5, 7, 16) if first else torch.randn(7, 5, 16)


Case = tuple[Callable[[], nn.Module], Callable[[], Any], int, list[str]]

MODULES: dict[str, Case] = {
    "transformer": (lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True), lambda: (words(), words()), 0,
                    ["attention", "dropout"]),
    "transformer-time-first": (lambda: nn.Transformer(16, 2, 2, 2, 32), lambda: (words(False), words(False)), 1,
                               ["attention", "dropout"]),
    "encoder": (lambda: encoder(True), words, 0, ["attention", "dropout"]),
    "encoder-norm-first": (lambda: encoder(True, norm_first=True), words, 0, ["attention", "dropout"]),
    "encoder-time-first": (lambda: encoder(False), lambda: words(False), 1, ["attention", "dropout"]),
    "attention-weights": (lambda: attention(True, batch_first=True), words, 0, ["dropout"]),
    "attention": (lambda: attention(False, batch_first=True), words, 0, ["attention"]),
    "attention-time-first": (lambda: attention(False), lambda: words(False), 1, ["attention"]),
    "lstm": (lambda: nn.LSTM(16, 8, 3, dropout=0.3, batch_first=True, bidirectional=True), words, 0, ["lstm"]),
    "lstm-projected": (lambda: nn.LSTM(16, 8, 3, dropout=0.3, proj_size=4, bidirectional=True), lambda: words(False),
                       1, ["lstm"]),
    "gru": (lambda: nn.GRU(16, 8, 3, dropout=0.3), lambda: words(False), 1, ["gru"]),
    "gru-state": (lambda: nn.GRU(16, 8, 3, dropout=0.3, bias=False), lambda: (words(False), torch.randn(3, 5, 8)), 1,
                  ["gru"]),
    "rnn-relu": (lambda: nn.RNN(16, 8, 2, dropout=0.3, batch_first=True, nonlinearity="relu"), words, 0, ["rnn"]),
    "rnn-tanh": (lambda: nn.RNN(16, 8, 2, dropout=0.3, batch_first=True, bidirectional=True), words, 0, ["rnn"]),
    "sdpa": (sdpa, heads, 0, ["attention"]),
    "sdpa-causal": (lambda: sdpa(is_causal=True), heads, 0, ["attention"]),
    "sdpa-bool": (lambda: sdpa(attn_mask=torch.rand(7, 9) > 0.5), heads, 0, ["attention"]),
    "sdpa-float": (lambda: sdpa(attn_mask=torch.randn(4, 7, 9), scale=0.3), heads, 0, ["attention"]),
    "sdpa-grouped": (lambda: sdpa(enable_gqa=True), lambda: heads(2), 0, ["attention"]),
    "timm-path": (lambda: Of(timm_path), images, 0, ["bernoulli"]),
    "torchvision-depth": (lambda: Of(torchvision_depth), images, 0, ["bernoulli"]),
    "huggingface-path": (lambda: Of(huggingface_path), images, 0, ["uniform"]),
    "drop-block": (lambda: Of(drop_block), images, 0, ["uniform"]),
    "gumbel": (lambda: Of(lambda self, x: F.gumbel_softmax(x, dim=1) if self.training else x.softmax(1)), images, 0,
               ["exponential"]),
    "gumbel-always": (lambda: Of(lambda self, x: x * F.gumbel_softmax(x, dim=1)), images, 0, ["exponential"]),
    "always": (lambda: Of(lambda self, x: F.dropout(x, 0.3, True)), images, 0, ["dropout"]),
    "rate-from-flag": (lambda: Of(lambda self, x: F.dropout(x, 0.3 if self.training else 0.0, self.training)), images,
                       0, ["dropout"]),
    "rate-from-flag-always-on": (lambda: Of(lambda self, x: F.dropout(x, 0.3 if self.training else 0.0)), images, 0,
                                 ["dropout"]),
    "rrelu": (nn.RReLU, images, 0, ["rrelu"]),
    "rrelu-of-torch": (lambda: Of(lambda self, x: torch.rrelu(x, 0.1, 0.4, self.training)), images, 0, ["rrelu"]),
    "torchdrop": (lambda: torchdrop.Dropout2d(0.3), images, 0, ["torchdrop"]),
    "torchdrop-alpha": (lambda: torchdrop.AlphaDropout(0.3), images, 0, ["torchdrop"]),
    "torchdrop-gaussian": (lambda: torchdrop.GaussianDropout(0.3), images, 0, ["torchdrop"]),
    "torchdrop-function": (lambda: Of(lambda self, x: functional.dropout(x, 0.3, self.training)), images, 0,
                           ["torchdrop"]),
}  # fmt: skip
"""Each with its inputs, the dimension of their rows, and the kinds of its sources."""

DROPOUTS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "F.dropout": (F.dropout, 0),
    "F.dropout1d": (F.dropout1d, 1),
    "F.dropout2d": (F.dropout2d, 2),
    "F.dropout3d": (F.dropout3d, 3),
    "F.alpha_dropout": (F.alpha_dropout, 0),
    "F.feature_alpha_dropout": (F.feature_alpha_dropout, 2),
    "torch.dropout": (torch.dropout, 0),
    "torch.dropout by keyword": (lambda x, p, on: torch.dropout(x, p, train=on), 0),
    "torch.feature_dropout": (torch.feature_dropout, 2),
    "torch.alpha_dropout": (torch.alpha_dropout, 0),
    "torch.feature_alpha_dropout": (torch.feature_alpha_dropout, 2),
    "F.dropout in place": (lambda x, p, on: F.dropout(x, p, on, inplace=True), 0),
    "F.dropout1d in place": (lambda x, p, on: F.dropout1d(x, p, on, True), 1),
    "F.dropout2d in place": (lambda x, p, on: F.dropout2d(x, p, on, True), 2),
    "F.dropout3d in place": (lambda x, p, on: F.dropout3d(x, p, on, True), 3),
    "F.alpha_dropout in place": (lambda x, p, on: F.alpha_dropout(x, p, on, True), 0),
    "F.feature_alpha_dropout in place": (lambda x, p, on: F.feature_alpha_dropout(x, p, on, True), 2),
    "torch.dropout_": (torch.dropout_, 0),
    "torch.feature_dropout_": (torch.feature_dropout_, 2),
    "torch.alpha_dropout_": (torch.alpha_dropout_, 0),
    "torch.feature_alpha_dropout_": (torch.feature_alpha_dropout_, 2),
}
"""Each with the number of dimensions that share a draw."""


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", MODULES)
def test_draws_are_those_of_train_mode(name: str, grad: bool) -> None:
    """Under no_grad too, where the encoder's fast path would leave dropout out."""
    make, inputs, dim, kinds = MODULES[name]
    with torch.set_grad_enabled(grad):
        report = check_draws(make(), inputs(), batch_dim=dim)
    assert sorted({source.kind for source in report.sources}) == kinds
    assert report.rows == dim


@pytest.mark.parametrize("name", MODULES)
def test_masks_are_independent_where_those_of_train_mode_are(name: str) -> None:
    """Layers, heads, directions and calls draw as many numbers as in train mode, and no two masks are under one key.

    So their joint distribution is that of train mode: a number is uniform, and independent of those at other places or
    under other keys.
    """
    make, inputs, dim, _ = MODULES[name]
    model, values = make().eval(), inputs()
    expected = train_sizes(model, values)
    with torchdrop.mc_dropout(model, seed=1, batch_dim=dim):
        call(model, values)
        with served_units() as served:
            call(model, values)
    if name.startswith("torchdrop"):  # which draw a key of two numbers in train mode
        assert len(served) == len(expected)
    else:
        assert [size for _, size in served] == expected
    assert len({seed for seed, _ in served}) == len(served), "two masks are one"


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_masks_between_recurrent_layers_multiply(layers: int, packed: bool, bidirectional: bool) -> None:
    """With the identity for weights, a unit is what is left of 1 after all masks: it passes n of them with k**n."""
    width, directions, k = 32, 1 + bidirectional, 0.5
    model = nn.RNN(width, width, layers, dropout=1 - k, nonlinearity="relu", bidirectional=bidirectional)
    for name, parameter in model.named_parameters():
        nn.init.zeros_(parameter)
        if "weight_ih" in name:  # a direction reads its own half
            at = width if "reverse" in name and parameter.shape[1] > width else 0
            parameter.data[:, at : at + width] = torch.eye(width)
    passing = k ** (layers - 1)
    steps = 8
    rows = -(-draws_for(passing, 0.2 * passing) // (20 * width * directions * steps))
    x: Any = torch.ones(steps, rows, width)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.full((rows,), steps))
    expected = 1 / passing
    through = total = 0
    with torch.no_grad(), torchdrop.mc_dropout(model.eval(), seed=0, batch_dim=None if packed else 1):
        for _ in range(20):
            out = model(x)[0]
            values = out.data if packed else out
            assert bool(((values == 0) | (values == expected)).all())
            through, total = through + int((values > 0).sum()), total + values.numel()
    check_rate(through, total, passing, 0.2 * passing)


@pytest.mark.parametrize("name", MODULES)
def test_rows_have_their_masks_in_any_batch(name: str) -> None:
    make, inputs, dim, _ = MODULES[name]
    model, values = make().eval(), inputs()
    with unchanged(model):
        check_rows(model, values, dim)


@pytest.mark.parametrize("name", MODULES)
def test_strategies_agree_with_single_passes(name: str) -> None:
    """Sample n of `mc_predict` is the n-th call in `mc_dropout`, however it is run."""
    make, inputs, dim, _ = MODULES[name]
    model, values = make().eval(), inputs()
    with torchdrop.mc_dropout(model, seed=3, batch_dim=dim):
        expected = torch.stack([main(call(model, values)) for _ in range(6)]).movedim(1 + dim, 1)
    worked = 0
    for strategy in ("loop", "repeated", "vectorized", "auto"):
        try:
            result = torchdrop.mc_predict(
                model, values, samples=6, seed=3, strategy=strategy, batch_dim=dim, chunk=4, keep_samples=True,
                select_output=main,
            )  # fmt: skip
        except RuntimeError as error:
            if "does not work here" not in str(error) or strategy in ("loop", "auto"):
                raise
        else:
            assert apart(result.samples, expected) < 1e-4, strategy
            worked += 1
    assert worked >= 3


@pytest.mark.parametrize("name", DROPOUTS)
def test_functional_dropout(name: str) -> None:
    """Each element has one of the two values that it has in train mode, at the rate, and channels share a draw."""
    function, shared = DROPOUTS[name]
    same = []

    def drop(self: nn.Module, x: Tensor) -> Tensor:
        hidden = x * 1
        out = function(hidden, 0.4, self.training)
        same.append(out is hidden)
        return out * 1

    model, x = Of(drop).eval(), torch.randn(5, 6, 4, 3, 2)[(..., *[0] * (3 - max(shared, 1)))]
    assert x.dim() == 2 + max(shared, 1)
    check_draws(model, x)
    with torch.no_grad():
        model.train()
        train = torch.stack([model(x) for _ in range(60)])
        model.eval()
        with torchdrop.mc_dropout(model, seed=0):
            model(x)
            same.clear()
            served = torch.stack([model(x) for _ in range(-(-draws_for(0.6, 0.1) // 30))])
    assert all(same) if "place" in name or name.endswith("_") else not any(same)
    low, high = train.amin(0), train.amax(0)
    torch.testing.assert_close(served.amin(0), low)
    torch.testing.assert_close(served.amax(0), high)
    candidates = (low.flatten()[0], high.flatten()[0])
    (dropped,) = [value for value in candidates if bool((near(low, value) | near(high, value)).all())]
    assert bool((near(served, low) | near(served, high)).all())
    kept = ~near(served, dropped)
    units = kept.flatten(-shared) if shared else kept.unsqueeze(-1)
    assert bool((units == units[..., :1]).all())
    mask = units[..., 0].flatten(1)
    assert len(mask.unique(dim=1).T) == mask.shape[1], "units have masks of their own"
    check_rate(int(mask.sum()), mask.numel(), 0.6, 0.1)


def near(values: Tensor, others: Tensor) -> Tensor:
    return (values - others).abs() < 1e-5


@pytest.mark.parametrize("inplace", [False, True])
def test_rrelu(inplace: bool) -> None:
    """Slopes of negative inputs are uniform between the limits; positive inputs stay."""
    model, x = Of(lambda self, x: F.rrelu(x * 1, 0.2, 0.6, self.training, inplace)).eval(), -torch.ones(5, 100)
    x[:, 0] = 2.0
    with torchdrop.mc_dropout(model, seed=0) as report:
        slopes = torch.stack([-model(x) for _ in range(-(-draws_for(0.25, 0.05) // 495))])
    assert [source.kind for source in report.active] == ["rrelu"]
    assert bool((slopes[:, :, 0] == -2).all())
    slopes = slopes[:, :, 1:]
    assert float(slopes.min()) >= 0.2
    assert float(slopes.max()) <= 0.6
    check_rate(int((slopes < 0.3).sum()), slopes.numel(), 0.25, 0.05)
    check_rate(int((slopes > 0.5).sum()), slopes.numel(), 0.25, 0.05)


@pytest.mark.slow
def test_dense_network() -> None:
    """Functional dropout in each of 100 blocks, with batch normalization."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(4 + i) for i in range(100))
            self.convolutions = nn.ModuleList(nn.Conv2d(4 + i, 1, 3, padding=1) for i in range(100))

        def forward(self, x: Tensor) -> Tensor:
            for norm, convolution in zip(self.norms, self.convolutions, strict=True):
                new = F.dropout(convolution(F.relu(norm(x))), 0.1, self.training)
                x = torch.cat([x, new], 1)
            return x.mean((2, 3))

    model, x = Dense(), torch.randn(5, 4, 6, 6)
    model(x)
    report = check_draws(model, x)
    assert report.expected == 100
    assert [source.number for source in report.active] == list(range(100))
    assert {int(norm.num_batches_tracked) for norm in model.norms} == {1}
    result = torchdrop.mc_predict(model, x, samples=4, seed=0)
    parts = torchdrop.mc_predict(model, iter(x.split(2)), samples=4, seed=0)
    assert apart(parts.mean, result.mean) < 1e-4
    assert {int(norm.num_batches_tracked) for norm in model.norms} == {1}


def test_literal_false_and_zero_stay_off() -> None:
    """Next to calls that follow the flag, in the same module."""

    def mixed(self: nn.Module, x: Tensor) -> Tensor:
        off = F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0, self.training)
        return torch.cat([off, F.dropout(x, 0.5, self.training)], 1)

    model, x = Of(mixed).eval(), torch.randn(5, 8)
    report = check_draws(model, x)
    assert [(s.kind, s.number, s.rate) for s in report.sources] == [("dropout", 2, 0.5)]
    with torchdrop.mc_dropout(model, seed=0):
        off, on = model(x).chunk(2, 1)
    assert torch.equal(off, 2 * x)
    assert not torch.equal(on, x)

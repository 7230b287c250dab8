"""What is random in torch's own modules and functions, and in those of other packages: each source is served."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torchdrop
from torchdrop import functional

from .mc_models import apart, call, check_draws, check_rows, equal, main, served_masks, train_draws, unchanged
from .statistical import check_rate, draws_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    return


class Of(nn.Module):
    """A function of the module itself, for its training flag, and the inputs."""

    def __init__(self, function: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def timm_path(self: nn.Module, x: Tensor) -> Tensor:
    if not self.training:
        return x
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.6)
    return x * mask.div_(0.6)


def torchvision_depth(self: nn.Module, x: Tensor, rows: bool = True) -> Tensor:
    if not self.training:
        return x
    size = [x.shape[0] if rows else 1] + [1] * (x.ndim - 1)
    noise = torch.empty(size, dtype=x.dtype, device=x.device).bernoulli_(0.6)
    return x * noise.div_(0.6)


def huggingface_path(self: nn.Module, x: Tensor) -> Tensor:
    if not self.training:
        return x
    mask = 0.6 + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
    return x.div(0.6) * mask.floor_()


def drop_block(self: nn.Module, x: Tensor) -> Tensor:
    if not self.training:
        return x
    centres = (torch.rand(x.shape[0], 1, 2, 2) < 0.3).to(x)
    return x * (1 - F.max_pool2d(F.pad(centres, [1] * 4), 3, 1, 1))


def layer_drop(self: nn.Module, x: Tensor) -> Tensor:
    for layer in self.layers:
        if not self.training or torch.rand([]) >= 0.5:
            x = layer(x)
    return x


def sdpa(**settings: Any) -> Of:
    def attend(self: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rate = 0.4 if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=rate, **settings)

    return Of(attend)


def encoder(batch_first: bool, **settings: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, **settings)
    return nn.TransformerEncoder(layer, 2)


def attention(weights: bool, **settings: Any) -> nn.Module:
    whole = nn.MultiheadAttention(16, 2, dropout=0.3, **settings)
    return Of(lambda self, x: self.attention(x, x, x, need_weights=weights)[0], attention=whole)


def images() -> Tensor:
    return torch.randn(5, 6, 4, 4)


def words(first: bool = True) -> Tensor:
    return torch.randn(5, 7, 16) if first else torch.randn(7, 5, 16)


def heads(keys: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(5, 4, 7, 8), torch.randn(5, keys, 9, 8), torch.randn(5, keys, 9, 8)


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

DROPOUTS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "F.dropout": (F.dropout, (5, 6, 4)),
    "F.dropout1d": (F.dropout1d, (5, 6, 4)),
    "F.dropout2d": (F.dropout2d, (5, 6, 4, 4)),
    "F.dropout3d": (F.dropout3d, (5, 6, 4, 4, 2)),
    "F.alpha_dropout": (F.alpha_dropout, (5, 6, 4)),
    "F.feature_alpha_dropout": (F.feature_alpha_dropout, (5, 6, 4, 4)),
    "torch.dropout": (torch.dropout, (5, 6, 4)),
    "torch.dropout, by keyword": (lambda x, p, on: torch.dropout(x, p, train=on), (5, 6, 4)),
    "torch.feature_dropout": (torch.feature_dropout, (5, 6, 4, 4)),
    "torch.alpha_dropout": (torch.alpha_dropout, (5, 6, 4)),
    "torch.feature_alpha_dropout": (torch.feature_alpha_dropout, (5, 6, 4, 4)),
}

INPLACE: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "F.dropout": (lambda x, p, on: F.dropout(x, p, on, inplace=True), (5, 6, 4)),
    "F.dropout1d": (lambda x, p, on: F.dropout1d(x, p, on, True), (5, 6, 4)),
    "F.dropout2d": (lambda x, p, on: F.dropout2d(x, p, on, True), (5, 6, 4, 4)),
    "F.dropout3d": (lambda x, p, on: F.dropout3d(x, p, on, True), (5, 6, 4, 4, 2)),
    "F.alpha_dropout": (lambda x, p, on: F.alpha_dropout(x, p, on, True), (5, 6, 4)),
    "F.feature_alpha_dropout": (lambda x, p, on: F.feature_alpha_dropout(x, p, on, True), (5, 6, 4, 4)),
    "torch.dropout_": (torch.dropout_, (5, 6, 4)),
    "torch.feature_dropout_": (torch.feature_dropout_, (5, 6, 4, 4)),
    "torch.alpha_dropout_": (torch.alpha_dropout_, (5, 6, 4)),
    "torch.feature_alpha_dropout_": (torch.feature_alpha_dropout_, (5, 6, 4, 4)),
}


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
    for strategy in ("loop", "repeated", "vectorised", "auto"):
        try:
            result = torchdrop.mc_predict(
                model, values, samples=6, seed=3, strategy=strategy, batch_dim=dim, chunk=4, keep_samples=True,
                output=main,
            )  # fmt: skip
        except RuntimeError as error:
            assert "does not work here" in str(error)
            assert strategy in ("repeated", "vectorised")
        else:
            assert apart(result.samples, expected) < 1e-4, strategy
            worked += 1
    assert worked >= 3


@pytest.mark.parametrize(
    ("function", "shape", "inplace"),
    [(*DROPOUTS[name], False) for name in DROPOUTS] + [(*INPLACE[name], True) for name in INPLACE],
    ids=[*DROPOUTS, *(f"{name} in place" for name in INPLACE)],
)
def test_functional_dropout(function: Callable[..., Tensor], shape: tuple[int, ...], inplace: bool) -> None:
    """Each element is one of the two values that it has in train mode, at the rate; whole channels are dropped."""
    model = Of(lambda self, x: function(self.scale(x), 0.4, self.training), scale=nn.Identity()).eval()
    if inplace:
        model.scale = Of(lambda _, x: x * 1)
    x = torch.randn(shape)
    before = x.clone()
    check_draws(model, x)
    with torch.no_grad():
        train = torch.stack([call(model.train(), x) for _ in range(60)])
    with torchdrop.mc_dropout(model.eval(), seed=0):
        served = torch.stack([call(model, x) for _ in range(max(60, draws_for(0.6, 0.1) // 30))])
    assert torch.equal(x, before)
    kept = torch.where(x > 0, train.amax(0), train.amin(0))
    dropped = torch.where(x > 0, train.amin(0), train.amax(0))
    torch.testing.assert_close(torch.where(x > 0, served.amax(0), served.amin(0)), kept)
    torch.testing.assert_close(torch.where(x > 0, served.amin(0), served.amax(0)), dropped)
    is_kept = (served - kept).abs() < (served - dropped).abs()
    torch.testing.assert_close(torch.where(is_kept, kept, dropped), served)
    channels = is_kept.flatten(3) if (train == train[0]).sum() and len(shape) > 3 else is_kept.unsqueeze(3)
    feature = "feature" in str(function) or len({*channels[:, :, :, 0].shape}) == 0
    of_train = ((train - kept).abs() < (train - dropped).abs()).flatten(3)
    if len(shape) > 2 and bool((of_train == of_train[..., :1]).all()):
        assert bool((is_kept.flatten(3) == is_kept.flatten(3)[..., :1]).all())
        is_kept = is_kept.flatten(3)[..., 0]
    assert not feature
    check_rate(int(is_kept.sum()), is_kept.numel(), 0.6, 0.1)

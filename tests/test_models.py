"""Whole models in which torchdrop's layers stand where torch.nn's stood."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

import torchdrop

pytestmark = pytest.mark.slow

STOCK = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def swapped(model: nn.Module, home: object = torchdrop) -> nn.Module:
    """A copy of the model whose dropout modules are those of the same names in `home`."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, STOCK):
                other = getattr(home, type(child).__name__)(child.p, child.inplace)
                setattr(parent, name, other.train(child.training))
    return model


def dropouts(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, _DropoutNd)}


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Dropout2d(0.1), nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.drop(self.body(x)))


def mlp() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Linear(16, 64), nn.SELU(), nn.AlphaDropout(0.1), nn.Linear(64, 64),
        nn.Dropout(0.3, inplace=True), nn.ReLU(inplace=True), nn.Linear(64, 4),
    )  # fmt: skip
    return model, torch.randn(32, 16)


def resnet() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Residual(8), nn.MaxPool2d(2), Residual(8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last), torch.randn(16, 3, 8, 8).to(memory_format=torch.channels_last)


def transformer(norm_first: bool) -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(16 * 8, 4)), torch.randn(16, 8, 16)


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], int]] = {
    "mlp": (mlp, 2),
    "resnet": (resnet, 4),
    "transformer_post_norm": (lambda: transformer(False), 6),
    "transformer_pre_norm": (lambda: transformer(True), 6),
}
"""Each with the number of its dropout modules."""

every_model = pytest.mark.parametrize("name", MODELS)


def model_of(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The stock model, the swapped one and a batch."""
    make, count = MODELS[name]
    stock, x = make()
    ours = swapped(stock)
    assert len(dropouts(ours)) == count
    assert all(kind.__module__.startswith("torchdrop.") for kind in dropouts(ours).values())
    assert all(kind.__module__.startswith("torch.nn.") for kind in dropouts(stock).values())
    return stock, ours, x


@pytest.mark.parametrize("stock", STOCK, ids=lambda kind: kind.__name__)
def test_layers_are_what_they_replace(stock: type[nn.Module]) -> None:
    layer = getattr(torchdrop, stock.__name__)(0.25)
    assert isinstance(layer, stock)
    assert isinstance(layer, _DropoutNd)
    assert (layer.p, layer.inplace, layer.training) == (0.25, False, True)
    assert repr(layer) == repr(stock(0.25))
    assert not layer.state_dict()
    assert not list(layer.parameters())
    assert not list(layer.buffers())


def test_layers_without_a_twin_are_found_as_dropout() -> None:
    assert isinstance(torchdrop.GaussianDropout(), _DropoutNd)


@every_model
def test_state_dict_is_unchanged_in_both_directions(name: str) -> None:
    stock, ours, _ = model_of(name)
    assert list(ours.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1.0)
    stock.load_state_dict(ours.state_dict())
    back = swapped(ours, nn)
    assert dropouts(back) == dropouts(stock)
    for restored in (stock, back):
        assert list(restored.state_dict()) == list(ours.state_dict())
        assert all(torch.equal(value, ours.state_dict()[key]) for key, value in restored.state_dict().items())


@every_model
def test_eval_is_equal_to_stock(name: str) -> None:
    stock, ours, x = model_of(name)
    expected = stock.eval()(x)
    before = torch.get_rng_state()
    assert torch.equal(ours.eval()(x), expected)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(ours(x), stock(x))
    assert not torch.equal(ours.train()(x), expected)


@every_model
def test_rate_zero_trains_like_eval_dropout(name: str) -> None:
    """With nothing dropped, outputs and gradients are those of stock layers at the same rate."""
    stock, ours, x = model_of(name)
    for model in (stock, ours):
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        model(x).square().sum().backward()
    for (label, expected), parameter in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert expected.grad is not None
        assert parameter.grad is not None, label
        assert torch.equal(parameter.grad, expected.grad), label


@every_model
def test_gradients_are_those_of_the_masks_that_were_drawn(name: str) -> None:
    """A step along the gradient of a frozen cost lowers it as the gradient says."""
    _, ours, x = model_of(name)
    ours, x = ours.double(), x.double()
    for module in ours.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0  # torch's own functional dropout, which cannot be frozen
    with torchdrop.frozen_masks(ours, seed=3):
        cost = ours(x).square().mean()
        cost.backward()
        slopes = [p.grad for p in ours.parameters() if p.grad is not None]
        assert len(slopes) == len(list(ours.parameters()))
        norm = sum(slope.square().sum() for slope in slopes)
        assert norm > 0
        costs = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for parameter, slope in zip(ours.parameters(), slopes, strict=True):
                    parameter.add_(slope, alpha=step)
                costs.append(ours(x).square().mean())
        assert torch.allclose((costs[0] - costs[1]) / 2e-6, torch.as_tensor(norm), rtol=1e-3)


@every_model
def test_training_lowers_the_loss(name: str) -> None:
    _, model, x = model_of(name)
    target = torch.arange(len(x)) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(p.isfinite().all() for p in model.parameters())


def test_masks_follow_channels_last() -> None:
    """The mask is a function of the logical index, whatever the memory format."""
    model = model_of("resnet")[1].get_submodule("1")
    h = torch.randn(4, 8, 6, 6)
    outputs = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(1)
        y = model.drop(h.to(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
        outputs.append(y)
    assert torch.equal(*outputs)
    y = model(h.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_transformers_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours, x = model_of("transformer_post_norm")
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(args) or fast(*args))
    with torch.no_grad():
        expected = stock.eval()(x)
        assert len(calls) == 2
        assert torch.equal(ours.eval()(x), expected)
        assert len(calls) == 4
        ours.train()(x)
        assert len(calls) == 4


@pytest.mark.slow
def test_digits() -> None:
    """Ours reach what stock layers reach. A wrong mask or scale in either direction costs far more than the band."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = (torch.as_tensor(a) for a in datasets.load_digits(return_X_y=True))
    images = images.float() / 16.0
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    stock = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(128, 10),
    )  # fmt: skip
    accuracies, gaps = {}, {}
    for name, model in {"stock": copy.deepcopy(stock), "ours": swapped(stock)}.items():
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(12):
            for batch in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            noisy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
            accuracies[name] = (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()
        gaps[name] = accuracies[name] - noisy
    assert accuracies["ours"] > 0.95
    assert abs(accuracies["ours"] - accuracies["stock"]) < 0.02
    assert 0.0 < gaps["ours"] < gaps["stock"] + 0.03

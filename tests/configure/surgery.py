"""Models to operate on, and what of them must not change."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.mc_models import call, state
from tests.seeding import seeded

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def vit(transformers: Any) -> nn.Module:
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SMALL, **rates))


def bart(transformers: Any) -> nn.Module:
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    return transformers.BartModel(transformers.BartConfig(vocab_size=99, d_model=32, **sizes))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, 0.3, batch_first=True), 2)


def pairs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 8), torch.randn(2, 3, 8)


REAL: dict[str, tuple[Callable[[Any], nn.Module], Callable[[Any], Any], int]] = {
    "bert": (lambda models: models.bert("sdpa"), lambda models: models.tokens(), 7),
    "bert-eager": (lambda models: models.bert("eager"), lambda models: models.tokens(), 7),
    "gpt2": (lambda models: models.gpt2("eager"), lambda models: models.tokens(), 7),
    "t5": (lambda models: models.t5(), lambda models: models.tokens(), 7),
    "vit": (lambda models: vit(models.transformers), lambda _: {"pixel_values": torch.randn(2, 3, 16, 16)}, 3),
    "wav2vec2": (lambda models: models.wav2vec2(), lambda models: models.sound(), 11),
    "transformer": (lambda _: nn.Transformer(8, 2, 1, 1, 8, batch_first=True), lambda _: pairs(), 7),
    "encoder": (lambda _: encoder(), lambda _: (pairs()[0],), 6),
}


def real(name: str) -> tuple[Callable[[], nn.Module], Any]:
    """What builds it, always with the same weights, and inputs."""
    models: Any = None
    if name not in ("transformer", "encoder"):
        pytest.importorskip("transformers")
        models = importlib.import_module("tests.monte_carlo.test_models")
    make, inputs, _ = REAL[name]

    def built() -> nn.Module:
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(models)

    return built, inputs(models)


def drawn(model: nn.Module, inputs: Any) -> Any:
    np.random.seed(7)  # SpecAugment
    return seeded(7, call, model, inputs)


def layers(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]


def shape_of(model: nn.Module) -> list[Any]:
    """Which modules there are, under which names, with which hooks, flags and parameters."""
    found = [(name, id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)]
    return [found, list(model.state_dict()), state(model)]


@contextmanager
def refused(model: nn.Module, error: type[Exception], message: str) -> Iterator[None]:
    """Asserts the message, from its start, and that nothing is changed."""
    before = shape_of(model)
    with pytest.raises(error, match="^" + re.escape(message)):
        yield
    assert shape_of(model) == before

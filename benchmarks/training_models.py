"""The models whose training steps are timed: random weights, random data, and one dropout rate each.

Sizes are those of small models that are trained on a CPU. Vocabularies of language models are small, since a large one
makes the last layer most of a step. LayerDrop is off: it skips layers, which makes a step cheaper whoever draws.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mc_models_packages import PACKAGES
from torch import Tensor, nn

F32, BF16 = "float32", "bfloat16"
"""Precisions: float32, and autocast to bfloat16."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model that returns its loss, or an object with a `loss`, and the data of a step.

    Args:
        name: of the model, in tables.
        package: that the model comes from.
        rate: its probability of dropping.
        build: makes the model with this rate.
        inputs: makes the named arguments of a step.
        compiled: the precisions in which it is compiled, too, in a full run.
        rounds: the least number of rounds of steps.
    """

    name: str
    package: str
    rate: float
    build: Callable[[float], nn.Module]
    inputs: Callable[[], Inputs]
    compiled: tuple[str, ...] = (BF16,)
    rounds: int = 3

    def missing(self) -> str:
        """Why it cannot be built here; "" if it can."""
        return PACKAGES[self.package].missing() if self.package in PACKAGES else ""

    def made(self, rate: float | None = None) -> tuple[nn.Module, Inputs]:
        """The model in train mode, and its data. Neither weights nor data depend on the rate."""
        torch.manual_seed(0)
        model = self.build(self.rate if rate is None else rate).train()
        torch.manual_seed(1)
        return model, self.inputs()


@dataclass(frozen=True)
class Size:
    """The sizes of all models.

    Args:
        layers: of transformers.
        width: of their layers, and of the LSTM's.
        heads: of attention.
        batch: rows of a step.
        length: of a row, in words.
        side: of a picture, in patches of 14 x 14 pixels.
        samples: of a second of sound.
        nodes: of the graph, with four times as many edges.
        words: in the vocabularies of the language models.
    """

    layers: int = 4
    width: int = 512
    heads: int = 8
    batch: int = 8
    length: int = 256
    side: int = 16
    samples: int = 16_000
    nodes: int = 2708
    words: int = 1000


FULL = Size()
BRIEF = Size(layers=1, width=32, heads=2, batch=2, length=16, side=3, samples=1600, nodes=60, words=50)
CLASSES = 10
ENCODER_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def _hugging_face(name: str, settings: dict[str, Any], rates: tuple[str, ...], rate: float) -> nn.Module:
    """A model of transformers: the class and the names of the rates that its configuration has."""
    transformers = PACKAGES["transformers"].load()
    configuration = getattr(transformers, f"{name.partition('For')[0].removesuffix('LMHeadModel')}Config")
    rates_given = dict.fromkeys(rates, rate)
    return getattr(transformers, name)(configuration(**settings, **rates_given, attn_implementation="sdpa"))


def _words(count: int, batch: int, length: int) -> Tensor:
    return torch.randint(0, count, (batch, length))


def _labels(batch: int) -> Tensor:
    return torch.randint(0, CLASSES, (batch,))


def bert(size: Size, length: int, name: str = "BERT", **more: Any) -> Case:
    """A classifier of texts with the vocabulary of BERT."""
    settings = _encoder(size) | {"max_position_embeddings": max(512, length)}
    if size is not FULL:
        settings["vocab_size"] = size.words
    build = partial(
        _hugging_face,
        "BertForSequenceClassification",
        settings,
        ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    )

    def inputs() -> Inputs:
        return {"input_ids": _words(size.words, size.batch, length), "labels": _labels(size.batch)}

    return Case(name, "transformers", 0.1, build, inputs, **more)


def _encoder(size: Size) -> dict[str, Any]:
    """What configurations of transformers' encoders have in common."""
    return {
        "hidden_size": size.width, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width, "num_labels": CLASSES,
    }  # fmt: skip


def gpt2(size: Size) -> Case:
    """A language model."""
    settings = {
        "vocab_size": size.words, "n_embd": size.width, "n_layer": size.layers, "n_head": size.heads,
        "bos_token_id": 0, "eos_token_id": 0, "use_cache": False,
    }  # fmt: skip
    build = partial(_hugging_face, "GPT2LMHeadModel", settings, ("resid_pdrop", "embd_pdrop", "attn_pdrop"))

    def inputs() -> Inputs:
        words = _words(size.words, size.batch, size.length)
        return {"input_ids": words, "labels": words}

    return Case("GPT-2", "transformers", 0.1, build, inputs)


def vit(size: Size) -> Case:
    """A classifier of pictures."""
    settings = _encoder(size) | {"image_size": 14 * size.side, "patch_size": 14}
    build = partial(_hugging_face, "ViTForImageClassification", settings, ENCODER_RATES)

    def inputs() -> Inputs:
        shape = (size.batch, 3, 14 * size.side, 14 * size.side)
        return {"pixel_values": torch.randn(shape), "labels": _labels(size.batch)}

    return Case("ViT", "transformers", 0.1, build, inputs)


def wav2vec2(size: Size) -> Case:
    """A classifier of sounds, without the masking of SpecAugment, which draws with NumPy."""
    settings = _encoder(size) | {
        "conv_dim": (size.width // 2,) * 7, "layerdrop": 0.0, "apply_spec_augment": False,
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": size.width // 2,
    }  # fmt: skip
    rates = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout")
    build = partial(_hugging_face, "Wav2Vec2ForSequenceClassification", settings, rates)

    def inputs() -> Inputs:
        return {"input_values": torch.randn(size.batch, size.samples), "labels": _labels(size.batch)}

    return Case("Wav2Vec2", "transformers", 0.1, build, inputs)


class Encoder(nn.Module):
    """PyTorch's own encoder, and a linear layer on the mean over positions."""

    def __init__(self, size: Size, rate: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(size.width, size.heads, 4 * size.width, rate, batch_first=True)
        self.body = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(x).mean(1)), labels)


def encoder(size: Size) -> Case:
    def inputs() -> Inputs:
        return {"x": torch.randn(size.batch, size.length, size.width), "labels": _labels(size.batch)}

    return Case("nn.TransformerEncoder", "torch", 0.1, partial(Encoder, size), inputs)


class LanguageLSTM(nn.Module):
    """Three layers of LSTM, with dropout before, between and after them (Zaremba et al. 2014)."""

    def __init__(self, size: Size, rate: float) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(size.words, size.width), nn.Dropout(rate)
        self.body = nn.LSTM(size.width, size.width, 3, dropout=rate, batch_first=True)
        self.head = nn.Linear(size.width, size.words)

    def forward(self, words: Tensor) -> Tensor:
        output = self.head(self.drop(self.body(self.drop(self.embedding(words[:, :-1])))[0]))
        return F.cross_entropy(output.flatten(0, 1), words[:, 1:].flatten())


def lstm(size: Size) -> Case:
    """With 20 rows of 35 words, as published for the Penn Treebank."""
    rows, length = (20, 35) if size is FULL else (size.batch, 5)
    return Case(
        "nn.LSTM", "torch", 0.5, partial(LanguageLSTM, size),
        lambda: {"words": _words(size.words, rows, length + 1)}, rounds=7,
    )  # fmt: skip


class Graph(nn.Module):
    """GAT of two layers, 8 heads of 8 features, with dropout of features and attention (Velickovic et al. 2018)."""

    def __init__(self, features: int, rate: float) -> None:
        super().__init__()
        networks = importlib.import_module("torch_geometric.nn")
        self.body = networks.GAT(features, 64, 2, CLASSES, dropout=rate, heads=8, act="elu")

    def forward(self, x: Tensor, edges: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x, edges), labels)


def gat(size: Size) -> Case:
    """On a graph of the size of Cora."""
    features = 1433 if size is FULL else 16

    def inputs() -> Inputs:
        edges = torch.randint(0, size.nodes, (2, 4 * size.nodes))
        return {"x": torch.randn(size.nodes, features), "edges": edges, "labels": _labels(size.nodes)}

    return Case("GAT", "torch_geometric", 0.6, partial(Graph, features), inputs, rounds=7)


class Pictures(nn.Module):
    """ConvNeXt with DropPath."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        create = PACKAGES["timm"].load().create_model
        self.body = create("convnext_atto", pretrained=False, num_classes=CLASSES, drop_path_rate=rate)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x), labels)


def convnext(size: Size) -> Case:
    side = 128 if size is FULL else 32

    def inputs() -> Inputs:
        return {"x": torch.randn(size.batch, 3, side, side), "labels": _labels(size.batch)}

    return Case("ConvNeXt, DropPath", "timm", 0.2, Pictures, inputs)


class MLP(nn.Module):
    """Three linear layers with ReLU and dropout between them, on 64 rows."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Dropout(rate), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(rate),
            nn.Linear(256, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x), labels)


SMALL = Case("MLP of 3 layers, 64 rows", "torch", 0.5, MLP, lambda: {"x": torch.randn(64, 64), "labels": _labels(64)})
LONG = "BERT, length 512"


def cases(size: Size) -> dict[str, Case]:
    """The models whose steps are timed, by name."""
    every = [
        bert(size, size.length, compiled=(F32, BF16), rounds=5), gpt2(size), vit(size), wav2vec2(size), encoder(size),
        lstm(size), gat(size), convnext(size),
    ]  # fmt: skip
    return {case.name: case for case in every}


def found(name: str, size: Size) -> Case:
    """The case of this name, the one whose memory alone is measured among them."""
    return bert(size, 2 * size.length, LONG) if name == LONG else cases(size)[name]

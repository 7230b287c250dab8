"""Models of other packages in small random configurations, and the list of all models. Nothing is downloaded."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from mc_models_torch import TORCH, TORCHDROP, Inputs, Model, normal
from peers import Package
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"

PACKAGES = {
    name: Package(name, name, name) for name in ("transformers", "torch_geometric", "timm", "torchvision")
}  # fmt: skip

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99, "hidden_size": 32}
SIZES = {**HEADS, "intermediate_size": 64}
LLAMA = {**SIZES, "num_key_value_heads": 2, "attention_dropout": 0.1}
SEQUENCES = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "attention_dropout": 0.1,
    "activation_dropout": 0.1,
}  # fmt: skip
IMAGES = {
    "image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    **{name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
}  # fmt: skip
SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "conv_dim": (32, 32),
    "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "layerdrop": 0.1,
}  # fmt: skip


def words(rows: int = 8, length: int = 12) -> Inputs:
    """Numbers of words, none of which is padding."""
    return {"input_ids": torch.randint(3, 90, (rows, length))}


def attended() -> Inputs:
    """Numbers of words, with a mask that hides the last of some rows."""
    mask = torch.ones(8, 12, dtype=torch.long)
    mask[::2, -3:] = 0
    return {**words(), "attention_mask": mask}


def sound() -> Inputs:
    return {"input_values": torch.randn(8, 800)}


def pictures() -> Inputs:
    return {"pixel_values": torch.randn(8, 3, 32, 32)}


def hugging_face(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """Builds a model of transformers: its class from a name, such as "Bert" or "T5Encoder", without "Model"."""

    def build() -> nn.Module:
        transformers = PACKAGES["transformers"].load()
        configuration = getattr(transformers, f"{name.removesuffix('Encoder')}Config")
        return getattr(transformers, f"{name}Model")(configuration(**settings))

    return build


def whisper_encoder() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    settings = {**SEQUENCES, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperEncoder(WhisperConfig(**settings, num_mel_bins=8, max_source_positions=16, dropout=0.1))


def _hf(label: str, model: Callable[[], nn.Module], inputs: Callable[[], Inputs] = words, **more: Any) -> Model:
    return Model(label, "transformers", model, inputs, **more)


TRANSFORMERS = [
    _hf("BERT", hugging_face("Bert", **SIZES), group="BERT"),
    _hf("BERT, eager attention", hugging_face("Bert", **SIZES, attn_implementation="eager"), group="BERT"),
    _hf("BERT, padded", hugging_face("Bert", **SIZES), attended, group="BERT"),
    _hf("BERT, 4 layers, d = 512, 8 x 64",
        hugging_face("Bert", vocab_size=99, hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
            intermediate_size=2048),
        lambda: words(8, 64), group="BERT", large=True),
    _hf("RoBERTa", hugging_face("Roberta", **SIZES)),
    _hf("ELECTRA", hugging_face("Electra", **SIZES, embedding_size=32)),
    _hf("ALBERT", hugging_face("Albert", **SIZES, embedding_size=16, hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1)),
    _hf("DistilBERT", hugging_face("DistilBert", vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64)),
    _hf("DeBERTa", hugging_face("Deberta", **SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"])),
    _hf("DeBERTa v2", hugging_face("DebertaV2", **SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"])),
    _hf("GPT-2", hugging_face("GPT2", vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)),
    _hf("GPT-2, eager attention", hugging_face("GPT2", vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1,
        eos_token_id=2, attn_implementation="eager")),
    _hf("OPT, LayerDrop", hugging_face("OPT", vocab_size=99, hidden_size=32, num_hidden_layers=4,
        num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.2)),
    _hf("LLaMA, attention dropout", hugging_face("Llama", **LLAMA)),
    _hf("Mixtral, attention dropout", hugging_face("Mixtral", **LLAMA, num_local_experts=4)),
    _hf("Mixtral, router jitter", hugging_face("Mixtral", **LLAMA, num_local_experts=4, router_jitter_noise=0.05)),
    _hf("T5 encoder", hugging_face("T5Encoder", vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2,
        num_heads=4)),
    _hf("T5", hugging_face("T5", vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        lambda: {**words(), "decoder_input_ids": words()["input_ids"]}),
    _hf("BART", hugging_face("Bart", **SEQUENCES)),
    _hf("BART, LayerDrop", hugging_face("Bart", **SEQUENCES, encoder_layerdrop=0.2, decoder_layerdrop=0.2)),
    _hf("Whisper encoder", whisper_encoder, lambda: {"input_features": torch.randn(8, 8, 32)}),
    _hf("Wav2Vec2, LayerDrop", hugging_face("Wav2Vec2", **SPEECH), sound),
    _hf("SEW-D, LayerDrop", hugging_face("SEWD", **SPEECH, squeeze_factor=2), sound),
    _hf("ViT", hugging_face("ViT", **IMAGES), pictures),
    _hf("BEiT, DropPath", hugging_face("Beit", **IMAGES, drop_path_rate=0.2), pictures),
    _hf("Swin, DropPath", hugging_face("Swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2],
        num_heads=[2, 4], window_size=4, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
        drop_path_rate=0.2), pictures),
    _hf("ConvNeXt, DropPath", hugging_face("ConvNext", hidden_sizes=[8, 16], depths=[2, 2], num_stages=2,
        drop_path_rate=0.2, patch_size=2), pictures),
]  # fmt: skip


def graph() -> Inputs:
    """40 nodes with 16 features, and 160 edges."""
    return torch.randn(40, 16), torch.randint(0, 40, (2, 160))


def geometric(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """Builds a graph network of three layers by the name of its class."""
    return lambda: getattr(importlib.import_module("torch_geometric.nn"), name)(16, 32, 3, 4, dropout=0.5, **settings)


class _DroppedEdges(nn.Module):
    """A graph network without some of the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.body = geometric("GCN")()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        from torch_geometric.utils import dropout_edge

        return self.body(x, dropout_edge(edges, p=0.2, training=self.training)[0])


def _graph(label: str, build: Callable[[], nn.Module]) -> Model:
    return Model(label, "torch_geometric", build, graph, rows=False)


TORCH_GEOMETRIC = [
    _graph("GCN", geometric("GCN")),
    _graph("GCN, BatchNorm", geometric("GCN", norm="batch_norm")),
    _graph("GCN, dropped edges", _DroppedEdges),
    _graph("GAT", geometric("GAT", heads=2)),
    _graph("GATv2", geometric("GAT", heads=2, v2=True)),
    _graph("GraphSAGE", geometric("GraphSAGE")),
    _graph("GIN", geometric("GIN")),
    Model("MLP of rows", "torch_geometric",
        lambda: importlib.import_module("torch_geometric.nn").MLP([16, 32, 32, 3], dropout=0.2), normal(32, 16)),
]  # fmt: skip


def timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: PACKAGES["timm"].load().create_model(name, pretrained=False, num_classes=10, **settings)


def torchvision(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(PACKAGES["torchvision"].load().models, name)(weights=None, num_classes=10, **settings)


PICTURES = [
    Model("ViT tiny, DropPath", "timm", timm("vit_tiny_patch16_224", img_size=64, depth=4, drop_rate=0.1,
        attn_drop_rate=0.1, drop_path_rate=0.2), normal(4, 3, 64, 64)),
    Model("ConvNeXt atto, DropPath", "timm", timm("convnext_atto", drop_rate=0.1, drop_path_rate=0.2),
        normal(4, 3, 64, 64)),
    Model("ResNet-18, DropBlock", "timm", timm("resnet18", drop_rate=0.1, drop_block_rate=0.1), normal(4, 3, 64, 64)),
    Model("EfficientNet-B0, StochasticDepth", "torchvision", torchvision("efficientnet_b0"), normal(4, 3, 64, 64)),
    Model("Swin-T, StochasticDepth", "torchvision", torchvision("swin_t", dropout=0.1, attention_dropout=0.1),
        normal(2, 3, 64, 64)),
    Model("MobileNet v3", "torchvision", torchvision("mobilenet_v3_small"), normal(4, 3, 64, 64)),
]  # fmt: skip

MODELS = [*TORCH, *TORCHDROP, *TRANSFORMERS, *TORCH_GEOMETRIC, *PICTURES]

QUICK = ("MLP 64-256-256-10", "BERT", "GCN", "ResNet-18, DropBlock")
"""The names of the models of a quick run."""

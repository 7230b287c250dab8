"""transformers' models with torchdrop's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from tests.seeding import seeded
from torchdrop.functional import scaled_dot_product_attention

transformers = pytest.importorskip("transformers")
hugging_face = pytest.importorskip("torchdrop.integrations.hugging_face")
pytest.importorskip("transformers.masking_utils")

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def bert(attention: str) -> nn.Module:
    config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attn_implementation=attention)
    return seeded(0, transformers.BertModel, config)


def llama(attention: str) -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, attention_dropout=0.1, attn_implementation=attention
    )
    return seeded(0, transformers.LlamaModel, config)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(50, (2, 10))


@pytest.fixture
def padding() -> Tensor:
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:] = 0
    return mask


@pytest.fixture(autouse=True)
def _registered() -> None:
    hugging_face.register_attention()


@pytest.mark.parametrize("make", [bert, llama])
def test_models_give_what_they_give_with_sdpa_in_eval_mode(
    make: Callable[[str], nn.Module], ids: Tensor, padding: Tensor
) -> None:
    ours, stock = make("torchdrop").eval(), make("sdpa").eval()
    for given in ({}, {"attention_mask": padding}):
        torch.testing.assert_close(ours(ids, **given)[0], stock(ids, **given)[0])


@pytest.mark.parametrize("make", [bert, llama])
def test_models_train_with_masks_of_ours(
    make: Callable[[str], nn.Module], ids: Tensor, padding: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def noted(*args: Any, **options: Any) -> Tensor:
        rates.append(args[4])
        return scaled_dot_product_attention(*args, **options)

    monkeypatch.setattr(hugging_face, "scaled_dot_product_attention", noted)
    model = make("torchdrop").train()
    y = seeded(1, model, ids, attention_mask=padding)[0]
    y.square().sum().backward()
    assert rates == [0.1, 0.1]
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert torch.equal(y, seeded(1, model, ids, attention_mask=padding)[0])
    assert not torch.equal(y, seeded(2, model, ids, attention_mask=padding)[0])


def test_monte_carlo_inference_drops_attention_weights(ids: Tensor) -> None:
    model = llama("torchdrop").eval()
    found = torchdrop.mc_predict(First(model), ids, 4, seed=0, task=None, keep_samples=True)
    other = torchdrop.mc_predict(First(llama("sdpa").eval()), ids, 4, seed=0, task=None, keep_samples=True)
    torch.testing.assert_close(found.samples, other.samples)
    assert not torch.equal(found.samples[0], found.samples[1])


class First(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)[0]


def test_a_bias_for_positions_is_added() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8).unbind()
    bias, seen = torch.randn(1, 4, 7, 7), torch.rand(2, 1, 7, 7) > 0.2
    module = nn.Module()
    for mask in (None, seen, torch.zeros(2, 1, 7, 7).masked_fill(~seen, -1e9)):
        y, _ = hugging_face.attention_forward(module, q, k, v, mask, is_causal=False, position_bias=bias)
        both = bias if mask is None else bias.masked_fill(~seen, -1e9)
        right = nn.functional.scaled_dot_product_attention(q, k, v, both)
        torch.testing.assert_close(y, right.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", ["softcap", "s_aux", "output_attentions"])
def test_what_it_has_not_is_refused(asked: str) -> None:
    q = torch.randn(2, 4, 7, 8)
    with pytest.raises(ValueError, match=f"does not support {asked}"):
        hugging_face.attention_forward(nn.Module(), q, q, q, None, **{asked: True})

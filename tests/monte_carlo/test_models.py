"""Monte Carlo inference on models of transformers, built from small random configurations: nothing is downloaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import torchdrop
from tests.mc_models import (
    apart,
    call,
    check_draws,
    check_each_source,
    check_rows,
    equal,
    main,
    served_masks,
    train_draws,
    unchanged,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

NEVER = 1e-12
"""A rate of LayerDrop at which the decision is drawn, and every layer runs."""

SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "conv_dim": (32, 32),
    "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.5, "mask_time_length": 2, "layerdrop": NEVER,
}  # fmt: skip

SILENT = dict.fromkeys(
    ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "feat_quantizer_dropout"), 0.0
)


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(1, 90, (5, 12)), "attention_mask": torch.ones(5, 12, dtype=torch.long)}


def sound() -> dict[str, Any]:
    return {"input_values": torch.randn(5, 800)}


def bert(attention: str) -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            attn_implementation=attention,
        )
    )  # fmt: skip


def gpt2(attention: str) -> nn.Module:
    return transformers.GPT2Model(
        transformers.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
            attn_implementation=attention,
        )
    )  # fmt: skip


def wav2vec2(attention: str = "sdpa", **changes: Any) -> nn.Module:
    return transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(**{**SPEECH, "attn_implementation": attention, **changes})
    )


def sew_d(**changes: Any) -> nn.Module:
    return transformers.SEWDModel(transformers.SEWDConfig(**{**SPEECH, "squeeze_factor": 2, **changes}))


def t5() -> nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )


def swin() -> nn.Module:
    return transformers.SwinModel(
        transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
            hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, drop_path_rate=0.2,
        )
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], int, set[str]]] = {
    "bert-sdpa": (lambda: bert("sdpa"), tokens, 7, {"dropout", "attention"}),
    "bert-eager": (lambda: bert("eager"), tokens, 7, {"dropout"}),
    "gpt2-sdpa": (lambda: gpt2("sdpa"), tokens, 7, {"dropout", "attention"}),
    "gpt2-eager": (lambda: gpt2("eager"), tokens, 7, {"dropout"}),
    "wav2vec2-sdpa": (lambda: wav2vec2("sdpa"), sound, 16, {"dropout", "attention", "uniform"}),
    "wav2vec2-eager": (lambda: wav2vec2("eager"), sound, 16, {"dropout", "uniform"}),
    "sew-d": (sew_d, sound, 12, {"dropout", "bernoulli"}),
    "t5": (t5, tokens, 10, {"dropout", "attention"}),
    "swin": (swin, lambda: {"pixel_values": torch.randn(5, 3, 32, 32)}, 16, {"dropout", "attention", "uniform"}),
}
"""Each with its inputs, the draws of a forward in train mode and their kinds."""

every_model = pytest.mark.parametrize("name", MODELS)


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    make, inputs, _, _ = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, values = make().eval(), inputs()
    call(model, values)  # Swin's layers set attributes by the size of their first input
    return model, values


@every_model
def test_draws_are_those_of_train_mode(name: str) -> None:
    model, inputs = built(name)
    report = check_draws(model, inputs)
    assert report.expected == MODELS[name][2]
    assert {source.kind for source in report.sources} == MODELS[name][3]


@every_model
def test_model_on_entry_in_train_mode(name: str) -> None:
    """It stays so, and its samples are those of the model in eval mode."""
    model, inputs = built(name)
    with torchdrop.mc_dropout(model, seed=1):
        expected = call(model, inputs)
    model.train()
    with unchanged(model), torchdrop.mc_dropout(model, seed=1):
        assert equal(call(model, inputs), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.slow
@every_model
def test_every_source_makes_a_difference(name: str) -> None:
    model, inputs = built(name)
    if "layerdrop" in model.config.to_dict():
        model.config.layerdrop = 0.5
    check_each_source(model, inputs)


@every_model
def test_rows_have_their_masks_in_any_batch(name: str) -> None:
    model, inputs = built(name)
    with unchanged(model):
        check_rows(model, inputs)


@every_model
def test_strategies_agree(name: str) -> None:
    model, inputs = built(name)
    expected = torchdrop.mc_predict(model, inputs, samples=6, seed=3, strategy="loop", select_output=main)
    worked = set()
    for strategy in ("vectorized", "repeated"):
        try:
            other = torchdrop.mc_predict(
                model, inputs, samples=6, seed=3, strategy=strategy, select_output=main, chunk=4
            )
        except RuntimeError as error:
            if "does not work here" not in str(error):
                raise
        else:
            assert apart(other.mean, expected.mean) < 1e-4
            worked.add(strategy)
    assert worked or name.startswith(("wav2vec2", "sew")), "these run with LayerDrop, one sample after another"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-sdpa", "bert-eager", "gpt2-sdpa", "gpt2-eager", "t5", "swin"])
def test_spread_is_that_of_train_mode(name: str) -> None:
    """The variance of the outputs, over elements, as in 300 forwards in train mode: each rate is right."""
    model, inputs = built(name)
    with torch.no_grad():
        model.train()
        trained = torch.stack([main(call(model, inputs)) for _ in range(300)]).var(0)
        model.eval()
    served = torchdrop.mc_predict(model, inputs, samples=300, seed=0, select_output=main)
    assert float(trained.mean()) == pytest.approx(float(served.variance.mean()), rel=0.05)


def test_layer_drop() -> None:
    """A forward draws what its layers draw: all of them where no layer is skipped, fewer where one is."""
    whole = len(train_draws(wav2vec2().eval(), sound()))
    model, inputs = wav2vec2(layerdrop=0.4).eval(), sound()
    drawn = set()
    with unchanged(model), torch.no_grad(), torchdrop.mc_dropout(model, seed=0) as report:
        for _ in range(60):
            with served_masks() as served:
                call(model, inputs)
            drawn.add(report.draws)
    assert len(served) == report.draws
    assert report.expected == whole == 16
    assert drawn == {4, 8, 12, 16}, "none to three of three layers"
    assert report.inactive == []


def test_spec_augment_stays_off() -> None:
    """It is on in train mode, where it takes numpy's random numbers."""
    model, inputs = wav2vec2().eval(), sound()
    path = "transformers.models.wav2vec2.modeling_wav2vec2._compute_mask_indices"
    with mock.patch(
        path, wraps=getattr(transformers.models.wav2vec2.modeling_wav2vec2, path.split(".")[-1])
    ) as augment:
        before = np.random.get_state()[1].copy()
        train_draws(model, inputs)
        assert augment.call_count == 1
        assert np.array_equal(np.random.get_state()[1], before)
        with torchdrop.mc_dropout(model, seed=0):
            call(model, inputs)
            augment.reset_mock()
            call(model, inputs)
        assert augment.call_count == 0


def test_spec_augment_is_no_source() -> None:
    model, inputs = wav2vec2(layerdrop=0.0, **SILENT).eval(), sound()
    with unchanged(model), pytest.raises(ValueError, match=r"nothing random is active in the model.* dropout"):
        torchdrop.mc_predict(model, inputs, samples=4, seed=0)
    assert not train_draws(model, inputs)


def test_random_state_of_numpy_in_eval_mode() -> None:
    """Wav2Vec2's adapter takes numbers from numpy even in eval mode: they are given back."""
    model, inputs = wav2vec2(add_adapter=True, num_adapter_layers=1).eval(), sound()
    before = np.random.get_state()[2]
    call(model, inputs)
    assert np.random.get_state()[2] != before
    check_draws(model, inputs)


@pytest.mark.parametrize("name", ["bert-sdpa", "bert-eager"])
def test_gradients(name: str) -> None:
    """The loss of a stochastic pass reaches every parameter that the loss of a plain one reaches."""
    model, inputs = built(name)
    call(model, inputs).last_hidden_state.square().sum().backward()
    plain = {label: p.grad for label, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torchdrop.mc_dropout(model, seed=0):
        call(model, inputs).last_hidden_state.square().sum().backward()
    served = {label: p.grad for label, p in model.named_parameters() if p.grad is not None}
    assert served.keys() == plain.keys()
    assert any(not torch.equal(served[label], plain[label]) for label in plain)


def test_head_alone() -> None:
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
    ).eval()
    inputs = tokens()
    result = torchdrop.mc_predict(model, inputs, samples=8, seed=0, sources="dropout", task="classification")
    assert [(s.module, s.kind) for s in result.report.active] == [("dropout", "dropout")]
    assert len(result.report.inactive) == 7
    assert result.mean.shape == (5, 2)
    assert float(result.std.max()) > 0


# Generation: steps of a decoder, with a cache that they write to.


def language_model(p: float) -> nn.Module:
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            resid_pdrop=p, embd_pdrop=p, attn_pdrop=p,
        )
    ).eval()  # fmt: skip


def translator(p: float) -> nn.Module:
    torch.manual_seed(1)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
            dropout_rate=p,
        )
    ).eval()  # fmt: skip


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "without cache": {"do_sample": False, "use_cache": False},
    "sampled": {"do_sample": True},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [language_model, translator])
def test_generation(make: Callable[[float], nn.Module], way: str) -> None:
    model, prompt = make(0.3), torch.randint(3, 99, (3, 6), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, **WAYS[way]}

    def generated(model: nn.Module, **changes: Any) -> tuple[Any, torch.Tensor]:
        torch.manual_seed(5)  # of sampled words
        out = model.generate(prompt, **{**options, **changes})
        return out.sequences, torch.stack(out.logits)

    with torchdrop.mc_dropout(model, seed=0) as report:
        first, second = generated(model), generated(model)
    with torchdrop.mc_dropout(model, seed=0):
        again = generated(model)
        assert generated(model, max_new_tokens=2)[0].shape[1] <= first[0].shape[1]
    assert torch.equal(first[1], again[1])
    assert first[1].shape != second[1].shape or not torch.allclose(first[1], second[1])
    assert len(report.active) > 4
    assert not report.unreached

    silent = make(1e-12)
    plain = generated(silent)
    with torchdrop.mc_dropout(silent, seed=0):
        words, logits = generated(silent)
    assert torch.equal(words, plain[0])
    assert torch.allclose(logits, plain[1], atol=1e-4)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_steps_of_a_decoder_under_one_function() -> None:
    """Within `report.sample`, a step with a cache gives what the whole sequence gives in one call."""
    model = language_model(0.3)
    ids = torch.randint(3, 99, (3, 6), generator=torch.Generator().manual_seed(1))
    dropped = {"sources": "transformer.h.*.mlp*", "masks": "shared"}
    with torch.no_grad(), torchdrop.mc_dropout(model, seed=0, **dropped) as report, report.sample(3):
        first = model(ids)
        again = model(ids)
        step = model(ids[:, :5], use_cache=True)
        assert step.past_key_values.get_seq_length() == 5
        last = model(ids[:, 5:], past_key_values=step.past_key_values, use_cache=True)
    assert torch.equal(first.logits, again.logits)
    assert last.past_key_values.get_seq_length() == 6
    assert last.logits.shape == (3, 1, 99)

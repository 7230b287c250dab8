"""Generation under masks of one function: the masks, the ways to compute a sequence, and its uncertainty."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchdrop.handlers.positions import PlacelessError
from torchdrop.monte_carlo import GeneratedPrediction, mc_generate
from torchdrop.monte_carlo.activate import Activation
from torchdrop.monte_carlo.context import Context
from torchdrop.monte_carlo.prompt import Prompt, find_positions
from torchdrop.monte_carlo.sequences import (
    TokenUncertainty,
    exact_agreement,
    mean_similarity,
    medoid,
    sequence_uncertainty,
    similarities,
)
from torchdrop.seeding import start

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")

NEW: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0}
WORDS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {"initializer_range": 0.5}
"""Weights that are far enough from 0 for samples to generate different words."""


def gpt2(p: float = 0.3, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        **WORDS, **WIDE, n_embd=32, n_layer=2, n_head=4, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p,
        attn_implementation=attention,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def eager(p: float = 0.3) -> nn.Module:
    return gpt2(p, "eager")


def t5(p: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        eos_token_id=2, dropout_rate=p,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def mistral(p: float = 0.3) -> nn.Module:
    """It has heads that share keys, and a cache of the last four words."""
    torch.manual_seed(1)
    config = transformers.MistralConfig(
        **WORDS, **WIDE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=p, sliding_window=4,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()


def opt(p: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.OPTConfig(
        **WORDS, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        dropout=p, attention_dropout=p, max_position_embeddings=64, init_std=0.5,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


def bart(p: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.BartConfig(
        **WORDS, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=p, attention_dropout=p, decoder_start_token_id=2,
        forced_eos_token_id=2, max_position_embeddings=64, init_std=0.5, encoder_layerdrop=0.2,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).eval()


MODELS = [gpt2, t5]
MANY = [gpt2, eager, t5, mistral, opt, bart]


def prompts(rows: int = 3, length: int = 5) -> Tensor:
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(7))


def same(a: GeneratedPrediction, b: GeneratedPrediction) -> None:
    """Asserts that two predictions agree to rounding."""
    assert torch.equal(a.sequences, b.sequences)
    assert torch.equal(a.reference, b.reference)
    for name in ("log_probs", "predictive_entropy", "expected_entropy", "mutual_information"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), equal_nan=True, atol=1e-5, rtol=1e-5)


class Steps:
    """The calls of one sample of a model, with masks that belong to places."""

    def __init__(self, model: nn.Module, ids: Tensor, **inputs: Tensor) -> None:
        self.context = Context(Activation(model, None, 0), model, 0, True)
        self.prompt = Prompt(model, {"input_ids": ids, **inputs}, NEW)

    def __enter__(self) -> Steps:
        self.context.__enter__()
        find_positions(self.context, self.prompt)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.context.__exit__(*exception)

    def sample(self, number: int) -> Any:
        return self.context.activation.report.sample(number)


class TestMasks:
    @torch.no_grad()
    def test_units_of_a_word_in_all_steps(self) -> None:
        """The zeros of the first dropout's output, in one pass and in steps with a cache."""
        model, ids = gpt2(), prompts()
        seen: list[Tensor] = []
        model.transformer.drop.register_forward_hook(lambda module, args, out: seen.append(out != 0))  # type: ignore[union-attr,operator]
        with Steps(model, ids) as steps, steps.sample(3):
            seen.clear()
            model(input_ids=ids)
            held = model(input_ids=ids[:, :2], use_cache=True).past_key_values
            for word in range(2, 5):
                model(input_ids=ids[:, word : word + 1], past_key_values=held, use_cache=True)
        assert [tuple(one.shape[:2]) for one in seen] == [(3, 5), (3, 2), (3, 1), (3, 1), (3, 1)]
        assert torch.equal(torch.cat(seen[1:], 1), seen[0])
        assert torch.equal(seen[0][0], seen[0][1])  # rows share masks
        assert len({tuple(word.tolist()) for word in seen[0][0]}) == 5  # and places do not
        assert 0.5 < seen[0].double().mean() < 0.9

    @torch.no_grad()
    def test_attention_of_two_words_in_all_steps(self) -> None:
        """The zeros of attention weights, where a word sees those before it."""
        model, ids = eager(), prompts()
        with Steps(model, ids) as steps, steps.sample(3):
            whole = model(input_ids=ids, output_attentions=True).attentions
            first = model(input_ids=ids[:, :2], use_cache=True, output_attentions=True)
            found = [first.attentions]
            for word in range(2, 5):
                step = model(
                    input_ids=ids[:, word : word + 1], past_key_values=first.past_key_values, use_cache=True,
                    output_attentions=True,
                )  # fmt: skip
                found.append(step.attentions)
        for layer in range(2):
            rows = torch.cat([nn.functional.pad(one[layer], (0, 5 - one[layer].shape[-1])) for one in found], 2)
            visible = torch.ones(5, 5, dtype=torch.bool).tril()
            kept = whole[layer][..., visible] != 0
            assert torch.equal(rows[..., visible] != 0, kept)
            assert 0.5 < kept.double().mean() < 0.9
            torch.testing.assert_close(rows, whole[layer])

    @pytest.mark.parametrize("make", MANY)
    @torch.no_grad()
    def test_steps_compute_what_one_pass_does(self, make: Callable[[], nn.Module]) -> None:
        model, ids = make(), prompts()
        words, translates = prompts(3, 7), model.config.is_encoder_decoder  # type: ignore[union-attr]
        with Steps(model, ids) as steps:
            logits = []
            for number in (0, 1):
                with steps.sample(number):
                    if translates:
                        given = {"encoder_outputs": model.get_encoder()(input_ids=ids)}  # type: ignore[operator]
                        name = "decoder_input_ids"
                    else:
                        given, name = {}, "input_ids"
                    whole = model(**({"input_ids": ids} if translates else {}), **{name: words}).logits
                    held, found = None, []
                    for first, stop in itertools.pairwise((0, 3, 4, 5, 7)):
                        out = model(**given, **{name: words[:, first:stop]}, past_key_values=held, use_cache=True)
                        held = out.past_key_values
                        found.append(out.logits)
                torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)
                logits.append(whole)
        assert not torch.allclose(logits[0], logits[1], atol=1e-2)

    @pytest.mark.parametrize("make", MANY)
    def test_with_and_without_a_cache(self, make: Callable[[], nn.Module]) -> None:
        model, ids = make(), prompts()
        cached = mc_generate(model, ids, 4, seed=0, generate_kwargs=NEW)
        same(cached, mc_generate(model, ids, 4, seed=0, generate_kwargs={**NEW, "use_cache": False}))
        assert (cached.agreement < 1).any()  # so that there is something to compare
        assert not torch.allclose(cached.log_probs[0], cached.log_probs[1], equal_nan=True)
        beams = {**NEW, "num_beams": 2}
        searched = mc_generate(model, ids, 2, seed=0, generate_kwargs=beams)
        same(searched, mc_generate(model, ids, 2, seed=0, generate_kwargs={**beams, "use_cache": False}))

    @pytest.mark.parametrize("make", MANY)
    def test_a_prompt_in_a_batch_and_alone(self, make: Callable[[], nn.Module]) -> None:
        """Decoder-only models have padding on the left, and encoders on the right. It is known from the mask, or, as in
        `generate`, from the token of padding."""
        model, ids = make(), prompts()
        mask = torch.ones_like(ids)
        given = slice(0, 3) if model.config.is_encoder_decoder else slice(2, 5)  # type: ignore[union-attr]
        padding = slice(3, 5) if given.start == 0 else slice(0, 2)
        ids[1, padding], mask[1, padding] = 0, 0
        batch = mc_generate(model, {"input_ids": ids, "attention_mask": mask}, 3, seed=0, generate_kwargs=NEW)
        alone = mc_generate(model, ids[1:2, given], 3, seed=0, generate_kwargs=NEW)
        same(batch, mc_generate(model, ids, 3, seed=0, generate_kwargs=NEW))
        for number in range(3):
            length = int(alone.lengths[number, 0])
            assert int(batch.lengths[number, 1]) == length
            assert torch.equal(batch.sequences[number, 1, :length], alone.sequences[number, 0, :length])
        length = int(alone.valid.sum())
        torch.testing.assert_close(batch.log_probs[:, 1, :length], alone.log_probs[:, 0, :length], atol=1e-4, rtol=1e-4)


class TestPrediction:
    @pytest.mark.parametrize("make", MODELS)
    def test_without_dropout_it_is_generate(self, make: Callable[[float], nn.Module]) -> None:
        model, ids = make(1e-12), prompts()
        result = mc_generate(model, ids, 2, seed=0, generate_kwargs=NEW)
        plain = model.generate(ids, **NEW)  # type: ignore[operator]
        plain = plain[:, 1:] if model.config.is_encoder_decoder else plain[:, 5:]  # type: ignore[union-attr]
        assert torch.equal(result.reference, plain)
        assert torch.equal(result.sequences, plain.expand(2, -1, -1))
        assert result.matches.tolist() == result.agreement.tolist() == [1.0, 1.0, 1.0]
        assert result.uncertainty.knowledge.max() < 1e-6

    @pytest.mark.parametrize("make", MODELS)
    @torch.no_grad()
    def test_uncertainty_of_tokens_and_sequences(self, make: Callable[[float], nn.Module]) -> None:
        """It is computed once more from scores of one word after the other, with a cache."""
        model, ids = make(0.3), prompts(2)
        result = mc_generate(model, ids, 4, seed=0, generate_kwargs={**NEW, "eos_token_id": None})
        translates = model.config.is_encoder_decoder  # type: ignore[union-attr]
        probabilities = torch.zeros(4, 2, 6, 99)
        with Steps(model, ids) as steps:
            for number in range(4):
                with steps.sample(number):
                    given: dict[str, Any] = {}
                    held, words, name = None, ids, "input_ids"
                    if translates:
                        given = {"encoder_outputs": model.get_encoder()(input_ids=ids)}  # type: ignore[operator]
                        words, name = torch.zeros(2, 1, dtype=torch.int64), "decoder_input_ids"
                    for step in range(6):
                        out = model(**given, **{name: words}, past_key_values=held, use_cache=True)
                        held = out.past_key_values
                        probabilities[number, :, step] = out.logits[:, -1].softmax(-1)
                        words = result.reference[:, step : step + 1]
        assert result.valid.all()
        chosen = probabilities.gather(3, result.reference.expand(4, -1, -1).unsqueeze(3)).squeeze(3)
        torch.testing.assert_close(result.log_probs, chosen.log(), atol=1e-4, rtol=1e-4)
        mean = probabilities.mean(0)
        total, expected = -(mean * mean.log()).sum(2), -(probabilities * probabilities.log()).sum(3).mean(0)
        torch.testing.assert_close(result.predictive_entropy, total, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result.expected_entropy, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result.mutual_information, total - expected, atol=1e-4, rtol=1e-3)
        assert result.log_probs.dtype == result.uncertainty.total.dtype == torch.float32
        whole = chosen.prod(2)
        torch.testing.assert_close(result.uncertainty.log_likelihood, whole.mean(0).log(), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(result.uncertainty.total, -whole.mean(0).log() / 6, atol=1e-3, rtol=1e-4)
        knowledge = (whole.mean(0).log() - whole.log().mean(0)) / 6
        torch.testing.assert_close(result.uncertainty.knowledge, knowledge, atol=1e-4, rtol=1e-3)
        assert (knowledge > 0).all()

    def test_sequences_that_end(self) -> None:
        model, ids = gpt2(), prompts()
        free = mc_generate(model, ids, 4, seed=0, generate_kwargs={**NEW, "eos_token_id": None})
        end = int(free.sequences[1, 0, 2])
        result = mc_generate(model, ids, 4, seed=0, generate_kwargs={**NEW, "eos_token_id": end})
        for number, row in itertools.product(range(4), range(3)):
            words = free.sequences[number, row].tolist()
            length = words.index(end) + 1 if end in words else 6
            assert int(result.lengths[number, row]) == length
            assert result.sequences[number, row].tolist() == words[:length] + [0] * (result.sequences.shape[2] - length)
        assert int(result.lengths.min()) < 6
        scored = mc_generate(
            model, ids, 2, seed=0, reference=free.sequences[1], generate_kwargs={**NEW, "eos_token_id": [end, 98]}
        )
        assert int(scored.valid[0].sum()) == int(result.lengths[1, 0])
        assert not scored.valid.all()
        for name in ("log_probs", "predictive_entropy", "expected_entropy", "mutual_information"):
            missing = getattr(scored, name).isnan()
            assert torch.equal(missing, (~scored.valid).expand_as(missing)), name

    def test_sequences_that_end_otherwise(self) -> None:
        """Where no token ends a sequence, its length is the number of words that were generated."""

        class Stops(transformers.StoppingCriteria):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                self.calls = 0

            def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
                self.calls += 1
                return torch.full((len(input_ids),), self.calls in (6, 8))

        how = {**NEW, "eos_token_id": None, "stopping_criteria": [Stops()]}
        result = mc_generate(gpt2(), prompts(), 2, seed=0, generate_kwargs=how)
        assert result.lengths.tolist() == [[2, 2, 2], [6, 6, 6]]  # after six words of the reference
        assert result.sequences[0, :, 2:].unique().tolist() == [0]

    def test_a_reference_of_ones_own(self) -> None:
        model, ids = gpt2(), prompts()
        free = mc_generate(model, ids, 3, seed=0, generate_kwargs=NEW)
        own = mc_generate(model, ids, 3, seed=0, generate_kwargs=NEW, reference=free.sequences[1])
        assert torch.equal(own.sequences, free.sequences)
        assert torch.equal(own.reference, free.sequences[1])
        assert (own.matches >= 1 / 3).all()
        same(own, mc_generate(model, ids, 3, seed=0, generate_kwargs=NEW, reference=own.reference))
        how = {**NEW, "eos_token_id": None}
        begun = mc_generate(model, ids, 3, seed=0, generate_kwargs=how, reference=free.sequences[1, :, :3])
        assert begun.matches.tolist() == [0, 0, 0]  # all are longer

    def test_words_that_are_drawn_follow_from_the_seed(self) -> None:
        model, ids = gpt2(), prompts()
        drawn = {**NEW, "do_sample": True}
        torch.manual_seed(3)
        state = torch.get_rng_state()
        first = mc_generate(model, ids, 3, seed=0, generate_kwargs=drawn)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(5)
        same(first, mc_generate(model, ids, 3, seed=0, generate_kwargs=drawn))
        other = mc_generate(model, ids, 3, seed=1, generate_kwargs=drawn)
        assert first.sequences.shape != other.sequences.shape or not torch.equal(first.sequences, other.sequences)
        report: Any = first.report
        assert {source.kind for source in report.active} == {"dropout", "attention"}

    def test_words_are_drawn_as_generate_draws_them(self) -> None:
        model, ids = gpt2(1e-12), prompts()
        drawn = {**NEW, "do_sample": True, "eos_token_id": None, "temperature": 30.0}
        result = mc_generate(model, ids, 2, seed=0, generate_kwargs=drawn)
        with torch.random.fork_rng():
            start(0, "generate 1", torch.manual_seed)
            plain = model.generate(ids, **drawn)  # type: ignore[operator]
        assert torch.equal(result.sequences[1], plain[:, 5:])
        assert not torch.equal(result.sequences[0], result.sequences[1])

    def test_draws_that_have_no_places(self) -> None:
        model = gpt2()
        inner = model.transformer.drop  # type: ignore[union-attr]

        class Shuffled(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return inner(x)[..., torch.randperm(x.shape[-1])] if self.training else inner(x)  # type: ignore[operator]

        model.transformer.drop = Shuffled()  # type: ignore[union-attr]
        with pytest.warns(UserWarning, match=r"do not follow from the places of words \(transformer.drop: randperm\)"):
            mc_generate(model, prompts(), 2, seed=0, generate_kwargs=NEW)

    def test_the_model_stays_as_it_was(self) -> None:
        """In train mode the reference is without dropout, too."""
        model, ids = gpt2(), prompts()
        before = mc_generate(model, ids, 2, seed=0, generate_kwargs=NEW)
        keys = list(model.__dict__)
        model.train()
        after = mc_generate(model, ids, 2, seed=0, generate_kwargs=NEW)
        assert all(module.training for module in model.modules())
        assert list(model.__dict__) == keys
        same(before, after)

    def test_sources(self) -> None:
        model, ids = gpt2(), prompts()
        result = mc_generate(model, ids, 2, seed=0, generate_kwargs=NEW, sources="transformer.h.1.mlp")
        report: Any = result.report
        assert [source.module for source in report.active] == ["transformer.h.1.mlp.dropout"]

    def test_summary(self) -> None:
        result = mc_generate(gpt2(), prompts(), 2, seed=0, generate_kwargs=NEW)
        assert "GeneratedPrediction of 3 sequences from 2 samples, seed 0" in repr(result)
        assert "transformer.h.0.attn" in repr(result)
        assert len(result) == 3


def random_sequences(samples: int = 5, rows: int = 3, length: int = 4) -> tuple[Tensor, Tensor]:
    """Sequences of few words, so that some are equal, and what stands after their ends."""
    return torch.randint(2, (samples, rows, length)), torch.randint(1, length + 1, (samples, rows))


def lists(sequences: Tensor, lengths: Tensor, row: int) -> list[list[int]]:
    return [one[row, : int(length[row])].tolist() for one, length in zip(sequences, lengths, strict=True)]


class TestAgreement:
    def test_pairs_of_samples(self) -> None:
        sequences, lengths = random_sequences()
        table = similarities(sequences, lengths)
        for row in range(3):
            words = lists(sequences, lengths, row)
            pairs = list(itertools.combinations(range(5), 2))
            equal = sum(words[a] == words[b] for a, b in pairs) / len(pairs)
            assert float(exact_agreement(sequences, lengths)[row]) == pytest.approx(equal)

            def like(a: list[int], b: list[int]) -> float:
                return sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b))

            for a, b in itertools.product(range(5), repeat=2):
                assert float(table[a, b, row]) == pytest.approx(like(words[a], words[b]))
            mean = sum(like(words[a], words[b]) for a, b in pairs) / len(pairs)
            assert float(mean_similarity(table)[row]) == pytest.approx(mean)
            sums = [sum(like(one, other) for other in words) for one in words]
            assert sums[int(medoid(table)[row])] == pytest.approx(max(sums))

    def test_a_function_of_ones_own(self) -> None:
        sequences, lengths = random_sequences()
        calls = []

        def overlap(a: Tensor, b: Tensor) -> float:
            calls.append((a.tolist(), b.tolist()))
            first, second = set(a.tolist()), set(b.tolist())
            return len(first & second) / len(first | second)

        table = similarities(sequences, lengths, overlap)
        distinct = 0
        for row in range(3):
            words = lists(sequences, lengths, row)
            different = len(set(map(tuple, words)))
            distinct += different * (different - 1) // 2
            for a, b in itertools.product(range(5), repeat=2):
                one, other = set(words[a]), set(words[b])
                expected = 1.0 if words[a] == words[b] else len(one & other) / len(one | other)
                assert float(table[a, b, row]) == pytest.approx(expected)
        assert len(calls) == distinct  # once for each pair of different ones

    def test_the_order_of_samples_does_not_matter(self) -> None:
        sequences, lengths = random_sequences()
        order = torch.randperm(5)
        mixed = similarities(sequences[order], lengths[order])
        torch.testing.assert_close(mixed, similarities(sequences, lengths)[order][:, order])
        torch.testing.assert_close(
            exact_agreement(sequences[order], lengths[order]), exact_agreement(sequences, lengths)
        )

    def test_one_sample_agrees_with_none(self) -> None:
        sequences, lengths = random_sequences(samples=1)
        assert exact_agreement(sequences, lengths).isnan().all()
        assert mean_similarity(similarities(sequences, lengths)).isnan().all()
        assert medoid(similarities(sequences, lengths)).tolist() == [0, 0, 0]

    def test_bad_input(self) -> None:
        sequences, lengths = random_sequences()
        with pytest.raises(ValueError, match=r"lengths of shape \(T, B\), got \(5, 3, 4\) and \(3,\)"):
            exact_agreement(sequences, lengths[0])
        with pytest.raises(ValueError, match="similarity must return a finite number, got nan"):
            similarities(sequences, lengths, lambda a, b: math.nan)


class TestUncertainty:
    def test_known_answers(self) -> None:
        logs = torch.tensor([[[0.5, 0.5, 0.1]], [[0.25, 1.0, 0.9]]]).double().log()
        found = sequence_uncertainty(logs, torch.tensor([[True, True, False]]))
        assert float(found.log_likelihood) == pytest.approx(math.log(0.25))
        assert float(found.total) == pytest.approx(math.log(4) / 2)
        assert float(found.knowledge) == pytest.approx(0, abs=1e-12)
        logs = torch.tensor([[[0.5]], [[0.125]]]).double().log()
        found = sequence_uncertainty(logs, torch.tensor([[True]]))
        assert float(found.knowledge) == pytest.approx(math.log(0.3125) - math.log(0.25))

    def test_words_that_cannot_follow(self) -> None:
        collected = TokenUncertainty(torch.tensor([[0, 1]]))
        collected.add(torch.tensor([[[0.0, -torch.inf], [0.0, 0.0]]]))
        collected.add(torch.tensor([[[-torch.inf, 0.0], [0.0, 0.0]]]))
        two = math.log(2)
        assert collected.predictive_entropy[0].tolist() == pytest.approx([two, two])
        assert collected.expected_entropy[0].tolist() == pytest.approx([0, two])
        assert collected.mutual_information[0].tolist() == pytest.approx([two, 0])
        assert collected.log_probs[:, 0, 0].tolist() == [0, -math.inf]

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"valid of shape \(B, L\), got \(2, 3\) and \(2, 3\)"):
            sequence_uncertainty(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))


class TestBadInput:
    def test_a_model_that_does_not_generate(self) -> None:
        with pytest.raises(TypeError, match=r"model must have a method `generate`.*got Linear"):
            mc_generate(nn.Linear(2, 2), prompts())

    def test_inputs(self) -> None:
        model = gpt2()
        with pytest.raises(TypeError, match="inputs must be a tensor of input_ids or a mapping with them, got list"):
            mc_generate(model, [1, 2])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"inputs must hold input_ids of shape \(B, P\).* got \['x'\]"):
            mc_generate(model, {"x": prompts()})
        with pytest.raises(ValueError, match="inputs must not hold decoder_input_ids"):
            mc_generate(t5(), {"input_ids": prompts(), "decoder_input_ids": prompts()})

    @pytest.mark.parametrize("name", ["return_dict_in_generate", "num_return_sequences", "streamer", "input_ids"])
    def test_arguments_of_generate(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"generate_kwargs must not hold '{name}': a sample is one sequence"):
            mc_generate(gpt2(), prompts(), generate_kwargs={name: 1})
        with pytest.raises(TypeError, match="generate_kwargs must be a mapping of arguments of generate, got list"):
            mc_generate(gpt2(), prompts(), generate_kwargs=[name])  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "reference", [torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3, 4), torch.zeros(3, 0).long(), "words"]
    )
    def test_a_reference_that_does_not_fit(self, reference: Any) -> None:
        with pytest.raises(ValueError, match=r"reference must be tokens \(B, L\) for the 3 prompts, got"):
            mc_generate(gpt2(), prompts(), 2, generate_kwargs=NEW, reference=reference)

    def test_nothing_random(self) -> None:
        with pytest.raises(ValueError, match="nothing random is active in the model"):
            mc_generate(gpt2(0.0), prompts(), 2, generate_kwargs=NEW)

    def test_samples(self) -> None:
        with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
            mc_generate(gpt2(), prompts(), 0)

    def test_a_tensor_without_words(self) -> None:
        """A dropout whose tensor grows with the square of the words: nobody knows where they are."""
        model = gpt2()
        inner = model.transformer.drop  # type: ignore[union-attr]

        class Odd(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                pairs = torch.ones(x.shape[1] ** 2)
                return inner(x) + nn.functional.dropout(pairs, 0.5, self.training).mean()  # type: ignore[operator]

        model.transformer.drop = Odd()  # type: ignore[union-attr]
        with pytest.raises(
            PlacelessError,
            match=r"the words of the sequence cannot be found in the tensor of dropout in "
            r"transformer.drop: .* Leave it out with sources=",
        ):
            mc_generate(model, prompts(), 2, generate_kwargs=NEW)

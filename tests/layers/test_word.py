"""Word dropout: of numbers of words and of their vectors."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.enumeration import expectation, force, masks
from tests.statistical import check_rate, draws_for
from tests.strategies import DTYPES
from torchdrop import kernels, random
from torchdrop.kernels.mask_params import mask_params
from torchdrop.layers.word import WordDropout, word_dropout

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TestWords:
    def test_tokens_are_replaced_by_the_unknown_word(self) -> None:
        words = torch.arange(10, 1010)
        torch.manual_seed(3)
        out = word_dropout(words, 0.25, unk_id=3)
        torch.manual_seed(3)
        kept = kernels.keep_mask(words.shape, random.draw_key(words.device), mask_params(0.75))
        assert torch.equal(out, torch.where(kept, words, 3))
        assert 150 < (out == 3).sum() < 350

    def test_special_tokens_are_untouched(self) -> None:
        words = torch.tensor([[1, 7, 8, 9, 2, 0], [1, 5, 2, 0, 0, 0]])
        expected = torch.tensor([[1, 3, 3, 3, 2, 0], [1, 3, 2, 0, 0, 0]])
        assert torch.equal(word_dropout(words, 1.0, unk_id=3, special_ids=(0, 1, 2)), expected)
        assert torch.equal(WordDropout(1.0, unk_id=3, special_ids=[0, 1, 2])(words), expected)

    def test_protected_places_are_untouched(self) -> None:
        words = torch.arange(10, 22).reshape(3, 4)
        for protected in (
            torch.tensor([True, False, False, True]),
            torch.tensor([[True, False, False, True]]).expand(3, 4),
            torch.tensor([[True], [False], [True]]),
        ):
            where = protected.expand(3, 4)
            out = word_dropout(words, 1.0, unk_id=3, protected=protected)
            assert torch.equal(out, torch.where(where, words, 3))
            out = word_dropout(words, 1.0, unk_id=3, protected=protected, special_ids=(15,))
            assert torch.equal(out, torch.where(where | (words == 15), words, 3))
            vectors = torch.randn(3, 4, 5)
            out = word_dropout(vectors, 1.0, protected=protected)
            assert torch.equal(out, torch.where(where.unsqueeze(-1), vectors, 0.0))
            assert torch.equal(WordDropout(1.0)(vectors, protected), out)

    @pytest.mark.parametrize("dtype", INTEGERS)
    def test_integers_of_any_size(self, dtype: torch.dtype) -> None:
        out = word_dropout(torch.full((100,), 7, dtype=dtype), 0.5, unk_id=3)
        assert out.dtype == dtype
        assert set(out.tolist()) == {3, 7}

    def test_occurrences_have_draws_of_their_own(self) -> None:
        out = word_dropout(torch.full((4, 50), 7), 0.5, unk_id=3)
        assert len({tuple(row.tolist()) for row in out}) == 4

    @pytest.mark.slow
    def test_rate(self) -> None:
        n = draws_for(0.7, 0.01)
        check_rate(int(word_dropout(torch.ones(n, dtype=torch.int32), 0.3, unk_id=0).sum()), n, 0.7, 0.01)


class TestVectors:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_whole_vectors_are_zero_or_as_they_were(self, dtype: torch.dtype) -> None:
        x = torch.randn(20, 30, 6).to(dtype)
        x[0] = float("nan")
        out = word_dropout(x, 0.3)
        dropped = (out == 0).all(-1)
        assert out.dtype == dtype
        assert torch.equal(out[~dropped].nan_to_num(), x[~dropped].nan_to_num())
        assert 0.2 < dropped[1:].float().mean() < 0.4
        assert torch.equal(out[0].isnan().all(-1), ~dropped[0])

    @pytest.mark.parametrize("inverted", [False, True])
    def test_expectation_by_enumeration(self, inverted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """The input where scaled, else k times the input; protected tokens are the input itself."""
        x, protected = torch.randn(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool)
        protected[0, 1] = True
        found = expectation(
            (word_dropout(x, keep_prob=0.5, inverted=inverted, protected=protected), chance)
            for _, chance in masks(monkeypatch, (2, 3, 1), 0.5)
        )
        factor = torch.where(protected, 1.0, 1.0 if inverted else 0.5).unsqueeze(-1)
        assert torch.allclose(found, x * factor, rtol=1e-12)

    def test_mean_over_kept_tokens(self) -> None:
        x = torch.randn(3, 40, 5) + 3
        y = word_dropout(x, 0.5)
        kept = (y != 0).any(-1)
        means = torch.stack([x[row][kept[row]].mean(0) for row in range(3)])
        assert torch.allclose(y.sum(1) / kept.sum(1, keepdim=True), means, atol=1e-5)

    def test_strides_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, torch.tensor([1, 2]))
        x = torch.randn(7, 20, 6)
        out = word_dropout(x, 0.5)
        assert torch.equal(word_dropout(x.transpose(0, 1).contiguous().transpose(0, 1), 0.5), out)
        assert torch.equal(word_dropout(torch.stack([x, x], -1)[..., 0], 0.5), out)

    def test_gradients_are_under_the_mask_of_forward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.ones(8, 9, 2, requires_grad=True)
        out = word_dropout(x, 0.5, inverted=True)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out.detach())
        force(monkeypatch, torch.tensor([1, 2]))
        protected = torch.tensor([True, False, False])
        wide = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: word_dropout(x, 0.5, protected=protected).sin(), wide)
        assert torch.autograd.gradgradcheck(lambda x: word_dropout(x, 0.5, protected=protected).sin(), wide)

    def test_tokens_can_have_rates_of_their_own(self) -> None:
        rates = torch.tensor([0.0, 0.5, 1.0])
        words, vectors = torch.full((60, 3), 7), torch.ones(60, 3, 2)
        for kept in (
            word_dropout(words, keep_prob=rates, unk_id=0) == 7,
            word_dropout(vectors, keep_prob=rates.unsqueeze(-1))[..., 0] == 1,
            WordDropout(keep_prob=rates.unsqueeze(-1))(vectors)[..., 0] == 1,
        ):
            assert [sorted(column.unique().tolist()) for column in kept.T] == [[False], [False, True], [True]]


both = pytest.mark.parametrize(
    ("make", "input"),
    [
        (lambda **options: WordDropout(unk_id=0, **options), torch.arange(5, 305).reshape(10, 30)),
        (lambda **options: WordDropout(**options), torch.randn(10, 30, 4)),
    ],
    ids=["words", "vectors"],
)


class TestLayer:
    @both
    def test_ends_of_the_rate_and_eval(self, make: Any, input: Tensor) -> None:
        assert torch.equal(make(p=0.0)(input), input)
        assert torch.equal(make(p=1.0)(input), torch.zeros_like(input))
        assert make(p=0.9).eval()(input) is input
        assert word_dropout(input, 0.9, training=False) is input
        assert make(p=0.5)(input[:0]).shape == input[:0].shape
        assert make(p=0.5)(input[:, :0]).shape == input[:, :0].shape

    @both
    def test_seeds_and_copies(self, make: Any, input: Tensor) -> None:
        layer, outs = make(p=0.5), []
        assert isinstance(layer, nn.modules.dropout._DropoutNd)
        assert not layer.state_dict()
        for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.manual_seed(1)
            outs.append(one(input))
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
        with torchdrop.frozen_masks(layer):
            assert torch.equal(layer(input), layer(input))
        assert not torch.equal(layer(input), layer(input))
        own = [make(p=0.5, generator=torch.Generator().manual_seed(5))(input) for _ in range(2)]
        assert torch.equal(*own)

    @both
    def test_rates_by_name(self, make: Any, input: Tensor) -> None:
        model = nn.Sequential(make(p=0.5))
        torchdrop.set_keep_prob(model, {"0": 0.0})
        assert torch.equal(model(input), torch.zeros_like(input))
        scheduler = torchdrop.KeepProbScheduler(model, {"0": torchdrop.schedules.linear(1.0, 0.5, steps=2)})
        scheduler.step()
        assert model[0].keep_prob == 0.75
        with torchdrop.disabled(model):
            assert torch.equal(model(input), input)

    @both
    def test_vmap_needs_no_randomness_where_all_words_are_kept(self, make: Any, input: Tensor) -> None:
        assert torch.equal(vmap(make(p=0.0))(input), input)

    @both
    def test_vmap_and_checkpointing(self, make: Any, input: Tensor) -> None:
        layer, same = make(p=0.5), input[:1].expand_as(input).contiguous()
        for randomness in ("same", "different"):
            out = vmap(layer, randomness=randomness)(same)
            assert torch.equal(out[0], out[1]) == (randomness == "same")
        scale = torch.ones(1, requires_grad=True)
        grads = []
        for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
            torch.manual_seed(4)
            grads.append(torch.autograd.grad((run(input) * scale).square().sum(), scale)[0])
        assert torch.equal(*grads)
        assert grad(lambda x: layer(input).float().sum() * x)(torch.tensor(1.0)).isfinite()

    @both
    def test_monte_carlo_fires_it_row_by_row(self, make: Any, input: Tensor) -> None:
        tail = nn.Embedding(305, 3) if not input.is_floating_point() else nn.Linear(4, 3)
        model = nn.Sequential(make(p=0.5), tail, nn.Flatten(), nn.Linear(90, 1)).eval()
        with torchdrop.mc_dropout(model, seed=1) as report:
            first = model(input)
            assert len(report.active) == 1
        with torchdrop.mc_dropout(model, seed=1):
            assert torch.allclose(model(input[:3]), first[:3], atol=1e-5)
        results = [
            torchdrop.mc_predict(model, input, samples=8, seed=2, task="regression", strategy=strategy).mean
            for strategy in ("loop", "vectorized", "repeated")
        ]
        assert torch.allclose(results[0], results[1], atol=1e-5)
        assert torch.allclose(results[0], results[2], atol=1e-5)
        assert not torch.allclose(results[0], model(input), atol=1e-3)

    @pytest.mark.slow
    @both
    def test_compiles_once_for_all_rates_with_the_masks_of_eager_code(self, make: Any, input: Tensor) -> None:
        from torch._dynamo.testing import CompileCounterWithBackend

        layer, counter = make(p=0.5), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        protected = torch.arange(30) % 7 == 0
        for k in (0.5, 0.9, 1.0):
            layer.keep_prob = k
            torch.manual_seed(2)
            expected = layer(input, protected)
            torch.manual_seed(2)
            assert torch.equal(compiled(input, protected), expected)
        assert counter.frame_count == 1

    def test_repr(self) -> None:
        layer = WordDropout(0.25, unk_id=3, special_ids=[0, 1])
        assert repr(layer) == "WordDropout(p=0.25, unk_id=3, special_ids=(0, 1))"
        assert repr(WordDropout(inverted=True)) == "WordDropout(p=0.5, inverted=True)"


WORDS, VECTORS = torch.arange(6).reshape(2, 3), torch.ones(2, 3, 4)


class TestErrors:
    @pytest.mark.parametrize(
        ("input", "options", "error", "message"),
        [
            (WORDS, {}, TypeError, "unk_id must be given for the numbers of words, which input of torch.int64 holds"),
            (WORDS.float(), {"unk_id": 1}, TypeError, "input must hold the numbers of words, as integers, where unk_i"),
            (WORDS > 1, {"unk_id": 1}, TypeError, "input must hold the numbers of words, as integers, where unk_id is"),
            ([1, 2], {"unk_id": 1}, TypeError, "word_dropout(): argument 'input' (position 1) must be Tensor, not lis"),
            (WORDS, {"unk_id": -1}, ValueError, "unk_id must be the number of a word, 0 or more, got -1"),
            (WORDS, {"unk_id": 1.0}, TypeError, "unk_id must be an integer, got float"),
            (WORDS.to(torch.int8), {"unk_id": 300}, ValueError, "unk_id and special_ids must be at most 127 for torch"),
            (WORDS, {"unk_id": 1, "special_ids": (0, -2)}, ValueError, "special_ids must be the number of a word, 0 o"),
            (WORDS, {"unk_id": 1, "special_ids": 0}, TypeError, "special_ids must be a sequence of integers, got 0"),
            (WORDS, {"unk_id": 1, "special_ids": ["pad"]}, TypeError, "special_ids must be an integer, got str"),
            (VECTORS, {"special_ids": (0,)}, ValueError, "special_ids need unk_id: vectors have no numbers, so give t"),
            (WORDS, {"unk_id": 1, "inverted": True}, ValueError, "inverted scales vectors, numbers of words cannot be"),
            (torch.ones(3), {}, ValueError, "input must have the dimensions (..., words, features), or hold integers"),
            (VECTORS, {"protected": [True]}, TypeError, "protected must be a tensor of bools, True where nothing may"),
            (VECTORS, {"protected": WORDS}, TypeError, "protected must be a tensor of bools, True where nothing may c"),
            (VECTORS, {"protected": VECTORS > 0}, ValueError, "protected of shape (2, 3, 4) does not broadcast agains"),
            (VECTORS, {"protected": torch.ones(2, dtype=torch.bool)}, ValueError, "protected of shape (2,) does not b"),
            (VECTORS, {"p": 1.5}, ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
            (VECTORS, {"keep_prob": torch.ones(4)}, ValueError, "keep_prob of shape (4,) does not broadcast against t"),
            (VECTORS.to(torch.complex64), {}, NotImplementedError, "word_dropout is not implemented for torch.complex"),
        ],
    )  # fmt: skip
    def test_wrong_arguments(self, input: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
        before = torch.get_rng_state()
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            word_dropout(input, **options)
        protected = options.pop("protected", None)
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            WordDropout(**options)(input, protected)
        assert torch.equal(torch.get_rng_state(), before)

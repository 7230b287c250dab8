"""Dropout of word types: one draw for each word of the vocabulary, and all that torch.nn.Embedding does."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.enumeration import expectation, force, masks
from tests.statistical import check_rate, draws_for
from tests.strategies import DTYPES
from torchdrop import kernels, random
from torchdrop.kernels.mask_params import mask_params
from torchdrop.layers.embedding import EmbeddingDropout, embedding_dropout
from torchdrop.layers.weights.weight import apply_weight_dropout

WORDS = torch.tensor([[1, 4, 1], [0, 2, 4]])


def kept_places(words: Tensor, rows: int = 50, **options: Any) -> Tensor:
    """Which places are kept."""
    return embedding_dropout(words, torch.ones(rows, 2), 0.5, **options)[..., 0] != 0


class TestDefinition:
    @pytest.mark.parametrize("k", [0.5, 0.3])
    def test_expectation_is_the_plain_lookup_by_enumeration(self, k: float, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = torch.randn(5, 3, dtype=torch.float64)
        found = expectation(
            (embedding_dropout(WORDS, weight, keep_prob=k), chance) for _, chance in masks(monkeypatch, (5,), k)
        )
        assert torch.allclose(found, weight[WORDS], rtol=1e-12)

    def test_expectation_with_a_mask_for_each_sample_by_enumeration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight, words = torch.randn(3, 2, dtype=torch.float64), torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
        for batch_dim, given in ((0, words), (1, words.T), (-1, words.T)):
            found = expectation(
                (embedding_dropout(given, weight, keep_prob=0.5, batch_dim=batch_dim), chance)
                for _, chance in masks(monkeypatch, (2, 3), 0.5)
            )
            assert torch.allclose(found, weight[given], rtol=1e-12)

    def test_all_occurrences_of_a_word_share_one_fate(self) -> None:
        words = torch.randint(50, (40, 30))
        kept = kept_places(words)
        by_word = [kept[words == word] for word in range(50)]
        assert all((places == places[0]).all() for places in by_word)
        assert 10 < sum(bool(places[0]) for places in by_word) < 40

    @pytest.mark.parametrize("batch_dim", [0, 1])
    def test_samples_can_have_fates_of_their_own(self, batch_dim: int) -> None:
        words = torch.randint(50, (40, 40))
        kept = kept_places(words, batch_dim=batch_dim).movedim(batch_dim, 0)
        words = words.movedim(batch_dim, 0)
        for sample in range(40):
            assert all(kept[sample][words[sample] == word].unique().numel() == 1 for word in words[sample].unique())
        assert kept[words == 7].unique().numel() == 2

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_are_dropped_or_scaled_by_the_mask(self, dtype: torch.dtype) -> None:
        weight = torch.randn(50, 6).to(dtype)
        weight[:10] = float("nan")
        torch.manual_seed(3)
        out = embedding_dropout(torch.arange(50), weight, 0.3)
        torch.manual_seed(3)
        kept = kernels.keep_mask((50,), random.draw_key(weight.device), mask_params(0.7))
        wide = weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
        assert out.dtype == dtype
        assert torch.equal(out[kept].nan_to_num(), (wide * mask_params(0.7).scale).to(dtype)[kept].nan_to_num())
        assert torch.equal(out[~kept], torch.zeros_like(out[~kept]))
        assert 0 < kept[:10].sum() < 10

    def test_padding_row_is_untouched(self) -> None:
        weight = torch.randn(6, 3)
        for padding, word in ((2, 2), (-1, 5), (0, 0)):
            out = embedding_dropout(torch.full((4,), word), weight, 1.0, padding_idx=padding)
            assert torch.equal(out, weight[word].expand(4, 3))
            out = embedding_dropout(torch.full((4,), word), weight, keep_prob=0.25, padding_idx=padding)
            assert torch.equal(out, weight[word].expand(4, 3))
        assert torch.equal(embedding_dropout(torch.tensor([0, 5]), weight, 1.0), torch.zeros(2, 3))

    def test_ends_of_the_rate_and_eval(self) -> None:
        weight = torch.randn(5, 3)
        assert torch.equal(embedding_dropout(WORDS, weight, 0.0), weight[WORDS])
        assert torch.equal(embedding_dropout(WORDS, weight, 1.0), torch.zeros(2, 3, 3))
        assert torch.equal(embedding_dropout(WORDS, weight, 0.9, training=False), weight[WORDS])
        layer = EmbeddingDropout(5, 3, p=0.9).eval()
        assert torch.equal(layer(WORDS), nn.Embedding.forward(layer, WORDS))

    def test_words_can_have_rates_of_their_own(self) -> None:
        rates, words = torch.tensor([0.0, 0.5, 1.0, 0.5, 0.25]), torch.arange(5).repeat(200, 1)
        out = embedding_dropout(words, torch.ones(5, 1), keep_prob=rates, batch_dim=0).squeeze(-1)
        assert [sorted(column.unique().tolist()) for column in out.T] == [[0], [0, 2], [1], [0, 2], [0, 4]]
        layer = EmbeddingDropout(5, 1, keep_prob=rates)
        assert (layer(torch.full((9,), 2)) == layer.weight[2]).all()

    @pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3,), (2, 0), (2, 3, 4)])
    def test_inputs_of_any_shape(self, shape: tuple[int, ...]) -> None:
        words = torch.randint(5, shape, dtype=torch.int32)
        assert embedding_dropout(words, torch.ones(5, 3)).shape == (*shape, 3)
        if shape:
            assert embedding_dropout(words, torch.ones(5, 3), batch_dim=0).shape == (*shape, 3)

    @pytest.mark.slow
    def test_rate(self) -> None:
        n = draws_for(0.9, 0.01)
        check_rate(int(embedding_dropout(torch.arange(n), torch.ones(n, 1), 0.1).count_nonzero()), n, 0.9, 0.01)


class TestGradients:
    def test_last_row_trains(self) -> None:
        layer = EmbeddingDropout(4, 3, p=0.5)
        for _ in range(20):
            layer(torch.arange(4)).sum().backward()
        assert layer.weight.grad is not None
        assert (layer.weight.grad > 0).all()

    def test_padding_row_does_not_train(self) -> None:
        layer = EmbeddingDropout(4, 3, padding_idx=0, p=0.5)
        for _ in range(20):
            layer(torch.arange(4)).sum().backward()
        assert layer.weight.grad is not None
        assert torch.equal((layer.weight.grad > 0).all(1), torch.tensor([False, True, True, True]))

    def test_gradient_is_under_the_mask_of_forward(self) -> None:
        weight = torch.ones(60, 2, requires_grad=True)
        out = embedding_dropout(torch.arange(60), weight, 0.5)
        out.sum().backward()
        assert torch.equal(weight.grad, out.detach())
        assert 0 < (out == 0).sum() < 120

    def test_gradcheck_with_the_key_fixed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, torch.tensor([1, 2]))
        weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda w: embedding_dropout(WORDS, w, 0.5).sin(), weight)
        assert torch.autograd.gradgradcheck(lambda w: embedding_dropout(WORDS, w, 0.5, batch_dim=0).sin(), weight)

    @pytest.mark.parametrize(
        "options",
        [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}, {"max_norm": 0.5, "norm_type": 1.0}],
        ids=str,
    )
    def test_options_are_those_of_torch(self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        force(monkeypatch, torch.tensor([1, 2]))
        factor = embedding_dropout(WORDS, torch.ones(5, 1), 0.5)
        weights = [torch.arange(15.0).reshape(5, 3).requires_grad_() for _ in range(2)]
        outs = [
            embedding_dropout(WORDS, weights[0], 0.5, **options),
            F.embedding(WORDS, weights[1], **options) * factor,
        ]
        assert torch.equal(*outs)
        for out in outs:
            out.square().sum().backward()
        assert torch.equal(*weights)
        assert weights[0].grad.is_sparse == options.get("sparse", False)
        assert torch.allclose(*(w.grad.to_dense() if w.grad.is_sparse else w.grad for w in weights))

    def test_memory_for_backward_does_not_grow_with_the_vocabulary(self) -> None:
        weight, saved = torch.ones(50_000, 64, requires_grad=True), []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            embedding_dropout(torch.randint(50_000, (2, 10)), weight, 0.1)
        assert sum(saved) < 2000

    def test_checkpointing_runs_under_the_same_mask(self) -> None:
        layer, words = EmbeddingDropout(50, 4, p=0.5), torch.randint(50, (3, 20))
        grads = []
        for run in (layer, lambda words: checkpoint(layer, words, use_reentrant=False)):
            torch.manual_seed(4)
            layer.weight.grad = None
            run(words).square().sum().backward()
            grads.append(layer.weight.grad)
        assert torch.equal(*grads)

    def test_transforms(self) -> None:
        slope = grad(lambda w: embedding_dropout(torch.arange(40), w, 0.5).sum())(torch.ones(40, 1))
        assert set(slope.unique().tolist()) == {0.0, 2.0}
        words = torch.arange(40).repeat(6, 1)
        for randomness in ("same", "different"):
            for options in ({}, {"batch_dim": 0}):
                out = vmap(
                    lambda row: embedding_dropout(row, torch.ones(40, 1), 0.5, **options),  # noqa: B023
                    randomness=randomness,
                )(words)
                assert torch.equal(out[0], out[1]) == (randomness == "same")

    def test_vmap_needs_no_randomness_where_all_words_are_kept(self) -> None:
        words, weight = torch.arange(12).reshape(3, 4), torch.randn(12, 2)
        assert torch.equal(vmap(lambda row: embedding_dropout(row, weight, keep_prob=1.0))(words), weight[words])


class TestModule:
    def test_stands_for_torchs_embedding(self) -> None:
        layer, plain = EmbeddingDropout(9, 4, 2, p=0.1), nn.Embedding(9, 4, 2)
        assert isinstance(layer, nn.Embedding)
        assert layer.state_dict().keys() == plain.state_dict().keys()
        layer.load_state_dict(plain.state_dict())
        assert torch.equal(layer.eval()(WORDS), plain(WORDS))
        assert torch.equal(layer.weight[2], torch.zeros(4))
        assert isinstance(layer.dropout, nn.modules.dropout._DropoutNd)
        assert repr(layer).splitlines()[0] == "EmbeddingDropout("
        given = EmbeddingDropout.from_pretrained(torch.ones(3, 2))
        assert not given.weight.requires_grad
        given.p = 1.0
        assert torch.equal(given(torch.arange(3)), torch.zeros(3, 2))

    @pytest.mark.parametrize("training", [True, False])
    def test_from_embedding_shares_the_parameter(self, training: bool) -> None:
        plain = nn.Embedding(9, 4, 2, max_norm=1.0, norm_type=1.0, scale_grad_by_freq=True).train(training)
        plain.weight.requires_grad_(False)
        made = EmbeddingDropout.from_embedding(plain, keep_prob=0.75, batch_dim=0)
        assert made.weight is plain.weight
        assert not made.weight.requires_grad
        assert made.training == made.dropout.training == training
        for name in nn.Embedding.__constants__:
            assert getattr(made, name) == getattr(plain, name)
        assert (made.p, made.keep_prob, made.dropout.batch_dim) == (0.25, 0.75, 0)
        assert "batch_dim=0" in repr(made)

    def test_tied_decoder_uses_the_matrix_as_it_is(self) -> None:
        layer, decoder = EmbeddingDropout(9, 4, p=1.0), nn.Linear(4, 9)
        decoder.weight = layer.weight
        assert decoder(torch.ones(2, 4)).abs().sum() > 0
        assert torch.equal(layer(WORDS), torch.zeros(2, 3, 4))

    def test_rates_by_name_and_schedules(self) -> None:
        model = nn.Sequential(EmbeddingDropout(50, 4, p=0.5), nn.Linear(4, 2))
        assert dict(torchdrop.keep_probs(model)) == {"0.dropout": 0.5}
        torchdrop.set_keep_prob(model, {"0": 0.25})
        assert (model[0].keep_prob, model[0].p) == (0.25, 0.75)
        model[0].keep_prob = 0.75
        scheduler = torchdrop.KeepProbScheduler(model, {"0.dropout": torchdrop.schedules.linear(1.0, 0.5, steps=2)})
        scheduler.step()
        assert model[0].keep_prob == 0.75
        words = torch.randint(50, (3, 20))
        with torchdrop.disabled(model):
            off = model(words)
        assert torch.equal(off, model.eval()(words))

    def test_seeds_and_copies(self) -> None:
        layer, words = EmbeddingDropout(50, 4, p=0.5), torch.randint(50, (3, 20))
        outs = []
        for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.manual_seed(1)
            outs.append(one(words))
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
        with torchdrop.frozen_masks(layer):
            assert torch.equal(layer(words), layer(words))
        assert not torch.equal(layer(words), layer(words))
        own = [kept_places(words, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
        assert torch.equal(*own)

    @pytest.mark.parametrize("batch_dim", [None, 0])
    def test_monte_carlo_fires_it(self, batch_dim: int | None) -> None:
        model = nn.Sequential(
            EmbeddingDropout(50, 8, p=0.5, batch_dim=batch_dim), nn.Flatten(), nn.Linear(48, 1)
        ).eval()
        words = torch.randint(50, (7, 6))
        with torchdrop.mc_dropout(model, seed=1) as report:
            first, second = model(words), model(words)
            assert len(report.active) == 1
        assert not torch.equal(first, second)
        with torchdrop.mc_dropout(model, seed=1):
            assert torch.allclose(model(words[:2]), first[:2], atol=1e-6)
        results = [
            torchdrop.mc_predict(model, words, samples=8, seed=2, task="regression", strategy=strategy)
            for strategy in ("loop", "vectorized")
        ]
        assert torch.allclose(results[0].mean, results[1].mean, atol=1e-5)
        assert (results[0].std > 0).all()

    @pytest.mark.slow
    @pytest.mark.parametrize("batch_dim", [None, 0])
    def test_compiles_once_for_all_rates_with_the_masks_of_eager_code(self, batch_dim: int | None) -> None:
        from torch._dynamo.testing import CompileCounterWithBackend

        layer = EmbeddingDropout(50, 8, padding_idx=0, p=0.5, batch_dim=batch_dim)
        counter = CompileCounterWithBackend("aot_eager")
        compiled, words = torch.compile(layer, backend=counter, fullgraph=True), torch.randint(50, (7, 6))
        for k in (0.5, 0.9, 1.0):
            layer.keep_prob = k
            torch.manual_seed(2)
            expected = layer(words)
            torch.manual_seed(2)
            assert torch.equal(compiled(words), expected)
        assert counter.frame_count == 1


class Scaled(nn.Embedding):
    """An embedding with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 8


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"batch_dim": 2}, ValueError, "batch_dim must be in [-2, 2) for a 2-D input, got 2"),
            ({"batch_dim": "first"}, TypeError, "batch_dim must be an integer or None, got str"),
            ({"keep_prob": torch.ones(4)}, ValueError, "keep_prob of shape (4,) does not broadcast against the mask's"),
            ({"p": 2}, ValueError, "dropout probability has to be between 0 and 1, but got 2"),
            ({"padding_idx": 9}, AssertionError, "Padding_idx must be within num_embeddings"),
        ],
    )
    def test_arguments(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            embedding_dropout(WORDS, torch.ones(5, 3), **options)

    def test_words(self) -> None:
        with pytest.raises(IndexError, match=r"^index out of range in self$"):
            embedding_dropout(WORDS, torch.ones(4, 3))
        with pytest.raises(RuntimeError, match=r"Expected tensor for argument #1 'indices'"):
            embedding_dropout(WORDS.float(), torch.ones(5, 3))
        with pytest.raises(RuntimeError, match=r"^result type Float can't be cast to the desired output type Long"):
            embedding_dropout(WORDS, torch.ones(5, 3, dtype=torch.int64))

    def test_from_embedding(self) -> None:
        with pytest.raises(TypeError, match=r"^embedding must be a torch\.nn\.Embedding, got EmbeddingBag$"):
            EmbeddingDropout.from_embedding(nn.EmbeddingBag(3, 2))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"got its subclass Scaled, whose forward would be lost: use torchdrop\.f"):
            EmbeddingDropout.from_embedding(Scaled(3, 2))
        with pytest.raises(ValueError, match=r"^embedding is parametrized, so its weight cannot be taken over: undo "):
            EmbeddingDropout.from_embedding(apply_weight_dropout(nn.Embedding(3, 2)))

    def test_module(self) -> None:
        with pytest.raises(TypeError, match=r"^batch_dim must be an integer or None, got bool$"):
            EmbeddingDropout(5, 3, batch_dim=True)
        layer = EmbeddingDropout(5, 3, p=0.5)
        with pytest.raises(ValueError, match=r"^keep_prob must be in \[0, 1\], got 1.5$"):
            layer.keep_prob = 1.5
        assert layer.keep_prob == 0.5
        assert not parametrize.is_parametrized(layer)

"""Entities against a reader of tags that goes through them one by one."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.monte_carlo import ClassificationPrediction, find_entities
from torchdrop.monte_carlo.classes import Classification
from torchdrop.monte_carlo.entities import read_scheme, spans
from torchdrop.monte_carlo.plain import Plain
from torchdrop.monte_carlo.statistics import Collector
from torchdrop.monte_carlo.task_predictions import predict_from

BIO = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
BILOU = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "LOC") for prefix in "BILU")]
IOBES = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "LOC") for prefix in "BIES")]


def read(tags: Sequence[str | None]) -> list[tuple[int, int, str]]:
    """The entities of tags, by the rules of conlleval, with None where there is no token."""
    found: list[tuple[int, int, str]] = []
    start, kind, before = None, "", "O"
    for place, tag in enumerate([*tags, None]):
        prefix, _, own = (tag or "O").partition("-")
        open_ = start is not None
        ends = open_ and (prefix in "OBSU" or own != kind or before in ("E", "L", "S", "U"))
        if ends:
            assert start is not None
            found.append((start, place, kind))
            start = None
        if prefix != "O" and start is None:
            start, kind = place, own
        before = prefix
    return found


def logits(tags: Tensor, labels: Sequence[str]) -> Tensor:
    """Logits of these classes (T, B, L). They differ a little, so that no two classes have one mean probability."""
    scores = 4.0 * nn.functional.one_hot(tags, len(labels)).double()
    return scores + 0.1 * torch.randn(scores.shape).clamp(-5, 5)


def prediction(tags: Tensor, labels: Sequence[str]) -> ClassificationPrediction:
    """A prediction whose samples have these classes, in the last dimension."""
    return prediction_of(logits(tags, labels))


def prediction_of(scores: Tensor) -> ClassificationPrediction:
    collector = Collector(Classification("logits", class_dim=-1), keep_samples=True)
    collector.add(scores, range(len(scores)))
    found = predict_from(collector)
    assert isinstance(found, ClassificationPrediction)
    return found


def random_tags(labels: Sequence[str], samples: int = 6, rows: int = 3, length: int = 9) -> Tensor:
    base = torch.randint(len(labels), (rows, length))
    noise = torch.randint(len(labels), (samples, rows, length))
    return torch.where(torch.rand(noise.shape) < 0.3, noise, base)


@pytest.mark.parametrize("labels", [BIO, BIO[::-1], BILOU, IOBES], ids=["BIO", "O last", "BILOU", "IOBES"])
def test_spans_are_those_of_a_reader(labels: list[str]) -> None:
    scheme = read_scheme(labels)
    every = [list(one) for one in itertools.product(range(len(labels)), repeat=3)]  # all sequences of three tags
    every += torch.randint(-1, len(labels), (200, 12)).tolist()
    seen = 0
    for tags in every:
        expected = read([labels[tag] if tag >= 0 else None for tag in tags])
        found = [(first, stop, scheme.names[kind]) for first, stop, kind in spans(torch.tensor(tags), scheme).tolist()]
        assert found == expected, [labels[tag] for tag in tags]
        seen += len(found)
    assert seen > 300
    together = spans(torch.tensor(every[:100]), scheme)
    alone = [
        [row, *span] for row, tags in enumerate(every[:100]) for span in spans(torch.tensor(tags), scheme).tolist()
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("labels", [BIO, BILOU, IOBES], ids=["BIO", "BILOU", "IOBES"])
def test_probabilities_are_shares_of_samples(labels: list[str]) -> None:
    tags = random_tags(labels)
    result = prediction(tags, labels)
    found = find_entities(result, labels)
    entities = [entity for row in found for entity in row]
    assert len(entities) > 4
    assert len({entity.probability for entity in entities}) > 2
    for row in range(3):
        mean = read([labels[tag] for tag in result.predicted[row].tolist()])
        assert [(one.start, one.stop, one.type) for one in found[row]] == mean
        samples = [read([labels[tag] for tag in sample[row].tolist()]) for sample in tags]
        for one in found[row]:
            assert one.row == row
            assert one.probability == pytest.approx(sum((one.start, one.stop, one.type) in s for s in samples) / 6)
            kinds = Counter(next((k for a, b, k in s if (a, b) == (one.start, one.stop)), None) for s in samples)
            entropy = -sum(n / 6 * math.log(n / 6) for n in kinds.values())
            assert one.entropy == pytest.approx(entropy, abs=1e-9)
            assert one.types == pytest.approx({k: n / 6 for k, n in kinds.items() if k is not None})


def test_known_answers() -> None:
    tags = torch.tensor([[[1, 2, 0, 3]], [[1, 2, 0, 0]], [[1, 0, 0, 3]], [[3, 4, 0, 3]]])
    (found,) = find_entities(prediction(tags, BIO), BIO)
    half, quarter = -0.5 * math.log(0.5), -0.25 * math.log(0.25)
    assert [tuple(one)[:5] for one in found] == [(0, 0, 2, "PER", 0.5), (0, 3, 4, "LOC", 0.75)]
    assert found[0].entropy == pytest.approx(half + 2 * quarter)  # PER, LOC, and none
    assert found[0].types == {"LOC": 0.25, "PER": 0.5}
    assert found[0].words is None


def test_entities_that_the_average_has_not() -> None:
    tags = torch.tensor([[[1, 2, 0]], [[1, 2, 0]], [[1, 2, 0]], [[1, 0, 0]], [[0, 0, 3]]])
    result = prediction(tags, BIO)
    (every,) = find_entities(result, BIO, least=0.0)
    assert [(one.start, one.stop, one.type, one.probability, one.predicted) for one in every] == [
        (0, 1, "PER", 0.2, False), (0, 2, "PER", 0.6, True), (2, 3, "LOC", 0.2, False),
    ]  # fmt: skip
    assert find_entities(result, BIO, least=0.2) == [every]
    assert [one.predicted for one in find_entities(result, BIO, least=0.3)[0]] == [True]


def test_the_order_of_samples_and_rows_does_not_matter() -> None:
    given = logits(random_tags(BIO), BIO)
    found = find_entities(prediction_of(given), BIO, least=0.2)
    again = find_entities(prediction_of(given[torch.randperm(6)]), BIO, least=0.2)
    assert found == again
    alone = find_entities(prediction_of(given[:, 1:2]), BIO, least=0.2)[0]
    assert [one._replace(row=1) for one in alone] == found[1]


def test_classes_in_another_dimension() -> None:
    given = logits(random_tags(BIO), BIO)
    collector = Collector(Classification("logits", class_dim=1), keep_samples=True)
    collector.add(given.movedim(-1, 2), range(6))
    found = predict_from(collector)
    assert found.mean.shape == (3, 5, 9)
    assert find_entities(found, BIO, least=0.2) == find_entities(prediction_of(given), BIO, least=0.2)  # type: ignore[arg-type]


def test_words_speak_by_their_first_token() -> None:
    """The words are [0 0] [1] [2 2 2], between special tokens. Tokens that continue words would break entities."""
    words: list[int | None] = [None, 0, 0, 1, 2, 2, 2, None]
    tags = torch.tensor([[[3, 1, 3, 2, 3, 0, 1, 1]], [[3, 1, 0, 2, 0, 3, 1, 1]]])
    made = prediction(tags, BIO)
    (found,) = find_entities(made, BIO, word_ids=[words])
    assert (found[0].start, found[0].stop, found[0].type, found[0].probability) == (1, 4, "PER", 1.0)
    assert found[0].words == (0, 2)
    (every,) = find_entities(made, BIO, word_ids=[words], least=0.5)
    assert (every[-1].start, every[-1].stop, every[-1].type, every[-1].probability) == (4, 7, "LOC", 0.5)
    assert every[-1].words == (2, 3)
    numbers = torch.tensor([[-100 if word is None else word for word in words]])
    assert find_entities(made, BIO, word_ids=numbers, least=0.5) == [every]


def test_targets_say_which_tokens_count() -> None:
    given = logits(random_tags(BIO, rows=2), BIO)
    labels = torch.randint(5, (2, 9))
    labels[0, ::3], labels[1, 4:] = -100, -100
    found = find_entities(prediction_of(given), BIO, labels=labels)
    for row in range(2):
        kept = (labels[row] != -100).nonzero().flatten()
        (alone,) = find_entities(prediction_of(given[:, row : row + 1, kept]), BIO)
        expected = [(int(kept[one.start]), int(kept[one.stop - 1]) + 1, one.type, one.probability) for one in alone]
        assert [(one.start, one.stop, one.type, one.probability) for one in found[row]] == expected


@pytest.mark.parametrize("labels", [BIO, BIO[::-1]], ids=["O first", "O last"])
def test_places_that_are_not_reported_are_left_out(labels: list[str]) -> None:
    tags, valid = random_tags(labels, rows=1), torch.ones(1, 9, dtype=torch.bool)
    tags[..., 2], tags[..., 5] = labels.index("B-PER"), labels.index("I-PER")
    given = logits(tags, labels)
    valid[0, [0, 3, 4, 8]] = False
    made, kept = prediction_of(given), valid[0].nonzero().flatten()
    assert made.samples is not None
    mean, samples = (one.where(valid.unsqueeze(-1), torch.nan) for one in (made.mean, made.samples))
    (found,) = find_entities(replace(made, valid=valid, mean=mean, samples=samples), labels, least=0.1)
    (alone,) = find_entities(prediction_of(given[:, :, kept]), labels, least=0.1)
    assert [(one.start, one.stop, one.type, one.probability) for one in found] == [
        (int(kept[one.start]), int(kept[one.stop - 1]) + 1, one.type, one.probability) for one in alone
    ]
    assert any(one.start < 3 and one.stop > 5 for one in found)  # over a place that is left out


def test_padding_is_left_out() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.drop, self.head = nn.Embedding(20, 16), nn.Dropout(0.5), nn.Linear(16, 5)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.drop(self.embed(input_ids)))}

    ids, mask = torch.randint(20, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    tagger = Tagger().eval()
    how = {"task": "classification", "class_dim": -1, "valid": "attention_mask", "keep_samples": True, "seed": 0}
    both = torchdrop.mc_predict(tagger, {"input_ids": ids, "attention_mask": mask}, 20, **how)  # type: ignore[arg-type]
    found = find_entities(both, dict(enumerate(BIO)), least=0.1)  # type: ignore[arg-type]
    assert all(one.stop <= 5 for one in found[1])
    assert any(one.stop > 5 for one in found[0])


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label=dict(enumerate(BIO)), hidden_dropout_prob=0.3,
    )  # fmt: skip
    model = transformers.BertForTokenClassification(config).eval()
    ids = torch.randint(5, 60, (2, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    result = torchdrop.mc_predict(
        model, batch, 10, task="classification", valid="attention_mask", keep_samples=True, seed=0
    )
    entities = find_entities(result, model.config.id2label, least=0.1)  # type: ignore[arg-type]
    assert len(entities) == 2
    assert entities[0] + entities[1]


class TestBadInput:
    def test_labels_of_another_form(self) -> None:
        with pytest.raises(ValueError, match=r"labels must be 'O' or a prefix out of .* got 'PER'"):
            read_scheme(["O", "PER"])
        with pytest.raises(ValueError, match="got 'X-PER'"):
            read_scheme(["O", "X-PER"])
        with pytest.raises(ValueError, match="got 'B-'"):
            read_scheme(["O", "B-"])

    def test_a_class_without_a_label(self) -> None:
        result = prediction(random_tags(BIO), BIO)
        with pytest.raises(ValueError, match=r"a label for each of 5 classes, got those of \[0, 1, 2, 3\]"):
            find_entities(result, BIO[:4])
        assert find_entities(result, {str(n): label for n, label in enumerate(BIO)}) == find_entities(result, BIO)

    def test_no_samples(self) -> None:
        with pytest.raises(ValueError, match=r"entities need the samples.*keep_samples=True"):
            find_entities(replace(prediction(random_tags(BIO), BIO), samples=None), BIO)

    def test_no_sequences(self) -> None:
        collector = Collector(Classification("logits"), keep_samples=True)
        collector.add(torch.randn(3, 2, 5), range(3))
        with pytest.raises(ValueError, match=r"must be of tokens, with classes for each, got shape \(2, 5\)"):
            find_entities(predict_from(collector), BIO)  # type: ignore[arg-type]

    def test_another_kind(self) -> None:
        collector = Collector(Plain())
        collector.add(torch.randn(3, 2, 5), range(3))
        with pytest.raises(TypeError, match="must be a ClassificationPrediction, got Prediction"):
            find_entities(predict_from(collector), BIO)  # type: ignore[arg-type]

    def test_words_that_do_not_fit(self) -> None:
        result = prediction(random_tags(BIO), BIO)
        with pytest.raises(ValueError, match=r"word_ids must be of shape \(3, 9\), got 1 rows of lengths \[9\]"):
            find_entities(result, BIO, word_ids=[list(range(9))])
        with pytest.raises(ValueError, match=r"word_ids must be integers of shape \(3, 9\), got .*float32 of \(3, 9\)"):
            find_entities(result, BIO, word_ids=torch.zeros(3, 9))

    def test_targets_that_do_not_fit(self) -> None:
        result = prediction(random_tags(BIO), BIO)
        with pytest.raises(ValueError, match=r"labels must be of shape \(3, 9\), got \(3, 8\)"):
            find_entities(result, BIO, labels=torch.zeros(3, 8))
        with pytest.raises(ValueError, match="give word_ids or labels, not both"):
            find_entities(result, BIO, labels=torch.zeros(3, 9), word_ids=torch.zeros(3, 9, dtype=torch.int64))

    def test_a_share_out_of_range(self) -> None:
        with pytest.raises(ValueError, match=r"least must be in \[0, 1\], got 2"):
            find_entities(prediction(random_tags(BIO), BIO), BIO, least=2)

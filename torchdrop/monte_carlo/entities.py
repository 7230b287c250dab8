"""Entities in token classification, as wholes: the share of samples that find the same span and type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_probability
from .task_predictions import IGNORED, ClassificationPrediction

_BEGINS, _ENDS = ("B", "S", "U"), ("S", "U", "E", "L")
_PREFIXES = ("B", "I", "E", "L", "S", "U")


class Entity(NamedTuple):
    """An entity of one row of the data."""

    row: int
    start: int
    """Its first token."""
    stop: int
    """The token after its last one."""
    type: str
    probability: float
    """The share of samples in which exactly this span is an entity of this type."""
    entropy: float
    """The entropy, in nats, of what exactly this span is in the samples: an entity of one of the types, or none."""
    types: dict[str, float]
    """The share of samples in which exactly this span is an entity, by type."""
    predicted: bool = True
    """Whether it is an entity of the average prediction."""
    words: tuple[int, int] | None = None
    """Its first word and the word after its last one; None if words were not given."""


class Scheme(NamedTuple):
    """The meaning of a model's classes: tensors with an element for each class."""

    begins: Tensor
    """Whether the class begins an entity whatever stands before (B, S, U)."""
    ends: Tensor
    """Whether nothing continues it (E, L, S, U)."""
    type: Tensor
    """The number of the type; -1 outside of entities."""
    names: list[str]
    """The types."""


def read_scheme(id2label: Mapping[Any, str] | Sequence[str], classes: int | None = None) -> Scheme:
    """Reads labels in the schemes IOB1, IOB2 (BIO), IOE, IOBES and BILOU: "O", or a prefix and a type, as "B-PER".

    Args:
        id2label: the label of each class, as in ``model.config.id2label``: a mapping from their numbers, which may be
            strings, or a sequence.
        classes: the number of classes that there must be.

    Raises:
        ValueError: labels that are not of this form, or that are missing.

    Example:
        >>> read_scheme({0: "O", 1: "B-PER", 2: "I-PER"}).names
        ['PER']
    """
    pairs = id2label.items() if isinstance(id2label, Mapping) else enumerate(id2label)
    labels = {int(number): label for number, label in pairs}
    count = len(labels) if classes is None else classes
    if sorted(labels) != list(range(count)):
        raise ValueError(f"id2label must have a label for each of {count} classes, got those of {sorted(labels)}")
    prefixes, types = [], []
    for number in range(count):
        prefix, dash, kind = labels[number].partition("-")
        if labels[number] != "O" and (prefix not in _PREFIXES or not dash or not kind):
            raise ValueError(
                f"labels must be 'O' or a prefix out of {', '.join(_PREFIXES)}, a dash and a type, as 'B-PER', "
                f"got {labels[number]!r}"
            )
        prefixes.append(prefix)
        types.append(kind)
    names = sorted(set(filter(None, types)))
    return Scheme(
        torch.tensor([prefix in _BEGINS for prefix in prefixes]),
        torch.tensor([prefix in _ENDS for prefix in prefixes]),
        torch.tensor([names.index(kind) if kind else -1 for kind in types]),
        names,
    )


def spans(labels: Tensor, scheme: Scheme) -> Tensor:
    """Returns the entities in sequences of labels, one a row: the sequence's indices, first place, end and type.

    The end is the place after the last.

    A label continues the entity before it if both are of one type, the one before does not end it, and this one does
    not begin one. Any other label of a type begins an entity, so that "O I-PER I-PER" has one, as in the evaluation
    of CoNLL.

    Args:
        labels: classes of shape (..., L), and a negative number where there is no token, which ends an entity.
        scheme: what the classes mean.

    References:
        Tjong Kim Sang and De Meulder, "Introduction to the CoNLL-2003 Shared Task", CoNLL 2003 (conlleval).

    Example:
        >>> spans(torch.tensor([[1, 2, 0, 2, 1]]), read_scheme(["O", "B-PER", "I-PER"]))
        tensor([[0, 0, 2, 0],
                [0, 3, 4, 0],
                [0, 4, 5, 0]])
    """
    absent, known = labels < 0, labels.clamp_min(0)
    begins, ends, types = (part.to(labels.device)[known] for part in scheme[:3])
    types = types.masked_fill(absent, -1)
    length = labels.shape[-1]
    continues = torch.zeros_like(absent)
    continues[..., 1:] = (
        (types[..., 1:] >= 0) & (types[..., 1:] == types[..., :-1]) & ~begins[..., 1:] & ~ends[..., :-1]
    )
    # The next place that continues nothing ends an entity: a minimum over the places from the next one on.
    places = torch.arange(length, device=labels.device).masked_fill(continues, length)
    stops = torch.full_like(places, length)
    stops[..., :-1] = places.flip(-1).cummin(-1).values.flip(-1)[..., 1:]
    found = ((types >= 0) & ~continues).nonzero()
    at = found.unbind(1)
    return torch.cat([found, stops[at].unsqueeze(1), types[at].unsqueeze(1)], 1)


def find_entities(
    prediction: ClassificationPrediction,
    id2label: Mapping[Any, str] | Sequence[str],
    *,
    word_ids: Sequence[Sequence[int | None]] | Tensor | None = None,
    labels: Tensor | None = None,
    least: float | None = None,
) -> list[list[Entity]]:
    """Returns the entities of each row, with the share of samples that have exactly the same.

    The labels of the average prediction, and of each sample, are the most probable ones of each token, and become
    entities by `spans`. Probabilities of tokens do not say how sure an entity is, because the tokens of one sample
    belong together; here each sample is read as a whole.

    Args:
        prediction: labels of tokens, with ``keep_samples=True``. Tokens that it does not report are left out.
        id2label: the label of each class: see `read_scheme`.
        word_ids: the number of each token's word, and None, or a negative number, for tokens of none, as a tokenizer's
            ``encoding.word_ids(row)``. The first token of a word then speaks for it, and the others are left out.
        labels: targets of shape (B, L), in place of `word_ids`: tokens where they are -100 are left out.
        least: also returns entities that the average prediction has not, and at least this share of samples has.

    Returns:
        For each row its entities, in the order of their first tokens.

    Raises:
        TypeError: a prediction of another kind.
        ValueError: samples that were not kept, outputs that are no sequences, labels of another form, or word numbers
            or targets of another shape.

    References:
        Ramshaw and Marcus, "Text Chunking using Transformation-Based Learning", 1995 (IOB). Ratinov and Roth, "Design
        Challenges and Misconceptions in Named Entity Recognition", CoNLL 2009 (BILOU).

    Example:
        >>> import torchdrop
        >>> tagger = torch.nn.Sequential(torch.nn.Embedding(9, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 3))
        >>> tags = torchdrop.mc_predict(
        ...     tagger, torch.randint(9, (2, 5)), 20, task="classification", class_dim=-1, keep_samples=True
        ... )
        >>> entities = find_entities(tags, ["O", "B-PER", "I-PER"])
        >>> len(entities), all(0 <= entity.probability <= 1 for entity in entities[0])
        (2, True)
    """
    mean, samples = _tokens(prediction)
    scheme = read_scheme(id2label, prediction.mean.shape[prediction.class_dim])
    if least is not None:
        check_probability("least", least)
    words = None if word_ids is None else _words(word_ids, mean)
    kept = _kept(prediction, words, labels)
    # Tokens that count are moved to the front of their row, so that those between them do not end entities.
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    counted = kept.gather(1, order)
    mean = mean.gather(1, order).where(counted, IGNORED)
    samples = samples.gather(2, order.expand_as(samples)).where(counted, IGNORED)
    seen, counts = spans(samples, scheme)[:, 1:].unique(dim=0, return_counts=True)
    of_samples = {tuple(span): count / len(samples) for span, count in zip(seen.tolist(), counts.tolist(), strict=True)}
    predicted = set(map(tuple, spans(mean, scheme).tolist()))
    chosen = predicted | {span for span, share in of_samples.items() if least is not None and share >= least}
    places, extent = order.tolist(), None if words is None else _Extent(words)
    entities: list[list[Entity]] = [[] for _ in range(len(mean))]
    for row, first, stop, kind in sorted(chosen):
        shares = [of_samples.get((row, first, stop, one), 0.0) for one in range(len(scheme.names))]
        types = {name: share for name, share in zip(scheme.names, shares, strict=True) if share}
        entropy = -sum(share * math.log(share) for share in (*shares, 1 - sum(shares)) if share > 1e-12)
        ends = (places[row][first], places[row][stop - 1])
        reach, numbers = (ends[1] + 1, None) if extent is None else extent(row, *ends)
        span = (row, first, stop, kind)
        entities[row].append(
            Entity(
                row,
                ends[0],
                reach,
                scheme.names[kind],
                shares[kind],
                max(entropy, 0.0),
                types,
                span in predicted,
                numbers,
            )
        )
    return entities


class _Extent:
    """Finds where a word ends, which only its first token speaks for."""

    def __init__(self, words: Tensor) -> None:
        self._words = words.tolist()

    def __call__(self, row: int, first: int, last: int) -> tuple[int, tuple[int, int]]:
        """Returns the token after the last word's last one, and the words, from two first tokens of words."""
        words = self._words[row]
        stop = last + 1
        while stop < len(words) and words[stop] == words[last]:
            stop += 1
        return stop, (words[first], words[last] + 1)


def _tokens(prediction: ClassificationPrediction) -> tuple[Tensor, Tensor]:
    """Returns the most probable classes of the average (B, L) and of the samples (T, B, L)."""
    if not isinstance(prediction, ClassificationPrediction):
        raise TypeError(
            f"prediction must be a ClassificationPrediction, got {type(prediction).__name__}: say task='classification'"
        )
    if prediction.mean.dim() != 3:
        raise ValueError(
            f"prediction must be of tokens, with classes for each, got shape {tuple(prediction.mean.shape)}"
        )
    if prediction.samples is None:
        raise ValueError("entities need the samples, which were not kept: predict with keep_samples=True")
    return prediction.predicted.clamp_min(0), prediction.samples.argmax(prediction.class_dim + 1)


def _words(word_ids: Sequence[Sequence[int | None]] | Tensor, tokens: Tensor) -> Tensor:
    if isinstance(word_ids, Tensor):
        words = word_ids.to(tokens.device)
    else:
        rows = [[IGNORED if word is None else word for word in row] for row in word_ids]
        lengths = sorted({len(row) for row in rows})
        if len(rows) != len(tokens) or lengths != [tokens.shape[1]]:
            raise ValueError(
                f"word_ids must be of shape {tuple(tokens.shape)}, got {len(rows)} rows of lengths {lengths}"
            )
        words = torch.tensor(rows, device=tokens.device)
    if words.shape != tokens.shape or words.is_floating_point():
        raise ValueError(
            f"word_ids must be integers of shape {tuple(tokens.shape)}, got {words.dtype} of {tuple(words.shape)}"
        )
    return words


def _kept(prediction: ClassificationPrediction, words: Tensor | None, labels: Tensor | None) -> Tensor:
    """Returns which tokens speak for themselves or for a word, (B, L)."""
    shape = prediction.predicted.shape
    kept = torch.ones(shape, dtype=torch.bool, device=prediction.mean.device)
    if prediction.valid is not None:
        kept = kept & prediction.valid
    if words is not None:
        if labels is not None:
            raise ValueError("give word_ids or labels, not both: each says which tokens count")
        kept = kept & (words >= 0)
        kept[:, 1:] &= words[:, 1:] != words[:, :-1]
    if labels is not None:
        if labels.shape != shape:
            raise ValueError(f"labels must be of shape {tuple(shape)}, got {tuple(labels.shape)}")
        kept = kept & (labels.to(kept.device) != IGNORED)
    return kept

"""Sequences of tokens in several samples: the uncertainty of each token and sequence, and the samples' agreement."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .moments import wide

Similarity = Callable[[Tensor, Tensor], float]
"""A function of two sequences of tokens, (L,) and (M,), with 1 for equal ones."""


class TokenUncertainty:
    """Collects the uncertainty of each token of given sequences, sample by sample, from scores of all words.

    With ``p_t`` the probabilities of the next word in sample t, given the words before it: the predictive entropy
    ``H[1/T sum_t p_t]``, all of the uncertainty; the expected entropy ``1/T sum_t H[p_t]``, of the data; and their
    difference, the mutual information of word and model. Memory does not grow with T but for one number a token.

    Args:
        tokens: the tokens that are scored, of shape (B, L).

    References:
        Malinin and Gales, "Uncertainty Estimation in Autoregressive Structured Prediction", ICLR 2021 (token-level
        measures), with samples that are weighted alike at every token.

    Example:
        >>> collected = TokenUncertainty(torch.tensor([[0]]))
        >>> collected.add(torch.tensor([[[60.0, 0.0]]]))
        >>> collected.add(torch.tensor([[[0.0, 60.0]]]))
        >>> collected.predictive_entropy.exp(), collected.expected_entropy.exp()
        (tensor([[2.]], dtype=torch.float64), tensor([[1.]], dtype=torch.float64))
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self._log_probs: list[Tensor] = []
        self._probability: Tensor | None = None
        self._entropy: Tensor | None = None

    def add(self, logits: Tensor) -> None:
        """Adds a sample: the scores (B, L, V) of all words at the places of the tokens."""
        logs = wide(logits).log_softmax(-1)
        probability = logs.exp()
        # A word that cannot follow has the score minus infinity, and adds nothing to the entropy.
        entropy = torch.special.entr(probability).sum(-1)
        self._log_probs.append(logs.gather(-1, self._tokens.unsqueeze(-1)).squeeze(-1))
        self._probability = probability if self._probability is None else self._probability.add_(probability)
        self._entropy = entropy if self._entropy is None else self._entropy + entropy

    @property
    def log_probs(self) -> Tensor:
        """The log-probability of each token in each sample, given the tokens before it, of shape (T, B, L)."""
        return torch.stack(self._log_probs)

    @property
    def predictive_entropy(self) -> Tensor:
        assert self._probability is not None
        return torch.special.entr(self._probability / len(self._log_probs)).sum(-1)

    @property
    def expected_entropy(self) -> Tensor:
        assert self._entropy is not None
        return self._entropy / len(self._log_probs)

    @property
    def mutual_information(self) -> Tensor:
        return (self.predictive_entropy - self.expected_entropy).clamp_min(0)


class SequenceUncertainty(NamedTuple):
    """The uncertainty of whole sequences."""

    log_likelihood: Tensor
    """``log 1/T sum_t P_t(y)``, of shape (B,)."""
    total: Tensor
    """``-1/L log 1/T sum_t P_t(y)``: all of the uncertainty, in nats a token."""
    knowledge: Tensor
    """``1/L (log 1/T sum_t P_t(y) - 1/T sum_t log P_t(y))``, never negative: the part that is due to the model."""


def sequence_uncertainty(log_probs: Tensor, valid: Tensor) -> SequenceUncertainty:
    """Returns the uncertainty of sequences from the log-probabilities of their tokens.

    ``P_t(y) = prod_l p_t(y_l | y_1, ..., y_(l-1))`` is the probability of the whole sequence in sample t. The average
    is over whole sequences, for each sample is one model of them. Both measures are those of one sequence, divided by
    its length L; their means over sequences that are drawn from the average are the entropy rate and the reverse
    mutual information.

    Args:
        log_probs: the tokens' log-probabilities, of shape (T, B, L).
        valid: whether a place has a token, of shape (B, L). What stands elsewhere does not matter, even NaN.

    References:
        Malinin and Gales, "Uncertainty Estimation in Autoregressive Structured Prediction", ICLR 2021
        (sequence-level measures, expectation of products).

    Example:
        >>> logs = torch.tensor([[[0.5, 0.5]], [[0.25, 1.0]]]).log()
        >>> sequence_uncertainty(logs, torch.tensor([[True, True]])).log_likelihood.exp()
        tensor([0.2500])
    """
    if log_probs.dim() != 3 or valid.shape != log_probs.shape[1:]:
        raise ValueError(
            f"log_probs must be of shape (T, B, L) and valid of shape (B, L), got {tuple(log_probs.shape)} and "
            f"{tuple(valid.shape)}"
        )
    logs = wide(log_probs).where(valid, 0.0).sum(2)
    length = valid.sum(1).clamp_min(1)
    likelihood = logs.logsumexp(0) - math.log(len(logs))
    knowledge = (likelihood - logs.mean(0)).clamp_min(0) / length
    return SequenceUncertainty(*(one.to(log_probs.dtype) for one in (likelihood, -likelihood / length, knowledge)))


def exact_agreement(sequences: Tensor, lengths: Tensor) -> Tensor:
    """Returns the share of pairs of different samples whose sequences are equal, of shape (B,); NaN for one sample.

    Args:
        sequences: tokens of shape (T, B, L). What stands after the end of a sequence does not matter.
        lengths: the number of tokens of each, of shape (T, B).

    Example:
        >>> exact_agreement(torch.tensor([[[1, 2]], [[1, 2]], [[1, 3]]]), torch.tensor([[2], [2], [2]]))
        tensor([0.3333])
    """
    first, _ = _numbered(sequences, lengths)
    return _mean_of_pairs((first.unsqueeze(0) == first.unsqueeze(1)).to(torch.get_default_dtype()))


def similarities(sequences: Tensor, lengths: Tensor, similarity: Similarity | None = None) -> Tensor:
    """Returns the similarity of each pair of samples, of shape (T, T, B).

    Args:
        sequences: tokens of shape (T, B, L). What stands after the end of a sequence does not matter.
        lengths: the number of tokens of each, of shape (T, B).
        similarity: a function of two sequences, which is called once for each pair of different ones. By default it is
            the number of places at which both have the same token, divided by the larger length.

    Raises:
        ValueError: shapes that do not fit, or a similarity that is no finite number.

    Example:
        >>> tokens, lengths = torch.tensor([[[1, 2, 0]], [[1, 2, 4]]]), torch.tensor([[2], [3]])
        >>> similarities(tokens, lengths)[0, 1]
        tensor([0.6667])
        >>> similarities(tokens, lengths, lambda a, b: float(a[0] == b[0]))[0, 1]
        tensor([1.])
    """
    first, inside = _numbered(sequences, lengths)
    if similarity is None:
        kept = sequences.where(inside, -1)
        rows = []
        for tokens, length in zip(kept, lengths, strict=True):  # one sample with all others, to save memory
            same = ((kept == tokens) & inside).sum(2)
            rows.append(torch.where(torch.maximum(lengths, length) > 0, same / torch.maximum(lengths, length), 1.0))
        return torch.stack(rows)
    table = torch.ones(len(sequences), *lengths.shape, device=sequences.device)
    for row, numbers in enumerate(first.T):
        distinct = numbers.unique().tolist()
        for place, one in enumerate(distinct):
            for other in distinct[place + 1 :]:
                pair = [sequences[sample, row, : lengths[sample, row]] for sample in (one, other)]
                value = float(similarity(*pair))
                if not math.isfinite(value):
                    raise ValueError(f"similarity must return a finite number, got {value}")
                of_one, of_other = numbers == one, numbers == other
                pairs = (of_one.unsqueeze(0) & of_other.unsqueeze(1)) | (of_other.unsqueeze(0) & of_one.unsqueeze(1))
                table[..., row] = table[..., row].where(~pairs, value)
    return table


def mean_similarity(table: Tensor) -> Tensor:
    """Returns the mean over pairs of different samples of `similarities`, of shape (B,); NaN for one sample.

    Example:
        >>> mean_similarity(torch.tensor([[[1.0], [0.5]], [[0.5], [1.0]]]))
        tensor([0.5000])
    """
    return _mean_of_pairs(table)


def medoid(table: Tensor) -> Tensor:
    """Returns the number of the sample that is most similar to all on average, the first of several, of shape (B,).

    It is the decision of minimum Bayes risk among the samples, with one minus the similarity as the loss.

    References:
        Kumar and Byrne, "Minimum Bayes-Risk Decoding for Statistical Machine Translation", HLT-NAACL 2004.

    Example:
        >>> tokens = torch.tensor([[[1, 2]], [[1, 3]], [[1, 3]]])
        >>> medoid(similarities(tokens, torch.full((3, 1), 2)))
        tensor([1])
    """
    return table.mean(1).argmax(0)


def _mean_of_pairs(table: Tensor) -> Tensor:
    count = len(table)
    off_diagonal = table.sum((0, 1)) - table.diagonal().sum(-1)
    return off_diagonal / (count * (count - 1)) if count > 1 else torch.full_like(off_diagonal, torch.nan)


def _numbered(sequences: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each sequence the number of the first sample that has the same, (T, B), and which places count."""
    if sequences.dim() != 3 or lengths.shape != sequences.shape[:2]:
        raise ValueError(
            "sequences must be of shape (T, B, L) and lengths of shape (T, B), got "
            f"{tuple(sequences.shape)} and {tuple(lengths.shape)}"
        )
    inside = torch.arange(sequences.shape[2], device=sequences.device) < lengths.unsqueeze(-1)
    first = torch.full_like(lengths, len(sequences))
    for number in range(len(sequences) - 1, -1, -1):
        same = ((sequences == sequences[number]) | ~inside).all(2) & (lengths == lengths[number])
        first = first.masked_fill(same, number)
    return first, inside

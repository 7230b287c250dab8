"""Dropout of word types in an embedding: `embedding_dropout` and `EmbeddingDropout`.

With k the keep probability and m_v a mask element for each row v of the embedding matrix E, 1 with probability k,

    y_i = E[w_i] m_(w_i) / k       in training, so E[y_i] = E[w_i]
    y_i = E[w_i]                   in eval mode

for the word w_i at place i: all occurrences of a word are dropped together (Gal and Ghahramani, NeurIPS 2016). The mask
is looked up as the vectors are, so the matrix is never copied.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core import sites
from ..core.inputs import check_input
from ..core.portable import refuse_script
from ..core.rate import DEFAULT_P, Probability, Rate, Rated, RateOfChild, as_rate
from ..core.symbolic import holds_proxy, leaf, recorded
from ..kernels.mask_params import MaskParams
from ..kernels.masking import COMPUTE_DTYPE


def _check_batch_dim(batch_dim: Any) -> None:
    if batch_dim is not None and (isinstance(batch_dim, bool) or not isinstance(batch_dim, int)):
        raise TypeError(f"batch_dim must be an integer or None, got {type(batch_dim).__name__}")


def _table_shape(input: Tensor, rows: int, batch_dim: int | None) -> tuple[int, ...]:
    if batch_dim is None:
        return (rows,)
    dims = input.dim()
    if not -dims <= batch_dim < dims:
        raise ValueError(f"batch_dim must be in [{-dims}, {dims}) for a {dims}-D input, got {batch_dim}")
    return (input.shape[batch_dim], rows)


def _look_up(table: Tensor, input: Tensor, batch_dim: int | None) -> Tensor:
    """Looks up each word's entry of the table: (rows,), or (batch, rows) with a row for each sample."""
    index = input.long()
    if batch_dim is None:
        return table[index]
    index = index.movedim(batch_dim, 0)
    found = table.gather(1, index.unsqueeze(1).flatten(1))
    return found.reshape(index.shape).movedim(0, batch_dim)


def _drop_words(
    vectors: Tensor,
    input: Tensor,
    rows: int,
    padding_idx: int | None,
    rate: Rate,
    generator: torch.Generator | None,
    batch_dim: int | None,
) -> Tensor:
    check_input(vectors, "embedding_dropout")
    shape = _table_shape(input, rows, batch_dim)
    params = rate.params_for(shape)
    mask = sites.keep_mask(vectors, params, shape, generator)
    if mask is None:
        return vectors
    kept = _look_up(mask, input, batch_dim)
    dtype = COMPUTE_DTYPE[vectors.dtype]
    scale: Any = params.scale if isinstance(params, MaskParams) else params[..., 1].to(vectors.device, dtype)
    if isinstance(scale, Tensor) and scale.dim():
        scale = _look_up(scale.expand(shape), input, batch_dim).unsqueeze(-1)
    out = torch.where(kept.unsqueeze(-1), vectors.to(dtype) * scale, 0.0).to(vectors.dtype)
    if padding_idx is None:
        return out
    return torch.where((input == padding_idx % rows).unsqueeze(-1), vectors, out)


def embedding_dropout(
    input: Tensor,
    weight: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    batch_dim: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Looks up words in an embedding matrix, some rows of which are dropped: F.embedding with a rate.

    ``y_i = E[w_i] m_(w_i) / k`` with one m_v ~ Bernoulli(k) for each row v, k = keep_prob = 1 - p. The expectation is
    the plain lookup, exactly. Each word of the vocabulary is kept or dropped as a whole, at all its places in the
    batch. The padding row is neither dropped nor scaled; every other row, the last one too, is trained. With k = 1 and
    in eval mode this is the plain lookup; with k = 0 all but padding is 0. Backward keeps a bool for each word of the
    input.

    Args:
        input: row numbers, int32 or int64 of any shape.
        weight: the matrix E, (rows, features).
        p: probability of dropping a row, in [0, 1]. Default: 0.5; Merity et al. use 0.1.
        training: whether dropout is applied.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against (rows,), with
            a value for each word.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: as in torch.nn.functional.embedding. Norms are
            those of the matrix itself.
        batch_dim: the dimension of `input` that counts samples, each of which then has a mask of its own. None: one
            mask for the whole batch.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A new tensor of shape ``input.shape + (features,)``.

    Raises:
        ValueError: a rate outside [0, 1], or one that does not broadcast; a batch_dim out of range.
        TypeError: both names of the rate, neither, or something that is no number.
        RuntimeError, IndexError: as torch.nn.functional.embedding; a matrix of integers.

    References:
        Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", NeurIPS
        2016, section 4.2; Merity et al., ICLR 2018 (arXiv:1708.02182), section 4.3.

    Example:
        >>> import torch
        >>> words = torch.tensor([[5, 1, 5], [2, 5, 0]])
        >>> y = embedding_dropout(words, torch.ones(6, 4), 0.5, padding_idx=0)
        >>> y[0, 0].equal(y[0, 2]) and y[0, 0].equal(y[1, 1]), y[1, 2].tolist()
        (True, [1.0, 1.0, 1.0, 1.0])
    """
    if holds_proxy(input, weight):
        return recorded(embedding_dropout, locals())
    rate = as_rate(p, keep_prob)
    _check_batch_dim(batch_dim)
    vectors = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if not sites.is_on(training):
        return vectors
    return _drop_words(vectors, input, weight.shape[0], padding_idx, rate, generator, batch_dim)


class _Words(Rated):
    """The layer that holds the rate of an `EmbeddingDropout`."""

    def __init__(
        self,
        p: Probability,
        keep_prob: Probability | None,
        batch_dim: int | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(p, keep_prob=keep_prob, generator=generator)
        _check_batch_dim(batch_dim)
        self.batch_dim = batch_dim

    def forward(self, vectors: Tensor, input: Tensor, rows: int, padding_idx: int | None) -> Tensor:
        if not sites.is_on(self.training):
            return vectors
        return _drop_words(vectors, input, rows, padding_idx, self.rate, self.generator, self.batch_dim)

    def extra_repr(self) -> str:
        own = "" if self.batch_dim is None else f", batch_dim={self.batch_dim}"
        return super().extra_repr() + own


class EmbeddingDropout(RateOfChild, nn.Embedding):
    """Module of `embedding_dropout`: torch.nn.Embedding, some rows of which are dropped in training.

    Arguments and state dict are those of torch.nn.Embedding, of which it is a subclass. `from_embedding` makes one from
    an existing embedding. Its rate is that of its child ``dropout``, for names and schedules; `p` and `keep_prob` are
    views of it. In eval mode it is the plain lookup. Other uses of the matrix, as in a decoder with tied weights, get
    it without dropout.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device, dtype: as
            in torch.nn.Embedding.
        p: probability of dropping a row, in [0, 1]. Default: 0.5; Merity et al. use 0.1.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against (rows,), with
            a value for each word.
        batch_dim: the dimension of the input that counts samples, each of which then has a mask of its own. None: one
            mask for the whole batch.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        Input: integers of any shape. Output: the input's shape, and embedding_dim.

    Raises:
        ValueError, TypeError: as `embedding_dropout`; AssertionError as torch.nn.Embedding.

    References:
        Gal and Ghahramani, NeurIPS 2016, section 4.2; Merity et al., ICLR 2018 (arXiv:1708.02182), section 4.3.

    Example:
        >>> import torch
        >>> layer = EmbeddingDropout(100, 8, padding_idx=0, p=0.1)
        >>> words = torch.randint(100, (3, 5))
        >>> layer(words).shape, list(layer.state_dict()), layer.keep_prob
        (torch.Size([3, 5, 8]), ['weight'], 0.9)
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        p: Probability = DEFAULT_P,
        keep_prob: Probability | None = None,
        batch_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        words = _Words(p, keep_prob, batch_dim, generator)
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        self.dropout: _Words = words

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        p: Probability = DEFAULT_P,
        *,
        keep_prob: Probability | None = None,
        batch_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> EmbeddingDropout:
        """Makes the same embedding with dropout. It has the same Parameter, so tied weights and optimizers stay valid.

        Args:
            embedding: a torch.nn.Embedding.
            p, keep_prob, batch_dim, generator: as in the constructor.

        Returns:
            A new module, in the mode that the embedding is in.

        Raises:
            TypeError: `embedding` is no torch.nn.Embedding, or is of a subclass, whose own forward would be lost.
            ValueError: its weight is parametrized.

        Example:
            >>> import torch
            >>> plain = torch.nn.Embedding(10, 4)
            >>> EmbeddingDropout.from_embedding(plain, 0.1).weight is plain.weight
            True
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding must be a torch.nn.Embedding, got {type(embedding).__name__}")
        if parametrize.is_parametrized(embedding):
            raise ValueError(
                "embedding is parametrized, so its weight cannot be taken over: undo that first, or use "
                "torchdrop.functional.embedding_dropout with its weight"
            )
        if type(embedding) is not nn.Embedding:
            raise TypeError(
                f"embedding must be a torch.nn.Embedding itself, got its subclass {type(embedding).__name__}, whose "
                "forward would be lost: use torchdrop.functional.embedding_dropout in it"
            )
        made = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            embedding.max_norm,
            embedding.norm_type,
            embedding.scale_grad_by_freq,
            embedding.sparse,
            _weight=embedding.weight.detach(),
            p=p,
            keep_prob=keep_prob,
            batch_dim=batch_dim,
            generator=generator,
        )
        made.weight = embedding.weight
        return made.train(embedding.training)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return self.dropout(super().forward(input), input, self.weight.shape[0], self.padding_idx)

"""Dropout of tokens at their places in a text: `word_dropout` and `WordDropout`.

With k the keep probability and m_i a mask element for each place i, 1 with probability k, independently,

    y_i = w_i if m_i else unk          for the numbers w of words (Bowman et al., CoNLL 2016)
    y_i = x_i m_i                      for vectors x (Iyyer et al., ACL 2015), or x_i m_i / k if asked for

in training, and the input itself in eval mode. Protected places keep their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import sites
from ..core.checks import check_integer
from ..core.inputs import check_input
from ..core.rate import DEFAULT_P, Probability, Rated, as_rate, formula_of
from ..core.symbolic import holds_proxy, leaf, recorded
from ..ops import operators


def _check_id(name: str, value: Any) -> None:
    check_integer(name, value)
    if value < 0:
        raise ValueError(f"{name} must be the number of a word, 0 or more, got {value}")


def _check_ids(unk_id: Any, special_ids: Any, inverted: bool) -> tuple[int, ...]:
    """Returns the numbers of the special words, if all arguments fit each other."""
    if unk_id is not None:
        _check_id("unk_id", unk_id)
    if isinstance(special_ids, str) or not isinstance(special_ids, Sequence):
        raise TypeError(f"special_ids must be a sequence of integers, got {special_ids!r}")
    for one in special_ids:
        _check_id("special_ids", one)
    if special_ids and unk_id is None:
        raise ValueError("special_ids need unk_id: vectors have no numbers, so give their places as `protected`")
    if inverted and unk_id is not None:
        raise ValueError("inverted scales vectors, numbers of words cannot be scaled: leave out inverted or unk_id")
    return tuple(special_ids)


def _check_kind(input: Any, unk_id: int | None, special_ids: tuple[int, ...]) -> None:
    """Refuses an input that does not fit the arguments.

    Raises:
        TypeError: it is no tensor, or numbers of words where vectors are meant, or the other way round.
        ValueError: vectors without a dimension of features, or a number that the input's dtype cannot hold.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"word_dropout(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}")
    whole = not (input.is_floating_point() or input.is_complex() or input.dtype is torch.bool)
    if unk_id is None:
        if whole:
            raise TypeError(f"unk_id must be given for the numbers of words, which input of {input.dtype} holds")
        check_input(input, "word_dropout")
        if input.dim() < 2:
            raise ValueError(
                f"input must have the dimensions (..., words, features), or hold integers with unk_id given, got "
                f"{tuple(input.shape)}"
            )
        return
    if not whole:
        raise TypeError(
            f"input must hold the numbers of words, as integers, where unk_id is given, got {input.dtype}: leave out "
            "unk_id for vectors"
        )
    largest = torch.iinfo(input.dtype).max
    for one in (unk_id, *special_ids):
        if one > largest:
            raise ValueError(f"unk_id and special_ids must be at most {largest} for {input.dtype}, got {one}")


def _protected(
    input: Tensor, places: Sequence[int], special_ids: tuple[int, ...], protected: Tensor | None
) -> Tensor | None:
    """Returns bools of the shape of `places`, True where nothing may change; None if there is no such place."""
    if protected is not None:
        if not isinstance(protected, Tensor) or protected.dtype is not torch.bool:
            got = protected.dtype if isinstance(protected, Tensor) else type(protected).__name__
            raise TypeError(f"protected must be a tensor of bools, True where nothing may change, got {got}")
        sizes = (1,) * (len(places) - protected.dim()) + tuple(protected.shape)
        if len(sizes) > len(places) or any(
            size != 1 and size != full for size, full in zip(sizes, places, strict=True)
        ):
            raise ValueError(
                f"protected of shape {tuple(protected.shape)} does not broadcast against the words' places, "
                f"{tuple(places)}"
            )
        protected = protected.expand(tuple(places))
    for one in special_ids:
        special = input == one
        protected = special if protected is None else protected | special
    return protected


def word_dropout(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    unk_id: int | None = None,
    special_ids: Sequence[int] = (),
    protected: Tensor | None = None,
    inverted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replaces each token with probability p: a word's number by that of the unknown word, a vector by zeros.

    ``y_i = w_i if m_i else unk_id`` for numbers, ``y_i = x_i m_i`` for vectors, with one m_i ~ Bernoulli(k) for each
    place i, k = keep_prob = 1 - p. Each occurrence of a word has a draw of its own (`embedding_dropout` drops all of
    them together). Tokens that are kept stay bit for bit; with ``inverted=True`` vectors are divided by k, so that
    E[y] = x. With k = 1 nothing changes, with k = 0 all tokens that are not protected are replaced, and in eval mode
    the input itself is returned. Iyyer et al. average over the tokens that are kept: that is ``y.sum(1)`` divided by
    the number of places at which y is not 0.

    Args:
        input: numbers of words, integers of any shape, if `unk_id` is given; else vectors, (..., words, features).
        p: probability of replacing a token, in [0, 1]. Default: 0.5.
        training: whether tokens are replaced.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the places
            (with a last dimension of 1 for vectors).
        unk_id: the number of the unknown word.
        special_ids: numbers of words that are never replaced: padding, beginning, end.
        protected: bools that broadcast against the places, ``input.shape`` or ``input.shape[:-1]``: True where
            nothing may change.
        inverted: whether vectors are scaled by 1 / k. Protected ones are not.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the input's shape and dtype; the input itself in eval mode and with k = 1.

    Raises:
        TypeError: numbers without unk_id, or anything else with it; arguments of another type; both names of the rate,
            or neither.
        ValueError: a rate outside [0, 1]; a negative or too large number of a word; special_ids for vectors, or
            inverted for numbers; shapes that do not fit.

    References:
        Bowman et al., "Generating Sentences from a Continuous Space", CoNLL 2016 (arXiv:1511.06349), section 3.1;
        Iyyer et al., "Deep Unordered Composition Rivals Syntactic Methods for Text Classification", ACL 2015.

    Example:
        >>> import torch
        >>> words = torch.tensor([[1, 7, 8, 9, 2], [1, 5, 6, 2, 0]])
        >>> word_dropout(words, 1.0, unk_id=3, special_ids=(0, 1, 2))
        tensor([[1, 3, 3, 3, 2],
                [1, 3, 3, 2, 0]])
    """
    if holds_proxy(input, protected):
        return recorded(word_dropout, locals())
    rate = as_rate(p, keep_prob, formula_of(inverted))
    special = _check_ids(unk_id, special_ids, inverted)
    if not sites.is_on(training):
        return input
    _check_kind(input, unk_id, special)
    places = tuple(input.shape if unk_id is not None else input.shape[:-1])
    shape = places if unk_id is not None else (*places, 1)
    params, protected = rate.params_for(shape), _protected(input, places, special, protected)
    if unk_id is not None:
        kept = sites.keep_mask(input, params, shape, generator)
        return input if kept is None else torch.where(kept if protected is None else kept | protected, input, unk_id)
    out = sites.apply(operators.masked, input, params, shape, False, generator)
    return out if protected is None else torch.where(protected.unsqueeze(-1), input, out)


class WordDropout(Rated):
    """Module of `word_dropout`: tokens are replaced in training, and the input itself is returned in eval mode.

    Args:
        p: probability of replacing a token, in [0, 1]. Default: 0.5.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor as in `word_dropout`.
        unk_id: the number of the unknown word, for inputs that are numbers of words; None for vectors.
        special_ids: numbers of words that are never replaced.
        inverted: whether vectors are scaled by 1 / k.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        Input: integers of any shape, or (..., words, features). Output: the same. The call takes a second argument,
        `protected`, as `word_dropout` does. No parameters, no buffers, nothing in the state_dict.

    Raises:
        TypeError, ValueError: as `word_dropout`.

    References:
        Bowman et al., CoNLL 2016 (arXiv:1511.06349); Iyyer et al., ACL 2015.

    Example:
        >>> import torch
        >>> layer, words = WordDropout(0.5, unk_id=3, special_ids=(0, 1, 2)), torch.arange(1000)
        >>> y = layer(words)
        >>> y[:3].tolist(), 300 < (y == 3).sum() < 700, layer.eval()(words) is words
        ([0, 1, 2], tensor(True), True)
    """

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        *,
        keep_prob: Probability | None = None,
        unk_id: int | None = None,
        special_ids: Sequence[int] = (),
        inverted: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self._formula = formula_of(inverted)
        super().__init__(p, keep_prob=keep_prob, generator=generator)
        self.special_ids: tuple[int, ...] = _check_ids(unk_id, special_ids, inverted)
        self.unk_id = unk_id
        self.inverted = inverted

    @leaf
    def forward(self, input: Tensor, protected: Tensor | None = None) -> Tensor:
        return word_dropout(
            input, self.rate, self.training, unk_id=self.unk_id, special_ids=self.special_ids, protected=protected,
            inverted=self.inverted, generator=self.generator,
        )  # fmt: skip

    def extra_repr(self) -> str:
        own = {"unk_id": self.unk_id, "special_ids": self.special_ids or None, "inverted": self.inverted or None}
        shown = "".join(f", {name}={value}" for name, value in own.items() if value is not None)
        return super().extra_repr() + shown

"""Locked (variational) dropout of sequences: `locked_dropout` and `LockedDropout`.

With k the keep probability and m a mask of one draw for each feature of each sequence,

    y[t] = x[t] m / k    for all time steps t

in training, and y = x in eval mode: a dropped feature stays dropped for the whole sequence (Gal and Ghahramani, NeurIPS
2016).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from ..core import sites
from ..core.checks import check_bool
from ..core.inputs import check_input
from ..core.rate import DEFAULT_P, InplaceRated, Probability, as_rate
from ..core.symbolic import leaf, recorded
from ..kernels.masking import scaled_where, unpack_params
from ..ops import operators

Sequences = TypeVar("Sequences", Tensor, PackedSequence)


def _mask_shape(input: Tensor | PackedSequence, batch_first: bool) -> tuple[int, ...]:
    """Returns (1, B, F), (B, 1, F), (1, F) for one sequence, or (B, F) for packed ones.

    Raises:
        TypeError: it is neither a tensor nor packed sequences; `batch_first` is no bool.
        ValueError: it has another rank.
    """
    check_bool("batch_first", batch_first)
    if isinstance(input, PackedSequence):
        return int(input.batch_sizes[0]), *input.data.shape[1:]
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor or a PackedSequence, got {type(input).__name__}")
    if input.dim() not in (2, 3):
        layout = "(B, T, F)" if batch_first else "(T, B, F)"
        raise ValueError(
            f"locked_dropout takes sequences {layout} with batch_first={batch_first}, or one sequence (T, F), got an "
            f"input of {tuple(input.shape)}: for other shapes name the time axes as dropout's shared_axes"
        )
    shape = list(input.shape)
    shape[1 if batch_first and len(shape) == 3 else 0] = 1
    return tuple(shape)


def locked_dropout(
    input: Sequences,
    p: Probability = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Probability | None = None,
    batch_first: bool = False,
    generator: torch.Generator | None = None,
) -> Sequences:
    """Applies dropout with one mask for each sequence, the same at all of its time steps.

    ``y[t] = x[t] m / k`` with m ~ Bernoulli(k) of the features' size, k = keep_prob = 1 - p. E[y] = x exactly; m is
    constant over time, independent between sequences, features and calls. With k = 1 and in eval mode the input itself
    is returned; with k = 0 the output is 0. A dropped element is exactly 0, also where the input is infinite or NaN.
    The mask is not stored, except for packed sequences, which take a byte for each element, and break the graph of
    torch.compile.

    Args:
        input: sequences (T, B, F), or (B, T, F) with ``batch_first=True``; one sequence (T, F), as nn.LSTM takes it; or
            a PackedSequence, which has a layout of its own and the masks that its padded form would have.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        training: whether dropout is applied.
        inplace: whether the result is written into `input`.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        batch_first: whether the batch comes before time in the input, as in nn.LSTM. The input does not show it.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor or a PackedSequence, as the input; the input itself in eval mode, with k = 1 and in place.

    Raises:
        ValueError: an input of another rank; a rate outside [0, 1]; packed sequences in place.
        TypeError: the input is neither a tensor nor a PackedSequence; both names of the rate, or neither;
            `batch_first` is no bool.

    References:
        Gal and Ghahramani, NeurIPS 2016 (arXiv:1512.05287); Merity et al., ICLR 2018 (arXiv:1708.02182).

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop.functional import locked_dropout
        >>> y = locked_dropout(torch.ones(20, 4, 8), 0.25)
        >>> torch.equal(y, y[:1].expand_as(y)), torch.equal(y[:, 0], y[:, 1])
        (True, False)
    """
    if isinstance(input, Proxy):
        return recorded(locked_dropout, locals())
    rate, shape = as_rate(p, keep_prob), _mask_shape(input, batch_first)
    if not sites.is_on(training):
        return input
    if isinstance(input, Tensor):
        check_input(input, "locked_dropout")
        return sites.apply(operators.masked, input, rate.params_for(shape), shape, inplace, generator)
    if inplace:
        raise ValueError("inplace must be False for a PackedSequence: its data are copied")
    check_input(input.data, "locked_dropout")
    params = rate.params_for(shape)
    kept = sites.keep_mask(input.data, params, shape, generator)
    if kept is None:
        return input
    order = input.sorted_indices
    if order is None:
        order = torch.arange(shape[0], device=kept.device)
    rows = torch.cat([order[:size] for size in input.batch_sizes.tolist()])
    scale: Any = unpack_params(params, kept.device)[1]
    if isinstance(scale, Tensor):
        scale = scale.to(kept.device).expand(shape)[rows]
    out = scaled_where(kept[rows], input.data, scale)
    return PackedSequence(out, input.batch_sizes, input.sorted_indices, input.unsorted_indices)


class LockedDropout(InplaceRated):
    """Module of `locked_dropout`: one mask for each sequence, the same at all of its time steps.

    Also known as variational dropout. A different mask is drawn for each sequence and in each forward.

    Args:
        p: probability of dropping, in [0, 1]. Default: 0.5.
        inplace: whether the result is written into the input.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        batch_first: False for inputs (T, B, F), True for (B, T, F). One sequence is (T, F) in both.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        Input and output: as `batch_first` says, or a PackedSequence. No parameters, nothing in the state_dict.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: both names of the rate, neither, or something that is no number; `batch_first` is no bool.

    References:
        Gal and Ghahramani, NeurIPS 2016 (arXiv:1512.05287); Merity et al., ICLR 2018 (arXiv:1708.02182).

    Example:
        >>> import torch
        >>> from torchdrop import LockedDropout
        >>> layer = LockedDropout(0.25, batch_first=True)
        >>> layer
        LockedDropout(p=0.25, inplace=False, batch_first=True)
        >>> y = layer(torch.ones(4, 20, 8))
        >>> torch.equal(y, y[:, :1].expand_as(y))
        True
    """

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        inplace: bool = False,
        *,
        keep_prob: Probability | None = None,
        batch_first: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, inplace, keep_prob=keep_prob, generator=generator)
        check_bool("batch_first", batch_first)
        self.batch_first = batch_first

    @leaf
    def forward(self, input: Sequences) -> Sequences:
        return locked_dropout(
            input, self.rate, self.training, self.inplace, batch_first=self.batch_first, generator=self.generator
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, batch_first={self.batch_first}"

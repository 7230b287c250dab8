"""Zoneout of recurrent states: `zoneout` and `Zoneout`, for cells that users write.

Each unit of a state keeps its old value with probability p at each time step:

    h = z h' + (1 - z) h~,    z ~ Bernoulli(p),    in training;    h = p h' + (1 - p) h~    in eval mode

with h' the state before and h~ the cell's result from it (Krueger et al., ICLR 2017). Eval mode has the expectation of
training, so nothing is scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import sites
from ...core.exported import or_eval
from ...core.inputs import check_input
from ...core.rate import DEFAULT_P, Probability, Rate, Rated, as_rate, realized
from ...core.symbolic import holds_proxy, leaf, recorded
from ...kernels.mask_params import ONE, MaskParams, keeps_all
from ...kernels.masking import COMPUTE_DTYPE
from .cells import Update, updated


def _update(
    like: Tensor, rate: Rate, shape: Sequence[int], training: bool, generator: torch.Generator | None
) -> Update:
    params, on = rate.params_for(shape), sites.is_on(training)
    if isinstance(params, MaskParams):
        if on:
            return sites.keep_mask(like, params, shape, generator)
        return None if keeps_all(params) else params.threshold / ONE
    if on:
        mask: Any = sites.keep_mask(like, params, shape, generator)
        return or_eval(mask, lambda: _expected(like, torch.as_tensor(realized(rate.keep_prob)), shape))
    return _expected(like, params[..., 0] / ONE, shape)


def _expected(like: Tensor, k: Tensor, shape: Sequence[int]) -> Tensor:
    k = k.to(like.device, COMPUTE_DTYPE[like.dtype])
    return k if k.dim() == 0 else k.expand(tuple(shape))


def _check_states(new: Any, old: Any) -> None:
    check_input(new, "zoneout")
    if not isinstance(old, Tensor):
        raise TypeError(f"old must be a tensor, got {type(old).__name__}")
    if old.shape != new.shape or old.dtype != new.dtype:
        raise ValueError(
            "new and old must agree in shape and dtype, "
            f"got {tuple(new.shape)} {new.dtype} and {tuple(old.shape)} {old.dtype}"
        )


def zoneout(
    new: Tensor,
    old: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Lets each unit of a recurrent state keep its old value with probability p, in a cell that a user writes.

    ``z old + (1 - z) new`` with z ~ Bernoulli(p) in training, ``p old + (1 - p) new`` in eval mode, which is the
    expectation of the former: nothing is scaled. k = keep_prob = 1 - p is the probability that a unit is updated. With
    k = 1 `new` itself is returned; with k = 0 the state never changes. Gradients go to the state that a unit has.

    Args:
        new: the state that the cell has computed.
        old: the state before, of the same shape and dtype.
        p: the zoneout rate: probability that a unit keeps its old value, in [0, 1]. Default: 0.5.
        training: whether units are chosen at random.
        keep_prob: probability that a unit is updated, in place of `p`: a number, or a tensor that broadcasts.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        The next state, of the same shape and dtype; `new` itself with k = 1.

    Raises:
        ValueError: a rate outside [0, 1]; states of different shapes or dtypes.
        TypeError: both names of the rate, or neither; `old` is no tensor.

    References:
        Krueger et al., ICLR 2017 (arXiv:1606.01305), section 3.

    Example:
        >>> import torch
        >>> from torchdrop.functional import zoneout
        >>> new, old = torch.ones(1000), torch.zeros(1000)
        >>> zoneout(new, old, 0.25).unique(), zoneout(new, old, 0.25, training=False).unique()
        (tensor([0., 1.]), tensor([0.7500]))
    """
    if holds_proxy(new, old):
        return recorded(zoneout, locals())
    rate = as_rate(p, keep_prob)
    _check_states(new, old)
    return updated(new, old, _update(new, rate, new.shape, training, generator))


class Zoneout(Rated):
    """Module of `zoneout`: ``layer(new, old)``.

    Args:
        p: the zoneout rate: probability that a unit keeps its old value, in [0, 1]. Default: 0.5.
        keep_prob: probability that a unit is updated, in place of `p`: a number, or a tensor that broadcasts.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: both names of the rate, neither, or something that is no number.

    Example:
        >>> import torch, torchdrop
        >>> cell, zoneout, h = torch.nn.GRUCell(8, 16), torchdrop.Zoneout(0.1), torch.zeros(4, 16)
        >>> for x in torch.randn(20, 4, 8):
        ...     h = zoneout(cell(x, h), h)
        >>> zoneout
        Zoneout(p=0.1)
    """

    @leaf
    def forward(self, new: Tensor, old: Tensor) -> Tensor:
        return zoneout(new, old, self.rate, self.training, generator=self.generator)


class ZoneoutSteps(Rated):
    """The rate of zoneout in a recurrent layer, which draws for all of its time steps at once."""

    def forward(self, like: Tensor, shape: Sequence[int]) -> Update:
        return _update(like, self.rate, shape, self.training, self.generator)

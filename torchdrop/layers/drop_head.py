"""Dropout of whole attention heads: `drop_head` and `DropHead`. Functions that it shares with `drop_key` are here, too.

At least one head of each sample always stays (in `drop_key`, one key of each query). Each draws an integer w, uniform
in [0, 2**32), and with t the threshold of the keep probability it is kept where

    w < t   or   w = min w

with the minimum over those of which one must stay. So the one with the smallest draw stays if all would be dropped, and
nothing is drawn twice. Equal smallest draws stay together, so that heads are exactly exchangeable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ..core import sites
from ..core.checks import check_integer
from ..core.choices import kept_or_smallest
from ..core.inputs import check_input
from ..core.rate import DEFAULT_P, Probability, Rate, Rated, as_rate, check_leaves_one
from ..core.symbolic import leaf, recorded
from ..kernels.masking import COMPUTE_DTYPE


def _check_layout(dim: Any, heads: Any) -> None:
    if dim is not None and heads is not None:
        raise TypeError(f"give dim or heads, not both: got dim={dim} and heads={heads}")
    for name, value in (("dim", dim), ("heads", heads)):
        if value is not None:
            check_integer(name, value, least=1 if name == "heads" else None)


def _drop_heads(
    input: Tensor, rate: Rate, dim: int | None, heads: int | None, generator: torch.Generator | None
) -> Tensor:
    check_input(input, "drop_head")
    if heads is not None:
        size = input.shape[-1] if input.dim() > 1 else 0
        if size % heads or input.dim() < 2:
            raise ValueError(
                f"heads must divide the last dimension of a (samples, ..., heads * features) input: {heads} for an "
                f"input of {tuple(input.shape)}"
            )
        parts = input.unflatten(-1, (heads, size // heads))
        return _drop_heads(parts, rate, parts.dim() - 2, None, generator).flatten(-2)
    dims = input.dim()
    at = 1 if dim is None else dim
    if not -dims <= at < dims:
        raise ValueError(f"dim must be in [{-dims}, {dims}) for a {dims}-D input, got {at}")
    at %= dims
    shape = [size if axis in (0, at) else 1 for axis, size in enumerate(input.shape)]
    params = rate.params_for(shape)
    if isinstance(params, Tensor) and params.dim() > 1 and params.shape[at] != 1:
        raise ValueError(f"keep_prob must be the same for all heads of a sample, got one that varies along dim {at}")
    bits = sites.random_bits_under(input, params, shape, generator)
    if bits is None:
        return input
    kept = kept_or_smallest(bits, params, at)
    number = kept.sum(at, keepdim=True, dtype=COMPUTE_DTYPE[input.dtype])
    scale = torch.full_like(number, input.shape[at]) / number  # a number over a tensor is rounded twice
    return torch.where(kept, input * scale, 0.0).to(input.dtype)


def _check_some(keep_prob: Probability) -> None:
    check_leaves_one(keep_prob, "drop_head", "head")


def drop_head(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    dim: int | None = None,
    heads: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole attention heads of a sample, and scales those kept by (heads / heads kept).

    ``y_h = x_h m_h H / sum(m)`` with one m_h for each head of each sample. A head is kept with probability k = 1 - p,
    and if none would be, the one with the smallest draw stays, so the total probability is k + (1 - k)**H / H.
    The scales of a sample's heads add up to H, and heads are exchangeable, so E[y] = x exactly. With k = 1 and in eval
    mode the input itself is returned; k = 0 is refused. A dropped head is exactly 0, also where the input is infinite
    or NaN.

    It belongs between attention and the output projection, on the output of each head (see `DropHead`).

    Args:
        input: float16, bfloat16, float32 or float64. Its first dimension counts samples; with ``dim=0`` the input is
            one sample.
        p: probability of dropping a head, in [0, 1). Default: 0.5.
        training: whether heads are dropped.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against (samples, 1,
            1, 1) for a rate of each sample. It is the same for all heads.
        dim: the dimension of heads: 1, the default, for (samples, heads, time, features), 2 for (samples, time, heads,
            features).
        heads: in place of `dim`, the number of heads if the last dimension has them one after another: (samples, time,
            heads * features).
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the input's shape and dtype; the input itself in eval mode and with k = 1.

    Raises:
        ValueError: a rate outside [0, 1], or k = 0; `dim` or `heads` do not fit the input; a rate that differs between
            heads.
        TypeError: both names of the rate, or neither; both `dim` and `heads`.
        RuntimeError: an integer tensor.

    References:
        Zhou et al., "Scheduled DropHead", Findings of EMNLP 2020 (arXiv:2004.13342).

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop.functional import drop_head
        >>> y = drop_head(torch.ones(5, 4, 3, 2), 0.5)
        >>> y[:, :, 0, 0].sum(1).round(decimals=4)
        tensor([4., 4., 4., 4., 4.])
    """
    if isinstance(input, Proxy):
        return recorded(drop_head, locals())
    rate = as_rate(p, keep_prob, check=_check_some)
    _check_layout(dim, heads)
    if not sites.is_on(training):
        return input
    return _drop_heads(input, rate, dim, heads, generator)


class DropHead(Rated):
    """Module of `drop_head`: whole heads of a sample, scaled by (heads / heads kept); the input itself in eval mode.

    The paper schedules the rate along a V: it falls during the first half of the training and rises again in the second
    half. `torchdrop.schedules.v_shaped` is that schedule.

    Args:
        p: probability of dropping a head, in [0, 1). Default: 0.5.
        keep_prob: probability of keeping, in place of `p`.
        dim: the dimension of heads; 1 if neither it nor `heads` is given.
        heads: in place of `dim`, the number of heads if the last dimension has them one after another.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Raises:
        ValueError: a rate outside [0, 1], or k = 0.

    References:
        Zhou et al., "Scheduled DropHead", Findings of EMNLP 2020 (arXiv:2004.13342).

    Example:
        In attention written by hand, with the paper's schedule:

        >>> import torch, torchdrop
        >>> import torch.nn.functional as F
        >>> from torchdrop import DropHead
        >>> class Attention(torch.nn.Module):
        ...     def __init__(self, features, heads):
        ...         super().__init__()
        ...         self.heads = heads
        ...         self.qkv = torch.nn.Linear(features, 3 * features)
        ...         self.drop_head = DropHead(0.2)
        ...         self.out = torch.nn.Linear(features, features)
        ...     def forward(self, x):
        ...         q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        ...         y = self.drop_head(F.scaled_dot_product_attention(q, k, v))
        ...         return self.out(y.transpose(-3, -2).flatten(-2))
        >>> model = Attention(16, 4)
        >>> model(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
        >>> v_shaped = torchdrop.schedules.v_shaped(0.8, 1.0, 1000)
        >>> scheduler = torchdrop.KeepProbScheduler(model, {"drop_head": v_shaped})
        >>> model.drop_head.keep_prob
        0.8

        In a model that exists, before its output projection, as a module of its own so that it is found by its name:

        >>> block = torch.nn.ModuleDict({"projection": torch.nn.Linear(16, 16)})
        >>> block["drop_head"] = DropHead(0.2, heads=4)
        >>> hook = block["projection"].register_forward_pre_hook(lambda _, args: (block["drop_head"](args[0]),))
    """

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        *,
        keep_prob: Probability | None = None,
        dim: int | None = None,
        heads: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, keep_prob=keep_prob, generator=generator)
        _check_layout(dim, heads)
        self.dim = dim
        self.heads = heads

    def _check_rate(self, keep_prob: Probability) -> None:
        _check_some(keep_prob)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return drop_head(input, self.rate, self.training, dim=self.dim, heads=self.heads, generator=self.generator)

    def extra_repr(self) -> str:
        layout = f"dim={1 if self.dim is None else self.dim}" if self.heads is None else f"heads={self.heads}"
        return f"{super().extra_repr()}, {layout}"

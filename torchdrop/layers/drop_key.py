"""Dropout of keys in attention, before the softmax: `drop_key`, `drop_key_mask` and `DropKey`.

    y = x where m, else -inf        m ~ Bernoulli(k) for each query and key, and one key of each query always stays

The output of the softmax then still adds up to 1. `drop_head` explains how the key that stays is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Proxy

from ..core import sites
from ..core.choices import kept_or_smallest
from ..core.inputs import check_input
from ..core.mask_shape import Axes, mask_shape
from ..core.rate import DEFAULT_P, Probability, Rate, Rated, as_rate, check_leaves_one
from ..core.symbolic import holds_proxy, leaf, recorded


def _may_be_seen(logits: Tensor) -> Tensor:
    """Returns the keys that no mask excludes: logits that are neither -inf nor masked by the dtype's lowest number."""
    return ~(logits <= torch.finfo(logits.dtype).min / 2)


def _kept_keys(
    like: Tensor,
    sizes: Sequence[int],
    rate: Rate,
    allowed: Tensor | None,
    shared_axes: Axes,
    generator: torch.Generator | None,
) -> Tensor | None:
    """Returns the mask of keys; None if all stay."""
    shape = list(mask_shape(like.new_empty(()).expand(sizes), shared_axes, None))
    if shape[-1] != sizes[-1]:
        raise ValueError(f"shared_axes must leave the last dimension, the keys, to themselves, got {shared_axes}")
    params = rate.params_for(shape)
    bits = sites.random_bits_under(like, params, shape, generator)
    return None if bits is None else kept_or_smallest(bits, params, -1, allowed)


def _check_some(keep_prob: Probability) -> None:
    check_leaves_one(keep_prob, "drop_key", "key")


def drop_key(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    shared_axes: Axes = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replaces attention logits by -inf, each with probability p, before the softmax.

    ``y = x where m, else -inf`` with m ~ Bernoulli(k), k = 1 - p, for each query and key. After the softmax every row
    adds up to 1: the weights of the keys that stay are those of attention among only these keys. No row is masked in
    full: of the keys that a query may see, the one with the smallest draw always stays. A key may be seen unless its
    logit is -inf, or below half of the most negative number of the dtype (as after masking by
    ``torch.finfo(dtype).min``); other large negative numbers are ordinary logits. A row in which no key may be seen
    stays as it is.

    It is not unbiased: the expected attention weights are not those of eval mode, as a softmax of fewer keys is
    sharper. With k = 1 and in eval mode the input itself is returned; k = 0 is refused. The gradient of a dropped
    logit is 0.

    Args:
        input: logits (samples, heads, queries, keys), or any shape with the keys last, with masks already added, in
            float16, bfloat16, float32 or float64.
        p: probability of dropping a key, in [0, 1). Default: 0.5.
        training: whether keys are dropped.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        shared_axes: axes over which the draws are the same: ``-2`` drops the same keys for all queries, ``1`` for all
            heads, ``(1, -2)`` for both.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the input's shape and dtype; the input itself in eval mode and with k = 1.

    Raises:
        ValueError: a rate outside [0, 1], or k = 0; axes that do not fit, or include that of the keys.
        TypeError: both names of the rate, or neither.
        RuntimeError: an integer tensor.

    References:
        Li et al., "DropKey", CVPR 2023 (arXiv:2208.02646).

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop.functional import drop_key
        >>> attention = drop_key(torch.zeros(2, 4, 3, 5), 0.4).softmax(-1)
        >>> torch.allclose(attention.sum(-1), torch.ones(2, 4, 3))
        True
    """
    if isinstance(input, Proxy):
        return recorded(drop_key, locals())
    rate = as_rate(p, keep_prob, check=_check_some)
    if not sites.is_on(training):
        return input
    check_input(input, "drop_key")
    if not input.dim():
        raise ValueError("drop_key takes logits with the keys in the last dimension, got a 0-D tensor")
    kept = _kept_keys(input, input.shape, rate, _may_be_seen(input), shared_axes, generator)
    return input if kept is None else torch.where(kept, input, -math.inf)


def _masked_by(mask: Tensor | None, other: Tensor) -> Tensor:
    """Returns a mask for attention, with False or -inf also where `other` is False."""
    if mask is None:
        return other
    return mask & other if mask.dtype is torch.bool else torch.where(other, mask, -math.inf)


def _logits_shape(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """Returns the shape of ``query @ key.mT``. Keys may have fewer heads than queries (grouped-query attention)."""
    own = (1,) * max(key.dim() - query.dim(), 0) + tuple(query.shape[:-2])
    other = (1,) * (len(own) - key.dim() + 2) + tuple(key.shape[:-2])
    batch = [of_key if size == 1 else size for size, of_key in zip(own, other, strict=True)]
    return (*batch, query.shape[-2], key.shape[-2])


def _attention_mask(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor) or tensor.dim() < 2:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a tensor of shape (..., time, features), got {got}")
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise TypeError(f"attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
        if not (attn_mask.dtype is torch.bool or attn_mask.is_floating_point()):
            raise TypeError(
                f"attn_mask must be bool, with True where a key may be seen, or floating point, got {attn_mask.dtype}"
            )
        shape = _logits_shape(query, key)
        try:
            attn_mask.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"attn_mask must broadcast against the logits' shape {shape}, got {tuple(attn_mask.shape)}"
            ) from None
    if not is_causal:
        return attn_mask
    sizes = (query.shape[-2], key.shape[-2])
    return _masked_by(attn_mask, torch.ones(sizes, dtype=torch.bool, device=query.device).tril())


def drop_key_mask(
    query: Tensor,
    key: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    shared_axes: Axes = None,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """Returns `drop_key` as an `attn_mask` for scaled_dot_product_attention, which makes its own logits.

    It is the mask that `drop_key` would apply to the logits of this query and key, combined with `attn_mask` and the
    causal mask: no row loses the last key that these let it see.

    Args:
        query: (..., queries, features). Only its shape and device matter.
        key: (..., keys, features), likewise.
        p: probability of dropping a key, in [0, 1). Default: 0.5.
        training: whether keys are dropped.
        keep_prob: probability of keeping, in place of `p`.
        attn_mask: as for scaled_dot_product_attention: bools, True where a key may be seen, or numbers to add to the
            logits.
        is_causal: whether query i may see only the keys 0 ... i. Leave it out in scaled_dot_product_attention then.
        shared_axes: axes of the logits (..., queries, keys) over which the draws are the same.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A mask of the kind of `attn_mask` (bool if that is None) that broadcasts against the logits. In eval mode and
        with k = 1, `attn_mask` itself, or the causal mask.

    Raises:
        ValueError: as `drop_key`; an `attn_mask` that does not broadcast against the logits.
        TypeError: an `attn_mask` of integers, or one that is no tensor.

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop.functional import drop_key_mask
        >>> q, k, v = torch.randn(3, 2, 4, 7, 8).unbind()
        >>> mask = drop_key_mask(q, k, 0.3, is_causal=True)
        >>> mask.shape, mask.any(-1).all(), mask.triu(1).any()
        (torch.Size([2, 4, 7, 7]), tensor(True), tensor(False))
        >>> torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).isfinite().all()
        tensor(True)
    """
    if holds_proxy(query, key, attn_mask):
        return recorded(drop_key_mask, locals())
    rate = as_rate(p, keep_prob, check=_check_some)
    mask = _attention_mask(query, key, attn_mask, is_causal)
    if not sites.is_on(training):
        return mask
    check_input(query, "drop_key_mask")
    allowed = mask if mask is None or mask.dtype is torch.bool else _may_be_seen(mask)
    kept = _kept_keys(query, _logits_shape(query, key), rate, allowed, shared_axes, generator)
    return mask if kept is None else _masked_by(mask, kept)


class DropKey(Rated):
    """Module of `drop_key`: replaces logits by -inf; the input itself in eval mode. `attn_mask` returns it as a mask.

    Args:
        p: probability of dropping a key, in [0, 1). Default: 0.5.
        keep_prob: probability of keeping, in place of `p`.
        shared_axes: axes over which the draws are the same: ``-2`` for all queries, ``1`` for all heads.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Raises:
        ValueError: a rate outside [0, 1], or k = 0.

    References:
        Li et al., "DropKey", CVPR 2023 (arXiv:2208.02646).

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop import DropKey
        >>> layer = DropKey(0.3)
        >>> q, k, v = torch.randn(3, 2, 4, 7, 8).unbind()
        >>> (layer(q @ k.mT / 8**0.5).softmax(-1) @ v).shape
        torch.Size([2, 4, 7, 8])
        >>> attention = torch.nn.functional.scaled_dot_product_attention
        >>> attention(q, k, v, attn_mask=layer.attn_mask(q, k)).shape
        torch.Size([2, 4, 7, 8])
        >>> layer.eval().attn_mask(q, k) is None
        True
    """

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        *,
        keep_prob: Probability | None = None,
        shared_axes: Axes = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, keep_prob=keep_prob, generator=generator)
        self.shared_axes = shared_axes

    def _check_rate(self, keep_prob: Probability) -> None:
        _check_some(keep_prob)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return drop_key(input, self.rate, self.training, shared_axes=self.shared_axes, generator=self.generator)

    def attn_mask(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | None:
        """Returns `drop_key_mask` for scaled_dot_product_attention, at this layer's rate and mode.

        In Monte Carlo inference the draw belongs to the module that calls this, and `sources` names that one.
        """
        return drop_key_mask(
            query, key, self.rate, self.training, attn_mask=attn_mask, is_causal=is_causal,
            shared_axes=self.shared_axes, generator=self.generator,
        )  # fmt: skip

    def extra_repr(self) -> str:
        shared = "" if self.shared_axes is None else f", shared_axes={self.shared_axes}"
        return f"{super().extra_repr()}{shared}"

"""Attention whose weights are dropped: `scaled_dot_product_attention`.

    O = (m softmax(s Q K' + bias) / k) V        m ~ Bernoulli(k) for each weight

It stands in the place of PyTorch's function, which on the CPU stores the weights and a mask of their size, and draws
the mask one number after the other.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import kernels
from ..core import portable, sites
from ..core.inputs import check_input
from ..core.rate import Default, Probability, Rate, as_rate, rate_named
from ..core.shard import is_dtensor
from ..core.symbolic import holds_proxy, recorded
from ..core.torch_state import function_modes, is_compiling, is_watched
from ..ops.attention import attention, composed
from ..ops.operators import masked

NAME = "scaled_dot_product_attention"


def _check(query: Any, key: Any, value: Any, attn_mask: Any, enable_gqa: bool) -> None:
    """Refuses tensors that do not go together, with the classes of PyTorch's errors."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}(): argument {name!r} must be Tensor, not {type(tensor).__name__}")
        if tensor.dim() < 2:
            raise RuntimeError(f"{NAME}: {name} must have the shape (..., time, features), got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise RuntimeError(
                f"{NAME}: query, key and value must have one dtype and be on one device, got a query of {query.dtype} "
                f"on {query.device} and a {name} of {tensor.dtype} on {tensor.device}"
            )
    check_input(query, NAME)
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"{NAME}: query and key must have as many features, and key and value as many positions, got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
        )
    shape = _weights_shape(query, key, value, enable_gqa)
    if attn_mask is not None:
        _check_mask(attn_mask, query, shape)


def _weights_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """Returns the shape of the attention weights.

    Raises:
        RuntimeError: samples or heads do not go together.
    """
    tensors = (query, key, value)
    batches = [t.shape[:-2] for t in tensors]
    if enable_gqa and all(batches):
        heads = query.shape[-3]
        if any(batch[-1] == 0 or heads % batch[-1] for batch in batches[1:]):
            raise RuntimeError(
                f"{NAME}: with enable_gqa the heads of key and value must divide those of query, got {heads} heads of "
                f"query, {key.shape[-3]} of key and {value.shape[-3]} of value"
            )
        batches = [(*batch[:-1], heads) for batch in batches]  # type: ignore[misc]
    if batches[0] == batches[1] == batches[2]:
        return (*batches[0], query.shape[-2], key.shape[-2])
    try:
        batch = torch.broadcast_shapes(*batches)
    except RuntimeError:
        raise RuntimeError(
            f"{NAME}: the samples and heads of query, key and value must broadcast against each other, got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
        ) from None
    return (*batch, query.shape[-2], key.shape[-2])


def _check_mask(mask: Any, query: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{NAME}(): argument 'attn_mask' must be Tensor, not {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype: "
            f"{mask.dtype} and query.dtype: {query.dtype} instead."
        )
    missing = len(shape) - mask.dim()
    if missing < 0 or any(
        size not in (1, full) for size, full in zip(mask.shape, shape[max(missing, 0) :], strict=False)
    ):
        raise RuntimeError(
            f"{NAME}: attn_mask must broadcast against the attention weights' shape {shape}, got {tuple(mask.shape)}"
        )


def _rate(dropout_p: Any, keep_prob: Probability | None) -> Rate:
    if isinstance(dropout_p, numbers.Real) and not 0.0 <= dropout_p <= 1.0:  # type: ignore[operator]
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")
    return as_rate(rate_named("dropout_p", dropout_p, keep_prob), keep_prob)


def _both(mask: Tensor, queries: int, keys: int) -> Tensor:
    """Returns a mask that is causal, too."""
    causal = torch.ones((queries, keys), dtype=torch.bool, device=mask.device).tril()
    return mask & causal if mask.dtype is torch.bool else torch.where(causal, mask, -math.inf)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: Probability | Rate = Default.NO_DROP,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Computes attention, and keeps each of its weights with probability k and divides it by k.

    ``O = (m softmax(s Q K' + bias) / k) V`` with m ~ Bernoulli(k) for each weight, k = keep_prob = 1 - dropout_p. E[O]
    is attention without dropout, because the scale is the reciprocal of the probability that the mask really has. The
    mask is the one that `torchdrop.functional.dropout` would draw for the weights, of shape (..., queries, keys), so
    the result is that of a softmax followed by this dropout. A query that may see no key gets 0. With k = 1 this is
    PyTorch's function; with k = 0 the output is 0. Like PyTorch's, the function has no flag for train mode: give 0 in
    eval mode.

    On the CPU, forward and backward work through blocks of queries and heads. Nothing of the size queries times keys is
    kept for backward, which computes weights and mask again. Only if there are at most 2**17 weights in all, they are
    computed as a whole and kept, which is faster then. On CUDA PyTorch's own kernel serves, and the mask is its own.
    Where the rate is a tensor, a generator is given, or `use_backend("reference")` asks for it, the mask there is ours
    and the weights are kept. Half types have their softmax in float32.

    Args:
        query: (..., heads, queries, features) in float16, bfloat16, float32 or float64.
        key: (..., heads, keys, features).
        value: (..., heads, keys, features of values).
        attn_mask: a mask that broadcasts against the weights' shape (..., heads, queries, keys): bools, True where a
            key may be seen, or numbers that are added to the scores.
        dropout_p: the probability of dropping a weight, in [0, 1]. Default: 0.
        is_causal: whether query i may see only the keys 0 ... i. A mask that is given holds as well.
        scale: the factor s of the scores. Default: 1 / sqrt(features).
        enable_gqa: whether key and value may have fewer heads than query, each of which serves a group of neighbors.
        keep_prob: the probability of keeping, in place of `dropout_p`: a number, or a tensor that broadcasts against
            the weights.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of shape (..., heads, queries, features of values).

    Raises:
        RuntimeError: sizes, element types or devices that do not go together, `attn_mask` among them, or a `dropout_p`
            outside [0, 1], as in PyTorch.
        ValueError: a `keep_prob` outside [0, 1].
        TypeError: both names of the rate, or something that is no tensor or no number.

    References:
        Vaswani et al., "Attention is all you need", 2017, equation 1; Srivastava et al., JMLR 15, 2014. Backward from
        the logsumexp: Dao et al., "FlashAttention", 2022, appendix B.

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop.functional import dropout, scaled_dot_product_attention
        >>> q, k, v = torch.randn(3, 2, 4, 7, 8).unbind()
        >>> _ = torch.manual_seed(0)
        >>> y = scaled_dot_product_attention(q, k, v, dropout_p=0.1)
        >>> _ = torch.manual_seed(0)
        >>> torch.allclose(y, dropout((q @ k.mT / 8**0.5).softmax(-1), 0.1) @ v, atol=1e-5)
        True
    """
    if holds_proxy(query, key, value, attn_mask):
        return recorded(scaled_dot_product_attention, locals())
    rate = dropout_p if isinstance(dropout_p, Rate) else _rate(dropout_p, keep_prob)
    if isinstance(query, Tensor) and torch.is_autocast_enabled(query.device.type):
        query, key, value, attn_mask = (_autocast(t, query.device.type) for t in (query, key, value, attn_mask))
    _check(query, key, value, attn_mask, enable_gqa)
    if is_causal and attn_mask is not None:
        attn_mask, is_causal = _both(attn_mask, query.shape[-2], key.shape[-2]), False
    number = not isinstance(rate.keep_prob, Tensor)
    compiling = is_compiling()
    watched = not compiling and function_modes() and is_watched()
    if watched and number and generator is None:  # handlers know it as a call of PyTorch's function with this rate
        args = (query, key, value, attn_mask, rate.p, is_causal, scale, enable_gqa)
        return handle_torch_function(scaled_dot_product_attention, (query,), *args)
    factor = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    params = rate.params_for(_weights_shape(query, key, value, enable_gqa))
    if watched or portable.is_wanted(compiling) or is_dtensor(query):

        def drop(weights: Tensor) -> Tensor:
            return sites.apply(masked, weights, params, weights.shape, generator=generator)

        return composed(query, key, value, attn_mask, is_causal, factor, drop)
    if query.is_cuda and generator is None and kernels._forced is None and number:
        return _of_torch(query, key, value, attn_mask, rate.p, is_causal, scale, enable_gqa)
    mask_key = sites.new_key(query, params, generator)
    # The rate of a layer is not looked at in compiled code.
    if mask_key is None or (compiling and not isinstance(dropout_p, Rate) and number and rate.keep_prob == 1.0):
        return _of_torch(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)
    return attention(query, key, value, attn_mask, mask_key, params, is_causal, factor)


def _autocast(tensor: Any, kind: str) -> Any:
    """Returns a tensor in the type to which autocast takes PyTorch's function."""
    wanted = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(torch.get_autocast_dtype(kind)) if wanted else tensor


def _of_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: Any,
    is_causal: bool,
    scale: float | None,
    gqa: bool,
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, p, is_causal, scale=scale, enable_gqa=gqa)

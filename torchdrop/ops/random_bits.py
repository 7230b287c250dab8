"""The registered operators that return numbers themselves, for masks that are not simply applied to a tensor.

``torchdrop::keep_mask``, ``torchdrop::random_bits`` and ``torchdrop::standard_normal`` are functions of a key and a
shape, as their namesakes in `torchdrop.kernels` are. They have no derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels.mask_params import MaskParams, has_float64, tensor_beside
from .arguments import check_numbers

Numbers = Callable[..., Tensor]
"""``numbers(key, shape, params=None)``: a tensor of shape ``key.shape[:-1] + shape``."""


def _define(name: str, dtype: torch.dtype, run: Callable[..., Tensor]) -> Numbers:
    qualified = f"torchdrop::{name}"
    torch.library.define(qualified, "(Tensor key, SymInt[] shape, Tensor? params=None) -> Tensor")
    registered = getattr(torch.ops.torchdrop, name).default

    @torch.library.impl(qualified, "default")
    def implementation(key: Tensor, shape: Sequence[int], params: Tensor | None = None) -> Tensor:
        check_numbers(qualified, key, shape, params, dtype is torch.bool)
        return run(key, tuple(shape), params)

    @torch.library.register_fake(qualified)
    def fake(key: Tensor, shape: Sequence[int], params: Tensor | None = None) -> Tensor:
        check_numbers(qualified, key, shape, params, dtype is torch.bool)
        own = dtype if dtype != torch.float64 or has_float64(key.device) else torch.float32
        return key.new_empty((*key.shape[:-1], *shape), dtype=own)

    def batched(
        info: Any, in_dims: Sequence[int | None], key: Tensor, shape: Sequence[int], params: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Makes one call with the batch as the first dimension of the keys; the parameters' dimensions follow them and
        the mask's.

        A key that is not batched is repeated if sets of parameters are batched: it is one draw under each of them.
        """
        key_dim, params_dim = in_dims[0], in_dims[2] if len(in_dims) > 2 else None
        key = key.expand(info.batch_size, *key.shape) if key_dim is None else key.movedim(key_dim, 0)
        if params is not None and params_dim is not None:
            params = params.movedim(params_dim, 0)
        elif params is not None and params.dim() > 1:
            params = params.unsqueeze(0)
        if params is not None and params.dim() > 1:
            missing = key.dim() - 1 + len(shape) + 1 - params.dim()
            params = params.reshape(params.shape[0], *[1] * missing, *params.shape[1:])
        return registered(key, shape, params), 0

    torch.library.register_vmap(qualified, batched)

    def call(key: Tensor, shape: Sequence[int], params: MaskParams | Tensor | None = None) -> Tensor:
        given = None if params is None else tensor_beside(params, key.device)
        return registered(key, tuple(shape), given)

    return call


def _keep_mask(key: Tensor, shape: Sequence[int], params: Tensor | None) -> Tensor:
    assert params is not None
    return kernels.keep_mask(shape, key, params)


keep_mask: Numbers = _define("keep_mask", torch.bool, _keep_mask)
"""Bools, True with the probability that the parameters' threshold has."""

random_bits: Numbers = _define("random_bits", torch.int64, lambda key, shape, _: kernels.random_bits(shape, key))
"""32 random bits for each element, as int64."""

standard_normal: Numbers = _define(
    "standard_normal", torch.float64, lambda key, shape, _: kernels.standard_normal(shape, key)
)
"""Standard normal variates, as float64; as float32 on devices without it."""

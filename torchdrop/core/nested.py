"""Nested tensors of the jagged layout: elementwise functions are applied to the tensor of their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_jagged(input: Any) -> bool:
    return isinstance(input, Tensor) and input.layout is torch.jagged


def of_values(drop: Callable[[Tensor], Tensor], input: Any, name: str, inplace: bool, *unserved: object) -> Tensor:
    """Returns `drop` of the values, in a nested tensor with the same offsets.

    Args:
        drop: an elementwise function.
        input: a jagged nested tensor.
        name: the name of the caller.
        inplace: whether the caller was asked to write into the input.
        unserved: arguments of the caller that have a meaning for strided tensors only, each None if it was not given.

    Raises:
        TypeError: one of `unserved` was given.
        ValueError: the input is not contiguous, which torch.nn.Dropout demands as well.
        NotImplementedError: `inplace` is True, which PyTorch does not have for nested tensors either.
    """
    if inplace:
        raise NotImplementedError(f"{name} of a jagged nested tensor cannot be done in place: use inplace=False")
    if any(argument is not None for argument in unserved):
        raise TypeError(
            f"{name} has a draw for each element of a jagged nested tensor: shared_axes, noise_shape and shard are for "
            "strided tensors"
        )
    if not input.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous jagged layout NestedTensor: call .contiguous() first")
    return torch.nested.nested_tensor_from_jagged(
        drop(input.values()), input.offsets(), jagged_dim=input._ragged_idx, min_seqlen=input._maybe_min_seqlen,
        max_seqlen=input._maybe_max_seqlen,
    )  # fmt: skip

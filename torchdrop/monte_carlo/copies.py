"""Copies of arguments that are no tensors and no containers, such as a cache of keys and values."""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_VALUES = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type, enum.Enum, nn.Module, torch.dtype,
    torch.device, torch.Generator, torch.Size, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
    types.ModuleType,
)  # fmt: skip
"""Types of values that a model does not write to; modules among them are the model's own business."""


class UncopyableError(TypeError):
    """Raised for an argument of a model that cannot be copied."""


class _Copying(TorchFunctionMode):
    """Within it, `copy.deepcopy` of a tensor returns a function's result."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self._function(tensor)
        return memo[id(tensor)]


def is_opaque(value: Any) -> bool:
    """Whether a value may hold anything, and change when a model is called with it.

    Example:
        >>> is_opaque(3), is_opaque(object())
        (False, True)
    """
    return not isinstance(value, (Tensor, *_VALUES))


def deep_copy(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of a value in which each tensor is a function's result.

    Raises:
        UncopyableError: Python cannot copy it.

    Example:
        >>> import torch
        >>> class Cache:
        ...     keys = None
        >>> cache = Cache()
        >>> cache.keys = [torch.ones(2)]
        >>> deep_copy(cache, lambda tensor: tensor * 2).keys, cache.keys
        ([tensor([2., 2.])], [tensor([1., 1.])])
    """
    try:
        with _Copying(function):
            return copy.deepcopy(value)
    except Exception as error:
        raise UncopyableError(
            f"an argument of type {type(value).__name__} cannot be copied ({type(error).__name__}: {error}), and the "
            "model may write to it: pass it in a form that copy.deepcopy takes"
        ) from error

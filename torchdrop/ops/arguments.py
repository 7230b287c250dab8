"""Checks of the registered operators' arguments.

An operator's implementation and its fake call the same check, so that what can be traced can be run, and no kernel
reads beyond a tensor. Code that calls kernels without an operator has made the arguments itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..kernels.masking import COMPUTE_DTYPE, SERVED

_int64, _float64, _strided = torch.int64, torch.float64, torch.strided


def check_masked(name: str, x: Tensor, key: Tensor, params: Tensor, shape: Sequence[int], part: Sequence[int]) -> None:
    """Checks the arguments of one mask of x, or of one for each of a batch of keys.

    Raises:
        TypeError: an element type or a layout that no kernel takes.
        ValueError: shapes that do not go together, or a part that is none.
        RuntimeError: tensors on several devices.
    """
    _check_elements(name, "x", x)
    _check_key(name, key, x.device)
    sizes = x.shape
    _check_params(name, params, x.device, sizes)
    mask = (*key.shape[:-1], *shape)
    if mask != sizes and not _fits(mask, sizes):
        raise ValueError(
            f"{name}: the dimensions of the keys and shape must be x's {tuple(sizes)}, or 1 where the mask is shared, "
            f"got keys of {tuple(key.shape[:-1])} and the shape {tuple(shape)}"
        )
    if any(part):
        _check_part(name, part, shape)
    elif len(part) not in (0, 3):
        raise ValueError(f"{name}: part must hold start, run and pitch, or nothing, got {tuple(part)}")


def check_numbers(name: str, key: Tensor, shape: Sequence[int], params: Tensor | None, with_params: bool) -> None:
    """Checks the arguments of numbers of a shape under each key: masks have parameters, and the others have none.

    Raises:
        TypeError, ValueError, RuntimeError: as `check_masked`.
    """
    _check_key(name, key, key.device)
    _check_sizes(name, "shape", shape, 0)
    if with_params and params is None:
        raise ValueError(f"{name}: params must be a tensor, got None")
    if params is None:
        return
    if not with_params:
        raise ValueError(
            f"{name}: params must be None, since it decides masks only: got one of shape {tuple(params.shape)}"
        )
    _check_params(name, params, key.device, (*key.shape[:-1], *shape))


def check_add(name: str, x: Tensor, bias: Tensor | None, residual: Tensor, key: Tensor, params: Tensor) -> None:
    """Checks one key and one set of parameters, a residual like x and a bias that broadcasts against it.

    Raises:
        TypeError, ValueError, RuntimeError: as `check_masked`.
    """
    _check_elements(name, "x", x)
    _check_like(name, "residual", residual, x)
    if bias is not None:
        _check_kind(name, "bias", bias, x)
        missing = x.dim() - bias.dim()
        if missing < 0 or not _fits(bias.shape, x.shape[missing:]):
            raise ValueError(f"{name}: bias must broadcast against x of {tuple(x.shape)}, got {tuple(bias.shape)}")
    _check_single(name, key, params, x.device)


def check_activation(
    name: str, x: Tensor, key: Tensor, params: Tensor, activation: str, known: Collection[str]
) -> None:
    """Checks one key and one set of parameters.

    Raises:
        TypeError, RuntimeError: as `check_masked`.
        ValueError: shapes that do not go together, or an unknown activation.
    """
    _check_elements(name, "x", x)
    _check_single(name, key, params, x.device)
    if activation not in known:
        raise ValueError(f"{name}: activation must be one of {', '.join(map(repr, known))}, got {activation!r}")


def check_activation_backward(
    name: str, grad: Tensor, kept: Tensor, key: Tensor, params: Tensor, activation: str, known: Collection[str]
) -> None:
    """Checks a gradient, and the tensor that was kept for it."""
    check_activation(name, grad, key, params, activation, known)
    _check_like(name, "kept", kept, grad)


def check_blocks(name: str, params: Tensor, sizes: Sequence[int], block: int, broadcast: bool) -> None:
    """Checks parameters for maps of these sizes, and blocks inside them. `broadcast` is true if the parameters'
    dimensions end with the map's.

    Raises:
        TypeError, ValueError: as `check_masked`.
    """
    _check_params(name, params, params.device, None)
    if broadcast and params.dim() > 1:
        missing = params.dim() - 1 - len(sizes)
        _check_params(name, params, params.device, (*params.shape[: max(missing, 0)], *sizes))
    _check_sizes(name, "sizes", sizes, 1)
    if not sizes or block < 1 or any(size < block for size in sizes):
        raise ValueError(f"{name}: block must be at least 1 and at most each of the sizes {tuple(sizes)}, got {block}")


def _check_elements(name: str, role: str, tensor: Tensor) -> None:
    if tensor.dtype not in SERVED:
        raise TypeError(f"{name}: {role} must be one of {', '.join(map(str, COMPUTE_DTYPE))}, got {tensor.dtype}")
    if tensor.layout is not _strided:
        raise TypeError(f"{name}: {role} must be a strided tensor, got the layout {tensor.layout}")


def _check_kind(name: str, role: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: {role} must have the first tensor's dtype {x.dtype}, got {tensor.dtype}")
    if tensor.layout is not _strided:
        raise TypeError(f"{name}: {role} must be a strided tensor, got the layout {tensor.layout}")
    if tensor.device != x.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got {role} on {tensor.device} beside a tensor "
            f"on {x.device}"
        )


def _check_like(name: str, role: str, tensor: Tensor, x: Tensor) -> None:
    _check_kind(name, role, tensor, x)
    if tensor.shape != x.shape:
        raise ValueError(
            f"{name}: {role} must have the first tensor's shape {tuple(x.shape)}, got {tuple(tensor.shape)}"
        )


def _check_key(name: str, key: Tensor, device: torch.device) -> None:
    if key.dtype is not _int64 or key.layout is not _strided:
        raise TypeError(
            f"{name}: key must be a strided int64 tensor, got one of {key.dtype} with the layout {key.layout}"
        )
    if key.dim() == 0 or key.shape[-1] != 2:
        raise ValueError(f"{name}: key must hold (seed, stream) in its last dimension, got shape {tuple(key.shape)}")
    if key.device != device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got key on {key.device} beside a tensor on "
            f"{device}"
        )


def _check_params(name: str, params: Tensor, device: torch.device, sizes: Sequence[int] | None) -> None:
    """Checks mask parameters. If they have several dimensions and `sizes` is given, they must broadcast against it."""
    if params.dtype is not _float64 or params.layout is not _strided:
        raise TypeError(
            f"{name}: params must be a strided float64 tensor, got one of {params.dtype} with the layout "
            f"{params.layout}"
        )
    dims = params.dim()
    if dims == 0 or params.shape[-1] != 4:
        raise ValueError(
            f"{name}: params must hold (threshold, scale, shift, fill) in its last dimension, got shape "
            f"{tuple(params.shape)}"
        )
    if not params.is_cpu and params.device != device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got params on {params.device} beside a "
            f"tensor on {device}"
        )
    if dims > 1 and sizes is not None and not _fits(params.shape[:-1], sizes):
        raise ValueError(
            f"{name}: params must have the shape (4,), for one set for all, or a size for each of the dimensions "
            f"{tuple(sizes)}, that size or 1, got shape {tuple(params.shape)}"
        )


def _check_single(name: str, key: Tensor, params: Tensor, device: torch.device) -> None:
    _check_key(name, key, device)
    _check_params(name, params, device, None)
    if key.dim() != 1 or params.dim() != 1:
        raise ValueError(
            f"{name}: one key of shape (2,) and params of shape (4,) must be given, got {tuple(key.shape)} and "
            f"{tuple(params.shape)}"
        )


def _fits(sizes: Sequence[int], full: Sequence[int]) -> bool:
    """Whether each size is the full one or 1. The order in which they are compared spares compiled code guards."""
    if len(sizes) != len(full):
        return False
    return all(
        (isinstance(size, int) and size == 1) or size == whole or size == 1
        for size, whole in zip(sizes, full, strict=True)
    )


def _check_sizes(name: str, role: str, sizes: Sequence[int], least: int) -> None:
    if any(size < least for size in sizes):
        raise ValueError(f"{name}: {role} must hold sizes of at least {least}, got {tuple(sizes)}")


def _check_part(name: str, part: Sequence[int], shape: Sequence[int]) -> None:
    if len(part) != 3 or any(number < 0 for number in part):
        raise ValueError(
            f"{name}: part must hold start, run and pitch, none of them negative, or nothing, got {tuple(part)}"
        )
    n = 1
    for size in shape:
        n = n * size
    if part[1] != 0 and n % part[1] != 0:
        raise ValueError(
            f"{name}: the run of a part must divide its number of elements, got a run of {part[1]} and {n}"
        )


def check_attention(
    name: str, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask_key: Tensor, params: Tensor
) -> None:
    """Checks queries, keys and values of the same samples and features, and a bias that broadcasts.

    Raises:
        TypeError, ValueError, RuntimeError: as `check_masked`.
    """
    _check_elements(name, "query", query)
    _check_kind(name, "key", key, query)
    _check_kind(name, "value", value, query)
    dims = query.dim()
    if dims < 2 or key.dim() != dims or value.dim() != dims:
        raise ValueError(
            f"{name}: query, key and value must have as many dimensions, at least 2, got {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    *samples, queries, features = query.shape
    samples_of_key, samples_of_value = key.shape[:-2], value.shape[:-2]
    heads = dims > 2 and samples[-1] != samples_of_key[-1]
    if heads and (samples_of_key[-1] == 0 or samples[-1] % samples_of_key[-1]):
        raise ValueError(f"{name}: the heads of key must divide those of query, got {samples_of_key[-1]}")
    if (
        samples[:-1] != list(samples_of_key[:-1])
        or samples_of_key != samples_of_value
        or key.shape[-1] != features
        or value.shape[-2] != key.shape[-2]
    ):
        raise ValueError(
            f"{name}: query, key and value must go together, got {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}"
        )
    if bias is not None:
        shape = (*samples, queries, key.shape[-2])
        missing = len(shape) - bias.dim()
        if missing < 0 or not _fits(bias.shape, shape[missing:]):
            raise ValueError(f"{name}: bias must broadcast against {shape}, got {tuple(bias.shape)}")
        if not (bias.dtype is torch.bool or bias.dtype in SERVED):
            raise TypeError(f"{name}: bias must be bool or floating point, got {bias.dtype}")
    _check_single(name, mask_key, params, query.device)

"""The shape of a mask: the input's, with ones on the axes over which a draw is shared."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .inputs import check_input

Axes = int | Sequence[int] | None
NoiseShape = Sequence[int | None] | None


def mask_shape(input: Tensor, shared_axes: Axes, noise_shape: NoiseShape) -> Sequence[int]:
    """Returns the mask's shape: the input's, with ones on the axes over which it is shared.

    Raises:
        TypeError: both arguments are given, or an axis is no integer.
        ValueError: an axis is out of range or named twice; a noise shape of another length, or with a size that is
            neither 1, None nor the input's.
    """
    if shared_axes is None and noise_shape is None:
        return input.shape
    if shared_axes is not None and noise_shape is not None:
        raise TypeError("give shared_axes or noise_shape, not both")
    sizes = list(input.shape)
    if shared_axes is not None:
        axes = (shared_axes,) if isinstance(shared_axes, int) else tuple(shared_axes)
        dims = input.dim()
        for axis in axes:
            if not isinstance(axis, int):
                raise TypeError(f"shared_axes must be integers, got {axis!r}")
            if not -dims <= axis < dims:
                raise ValueError(f"shared_axes must be in [{-dims}, {dims}) for a {dims}-D input, got {axis}")
            sizes[axis] = 1
        if len({axis % dims for axis in axes}) < len(axes):
            raise ValueError(f"shared_axes must name each axis once, got {axes}")
        return tuple(sizes)
    assert noise_shape is not None
    if len(noise_shape) != len(sizes):
        raise ValueError(
            f"noise_shape must have a size for each of the input's {len(sizes)} dimensions, got {tuple(noise_shape)}"
        )
    for noise, size in zip(noise_shape, sizes, strict=True):
        if noise not in (None, 1, size):
            raise ValueError(
                "noise_shape must hold 1, None or the input's size: "
                f"{tuple(noise_shape)} for an input of {tuple(sizes)}"
            )
    return tuple(size if noise is None else noise for noise, size in zip(noise_shape, sizes, strict=True))


def row_shape(input: Tensor, name: str) -> tuple[int, ...]:
    """Returns (B, 1, ..., 1) for a checked input of shape (B, ...): the shape of a mask with a draw for each sample.

    Raises:
        ValueError: the input has no dimensions.
    """
    check_input(input, name)
    if input.dim() == 0:
        raise ValueError(f"{name}: input must have its samples in the first dimension, (B, ...), got a 0-d tensor")
    return (input.shape[0], *[1] * (input.dim() - 1))


def check_channels(input: Tensor, least: int = 2) -> None:
    """Raises RuntimeError, with torch.nn's text, if the input has too few dimensions for channels."""
    if input.dim() < least:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")

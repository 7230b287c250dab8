"""Outputs in blocks: the shapes of outputs whose places are one dimension, and the rows and places of each block.

The places of a row are what its output has besides classes: the pixels of an image, the tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]
"""The output of a model: one tensor, or a pair (mean, log_variance)."""

BLOCK = 2**19
"""The number of elements that are worked on at a time: few enough for the cache, and enough to keep threads busy."""


def raw(outputs: Any) -> Outputs:
    """Returns outputs (S, B, ...) of a model, detached; a tuple or list of one tensor counts as the tensor.

    Raises:
        TypeError: something that is no tensor.
        ValueError: a tensor that has no dimension for the rows, or is not floating-point.
    """
    parts = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"outputs must be tensors, got {type(part).__name__}: pick them with select_output=")
        if part.dim() < 2:
            raise ValueError("outputs must have a first dimension for the rows of the data, got a number for each pass")
        if not part.is_floating_point():
            raise ValueError(
                f"outputs must be floating-point, got {part.dtype}: pick scores or floats with select_output="
            )
    return parts[0].detach() if len(parts) == 1 else tuple(part.detach() for part in parts)


def as_numbers(output: Tensor, task: str | None) -> Tensor:
    """Returns an output of a model with true and false as 1 and 0, where a task can be about them.

    Raises:
        ValueError: an integer output, or a boolean one for a task that needs scores or values.

    Example:
        >>> as_numbers(torch.tensor([True, False]), None)
        tensor([1., 0.])
    """
    if output.dtype == torch.bool:
        if task in (None, "multilabel"):
            return output.to(torch.get_default_dtype())
        raise ValueError(
            f"outputs must be floating-point for task={task!r}, got {output.dtype}: say task='multilabel' for the "
            "probability of True, or pick the scores behind it with select_output="
        )
    if not output.is_floating_point() and not output.is_complex():
        raise ValueError(
            f"outputs must be floating-point, got {output.dtype}: if they are classes, pick the scores behind them "
            "with select_output=, and if they are numbers, such as counts, give select_output=lambda y: y.float()"
        )
    return output


@dataclass(frozen=True)
class OutputShape:
    """The shapes and dtype of outputs, and how their places are flattened."""

    outputs: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    rows: int
    places: tuple[int, ...]
    classes_innermost: bool

    def room(self, like: Tensor, dtype: torch.dtype, groups: int | None = None) -> Tensor:
        """Returns memory for all rows and places of what is like (rows, ..., places), in the order of the outputs', and
        for so many groups of them in front."""
        middle, places = like.shape[1:-1], math.prod(self.places)
        lead = (self.rows,) if groups is None else (groups, self.rows)
        if self.classes_innermost and middle:
            return like.new_empty((*lead, places, *middle), dtype=dtype).movedim(len(lead), -1)
        return like.new_empty((*lead, *middle, places), dtype=dtype)

    def blocks(self, each: int) -> Iterator[tuple[slice, slice]]:
        """Yields rows and places, in blocks of about `BLOCK` elements if a row has so many at each place."""
        places = math.prod(self.places)
        fitting = max(1, BLOCK // max(each, 1))
        width = places if fitting >= places else max(1, fitting // 64 * 64 or fitting)
        height = max(1, fitting // max(places, 1))
        for row in range(0, max(self.rows, 1), height):
            for place in range(0, max(places, 1), max(width, 1)):
                yield slice(row, row + height), slice(place, place + max(width, 1))

    def expanded(self, valid: Tensor) -> Tensor:
        """Returns whether places are valid, (rows, places), from values for a beginning of their dimensions.

        Raises:
            ValueError: another shape.
        """
        shape = (self.rows, *self.places)
        if tuple(valid.shape) != shape[: max(valid.dim(), 1)]:
            raise ValueError(f"valid must have the shape {shape}, or a beginning of it, got {tuple(valid.shape)}")
        valid = (valid != 0).reshape(*valid.shape, *[1] * (len(shape) - valid.dim()))
        return valid.expand(shape).reshape(self.rows, -1) if self.rows else valid.new_zeros(0, math.prod(self.places))

    def unflattened(self, values: Tensor) -> Tensor:
        """Returns values (..., places) in the outputs' own dimensions."""
        return values.reshape(*values.shape[:-1], *self.places)


def flattened(outputs: Outputs, arranged: Outputs, leading: int) -> tuple[OutputShape, list[Tensor]]:
    """Returns the shapes, and the arranged outputs (samples, rows, ..., places) with one dimension of places."""
    several = (arranged,) if isinstance(arranged, Tensor) else arranged
    first = several[0]
    places = tuple(first.shape[1 + leading :])
    flat = [one.flatten(1 + leading) if places else one.unsqueeze(-1) for one in several]
    innermost = leading == 2 and math.prod(places) > 1 and flat[0].stride(2) < flat[0].stride(3)
    parts = (outputs,) if isinstance(outputs, Tensor) else outputs
    shapes = tuple(tuple(part.shape[1:]) for part in parts)
    return OutputShape(shapes, parts[0].dtype, first.shape[1], places, innermost), flat


def cut(flat: Sequence[Tensor], block: tuple[slice, slice]) -> Outputs:
    rows, places = block
    return joined([one[:, rows, ..., places] for one in flat])


def joined(parts: Sequence[Tensor]) -> Outputs:
    return parts[0] if len(parts) == 1 else tuple(parts)


def refuse_nan(parts: Sequence[Tensor], samples: Sequence[int]) -> None:
    if any(bool(part.isnan().any()) for part in parts):
        refuse([part.isnan() for part in parts], samples)


def refuse(bad: Sequence[Tensor], samples: Sequence[int]) -> None:
    """Raises if any is True, naming the first sample and row (the first two dimensions) at fault."""
    if not torch.stack([one.any() for one in bad]).any():
        return
    where = torch.stack([one.flatten(2).any(2) if one.dim() > 2 else one for one in bad]).any(0)
    place, row = where.nonzero()[0].tolist()
    raise ValueError(
        f"sample {samples[place]} is not finite in row {row} of its batch ({int(where.sum())} such in this chunk), "
        "so no statistic would be: run that sample within torchdrop.mc_dropout to see which layer it comes from"
    )

"""Masks of tensors that are cut: a shard's mask is a part of the whole tensor's, under the same key.

So it does not depend on how the tensor is sharded. A DTensor has its place in the whole; a plain tensor has a `Shard`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from ..kernels.mask_params import MaskParams
from ..kernels.masking import MaskSlice
from ..ops.operators import Operator
from ..random import draw_key

Apply = Callable[..., Tensor]
"""The type of `sites.apply`."""


@dataclass(frozen=True)
class Shard:
    """The place of a tensor in a larger one: it is the part [offset, offset + its own size) of `size` along `dim`.

    Given to `Dropout` or `dropout` as `shard`, it makes the mask the part of the whole tensor's mask that belongs here,
    if the processes that hold the other parts draw the same key, as under ``torchdrop.seeded(seed, rank=0)``.

    Args:
        dim: the dimension along which the tensor is cut; negative ones count from the end.
        offset: the beginning of this part, in elements.
        size: the number of elements of the whole tensor there.

    Raises:
        TypeError: something that is no integer.
        ValueError: a negative offset or size, or an offset beyond the size.

    Example:
        >>> import torch, torchdrop
        >>> whole, layer = torch.ones(4, 6), torchdrop.Dropout(0.5)
        >>> with torchdrop.seeded(1, rank=0):
        ...     y = layer(whole)
        >>> layer.shard = torchdrop.Shard(dim=1, offset=2, size=6)
        >>> with torchdrop.seeded(1, rank=0):
        ...     part = layer(whole[:, 2:5])
        >>> torch.equal(part, y[:, 2:5])
        True
    """

    dim: int
    offset: int
    size: int

    def __post_init__(self) -> None:
        for name in ("dim", "offset", "size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if name != "dim" and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.offset > self.size:
            raise ValueError(f"offset must not be beyond size, got offset={self.offset} and size={self.size}")


Shards = Shard | Sequence[Shard] | None


def shards(given: Any) -> tuple[Shard, ...]:
    """Returns one shard, several or none as a tuple.

    Raises:
        TypeError: it is something else.
    """
    if given is None:
        return ()
    found = given if isinstance(given, (list, tuple)) else [given]
    for one in found:
        if not isinstance(one, Shard):
            kind = type(one)
            name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
            raise TypeError(f"shard must be a torchdrop.Shard, a list or tuple of them, or None, got {name}")
    return tuple(found)


class Cut(NamedTuple):
    """A mask's place in a larger one: the larger one's shape, the place of the first element, and the elements."""

    whole: tuple[int, ...]
    first: tuple[int, ...]
    part: MaskSlice


def cut_of(shape: Sequence[int], whole: Sequence[int], first: Sequence[int]) -> Cut | None:
    """Returns a mask of this shape as a part of a larger one; None if it is the larger one, or empty.

    Raises:
        NotImplementedError: it has no form that kernels take.
    """
    if tuple(shape) == tuple(whole) or 0 in shape:
        return None
    return Cut(tuple(whole), tuple(first), part_of(shape, whole, first))


def part_of(shape: Sequence[int], whole: Sequence[int], first: Sequence[int]) -> MaskSlice:
    """Returns the elements of a block of this shape, whose first one is at `first`, within a tensor of shape `whole`.

    They are runs at equal distances if dimensions that are neighbors in memory are taken together.

    Raises:
        NotImplementedError: they are not, for example if the tensor is cut along two inner dimensions.

    Example:
        >>> part_of((2, 3), (2, 8), (0, 4))
        MaskSlice(start=4, run=3, pitch=8)
        >>> part_of((1, 8), (2, 8), (1, 0))
        MaskSlice(start=8, run=0, pitch=0)
    """
    start, step = 0, 1
    blocks: list[tuple[int, int]] = []  # how many elements, and how far apart; innermost first
    for size, full, offset in zip(reversed(shape), reversed(whole), reversed(first), strict=True):
        start += offset * step
        if blocks and step == blocks[-1][0] * blocks[-1][1]:
            blocks[-1] = blocks[-1][0] * size, blocks[-1][1]
        elif size != 1:
            blocks.append((size, step))
        step *= full
    if len(blocks) == 1 and blocks[0][1] != 1:
        return MaskSlice(start, 1, blocks[0][1])
    if len(blocks) == 2 and blocks[0][1] == 1:
        return MaskSlice(start, blocks[0][0], blocks[1][1])
    if len(blocks) > 1:
        dims = [dim for dim, (size, full) in enumerate(zip(shape, whole, strict=True)) if size != full]
        raise NotImplementedError(
            "a mask can be cut along one dimension, or along the outermost and one more, got a part of shape "
            f"{tuple(shape)} of a mask of shape {tuple(whole)}, cut along {dims}: share the mask along one of them, "
            "gather the tensor along it first, or apply dropout before it is cut"
        )
    return MaskSlice(start)


def cut_by(given: Shards, input: Tensor, shape: Sequence[int], shared: Collection[int]) -> Cut | None:
    """Returns the place of an input with these shards in the whole. `shape` is its mask's, shared over some dimensions.

    Raises:
        TypeError: something that is no shard, or a DTensor.
        ValueError: shards that do not fit the input or each other.
        NotImplementedError: a part that has no form that kernels take.
    """
    if is_dtensor(input):
        raise TypeError(f"a DTensor knows where its parts belong: shard must be None, got {given}")
    dims = input.dim()
    whole, first = list(shape), [0] * dims
    named: set[int] = set()
    for shard in shards(given):
        if not -dims <= shard.dim < dims:
            raise ValueError(f"the dim of a shard must be in [{-dims}, {dims}) for a {dims}-D input, got {shard.dim}")
        dim = shard.dim % dims
        if dim in named:
            raise ValueError(f"shards must name each dim once, got {given}")
        named.add(dim)
        if shard.offset + input.shape[dim] > shard.size:
            raise ValueError(
                "a shard must end within the whole: its offset + the input's size must be at most its size, got "
                f"{shard.offset} + {input.shape[dim]} > {shard.size} along dim {shard.dim}"
            )
        if dim not in shared:
            whole[dim], first[dim] = shard.size, shard.offset
    return cut_of(shape, whole, first)


def apply_to_whole(
    apply: Apply,
    operator: Operator,
    input: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    inplace: bool,
    generator: torch.Generator | None,
    cut: Cut,
) -> Tensor:
    """Applies the operator to the whole tensor, zero outside the part, and takes the part of the result.

    Function modes see this call, so the masks of Monte Carlo inference and of searches do not depend on how the tensor
    is cut either.
    """
    sides = [(at, full - at - size) for size, full, at in zip(shape, cut.whole, cut.first, strict=True)]

    def padded(x: Tensor, beyond: int = 0) -> Tensor:
        widths = [(0, 0)] * beyond
        for dim in range(len(sides) - 1, -1, -1):
            widths.append(sides[dim] if x.shape[dim] != 1 or not beyond else (0, 0))
        return F.pad(x, [width for pair in widths for width in pair])

    whole_params = padded(params, 1) if isinstance(params, Tensor) and params.dim() > 1 else params
    whole = padded(input)
    out = handle_torch_function(apply, (whole,), operator, whole, whole_params, cut.whole, False, generator)
    for dim, (before, after) in enumerate(sides):
        if before or after:
            out = out.narrow(dim, before, shape[dim])
    return input.copy_(out) if inplace else out


def is_dtensor(x: Tensor) -> bool:
    """Whether x is a DTensor, without importing what defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def apply_to_dtensor(
    apply: Apply,
    operator: Operator,
    input: Any,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    inplace: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """Does what `sites.apply` does for a DTensor: on its local tensor, with its part of the whole mask.

    Raises:
        ValueError: a placement that is neither Replicate nor Shard.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Sharded

    mesh, placements = input.device_mesh, input.placements
    if not all(isinstance(placement, (Replicate, Sharded)) for placement in placements):
        raise ValueError(
            f"dropout of a DTensor needs placements that are Shard or Replicate, got {tuple(placements)}: call "
            "redistribute(placements=...) first"
        )
    place = mesh.get_coordinate()
    if place is None:  # this rank has no part of it, but draws as the others do
        draw_key(input.device, generator)
        return input
    sizes, offsets = list(input.shape), [0] * input.dim()
    for axis, placement in enumerate(placements):
        if isinstance(placement, Sharded):
            dim = placement.dim
            chunk = -(-sizes[dim] // mesh.size(axis))  # as torch.chunk cuts
            at = min(chunk * place[axis], sizes[dim])
            sizes[dim] = min(chunk, sizes[dim] - at)
            offsets[dim] += at
    own = tuple(size if full != 1 else 1 for size, full in zip(sizes, shape, strict=True))
    first = tuple(at if full != 1 else 0 for at, full in zip(offsets, shape, strict=True))
    if isinstance(params, Tensor) and params.dim() > 1:
        for dim, (at, size) in enumerate(zip(first, own, strict=True)):
            params = params if params.shape[dim] == 1 else params.narrow(dim, at, size)
    local = input.to_local()
    out = apply(operator, local, params, own, False, generator, cut_of(own, shape, first))
    if out is local:
        return input
    stride = torch.empty_like(torch.empty_strided(input.shape, input.stride(), device="meta")).stride()
    out = DTensor.from_local(out, mesh, placements, shape=input.shape, stride=stride)
    return input.copy_(out) if inplace else out

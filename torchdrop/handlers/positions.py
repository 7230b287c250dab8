"""Masks that belong to places in a sequence: a step of a decoder has those that a pass over the whole sequence has.

A mask is ordinarily numbered by the rows of its tensor, so that the fifth word has another mask when it comes alone,
after four that a cache holds, than when all five come together. Here each dimension that grows with the words gets
keys of its own: an element's mask follows from (seed, source, sample), the places of its words, and its number among
the elements that have these places. Rows do not enter. So a sample is one function of sequences of any length,
computed in any steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.mask_params import MaskParams
from ..ops import operators, random_bits
from .calls import Site
from .masks import MaskSlot, Pass, source_seed, written

ROWS, SOURCE, TARGET, HELD = "rows", "source", "target", "held"

Shapes = Mapping[Site, tuple[Sequence[int], Sequence[int]]]
"""The shape of the tensor of each random call of a forward, and that of its mask."""


class PlacelessError(RuntimeError):
    """Raised if it is not known where in a tensor the words of a sequence are."""


class Span(NamedTuple):
    """The words that one forward computes."""

    rows: int
    """The number of sequences."""
    past: int = 0
    """The place of the first word: the number of words that a cache holds."""
    new: int | None = None
    """The number of words; None if it is not known."""


class Part(NamedTuple):
    """A factor of a dimension's size: it counts rows, words of the source or the target, words of the target together
    with those that a cache holds, or `rest` other elements."""

    kind: str
    rest: int = 1


def find_parts(
    lengths: Mapping[str, int], base: Sequence[int], longer: Mapping[str, Sequence[int]]
) -> list[list[Part]]:
    """Finds the parts of each dimension from the shapes that a tensor has in several forwards.

    Args:
        lengths: the numbers of rows and of words in the first forward.
        base: the shape there.
        longer: for each of these, the shape in a forward where it is larger by one.

    Raises:
        PlacelessError: a dimension grows in another way than in proportion to them.

    Example:
        >>> shapes = {"rows": (12, 3, 3), "target": (8, 4, 4)}
        >>> [[part.kind for part in parts] for parts in find_parts({"rows": 2, "target": 3}, (8, 3, 3), shapes)]
        [['rows', ''], ['target'], ['held']]
    """
    found: list[list[Part]] = []
    for dim, size in enumerate(base):
        parts, rest = [], size
        for kind, length in lengths.items():
            other = longer[kind]
            if len(other) != len(base):
                raise PlacelessError("it has another number of dimensions for another number of words")
            if other[dim] == size:
                continue
            if other[dim] * length != size * (length + 1) or rest % length:
                raise PlacelessError(
                    f"dimension {dim} has {size} and {other[dim]} elements for {length} and {length + 1} {kind}"
                )
            # Attention has scores of queries, which are new words, and keys, some of which a cache may hold.
            again = kind == TARGET and any(part.kind == TARGET for before in found for part in before)
            parts.append(Part(HELD if again else kind))
            rest //= length
        found.append([*parts, Part("", rest)] if not parts or rest != 1 else parts)
    return found


class Positions:
    """Makes the slots of a model whose masks belong to places in a sequence.

    Args:
        origin: the place, in the target, that has number 0. Where prompts are padded on the left to one length, that
            length as the origin gives each word the same mask in any batch.

    Attributes:
        span: the words of the forward that runs.
    """

    def __init__(self, origin: int = 0) -> None:
        self.span: Span = Span(1)
        self._origin = origin
        self._parts: dict[Site, list[list[Part]]] | None = None
        self._shared: dict[Site, list[bool]] = {}
        self._shapes: dict[Site, tuple[Sequence[int], Sequence[int]]] = {}

    @contextmanager
    def recorded(self) -> Iterator[Shapes]:
        """Yields the shapes of the tensors of all random calls within it, which get masks without places."""
        self._parts, self._shapes = None, {}
        yield self._shapes

    def learn(self, lengths: Mapping[str, int], base: Shapes, longer: Mapping[str, Shapes]) -> None:
        """Finds the places in all tensors from their recorded shapes: see `find_parts`.

        Raises:
            PlacelessError: they cannot be found. The message names the module.
        """
        self._parts, self._shared = {}, {}
        for site, (shape, mask) in base.items():
            try:
                others = {kind: shapes[site][0] for kind, shapes in longer.items()}
                self._parts[site] = find_parts(lengths, shape, others)
            except (PlacelessError, KeyError) as error:
                why = "it is not called every time" if isinstance(error, KeyError) else str(error)
                raise _placeless(site, why) from error
            self._shared[site] = [size != own for size, own in zip(shape, mask, strict=True)]

    def slot(self, run: Pass, site: Site, seed: int) -> PositionSlot:
        """Returns the slot of a random call."""
        return PositionSlot(self, run, site, seed)

    def split(self, site: Site, shape: Sequence[int], mask: Sequence[int]) -> list[list[tuple[str, int]]]:
        """Returns for each dimension of a tensor the kinds and sizes of its parts."""
        if self._parts is None:
            self._shapes.setdefault(site, (tuple(shape), tuple(mask)))
            return [[("", size)] for size in shape]
        parts = self._parts.get(site)
        if parts is None or len(parts) != len(shape):
            raise _placeless(site, "it was not met when the lengths of sequences were compared")
        sized = [self._sized(dim, size) for dim, size in zip(parts, shape, strict=True)]
        others = math.prod(part.rest for dim in parts for part in dim if part.kind == "")
        wholes = [math.prod(size for _, size in dim) for dim in sized]
        if wholes != list(shape) or math.prod(size for dim in sized for kind, size in dim if kind == "") != others:
            raise _placeless(site, f"its shape {tuple(shape)} does not fit {self.span}")
        return sized

    def shared(self, site: Site, dims: int) -> list[bool]:
        """Returns for each dimension of a tensor whether its mask has one element there, for all."""
        return self._shared.get(site, [False] * dims)

    def _sized(self, parts: Sequence[Part], size: int) -> list[tuple[str, int]]:
        kinds = [part.kind for part in parts]
        if kinds == [""]:
            return [("", size)]
        if kinds == [TARGET] and self.span.new == 1 < size:
            # Heads that share keys may come in the place of queries, if there is one query only.
            return [("", size), (TARGET, 1)]
        rest = math.prod(part.rest for part in parts)
        if kinds in ([ROWS], [ROWS, ""]):  # beams multiply rows
            return [(part.kind, size // rest if part.kind == ROWS else rest) for part in parts]
        known = {ROWS: self.span.rows, "": rest}
        words = size // math.prod(known[kind] for kind in kinds if kind in known)
        return [(kind, known.get(kind, words)) for kind in kinds]

    def places(self, site: Site, kinds: Sequence[str], sizes: Sequence[int], device: torch.device) -> list[Tensor]:
        """Returns the numbers of the words along dimensions of these kinds and sizes."""
        found = []
        for kind, size in zip(kinds, sizes, strict=True):
            if kind == TARGET and size != (self.span.new or size):
                raise _placeless(site, f"a dimension of {size} words does not fit {self.span}")
            # A cache that holds the last words only, or that has room for words to come, begins elsewhere.
            held = max(self.span.past + (self.span.new or 0) - size, 0)
            first = {SOURCE: 0, TARGET: self.span.past - self._origin, HELD: held - self._origin}[kind]
            found.append(torch.arange(first, first + size, device=device))
        return found


def _placeless(site: Site, why: str) -> PlacelessError:
    where = site.module or "the model"
    return PlacelessError(
        f"the words of the sequence cannot be found in the tensor of {site.kind} in {where}: {why}. Leave it out with "
        "sources=, or take samples with mc_dropout, whose masks differ between the steps"
    )


class _Arranged(NamedTuple):
    """A tensor taken apart: its parts, and their order with places in front."""

    parts: list[list[tuple[str, int]]]
    order: list[int]
    keyed: int
    """The number of parts in front that have places."""

    @property
    def flat(self) -> list[tuple[str, int]]:
        return [part for dim in self.parts for part in dim]

    def shape(self, of: Sequence[int], shared: bool) -> list[int]:
        """Returns the sizes of the parts of a tensor of this shape, or one that is broadcast to it, in their order."""
        sizes = []
        for size, dim in zip(of, self.parts, strict=True):
            whole = math.prod(number for _, number in dim)
            sizes += [number if size == whole and not (shared and kind == ROWS) else 1 for kind, number in dim]
        return [sizes[part] for part in self.order]

    def forward(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns a tensor of this shape, with `x`'s further dimensions behind, in its parts."""
        sizes = [0] * len(self.order)
        for number, part in zip(self.shape(shape, False), self.order, strict=True):
            sizes[part] = number
        extra = list(range(len(self.order), len(self.order) + x.dim() - len(shape)))
        return x.reshape(sizes + list(x.shape[len(shape) :])).permute(self.order + extra)

    def back(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        order = [0] * len(self.order)
        for place, part in enumerate(self.order):
            order[part] = place
        return x.permute(order).reshape(list(shape))


class PositionSlot(MaskSlot):
    """The place of one source in one pass, whose masks belong to places in a sequence.

    Args:
        positions: knows where the words are.
        run: the pass.
        site: the random call.
        seed: the seed of the source.
    """

    def __init__(self, positions: Positions, run: Pass, site: Site, seed: int) -> None:
        super().__init__(run, seed, lambda shape, mask: None)
        self._positions, self._site = positions, site

    def another(self, number: int) -> PositionSlot:
        seed = source_seed(self._seed, number)
        return self if not number else PositionSlot(self._positions, self._run, self._site, seed)

    def _arranged(self, shape: Sequence[int], mask: Sequence[int]) -> _Arranged:
        parts = self._positions.split(self._site, shape, mask)
        shared = self._positions.shared(self._site, len(shape))
        own = [size == other and not one for size, other, one in zip(shape, mask, shared, strict=True)]
        flat = [(kind, alone) for dim, alone in zip(parts, own, strict=True) for kind, _ in dim]
        keyed = [number for number, (kind, alone) in enumerate(flat) if alone and kind in (SOURCE, TARGET, HELD)]
        rest = [number for number in range(len(flat)) if number not in keyed]
        return _Arranged(parts, keyed + rest, len(keyed))

    def _key(self, arranged: _Arranged) -> Tensor:
        """Returns the keys (..., 2) of the places in front."""
        run, flat = self._run, arranged.flat
        front = [flat[part] for part in arranged.order[: arranged.keyed]]
        device = run.samples.device
        if len(front) > 2:
            raise _placeless(self._site, "more than two of its dimensions count words")
        places = self._positions.places(self._site, [kind for kind, _ in front], [size for _, size in front], device)
        seeds = torch.tensor(self._seed, device=device)
        for number, place in enumerate(places):
            # Integers wrap around, so that all pairs of places below 2**31 have seeds of their own.
            seeds = seeds.unsqueeze(-1) + (place << 32 if number == 0 else place)
        return torch.stack([seeds, (run.samples << 32).expand_as(seeds)], -1)

    def apply(
        self, operator: operators.Operator, x: Tensor, params: MaskParams | Tensor, shape: Sequence[int], inplace: bool
    ) -> Tensor:
        shape = [1] * (x.dim() - len(shape)) + list(shape)
        arranged = self._arranged(x.shape, shape)
        if isinstance(params, Tensor) and params.dim() > 1:
            params = params.reshape((1,) * (x.dim() + 1 - params.dim()) + tuple(params.shape))
            params = arranged.forward(params, params.shape[:-1])
        mask = arranged.shape(shape, True)[arranged.keyed :]
        out = arranged.back(operator(arranged.forward(x, x.shape), self._key(arranged), params, mask), x.shape)
        return written(x, out) if inplace else out

    def _words(self, shape: Sequence[int]) -> Tensor:
        arranged = self._arranged(shape, shape)
        words = random_bits.random_bits(self._key(arranged), arranged.shape(shape, True)[arranged.keyed :])
        return arranged.back(words.expand(arranged.shape(shape, False)), shape)

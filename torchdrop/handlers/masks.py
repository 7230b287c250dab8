"""Masks as a function of (seed, source, sample, row): the keys, and the places of rows and samples in a tensor.

A source of randomness is a call in the model. Its seed is a hash of (seed, module, kind, number of the call); the
stream is ``sample * 2**32 + row``. So a row of the data gets the same mask in any batch, chunk, strategy or process.

Latin sampling: across the T samples the draws of one unit are, in units of 2**-32,

    D_s = (w + floor(g(s) 2**32 / T)) mod 2**32

with w the unit's own 32-bit draw and g its own permutation of 0 ... T - 1. For each s, D_s is exactly uniform because w
is; across s there is one draw in each of T intervals of equal length, so a unit with keep probability k is kept T k
times, rounded up or down. g comes from a family of permutations whose differences g(s) - g(t) are close to uniform,
so that the units' joint behavior over samples is that of a Latin hypercube (McKay, Beckman and Conover, 1979).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..core.torch_state import transforms_active
from ..kernels.mask_params import ONE, MaskParams, has_float64, mask_params
from ..kernels.masking import unpack_params
from ..ops import operators, random_bits
from ..ops.attention import composed
from ..seeding import hash_of
from .calls import Slot


class NotVectorizableError(RuntimeError):
    """Raised if the samples cannot be run together in the way that was tried."""


@dataclass(frozen=True)
class Layout:
    """The place of the data's rows in a source's tensor: dimension `dim` has `ratio` neighbors for each row.

    `own` says whether the mask differs between rows, or has one place there for all of them.
    """

    dim: int
    ratio: int
    own: bool


def find_layout(
    shapes: tuple[Sequence[int], Sequence[int]], rows: tuple[int, int], mask: Sequence[int]
) -> Layout | None:
    """Finds the first dimension that grows with the rows of the data, from one source's shapes at two numbers of rows.

    >>> find_layout(((6, 4), (9, 4)), (2, 3), (9, 4))
    Layout(dim=0, ratio=3, own=True)
    >>> find_layout(((5, 2, 4), (5, 3, 4)), (2, 3), (5, 1, 4))
    Layout(dim=1, ratio=1, own=False)
    """
    first, second = shapes
    if len(first) != len(second):
        return None
    for dim, (a, b) in enumerate(zip(first, second, strict=True)):
        if a != b and a % rows[0] == 0 and a // rows[0] * rows[1] == b:
            return Layout(dim, a // rows[0], mask[dim] != 1)
    return None


def source_seed(seed: int, *name: object) -> int:
    """Returns 64 bits, as a signed integer, that follow from the seed and the name of a source."""
    return int.from_bytes(hash_of(seed, *name), "little", signed=True)


class Hypercube:
    """The strata of one Latin hypercube of `size` samples, for the samples being run.

    Args:
        size: the number of samples, T.
        number: the number of the hypercube, among several independent ones.
    """

    def __init__(self, size: int, number: int = 0) -> None:
        self.size = size
        self.number = number

    def offsets(self, position: Tensor) -> Tensor:
        """Returns ``floor(g(s) 2**32 / T)`` for every permutation g of the family: (..., permutations) for positions
        (...)."""
        a, b, prime = _family(self.size)
        a, b = a.to(position.device), b.to(position.device)
        value = (a * position.unsqueeze(-1) + b) % prime
        for _ in range(prime - self.size):  # following its cycle, one is below T again after so many steps at most
            outside = value >= self.size
            if not (transforms_active() or outside.any()):
                break
            value = torch.where(outside, (a * value + b) % prime, value)
        return (value << 32) // self.size

    @property
    def family(self) -> int:
        """The number of permutations."""
        return len(_family(self.size)[0])


@functools.lru_cache(maxsize=16)
def _family(size: int) -> tuple[Tensor, Tensor, int]:
    """Returns coefficients of maps ``a s + b mod P``, P the smallest prime from T on: about 4096 of them, or all."""
    prime = next(n for n in range(max(size, 2), 2 * size + 2) if all(n % d for d in range(2, math.isqrt(n) + 1)))
    shifts = min(prime, max(1, 4096 // (prime - 1)))
    with torch.inference_mode(False):
        a = torch.arange(1, prime, device="cpu").repeat(shifts)
        b = (torch.arange(shifts, device="cpu") * prime // shifts).repeat_interleave(prime - 1)
    return a, b, prime


class Pass:
    """One run of the model: its samples, its rows of the data, and their places in its tensors.

    Args:
        seed: the seed of all masks.
        samples: numbers of the samples, int64: 0-d for one sample (or one under vmap), (S,) if folded.
        rows: the number of rows of data; None if the inputs are one whole.
        first_row: the number of the first one.
        shared: whether all rows have the mask of row 0.
        folded: whether the tensors have the rows once for each sample, one sample after another.
        hypercube: the Latin hypercube of the samples of a unit; None if they are independent.
        offsets: the strata of these samples, if they are known already.
    """

    def __init__(
        self,
        seed: int,
        samples: Tensor,
        rows: int | None,
        *,
        first_row: int | Tensor = 0,
        shared: bool = False,
        folded: bool = False,
        hypercube: Hypercube | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        self.seed = seed
        self.samples = samples
        self.rows = rows
        self.shared = shared
        self.folded = folded
        self.hypercube = hypercube
        self.copies: int = samples.numel() if folded else 1
        numbers = torch.arange(rows or 0, device=samples.device)
        self._row_numbers = numbers + first_row if isinstance(first_row, Tensor) or first_row else numbers
        self._streams: dict[bool, Tensor] = {}
        self._offsets = offsets

    def key(self, seed: int, own: bool) -> Tensor:
        """Returns keys (..., 2): for each sample if they are folded, and for each row if rows have their own masks."""
        stream = self._streams.get(own)
        if stream is None:
            stream = self._streams[own] = self._stream(self.samples, own)
        return _key(seed, stream)

    def _stream(self, samples: Tensor, own: bool) -> Tensor:
        stream = samples << 32
        return stream.unsqueeze(-1) | self._row_numbers if own else stream

    def words(self, seed: int, shape: Sequence[int], own: bool) -> Tensor:
        """Makes the 32-bit draws of a source, int64 of shape ``key.shape[:-1] + shape``."""
        if self.hypercube is None:
            return random_bits.random_bits(self.key(seed, own), shape)
        shift, choice = self.unit_keys(seed, own)
        first, member = kernels.random_bits(shape, shift), kernels.random_bits(shape, choice)
        table = self.offsets()
        member = member * table.shape[-1] >> 32
        return first + (table[:, member] if self.folded else table[member]) & ONE - 1

    def unit_keys(self, seed: int, own: bool) -> tuple[Tensor, Tensor]:
        """Returns the keys of the two draws that a unit makes for a hypercube: its shift and its permutation."""
        assert self.hypercube is not None
        number = torch.tensor(2 * self.hypercube.number, device=self.samples.device)
        return _key(seed, self._stream(number, own)), _key(seed, self._stream(number + 1, own))

    def offsets(self) -> Tensor:
        """Returns the strata of this pass's samples under each permutation."""
        assert self.hypercube is not None
        if self._offsets is None:
            self._offsets = self.hypercube.offsets(self.samples % self.hypercube.size)
        return self._offsets


def _key(seed: int, stream: Tensor) -> Tensor:
    return torch.stack([torch.full_like(stream, seed), stream], -1)


class MaskSlot(Slot):
    """The place of one source in one pass: it makes its masks and numbers.

    Args:
        run: the pass.
        seed: the seed of the source.
        find: returns the layout of the source's tensor from its shape and its mask's.
    """

    def __init__(self, run: Pass, seed: int, find: Callable[[Sequence[int], Sequence[int]], Layout | None]) -> None:
        self._run, self._seed, self._find = run, seed, find
        self._layout: Layout | None = None
        self._own = False

    def another(self, number: int) -> MaskSlot:
        """Returns the place of one of several masks that one call draws; the first of them is this one."""
        return self if not number else MaskSlot(self._run, source_seed(self._seed, number), self._find)

    def _place(self, shape: Sequence[int], mask: Sequence[int]) -> None:
        self._layout = self._find(shape, mask)
        if self._run.folded and self._layout is None:
            raise NotVectorizableError("a source draws numbers that belong to no row of the data")
        self._own = self._layout is not None and self._layout.own and not self._run.shared

    @property
    def _lead(self) -> list[int]:
        """The sizes that the rows' dimension is split into: samples, rows, neighbors."""
        assert self._layout is not None
        lead = [self._run.copies] if self._run.folded else []
        return [*lead, self._run.rows or 1, *([self._layout.ratio] if self._layout.ratio > 1 else [])]

    def _forward(self, x: Tensor) -> Tensor:
        """Returns x with the dimensions of the keys in front; the mask's follow."""
        if self._layout is None:
            return x
        if self._layout.dim:
            x = x.movedim(self._layout.dim, 0)
        lead = self._lead
        return x.unflatten(0, lead) if len(lead) > 1 else x

    def _back(self, x: Tensor) -> Tensor:
        if self._layout is None:
            return x
        lead = self._lead
        return (x.flatten(0, len(lead) - 1) if len(lead) > 1 else x).movedim(0, self._layout.dim)

    def _mask_shape(self, shape: Sequence[int]) -> list[int]:
        """Returns the mask's shape without the keys' dimensions."""
        if self._layout is None:
            return list(shape)
        dim, ratio = self._layout.dim, self._layout.ratio
        neighbors = [ratio if self._layout.own else 1] if ratio > 1 else []
        return [*([] if self._own else [1]), *neighbors, *shape[:dim], *shape[dim + 1 :]]

    def _law(self, params: MaskParams | Tensor, dims: int) -> MaskParams | Tensor:
        """Returns mask parameters that vary over the mask in the order of `_forward`."""
        if isinstance(params, MaskParams) or params.dim() == 1 or self._layout is None:
            return params
        params = params.reshape((1,) * (dims + 1 - params.dim()) + tuple(params.shape)).movedim(self._layout.dim, 0)
        lead = self._lead
        if len(lead) == 1:
            return params
        return (
            params.reshape([1] * len(lead) + list(params.shape[1:]))
            if params.shape[0] == 1
            else params.unflatten(0, lead)
        )

    def apply(
        self, operator: operators.Operator, x: Tensor, params: MaskParams | Tensor, shape: Sequence[int], inplace: bool
    ) -> Tensor:
        """Applies an operator with mask parameters to x, with this source's mask of this shape."""
        self._place(x.shape, shape)
        run, arranged, mask_shape = self._run, self._forward(x), self._mask_shape(shape)
        params = self._law(params, x.dim())
        if run.hypercube is None:
            out = operator(arranged, run.key(self._seed, self._own), params, mask_shape)
            out = out if arranged is x else self._back(out)
        elif operator is operators.masked:
            shift, choice = run.unit_keys(self._seed, self._own)
            stratified = _Stratified.folded if run.folded else _Stratified.apply
            out = self._back(stratified(arranged, run.offsets(), shift, choice, params, mask_shape))
        else:
            out = self._back(_gaussian(arranged, run.words(self._seed, mask_shape, self._own), params))
        return written(x, out) if inplace else out

    def numbers(self, numbers: random_bits.Numbers, shape: Sequence[int], params: MaskParams | Tensor | None) -> Tensor:
        """Makes the numbers of one of the operators of `ops.random_bits`, of this shape."""
        words = self._words(shape)
        if numbers is random_bits.random_bits:
            return words
        if numbers is random_bits.standard_normal:
            return _normal(words)
        assert params is not None
        return words < unpack_params(params, words.device)[0]

    def words(self, like: Tensor) -> Tensor:
        return self._words(like.shape)

    def _words(self, shape: Sequence[int]) -> Tensor:
        self._place(shape, shape)
        words = self._run.words(self._seed, self._mask_shape(shape), self._own)
        if self._layout is None:
            return words
        return self._back(words.expand(*self._lead, *words.shape[len(self._lead) :]))

    def normal(self, like: Tensor) -> Tensor:
        return _normal(self.words(like)).to(like.dtype)

    def params(self, rate: Any, shape: Sequence[int]) -> MaskParams:
        return mask_params(1.0 - rate)

    def attention(self, rate: Any, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        def drop(weights: Tensor) -> Tensor:
            return self.apply(operators.masked, weights, self.params(rate, weights.shape), weights.shape, False)

        factor = 1.0 / math.sqrt(query.shape[-1]) if how["scale"] is None else how["scale"]
        return composed(query, key, value, how["attn_mask"], how["is_causal"], factor, drop)


def _normal(words: Tensor) -> Tensor:
    exact = has_float64(words.device)
    z = torch.special.ndtri(((words if exact else words.cpu()).to(torch.float64) + 0.5) * 2.0**-32)
    return z if exact else z.to(words.device, torch.float32)


def _gaussian(x: Tensor, words: Tensor, params: MaskParams | Tensor) -> Tensor:
    dtype = kernels.COMPUTE_DTYPE[x.dtype]
    scale = params.scale if isinstance(params, MaskParams) else params[..., 1].to(x.device)
    return (x.to(dtype) * (1.0 + scale * _normal(words)).to(dtype)).to(x.dtype)


class _Stratified(torch.autograd.Function):
    """Applies mask parameters to x, with the masks of one sample of a hypercube, or of several under vmap. It has no
    derivative."""

    @staticmethod
    def folded(
        x: Tensor, offsets: Tensor, shift: Tensor, choice: Tensor, params: MaskParams | Tensor, shape: list[int]
    ) -> Tensor:
        """Does this for x with all samples in front, or the same for all samples."""
        return kernels.select(x, kernels.stratified(shape, shift, choice, offsets, params), params)

    @staticmethod
    def forward(x: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
        return _Stratified.folded(x.unsqueeze(0), offsets.unsqueeze(0), *rest).squeeze(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, int]:
        x = x.unsqueeze(0) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return _Stratified.folded(x, offsets, *rest), 0


def written(x: Tensor, out: Tensor) -> Tensor:
    """Writes `out` to x's memory.

    Raises:
        NotVectorizableError: under vmap, if x is the same for all samples and `out` is not.
    """
    try:
        return x.copy_(out)
    except RuntimeError as error:
        if transforms_active():
            raise NotVectorizableError(f"a tensor that all samples share is written to: {error}") from error
        raise

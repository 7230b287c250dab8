"""The masks of the reference for graphs that run elsewhere: ONNX Runtime, AOTInductor, or PyTorch without torchdrop.

Only operations on int64 and float64 tensors are used that all of these have, and no tensor is written to or read by
Python. Seed and stream come as four words of 32 bits each, so that no number needs the sign of an int64. The blocks of
many keys are not made before they differ: a word that is the same for all samples, rows or blocks has one place there.

- Products may have all 64 bits, and wrap around as they do in two's complement everywhere.
- ONNX has no shift of signed integers, and its exporter puts ten operations in the place of one. A multiple of 2**32
  below 2**63 is exact in float64, so its upper half is the product with 2**-32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import masking
from .mask_params import ONE, MaskParams

_WORD = ONE - 1
_HALF = 2**16
_MULTIPLIERS, _STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_SECOND, _NORMAL = 2**29, 2**30
"""The upper words of the first blocks of the second plane and of that of normal variates."""


Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Key(NamedTuple):
    """Keys of one source, in words of 32 bits, as int64.

    Args:
        seeds: the words of the seed in each round, of shape (2, 10): see `schedule`.
        low, high: the words of the streams. They broadcast to the shape of the keys.
    """

    seeds: Tensor
    low: Tensor
    high: Tensor

    @property
    def dims(self) -> int:
        return max(self.low.dim(), self.high.dim())


def seed_words(seed: int) -> tuple[int, int]:
    """Returns the lower and the upper 32 bits of a seed.

    >>> seed_words(-1) == (2**32 - 1, 2**32 - 1), seed_words(2**32 + 5)
    (True, (5, 1))
    """
    return seed & _WORD, seed >> 32 & _WORD


def schedule(words: Tensor) -> Tensor:
    """Returns the words of seeds in each round, of shape (seeds, 2, 10), from the seeds' words (seeds, 2)."""
    rounds = torch.tensor([[step * number for number in range(_ROUNDS)] for step in _STEPS], device=words.device)
    return words.unsqueeze(-1) + rounds & _WORD


def _upper(word: Tensor, bits: int = 32) -> Tensor:
    """Returns ``word >> bits`` for an int64, with its sign."""
    return ((word & -(2**bits)).to(torch.float64) * 2.0**-bits).to(torch.int64)


def _philox(block: Tensor, plane: int, key: Key) -> Words:
    """Returns the four words of blocks (n,), each of the shape (keys..., n). `plane` is the upper word of the blocks'
    numbers."""
    return _rounds(block, plane, Key(key.seeds, key.low.unsqueeze(-1), key.high.unsqueeze(-1)))


def _rounds(block: Tensor, plane: int, key: Key) -> Words:
    """Returns the four words of blocks, each of which has its own key or shares one by broadcasting."""
    c0, c2, c3 = block, key.low, key.high
    c1 = torch.full((), plane, dtype=torch.int64, device=block.device)
    for first, second in zip(*(words.unbind() for words in key.seeds.unbind()), strict=True):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # The bits of c1 and c3 above their lower 32 have no meaning until the end.
        c0, c1, c2, c3 = (_upper(p1) ^ (c1 ^ first)) & _WORD, p1, (_upper(p0) ^ (c3 ^ second)) & _WORD, p0
    return c0, c1 & _WORD, c2, c3 & _WORD


def _arranged(halves: Sequence[Tensor], shape: Sequence[int], key: Key) -> Tensor:
    """Returns what was computed of the lower and upper halves of a block's words, in the order of the elements.

    Args:
        halves: eight tensors, with one element for each block.
        shape: the shape of the mask.
        key: the keys, whose dimensions come first.
    """
    flat = torch.stack(torch.broadcast_tensors(*halves), -1).flatten(-2)
    flat = flat.narrow(-1, 0, math.prod(shape))
    return flat.reshape(*flat.shape[: key.dims], *shape)


def _blocks(shape: Sequence[int]) -> int:
    return -(-math.prod(shape) // 8)


def random_bits(shape: Sequence[int], key: Key) -> Tensor:
    """Returns the 32 random bits of a mask's elements, as int64 of the keys' shape and then the mask's."""
    blocks, halves = torch.arange(_blocks(shape), device=key.seeds.device), list[Tensor]()
    for upper, lower in zip(*(_philox(blocks, plane, key) for plane in (0, _SECOND)), strict=True):
        halves += [(upper & _HALF - 1) * _HALF + (lower & _HALF - 1), (upper & -_HALF) + _upper(lower, 16)]
    return _arranged(halves, shape, key)


def keep_mask(shape: Sequence[int], key: Key, threshold: int | Tensor) -> Tensor:
    """Returns whether random bits are below a threshold, in the shape of the keys and then the mask's.

    The upper 16 of the random bits decide alone if the threshold's lower 16 are 0, as at a rate of 1/2. Otherwise one
    element in 2**16 is open, and the lower 16 are made for these elements only.
    """
    if isinstance(threshold, Tensor):
        return random_bits(shape, key) < threshold
    high, low = divmod(threshold, _HALF)
    words = _philox(torch.arange(_blocks(shape), device=key.seeds.device), 0, key)
    halves = [(half, unit) for word in words for half, unit in ((word & _HALF - 1, 1), (word, _HALF))]
    below = _arranged([half < high * unit for half, unit in halves], shape, key)
    if not low:
        return below
    at_most = _arranged([half < (high + 1) * unit for half, unit in halves], shape, key)
    flat = (*below.shape[: key.dims], math.prod(shape))
    places = (below ^ at_most).reshape(flat).nonzero().unbind(-1)
    return below.reshape(flat).index_put(places, _lower(places, key) < low).reshape(below.shape)


def _lower(places: Sequence[Tensor], key: Key) -> Tensor:
    """Returns the lower 16 random bits of some elements.

    Args:
        places: the indices of the elements: those of their keys, and the number in the mask.
        key: the keys.
    """
    *keys, element = places
    low, high = (word[tuple(keys)] if keys else word for word in torch.broadcast_tensors(key.low, key.high))
    words = torch.stack(torch.broadcast_tensors(*_rounds(_upper(element, 3), _SECOND, Key(key.seeds, low, high))), -1)
    halves = torch.stack([words & _HALF - 1, _upper(words, 16)], -1).flatten(-2)
    return halves.gather(-1, (element & 7).unsqueeze(-1)).squeeze(-1)


def masked_values(x: Tensor, kept: Tensor, params: MaskParams | Tensor) -> Tensor:
    """Returns ``x * scale + shift`` where `kept`, and `fill` elsewhere, in the element type that x is computed in.

    Without shift and fill it is a minimum and a maximum with infinity or 0, so a dropped infinity becomes 0, as in the
    other backends, and a dropped NaN stays. A select takes ONNX Runtime five times as long as all of that.
    """
    if not isinstance(params, MaskParams) or params.shift or params.fill:
        return masking.masked_values(x, kept, params)
    dtype = masking.COMPUTE_DTYPE[x.dtype]
    most, none = (torch.full((), end, dtype=dtype, device=x.device) for end in (math.inf, 0.0))
    limit = torch.where(kept, most, none)
    return torch.minimum(torch.maximum(x.to(dtype) * params.scale, -limit), limit)


def standard_normal(shape: Sequence[int], key: Key) -> Tensor:
    """Returns standard normal variates of the keys' shape and then the mask's, as float64: those of the reference up to
    rounding."""
    blocks = torch.arange(-(-math.prod(shape) // 4), device=key.seeds.device)
    words = [word.to(torch.float64) for word in _philox(blocks, _NORMAL, key)]
    variates: list[Tensor] = []
    for first, second in (words[:2], words[2:]):
        radius = (-2.0 * ((first + 0.5) * 2.0**-32).log()).sqrt()
        angle = (second + 0.5) * (2.0 * math.pi * 2.0**-32) - math.pi / 4
        variates += [radius * angle.cos(), radius * angle.sin()]
    return _arranged(variates, shape, key)


_CENTRAL = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457, 13731.693765509461125,
     1971.5909503065514427, 133.14166789178437745, 3.3871328727963666080),
    (5226.4952788528545610, 28729.085735721942674, 39307.895800092710610, 21213.794301586595867, 5394.1960214247511077,
     687.18700749205790830, 42.313330701600911252, 1.0),
)  # fmt: skip
_TAILS = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 0.241780725177450611770, 1.27045825245236838258,
     3.64784832476320460504, 5.76949722146069140550, 4.63033784615654529590, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 0.148103976427480074590,
     0.689767334985100004550, 1.67638483018380384940, 2.05319162663775882187, 1.0),
)  # fmt: skip


def _ratio(polynomials: tuple[Sequence[float], Sequence[float]], x: Tensor) -> Tensor:
    """Returns the first polynomial divided by the second, from their coefficients, highest powers first."""
    values = []
    for coefficients in polynomials:
        value = torch.full_like(x, coefficients[0])
        for coefficient in coefficients[1:]:
            value = value * x + coefficient
        values.append(value)
    return values[0] / values[1]


def normal_of(words: Tensor) -> Tensor:
    """Returns the normal quantiles of ``(words + 1/2) 2**-32``, as float64: ``torch.special.ndtri``, which ONNX has
    not.

    References:
        Wichura, "Algorithm AS 241: The Percentage Points of the Normal Distribution", Applied Statistics 37, 1988. Its
        region beyond 1e-11 is not needed.
    """
    u = (words.to(torch.float64) + 0.5) * 2.0**-32
    q = u - 0.5
    central = q * _ratio(_CENTRAL, 0.180625 - q * q)
    tail = _ratio(_TAILS, (-torch.minimum(u, 1.0 - u).log()).sqrt() - 1.6)
    return torch.where(q.abs() <= 0.425, central, torch.where(q < 0, -tail, tail))

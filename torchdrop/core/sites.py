"""Masks and random numbers for layers that do more with them than multiply: whether they are on, and what they draw.

The one way to numbers beside `sites.apply`. Function modes see both, so that Monte Carlo inference and searches can put
their keys in place of drawn ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from ..kernels.law import Law
from ..kernels.masking import COMPUTE_DTYPE
from ..ops import random_bits
from ..random import draw_key
from . import portable
from .exported import warn_stays_on
from .torch_state import function_modes, is_compiling, is_watched


def is_on(training: bool) -> bool:
    """Whether a layer or function with this flag drops anything. Monte Carlo inference turns layers in eval mode on,
    and `torchdrop.disabled` turns functions off."""
    if is_compiling() or not function_modes() or not is_watched():
        return training
    return bool(handle_torch_function(is_on, (), training))


def draw(
    numbers: random_bits.Numbers,
    like: Tensor,
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    law: Law | Tensor | None = None,
) -> Tensor:
    """Numbers of this shape under a new key, on the device of `like`."""
    compiling = is_compiling()
    if not compiling and function_modes():
        return handle_torch_function(draw, (like,), numbers, like, shape, generator, law)
    if portable.is_wanted(compiling):
        return portable.numbers(numbers, like, shape, generator, law)
    return numbers(draw_key(like.device, generator), shape, law)


def keep_mask(
    like: Tensor, law: Law | Tensor, shape: Sequence[int], generator: torch.Generator | None = None
) -> Tensor:
    """Bools, True with the law's probability: ``law.threshold / 2**32``."""
    return draw(random_bits.keep_mask, like, shape, generator, law)


def words(like: Tensor, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Uniform integers in [0, 2**32), as int64: what ranks and choices are made from."""
    return draw(random_bits.draws, like, shape, generator)


def uniform(like: Tensor, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Uniform variates strictly between 0 and 1, symmetric about 1/2, in the dtype that `like` is computed in."""
    warn_stays_on()
    dtype = COMPUTE_DTYPE[like.dtype]
    digits = 32 if dtype == torch.float64 else 23  # u and 1 - u are both exact
    return ((words(like, shape, generator) >> 32 - digits).to(dtype) + 0.5) * 2.0**-digits


def standard_normal(like: Tensor, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Standard normal variates in the dtype that `like` is computed in."""
    warn_stays_on()
    return draw(random_bits.standard_normal, like, shape, generator).to(COMPUTE_DTYPE[like.dtype])

"""The verbs of a layer: whether this call drops, and what it draws. They are the only way to randomness.

is_on              whether this call drops anything
apply              a tensor under an operator and mask parameters: a mask applied, or noise
keep_mask          the mask itself, for layers that do more with it than multiply
random_bits        integers from which ranks and choices are made
uniform, standard_normal   random variates

Each draws a key of its own, also if everything is kept: the draws of the layers after this one must not depend on its
rate, and compiled code, which cannot see the rate, draws one too. Only under vmap, where drawing may be forbidden, a
rate that keeps everything draws none. Function modes see `is_on`, `apply` and `draw`, so that Monte Carlo inference and
searches can put keys of their own in the place of drawn ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from ..kernels.mask_params import MaskParams, keeps_all
from ..kernels.masking import COMPUTE_DTYPE, WHOLE
from ..ops import random_bits as numbers
from ..ops.operators import Operator
from ..random import draw_key
from . import portable
from .exported import warn_stays_on
from .inputs import check_inplace
from .shard import Cut, apply_to_dtensor, apply_to_whole, is_dtensor
from .torch_state import function_modes, is_compiling, is_watched, tracing_state, transforms_active


def is_on(training: bool) -> bool:
    """Whether a layer or function with this flag drops anything.

    Monte Carlo inference turns layers in eval mode on, and `torchdrop.disabled` turns functions off. A function that
    ends in `apply` need not ask if its flag is True, since the modes see that call.
    """
    if is_compiling() or not function_modes() or not is_watched():
        return training
    return bool(handle_torch_function(is_on, (), training))


def apply(
    operator: Operator,
    input: Tensor,
    params: MaskParams | Tensor,
    shape: Sequence[int],
    inplace: bool = False,
    generator: torch.Generator | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """Applies an operator with mask parameters and a new key to a checked `input`. Returns the input itself if nothing
    is dropped.

    For a DTensor, `shape` is the whole mask's. For a plain tensor that is a part of a larger one, `cut` says which
    part.
    """
    if type(input) is not Tensor and is_dtensor(input):
        if inplace:
            check_inplace(input)
        return apply_to_dtensor(apply, operator, input, params, shape, inplace, generator)
    compiling = is_compiling()
    if not compiling and function_modes():
        args = (operator, input, params, shape, inplace, generator)
        if cut is None or keeps_all(params):
            return handle_torch_function(apply, (input,), *args)
        if not is_watched():
            return handle_torch_function(apply, (input,), *args, cut)
        return apply_to_whole(apply, *args, cut)
    if inplace:
        check_inplace(input)
    if portable.is_in_onnx_export() if compiling else tracing_state() is not None:
        return portable.apply(operator, input, params, shape, inplace, generator)
    key = new_key(input, params, generator)
    if key is None:
        return input
    return operator(input, key, params, shape, inplace, WHOLE if cut is None else cut.part)


def new_key(input: Tensor, params: MaskParams | Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Draws a key. Returns None if nothing is dropped; a key is drawn then, too, except under transforms."""
    every = keeps_all(params)
    if every and transforms_active():
        return None
    key = draw_key(input.device, generator)
    return None if every else key


def draw(
    kind: numbers.Numbers,
    like: Tensor,
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    params: MaskParams | Tensor | None = None,
) -> Tensor:
    """Draws numbers of this kind and shape under a new key, on the device of `like`."""
    compiling = is_compiling()
    if not compiling and function_modes():
        return handle_torch_function(draw, (like,), kind, like, shape, generator, params)
    if portable.is_wanted(compiling):
        return portable.numbers(kind, like, shape, generator, params)
    return kind(draw_key(like.device, generator), shape, params)


def keep_mask(
    like: Tensor, params: MaskParams | Tensor, shape: Sequence[int], generator: torch.Generator | None = None
) -> Tensor | None:
    """Draws bools, True with the probability ``params.threshold / 2**32``. None if the parameters keep everything."""
    every = keeps_all(params)
    if every and transforms_active():
        return None
    kept = draw(numbers.keep_mask, like, shape, generator, params)
    return None if every else kept


def random_bits(like: Tensor, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Draws uniform integers in [0, 2**32), as int64. Ranks and choices are made from them."""
    return draw(numbers.random_bits, like, shape, generator)


def random_bits_under(
    like: Tensor, params: MaskParams | Tensor, shape: Sequence[int], generator: torch.Generator | None = None
) -> Tensor | None:
    """Draws `random_bits` to be compared with a mask's threshold. None if the parameters keep everything."""
    every = keeps_all(params)
    if every and transforms_active():
        return None
    bits = random_bits(like, shape, generator)
    return None if every else bits


def uniform(like: Tensor, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Draws uniform variates strictly between 0 and 1, symmetric about 1/2, in the dtype that `like` is computed in."""
    warn_stays_on()
    dtype = COMPUTE_DTYPE[like.dtype]
    digits = 32 if dtype == torch.float64 else 23  # u and 1 - u are both exact
    return ((random_bits(like, shape, generator) >> 32 - digits).to(dtype) + 0.5) * 2.0**-digits


def standard_normal(like: Tensor, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Draws standard normal variates in the dtype that `like` is computed in."""
    warn_stays_on()
    return draw(numbers.standard_normal, like, shape, generator).to(COMPUTE_DTYPE[like.dtype])

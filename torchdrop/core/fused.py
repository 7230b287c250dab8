"""The choice between one fused kernel and separate operations, for layers that fuse dropout with the operation next to
it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..kernels.mask_params import MaskParams
from ..ops import operators
from ..ops.fused import Drop
from . import portable
from .shard import is_dtensor
from .sites import apply, new_key
from .torch_state import function_modes, is_compiling, is_watched, pop_function_mode


def unchanged(x: Tensor) -> Tensor:
    return x


@contextmanager
def _without_modes() -> Iterator[None]:
    with ExitStack() as stack:
        while function_modes():
            stack.enter_context(pop_function_mode())
        yield


def dropped(
    input: Tensor,
    params: MaskParams | Tensor,
    generator: torch.Generator | None,
    fuse: Callable[[Tensor], Tensor],
    compose: Callable[[Drop], Tensor],
) -> Tensor:
    """Drops under a new key, with one kernel or with plain parts.

    Monte Carlo inference and other handlers put their own keys in place of those of `apply`, which also serves
    DTensors, so they get the parts. The mode of a default device does not matter here: every device is named.
    """
    if not is_compiling() and function_modes() and not is_watched():
        with _without_modes():
            return dropped(input, params, generator, fuse, compose)
    if (not is_compiling() and function_modes()) or (type(input) is not Tensor and is_dtensor(input)):
        return compose(lambda x: apply(operators.masked, x, params, x.shape, False, generator))
    if portable.is_wanted(is_compiling()):
        return compose(lambda x: apply(operators.masked, x, params, x.shape, False, generator))
    key = new_key(input, params, generator)
    return compose(unchanged) if key is None else fuse(key)

"""Seeds and streams, the two parts of keys, and how they are drawn.

A mask's key is two 64-bit integers, (seed, stream). By default both are drawn from PyTorch's default generator of the
device, so whatever governs that generator governs masks. Inside `frozen_masks` they are derived instead.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .core.torch_state import (
    constant_when_compiled,
    is_compiling,
    is_exporting,
    recomputing_setting,
    transforms_active,
    vmap_active,
    without_transforms,
)

_empty_like = torch.empty_like


class Forwards(Protocol):
    """The forwards that `frozen_masks` governs: whether this thread is in one, and how many keys they have drawn."""

    served: int

    @property
    def running(self) -> bool: ...


frozen: list[Forwards] = []
"""The contexts of `frozen_masks` that are open. While there is one, keys are counted."""


def draw_key(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draws a new key, int64 of shape (2,), on the device.

    Args:
        device: the device of the key and of the draw.
        generator: the source of the key; the device's default generator if None.

    Raises:
        ValueError: the generator belongs to another device.
        TypeError: it is no torch.Generator.
        RuntimeError: the call is compiled under settings with which backward would draw another key.
    """
    if generator is not None:
        return _from_generator(device, generator)
    if is_compiling():
        _refuse_recomputation()
        if transforms_active() and vmap_active():  # the form for which vmap has its randomness modes
            return torch.randint(2**63 - 1, (2,), device=device)
        return torch.ops.torchdrop.draw_key(_never_merged(device), device=device)
    return _from_default(device)


def _from_default(device: torch.device) -> Tensor:
    if not frozen and not transforms_active():
        return torch.empty((2,), dtype=torch.int64, device=device).random_()
    running = [each for each in frozen if each.running]
    for each in running:
        each.served += 1
    if running and transforms_active():
        with without_transforms():  # frozen masks are one set of masks, also under vmap
            return _drawn(device, None)
    return _drawn(device, None)


def _drawn(device: torch.device, generator: torch.Generator | None) -> Tensor:
    if transforms_active() and vmap_active():  # the form for which vmap has its randomness modes
        return torch.randint(2**63 - 1, (2,), device=device, generator=generator)
    return torch.empty((2,), dtype=torch.int64, device=device).random_(generator=generator)


class _KeyBytes(threading.local):
    """Sixteen bytes and a tensor over them: after ``draw()``, ``memory.raw`` is the CPU key that `draw_key` would have
    drawn in eager mode outside `frozen_masks`, without a tensor of its own. One for each thread."""

    def __init__(self) -> None:
        self.memory: ctypes.Array[ctypes.c_char] = (ctypes.c_char * 16)()
        with torch.inference_mode(False):
            self.draw: Callable[[], Tensor] = torch.frombuffer(self.memory, dtype=torch.int64).random_


key_bytes: _KeyBytes = _KeyBytes()


_keys: dict[int, Tensor] = {}


def cuda_key(index: int) -> Tensor:
    """Draws the key that `draw_key` would have drawn for this CUDA device in eager mode outside `frozen_masks`, in half
    the time."""
    like = _keys.get(index)
    if like is None:
        with torch.inference_mode(False):
            like = _keys[index] = torch.empty((2,), dtype=torch.int64, device=torch.device("cuda", index))
    return _empty_like(like).random_()


def key_tensor(key: bytes) -> Tensor:
    """Returns the tensor that `draw_key` returns for the same draw."""
    return torch.frombuffer(bytearray(key), dtype=torch.int64)


def _from_generator(device: torch.device, generator: torch.Generator) -> Tensor:
    check_generator(generator)
    own = generator.device
    if own.type != device.type or (own.index or 0) != (device.index or 0):
        raise ValueError(
            f"generator must be on the input's device, got a generator on {own} for an input on {device}: "
            f"create it with torch.Generator(device={str(device)!r})"
        )
    return _drawn(device, generator)


def check_generator(generator: Any) -> None:
    """Raises TypeError unless `generator` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


# Under torch.compile, Inductor would put its own random numbers in place of torch's. It keeps an operator that it does
# not recognize. Activation checkpointing looks for the tag and the argument named `device`. Passes merge equal calls of
# an operator that they do not recognize, random or not, and two layers would share their masks: `place` prevents it.
torch.library.define(
    "torchdrop::draw_key", "(Tensor place, *, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)


def _never_merged(device: torch.device) -> Tensor:
    """Returns a tensor that nobody reads, from an operator of PyTorch whose calls are merged by no pass of a compiler.

    An exported program may meet other passes than those of torch.compile, and vmap with its randomness modes. There the
    operator is a random one that takes nothing from the generator. Elsewhere uninitialized memory costs less.
    """
    return torch.randperm(0, device=device) if is_exporting() else torch.empty((2,), dtype=torch.int64, device=device)


@constant_when_compiled
def _refuse_recomputation() -> None:
    """Refuses the settings under which the partitioner may recompute anything, our draws included.

    Raises:
        RuntimeError: backward would draw anew what forward has drawn.
    """
    if not torch.is_grad_enabled():
        return
    found = recomputing_setting()
    if found is None:
        return
    setting, instead = found
    raise RuntimeError(
        f"{setting} the compiler draws random numbers anew for backward (PyTorch issue 190717), so gradients would "
        f"have other masks than the forward pass. {instead} and recompute with torch.utils.checkpoint, under which "
        "masks are repeated"
    )


@torch.library.impl("torchdrop::draw_key", "default")
def _draw_key(place: Tensor, *, device: torch.device) -> Tensor:
    """Draws one key, or one for each of a batch of places."""
    if place.dim() == 1:
        return _from_default(device)
    batch = place.shape[:-1]
    if any(each.running for each in frozen):  # frozen masks are one set of masks, also under vmap
        return _from_default(device).repeat(*batch, 1)
    return torch.randint(2**63 - 1, (*batch, 2), device=device)


@torch.library.register_fake("torchdrop::draw_key")
def _fake_key(place: Tensor, *, device: torch.device) -> Tensor:
    _refuse_recomputation()  # an exported program is compiled without a call of `draw_key`
    return torch.empty((*place.shape[:-1], 2), dtype=torch.int64, device=device)


@torch.library.register_vmap("torchdrop::draw_key")
def _batched_key(info: Any, in_dims: tuple[int], place: Tensor, *, device: torch.device) -> tuple[Tensor, int]:
    return torch.ops.torchdrop.draw_key(place.movedim(in_dims[0], 0), device=device), 0

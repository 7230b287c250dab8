"""Seeds and streams: the only place that touches a torch.Generator.

A mask's key is two 64-bit integers, (seed, stream). By default both are drawn from PyTorch's default generator of the
device, so whatever governs that generator governs masks. Inside `frozen_masks` they are derived instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

_LOW, _HIGH = -(2**63), 2**63 - 1

_is_compiling = torch.compiler.is_compiling
_transformed = torch._C._are_functorch_transforms_active


def draw_key(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A new key, int64 of shape (2,), on the device.

    Args:
        device: where the key is drawn and stays.
        generator: what it is drawn from; the device's default generator if None.

    Raises:
        ValueError: the generator belongs to another device.
        TypeError: it is no torch.Generator.
    """
    if generator is not None:
        return _from_generator(device, generator)
    if _is_compiling():
        if _transformed():  # the form for which vmap has its randomness modes
            return torch.randint(2**63 - 1, (2,), device=device)
        return torch.ops.torchdrop.draw_key(_call_number(), device=device)
    return _from_default(device)


def _from_default(device: torch.device) -> Tensor:
    if _frozen:
        key = _frozen_key(device)
        if key is not None:
            return key
    if _transformed() and _vmapped():
        return torch.randint(2**63 - 1, (2,), device=device)  # the form for which vmap has its randomness modes
    return torch.empty((2,), dtype=torch.int64, device=device).random_()


def _vmapped() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(interpreter.key() == torch._C._functorch.TransformType.Vmap for interpreter in stack)


class _KeyBytes(threading.local):
    """Sixteen bytes and a tensor over them: after ``draw()``, ``memory.raw`` is the CPU key that `draw_key` would have
    drawn in eager mode outside `frozen_masks`, without a tensor of its own. One for each thread."""

    def __init__(self) -> None:
        self.memory = (ctypes.c_char * 16)()
        with torch.inference_mode(False):
            self.draw = torch.frombuffer(self.memory, dtype=torch.int64).random_


key_bytes = _KeyBytes()


def key_tensor(key: bytes) -> Tensor:
    """The tensor that `draw_key` gives for the same draw."""
    return torch.frombuffer(bytearray(key), dtype=torch.int64)


def _from_generator(device: torch.device, generator: torch.Generator) -> Tensor:
    check_generator(generator)
    own = generator.device
    if own.type != device.type or (own.index or 0) != (device.index or 0):
        raise ValueError(
            f"generator must be on the input's device, got a generator on {own} for an input on {device}: "
            f"create it with torch.Generator(device={str(device)!r})"
        )
    return torch.empty((2,), dtype=torch.int64, device=device).random_(generator=generator)


def check_generator(generator: Any) -> None:
    """Raises TypeError unless `generator` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


# Under torch.compile, Inductor would put its own random numbers in place of torch's. An operator it does not know
# stays; the tag and the argument named `device` are what activation checkpointing looks for. `call` is another number
# for every call in a graph: the partitioner merges equal calls, random or not, and two layers would share their masks.
torch.library.define(
    "torchdrop::draw_key", "(int call, *, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)

_numbers = itertools.count()


@torch.compiler.assume_constant_result
def _call_number() -> int:
    return next(_numbers)


@torch.library.impl("torchdrop::draw_key", "default")
def _draw_key(call: int, *, device: torch.device) -> Tensor:
    return _from_default(device)


@torch.library.register_fake("torchdrop::draw_key")
def _fake_key(call: int, *, device: torch.device) -> Tensor:
    return torch.empty((2,), dtype=torch.int64, device=device)


class _Frozen:
    """Keys derived from a seed, the module that asks and how often it has asked in this forward."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.served = 0
        self._by_draw: dict[tuple[int, int], Tensor] = {}
        self._local = threading.local()

    def _forward(self) -> tuple[list[str], dict[str, int]]:
        """The modules being run in this thread, outermost first, and the calls each has made."""
        if not hasattr(self._local, "names"):
            self._local.names, self._local.calls = [], {}
        return self._local.names, self._local.calls

    def enter(self, name: str) -> None:
        names, calls = self._forward()
        if not names and not _in_backward():
            calls.clear()
            self._by_draw.clear()
        names.append(name)

    def leave(self) -> None:
        self._forward()[0].pop()

    def key(self, device: torch.device) -> Tensor | None:
        """The key of this call, or None if no forward of the model is running.

        Activation checkpointing runs parts of a forward again during backward, in another order. It also restores the
        generator, so a number drawn from that tells which call is being repeated.
        """
        names, calls = self._forward()
        again = _in_backward()
        if not names and not again:
            return None
        draw: tuple[int, int] | None = None
        if not _transformed():
            draw = tuple(torch.randint(_LOW, _HIGH, (2,), device=device).tolist())
            if again and draw in self._by_draw:
                return self._by_draw[draw]
        if not names:
            return None
        name = names[-1]
        call = calls.get(name, 0)
        calls[name] = call + 1
        digest = hashlib.blake2b(f"{name}\0{call}".encode(), digest_size=8).digest()
        key = torch.tensor([self.seed, int.from_bytes(digest, "little", signed=True)], device=device)
        if draw is not None:
            self._by_draw[draw] = key
        self.served += 1
        return key


_frozen: list[_Frozen] = []


def _frozen_key(device: torch.device) -> Tensor | None:
    for frozen in reversed(_frozen):
        key = frozen.key(device)
        if key is not None:
            return key
    return None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@contextmanager
def frozen_masks(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Every forward of the model inside the context uses the same masks.

    A layer's key is (seed, which module, which call of it in this forward), so a layer that is called several times
    has a mask for each call. Element i of a layer's input always meets the same draw: with the batch in the first
    dimension, a sample keeps its mask in whatever batch it comes at that place. The cost with dropout on is then a
    deterministic function of the parameters, to be plotted, searched along a line or checked by finite differences.
    Whether dropout is on is still the business of ``model.train()``. A forward is a call of the model or of any module
    in it. Layers with a `generator` of their own follow that, and a model compiled as a whole counts as one module.

    Args:
        model: the model, or any part of it, with torchdrop's layers or functions inside.
        seed: any integer of 64 bits.

    Raises:
        TypeError: `model` is no module or `seed` no integer.
        ValueError: the seed needs more than 64 bits, or the model has dropout modules of torch.nn, which cannot be
            frozen: put torchdrop's layers in their place.

    Warns:
        UserWarning: at the end, if nothing in the context asked for a mask.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torchdrop.Dropout(0.5))
        >>> x = torch.randn(5, 8)
        >>> with torchdrop.frozen_masks(model, seed=1):
        ...     y, again, fewer = model(x), model(x), model(x[:3])
        >>> torch.equal(y, again), torch.equal(y[:3] == 0, fewer == 0)
        (True, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if not _LOW <= seed <= 2 * _HIGH + 1:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    stock = [
        name
        for name, m in model.named_modules()
        if isinstance(m, _DropoutNd) and type(m).__module__.startswith("torch.")
    ]
    if stock:
        raise ValueError(
            f"the model has dropout modules of torch.nn, whose masks cannot be frozen: {', '.join(stock)}. "
            "Put torchdrop's layers of the same names in their place"
        )
    frozen = _Frozen(seed if seed <= _HIGH else seed - 2**64)

    def enter(name: str) -> Any:
        return lambda module, args: None if _is_compiling() else frozen.enter(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if not _is_compiling():
            frozen.leave()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    _frozen.append(frozen)
    try:
        yield
    finally:
        _frozen.remove(frozen)
        for handle in handles:
            handle.remove()
    if not frozen.served:
        warnings.warn(
            "frozen_masks: no mask was drawn in this context. Is the model in train mode, does it use torchdrop's "
            "layers, and was it called as the module that was given (a compiled model must be given as compiled)?",
            UserWarning,
            stacklevel=3,
        )

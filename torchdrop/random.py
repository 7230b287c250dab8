"""Seeds and streams, the two parts of keys, and how they are drawn.

A mask's key is two 64-bit integers, (seed, stream). By default both are drawn from PyTorch's default generator of the
device, so whatever governs that generator governs masks. Inside `frozen_masks` they are derived instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .core.checks import check_integer, check_module
from .core.hooks import observer
from .core.torch_state import (
    in_backward,
    is_compiling,
    is_exporting,
    recomputing_setting,
    transforms_active,
    vmap_active,
    without_transforms,
)

_empty_like = torch.empty_like


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
    if not _frozen and not transforms_active():
        return torch.empty((2,), dtype=torch.int64, device=device).random_()
    running = [frozen for frozen in _frozen if frozen.running]
    for frozen in running:
        frozen.served += 1
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
        self.memory = (ctypes.c_char * 16)()
        with torch.inference_mode(False):
            self.draw = torch.frombuffer(self.memory, dtype=torch.int64).random_


key_bytes = _KeyBytes()


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


@torch.compiler.assume_constant_result
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
    if any(frozen.running for frozen in _frozen):  # frozen masks are one set of masks, also under vmap
        return _from_default(device).repeat(*batch, 1)
    return torch.randint(2**63 - 1, (*batch, 2), device=device)


@torch.library.register_fake("torchdrop::draw_key")
def _fake_key(place: Tensor, *, device: torch.device) -> Tensor:
    _refuse_recomputation()  # an exported program is compiled without a call of `draw_key`
    return torch.empty((*place.shape[:-1], 2), dtype=torch.int64, device=device)


@torch.library.register_vmap("torchdrop::draw_key")
def _batched_key(info: Any, in_dims: tuple[int], place: Tensor, *, device: torch.device) -> tuple[Tensor, int]:
    return torch.ops.torchdrop.draw_key(place.movedim(in_dims[0], 0), device=device), 0


class _Forward(threading.local):
    """The modules that are running in this thread, outermost first, and the generators' states from before."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.before: _States | None = None


class _Frozen:
    """Starts every outermost forward from a given state of PyTorch's generators, and puts their state back after it.

    Activation checkpointing restores the generators before it runs a part of a forward again, in any order and at any
    time, so it draws the same masks again. If it wraps a whole forward, it restores the state from before that forward,
    which is recognized by its digest.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.served = 0
        self._seed, self._names = seed, {id(module): name for name, module in model.named_modules()}
        self._outside: set[bytes] = set()
        self._forward = _Forward()

    @property
    def running(self) -> bool:
        return bool(self._forward.modules)

    @observer
    def enter(self, module: nn.Module, args: Any) -> None:
        if is_compiling():
            return
        forward = self._forward
        if not forward.modules:
            before, digest = states()
            again = in_backward()
            if not again or digest in self._outside:
                self._outside.add(digest)
                forward.before = before
                start(self._seed, self._names.get(id(module), ""), torch.manual_seed)
        forward.modules.append(module)

    @observer
    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        modules = self._forward.modules
        if not is_compiling() and modules and modules[-1] is module:  # not so if a hook before `enter` has raised
            modules.pop()
            if not modules:
                self.restore()

    def restore(self) -> None:
        """Restores the generators' states from before an outermost forward, also if that was interrupted."""
        self._forward.modules.clear()
        before, self._forward.before = self._forward.before, None
        if before is not None:
            put_back(before)


_States = tuple[Tensor, list[Tensor]]


def states() -> tuple[_States, bytes]:
    """Returns the states of PyTorch's generators, and a digest of the CPU's."""
    with without_transforms():  # plain tensors, also under torch.func
        cpu = torch.get_rng_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return (cpu, cuda), hashlib.blake2b(ctypes.string_at(cpu.data_ptr(), cpu.numel()), digest_size=16).digest()


def put_back(states: _States) -> None:
    """Sets PyTorch's generators back to these states."""
    cpu, cuda = states
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def start(seed: int, name: str, manual_seed: Callable[[int], Any] | None = None) -> int:
    """Starts PyTorch's CPU generator from a hash of (seed, name).

    Seeding it would take 32 bits for its Mersenne Twister, so all 624 words of that are set.

    Args:
        manual_seed: a function that gets 64 bits of the hash first; the generator's own if None.

    Returns:
        64 bits of the hash, which the generator returns as its initial seed: other devices' generators start from them.
    """
    number, words = _hash(seed, name)
    generator = torch.default_generator
    with without_transforms():  # plain tensors, also under torch.func
        (manual_seed or generator.manual_seed)(number)
        if _words_are_known():
            state = generator.get_state()
            ctypes.memmove(state.data_ptr() + _HEAD.size, words, len(words))
            generator.set_state(state)
    return number


def hash_of(*name: object) -> bytes:
    """Returns eight bytes that follow from a name, whose parts are joined by slashes. Seeds of named things are made
    from them."""
    return hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8).digest()


_HEAD = struct.Struct("=QiiQ")
"""The fields before the words in a CPU generator's state: the seed, the number of words left, 1, and the next one."""

_WORDS = struct.Struct("=624Q")


@functools.lru_cache(maxsize=64)
def _hash(seed: int, name: str) -> tuple[int, bytes]:
    """Returns 64 bits, and the words of a Mersenne Twister: 32 bits each, stored in 64."""
    digest = hashlib.shake_256(f"{seed}:{name}".encode()).digest(8 + 4 * 624)
    return int.from_bytes(digest[:8], "little"), _WORDS.pack(*struct.unpack("<624I", digest[8:]))


@functools.cache
def _words_are_known() -> bool:
    """Whether a generator's state is laid out as in PyTorch 2.6 to 2.13. If it is not, only 32 bits are used."""
    seed = 2**63 + 12345
    state = torch.Generator().manual_seed(seed).get_state()
    words = [seed % 2**32]
    for at in range(1, 624):
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + at) % 2**32)
    known = _HEAD.pack(seed, 1, 1, 0) + _WORDS.pack(*words)
    return state.numel() > len(known) and ctypes.string_at(state.data_ptr(), len(known)) == known


_frozen: list[_Frozen] = []


@contextmanager
def frozen_forwards(model: nn.Module, seed: int) -> Iterator[_Frozen]:
    """Does what `frozen_masks` does for anything that draws in the model: with equal inputs, all of it is frozen."""
    frozen = _Frozen(model, seed)
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(frozen.enter))
        handles.append(module.register_forward_hook(frozen.leave, always_call=True, prepend=True))
    _frozen.append(frozen)
    try:
        yield frozen
    finally:
        _frozen.remove(frozen)
        frozen.restore()
        for handle in handles:
            handle.remove()


@contextmanager
def frozen_masks(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Every forward of the model inside the context uses the same masks.

    Each forward starts from the same state of PyTorch's generators, which follows from `seed` and from the name of the
    module that was called, and puts their state back when it ends. A layer draws two numbers a call, whatever its
    input, so that a layer that is called several times has a mask for each call, the same in each forward. Element i of
    a layer's input always gets the same draw: with the batch in the first dimension, a sample keeps its mask in every
    batch in which it has the same place (unless something else in the model draws an amount that depends on the batch).
    The cost with dropout on is then a deterministic function of the parameters, which can be plotted, searched along a
    line or checked by finite differences.

    ``model.train()`` still decides whether dropout is on. A forward is a call of the model or of any module in it,
    outside backward; one runs at a time, since threads share PyTorch's generator. Layers with a `generator` of their
    own follow that. If activation checkpointing wraps the whole model, run backward inside the context too.

    Args:
        model: the model, or any part of it, with torchdrop's layers or functions inside.
        seed: any integer.

    Raises:
        TypeError: `model` is no module or `seed` no integer.
        ValueError: the model has dropout modules of torch.nn, which cannot be
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
    check_module("model", model)
    check_integer("seed", seed)
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
    with frozen_forwards(model, seed) as frozen:
        yield
    if not frozen.served:
        warnings.warn(
            "frozen_masks: no mask was drawn in this context. Is the model in train mode, does it use torchdrop's "
            "layers, and was it called as the module that was given (a compiled model must be given as compiled)?",
            UserWarning,
            stacklevel=3,
        )

"""Seeds for a block of code, in one process or in many: `seeded`; and the states of PyTorch's generators."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .core.checks import check_integer
from .core.torch_state import without_transforms

States = tuple[Tensor, list[Tensor]]


def states() -> tuple[States, bytes]:
    """Returns the states of PyTorch's generators, and a digest of the CPU's."""
    with without_transforms():  # plain tensors, also under torch.func
        cpu = torch.get_rng_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return (cpu, cuda), hashlib.blake2b(ctypes.string_at(cpu.data_ptr(), cpu.numel()), digest_size=16).digest()


def put_back(states: States) -> None:
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


@contextmanager
def seeded(seed: int, rank: int | None = None) -> Iterator[None]:
    """Makes all draws inside the context follow from `seed` and `rank` alone, and changes no draw outside.

    PyTorch's default generators, the CPU's and those of all CUDA devices, start from a hash of (seed, rank), so that
    neighboring seeds and ranks have nothing in common; on leaving, also by an exception, they go on from where they
    were. This governs all that draws from them, torch.nn's layers and torchdrop's alike; a layer with a `generator` of
    its own follows that. Activation checkpointing finds its masks wherever backward runs, contexts nest, and compiled
    code draws what eager code draws, except that a torch.func.vmap within it has draws of its own. As a decorator
    (``@torchdrop.seeded(7)``) it begins anew with every call; it cannot decorate generators and coroutines, which run
    after it.

    Without it masks follow each process's own generator, as those of torch.nn do: processes that have all called
    torch.manual_seed with one number draw the same masks as long as they draw alike, and processes that have not
    draw masks of their own. So for each kind of parallelism:

    - Data-parallel processes (DistributedDataParallel, FSDP) see different samples and should draw different masks:
      ``seeded(seed)``, even if all have called torch.manual_seed with one number to get the same parameters.
    - Processes that hold parts of one tensor (`torchdrop.Shard`, DTensor), replicas of one tensor, or stacks that must
      skip the same layers (`torchdrop.LayerDrop`) have to draw the same: ``seeded(seed, rank=0)``, or with the rank
      within the data-parallel mesh, which is the same number for all of them, instead of 0.

    The context starts from the same state each time: in a training loop, enter it once around all steps, or give each
    step a seed of its own. Enter it outside of compiled functions, because inside it would break the graph. Threads
    share PyTorch's generators, so only one at a time can use it.

    Args:
        seed: any integer.
        rank: a number for this process, from 0 on; processes that give the same number draw the same. If None, the rank
            of this process in torch.distributed's default group on entering, and 0 if there is none.

    Raises:
        TypeError: `seed` or `rank` is no integer.
        ValueError: `rank` is negative.

    Warns:
        UserWarning: at the end, if CUDA was initialized inside: its generators did not exist on entering.

    Example:
        >>> import torch, torchdrop
        >>> layer, x = torchdrop.Dropout(0.5), torch.ones(100)
        >>> with torchdrop.seeded(7, rank=0):
        ...     y = layer(x)
        >>> with torchdrop.seeded(7, rank=1):
        ...     other = layer(x)
        >>> with torchdrop.seeded(7, rank=0):
        ...     again = layer(x)
        >>> torch.equal(y, again), torch.equal(y, other)
        (True, False)
    """
    check_integer("seed", seed)
    if rank is None:
        rank = _own_rank()
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an integer or None, got {type(rank).__name__}")
    if rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
    before, _ = states()
    cuda = torch.cuda.is_initialized()
    number = start(seed, f"rank {rank}")
    if cuda:
        torch.cuda.manual_seed_all(number)
    try:
        yield
    finally:
        put_back(before)
        if torch.cuda.is_initialized() and not cuda:
            warnings.warn(
                "seeded: CUDA was initialized inside the context, so what was drawn there does not follow from the "
                "seed. Enter the context after the model was moved there, or call torch.cuda.init() before",
                UserWarning,
                stacklevel=3,
            )


def _own_rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0

"""How much memory a call takes at its peak, and how much it keeps for backward.

PyTorch's hooks see what is saved through ``save_for_backward`` and nothing else, so they alone would not find a mask
that a node holds as an attribute. What is kept is therefore measured in three ways, and the largest counts.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

Map = Callable[[Tensor], Tensor]

_OPAQUE = (type, types.ModuleType, torch.nn.Module, logging.Logger, torch.device, torch.dtype, str, int, float, complex)


@dataclass(frozen=True)
class Saved:
    """Bytes kept for backward: as the hooks see them, as found in the graph, as held from PyTorch's allocator."""

    hooks: int
    graph: int
    live: int

    @property
    def largest(self) -> int:
        return max(self.hooks, self.graph, self.live)


def _storage(x: Tensor) -> tuple[int, int]:
    """Address and bytes of what x is a view of."""
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _seen_by_hooks(function: Map, x: Tensor) -> int:
    own = _storage(x)[0]
    sizes: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        if saved.device.type != "meta" and _storage(saved)[0] != own:
            sizes.update([_storage(saved)])
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        function(x)
    return sum(sizes.values())


def _slots(value: Any) -> Iterator[Any]:
    for kind in type(value).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            yield getattr(value, name, None)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _parts(value: Any) -> Iterable[Any]:
    """What a Python object holds, without its class, its module or a function's globals."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, types.FunctionType):
        return [*map(_content, value.__closure__ or ()), *(value.__defaults__ or ())]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    return [*getattr(value, "__dict__", {}).values(), *_slots(value)]


def _buffer_bytes(value: Any) -> int | None:
    """The size of bytes, bytearrays, arrays of any library and ctypes buffers; None for anything else."""
    try:
        return memoryview(value).nbytes
    except (TypeError, ValueError, BufferError):
        return None


def held_bytes(roots: Iterable[Any], excluded: Iterable[Tensor] = (), depth: int = 8) -> int:
    """Bytes of the tensors and buffers that can be reached from the objects, each storage once."""
    storages: dict[int, int] = {}
    buffers: dict[int, int] = {}
    skipped = {_storage(x)[0] for x in excluded}
    seen: set[int] = set()
    alive: list[Any] = []
    stack = [(root, depth) for root in roots]
    while stack:
        value, left = stack.pop()
        if value is None or id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen.add(id(value))
        alive.append(value)
        if isinstance(value, Tensor):
            if value.device.type != "meta" and _storage(value)[0] not in skipped:
                storages.update([_storage(value)])
            continue
        size = _buffer_bytes(value)
        if size is not None:
            buffers[id(value)] = size
        elif left:
            stack += [(part, left - 1) for part in _parts(value)]
    return sum(storages.values()) + sum(buffers.values())


def _nodes(root: Any) -> list[Any]:
    """The nodes of a graph, without the leaves' accumulators."""
    found: list[Any] = []
    stack = [root]
    while stack:
        node = stack.pop()
        if node is None or node in found or type(node).__name__ == "AccumulateGrad":
            continue
        found.append(node)
        stack += [following for following, _ in node.next_functions]
    return found


def _saved_by(node: Any) -> Iterator[Any]:
    for name in dir(node):
        if name == "saved_tensors" or name.startswith("_saved_"):
            yield getattr(node, name)
    yield getattr(node, "__dict__", {})


def graph_bytes(root: Any, excluded: Iterable[Tensor] = ()) -> int:
    """Bytes that the nodes of a graph hold, saved in the proper way or hidden in their attributes."""
    return held_bytes((part for node in _nodes(root) for part in _saved_by(node)), excluded)


@contextmanager
def _no_native_messages() -> Iterator[None]:
    """Nothing reaches standard error: the profiler writes two lines there each time it runs."""
    sys.stderr.flush()
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def changes(run: Callable[[], object]) -> list[int]:
    """Allocations and releases from PyTorch's CPU allocator in the order in which they happen, in bytes."""
    with (
        _no_native_messages(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof,
    ):
        result = run()
    del result
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def saved_bytes(function: Map, x: Tensor) -> Saved:
    """What stays alive for backward when the output is gone but its graph is not.

    x wants a gradient. It is not counted, and neither is what the module itself owns before the call.
    """

    def graph() -> GradientEdge:
        return get_gradient_edge(function(x))

    graph()
    gc.collect()
    edge = graph()
    hooks, held = _seen_by_hooks(function, x), graph_bytes(edge.node, [x])
    del edge
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(x.device)
        kept = graph()
        live = torch.cuda.memory_allocated(x.device) - before
        del kept
    else:
        live = sum(changes(graph))
    return Saved(hooks, held, live)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that PyTorch's allocator had given to one run at a time, beyond what it had given before."""
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    return highest(changes(run))


def highest(changed: Iterable[int]) -> int:
    """The most bytes out at a time, of allocations and releases in their order."""
    return max(itertools.accumulate(changed, initial=0))


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field}")


def peak_resident(run: Callable[[], object]) -> int | None:
    """The growth of the process's resident memory during one run, whoever allocates; None where Linux does not tell.

    What the C library holds in reserve is returned first, or a run could live on that and not grow at all.
    """
    run()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run()
        return _resident("VmHWM") - before
    except (OSError, AttributeError):
        return None

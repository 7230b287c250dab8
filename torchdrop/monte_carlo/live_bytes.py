"""The most memory that the tensors of a pass hold at once, as a dispatch mode sees it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core.torch_state import DispatchMode, elements, tree_flatten


class LiveBytes(DispatchMode):
    """The most bytes that tensors made within the context hold at once.

    Args:
        counting: whether tensors that are made now count.
    """

    def __init__(self, counting: Callable[[], bool]) -> None:
        super().__init__()
        self.peak: int = 0
        self._counting = counting
        self._live: dict[int, tuple[int, int]] = {}
        self._total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._counting():
            old = {_pointer(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)} - self._live.keys()
            for tensor in tree_flatten(out)[0]:
                if isinstance(tensor, Tensor) and _pointer(tensor) not in old:
                    self._hold(tensor)
            self.peak = max(self.peak, self._total)
        return out

    def _hold(self, tensor: Tensor) -> None:
        pointer, size = _pointer(tensor), elements(tensor).untyped_storage().nbytes()
        _, rate_sites = self._live.get(pointer, (0, 0))
        if not rate_sites:
            self._total += size
        self._live[pointer] = size, rate_sites + 1
        weakref.finalize(tensor, self._release, pointer)

    def _release(self, pointer: int) -> None:
        size, rate_sites = self._live.get(pointer, (0, 0))
        if rate_sites > 1:
            self._live[pointer] = size, rate_sites - 1
        elif rate_sites == 1:
            del self._live[pointer]
            self._total -= size


def _pointer(tensor: Tensor) -> int:
    return elements(tensor).untyped_storage().data_ptr()

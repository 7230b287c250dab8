"""The calls before the first random one run once: their results are kept, and returned in the passes that follow.

Up to there a forward is the same for all samples, call by call. A result that only the next call needed is not kept: an
empty tensor without memory takes its place, since the calls that would read it are not made again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.torch_state import tree_map


class PrefixChangedError(RuntimeError):
    """Raised if a pass does not begin with the calls that the first one began with."""


class _Kept:
    """A tensor of the prefix: held weakly until it is known whether the rest of the forward needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self._weak: Callable[[], Tensor | None] = weakref.ref(tensor)
        self._shape, self._dtype = tensor.shape, tensor.dtype
        self._version = -1
        self.value: Tensor | None = None

    def settle(self) -> None:
        tensor = self._weak()
        if tensor is None:
            self.value = torch.empty(self._shape, dtype=self._dtype, device="meta")
        else:
            self.value, self._version = tensor, -1 if tensor.is_inference() else tensor._version

    @property
    def written(self) -> bool:
        """Whether a pass has written to it since."""
        return self.value is not None and self._version >= 0 and self.value._version != self._version


class Prefix:
    """The calls of a forward before its first random one, for one batch of data. It is for use without autograd.

    Attributes:
        over: whether the calls that come are neither kept nor replaced, up to the end of the pass.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any]] = []
        self._tensors: list[_Kept] = []
        self._position = 0
        self._recording = True
        self._usable = True
        self.over: bool = False

    @property
    def tensors(self) -> int:
        """The number of tensors that they returned."""
        return len(self._tensors)

    @property
    def length(self) -> int:
        """The number of calls that are kept."""
        return 0 if self._recording else len(self._calls)

    def restart(self) -> None:
        """Begins a pass."""
        if self._recording and not self._calls:
            return
        self.end()
        if any(kept.written for kept in self._tensors):
            self.drop()
        self._position, self.over = 0, not self._calls

    def drop(self) -> None:
        """Makes all passes run as a whole from now on."""
        self._usable = False
        self._calls.clear()
        self._tensors.clear()
        self._position, self.over = 0, not self._recording

    def end(self) -> None:
        """Ends the prefix, at the first random call or at the end of the forward."""
        if self._recording:
            self._recording, self._position, self.over = False, len(self._calls), True
            for kept in self._tensors:
                kept.settle()
        elif self._usable and self._position < len(self._calls):
            self._position, self.over = len(self._calls), True
            raise PrefixChangedError("a pass met its first random call earlier than the first pass")

    def run(self, func: Any, call: Callable[[], Any]) -> Any:
        """Returns the result of a call, computed or kept."""
        if self._position < len(self._calls) and not self._recording:
            known, result = self._calls[self._position]
            if known != func:
                raise PrefixChangedError("a pass made other calls than the first one")
            self._position += 1
            self.over = self._position == len(self._calls)
            if type(result) is _Kept:  # most results are one tensor, and pytrees are slow
                return result.value
            return tree_map(lambda leaf: leaf.value if isinstance(leaf, _Kept) else leaf, result)
        out = call()
        if self._recording and self._usable:
            self._calls.append((func, self._keep(out) if type(out) is Tensor else tree_map(self._keep, out)))
        return out

    def _keep(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        kept = _Kept(leaf)
        self._tensors.append(kept)
        return kept

"""The private parts of Inductor, PyTorch's compiler, with which an operator becomes a part of generated kernels.

If a new version of torch moves one of them, operators are called as they are until this file changes. It imports
nothing of torchdrop.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch


class InductorGraph:
    """The graph that Inductor is compiling, for operators that are written as expressions of single elements.

    Attributes:
        ops: the operations on values of an element.
    """

    def __init__(self) -> None:
        from torch._inductor.virtualized import V, ops

        self.ops: Any = ops
        self._sizes: Any = V.graph.sizevars

    def _is_one(self, size: Any) -> bool:
        return bool(self._sizes.statically_known_equals(size, 1))

    def broadcasts(self, sizes: Sequence[Any], full: Sequence[Any]) -> bool:
        """Whether sizes are known to be the full ones, or 1."""
        return len(sizes) == len(full) and all(
            self._is_one(size) or self._sizes.statically_known_equals(size, whole)
            for size, whole in zip(sizes, full, strict=True)
        )

    def fits(self, sizes: Sequence[Any], limit: int) -> bool:
        """Whether there are known to be fewer than `limit` elements."""
        return bool(self._sizes.statically_known_lt(math.prod(sizes), limit))

    def place(self, sizes: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
        """Returns a function from the indices of an element to its place in a contiguous tensor of these sizes, to
        which it is broadcast."""
        from sympy import Integer  # type: ignore[import-untyped]

        steps = [0 if self._is_one(size) else math.prod(sizes[d + 1 :]) for d, size in enumerate(sizes)]

        def place(index: Sequence[Any]) -> Any:
            return sum((number * step for number, step in zip(index, steps, strict=True)), Integer(0))

        return place

    def elements(self, tensor: Any, dtype: torch.dtype) -> Callable[[Sequence[Any]], Any]:
        """Returns a function from the indices of an element to its value, for a tensor that is broadcast."""
        load, dims = tensor.make_loader(), len(tensor.get_size())
        ones = [self._is_one(size) for size in tensor.get_size()]

        def value(index: Sequence[Any]) -> Any:
            own = [number * 0 if one else number for number, one in zip(index[len(index) - dims :], ones, strict=True)]
            return self.ops.to_dtype(load(own), dtype)

        return value

    def numbers(self, tensor: Any) -> Callable[[int], Any]:
        """Returns a function that reads a number of a tensor with one dimension from memory."""
        from sympy import Integer

        tensor.realize()
        load = tensor.make_loader()
        return lambda number: load([Integer(number)])


_lowered: set[Any] = set()


def lower_in_inductor(operator: Any, expression: Callable[..., Any]) -> None:
    """Gives Inductor an expression for the elements of an operator's result, which is like the operator's first tensor.

    There is no public function for it. If Inductor is not loaded, or does not have what is needed, nothing happens, and
    the operator is called as it is.

    Args:
        operator: an overload of an operator.
        expression: called with an `InductorGraph` and the operator's arguments; it returns a function from the indices
            of an element to its value, or None if the operator is to be called.
    """
    module = sys.modules.get("torch._inductor.lowering")
    if module is None or operator in _lowered:
        return
    _lowered.add(operator)
    try:
        from torch._inductor.ir import Pointwise

        register, call = module.register_lowering, module.fallback_handler(operator, add_to_fallback_set=False)
    except (AttributeError, ImportError):
        return

    @register(operator, type_promotion_kind=None)
    def lowered(x: Any, *args: Any, **kwargs: Any) -> Any:
        graph = InductorGraph()
        element = expression(graph, x, *args, **kwargs)
        if element is None:
            return call(x, *args, **kwargs)
        dtype = x.get_dtype()
        return Pointwise.create(
            device=x.get_device(),
            dtype=dtype,
            inner_fn=lambda index: graph.ops.to_dtype(element(index), dtype),
            ranges=list(x.get_size()),
        )

"""The arguments of a model: the rows of data in them, some of the rows, and copies of them.

Tensors may be sparse or nested. A packed sequence and a graph of torch_geometric have no rows that could be taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.shard import is_dtensor
from .copies import deep_copy, is_opaque
from .structures import is_graph, is_packed, map_leaves, walk

_FLAT = frozenset((Tensor, type(None), bool, int, float, str))
"""Types of arguments in which there is nothing else."""

_BY_ELEMENTS = (torch.strided, torch.sparse_coo)
_BY_COORDINATES = (torch.sparse_csr, torch.sparse_csc)
"""Layouts whose rows are taken by way of the coordinates of the elements."""


class Inputs:
    """Arguments of a model, in which each tensor has the rows of data along one dimension.

    Args:
        args, kwargs: the arguments of a call of the model.
        dim: the dimension of the tensors that counts rows; None takes the inputs as one whole.

    Raises:
        TypeError: a nested tensor that is not jagged.

    Attributes:
        rows: the number of rows; None if the inputs are one whole, as when their tensors disagree, or there is a packed
            sequence, a graph, a DTensor, or a tensor in blocks among them.
        tensors: all tensors that have a dimension.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], dim: int | None) -> None:
        self.args = args
        self.kwargs: dict[str, Any] = dict(kwargs)
        values: list[Any] = [*self.args, *self.kwargs.values()]
        if not all(type(value) in _FLAT for value in values):
            values = [part for value in values for part in walk(value)]
        self._mutable = any(type(part) not in _FLAT and type(part) is not tuple for part in values)
        self.tensors: list[Tensor] = [t for t in values if isinstance(t, Tensor) and t.dim() > 0]
        if any(t.is_nested and t.layout is not torch.jagged for t in self.tensors):
            raise TypeError(
                "nested tensors must be jagged, which have a shape: make them by "
                "torch.nested.nested_tensor(..., layout=torch.jagged)"
            )
        self.device: torch.device = self.tensors[0].device if self.tensors else torch.device("cpu")
        self.dim: int | None = None
        self.rows: int | None = None
        if dim is not None and not any(is_packed(value) or is_graph(value) or _is_spread(value) for value in values):
            sizes = [_size(t, dim) for t in self.tensors]  # symbols, while a graph is traced, which have no hash
            if sizes and sizes[0] is not None and all(size == sizes[0] for size in sizes):
                self.dim, self.rows = dim, sizes[0]

    @classmethod
    def of(cls, inputs: Any, dim: int | None) -> Inputs:
        """Makes inputs from a tensor (the only argument), a tuple or list (positional ones) or a mapping (named
        ones)."""
        if isinstance(inputs, Mapping):
            return cls((), inputs, dim)
        if isinstance(inputs, (tuple, list)) and not is_packed(inputs):
            return cls(tuple(inputs), {}, dim)
        return cls((inputs,), {}, dim)

    def call(self, model: Callable[..., Any]) -> Any:
        """Returns the output of a model, or of one of its methods, for these arguments."""
        return model(*self.args, **self.kwargs)

    def _map(self, function: Any) -> Inputs:
        def of_leaf(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return function(leaf) if leaf.dim() > 0 else leaf
            return deep_copy(leaf, of_hidden) if is_opaque(leaf) else leaf

        def of_hidden(tensor: Tensor) -> Tensor:
            has_rows = self.rows is not None and tensor.dim() > 0 and _size(tensor, self.dim or 0) == self.rows
            own = tensor.detach().clone()
            return function(own) if has_rows else own

        args, kwargs = map_leaves(of_leaf, (self.args, self.kwargs))
        return Inputs(args, kwargs, self.dim)

    def first(self, rows: int) -> Inputs:
        """Returns so many rows, from the first on, and again from the first if there are fewer."""
        if not self.rows:
            return self.copy()
        return self._taken([row % self.rows for row in range(rows)])

    def part(self, first: int, count: int) -> Inputs:
        """Returns so many rows, from this one on. Where tensors are strided they share the memory of these."""
        if all(t.layout is torch.strided for t in self.tensors):
            return self._map(lambda t: t.narrow(self.dim, first, count))
        return self._taken(range(first, first + count))

    def _taken(self, rows: Sequence[int]) -> Inputs:
        """Returns these rows."""
        index = torch.tensor(rows, device=self.device)
        offsets: dict[int, Tensor] = {}  # nested tensors that share their lengths do so afterwards
        dim = self.dim or 0
        return self._map(lambda t: _jagged_rows(t, rows, offsets) if t.is_nested else _rows(t, dim, index.to(t.device)))

    def copy(self) -> Inputs:
        """Returns the same values in memory of their own."""
        return self._map(Tensor.clone)

    def fresh(self) -> Inputs:
        """Returns the same tensors in containers of their own, and copies of all other objects that a model may write
        to."""
        return self._map(lambda t: t) if self._mutable else self

    @property
    def versions(self) -> list[int]:
        """Returns a count for each tensor that rises when it is written to."""
        return [0 if t.is_inference() else t._version for t in self.tensors]

    def folded(self, copies: int) -> Inputs:
        """Returns all rows, then all rows again, for each copy."""
        if all(t.layout is torch.strided for t in self.tensors):
            return self._map(lambda t: torch.cat([t] * copies, self.dim or 0))
        return self._taken(list(range(self.rows or 0)) * copies)

    def to(self, device: torch.device) -> Inputs:
        return self._map(lambda t: t.to(device))


def valid_places(valid: str | Tensor | None, inputs: Inputs, first_row: int) -> Tensor | None:
    """Returns whether places of this batch's rows are reported, rows first: see `mc_predict`.

    Raises:
        ValueError: a name that no tensor among the named arguments has, or a tensor of too few rows.
        TypeError: something else than a name or a tensor.
    """
    if valid is None:
        return None
    if isinstance(valid, str):
        named = {name: value for name, value in inputs.kwargs.items() if isinstance(value, Tensor)}
        if valid not in named:
            listed = ", ".join(named) or "there are none"
            raise ValueError(f"valid must name a tensor among the model's named arguments ({listed}), got {valid!r}")
        return named[valid].movedim(inputs.dim or 0, 0) != 0
    if not isinstance(valid, Tensor):
        raise TypeError(f"valid must be the name of an argument, a tensor or None, got {type(valid).__name__}")
    if inputs.rows is None:
        return valid.to(inputs.device) != 0
    if valid.dim() == 0 or len(valid) < first_row + inputs.rows:
        raise ValueError(
            f"valid must have a row for each row of the inputs, got shape {tuple(valid.shape)} for row "
            f"{first_row + inputs.rows - 1}"
        )
    return valid[first_row : first_row + inputs.rows].to(inputs.device) != 0


def _size(tensor: Tensor, dim: int) -> int | None:
    """Returns the number of rows along a dimension; None if there are none that could be taken out."""
    if tensor.is_nested:
        return tensor.size(0) if dim == 0 and _is_jagged(tensor) else None
    served = tensor.layout in (*_BY_ELEMENTS, *_BY_COORDINATES)
    return tensor.shape[dim] if served and -tensor.dim() <= dim < tensor.dim() else None


def _is_spread(value: Any) -> bool:
    """Whether a value is a DTensor, whose rows may lie on several processes."""
    return type(value) is not Tensor and isinstance(value, Tensor) and is_dtensor(value)


def _is_jagged(tensor: Tensor) -> bool:
    """Whether the second dimension of a nested tensor is the one of many lengths, with nothing between rows."""
    return tensor.layout is torch.jagged and not isinstance(tensor.shape[1], int) and tensor.lengths() is None


def _rows(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    if tensor.layout in _BY_ELEMENTS:
        return tensor.index_select(dim, index)
    return tensor.to_sparse_coo().index_select(dim, index).to_sparse(layout=tensor.layout)


def _jagged_rows(tensor: Tensor, rows: Sequence[int], known: dict[int, Tensor]) -> Tensor:
    """Returns rows of a jagged tensor.

    Args:
        tensor: the tensor.
        rows: their numbers.
        known: the offsets of results, by the identity of those of the tensor.
    """
    parts, before = tensor.unbind(), tensor.offsets()  # type: ignore[attr-defined]
    chosen = [parts[row] for row in rows]
    lengths = list(map(len, chosen))
    if id(before) not in known:
        known[id(before)] = torch.tensor([0, *lengths], device=tensor.device).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(
        torch.cat(chosen), known[id(before)], min_seqlen=min(lengths), max_seqlen=max(lengths)
    )

"""The tensors in an argument of a model: in tuples, lists, mappings, dataclasses, packed sequences and graphs."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..core.torch_state import tree_flatten, tree_unflatten

_SIMPLE = (Tensor, type(None), bool, int, float, str)

Parts = tuple[list[Any], Callable[[list[Any]], Any]]
"""The items of a container, and a function that returns the same container with other items."""


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Returns a value with the function's results in the place of whatever is no container.

    Lists and dicts are copied, and other containers if something in them changes: dataclasses and graphs without
    running their constructors.

    Example:
        >>> map_leaves(lambda leaf: -leaf, {"a": 1, "b": (2, [3])})
        {'a': -1, 'b': (-2, [-3])}
    """
    parts = _take_apart(value)
    if parts is None:
        return function(value)
    items, rebuild = parts
    mapped = [map_leaves(function, item) for item in items]
    changed = any(new is not old for new, old in zip(mapped, items, strict=True))
    return rebuild(mapped) if changed or type(value) in (list, dict) else value


def walk(value: Any) -> Iterator[Any]:
    """Yields a value, and all that it contains.

    Example:
        >>> list(walk((1, [2])))
        [(1, [2]), 1, [2], 2]
    """
    yield value
    parts = _take_apart(value)
    for item in () if parts is None else parts[0]:
        yield from walk(item)


def is_packed(value: Any) -> bool:
    """Whether a value is a packed sequence."""
    return isinstance(value, PackedSequence)


def is_graph(value: Any) -> bool:
    """Whether a value is a graph, or a batch of graphs, of torch_geometric."""
    graphs = sys.modules.get("torch_geometric.data.data")
    return graphs is not None and isinstance(value, graphs.BaseData)


def is_record(value: Any) -> bool:
    """Whether a value has fields that belong together: a dataclass, a packed sequence or a graph.

    Example:
        >>> is_record((1, 2)), is_record(dataclasses.make_dataclass("Point", ["x"])(1))
        (False, True)
    """
    return dataclasses.is_dataclass(value) or is_packed(value) or is_graph(value)


def _take_apart(value: Any) -> Parts | None:
    """Returns the items of a container; None if the value is none."""
    if isinstance(value, _SIMPLE):
        return None
    kind = type(value)
    if kind is tuple or kind is list:
        return list(value), kind
    if is_packed(value):  # its batch sizes stay on the CPU
        moved = ("data", "sorted_indices", "unsorted_indices")
        return [getattr(value, name) for name in moved], lambda items: value._replace(
            **dict(zip(moved, items, strict=True))
        )
    if isinstance(value, tuple):
        return list(value), getattr(kind, "_make", kind)
    if isinstance(value, MutableMapping):
        return list(value.values()), lambda items: _with_items(value, zip(value, items, strict=True))
    if isinstance(value, list):
        return list(value), lambda items: _with_items(value, enumerate(items))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return [getattr(value, name) for name in names], lambda items: _with_fields(value, names, items)
    if is_graph(value):
        return _graph(value)
    leaves, spec = tree_flatten(value)  # a class that was registered with PyTorch
    return None if len(leaves) == 1 and leaves[0] is value else (leaves, lambda items: tree_unflatten(items, spec))


def _with_items(value: Any, items: Iterable[tuple[Any, Any]]) -> Any:
    new = copy.copy(value)
    for key, item in items:
        new[key] = item
    return new


def _with_fields(value: Any, names: list[str], items: list[Any]) -> Any:
    new = copy.copy(value)
    for name, item in zip(names, items, strict=True):
        object.__setattr__(new, name, item)
    return new


def _graph(value: Any) -> Parts:
    items: list[Any] = []

    def note(item: Any) -> Any:
        items.append(item)
        return item

    copy.copy(value).apply(note)

    def rebuild(others: list[Any]) -> Any:
        rest = iter(others)
        return copy.copy(value).apply(lambda _: next(rest))

    return items, rebuild

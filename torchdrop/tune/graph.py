"""A traced step made leaner: without operations that change nothing, and with memory of its own for its results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_aten = torch.ops.aten

_SAME = {
    _aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.expand.default, _aten.permute.default,
    _aten.detach.default, _aten.alias.default,
}  # fmt: skip
"""Operations that return their input if shape and strides are the same."""

_VIEWS = {_aten.view.default, _aten._unsafe_view.default, _aten.permute.default, _aten.transpose.int}


def lean(graph: GraphModule) -> GraphModule:
    """Makes the graph leaner in place, with the same function. One that writes to its inputs is left alone."""
    nodes = list(graph.graph.nodes)
    if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in nodes):
        return graph
    for node in nodes:
        if node.op == "call_function" and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    _keep_results(graph)
    graph.recompile()
    return graph


def _changes_nothing(node: Node) -> bool:
    if node.target is _aten.mul.Scalar:
        factor = node.args[1]
        return isinstance(factor, (int, float)) and factor == 1 and _alike(node)
    return node.target in _SAME and _alike(node)


def _alike(node: Node) -> bool:
    """Whether a node's result has the shape, strides and dtype of its first argument."""
    first = node.args[0]
    now, before = node.meta.get("val"), first.meta.get("val") if isinstance(first, Node) else None
    if not isinstance(now, Tensor) or not isinstance(before, Tensor):
        return False
    return (now.shape, now.stride(), now.dtype) == (before.shape, before.stride(), before.dtype)


def _keep_results(graph: GraphModule) -> None:
    """Makes products that are returned go to their memory from the last step: new memory costs page faults."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    for number, node in enumerate(_returned(output.args)):
        while node.target in _VIEWS and isinstance(node.args[0], Node):
            node = node.args[0]
        value: Any = node.meta.get("val")
        if node.target is not _aten.bmm.default or not isinstance(value, Tensor):
            continue
        name = f"_result{number}"
        graph.register_buffer(name, torch.empty(value.shape, dtype=value.dtype, device=value.device), persistent=False)
        with graph.graph.inserting_before(node):
            memory = graph.graph.get_attr(name)
        node.target, node.kwargs = _aten.bmm.out, {"out": memory}


def _returned(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _returned(one)

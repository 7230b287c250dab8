"""Edges of a graph as a tensor of two rows: their checks, and a draw for each pair of nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import sites
from ...core.inputs import check_input
from ...core.torch_state import is_compiling, transforms_active
from ...kernels.mask_params import ONE
from ...ops import random_bits as numbers


def check_edges(edge_index: Any, edge_weight: Any, num_nodes: int | None) -> None:
    """Refuses edges that are no pairs of nodes' numbers, and weights that are not one for each of them.

    Raises:
        TypeError, ValueError: edges or weights are refused.
    """
    if not isinstance(edge_index, Tensor):
        raise TypeError(f"edge_index must be a tensor of shape (2, edges), got {type(edge_index).__name__}")
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"edge_index must hold integers, int64 or int32, got {edge_index.dtype}")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have the shape (2, edges), got {tuple(edge_index.shape)}")
    if edge_weight is not None:
        if not isinstance(edge_weight, Tensor):
            raise TypeError(
                f"edge_weight must be a tensor or None, got {type(edge_weight).__name__}: the rate comes after it"
            )
        check_input(edge_weight, "drop_edge")
        if edge_weight.dim() < 1 or edge_weight.shape[0] != edge_index.shape[1]:
            raise ValueError(
                f"edge_weight must have an entry for each of the {edge_index.shape[1]} edges, got "
                f"{tuple(edge_weight.shape)}"
            )
    if not edge_index.is_cpu or is_compiling() or transforms_active() or not edge_index.numel():
        return
    low, high = (int(end) for end in edge_index.aminmax())
    if low < 0 or high >= (ONE if num_nodes is None else num_nodes):
        most, wrong = "2**32" if num_nodes is None else f"num_nodes={num_nodes}", low if low < 0 else high
        raise ValueError(f"edge_index must hold numbers of nodes, from 0 and below {most}, got {wrong}")


def bits_of_pairs(edge_index: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws an integer in [0, 2**32) for each edge, the same for (i, j) and (j, i): 128 bits are drawn and are the key,
    under which each pair has a stream of its own."""
    high, low, top, bottom = sites.random_bits(edge_index, (4,), generator).unbind(-1)
    source, target = edge_index.to(torch.int64).unbind(0)
    pair = torch.minimum(source, target) << 32 ^ torch.maximum(source, target)
    stream = (top << 32 | bottom) ^ pair
    return numbers.random_bits(torch.stack([(high << 32 | low).expand_as(stream), stream], -1), ())

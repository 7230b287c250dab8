"""Dropout on graphs, as plain tensors: of edges, of nodes and of messages.

With A the (weighted) adjacency matrix and x the nodes' features, a layer sums ``A_ij x_j`` over the neighbors j of i.
Each of the three masks a part of that and divides it by the keep probability k, so that the expectation of the sum is
the sum without dropout:

    drop_edge      A_ij m_ij / k        one m for each edge, or one for both directions of an undirected edge
    drop_node      x_j m_j / k          one m for each node
    drop_message   (A_ij x_j) m_ij / k  one m for each element of the message matrix

Numbers that a layer computes from the edges, such as the degrees that GCN divides by, change with the kept edges: then
only the sum keeps its expectation, not the divisor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Proxy

from ...core import sites
from ...core.inputs import check_input
from ...core.rate import DEFAULT_P, InplaceRated, Probability, Rate, Rated, as_rate
from ...core.symbolic import holds_proxy, leaf, recorded
from ...core.torch_state import transforms_active
from ...kernels.mask_params import MaskParams, keeps_all
from ...kernels.masking import COMPUTE_DTYPE, unpack_params
from ...ops import operators
from .edges import bits_of_pairs, check_edges


def _drop_edges(
    edge_index: Tensor,
    edge_weight: Tensor | None,
    num_nodes: int | None,
    training: bool,
    rate: Rate,
    undirected: bool,
    keep_self_loops: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor | None, Tensor]:
    """Returns bools of the edges that are kept (None for all), and the weights of all edges, 0 where dropped."""
    check_edges(edge_index, edge_weight, num_nodes)
    shape = (edge_index.shape[1],)
    weight = torch.ones(shape, device=edge_index.device) if edge_weight is None else edge_weight
    if not sites.is_on(training):
        return None, weight
    params = rate.params_for(shape)
    kept = _kept_edges(edge_index, params, undirected, generator)
    if kept is None:
        return None, weight
    dtype = COMPUTE_DTYPE[weight.dtype]
    scale = unpack_params(params, weight.device)[1]
    if keep_self_loops:
        loops = edge_index[0] == edge_index[1]
        kept, scale = kept | loops, torch.where(loops, torch.ones((), dtype=dtype, device=weight.device), scale)
    each = (-1, *[1] * (weight.dim() - 1))
    if isinstance(scale, Tensor):
        scale = scale.to(dtype).reshape(each if scale.dim() else ())
    return kept, torch.where(kept.reshape(each), weight.to(dtype) * scale, 0.0).to(weight.dtype)


def _kept_edges(
    edge_index: Tensor, params: MaskParams | Tensor, undirected: bool, generator: torch.Generator | None
) -> Tensor | None:
    if not undirected:
        return sites.keep_mask(edge_index, params, (edge_index.shape[1],), generator)
    every = keeps_all(params)
    if every and transforms_active():
        return None
    bits = bits_of_pairs(edge_index, generator)
    return None if every else bits < unpack_params(params, edge_index.device)[0]


def _remove_edges(edge_index: Tensor, kept: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (edge_index, weight) if kept is None else (edge_index[:, kept], weight[kept])


def drop_edge_weight(
    edge_index: Tensor,
    edge_weight: Tensor | None = None,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    undirected: bool = False,
    keep_self_loops: bool = False,
    num_nodes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Does what `drop_edge` does, but leaves dropped edges in the graph, with the weight 0.

    The number of edges does not change, so that it works under torch.compile(fullgraph=True) and torch.func.vmap. With
    equal seeds the same edges are dropped as by `drop_edge`, whose arguments and exceptions these are.

    Returns:
        Weights of the shape of `edge_weight`, or (edges,): w m / k. In eval mode and with k = 1, `edge_weight` itself,
        or ones.

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop.functional import drop_edge_weight
        >>> edge_index = torch.tensor([[0, 1, 1, 2, 2, 2], [1, 0, 2, 1, 0, 2]])
        >>> weight = drop_edge_weight(edge_index, p=0.5, undirected=True)
        >>> set(weight.tolist()) <= {0.0, 2.0}, weight[0] == weight[1], weight[2] == weight[3]
        (True, tensor(True), tensor(True))
    """
    if holds_proxy(edge_index, edge_weight):
        return recorded(drop_edge_weight, locals())
    rate = as_rate(p, keep_prob)
    return _drop_edges(edge_index, edge_weight, num_nodes, training, rate, undirected, keep_self_loops, generator)[1]


def drop_edge(
    edge_index: Tensor,
    edge_weight: Tensor | None = None,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    undirected: bool = False,
    keep_self_loops: bool = False,
    num_nodes: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Removes edges of a graph, each with probability p, and divides the weights of the others by k = 1 - p.

    ``w_ij -> w_ij m_ij / k``: the expectation of a sum over neighbors, weighted by w, is the sum over all of them.
    The published form takes only the first output: a layer that normalizes by the edges that are left, as
    torch_geometric's GCNConv does. Edges are neither added nor reordered, and each self-loop occurs once.

    Args:
        edge_index: (2, edges), int64 or int32: the source and the target node of each edge.
        edge_weight: (edges,) or (edges, ...); ones if None.
        p: probability of dropping an edge, in [0, 1]. Default: 0.5.
        training: whether edges are dropped.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor with one for each edge.
        undirected: whether (i, j) and (j, i), and repeated edges, are dropped together. An edge's mask then follows
            from its nodes, not from its place in the list.
        keep_self_loops: whether the edges (i, i) always stay, with the weight they have.
        num_nodes: if given, the nodes' numbers are compared with it (on the CPU, and not in compiled code).
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        The edges that are left and their weights. In eval mode and with k = 1, `edge_index` itself, and `edge_weight`
        itself or ones. The number of edges depends on the draw: `drop_edge_weight` keeps it, for compiled code.

    Raises:
        ValueError: a rate outside [0, 1]; an `edge_index` of another shape, or with numbers that no node has; an
            `edge_weight` of another length.
        TypeError: an `edge_index` that does not hold integers; both names of the rate, or neither.

    References:
        Rong et al., "DropEdge", ICLR 2020 (arXiv:1907.10903).

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop.functional import drop_edge
        >>> edge_index = torch.tensor([[0, 1, 1, 2, 2, 2], [1, 0, 2, 1, 0, 2]])
        >>> fewer, weight = drop_edge(edge_index, p=0.5, undirected=True, keep_self_loops=True)
        >>> fewer[:, -1], weight[-1]
        (tensor([2, 2]), tensor(1.))
    """
    if holds_proxy(edge_index, edge_weight):
        return recorded(drop_edge, locals())
    rate = as_rate(p, keep_prob)
    return _remove_edges(
        edge_index,
        *_drop_edges(edge_index, edge_weight, num_nodes, training, rate, undirected, keep_self_loops, generator),
    )


class DropEdge(Rated):
    """Module of `drop_edge`: the edges that are left and their weights; `edge_weight` is for `drop_edge_weight`.

    Args:
        p: probability of dropping an edge, in [0, 1]. Default: 0.5.
        keep_prob: probability of keeping, in place of `p`.
        undirected: whether (i, j) and (j, i) are dropped together.
        keep_self_loops: whether the edges (i, i) always stay.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop import DropEdge
        >>> layer = DropEdge(0.5, undirected=True)
        >>> x, edge_index = torch.ones(3, 4), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> (source, target), weight = layer(edge_index)
        >>> torch.zeros(3, 4).index_add(0, target, weight[:, None] * x[source]).shape
        torch.Size([3, 4])
        >>> layer.edge_weight(edge_index).shape
        torch.Size([4])
        >>> layer.eval()(edge_index)[0] is edge_index
        True
    """

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        *,
        keep_prob: Probability | None = None,
        undirected: bool = False,
        keep_self_loops: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, keep_prob=keep_prob, generator=generator)
        self.undirected = undirected
        self.keep_self_loops = keep_self_loops

    @leaf
    def forward(self, edge_index: Tensor, edge_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return drop_edge(
            edge_index, edge_weight, self.rate, self.training, undirected=self.undirected,
            keep_self_loops=self.keep_self_loops, generator=self.generator,
        )  # fmt: skip

    def edge_weight(self, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Returns `drop_edge_weight` at this layer's rate and mode: weights of all edges, 0 where dropped. In Monte
        Carlo inference the draw belongs to the module that calls this."""
        return drop_edge_weight(
            edge_index, edge_weight, self.rate, self.training, undirected=self.undirected,
            keep_self_loops=self.keep_self_loops, generator=self.generator,
        )  # fmt: skip

    def extra_repr(self) -> str:
        rate = super().extra_repr()
        return f"{rate}, undirected={self.undirected}, keep_self_loops={self.keep_self_loops}"


def _drop_features(
    name: str, input: Tensor, rate: Rate, training: bool, inplace: bool, generator: torch.Generator | None
) -> Tensor:
    if not (training or sites.is_on(training)):
        return input
    check_input(input, name)
    rows = name == "drop_node"
    if input.dim() < 2 - rows:
        expected = "features of shape (nodes, ...)" if rows else "messages of shape (edges, features, ...)"
        raise ValueError(f"{name} takes {expected}, got a {input.dim()}-D tensor")
    shape = (input.shape[0], *[1] * (input.dim() - 1)) if rows else input.shape
    return sites.apply(operators.masked, input, rate.params_for(shape), shape, inplace, generator)


def drop_node(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Zeroes the features of whole nodes, each with probability p, and divides the others by k = 1 - p.

    ``y_i = x_i m_i / k`` with one m_i for each node: E[y] = x, so the expectation of any sum over neighbors is kept.
    With k = 1 and in eval mode the input itself is returned; with k = 0 the output is 0.

    Args:
        input: features, (nodes, ...).
        p: probability of dropping a node, in [0, 1]. Default: 0.5.
        training: whether nodes are dropped.
        inplace: whether the result is written into `input`.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against (nodes, 1).
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the input's shape and dtype; the input itself in eval mode, with k = 1 and in place.

    Raises:
        ValueError: a rate outside [0, 1], or a 0-D input.
        TypeError, RuntimeError: as `dropout`.

    References:
        Fang et al., "DropMessage", AAAI 2023 (arXiv:2204.10037), which compares the three on graphs.

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop.functional import drop_node
        >>> y = drop_node(torch.ones(9, 4), 0.5)
        >>> torch.equal(y, y[:, :1].expand(9, 4))
        True
    """
    if isinstance(input, Proxy):
        return recorded(drop_node, locals())
    return _drop_features("drop_node", input, as_rate(p, keep_prob), training, inplace, generator)


class DropNode(InplaceRated):
    """Module of `drop_node`: rows of x m / k in training, the input itself in eval mode.

    Args:
        p: probability of dropping a node, in [0, 1]. Default: 0.5.
        inplace: whether the result is written into the input.
        keep_prob: probability of keeping, in place of `p`.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop import DropNode
        >>> y = DropNode(0.5)(torch.ones(9, 4))
        >>> torch.equal(y, y[:, :1].expand(9, 4))
        True
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return drop_node(input, self.rate, self.training, self.inplace, generator=self.generator)


def drop_message(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops elements of the message matrix: the messages of edges before they are summed at their target nodes.

    ``y = x m / k`` element by element, k = 1 - p: inverted dropout of messages instead of features, so that a node
    sends different parts of its features to different neighbors. E[y] = x, so the expectation of the sum over
    neighbors is kept. With k = 1 and in eval mode the input itself is returned; with k = 0 the output is 0.

    Args:
        input: messages, (edges, features) or (edges, heads, features).
        p: probability of dropping an element, in [0, 1]. Default: 0.5.
        training: whether elements are dropped.
        inplace: whether the result is written into `input`.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the input.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the input's shape and dtype; the input itself in eval mode, with k = 1 and in place.

    Raises:
        ValueError: a rate outside [0, 1], or an input of fewer than 2 dimensions.
        TypeError, RuntimeError: as `dropout`.

    References:
        Fang et al., "DropMessage", AAAI 2023 (arXiv:2204.10037).

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop.functional import drop_message
        >>> x, (source, target) = torch.ones(3, 4), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> torch.zeros(3, 4).index_add(0, target, drop_message(x[source], 0.5)).shape
        torch.Size([3, 4])
    """
    if isinstance(input, Proxy):
        return recorded(drop_message, locals())
    return _drop_features("drop_message", input, as_rate(p, keep_prob), training, inplace, generator)


class DropMessage(InplaceRated):
    """Module of `drop_message`: messages m / k in training, the input itself in eval mode.

    A layer of torch_geometric calls it from a hook; as a part of the model it has a name and a mode:

        model.drop = DropMessage(0.2)
        conv.register_message_forward_hook(lambda conv, inputs, messages: model.drop(messages))

    Args:
        p: probability of dropping an element, in [0, 1]. Default: 0.5.
        inplace: whether the result is written into the input.
        keep_prob: probability of keeping, in place of `p`.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Example:
        >>> import torch, torchdrop
        >>> from torchdrop import DropMessage
        >>> DropMessage(0.5)(torch.ones(100, 4)).unique()
        tensor([0., 2.])
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return drop_message(input, self.rate, self.training, self.inplace, generator=self.generator)

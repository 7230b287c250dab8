"""Compiled samples: the passes of a chunk of samples, and their statistics, as one function of torch.compile.

The calls of a chunk are recorded once (`torch.fx.experimental.proxy_tensor.make_fx`), with the masks' operators among
them. The numbers of samples and rows are inputs of the recording, and parameters are read where they are, so that it
serves all chunks of one size, whatever the weights. It is made for each shape of inputs. Rows are filled up to a power
of two where rows do not depend on each other, so that requests of any size need few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ..core.torch_state import below_autograd, compile_graph, tree_flatten, tree_unflatten
from .inputs import Inputs
from .sample import Chunk, Outputs, Sampler

MOST = 16
"""The most functions that are compiled for one predictor."""

Results = Any
"""Tensors with rows first, in containers: they are made of the outputs."""

_PLAIN = (type(None), bool, int, float, str)


class NotCompiledError(Exception):
    """Raised where samples are not compiled. The message says why."""


class CompiledSampler:
    """Runs chunks of samples as compiled functions.

    Args:
        sampler: runs samples without compilation.
        rows_first: returns outputs with samples and then rows in front.

    Attributes:
        tried: whether a chunk has been run, or could not be.
        said: why chunks were not compiled, if any was not.
    """

    def __init__(self, sampler: Sampler, rows_first: Callable[[Outputs], Outputs]) -> None:
        self._sampler, self._rows_first = sampler, rows_first
        self._functions: dict[Any, _Function] = {}
        self._reason = ""
        self.said: list[str] = []
        self.tried: bool = False

    def run(
        self,
        strategy: str,
        inputs: Inputs,
        samples: Sequence[int],
        first_row: int,
        fill: bool,
        results: Callable[[Outputs, Sequence[int]], Results] | None = None,
    ) -> tuple[Outputs, Results] | None:
        """Returns the outputs of these samples with samples and rows in front, and what a function makes of them.

        Args:
            strategy, inputs, samples, first_row: as in `Sampler.run`.
            fill: whether rows may be added.
            results: the function of the outputs, which is compiled, too; None for none.

        Returns:
            None where it is not compiled. `said` has the reason.
        """
        self.tried = True
        rows = inputs.rows
        size = 1 << (rows - 1).bit_length() if fill and rows else rows
        try:
            filled = inputs if size == rows else inputs.first(size or 1)
            outputs, found = self._run(strategy, filled, samples, first_row, results)
        except NotCompiledError as error:
            said = f"samples are run without compilation, because {error}"
            if said not in self.said:
                self.said.append(said)
                self._sampler.note(f"Not compiled: {error}")
            return None
        if size == rows or not rows or not size:
            return outputs, found
        leaves, spec = tree_flatten(found)
        outputs = tuple(out.narrow(1, 0, out.shape[1] // size * rows) for out in outputs)
        taken = [
            leaf[: len(leaf) // size * rows] if isinstance(leaf, Tensor) and leaf.dim() else leaf for leaf in leaves
        ]
        return outputs, tree_unflatten(taken, spec)

    def _run(
        self,
        strategy: str,
        inputs: Inputs,
        samples: Sequence[int],
        first_row: int,
        results: Callable[[Outputs, Sequence[int]], Results] | None,
    ) -> tuple[Outputs, Results]:
        leaves, spec = tree_flatten((inputs.args, inputs.kwargs))
        leaves = [_dense(leaf) for leaf in leaves]
        key = (
            strategy,
            len(samples),
            results is not None,
            spec,
            tuple(_described(leaf) for leaf in leaves),
            torch.is_autocast_enabled(inputs.device.type) and torch.get_autocast_dtype(inputs.device.type),
        )
        function = self._functions.get(key)
        chunk = self._sampler.chunk(samples, inputs.device)
        if function is None:
            reason = self._reason or self._sampler.not_recorded(strategy)
            if len(self._functions) == MOST:
                reason = f"{MOST} shapes of inputs have been compiled, and no more are"
            if reason:
                raise NotCompiledError(reason)
            function = _Function(self._sampler, strategy, leaves, spec, inputs.dim, samples, self._rows_first, results)
            try:
                function.compile(chunk, leaves, inputs)
            except NotCompiledError as error:
                self._reason = str(error)  # other shapes are not tried, which would take as long each time
                raise
            self._functions[key] = function
        return function(chunk, first_row, leaves)


class _Function:
    """The compiled function of chunks of one size, for inputs of one shape."""

    def __init__(
        self,
        sampler: Sampler,
        strategy: str,
        leaves: Sequence[Any],
        spec: Any,
        dim: int | None,
        samples: Sequence[int],
        rows_first: Callable[[Outputs], Outputs],
        results: Callable[[Outputs, Sequence[int]], Results] | None,
    ) -> None:
        self._sampler, self._strategy, self._rows_first = sampler, strategy, rows_first
        self._places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._spec: Any = None
        self._constants: list[Tensor] = []
        self._compiled: Callable[..., Any] | None = None

        def recorded(first_row: Tensor, numbers: Tensor, *tensors: Tensor) -> list[Tensor]:
            offsets = tensors[0] if len(tensors) > len(self._places) else None
            values = list(leaves)
            for place, tensor in zip(reversed(self._places), reversed(tensors), strict=False):
                values[place] = tensor
            args, kwargs = tree_unflatten(values, spec)
            chunk = Chunk(samples, numbers, offsets)
            outputs = rows_first(sampler.run(strategy, Inputs(args, kwargs, dim), samples, first_row, chunk))
            flat, self._spec = tree_flatten((outputs, None if results is None else results(outputs, samples)))
            return flat

        self._recorded = recorded

    def compile(self, chunk: Chunk, leaves: Sequence[Any], inputs: Inputs) -> None:
        """Compiles, and compares the outputs of other samples and rows with those that are not compiled.

        Raises:
            NotCompiledError: it cannot be compiled, or the outputs differ.
        """
        arguments = self._arguments(chunk, 0, leaves)
        samples, first_row = [sample + len(chunk.samples) for sample in chunk.samples], 5
        other = self._sampler.chunk(samples, inputs.device)
        try:
            graph = make_fx(self._recorded)(*arguments)
            self._constants = _lifted(graph)
            self._compiled = compile_graph(graph, [*self._constants, *arguments])
            outputs, _ = self(other, first_row, leaves)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            raise NotCompiledError(f"{type(error).__name__}: {lines[0][:200]}") from error
        expected = self._rows_first(self._sampler.run(self._strategy, inputs, samples, first_row, other))
        if not all(_equal(one, two) for one, two in zip(outputs, expected, strict=True)):
            raise NotCompiledError("the compiled outputs differ from those that are not compiled")

    def __call__(self, chunk: Chunk, first_row: int, leaves: Sequence[Any]) -> tuple[Outputs, Results]:
        assert self._compiled is not None
        arguments = self._arguments(chunk, first_row, leaves)
        with below_autograd():
            flat = self._compiled(*self._constants, *arguments)
        return tree_unflatten(list(flat), self._spec)

    def _arguments(self, chunk: Chunk, first_row: int, leaves: Sequence[Any]) -> list[Any]:
        first = torch.tensor(first_row, device=chunk.numbers.device)
        offsets = [] if chunk.offsets is None else [chunk.offsets]
        return [first, chunk.numbers, *offsets, *(leaves[place] for place in self._places)]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are equal up to rounding, in relation to the largest."""
    epsilon = torch.finfo(other.dtype).eps if other.is_floating_point() else 0.0
    largest = other.abs().max() if other.numel() else 0.0
    return one.shape == other.shape and bool(((one - other).abs() <= max(1e-4, 8 * epsilon) * largest).all())


def _lifted(graph: GraphModule) -> list[Tensor]:
    """Makes first inputs of the tensors that a recording has met, as parameters, and returns them. So they are read
    anew in each call, and nothing is computed from them in advance."""
    found = [node for node in graph.graph.nodes if node.op == "get_attr"]
    tensors: dict[str, Tensor] = {node.target: getattr(graph, node.target) for node in found}
    first = next(iter(graph.graph.nodes))
    with graph.graph.inserting_before(first):
        inputs = {target: graph.graph.placeholder(f"constant{number}") for number, target in enumerate(tensors)}
    for node in found:
        node.replace_all_uses_with(inputs[node.target])
        graph.graph.erase_node(node)
    graph.recompile()
    return list(tensors.values())


_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def _format(tensor: Tensor) -> int | None:
    """Returns the first memory format that a strided tensor has, as a place in `_FORMATS`; None if it has none."""
    ranks = (tensor.dim(), 4, 5)
    fitting = (place for place, rank in enumerate(ranks) if rank == tensor.dim())
    return next((place for place in fitting if tensor.is_contiguous(memory_format=_FORMATS[place])), None)


def _dense(leaf: Any) -> Any:
    """Returns a tensor without gaps, so that requests with other strides need no other function."""
    return (
        leaf.contiguous() if type(leaf) is Tensor and leaf.layout is torch.strided and _format(leaf) is None else leaf
    )


def _described(leaf: Any) -> Any:
    """Returns what of an argument a recording is for.

    Raises:
        NotCompiledError: it is an object of which that is not known.
    """
    if type(leaf) is Tensor and leaf.layout is torch.strided:
        return leaf.shape, _format(leaf), leaf.dtype, leaf.device
    if type(leaf) in _PLAIN:
        return type(leaf), leaf
    raise NotCompiledError(f"an argument is a {type(leaf).__name__}, which is not compiled")

"""Skipping whole layers of a stack: `LayerDrop`.

With m_l ~ Bernoulli(k), one for each layer l of the stack, independently, in training

    x_l = f_l(x_{l-1})  where m_l = 1,   x_{l-1}  where m_l = 0

without scaling: stacks of every depth are trained, so that layers can be removed later.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..core import portable, sites
from ..core.checks import check_bool, check_integer
from ..core.rate import DEFAULT_P, Probability, Rated
from ..core.symbolic import recorded
from ..core.torch_state import fx_tracing, is_batched, is_compiling, transforms_active


def _all_modules(layers: Iterable[nn.Module]) -> Iterable[nn.Module]:
    """Returns the modules of an iterable, none of which is skipped."""
    return layers._modules.values() if isinstance(layers, LayerDrop) else layers


class _Selected:
    """A layer that always runs, but whose output is taken only where it is kept."""

    def __init__(self, layer: nn.Module, kept: Tensor) -> None:
        self.layer, self.kept = layer, kept

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not args:
            raise TypeError(
                "LayerDrop with keep_graph=True gives a dropped layer's first argument in the place of its output: "
                f"give it by position, got {', '.join(kwargs) or 'none'} for {type(self.layer).__name__}"
            )
        input, output = args[0], self.layer(*args, **kwargs)
        if not isinstance(input, Tensor) or not isinstance(output, Tensor):
            raise TypeError(
                "LayerDrop with keep_graph=True gives a dropped layer's first argument in the place of its output, so "
                f"both must be tensors, got {type(input).__name__} and {type(output).__name__} from "
                f"{type(self.layer).__name__}: use keep_graph=False, or let the layer return a tensor"
            )
        if output.shape != input.shape:
            raise ValueError(
                "LayerDrop with keep_graph=True gives a dropped layer's first argument in the place of its output, so "
                f"both must have one shape, got {tuple(input.shape)} and {tuple(output.shape)} from "
                f"{type(self.layer).__name__}"
            )
        return torch.where(self.kept.to(input.device), output, input)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _Traced:
    """A layer in a symbolic trace, whose output is taken where a run of the graph keeps it."""

    def __init__(self, layer: nn.Module, stack: LayerDrop, at: int, drawn: list[Any]) -> None:
        self.layer, self.stack, self.at, self.drawn = layer, stack, at, drawn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], Proxy):
            return self.layer(*args, **kwargs)
        input: Any = args[0]
        output = self.layer(*args, **kwargs)
        if not self.drawn:
            self.drawn.append(recorded(kept_layers, {"stack": self.stack}, input.tracer))
        return torch.where(self.drawn[0][self.at].to(input.device), output, input)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def kept_layers(stack: LayerDrop) -> Tensor:
    """Returns bools of the layers of a stack that stay in this call, all True in eval mode."""
    drawn = stack._draw()
    return torch.ones(len(stack), dtype=torch.bool, device="cpu") if drawn is None else drawn


class LayerDrop(Rated, nn.ModuleList):
    """A torch.nn.ModuleList that skips layers when it is iterated over in training.

    Each time it is iterated over (``for layer in layers``, ``list(layers)``, ``nn.Sequential(*layers)``), each layer is
    left out with probability p, independently: the number that is left out is binomial. Nothing is scaled. In eval mode
    it yields all layers. Only iteration skips: indexing, slicing, ``len``, ``in``, ``reversed``, ``+``, ``children()``
    and the state_dict are those of a ModuleList, with the same keys, so that it can replace a ModuleList and
    checkpoints load in both directions. A slice is a LayerDrop of the same rate. With p = 1 all layers are left out.

    By default a dropped layer does not run: that saves its time, and its parameters get no gradient (None). Python code
    decides this, so a compiled model has a graph break there, and DistributedDataParallel needs
    ``find_unused_parameters=True``. With ``keep_graph=True`` every layer runs, and the output of a dropped one is
    replaced by its first argument, so that its parameters get zero gradients. That is for DistributedDataParallel,
    ``torch.compile(fullgraph=True)`` and vmap; layers must return a tensor of their first argument's shape then, while
    by default they can take and return anything.

    Objects that belong to layers get mixed up if they are numbered along with the layers that it yields
    (``zip(layers, states)``, ``enumerate(layers)``). ``keep_graph=True`` yields all layers, so the numbers are right.

    The layers to drop are drawn on the CPU, once for each iteration, whatever the device of the layers. Processes that
    train one model agree on them if their generators are equal: pass ``generator=torch.Generator().manual_seed(n)``
    with the same n in each, or call torch.manual_seed with the same number. Otherwise each drops layers of its own.

    In Monte Carlo inference the draws belong to the module that iterates, and all rows of a sample share them.

    Args:
        layers: an iterable of modules, such as a ModuleList. It comes first (fairseq has the rate first).
        p: probability of dropping a layer, in [0, 1]. Default: 0.5; the paper trains with 0.2.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor with one for each layer.
        keep_graph: whether dropped layers are run and their parameters stay in the graph.
        generator: a CPU generator that draws; PyTorch's default one if None.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: `layers` is no iterable of modules; both names of the rate, or neither.

    References:
        Fan, Grave and Joulin, "Reducing Transformer Depth on Demand with Structured Dropout", ICLR 2020
        (arXiv:1909.11556).

    Example:
        >>> import torch, torchdrop
        >>> from torch import nn
        >>> from torchdrop import LayerDrop
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 6, enable_nested_tensor=False)
        >>> encoder.layers = LayerDrop(encoder.layers, 0.2)
        >>> encoder(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
        >>> torchdrop.keep_probs(encoder)["layers"]
        0.8
        >>> len(encoder.layers), len(list(encoder.layers)) <= 6, len(encoder.layers.pruned(2))
        (6, True, 3)
    """

    def __init__(
        self,
        layers: Iterable[nn.Module] | None = None,
        p: Probability = DEFAULT_P,
        *,
        keep_prob: Probability | None = None,
        keep_graph: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if layers is not None and not isinstance(layers, Iterable):
            raise TypeError(
                f"layers must be an iterable of modules, got {type(layers).__name__}: the order is LayerDrop(layers, p)"
            )
        check_bool("keep_graph", keep_graph)
        super().__init__(p, keep_prob=keep_prob, generator=generator)
        self.keep_graph = keep_graph
        if layers is not None:
            self.extend(layers)

    def _draw(self) -> Tensor | None:
        """Returns bools of the layers that stay; None if all do."""
        if not sites.is_on(self.training):
            return None
        shape = (len(self),)
        kept = sites.keep_mask(torch.empty(0, device="cpu"), self.rate.params_for(shape), shape, self.generator)
        if kept is None and self.keep_graph and not transforms_active():
            return torch.ones(shape, dtype=torch.bool, device="cpu")  # its layers are checked all the same
        return kept

    def __iter__(self) -> Iterator[Any]:
        layers = list(self._modules.values())
        if fx_tracing():
            return iter(self._for_a_trace(layers))
        if self.training and not self.keep_graph and portable.is_wanted(is_compiling()):
            raise RuntimeError(
                "a graph has one path through the layers, and LayerDrop takes another in each call: use "
                "keep_graph=True, or put the model in eval mode"
            )
        kept = self._draw()
        if kept is None:
            return iter(layers)
        if self.keep_graph:
            return iter([_Selected(layer, kept[i]) for i, layer in enumerate(layers)])
        if not is_compiling() and is_batched(kept):
            raise RuntimeError(
                "LayerDrop cannot skip layers under vmap, where each sample drops others: use keep_graph=True, or "
                'randomness="same"'
            )
        return iter([layer for layer, stays in zip(layers, kept.tolist(), strict=True) if stays])

    def _for_a_trace(self, layers: list[Any]) -> list[Any]:
        if self.keep_graph:
            drawn: list[Any] = []
            return [_Traced(layer, self, at, drawn) for at, layer in enumerate(layers)]
        remedy = "torch.fx traces one path through the layers, and LayerDrop takes another in each call"
        if self.training:
            raise RuntimeError(f"{remedy}: use keep_graph=True, or trace it in eval mode")
        warnings.warn(
            f"{remedy}: the graph runs all of them, also in train mode; with keep_graph=True it drops them as here",
            UserWarning,
            stacklevel=2,
        )
        return layers

    @overload
    def __getitem__(self, idx: slice) -> LayerDrop: ...

    @overload
    def __getitem__(self, idx: int) -> nn.Module: ...

    def __getitem__(self, idx: int | slice) -> nn.Module:
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        return self._like_this(list(self._modules.values())[idx], self._rate_of(idx))

    def __add__(self, other: Iterable[nn.Module]) -> LayerDrop:
        return self._like_this([*self._modules.values(), *_all_modules(other)], self.keep_prob)

    def __radd__(self, other: Any) -> nn.ModuleList:
        if not isinstance(other, nn.ModuleList):
            return NotImplemented
        return nn.ModuleList([*_all_modules(other), *_all_modules(self)])

    def _rate_of(self, idx: slice) -> Probability:
        each = isinstance(self.keep_prob, Tensor) and self.keep_prob.dim() == 1 and self.keep_prob.numel() > 1
        at = list(range(len(self)))[idx]  # a tensor takes no negative step
        return self.keep_prob[at] if each else self.keep_prob  # type: ignore[index]

    def _like_this(self, layers: Iterable[nn.Module], keep_prob: Probability) -> LayerDrop:
        other = LayerDrop(layers, keep_prob=keep_prob, keep_graph=self.keep_graph, generator=self.generator)
        other.training = self.training  # only its own flag: the layers keep theirs
        return other

    def extend(self, modules: Iterable[nn.Module]) -> LayerDrop:
        """Appends modules from an iterable, as torch.nn.ModuleList.extend does; from a LayerDrop, all of them."""
        return super().extend(_all_modules(modules))

    def __contains__(self, module: Any) -> bool:
        return any(module is layer for layer in self._modules.values())

    def pruned(self, n: int) -> nn.ModuleList:
        """Returns the stack for inference without every n-th layer: without layers n, 2n, 3n, ..., counted from 1.

        For the paper's rate of pruning p*, n is 1 / p* rounded down: 2 leaves out every other layer.

        Args:
            n: an integer between 2 and the number of layers.

        Returns:
            A new torch.nn.ModuleList of the layers that stay. They are the same modules as here.

        Raises:
            ValueError: n is out of range: 1 would leave out all layers, and above their number none is left out.
            TypeError: n is no integer.

        Example:
            >>> from torch import nn
            >>> from torchdrop import LayerDrop
            >>> stack = LayerDrop([nn.Linear(2, 2) for _ in range(6)], 0.2)
            >>> pruned = stack.pruned(3)
            >>> [i for i in range(6) if stack[i] in list(pruned)]
            [0, 1, 3, 4]
        """
        check_integer("n", n)
        if not 2 <= n <= len(self):
            raise ValueError(f"n must be between 2 and the number of layers, {len(self)}, got {n}")
        return nn.ModuleList(layer for at, layer in enumerate(self._modules.values(), 1) if at % n)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        rate = super().extra_repr()
        return f"{rate}, keep_graph=True" if self.keep_graph else rate

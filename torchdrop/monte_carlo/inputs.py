"""The arguments of a model: the rows of data in them, some of the rows, and copies of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .structures import map_leaves, walk


class Inputs:
    """Arguments of a model, in which each tensor has the rows of data along one dimension.

    Args:
        args, kwargs: the arguments of a call of the model.
        dim: the dimension of the tensors that counts rows; None takes the inputs as one whole.

    Attributes:
        rows: the number of rows; None if the inputs are one whole, as when their tensors disagree.
        tensors: all tensors that have a dimension.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], dim: int | None) -> None:
        self.args = args
        self.kwargs: dict[str, Any] = dict(kwargs)
        self.tensors: list[Tensor] = [
            t for t in walk((self.args, self.kwargs)) if isinstance(t, Tensor) and t.dim() > 0
        ]
        self.device: torch.device = self.tensors[0].device if self.tensors else torch.device("cpu")
        self.dim: int | None = None
        self.rows: int | None = None
        if dim is not None:
            sizes = {t.shape[dim] if -t.dim() <= dim < t.dim() else None for t in self.tensors}
            if len(sizes) == 1 and None not in sizes:
                self.dim, self.rows = dim, sizes.pop()

    @classmethod
    def of(cls, inputs: Any, dim: int | None) -> Inputs:
        """Makes inputs from a tensor (the only argument), a tuple or list (positional ones) or a mapping (named
        ones)."""
        if isinstance(inputs, Mapping):
            return cls((), inputs, dim)
        if isinstance(inputs, (tuple, list)):
            return cls(tuple(inputs), {}, dim)
        return cls((inputs,), {}, dim)

    def call(self, model: Callable[..., Any]) -> Any:
        """Returns the output of a model, or of one of its methods, for these arguments."""
        return model(*self.args, **self.kwargs)

    def _map(self, function: Any) -> Inputs:
        args, kwargs = map_leaves(
            lambda t: function(t) if isinstance(t, Tensor) and t.dim() > 0 else t, (self.args, self.kwargs)
        )
        return Inputs(args, kwargs, self.dim)

    def first(self, rows: int) -> Inputs:
        """Returns so many rows, from the first on, and again from the first if there are fewer."""
        if not self.rows:
            return self.copy()
        index = torch.arange(rows, device=self.device) % self.rows
        return self._map(lambda t: t.index_select(self.dim, index.to(t.device)))

    def copy(self) -> Inputs:
        """Returns the same values in memory of their own."""
        return self._map(Tensor.clone)

    @property
    def versions(self) -> list[int]:
        """Returns a count for each tensor that rises when it is written to."""
        return [0 if t.is_inference() else t._version for t in self.tensors]

    def folded(self, copies: int) -> Inputs:
        """Returns all rows, then all rows again, for each copy."""
        return self._map(lambda t: torch.cat([t] * copies, self.dim or 0))

    def to(self, device: torch.device) -> Inputs:
        return self._map(lambda t: t.to(device))


def picker(select_output: Callable[[Any], Any] | None, pair: bool) -> Callable[[Any], tuple[Tensor, ...]]:
    """Returns a function that takes the tensors of interest from a model's output, as a tuple.

    Args:
        select_output: the user's own function.
        pair: whether two tensors are expected.
    """

    def pick(returned: Any) -> tuple[Tensor, ...]:
        chosen = _usual(returned, pair) if select_output is None else select_output(returned)
        parts = tuple(chosen) if isinstance(chosen, (tuple, list)) else (chosen,)
        if not all(isinstance(part, Tensor) for part in parts) or len(parts) not in ((1, 2) if pair else (1,)):
            named = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(
                f"the outputs must be one tensor{' or a pair of them' if pair else ''}, got {named}: give "
                "select_output=, a function that gets it out of what the model returns, such as lambda y: y[0]"
            )
        return parts

    return pick


def _usual(returned: Any, pair: bool) -> Any:
    if isinstance(returned, Mapping):
        for name in ("logits", "last_hidden_state"):
            if isinstance(returned.get(name), Tensor):
                return returned[name]
        return tuple(returned.values())
    return returned

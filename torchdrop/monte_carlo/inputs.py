"""The arguments of a model: the rows of data in them, some of the rows, and copies of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.torch_state import tree_flatten, tree_map


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
            t for t in tree_flatten((self.args, self.kwargs))[0] if isinstance(t, Tensor) and t.dim() > 0
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
        args, kwargs = tree_map(
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

    def fresh(self) -> Inputs:
        return self

    @property
    def versions(self) -> list[int]:
        """Returns a count for each tensor that rises when it is written to."""
        return [0 if t.is_inference() else t._version for t in self.tensors]

    def folded(self, copies: int) -> Inputs:
        """Returns all rows, then all rows again, for each copy."""
        return self._map(lambda t: torch.cat([t] * copies, self.dim or 0))

    def to(self, device: torch.device) -> Inputs:
        return self._map(lambda t: t.to(device))


def batches(inputs: Any, select: Callable[[Any], Any] | None, dim: int | None, model: nn.Module) -> Iterator[Inputs]:
    """Yields the batches in the inputs of `mc_predict`. An iterable's batches are moved to the model's device.

    Raises:
        TypeError: inputs of another type, or a batch of an unexpected structure.
        ValueError: a tensor on another device than the model's.
    """
    home = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    if isinstance(inputs, (Tensor, tuple, Mapping)):
        one = Inputs.of(inputs if select is None else select(inputs), dim)
        if home is not None and one.tensors and one.device != home:
            raise ValueError(
                f"inputs are on {one.device} and the model is on {home}: pass inputs.to({str(home)!r}), or a "
                "DataLoader, whose batches are moved"
            )
        yield one
        return
    if isinstance(inputs, (list, str)) or hasattr(inputs, "__array__") or not isinstance(inputs, Iterable):
        raise TypeError(
            "inputs must be a tensor, a tuple of positional arguments, a mapping of named ones, or an iterable of "
            f"batches such as a DataLoader, got {type(inputs).__name__}"
        )
    for batch in inputs:
        one = Inputs.of(_selected(batch) if select is None else select(batch), dim)
        yield one if home is None else one.to(home)


def _selected(batch: Any) -> Any:
    """Returns the inputs in a batch, by the convention that a pair is (inputs, targets)."""
    if isinstance(batch, (Tensor, Mapping)):
        return batch
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2) and isinstance(batch[0], (Tensor, Mapping, tuple)):
        return batch[0]
    what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise TypeError(
        f"a batch must be a tensor, a mapping, or a pair (inputs, targets), got a {what}: give select=, a function "
        "that gets the inputs out of a batch"
    )


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

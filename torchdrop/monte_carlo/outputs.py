"""The outputs of interest in what a model returns: one, or several with names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .blocks import as_numbers

_USUAL = ("logits", "last_hidden_state")
"""The names of what is taken from a mapping by default."""


class Picker:
    """Takes the tensors of interest from what a model returns, as a tuple.

    Args:
        select: the user's own function, which returns a tensor, or a mapping of names to tensors; None for the usual.
        pair: whether an output may be a pair of tensors.
        task: the name of the task of all outputs, or a mapping of the outputs' names to those of their tasks.

    Attributes:
        names: the names of the outputs, known after the first call; a single output without a name has "".
        sizes: how many tensors each has.
        row_dims: the dimension of rows of each tensor, set where the data has a single row. A dimension that the model
            has squeezed away is put back.

    Raises:
        TypeError: when it is called, something else than such tensors.

    Example:
        >>> import torch
        >>> pick = Picker(lambda y: {"mean": y, "half": y / 2})
        >>> pick(torch.tensor([2.0])), pick.names, pick.sizes
        ((tensor([2.]), tensor([1.])), ('mean', 'half'), (1, 1))
    """

    def __init__(
        self,
        select: Callable[[Any], Any] | None = None,
        pair: bool = False,
        task: str | Mapping[str, str | None] | None = None,
    ) -> None:
        self._select, self._pair, self._task = select, pair, task
        self._wanted = tuple(task) if isinstance(task, Mapping) else None
        self._ranks: tuple[int, ...] = ()
        self.names: tuple[str, ...] = ()
        self.sizes: tuple[int, ...] = ()
        self.row_dims: tuple[int | None, ...] | None = None

    def __call__(self, returned: Any) -> tuple[Tensor, ...]:
        outputs = [self._numbers(name, output) for name, output in self._named(returned).items()]
        self.sizes = tuple(map(len, outputs))
        tensors = tuple(tensor for output in outputs for tensor in output)
        if self.row_dims is None:
            self._ranks = tuple(tensor.dim() for tensor in tensors)
            return tensors
        return tuple(
            tensor if dim is None or tensor.dim() != rank - 1 else tensor.unsqueeze(dim)
            for tensor, dim, rank in zip(tensors, self.row_dims, self._ranks, strict=True)
        )

    def _numbers(self, name: str, output: Any) -> tuple[Tensor, ...]:
        """Returns the tensors of one output, as numbers that its task can take."""
        task = self._task.get(name) if isinstance(self._task, Mapping) else self._task
        return tuple(as_numbers(tensor, task) for tensor in _tensors(output, self._pair, name))

    def by_name(self, numbers: Sequence[int]) -> dict[str, int]:
        """Returns the sum, for each output, of numbers that belong to its tensors."""
        rest = iter(numbers)
        return {name: sum(next(rest) for _ in range(size)) for name, size in zip(self.names, self.sizes, strict=True)}

    def _named(self, returned: Any) -> dict[str, Any]:
        """Returns the outputs by name."""
        if self._select is not None:
            chosen = self._select(returned)
        elif self._wanted is not None:
            chosen = {name: _part(returned, name) for name in self._wanted}
        else:
            chosen = _usual(returned)
        several = isinstance(chosen, Mapping) and (self._select is not None or self._wanted is not None)
        outputs = dict(chosen) if several else {"": chosen}
        expected = self._wanted or self.names or tuple(outputs)
        if set(outputs) != set(expected) or not outputs:
            got = ", ".join(map(repr, outputs)) if several else type(chosen).__name__
            raise TypeError(f"the outputs must be a mapping with {', '.join(map(repr, expected))}, got {got or 'none'}")
        self.names = expected
        return {name: outputs[name] for name in expected}


def one_tensor(returned: Any) -> Tensor:
    """Returns the usual output of a model.

    Raises:
        TypeError: it is not one tensor.
    """
    return _tensors(_usual(returned), False, "")[0]


def _usual(returned: Any) -> Any:
    if not isinstance(returned, Mapping):
        return returned
    found = next((returned[name] for name in _USUAL if isinstance(returned.get(name), Tensor)), None)
    return tuple(returned.values()) if found is None else found


def _part(returned: Any, name: str) -> Any:
    """Returns the output of this name from a mapping, or from a namedtuple or dataclass."""
    found = returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None)
    if found is None:
        names = f" with {', '.join(map(str, returned))}" if isinstance(returned, Mapping) else ""
        raise TypeError(
            f"task names the output {name!r}, which the model's {type(returned).__name__}{names} does not have: give "
            f"select_output=, a function that returns a mapping of names, such as lambda y: {{{name!r}: y[0]}}"
        )
    return found


def _tensors(output: Any, pair: bool, name: str) -> tuple[Tensor, ...]:
    """Returns one output as a tuple of its tensors."""
    parts = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    if all(isinstance(part, Tensor) for part in parts) and len(parts) in ((1, 2) if pair else (1,)):
        return parts
    kinds = ", ".join(type(part).__name__ for part in parts)
    what = f"the output {name!r}" if name else "the outputs"
    raise TypeError(
        f"{what} must be one tensor{' or a pair of them' if pair else ''}, got {kinds}: give select_output=, a "
        "function that gets it out of what the model returns, such as lambda y: y[0], or that returns a mapping of "
        "names to tensors, such as lambda y: {'mean': y[0], 'other': y[1]}, for a prediction of each"
    )

"""The batches in the inputs of `mc_predict`: the arguments of the model that are in each of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import Inputs
from .structures import is_packed, is_record, map_leaves

_TARGETS = ("y", "target", "targets", "label", "labels")
"""Names of parameters that take targets, which are left out on purpose."""


class Signature:
    """The parameters of a model's forward, or of another of its methods, that arguments are compared with.

    Nothing is known of them, and every comparison holds, if a hook of the model may change its arguments.

    Args:
        model: the model, or one in `DataParallel` or `DistributedDataParallel`.
        method: the name of the method; "__call__" for the forward.

    Example:
        >>> signature = Signature(nn.Bilinear(2, 3, 4))
        >>> signature, signature.required, signature.takes((1, 2)), signature.takes((1,))
        (forward(input1, input2), ['input1', 'input2'], True, False)
    """

    def __init__(self, model: nn.Module, method: str = "__call__") -> None:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        self._name = "forward" if method == "__call__" else method
        self._known: inspect.Signature | None = None
        if not (method == "__call__" and model._forward_pre_hooks):
            try:
                self._known = inspect.signature(getattr(model, self._name))
            except (TypeError, ValueError):  # a callable of another language
                return

    def __repr__(self) -> str:
        parameters = () if self._known is None else self._known.parameters.values()
        shown = (str(one.replace(annotation=inspect.Parameter.empty)) for one in parameters)
        return f"{self._name}({', '.join(shown)})"

    @property
    def _positional(self) -> list[inspect.Parameter]:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [] if self._known is None else [one for one in self._known.parameters.values() if one.kind in kinds]

    @property
    def required(self) -> list[str]:
        """The names of the positional parameters that have no default."""
        return [one.name for one in self._positional if one.default is inspect.Parameter.empty]

    def takes(self, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
        """Whether a call with these arguments is possible."""
        if self._known is None:
            return True
        try:
            self._known.bind(*args, **(kwargs or {}))
        except TypeError:
            return False
        return True

    def has_any(self, names: Iterable[Any]) -> bool:
        """Whether one of the parameters has one of these names."""
        return self._known is None or any(name in self._known.parameters for name in names)

    def optional_tensor(self, place: int) -> str:
        """Returns the name of the optional parameter of this place if a tensor that is no target could be meant for
        it, and "" if not: its default is not None, its name is that of targets, or its annotation is of another
        type."""
        if len(self._positional) <= place:
            rest = [] if self._known is None else self._known.parameters.values()
            return next((f"*{one.name}" for one in rest if one.kind is inspect.Parameter.VAR_POSITIONAL), "")
        one = self._positional[place]
        unannotated = one.annotation is inspect.Parameter.empty
        fits = unannotated or any(word in str(one.annotation) for word in ("Tensor", "Any"))
        return one.name if fits and one.default is None and one.name not in _TARGETS else ""


def arguments(inputs: Any, signature: Signature, dim: int | None) -> Inputs:
    """Returns the arguments in inputs: a tuple or list has positional ones, a mapping named ones, and anything else is
    the only one, as a dataclass, packed sequence or graph is. A mapping, list or namedtuple that the model takes only
    as its one argument is that.

    Raises:
        TypeError: the model takes them in neither way.
    """
    if isinstance(inputs, Mapping):
        if all(isinstance(name, str) for name in inputs) and signature.takes((), inputs):
            return Inputs((), inputs, dim)
        if not signature.has_any(inputs) and signature.takes((inputs,)):
            return Inputs((inputs,), {}, dim)
        raise TypeError(
            f"the inputs are a mapping with {', '.join(map(repr, inputs))}, and the model's {signature!r} does not "
            "take these as named arguments: give select=, a function that gets those out that it takes, or all of them "
            "as one argument: lambda batch: (batch,)"
        )
    if not isinstance(inputs, (tuple, list)) or is_packed(inputs):
        return Inputs((inputs,), {}, dim)
    if signature.takes(inputs):
        return Inputs(tuple(inputs), {}, dim)
    if (isinstance(inputs, list) or hasattr(inputs, "_fields")) and signature.takes((inputs,)):
        return Inputs((inputs,), {}, dim)
    raise TypeError(
        f"the inputs are a {type(inputs).__name__} of {len(inputs)}, which are positional arguments, and the model's "
        f"{signature!r} does not take this many: pass the inputs without targets, or a tuple in a tuple if that is the "
        "one argument"
    )


def is_array(value: Any) -> bool:
    """Whether a value gives itself as a numpy array: an array, or a frame or series of pandas, but no tensor."""
    return hasattr(value, "__array__") and not isinstance(value, (Tensor, type))


class Conversion:
    """Makes tensors of numpy arrays and pandas frames, with the dtype and on the device of a model's parameters.

    Floating-point values get the dtype and device of the model's first floating-point parameter, others its device
    alone: integers stay integers. Values of another dtype or order in memory are copied.

    Args:
        model: the model.

    Raises:
        TypeError: when it is called, an array of anything else than numbers and booleans.

    Example:
        >>> import numpy
        >>> convert = Conversion(nn.Linear(2, 2))
        >>> convert({"x": numpy.ones((1, 2)), "index": numpy.arange(2), "name": "a"})
        {'x': tensor([[1., 1.]]), 'index': tensor([0, 1]), 'name': 'a'}
    """

    def __init__(self, model: nn.Module) -> None:
        floating = next((one for one in model.parameters() if one.is_floating_point()), None)
        self._dtype = torch.get_default_dtype() if floating is None else floating.dtype
        self._device = torch.device("cpu") if floating is None else floating.device

    def __call__(self, inputs: Any) -> Any:
        if type(inputs) is Tensor:
            return inputs
        return map_leaves(lambda leaf: self._tensor(leaf) if is_array(leaf) else leaf, inputs)

    def _tensor(self, value: Any) -> Any:
        array = value.__array__()
        if array.dtype.kind not in "biufc":
            raise TypeError(
                f"inputs must be numbers, got a {type(value).__name__} of dtype {array.dtype}: make numbers of it, for "
                "example by astype('float32')"
            )
        if array.ndim == 0:
            return value
        if not (array.flags.writeable and array.dtype.isnative) or min(array.strides) < 0:
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        tensor = torch.from_numpy(array)
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)


class Reader:
    """Reads the inputs of `mc_predict` for one model. Arrays become tensors (see `Conversion`).

    Args:
        model: the model.
        method: the name of the method that gets them.
        select: the user's function that gets the inputs out of a batch.
        dim: the dimension that counts rows.
    """

    def __init__(self, model: nn.Module, method: str, select: Callable[[Any], Any] | None, dim: int | None) -> None:
        self._home = next((t.device for t in chain(model.parameters(), model.buffers())), None)
        self._signature = Signature(model, method)
        self._convert = Conversion(model)
        self._select, self._dim = select, dim

    def batches(self, inputs: Any) -> Iterator[Inputs]:
        """Yields the batches. An iterable's batches are moved to the model's device.

        Raises:
            TypeError: inputs of another type, a batch of an unexpected structure, or arguments that the model does not
                take.
            ValueError: a tensor on another device than the model's.

        Warns:
            UserWarning: the second of a pair is left out, and the model could take it as an argument.
        """
        home, select = self._home, self._select
        if isinstance(inputs, (Tensor, tuple, Mapping)) or is_array(inputs) or is_record(inputs):
            one = arguments(self._convert(inputs if select is None else select(inputs)), self._signature, self._dim)
            if home is not None and one.tensors and one.device != home:
                raise ValueError(
                    f"inputs are on {one.device} and the model is on {home}: pass inputs.to({str(home)!r}), or a "
                    "DataLoader, whose batches are moved"
                )
            yield one
            return
        if isinstance(inputs, (list, str)) or not isinstance(inputs, Iterable):
            kind = type(inputs).__name__
            if isinstance(inputs, list):
                kind += ": pass tuple(inputs) if they are arguments, iter(inputs) if they are batches"
            raise TypeError(
                "inputs must be a tensor or array, a tuple of positional arguments, a mapping of named ones, or an "
                f"iterable of batches such as a DataLoader, got {kind}"
            )
        doubtful: set[str] = set()
        for batch in inputs:
            chosen = _without_targets(batch, self._signature, doubtful) if select is None else select(batch)
            one = arguments(self._convert(chosen), self._signature, self._dim)
            yield one if home is None else one.to(home)


def _without_targets(batch: Any, signature: Signature, doubtful: set[str]) -> Any:
    """Returns the inputs in a batch, by the convention that a pair is (inputs, targets).

    Args:
        batch: the batch.
        signature: what the model takes.
        doubtful: the parameters of which a warning has said that the second of a pair could be meant for them.
    """
    if isinstance(batch, (Tensor, Mapping)) or is_array(batch) or is_record(batch):
        return batch
    if not isinstance(batch, (tuple, list)) or len(batch) not in (1, 2):
        what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(
            f"a batch must be a tensor or array, a mapping, or a pair (inputs, targets), got a {what}: give select=, a "
            "function that gets the inputs out of a batch, such as lambda batch: batch[:2] for two positional arguments"
        )
    chosen = batch[0]
    if not (isinstance(chosen, (Tensor, Mapping, tuple, list)) or is_array(chosen) or is_record(chosen)):
        raise TypeError(
            "the inputs in a batch must be a tensor or array, a mapping, a tuple or a list, got a "
            f"{type(chosen).__name__}: give select=, a function that gets the inputs out of a batch"
        )
    if len(batch) == 2 and not isinstance(chosen, Mapping):
        several = isinstance(chosen, (tuple, list)) and not is_packed(chosen)
        _check_pair(len(chosen) if several else 1, batch[1], signature, doubtful)
    return chosen


def _check_pair(taken: int, second: Any, signature: Signature, doubtful: set[str]) -> None:
    """Checks that the second of a pair can be targets, with so many arguments in the first.

    Raises:
        TypeError: the model needs another argument, which the second may be.
    """
    both = "select=tuple to pass both as arguments" if taken == 1 else "select=, to pass all of them as arguments"
    if taken == 1 and len(signature.required) > 1:
        raise TypeError(
            f"a batch is a pair, of which the second would be left out as targets, but the model's {signature!r} needs "
            f"{len(signature.required)} arguments: give {both}, or another function that gets them out of a batch"
        )
    name = signature.optional_tensor(taken) if isinstance(second, Tensor) or is_array(second) else ""
    if name and name not in doubtful:
        doubtful.add(name)
        warnings.warn(
            f"mc_predict: the second of each pair is left out as targets, but the model's {signature!r} could take it "
            f"as {name}: give {both}, or select=lambda batch: batch[0] if it is the targets",
            UserWarning,
            stacklevel=7,
        )

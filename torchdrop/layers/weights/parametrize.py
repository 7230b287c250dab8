"""Parametrizations that drop: selecting parameters, registering, removing, and nn.LSTM, nn.GRU and nn.RNN.

torch.nn.utils.parametrize does the work. This file adds three things, as methods of the class that it makes for each
parametrized module:

- A checkpoint saved before the parametrization can be loaded: its ``weight`` is ``parametrizations.weight.original``.
- nn.LSTM, nn.GRU and nn.RNN hold their weights in a list of their own, which is read through the parametrizations once
  a forward, so that a recurrent matrix has one mask for all time steps, and which holds the parameters at other times.
- A copy made by copy.deepcopy shares the class of its original, so it gets its own before anything is added or removed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ...core.checks import check_module
from ...core.mask_shape import Axes, mask_shape
from ...core.names import fits, near
from ...core.rate import DEFAULT_P, Probability, Rated
from ...kernels.masking import COMPUTE_DTYPE, SERVED

Names = str | Sequence[str]
Layers = type[nn.Module] | tuple[type[nn.Module], ...]

_ORDER = "_order_of_parameters"


class OfWeight(Rated):
    """The base of the parametrizations of this package."""

    undone_by: str

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        *,
        keep_prob: Probability | None = None,
        shared_axes: Axes = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, keep_prob=keep_prob, generator=generator)
        self.shared_axes = shared_axes

    def check_weight(self, weight: Tensor) -> None:
        """Raises ValueError if the rate does not broadcast against a weight's mask."""
        self.rate.params_for(mask_shape(weight, self.shared_axes, None))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Returns the tensor to store when a weight is assigned."""
        return weight

    def extra_repr(self) -> str:
        shared = "" if self.shared_axes is None else f", shared_axes={self.shared_axes}"
        return super().extra_repr() + shared


class Place(NamedTuple):
    """A parameter in a model."""

    path: str
    module: nn.Module
    name: str

    def rated(self) -> OfWeight | None:
        """Returns the parametrization of this package that the parameter is under, or None."""
        return _rated(self.module, self.name)

    def value(self) -> Tensor:
        """Returns the value that its layer uses. Draws nothing unless a parametrization of another package does."""
        with torch.no_grad():
            return getattr(self.module, self.name)


def _stack(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    return module.parametrizations[name]  # type: ignore[index, return-value]


def _rated(module: nn.Module, name: str) -> OfWeight | None:
    if not parametrize.is_parametrized(module, name):
        return None
    return next((one for one in _stack(module, name) if isinstance(one, OfWeight)), None)


def _own_names(module: nn.Module) -> Iterator[str]:
    yield from (name for name, parameter in module._parameters.items() if parameter is not None)
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            if any(True for _ in _stack(module, name).parameters(recurse=False)):
                yield name


def _all_places(module: nn.Module) -> list[Place]:
    """Returns every parameter of a model under the name that it has without parametrizations."""
    stacks = [one for one in module.modules() if isinstance(one, parametrize.ParametrizationList)]
    inner = {part for stack in stacks for part in stack.modules()}
    return [
        Place(f"{prefix}.{name}".lstrip("."), one, name)
        for prefix, one in module.named_modules()
        if one not in inner
        for name in _own_names(one)
    ]


def _patterns(module: Any, names: Any) -> Sequence[str]:
    check_module("module", module)
    patterns = (names,) if isinstance(names, str) else names
    if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
        raise TypeError(f"names must be a string such as 'weight_hh_*', or several, got {names!r}")
    if not patterns:
        raise ValueError("names must hold at least one name of a parameter, got none")
    return patterns


def _chosen(module: nn.Module, patterns: Sequence[str], found: list[Place], what: str) -> list[Place]:
    """Returns the places that a pattern matches; each pattern must match one."""
    kind = _original_class(module).__name__
    for pattern in patterns:
        if any(fits(pattern, place.path) for place in found):
            continue
        others = [place.path for place in _all_places(module)]
        if any(fits(pattern, path) for path in others):
            raise ValueError(
                f"{pattern!r} names no {what} of the {kind}: {near(pattern, [place.path for place in found])}"
            )
        there = [place.path for place in found or _all_places(module)]
        raise ValueError(f"{pattern!r} names no parameter of the {kind}: {near(pattern, there)}")
    return [place for place in found if any(fits(pattern, place.path) for pattern in patterns)]


def register(module: Any, names: Any, layers: Layers, make: Callable[[Tensor], OfWeight]) -> None:
    """Puts the named parameters under parametrizations, all of them or none.

    Args:
        module: a layer or a model.
        names: globs of the names that ``module.named_parameters()`` has; ``*`` matches dots too.
        layers: the classes of layers whose parameters are meant.
        make: makes a parametrization for each parameter from the value that its layer uses.

    Raises:
        TypeError, ValueError: as `apply_weight_dropout`, or raised by `make`. Nothing is changed then.
    """
    patterns = _patterns(module, names)
    classes = layers if isinstance(layers, tuple) else (layers,)
    if not all(isinstance(one, type) for one in classes):
        raise TypeError(f"layers must be a class such as torch.nn.Linear, or a tuple of them, got {layers!r}")
    found = [place for place in _all_places(module) if isinstance(place.module, classes)]
    chosen = _chosen(module, patterns, found, "parameter in a layer of the given classes")
    made = [_made(place, make) for place in chosen]
    for place, parametrization in zip(chosen, made, strict=True):
        if parametrize.is_parametrized(place.module):
            _give_own_class(place.module)
        order = _order(place.module)
        # Its checks would evaluate it, and draw a mask.
        parametrize.register_parametrization(place.module, place.name, parametrization, unsafe=True)
        setattr(type(place.module), _ORDER, order)
        _settle(place.module)


def _made(place: Place, make: Callable[[Tensor], OfWeight]) -> OfWeight:
    rated = place.rated()
    if rated is not None:
        raise ValueError(
            f"{place.path} is under {type(rated).__name__} already: change its rate with torchdrop.set_keep_prob, or "
            f"undo that first, with {rated.undone_by}"
        )
    weight = place.value()
    if is_lazy(weight):
        raise ValueError(f"{place.path} has no shape yet, its layer is lazy: run the model once first")
    if weight.dtype not in SERVED:
        served = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTE_DTYPE)
        raise ValueError(
            f"{place.path} must be a {served} tensor, got {weight.dtype}: choose other parameters by `names`"
        )
    made = make(weight)
    try:
        made.check_weight(weight)
    except ValueError as error:
        raise ValueError(f"{error}, for {place.path!r}") from None
    return made


def remove(module: Any, names: Any, kind: type[OfWeight]) -> None:
    """Undoes `register`. The layers have their parameters again, the same objects, as they have been trained.

    Raises:
        TypeError: an argument of another type.
        ValueError: a name that no parameter under such a parametrization has. Nothing is changed then.
    """
    patterns = _patterns(module, names)
    found = [place for place in _all_places(module) if isinstance(place.rated(), kind)]
    for place in _chosen(module, patterns, found, f"parameter under {kind.__name__}"):
        _give_own_class(place.module)
        order = _order(place.module)
        stack = _stack(place.module, place.name)
        if len(stack) == 1:
            parametrize.remove_parametrizations(place.module, place.name, leave_parametrized=False)
        else:
            del stack[next(at for at, one in enumerate(stack) if isinstance(one, kind))]
        _settle(place.module)
        own = place.module._parameters
        for name in sorted(own, key=lambda name: order.index(name) if name in order else len(order)):
            own[name] = own.pop(name)
        if isinstance(place.module, nn.RNNBase):
            place.module._init_flat_weights()


def _give_own_class(module: nn.Module) -> None:
    cls: Any = type(module)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls)(cls.__name__, cls.__bases__, own)


def _order(module: nn.Module) -> tuple[str, ...]:
    """Returns the parameters in their order without parametrizations, by which optimizers number them."""
    return vars(type(module)).get(_ORDER) or tuple(module._parameters)


def _settle(module: nn.Module) -> None:
    """Adds the methods below to the class of a parametrized module, or takes them away from it."""
    if not parametrize.is_parametrized(module):
        return
    cls = type(module)
    wanted = any(_rated(module, name) is not None for name in module.parametrizations)  # type: ignore[union-attr]
    methods = {"_load_from_state_dict": _load_from_state_dict}
    if isinstance(module, nn.RNNBase):
        methods |= _OF_RNN
    for name, method in methods.items():
        if wanted:
            setattr(cls, name, method)
        elif name in vars(cls):
            delattr(cls, name)


def _load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in self.parametrizations:  # type: ignore[union-attr]
        plain, own = f"{prefix}{name}", f"{prefix}parametrizations.{name}.original"
        if plain in state_dict and own not in state_dict and hasattr(_stack(self, name), "original"):
            state_dict[own] = state_dict.pop(plain)
    _original_class(self)._load_from_state_dict(self, state_dict, prefix, *rest)


def _original_class(module: nn.Module) -> type[nn.Module]:
    return parametrize.type_before_parametrizations(module)


def _stored(rnn: nn.RNNBase) -> list[Any]:
    """Returns the parameters themselves; None for a weight that is made from several."""
    return [
        getattr(_stack(rnn, name), "original", None)
        if parametrize.is_parametrized(rnn, name)
        else getattr(rnn, name, None)
        for name in rnn._flat_weights_names
    ]


def _init_flat_weights(self: nn.RNNBase) -> None:
    self._flat_weights = _stored(self)
    self._flat_weight_refs = [None if one is None else weakref.ref(one) for one in self._flat_weights]
    self.flatten_parameters()


def _update_flat_weights(self: nn.RNNBase) -> None:
    """Does nothing, since `_forward` has done it."""


def _forward(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
    stored = _stored(self)
    own = all(one is None or isinstance(one, nn.Parameter) for one in stored)  # not replaced, as by functional_call
    if own and any(now is not held for now, held in zip(stored, self._flat_weights, strict=True)):
        self._init_flat_weights()
    held = self._flat_weights
    self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
    try:
        _flatten(self, stored)
        return _original_class(self).forward(self, *args, **kwargs)
    finally:
        self._flat_weights = held


def _on_cuda(weight: Tensor) -> bool:
    return weight.is_cuda


def _flatten(rnn: nn.RNNBase, stored: list[Any]) -> None:
    """On CUDA, puts the weights of one forward into one chunk of memory, as cuDNN needs it. The parameters stay where
    they are."""
    weights: list[Any] = rnn._flat_weights
    if not _on_cuda(weights[0]) or all(weight is own for weight, own in zip(weights, stored, strict=True)):
        return
    rnn._flat_weights = [
        weight.clone() if weight is own else weight for weight, own in zip(weights, stored, strict=True)
    ]
    rnn.flatten_parameters()


_OF_RNN: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "_init_flat_weights": _init_flat_weights,
    "_update_flat_weights": _update_flat_weights,
}

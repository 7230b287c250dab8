"""Surgery: torchdrop's layers in the place of torch.nn's (`replace`), and dropout where there is none (`insert`)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..layers._rate import Rated
from ..layers.alpha import AlphaDropout, FeatureAlphaDropout
from ..layers.bernoulli import Dropout
from ..layers.channel import Dropout1d, Dropout2d, Dropout3d
from .holders import names_of, unwrapped
from .names import check_patterns, matches_itself, winner
from .unreached import Unreached, unreached

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
    nn.AlphaDropout: AlphaDropout,
    nn.FeatureAlphaDropout: FeatureAlphaDropout,
}
STOCK = {ours: stock for stock, ours in OURS.items()}


class Undoable:
    """What was done to a model, and the way back.

    Args:
        done: the names of the layers.
    """

    def __init__(self, done: list[str]) -> None:
        self.done = done
        self.undone = False

    def undo(self) -> None:
        """Puts the model back.

        Raises:
            RuntimeError: it has been done already.
        """
        if self.undone:
            raise RuntimeError(f"{type(self).__name__.lower()} has been undone already: undo() works once")
        self._undo()
        self.undone = True

    def _undo(self) -> None:
        raise NotImplementedError


def _layers(names: list[str]) -> str:
    """
    >>> _layers(["a", "b"]), _layers([""]), _layers([])
    ('2 dropout layers: a, b', '1 dropout layer: (model)', 'no dropout layer')
    """
    if not names:
        return "no dropout layer"
    return f"{len(names)} dropout layer{'s' if len(names) > 1 else ''}: {', '.join(n or '(model)' for n in names)}"


class Replacement(Undoable):
    """The layers that `replace` swapped. ``undo()`` swaps them back; printing it lists what it could not reach.

    Args:
        swapped: the layers and their names.
        unreached: the rest of the model's dropout.
    """

    def __init__(self, swapped: dict[nn.Module, str], unreached: list[Unreached]) -> None:
        super().__init__(list(swapped.values()))
        self.unreached = unreached
        self._swapped = swapped

    def _undo(self) -> None:
        _swap(self._swapped)

    def __repr__(self) -> str:
        lines = [f"replaced {_layers(self.done)}"]
        if self.unreached:
            lines.append(f"not reached: {len(self.unreached)}")
            lines += [f"  {entry}" for entry in self.unreached]
        return "\n".join(lines)


def replace(model: nn.Module, *, to: str = "torchdrop") -> Replacement:
    """Makes the dropout layers of torch.nn in a model torchdrop's, in place.

    Each module stays the object it is and changes its class, so that aliases, modules used in several places, hooks,
    training flags, rates and references from anywhere hold; state_dict keys do not change, and in eval mode nothing does.
    ``undo()`` changes the classes back and leaves rates that were set meanwhile as they are.

    Args:
        model: any module.
        to: "torchdrop", or "torch" for the other direction: torchdrop's layers become torch.nn's.

    Returns:
        What was swapped, with ``undo()``, and what could not be: functional calls, subclasses of torch.nn's layers with
        code of their own, and rates that are numbers, such as those of nn.LSTM and nn.MultiheadAttention, which
        `set_keep_prob` sets. Functional calls are looked for in the source of the modules; `audit` runs the model.

    Raises:
        TypeError: `model` is no module.
        ValueError: another value of `to`; or towards "torch" a layer that torch.nn cannot express. Nothing is changed.

    Warns:
        UserWarning: there is nothing to swap.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.TransformerEncoderLayer(8, 2, dropout=0.1)
        >>> swap = torchdrop.replace(model)
        >>> type(model.dropout1).__module__, model.dropout1.p
        ('torchdrop.layers.bernoulli', 0.1)
        >>> print(swap)
        replaced 3 dropout layers: dropout, dropout1, dropout2
        not reached: 1
          self_attn (MultiheadAttention): holds a rate as a number in .dropout (keep_prob 0.9); torchdrop.set_keep_prob(model, {'self_attn': ...}) sets it
        >>> swap.undo()
        >>> type(model.dropout1)
        <class 'torch.nn.modules.dropout.Dropout'>
    """  # noqa: E501
    if to not in ("torchdrop", "torch"):
        raise ValueError(f"to must be 'torchdrop' or 'torch', got {to!r}")
    table = OURS if to == "torchdrop" else STOCK
    swapped = {module: names[0] for module, names in names_of(model).items() if type(module) in table}
    _swap(swapped)
    if not swapped:
        whose = "torch.nn" if to == "torchdrop" else "torchdrop"
        warnings.warn(f"replace: the model has no dropout layers of {whose} to replace", UserWarning, stacklevel=2)
    return Replacement(swapped, unreached(unwrapped(model)) if to == "torchdrop" else [])


def _swap(layers: Mapping[nn.Module, str]) -> None:
    """Changes the classes of all the layers, or of none.

    Raises:
        ValueError: one has what its new class cannot hold.
    """
    fresh = [(layer, _counterpart(layer, name)) for layer, name in layers.items()]
    plain = vars(nn.Module()).keys()
    for layer, counterpart in fresh:
        own = vars(type(layer)(0.5)).keys() - plain
        for attribute in own:
            vars(layer).pop(attribute, None)
        layer.__class__ = type(counterpart)
        vars(layer).update({name: value for name, value in vars(counterpart).items() if name not in plain})


def _counterpart(layer: nn.Module, name: str) -> nn.Module:
    """A new layer of the other package with the same rate."""
    if type(layer) in OURS:
        assert isinstance(layer, _DropoutNd)
        return OURS[type(layer)](layer.p, layer.inplace)
    if type(layer) not in STOCK:
        raise ValueError(f"{name!r} is no longer a layer that was replaced, but a {type(layer).__name__}")
    assert isinstance(layer, Rated)
    special = {
        "a tensor as keep_prob": isinstance(layer.p, Tensor),
        "a generator": layer.generator is not None,
        "shared_axes": getattr(layer, "shared_axes", None) is not None,
        "noise_shape": getattr(layer, "noise_shape", None) is not None,
        "inverted=False": not getattr(layer, "inverted", True),
    }
    reasons = [reason for reason, holds in special.items() if holds]
    if reasons:
        raise ValueError(
            f"{name!r} has {' and '.join(reasons)}, which torch.nn's {type(layer).__name__} cannot express"
        )
    return STOCK[type(layer)](layer.p, layer.inplace)


_CHILD = {"after": "dropout_after", "before": "dropout_before"}


class Insertion(Undoable):
    """The layers that `insert` put into a model. ``undo()`` takes them out.

    Args:
        places: the modules they were put into, by name of the layer.
        where: "after" or "before".
        handles: of the hooks that call them.
    """

    def __init__(self, places: dict[str, nn.Module], where: str, handles: list[Any]) -> None:
        super().__init__(list(places))
        self._places, self._where, self._handles = places, where, handles

    def _undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._places.values():
            module._modules.pop(_CHILD[self._where], None)

    def __repr__(self) -> str:
        return f"inserted {_layers(self.done)}"


def insert(model: nn.Module, layers: Mapping[str, nn.Module], where: str = "after") -> Insertion:
    """Puts dropout into a model, at the output or the input of modules that are chosen by name.

    Each becomes a child of the module that it is put at, "dropout_after" or "dropout_before", so that ``model.eval()``,
    `keep_probs`, schedules and Monte Carlo inference find it; having no parameters, it adds no key to the state_dict.
    Of several outputs or inputs the first is dropped from. In an nn.Sequential it becomes the last or first element.

    Args:
        model: any module.
        layers: for each glob pattern of module names a dropout layer without parameters. "*" stands for one part of a
            name: "blocks.*" are the blocks and not what is in them. Where a pattern matches several modules each has a
            copy of its own. The most specific pattern wins.
        where: "after" or "before" the module.

    Returns:
        What was inserted, with ``undo()``.

    Raises:
        TypeError: a value is no dropout layer.
        ValueError: a pattern that matches no module; a module that has such a layer already, that is a dropout layer,
            or that is never called (containers, and the projection inside nn.MultiheadAttention); a layer with a
            state. Nothing is changed.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> keys = list(model.state_dict())
        >>> put = torchdrop.insert(model, {"1": torchdrop.Dropout(0.5)})
        >>> torchdrop.keep_probs(model)
        layer            kind     keep_prob  mode
        1.dropout_after  Dropout  0.5        train
        >>> list(model.state_dict()) == keys
        True
        >>> put.undo()
        >>> len(torchdrop.keep_probs(model))
        0
    """
    if where not in _CHILD:
        raise ValueError(f"where must be 'after' or 'before', got {where!r}")
    if not isinstance(layers, Mapping):
        raise TypeError(f"give patterns and layers as a mapping, {{'fc*': Dropout(0.5)}}, got {type(layers).__name__}")
    for pattern, layer in layers.items():
        _check_layer(pattern, layer)
    modules = {module: names for module, names in names_of(model).items() if names[0]}
    check_patterns(layers, [n for names in modules.values() for n in names], [], "modules", matches_itself)
    places: list[tuple[str, nn.Module, nn.Module]] = []
    used: set[str] = set()
    for module, names in modules.items():
        best = winner(layers, names, matches_itself)
        if best is not None:
            _check_place(modules, module, where)
            places.append((names[0], module, _twin(layers[best]) if best in used else layers[best]))
            used.add(best)
    inserted, handles = {}, []
    for name, module, layer in places:
        handles += _attach(module, layer.train(module.training), where)
        inserted[f"{name}.{_CHILD[where]}"] = module
    return Insertion(inserted, where, handles)


def _check_layer(pattern: str, layer: Any) -> None:
    if not isinstance(layer, _DropoutNd):
        raise TypeError(
            f"give {pattern!r} a dropout layer, such as torchdrop.Dropout(keep_prob=0.9), got {type(layer).__name__}"
        )
    if layer.state_dict():
        raise ValueError(
            f"the layer of {pattern!r} has a state ({', '.join(layer.state_dict())}), which would change the model's"
        )


def _check_place(modules: Mapping[nn.Module, tuple[str, ...]], module: nn.Module, where: str) -> None:
    name = modules[module][0]
    if isinstance(module, _DropoutNd):
        raise ValueError(
            f"{name!r} is a dropout layer itself: set_keep_prob sets its rate, or leave it out of the pattern"
        )
    if _CHILD[where] in module._modules:
        raise ValueError(
            f"{name!r} has a layer {where} it already: undo the first insertion, or set the rate of {_CHILD[where]!r}"
        )
    own = type(module).forward
    if own is nn.Module.forward or (isinstance(module, nn.Sequential) and own is not nn.Sequential.forward):
        raise ValueError(
            f"{name!r} is a {type(module).__name__}, a container without a call of its own: name modules in it"
        )
    if isinstance(module, NonDynamicallyQuantizableLinear):
        parent = name.rpartition(".")[0]
        raise ValueError(f"{name!r} is never called, nn.MultiheadAttention uses its weight: insert {where} {parent!r}")


def _twin(layer: nn.Module) -> nn.Module:
    """A copy that draws from the same generator: a copied one would give both layers the same masks."""
    generator = getattr(layer, "generator", None)
    return copy.deepcopy(layer, {id(generator): generator})


def _attach(module: nn.Module, layer: nn.Module, where: str) -> list[Any]:
    """Makes the layer a child of the module that is run; the hooks' handles, where hooks run it."""
    children = module._modules
    if not isinstance(module, nn.Sequential):
        children[_CHILD[where]] = layer
        hook = module.register_forward_hook(_after) if where == "after" else module.register_forward_pre_hook(_before)
        return [hook]
    others = dict(children) if where == "before" else {}
    if others:
        children.clear()
    children[_CHILD[where]] = layer
    children.update(others)
    return []


# The hooks look the layer up in the module they are called for, so that a copy of the model runs its own.


def _after(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (module._modules["dropout_after"](output[0]), *output[1:])  # type: ignore[misc]
    _check_tensor(output, module, "returned")
    return module._modules["dropout_after"](output)  # type: ignore[misc]


def _before(module: nn.Module, args: Any) -> Any:
    _check_tensor(args[0] if args else None, module, "was given, as its first argument without a keyword,")
    return (module._modules["dropout_before"](args[0]), *args[1:])  # type: ignore[misc]


def _check_tensor(value: Any, module: nn.Module, what: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"dropout was inserted at a {type(module).__name__} that {what} no tensor but a {type(value).__name__}: "
            "insert it at another module"
        )

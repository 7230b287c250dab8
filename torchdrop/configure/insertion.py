"""`insert`: dropout in a model that has none, without a change to its code or its state_dict keys."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..core.names import check_patterns, matches_itself, winner
from ..core.torch_state import check_compiled_code_is_replaceable, forget_compiled_code
from .rate_sites import names_of
from .surgery import Undoable, listed

CHILD = "inserted"
"""The name under which a module has the layers that were inserted at it."""


class Inserted(nn.Module):
    """Holds the dropout at a module's input and output: ``before`` and ``after``. The module's hooks run them.

    It is the identity, for modules that run all their children.

    Example:
        >>> Inserted()(3)
        3
    """

    def forward(self, input: Any) -> Any:
        return input


class Insertion(Undoable):
    """The layers that `insert` put into a model. ``undo()`` takes them out.

    Args:
        places: the modules they were put into, by name of the layer.
        where: "after" or "before".
        handles: the handles of the hooks that call them.
    """

    def __init__(self, places: dict[str, nn.Module], where: str, handles: list[Any]) -> None:
        super().__init__(list(places))
        self._places, self._where, self._handles = places, where, handles

    def _undo(self) -> None:
        check_compiled_code_is_replaceable()
        for handle in self._handles:
            handle.remove()
        for module in self._places.values():
            held = module._modules[CHILD]
            assert held is not None
            del held._modules[self._where]
            if not held._modules:
                del module._modules[CHILD]
        forget_compiled_code()

    def __repr__(self) -> str:
        return f"inserted {listed(self.done)}"


def insert(model: nn.Module, layers: Mapping[str, nn.Module], where: str = "after") -> Insertion:
    """Puts dropout into a model, at the output or the input of modules that are chosen by name.

    A layer that is put after "fc1" has the name "fc1.inserted.after", so that ``model.eval()``, `keep_probs`, schedules
    and Monte Carlo inference find it. It has no parameters, so it adds no key to the state_dict. If there are several
    outputs or inputs, it acts on the first. Code that torch.compile has compiled is compiled again.

    Args:
        model: any module.
        layers: for each glob pattern of module names a dropout layer without parameters. `*` matches one part of a
            name: `blocks.*` are the blocks and not the modules in them. If a pattern matches several modules, each has
            a copy of its own. The most specific pattern wins.
        where: "after" or "before" the module.

    Returns:
        The inserted layers, with ``undo()``.

    Raises:
        TypeError: a value is no dropout layer.
        ValueError: a pattern that matches no module; a module that has such a layer already, that is a dropout layer,
            or that is never called (containers, and the projection inside nn.MultiheadAttention); a layer with a
            state. Nothing is changed.
        RuntimeError: code was compiled by a PyTorch before 2.9, which cannot compile it again.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> keys = list(model.state_dict())
        >>> put = torchdrop.insert(model, {"1": torchdrop.Dropout(0.5)})
        >>> torchdrop.keep_probs(model)
        layer             kind     keep_prob  mode
        1.inserted.after  Dropout  0.5        train
        >>> list(model.state_dict()) == keys
        True
        >>> put.undo()
        >>> len(torchdrop.keep_probs(model))
        0
    """
    if where not in ("after", "before"):
        raise ValueError(f"where must be 'after' or 'before', got {where!r}")
    if not isinstance(layers, Mapping):
        raise TypeError(f"give patterns and layers as a mapping, {{'fc*': Dropout(0.5)}}, got {type(layers).__name__}")
    for pattern, layer in layers.items():
        _check_layer(pattern, layer)
    modules = {module: names for module, names in names_of(model).items() if _can_be_named(names[0])}
    check_patterns(layers, [n for names in modules.values() for n in names], [], "modules", matches_itself)
    places: list[tuple[str, nn.Module, nn.Module]] = []
    used: set[str] = set()
    for module, names in modules.items():
        best = winner(layers, names, matches_itself)
        if best is not None:
            _check_place(modules, module, where)
            places.append((names[0], module, _copy_sharing_generator(layers[best]) if best in used else layers[best]))
            used.add(best)
    check_compiled_code_is_replaceable()  # it does not look at hooks again
    inserted, handles = {}, []
    for name, module, layer in places:
        if CHILD not in module._modules:
            module._modules[CHILD] = Inserted().train(module.training)
        held = module._modules[CHILD]
        assert held is not None
        held._modules[where] = layer.train(module.training)
        hook = module.register_forward_hook(_after) if where == "after" else module.register_forward_pre_hook(_before)
        handles.append(hook)
        inserted[f"{name}.{CHILD}.{where}"] = module
    forget_compiled_code()
    return Insertion(inserted, where, handles)


def _can_be_named(name: str) -> bool:
    return name != "" and CHILD not in name.split(".")


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
    held = module._modules.get(CHILD)
    if held is None and hasattr(module, CHILD):
        raise ValueError(f"{name!r} has an attribute {CHILD!r} of its own, which is the name that dropout would get")
    if held is not None and where in held._modules:
        raise ValueError(
            f"{name!r} has a layer {where} it already: undo the first insertion, or set the rate of "
            f"'{name}.{CHILD}.{where}'"
        )
    if type(module).forward is nn.Module.forward:
        kind = type(module).__name__
        raise ValueError(f"{name!r} is a {kind}, a container without a call of its own: name modules in it")
    if isinstance(module, NonDynamicallyQuantizableLinear):
        parent = name.rpartition(".")[0]
        raise ValueError(f"{name!r} is never called, nn.MultiheadAttention uses its weight: insert {where} {parent!r}")


def _copy_sharing_generator(layer: nn.Module) -> nn.Module:
    """Makes a copy that draws from the same generator: a copied one would give both layers the same masks."""
    generator = getattr(layer, "generator", None)
    return copy.deepcopy(layer, {id(generator): generator})


# The hooks look the layer up in the module they are called for, so that a copy of the model runs its own.


def _after(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        dropped = _drop(module, "after", output[0])
        if hasattr(output, "_replace"):  # a named tuple
            fields: Any = output._fields  # type: ignore[attr-defined]
            return output._replace(**{fields[0]: dropped})
        return (dropped, *output[1:])
    _check_tensor(output, module, "returned")
    return _drop(module, "after", output)


def _before(module: nn.Module, args: Any) -> Any:
    _check_tensor(args[0] if args else None, module, "was given, as its first argument without a keyword,")
    return (_drop(module, "before", args[0]), *args[1:])


def _drop(module: nn.Module, where: str, input: Tensor) -> Tensor:
    return getattr(getattr(module, CHILD), where)(input)


def _check_tensor(value: Any, module: nn.Module, what: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"dropout was inserted at a {type(module).__name__} that {what} no tensor but a {type(value).__name__}: "
            "insert it at another module"
        )

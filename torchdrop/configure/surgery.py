"""`replace`: torchdrop's layers and calls in the place of PyTorch's, and back."""

from __future__ import annotations

import types
import warnings
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..core.checks import check_bool, unwrapped
from ..core.rate import Rated
from ..layers.alpha import AlphaDropout, FeatureAlphaDropout
from ..layers.channel import Dropout1d, Dropout2d, Dropout3d
from ..layers.dropout import Dropout
from .rate_sites import names_of
from .reach import calls_of, class_forwards, has_own_forward, is_reachable, is_reached, leave, reach
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
    """A change to a model that can be undone.

    Args:
        done: the names of the layers.
    """

    def __init__(self, done: list[str]) -> None:
        self.done = done
        self.undone: bool = False

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


def listed(names: list[str], kind: str = "dropout layer") -> str:
    """Returns the number of layers and their names, as a text.

    >>> listed(["a", "b"]), listed([""]), listed([])
    ('2 dropout layers: a, b', '1 dropout layer: (model)', 'no dropout layer')
    """
    if not names:
        return f"no {kind}"
    return f"{len(names)} {kind}{'s' if len(names) > 1 else ''}: {', '.join(n or '(model)' for n in names)}"


class Replacement(Undoable):
    """The result of `replace`. ``undo()`` takes it back; printing it lists the dropout that was not reached.

    Args:
        swapped: the layers that were swapped, and their names.
        reached: the modules whose own random calls are served, and their names.
        unreached: the rest of the model's dropout.
    """

    def __init__(
        self, swapped: dict[nn.Module, str], reached: dict[nn.Module, str], unreached: list[Unreached]
    ) -> None:
        super().__init__(list(swapped.values()))
        self.reached = list(reached.values())
        self.unreached = unreached
        self._swapped = [(layer, name, type(layer)) for layer, name in swapped.items()]
        self._reached = [(module, name, type(module)) for module, name in reached.items()]

    def _undo(self) -> None:
        for layer, name, kind in [*self._swapped, *self._reached]:
            if type(layer) is not kind:
                raise ValueError(
                    f"{name!r} is no longer the layer that was put there, but {_full_name(type(layer))}: "
                    "undo first what was done after that"
                )
        _swap({layer: name for layer, name, _ in self._swapped})
        for module, _, _ in self._reached:
            leave(module)

    def __repr__(self) -> str:
        lines = [f"replaced {listed(self.done)}"]
        if self.reached:
            lines.append(f"serves the calls of {listed(self.reached, 'module')}")
        if self.unreached:
            lines.append(f"not reached: {len(self.unreached)}")
            lines += [f"  {entry}" for entry in self.unreached]
        return "\n".join(lines)


def replace(model: nn.Module, *, to: str = "torchdrop", sites: bool = True) -> Replacement:
    """Makes all dropout in a model torchdrop's, in place: its layers, and the random calls of its modules.

    Layers of torch.nn become torchdrop's. Modules whose own code draws, with functional dropout, dropout of attention
    weights, dropout between the layers of nn.LSTM, torch.rand or bernoulli_, make these calls as before, and in train
    mode torchdrop serves them: with masks that are never stored, that follow the seed, and that are the same for any
    thread count. Attention is `torchdrop.functional.scaled_dot_product_attention`. In eval mode nothing is served.

    Each module stays the object it is and changes its class, so that aliases, modules used in several places, hooks,
    training flags, rates and all references stay valid. The class of a module whose calls are served has the name of
    its own class and is derived from it. state_dict keys do not change, and outputs in eval mode do not. ``undo()``
    changes the classes back and leaves rates of layers that were set meanwhile as they are.

    A served call has the rate that the module's code passes. After a forward in train mode that is not compiled, it is
    listed by `keep_probs` under the module's name, its kind and its number, "encoder.self_attn.attention:0", and
    `set_keep_prob` and schedules can give it a rate of its own. If a rate is an attribute that the code only passes on,
    compiled code gets it as a tensor and is compiled once for all rates.

    Args:
        model: any module.
        to: "torchdrop", or "torch" for the other direction: torchdrop's layers become torch.nn's, and calls are
            PyTorch's again.
        sites: whether random calls are served. If not, layers alone are swapped.

    Returns:
        The layers that were swapped and the modules whose calls are served, with ``undo()``, and the dropout that could
        not be reached: subclasses of torch.nn's layers with code of their own, modules whose instance was given another
        forward (that of accelerate's hooks follows), and scripted modules. Random calls are looked for in the source of
        the modules, and `audit` shows by a run what that did not find.

    Raises:
        TypeError: `model` is no module.
        ValueError: another value of `to`; or towards "torch" a layer that torch.nn cannot express. Nothing is changed.

    Warns:
        UserWarning: there is nothing to replace.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.TransformerEncoderLayer(8, 2, dropout=0.1)
        >>> swap = torchdrop.replace(model)
        >>> type(model.dropout1).__module__, model.dropout1.p
        ('torchdrop.layers.dropout', 0.1)
        >>> print(swap)
        replaced 3 dropout layers: dropout, dropout1, dropout2
        serves the calls of 1 module: self_attn
        >>> y = model(torch.randn(5, 3, 8))
        >>> torchdrop.set_keep_prob(model, {"self_attn.attention:0": 0.8})
        >>> print(torchdrop.keep_probs(model))
        layer                  kind                keep_prob  mode
        self_attn              MultiheadAttention  0.9        train  number in .dropout
        self_attn.attention:0  MultiheadAttention  0.8        train  call, set by name
        dropout                Dropout             0.9        train
        dropout1               Dropout             0.9        train
        dropout2               Dropout             0.9        train
        >>> swap.undo()
        >>> type(model.dropout1)
        <class 'torch.nn.modules.dropout.Dropout'>
    """
    if to not in ("torchdrop", "torch"):
        raise ValueError(f"to must be 'torchdrop' or 'torch', got {to!r}")
    check_bool("sites", sites)
    ours = to == "torchdrop"
    names = names_of(model)
    kinds = OURS if ours else STOCK
    swapped = {module: every[0] for module, every in names.items() if type(module) in kinds}
    fixed = {module: name for module, name in swapped.items() if has_own_forward(module)}
    for module, every in names.items():
        if not ours and isinstance(module, Rated) and module not in swapped:
            raise ValueError(f"{every[0]!r} is a {_full_name(type(module))}, for which torch.nn has no layer")
        if not ours and calls_of(module) is not None and not is_reached(module):
            raise ValueError(
                f"{every[0]!r} has the class {type(module).__name__}, made of the one that replace gave it: undo first "
                "what was done after that"
            )
        if not ours and module in fixed:
            raise ValueError(
                f"{every[0]!r} has a forward of its own on its instance, which calls that of "
                f"{_full_name(type(module))}: set the class's forward again first"
            )
    swapped = {module: name for module, name in swapped.items() if module not in fixed}
    reached = {m: every[0] for m, every in names.items() if (is_reachable(m) if ours and sites else is_reached(m))}
    reached = reached if sites else {}
    _swap(swapped)
    for module in reached:
        (reach if ours else leave)(module)
    rest = unreached(unwrapped(model)) if ours else []
    if not (swapped or reached):
        whose = "torch.nn" if ours else "torchdrop"
        but = ", save those whose instance has a forward of its own" if fixed else ""
        warnings.warn(f"replace: the model has no dropout layers of {whose} to replace{but}", UserWarning, stacklevel=2)
    return Replacement(swapped, reached if ours else {}, rest)


def _full_name(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"


def _swap(layers: Mapping[nn.Module, str]) -> None:
    """Changes the classes of all the layers, or of none.

    Raises:
        ValueError: a layer has something that its new class cannot hold.
    """
    fresh = [(layer, _counterpart(layer, name)) for layer, name in layers.items()]
    plain = vars(nn.Module()).keys()
    for layer, counterpart in fresh:
        own, forwards = vars(type(layer)(0.5)).keys() - plain, class_forwards(layer)
        for attribute in own:
            vars(layer).pop(attribute, None)
        layer.__class__ = type(counterpart)
        vars(layer).update({name: value for name, value in vars(counterpart).items() if name not in plain})
        vars(layer).update({name: types.MethodType(type(layer).forward, layer) for name in forwards})


def _counterpart(layer: nn.Module, name: str) -> nn.Module:
    """Makes a layer of the other package with the same rate."""
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
        "a shard": getattr(layer, "shard", None) is not None,
        "inverted=False": not getattr(layer, "inverted", True),
    }
    reasons = [reason for reason, holds in special.items() if holds]
    if reasons:
        raise ValueError(
            f"{name!r} has {' and '.join(reasons)}, which torch.nn's {type(layer).__name__} cannot express"
        )
    return STOCK[type(layer)](layer.p, layer.inplace)

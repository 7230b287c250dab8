"""Where a model holds its rates: in dropout layers, in nn.LSTM and nn.MultiheadAttention, in plain attributes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..layers._rate import Rate, Rated, read_rate
from ..rules import LayerSize

_NAMED = re.compile(
    r"(?i)(drop(_?(out|path|block|connect|head|key|edge))?(_?(p|prob|probability|rate|ratio))?|keep_?prob)$"
)
_KEPT = re.compile(r"(?i)keep")
_DROPPING = re.compile(r"(?i)drop|stochasticdepth")
_PLAIN = ("p", "prob", "rate")


@dataclass(frozen=True)
class Holder:
    """One place that holds a rate.

    Args:
        name: of the layer in the model; with the attribute's name after it where that is a plain number.
        module: that holds it.
        attribute: its name where it is a number; "" for a dropout layer.
        aliases: every name of the layer, `name` first.
    """

    name: str
    module: nn.Module
    attribute: str
    aliases: tuple[str, ...]

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def keep_prob(self) -> Rate:
        if isinstance(self.module, Rated):
            return self.module.keep_prob
        value = float(getattr(self.module, self.attribute or "p"))
        return value if self._keeps else round(1.0 - value, 15)

    def check(self, keep_prob: Any) -> Rate:
        """A keep probability that can be set here.

        Raises:
            TypeError, ValueError: it is none, or a tensor where only a number can be held.
        """
        try:
            checked, _ = read_rate(None, keep_prob) if keep_prob is not None else (None, None)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, for {self.name!r}") from None
        if checked is None:
            raise TypeError(f"keep_prob must be a number or a tensor, got NoneType, for {self.name!r}")
        if isinstance(self.module, Rated):
            self.module._check_rate(checked)
        elif isinstance(checked, torch.Tensor):
            raise TypeError(
                f"{self.name!r} ({self.kind}) holds its rate as a number, so keep_prob must be a number, got a tensor; "
                "torchdrop.replace(model) puts torchdrop's layers, which take tensors, in the place of torch.nn's"
            )
        return checked

    def set(self, keep_prob: Rate) -> None:
        """Sets what `check` has let pass."""
        if isinstance(self.module, Rated):
            self.module.keep_prob = keep_prob
        else:
            assert not isinstance(keep_prob, torch.Tensor)
            value = keep_prob if self._keeps else round(1.0 - keep_prob, 15)
            setattr(self.module, self.attribute or "p", value)

    def state(self) -> Any:
        """What `restore` puts back, to the bit."""
        if isinstance(self.module, Rated):
            return self.module.keep_prob, self.module.p
        return getattr(self.module, self.attribute or "p")

    def restore(self, state: Any) -> None:
        if isinstance(self.module, Rated):
            self.module._hold(*state)
        else:
            setattr(self.module, self.attribute or "p", state)

    @property
    def _keeps(self) -> bool:
        return bool(_KEPT.search(self.attribute))


def unwrapped(model: Any) -> nn.Module:
    """The module itself, or the original of a compiled one.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return unwrapped(model._orig_mod) if isinstance(getattr(model, "_orig_mod", None), nn.Module) else model


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it is compiled."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def names_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module under all its names, which are those of the uncompiled model."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in unwrapped(model).named_modules(remove_duplicate=False):
        own = ".".join(part for part in name.split(".") if part != "_orig_mod")
        known = names.get(module, ())
        if own not in known:
            names[module] = (*known, own)
    return names


def holders(model: nn.Module) -> list[Holder]:
    """Every place in the model that holds a rate, in the order of `named_modules`."""
    found = []
    for module, aliases in names_of(model).items():
        for attribute in _attributes(module):
            plain = attribute and not isinstance(module, nn.RNNBase | nn.MultiheadAttention)
            full = tuple(f"{alias}.{attribute}".lstrip(".") for alias in aliases) if plain else aliases
            found.append(Holder(full[0], module, attribute, full))
    return found


def _attributes(module: nn.Module) -> list[str]:
    """The names of the attributes that hold rates; "" stands for a dropout layer's own."""
    if isinstance(module, _DropoutNd):
        return [""]
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return ["dropout"]
    dropping = _DROPPING.search(type(module).__name__)
    return [
        name
        for name, value in vars(module).items()
        if type(value) is float
        and 0.0 <= value <= 1.0
        and not name.startswith("_")
        and (_NAMED.search(name) or (dropping and name in _PLAIN))
    ]


def sizes(model: nn.Module, chosen: list[Holder]) -> list[LayerSize]:
    """What rules look at: the weights before each layer, in the order in which modules are registered."""
    before: dict[nn.Module, int | None] = {}
    weights: int | None = None
    for module in names_of(model):
        own = 0 if isinstance(module, nn.Embedding) else sum(p.numel() for p in _matrices(module))
        weights = own or weights
        before[module] = weights
    order = list(before)
    last = max((at for at, m in enumerate(order) if _matrices(m) and not isinstance(m, nn.Embedding)), default=-1)
    return [LayerSize(h.name, before[h.module], order.index(h.module) >= last >= 0) for h in chosen]


def _matrices(module: nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dim() >= 2]

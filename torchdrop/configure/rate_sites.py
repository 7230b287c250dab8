"""The places in a model that hold its rates: dropout layers, nn.LSTM and nn.MultiheadAttention, plain attributes, and
the calls that modules make in their own code."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

from ..core.checks import unwrapped
from ..core.rate import Probability, Rate, Rated, read_rate
from ..handlers.random_functions import RATED
from ..handlers.training import Calls, OwnRate
from ..rules import LayerSize
from .reach import calls_of

_NAMED = re.compile(
    r"(?i)(drop(_?(out|path|block|connect|head|key|edge))?(_?(p|prob|probability|rate|ratio))?|keep_?prob)$"
)
_KEPT = re.compile(r"(?i)keep")
_DROPPING = re.compile(r"(?<![a-z])[Dd]rop|StochasticDepth")
_PLAIN = ("p", "prob", "rate")
_CALL = re.compile(rf"({'|'.join(RATED)}):\d+")


_disabled: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""The rates of disabled layers, by module and attribute, as `RateSite.state` has them."""


@dataclass(frozen=True)
class RateSite:
    """One place that holds a rate.

    Args:
        name: the layer's name in the model, followed by the attribute's name if the rate is a plain number.
        module: the module that holds it.
        attribute: the name of the attribute if the rate is a number; "" for a dropout layer.
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
    def keep_prob(self) -> Probability:
        if isinstance(self.module, Rated):
            return self.module.keep_prob
        value = float(getattr(self.module, self.attribute or "p"))
        return value if self._keeps else round(1.0 - value, 15)

    def check(self, keep_prob: Any) -> Probability:
        """Returns a keep probability in a form that can be set here.

        Raises:
            TypeError, ValueError: it is no keep probability, or a tensor where only a number can be held.
        """
        try:
            checked = check_keep_prob(keep_prob)
            if isinstance(self.module, Rated):
                self.module._check_rate(checked)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, for {self.name!r}") from None
        if isinstance(checked, torch.Tensor) and not isinstance(self.module, Rated):
            if isinstance(self, CallRate):
                raise TypeError(f"{self.name!r} is a call of {self.kind}: keep_prob must be a number, got a tensor")
            advice = "" if self.attribute else "; torchdrop.replace(model) makes it a layer that takes tensors"
            raise TypeError(
                f"{self.name!r} ({self.kind}) holds its rate as a number, so keep_prob must be a number, got a tensor"
                + advice
            )
        return checked

    def set(self, keep_prob: Probability) -> None:
        """Sets a value that `check` has returned. If it is the rate that is there already, that stays to the bit."""
        if self.is_disabled:
            _disabled[self.module][self.attribute] = self._state_with(keep_prob)
            return
        now = self.keep_prob
        if not isinstance(now, torch.Tensor) and not isinstance(keep_prob, torch.Tensor) and now == keep_prob:
            return
        self._write(keep_prob)

    def _write(self, keep_prob: Probability) -> None:
        if isinstance(self.module, Rated):
            self.module.keep_prob = keep_prob
        else:
            setattr(self.module, self.attribute or "p", self._value_of(keep_prob))

    def _state_with(self, keep_prob: Probability) -> Any:
        """Returns the state that `restore` puts back to have this keep_prob."""
        return keep_prob, self._value_of(keep_prob)

    def _value_of(self, keep_prob: Probability) -> Any:
        """Returns the value that an attribute holds for a keep_prob."""
        if self._keeps or isinstance(keep_prob, torch.Tensor):
            return keep_prob if self._keeps else 1.0 - keep_prob
        return round(1.0 - keep_prob, 15)

    @property
    def is_disabled(self) -> bool:
        return self.attribute in _disabled.get(self.module, {})

    def disable(self) -> None:
        """Sets keep_prob 1 until `enable` restores the rate from before, or the one that was set meanwhile."""
        state = self.state()
        self.set(1.0)
        _disabled.setdefault(self.module, {})[self.attribute] = state

    def enable(self) -> None:
        states = _disabled.get(self.module, {})
        if self.attribute in states:
            self.restore(states.pop(self.attribute))

    def state(self) -> Any:
        """Returns a state that `restore` puts back, to the bit, also if the layer has another class by then."""
        return self.keep_prob, getattr(self.module, self.attribute or "p")

    def restore(self, state: Any) -> None:
        if isinstance(self.module, Rated):
            keep_prob, p = state
            self.module.rate = Rate(keep_prob, p, self.module._formula).held(self.module)
        else:
            setattr(self.module, self.attribute or "p", state[1])

    @property
    def _keeps(self) -> bool:
        return bool(_KEPT.search(self.attribute))

    @property
    def is_there(self) -> bool:
        """Whether the module still has this rate."""
        return hasattr(self.module, self.attribute or "p")

    @property
    def is_known(self) -> bool:
        """Whether it has a keep_prob now, as all have but calls that have not been made."""
        return True

    @property
    def recompiles(self) -> bool:
        """Whether compiled code is compiled again for another rate."""
        calls = calls_of(self.module)
        return not isinstance(self.module, Rated) and (calls is None or self.attribute not in calls.numbers)

    @property
    def note(self) -> str:
        """A remark on the place in the table of `keep_probs`; none for a dropout layer."""
        return f"number in .{self.attribute}" if self.attribute else ""


class CallRate(RateSite):
    """The rate of a call that a module makes in its own code, "attention:0". It is the one that the code passes until
    another is set."""

    @property
    def _calls(self) -> Calls:
        calls = calls_of(self.module)
        assert calls is not None
        return calls

    @property
    def keep_prob(self) -> Probability:
        own = self._calls.own.get(self.attribute)
        if own is not None:
            return own.keep_prob
        passed = self._calls.passed.get(self.attribute, math.nan)
        return 1.0 - passed if isinstance(passed, torch.Tensor) else round(1.0 - passed, 15)

    def _write(self, keep_prob: Probability) -> None:
        self._calls.own[self.attribute] = OwnRate(keep_prob)

    def _state_with(self, keep_prob: Probability) -> Any:
        return OwnRate(keep_prob)

    def state(self) -> Any:
        return self._calls.own.get(self.attribute)

    def restore(self, state: Any) -> None:
        self._calls.own.pop(self.attribute, None)
        if state is not None:
            self._calls.own[self.attribute] = state

    @property
    def is_there(self) -> bool:
        return calls_of(self.module) is not None

    @property
    def is_known(self) -> bool:
        return self.attribute in self._calls.own or self.attribute in self._calls.passed

    @property
    def recompiles(self) -> bool:
        return False

    @property
    def note(self) -> str:
        if self.attribute not in self._calls.own:
            return "call, at the rate that the code passes"
        unmade = self._calls.passed and self.attribute not in self._calls.passed
        return "call, set by name, not made" if unmade else "call, set by name"


def check_keep_prob(keep_prob: Any) -> Probability:
    """Returns a keep probability, checked.

    Raises:
        TypeError, ValueError: it is no keep probability.
    """
    if keep_prob is None or isinstance(keep_prob, bool):
        raise TypeError(f"keep_prob must be a number or a tensor, got {type(keep_prob).__name__}")
    checked, _ = read_rate(None, keep_prob)
    return checked


def compiled_parts(model: nn.Module) -> list[nn.Module]:
    """Returns the modules in the model that are compiled, which may be the model itself."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    ]


def names_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Returns every module with all its names, which are those of the uncompiled model."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in unwrapped(model).named_modules(remove_duplicate=False):
        if unwrapped(module) is not module:
            continue  # the original of the compiled module comes next, under the same name
        own = ".".join(part for part in name.split(".") if part != "_orig_mod")
        known = names.get(module, ())
        if own not in known:
            names[module] = (*known, own)
    return names


def rate_sites(model: nn.Module) -> list[RateSite]:
    """Returns every place in the model that holds a rate, in the order of `named_modules`."""
    found = []
    for module, aliases in names_of(model).items():
        for attribute in _attributes(module):
            plain = attribute and not _is_own(module, attribute)
            full = tuple(f"{alias}.{attribute}".lstrip(".") for alias in aliases) if plain else aliases
            found.append(RateSite(full[0], module, attribute, full))
        calls = calls_of(module)
        found += [_call_rate(module, aliases, name) for name in sorted(calls.passed | calls.own)] if calls else []
    return found


def _call_rate(module: nn.Module, aliases: tuple[str, ...], name: str) -> CallRate:
    full = tuple(f"{alias}.{name}".lstrip(".") for alias in aliases)
    return CallRate(full[0], module, name, full)


def calls_named(model: nn.Module, names: Iterable[str]) -> list[RateSite]:
    """Returns the places that these names mean, of calls that have not been made yet: the kind of the call is known,
    and its module is one whose calls are served and which has not run."""
    found: list[RateSite] = []
    modules = names_of(model)
    for name in names:
        owner, _, call = name.rpartition(".") if isinstance(name, str) else ("", "", "")
        if not _CALL.fullmatch(call):
            continue
        for module, aliases in modules.items():
            calls = calls_of(module)
            if owner in aliases and calls is not None and not calls.passed and call not in calls.own:
                found.append(_call_rate(module, aliases, call))
    return found


def _is_own(module: nn.Module, attribute: str) -> bool:
    """Whether the attribute is the rate that torch.nn gives a module of this kind."""
    return attribute == "dropout" and isinstance(module, (nn.RNNBase, nn.MultiheadAttention))


def _attributes(module: nn.Module) -> list[str]:
    """Returns the names of the attributes that hold rates; "" is a dropout layer's own."""
    is_layer = isinstance(module, _DropoutNd)
    dropping = not is_layer and _DROPPING.search(type(module).__name__)
    plain = [
        name
        for name, value in vars(module).items()
        if type(value) in (int, float)
        and 0 <= value <= 1
        and not name.startswith("_")
        and (_NAMED.search(name) or (dropping and name in _PLAIN))
    ]
    return ["", *plain] if is_layer else plain


def sizes(model: nn.Module, chosen: list[RateSite]) -> list[LayerSize]:
    """Returns the layers as rules see them: with the weights before each, in the order of registration."""
    before: dict[nn.Module, int | None] = {}
    weights: int | None = None
    last = -1
    for at, module in enumerate(names_of(model)):
        own = _weights(module)
        weights, last = (own, at) if own else (weights, last)
        before[module] = weights
    order = {module: at for at, module in enumerate(before)}
    return [LayerSize(h.name, before[h.module], order[h.module] >= last >= 0) for h in chosen]


def _weights(module: nn.Module) -> int:
    """Counts the elements of the weight matrices of a module; an embedding's rows are inputs."""
    if isinstance(module, (nn.Embedding, parametrize.ParametrizationList)):
        return 0
    own = [*module.parameters(recurse=False)]
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        own += [getattr(module, name) for name in module.parametrizations]
    return sum(tensor.numel() for tensor in own if tensor.dim() >= 2)

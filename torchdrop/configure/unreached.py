"""The dropout that a swap of layers cannot reach: a function call, a number, or a part of a fused module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..core.rate import Rated
from .drawing import random_calls
from .rate_sites import names_of, rate_sites
from .reach import has_own_forward, is_reached


@dataclass(frozen=True)
class Unreached:
    """Dropout in a model that is no layer to swap.

    Args:
        name: the name of the module that drops.
        kind: the module's class.
        what: a description of the dropout, such as "holds a rate as a number in .dropout".
        advice: a remedy.
    """

    name: str
    kind: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name or '(model)'} ({self.kind}): {self.what}; {self.advice}"


def unreached(model: nn.Module) -> list[Unreached]:
    """Finds all that can be seen without running the model: attributes, and calls in the source of the forwards."""
    found = []
    for site in rate_sites(model):
        if isinstance(site.module, Rated) or is_reached(site.module):
            continue
        if isinstance(site.module, _DropoutNd):
            if not type(site.module).__module__.startswith("torch."):
                what = "a subclass of torch.nn's dropout with code of its own"
                found.append(Unreached(site.name, site.kind, what, _settable(site.name)))
            elif has_own_forward(site.module):
                what = "its instance has a forward of its own, which calls that of torch.nn"
                advice = "call torchdrop.replace before what sets it, or set the class's forward again"
                found.append(Unreached(site.name, site.kind, what, advice))
            continue
        what = f"holds a rate as a number in .{site.attribute} (keep_prob {site.keep_prob:g})"
        found.append(Unreached(site.name, site.kind, what, _settable(site.name)))
    held = (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)  # listed above, with their rates
    advice = "its masks stay PyTorch's; call torchdrop.functional there to have ours"
    for module, names in names_of(model).items():
        calls = [] if is_reached(module) or isinstance(module, held) else random_calls(type(module))
        if calls:
            what = f"calls {', '.join(calls)} in its forward"
            found.append(Unreached(names[0], type(module).__name__, what, advice))
    return found


def _settable(name: str) -> str:
    return f"torchdrop.set_keep_prob(model, {{{name!r}: ...}}) sets it"

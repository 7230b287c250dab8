"""The dropout that a swap of layers cannot reach: a function call, a number, or a part of a fused module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..core.rate import Rated
from ..handlers.training import SERVED
from .drawing import random_calls
from .rate_sites import names_of, rate_sites
from .reach import calls_of, has_own_forward

_OPERATORS = {f"aten::{function.__name__}" for function in SERVED}
"""The random operators that a graph of TorchScript can have."""


_ATTENTION = ("attention_interface", "scaled_dot_product_attention", "multi_head_attention_forward")


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
    found = list(_rates(model))
    inner: set[nn.Module] = set()  # the parts of scripted modules, whose graphs have those of their parts in them
    for module, names in names_of(model).items():
        if isinstance(module, torch.jit.ScriptModule):
            entry = None if module in inner else _scripted(module)
            inner.update(module.modules())
        elif calls_of(module) is not None:
            entry = _of_other_kernels(module)
        else:
            entry = _called(module)
        if entry is not None:
            found.append(Unreached(names[0], type(module).__name__, *entry))
    return found


def _rates(model: nn.Module) -> Iterator[Unreached]:
    for site in rate_sites(model):
        if isinstance(site.module, Rated) or calls_of(site.module) is not None:
            continue
        if isinstance(site.module, _DropoutNd):
            if not type(site.module).__module__.startswith("torch."):
                what = "a subclass of torch.nn's dropout with code of its own"
                yield Unreached(site.name, site.kind, what, _settable(site.name))
            elif has_own_forward(site.module):
                what = "its instance has a forward of its own, which calls that of torch.nn"
                advice = "call torchdrop.replace before what sets it, or set the class's forward again"
                yield Unreached(site.name, site.kind, what, advice)
            continue
        what = f"holds a rate as a number in .{site.attribute} (keep_prob {site.keep_prob:g})"
        yield Unreached(site.name, site.kind, what, _settable(site.name))


def _called(module: nn.Module) -> tuple[str, str] | None:
    if isinstance(module, (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)):  # listed with their rates
        return None
    calls = random_calls(type(module))
    if not calls:
        return None
    advice = "its masks stay PyTorch's; call torchdrop.functional there to have ours"
    return f"calls {', '.join(calls)} in its forward", advice


def _of_other_kernels(module: nn.Module) -> tuple[str, str] | None:
    """Describes attention whose masks are drawn in a kernel of another package, or of PyTorch on CUDA."""
    calls = random_calls(type(module))
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if "attention_interface" in calls and chosen not in (None, "eager", "sdpa", "torchdrop"):
        advice = "the masks are that kernel's; choose attn_implementation='sdpa' to have ours"
        return f"computes attention with {chosen}", advice
    if any(call.endswith(_ATTENTION) for call in calls) and _is_on_cuda(module):
        advice = "its masks are PyTorch's there; torchdrop.use_backend('reference') gives ours, for tests"
        return "computes attention by PyTorch's kernels on CUDA", advice
    return None


def _is_on_cuda(module: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in module.parameters())


def _scripted(module: torch.jit.ScriptModule) -> tuple[str, str] | None:
    drawn = _scripted_calls(module)
    if not drawn:
        return None
    advice = "its masks stay PyTorch's; replace the calls of the module that it was made from"
    return f"is made by TorchScript, and its code calls {', '.join(drawn)}", advice


def _scripted_calls(module: torch.jit.ScriptModule) -> list[str]:
    """Returns the random operators in the graph of a scripted or traced module."""
    graph = getattr(module, "inlined_graph", None)
    return sorted({node.kind() for node in _nodes(graph)} & _OPERATORS) if graph is not None else []


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _settable(name: str) -> str:
    return f"torchdrop.set_keep_prob(model, {{{name!r}: ...}}) sets it"

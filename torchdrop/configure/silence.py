"""Functional dropout switched off while a model runs: its rate is a constant in a forward, so no name reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..monte_carlo.sources import DESCRIBE, OPENED, RECURRENT

_KEPT = RECURRENT | {F.rrelu, torch.rrelu, torch.rrelu_}
"""What goes on as it is: the rate of a recurrent layer has a name, and cuDNN's backward asks for its training flag;
random leaky ReLUs drop nothing."""


class _Silence(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.running = 0

    def begin(self, module: nn.Module, args: Any) -> None:
        self.running += 1

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.running or func in _KEPT:
            return func(*args, **kwargs)
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        if func in DESCRIBE:
            return DESCRIBE[func](self, func, *args, **kwargs).plain()
        return func(*args, **kwargs)


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """Within it, dropout functions, and attention with dropout, drop nothing where a forward of the model "
    "calls them."""
    mode = _Silence()
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(mode.begin, prepend=True))
        handles.append(module.register_forward_hook(mode.end, always_call=True))
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()

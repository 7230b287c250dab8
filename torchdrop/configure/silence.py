"""Functional dropout switched off while a model runs: its rate is a constant in a forward, so no name reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core import sites
from ..core.rate import Rated
from ..core.torch_state import transforms_active
from ..kernels.mask_params import keeps_all
from ..monte_carlo.mode import checkpointed
from ..monte_carlo.sources import DESCRIBE, OPENED, RECURRENT
from ..random import draw_key

_KEPT = RECURRENT | {F.rrelu, torch.rrelu, torch.rrelu_}
"""What goes on as it is: the rate of a recurrent layer has a name, and cuDNN's backward asks for its training flag;
random leaky ReLUs drop nothing."""


class _Silence(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._modules: list[nn.Module] = []

    def begin(self, module: nn.Module, args: Any) -> None:
        self._modules.append(module)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._modules:  # not so if a hook before `begin` has raised
            while self._modules.pop() is not module:
                pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._modules or func in _KEPT:
            return func(*args, **kwargs)
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        if func is sites.apply:
            return self._undropped(*args)
        if func is sites.draw:  # a layer whose rate is set to 0
            return func(*args)
        if func is sites.is_on:
            return self._is_on(*args)
        if func in DESCRIBE:
            draw = DESCRIBE[func](self, func, *args, **kwargs)
            if draw.on and not draw.flagged and checkpointed():
                _refuse(draw.kind)
            return draw.plain()
        return func(*args, **kwargs)

    def _is_on(self, training: bool) -> bool:
        if isinstance(self._modules[-1], Rated):
            return training
        if training and checkpointed():
            _refuse("dropout of torchdrop")
        return False

    def _undropped(
        self, operator: Any, input: Tensor, params: Any, shape: Any, inplace: bool, generator: torch.Generator | None
    ) -> Tensor:
        """What torchdrop's layers do at keep_prob 1: a key is drawn, so that what else draws does not depend on it."""
        if not isinstance(self._modules[-1], Rated) and not keeps_all(params) and checkpointed():
            _refuse("dropout of torchdrop")
        if not transforms_active():
            draw_key(input.device, generator)
        return input


def _refuse(kind: str) -> None:
    raise RuntimeError(
        f"activation checkpointing runs a functional {kind} again in backward, where it cannot be disabled: switch "
        "checkpointing off in the model, or let the call pass training=self.training with an attribute of the module "
        "as its rate"
    )


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """Within it, dropout functions and attention drop nothing where a forward of the model calls them."""
    mode = _Silence()
    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(mode.begin, prepend=True))
            handles.append(module.register_forward_hook(mode.end, always_call=True))
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()

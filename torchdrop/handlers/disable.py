"""A handler that leaves out functional dropout: its rate is a constant in a forward, which no name refers to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import sites
from ..core.rate import Rated
from ..core.torch_state import transforms_active
from ..kernels.mask_params import keeps_all
from ..random import draw_key
from .base import Handler, checkpointed
from .calls import RandomCall
from .random_functions import RECURRENT
from .tracker import Tracker

_KEPT = RECURRENT | {F.rrelu, torch.rrelu, torch.rrelu_}
"""The functions that are called as they are: the rate of a recurrent layer has a name, and cuDNN's backward needs its
training flag; random leaky ReLUs drop nothing."""


class Disable(Handler):
    """Leaves out the dropout that functions of a running model would make; layers with a rate of their own have 0.

    It decides only for itself: handlers outside of it serve the calls that it lets pass.
    """

    decides = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(Tracker())
        self._rated = {name for name, module in model.named_modules() if isinstance(module, Rated)}

    def _outside(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _KEPT:
            return func(*args, **kwargs)
        if func is sites.draw:  # a layer whose rate is set to 0
            return func(*args)
        if func is sites.apply:
            return self._undropped(*args)
        return super()._inside(func, args, kwargs)

    def _meet(self, func: Any, draw: RandomCall) -> Any:
        if draw.on and not draw.flagged and checkpointed():
            _refuse(draw.kind)
        return draw.plain()

    def _is_on(self, training: bool) -> bool:
        if self._is_in_layer():
            return training
        if training and checkpointed():
            _refuse("dropout of torchdrop")
        return False

    def _is_in_layer(self) -> bool:
        return self._tracker.stack[-1] in self._rated

    def _undropped(
        self, operator: Any, input: Tensor, params: Any, shape: Any, inplace: bool, generator: torch.Generator | None
    ) -> Tensor:
        """Does what torchdrop's layers do at keep_prob 1: draws a key, so that other draws do not depend on it."""
        if not self._is_in_layer() and not keeps_all(params) and checkpointed():
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
def without_functional_dropout(model: nn.Module) -> Iterator[None]:
    """Within the context, dropout functions and attention drop nothing if a forward of the model calls them."""
    handler = Disable(model)
    with handler._tracker.follow(model), handler:
        yield

"""Frozen masks: every forward of a model starts from the same state of PyTorch's generators."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .. import random
from ..core.checks import check_integer, check_module
from ..core.torch_state import in_backward, is_compiling
from ..seeding import States, put_back, start, states
from .tracker import Tracker, following


class _Forward(Tracker):
    """The forward of this thread, with the generators' states from before it."""

    def __init__(self) -> None:
        super().__init__()
        self.before: States | None = None


class Frozen:
    """Starts every outermost forward from a given state of PyTorch's generators, and puts their state back after it.

    Activation checkpointing restores the generators before it runs a part of a forward again, in any order and at any
    time, so it draws the same masks again. If it wraps a whole forward, it restores the state from before that forward,
    which is recognized by its digest.

    Attributes:
        served: how many keys were drawn in these forwards.
    """

    def __init__(self, seed: int) -> None:
        self.served = 0
        self._seed = seed
        self._outside: set[bytes] = set()
        self._forward = _Forward()

    @property
    def running(self) -> bool:
        """Whether this thread is in a forward."""
        return self._forward.running

    def enter(self, name: str) -> None:
        """A module is called."""
        if is_compiling():
            return
        forward = self._forward
        if not forward.running:
            before, digest = states()
            if not in_backward() or digest in self._outside:
                self._outside.add(digest)
                forward.before = before
                start(self._seed, name, torch.manual_seed)
        forward.enter(name)

    def leave(self, name: str) -> None:
        """A module's call ends."""
        if is_compiling() or not self.running:
            return
        self._forward.leave(name)
        if not self.running:
            self.restore()

    def restore(self) -> None:
        """Puts back what an outermost forward found, also one that was interrupted."""
        self._forward.stack.clear()
        before, self._forward.before = self._forward.before, None
        if before is not None:
            put_back(before)


@contextmanager
def frozen_forwards(model: nn.Module, seed: int) -> Iterator[Frozen]:
    """Does what `frozen_masks` does for anything that draws in the model: with equal inputs, all of it is frozen."""
    frozen = Frozen(seed)
    with following(model, frozen.enter, frozen.leave, innermost=True):
        random.frozen.append(frozen)
        try:
            yield frozen
        finally:
            random.frozen.remove(frozen)
            frozen.restore()


@contextmanager
def frozen_masks(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Every forward of the model inside the context uses the same masks.

    Each forward starts from the same state of PyTorch's generators, which follows from `seed` and from the name of the
    module that was called, and puts their state back when it ends. A layer draws two numbers a call, whatever its
    input, so that a layer that is called several times has a mask for each call, the same in each forward. Element i of
    a layer's input always gets the same draw: with the batch in the first dimension, a sample keeps its mask in every
    batch in which it has the same place (unless something else in the model draws an amount that depends on the batch).
    The cost with dropout on is then a deterministic function of the parameters, which can be plotted, searched along a
    line or checked by finite differences.

    ``model.train()`` still decides whether dropout is on. A forward is a call of the model or of any module in it,
    outside backward; one runs at a time, since threads share PyTorch's generator. Layers with a `generator` of their
    own follow that. If activation checkpointing wraps the whole model, run backward inside the context too.

    Args:
        model: the model, or any part of it, with torchdrop's layers or functions inside.
        seed: any integer.

    Raises:
        TypeError: `model` is no module or `seed` no integer.
        ValueError: the model has dropout modules of torch.nn, which cannot be
            frozen: put torchdrop's layers in their place.

    Warns:
        UserWarning: at the end, if nothing in the context asked for a mask.

    Example:
        >>> import torch, torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torchdrop.Dropout(0.5))
        >>> x = torch.randn(5, 8)
        >>> with torchdrop.frozen_masks(model, seed=1):
        ...     y, again, fewer = model(x), model(x), model(x[:3])
        >>> torch.equal(y, again), torch.equal(y[:3] == 0, fewer == 0)
        (True, True)
    """
    check_module("model", model)
    check_integer("seed", seed)
    stock = [
        name
        for name, m in model.named_modules()
        if isinstance(m, _DropoutNd) and type(m).__module__.startswith("torch.")
    ]
    if stock:
        raise ValueError(
            f"the model has dropout modules of torch.nn, whose masks cannot be frozen: {', '.join(stock)}. "
            "Put torchdrop's layers of the same names in their place"
        )
    with frozen_forwards(model, seed) as frozen:
        yield
    if not frozen.served:
        warnings.warn(
            "frozen_masks: no mask was drawn in this context. Is the model in train mode, does it use torchdrop's "
            "layers, and was it called as the module that was given (a compiled model must be given as compiled)?",
            UserWarning,
            stacklevel=3,
        )

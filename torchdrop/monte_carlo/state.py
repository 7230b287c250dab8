"""Contexts that restore training flags, random states, buffers and attributes."""

from __future__ import annotations

import ctypes
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..seeding import put_back, states

GENERATORS = threading.RLock()
"""A lock for code that draws from generators that threads share, and restores their states."""


@contextmanager
def flags(model: nn.Module, training: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Sets the training flag of each module, without a call of its `train`, and restores it."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, was in before:
            if training(module) != was:
                module.__dict__["training"] = not was
        yield
    finally:
        for module, was in before:
            module.__dict__["training"] = was


def _states() -> tuple[Any, Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state() if numpy is not None else None, states()[0]


def _put_back(before: tuple[Any, Any, Any]) -> None:
    python, others, torchs = before
    random.setstate(python)
    if others is not None:
        sys.modules["numpy"].random.set_state(others)
    put_back(torchs)


@contextmanager
def random_state() -> Iterator[None]:
    """Restores the states of Python's, numpy's and PyTorch's generators."""
    with KeptStates() as states:
        states.keep()
        yield


class KeptStates:
    """A context that restores the states of Python's, numpy's and PyTorch's generators, if `keep` is called in it.

    Taking these states costs more than a pass of a small model, and most passes draw from no generator.
    """

    def __init__(self) -> None:
        self._before: tuple[Any, Any, Any] | None = None

    def keep(self) -> None:
        """Takes the states that are restored at the end. Only the first call counts."""
        if self._before is None:
            self._before = _states()

    def __enter__(self) -> KeptStates:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._before is not None:
            _put_back(self._before)
            self._before = None


@contextmanager
def own_generators(model: nn.Module) -> Iterator[None]:
    """Restores the states of the generators that modules hold."""
    before = [(generator, generator.get_state()) for generator in _generators(model)]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


def _generators(model: nn.Module) -> list[torch.Generator]:
    values = [value for m in model.modules() for value in vars(m).copy().values()]  # other threads may add to them
    kinds = {kind for kind in set(map(type, values)) if issubclass(kind, torch.Generator)}  # isinstance is slow for it
    return list(dict.fromkeys(value for value in values if type(value) in kinds)) if kinds else []


def states_of(model: nn.Module) -> Callable[[], list[bytes]]:
    """Returns a function that takes the states of PyTorch's generators and of the model's own, for comparison."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    generators = [torch.default_generator, *cuda, *_generators(model)]

    def states() -> list[bytes]:
        found = (generator.get_state() for generator in generators)
        return [ctypes.string_at(state.data_ptr(), state.numel()) for state in found]

    return states


def foreign_states() -> tuple[Any, ...]:
    """Returns the states of Python's and numpy's generators, for comparison."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, words, *rest = numpy.random.get_state()
    return random.getstate(), kind, words.tobytes(), rest


@contextmanager
def undisturbed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restores all that a forward in train mode may change: the modules' own buffers, bit for bit, and attributes."""
    plain = [(module, dict(module.__dict__), dict(module._buffers)) for module in modules]
    filled = [
        (value, value.copy())
        for _, attributes, _ in plain
        for name, value in attributes.items()
        if type(value) in (list, dict, set) and not name.startswith("_")
    ]
    buffers = [(buffer, buffer.clone()) for *_, own in plain for buffer in own.values() if buffer is not None]
    try:
        yield
    finally:
        for module, attributes, own in plain:
            for now, before in ((module.__dict__, attributes), (module._buffers, own)):
                now.clear()
                now.update(before)
        for value, content in filled:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
        with torch.no_grad():
            for buffer, copy in buffers:
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)

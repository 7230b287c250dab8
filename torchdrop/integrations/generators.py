"""The states of the generators that a training draws from, in a form that checkpoints hold."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..seeding import put_back


def generator_states(model: nn.Module) -> dict[str, Any]:
    """Returns the states of Python's, numpy's and PyTorch's generators, and of those that modules of a model hold.

    They are numbers and tensors, which `torch.load(weights_only=True)` reads.

    Example:
        >>> states = generator_states(nn.Dropout())
        >>> before = torch.rand(()), random.random()
        >>> set_generator_states(nn.Dropout(), states)
        >>> before == (torch.rand(()), random.random())
        True
    """
    numpy = sys.modules.get("numpy")
    words: Any = None
    if numpy is not None:
        kind, key, *rest = numpy.random.get_state()
        words = [kind, key.tolist(), *rest]
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    own = {name: generator.get_state() for name, generator in _own(model)}
    return {"python": random.getstate(), "numpy": words, "cpu": torch.get_rng_state(), "cuda": cuda, "modules": own}


def set_generator_states(model: nn.Module, states: Mapping[str, Any]) -> None:
    """Sets the generators to states from `generator_states`, as far as there are such generators."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = sys.modules.get("numpy")
    if numpy is not None and states["numpy"] is not None:
        kind, key, *rest = states["numpy"]
        numpy.random.set_state((kind, numpy.array(key, dtype="uint32"), *rest))
    put_back((states["cpu"].cpu(), []))
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0].cpu())
    for name, generator in _own(model):
        if name in states["modules"]:
            generator.set_state(states["modules"][name].cpu())


def _own(model: nn.Module) -> Iterator[tuple[str, torch.Generator]]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Generator):
                yield f"{path}.{name}", value


def of_all_processes(states: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the states of each process, in the order of their ranks. All processes have to call it.

    >>> len(of_all_processes({}))
    1
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [states]
    each: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(each, states)
    return each


def of_this_process(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the states of this process from those of all.

    Raises:
        ValueError: there was another number of processes when they were saved.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if len(each) != size:
        raise ValueError(
            f"the checkpoint has the generators' states of {len(each)} processes, and there are {size}: resume with as "
            "many, or with generators=False"
        )
    return each[rank]

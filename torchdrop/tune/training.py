"""One training of a search: the parts of the data, the order of the batches, the masks, and the score at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import sites
from ..handlers.base import Handler
from ..handlers.tracker import Tracker
from ..kernels.mask_params import ONE, MaskParams
from ..seeding import hash_of

Loss = Callable[[Any, Tensor], Tensor]
Score = Callable[[Any, Tensor], Any]
MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Fold:
    """One division of the rows, with the model that all its trainings start from.

    Args:
        number: the number of the fold.
        train, test: indices of rows.
        model: the model, with torchdrop's layers.
    """

    number: int
    train: Tensor
    test: Tensor
    model: nn.Module


@dataclass(frozen=True)
class Training:
    """The settings of the training of every model of the search. `torchdrop.tune.cross_validate` explains each."""

    inputs: Tensor
    targets: Tensor
    loss: Loss
    score: Score
    optimizer: MakeOptimizer
    epochs: int
    batch_size: int
    seed: int

    def steps(self, fold: Fold) -> int:
        """Returns the number of batches in an epoch. Other rows are left over in every epoch."""
        return len(fold.train) // self.batch_size

    def batches(self, fold: Fold) -> Iterator[Tensor]:
        """Yields for each epoch the rows of its batches, (steps, batch size): the same for all trainings of a fold."""
        generator = torch.Generator().manual_seed(mixed(self.seed, "batches", fold.number))
        steps = self.steps(fold)
        for _ in range(self.epochs):
            order = torch.randperm(len(fold.train), generator=generator)[: steps * self.batch_size]
            yield fold.train[order].view(steps, self.batch_size).to(self.inputs.device)

    def evaluate(self, model: nn.Module, fold: Fold) -> float:
        """Returns the score on the fold's test rows; NaN if the outputs are not finite."""
        model.eval()
        rows = fold.test.to(self.inputs.device)
        with torch.no_grad():
            output = model(self.inputs[rows])
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                return float("nan")
            return float(self.score(output, self.targets[rows]))


def mixed(seed: int, *name: object) -> int:
    """Returns 63 bits that follow from the seed and a name."""
    return int.from_bytes(hash_of("tune", seed, *name), "little") >> 1


class Masks(Handler):
    """Gives every layer of torchdrop its key: the seed from the number of its call in the forward, the stream from
    fold and step.

    So the mask of a layer in a step does not depend on the models that are trained with it. All settings of a fold get
    the same draws: an element that is kept with the lower keep_prob is kept with the higher one too.

    Args:
        seed: the seed of the search.
    """

    sees_functions = False

    def __init__(self, seed: int) -> None:
        super().__init__(Tracker())
        self._seed = seed
        self._seeds: list[int] = []
        self._calls = 0
        self._stream: Tensor | None = None

    @contextmanager
    def at(self, stream: Tensor) -> Iterator[None]:
        """Within it, one forward is made, in which keys have this stream."""
        self._stream, self._calls = stream, 0
        self._tracker.enter("")
        try:
            with self:
                yield
        finally:
            self._tracker.leave("")

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is sites.is_on:
            return args[0]
        if func is sites.draw:
            numbers, like, shape, _, params = args
            return numbers(self._key(like.device), shape, params)
        if func is not sites.apply:
            return func(*args, **kwargs)
        operator, input, params, shape, inplace, _ = args
        key = self._key(input.device)
        if isinstance(params, MaskParams) and params.threshold == ONE:
            return input
        return operator(input, key, params, shape, inplace)

    def _key(self, device: torch.device) -> Tensor:
        assert self._stream is not None
        if self._calls == len(self._seeds):
            self._seeds.append(mixed(self._seed, "masks", self._calls))
        seed = self._seeds[self._calls]
        self._calls += 1
        stream = self._stream.to(device)
        return torch.stack([torch.full_like(stream, seed), stream])


def first_stream(fold: Fold) -> int:
    """Returns the stream of the fold's first step; those of other steps follow, at most 2**32 of them."""
    return fold.number << 32


def default_loss(output: Tensor, target: Tensor) -> Tensor:
    """Returns the cross-entropy for integer targets, the mean squared error otherwise."""
    if not target.is_floating_point():
        return F.cross_entropy(output, target)
    _check_shapes(output, target)
    return F.mse_loss(output, target)


def default_score(output: Tensor, target: Tensor) -> float:
    """Returns the accuracy for integer targets, minus the mean squared error otherwise."""
    if not target.is_floating_point():
        return (output.argmax(1) == target).double().mean().item()
    _check_shapes(output, target)
    return -F.mse_loss(output.double(), target.double()).item()


def _check_shapes(output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise ValueError(
            f"the model's outputs must have the targets' shape {tuple(target.shape)} for the mean squared error, "
            f"got {tuple(output.shape)}"
        )


def default_optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Returns Adam with a learning rate of 0.001."""
    return torch.optim.Adam(parameters, lr=1e-3, fused=all(p.device.type in ("cpu", "cuda") for p in parameters))

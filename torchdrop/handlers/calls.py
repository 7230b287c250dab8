"""A random call of a model: its place, the numbers that it would draw, and where they come from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.mask_params import MaskParams
from ..ops.operators import Operator


class Site(NamedTuple):
    """A call in the model: the module that makes it, its kind, and its number among such calls in one forward."""

    module: str
    kind: str
    number: int


class Slot(ABC):
    """The masks and numbers of one random call.

    Attributes:
        by_rows: whether the masks follow from the rows of the data, in the dimension in which the call was given them.
    """

    by_rows = True

    @abstractmethod
    def params(self, rate: Any, shape: Sequence[int]) -> MaskParams | Tensor:
        """Returns the parameters of a mask of this shape for a probability of dropping."""

    @abstractmethod
    def apply(
        self, operator: Operator, x: Tensor, params: MaskParams | Tensor, shape: Sequence[int], inplace: bool
    ) -> Tensor:
        """Applies an operator with mask parameters to x, with a mask of this shape."""

    @abstractmethod
    def attention(self, rate: Any, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """Computes attention whose weights are dropped; `how` has the rest of torch's arguments."""

    @abstractmethod
    def another(self, number: int) -> Slot:
        """Returns the slot of one of several masks that one call draws; the first of them is this one."""

    @abstractmethod
    def words(self, like: Tensor) -> Tensor:
        """Makes 32-bit draws, int64 of the shape of `like`."""

    @abstractmethod
    def normal(self, like: Tensor) -> Tensor:
        """Makes standard normal variates of the shape and element type of `like`."""

    def uniform(self, like: Tensor) -> Tensor:
        """Makes uniform variates on [0, 1), on the grid that torch.rand has for the element type of `like`."""
        digits = min(1 - math.frexp(torch.finfo(like.dtype).eps)[1] + 1, 32)
        return (self.words(like) >> 32 - digits).to(like.dtype) * 2.0**-digits


@dataclass
class RandomCall:
    """One call of a random function.

    Args:
        kind: the name of its kind in reports.
        rate: the probability of dropping, if there is one.
        on: whether the call as made draws anything.
        shape: the shape of the tensor that is dropped from or drawn; None if only the result has it.
        mask: the shape of its mask, if it is another.
        original: makes the call as it is.
        plain: makes it without randomness.
        served: makes it with masks from a slot, at a rate; None if that is impossible.
        flagged: whether the module's own code decides from its training flag if this is called or used.
        draws: the number of random draws in it.
        loose: why its draws depend on the batch, if they do.
        at: makes the call as it is with another rate; None if it has none.
        training: the training flag that it is given; None if it takes none.
        is_split: whether it is served in parts. Others are served at rate 0, too, so that a key is drawn.
    """

    kind: str
    rate: Any
    on: bool
    shape: Sequence[int] | None
    original: Callable[[], Any]
    plain: Callable[[], Any]
    served: Callable[[Slot, Any], Any] | None
    mask: Sequence[int] | None = None
    flagged: bool = False
    draws: int = 1
    loose: str = ""
    at: Callable[[Any], Any] | None = None
    training: bool | None = None
    is_split: bool = False


Mode = Any
"""The function mode that asks. Its `layer(slot, function, input, rate, inplace)` calls a dropout function of torchdrop
whose mask is the slot's."""

"""A pass whose seeds are inputs of a graph: `TracedPass` makes masks by operations that other runtimes have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import traceable
from ..kernels.mask_params import MaskParams
from ..kernels.masking import normal_values
from ..ops import operators
from .masks import Pass, source_seed

Name = tuple[object, ...]
"""The name of a mask: module, kind and number of the call, and its number if it is a further mask of that call."""


class MaskNames:
    """The names of the masks of a graph, in the order of their keys.

    Example:
        >>> names = MaskNames()
        >>> names.place(("2", "dropout", 0)), names.place(("4", "dropout", 0)), names.place(("2", "dropout", 0))
        (0, 1, 0)
        >>> names.keys(seed=0).shape
        torch.Size([2, 2])
    """

    def __init__(self) -> None:
        self._places: dict[Name, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Any:
        return iter(self._places)

    def place(self, name: Name) -> int:
        """Returns the place of a mask's key. A name that is new gets the next one."""
        return self._places.setdefault(name, len(self._places))

    def keys(self, seed: int) -> Tensor:
        """Returns the keys of all masks under a seed, int64 of shape (masks, 2): the words of each mask's own seed."""
        return torch.tensor([traceable.seed_words(_seed(seed, name)) for name in self], dtype=torch.int64).reshape(
            -1, 2
        )


def _seed(seed: int, name: Name) -> int:
    site, others = name[:3], name[3:]
    own = source_seed(seed, *site)
    for number in others:
        own = source_seed(own, number)
    return own


class TracedPass(Pass):
    """One run of the model, or several at once, under keys that are a tensor.

    Args:
        names: the names of the masks.
        keys: the keys, of shape (masks, 2), or a seed that they follow from, to find the names.
        samples, rows, shared, folded: as for `Pass`.
        every: the numbers of all samples if `samples` is one of them under vmap. The masks of all are made at once then
            outside of vmap, under which it could not be asked which elements are open.
    """

    def __init__(
        self,
        names: MaskNames,
        keys: Tensor | int,
        samples: Tensor,
        rows: int | None,
        *,
        shared: bool = False,
        folded: bool = False,
        every: Tensor | None = None,
    ) -> None:
        super().__init__(0, samples, rows, shared=shared, folded=folded)
        self.seed: Any = names  # from which the names of sources follow
        self._seeds = keys if isinstance(keys, int) else traceable.schedule(keys)
        self._every = every

    def seed_of(self, *name: object) -> Name:
        return name

    def another(self, seed: Name, number: int) -> Name:
        return (*seed, number)

    def apply(
        self,
        operator: operators.Operator,
        x: Tensor,
        seed: Any,
        own: bool,
        params: MaskParams | Tensor,
        shape: list[int],
    ) -> Tensor:
        key = self._key(seed, own)
        if operator is operators.gaussian:
            return normal_values(x, self._mine(traceable.standard_normal(shape, key)), params)
        threshold = params.threshold if isinstance(params, MaskParams) else params[..., 0].to(torch.int64)
        kept = self._mine(traceable.keep_mask(shape, key, threshold))
        return traceable.masked_values(x, kept, params).to(x.dtype)

    def words(self, seed: Any, shape: Sequence[int], own: bool) -> Tensor:
        return self._mine(traceable.random_bits(shape, self._key(seed, own)))

    def normal(self, words: Tensor) -> Tensor:
        return traceable.normal_of(words)

    def _key(self, name: Name, own: bool) -> traceable.Key:
        every = self.samples if self._every is None else self._every
        samples = every.unsqueeze(-1) if own else every
        rows = self._row_numbers if own else torch.zeros_like(every)
        place = self.seed.place(name)
        if isinstance(self._seeds, int):
            words = self.seed.keys(self._seeds).to(every.device)
            return traceable.Key(traceable.schedule(words)[place], rows, samples)
        return traceable.Key(self._seeds[place], rows, samples)

    def _mine(self, numbers: Tensor) -> Tensor:
        """Returns this sample's share of what was made for all. (Of all ways to select it, torch.export takes this one
        under vmap with a number of rows that is not fixed.)"""
        if self._every is None:
            return numbers
        return torch.embedding(numbers.reshape(len(numbers), -1), self.samples).reshape(numbers.shape[1:])

"""Inverted dropout, which scales in training, and the original formulation, which scales in eval mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import operators
from .exported import or_eval
from .inputs import check_inplace
from .rate import DEFAULT_P, InplaceRated, Probability, Rate, formula_of, realized
from .shard import Cut
from .sites import apply
from .torch_state import is_exporting


def eval_form(input: Tensor, rate: Rate, inverted: bool, inplace: bool) -> Tensor:
    """Returns the output in eval mode: the input itself if `inverted`, otherwise k times it."""
    if inverted:
        return input
    k = realized(rate.keep_prob)
    if isinstance(k, Tensor):
        k = k.to(input.device, torch.promote_types(input.dtype, torch.float32))
    if inplace:
        return input.mul_(k)
    return (input * k).to(input.dtype)


def masked(
    input: Tensor,
    rate: Rate,
    inverted: bool,
    shape: Sequence[int],
    inplace: bool,
    generator: torch.Generator | None,
    cut: Cut | None = None,
) -> Tensor:
    """Returns a checked input under a mask of this shape. In an exported program, the original formulation comes with
    its eval mode."""
    if input.is_complex():
        return _masked_pairs(input, rate, inverted, shape, inplace, generator, cut)
    params = rate.params_for(shape)
    if inverted or not is_exporting():
        return apply(operators.masked, input, params, shape, inplace, generator, cut)
    in_eval = eval_form(input, rate, False, False)
    out = or_eval(apply(operators.masked, input, params, shape, False, generator, cut), lambda: in_eval)
    return input.copy_(out) if inplace else out


def _masked_pairs(
    input: Tensor,
    rate: Rate,
    inverted: bool,
    shape: Sequence[int],
    inplace: bool,
    generator: torch.Generator | None,
    cut: Cut | None,
) -> Tensor:
    """Masks complex numbers, whose real and imaginary parts share a draw: the mask is that of a real tensor of this
    shape."""
    if inplace:
        check_inplace(input)
    pairs = torch.view_as_real(input.resolve_conj())
    params = rate.params_for(shape)
    if isinstance(params, Tensor) and params.dim() > 1:
        params = params.unsqueeze(-2)
    if cut is not None:
        cut = Cut((*cut.whole, 1), (*cut.first, 0), cut.part)
    kept = apply(operators.masked, pairs, params, (*shape, 1), False, generator, cut)
    if kept is pairs:
        return input
    out = torch.view_as_complex(kept)
    if not inverted:
        out = or_eval(out, lambda: eval_form(input, rate, False, False))
    return input.copy_(out) if inplace else out


class Formulated(InplaceRated):
    """A layer in either formulation."""

    inverted: bool

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        inplace: bool = False,
        *,
        keep_prob: Probability | None = None,
        generator: torch.Generator | None = None,
        inverted: bool = True,
    ) -> None:
        self._formula = formula_of(inverted)
        super().__init__(p, inplace, keep_prob=keep_prob, generator=generator)
        self.inverted = inverted

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.inverted else ", inverted=False")

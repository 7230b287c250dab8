"""The packages whose variants torchdrop's can stand in for, and whether what they compute is what it should be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import checks
import torch
import torch.nn.functional as F
from peers import Package
from torch import Tensor

OURS, TORCHVISION, TIMM = "torchdrop", "torchvision", "timm"

Map = Callable[[Tensor], Tensor]

_SCHEMAS = ("nms", "qnms")
"""Operators that torchvision's Python code expects of its compiled part."""


class Peer(Package):
    """A package that may be built for another torch."""

    def load(self) -> Any:
        """The module.

        torchvision's compiled part belongs to one build of torch. Beside another, the Python code that is compared here
        imports once the operators that it looks for have a schema.
        """
        try:
            return super().load()
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in _SCHEMAS:
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        return super().load()


PEERS = [Peer(TORCHVISION, "torchvision.ops", TORCHVISION), Peer(TIMM, "timm.layers.drop", TIMM)]


def block_fault(function: Map, x: Tensor, block: int) -> str | None:
    """What is wrong with `function` as DropBlock of x, (N, C, H, W) without zeros, or None.

    Shape, dtype and strides; values that are 0 or x times one number; dropped elements that lie in whole blocks, which
    may reach over the map's edge; one result under one seed and another without; a gradient with the output's mask.
    Not the rate, which is measured.
    """
    torch.manual_seed(0)
    y = function(x)
    again = function(x).detach()
    torch.manual_seed(0)
    repeated = function(x).detach()
    out, plain = y.detach(), x.detach()
    if out.shape != x.shape or out.dtype != x.dtype or out.stride() != torch.empty_like(plain).stride():
        return f"{out.dtype} of shape {tuple(out.shape)} and strides {out.stride()}"
    if not bool(out.isfinite().all()):
        return "values that are not finite"
    if not torch.equal(out, repeated):
        return "two results under one seed"
    kept = out != 0
    if torch.equal(kept, again != 0):
        return "the same mask in two calls"
    fault = _scale_fault(out, plain, kept)
    if fault:
        return fault
    dropped = (~kept).float().flatten(0, 1).unsqueeze(1)
    around = F.pad(dropped, [block - 1] * 4, value=1.0)
    whole = -F.max_pool2d(-around, block, 1)  # where a block's every position in the map is dropped
    if not torch.equal(F.max_pool2d(whole, block, 1), dropped):
        return "drops outside of whole blocks"
    if y.requires_grad:
        g = checks.sample(tuple(x.shape), x.dtype, x.device)
        (grad,) = torch.autograd.grad(y, x, g)
        return _scale_fault(grad, g, kept, "a gradient of ")
    return None


def _scale_fault(out: Tensor, x: Tensor, kept: Tensor, what: str = "") -> str | None:
    if not torch.equal(out != 0, kept) or not bool(kept.any()):
        return f"{what}another mask" if bool(kept.any()) else f"{what}zeros only"
    factors = (out.double() / x.double())[kept]
    spread = 8 * torch.finfo(x.dtype).eps * float(factors.mean())
    return None if float(factors.max() - factors.min()) <= spread else f"{what}several scales"

"""Mask parameters as a tensor, which a layer holds for compiled code.

The tensor is on the device to which the layer was moved. On CUDA its memory gets the numbers of each new rate, because
captured graphs read the memory that was there when they were captured, and never look at the host's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.mask_params import MaskParams
from .torch_state import tensor_for_graphs

CAPTURED = {"cuda"}
"""The types of devices whose work is captured, to be replayed later."""


class HeldParams:
    """A tensor with the four numbers of mask parameters.

    Attributes:
        tensor: the numbers, float64 of shape (4,).
        holder: the id of the layer that may write to it. A copy of a layer has the tensor of the layer until it gets a
            new rate, and then one of its own.
    """

    def __init__(self, params: MaskParams, holder: int, last: HeldParams | None) -> None:
        self.holder, given = holder, params.tensor()
        self.tensor: Tensor = given
        if last is None or last.tensor.device.type not in CAPTURED:
            return
        if last.holder == holder:
            self.tensor = last.tensor.copy_(given, non_blocking=True)
        else:
            self.tensor = tensor_for_graphs(given, last.tensor.device)

    def move(self, params: MaskParams, function: Callable[[Tensor], Tensor]) -> None:
        """Moves the tensor to where this function, which is applied to a layer's tensors, moves them, if that is the
        CPU or a CUDA device."""
        device = function(torch.empty(1, device=self.tensor.device)).device
        if device == self.tensor.device:
            return
        if device.type in CAPTURED:
            self.tensor = tensor_for_graphs(params.tensor(), device)
        elif device.type == "cpu":
            self.tensor = params.tensor()

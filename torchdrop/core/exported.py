"""Dropout of exported programs, which have no flag: it follows what puts such a program into eval mode.

`move_exported_model_to_eval` and its like, of torch.ao and torchao, look for ``aten.dropout(x, p, True)`` in the graph
and turn its flag. So there is such a call beside the parameters of each mask, of a one with p = 1, which draws nothing:
0 says that the program trains, and 1 that it does not. (Compiled by aot_eager, by Inductor with fallback_random, and in
decomposed programs, PyTorch takes a number from the generator for it, so that under one seed the masks are others than
eager's.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.mask_params import ONE, Formula
from .torch_state import is_exporting


def trains(device: torch.device) -> Tensor:
    """A bool that the exported program finds out: whether it trains."""
    return F.dropout(torch.ones((), dtype=torch.float32, device=device), 1.0, True) != 1.0


def switched(params: Tensor, formula: Formula) -> Tensor:
    """Parameters that keep all, as those of keep_prob 1, once the exported program is moved to eval mode."""
    if not is_exporting():
        return params
    one = torch.ones((), dtype=params.dtype, device=params.device)
    scale, shift, fill = formula(one)
    return torch.where(trains(params.device), params, torch.stack([one * ONE, scale, shift, fill]))


def or_eval(output: Tensor, in_eval: Callable[[], Tensor], inplace: bool = False) -> Tensor:
    """An output, or in eval mode what the layer gives there, where that is not what keep_prob 1 gives."""
    return output if not is_exporting() else torch.where(trains(output.device), output, in_eval())


def warn_stays_on() -> None:
    """Warns that what follows is drawn by an exported program in either mode."""
    if is_exporting():
        _warn()


@torch.compiler.assume_constant_result
def _warn() -> None:
    warnings.warn(
        "an exported program keeps this layer's noise after move_exported_model_to_eval, which turns off only what "
        "drops by a given rate: export the model in eval mode for inference",
        UserWarning,
        stacklevel=2,
    )

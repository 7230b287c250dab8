"""Dropout of exported programs, which have no flag: it follows the functions that put such a program into eval mode.

Functions such as `move_exported_model_to_eval` of torch.ao and torchao look for ``aten.dropout(x, p, True)`` in the
graph and change its flag. So the parameters of each mask come with such a call, on a one with p = 1, which draws
nothing: 0 says that the program trains, and 1 that it does not. (In programs that are decomposed, or compiled by
aot_eager or by Inductor with fallback_random, PyTorch takes a number from the generator for it, so that under one seed
the masks differ from eager's.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.mask_params import ONE, Formula
from .torch_state import constant_when_compiled, is_exporting


def trains(device: torch.device) -> Tensor:
    """Returns a bool that the exported program computes: whether it trains."""
    return F.dropout(torch.ones((), dtype=torch.float32, device=device), 1.0, True) != 1.0


def switched(params: Tensor, formula: Formula) -> Tensor:
    """Returns parameters that keep all, as those of keep_prob 1, once the exported program is moved to eval mode."""
    if not is_exporting():
        return params
    one = torch.ones((), dtype=params.dtype, device=params.device)
    scale, shift, fill = formula(one)
    return torch.where(trains(params.device), params, torch.stack([one * ONE, scale, shift, fill]))


def or_eval(output: Tensor, in_eval: Callable[[], Tensor], inplace: bool = False) -> Tensor:
    """Returns `output`, or in eval mode `in_eval()`, for layers whose eval mode differs from keep_prob 1."""
    return output if not is_exporting() else torch.where(trains(output.device), output, in_eval())


def warn_stays_on() -> None:
    """Warns that an exported program makes the following draws in both modes."""
    if is_exporting():
        _warn()


@constant_when_compiled
def _warn() -> None:
    warnings.warn(
        "an exported program keeps this layer's noise after move_exported_model_to_eval, which turns off only what "
        "drops by a given rate: export the model in eval mode for inference",
        UserWarning,
        stacklevel=2,
    )

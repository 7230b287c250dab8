"""From a keep probability to what a kernel does: an integer threshold and the scale that goes with it.

An element draws a 32-bit integer and is kept when the draw is below the threshold, so the probability that it is
really kept is ``threshold / 2**32``, and the scale is the reciprocal of that, never of the nominal keep probability.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ONE = 2**32
"""The threshold of keep_prob 1: every 32-bit draw is below it."""


def threshold(keep_prob: float) -> int:
    """The integer below which a 32-bit draw keeps its element: ``round(keep_prob * 2**32)``.

    0 and 1 are exact; what lies strictly between them stays strictly between, so that no rate is silently turned
    into "never" or "always".

    >>> threshold(0.5) == ONE // 2, threshold(0.0), threshold(1.0) == ONE, threshold(1e-300)
    (True, 0, True, 1)
    """
    if keep_prob <= 0.0:
        return 0
    if keep_prob >= 1.0:
        return ONE
    return min(max(round(keep_prob * ONE), 1), ONE - 1)


class MaskParams:
    """What becomes of an element: ``x * scale + shift`` where its draw is below `threshold`, `fill` elsewhere.

    Immutable. The same four numbers lie in a buffer for C code at `address`, and `tensor()` gives them to the
    registered operator.
    """

    __slots__ = ("_buffer", "address", "fill", "scale", "shift", "threshold")

    def __init__(self, threshold: int, scale: float, shift: float = 0.0, fill: float = 0.0) -> None:
        self.threshold, self.scale, self.shift, self.fill = threshold, scale, shift, fill
        self._buffer = (ctypes.c_double * 4)(threshold, scale, shift, fill)
        self.address = ctypes.addressof(self._buffer)

    def __reduce__(self) -> tuple[type[MaskParams], tuple[int, float, float, float]]:
        return MaskParams, (self.threshold, self.scale, self.shift, self.fill)

    def __repr__(self) -> str:
        return f"MaskParams(threshold={self.threshold}, scale={self.scale}, shift={self.shift}, fill={self.fill})"

    def tensor(self) -> Tensor:
        """The four numbers as a new float64 tensor on the CPU, an ordinary one even under inference mode."""
        with torch.inference_mode(False):
            return torch.tensor([self.threshold, self.scale, self.shift, self.fill], dtype=torch.float64, device="cpu")

    def linear(self) -> MaskParams:
        """The parameters of the derivative: the same mask and scale, nothing added."""
        return MaskParams(self.threshold, self.scale) if self.shift or self.fill else self


def linear(params: MaskParams | Tensor) -> MaskParams | Tensor:
    """`MaskParams.linear` for either form of mask parameters."""
    if isinstance(params, MaskParams):
        return params.linear()
    return torch.cat([params[..., :2], torch.zeros_like(params[..., :2])], -1)


Formula = Callable[[Any], tuple[Any, Any, Any]]
"""Scale, shift and fill as a function of the keep probability that the threshold really has: of a float or a tensor."""


def inverted(k: Any) -> tuple[Any, Any, Any]:
    """Scale by 1/k, so that the expectation of the output is the input."""
    return 1.0 / k, 0.0 * k, 0.0 * k


def original(k: Any) -> tuple[Any, Any, Any]:
    """No scaling in training: the expectation of the output is k times the input (Srivastava et al., 2014)."""
    return 0.0 * k + 1.0, 0.0 * k, 0.0 * k


ALPHA = 1.7580993408473766
"""SELU's negative saturation with its sign changed: scale * alpha (Klambauer et al., 2017)."""


def alpha(k: Any) -> tuple[Any, Any, Any]:
    """``a (x m - ALPHA (1 - m)) + b`` with a and b such that mean 0 and variance 1 stay (Klambauer et al., 2017)."""
    a = ((ALPHA**2 * (1.0 - k) + 1.0) * k) ** -0.5
    return a, a * ALPHA * (1.0 - k), -a * ALPHA * k


def gaussian(k: Any) -> tuple[Any, Any, Any]:
    """The scale is a standard deviation: multiplicative noise with the moments of inverted dropout."""
    return ((1.0 - k) / k) ** 0.5, 0.0 * k, 0.0 * k


@functools.lru_cache(maxsize=4096)
def mask_params(keep_prob: float, formula: Formula = inverted) -> MaskParams:
    """The parameters of a keep probability. With nothing kept the output is 0 under every formula.

    >>> mask_params(0.25).scale, mask_params(0.25).threshold == ONE // 4
    (4.0, True)
    """
    below = threshold(keep_prob)
    scale, shift, fill = formula(max(below, 1) / ONE)
    return MaskParams(below, scale, shift, fill if below else 0.0)


_WITHOUT_FLOAT64 = frozenset({"mps"})


def has_float64(device: torch.device) -> bool:
    """Whether tensors of a device can be of this type, in which a threshold is exact."""
    return device.type not in _WITHOUT_FLOAT64


def params_tensor(keep_prob: Tensor, formula: Formula = inverted) -> Tensor:
    """`mask_params` of every element: float64, of shape ``keep_prob.shape + (4,)``, where the rates lie if that is
    possible there, and on the CPU if not."""
    k = (keep_prob if has_float64(keep_prob.device) else keep_prob.cpu()).to(torch.float64)
    below = (k * ONE).round().clamp(1, ONE - 1)
    below = torch.where(k <= 0, torch.zeros_like(k), torch.where(k >= 1, torch.full_like(k, ONE), below))
    scale, shift, fill = formula(below.clamp(min=1) / ONE)
    return torch.stack([below, scale, shift, torch.where(below > 0, fill, torch.zeros_like(fill))], -1)


def keeps_all(params: MaskParams | Tensor) -> bool:
    """Whether it is known that the parameters keep every element. It is not where the parameters are a tensor."""
    return isinstance(params, MaskParams) and params.threshold == ONE

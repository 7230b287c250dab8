"""Mask parameters: a keep probability becomes an integer threshold and the scale that belongs to it.

An element has 32 random bits, and is kept where the integer that they make is below the threshold. So the probability
that it is really kept is ``threshold / 2**32``. The scale is the reciprocal of that number, and never of the nominal
keep probability.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.torch_state import is_compiling

ONE = 2**32
"""The threshold of keep_prob 1: every 32-bit integer is below it."""


def threshold(keep_prob: float) -> int:
    """Returns ``round(keep_prob * 2**32)``: an element is kept where its random bits are below this integer.

    0 and 1 are exact. Numbers strictly between them stay strictly between, so that no rate is silently turned into
    "never" or "always".

    >>> threshold(0.5) == ONE // 2, threshold(0.0), threshold(1.0) == ONE, threshold(1e-300)
    (True, 0, True, 1)
    """
    if keep_prob <= 0.0:
        return 0
    if keep_prob >= 1.0:
        return ONE
    return min(max(round(keep_prob * ONE), 1), ONE - 1)


class MaskParams:
    """The parameters of a mask: x becomes ``x * scale + shift`` where its random bits are below `threshold`, and `fill`
    elsewhere.

    They are immutable. The same four numbers are in a buffer for C code at `address`, and `tensor()` makes a tensor of
    them for the registered operators.
    """

    __slots__ = ("_buffer", "address", "fill", "scale", "shift", "threshold")

    def __init__(self, threshold: int, scale: float, shift: float = 0.0, fill: float = 0.0) -> None:
        self.threshold: int = threshold
        self.scale: float = scale
        self.shift: float = shift
        self.fill: float = fill
        self._buffer = (ctypes.c_double * 4)(threshold, scale, shift, fill)
        self.address: int = ctypes.addressof(self._buffer)

    def __reduce__(self) -> tuple[type[MaskParams], tuple[int, float, float, float]]:
        return MaskParams, (self.threshold, self.scale, self.shift, self.fill)

    def __repr__(self) -> str:
        return f"MaskParams(threshold={self.threshold}, scale={self.scale}, shift={self.shift}, fill={self.fill})"

    def tensor(self) -> Tensor:
        """Returns the four numbers as a new float64 tensor on the CPU. It is no inference tensor, even in that mode."""
        with torch.inference_mode(False):
            return torch.tensor([self.threshold, self.scale, self.shift, self.fill], dtype=torch.float64, device="cpu")

    def linear(self) -> MaskParams:
        """Returns the parameters of the derivative: mask and scale are the same, and nothing is added."""
        return MaskParams(self.threshold, self.scale) if self.shift or self.fill else self


def linear(params: MaskParams | Tensor) -> MaskParams | Tensor:
    """Does what `MaskParams.linear` does, for either form of mask parameters."""
    if isinstance(params, MaskParams):
        return params.linear()
    return torch.cat([params[..., :2], torch.zeros_like(params[..., :2])], -1)


Formula = Callable[[Any], tuple[Any, Any, Any]]
"""A function from the keep probability that the threshold really has to scale, shift and fill: floats or tensors."""


def inverted(k: Any) -> tuple[Any, Any, Any]:
    """Inverted dropout scales by 1/k, so that the expectation of the output is the input."""
    return 1.0 / k, 0.0 * k, 0.0 * k


def original(k: Any) -> tuple[Any, Any, Any]:
    """The original dropout does not scale in training: the output is k times the input in expectation (Srivastava et
    al., 2014)."""
    return 0.0 * k + 1.0, 0.0 * k, 0.0 * k


ALPHA = 1.7580993408473766
"""SELU's negative saturation with its sign changed: scale * alpha (Klambauer et al., 2017)."""


def alpha(k: Any) -> tuple[Any, Any, Any]:
    """Alpha dropout is ``a (x m - ALPHA (1 - m)) + b``, where a and b preserve mean 0 and variance 1 (Klambauer et al.,
    2017)."""
    a = ((ALPHA**2 * (1.0 - k) + 1.0) * k) ** -0.5
    return a, a * ALPHA * (1.0 - k), -a * ALPHA * k


def gaussian(k: Any) -> tuple[Any, Any, Any]:
    """The scale is a standard deviation, with which multiplicative noise has the moments of inverted dropout."""
    return ((1.0 - k) / k) ** 0.5, 0.0 * k, 0.0 * k


@functools.lru_cache(maxsize=4096)
def mask_params(keep_prob: float, formula: Formula = inverted) -> MaskParams:
    """Returns the parameters of a keep probability. If nothing is kept, the output is 0 under every formula.

    >>> mask_params(0.25).scale, mask_params(0.25).threshold == ONE // 4
    (4.0, True)
    """
    below = threshold(keep_prob)
    scale, shift, fill = formula(max(below, 1) / ONE)
    return MaskParams(below, scale, shift, fill if below else 0.0)


_WITHOUT_FLOAT64 = frozenset({"mps"})


def has_float64(device: torch.device) -> bool:
    """Whether tensors of a device can have the type float64, in which a threshold is exact."""
    return device.type not in _WITHOUT_FLOAT64


def params_tensor(keep_prob: Tensor, formula: Formula = inverted) -> Tensor:
    """Returns the `mask_params` of every element, as float64 of shape ``keep_prob.shape + (4,)``.

    The result is on the device of `keep_prob` if that has float64, and on the CPU if not.
    """
    k = (keep_prob if has_float64(keep_prob.device) else keep_prob.cpu()).to(torch.float64)
    below = (k * ONE).round().clamp(1, ONE - 1)
    below = torch.where(k <= 0, torch.zeros_like(k), torch.where(k >= 1, torch.full_like(k, ONE), below))
    scale, shift, fill = formula(below.clamp(min=1) / ONE)
    return torch.stack([below, scale, shift, torch.where(below > 0, fill, torch.zeros_like(fill))], -1)


def tensor_beside(params: MaskParams | Tensor, device: torch.device) -> Tensor:
    """Returns the parameters as a tensor for a registered operator that works on this device.

    In compiled code the tensor is on that device. A captured graph would read one on the host when it is captured, and
    never again (PyTorch issue 190233). The compiler keeps a copy that is made here out of captured graphs.
    """
    tensor = params.tensor() if isinstance(params, MaskParams) else params
    if not is_compiling() or tensor.device == device or not has_float64(device):
        return tensor
    return tensor.to(device, non_blocking=device.type != "cpu")


def keeps_all(params: MaskParams | Tensor) -> bool:
    """Whether it is known that the parameters keep every element. It is not known if they are a tensor."""
    return isinstance(params, MaskParams) and params.threshold == ONE

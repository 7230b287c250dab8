"""An activation and dropout together: `relu_dropout`, `gelu_dropout`.

With k the keep probability and m a mask whose elements are 1 with probability k, independently,

    y = m f(x) / k      in training, so E[y] = f(x), with f the rectifier or GELU
    y = f(x)            in eval mode

Under one key they equal the plain parts one after another. On CUDA both are one pass over memory; on the CPU the
rectifier is, and GELU is torch's, whose result is masked in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ..core import sites
from ..core.fused import dropped
from ..core.inputs import check_input
from ..core.rate import DEFAULT_P, Probability, Rate, Rated, as_rate
from ..core.symbolic import leaf, recorded
from ..core.torch_state import is_compiling
from ..ops import fused
from ..ops.fast_path import fast_activation_dropout

_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def _activate(
    name: str, input: Tensor, activation: str, rate: Rate, training: bool, generator: torch.Generator | None
) -> Tensor:
    if training and generator is None and not is_compiling() and rate.params is not None:
        out = fast_activation_dropout(input, rate.params, activation)
        if out is not None:
            return out
    check_input(input, name)
    if not (training or sites.is_on(training)):
        return fused.ACTIVATIONS[activation].function(input)
    params = rate.params_for(input.shape)
    return dropped(
        input,
        params,
        generator,
        lambda key: fused.activation_dropout(input, key, params, activation),
        lambda drop: fused.composed_activation(input, activation, drop),
    )


def _gelu(approximate: Any) -> str:
    """Raises ValueError for a form that torch's GELU does not have."""
    if not isinstance(approximate, str) or approximate not in _GELUS:
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return _GELUS[approximate]


def relu_dropout(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Applies a rectifier and dropout in one pass: ``y = m max(input, 0) / k``, with E[y] = max(input, 0).

    m ~ Bernoulli(k), k = keep_prob = 1 - p, as in `dropout`, with the same mask under the same key. In eval mode and
    with k = 1 it is the rectifier alone, with k = 0 it is 0. Backward keeps only the output, which the layer after it
    keeps in any case: the gradient is zero exactly where the output is.

    Args:
        input: float16, bfloat16, float32 or float64, of any shape.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        training: whether dropout is applied.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the input.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A new tensor of the input's shape and dtype. A NaN that is kept stays NaN.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: both names of the rate, or something that is no number.
        RuntimeError: an integer tensor.

    References:
        Nair and Hinton, ICML 2010; Srivastava et al., JMLR 15, 2014.

    Example:
        >>> import torch, torchdrop
        >>> torchdrop.functional.relu_dropout(torch.tensor([-1.0, 2.0]), 0.0)
        tensor([0., 2.])
    """
    if isinstance(input, Proxy):
        return recorded(relu_dropout, locals())
    return _activate("relu_dropout", input, "relu", as_rate(p, keep_prob), training, generator)


def gelu_dropout(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    approximate: str = "none",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Applies GELU and dropout together: ``y = m GELU(input) / k``, with E[y] = GELU(input) = input Phi(input).

    m ~ Bernoulli(k), k = keep_prob = 1 - p, as in `dropout`, with the same mask under the same key. In eval mode and
    with k = 1 it is GELU alone, with k = 0 it is 0. Backward keeps the input, as GELU alone does, and the key.

    Args:
        input: float16, bfloat16, float32 or float64, of any shape.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        training: whether dropout is applied.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the input.
        approximate: "none", or "tanh" for torch.nn.GELU's approximation of that name.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A new tensor of the input's shape and dtype. For half types the CPU rounds both GELU and the product, as
        separate layers do; CUDA rounds only the product.

    Raises:
        ValueError: a rate outside [0, 1], or another approximation.
        TypeError: both names of the rate, or something that is no number.
        RuntimeError: an integer tensor.

    References:
        Hendrycks and Gimpel, Gaussian error linear units, 2016 (arXiv:1606.08415).

    Example:
        >>> import torch, torchdrop
        >>> x = torch.randn(8)
        >>> y = torchdrop.functional.gelu_dropout(x, 0.0, approximate="tanh")
        >>> torch.allclose(y, torch.nn.functional.gelu(x, approximate="tanh"))
        True
    """
    if isinstance(input, Proxy):
        return recorded(gelu_dropout, locals())
    rate, activation = as_rate(p, keep_prob), _gelu(approximate)
    return _activate("gelu_dropout", input, activation, rate, training, generator)


class ReLUDropout(Rated):
    """Module of `relu_dropout`: ``y = m max(input, 0) / k`` in training, the rectifier alone in eval mode.

    Args:
        p: probability of dropping an element, in [0, 1]. Default: 0.5.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the input.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        Input and output: any shape. No parameters, no buffers, nothing in the state_dict.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: both names of the rate, neither, or something that is no number.

    References:
        See `relu_dropout`.

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.ReLUDropout(0.5)  # in place of torch.nn.ReLU() and torch.nn.Dropout(0.5)
        >>> layer(torch.ones(100)).unique(), layer.eval()(torch.tensor([-1.0, 1.0]))
        (tensor([0., 2.]), tensor([0., 1.]))
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return relu_dropout(input, self.rate, self.training, generator=self.generator)


class GELUDropout(Rated):
    """Module of `gelu_dropout`: ``y = m GELU(input) / k`` in training, GELU alone in eval mode.

    Args:
        p: probability of dropping an element, in [0, 1]. Default: 0.5.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the input.
        approximate: "none", or "tanh" for torch.nn.GELU's approximation of that name.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        Input and output: any shape. No parameters, no buffers, nothing in the state_dict.

    Raises:
        ValueError: a rate outside [0, 1], or another approximation.
        TypeError: both names of the rate, neither, or something that is no number.

    References:
        See `gelu_dropout`.

    Example:
        >>> import torch, torchdrop
        >>> torchdrop.GELUDropout(0.1, approximate="tanh")
        GELUDropout(p=0.1, approximate='tanh')
    """

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        *,
        keep_prob: Probability | None = None,
        approximate: str = "none",
        generator: torch.Generator | None = None,
    ) -> None:
        _gelu(approximate)
        super().__init__(p, keep_prob=keep_prob, generator=generator)
        self.approximate = approximate

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return gelu_dropout(input, self.rate, self.training, approximate=self.approximate, generator=self.generator)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate!r}"

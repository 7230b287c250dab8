"""Gaussian dropout: `gaussian_dropout` and `GaussianDropout`.

    y = x (1 + sqrt((1 - k) / k) z),   z ~ N(0, 1)

has the mean and the variance of inverted dropout with keep probability k (Srivastava et al., JMLR 2014, section 10).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Proxy

from ..core import sites
from ..core.inputs import check_input
from ..core.rate import DEFAULT_P, InplaceRated, Probability, as_rate
from ..core.symbolic import leaf, recorded
from ..kernels.mask_params import gaussian
from ..ops import operators


def _check_positive(keep_prob: Probability) -> None:
    if not isinstance(keep_prob, Tensor) and keep_prob <= 0.0:
        raise ValueError(
            f"keep_prob must be in (0, 1] for Gaussian dropout, got {keep_prob}: its noise would be infinite"
        )


def gaussian_dropout(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    inplace: bool = False,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Multiplies by noise of mean 1 and variance (1 - k) / k, the first two moments of inverted dropout.

    ``y = x (1 + sqrt((1 - k) / k) z)`` with z ~ N(0, 1): E[y] = x, Var[y] = x**2 (1 - k) / k. With k = 1 and in eval
    mode the input itself is returned; k = 0 is refused. The noise comes from the same counter-based generator as the
    masks, by Box and Muller's method on a symmetric grid. Backward makes it again.

    Args:
        input: float16, bfloat16, float32 or float64, of any shape, strides and memory format.
        p: rate in [0, 1), with k = 1 - p. Default: 0.5.
        training: whether noise is applied.
        inplace: whether the result is written into `input`.
        keep_prob: k, in place of `p`: a number, or a tensor that broadcasts against the input.
        generator: the source of the noise's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the input's shape, dtype and memory format; the input itself in eval mode, with k = 1 and in place.

    Raises:
        ValueError: a rate outside [0, 1], or k = 0.
        TypeError, RuntimeError: as `dropout`.

    References:
        Srivastava et al., JMLR 15, 2014, section 10; Wang and Manning, ICML 2013.

    Example:
        >>> import torch, torchdrop
        >>> _ = torch.manual_seed(0)
        >>> y = torchdrop.functional.gaussian_dropout(torch.ones(100_000), 0.2)
        >>> abs(y.mean() - 1) < 0.01, abs(y.var() - 0.25) < 0.01
        (tensor(True), tensor(True))
    """
    if isinstance(input, Proxy):
        return recorded(gaussian_dropout, locals())
    rate = as_rate(p, keep_prob, gaussian, _check_positive)
    if not (training or sites.is_on(training)):
        return input
    check_input(input, "gaussian_dropout")
    return sites.apply(operators.gaussian, input, rate.params_for(input.shape), input.shape, inplace, generator)


class GaussianDropout(InplaceRated):
    """Module of `gaussian_dropout`: y = x (1 + sqrt((1 - k) / k) z) in training, the input itself in eval mode.

    Args:
        p: rate in [0, 1), with k = 1 - p. Default: 0.5.
        inplace: whether the result is written into the input.
        keep_prob: k, in place of `p`: a number, or a tensor that broadcasts against the input.
        generator: the source of the noise's keys; PyTorch's default generator of the device if None.

    Raises:
        ValueError: a rate outside [0, 1], or k = 0.

    Example:
        >>> import torch, torchdrop
        >>> x = torch.randn(1000)
        >>> layer = torchdrop.GaussianDropout(keep_prob=0.9)
        >>> layer(x).shape, layer.eval()(x) is x
        (torch.Size([1000]), True)
    """

    _formula = staticmethod(gaussian)

    def _check_rate(self, keep_prob: Probability) -> None:
        _check_positive(keep_prob)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return gaussian_dropout(input, self.rate, self.training, self.inplace, generator=self.generator)

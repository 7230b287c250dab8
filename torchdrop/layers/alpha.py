"""Alpha dropout, for networks of SELUs: `alpha_dropout`, `feature_alpha_dropout` and their modules.

With k the keep probability, m ~ Bernoulli(k) and A = 1.7580993408473766, minus SELU's value at minus infinity,

    y = a (x m - A (1 - m)) + b,   a = ((A^2 (1 - k) + 1) k)^(-1/2),   b = a A (1 - k)

which keeps mean 0 and variance 1 (Klambauer et al., NeurIPS 2017, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..core import sites
from ..core.inputs import check_input
from ..core.mask_shape import check_channels
from ..core.rate import DEFAULT_P, InplaceRated, Probability, as_rate, undrawn
from ..core.symbolic import leaf, recorded
from ..kernels.mask_params import alpha
from ..ops import operators


def alpha_dropout(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = False,
    inplace: bool = False,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sets dropped elements to SELU's saturation value, then scales and shifts so that mean 0 and variance 1 stay.

    ``y = a (x m - A (1 - m)) + b`` with the constants of this module. With keep_prob 1 and in eval mode (the default
    here, as in torch.nn.functional) the input itself is returned; with keep_prob 0 the output is 0, as in
    torch.nn.functional.

    Args:
        input: float16, bfloat16, float32 or float64, of any shape, strides and memory format.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        training: whether dropout is applied.
        inplace: whether the result is written into `input`.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the input.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the input's shape, dtype and memory format; the input itself in eval mode, with k = 1 and in place.

    Raises:
        ValueError, TypeError, RuntimeError: as `dropout`.

    References:
        Klambauer et al., Self-normalizing neural networks, NeurIPS 2017.

    Example:
        >>> import torch, torchdrop
        >>> _ = torch.manual_seed(0)
        >>> y = torchdrop.functional.alpha_dropout(torch.randn(100_000), 0.2, training=True)
        >>> abs(y.mean()) < 0.02, abs(y.std() - 1) < 0.02
        (tensor(True), tensor(True))
    """
    if isinstance(input, Proxy):
        return recorded(alpha_dropout, locals())
    rate = as_rate(p, keep_prob, alpha)
    if not (training or sites.is_on(training)):
        return input
    whole = undrawn(input, rate, inplace)
    if whole is not None:
        return whole
    check_input(input, "alpha_dropout")
    return sites.apply(operators.masked, input, rate.params_for(input.shape), input.shape, inplace, generator)


def feature_alpha_dropout(
    input: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = False,
    inplace: bool = False,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Applies `alpha_dropout` to whole channels of (N, C, ...): one draw for each channel of each sample.

    The definition, the moments that it preserves and the arguments are those of `alpha_dropout`.

    Raises:
        RuntimeError: the input has fewer than 2 dimensions.

    Example:
        >>> import torch, torchdrop
        >>> x = torch.zeros(4, 8, 5)
        >>> y = torchdrop.functional.feature_alpha_dropout(x, 0.25, training=True)
        >>> torch.equal(y, y[:, :, :1].expand_as(y))
        True
    """
    if isinstance(input, Proxy):
        return recorded(feature_alpha_dropout, locals())
    rate = as_rate(p, keep_prob, alpha)
    if not (training or sites.is_on(training)):
        return input
    whole = undrawn(input, rate, inplace)
    if whole is not None:
        return whole
    check_input(input, "feature_alpha_dropout")
    check_channels(input)
    shape = (*input.shape[:2], *[1] * (input.dim() - 2))
    return sites.apply(operators.masked, input, rate.params_for(shape), shape, inplace, generator)


class _Alpha(InplaceRated):
    _formula = staticmethod(alpha)


class AlphaDropout(_Alpha, nn.AlphaDropout):
    """Module of `alpha_dropout`. A drop-in for torch.nn.AlphaDropout, which ignores `inplace`; here it works.

    See `Dropout` for the arguments and `alpha_dropout` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> x = torch.randn(1000)
        >>> layer = torchdrop.AlphaDropout(0.1)
        >>> layer(x).shape, layer.eval()(x) is x
        (torch.Size([1000]), True)
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return alpha_dropout(input, self.rate, self.training, self.inplace, generator=self.generator)


class FeatureAlphaDropout(_Alpha, nn.FeatureAlphaDropout):
    """Module of `feature_alpha_dropout`: whole channels of (N, C, ...). A drop-in for torch.nn.FeatureAlphaDropout.

    See `Dropout` for the arguments and `feature_alpha_dropout` for the definition.

    Example:
        >>> import torch, torchdrop
        >>> torchdrop.FeatureAlphaDropout(0.1)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return feature_alpha_dropout(input, self.rate, self.training, self.inplace, generator=self.generator)

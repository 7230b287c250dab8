"""Variational Gaussian dropout with rates that are learned: `VariationalLinear` and `VariationalConv1d`, 2d, 3d.

Gaussian dropout with noise N(1, alpha), seen as a distribution of the weights,

    w_ij ~ N(W_ij, alpha W_ij^2),   y ~ N(x W, alpha x^2 W^2)

whose alpha is learned with the weights: the divergence from the prior p(|w|) ~ 1 / |w|, which does not depend on W,
makes it larger, and the data make it smaller (Kingma, Salimans and Welling, NeurIPS 2015). With alpha at most 1 this is
dropout at rates up to 1/2. `sparse` has the form in which alpha is unbounded and weights are pruned.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ...core.inputs import check_input
from ...core.rate import read_rate
from ...core.symbolic import recorded
from ...kernels.masking import COMPUTE_DTYPE
from ...random import check_generator
from .base import Variational, arguments_of, check_plain

CUBIC = (1.16145124, -1.50204118, 0.58629921)

CONSTANT = 0.63576
"""The constant of Molchanov et al., with which the divergence vanishes as alpha grows without bound."""

RATES = ("layer", "unit", "weight")

G = TypeVar("G", bound="Gaussian")


def variational_kl(log_alpha: Tensor) -> Tensor:
    """Returns the divergence of N(w, alpha w**2) from the log-uniform prior, for alpha at most 1.

    ``KL = c0 - 1/2 ln alpha - (c1 alpha + c2 alpha**2 + c3 alpha**3)``, c1 = 1.16145124, c2 = -1.50204118, c3 =
    0.58629921. The prior is improper, so that the divergence has a constant that is free; c0 = 0.63576 is that of
    `sparse_variational_kl`. Its deviation from the integral varies by less than 0.004 over alpha in [0.1, 1], and by
    0.041 over (0, 1]. Beyond 1 it is wrong.

    Args:
        log_alpha: ln alpha, of any shape, at most 0.

    Returns:
        The divergence of each element in nats, a new tensor: float32 for half types.

    Raises:
        TypeError, RuntimeError: no floating-point tensor.

    References:
        Kingma, Salimans and Welling, NeurIPS 2015 (arXiv:1506.02557), section 3.

    Example:
        >>> import torch, torchdrop
        >>> torchdrop.functional.variational_kl(torch.tensor([-2.0, -1.0]))
        tensor([1.5046, 0.8826])
    """
    if isinstance(log_alpha, Proxy):
        return recorded(variational_kl, locals())
    check_input(log_alpha, "variational_kl")
    log_alpha = log_alpha.to(COMPUTE_DTYPE[log_alpha.dtype])
    alpha = log_alpha.exp()
    c1, c2, c3 = CUBIC
    return CONSTANT - 0.5 * log_alpha - alpha * (c1 + alpha * (c2 + alpha * c3))


class Gaussian(Variational):
    """The base of `VariationalLinear` and the convolutions, with alpha = sigmoid(logit_alpha) for the layer, its inputs
    or its weights."""

    rates: str
    logit_alpha: Tensor
    learned = "logit_alpha"

    @classmethod
    def from_module(
        cls: type[G],
        module: nn.Module,
        *,
        keep_prob: float = 0.8,
        rates: str = "layer",
        generator: torch.Generator | None = None,
    ) -> G:
        """Makes a layer that starts from copies of the parameters of a plain one of torch.nn, in the same mode.

        Raises:
            TypeError: `module` is not of the class of torch.nn that the layer extends.
            ValueError: it is lazy and has no weights yet. The constructor may raise its own errors, too.
        """
        check_plain(cls, module)
        layer = cls(
            *arguments_of(module),
            device="meta",
            dtype=module.weight.dtype,
            keep_prob=keep_prob,
            rates=rates,
            generator=generator,
        )
        return layer._take(module)

    def _settle(self, keep_prob: float, rates: str, generator: torch.Generator | None) -> None:
        self._initial = keep_prob
        self.rates = rates
        self.generator = generator
        self._add_noise()

    def _first_noise(self) -> Tensor:
        inputs = self.weight.shape[1] * getattr(self, "groups", 1)
        shape = {"layer": (), "unit": (inputs,), "weight": tuple(self.weight.shape)}[self.rates]
        alpha = (1.0 - self._initial) / self._initial
        return self.weight.new_full(shape, math.log(alpha / (1.0 - alpha)))

    @property
    def log_alpha(self) -> Tensor:
        """ln alpha, below 0: of shape (), (inputs,) or the weight's, as `rates` says."""
        return F.logsigmoid(self.logit_alpha.to(COMPUTE_DTYPE[self.logit_alpha.dtype]))

    def _weight_variance(self) -> Tensor:
        alpha = self.alpha
        if self.rates == "unit":
            groups, (outputs, inputs, *kernel) = getattr(self, "groups", 1), self.weight.shape
            alpha = alpha.reshape(groups, 1, inputs).expand(groups, outputs // groups, inputs)
            alpha = alpha.reshape(outputs, inputs, *[1] * len(kernel))
        return alpha * self._wide_weight().square()

    def regularizer(self) -> Tensor:
        """Returns the divergence of the weights from the log-uniform prior (`variational_kl`), up to a constant.

        It is a scalar in nats, which `regularization` collects, summed over all weights, also where they share an
        alpha. Added to the negative log-likelihood of all N data it gives the negative evidence lower bound, so divide
        it by N before adding it to a loss that is a mean over data.
        """
        shared = self.weight.numel() / max(1, self.logit_alpha.numel())
        return variational_kl(self.log_alpha).sum() * shared

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rates={self.rates!r}"


def _check(keep_prob: Any, rates: Any, generator: Any) -> float:
    k, _ = read_rate(None, keep_prob)
    if isinstance(k, Tensor) or not 0.5 < k < 1.0:
        raise ValueError(
            f"keep_prob must be a number in (1/2, 1), so that alpha = (1 - k) / k is in (0, 1), got {keep_prob}"
        )
    if rates not in RATES:
        raise ValueError(f"rates must be 'layer', 'unit' or 'weight', got {rates!r}")
    check_generator(generator)
    return k


class VariationalLinear(Gaussian, nn.Linear):
    """torch.nn.Linear with variational Gaussian dropout on its input, whose rate is learned.

    ``y = x W + b + sqrt(alpha x**2 W**2) z`` in training, with z ~ N(0, 1) drawn for every output by the local
    reparameterization trick; ``y = x W + b`` in eval mode. E[y] is the output of eval mode, and Var[y] that of inputs
    multiplied by noise N(1, alpha): of dropout with ``keep_prob = 1 / (1 + alpha)``. alpha = sigmoid(logit_alpha), in
    (0, 1), is a parameter. Add the divergence from the prior to the loss::

        loss = F.cross_entropy(model(x), y) + warmup * torchdrop.regularization(model) / N

    with N the size of the training set and a warm-up factor that rises from 0 to 1.

    Under Monte Carlo inference each row of a sample has its own weights: the moments of a row are those of a Bayesian
    network, and different rows are independent.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear.
        keep_prob: the initial keep_prob k, in (1/2, 1), for alpha = (1 - k) / k. Default: 0.8, alpha = 0.25.
        rates: "layer" for one alpha, "unit" for one an input, "weight" for one a weight.
        generator: the source of the noise's keys; PyTorch's default generator of the device if None.

    Shape:
        As torch.nn.Linear. The state_dict has weight, bias and `logit_alpha`.

    Raises:
        ValueError: keep_prob outside (1/2, 1), or another word for `rates`.
        TypeError: keep_prob is no number.

    References:
        Kingma, Salimans and Welling, NeurIPS 2015 (arXiv:1506.02557), section 3.1 and the adaptive rates of section 3.

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.VariationalLinear(4, 3, keep_prob=0.9)
        >>> layer(torch.randn(5, 4)).shape, layer.keep_prob
        (torch.Size([5, 3]), tensor(0.9000))
        >>> layer.regularizer()
        tensor(19.4767, grad_fn=<MulBackward0>)
    """

    plain: ClassVar[type[nn.Linear]] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        keep_prob: float = 0.8,
        rates: str = "layer",
        generator: torch.Generator | None = None,
    ) -> None:
        keep_prob = _check(keep_prob, rates, generator)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._settle(keep_prob, rates, generator)


class _Conv(Gaussian):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        keep_prob: float = 0.8,
        rates: str = "layer",
        generator: torch.Generator | None = None,
    ) -> None:
        keep_prob = _check(keep_prob, rates, generator)
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(*geometry, bias, padding_mode, device, dtype)
        self._settle(keep_prob, rates, generator)


class VariationalConv1d(_Conv, nn.Conv1d):
    """torch.nn.Conv1d with variational Gaussian dropout: `VariationalLinear`, for a convolution.

    The arguments of torch.nn.Conv1d, then keep_prob, rates and generator; "unit" rates are one an input channel.

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.VariationalConv1d(4, 6, 3, padding=1, rates="unit")
        >>> layer(torch.randn(2, 4, 9)).shape, layer.keep_prob.shape
        (torch.Size([2, 6, 9]), torch.Size([4]))
    """

    plain: ClassVar[type[nn.Conv1d]] = nn.Conv1d


class VariationalConv2d(_Conv, nn.Conv2d):
    """torch.nn.Conv2d with variational Gaussian dropout: `VariationalLinear`, for a convolution.

    The arguments of torch.nn.Conv2d, then keep_prob, rates and generator; "unit" rates are one an input channel.

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.VariationalConv2d(4, 6, 3, rates="unit")
        >>> layer(torch.randn(2, 4, 9, 9)).shape, layer.keep_prob.shape
        (torch.Size([2, 6, 7, 7]), torch.Size([4]))
    """

    plain: ClassVar[type[nn.Conv2d]] = nn.Conv2d


class VariationalConv3d(_Conv, nn.Conv3d):
    """torch.nn.Conv3d with variational Gaussian dropout: `VariationalLinear`, for a convolution.

    The arguments of torch.nn.Conv3d, then keep_prob, rates and generator; "unit" rates are one an input channel.

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.VariationalConv3d(4, 6, 3, rates="unit")
        >>> layer(torch.randn(2, 4, 5, 5, 5)).shape, layer.keep_prob.shape
        (torch.Size([2, 6, 3, 3, 3]), torch.Size([4]))
    """

    plain: ClassVar[type[nn.Conv3d]] = nn.Conv3d

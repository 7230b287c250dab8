"""Sparse variational dropout: `SparseVariationalLinear` and `SparseVariationalConv1d`, 2d, 3d.

This is variational Gaussian dropout with a rate of its own for each weight, which may grow without bound,

    w_ij ~ N(W_ij, s_ij^2),   alpha_ij = s_ij^2 / W_ij^2,   y ~ N(x W, x^2 s^2)

parametrized by W and ln s^2, which leaves the noise out of W's gradient. If the data do not determine a weight, its
alpha grows until the noise dominates, and it can be left out: weights with ln alpha above a threshold are 0 in eval
mode (Molchanov, Ashukha and Vetrov, ICML 2017).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ...core.checks import check_number
from ...core.inputs import check_input
from ...core.symbolic import recorded
from ...kernels.masking import COMPUTE_DTYPE
from ...random import check_generator
from .base import Variational, arguments_of, check_plain

SIGMOID = (0.63576, 1.87320, 1.48695)

EPSILON = 1e-16
"""This is added to a squared weight before its logarithm: a weight of 0 then has an alpha, and a gradient of 0."""

S = TypeVar("S", bound="Sparse")


def sparse_variational_kl(log_alpha: Tensor) -> Tensor:
    """Returns the divergence of N(w, alpha w**2) from the log-uniform prior, for any alpha.

    ``KL = k1 - k1 sigmoid(k2 + k3 ln alpha) + 1/2 ln(1 + 1 / alpha)``, k1 = 0.63576, k2 = 1.87320, k3 = 1.48695: within
    0.009 of the integral. The prior is improper, so that the divergence has a constant that is free; here it is such
    that KL falls to 0 as alpha grows without bound.

    Args:
        log_alpha: ln alpha, of any shape.

    Returns:
        The divergence of each element in nats, a new tensor: float32 for half types.

    Raises:
        TypeError, RuntimeError: no floating-point tensor.

    References:
        Molchanov, Ashukha and Vetrov, ICML 2017 (arXiv:1701.05369).

    Example:
        >>> import torch, torchdrop
        >>> torchdrop.functional.sparse_variational_kl(torch.tensor([-2.0, 0.0, 3.0]))
        tensor([1.5405, 0.4312, 0.0254])
    """
    if isinstance(log_alpha, Proxy):
        return recorded(sparse_variational_kl, locals())
    check_input(log_alpha, "sparse_variational_kl")
    log_alpha = log_alpha.to(COMPUTE_DTYPE[log_alpha.dtype])
    k1, k2, k3 = SIGMOID
    return k1 * torch.sigmoid(-k2 - k3 * log_alpha) + 0.5 * F.softplus(-log_alpha)


class Sparse(Variational):
    """The base of `SparseVariationalLinear` and the convolutions, with ln s^2 of each weight, and the threshold."""

    threshold: float
    log_sigma2: Tensor
    learned = "log_sigma2"

    @classmethod
    def from_module(
        cls: type[S],
        module: nn.Module,
        *,
        threshold: float = 3.0,
        log_sigma2: float = -10.0,
        generator: torch.Generator | None = None,
    ) -> S:
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
            threshold=threshold,
            log_sigma2=log_sigma2,
            generator=generator,
        )
        return layer._take(module)

    def _settle(self, threshold: float, log_sigma2: float, generator: torch.Generator | None) -> None:
        self.threshold = threshold
        self._initial = log_sigma2
        self.generator = generator
        self._add_noise()

    def _first_noise(self) -> Tensor:
        return torch.full_like(self.weight, self._initial, requires_grad=False)

    @property
    def log_alpha(self) -> Tensor:
        """ln alpha = ln(s**2 / W**2) of each weight, with a gradient; float32 for half types."""
        weight = self._wide_weight()
        return self.log_sigma2.to(weight.dtype) - torch.log(weight.square() + EPSILON)

    def _weight_variance(self) -> Tensor:
        return self.log_sigma2.to(COMPUTE_DTYPE[self.log_sigma2.dtype]).exp()

    def eval_weight(self) -> Tensor:
        """Returns the weights with which the layer computes in eval mode: 0 where ln alpha is above the threshold."""
        return torch.where(self.log_alpha > self.threshold, 0.0, self.weight)

    def regularizer(self) -> Tensor:
        """Returns the divergence of the weights from the log-uniform prior: `sparse_variational_kl`, summed.

        It is a scalar in nats, which `regularization` collects. Added to the negative log-likelihood of all N data it
        gives the negative evidence lower bound, so divide it by N before adding it to a loss that is a mean over data,
        and multiply it in the first epochs by a factor that rises from 0 to 1, so that weights are not pruned before
        they have learned anything.
        """
        return sparse_variational_kl(self.log_alpha).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"


def _check(threshold: Any, log_sigma2: Any, generator: Any) -> None:
    for name, value in (("threshold", threshold), ("log_sigma2", log_sigma2)):
        check_number(name, value)
    if math.isnan(threshold):
        raise ValueError(f"threshold must be a bound of ln alpha, got {threshold}")
    if not math.isfinite(log_sigma2):
        raise ValueError(f"log_sigma2 must be finite, got {log_sigma2}")
    check_generator(generator)


class SparseVariationalLinear(Sparse, nn.Linear):
    """torch.nn.Linear with sparse variational dropout: it learns which of its weights are not needed.

    ``y = x W + b + sqrt(x**2 s**2) z`` in training, with z ~ N(0, 1) drawn for every output by the local
    reparameterization trick, so that E[y] = x W + b and Var[y] = x**2 s**2 = x**2 (alpha W**2). In eval mode
    ``y = x W + b`` with the weights set to 0 whose ln alpha is above the threshold: noise with alpha is that of dropout
    with ``keep_prob = 1 / (1 + alpha)``, and ln alpha = 3 is a keep_prob of 0.047. `sparsity` counts these zeros, and
    `to_module` returns a torch.nn.Linear with them. ln s**2 is a parameter, `log_sigma2`. Add the divergence from the
    prior to the loss::

        loss = F.cross_entropy(model(x), y) + warmup * torchdrop.regularization(model) / N

    with N the size of the training set and a warm-up factor that rises from 0 to 1 over the first epochs, or to less on
    a small training set, where 1 may prune too much for good accuracy. Sum the terms of these layers separately from
    those that are scaled otherwise, such as concrete dropout's.

    Under Monte Carlo inference no weight is set to 0, and each row of a sample has its own weights: the moments of a
    row are those of a Bayesian network, and different rows are independent.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear.
        threshold: the ln alpha above which a weight is 0 in eval mode. Default: 3. It can be set at any time.
        log_sigma2: the initial ln s**2 of all weights. Default: -10, little noise: only weights below 0.0015 are above
            the threshold from the start.
        generator: the source of the noise's keys; PyTorch's default generator of the device if None.

    Shape:
        As torch.nn.Linear. The state_dict has weight, bias and `log_sigma2`.

    Raises:
        TypeError: threshold or log_sigma2 is no number.
        ValueError: threshold is NaN or log_sigma2 not finite.

    References:
        Molchanov, Ashukha and Vetrov, ICML 2017 (arXiv:1701.05369).

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.SparseVariationalLinear(4, 3)
        >>> layer(torch.randn(5, 4)).shape
        torch.Size([5, 3])
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(0.5)
        ...     _ = layer.log_sigma2[0].fill_(2.0)
        >>> torchdrop.sparsity(layer)
        layer    kind                     weights  zero  share
        (model)  SparseVariationalLinear       12     4  33.3 %
        >>> layer.to_module().weight[0]
        tensor([0., 0., 0., 0.], grad_fn=<SelectBackward0>)
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
        threshold: float = 3.0,
        log_sigma2: float = -10.0,
        generator: torch.Generator | None = None,
    ) -> None:
        _check(threshold, log_sigma2, generator)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._settle(threshold, log_sigma2, generator)


class _Conv(Sparse):
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
        threshold: float = 3.0,
        log_sigma2: float = -10.0,
        generator: torch.Generator | None = None,
    ) -> None:
        _check(threshold, log_sigma2, generator)
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(*geometry, bias, padding_mode, device, dtype)
        self._settle(threshold, log_sigma2, generator)


class SparseVariationalConv1d(_Conv, nn.Conv1d):
    """torch.nn.Conv1d with sparse variational dropout: `SparseVariationalLinear`, for a convolution.

    The arguments of torch.nn.Conv1d, then threshold, log_sigma2 and generator.

    Example:
        >>> import torch, torchdrop
        >>> torchdrop.SparseVariationalConv1d(4, 6, 3, padding=1)(torch.randn(2, 4, 9)).shape
        torch.Size([2, 6, 9])
    """

    plain: ClassVar[type[nn.Conv1d]] = nn.Conv1d


class SparseVariationalConv2d(_Conv, nn.Conv2d):
    """torch.nn.Conv2d with sparse variational dropout: `SparseVariationalLinear`, for a convolution.

    The arguments of torch.nn.Conv2d, then threshold, log_sigma2 and generator.

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.SparseVariationalConv2d.from_module(torch.nn.Conv2d(4, 6, 3))
        >>> layer(torch.randn(2, 4, 9, 9)).shape
        torch.Size([2, 6, 7, 7])
    """

    plain: ClassVar[type[nn.Conv2d]] = nn.Conv2d


class SparseVariationalConv3d(_Conv, nn.Conv3d):
    """torch.nn.Conv3d with sparse variational dropout: `SparseVariationalLinear`, for a convolution.

    The arguments of torch.nn.Conv3d, then threshold, log_sigma2 and generator.

    Example:
        >>> import torch, torchdrop
        >>> torchdrop.SparseVariationalConv3d(4, 6, 3)(torch.randn(2, 4, 5, 5, 5)).shape
        torch.Size([2, 6, 3, 3, 3])
    """

    plain: ClassVar[type[nn.Conv3d]] = nn.Conv3d

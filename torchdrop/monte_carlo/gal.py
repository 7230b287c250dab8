"""Regression with dropout as an approximate Gaussian process: the noise's precision tau, and the predictive mixture.

Each sample f_t predicts N(f_t, s_t^2); T of them together predict the mixture ``1/T sum_t N(f_t, s_t^2)``. If the noise
has no model of its own, it is the same everywhere, ``s_t^2 = 1 / tau``.

References:
    Gal, Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .moments import wide

HALVINGS = 60


def tau_from_weight_decay(length_scale: float, keep_prob: float, n: int, weight_decay: float) -> float:
    """Returns the model precision ``tau = keep_prob l^2 / (2 n weight_decay)`` that follows from this weight decay.

    It goes to infinity as the weight decay goes to 0, and is 0 at keep_prob 0. W are the weights as they are stored,
    as in Gal and Ghahramani's published experiments, although inverted dropout multiplies them by 1 / keep_prob in
    training.

    Args:
        length_scale: l, the prior length scale: large for functions that vary slowly.
        keep_prob: the probability of keeping a unit before the layer.
        n: the number of training points.
        weight_decay: lambda in ``1/n sum_i |y_i - f(x_i)|^2 / 2 + lambda sum |W|^2``. The `weight_decay` of a torch
            optimizer, whose gradient step adds it times W, is 2 lambda with this loss, and 4 lambda with
            torch.nn.MSELoss, which lacks the half.

    Raises:
        ValueError: a keep probability outside [0, 1], or another argument that is not positive and finite.

    References:
        Gal, Ghahramani, ICML 2016, equation 7.

    Example:
        >>> tau_from_weight_decay(length_scale=0.5, keep_prob=0.8, n=100, weight_decay=0.01)
        0.1
    """
    _check(length_scale=length_scale, n=n, weight_decay=weight_decay)
    return _keep(keep_prob) * length_scale**2 / (2 * n * weight_decay)


def weight_decay_from_tau(length_scale: float, keep_prob: float, n: int, tau: float) -> float:
    """Returns the weight decay ``keep_prob l^2 / (2 n tau)`` for a model precision: inverse of `tau_from_weight_decay`.

    Args:
        length_scale: l, the prior length scale.
        keep_prob: the probability of keeping a unit before the layer.
        n: the number of training points.
        tau: the model precision, the inverse of the noise's variance.

    Raises:
        ValueError: a keep probability outside [0, 1], or another argument that is not positive and finite.

    References:
        Gal, Ghahramani, ICML 2016, equation 7 solved for lambda.

    Example:
        >>> weight_decay_from_tau(length_scale=0.5, keep_prob=0.8, n=100, tau=0.1)
        0.01
    """
    _check(length_scale=length_scale, n=n, tau=tau)
    return _keep(keep_prob) * length_scale**2 / (2 * n * tau)


def predictive_log_likelihood(
    samples: Tensor, targets: Tensor, *, tau: float | None = None, noise_variance: Tensor | None = None
) -> Tensor:
    """Returns ``log 1/T sum_t prod_d N(y_d; f_td, s_td^2)`` of each row, in nats, by a stable log-mean-exp in float64.

    The outputs d of a row are independent given the sample, and dependent over all of them, so the product is inside.

    Args:
        samples: f, of shape (T, N, ...).
        targets: y, of shape (N, ...).
        tau: the noise's precision, the same everywhere.
        noise_variance: the noise's variance s^2, of the samples' shape. One of the two is needed.

    Returns:
        A float64 tensor of shape (N,).

    Raises:
        ValueError: shapes that differ (nothing is broadcast), no sample, or a noise that is not positive.
        TypeError: both descriptions of the noise, or neither.

    References:
        Gal, Ghahramani, ICML 2016, equation 8.

    Example:
        >>> samples = torch.tensor([[[0.0]], [[2.0]]])
        >>> density = predictive_log_likelihood(samples, torch.tensor([[1.0]]), tau=1.0).exp()
        >>> torch.allclose(density, torch.tensor(math.exp(-0.5) / math.sqrt(2 * math.pi)).double())
        True
    """
    check_targets(targets, samples.shape[1:])
    variance = _noise_variance(samples, tau, noise_variance)
    if len(samples) == 0:
        raise ValueError("samples must hold at least one, got none")
    squares = (wide(targets) - wide(samples)).square() / variance
    log_densities = -0.5 * (squares + variance.log() + math.log(2 * math.pi))
    return log_densities.unsqueeze(-1).flatten(2).sum(2).logsumexp(0) - math.log(len(samples))


def predictive_quantile(
    samples: Tensor, q: float, *, tau: float | None = None, noise_variance: Tensor | None = None
) -> Tensor:
    """Returns the q-quantile of the mixture ``1/T sum_t N(f_t, s_t^2)``, element by element.

    Its distribution function ``1/T sum_t Phi((y - f_t) / s_t)`` is inverted by bisection between the smallest and the
    largest quantile of the components, to 2^-60 of their distance.

    Args:
        samples: f, of shape (T, N, ...).
        q: between 0 and 1, both excluded.
        tau: the noise's precision, the same everywhere.
        noise_variance: the noise's variance s^2, of the samples' shape. One of the two is needed.

    Returns:
        A float64 tensor of shape (N, ...).

    Raises:
        ValueError: q out of range, no sample, or a noise that is not positive or of another shape.
        TypeError: both descriptions of the noise, or neither.

    Example:
        >>> round(predictive_quantile(torch.tensor([[0.0], [2.0]]), 0.5, tau=1.0).item(), 12)
        1.0
    """
    if not 0 < q < 1:
        raise ValueError(f"q must be between 0 and 1, both excluded where there is noise, got {q}")
    if len(samples) == 0:
        raise ValueError("samples must hold at least one, got none")
    scale = _noise_variance(samples, tau, noise_variance).sqrt()
    values = wide(samples)
    ends = values + scale * torch.special.ndtri(torch.full((), q, dtype=values.dtype, device=values.device))
    low, high = ends.amin(0), ends.amax(0)
    for _ in range(HALVINGS):
        middle = low + (high - low) / 2
        below = torch.special.ndtr((middle - values) / scale).mean(0) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def check_targets(targets: Tensor, shape: torch.Size) -> None:
    """Raises ValueError if targets do not have this shape: torch would broadcast (N,) against (N, 1) to (N, N)."""
    if targets.shape != shape:
        raise ValueError(f"targets must have the predictions' shape {tuple(shape)}, got {tuple(targets.shape)}")


def _noise_variance(samples: Tensor, tau: float | None, noise_variance: Tensor | None) -> Tensor:
    if (tau is None) == (noise_variance is None):
        raise TypeError("give tau or noise_variance: one of the two, and not both")
    if noise_variance is None:
        assert tau is not None
        _check(tau=tau)
        return torch.full_like(wide(samples), 1 / tau)
    if noise_variance.shape != samples.shape:
        raise ValueError(
            f"noise_variance must have the samples' shape {tuple(samples.shape)}, got {tuple(noise_variance.shape)}"
        )
    if not bool((noise_variance > 0).all()):
        raise ValueError(f"noise_variance must be positive, got {noise_variance.min().item()}")
    return wide(noise_variance)


def _check(**arguments: float) -> None:
    for name, value in arguments.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _keep(keep_prob: float) -> float:
    if not 0 <= keep_prob <= 1:
        raise ValueError(f"keep_prob must be in [0, 1], got {keep_prob}")
    return keep_prob

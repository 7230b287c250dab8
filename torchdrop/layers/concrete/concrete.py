"""Concrete dropout, whose rate is learned: `concrete_dropout` and `ConcreteDropout`.

A mask has no gradient in its rate p. With u uniform on (0, 1), k = 1 - p and a temperature t, the relaxed mask

    y = x (1 - z) / k,   z = sigmoid((logit p + logit u) / t)

has one (Gal, Hron and Kendall, NeurIPS 2017). As t falls to 0, z becomes the indicator of u > k and y becomes dropout
with keep probability k. The wrapper `ConcreteLayer` adds the regularizer, without which p would follow only the
training data.

The relaxation has a bias: E[1 - z] is not k, but

    E[1 - z] = int_0^1 P(z <= v) dv = int_0^1 sigmoid(t logit v - logit p) dv,

0.9455 k at t = 2/3 and p = 0.3. ``unbiased=True`` divides by it in place of k.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.functional import logsigmoid, softplus

from ...core import sites
from ...core.checks import check_number
from ...core.inputs import check_input
from ...core.mask_shape import Axes, NoiseShape, mask_shape
from ...core.portable import refuse_script
from ...core.rate import Probability, read_rate
from ...core.symbolic import leaf, recorded
from ...kernels.masking import COMPUTE_DTYPE
from ...random import check_generator

TEMPERATURE = 0.1


def _check_temperature(temperature: Any) -> None:
    check_number("temperature", temperature)
    if not 0.0 < float(temperature) <= 1.0:
        raise ValueError(
            f"temperature must be in (0, 1], got {temperature}: above 1 the relaxed mask has no peaks at 0 and 1"
        )


def _checked_logit(logit_p: Any, like: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the logit in the dtype that `like` is computed in.

    Raises:
        TypeError: it is neither a number nor a tensor.
        ValueError: a number that is not finite, an integer tensor, or one that does not fit the mask's shape.
    """
    dtype = COMPUTE_DTYPE[like.dtype]
    if not isinstance(logit_p, Tensor):
        if not isinstance(logit_p, numbers.Real):
            raise TypeError(f"logit_p must be a number or a tensor, got {type(logit_p).__name__}")
        if not math.isfinite(logit_p):
            raise ValueError(f"logit_p must be finite, got {logit_p}")
        return torch.full((), float(logit_p), dtype=dtype, device=like.device)
    if not logit_p.is_floating_point():
        raise ValueError(f"logit_p must be a floating-point tensor, got {logit_p.dtype}")
    sizes = (1,) * (len(shape) - logit_p.dim()) + tuple(logit_p.shape)
    if len(sizes) > len(shape) or any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"logit_p of shape {tuple(logit_p.shape)} does not broadcast against the mask's shape {tuple(shape)}"
        )
    return logit_p.to(dtype)


def concrete_dropout(
    input: Tensor,
    logit_p: float | Tensor,
    training: bool = True,
    *,
    temperature: float = TEMPERATURE,
    shared_axes: Axes = None,
    noise_shape: NoiseShape = None,
    unbiased: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Multiplies by a relaxed dropout mask that is differentiable in the logit of its rate.

    ``y = x (1 - z) / k`` with ``z = sigmoid((logit p + logit u) / t)``, u uniform on (0, 1) and k = 1 - p. For t -> 0
    this is `dropout` with keep_prob k, with the same mask that `dropout` has under the same seed. E[y] is
    ``x E[1 - z] / k``, which is x at p = 1/2 and for t -> 0 only (0.9455 x at t = 2/3 and p = 0.3), unless `unbiased`
    asks for a division by E[1 - z]: then E[y] = x at every rate and temperature. The rate is given as a logit, so it
    cannot be 0 or 1; for a logit of large magnitude the output stays finite. In eval mode the input itself is returned.
    Backward keeps two numbers for each element of the mask, in float32 or float64.

    Args:
        input: float16, bfloat16, float32 or float64, of any shape, strides and memory format.
        logit_p: ln(p / (1 - p)) of the probability p of dropping: a number, or a tensor that broadcasts against the
            mask and may require a gradient.
        training: whether dropout is applied.
        temperature: t, in (0, 1]. Default: 0.1.
        shared_axes: the axes over which the mask is the same, for example those of an image.
        noise_shape: the mask's shape, with 1 where it is shared (None means the input's size).
        unbiased: whether the expectation is kept, by dividing by E[1 - z], an integral computed to machine precision,
            in place of k.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the input's shape, dtype and memory format; the input itself in eval mode.

    Raises:
        ValueError: a temperature outside (0, 1], a logit that is not finite or does not fit, axes or shapes that do
            not fit.
        TypeError: a temperature or a logit that is no number.
        RuntimeError: an integer input.

    References:
        Gal, Hron and Kendall, "Concrete Dropout", NeurIPS 2017 (arXiv:1705.07832), section 3.

    Example:
        >>> import torch, torchdrop
        >>> _ = torch.manual_seed(0)
        >>> logit_p = torch.tensor(-1.0, requires_grad=True)
        >>> y = torchdrop.functional.concrete_dropout(torch.ones(1000), logit_p)
        >>> y.sum().backward()
        >>> logit_p.grad != 0
        tensor(True)
    """
    if isinstance(input, Proxy):
        return recorded(concrete_dropout, locals())
    _check_temperature(temperature)
    if not sites.is_on(training):
        return input
    check_input(input, "concrete_dropout")
    shape = mask_shape(input, shared_axes, noise_shape)
    logit = _checked_logit(logit_p, input, shape)
    noise = torch.logit(sites.uniform(input, shape, generator))
    log_mean = _log_mean(logit, temperature) if unbiased else logsigmoid(-logit)
    log_gate = -softplus((logit + noise) / temperature)  # logsigmoid would keep one more number for backward
    gate = torch.exp(log_gate - log_mean)
    return (input.to(gate.dtype) * gate).to(input.dtype)


_STEP, _NODES = 0.5, 120


def _log_mean(logit: Tensor, temperature: float) -> Tensor:
    """Returns ln E[1 - z], the logarithm of ``int sigmoid(t s - logit p) sigmoid'(s) ds`` over all real s.

    The trapezoidal rule is exact to rounding here: the integrand is analytic in a strip of half-width pi, which makes
    its error at this step about exp(-4 pi^2), and falls like exp(-|s|) at least beyond |logit p|.
    """
    s = torch.arange(-_NODES, _NODES + 1, dtype=logit.dtype, device=logit.device) * _STEP
    weight = logsigmoid(s) + logsigmoid(-s) + math.log(_STEP)
    return torch.logsumexp(logsigmoid(temperature * s - logit.unsqueeze(-1)) + weight, -1)


def _logit(p: Probability | None, keep_prob: Probability | None) -> Tensor:
    """Returns the logit of a rate strictly between 0 and 1; of p = 0.1 if none is given.

    Raises:
        TypeError, ValueError: as `read_rate`, or a rate of 0 or 1.
    """
    name, given = ("keep_prob", keep_prob) if keep_prob is not None else ("p", p)
    k, p = read_rate(0.1 if p is None and keep_prob is None else p, keep_prob)
    ends = bool(((k <= 0) | (p <= 0)).any()) if isinstance(k, Tensor) else min(k, p) <= 0
    if ends:
        got = f"a tensor from {given.min().item()} to {given.max().item()}" if isinstance(given, Tensor) else given
        raise ValueError(f"{name} must be strictly between 0 and 1 to be learned, got {got}: its logit is infinite")
    if isinstance(k, Tensor) and isinstance(p, Tensor):
        return torch.log(p) - torch.log(k)
    return torch.tensor(math.log(p) - math.log(k), dtype=torch.float64, device="cpu")


class ConcreteDropout(nn.Module):
    """Module of `concrete_dropout`: dropout with a rate that is learned; the input itself in eval mode.

    The rate is the parameter `logit_p`. Without a regularizer, training makes it drop less and less: wrap the layer
    that follows in `ConcreteLayer` instead, which has the regularizer, or add one of your own in `p`.

    `p` and `keep_prob` are two views of the rate, differentiable tensors; setting one sets `logit_p`. As the rate is
    learned, `keep_probs`, `set_keep_prob` and schedules leave it out. `mc_dropout` and `mc_predict` turn the layer on,
    with relaxed masks as in training, and `disabled` turns it off.

    Args:
        p: initial probability of dropping, strictly between 0 and 1: a number, or a tensor that broadcasts against
            the mask and gives every part of it a rate of its own. Default: 0.1.
        keep_prob: initial probability of keeping, in place of `p`.
        temperature: t, in (0, 1]. Default: 0.1.
        shared_axes: the axes over which the mask is the same.
        noise_shape: the mask's shape, with 1 where it is shared (None means the input's size).
        unbiased: whether to divide by E[1 - z] in place of k.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        Input and output: any shape. The state_dict has ``logit_p``, of shape () or that of `p`.

    Raises:
        ValueError: a rate outside (0, 1), or a temperature outside (0, 1].
        TypeError: both names of the rate, something that is no number, or both ways of giving a mask's shape.

    References:
        Gal, Hron and Kendall, "Concrete Dropout", NeurIPS 2017 (arXiv:1705.07832).

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.ConcreteDropout(keep_prob=0.8)
        >>> layer
        ConcreteDropout(p=0.2, temperature=0.1)
        >>> layer.p = 0.5
        >>> layer.logit_p.item()
        0.0
        >>> x = torch.ones(100)
        >>> layer.eval()(x) is x
        True
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        p: Probability | None = None,
        *,
        keep_prob: Probability | None = None,
        temperature: float = TEMPERATURE,
        shared_axes: Axes = None,
        noise_shape: NoiseShape = None,
        unbiased: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_generator(generator)
        _check_temperature(temperature)
        if shared_axes is not None and noise_shape is not None:
            raise TypeError("give shared_axes or noise_shape, not both")
        self.temperature = temperature
        self.shared_axes = shared_axes
        self.noise_shape = noise_shape
        self.unbiased = unbiased
        self.generator = generator
        self._first = p, keep_prob
        logit = _logit(p, keep_prob).to(torch.get_default_dtype())
        given = isinstance(p, Tensor) or isinstance(keep_prob, Tensor)
        self.logit_p: nn.Parameter = nn.Parameter(logit if given else logit.to(torch.get_default_device()))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Resets the rate to the one that the layer was constructed with."""
        self.logit_p.copy_(_logit(*self._first))

    @property
    def p(self) -> Tensor:
        """The probability that an element is dropped."""
        return torch.sigmoid(self.logit_p)

    @p.setter
    def p(self, value: Probability) -> None:
        self._set(value, None)

    @property
    def keep_prob(self) -> Tensor:
        """The probability that an element is kept: 1 - p."""
        return torch.sigmoid(-self.logit_p)

    @keep_prob.setter
    def keep_prob(self, value: Probability) -> None:
        self._set(None, value)

    @torch.no_grad()
    def _set(self, p: Probability | None, keep_prob: Probability | None) -> None:
        if p is None and keep_prob is None:
            raise TypeError("a rate must be a number or a tensor, got NoneType")
        logit = _logit(p, keep_prob)
        if logit.dim() and logit.shape != self.logit_p.shape:
            raise ValueError(
                f"a rate must be a number or a tensor of shape {tuple(self.logit_p.shape)} here, got shape "
                f"{tuple(logit.shape)}"
            )
        self.logit_p.copy_(logit)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return concrete_dropout(
            input, self.logit_p, self.training, temperature=self.temperature, shared_axes=self.shared_axes,
            noise_shape=self.noise_shape, unbiased=self.unbiased, generator=self.generator,
        )  # fmt: skip

    def extra_repr(self) -> str:
        plain = self.logit_p.dim() == 0 and not self.logit_p.is_meta
        p = f"{self.p.item():.4g}" if plain else f"<tensor of shape {tuple(self.logit_p.shape)}>"
        shared = {"shared_axes": self.shared_axes, "noise_shape": self.noise_shape}
        extra = "".join(f", {k}={v}" for k, v in shared.items() if v is not None)
        return f"p={p}, temperature={self.temperature:.4g}{extra}" + (", unbiased=True" if self.unbiased else "")

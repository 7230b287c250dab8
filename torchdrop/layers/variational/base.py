"""The base of variational layers: noise on outputs instead of weights, and conversion from and to plain layers.

With independent Gaussian weights w_ij ~ N(W_ij, V_ij) a linear map has, given its input, outputs

    y = x W + b + sqrt(x^2 V) z,   z ~ N(0, 1)

so the noise is drawn for outputs, a new one for each row: less of it, and a gradient with less variance (Kingma,
Salimans and Welling, NeurIPS 2015, section 2.3). A convolution is such a map.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...core import sites
from ...core.inputs import check_input
from ...core.portable import refuse_script
from ...core.symbolic import holds_proxy, leaf, recorded
from ...core.torch_state import autocast_available
from ...kernels.masking import COMPUTE_DTYPE

V = TypeVar("V", bound="Variational")


def local_reparameterization(
    mean: Tensor, variance: Tensor, training: bool = True, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draws outputs from their mean and variance: the local reparameterization trick.

    ``y = mean + sqrt(variance) z`` with z ~ N(0, 1), independent in all elements. For a map that is linear in weights
    with means W and variances V, pass its outputs for (x, W) and, without a bias, for (x**2, V). Where the variance is
    0 the output is the mean, and the gradient with respect to the variance is 0 there, not infinite. In eval mode the
    mean itself is returned.

    Args:
        mean: float16, bfloat16, float32 or float64, of any shape.
        variance: a tensor of the same shape; its dtype may be wider, as the square of a half number needs. Values that
            are not positive count as 0.
        training: whether noise is added.
        generator: the source of the noise's key; PyTorch's default generator of the device if None.

    Returns:
        A new tensor of the mean's shape and dtype; the mean itself in eval mode.

    Raises:
        ValueError: mean and variance differ in shape.
        TypeError, RuntimeError: as `dropout`.

    References:
        Kingma, Salimans and Welling, NeurIPS 2015 (arXiv:1506.02557), section 2.3.

    Example:
        >>> import torch, torchdrop
        >>> x, mean, variance = torch.randn(2, 3), torch.randn(5, 3), torch.rand(5, 3)
        >>> y = torchdrop.functional.local_reparameterization(x @ mean.T, x**2 @ variance.T)
        >>> y.shape
        torch.Size([2, 5])
    """
    if holds_proxy(mean, variance):
        return recorded(local_reparameterization, locals())
    if not sites.is_on(training):
        return mean
    check_input(mean, "local_reparameterization")
    check_input(variance, "local_reparameterization")
    if mean.shape != variance.shape:
        raise ValueError(
            f"variance must have the mean's shape, got {tuple(variance.shape)} for a mean of {tuple(mean.shape)}"
        )
    return with_noise(mean, variance, generator)


def with_noise(mean: Tensor, variance: Tensor, generator: torch.Generator | None) -> Tensor:
    """Does what `local_reparameterization` does in training, for checked arguments."""
    z = sites.standard_normal(mean, mean.shape, generator)
    none = variance <= 0  # fast convolutions may round a sum of squares to below 0
    deviation = torch.where(none, 1.0, variance).sqrt()
    return torch.where(none, mean, mean + deviation * z).to(mean.dtype)


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context in which autocast leaves squares alone, since they overflow in float16."""
    kind = device.type
    if autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


class Variational(nn.Module):
    """The base of the variational layers, before nn.Linear or nn.Conv1d, 2d, 3d among a layer's parents."""

    __prepare_scriptable__ = refuse_script

    weight: Tensor
    bias: Any
    generator: torch.Generator | None
    plain: ClassVar[type[nn.Module]]
    """The class of torch.nn that the layer extends."""
    learned: ClassVar[str]
    """The name of the noise's parameter."""

    @property
    def log_alpha(self) -> Tensor:
        """ln alpha of the noise N(1, alpha) that multiplies weights, with a gradient."""
        raise NotImplementedError

    @property
    def alpha(self) -> Tensor:
        """The variance alpha of the noise N(1, alpha) that multiplies weights, with a gradient."""
        return self.log_alpha.exp()

    @property
    def keep_prob(self) -> Tensor:
        """The keep probability of dropout with noise of the same variance: 1 / (1 + alpha). Learned, not to be set."""
        return torch.sigmoid(-self.log_alpha.detach())

    @property
    def p(self) -> Tensor:
        """The rate of dropout with noise of the same variance: alpha / (1 + alpha) = 1 - keep_prob."""
        return torch.sigmoid(self.log_alpha.detach())

    def regularizer(self) -> Tensor:
        """Returns the Kullback-Leibler divergence of the weights from the log-uniform prior, up to a constant.

        It is a scalar in nats, summed over weights, which `regularization` collects. Added to the negative
        log-likelihood of all N data it gives the negative evidence lower bound. The classes of the layers say more.
        """
        raise NotImplementedError

    def eval_weight(self) -> Tensor:
        """Returns the weights with which the layer computes in eval mode."""
        return self.weight

    def _weight_variance(self) -> Tensor:
        """Returns the variance of each weight, in the dtype that it is computed in."""
        raise NotImplementedError

    def _map(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self, nn.Linear):
            return F.linear(input, weight, bias)
        return self._conv_forward(input, weight, bias)  # type: ignore[operator]

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        if not sites.is_on(self.training):
            return self._map(input, self.weight if self.training else self.eval_weight(), self.bias)
        mean = self._map(input, self.weight, self.bias)
        with _full_precision(input.device):
            variance = self._weight_variance()
            variance = self._map(input.to(variance.dtype).square(), variance, None)
        return with_noise(mean, variance, self.generator)

    def _wide_weight(self) -> Tensor:
        return self.weight.to(COMPUTE_DTYPE[self.weight.dtype])

    def _first_noise(self) -> Tensor:
        """Returns the initial value of the noise's parameter, given the present weight."""
        raise NotImplementedError

    def _add_noise(self) -> None:
        setattr(self, self.learned, nn.Parameter(self._first_noise()))

    def reset_parameters(self) -> None:
        """Resets weight and bias as torch.nn does, and the noise as the constructor does."""
        super().reset_parameters()  # type: ignore[misc]
        noise = self._parameters.get(self.learned)
        if noise is not None:  # there is none yet while torch.nn's constructor runs
            with torch.no_grad():
                noise.copy_(self._first_noise())

    def _take(self: V, module: nn.Module) -> V:
        """Copies a plain layer's parameters and its mode."""
        _copy_parameters(self, module.weight, module.bias)
        self._add_noise()
        return self.train(module.training)

    def to_module(self) -> nn.Module:
        """Makes the plain layer of torch.nn that computes the same as this one in eval mode, from copied parameters."""
        plain = self.plain(*arguments_of(self), device="meta", dtype=self.weight.dtype)
        _copy_parameters(plain, self.eval_weight(), self.bias)
        return plain.train(self.training)


def _copy_parameters(module: nn.Module, weight: Any, bias: Any) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(module, name, nn.Parameter(value.detach().clone(), value.requires_grad))


def arguments_of(module: nn.Module) -> tuple[Any, ...]:
    """Returns the arguments with which nn.Linear or nn.ConvNd was constructed, by position."""
    has_bias = module.bias is not None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, has_bias
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return (*(getattr(module, name) for name in names), has_bias, module.padding_mode)


def check_plain(kind: type[Variational], module: Any) -> None:
    """Refuses a module from which a variational layer of this kind cannot be made.

    Raises:
        TypeError: the module is not of the class of torch.nn that the layer extends.
        ValueError: it is a lazy one that has not seen its first input.
    """
    if not isinstance(module, kind.plain):
        raise TypeError(
            f"{kind.__name__}.from_module takes a torch.nn.{kind.plain.__name__}, got {type(module).__name__}"
        )
    if is_lazy(module.weight):  # type: ignore[arg-type]
        raise ValueError(
            f"{kind.__name__}.from_module takes a layer with weights, got a lazy {type(module).__name__} "
            "that has none yet: run the model once first"
        )

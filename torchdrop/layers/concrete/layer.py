"""A layer whose input has concrete dropout, and the regularizer that its rate is learned with: `ConcreteLayer`.

For a layer with weights W and K inputs, a rate p of dropping and k = 1 - p, the regularizer is

    lambda_w ||W||^2 / k + lambda_d K (p ln p + k ln k)

the divergence of the weights' approximate posterior from a prior N(0, 1 / l^2), up to a constant and a factor. With few
examples its entropy keeps p large; the likelihood of many examples makes p small (Gal, Hron and Kendall, NeurIPS 2017).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.nn.modules.conv import _ConvNd

from ...core.checks import check_choice, check_number
from ...core.portable import refuse_script
from ...core.rate import Probability
from ...core.symbolic import leaf
from .concrete import TEMPERATURE, ConcreteDropout

Loss = Literal["squared", "cross_entropy"]


class Regularizers(NamedTuple):
    """The factors of `ConcreteLayer`'s regularizer: lambda_w for the weights, lambda_d for the entropy."""

    weight: float
    dropout: float


def concrete_regularizers(
    examples: float, *, length_scale: float = 1e-2, precision: float = 1.0, loss: Loss = "squared"
) -> Regularizers:
    """Returns the factors lambda_w and lambda_d of concrete dropout's regularizer, for a loss averaged over examples.

    ``lambda_w = l^2 / (tau N)``, and ``lambda_d = 2 / (tau N)`` or, for cross-entropy, ``1 / (tau N)``. The first pair
    goes with a squared error whose noise has precision tau and, at tau = 1, with twice a negative log-likelihood, such
    as ``(y - f)^2 / s^2 + ln s^2``. The second is the published one for cross-entropy; it corresponds to a prior length
    scale of l sqrt(2).

    Args:
        examples: N, the number of training examples.
        length_scale: l in the prior of the weights, N(0, 1 / l^2). Default: 0.01.
        precision: tau, the inverse variance of the observations' noise. Default: 1.
        loss: "squared" or "cross_entropy".

    Returns:
        The two, as a named tuple (weight, dropout).

    Raises:
        TypeError: something that is no number.
        ValueError: a number that is not positive and finite, or another loss.

    References:
        Gal, Hron and Kendall, "Concrete Dropout", NeurIPS 2017 (arXiv:1705.07832), section 3.

    Example:
        >>> concrete_regularizers(1000, length_scale=2.0)
        Regularizers(weight=0.004, dropout=0.002)
    """
    for name, value in (("examples", examples), ("length_scale", length_scale), ("precision", precision)):
        check_number(name, value)
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    check_choice("loss", loss, get_args(Loss))
    unit = 1.0 / (precision * examples)
    return Regularizers(length_scale**2 * unit, (2.0 if loss == "squared" else 1.0) * unit)


class ConcreteLayer(nn.Module):
    """A linear or convolutional layer with concrete dropout of its input, and the regularizer that belongs to it.

    ``layer(concrete_dropout(x))``, element by element before nn.Linear and by whole channels of a sample before a
    convolution. The regularizer ``lambda_w ||W||^2 / k + lambda_d K (p ln p + k ln k)``, with W the layer's weight
    (without its bias) and K the number of its input features or channels, is to be added to the loss:
    ``loss + torchdrop.regularization(model)`` collects it over a model. In eval mode this is ``layer(x)``.

    Args:
        layer: an nn.Linear, nn.Conv1d to nn.Conv3d or their transposed forms; it is held, not copied.
        p: initial probability of dropping, a number strictly between 0 and 1. Default: 0.1.
        keep_prob: initial probability of keeping, in place of `p`.
        regularizers: (lambda_w, lambda_d), from `concrete_regularizers` or any two numbers that are not negative.
        temperature: t, in (0, 1]. Default: 0.1.
        unbiased: whether the noise divides by E[1 - z] in place of k.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Attributes:
        layer: the wrapped layer.
        dropout: the `ConcreteDropout` before it; its `p` is the rate that has been learned.
        regularizers: (lambda_w, lambda_d).

    Shape:
        The shapes of the layer. The state_dict has the layer's entries after ``layer.``, and ``dropout.logit_p``.

    Raises:
        TypeError: another kind of layer, or factors that are no pair of numbers; else as `ConcreteDropout`.
        ValueError: a factor that is negative or not finite, or a rate that is no single number in (0, 1).

    References:
        Gal, Hron and Kendall, "Concrete Dropout", NeurIPS 2017 (arXiv:1705.07832).

    Example:
        >>> import torch, torchdrop
        >>> factors = torchdrop.concrete_regularizers(500, length_scale=1e-2)
        >>> model = torch.nn.Sequential(
        ...     torchdrop.ConcreteLayer(torch.nn.Linear(4, 32), regularizers=factors),
        ...     torch.nn.ReLU(),
        ...     torchdrop.ConcreteLayer(torch.nn.Linear(32, 1), regularizers=factors),
        ... )
        >>> x, y = torch.randn(20, 4), torch.randn(20, 1)
        >>> loss = torch.nn.functional.mse_loss(model(x), y) + torchdrop.regularization(model)
        >>> loss.backward()
        >>> round(model[2].dropout.p.item(), 6)
        0.1
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        layer: nn.Module,
        p: Probability | None = None,
        *,
        keep_prob: Probability | None = None,
        regularizers: tuple[float, float],
        temperature: float = TEMPERATURE,
        unbiased: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            raise TypeError(
                f"layer must be an nn.Linear or a convolution of torch.nn, got {type(layer).__name__}: put "
                "ConcreteDropout before other layers, and give them a method regularizer()"
            )
        axes = tuple(range(-len(layer.kernel_size), 0)) if isinstance(layer, _ConvNd) else None
        dropout = ConcreteDropout(
            p, keep_prob=keep_prob, temperature=temperature, shared_axes=axes, unbiased=unbiased, generator=generator
        )
        if dropout.logit_p.dim():
            raise ValueError(f"a wrapped layer has a single rate, got a tensor of shape {tuple(dropout.logit_p.shape)}")
        self.regularizers: tuple[float, float] = _checked_factors(regularizers)
        self.layer: nn.Linear | _ConvNd = layer
        self.dropout: ConcreteDropout = dropout

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        return self.layer(self.dropout(input))

    def regularizer(self) -> Tensor:
        """Returns ``lambda_w ||W||^2 / k + lambda_d K (p ln p + k ln k)`` at this moment, in float32 at least."""
        weight = self.layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        logit = self.dropout.logit_p.to(wide)
        log_p, log_k = logsigmoid(logit), logsigmoid(-logit)
        inputs = self.layer.in_features if isinstance(self.layer, nn.Linear) else self.layer.in_channels
        on_weights, on_entropy = self.regularizers
        negative_entropy = torch.exp(log_p) * log_p + torch.exp(log_k) * log_k
        return on_weights * weight.to(wide).square().sum() * torch.exp(-log_k) + on_entropy * inputs * negative_entropy


def _checked_factors(factors: Any) -> Regularizers:
    if not isinstance(factors, Sequence) or len(factors) != 2 or not all(isinstance(f, numbers.Real) for f in factors):
        raise TypeError(
            f"regularizers must be two numbers, lambda_w and lambda_d, got {factors!r}: see concrete_regularizers"
        )
    if not all(0.0 <= f < math.inf for f in factors):
        raise ValueError(f"regularizers must be finite and not negative, got {tuple(factors)}")
    return Regularizers(*map(float, factors))

"""Standout, dropout with a probability for each unit that depends on the input: `standout` and `Standout`.

A hidden layer h = f(W x) gets masks whose probabilities come from a second layer. In the practical form that layer has
the first one's own weights, scaled and shifted (Ba and Frey, NeurIPS 2013):

    y = h m,   m ~ Bernoulli(pi),   pi = sigmoid(alpha W x + beta)        in training
    y = h pi                                                              in eval mode

Units that respond strongly are kept more often. Nothing is divided by pi: eval mode is the expectation of training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..core import sites
from ..core.checks import check_finite, check_module
from ..core.exported import warn_stays_on
from ..core.inputs import check_input
from ..core.portable import refuse_script
from ..core.rate import Probability, read_rate
from ..core.symbolic import leaf, recorded
from ..core.torch_state import transforms_active
from ..kernels.mask_params import ONE, has_float64
from ..kernels.masking import COMPUTE_DTYPE
from ..random import check_generator

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def standout(
    input: Tensor,
    training: bool = True,
    *,
    keep_prob: Probability,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keeps each element with a probability of its own, without scaling; in eval mode, multiplies by it.

    ``y = x m`` with m ~ Bernoulli(pi) in training and ``y = pi x`` in eval mode, which is E[x m] (to 2**-32, the grid
    of the masks' probabilities): 0 where pi = 0 and x where pi = 1, in both. In training a dropped element is exactly
    0, also where the input is infinite or NaN, and no gradient flows into pi, since a mask has none; in eval mode it
    does. Backward keeps one byte for each element.

    Args:
        input: float16, bfloat16, float32 or float64, of any shape, strides and memory format.
        training: whether masks are drawn.
        keep_prob: pi, in [0, 1]: a tensor that broadcasts against the input, or a number.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A new tensor of the input's shape and dtype.

    Raises:
        ValueError: a probability outside [0, 1], or a tensor that does not broadcast against the input.
        TypeError: a probability that is neither a number nor a tensor.
        RuntimeError: an integer input.

    References:
        Ba and Frey, "Adaptive dropout for training deep neural networks", NeurIPS 2013, section 3.

    Example:
        >>> import torch, torchdrop
        >>> x, pi = torch.ones(3), torch.tensor([0.0, 0.5, 1.0])
        >>> torchdrop.functional.standout(x, training=False, keep_prob=pi)
        tensor([0.0000, 0.5000, 1.0000])
        >>> torchdrop.functional.standout(x, keep_prob=pi)[::2]
        tensor([0., 1.])
    """
    if isinstance(input, Proxy):
        return recorded(standout, locals())
    if keep_prob is None:
        raise TypeError("keep_prob must be a number or a tensor, got NoneType")
    checked, _ = read_rate(None, keep_prob.detach() if isinstance(keep_prob, Tensor) else keep_prob)
    check_input(input, "standout")
    if isinstance(keep_prob, Tensor):
        pi = keep_prob
    else:
        where = input.device if has_float64(input.device) else "cpu"
        pi = torch.full((), float(checked), dtype=torch.float64, device=where)
    return _apply_masks(input, pi, sites.is_on(training), generator)


def _apply_masks(input: Tensor, pi: Tensor, on: bool, generator: torch.Generator | None) -> Tensor:
    """Does what `standout` does, with a probability that has been checked, except for its shape."""
    sizes = (1,) * (input.dim() - pi.dim()) + tuple(pi.shape)
    if len(sizes) > input.dim() or any(n not in (1, full) for n, full in zip(sizes, input.shape, strict=True)):
        raise ValueError(
            f"keep_prob of shape {tuple(pi.shape)} does not broadcast against the input of {tuple(input.shape)}"
        )
    if not on:
        dtype = COMPUTE_DTYPE[input.dtype]
        return (input.to(dtype) * pi.to(dtype)).to(input.dtype)
    warn_stays_on()
    dropped = sites.random_bits(input, input.shape, generator) >= _thresholds(
        pi.detach(), input.device
    )  # not so where pi is NaN
    return torch.where(_laid_out(dropped, input), 0.0, input)


def _thresholds(pi: Tensor, device: torch.device) -> Tensor:
    """Returns the thresholds of mask parameters, at a fifth of the cost of parameters for each element."""
    k = pi.to(torch.float64 if has_float64(pi.device) else torch.float32)
    found = torch.clamp((k * ONE).round(), (k > 0).to(k.dtype), ONE - (k < 1).to(k.dtype))
    return found if has_float64(device) else found.nan_to_num(ONE).to(torch.int64)


def _laid_out(mask: Tensor, input: Tensor) -> Tensor:
    """Returns the mask in the memory format of images, if the input has it: torch.where follows its condition.

    Under torch.func this may be unknown: vmap has no memory formats.
    """
    memory_format = None if transforms_active() else _FORMATS.get(input.dim())
    if memory_format is None or not input.is_contiguous(memory_format=memory_format):
        return mask
    return mask.contiguous(memory_format=memory_format)


class Standout(nn.Module):
    """A layer with its activation, under masks whose probabilities follow its own response.

    ``a = layer(x)``, ``pi = sigmoid(alpha a + beta)``, ``y = activation(a) m`` with m ~ Bernoulli(pi) in training and
    ``y = activation(a) pi``, its expectation, in eval mode. `alpha` and `beta` are numbers that are set, not learned:
    the weights of pi are the layer's, which learn only through the activation, as masks have no gradient. With
    alpha = 0 this is dropout in its original formulation with keep_prob sigmoid(beta). Monte Carlo inference turns the
    masks on in eval mode; `disabled` switches to the form of eval mode. A response that is NaN is not dropped.

    Args:
        layer: an nn.Linear, a convolution or another module that returns one floating-point tensor, bias included.
        alpha: the scale of the shared weights. Default: 1.
        beta: the shift; positive values keep more. Default: 0.
        activation: f, element by element. Default: torch.relu.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Shape:
        The shapes of the layer. The state_dict has the layer's entries after ``layer.``, and those of an activation
        that is a module after ``activation.``; nothing of its own.

    Raises:
        TypeError: a layer that is no module, an activation that cannot be called, alpha or beta that is no number.
        ValueError: alpha or beta that is not finite.

    References:
        Ba and Frey, "Adaptive dropout for training deep neural networks", NeurIPS 2013, section 3.

    Example:
        >>> import torch, torchdrop
        >>> hidden = torchdrop.Standout(torch.nn.Linear(4, 100), beta=1.0)
        >>> x = torch.randn(8, 4)
        >>> hidden(x).shape
        torch.Size([8, 100])
        >>> a = hidden.layer(x)
        >>> torch.equal(hidden.eval()(x), a.relu() * torch.sigmoid(a + 1.0))
        True
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        layer: nn.Module,
        alpha: float = 1.0,
        beta: float = 0.0,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_generator(generator)
        check_module("layer", layer)
        if not callable(activation):
            raise TypeError(f"activation must be a function or a module, got {type(activation).__name__}")
        for name, value in (("alpha", alpha), ("beta", beta)):
            check_finite(name, value)
        self.layer = layer
        self.alpha: float = float(alpha)
        self.beta: float = float(beta)
        self.activation = activation
        self.generator = generator

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        a = self.layer(input)
        if not isinstance(a, Tensor):
            raise TypeError(f"layer must return one tensor, got {type(a).__name__} from {type(self.layer).__name__}")
        check_input(a, "Standout")
        on = sites.is_on(self.training)
        response = (a.detach() if on else a).to(COMPUTE_DTYPE[a.dtype])
        pi = torch.sigmoid(self.alpha * response + self.beta)  # before the activation, which may work in place
        return _apply_masks(self.activation(a), pi, on, self.generator)

    def extra_repr(self) -> str:
        name = "" if isinstance(self.activation, nn.Module) else f", activation={_name_of(self.activation)}"
        return f"alpha={self.alpha:g}, beta={self.beta:g}{name}"


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", repr(function))

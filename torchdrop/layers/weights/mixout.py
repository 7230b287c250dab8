"""Mixout, dropout of the changes by fine-tuning: `mixout`, `Mixout`, and `apply_mixout` for existing layers.

With k the keep probability, p = 1 - k, W0 the weights to which dropped ones go back, and M a mask whose elements are 1
with probability k, independently,

    W' = (M W + (1 - M) W0 - p W0) / k       in training, so E[W'] = W
    W' = W                                   in eval mode

(Lee et al., ICLR 2020): W0 where dropped, W0 + (W - W0) / k where kept. With W0 = 0 this is dropout of W. Each element
has a draw of its own here unless axes are shared; with axis 0 shared all weights of an input unit are replaced
together, as if a dropout layer came before the linear one, as in the authors' experiments.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...core import sites
from ...core.inputs import check_input
from ...core.mask_shape import Axes, mask_shape
from ...core.rate import DEFAULT_P, Probability, as_rate
from ...core.symbolic import holds_proxy, recorded
from ...kernels.mask_params import ONE, MaskParams
from ...kernels.masking import COMPUTE_DTYPE
from ...ops import operators
from .parametrize import Layers, Names, OfWeight, register, remove

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def _check_target(input: Tensor, target: Any) -> None:
    check_input(input, "mixout")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    for what, own, other in (
        ("shape", tuple(input.shape), tuple(target.shape)),
        ("dtype", input.dtype, target.dtype),
        ("device", input.device, target.device),
    ):
        if own != other:
            raise ValueError(f"target must have the input's {what}, {own}, got {other}")


def mixout(
    input: Tensor,
    target: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    shared_axes: Axes = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replaces each element by the target's with probability p, and shifts and scales so that the expectation stays.

    ``y = (m x + (1 - m) u - p u) / k`` with m ~ Bernoulli(k), k = keep_prob = 1 - p, u the target: u where dropped,
    u + (x - u) / k where kept. E[y] = x exactly, Var[y] = (x - u)**2 p / k, and x = u is a fixed point, bit for bit.
    With k = 1 and in eval mode the input itself is returned; with k = 0 the result is the target. The mask is not
    stored. The target gets a gradient too, if it requires one.

    Args:
        input: the tensor that is trained: float16, bfloat16, float32 or float64, of any shape.
        target: the values of dropped elements, of the same shape, dtype and device.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        training: whether mixout is applied.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        shared_axes: the axes over which the mask is the same: 0 replaces all weights of an input unit together.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the input's shape and dtype; the input itself in eval mode and with k = 1.

    Raises:
        ValueError: a target of another shape, dtype or device; a rate outside [0, 1]; axes or shapes that do not fit.
        TypeError: a target that is no tensor; both names of the rate, neither, or something that is no number.
        RuntimeError: an integer tensor.

    References:
        Lee, Cho and Kang, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models",
        ICLR 2020 (arXiv:1909.11299).

    Example:
        >>> import torch
        >>> x, u = torch.full((1000,), 3.0), torch.ones(1000)
        >>> mixout(x, u, 0.5).unique()
        tensor([1., 5.])
    """
    if holds_proxy(input, target):
        return recorded(mixout, locals())
    rate = as_rate(p, keep_prob)
    if not (training or sites.is_on(training)):
        return input
    _check_target(input, target)
    shape = mask_shape(input, shared_axes, None)
    params, wide = rate.params_for(shape), COMPUTE_DTYPE[input.dtype]
    base = target.to(wide)
    out = (base + sites.apply(operators.masked, input.to(wide) - base, params, shape, False, generator)).to(input.dtype)
    # The sum rounds, so the input itself is returned, bit for bit, if nothing is dropped.
    if isinstance(params, MaskParams):
        return input if params.threshold == ONE else out
    return torch.where((params[..., 0] >= ONE).to(input.device), input, out)


class Mixout(OfWeight):
    """The parametrization that `apply_mixout` registers: W' = (M W + (1 - M) W0 - p W0) / k in training, else W.

    W0 is a persistent buffer, `target`: training that is resumed needs the weights that it started from.

    Args:
        target: W0, which is copied.
        p: probability of dropping an element, in [0, 1]. Default: 0.5.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        shared_axes: the axes over which the mask is the same.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: a target that is no tensor; both names of the rate, neither, or something that is no number.

    Example:
        >>> import torch
        >>> mix, w = Mixout(torch.ones(30, 30), keep_prob=0.5), torch.full((30, 30), 3.0)
        >>> mix(w).unique(), mix.eval()(w) is w, list(mix.state_dict())
        (tensor([1., 5.]), True, ['target'])
    """

    target: Tensor

    undone_by = "torchdrop.remove_mixout"

    def __init__(
        self,
        target: Tensor,
        p: Probability = DEFAULT_P,
        *,
        keep_prob: Probability | None = None,
        shared_axes: Axes = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, keep_prob=keep_prob, shared_axes=shared_axes, generator=generator)
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a tensor, got {type(target).__name__}")
        self.register_buffer("target", target.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        return mixout(
            weight, self.target, self.rate, self.training, shared_axes=self.shared_axes, generator=self.generator
        )


def apply_mixout(
    module: ModuleT,
    names: Names = "weight",
    p: Probability = DEFAULT_P,
    *,
    keep_prob: Probability | None = None,
    shared_axes: Axes = None,
    generator: torch.Generator | None = None,
    layers: Layers = nn.Module,
) -> ModuleT:
    """Puts parameters of a layer, or of a whole model, under mixout with the values that they have now.

    From here on the layer computes with ``W' = (M W + (1 - M) W0 - p W0) / k`` in training, W0 being the weight at this
    moment, a new mask for each time that it reads it, and with W itself in eval mode; E[W'] = W. For fine-tuning, load
    the pretrained model first, then apply mixout to the layers that are to stay near it, but not to a new head.

    In the state dict W is ``parametrizations.weight.original`` in place of ``weight``, and W0
    ``parametrizations.weight.0.target``, so the weight's value is stored twice. A checkpoint without W0 is refused, as
    the present W0 would stay: load it before applying mixout. Everything else is as with `apply_weight_dropout`.

    Args:
        module: a layer or a model.
        names: a glob, or several, of the names that ``module.named_parameters()`` has, for example
            "weight", "encoder.*.weight"; ``*`` matches dots too.
        p: probability of dropping an element, in [0, 1]. Default: 0.5; Lee et al. fine-tune with 0.7 to 0.9.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the masks.
        shared_axes: the axes over which a mask is the same: 0 replaces all weights of an input unit together.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.
        layers: a class, or several, of the layers whose parameters are meant, such as ``nn.Linear``.

    Returns:
        The module itself.

    Raises:
        TypeError: an argument of another type.
        ValueError: a name that no parameter has; one that is under weight dropout or mixout already, is lazy or holds
            integers; a rate outside [0, 1]; axes or shapes that do not fit. Nothing is changed then.

    References:
        Lee, Cho and Kang, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models",
        ICLR 2020 (arXiv:1909.11299).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> x = torch.randn(3, 8)
        >>> pretrained = model(x)
        >>> _ = apply_mixout(model, "*.weight", 0.7, layers=torch.nn.Linear)
        >>> torch.equal(model(x), pretrained)  # nothing has been trained yet
        True
        >>> list(model.state_dict())[:3]
        ['0.bias', '0.parametrizations.weight.original', '0.parametrizations.weight.0.target']
    """

    register(
        module,
        names,
        layers,
        lambda weight: Mixout(weight, p, keep_prob=keep_prob, shared_axes=shared_axes, generator=generator),
    )
    return module


def remove_mixout(module: ModuleT, names: Names = "*") -> ModuleT:
    """Undoes `apply_mixout`. The layers have their parameters again, the same objects, as they have been trained.

    Other parametrizations of the same parameters stay.

    Args:
        module: the layer or model.
        names: names of parameters, as in `apply_mixout`: all that are under mixout by default.

    Returns:
        The module itself.

    Raises:
        TypeError: an argument of another type.
        ValueError: a name that no parameter under mixout has. Nothing is changed then.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 3)
        >>> weight = layer.weight
        >>> remove_mixout(apply_mixout(layer, p=0.9)).weight is weight
        True
    """
    remove(module, names, Mixout)
    return module

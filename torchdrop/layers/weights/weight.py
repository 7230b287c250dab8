"""Dropout of weights, DropConnect: `weight_dropout`, `WeightDropout`, and `apply_weight_dropout` for existing layers.

With k the keep probability and M a mask of the weight's shape whose elements are 1 with probability k, independently,

    W' = W M / k       in training, so E[W'] = W and Var[W'] = W^2 (1 - k) / k
    W' = W             in eval mode

(Wan et al., ICML 2013). On the recurrent matrices of an LSTM, with one mask for all time steps, it is the weight
dropout of Merity et al., ICLR 2018. W is trained: its gradient is that of W' times M / k.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ...core import sites
from ...core.inputs import check_input
from ...core.mask_shape import Axes, mask_shape
from ...core.rate import DEFAULT_P, Probability, as_rate
from ...core.symbolic import recorded
from ...ops import operators
from .parametrize import Layers, Names, OfWeight, register, remove

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def weight_dropout(
    weight: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    *,
    keep_prob: Probability | None = None,
    shared_axes: Axes = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keeps each element of a weight with probability k and divides it by k, for one forward.

    ``W' = W M / k`` with M ~ Bernoulli(k), k = keep_prob = 1 - p. E[W'] = W exactly, so the expectation of a linear
    layer's output is its output with W. With k = 1 and in eval mode the weight itself is returned; with k = 0 the
    result is 0. The mask is not stored, and the weight is not written to.

    Args:
        weight: float16, bfloat16, float32 or float64, of any shape.
        p: probability of dropping, in [0, 1]. Default: 0.5.
        training: whether dropout is applied.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        shared_axes: the axes over which the mask is the same: 0 drops whole input units of a linear layer.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the weight's shape and dtype; the weight itself in eval mode and with k = 1.

    Raises:
        ValueError: a rate outside [0, 1], or axes or shapes that do not fit.
        TypeError: both names of the rate, neither, or something that is no number.
        RuntimeError: an integer tensor.

    References:
        Wan et al., "Regularization of Neural Networks using DropConnect", ICML 2013; Merity et al., ICLR 2018
        (arXiv:1708.02182), section 2.

    Example:
        >>> import torch
        >>> layer, x = torch.nn.Linear(100, 10), torch.randn(5, 100)
        >>> y = torch.nn.functional.linear(x, weight_dropout(layer.weight, 0.5), layer.bias)
        >>> y.sum().backward()
        >>> 0.3 < (layer.weight.grad == 0).float().mean() < 0.7
        tensor(True)
    """
    if isinstance(weight, Proxy):
        return recorded(weight_dropout, locals())
    rate = as_rate(p, keep_prob)
    if not (training or sites.is_on(training)):
        return weight
    check_input(weight, "weight_dropout")
    shape = mask_shape(weight, shared_axes, None)
    return sites.apply(operators.masked, weight, rate.params_for(shape), shape, False, generator)


class WeightDropout(OfWeight):
    """The parametrization that `apply_weight_dropout` registers: W' = W M / k in training, W itself in eval mode.

    Each evaluation draws a mask, so there is one for each time that a layer reads its weight, and within
    ``torch.nn.utils.parametrize.cached()`` one for all of them. Assigning to a parametrized weight sets W.

    Args:
        p: probability of dropping an element, in [0, 1]. Default: 0.5.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the mask.
        shared_axes: the axes over which the mask is the same.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: both names of the rate, neither, or something that is no number.

    Example:
        >>> import torch
        >>> drop, w = WeightDropout(keep_prob=0.8), torch.ones(30, 30)
        >>> drop(w).unique(), drop.eval()(w) is w
        (tensor([0.0000, 1.2500]), True)
    """

    undone_by = "torchdrop.remove_weight_dropout"

    def forward(self, weight: Tensor) -> Tensor:
        return weight_dropout(weight, self.rate, self.training, shared_axes=self.shared_axes, generator=self.generator)


def apply_weight_dropout(
    module: ModuleT,
    names: Names = "weight",
    p: Probability = DEFAULT_P,
    *,
    keep_prob: Probability | None = None,
    shared_axes: Axes = None,
    generator: torch.Generator | None = None,
    layers: Layers = nn.Module,
) -> ModuleT:
    """Puts parameters of a layer, or of a whole model, under weight dropout.

    From here on the layer computes with ``W' = W M / k`` in training, a new mask for each time that it reads the
    weight, and with W itself in eval mode; E[W'] = W. nn.LSTM, nn.GRU and nn.RNN read their weights once a forward: a
    recurrent matrix keeps its mask over all time steps. nn.LSTMCell, nn.GRUCell and nn.RNNCell read theirs at every
    step: within ``torch.nn.utils.parametrize.cached()`` they keep one mask. Only the optimizer changes W, and it is the
    same Parameter as before, so an optimizer that has it goes on. In ``parameters()`` it comes after those of its layer
    that are not dropped: an optimizer made from now on numbers it so in its state dict.

    In the state dict W is ``parametrizations.weight.original`` in place of ``weight``, and there is nothing else. A
    checkpoint with the plain name can be loaded, too; `remove_weight_dropout` before saving makes one.
    ``layer.parametrizations.weight.original`` is W itself at any time, whereas ``layer.weight`` draws a mask in
    training: writing to that in place, as ``layer.reset_parameters()`` does, has no effect. For `set_keep_prob` and
    schedules the rate is that of the module ``parametrizations.weight.0`` in the layer; "rnn.parametrizations" matches
    all of a layer rnn, whereas "rnn" matches nn.LSTM's own rate as well.

    Modules with parametrizations can be copied but, by PyTorch's rule, not pickled: save their state dict.
    torch.compile takes them, except that it leaves nn.LSTM, nn.GRU and nn.RNN to eager code. On CUDA the weights of a
    forward with dropped ones are copied into one chunk for cuDNN.

    Args:
        module: a layer or a model.
        names: a glob, or several, of the names that ``module.named_parameters()`` has, for example
            "weight", "weight_hh_*" for an LSTM, "rnn.weight_hh_*" or "*.weight" for a model; ``*`` matches dots too.
        p: probability of dropping an element, in [0, 1]. Default: 0.5.
        keep_prob: probability of keeping, in place of `p`: a number, or a tensor that broadcasts against the masks.
        shared_axes: the axes over which a mask is the same: 0 drops whole input units of a linear layer.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.
        layers: a class, or several, of the layers whose parameters are meant, such as ``nn.Linear``.

    Returns:
        The module itself.

    Raises:
        TypeError: an argument of another type.
        ValueError: a name that no parameter has; one that is under weight dropout or mixout already, is lazy or holds
            integers; a rate outside [0, 1]; axes or shapes that do not fit. Nothing is changed then.

    References:
        Wan et al., "Regularization of Neural Networks using DropConnect", ICML 2013; Merity et al., ICLR 2018
        (arXiv:1708.02182), section 2.

    Example:
        >>> import torch
        >>> rnn = apply_weight_dropout(torch.nn.LSTM(8, 16, num_layers=2), "weight_hh_*", 0.5)
        >>> x = torch.randn(5, 3, 8)
        >>> torch.equal(rnn(x)[0], rnn(x)[0]), torch.equal(rnn.eval()(x)[0], rnn(x)[0])
        (False, True)
        >>> _ = remove_weight_dropout(rnn)
        >>> sorted(rnn.state_dict()) == sorted(torch.nn.LSTM(8, 16, num_layers=2).state_dict())
        True
    """

    register(
        module,
        names,
        layers,
        lambda _: WeightDropout(p, keep_prob=keep_prob, shared_axes=shared_axes, generator=generator),
    )
    return module


def remove_weight_dropout(module: ModuleT, names: Names = "*") -> ModuleT:
    """Undoes `apply_weight_dropout`. The layers have their parameters again, the same objects, as they have been
    trained, in their former order.

    Other parametrizations of the same parameters stay. (torch.nn.utils.parametrize.remove_parametrizations would, in
    train mode, leave the weight with one mask applied for good.)

    Args:
        module: the layer or model.
        names: names of parameters, as in `apply_weight_dropout`: all that are under weight dropout by default.

    Returns:
        The module itself.

    Raises:
        TypeError: an argument of another type.
        ValueError: a name that no parameter under weight dropout has. Nothing is changed then.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 3)
        >>> weight = layer.weight
        >>> _ = remove_weight_dropout(apply_weight_dropout(layer, p=0.3))
        >>> layer.weight is weight, type(layer) is torch.nn.Linear
        (True, True)
    """
    remove(module, names, WeightDropout)
    return module

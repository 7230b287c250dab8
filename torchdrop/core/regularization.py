"""The terms that layers with learned noise add to the loss, collected over a model: `regularization`.

A layer takes part by a method ``regularizer() -> Tensor`` of its class, which returns a scalar.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .checks import check_module


def regularization(model: nn.Module) -> Tensor:
    """Returns the sum of the regularizers of a model's layers, a scalar to add to the loss.

    ``sum over layers of layer.regularizer()``: every module, the model itself included, whose class has a method of
    that name. A layer that is reached under several names counts once. The class of a layer says how its term is
    scaled: that of `ConcreteLayer` belongs to a loss that is a mean over the data, a divergence in nats to one that is
    a sum. If a model has both, collect them from its parts and weigh them. The training flag does not matter.

    Args:
        model: any module, also a compiled or wrapped one.

    Returns:
        A tensor of shape (), differentiable, on the device of the first layer's term. It is computed anew in each call.

    Raises:
        TypeError: `model` is no module, or a layer's regularizer returns something other than a scalar tensor.
        ValueError: no layer has a regularizer.

    References:
        Gal, Hron and Kendall, "Concrete Dropout", NeurIPS 2017 (arXiv:1705.07832), equations 1 to 4.

    Example:
        >>> import torch, torchdrop
        >>> from torch import nn
        >>> class Decay(nn.Linear):
        ...     def regularizer(self):
        ...         return 0.5 * self.weight.square().sum()
        >>> layer = Decay(3, 1)
        >>> _ = nn.init.constant_(layer.weight, 2.0)
        >>> torchdrop.regularization(nn.Sequential(layer, nn.ReLU(), layer)).item()
        6.0
    """
    check_module("model", model)
    total: Tensor | None = None
    for term in _terms(model):
        total = term if total is None else total + term.to(total.device)
    if total is None:
        raise ValueError(
            f"no layer of the {type(model).__name__} has a regularizer: use layers that have one, such as "
            "ConcreteLayer, or give a module of yours a method regularizer() that returns a scalar tensor"
        )
    return total


def _terms(model: nn.Module) -> Iterator[Tensor]:
    for name, module in model.named_modules():
        if not callable(getattr(type(module), "regularizer", None)):
            continue
        term = module.regularizer()
        if not isinstance(term, Tensor) or term.dim() != 0:
            got = f"shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise TypeError(
                f"regularizer() must return a tensor of shape (), got {got} from {type(module).__name__} {name!r}"
            )
        yield term


__all__ = ["regularization"]

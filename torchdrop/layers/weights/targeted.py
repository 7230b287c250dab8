"""Targeted dropout of weights: `targeted_dropout`, `TargetedDropout`, and `apply_targeted_dropout` for existing layers.

It makes a network robust to pruning: of each output unit's n weights the floor(gamma n) smallest are the targets, and
each of them is dropped with rate p; the others are never changed (Gomez et al., 2019).

    W' = W m,   m_i ~ Bernoulli(1 - p) where |W_i| is among the floor(gamma n) smallest, 1 elsewhere

Kept weights are not rescaled, as in the paper: the targets shrink, and finally they can be pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils import parametrize

from ...core import sites
from ...core.checks import check_bool, check_integer, check_probability
from ...core.inputs import check_input
from ...core.rate import DEFAULT_P, Probability, as_rate
from ...core.symbolic import recorded
from ...core.torch_state import is_compiling
from ...kernels.mask_params import original
from .parametrize import Layers, Names, OfWeight, register, remove
from .targets import Choice

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def _without(weight: Tensor, dropped: Tensor) -> Tensor:
    if not weight.is_contiguous():
        dropped = torch.zeros_like(weight, dtype=torch.bool) | dropped  # where() takes over the strides that come first
    return torch.where(dropped, 0.0, weight)


def _check_fraction(fraction: Any) -> Any:
    """Returns the fraction as a float, or the tensor of a layer in compiled code, which has checked its own."""
    if isinstance(fraction, Tensor) and is_compiling():
        return fraction
    return check_probability("target_fraction", fraction)


def _check_leaves_some(fraction: float, keep_prob: Probability, pruned: bool) -> None:
    """Refuses a fraction and a rate that would leave no weight."""
    if fraction == 1.0 and not isinstance(keep_prob, Tensor) and keep_prob == 0.0:
        raise ValueError(
            "target_fraction 1 and p 1 would drop every weight: target_fraction must be below 1 where p is 1"
        )
    if fraction == 1.0 and pruned:
        raise ValueError("target_fraction 1 would prune every weight: target_fraction must be below 1 where pruned")


def _check_form(units: Any, dim: Any, pruned: Any) -> None:
    check_bool("units", units)
    check_bool("pruned", pruned)
    check_integer("dim", dim)


def _check_shape(shape: Sequence[int], dim: int) -> None:
    dims = len(shape)
    if dims < 2:
        raise ValueError(
            f"weight must have an axis of output units and at least one more, got the shape {tuple(shape)}"
        )
    if not -dims <= dim < dims:
        raise ValueError(f"dim must be in [{-dims}, {dims}) for a weight of shape {tuple(shape)}, got {dim}")


def _check_weight(weight: Any) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    check_input(weight, "targeted_dropout")


def targeted_dropout(
    weight: Tensor,
    p: Probability = DEFAULT_P,
    training: bool = True,
    target_fraction: float = 0.5,
    *,
    keep_prob: Probability | None = None,
    units: bool = False,
    dim: int = 0,
    pruned: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops, with rate p, weights among the smallest of each output unit, and never any of the others.

    ``W' = W m`` with m ~ Bernoulli(1 - p) for the floor(gamma n) weights of the smallest magnitude among the n weights
    of a unit, and m = 1 for the others. If magnitudes are equal, those that come first count as smaller. Nothing is
    rescaled: E[W'] = (1 - p) W for targets, W for the others. A dropped weight gets no gradient. With p = 0, in eval
    mode and without targets, W' = W; with p = 1 all targets are 0.

    Args:
        weight: float16, bfloat16, float32 or float64, of two dimensions or more.
        p: the rate alpha with which a target is dropped. Default: 0.5.
        training: whether targets are dropped at random.
        target_fraction: gamma, in [0, 1]. Default: 0.5.
        keep_prob: 1 - p, in place of `p`: a number, or a tensor that broadcasts against the mask, which has the
            weight's shape, or ones on all axes but `dim` for units.
        units: True to choose among whole units, by the Euclidean norm of their weights, and drop all of a unit.
        dim: the weight's axis of output units: 0 for linear layers and convolutions, 1 for transposed ones.
        pruned: True for the eval mode of a network that is to be pruned: all targets are 0.
        generator: the source of the mask's key; PyTorch's default generator of the device if None.

    Returns:
        A tensor of the weight's shape and dtype; the weight itself in eval mode, unless `pruned`.

    Raises:
        ValueError: a rate or fraction outside [0, 1]; together they would drop everything; a weight without units.
        TypeError, RuntimeError: as `dropout`.

    References:
        Gomez et al., "Learning Sparse Networks Using Targeted Dropout", 2019 (arXiv:1905.13678).

    Example:
        >>> import torch, torchdrop
        >>> weight = torch.tensor([[0.1, -3.0, 0.2, 4.0], [5.0, -0.6, 7.0, 0.8]])
        >>> torchdrop.functional.targeted_dropout(weight, p=1.0, target_fraction=0.5)
        tensor([[ 0., -3.,  0.,  4.],
                [ 5.,  0.,  7.,  0.]])
        >>> torchdrop.functional.targeted_dropout(weight, p=1.0, target_fraction=0.5, units=True)
        tensor([[ 0.0000,  0.0000,  0.0000,  0.0000],
                [ 5.0000, -0.6000,  7.0000,  0.8000]])
    """
    if isinstance(weight, Proxy):
        return recorded(targeted_dropout, locals())
    fraction = _check_fraction(target_fraction)
    _check_form(units, dim, pruned)
    rate = as_rate(p, keep_prob, original, lambda k: _check_leaves_some(fraction, k, pruned))
    on = sites.is_on(training)
    if not on and not (pruned and not training):
        return weight
    _check_weight(weight)
    _check_shape(weight.shape, dim)
    choice = Choice(fraction, units, dim)
    if not on:
        return _without(weight, choice.targets(weight))
    shape = choice.mask_shape(weight.shape)
    kept = sites.keep_mask(weight, rate.params_for(shape), shape, generator)
    return weight if kept is None else _without(weight, choice.targets(weight) & ~kept)


class TargetedDropout(OfWeight):
    """Module of `targeted_dropout`: the parametrization that `apply_targeted_dropout` registers.

    ``p`` is the rate among the targets. It can be set and scheduled, and `target_fraction` set, as training goes on:
    the paper raises them from 0. Neither recompiles a compiled model.

    Args:
        p: the rate with which a target is dropped. Default: 0.5.
        target_fraction: gamma, in [0, 1]. Default: 0.5.
        keep_prob: 1 - p, in place of `p`.
        units: True to choose among whole units.
        dim: the weight's axis of output units.
        pruned: True to have all targets 0 in eval mode; it can be set at any time.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.

    Raises:
        ValueError: a rate or fraction outside [0, 1], or both 1, which would drop every weight.
        TypeError: both names of the rate, or something that is no number.

    References:
        Gomez et al., "Learning Sparse Networks Using Targeted Dropout", 2019 (arXiv:1905.13678).

    Example:
        >>> import torch, torchdrop
        >>> targeted = torchdrop.TargetedDropout(0.5, target_fraction=0.75)
        >>> (targeted(torch.randn(100, 100)) != 0).sum(1).min() >= 25
        tensor(True)
        >>> weight = torch.randn(3, 4)
        >>> targeted.eval()(weight) is weight
        True
    """

    _formula = staticmethod(original)

    undone_by = "torchdrop.remove_targeted_dropout"

    def __init__(
        self,
        p: Probability = DEFAULT_P,
        target_fraction: float = 0.5,
        *,
        keep_prob: Probability | None = None,
        units: bool = False,
        dim: int = 0,
        pruned: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self._set_fraction(_check_fraction(target_fraction))
        _check_form(units, dim, pruned)
        self._pruned = pruned
        super().__init__(p, keep_prob=keep_prob, generator=generator)
        self.units = units
        self.dim = dim

    def _set_fraction(self, fraction: float) -> None:
        self._fraction = fraction
        with torch.inference_mode(False):
            self._fraction_tensor = torch.tensor([fraction], dtype=torch.float64, device="cpu")

    def _check_rate(self, keep_prob: Probability) -> None:
        _check_leaves_some(self._fraction, keep_prob, self._pruned)

    @property
    def target_fraction(self) -> float:
        """The fraction gamma of weights, or of units, that are targets."""
        return self._fraction

    @target_fraction.setter
    def target_fraction(self, value: float) -> None:
        fraction = _check_fraction(value)
        _check_leaves_some(fraction, self.keep_prob, self._pruned)
        self._set_fraction(fraction)

    @property
    def pruned(self) -> bool:
        """Whether all targets are 0 in eval mode."""
        return self._pruned

    @pruned.setter
    def pruned(self, value: bool) -> None:
        _check_form(self.units, self.dim, value)
        _check_leaves_some(self._fraction, self.keep_prob, value)
        self._pruned = value

    def _given_fraction(self) -> Any:
        return self._fraction_tensor if is_compiling() else self._fraction

    def _choice(self) -> Choice:
        return Choice(self._given_fraction(), self.units, self.dim)

    def without_targets(self, weight: Tensor) -> Tensor:
        """Returns the weight with all targets 0."""
        _check_weight(weight)
        _check_shape(weight.shape, self.dim)
        return _without(weight, self._choice().targets(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return targeted_dropout(
            weight, self.rate, self.training, target_fraction=self._given_fraction(), units=self.units, dim=self.dim,
            pruned=self._pruned, generator=self.generator,
        )  # fmt: skip

    def check_weight(self, weight: Tensor) -> None:
        _check_shape(weight.shape, self.dim)
        self.rate.params_for(self._choice().mask_shape(weight.shape))

    def extra_repr(self) -> str:
        flags = f", units={self.units}, dim={self.dim}, pruned={self._pruned}"
        return f"p={self.p}, target_fraction={self._fraction}{flags}"


def apply_targeted_dropout(
    module: ModuleT,
    names: Names = "weight",
    p: Probability = DEFAULT_P,
    target_fraction: float = 0.5,
    *,
    keep_prob: Probability | None = None,
    units: bool = False,
    dim: int = 0,
    pruned: bool = False,
    generator: torch.Generator | None = None,
    layers: Layers = nn.Module,
) -> ModuleT:
    """Puts weights of a layer, or of a whole model, under targeted dropout.

    From here on the layer computes in training with W' of `targeted_dropout`, a new mask and a new choice of targets
    for each time that it reads the weight; in eval mode with W itself, or, if `pruned`, without the targets. W stays
    the same Parameter; in the state dict it is ``parametrizations.weight.original``. The module
    ``parametrizations.weight.0`` has the rate and the fraction. After training, `prune_targeted_dropout` leaves the
    pruned layer, and `remove_targeted_dropout` leaves the whole one.

    Args:
        module: a layer or a model.
        names: a glob, or several, of the names that ``module.named_parameters()`` has: "weight", or
            "*.weight" for a model.
        p: the rate with which a target is dropped. Default: 0.5.
        target_fraction: gamma, in [0, 1]. Default: 0.5.
        keep_prob: 1 - p, in place of `p`.
        units: True to choose among whole units.
        dim: the weights' axis of output units: 0 for linear layers and convolutions, 1 for transposed ones.
        pruned: True to have all targets 0 in eval mode.
        generator: the source of the masks' keys; PyTorch's default generator of the device if None.
        layers: a class, or several, of the layers whose parameters are meant, such as ``nn.Linear``.

    Returns:
        The module itself.

    Raises:
        TypeError: an argument of another type.
        ValueError: a name that no parameter has; a parameter that is under a dropout of this package already, or has
            fewer than two dimensions; an argument that `TargetedDropout` refuses. Nothing is changed then.

    References:
        Gomez et al., "Learning Sparse Networks Using Targeted Dropout", 2019 (arXiv:1905.13678).

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.apply_targeted_dropout(torch.nn.Linear(20, 5), p=0.6, target_fraction=0.75)
        >>> torchdrop.sparsity(layer).share
        0.0
        >>> torchdrop.sparsity(torchdrop.prune_targeted_dropout(layer)).share, type(layer) is torch.nn.Linear
        (0.75, True)
    """

    def make(_: Tensor) -> TargetedDropout:
        return TargetedDropout(
            p,
            target_fraction,
            units=units,
            dim=dim,
            pruned=pruned,
            keep_prob=keep_prob,
            generator=generator,
        )

    register(module, names, layers, make)
    return module


def remove_targeted_dropout(module: ModuleT, names: Names = "*") -> ModuleT:
    """Undoes `apply_targeted_dropout`. The layers have their parameters again, whole, as they have been trained.

    Args:
        module: the layer or model.
        names: names of parameters: all that are under targeted dropout by default.

    Returns:
        The module itself.

    Raises:
        TypeError: an argument of another type.
        ValueError: a name that no parameter under targeted dropout has. Nothing is changed then.

    Example:
        >>> import torch, torchdrop
        >>> layer = torch.nn.Linear(4, 3)
        >>> weight = layer.weight
        >>> torchdrop.remove_targeted_dropout(torchdrop.apply_targeted_dropout(layer)).weight is weight
        True
    """
    remove(module, names, TargetedDropout)
    return module


def prune_targeted_dropout(module: ModuleT) -> ModuleT:
    """Makes the pruning permanent: sets the targets of all weights under targeted dropout to 0 and ends it.

    The layers then compute the same as in eval mode with ``pruned=True``. The parameters are the same objects; an
    optimizer that goes on with them makes zeros grow again.

    Args:
        module: the layer or model.

    Returns:
        The module itself.

    Raises:
        TypeError: `module` is no module.
        ValueError: nothing in it is under targeted dropout; a target_fraction is 1, which would leave no weight; or a
            weight has other parametrizations besides. Nothing is changed then.

    Example:
        >>> import torch, torchdrop
        >>> layer = torchdrop.apply_targeted_dropout(torch.nn.Linear(8, 3), target_fraction=0.25)
        >>> (torchdrop.prune_targeted_dropout(layer).weight == 0).sum(1)
        tensor([2, 2, 2])
    """
    stacks = [
        (name.replace("parametrizations.", ""), stack, one)
        for name, stack in (module.named_modules() if isinstance(module, nn.Module) else ())
        if isinstance(stack, parametrize.ParametrizationList)
        for one in stack
        if isinstance(one, TargetedDropout)
    ]
    for path, stack, targeted in stacks:
        if len(stack) > 1:
            raise ValueError(f"{path} has other parametrizations: remove them first")
        try:
            _check_leaves_some(targeted.target_fraction, targeted.keep_prob, pruned=True)
        except ValueError as error:
            raise ValueError(f"{error}, for {path!r}") from None
    with torch.no_grad():
        for _, stack, targeted in stacks:
            stack.original.copy_(targeted.without_targets(stack.original))
    remove(module, "*", TargetedDropout)
    return module

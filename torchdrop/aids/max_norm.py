"""The constraint on the norms of incoming weights that the dropout papers train with: `max_norm` and `max_norm_`.

    w_u <- w_u min(1, c / |w_u|)   for each unit u, with w_u its incoming weights

is the projection onto the ball of radius c (Srivastava et al., JMLR 2014, section 5.1). It allows training with dropout
at a large learning rate, without weights that grow without bound. Norms are computed without overflow or underflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..core.checks import check_module, check_number

NORMALISATIONS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
"""Their weights are gains of single elements, whatever their shape."""

SLACK = 4
"""A norm counts as within the bound up to so many units of roundoff, so that rescaled weights stay as they are."""

BLOCK = 256

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def max_norm(module: ModuleT, c: float, dim: int | None = None, *, name: str = "weight") -> ModuleT:
    """Constrains the norm of each unit's incoming weights to c, as a parametrization of a layer or a whole model.

    ``w_u = v_u min(1, c / |v_u|)``, where v is trained. Units whose norm is at most c have their weights bit for bit,
    and gradients as without the constraint; the gradient of the others is that of their direction only. The state dict
    has v, as ``parametrizations.weight.original`` in place of ``weight``, whose norm may exceed c.
    ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")`` undoes it and leaves w.

    Args:
        module: a layer, or a model: then it applies to the weight of each linear layer, convolution, embedding and so
            on in it, that is to each parameter of that name with two dimensions or more. The weights of normalization
            layers and parameters of one dimension, such as biases, are left alone; so are others' names, such as
            ``in_proj_weight`` of nn.MultiheadAttention. Tied weights stay tied.
        c: the largest norm, in the units of the weights; 2 to 4 are usual.
        dim: the dimension of the weight that counts units, as in torch.renorm. If None, the one that counts output
            channels, for each group, in transposed convolutions, and 0 in everything else. For an embedding these are
            the rows, as with ``nn.Embedding(max_norm=)``.
        name: the name of the parameter.

    Returns:
        The module itself.

    Raises:
        TypeError: an argument of another type.
        ValueError: `c` is not positive and finite, a weight lacks `dim`, or the module has no such parameter, one that
            is lazy, or one that is under a maximum norm already. Nothing is changed then.

    References:
        Srebro, Shraibman, "Rank, trace-norm and max-norm", COLT 2005; Srivastava et al., JMLR 15, 2014, section 5.1.

    Example:
        >>> import torch
        >>> layer = max_norm(torch.nn.Linear(100, 3), 0.25)
        >>> layer.weight.norm(dim=1)
        tensor([0.2500, 0.2500, 0.2500], grad_fn=<LinalgVectorNormBackward0>)
        >>> list(layer.state_dict())
        ['bias', 'parametrizations.weight.original']
    """
    c = _checked(c, dim, name)
    found = list(_weights(module, dim, name))
    for one in found:
        if _is_constrained(one.module, name):
            raise ValueError(
                f"{one.path} is under a maximum norm already: undo that first, with "
                f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
            )
    for one in found:
        parametrize.register_parametrization(one.module, name, MaxNorm(c, one.units))
    return module


@torch.no_grad()
def max_norm_(module: nn.Module, c: float, dim: int | None = None, *, name: str = "weight") -> int:
    """Rescales, in place, the incoming weights of each unit whose norm exceeds c. Call it after ``optimizer.step()``.

    ``w_u <- w_u min(1, c / |w_u|)``. Weights within the bound, and those with NaN or infinity, stay bit for bit. It
    reads the weights once, and writes those of layers with a unit that is over.

    Args:
        module, c, dim, name: as in `max_norm`.

    Returns:
        The number of units that were rescaled.

    Raises:
        TypeError: an argument of another type.
        ValueError: as `max_norm`; or a weight that is parametrized, so that writing to it would be lost. Nothing is
            changed then.

    References:
        Srivastava et al., JMLR 15, 2014, section 5.1.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = torch.nn.init.constant_(layer.weight[0].data, 3.0), torch.nn.init.zeros_(layer.weight[1].data)
        >>> max_norm_(layer, 2.0)
        1
        >>> layer.weight.tolist()
        [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
        >>> max_norm_(layer, 2.0)
        0
    """
    c = _checked(c, dim, name)
    found = list(_weights(module, dim, name))
    for one in found:
        if parametrize.is_parametrized(one.module, name):
            raise ValueError(f"{one.path} is parametrized, so it cannot be rescaled in place: use max_norm for it")
    return sum(_rescale(one.weight, c, one.units) for one in found)


class Units(NamedTuple):
    """The units of a weight: they are counted along `dim`, in each of the groups along dimension 0."""

    dim: int
    groups: int

    def split(self, weight: Tensor) -> Tensor:
        """Returns a view in which dimension 0 counts the groups."""
        return weight.unflatten(0, (self.groups, -1))

    def rows(self, split: Tensor) -> Tensor:
        """Returns each unit's incoming weights: (units, weights). It is a view if possible."""
        return split.movedim(self.dim + 1, 1).flatten(0, 1).flatten(1)

    def spread(self, values: Tensor, split: Tensor) -> Tensor:
        """Returns a value for each unit, in the shape that multiplies `split`."""
        ones = (1,) * (split.dim() - 2)
        return values.reshape(self.groups, -1, *ones).movedim(1, self.dim + 1)


class MaxNorm(nn.Module):
    """The parametrization that `max_norm` registers.

    Args:
        c: the largest norm.
        units: the units of the weight.
    """

    def __init__(self, c: float, units: Units) -> None:
        super().__init__()
        self.c = c
        self.units = units

    def forward(self, weight: Tensor) -> Tensor:
        if not weight.numel():
            return weight
        return _projected(weight, self.c, self.units)[0]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Returns the tensor to store when a weight is assigned; reading constrains it."""
        return weight

    def extra_repr(self) -> str:
        return f"c={self.c}, dim={self.units.dim}"


class _Weight(NamedTuple):
    path: str
    module: nn.Module
    weight: Tensor
    units: Units


def _checked(c: Any, dim: Any, name: Any) -> float:
    check_number("c", c)
    if not 0 < float(c) < math.inf:
        raise ValueError(f"c must be positive and finite, got {c}")
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        raise TypeError(f"dim must be an integer or None, got {type(dim).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'weight', got {type(name).__name__}")
    return float(c)


def _weights(module: Any, dim: int | None, name: str) -> Iterator[_Weight]:
    """Yields the weights that the constraint is for.

    Raises:
        TypeError, ValueError: as `max_norm`.
    """
    check_module("module", module)
    found = False
    for prefix, one in module.named_modules():
        parametrized = parametrize.is_parametrized(one, name)
        if isinstance(one, NORMALISATIONS) or not (parametrized or one._parameters.get(name) is not None):
            continue
        weight = getattr(one, name)
        path = f"{prefix}.{name}" if prefix else name
        if is_lazy(weight):
            raise ValueError(f"{path} has no shape yet, its layer is lazy: run the model once first")
        if weight.dim() < 2:
            continue
        if not weight.is_floating_point():
            raise ValueError(f"{path} must be a floating-point tensor, got {weight.dtype}")
        found = True
        yield _Weight(path, one, weight, _units(path, one, weight, dim))
    if not found:
        raise ValueError(
            f"module must have a parameter named {name!r} of two dimensions or more, in itself or in a layer, got "
            f"{type(module).__name__} without one"
        )


def _units(path: str, module: nn.Module, weight: Tensor, dim: int | None) -> Units:
    dims = weight.dim()
    if dim is not None and not -dims <= dim < dims:
        raise ValueError(f"dim must be in [{-dims}, {dims}) for {path} of shape {tuple(weight.shape)}, got {dim}")
    transposed = isinstance(module, _ConvTransposeNd)
    dim = int(transposed) if dim is None else dim % dims
    return Units(dim, module.groups if transposed and dim == 1 else 1)  # type: ignore[arg-type]


def _is_constrained(module: nn.Module, name: str) -> bool:
    if not parametrize.is_parametrized(module, name):
        return False
    return any(isinstance(one, MaxNorm) for one in module.parametrizations[name])  # type: ignore[index]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _norms(rows: Tensor) -> Tensor:
    """Returns the norm of each row, in float32 at least, summed as a tree: one long sum would lose digits."""
    wide = _wide(rows.dtype)
    while rows.shape[1] > BLOCK:
        whole = rows.shape[1] // BLOCK * BLOCK
        blocks = rows[:, :whole].unflatten(1, (-1, BLOCK))
        norms = torch.linalg.vector_norm(blocks, dim=2, dtype=wide)
        rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True, dtype=wide)
        rows = torch.cat([norms, rest], 1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=wide)


def _projected(weight: Tensor, c: float, units: Units) -> tuple[Tensor, Tensor]:
    """Returns the weight within the bound, and the units that were over. Differentiable, and exact at any size."""
    split = units.split(weight).to(_wide(weight.dtype))
    peaks = units.rows(split.detach()).abs().amax(1)
    alive = (peaks > 0) & peaks.isfinite()
    peaks = torch.where(alive, peaks, 1)
    # Values that are not chosen in the end are replaced before the division: a gradient of 0 times infinity is NaN.
    scaled = torch.where(units.spread(alive, split), split / units.spread(peaks, split), 1)
    norms = _norms(units.rows(scaled))
    over = alive & (norms > c / peaks * _relative_tolerance(weight.dtype))
    shrunk = scaled * units.spread(c / norms, split)
    return torch.where(units.spread(over, split), shrunk, split).flatten(0, 1).to(weight.dtype), over


def _relative_tolerance(dtype: torch.dtype) -> float:
    return 1 + SLACK * torch.finfo(dtype).eps


def _rescale(weight: Tensor, c: float, units: Units) -> int:
    if not weight.numel():
        return 0
    split = units.split(weight)
    norms = _norms(units.rows(split))
    limits = torch.finfo(norms.dtype)
    if c < math.sqrt(limits.tiny) / limits.eps or not norms.isfinite().all():
        projected, over = _projected(weight, c, units)
        weight.copy_(projected)
        return int(over.sum())
    over = norms > c * _relative_tolerance(weight.dtype)
    count = int(over.sum())
    if count:
        split.mul_(units.spread(torch.where(over, c / norms, 1), split))
    return count

"""Compact (batchwise, submatrix) dropout: `CompactSequential` and `compact`.

With m a mask over the n inputs of a layer, the same for all rows of a batch, K the units that it keeps and k the keep
probability,

    y = (x m / k) W' + b = (x[:, K] / k) W[:, K]' + b

so dropped units need not be computed: neither their columns of W are used nor, in the layer before, the rows that make
them. At k = 1/2 the products between two hidden layers shrink to a quarter, forward and backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.hooks import is_observer
from ...core.inputs import check_input
from ...core.portable import refuse_script
from ...core.rate import Probability
from ...core.symbolic import leaf
from ...core.torch_state import forward_mode_active, function_modes, is_compiling, tracing_state, transforms_active
from ...kernels.masking import COMPUTE_DTYPE
from ..dropout import Dropout
from .submatrix import cut

_ZERO_AT_ZERO = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardswish, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6,
    nn.SELU, nn.SiLU, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink,
)  # fmt: skip

_ELSEWHERE = (nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Sigmoid, nn.Softplus, nn.Threshold)


_ALIGNED, _WIDE = 8, 128
"""Layers of `_WIDE` units and more keep a multiple of `_ALIGNED`: without alignment of its rows, a product was measured
to take up to 1.5 times as long."""

_Named = Sequence[tuple[str, Any]]
"""Modules by name, in order."""


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _keeps_zero(module: nn.Module) -> bool:
    return type(module) in _ZERO_AT_ZERO or (type(module) is nn.PReLU and module.num_parameters == 1)


def _is_elementwise(module: nn.Module) -> bool:
    return _keeps_zero(module) or type(module) in _ELSEWHERE or getattr(module, "elementwise", False) is True


class _Feed(NamedTuple):
    """Dropouts whose mask is over the inputs of one Linear; by positions.

    `start` is the first module with cut units: the Linear that makes them if only elementwise modules are between, else
    the first of the dropouts.
    """

    start: int
    dropouts: tuple[int, ...]
    linear: int


def _feeds(modules: _Named) -> list[_Feed]:
    """Finds the dropouts that can be cut.

    Raises:
        ValueError: a Dropout that comes before a Linear and cannot be cut.
    """
    feeds: list[_Feed] = []
    dropouts: list[int] = []
    source, between = -1, ""
    for position, (name, module) in enumerate(modules):
        if _is_linear(module):
            if dropouts:
                if between:
                    raise ValueError(
                        f"Dropout {modules[dropouts[0]][0]!r} cannot be cut out: {between} lies between it and Linear "
                        f"{name!r}, and does not give 0 for a dropped unit. Put the Dropout right before the Linear"
                    )
                _check_feed(modules, source, dropouts, position)
                feeds.append(_Feed(source if source >= 0 else dropouts[0], tuple(dropouts), position))
            dropouts, source, between = [], position, ""
        elif isinstance(module, nn.Dropout):
            dropouts.append(position)
        elif dropouts:
            between = between or ("" if _keeps_zero(module) else f"{type(module).__name__} {name!r}")
        elif not _is_elementwise(module):
            source = -1
    return feeds


def _check_feed(modules: _Named, source: int, dropouts: Sequence[int], linear: int) -> None:
    name, fed = modules[linear]
    if isinstance(fed, nn.LazyLinear):
        raise ValueError(f"Linear {name!r} is not initialized: run the model once before it is made compact")
    for position in dropouts:
        module = modules[position][1]
        for attribute in ("shared_axes", "noise_shape", "shard"):
            if getattr(module, attribute, None) is not None:
                raise ValueError(
                    f"{attribute} must be None in compact dropout, whose mask is over the units alone, got "
                    f"{getattr(module, attribute)} in Dropout {modules[position][0]!r}"
                )
    if source >= 0 and modules[source][1].out_features != fed.in_features:
        raise ValueError(
            f"Linear {name!r} must take as many inputs as Linear {modules[source][0]!r} gives, got {fed.in_features} "
            f"and {modules[source][1].out_features}"
        )


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook needs whole tensors: to see or change (`insert`), or to make the weight (pruning, weight_norm)."""
    return any(
        not is_observer(hook)
        for hooks in (
            module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks
        )
        for hook in hooks.values()
    )  # fmt: skip


def _is_plain(tensor: Any) -> bool:
    return tensor is None or (type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta)


def _must_mask(input: Any, modules: _Named) -> bool:
    """Whether masks must be applied: sizes must not depend on them, or something has to see the whole layers."""
    return (
        is_compiling()
        or transforms_active()
        or forward_mode_active()
        or tracing_state() is not None
        or not _is_plain(input)
        or any(
            (_is_linear(module) and not _is_plain(module._parameters.get("weight"))) or _is_watched(module)
            for _, module in modules
            if not isinstance(module, nn.Dropout)
        )
    )


def _factors(dropout: nn.Module, x: Tensor, units: int) -> Tensor | None:
    """Returns m / k of every unit, which is this layer's output for ones; None if it leaves them alone."""
    ones = torch.ones((1, units), dtype=COMPUTE_DTYPE[x.dtype], device=x.device)
    out = dropout(ones)
    return None if out is ones and not getattr(dropout, "inplace", False) else out.squeeze(0)


def _kept_units(factors: Iterable[Tensor | None], units: int) -> Tensor | None:
    """Returns the units that stay in the products: those that all masks keep, and in wide layers some more, so that
    rows begin at multiples of 32 bytes. None if these are all."""
    mask = None
    for one in factors:
        if one is not None:
            mask = one != 0 if mask is None else mask & (one != 0)
    if mask is None:
        return None
    index = mask.nonzero().squeeze(1)
    missing = -index.numel() % _ALIGNED
    if missing and units >= _WIDE:
        mask[(~mask).nonzero().squeeze(1)[:missing]] = True
        index = mask.nonzero().squeeze(1)
    return None if index.numel() == units else index


def _masked(x: Tensor, factors: Tensor) -> Tensor:
    return torch.where(factors != 0, x * factors, 0.0).to(x.dtype)


def _columns(x: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return x
    return cut(x.reshape(x.shape[:-1].numel(), x.shape[-1]), None, kept).reshape(*x.shape[:-1], kept.numel())


def _check_units(x: Tensor, linear: nn.Module) -> None:
    if x.shape[-1:] != (linear.in_features,):
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied: the input of shape {tuple(x.shape)} must have "
            f"{linear.in_features} units in its last dimension"
        )


class CompactSequential(nn.Sequential):
    """nn.Sequential in which dropout between Linear layers makes a training step cheaper: dropped units are cut out.

    A Dropout before a Linear draws one mask over the units for the whole batch. Instead of multiplying by it, it cuts
    the rows of the Linear before and the columns of the Linear after (see the module's docstring for the formula).
    Output and gradients are those of the whole network with that mask and scale, up to rounding; the gradient of rows
    and columns that are cut out is exactly 0. E[y] = x holds for each Dropout, but the rows of a batch share a mask, so
    the noise of a batch's mean gradient is larger than with a mask for each row.

    In eval mode the children are called as in nn.Sequential; the Dropout layers hold the rates. In training:

    - Linear: torch.nn.Linear is cut; a subclass with a forward of its own is left as it is.
    - Dropout: torchdrop.Dropout or torch.nn.Dropout. If no Linear follows, it drops element by element, as usual. All
      that decides whether these layers draw (train mode, schedules, `set_keep_prob`, `disabled`, `frozen_masks`,
      generators, Monte Carlo inference) holds as it does for the layers alone. keep_prob may be a tensor over units.
    - elementwise activations, which may be between a Linear and the Dropout after it: CELU, ELU, GELU, Hardshrink,
      Hardsigmoid, Hardswish, Hardtanh, Identity, LeakyReLU, LogSigmoid, Mish, PReLU with one parameter, ReLU, ReLU6,
      SELU, SiLU, Sigmoid, Softplus, Softshrink, Softsign, Tanh, Tanhshrink, Threshold, and modules with a
      true attribute `elementwise`. Those with f(0) = 0 may also be between the Dropout and the next Linear.
    - anything else (for example LayerNorm) works and sees all units: after it only the columns are cut.

    Masks are applied instead of cut, with the same result, where sizes must not depend on them: in compiled code, under
    torch.func transforms and forward-mode AD (so mc_predict prefers "loop", whose samples are cut); for tensor
    subclasses; and if a child other than a Dropout has hooks, such as those of `insert`, which see whole tensors. On a
    GPU cutting waits for the mask's size. If all units are dropped, the next Linear returns its bias. In layers of
    128 units and more up to 7 dropped ones stay in the products, as zeros, since these are faster in multiples of 8.

    Args:
        *args: modules, or an OrderedDict of them, as nn.Sequential takes them. See `compact` for an existing
            nn.Sequential.

    Shape:
        As the children's, with any number of dimensions before the units. The state_dict keys are those of the same
        nn.Sequential.

    Raises:
        ValueError: a Dropout before a Linear that cannot be cut, since something else is between; one with
            `shared_axes`, `noise_shape` or `shard`; two Linear layers that do not fit; one that is not initialized.

    References:
        Graham, Reizenstein and Robinson, "Efficient batchwise dropout training using submatrices", 2015
        (arXiv:1502.02478).

    Example:
        >>> import torch, torchdrop
        >>> from torch import nn
        >>> model = torchdrop.CompactSequential(nn.Linear(8, 64), nn.ReLU(), torchdrop.Dropout(0.5), nn.Linear(64, 3))
        >>> model(torch.randn(5, 8)).sum().backward()
        >>> dropped = (model[3].weight.grad == 0).all(0)
        >>> bool(dropped.any()), torch.equal(dropped, dropped & (model[0].weight.grad == 0).all(1))
        (True, True)
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '3.weight', '3.bias']
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        _feeds(list(self._modules.items()))

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        named = list(self._modules.items())
        feeds = {feed.start: feed for feed in _feeds(named)}
        modes = not is_compiling() and function_modes() > 0
        if not (modes or any(named[d][1].training for feed in feeds.values() for d in feed.dropouts)):
            return super().forward(input)
        return _run(input, named, feeds, _must_mask(input, named))


def _run(x: Tensor, named: _Named, feeds: Mapping[int, _Feed], masking: bool) -> Tensor:
    factors: dict[int, Tensor | None] = {}
    kept = columns = None
    for position, (_, module) in enumerate(named):
        feed = feeds.get(position)
        if feed is not None:
            units = named[feed.linear][1].in_features
            check_input(x, "compact dropout")
            if columns is None:
                _check_units(x, named[feed.linear][1] if feed.start in feed.dropouts else module)
            factors = {d: _factors(named[d][1], x, units) for d in feed.dropouts}
            kept = None if masking else _kept_units(factors.values(), units)
        if not masking and _is_linear(module):
            rows = kept if feed is not None else None
            bias = module.bias if module.bias is None or rows is None else module.bias.index_select(0, rows)
            x, columns = F.linear(x, cut(module.weight, rows, columns), bias), rows
        elif position not in factors:
            x = module(x)
        else:
            if columns is not kept:
                x, columns = _columns(x, kept), kept
            factor = factors[position]
            if factor is not None:
                x = _masked(x, factor if kept is None else factor.index_select(0, kept))
    return x


def compact(
    modules: nn.Sequential | Mapping[str, nn.Module] | Iterable[nn.Module],
    p: Probability | None = None,
    *,
    keep_prob: Probability | None = None,
    generator: torch.Generator | None = None,
) -> CompactSequential:
    """Makes a `CompactSequential` of existing modules: the same children and parameters, with the same state_dict keys.

    Dropout layers among them hold the rates, each its own. If there are none, a rate must be given, and a
    torchdrop.Dropout with it comes before every Linear but the first, as child "dropout0", "dropout1", ... For the
    block of a transformer::

        block.mlp = compact({"fc1": mlp.fc1, "act": mlp.act, "fc2": mlp.fc2}, keep_prob=0.8)

    Args:
        modules: an nn.Sequential, modules by the names that they get, or modules in order.
        p: probability of dropping a hidden unit, in [0, 1], if no Dropout is among the modules.
        keep_prob: probability of keeping it, in place of `p`.
        generator: the source of the masks' keys, for the Dropout layers that are put in.

    Returns:
        The CompactSequential, in train mode if the nn.Sequential is (else if the first module is). Hooks of the
        nn.Sequential itself stay with it.

    Raises:
        TypeError: no module, an nn.Sequential with a forward of its own, or both names of the rate.
        ValueError: a rate for modules that have Dropout layers, or none for modules without; nothing that can be cut;
            or an error of `CompactSequential`.

    Example:
        >>> import torch, torchdrop
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> cheaper = torchdrop.compact(model, keep_prob=0.5)
        >>> list(cheaper.state_dict()) == list(model.state_dict()), cheaper[0] is model[0]
        (True, True)
        >>> torch.equal(cheaper.eval()(torch.ones(2, 8)), model.eval()(torch.ones(2, 8)))
        True
    """
    named = _named_modules(modules)
    dropouts = [name for name, module in named if isinstance(module, nn.Dropout)]
    given = p is not None or keep_prob is not None
    if given and dropouts:
        raise ValueError(
            f"the rates are those of the Dropout layers, got p={p} and keep_prob={keep_prob} for modules with Dropout "
            f"{dropouts[0]!r}: set its rate, or leave the rate out"
        )
    if given:
        named = _with_dropout(named, p, keep_prob, generator)
    if not _feeds(named):
        raise ValueError(
            "nothing can be cut: there must be a Dropout before a Linear, or a rate (p or keep_prob) and two Linear, "
            f"got {', '.join(type(module).__name__ for _, module in named) or 'no modules'}"
        )
    made = CompactSequential()
    for name, module in named:
        made.add_module(name, module)
    made.training = modules.training if isinstance(modules, nn.Sequential) else named[0][1].training
    return made


def _named_modules(modules: Any) -> _Named:
    if isinstance(modules, nn.Sequential):
        if type(modules).forward not in (nn.Sequential.forward, CompactSequential.forward):
            raise TypeError(f"modules must be an nn.Sequential, got {type(modules).__name__} with a forward of its own")
        named = list(modules._modules.items())
    elif isinstance(modules, (Mapping, nn.ModuleDict)):
        named = list(modules.items())
    elif isinstance(modules, Iterable):
        named = [(str(number), module) for number, module in enumerate(modules)]
    else:
        kind = type(modules).__name__
        raise TypeError(f"modules must be an nn.Sequential, a mapping or a list of modules, got {kind}")
    for name, module in named:
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules must be modules, got {type(module).__name__} as {name!r}")
    return named


def _with_dropout(named: _Named, p: Any, keep_prob: Any, generator: torch.Generator | None) -> _Named:
    found: list[tuple[str, Any]] = []
    taken = {name for name, _ in named}
    free = (name for name in (f"dropout{n}" for n in itertools.count()) if name not in taken)
    first = True
    for name, module in named:
        if _is_linear(module):
            if not first:
                layer = Dropout(p, keep_prob=keep_prob, generator=generator)
                found.append((next(free), layer.train(module.training)))
            first = False
        found.append((name, module))
    return found

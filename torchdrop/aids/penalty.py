"""The adaptive L2 penalty that dropout amounts to: `equivalent_l2`.

Dropout multiplies activations by gates g with mean 1 and variance (1 - k) / k. The expected loss is then, to second
order in the gates, the loss without dropout plus

    R = 1/2 sum_u (1 - k_u) / k_u  sum_i (dz_i / dg_u)^T H_i (dz_i / dg_u)        at g = 1

with z_i the outputs of row i and H_i the Hessian of its loss in them. For a mask element u whose positions v carry
activations h_v, dz_i / dg_u = sum_v h_v dz_i / dh_v. Terms with the curvature of the network are left out, as in the
generalized Gauss-Newton matrix. The result is exact for a linear model under squared error, where with one weight
vector w it is (1 - k) / k sum_j w_j^2 sum_i x_ij^2. Elsewhere the remainder is of third order in a dropped element's
contribution to z (of fourth at k = 1/2), whatever k: a rare drop is still a whole one.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..core.checks import check_choice, check_module
from ..core.hooks import observer
from ..core.mask_shape import mask_shape
from ..core.rate import Probability, Rated, params_for, realized
from ..kernels.mask_params import inverted
from ..layers.channel import channel_shape
from ..layers.dropout import Dropout
from ..layers.gaussian import GaussianDropout
from ..monte_carlo.inputs import Inputs
from ..monte_carlo.outputs import one_tensor

Loss = Literal["squared", "bernoulli", "categorical", "poisson"]


@dataclass(frozen=True)
class EquivalentL2:
    """The penalty of a model's dropout on some inputs.

    Args:
        total: the sum over all layers; a scalar in the unit of the loss, which can be added to a loss and
            differentiated.
        by_layer: the penalty of each dropout layer, by name; they add up to the total.
        left_out: modules that draw inside themselves, such as attention with dropout, whose share is not in the total.
    """

    total: Tensor
    by_layer: dict[str, Tensor]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [*((name, value.item()) for name, value in self.by_layer.items()), ("total", self.total.item())]
        width = max(len(name) for name, _ in rows)
        lines = ["Penalty equivalent to dropout", f"  {'layer':{width}}  {'penalty':>12}  share"]
        for name, value in rows:
            share = f"{100 * value / rows[-1][1]:4.0f} %" if rows[-1][1] else "     -"
            lines.append(f"  {name:{width}}  {value:12.5g}  {share}")
        if self.left_out:
            lines.append(f"  left out, as they draw inside themselves: {', '.join(self.left_out)}")
        return "\n".join(lines)


def equivalent_l2(
    module: nn.Module, inputs: Any, *, keep_prob: Probability | None = None, loss: Loss = "squared"
) -> EquivalentL2:
    """Returns the adaptive L2 penalty that dropout amounts to, for a linear model, or per layer for a network.

    ``R = 1/2 sum_u (1 - k) / k sum_i (dz_i / dg_u)^T H_i (dz_i / dg_u)``, as this file's beginning explains: the
    expected loss with dropout less the loss without, to second order. It is exact for linear models under squared error
    and the quadratic approximation of Wager, Wang and Liang for generalized linear models, where
    ``R = 1/2 sum_i A''(x_i b) Var[x~_i b]``; in networks it is the Gauss-Newton part of the second order, the sum over
    the layers. Targets do not enter. At keep_prob 1 it is 0; it grows without bound towards 0.

    The module is run once, as in eval mode, whatever its training flags, which stay. One backward pass is made for each
    output of a row, and two to see that rows do not depend on each other. If they do, for example because time comes
    before the batch or a layer's masks are not counted by rows, one is made for each output of each row.

    Args:
        module: a model with dropout layers, of torchdrop or torch.nn; or one without, with `keep_prob`.
        inputs: a tensor (B, ...), a tuple of positional arguments or a mapping of named ones.
        keep_prob: the probability of keeping an element in dropout on the inputs of a module that has no dropout layer:
            a number, or a tensor that broadcasts against the inputs.
        loss: a loss of the outputs z, summed over all of them. "squared": (y - z)^2. "bernoulli": logistic loss of
            logits. "categorical": cross-entropy of logits (B, C, ...). "poisson": exp(z) - y z, the log link.

    Returns:
        The penalty, as a total and for each layer, in float32 at least. It is differentiable in the parameters, with
        the Hessian's dependence on them, unless gradients are switched off.

    Raises:
        TypeError: an argument of another type; `keep_prob` for a module with dropout layers, or none for one without;
            a dropout layer of another kind.
        ValueError: an unknown loss, a layer with keep_prob 0, AlphaDropout (it changes an element's mean).
        RuntimeError: under torch.inference_mode.

    Warns:
        UserWarning: dropout inside modules such as nn.MultiheadAttention or nn.LSTM, which is no layer, is left out.

    References:
        Srivastava et al., JMLR 15, 2014, section 9.1, for linear regression; Wager, Wang, Liang, "Dropout Training as
        Adaptive Regularization", NeurIPS 2013; Wei, Kakade, Ma, "The Implicit and Explicit Regularization Effects of
        Dropout", ICML 2020, for networks.

    Example:
        >>> import torch
        >>> x, layer = torch.ones(10, 3), torch.nn.Linear(3, 1)
        >>> _ = torch.nn.init.constant_(layer.weight, 2.0)
        >>> equivalent_l2(layer, x, keep_prob=0.5).total
        tensor(120., grad_fn=<AddBackward0>)
        >>> model = torch.nn.Sequential(torch.nn.Dropout(0.2), layer)
        >>> print(equivalent_l2(model, x, loss="bernoulli"))  # doctest: +ELLIPSIS
        Penalty equivalent to dropout
          layer       penalty  share
          0       ...   100 %
          total   ...   100 %
    """
    module, arguments = _checked(module, inputs, loss, keep_prob)
    differentiable = torch.is_grad_enabled()
    layers = _layers(module)
    gates: list[_Gate] = []
    with torch.enable_grad(), _gated(module, layers, gates):
        z = one_tensor(arguments.call(module))
        if not z.is_floating_point():
            raise TypeError(f"the module must return a floating-point tensor, got {z.dtype}")
        wide = torch.promote_types(z.dtype, torch.float32)
        totals = {name: torch.zeros((), dtype=wide, device=z.device) for name in layers}
        for name, share in _shares(z, [gate for gate in gates if gate.acts], loss, differentiable):
            totals[name] = totals[name] + share
    total = torch.stack(list(totals.values())).sum() if len(totals) > 1 else next(iter(totals.values()))
    if not differentiable:
        total, totals = total.detach(), {name: share.detach() for name, share in totals.items()}
    return EquivalentL2(total, totals, _left_out(module))


def _checked(module: Any, inputs: Any, loss: Any, keep_prob: Any) -> tuple[nn.Module, Inputs]:
    """Returns the module, with dropout in front if that is asked for, and its arguments.

    Raises:
        TypeError, ValueError, RuntimeError: as `equivalent_l2`.
    """
    check_module("module", module)
    check_choice("loss", loss, get_args(Loss))
    if not isinstance(inputs, (Tensor, tuple, Mapping)):
        raise TypeError(
            "inputs must be a tensor, a tuple of positional arguments or a mapping of named ones, got "
            f"{type(inputs).__name__}"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("equivalent_l2 needs gradients: call it outside torch.inference_mode()")
    module = getattr(module, "_orig_mod", module)  # without torch.compile's wrapper, whose graphs have no gates
    layers = _layers(module)
    if layers and keep_prob is not None:
        raise TypeError(
            f"keep_prob is for a module without dropout layers, this one has {', '.join(map(repr, layers))}: leave it "
            "out, their own rates count"
        )
    for name, layer in layers.items():
        _check_layer(name, layer)
    if layers:
        return module, Inputs.of(inputs, None)
    if keep_prob is None:
        raise TypeError(
            f"keep_prob must be given for a module without dropout layers, such as this {type(module).__name__}: it is "
            "that of dropout on its inputs"
        )
    if isinstance(inputs, tuple) and len(inputs) == 1:
        (inputs,) = inputs
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be one tensor where keep_prob is given, got {type(inputs).__name__}")
    if not inputs.is_floating_point():
        raise TypeError(f"inputs must be a floating-point tensor where keep_prob is given, got {inputs.dtype}")
    front = Dropout(keep_prob=keep_prob)
    _check_layer("keep_prob", front)
    return nn.Sequential(OrderedDict(inputs=front, module=module)), Inputs.of(inputs, None)


def _layers(module: nn.Module) -> dict[str, _DropoutNd]:
    return {name or "(model)": one for name, one in module.named_modules() if isinstance(one, _DropoutNd)}


_SERVED = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, GaussianDropout)


def _check_layer(name: str, layer: _DropoutNd) -> None:
    if isinstance(layer, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
        raise ValueError(
            f"{name} is {type(layer).__name__}, which changes the mean of an element, so that it amounts to no penalty "
            "of this form: put Dropout in its place"
        )
    if not isinstance(layer, _SERVED):
        served = ", ".join(one.__name__ for one in _SERVED)
        raise TypeError(f"{name} is {type(layer).__name__}, whose noise is not known here: {served} are")
    keep_prob = _keep_prob(layer)
    least = keep_prob.min().item() if isinstance(keep_prob, Tensor) and keep_prob.numel() else keep_prob
    if isinstance(least, float) and least <= 0:
        where = f"keep_prob of {name}" if name != "keep_prob" else name
        raise ValueError(f"{where} must be in (0, 1], got {least}: with nothing kept the penalty is infinite")


def _keep_prob(layer: _DropoutNd) -> Probability:
    """Returns the probability that the layer's masks really have."""
    return realized(layer.keep_prob) if isinstance(layer, Rated) else 1.0 - layer.p


def _mask_of(layer: _DropoutNd, input: Tensor) -> tuple[int, ...]:
    for spatial, kind in enumerate((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), 1):
        if isinstance(layer, kind):
            return channel_shape(input, spatial)
    if isinstance(layer, Dropout):
        return tuple(mask_shape(input, layer.shared_axes, layer.noise_shape))
    return tuple(input.shape)


class _Gate(NamedTuple):
    """A call of a dropout layer: ones that multiply its output, in which derivatives are taken.

    Args:
        layer: the layer's name.
        ones: a tensor of ones of the mask's shape.
        variance: the variance of a gate, (1 - k) / k: a number, or a tensor that broadcasts against the mask.
    """

    layer: str
    ones: Tensor
    variance: Probability

    @property
    def acts(self) -> bool:
        return isinstance(self.variance, Tensor) or self.variance > 0


@contextmanager
def _gated(module: nn.Module, layers: Mapping[str, _DropoutNd], gates: list[_Gate]) -> Iterator[None]:
    """Within the context, the module runs as in eval mode, and each call of a layer puts a gate on its output.

    Kernels without a second derivative are switched off; attention's fast path, which skips modules, avoids hooks.
    """

    def gate(name: str, layer: _DropoutNd, output: Tensor) -> Tensor:
        mask = _mask_of(layer, output)
        k = _keep_prob(layer)
        if isinstance(k, Tensor):
            params_for(k, inverted, mask)  # refuses one that does not broadcast against the mask
            k = k.to(output.device, torch.promote_types(output.dtype, torch.float32))
        ones = torch.ones(mask, dtype=output.dtype, device=output.device, requires_grad=True)
        gates.append(_Gate(name, ones, (1 - k) / k))
        return output * ones

    flags = [(one, one.training) for one in module.modules()]
    with ExitStack() as undo:
        for one, training in flags:
            undo.callback(setattr, one, "training", training)
            one.training = False
        for name, layer in layers.items():
            hook = layer.register_forward_hook(observer(lambda layer, _, output, name=name: gate(name, layer, output)))
            undo.callback(hook.remove)
        undo.enter_context(nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH))
        undo.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _shares(z: Tensor, gates: list[_Gate], loss: Loss, differentiable: bool) -> Iterator[tuple[str, Tensor]]:
    """Yields the parts of the penalty, for each factor of the Hessian and each gate."""
    if not gates or not z.numel():
        return
    if not z.requires_grad:
        raise RuntimeError(
            "the module's output must be differentiable, and depend on a dropout layer, got one that is not"
        )
    if z.dim() < (2 if loss == "categorical" else 1):
        z = z.unsqueeze(0)  # one row
    apart = _rows_are_independent(z, gates)
    together = [gate for gate, own in zip(gates, apart, strict=True) if own]
    tangled = [gate for gate, own in zip(gates, apart, strict=True) if not own]
    for weights, direction in _factors(z, loss):
        for gate, slopes in _slopes(z, together, direction, differentiable):
            squares = (slopes.square() * gate.variance).reshape(len(z), -1).sum(1)
            yield gate.layer, (weights * squares).sum() / 2
        for row in range(len(z) if tangled else 0):
            alone = torch.zeros_like(direction)
            alone[row] = 1
            for gate, slopes in _slopes(z, tangled, direction * alone, differentiable):
                yield gate.layer, weights[row] * (slopes.square() * gate.variance).sum() / 2


def _factors(z: Tensor, loss: Loss) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields weights a_i >= 0 and directions d_i, each pair for all rows at once, with ``H_i = sum a_i d_i d_i^T``.

    So the square roots of a Hessian's eigenvalues, which have no derivative at 0, are not needed.
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    if loss == "squared":
        curvature = torch.full_like(wide, 2.0)
    elif loss == "bernoulli":
        curvature = wide.sigmoid() * (-wide).sigmoid()
    elif loss == "poisson":
        curvature = wide.exp()
    else:
        curvature = wide.softmax(1)
    for place in range(z[0].numel()):
        unit = torch.zeros(z[0].numel(), dtype=z.dtype, device=z.device)
        unit[place] = 1
        direction = unit.reshape(z[0].shape).expand_as(z)
        if loss == "categorical":
            # p_c (e_c - p) (e_c - p)^T, summed over the classes c, is diag(p) - p p^T.
            direction = direction - curvature.to(z.dtype) * direction.sum(1, keepdim=True)
        yield curvature.reshape(len(z), -1)[:, place], direction


def _slopes(z: Tensor, gates: list[_Gate], direction: Tensor, differentiable: bool) -> Iterator[tuple[_Gate, Tensor]]:
    """Yields the derivatives of ``direction . z`` in each gate. They reach `direction`'s own graph, which the penalty's
    gradient needs."""
    if not gates:
        return
    slopes = torch.autograd.grad(
        z,
        [gate.ones for gate in gates],
        direction,
        create_graph=differentiable,
        retain_graph=True,
        allow_unused=True,
    )
    for gate, slope in zip(gates, slopes, strict=True):
        if slope is not None:
            yield gate, slope.to(torch.promote_types(slope.dtype, torch.float32))


def _rows_are_independent(z: Tensor, gates: list[_Gate]) -> list[bool]:
    """Returns, for each gate, whether its rows act only on the same rows of z, so that one pass serves all rows.

    Even rows of z must not depend on odd rows of the gate, nor odd rows on even ones: derivatives must be exactly 0.
    """
    if len(z) == 1:
        return [True] * len(gates)
    mixed: set[int] = set()
    random = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(z)
    for start in (0, 1):
        some = torch.zeros_like(z)
        some[start::2] = random[start::2]
        slopes = _slopes(z, gates, some, differentiable=False)
        mixed |= {id(gate) for gate, slope in slopes if slope.dim() and slope[1 - start :: 2].count_nonzero()}
    return [gate.ones.dim() > 0 and len(gate.ones) == len(z) and id(gate) not in mixed for gate in gates]


def _left_out(module: nn.Module) -> tuple[str, ...]:
    """Returns names of modules that draw without a dropout layer, with a warning if there are any."""
    names = tuple(
        name or "(model)"
        for name, one in module.named_modules()
        if (isinstance(one, (nn.MultiheadAttention, nn.RNNBase)) and one.dropout > 0) or isinstance(one, nn.RReLU)
    )
    if names:
        warnings.warn(f"dropout inside {', '.join(names)} is not in the penalty: no layer stands for it", stacklevel=3)
    return names

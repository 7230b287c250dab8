"""Measures of the sparsity of hidden activations and of the co-adaptation of features: `feature_statistics`.

Srivastava et al. (JMLR 2014, section 7) look at these: with dropout, few units are active at a time, their mean
activations are lower, and features are useful by themselves instead of correcting each other's mistakes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .._extras import BLUE, GREEN, ORANGE, VERMILION, axes_or_new
from ..core.checks import check_choice, check_module
from ..core.hooks import observer
from ..core.names import check_patterns, fits
from ..monte_carlo.inputs import Inputs

ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.PReLU, nn.RReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
"""The modules whose outputs are taken by default: all elementwise ones, and nn.GLU, but no softmax."""

BINS = 60
CHUNK = 1 << 22

Quantity = Literal["mean activations", "activations"]

_COLOURS = (BLUE, VERMILION, GREEN, ORANGE)
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class LayerStatistics:
    """Sparsity and co-adaptation of one layer's units, over data.

    Args:
        name: the module's name; with the number of the call, from the second call in a forward on.
        units: the number of units: channels of convolutions, otherwise the size of the last dimension.
        data: the number of activations of each unit: rows, times positions.
        mean_activation: the mean over data and units.
        zeros: the fraction of activations that are exactly 0.
        dead: the fraction of units that are 0 on all data.
        sparseness: ``(sqrt(n) - |a|_1 / |a|_2) / (sqrt(n) - 1)`` for each datum over n units, and then the mean over
            data with an activation that is not 0: 0 if all units are equally active, 1 if only one is (Hoyer, JMLR 5,
            2004, section 3.1).
        correlation: the mean |correlation| between two different units, of those that vary: 0 if they are
            uncorrelated, 1 if each is a linear function of each other.
        constant: the number of units that have one value on all data, and are left out of `correlation`.
        effective_features: the participation ratio ``(sum l)^2 / sum l^2`` of the eigenvalues l of the units'
            covariance: from 1, if all vary along one direction, to the number of units, if they vary equally and
            independently (Gao et al., bioRxiv 214262, 2017).
        unit_means: the mean activation of each unit, of shape (units,).
        counts: the numbers of activations in bins of equal width.
        edges: the edges of the bins, one more.

    Undefined values are NaN: the sparseness of a single unit or of only zeros, the correlation of fewer than two units
    that vary, the effective features of units that do not vary.
    """

    name: str
    units: int
    data: int
    mean_activation: float
    zeros: float
    dead: float
    sparseness: float
    correlation: float
    constant: int
    effective_features: float
    unit_means: Tensor = field(repr=False, compare=False)
    counts: Tensor = field(repr=False, compare=False)
    edges: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class FeatureStatistics:
    """The result of `feature_statistics`, layer by layer in the order in which they ran.

    Args:
        layers: one for each call of each layer.
    """

    layers: tuple[LayerStatistics, ...]

    def __getitem__(self, name: str) -> LayerStatistics:
        """Returns the statistics of the layer of that name.

        Raises:
            KeyError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"{name!r}: there are {', '.join(layer.name for layer in self.layers)}")

    def rows(self) -> list[dict[str, Any]]:
        """Returns a plain dict of numbers for each layer, for tables."""
        names = [name for name in LayerStatistics.__annotations__ if name not in ("unit_means", "counts", "edges")]
        return [{name: getattr(layer, name) for name in names} for layer in self.layers]

    def __str__(self) -> str:
        width = max(5, *(len(layer.name) for layer in self.layers))
        lines = [
            "Hidden activations: sparsity and co-adaptation",
            f"  {'layer':{width}}  units     mean   zeros    dead  sparseness  |correlation|  effective features",
        ]
        for one in self.layers:
            lines.append(
                f"  {one.name:{width}}  {one.units:5d}  {one.mean_activation:7.4g}  {100 * one.zeros:4.0f} %  "
                f"{100 * one.dead:4.0f} %  {one.sparseness:10.3f}  {one.correlation:13.3f}  "
                f"{one.effective_features:10.1f} of {one.units}"
            )
        left = [f"{one.name} ({one.constant})" for one in self.layers if one.constant]
        if left:
            lines.append(f"  constant units, left out of the correlation: {', '.join(left)}")
        return "\n".join(lines)

    def plot(self, ax: Any = None, *, of: Quantity = "mean activations", label: str = "") -> Any:
        """Plots a histogram for each layer, as in figure 8 of Srivastava et al. (2014).

        Call it again with the same Axes to compare models; give each its label.

        Args:
            ax: the Axes to draw on; new ones if None.
            of: "mean activations", one of each unit; or "activations", of all units on all data, on a logarithmic
                scale, as zeros are many. Each histogram has area 1, whatever its bins, so they can be compared.
            label: the text before the layers' names in the legend, for example the model's name.

        Returns:
            The Axes.

        Raises:
            ValueError: another quantity.
        """
        check_choice("of", of, get_args(Quantity))
        ax = axes_or_new(ax)
        before = len(ax.patches)
        for number, layer in enumerate(self.layers, before):
            counts, edges = self._means_of(layer) if of == "mean activations" else (layer.counts, layer.edges)
            heights = counts / counts.sum() / edges.diff()
            color, line = _COLOURS[number % 4], _LINES[number // 4 % 4]
            name = f"{label} {layer.name}".strip()
            ax.stairs(heights.numpy(), edges.numpy(), color=color, linestyle=line, linewidth=1.4, label=name)
        if of == "activations":
            ax.set_yscale("log")
        ax.set(xlabel=of.removesuffix("s"), ylabel="density of units" if of == "mean activations" else "density")
        ax.legend(frameon=False, fontsize=8)
        return ax

    def _means_of(self, layer: LayerStatistics) -> tuple[Tensor, Tensor]:
        """Returns the histogram of a layer's mean activations, in bins that all layers have in common."""
        means = torch.cat([one.unit_means for one in self.layers])
        return _histogram(layer.unit_means, means.min().item(), means.max().item(), 30)


def feature_statistics(
    model: nn.Module, inputs: Any, layers: str | Sequence[str] | None = None, *, dim: int | None = None
) -> FeatureStatistics:
    """Measures the sparsity of hidden activations and the co-adaptation of features, in one forward in eval mode.

    Compare a model trained with dropout to one trained without: dropout should make activations sparser, means lower,
    correlations weaker and effective features more. See `LayerStatistics` for the definitions.

    Args:
        model: the model that has the layers. Its training flags stay as they are.
        inputs: some thousand rows of data: a tensor (B, ...), a tuple of positional arguments or a mapping of named
            ones. Estimates of correlation need more rows than there are units.
        layers: names of modules whose outputs are taken, or glob patterns for them (``"features.*"``). If None, those
            of all activations that are modules (`ACTIVATIONS`); a function that a forward calls has no name.
        dim: the dimension of the outputs that counts units; all others count data. If None, the channels if the output
            has as many dimensions as that of the last convolution before it, and the last dimension otherwise.

    Returns:
        Numbers for each layer, a table (``print``) and pictures (``.plot()``).

    Raises:
        TypeError: an argument of another type, or a layer that does not return one floating-point tensor.
        ValueError: a pattern without a layer, no activation in the model, a layer that is not called, fewer than two
            activations for a unit, or activations that are not finite.

    References:
        Srivastava et al., JMLR 15, 2014, sections 7.1 and 7.2; Hoyer, "Non-negative Matrix Factorization with
        Sparseness Constraints", JMLR 5, 2004; Gao et al., "A theory of multineuronal dimensionality, dynamics and
        measurement", bioRxiv 214262, 2017.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        ...     _ = model[0].bias.zero_()
        >>> found = feature_statistics(model, torch.tensor([[1.0, 2], [-1, 2], [1, -2], [-1, -2]]))
        >>> found["1"].zeros, found["1"].dead, round(found["1"].effective_features, 2)
        (0.5, 0.0, 1.47)
        >>> print(found)
        Hidden activations: sparsity and co-adaptation
          layer  units     mean   zeros    dead  sparseness  |correlation|  effective features
          1          4     0.75    50 %     0 %       0.658          0.333         1.5 of 4
    """
    check_module("model", model)
    if not isinstance(inputs, (Tensor, tuple, Mapping)):
        raise TypeError(
            "inputs must be a tensor, a tuple of positional arguments or a mapping of named ones, got "
            f"{type(inputs).__name__}"
        )
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        raise TypeError(f"dim must be an integer or None, got {type(dim).__name__}")
    chosen = _chosen(model, layers)
    found: list[LayerStatistics] = []
    with torch.no_grad(), _observed(model, chosen, dim, found):
        Inputs.of(inputs, None).call(model)
    silent = set(chosen) - {one.name for one in found}
    if silent:
        raise ValueError(f"the model did not call {', '.join(sorted(silent))} on these inputs: leave it out of layers")
    return FeatureStatistics(tuple(found))


def _chosen(model: nn.Module, layers: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """Returns the modules to look at, by name.

    Raises:
        TypeError, ValueError: as `feature_statistics`.
    """
    named = {name or "(model)": one for name, one in model.named_modules()}
    if layers is None:
        chosen: dict[str, nn.Module] = {name: one for name, one in named.items() if isinstance(one, ACTIVATIONS)}
        if not chosen:
            raise ValueError(
                f"layers must be given for {type(model).__name__}, which has no activation, such as nn.ReLU, as a "
                f"module; it has {', '.join(list(named)[1:9]) or 'no modules'}{', ...' if len(named) > 9 else ''}"
            )
        return chosen
    patterns = [layers] if isinstance(layers, str) else layers
    if not isinstance(patterns, Sequence):
        raise TypeError(f"layers must be a name, a list of names or None, got {type(layers).__name__}")
    check_patterns(patterns, list(named), (), "modules", fits)
    return {name: one for name, one in named.items() if any(fits(one, name) for one in patterns)}


@contextmanager
def _observed(
    model: nn.Module, chosen: Mapping[str, nn.Module], dim: int | None, found: list[LayerStatistics]
) -> Iterator[None]:
    """Within the context, the model is in eval mode, and each output of the chosen modules is measured at once."""
    calls: Counter[str] = Counter()
    spatial = 0  # dimensions behind the channels, after the last layer that decides about them

    def place(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal spatial
        spatial = len(module.kernel_size) if isinstance(module, (_ConvNd, _ConvTransposeNd)) else 0

    def measure(name: str, output: Any) -> None:
        calls[name] += 1
        if not isinstance(output, Tensor) or not output.is_floating_point():
            what = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"{name} must return one floating-point tensor, got {what}: choose a layer that does")
        axis = dim if dim is not None else 1 if spatial and output.dim() == spatial + 2 else -1
        if not -output.dim() <= axis < output.dim():
            raise ValueError(f"dim must be in [{-output.dim()}, {output.dim()}) for the output of {name}, got {axis}")
        rows = output.movedim(axis, -1).unsqueeze(0).flatten(0, -2)
        found.append(_statistics(name if calls[name] == 1 else f"{name} (call {calls[name]})", rows))

    with ExitStack() as undo:
        for one in model.modules():
            undo.callback(setattr, one, "training", one.training)
            one.training = False
            if isinstance(one, (_ConvNd, nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)):
                undo.callback(one.register_forward_hook(observer(place)).remove)
        for name, one in chosen.items():
            hook = one.register_forward_hook(observer(lambda _, __, output, name=name: measure(name, output)))
            undo.callback(hook.remove)
        yield


def _statistics(name: str, rows: Tensor) -> LayerStatistics:
    """Returns the measures of activations (data, units)."""
    data, units = rows.shape
    if data < 2 or not units:
        raise ValueError(f"{name} must have units with at least 2 activations each, got {units} with {data}")
    low, high = (one.double() for one in rows.aminmax(dim=0))
    if not (low.isfinite().all() and high.isfinite().all()):
        raise ValueError(f"{name} has activations that are not finite: look for the layer where they begin")
    means = rows.mean(0, dtype=torch.float64)
    sparseness: list[Tensor] = []
    covariance = torch.zeros(units, units, dtype=torch.float64, device=rows.device)
    counts = torch.zeros(BINS, dtype=torch.float64)
    least, most = low.min().item(), high.max().item()
    scale = max(-least, most) or 1.0  # squares must neither overflow nor vanish
    zeros = 0
    for some in rows.split(max(1, CHUNK // units)):
        counts += _histogram(some, least, most, BINS)[0]
        zeros += some.numel() - int(some.count_nonzero())
        sparseness.append(_sparseness(some.double()))
        centered = (some.double() - means) / scale
        covariance += centered.T @ centered
    varies = low != high
    spread = covariance.diagonal().sqrt()
    measured = torch.cat(sparseness)
    return LayerStatistics(
        name=name,
        units=units,
        data=data,
        mean_activation=means.mean().item(),
        zeros=zeros / rows.numel(),
        dead=((low == 0) & (high == 0)).double().mean().item(),
        sparseness=measured.mean().item() if units > 1 else math.nan,
        correlation=_mean_correlation(covariance[varies][:, varies], spread[varies]),
        constant=int((~varies).sum()),
        effective_features=_participation(covariance[varies][:, varies]),
        unit_means=means.cpu(),
        counts=counts,
        edges=_histogram(means[:0], least, most, BINS)[1],
    )


def _sparseness(rows: Tensor) -> Tensor:
    """Returns Hoyer's measure of each row that is not 0."""
    rows = rows[(rows != 0).any(1)]
    rows = rows / rows.abs().amax(1, keepdim=True)
    root = math.sqrt(rows.shape[1])
    return (root - rows.abs().sum(1) / rows.norm(dim=1)) / max(root - 1, 1e-300)


def _mean_correlation(covariance: Tensor, spread: Tensor) -> float:
    """Returns the mean absolute correlation of different units."""
    n = len(spread)
    if n < 2:
        return math.nan
    absolute = (covariance / spread / spread[:, None]).abs().clamp_(max=1)
    return ((absolute.sum() - absolute.diagonal().sum()) / (n * (n - 1))).item()


def _participation(covariance: Tensor) -> float:
    """Returns (sum l)^2 / sum l^2 of the eigenvalues l, from the squares of trace and Frobenius norm."""
    if not len(covariance):
        return math.nan
    scaled = covariance / covariance.diagonal().max()
    return (scaled.trace().square() / scaled.square().sum()).item()


def _histogram(values: Tensor, least: float, most: float, bins: int) -> tuple[Tensor, Tensor]:
    """Returns counts in equal bins from `least` to `most`, and the edges. A single value has bins around it."""
    if least == most:
        half = max(abs(least), 1.0) / 2
        least, most = least - half, most + half
    edges = torch.linspace(least, most, bins + 1, dtype=torch.float64)
    place = ((values.double() - least) / (most - least) * bins).long().clamp_(0, bins - 1)
    return torch.bincount(place.reshape(-1), minlength=bins).double().cpu(), edges

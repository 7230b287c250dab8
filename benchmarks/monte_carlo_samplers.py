"""Ways to Monte Carlo samples of a model: torchdrop's, the usual loop, and those of other packages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from monte_carlo_models import everything_on
from peers import Package
from torch import Tensor, nn

import torchdrop
from torchdrop.monte_carlo import Report

OURS, LOOP = "torchdrop", "usual loop"
_TU, _BAAL = "torch-uncertainty", "baal"


class Moments(NamedTuple):
    """Mean and variance of the outputs over samples."""

    mean: Tensor
    variance: Tensor


Samples = Callable[[], Tensor]
"""Gives samples of the outputs, (T, rows, ...)."""

Maker = Callable[[nn.Module, Tensor, int], Samples]
"""From a model, which is the maker's to change, its inputs, and T."""


def moments(samples: Tensor) -> Moments:
    return Moments(samples.mean(0), samples.var(0))


def ours(model: nn.Module, x: Tensor, samples: int) -> tuple[Moments, Report]:
    """The public function with all that it does: finding what is random, choosing a strategy, statistics."""
    result = torchdrop.mc_predict(model, x, samples=samples)
    return Moments(result.mean, result.variance), result.report


def _repeated(model: nn.Module, x: Tensor, samples: int) -> Samples:
    def run() -> Tensor:
        with torch.no_grad():
            return torch.stack([model(x) for _ in range(samples)])

    return run


def modules_loop(model: nn.Module, x: Tensor, samples: int) -> Samples:
    """What people write: eval mode, nn.Dropout's modules in train mode, T forwards."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.train()
    return _repeated(model, x, samples)


def train_loop(model: nn.Module, x: Tensor, samples: int) -> Samples:
    """T forwards in train mode, with BatchNorm in eval mode: everything random fires."""
    return _repeated(everything_on(model), x, samples)


def _torch_uncertainty(on_batch: bool) -> Maker:
    def make(model: nn.Module, x: Tensor, samples: int) -> Samples:
        from torch_uncertainty.methods import mc_dropout

        wrapped = mc_dropout(model, num_estimators=samples, on_batch=on_batch).eval()

        def run() -> Tensor:
            with torch.no_grad():
                return wrapped(x).unflatten(0, (samples, -1))

        return run

    return make


def _baal(replicate: bool) -> Maker:
    def make(model: nn.Module, x: Tensor, samples: int) -> Samples:
        from baal.bayesian.dropout import MCDropoutModule
        from baal.modelwrapper import ModelWrapper, TrainingArgs

        patched = MCDropoutModule(model)
        patched.eval()
        wrapper = ModelWrapper(patched, TrainingArgs(use_cuda=x.is_cuda, replicate_in_memory=replicate))

        def run() -> Tensor:
            return wrapper.predict_on_batch(x, iterations=samples).movedim(-1, 0)

        return run

    return make


@dataclass(frozen=True)
class Peer(Package):
    """Another package's Monte Carlo dropout.

    Args:
        variants: its ways to run T samples, its default first.
    """

    variants: dict[str, Maker]


PEERS = [
    Peer(
        _TU,
        "torch_uncertainty.methods",
        "'torch_uncertainty[cpu]'",
        {f"{_TU}, one batch": _torch_uncertainty(True), f"{_TU}, loop": _torch_uncertainty(False)},
    ),
    Peer(_BAAL, "baal.bayesian.dropout", "baal", {f"{_BAAL}, one batch": _baal(True), f"{_BAAL}, loop": _baal(False)}),
]


def sampler(make: Maker, model: nn.Module, x: Tensor, samples: int) -> Samples:
    """What a maker makes of the model itself, without warnings."""

    def run() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return made()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = make(model, x, samples)
    return run


def means_apart(a: Moments, b: Moments, samples: int) -> float | None:
    """By how many standard errors two means over T samples differ, if by more than chance explains.

    6 standard deviations of the mean square, with the outputs of a row (their last dimension) taken as one.
    """
    error = ((a.variance + b.variance) / samples).clamp_min(1e-30)
    square = float(((a.mean - b.mean).square() / error).mean())
    return math.sqrt(square) if square > 1.2 + 6 * math.sqrt(4 / a.mean[..., 0].numel()) else None


def fault(found: Moments, reference: Moments, samples: int) -> str | None:
    """What is wrong with moments over T samples, against those of T forwards in train mode; None if nothing is.

    The mean variance may differ by 6 standard deviations, with the outputs of a row (the last dimension) taken as one.
    """
    if found.mean.shape != reference.mean.shape:
        return f"outputs of shape {tuple(found.mean.shape)} for {tuple(reference.mean.shape)}"
    if not all(bool(one.isfinite().all()) for one in found):
        return "outputs that are not finite"
    if not bool((found.variance > 0).any()):
        return "identical samples"
    rows = found.mean[..., 0].numel()
    ratio = float(found.variance.mean() / reference.variance.mean())
    if abs(ratio - 1) > 6 * math.sqrt(8 / ((samples - 1) * rows)):
        return f"{ratio:.2f} times the variance"
    apart = means_apart(found, reference, samples)
    return f"a mean off by {apart:.1f} standard errors" if apart else None

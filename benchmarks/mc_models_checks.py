"""Whether Monte Carlo inference on a model is right: its samples, its draws, its rows, and what it leaves behind."""

from __future__ import annotations

import copy
import math
import random
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from mc_models_torch import Inputs, Model, called
from monte_carlo_models import Draws, everything_on
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import torchdrop
from torchdrop.monte_carlo import Prediction

SIGMAS = 7.0
"""By how many standard deviations the mean of squared distances may be off."""

EXPONENT = 18.0
"""A distance between two means is exceeded by chance with a probability of at most exp(-18)."""

ROUNDING = 1e-4
"""How far means over the same masks may be apart, as a share of the largest value."""

PASSES = 20
"""The number of forwards whose draws are counted; the largest count is taken, since layers may be skipped."""


def picked(output: Any) -> Tensor:
    """The output of interest, as `mc_predict` takes it: a tensor, or from a mapping its logits or last hidden state."""
    if isinstance(output, Mapping):
        found = [output[name] for name in ("logits", "last_hidden_state") if name in output]
        return found[0] if found else next(iter(output.values()))
    return output


def predicted(case: Model, model: nn.Module, inputs: Any, samples: int, **options: Any) -> Prediction:
    """The prediction of a fresh call, which finds out what is random in the model."""
    return torchdrop.mc_predict(model, inputs, samples=samples, batch_dim=case.batch_dim, **{"seed": 0, **options})


def trained(model: nn.Module) -> nn.Module:
    """A copy in train mode, but for layers with running statistics."""
    return everything_on(copy.deepcopy(model))


def loop_mean(model: nn.Module, inputs: Inputs, samples: int) -> Tensor:
    """What people write: the sum of the outputs of T forwards of a model in train mode, divided by T."""
    with torch.no_grad():
        total = picked(called(model, inputs))
        for _ in range(samples - 1):
            total = total + picked(called(model, inputs))
    return total / samples


def loop_samples(model: nn.Module, inputs: Inputs, samples: int) -> Tensor:
    """The outputs of T forwards of a model in train mode."""
    with torch.no_grad():
        return torch.stack([picked(called(model, inputs)) for _ in range(samples)])


def samples_fault(found: Tensor, reference: Tensor) -> str | None:
    """What is wrong with samples (T, ...), against as many of train mode; None if nothing is.

    Samples are independent, their elements need not be. So the variance is judged by the squared distances of samples
    from their mean, each a single number, and the mean by a bound that counts the dimensions the samples vary in
    (Laurent and Massart, 2000, Lemma 1).
    """
    if found.shape != reference.shape:
        return f"samples of shape {tuple(found.shape)} for {tuple(reference.shape)}"
    if not bool(found.isfinite().all()):
        return "samples that are not finite"
    if not bool((found != found[0]).any()):
        return "identical samples"
    samples, (a, b) = len(found), (_Spread(x) for x in (found, reference))
    ratio = float(a.squares.mean() / b.squares.mean())
    error = math.sqrt(float(a.squares.var() + b.squares.var()) / samples)
    if abs(float(a.squares.mean() - b.squares.mean())) > SIGMAS * error:
        return f"{ratio:.2f} times the variance"
    distance = float((a.mean - b.mean).square().sum()) * samples / (a.variance + b.variance)
    dimensions = (a.variance + b.variance) ** 2 / (a.square_trace + b.square_trace) / 2
    if distance > 1 + 2 * math.sqrt(EXPONENT / dimensions) + 2 * EXPONENT / dimensions:
        return f"a mean off by {math.sqrt(distance):.1f} standard errors"
    return None


class _Spread:
    """Mean and spread of samples (T, ...): with S their covariance, `variance` is tr S and `square_trace` tr S^2."""

    def __init__(self, samples: Tensor) -> None:
        x, count = samples.flatten(1).double(), len(samples)
        self.mean = x.mean(0)
        centered = x - self.mean
        gram = centered @ centered.T
        self.squares = gram.diagonal()
        self.variance = float(self.squares.sum()) / (count - 1)
        self.square_trace = float(gram.square().sum()) / (count - 1) ** 2


def draws(case: Model, model: nn.Module, inputs: Inputs) -> tuple[int, int]:
    """The most random draws of a Monte Carlo pass, and of a forward in train mode, where operators are watched."""
    copied, seen, own, passes = trained(model), [], [], 2 if case.large else PASSES
    with torch.no_grad(), kept_generators():
        for _ in range(passes):
            with Draws() as counted:
                called(copied, inputs)
            seen.append(counted.count)
    with torch.no_grad(), torchdrop.mc_dropout(model, seed=0, batch_dim=case.batch_dim) as report:
        for _ in range(passes):
            called(model, inputs)
            own.append(report.draws)
    return max(own), max(seen)


def rows_apart(case: Model, model: nn.Module, inputs: Inputs) -> float | None:
    """How far means of rows alone and in batches of two are from those of one batch; None where there are no rows."""
    if not case.rows:
        return None
    count = len(tree_flatten(inputs)[0][0])

    def mean(size: int) -> Tensor:
        parts = [tree_map(partial(_some, first=i, count=size), inputs) for i in range(0, count, size)]
        return predicted(case, model, iter(parts), 6, select=lambda batch: batch).mean

    whole = mean(count)
    return max(float((mean(size) - whole).abs().max() / whole.abs().max()) for size in (1, 2))


def _some(x: Tensor, first: int, count: int) -> Tensor:
    return x[first : first + count]


def changes(case: Model, model: nn.Module, inputs: Inputs) -> list[str]:
    """The names of all in the model, and of the generators, that a context and a prediction leave changed."""
    before = _state(model)
    with torch.no_grad(), torchdrop.mc_dropout(model, seed=0, batch_dim=case.batch_dim):
        called(model, inputs), called(model, inputs)
    predicted(case, model, inputs, 6)
    after = _state(model)
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@contextmanager
def kept_generators() -> Iterator[None]:
    """Puts the states of the generators of torch, numpy and Python back."""
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)


def _state(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, with its parameters, buffers, flags and hooks, and the generators' states."""
    found: dict[str, Any] = {
        "Python's generator": random.getstate(),
        "numpy's generator": _facts(np.random.get_state()),
        "torch's generator": _facts(torch.get_rng_state())[1:],
    }
    for name, module in model.named_modules(remove_duplicate=False):
        found |= {f"{name}.{label}".lstrip("."): _facts(value) for label, value in vars(module).items()}
    return found


_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, nn.Module)


def _facts(value: Any, depth: int = 5) -> Any:
    """What is compared: which object it is, and what it holds."""
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return type(value), value
    if isinstance(value, Tensor):
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return id(value), value.dtype, value.shape, value.requires_grad, id(value.grad), content
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, _NAMED) or not depth:
        return id(value)
    if isinstance(value, Mapping):
        return id(value), [(repr(key), _facts(part, depth - 1)) for key, part in value.items()]
    if isinstance(value, tuple):
        return [_facts(part, depth - 1) for part in value]
    if isinstance(value, (list, set, frozenset)):
        return id(value), [_facts(part, depth - 1) for part in value]
    return id(value), _facts(getattr(value, "__dict__", None), depth - 1)


def fault(
    case: Model, model: nn.Module, inputs: Inputs, samples: int, predict: Callable[..., Prediction]
) -> str | None:
    """What is wrong with the samples of a prediction, against those of train mode; None if nothing is."""
    with kept_generators():
        torch.manual_seed(0)
        reference = loop_samples(trained(model), inputs, samples)
    found = predict(case, model, inputs, samples, keep_samples=True).samples
    return "no samples" if found is None else samples_fault(found, reference)

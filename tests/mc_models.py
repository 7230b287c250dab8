"""What the tests of Monte Carlo inference share: counting draws without torchdrop, and what must not change."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import torchdrop
from torchdrop.handlers.masks import MaskSlot, Pass
from torchdrop.monte_carlo.prediction import Prediction
from torchdrop.monte_carlo.report import Report

WARNINGS_OF_TORCH = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
"""Marks against what torch says of its own modules where they take another path in eval mode."""


def call(model: nn.Module, inputs: Any) -> Any:
    """The model of a tensor, a tuple of positional arguments or a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors(output: Any) -> list[Tensor]:
    """What a model returned, as tensors."""
    leaves = list(output.values()) if isinstance(output, Mapping) else tree_flatten(output)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def equal(first: Any, second: Any) -> bool:
    """Whether two outputs are bit for bit the same."""
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


class Draws(TorchDispatchMode):
    """Names the operators that draw: those during which the state of PyTorch's default generator changes.

    Dropout on the CPU is one of them (`bernoulli_`), within attention and recurrent layers too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = torch.default_generator.get_state()
        out = func(*args, **(kwargs or {}))
        if not torch.equal(torch.default_generator.get_state(), before):
            self.operators.append(str(func))
            self.sizes.append(main(out).numel())
        return out


def train_draws(model: nn.Module, inputs: Any) -> list[str]:
    """The operators that draw in a forward in train mode, of a copy."""
    return _trained(model, inputs).operators


def train_sizes(model: nn.Module, inputs: Any) -> list[int]:
    """How many numbers they draw."""
    return _trained(model, inputs).sizes


def _trained(model: nn.Module, inputs: Any) -> Draws:
    trained = copy.deepcopy(model).train()
    with kept_random_states(), torch.no_grad(), Draws() as draws:
        random.seed(0)
        np.random.seed(0)
        call(trained, inputs)
    return draws


@contextmanager
def kept_random_states() -> Iterator[None]:
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


@contextmanager
def served_masks() -> Iterator[list[Pass]]:
    """One entry for each mask, or tensor of random numbers, that Monte Carlo inference serves."""
    made: list[Pass] = []
    key: Callable[..., Tensor] = Pass.key

    def counted(self: Pass, seed: int, own: bool) -> Tensor:
        made.append(self)
        return key(self, seed, own)

    with mock.patch.object(Pass, "key", counted):
        yield made


@contextmanager
def served_units() -> Iterator[list[tuple[int, int]]]:
    """For each mask, or tensor of random numbers, that is served: its seed, and how many numbers are drawn for it."""
    made: list[tuple[int, int]] = []
    shapes: list[list[int]] = []
    key: Callable[..., Tensor] = Pass.key
    shaped: Callable[..., list[int]] = MaskSlot._mask_shape

    def counted(self: Pass, seed: int, own: bool) -> Tensor:
        keys = key(self, seed, own)
        assert len(keys.reshape(-1, 2).unique(dim=0)) == keys.numel() // 2, "rows or samples share a key"
        made.append((seed, keys.numel() // 2 * math.prod(shapes[-1])))
        return keys

    def noted(self: MaskSlot, shape: Any) -> list[int]:
        shapes.append(shaped(self, shape))
        return shapes[-1]

    with mock.patch.object(Pass, "key", counted), mock.patch.object(MaskSlot, "_mask_shape", noted):
        yield made


def state(model: nn.Module) -> dict[str, Any]:
    """Everything in a model that a forward could change, by name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for label, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                found[f"{name}.{label}"] = (id(value), value.detach().clone().numpy().tobytes())
        for label, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, type(None))):
                found[f"{name}:{label}"] = value
            elif "hooks" in label:
                found[f"{name}:{label}"] = list(value)
    return found


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Asserts that the model and the random states of Python, numpy and PyTorch are afterwards as before, bit for bit.

    Hooks too are those of before.
    """
    before, python, numpy, own = state(model), random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    after = state(model)
    assert after.keys() == before.keys(), after.keys() ^ before.keys()
    changed = [name for name in before if after[name] != before[name]]
    assert not changed, changed
    assert random.getstate() == python, "Python's random state"
    for value, was in zip(np.random.get_state(), numpy, strict=True):
        assert np.array_equal(value, was), "numpy's random state"
    assert torch.equal(torch.get_rng_state(), own), "PyTorch's random state"


def check_draws(model: nn.Module, inputs: Any, **options: Any) -> Report:
    """Asserts that a Monte Carlo forward draws as often as one in train mode, and changes nothing.

    Each mask comes from the seed: PyTorch's generator is not used.
    """
    model.eval()
    drawn = train_draws(model, inputs)
    assert drawn, "nothing is random in train mode"
    with unchanged(model), torchdrop.mc_dropout(model, seed=1, **options) as report:
        first = call(model, inputs)
        with served_masks() as served, Draws() as own:
            second = call(model, inputs)
    assert len(served) == len(drawn), (len(served), drawn)
    assert not own.operators, own.operators
    with unchanged(model), torchdrop.mc_dropout(model, seed=1, **options):
        again = call(model, inputs)
    counts = (report.draws, report.expected, sum(source.draws for source in report.active))
    assert counts == (len(drawn),) * 3, (counts, drawn)
    assert not report.inactive, report
    assert report.replayable, report
    assert not equal(first, second), "two samples are equal"
    assert equal(first, again), "a sample is not replayed"
    assert not equal(first, call(model, inputs)), "a sample is equal to the deterministic pass"
    return report


def check_each_source(model: nn.Module, inputs: Any, **options: Any) -> None:
    """Asserts that every module whose sources are active makes a difference, when it alone is chosen."""
    plain = call(model, inputs)
    with torchdrop.mc_dropout(model, seed=1, **options) as report:
        call(model, inputs)
    modules = {source.module for source in report.active}
    assert modules
    for module in modules:
        with torchdrop.mc_dropout(model, seed=2, sources=module, **options) as chosen:
            outputs = [call(model, inputs) for _ in range(8)]
        within = {other for other in modules if other == module or (module and other.startswith(f"{module}."))}
        assert {source.module for source in chosen.active} == within, chosen
        assert any(not equal(output, plain) for output in outputs), f"{module} is silent"
        assert any(not equal(output, outputs[0]) for output in outputs), f"{module} draws the same again"


def rows_of(inputs: Any, first: int, last: int, dim: int = 0) -> Any:
    """Some rows of the inputs."""
    return tree_map(lambda t: t.narrow(dim, first, last - first), inputs)


def check_rows(model: nn.Module, inputs: Any, dim: int = 0, **options: Any) -> Prediction:
    """Asserts that rows have the same Monte Carlo mean alone, in batches of two and in one batch.

    A row at another place has another mean: the comparison could fail.
    """
    count = next(leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)).shape[dim]

    def predict(*bounds: int) -> Prediction:
        parts = [rows_of(inputs, a, b, dim) for a, b in itertools.pairwise(bounds)]
        return torchdrop.mc_predict(
            model,
            iter(parts),
            samples=6,
            seed=3,
            batch_dim=dim,
            select=lambda batch: batch,
            select_output=main,
            **options,
        )

    whole = predict(0, count)
    assert float(whole.std.max()) > 0
    for size in (1, 2):
        bounds = [*range(0, count, size), count]
        assert apart(predict(*bounds).mean, whole.mean) < 1e-4, size
    assert apart(predict(1, count).mean, whole.mean[1:]) > 1e-3
    return whole


def main(output: Any) -> Tensor:
    """The first tensor of what a model returned."""
    return tensors(output)[0]


def apart(value: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((value - reference).detach().abs().max() / reference.detach().abs().max())


class Of(nn.Module):
    """A function of the module itself, for its training flag, and the inputs."""

    def __init__(self, function: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def timm_path(self: nn.Module, x: Tensor) -> Tensor:
    if not self.training:
        return x
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.6)
    return x * mask.div_(0.6)


def torchvision_depth(self: nn.Module, x: Tensor, rows: bool = True) -> Tensor:
    if not self.training:
        return x
    size = [x.shape[0] if rows else 1] + [1] * (x.ndim - 1)
    noise = torch.empty(size, dtype=x.dtype, device=x.device).bernoulli_(0.6)
    return x * noise.div_(0.6)


def huggingface_path(self: nn.Module, x: Tensor) -> Tensor:
    if not self.training:
        return x
    mask = 0.6 + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
    return x.div(0.6) * mask.floor_()


def drop_block(self: nn.Module, x: Tensor) -> Tensor:
    if not self.training:
        return x
    centers = (torch.rand(x.shape[0], 1, 2, 2) < 0.3).to(x)
    return x * (1 - F.max_pool2d(F.pad(centers, [1] * 4), 3, 1, 1))


def layer_drop(self: nn.Module, x: Tensor) -> Tensor:
    for layer in self.layers:
        if not self.training or torch.rand([]) >= 0.5:
            x = layer(x)
    return x


def sdpa(**settings: Any) -> Of:
    def attend(self: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rate = 0.4 if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=rate, **settings)

    return Of(attend)


def images() -> Tensor:
    return torch.randn(5, 6, 4, 4)


def heads(keys: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(5, 4, 7, 8), torch.randn(5, keys, 9, 8), torch.randn(5, keys, 9, 8)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4))
    ).eval()  # fmt: skip


def passes(model: nn.Module, x: Any, count: int = 3, **options: Any) -> list[Tensor]:
    with torchdrop.mc_dropout(model, **options):
        return [call(model, x) for _ in range(count)]


def data() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))

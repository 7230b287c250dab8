"""Devices without float64, as Apple's: what is asked of them is float32 and integers, and thresholds stay exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.family import VARIANTS, built, gradients, inputs
from torchdrop.core import portable
from torchdrop.handlers import masks
from torchdrop.kernels import aten
from torchdrop.kernels import mask_params as params_of_each
from torchdrop.kernels.mask_params import ONE, alpha, inverted, mask_params, params_tensor
from torchdrop.kernels.masking import unpack_params
from torchdrop.layers.standout import _thresholds

DEVICE = torch.device("meta")


class WithoutFloat64(TorchDispatchMode):
    """Meta tensors stand for those of a device that refuses float64. The host reads quarters from it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.full(args[0].shape, 0.25, dtype=kwargs.get("dtype") or args[0].dtype)
        out = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and leaf.is_meta and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype, in {func}")
        return out


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(params_of_each, "_WITHOUT_FLOAT64", {"meta"})
    with WithoutFloat64():
        yield


def test_the_stand_in_refuses() -> None:
    with pytest.raises(TypeError, match="to float64"):
        torch.ones(3, device=DEVICE).double()


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.reads])
def test_no_variant_asks_for_it(name: str) -> None:
    model, x = built(name, DEVICE), inputs(VARIANTS[name], DEVICE)
    y = model(x)
    assert y.is_meta
    assert all(g is None or g.is_meta for g in gradients(model, y))
    assert model.eval()(x).is_meta


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("compact", "mixout")])
def test_none_is_built_with_it_under_a_default_device(name: str) -> None:
    with torch.device("meta"):
        VARIANTS[name].make()


@pytest.mark.parametrize("formula", [inverted, alpha])
@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_laws_of_rates_there_are_computed_on_the_host(formula: Any, shape: tuple[int, ...]) -> None:
    found, exact = params_tensor(torch.empty(shape, device=DEVICE), formula), mask_params(0.25, formula)
    assert (found.device.type, found.dtype) == ("cpu", torch.float64)
    assert torch.equal(found, exact.tensor().expand(*shape, 4))
    threshold, *others = unpack_params(found, DEVICE)
    assert isinstance(threshold, Tensor)
    assert (threshold.device, threshold.dtype) == (DEVICE, torch.int64)
    assert all(isinstance(t, Tensor) and (t.device, t.dtype) == (DEVICE, torch.float32) for t in others)


def test_normal_variates_are_computed_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    key, words = torch.tensor([1, 2]), torch.arange(0, 2**32, 2**28)
    exact = aten.standard_normal((50,), key), masks._normal(words)
    monkeypatch.setattr(params_of_each, "_WITHOUT_FLOAT64", {"cpu"})
    found = aten.standard_normal((50,), key), masks._normal(words)
    for ours, wide in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, wide.to(torch.float32))


def test_thresholds_of_learned_rates_are_those_of_laws() -> None:
    pi = torch.tensor([0.0, 1e-30, 2.0**-32, 0.1, 0.5, 0.9, 1.0 - 2.0**-24, 1.0, torch.nan])
    ours, exact = _thresholds(pi, DEVICE), _thresholds(pi, torch.device("cpu"))
    assert ours.dtype == torch.int64
    assert ours[:-1].tolist() == exact[:-1].tolist() == [mask_params(k).threshold for k in pi[:-1].tolist()]
    assert ours[-1] == ONE  # what is not a number drops nothing, and is seen
    assert _thresholds(pi.to(DEVICE), DEVICE).dtype == torch.int64


def test_graphs_elsewhere_draw_without_it() -> None:
    x = torch.ones(5, device=DEVICE)
    assert portable._words(x, (5,)).dtype == torch.int64
    assert portable._normal(x, (5,)).dtype == torch.float32

"""The fast paths of channel masks, and under modes: which of them have to see the call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import torchdrop
from torchdrop.core.sites import apply
from torchdrop.functional import dropout
from torchdrop.kernels import native
from torchdrop.ops import fast_path

pytestmark = pytest.mark.skipif(native.library is None, reason="the C kernels are not built")


class Seen(TorchFunctionMode):
    """A user's mode, which notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torchdrop.Dropout(0.5), (30, 7)),
        (torchdrop.Dropout2d(0.5), (3, 5, 4, 4)),
        (torchdrop.ReLUDropout(0.5), (30, 7)),
        (lambda x: torchdrop.functional.dropout_add(x, x, 0.5), (30, 7)),
    ],
)
def test_a_default_device_leads_to_the_fast_path_and_other_modes_see_the_call(
    layer: Callable[[Tensor], Tensor], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, drawn = torch.randn(shape, requires_grad=True), []
    monkeypatch.setattr(fast_path._key, "draw", lambda draw=fast_path._key.draw: drawn.append(draw()))

    def gradient() -> Tensor:
        torch.manual_seed(1)
        return torch.autograd.grad(layer(x).square().sum(), x)[0]

    expected = gradient()
    for modes in ([torch.device("cpu")], [torch.device("meta"), torch.device("cpu")]):
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            assert torch.equal(gradient(), expected)
    assert len(drawn) == 3
    for modes in ([Seen()], [Seen(), torch.device("cpu")], [torch.device("cpu"), Seen()]):
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            assert torch.equal(gradient(), expected)
        (seen,) = [mode for mode in modes if isinstance(mode, Seen)]
        assert apply in seen.functions
    assert len(drawn) == 3


@pytest.mark.parametrize(
    ("kind", "shape", "spatial"),
    [
        ("Dropout2d", (5, 4, 6, 6), (2, 3)),
        ("Dropout2d", (2, 3, 1, 1), (2, 3)),
        ("Dropout2d", (4, 30, 40, 40), (2, 3)),
        ("Dropout2d", (3, 2, 0, 5), (2, 3)),
        ("Dropout1d", (3, 4, 9), (2,)),
        ("Dropout1d", (4, 9), (1,)),
        ("Dropout3d", (3, 4, 2, 3, 2), (2, 3, 4)),
        ("Dropout3d", (4, 2, 3, 2), (1, 2, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("twice", [False, True])
def test_the_fast_path_of_channels_gives_what_the_general_one_gives(
    kind: str,
    shape: tuple[int, ...],
    spatial: tuple[int, ...],
    dtype: torch.dtype,
    twice: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, taken = torch.randn(shape).to(dtype).requires_grad_(), []
    record = fast_path._record_channels
    monkeypatch.setattr(fast_path, "_record_channels", lambda *args: taken.append(1) or record(*args))

    def both(shared: tuple[int, ...] | None) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(3)
        y = getattr(torchdrop, kind)(0.3)(x) if shared is None else dropout(x, 0.3, shared_axes=shared)
        (g,) = torch.autograd.grad((y**2).sum(), x, create_graph=twice)
        (h,) = torch.autograd.grad(g.sum(), x) if twice else (g,)
        return y, g, h

    for a, b in zip(both(None), both(spatial), strict=True):
        assert torch.equal(a, b)
    assert bool(taken) == bool(x.numel())
    if len(shape) == 4:
        torch.manual_seed(3)
        assert torch.equal(getattr(torchdrop, kind)(0.3)(x.to(memory_format=torch.channels_last)), both(None)[0])

"""An activation and dropout together: `relu_dropout`, `gelu_dropout` and their modules."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.enumeration import expectation, masks
from tests.seeding import seeded
from tests.strategies import DTYPES
from torchdrop import functional as TF

FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., nn.Module], Callable[[Tensor], Tensor]]] = {
    "relu": (TF.relu_dropout, torchdrop.ReLUDropout, F.relu),
    "gelu": (TF.gelu_dropout, torchdrop.GELUDropout, F.gelu),
    "tanh": (
        lambda *a, **k: TF.gelu_dropout(*a, approximate="tanh", **k),
        lambda *a, **k: torchdrop.GELUDropout(*a, approximate="tanh", **k),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
}
"""The function, the module, and the activation alone."""

every_form = pytest.mark.parametrize("form", FORMS)


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_composition_of_the_parts_under_the_same_seed(
    form: str, dtype: torch.dtype, device: torch.device
) -> None:
    """To the bit, but for a GELU of CUDA's own kernel."""
    function, module, activation = FORMS[form]
    x = torch.randn(50, 33).to(device, dtype).requires_grad_()
    expected = seeded(3, TF.dropout, activation(x), 0.3)
    g = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(expected, x, g)
    for y in (seeded(3, function, x, 0.3), seeded(3, module(0.3), x)):
        for found, right in ((y, expected), (torch.autograd.grad(y, x, g)[0], gradient)):
            if device.type == "cpu" or form == "relu":
                assert torch.equal(found, right)
            else:
                assert torch.equal(found == 0, right == 0)
                torch.testing.assert_close(found, right)


@every_form
def test_expectation_is_the_activation_by_enumeration(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, _, activation = FORMS[form]
    x = torch.randn(4, dtype=torch.float64)
    found = expectation((function(x, 0.4), weight) for _, weight in masks(monkeypatch, (4,), 0.6))
    torch.testing.assert_close(found, activation(x), rtol=1e-12, atol=1e-12)


@every_form
def test_the_gradient_has_forwards_mask(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = FORMS[form][0]
    for kept, _ in masks(monkeypatch, (4,), 0.6):
        x = torch.full((4,), 0.7, dtype=torch.float64, requires_grad=True)
        y = function(x, keep_prob=0.6)
        assert torch.equal(y != 0, kept)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0] != 0, kept)


@every_form
def test_rates_zero_and_one_and_eval_mode(form: str) -> None:
    function, module, activation = FORMS[form]
    x = torch.randn(100)
    assert torch.equal(module(0.5).eval()(x), activation(x))
    assert torch.equal(function(x, 0.5, False), activation(x))
    assert torch.equal(module(0.0)(x), activation(x))
    assert torch.equal(module(1.0)(x), torch.zeros(100))


@every_form
def test_rates_can_be_a_tensor_and_memory_formats_stay(form: str) -> None:
    function, _, activation = FORMS[form]
    x = torch.rand(4, 3, 5, 5).contiguous(memory_format=torch.channels_last) + 0.5
    y = function(x, keep_prob=torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y[:, 0].any()
    assert 0 < (y[:, 1] == 0).sum() < 100
    torch.testing.assert_close(y[:, 2], activation(x[:, 2]))
    other = seeded(1, function, x.contiguous())
    assert torch.equal(seeded(1, function, x) == 0, other == 0)
    torch.testing.assert_close(seeded(1, function, x), other)


@every_form
def test_a_key_is_drawn_at_every_rate_but_not_from_the_default_where_one_is_given(form: str) -> None:
    function, x, after = FORMS[form][0], torch.randn(8), []
    for p in (0.0, 0.5, 1.0):
        seeded(1, function, x, p)
        after.append(torch.get_rng_state())
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[1], after[2])
    first = function(x, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.get_rng_state(), after[2])
    assert torch.equal(first, function(x, generator=torch.Generator().manual_seed(2)))


@every_form
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("default", [None, "cpu"])
def test_one_tensor_is_kept_for_backward_with_a_default_device_too(form: str, p: float, default: str | None) -> None:
    function, x, saved = FORMS[form][0], torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor.dtype, tensor.data_ptr()))
        return tensor

    expected = seeded(1, function, x, p)
    with torch.device(default) if default else contextlib.nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = seeded(1, function, x, p)
        assert torch._C._len_torch_function_stack() == (default is not None)
    assert saved == [(torch.bfloat16, y.data_ptr() if form == "relu" else x.data_ptr())]
    assert torch.equal(y, expected)
    for ours, theirs in zip(*(torch.autograd.grad(out, x, torch.ones_like(x)) for out in (y, expected)), strict=True):
        assert torch.equal(ours, theirs)


@every_form
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_finds_its_mask_again(form: str, use_reentrant: bool, device: torch.device) -> None:
    layer, x = FORMS[form][1](0.5), torch.randn(200, device=device, requires_grad=True)

    def segment(x: Tensor) -> Tensor:
        return torch.tanh(layer(x.sin())).cos()

    plain = seeded(1, segment, x)
    again = seeded(1, checkpoint, segment, x, use_reentrant=use_reentrant)
    assert torch.equal(plain, again)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    again.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


@every_form
def test_frozen_masks_monte_carlo_and_disabled_reach_it(form: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), FORMS[form][1](0.5), nn.Linear(8, 3)), torch.randn(5, 8)
    with torchdrop.frozen_masks(model, seed=1):
        assert torch.equal(model(x), model(x))
    model.eval()
    plain = nn.Sequential(model[0], {"relu": nn.ReLU(), "gelu": nn.GELU(), "tanh": nn.GELU("tanh")}[form])
    separate = nn.Sequential(*plain, torchdrop.Dropout(0.5), model[2]).eval()
    with torchdrop.mc_dropout(model, seed=1) as report:
        first, second = model(x), model(x)
    assert [(source.kind, source.replayable) for source in report.sources] == [("torchdrop", True)]
    assert not torch.equal(first, second)
    runs = [torchdrop.mc_predict(model, data, samples=6, seed=2, keep_samples=True).samples for data in (x, x[:3])]
    assert runs[0] is not None
    assert runs[1] is not None
    torch.testing.assert_close(runs[0][:, :3], runs[1])
    assert torch.equal(model(x), separate(x))
    model.train()
    with torchdrop.disabled(model):
        assert torch.equal(model(x), separate(x))


@every_form
def test_rates_are_set_by_name_and_copies_are_independent(form: str) -> None:
    model = nn.Sequential(FORMS[form][1](0.5))
    twin = copy.deepcopy(model)
    torchdrop.set_keep_prob(model, {"0": 0.9})
    assert (round(model[0].p, 6), twin[0].p) == (0.1, 0.5)
    assert not model.state_dict()
    assert isinstance(model[0], nn.modules.dropout._DropoutNd)


def test_the_repr_says_what_it_is() -> None:
    assert repr(torchdrop.ReLUDropout(0.2)) == "ReLUDropout(p=0.2)"
    assert repr(torchdrop.GELUDropout(0.2)) == "GELUDropout(p=0.2, approximate='none')"


@every_form
def test_vmap_has_its_randomness_modes(form: str) -> None:
    function, x = FORMS[form][0], torch.ones(6, 300)
    different = torch.func.vmap(function, randomness="different")(x)
    same = torch.func.vmap(function, randomness="same")(x)
    assert len({tuple(row.tolist()) for row in different}) == 6
    assert len({tuple(row.tolist()) for row in same}) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TF.relu_dropout(torch.ones(3).long()), RuntimeError, "result type Float can't be cast"),
        (lambda: TF.relu_dropout(3.0), TypeError, "must be Tensor, not float"),
        (lambda: TF.relu_dropout(torch.ones(3), 2.0), ValueError, "has to be between 0 and 1, but got 2.0"),
        (lambda: TF.gelu_dropout(torch.ones(3), approximate="erf"), ValueError, "must be 'none' or 'tanh', got 'erf'"),
        (lambda: TF.relu_dropout(torch.eye(3).to_mkldnn()), TypeError, "takes strided tensors, got the layout"),
        (lambda: TF.gelu_dropout(torch.ones(3), approximate=["tanh"]), ValueError, r"'none' or 'tanh', got \['tanh'\]"),
        (lambda: torchdrop.GELUDropout(approximate=True), ValueError, "must be 'none' or 'tanh', got True"),
        (lambda: torchdrop.ReLUDropout(keep_prob=float("nan")), ValueError, r"keep_prob must be in \[0, 1\], got nan"),
        (lambda: torchdrop.ReLUDropout(0.5, keep_prob=0.5), TypeError, "not both"),
        (lambda: TF.gelu_dropout(torch.ones(3), generator=1), TypeError, "generator must be a torch.Generator"),
    ],
)
def test_wrong_arguments_are_answered_and_nothing_is_drawn(call: Any, error: type[Exception], message: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(torch.get_rng_state(), state)

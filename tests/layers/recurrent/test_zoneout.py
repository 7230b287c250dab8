"""Zoneout of a state: which units are updated, and the expectation in eval mode."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import torchdrop
from tests.seeding import seeded
from tests.statistical import check_rate, draws_for
from tests.strategies import DTYPES
from torchdrop.core import sites
from torchdrop.kernels.mask_params import ONE, mask_params
from torchdrop.layers.recurrent.zoneout import Zoneout, zoneout

NEW = torch.tensor([1.5, -2.0, 0.25, 3.0], dtype=torch.float64)
OLD = torch.tensor([-1.0, 0.5, 7.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1 / 3])
def test_eval_is_the_expectation_of_training_by_enumeration(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    q = mask_params(1 - p).threshold / ONE
    mean = torch.zeros_like(NEW)
    for bits in itertools.product([False, True], repeat=4):
        monkeypatch.setattr(sites, "keep_mask", lambda *_, bits=bits: torch.tensor(bits))
        y = zoneout(NEW, OLD, p)
        assert torch.equal(y, torch.where(torch.tensor(bits), NEW, OLD))  # nothing is scaled
        mean += q ** sum(bits) * (1 - q) ** (4 - sum(bits)) * y
    torch.testing.assert_close(zoneout(NEW, OLD, p, training=False), mean, rtol=1e-14, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.05, 0.7])
def test_units_keep_the_old_state_at_the_zoneout_rate(p: float) -> None:
    n = draws_for(p, 0.01)
    y = zoneout(torch.ones(n), torch.zeros(n), p)
    check_rate(int((y == 0).sum()), n, p, 0.01)


def test_rates_of_zero_and_one() -> None:
    for training in (False, True):
        assert zoneout(NEW, OLD, 0.0, training) is NEW
        assert torch.equal(zoneout(NEW, OLD, 1.0, training), OLD)
        assert torch.equal(zoneout(NEW, OLD, keep_prob=torch.tensor([1.0, 0.0, 1.0, 0.0]), training=training),
                           torch.tensor([1.5, 0.5, 0.25, 2.0], dtype=torch.float64))  # fmt: skip


def test_gradients_go_to_the_state_that_was_taken() -> None:
    new, old = torch.ones(50, requires_grad=True), torch.zeros(50, requires_grad=True)
    y = zoneout(new, old, 0.5)
    by_new, by_old = torch.autograd.grad(y.sum(), (new, old))
    assert torch.equal(by_new, y.detach())
    assert torch.equal(by_old, 1 - y.detach())
    a, b = NEW.clone().requires_grad_(), OLD.clone().requires_grad_()
    for training in (False, True):
        assert torch.autograd.gradcheck(lambda a, b, on=training: seeded(1, zoneout, a, b, 0.3, on), (a, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    new, old = torch.randn(500).to(dtype), torch.randn(500).to(dtype)
    y = zoneout(new, old, 0.3)
    assert y.dtype == dtype
    assert ((y == new) | (y == old)).all()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    k = mask_params(0.7).threshold / ONE
    exact = torch.lerp(old.to(wide), new.to(wide), k).to(dtype)
    assert torch.equal(zoneout(new, old, 0.3, False), exact)
    assert torch.equal(zoneout(new, old, keep_prob=torch.full((500,), 0.7, dtype=torch.float64), training=False), exact)


def test_states_that_are_not_finite_are_chosen_not_multiplied() -> None:
    new, old = torch.full((100,), torch.inf), torch.full((100,), torch.nan)
    y = zoneout(new, old, 0.5)
    assert (y[y.isnan().logical_not()] == torch.inf).all()
    assert 0 < y.isnan().sum() < 100


def test_seeds() -> None:
    new, old = torch.ones(60), torch.zeros(60)
    assert torch.equal(seeded(1, zoneout, new, old), seeded(1, zoneout, new, old))
    first, second = (Zoneout(generator=torch.Generator().manual_seed(4))(new, old) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(zoneout(new, old), zoneout(new, old))
    later = []
    for p in (0.0, 0.5):
        seeded(1, zoneout, new, old, p)
        later.append(torch.rand(()))
    assert later[0] == later[1]


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap(randomness: str) -> None:
    y = torch.func.vmap(zoneout, randomness=randomness)(torch.ones(3, 50), torch.zeros(3, 50))
    assert torch.equal(y[0], y[1]) == (randomness == "same")
    assert torch.equal(torch.func.vmap(lambda a, b: zoneout(a, b, 0.0))(NEW, OLD), NEW)


class Cell(nn.Module):
    """A GRU cell with zoneout, through three steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.zoneout = nn.GRUCell(4, 30), Zoneout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 30)
        for _ in range(3):
            h = self.zoneout(self.cell(x, h), h)
        return h


def test_monte_carlo_in_a_cell_of_ones_own() -> None:
    model, x = Cell().eval(), torch.randn(6, 4)
    with torchdrop.mc_dropout(model, seed=1) as report:
        first = model(x)
        assert len(report.sources) == 3
    with torchdrop.mc_dropout(model, seed=1):
        torch.testing.assert_close(model(x[:2]), first[:2])
    prediction = torchdrop.mc_predict(model, x, samples=16, seed=1, task="regression")
    assert prediction.variance.max() > 0
    with torchdrop.frozen_masks(model.train()):
        assert torch.equal(model(x), model(x))


def test_rates_by_name_and_disabled() -> None:
    model, x = Cell(), torch.randn(6, 4)
    torchdrop.set_keep_prob(model, {"zoneout": 0.95})
    assert model.zoneout.p == 0.05
    assert dict(torchdrop.keep_probs(model)) == {"zoneout": 0.95}
    with torchdrop.disabled(model):
        plain = model(x)
    model.zoneout.p = 0.0
    assert torch.equal(model(x), plain)


def test_copies_and_pickles() -> None:
    layer = Zoneout(keep_prob=0.75)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == "Zoneout(p=0.25)"
        assert other.state_dict() == {}
        assert torch.equal(other.eval()(NEW, OLD), zoneout(NEW, OLD, 0.25, False))


@pytest.mark.slow
def test_compiled_code_has_eager_masks_and_is_not_compiled_again_for_another_rate() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = Zoneout(0.5)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    new, old = torch.ones(70), torch.zeros(70)
    for p in (0.5, 0.2, 0.7):
        layer.p = p
        assert torch.equal(seeded(1, compiled, new, old), seeded(1, layer, new, old))
    assert counter.frame_count == 1
    layer.eval()
    for p in (0.5, 0.2, 0.7):
        layer.p = p
        torch.testing.assert_close(compiled(new, old), layer(new, old))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: zoneout(NEW, OLD[:3]),
            ValueError,
            r"^new and old must agree in shape and dtype, got \(4,\) torch.float64 and \(3,\) torch.float64$",
        ),
        (lambda: Zoneout().eval()(NEW, OLD.float()), ValueError, "new and old must agree .* torch.float32"),
        (lambda: zoneout(NEW, None), TypeError, "^old must be a tensor, got NoneType$"),  # type: ignore[arg-type]
        (lambda: zoneout(NEW, OLD, 1.5), ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
        (lambda: Zoneout(0.1, keep_prob=0.9), TypeError, "give the rate as p or as keep_prob, not both"),
        (lambda: zoneout(NEW.long(), OLD.long()), RuntimeError, "can't be cast to the desired output type Long"),
    ],
)
def test_what_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

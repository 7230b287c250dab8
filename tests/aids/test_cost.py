"""`check_cost_decreases`: right models pass, planted bugs are named by their iterations, everything is put back."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import torchdrop
from tests.mc_models import Of, unchanged
from torchdrop.aids.cost import CostCheck, Descent

pytestmark = pytest.mark.usefixtures("one_thread")

SGD, ADAM = (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5)), (lambda p: torch.optim.Adam(p, lr=1e-3))
EVERY = list(range(1, 21))


class Task:
    """A regression: a model, its cost and a step of training."""

    def __init__(self, model: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer] = SGD) -> None:
        generator = torch.Generator().manual_seed(3)
        self.model = model
        self.x, self.y = torch.randn(40, 4, generator=generator), torch.randn(40, 1, generator=generator)
        self.optimizer = optimizer(model.parameters())
        self.modes: set[bool] = set()

    def cost(self) -> Tensor:
        self.modes.add(self.model.training)
        return (self.model(self.x) - self.y).square().mean()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.cost().backward()
        self.optimizer.step()

    def check(self, **settings: Any) -> CostCheck:
        return torchdrop.check_cost_decreases(self.model, self.cost, self.step, **settings)


def mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), *layers, nn.Linear(16, 1))


def recurrent() -> nn.Module:
    return Of(
        lambda m, x: m.out(m.lstm(x.unsqueeze(1))[0][:, -1]), lstm=nn.LSTM(4, 5, 2, dropout=0.5), out=nn.Linear(5, 1)
    )


def functional(*, training: bool | None = None) -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.out(F.dropout(self.a(x), 0.4, self.training if training is None else training))

    return Of(forward, a=nn.Linear(4, 8), out=nn.Linear(8, 1))


def tied() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(4, 4, bias=False), torchdrop.Dropout(0.2), nn.Linear(4, 4, bias=False), nn.Linear(4, 1)
    )
    model[2].weight = model[0].weight
    return model


def lbfgs(task: Task) -> Callable[[], object]:
    def closure() -> Tensor:
        task.optimizer.zero_grad()
        loss = task.cost()
        loss.backward()
        return loss

    return lambda: task.optimizer.step(closure)  # type: ignore[arg-type]


WITH_DROPOUT: dict[str, Callable[[], nn.Module]] = {
    "torchdrop": lambda: mlp(torchdrop.Dropout(0.5)),
    "torch.nn": lambda: mlp(nn.Dropout(0.5), nn.AlphaDropout(0.1)),
    "gaussian": lambda: mlp(torchdrop.GaussianDropout(0.3)),
    "batch norm": lambda: mlp(nn.BatchNorm1d(16), nn.Dropout(0.5)),
    "in place": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5, inplace=True), nn.Tanh(), nn.Linear(8, 1)),
    "keep_prob is a tensor": lambda: mlp(torchdrop.Dropout(keep_prob=torch.linspace(0.2, 1, 16))),
    "own generator": lambda: mlp(torchdrop.Dropout(0.5, generator=torch.Generator().manual_seed(0))),
    "lstm": recurrent,
    "attribute": lambda: Of(lambda m, x: m.a(F.dropout(x, m.dropout, m.training)), a=nn.Linear(4, 1), dropout=0.3),
    "function": functional,
    "function that ignores training": lambda: functional(training=True),
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(4, 1)
    ),
    "tied": tied,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", WITH_DROPOUT)
@pytest.mark.slow
def test_right_models_pass(name: str, training: bool) -> None:
    task = Task(WITH_DROPOUT[name]().train(training), SGD if training else ADAM)
    with unchanged(task.model):
        result = task.check()
    assert task.modes == {True}
    assert result.off.decreases, result
    assert result.frozen is not None, "the model has dropout"
    assert result.frozen.decreases, result
    assert result.decreases
    assert len(result.off.costs) == len(result.frozen.costs) == 21
    assert result.frozen.costs != result.off.costs


@pytest.mark.parametrize("model", [nn.Linear(4, 1), mlp(), mlp(nn.Dropout(0.0))])
def test_no_dropout(model: nn.Module) -> None:
    result = Task(model).check()
    assert result.decreases
    assert result.frozen is None
    assert "no dropout to turn on" in str(result)


def test_lbfgs() -> None:
    task = Task(mlp(nn.Dropout()), lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4))
    step = lbfgs(task)
    step()
    before = copy.deepcopy(task.optimizer.state_dict())
    with unchanged(task.model):
        result = torchdrop.check_cost_decreases(task.model, task.cost, step, iterations=5)
    assert result.decreases, result
    assert result.frozen is not None
    assert same(task.optimizer.state_dict(), before)


def test_compiled_model() -> None:
    task = Task(mlp(torchdrop.Dropout(0.5)))
    task.model = torch.compile(task.model, backend="eager")  # type: ignore[assignment]
    result = task.check(iterations=3)
    assert result.decreases
    assert result.frozen is not None


def test_costs_are_those_of_training_by_hand() -> None:
    plain, task = Task(mlp(nn.Identity())), Task(mlp(torchdrop.Dropout(0.5)))
    plain.model.load_state_dict(task.model.state_dict())
    result = task.check(iterations=4, seed=7)

    def train(by_hand: Task) -> list[float]:
        costs = [by_hand.cost().item()]
        for _ in range(4):
            by_hand.step()
            costs.append(by_hand.cost().item())
        return costs

    assert result.off.costs == train(plain)
    other = task.check(iterations=4, seed=8)
    with torchdrop.frozen_masks(task.model, 7):
        assert result.frozen is not None
        assert result.frozen.costs == train(task)
    assert other.frozen is not None
    assert other.off == result.off
    assert other.frozen.costs != result.frozen.costs


def test_a_learning_rate_that_is_too_high() -> None:
    result = Task(nn.Linear(4, 1), lambda p: torch.optim.SGD(p, lr=3.0)).check()
    assert result.off.rises == EVERY
    assert not result.decreases
    assert "Lower the learning rate" in str(result)


class WrongSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class WrongWithNoise(torchdrop.Dropout):
    """Right where nothing is dropped: only dropout shows it."""

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return WrongSign.apply(out) if self.p > 0 else out


def test_wrong_sign_in_a_function() -> None:
    result = Task(nn.Sequential(nn.Linear(4, 1), Of(lambda m, x: WrongSign.apply(x)))).check()
    assert result.off.rises == EVERY
    assert "sign" in str(result)


@pytest.mark.parametrize("name", ["torchdrop", "torch.nn", "batch norm", "lstm", "function"])
def test_wrong_sign_in_a_hook(name: str) -> None:
    task = Task(WITH_DROPOUT[name]())
    for parameter in task.model.parameters():
        parameter.register_hook(lambda grad: -grad)
    result = task.check()
    assert result.off.rises == EVERY
    assert result.frozen is not None
    assert result.frozen.rises == EVERY
    assert not result.decreases


def test_a_bug_that_only_dropout_shows() -> None:
    result = Task(nn.Sequential(nn.Linear(4, 1), WrongWithNoise(0.3))).check()
    assert result.off.decreases
    assert result.frozen is not None
    assert result.frozen.rises == EVERY
    assert not result.decreases
    assert "without dropout only" in str(result)


def test_a_bug_that_only_functional_dropout_shows() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out = F.dropout(self.a(x), 0.3, self.training)
        return WrongSign.apply(out) if bool((out == 0).any()) else out

    result = Task(Of(forward, a=nn.Linear(4, 1))).check()
    assert result.off.decreases
    assert not result.decreases


def scripted(costs: list[float], **settings: Any) -> CostCheck:
    """Of costs that come one after another: the first two calls are made before the first step."""
    place = itertools.count(1)
    now = [costs[0]]
    return torchdrop.check_cost_decreases(
        nn.Linear(1, 1), lambda: now[0], lambda: now.__setitem__(0, costs[next(place)]),
        iterations=len(costs) - 1, **settings,
    )  # fmt: skip


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(("costs", "rises"), [
    ([5, 4, 3, 2], []), ([5, 4, 4, 3], [2]), ([5, 6, 4, 4.5], [1, 3]), ([0, 0], [1]), ([-1, -2, -1.5], [2]),
    ([INF, 3, 2], []), ([3, INF, 2], [1]), ([INF, INF], [1]), ([NAN, NAN, 1], [1, 2]), ([3, NAN, 2, 1], [1, 2]),
    ([1, -INF], []),
])  # fmt: skip
def test_iterations_that_are_named(costs: list[float], rises: list[int]) -> None:
    """A plateau is no fall; nor is what cannot be compared."""
    result = scripted(costs)
    assert result.off.rises == rises
    assert result.decreases == (not rises)
    assert result.off.costs == pytest.approx(costs, nan_ok=True)
    for i in rises:
        assert f"{i} ({costs[i - 1]:.6g} -> {costs[i]:.6g})" in str(result)


@pytest.mark.parametrize(("costs", "rises"), [
    ([10, 10.5, 10.9], []), ([10, 11.5], [1]), ([10, 10, 10], []), ([-10, -9.5, -8], [2]), ([0, 0.1], [1]),
    ([0, 0], []), ([INF, 3], []), ([3, INF], [1]), ([3, NAN], [1]),
])  # fmt: skip
def test_tolerance(costs: list[float], rises: list[int]) -> None:
    assert scripted(costs, tolerance=0.1).off.rises == rises


def test_many_rises_are_shortened() -> None:
    line = str(Descent("off", [0.0] * 21, EVERY))
    assert "not at 20 of them" in line
    assert "8 (0 -> 0), ..." in line
    assert "9 (" not in line


@pytest.mark.parametrize("kind", [lambda c: c.item(), lambda c: c.reshape(1), lambda c: np.float32(c.item())])
def test_kinds_of_costs(kind: Callable[[Tensor], Any]) -> None:
    task = Task(mlp(nn.Dropout()))
    result = torchdrop.check_cost_decreases(task.model, lambda: kind(task.cost()), task.step, iterations=3)
    assert result == task.check(iterations=3)


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(0), None, "0.5", (1.0, 2.0)])
def test_other_costs_are_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match="cost must return a number or a tensor with one element, got"):
        torchdrop.check_cost_decreases(nn.Linear(1, 1), lambda: value, lambda: None)


def test_cost_that_differentiates_the_model() -> None:
    """A gradient penalty, or the residual of a differential equation."""
    task = Task(mlp(nn.Dropout(0.2)))
    task.x.requires_grad_()

    def cost() -> Tensor:
        out = task.model(task.x)
        (slope,) = torch.autograd.grad(out.sum(), task.x, create_graph=True)
        return (out - task.y).square().mean() + 0.1 * slope.square().mean()

    def step() -> None:
        task.optimizer.zero_grad()
        cost().backward()
        task.optimizer.step()

    assert torchdrop.check_cost_decreases(task.model, cost, step).decreases


def test_other_data_at_each_call_is_refused() -> None:
    task = Task(mlp(nn.Dropout()))
    batches = itertools.cycle(range(0, 40, 10))

    def cost() -> Tensor:
        at = next(batches)
        return (task.model(task.x[at : at + 10]) - task.y[at : at + 10]).square().mean()

    with unchanged(task.model), pytest.raises(RuntimeError, match="same data each time"):
        torchdrop.check_cost_decreases(task.model, cost, task.step)


def test_other_noise_is_refused() -> None:
    task = Task(nn.Sequential(nn.Linear(4, 1), Of(lambda m, x: x + torch.randn_like(x))))
    with unchanged(task.model), pytest.raises(RuntimeError, match="two calls of cost"):
        task.check()


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else bool(a == b)


def moments(task: Task) -> Any:
    return copy.deepcopy(task.optimizer.state_dict())


class PlantedError(Exception):
    pass


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("fails", [None, 3, 15], ids=["no failure", "off", "frozen"])
@pytest.mark.parametrize("optimizer", [SGD, ADAM, lambda p: torch.optim.RMSprop(p, lr=1e-3)])
@pytest.mark.slow
def test_everything_is_put_back(optimizer: Any, fails: int | None, started: bool) -> None:
    task = Task(mlp(nn.BatchNorm1d(16), nn.Dropout(0.5), torchdrop.Dropout(keep_prob=0.9)), optimizer)
    model = task.model
    model[2].eval()
    scheduler = torch.optim.lr_scheduler.StepLR(task.optimizer, 2)
    if started:
        task.step()
        scheduler.step()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer_state, scheduler_state = moments(task), copy.deepcopy(scheduler.state_dict())
    kinds, rates, calls = [type(m) for m in model], dict(torchdrop.keep_probs(model)), itertools.count(1)

    def step() -> None:
        task.step()
        scheduler.step()
        random.random(), np.random.rand(), torch.rand(1)
        model[3].train(not model[3].training)
        if next(calls) == fails:
            raise PlantedError

    with unchanged(model):
        if fails:
            with pytest.raises(PlantedError):
                torchdrop.check_cost_decreases(model, task.cost, step, iterations=10, restore=[scheduler])
        else:
            torchdrop.check_cost_decreases(model, task.cost, step, iterations=10, restore=[scheduler])
    assert same(moments(task), optimizer_state)
    assert same(scheduler.state_dict(), scheduler_state)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)  # type: ignore[arg-type]
    assert [type(m) for m in model] == kinds
    assert dict(torchdrop.keep_probs(model)) == rates
    assert not _global_optimizer_pre_hooks
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("own", [False, True])
def test_training_goes_on_as_if_nothing_had_been(own: bool) -> None:
    """Whether masks come from PyTorch's generator or from a layer's own."""

    def train(check: bool) -> list[Tensor]:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1) if own else None
        task = Task(mlp(nn.Dropout(0.5), torchdrop.Dropout(0.2, generator=generator)), ADAM)
        task.step()
        if check:
            task.check(iterations=3)
        task.step()
        return [p.detach().clone() for p in task.model.parameters()]

    assert all(map(torch.equal, train(False), train(True)))


@pytest.mark.parametrize("named", [True, False])
def test_a_learning_rate_set_before_the_optimizers_step(named: bool) -> None:
    """As in warm-up by hand. It is part of the optimizer's state, whether or not restore= names the optimizer."""
    task = Task(mlp(nn.Dropout()))
    task.step()

    def step() -> None:
        task.optimizer.param_groups[0]["lr"] *= 0.5
        task.step()

    before = moments(task)
    restore = [task.optimizer] if named else []
    torchdrop.check_cost_decreases(task.model, task.cost, step, iterations=3, restore=restore)
    assert task.optimizer.param_groups[0]["lr"] == 0.01
    assert same(moments(task), before)


def test_several_optimizers_and_those_of_other_models() -> None:
    task, other = Task(mlp(nn.Dropout())), Task(mlp(), ADAM)
    other.step()
    first, last = torch.optim.Adam(task.model[0].parameters()), torch.optim.SGD(task.model[3].parameters(), lr=0.01)
    untouched = [*other.optimizer.state.values()]

    def step() -> None:
        task.model.zero_grad()
        task.cost().backward()
        first.step()
        last.step()

    before = copy.deepcopy((first.state_dict(), last.state_dict()))
    with unchanged(task.model), unchanged(other.model):
        assert torchdrop.check_cost_decreases(task.model, task.cost, step).decreases
    assert same((first.state_dict(), last.state_dict()), before)
    assert all(a is b for a, b in zip(other.optimizer.state.values(), untouched, strict=True))


def test_parameters_of_the_optimizer_outside_the_model() -> None:
    """A loss with parameters of its own: the second run starts where the first did."""
    task = Task(mlp(nn.Dropout(0.0), nn.Dropout(1e-9)))
    scale = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([*task.model.parameters(), scale], lr=0.01)

    def cost() -> Tensor:
        return task.cost() * (-scale).exp() + scale

    def step() -> None:
        optimizer.zero_grad()
        cost().backward()
        optimizer.step()

    result = torchdrop.check_cost_decreases(task.model, cost, step, iterations=3)
    assert result.frozen is not None
    assert result.frozen.costs == pytest.approx(result.off.costs, rel=1e-6)
    assert scale.item() == 0


def test_mode_of_the_model_within() -> None:
    """Modules that were in eval mode on their own stay so, and a model in eval mode is trained in train mode."""
    task = Task(mlp(nn.BatchNorm1d(16), nn.Dropout()))
    task.model[2].eval()
    task.model[2].register_forward_hook(lambda m, *_: task.modes.add(m.training))
    task.check(iterations=1)
    assert task.modes == {True, False}
    assert not task.model[2].training


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"iterations": 0}, ValueError, "iterations must be .* 1, got 0"),
    ({"iterations": -3}, ValueError, "iterations must be .*, got -3"),
    ({"iterations": True}, (TypeError, ValueError), "iterations must be .*True"),
    ({"iterations": 2.0}, TypeError, "iterations must be an integer"),
    ({"iterations": "3"}, TypeError, "iterations must be an integer"),
    ({"tolerance": -0.1}, ValueError, "tolerance must be .*, got -0.1"),
    ({"tolerance": NAN}, ValueError, "tolerance must be .*, got nan"),
    ({"tolerance": None}, TypeError, "tolerance must be"),
    ({"tolerance": "1"}, TypeError, "tolerance must be"),
    ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ({"seed": None}, TypeError, "seed must be an integer"),
    ({"restore": [object()]}, TypeError, "restore must .*object"),
    ({"restore": 3}, TypeError, "restore must .*int"),
    ({"cost": 0.5}, TypeError, "cost must be a function"),
    ({"step": None}, TypeError, "step must be a function"),
    ({"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
])  # fmt: skip
def test_bad_arguments_are_refused_before_anything_runs(settings: dict[str, Any], error: Any, message: str) -> None:
    def step() -> None:
        raise AssertionError("step was called")

    given = {"model": mlp(nn.Dropout()), "cost": lambda: 1.0, "step": step, **settings}
    with pytest.raises(error, match=message):
        torchdrop.check_cost_decreases(**given)

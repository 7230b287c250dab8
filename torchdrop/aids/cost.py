"""`check_cost_decreases`: with the noise off, and again with the masks held still, training must lower the cost."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..configure import disabled, keep_probs, replace
from ..configure.holders import unwrapped
from ..monte_carlo.state import flags, random_state, undisturbed
from ..random import frozen_masks

_SHOWN = 8


@dataclass(frozen=True)
class Descent:
    """The costs of some iterations of training.

    Args:
        name: what was done about dropout meanwhile.
        costs: before the first iteration and after each.
        rises: the iterations, from 1, after which the cost had not fallen.
        problem: why the costs say nothing; "" if they do.
    """

    name: str
    costs: list[float]
    rises: list[int]
    problem: str = ""

    @property
    def decreases(self) -> bool:
        return not self.rises and not self.problem

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        iterations = len(self.costs) - 1
        line = f"{self.name}: {self.costs[0]:.6g} -> {self.costs[-1]:.6g} in {iterations} iterations, "
        if not self.rises:
            return line + "falling at each"
        some = ", ".join(f"{i} ({self.costs[i - 1]:.6g} -> {self.costs[i]:.6g})" for i in self.rises[:_SHOWN]) + (
            ", ..." if len(self.rises) > _SHOWN else ""
        )
        return f"{line}but not at {len(self.rises)} of them: {some}"


@dataclass(frozen=True)
class CostCheck:
    """What `check_cost_decreases` found. Printing it says what to do.

    Args:
        off: with dropout off.
        frozen: with dropout on and the masks frozen; None if the model has no dropout.
    """

    off: Descent
    frozen: Descent | None

    @property
    def decreases(self) -> bool:
        """Whether the cost fell at every iteration of both."""
        return self.off.decreases and (self.frozen is None or self.frozen.decreases)

    def __str__(self) -> str:
        without = "masks frozen: the model has no dropout to turn on"
        lines = [str(self.off), str(self.frozen) if self.frozen else without]
        if not self.off.decreases:
            lines.append(
                "The cost must fall without dropout first. Lower the learning rate; if that does not help, compare the "
                "gradient with finite differences (torch.autograd.gradcheck), its sign to begin with"
            )
        elif self.frozen is not None and self.frozen.rises:
            lines.append(
                "It falls without dropout only: lower the learning rate, or look at what the layers do with noise"
            )
        return "\n".join(lines)


def check_cost_decreases(
    model: nn.Module,
    cost: Callable[[], Tensor | float],
    step: Callable[[], object],
    *,
    iterations: int = 20,
    tolerance: float = 0.0,
    seed: int = 0,
    restore: Sequence[Any] = (),
) -> CostCheck:
    """Trains for some iterations with dropout off, and again with frozen masks, and tells where the cost did not fall.

    With dropout on, the cost is another function at every iteration, and its curve says little about whether training
    works. With keep_prob 1 it must fall at every iteration of gradient descent with a small enough learning rate, and
    with the masks frozen (`frozen_masks`) too. Both runs start from the parameters as they are. Afterwards everything
    is as it was: parameters, gradients, buffers, training flags, rates, random states, and the state of every optimiser
    that made a step.

    Args:
        model: in train or eval mode; it is trained in train mode.
        cost: gives the cost of the model on some fixed data, without arguments: ``lambda: loss(model(x), y)``.
        step: makes one iteration of training on the same data: ``optimizer.zero_grad(); cost().backward();
            optimizer.step()``. With other data at each iteration the cost need not fall.
        iterations: how many.
        tolerance: how much the cost may rise in an iteration, as a fraction of it.
        seed: of the frozen masks.
        restore: further objects with state_dict and load_state_dict to put back, such as a learning-rate scheduler.

    Returns:
        The costs and the iterations at which they did not fall: ``decreases``, ``off.rises``, ``frozen.rises``.

    Raises:
        TypeError: an argument of another type.
        ValueError: fewer than one iteration, or a negative tolerance.
        RuntimeError: with dropout off two calls of `cost` differ, so it depends on more than the parameters.

    References:
        Andrew Ng, "Improving Deep Neural Networks", Coursera 2017, week 1, "Understanding Dropout": to turn dropout off
        and see the cost fall before turning it on.

    Example:
        >>> import torch, torchdrop
        >>> _ = torch.manual_seed(0)
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), torchdrop.Dropout(), nn.Linear(16, 1))
        >>> x, y = torch.randn(50, 4), torch.randn(50, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> def cost():
        ...     return (model(x) - y).square().mean()
        >>> def step():
        ...     optimizer.zero_grad()
        ...     cost().backward()
        ...     optimizer.step()
        >>> torchdrop.check_cost_decreases(model, cost, step).decreases
        True
    """
    original = unwrapped(model)
    for name, value in (("cost", cost), ("step", step)):
        if not callable(value):
            raise TypeError(f"{name} must be a function without arguments, got {type(value).__name__}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1, got {iterations!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance!r}")

    with _kept(original, restore), disabled(model):
        off = _descend("dropout off", cost, step, iterations, tolerance)
    if off.problem:
        raise RuntimeError(off.problem)
    if not any(_drops(k) for k in keep_probs(model).values()):
        return CostCheck(off, None)
    with _kept(original, restore), _replaced(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "frozen_masks: no mask was drawn", UserWarning)
        with frozen_masks(model, seed):
            frozen = _descend("masks frozen", cost, step, iterations, tolerance)
    return CostCheck(off, frozen)


def _drops(keep_prob: Any) -> bool:
    return bool((keep_prob < 1).any()) if isinstance(keep_prob, Tensor) else keep_prob < 1


def _descend(
    name: str, cost: Callable[[], Any], step: Callable[[], object], iterations: int, tolerance: float
) -> Descent:
    costs = [_number(cost)]
    if _number(cost) != costs[0] and not math.isnan(costs[0]):
        return Descent(
            name,
            costs,
            [],
            f"two calls of cost() differ with {name}: it must use the same data each time, and what else is "
            "random in it "
            "(augmentation, functional dropout) has to be off",
        )
    rises = []
    for iteration in range(1, iterations + 1):
        step()
        costs.append(_number(cost))
        before, after = costs[-2:]
        if not after < before + tolerance * abs(before):
            rises.append(iteration)
    return Descent(name, costs, rises)


def _number(cost: Callable[[], Any]) -> float:
    with torch.no_grad():
        value = cost()
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"cost must return a number or a tensor with one element, got shape {tuple(value.shape)}")
    return float(value)


@contextmanager
def _replaced(model: nn.Module) -> Iterator[None]:
    """torchdrop's layers in the place of torch.nn's, whose masks cannot be frozen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "replace: ", UserWarning)
        swap = replace(model)
    try:
        yield
    finally:
        if swap.done:
            swap.undo()


@contextmanager
def _kept(model: nn.Module, others: Sequence[Any]) -> Iterator[None]:
    """Puts back all that training changes. Train mode within, unless the model is in it already."""
    parameters = [(p, p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    states = [(other, copy.deepcopy(other.state_dict())) for other in others]
    seen: dict[Optimizer, Any] = {}

    def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in seen:
            seen[optimizer] = copy.deepcopy(optimizer.state_dict())

    with ExitStack() as stack:
        stack.enter_context(random_state())
        stack.enter_context(undisturbed(model.modules()))
        if not model.training:
            stack.enter_context(flags(model, lambda _: True))
        hook = register_optimizer_step_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()
            with torch.no_grad():
                for parameter, value, grad in parameters:
                    parameter.copy_(value)
                    parameter.grad = grad
            for stateful, state in [*states, *seen.items()]:
                stateful.load_state_dict(state)

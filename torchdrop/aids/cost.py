"""`check_cost_decreases`: with the noise off, and again with fixed masks, training must lower the cost."""

from __future__ import annotations

import copy
import gc
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ..configure import disabled, keep_probs
from ..core.checks import unwrapped
from ..core.rate import Probability, Rated
from ..handlers.freeze import frozen_forwards
from ..monte_carlo.activate import check_seed
from ..monte_carlo.state import flags, own_generators, random_state, undisturbed

_SHOWN = 8


@dataclass(frozen=True)
class Descent:
    """The costs of some iterations of training.

    Args:
        name: the state of dropout during them.
        costs: the cost before the first iteration and after each.
        rises: the iterations, from 1, after which the cost had not fallen.
        problem: the reason why the costs show nothing; "" if they do.
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
    """The result of `check_cost_decreases`. It prints as text that says what to do.

    Args:
        off: the iterations with dropout off.
        frozen: those with dropout on and the masks frozen; None if the model has no dropout.
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
    """Trains for some iterations with dropout off, and again with frozen masks, and says where the cost did not fall.

    With dropout on, the cost is another function at every iteration, and its curve hardly shows whether training works.
    With keep_prob 1 it must fall at every iteration of gradient descent with a small enough learning rate. So it must
    with masks frozen as by `frozen_masks`, including those of functional dropout and torch.nn's layers. Both runs start
    from the parameters as they are. Afterwards everything is as it was: parameters, gradients, buffers, training flags,
    rates, random states, and the state of every optimizer of the parameters.

    Args:
        model: in train or eval mode; it is trained in train mode.
        cost: returns the cost of the model on some fixed data, without arguments: ``lambda: loss(model(x), y)``.
        step: makes one iteration of training on the same data: ``optimizer.zero_grad(); cost().backward();
            optimizer.step()``. With other data at each iteration the cost need not fall.
        iterations: the number of iterations.
        tolerance: the largest rise of the cost in an iteration, as a fraction of it.
        seed: the seed of the frozen masks.
        restore: further objects with state_dict and load_state_dict to restore, such as a learning-rate scheduler.

    Returns:
        The costs and the iterations at which they did not fall: ``decreases``, ``off.rises``, ``frozen.rises``.

    Raises:
        TypeError: an argument of another type.
        ValueError: fewer than one iteration, or a negative tolerance.
        RuntimeError: with dropout off, two calls of `cost` differ, so it depends on more than the parameters.

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
    _check_arguments(cost, step, iterations, tolerance, seed, restore)
    with _restored(original, restore), disabled(model):
        off = _descend("dropout off", cost, step, iterations, tolerance)
    if off.problem:
        raise RuntimeError(off.problem)
    with _restored(original, restore), _without_generators(original):
        first, second = (_frozen_cost(model, cost, seed + i) for i in range(2))
        if _equal(first, second) and not any(_drops(k) for k in keep_probs(model).values()):
            return CostCheck(off, None)
        with frozen_forwards(model, seed):
            frozen = _descend("masks frozen", cost, step, iterations, tolerance)
    return CostCheck(off, frozen)


def _check_arguments(cost: Any, step: Any, iterations: Any, tolerance: Any, seed: Any, restore: Any) -> None:
    for name, value in (("cost", cost), ("step", step)):
        if not callable(value):
            raise TypeError(f"{name} must be a function without arguments, got {type(value).__name__}")
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations must be an integer of at least 1, got {iterations!r}")
    if iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1, got {iterations}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real):
        raise TypeError(f"tolerance must be a number of at least 0, got {tolerance!r}")
    if not tolerance >= 0:  # type: ignore[operator]
        raise ValueError(f"tolerance must be a number of at least 0, got {tolerance}")
    check_seed(seed)
    if not isinstance(restore, Sequence):
        raise TypeError(f"restore must be a list of objects with a state_dict, got {type(restore).__name__}")
    for stateful in restore:
        if not (hasattr(stateful, "state_dict") and hasattr(stateful, "load_state_dict")):
            raise TypeError(f"restore must hold objects with a state_dict, got {type(stateful).__name__}")


def _drops(keep_prob: Probability) -> bool:
    return bool((keep_prob < 1).any()) if isinstance(keep_prob, Tensor) else keep_prob < 1


def _equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _frozen_cost(model: nn.Module, cost: Callable[[], Any], seed: int) -> float:
    with frozen_forwards(model, seed):
        return _cost_as_number(cost)


def _descend(
    name: str, cost: Callable[[], Any], step: Callable[[], object], iterations: int, tolerance: float
) -> Descent:
    costs = [_cost_as_number(cost)]
    if not _equal(_cost_as_number(cost), costs[0]):
        problem = (
            f"two calls of cost() differ with {name}: it must use the same data each time, and what else is random in "
            "it, such as augmentation, has to be off"
        )
        return Descent(name, costs, [], problem)
    rises = []
    for iteration in range(1, iterations + 1):
        step()
        costs.append(_cost_as_number(cost))
        before, after = costs[-2:]
        if not (after < before or (tolerance > 0 and after <= before + tolerance * abs(before))):
            rises.append(iteration)
    return Descent(name, costs, rises)


def _cost_as_number(cost: Callable[[], Any]) -> float:
    value = cost()  # with gradients: the cost may compute some of its own
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, numbers.Real):
        return float(value)
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"cost must return a number or a tensor with one element, got {got}")


@contextmanager
def _without_generators(model: nn.Module) -> Iterator[None]:
    """Within the context, layers with a generator of their own draw from PyTorch's, whose state is frozen."""
    own = [(module, module.generator) for module in model.modules() if isinstance(module, Rated)]
    try:
        for module, _ in own:
            module.generator = None
        yield
    finally:
        for module, generator in own:
            module.generator = generator


def _optimizers_of(parameters: Iterable[Tensor]) -> list[Optimizer]:
    """Finds the optimizers that train any of the parameters, among all that exist: `step` has them, but does not show
    them."""
    trained = {id(parameter) for parameter in parameters}
    # By type: to ask other objects for their class may run code of theirs.
    every = [found for found in gc.get_objects() if issubclass(type(found), Optimizer)]
    groups = {id(found): getattr(found, "param_groups", ()) for found in every}
    return [o for o in every if any(id(p) in trained for group in groups[id(o)] for p in group["params"])]


@contextmanager
def _restored(model: nn.Module, others: Sequence[Any]) -> Iterator[None]:
    """Restores at the end all that training changes. Within the context, the model is in train mode."""
    optimizers = _optimizers_of(model.parameters())
    every = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    tensors = {id(p): p for p in [*model.parameters(), *every]}.values()
    parameters = [(p, p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in tensors]
    stateful = {id(one): one for one in [*others, *optimizers]}.values()
    states = [(one, copy.deepcopy(one.state_dict())) for one in stateful]

    with ExitStack() as stack:
        stack.enter_context(random_state())
        stack.enter_context(own_generators(model))
        stack.enter_context(undisturbed(model.modules()))
        if not model.training:
            stack.enter_context(flags(model, lambda _: True))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value, grad in parameters:
                    parameter.copy_(value)
                    parameter.grad = grad
            for one, state in states:
                one.load_state_dict(state)

"""Training many models at once: parameters and buffers are stacked, and the models' dimension is mapped over.

A step costs as many calls of operations for all models as it would for one. The cost that vmap and autograd add to each
call is paid once: the step is traced to a graph of plain operations, and the graph is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from ..configure.rate_sites import rate_sites
from ..core.rate import Probability, Rate, Rated
from ..kernels.mask_params import params_tensor
from .alone import with_rates
from .graph import lean
from .training import Fold, Masks, Training, first_stream

ELEMENTWISE = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
)  # fmt: skip
"""The optimizers of torch.optim that update each element by itself: on stacked parameters they do the same as on those
of each model."""

_STEPS = 32
"""The number of steps after which values that would soon be denormal are dropped."""

Named = dict[str, Tensor]
Gradients = Callable[[list[Tensor], Named, Tensor, Tensor, Tensor], tuple[Tensor, Sequence[Tensor | None]]]


class NotStackableError(Exception):
    """The reason why the models cannot be trained at once."""


@dataclass(frozen=True)
class Job:
    """One model of the search: its fold, and its rates in the order of `rate_sites`."""

    fold: Fold
    rates: Sequence[Probability]


class Stack:
    """Models that are trained at once.

    Args:
        jobs: the models; their folds have equal numbers of steps in an epoch.
        training: the settings of the training.

    Attributes:
        finite: for each model, whether its loss was finite in every step so far.

    Raises:
        NotStackableError, or an error of torch.func: they cannot be trained at once.
    """

    def __init__(self, jobs: Sequence[Job], training: Training) -> None:
        _check_rates(jobs)
        self._jobs, self._training = jobs, training
        self._model = with_rates(jobs[0].fold.model, jobs[0].rates)
        self._layers = [h.module for h in rate_sites(self._model) if isinstance(h.module, Rated)]
        self._rates = _stacked_rates(self._model, jobs)
        self._masks = Masks(training.seed)
        models = [job.fold.model for job in jobs]
        parameters = _stacked(dict(model.named_parameters()) for model in models)
        self._buffers = _stacked(dict(model.named_buffers()) for model in models)
        self._names = [name for name, p in self._model.named_parameters() if p.requires_grad]
        self._frozen = {name: value for name, value in parameters.items() if name not in self._names}
        self._values = [parameters[name].requires_grad_() for name in self._names]
        self._orders = [list(range(value.dim())) for value in self._values]
        device = training.inputs.device
        self._streams = torch.tensor([first_stream(job.fold) for job in jobs], device=device)
        self.finite: Tensor = torch.ones(len(jobs), dtype=torch.bool, device=device)
        first, *others = islice(self._batches(), 2)
        self._arrange(first)
        self._step = self._traced(first, [*others, first][0])
        self._optimizer = training.optimizer(self._values)
        _check_optimizer(self._optimizer)

    def train(self, after_epoch: Callable[[], None]) -> None:
        """Trains for all epochs."""
        steps = self._training.steps(self._jobs[0].fold)
        for number, rows in enumerate(self._batches(), 1):
            losses, gradients = self._run(self._step, rows, self._buffers)
            for value, gradient in zip(self._values, gradients, strict=True):
                value.grad = None if gradient is None else gradient.contiguous()
            del gradients, gradient  # their memory serves the next step
            self._optimizer.step()
            for value in self._values:
                value.grad = None
            if number % _STEPS == 0:
                _drop_denormals(self._optimizer)
            self.finite &= losses.isfinite()
            self._streams += 1
            if number % steps == 0:
                after_epoch()

    def models(self) -> Iterator[nn.Module]:
        """Yields each model by itself."""
        own = {**self._named(self._values), **self._frozen, **self._buffers}
        for index, job in enumerate(self._jobs):
            model = with_rates(job.fold.model, job.rates)
            with torch.no_grad():
                for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                    tensor.copy_(own[name][index])
            yield model

    def _batches(self) -> Iterator[Tensor]:
        """Yields the rows of every model in each step, (models, batch size)."""
        folds = {job.fold.number: job.fold for job in self._jobs}
        own = [list(folds).index(job.fold.number) for job in self._jobs]
        for orders in zip(*(self._training.batches(fold) for fold in folds.values()), strict=True):
            yield from torch.stack(orders)[own].unbind(1)

    def _run(self, step: Gradients, rows: Tensor, buffers: Named) -> tuple[Tensor, Sequence[Tensor | None]]:
        with torch.set_grad_enabled(step == self._gradients):
            return step(*self._arguments(rows, buffers))

    def _arguments(self, rows: Tensor, buffers: Named) -> tuple[list[Tensor], Named, Tensor, Tensor, Tensor]:
        return self._values, buffers, self._training.inputs[rows], self._training.targets[rows], self._streams

    def _gradients(
        self, values: list[Tensor], buffers: Named, x: Tensor, y: Tensor, streams: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Returns every model's loss, and the gradients of their sum, which are each model's own."""
        losses = vmap(self._loss)(self._named(values), self._frozen, buffers, self._rates, x, y, streams)
        return losses.detach(), torch.autograd.grad(losses.sum(), values, allow_unused=True)

    def _loss(
        self, own: Named, frozen: Named, buffers: Named, rates: list[list[Tensor]], x: Tensor, y: Tensor, stream: Tensor
    ) -> Tensor:
        for layer, (keep, params) in zip(self._layers, rates, strict=True):
            # Values that a layer derives from its rate are given to it, so that not every step computes them.
            layer.rate = Rate(keep, 1.0 - keep, layer._formula, params)
        with self._masks.at(stream):
            output = functional_call(self._model, {**own, **frozen, **buffers}, (x,))
        return self._training.loss(output, y)

    def _named(self, values: Sequence[Tensor]) -> Named:
        """Returns the parameters in their own order of dimensions."""
        return {
            name: value.permute([order.index(dim) for dim in range(value.dim())])
            for name, value, order in zip(self._names, values, self._orders, strict=True)
        }

    def _arrange(self, rows: Tensor) -> None:
        """Lays out the parameters in memory as their gradients are, so that no gradient has to be copied."""
        _, gradients = self._run(self._gradients, rows, _copied(self._buffers))
        self._orders = [
            _outermost_first(value if gradient is None else gradient)
            for value, gradient in zip(self._values, gradients, strict=True)
        ]
        self._values = [
            value.detach().permute(order).contiguous().requires_grad_()
            for value, order in zip(self._values, self._orders, strict=True)
        ]

    def _traced(self, first: Tensor, second: Tensor) -> Gradients:
        """Returns `_gradients` as a graph, or itself if a graph cannot be made or computes something else.

        Raises:
            NotStackableError: a forward changes the model's behavior in the next one.
        """

        def plain(values: list[Tensor], buffers: Named, x: Tensor, y: Tensor, streams: Tensor) -> Any:
            return self._gradients(values, buffers, x, y, streams)  # tracing needs a function without self

        before = _attributes(self._model)
        expected = self._found(self._gradients, second)
        after = _attributes(self._model)
        changed = [".".join(filter(None, place)) for place in after if before.get(place) != after[place]]
        if changed:
            raise NotStackableError(f"the forward changes an attribute of the model, {changed[0]!r}")
        try:
            graph: Gradients = lean(make_fx(plain)(*self._arguments(first, _copied(self._buffers))))
            found = self._found(graph, second)
        except Exception:
            return self._gradients
        same = all(torch.allclose(a, b, 1e-3, 1e-5, equal_nan=True) for a, b in zip(found, expected, strict=True))
        return graph if same else self._gradients

    def _found(self, step: Gradients, rows: Tensor) -> list[Tensor]:
        """Returns a step's results and the buffers after it. The step works on copies of the buffers."""
        buffers = _copied(self._buffers)
        losses, gradients = self._run(step, rows, buffers)
        return [losses, *(g for g in gradients if g is not None), *buffers.values()]


def _stacked(models: Iterable[Mapping[str, Tensor]]) -> Named:
    states = list(models)
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


def _outermost_first(tensor: Tensor) -> list[int]:
    """Returns a tensor's dimensions in the order of its memory."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _copied(tensors: Named) -> Named:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Returns the plain values that modules hold: a forward that changes them is not the same in every step."""
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, (bool, int, float, str))
    }


def _check_rates(jobs: Sequence[Job]) -> None:
    for at, site in enumerate(rate_sites(jobs[0].fold.model)):
        rates = [job.rates[at] for job in jobs]
        if not isinstance(site.module, Rated):
            if any(rate != rates[0] for rate in rates):
                raise NotStackableError(f"settings differ in a rate that is no layer, {site.name!r} ({site.kind})")
        elif any(isinstance(rate, Tensor) and rate.dim() for rate in rates):
            raise NotStackableError(f"the keep_prob of {site.name!r} is a tensor with more than one value")


def _stacked_rates(model: nn.Module, jobs: Sequence[Job]) -> list[list[Tensor]]:
    """Returns, for each layer of torchdrop, the keep_prob and the parameters of every model."""
    result = []
    for at, site in enumerate(rate_sites(model)):
        if isinstance(site.module, Rated):
            keep = torch.tensor([float(job.rates[at]) for job in jobs], dtype=torch.float64)
            result.append([keep, params_tensor(keep, site.module._formula)])
    return result


def _drop_denormals(optimizer: torch.optim.Optimizer) -> None:
    """Sets momenta that have had no gradient for long to 0, before they become denormal and slow.

    Units that no longer fire have such momenta. They are some 2**40 times too small to move a parameter by a rounding.
    """
    for state in optimizer.state.values():
        for name in ("exp_avg", "momentum_buffer"):
            momentum = state.get(name)
            if isinstance(momentum, Tensor) and momentum.is_floating_point():
                momentum.copy_(F.hardshrink(momentum, 2.0**40 * torch.finfo(momentum.dtype).smallest_normal))


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.") or kind.__name__ not in ELEMENTWISE:
        raise NotStackableError(f"{kind.__name__} is not known to update each element of a parameter by itself")

"""Training one model after another: for models that cannot be vectorized, and as a reference for the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..configure.rate_sites import rate_sites
from ..core.rate import Probability
from .training import Fold, Masks, Training, first_stream, mixed


def with_rates(model: nn.Module, rates: Sequence[Probability]) -> nn.Module:
    """Returns a copy of the model with these rates, in train mode."""
    model = copy.deepcopy(model).train()
    for site, rate in zip(rate_sites(model), rates, strict=True):
        site.set(rate)
    return model


def train_alone(
    fold: Fold, rates: Sequence[Probability], training: Training, after_epoch: Callable[[], None]
) -> tuple[nn.Module, bool]:
    """Returns the trained model of one fold and setting, and whether its loss was finite throughout."""
    model = with_rates(fold.model, rates)
    torch.manual_seed(mixed(training.seed, "other", fold.number))
    parameters: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
    optimizer = training.optimizer(parameters)
    masks = Masks(training.seed)
    stream = torch.tensor(first_stream(fold), device=training.inputs.device)
    finite = torch.ones((), dtype=torch.bool, device=training.inputs.device)
    for epoch in training.batches(fold):
        for rows in epoch:
            with masks.at(stream):
                output = model(training.inputs[rows])
            loss = training.loss(output, training.targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            finite &= loss.detach().isfinite()
            stream += 1
        after_epoch()
    return model, bool(finite)

"""What targeted dropout refuses, with which words, and that nothing is changed then."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from torchdrop.layers.variational.sparsity import sparsity
from torchdrop.layers.weights.targeted import (
    TargetedDropout,
    apply_targeted_dropout,
    prune_targeted_dropout,
    remove_targeted_dropout,
    targeted_dropout,
)

SMALL = torch.tensor([[0.1, -3.0, 0.2, 4.0], [5.0, -0.6, 7.0, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TargetedDropout(0.5, 1.5), ValueError, r"target_fraction must be in \[0, 1\], got 1.5"),
        (lambda: TargetedDropout(0.5, math.nan), ValueError, r"target_fraction must be in \[0, 1\], got nan"),
        (lambda: TargetedDropout(0.5, "x"), TypeError, "target_fraction must be a number, got str"),
        (lambda: targeted_dropout(SMALL, target_fraction=-1), ValueError, r"in \[0, 1\], got -1"),
        (lambda: TargetedDropout(2.0), ValueError, "dropout probability has to be between 0 and 1, but got 2.0"),
        (lambda: TargetedDropout(1.0, 1.0), ValueError, "target_fraction 1 and p 1 would drop every weight"),
        (lambda: targeted_dropout(SMALL, 1.0, target_fraction=1), ValueError, "would drop every weight"),
        (lambda: TargetedDropout(0.5, 1.0, pruned=True), ValueError, "target_fraction 1 would prune every weight"),
        (lambda: targeted_dropout(torch.ones(3)), ValueError, r"output units and at least one more, .* \(3,\)"),
        (lambda: targeted_dropout(SMALL, dim=2), ValueError, r"in \[-2, 2\) for a weight of shape \(2, 4\), got 2"),
        (lambda: TargetedDropout(dim=0.5), TypeError, "dim must be an integer, got float"),
        (lambda: TargetedDropout(units="no"), TypeError, "units must be True or False, got 'no'"),
        (lambda: targeted_dropout(SMALL, pruned=None), TypeError, "pruned must be True or False, got None"),
        (lambda: targeted_dropout([1.0]), TypeError, "weight must be a tensor, got list"),
        (lambda: targeted_dropout(SMALL, dim=0.5), TypeError, "dim must be an integer, got float"),
        (lambda: targeted_dropout(SMALL.long()), RuntimeError, "can't be cast to the desired output type Long"),
        (lambda: targeted_dropout(SMALL, keep_prob=torch.ones(3)), ValueError, "does not broadcast"),
        (lambda: apply_targeted_dropout(nn.BatchNorm1d(3)), ValueError, "at least one more"),
        (lambda: apply_targeted_dropout(nn.Linear(3, 3), "w"), ValueError, "'w' names no parameter of the Linear"),
        (lambda: remove_targeted_dropout(nn.Linear(3, 3)), ValueError, "names no parameter under TargetedDropout"),
        (lambda: prune_targeted_dropout(nn.Linear(3, 3)), ValueError, "names no parameter under TargetedDropout"),
        (lambda: prune_targeted_dropout(3), TypeError, "module must be a torch.nn.Module, got int"),  # type: ignore
    ],
)
def test_what_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("*weight", {}, r"at least one more, got the shape \(4,\), for '1.weight'$"),
        ("?.bias", {}, r"at least one more, got the shape \(4,\), for '0.bias'$"),
        (["2.weight"], {"dim": 2}, r"^dim must be in \[-2, 2\) for a weight of shape \(2, 4\), got 2, for '2.weight'$"),
        (
            "*weight",
            {"keep_prob": torch.full((4, 1), 0.5), "layers": nn.Linear},
            r"\(4, 1\) does not broadcast against the mask's shape \(2, 4\), for '2.weight'$",
        ),
        (
            "0.weight",
            {"keep_prob": torch.full((4, 3), 0.5), "units": True},
            r"\(4, 3\) does not broadcast against the mask's shape \(4, 1\), for '0.weight'$",
        ),
    ],
)
def test_a_refused_parameter_of_a_model_is_named(names: Any, options: dict[str, Any], message: str) -> None:
    model = network()
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        apply_targeted_dropout(model, names, **options)
    assert set(model.state_dict()) == keys


def test_what_cannot_be_pruned_is_named_and_nothing_is_pruned() -> None:
    model = apply_targeted_dropout(network(), ["0.weight", "2.weight"])
    targeted = model[2].parametrizations.weight[0]
    targeted.target_fraction = 1.0
    with pytest.raises(ValueError, match=r"would prune every weight: .*, for '2\.weight'$"):
        prune_targeted_dropout(model)
    targeted.target_fraction = 0.5
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"^2\.weight has other parametrizations: remove them first$"):
        prune_targeted_dropout(model)
    assert sparsity(model).zeros == 0


def test_refusals_change_nothing() -> None:
    layer = apply_targeted_dropout(nn.Linear(4, 4), p=0.5, target_fraction=1.0)
    targeted = layer.parametrizations.weight[0]
    with pytest.raises(ValueError, match="is under TargetedDropout already"):
        apply_targeted_dropout(layer)
    with pytest.raises(ValueError, match="would drop every weight"):
        targeted.p = 1.0
    with pytest.raises(ValueError, match="would prune every weight"):
        targeted.pruned = True
    with pytest.raises(ValueError, match="would prune every weight"):
        prune_targeted_dropout(layer)
    assert (targeted.p, targeted.target_fraction, targeted.pruned, len(layer.parametrizations.weight)) == (
        0.5, 1.0, False, 1,
    )  # fmt: skip
    targeted.target_fraction = 0.5
    targeted.p = 1.0
    with pytest.raises(ValueError, match="would drop every weight"):
        targeted.target_fraction = 1.0
    assert targeted.target_fraction == 0.5
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(ValueError, match="has other parametrizations: remove them first"):
        prune_targeted_dropout(layer)

"""Masks under fixed seeds, as recorded in pinned_masks.json: no change of the code changes them unnoticed.

`python -m tests.test_pinned_masks` records them anew, for a change that is meant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.family import VARIANTS, built, inputs
from tests.seeding import seeded
from torchdrop import functional as dropouts

PINNED = Path(__file__).with_name("pinned_masks.json")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: dropouts.dropout(x, 0.3),
    "dropout, shared axes": lambda x: dropouts.dropout(x, 0.3, shared_axes=1),
    "dropout, a rate for each column": lambda x: dropouts.dropout(x, keep_prob=torch.linspace(0.0, 1.0, x.shape[-1])),
    "dropout, one key for all elements": lambda x: dropouts.dropout(x.flatten(), 0.3),
    "alpha_dropout": lambda x: dropouts.alpha_dropout(x, 0.3, training=True),
    "dropout2d": lambda x: dropouts.dropout2d(x, 0.3),
    "feature_alpha_dropout": lambda x: dropouts.feature_alpha_dropout(x, 0.3, training=True),
    "drop_path": lambda x: dropouts.drop_path(x, 0.3, training=True),
    "drop_block2d": lambda x: dropouts.drop_block2d(x, 0.3, 3),
    "relu_dropout": lambda x: dropouts.relu_dropout(x, 0.3),
    "dropout_add": lambda x: dropouts.dropout_add(x, torch.zeros_like(x), 0.3),
    "locked_dropout": lambda x: dropouts.locked_dropout(x.flatten(2), 0.3),
    "drop_head": lambda x: dropouts.drop_head(x, 0.3, dim=1),
    "patch_dropout": lambda x: dropouts.patch_dropout(x.flatten(2), 0.3),
}
"""Functions of ones of shape (5, 7, 20, 31), whose zeros are the mask."""


def strided(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


class Functional(nn.Module):
    """Dropout that is called as PyTorch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.linear(x), 0.3, self.training)
        x = torch.dropout(x, 0.2, self.training)
        x = F.alpha_dropout(x, 0.2, self.training)
        p = 0.3 if self.training else 0.0
        return F.scaled_dot_product_attention(x, x, x, dropout_p=p)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * torch.bernoulli(torch.full_like(x, 0.5)) if self.training else x


SITES: dict[str, Callable[[], nn.Module]] = {
    "modules": lambda: nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.3), nn.Linear(12, 12), nn.Dropout(0.2)),
    "one module called twice": lambda: nn.Sequential(*[nn.Dropout(0.3)] * 2),
    "functions": Functional,
    "random functions": Noisy,
    "attention": lambda: nn.TransformerEncoderLayer(12, 2, 24, dropout=0.2, batch_first=True),
    "recurrent": lambda: nn.LSTM(12, 8, 3, dropout=0.3, batch_first=True),
    "torchdrop": lambda: nn.Sequential(torchdrop.Dropout(0.3), nn.Linear(12, 12), torchdrop.GaussianDropout(0.3)),
}
"""What Monte Carlo inference serves, for inputs of shape (6, 5, 12)."""


def digest(x: Tensor) -> str:
    return hashlib.sha256((x == 0).to(torch.uint8).contiguous().numpy().tobytes()).hexdigest()[:16]


def projections(x: Tensor) -> list[float]:
    """Sums with three vectors of weights between -1 and 1, which rounding moves little, and another mask much."""
    x = x.detach().double().flatten()
    places = torch.arange(1.0, len(x) + 1, dtype=torch.float64)
    return [round(float((x * torch.cos(places * step)).sum()), 6) for step in (0.7, 1.9, 2.6)]


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def exact_masks() -> Iterator[tuple[str, str]]:
    for name, function in EXACT.items():
        for dtype in FLOATS:
            x = torch.ones(5, 7, 20, 31, dtype=dtype)
            torch.manual_seed(1)
            y = function(x)
            yield f"{name} {dtype}", digest(y)
        torch.manual_seed(1)
        assert digest(function(strided(torch.ones(5, 7, 20, 31)))) == digest(y), f"{name}: strides change the mask"


def variants() -> Iterator[tuple[str, list[float]]]:
    for name, variant in VARIANTS.items():
        model, x = built(name), inputs(variant)
        torch.set_num_threads(1)
        yield f"{name}, train mode", projections(seeded(1, model, x))
        if not variant.draws:
            continue
        with torchdrop.frozen_masks(model, seed=2):
            yield f"{name}, frozen", projections(model(x))
        with torchdrop.seeded(3, rank=1):
            yield f"{name}, seeded", projections(model(x))
        model.eval()
        with torchdrop.mc_dropout(model, seed=4, batch_dim=variant.batch_dim):
            yield f"{name}, Monte Carlo", projections(torch.stack([model(x) for _ in range(2)]))


def sites() -> Iterator[tuple[str, list[float]]]:
    for name, make in SITES.items():
        torch.manual_seed(0)
        model, x = make().eval(), torch.randn(6, 5, 12)
        for sampling in ("iid", "latin"):
            prediction = torchdrop.mc_predict(
                model, x, samples=4, seed=5, sampling=sampling, task="regression", select_output=first
            )
            yield f"{name}, {sampling}", projections(torch.stack([prediction.mean, prediction.std]))


PARTS: dict[str, Callable[[], Iterator[tuple[str, Any]]]] = {"masks": exact_masks, "variants": variants, "sites": sites}


@pytest.mark.filterwarnings("ignore:.*assuming that channel-wise 1D dropout:UserWarning")
@pytest.mark.parametrize("part", PARTS)
def test_masks_are_those_that_were_recorded(part: str) -> None:
    recorded, found = json.loads(PINNED.read_text())[part], dict(PARTS[part]())
    assert list(found) == list(recorded)
    if part == "masks":
        assert found == recorded
    else:
        for name, values in found.items():
            assert values == pytest.approx(recorded[name], rel=1e-4, abs=1e-3), name


if __name__ == "__main__":
    PINNED.write_text(json.dumps({part: dict(make()) for part, make in PARTS.items()}, indent=0) + "\n")

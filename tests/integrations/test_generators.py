"""Runs by Lightning that are resumed from a checkpoint: equal to the uninterrupted run bit for bit, on request."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchdrop
from torchdrop import schedules
from torchdrop.integrations.generators import generator_states, of_this_process, set_generator_states

BATCHES, EPOCHS = 4, 3
DATA = torch.randn(2 * BATCHES, 5, generator=torch.Generator().manual_seed(6))

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


class Resumable(DataLoader[Any]):
    """A loader, in order, whose state says where it is within the epoch."""

    def __init__(self, data: Any) -> None:
        super().__init__(data, 2)
        self.done, self.skip = 0, 0

    def __iter__(self) -> Any:
        return self._rest(super().__iter__())  # which draws a seed for workers

    def _rest(self, batches: Any) -> Any:
        skipped, self.skip = self.skip, 0
        for number, batch in enumerate(batches):
            self.done = number + 1
            if number >= skipped:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % BATCHES}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["done"]


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def train(pl: Any, folder: Path, loader: Any, resume: int = 0, validate: bool = False, **options: Any) -> Any:
    """Trains for three epochs, from the start or from a checkpoint, and returns the parameters and what was drawn."""
    seen: list[float] = []

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            own = torch.Generator().manual_seed(2)
            self.net = nn.Sequential(
                nn.Linear(5, 16), torchdrop.Dropout(0.5), nn.Dropout(0.2), nn.Linear(16, 4),
                torchdrop.Dropout(0.3, generator=own), nn.Linear(4, 1),
            )  # fmt: skip

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            seen.append(random.random())
            return self.net(batch[0]).square().mean()

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            torch.rand(3)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    callback = pytest.importorskip("torchdrop.integrations.lightning").KeepProbCallback(
        {"net.1": schedules.linear(0.9, 0.4, 12)}, **options
    )
    often = {"every_n_train_steps": 1} if isinstance(loader, Resumable) else {}
    saving = pl.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, **often)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, callbacks=[callback, saving], logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=2, limit_val_batches=1.0 if validate else 0,
    )  # fmt: skip
    module = Module()
    torch.manual_seed(1000 + resume)
    random.seed(1000 + resume)
    given = {"ckpt_path": folder / f"step={resume}.ckpt"} if resume else {}
    trainer.fit(module, loader, DataLoader(TensorDataset(DATA), 4), **given)
    return [p.detach().clone() for p in module.parameters()], seen


def equal(one: Any, other: Any) -> bool:
    (parameters, seen), (others, rest) = one, other
    return all(map(torch.equal, parameters, others)) and seen[-len(rest) :] == rest


def shuffled() -> Any:
    return DataLoader(TensorDataset(DATA), 2, shuffle=True)


@pytest.mark.slow
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("at", [BATCHES, 2 * BATCHES])
def test_from_the_end_of_an_epoch(pl: Any, tmp_path: Path, at: int, validate: bool) -> None:
    whole = train(pl, tmp_path, shuffled(), validate=validate, generators=True)
    assert len(whole[1]) == BATCHES * EPOCHS
    resumed = train(pl, tmp_path, shuffled(), at, validate, generators=True)
    assert len(resumed[1]) == BATCHES * EPOCHS - at
    assert equal(whole, resumed)
    assert not equal(whole, train(pl, tmp_path, shuffled(), at, validate))


@pytest.mark.slow
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("at", [1, BATCHES + 3])
def test_from_within_an_epoch(pl: Any, tmp_path: Path, at: int, validate: bool) -> None:
    whole = train(pl, tmp_path, Resumable(TensorDataset(DATA)), validate=validate, generators=True)
    resumed = train(pl, tmp_path, Resumable(TensorDataset(DATA)), at, validate, generators=True)
    assert len(resumed[1]) == BATCHES * EPOCHS - at
    assert equal(whole, resumed)
    assert not equal(whole, train(pl, tmp_path, Resumable(TensorDataset(DATA)), at, validate))


@pytest.mark.slow
def test_without_it_nothing_changes(pl: Any, tmp_path: Path) -> None:
    """Checkpoints hold no states then, and states that they hold are left alone."""
    train(pl, tmp_path, shuffled(), generators=False)
    path = tmp_path / f"step={BATCHES}.ckpt"
    states = torch.load(path, weights_only=False)["callbacks"]
    assert not any("generators" in state for state in states.values())
    assert len(train(pl, tmp_path, shuffled(), BATCHES, generators=True)[1]) == BATCHES * (EPOCHS - 1)


def test_states_of_all_generators() -> None:
    numpy = pytest.importorskip("numpy")
    model = nn.Sequential(torchdrop.Dropout(generator=torch.Generator().manual_seed(1)))

    def draw() -> tuple[Any, ...]:
        own = torch.rand((), generator=model[0].generator)  # type: ignore[arg-type]
        return random.random(), numpy.random.rand(), numpy.random.randn(), torch.rand(()).item(), own.item()

    numpy.random.randn()  # its second number is kept for the next call
    states = generator_states(model)
    first = draw()
    assert draw() != first
    set_generator_states(model, states)
    assert draw() == first


def test_states_of_another_number_of_processes() -> None:
    with pytest.raises(ValueError, match="states of 2 processes, and there are 1: resume with as many"):
        of_this_process([{}, {}])

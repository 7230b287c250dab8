"""`KeepProbCallback` in real trainings by Lightning and by the Hugging Face Trainer: the rates that forwards see."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import torchdrop
from tests import ROOT
from torchdrop import schedules
from torchdrop.integrations.every import check_every

DOWN = schedules.linear(1.0, 0.0, 10)
HALVED = schedules.scale(schedules.linear(0.0, 1.0, 10))
RATES = {"drops.0": DOWN, "drops.1": HALVED}
BATCHES, TOGETHER, STEPS = 6, 2, 6  # an epoch is 3 steps of the optimizer, of 2 batches each


class Net(nn.Module):
    """Notes in each forward of training the optimizer's step, by its own count, and the rates."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.drops = nn.Sequential(torchdrop.Dropout(), nn.Dropout(0.2), torchdrop.Dropout(0.3))
        self.done = 0
        self.seen: list[tuple[int, float, float]] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if self.training:
            self.seen.append((self.done, self.drops[0].keep_prob, 1 - self.drops[1].p))  # type: ignore[arg-type]
        y = self.fc(self.drops(x))
        return {"loss": y.square().mean(), "logits": y}

    def counted_by(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_post_hook(lambda *_: setattr(self, "done", self.done + 1))
        return optimizer


def expected(start: int, stop: int, every: str = "step", error: float = 1e-12) -> list[Any]:
    steps = [step for step in range(start, stop) for _ in range(TOGETHER)]
    at = steps if every == "step" else [step // (BATCHES // TOGETHER) for step in steps]
    return [
        (s, pytest.approx(1 - i / 10, abs=error), pytest.approx(1 - 0.2 * i / 10, abs=error))
        for s, i in zip(steps, at, strict=True)
    ]


class Lightning:
    """What tests ask of either package: its callback, and training by it."""

    def __init__(self, path: Path, package: str = "lightning.pytorch") -> None:
        self.pl = pytest.importorskip(package)
        self.callback = pytest.importorskip("torchdrop.integrations.lightning").KeepProbCallback
        self.path, self.modules = path, {}

    def train(self, net: Net, callback: Any, stop: int = STEPS, resume: int = 0, beside: Any = (), **more: Any) -> Any:
        class Module(self.pl.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def training_step(self, batch: Tensor, _: int) -> Tensor:
                return self.net(batch)["loss"]

            def validation_step(self, batch: Tensor, _: int) -> None:
                self.net(batch)

            def configure_optimizers(self) -> Any:
                return self.net.counted_by(torch.optim.SGD(self.parameters(), 0.1))

        saving = self.pl.callbacks.ModelCheckpoint(self.path, "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = self.pl.Trainer(
            accelerator="cpu", max_steps=stop, accumulate_grad_batches=TOGETHER, callbacks=[callback, *beside, saving],
            enable_progress_bar=False, enable_model_summary=False, **({"logger": False} | more),
        )  # fmt: skip
        data = DataLoader(torch.randn(2 * BATCHES, 4), 2)  # type: ignore[arg-type]
        # Lightning's checkpoints hold more than tensors.
        given = {"ckpt_path": self.path / f"step={resume}.ckpt", "weights_only": False} if resume else {}
        net.done = resume
        trainer.fit(self.modules.setdefault(net, Module()), data, data, **given)
        return trainer

    def rates(self, rates: dict[str, Any]) -> dict[str, Any]:
        return {f"net.{pattern}": rate for pattern, rate in rates.items()}


class OfPyTorchLightning(Lightning):
    def __init__(self, path: Path) -> None:
        super().__init__(path, "pytorch_lightning")


class HuggingFace:
    def __init__(self, path: Path) -> None:
        self.hf = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        self.callback = pytest.importorskip("torchdrop.integrations.hugging_face").KeepProbCallback
        self.path = path

    def train(self, net: Any, callback: Any, stop: int = STEPS, resume: int = 0, beside: Any = (), **more: Any) -> Any:
        arguments = self.hf.TrainingArguments(
            str(self.path), max_steps=stop, gradient_accumulation_steps=TOGETHER, per_device_train_batch_size=2,
            save_steps=1, eval_strategy="steps", eval_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, **more,
        )  # fmt: skip
        data = [{"x": torch.randn(4), "labels": torch.tensor(0)} for _ in range(2 * BATCHES)]
        optimizer = net.counted_by(torch.optim.SGD(net.parameters(), 0.1))
        trainer = self.hf.Trainer(
            net,
            arguments,
            train_dataset=data,
            eval_dataset=data,
            callbacks=[callback, *beside],
            optimizers=(optimizer, None),
        )
        net.done = resume
        trainer.train(resume_from_checkpoint=str(self.path / f"checkpoint-{resume}") if resume else None)
        return trainer

    def rates(self, rates: dict[str, Any]) -> dict[str, Any]:
        return rates


@pytest.fixture(params=[Lightning, OfPyTorchLightning, HuggingFace])
def package(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return request.param(tmp_path)


pytestmark = [
    # Lightning itself uses a class of torch's trees that torch has deprecated.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    # Lightning says so of every training that is resumed within an epoch, with a loader that has no state.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    # It says so where a folder has checkpoints already, as it has where training is resumed.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


@pytest.mark.slow
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_forwards_see_the_rates_of_their_step(package: Any, every: str) -> None:
    net = Net()
    callback = package.callback(package.rates(RATES), every=every)
    assert callback.scheduler is None
    package.train(net, callback)
    assert net.seen == expected(0, STEPS, every)
    assert net.drops[2].keep_prob == 0.7
    assert callback.scheduler.get_last_keep_prob().keys() == package.rates(RATES).keys()


@pytest.mark.slow
@pytest.mark.parametrize(("every", "at"), [("step", 2), ("step", 3), ("epoch", 2), ("epoch", 3), ("epoch", 4)])
def test_resumed_training_goes_on(package: Any, every: str, at: int) -> None:
    """From a checkpoint within an epoch and at its end, with a new model, callback and trainer."""
    package.train(Net(), package.callback(package.rates(RATES), every=every), stop=at)
    net = Net()
    package.train(net, package.callback(package.rates(RATES), every=every), resume=at)
    assert net.seen == expected(at, STEPS, every)


@pytest.mark.slow
def test_resumed_training_multiplies_the_rates_that_the_first_run_had(package: Any) -> None:
    """As `KeepProbScheduler.load_state_dict` does: here they were set by hand, which the resumed run does not do."""
    torchdrop.set_keep_prob(first := Net(), {"drops.1": 0.5})
    package.train(first, package.callback(package.rates(RATES)), stop=2)
    net = Net()
    package.train(net, package.callback(package.rates(RATES)), stop=4, resume=2)
    assert [kept for _, _, kept in net.seen] == pytest.approx([0.9, 0.9, 0.85, 0.85])


@pytest.mark.slow
@pytest.mark.parametrize(("same_callback", "resume"), [(True, 0), (True, 2), (False, 2)])
def test_a_model_trained_again_has_its_own_rates_scaled_once(package: Any, same_callback: bool, resume: int) -> None:
    """The same model again, from the start or from a checkpoint, as in a notebook."""
    callback = package.callback(package.rates(RATES))
    package.train(net := Net(), callback, stop=4)
    net.seen.clear()
    package.train(net, callback if same_callback else package.callback(package.rates(RATES)), resume=resume)
    assert net.seen == expected(resume, STEPS)


@pytest.mark.slow
def test_a_callback_takes_another_model(package: Any) -> None:
    callback = package.callback(package.rates(RATES))
    package.train(first := Net(), callback, stop=3)
    package.train(net := Net(), callback, stop=3)
    assert first.seen == net.seen == expected(0, 3)


@pytest.mark.slow
def test_two_callbacks_on_one_trainer(package: Any) -> None:
    net = Net()
    by_epoch = package.callback(package.rates({"drops.2": DOWN}), every="epoch")
    package.train(net, package.callback(package.rates(RATES)), beside=[by_epoch])
    assert net.seen == expected(0, STEPS)
    assert net.drops[2].keep_prob == DOWN(1)


@pytest.mark.slow
def test_what_the_scheduler_refuses_is_raised_when_training_starts(package: Any) -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"'dorp' matches none of the layers with a rate: near misses: .*drops"):
        package.train(net, package.callback({"dorp": 0.5}))
    bad = package.callback(package.rates({"drops.0": lambda step: 1.0 if step < 2 else 1.5}))
    with pytest.raises(ValueError, match=r"got 1.5 at step 2 from the schedule of '(net.)?drops.0'"):
        package.train(net, bad)
    assert [(step, kept) for step, kept, _ in net.seen] == [(step, 1.0) for step in (0, 0, 1, 1)]


def test_every_is_step_or_epoch(package: Any) -> None:
    for every in ("batch", "", None, "Step", ["step"]):
        with pytest.raises(ValueError, match=r"every must be 'step' or 'epoch', got "):
            package.callback({"*": 0.5}, every=every)


@pytest.mark.slow
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_lightning_logs_rates(tmp_path: Path, every: str) -> None:
    lightning = Lightning(tmp_path)
    logger = lightning.pl.loggers.CSVLogger(tmp_path, version=1)
    callback = lightning.callback(lightning.rates(RATES), every=every, log=True)
    lightning.train(Net(), callback, logger=logger, log_every_n_steps=1)
    text = (tmp_path / "lightning_logs" / "version_1" / "metrics.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    steps = [(row["step"], row["keep_prob/net.drops.0"], row["keep_prob/net.drops.1"]) for row in rows]
    assert [tuple(map(float, row)) for row in steps] == expected(0, STEPS, every, 1e-6)[1::TOGETHER]


@pytest.mark.slow
def test_a_transformer_of_hugging_face(tmp_path: Path) -> None:
    """Real layers by name: rates that are layers and, in attention, numbers."""
    package = HuggingFace(tmp_path)
    config = package.hf.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    model = package.hf.BertForSequenceClassification(config)
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda m, _: seen.append(dict(torchdrop.keep_probs(m))) if m.training else None)
    arguments = package.hf.TrainingArguments(
        str(tmp_path), max_steps=3, save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True
    )
    data = [{"input_ids": torch.arange(5), "labels": torch.tensor(i % 2)} for i in range(32)]
    callback = package.callback({"*": 0.75, "bert.encoder": DOWN, "classifier*": 1.0})
    with pytest.raises(ValueError, match="classifier"):
        package.hf.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    callback = package.callback({"*": 0.75, "bert.encoder": DOWN})
    package.hf.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert len(seen) == 3
    for step, rates in enumerate(seen):
        assert rates["dropout"] == rates["bert.embeddings.dropout"] == 0.75
        inner = [rate for name, rate in rates.items() if name.startswith("bert.encoder")]
        assert len(inner) >= 6
        assert set(inner) == {DOWN(step)}


def test_a_compiled_model_has_the_names_of_its_original() -> None:
    hugging_face = pytest.importorskip("torchdrop.integrations.hugging_face")
    callback = hugging_face.KeepProbCallback({"drops.0": DOWN})
    callback.on_step_begin(None, SimpleNamespace(global_step=3, epoch=None), None)  # before any training: nothing
    net = Net()
    callback.on_train_begin(None, SimpleNamespace(global_step=3, epoch=None), None, model=torch.compile(net))
    assert callback.scheduler is not None
    assert callback.scheduler.last_step == 3
    assert net.drops[0].keep_prob == 0.7


@pytest.mark.parametrize(
    ("absent", "module", "extra"),
    [
        (["lightning", "pytorch_lightning"], "lightning", "lightning"),
        (["lightning.pytorch", "pytorch_lightning"], "lightning", "lightning"),
        (["transformers"], "hugging_face", "hugging-face"),
    ],
)
def test_a_package_that_is_missing_is_named(
    absent: list[str], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in absent:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"torchdrop.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"^this needs .*pip install 'torchdrop\[{extra}\]'$"):
        importlib.import_module(f"torchdrop.integrations.{module}")


@pytest.mark.slow
def test_either_package_of_lightning_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    other = pytest.importorskip("pytorch_lightning")
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "torchdrop.integrations.lightning", raising=False)
    ours = importlib.import_module("torchdrop.integrations.lightning")
    monkeypatch.delitem(sys.modules, "torchdrop.integrations.lightning")
    assert issubclass(ours.KeepProbCallback, other.Callback)


def test_the_extras_that_the_messages_name_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert "\nlightning = [" in text
    assert "\nhugging-face = [" in text


def test_check_every() -> None:
    assert [check_every("step"), check_every("epoch")] == ["step", "epoch"]

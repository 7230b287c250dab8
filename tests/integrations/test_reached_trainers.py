"""Trainings of replaced models by the Hugging Face Trainer and by Lightning: scheduled, saved, resumed, and loaded
where there is no torchdrop."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import torchdrop
from tests import ROOT
from torchdrop import keep_probs, replace, schedules

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]

DOWN = schedules.linear(1.0, 0.5, 10)
STEPS = 4


def alone(code: str) -> None:
    """Runs code in a process where torchdrop cannot be imported."""
    code = "import sys\nsys.modules['torchdrop'] = None\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        )
    )
    replace(model)
    return model


def trained_by_hugging_face(model: Any, path: Path, resume: str | None = None) -> list[dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    callback = pytest.importorskip("torchdrop.integrations.hugging_face").KeepProbCallback
    seen: list[dict[str, Any]] = []
    handle = model.register_forward_hook(lambda m, *_: seen.append(dict(keep_probs(m))) if m.training else None)
    arguments = transformers.TrainingArguments(
        str(path), max_steps=STEPS, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, seed=3,
        per_device_train_batch_size=4,
    )  # fmt: skip
    data = [{"input_ids": torch.arange(i, i + 5) % 20, "labels": torch.tensor(i % 2)} for i in range(32)]
    rates = {"*dropout": 0.75, **{f"bert.encoder.layer.{i}.attention.self.attention:0": DOWN for i in range(2)}}
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback(rates)]).train(
        resume_from_checkpoint=resume
    )
    handle.remove()
    return seen


def test_hugging_face(tmp_path: Path) -> None:
    model = bert()
    seen = trained_by_hugging_face(model, tmp_path)
    names = [f"bert.encoder.layer.{i}.attention.self.attention:0" for i in range(2)]
    assert [[rates[name] for name in names] for rates in seen] == [[DOWN(step)] * 2 for step in range(STEPS)]
    again = bert()
    seen = trained_by_hugging_face(again, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert [rates[names[0]] for rates in seen] == [DOWN(2), DOWN(3)]
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), "the resumed run is the uninterrupted one"
    torch.save(model.eval()(torch.arange(5)[None]).logits.detach(), tmp_path / "logits.pt")
    alone(f"""
        import torch, transformers
        model = transformers.BertForSequenceClassification.from_pretrained({str(tmp_path / "checkpoint-4")!r}).eval()
        expected = torch.load({str(tmp_path / "logits.pt")!r})
        torch.testing.assert_close(model(torch.arange(5)[None]).logits, expected)
    """)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 4, 2, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(F.dropout(self.first(x), 0.5, self.training))[0]


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    replace(model)
    return model


def trained_by_lightning(model: nn.Module, path: Path, resume: str | None = None) -> list[dict[str, Any]]:
    pl = pytest.importorskip("lightning.pytorch")
    callback = pytest.importorskip("torchdrop.integrations.lightning").KeepProbCallback
    seen: list[dict[str, Any]] = []

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            torch.manual_seed(100 + self.global_step)  # Lightning's checkpoints have no state of PyTorch's generator
            loss = self.net(batch).square().mean()
            seen.append(dict(keep_probs(self.net)))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    saving = pl.callbacks.ModelCheckpoint(path, "{step}", save_top_k=-1, every_n_train_steps=1)
    rates = {"net.dropout:0": DOWN, "net.lstm.lstm:0": 0.75}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS, callbacks=[callback(rates), saving], enable_progress_bar=False,
        enable_model_summary=False, logger=False,
    )  # fmt: skip
    rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).repeat(STEPS, 1)  # a resumed epoch restarts
    given = {"ckpt_path": resume, "weights_only": False} if resume else {}
    trainer.fit(Module(), DataLoader(rows, 2), **given)  # type: ignore[arg-type]
    return seen


def test_lightning(tmp_path: Path) -> None:
    model = net()
    seen = trained_by_lightning(model, tmp_path)
    assert [(rates["dropout:0"], rates["lstm.lstm:0"]) for rates in seen] == [
        (DOWN(step), 0.75) for step in range(STEPS)
    ]
    again = net()
    seen = trained_by_lightning(again, tmp_path, resume=str(tmp_path / "step=2.ckpt"))
    assert [rates["dropout:0"] for rates in seen] == [DOWN(2), DOWN(3)]
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    alone(f"""
        import torch
        from torch import nn
        state = torch.load({str(tmp_path / "step=4.ckpt")!r}, weights_only=False)["state_dict"]
        lstm = nn.LSTM(4, 4, 2, dropout=0.5)
        lstm.load_state_dict({{k.removeprefix("net.lstm."): v for k, v in state.items() if k.startswith("net.lstm.")}})
    """)


def test_scheduling_reaches_masks() -> None:
    """At keep_prob 1 for all, a step of a replaced model has no noise."""
    model = net()
    torchdrop.set_keep_prob(model, {"dropout:0": 1.0, "lstm": 1.0})
    x = torch.randn(6, 4)
    torch.testing.assert_close(model(x), model.eval()(x))

"""Models of other packages, replaced: nothing in them is left to PyTorch's masks, and whatever is done with them works.

The models are small and random: nothing is downloaded.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchdrop
from tests import ROOT
from tests.configure.surgery import bart, encoder, vit
from tests.mc_models import apart, call, equal, main, tensors, unchanged
from tests.seeding import seeded
from torchdrop import keep_probs, replace, schedules, set_keep_prob
from torchdrop.core.torch_state import function_modes

pytestmark = [pytest.mark.usefixtures("one_thread")]

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

from tests.monte_carlo import test_models as models  # noqa: E402  (it skips where there is no transformers)


class Left(TorchDispatchMode):
    """Counts the operators that draw: the draws of keys, and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = 0
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = torch.default_generator.get_state()
        out = func(*args, **(kwargs or {}))
        if not torch.equal(torch.default_generator.get_state(), before):
            if isinstance(out, Tensor) and out.dtype == torch.int64 and out.shape == (2,):
                self.keys += 1
            else:
                self.others.append(str(func))
        return out


def graph_attention() -> nn.Module:
    layers = pytest.importorskip("torch_geometric.nn")
    return layers.GAT(8, 8, 2, 4, heads=2, dropout=0.3)


def convnext() -> nn.Module:
    return transformers.ConvNextModel(
        transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, drop_path_rate=0.3)
    )


def opt(layerdrop: float = models.NEVER) -> nn.Module:
    return transformers.OPTModel(
        transformers.OPTConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=3, ffn_dim=32, num_attention_heads=4, layerdrop=layerdrop,
            word_embed_proj_dim=32, attention_dropout=0.2, max_position_embeddings=32,
        )
    )  # fmt: skip


def graph() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 8), torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])


def image(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], int, int]] = {
    "bert": (lambda: models.bert("sdpa"), models.tokens, 7, 2),
    "bert, eager attention": (lambda: models.bert("eager"), models.tokens, 7, 2),
    "gpt2": (lambda: models.gpt2("sdpa"), models.tokens, 7, 2),
    "gpt2, eager attention": (lambda: models.gpt2("eager"), models.tokens, 7, 2),
    "vit": (lambda: vit(transformers), lambda: image(16), 7, 2),
    "wav2vec2": (models.wav2vec2, models.sound, 17, 3),
    "wav2vec2, eager attention": (lambda: models.wav2vec2("eager"), models.sound, 17, 3),
    "sew-d": (models.sew_d, models.sound, 13, 0),
    "t5": (models.t5, models.tokens, 10, 2),
    "swin": (models.swin, lambda: image(32), 16, 4),
    "bart": (lambda: bart(transformers), models.tokens, 12, 12),
    "opt": (opt, models.tokens, 12, 9),
    "convnext": (convnext, lambda: image(32), 2, 0),
    "graph attention": (graph_attention, graph, 3, 2),
    "encoder of torch": (encoder, lambda: (torch.randn(2, 5, 8),), 8, 2),
    "lstm": (lambda: nn.LSTM(4, 4, 3, dropout=0.3), lambda: (torch.randn(2, 5, 4),), 2, 1),
    "gru": (lambda: nn.GRU(4, 4, 3, dropout=0.3, bidirectional=True), lambda: (torch.randn(2, 5, 4),), 2, 1),
}
"""Each with its inputs, the keys that a forward draws, and the calls with a rate that modules make themselves."""

every_model = pytest.mark.parametrize("name", MODELS)


def built(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MODELS[name][0]().train(), MODELS[name][1]()


def outputs(model: nn.Module, inputs: Any) -> Any:
    np.random.seed(7)  # SpecAugment
    return call(model, inputs)


def loss_of(model: nn.Module, inputs: Any) -> Tensor:
    return sum((t.square().mean() for t in tensors(outputs(model, inputs)) if t.requires_grad), torch.zeros(()))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model: nn.Module, inputs: Any, seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = seeded(seed, loss_of, model, inputs)
    loss.backward()
    return loss.detach(), gradients(model)


def same(first: Any, second: Any) -> bool:
    (a, slopes), (b, others) = first, second
    assert slopes.keys() == others.keys()
    return torch.equal(a, b) and all(torch.equal(slopes[name], others[name]) for name in slopes)


class TestEveryModel:
    @every_model
    def test_nothing_is_left_to_pytorch(self, name: str) -> None:
        """In a forward and backward in train mode, where before there was something; and `unreached` is empty."""
        model, inputs = built(name)
        with Left() as before:
            loss_of(model, inputs).backward()
        swap = replace(model)
        with Left() as after:
            loss_of(model, inputs).backward()
        assert before.others
        assert not before.keys
        assert not after.others
        assert after.keys == MODELS[name][2]
        assert not swap.unreached, swap
        assert len([row for row in keep_probs(model).rows if ":" in row["attribute"]]) == MODELS[name][3]

    @every_model
    def test_same_seed_same_result_and_all_is_put_back(self, name: str) -> None:
        model, inputs = built(name)
        names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
        stock = trained(model, inputs)
        swap = replace(model)
        assert [type(module).__name__ for module in model.modules()] == [kind.__name__ for kind in kinds]
        first = trained(model, inputs)
        assert same(first, trained(model, inputs))
        assert not same(first, stock)
        assert not same(first, trained(model, inputs, seed=4))
        assert list(model.state_dict()) == names
        assert function_modes() == 0
        swap.undo()
        assert [type(module) for module in model.modules()] == kinds
        assert same(trained(model, inputs), stock)

    @every_model
    def test_in_eval_mode_nothing_changes(self, name: str) -> None:
        model, inputs = built(name)
        model.eval()
        expected = call(model, inputs)
        replace(model)
        with Left() as draws:
            assert equal(call(model, inputs), expected)
        assert not draws.keys
        assert not draws.others

    @every_model
    def test_copies_and_files(self, name: str) -> None:
        """A copy draws the same masks, has the rates that were set by name, and its own from then on."""
        model, inputs = built(name)
        replace(model)
        loss_of(model, inputs)
        calls = [row["name"] for row in keep_probs(model).rows if ":" in row["attribute"]]
        set_keep_prob(model, dict.fromkeys(calls, 0.5)) if calls else None
        expected = trained(model, inputs)
        copies = [copy.deepcopy(model)]
        if not any(map(nn.utils.parametrize.is_parametrized, model.modules())):  # torch saves none of these
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copies += [pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        for other in copies:
            assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
            assert same(trained(other, inputs), expected)
            assert dict(keep_probs(other)) == dict(keep_probs(model))
            if calls:
                set_keep_prob(other, dict.fromkeys(calls, 1.0))
                assert keep_probs(model)[calls[0]] == 0.5
            back = replace(other, to="torch")
            assert not back.unreached
            assert not any(":" in row["attribute"] for row in keep_probs(other).rows)

    @every_model
    def test_frozen(self, name: str) -> None:
        model, inputs = built(name)
        replace(model)
        with torchdrop.frozen_masks(model, seed=1):
            first, second = (outputs(model, inputs) for _ in range(2))
        assert equal(first, second)
        with torchdrop.frozen_masks(model, seed=2):
            assert not equal(outputs(model, inputs), first)

    @every_model
    def test_disabled(self, name: str) -> None:
        if name.startswith(("convnext", "sew-d", "swin", "wav2vec2")):
            pytest.skip("stochastic depth, LayerDrop and SpecAugment go on")
        model, inputs = built(name)
        replace(model)
        expected = call(model.eval(), inputs)
        model.train()
        for _ in range(2):
            with torchdrop.disabled(model):
                assert apart(main(call(model, inputs)), main(expected)) < 1e-5
            assert apart(main(call(model, inputs)), main(expected)) > 1e-3


class TestMonteCarlo:
    @pytest.mark.parametrize("name", ["bert", "gpt2, eager attention", "vit", "t5", "encoder of torch", "lstm"])
    def test_samples_are_those_of_a_model_whose_calls_are_not_served(self, name: str) -> None:
        """Its layers are replaced, too: the sources are the same, and so are the masks."""
        (model, inputs), (other, _) = built(name), built(name)
        replace(model)
        if name != "lstm":  # it has no layers to replace
            replace(other, sites=False)
        expected, got = (
            torchdrop.mc_predict(m.eval(), inputs, samples=4, seed=1, select_output=main) for m in (other, model)
        )
        assert [str(s) for s in got.report.active] == [str(s) for s in expected.report.active]
        assert torch.equal(got.mean, expected.mean)
        assert float(got.std.max()) > 0

    def test_it_follows_a_rate_that_was_set_on_a_call(self) -> None:
        """As one that the model's code passes: in each strategy, and in train mode on entry, too."""
        (model, inputs), (other, _) = built("bert"), built("bert")
        replace(model)
        replace(other, sites=False)
        call(model, inputs)
        set_keep_prob(model, {"*attention:0": 0.4})
        for layer in other.encoder.layer:  # type: ignore[union-attr]
            layer.attention.self.dropout.p = 0.6  # type: ignore[union-attr]
        for strategy in ("loop", "vectorized", "repeated"):
            options = {"samples": 4, "seed": 1, "select_output": main, "strategy": strategy}
            expected = torchdrop.mc_predict(other.eval(), inputs, **options)
            with unchanged(model.eval()):
                got = torchdrop.mc_predict(model, inputs, **options)
            assert torch.equal(got.mean, expected.mean), strategy
        model.train()
        with torchdrop.mc_dropout(model, seed=1) as report:
            call(model, inputs)
        assert {s.rate for s in report.active if s.kind == "attention"} == {0.6}

    def test_audit(self) -> None:
        (model, inputs), (other, _) = built("bert"), built("bert")
        replace(model)
        replace(other, sites=False)
        expected = [(c.module, c.kind, c.rate) for c in torchdrop.audit(other, inputs).calls]
        found = torchdrop.audit(model, inputs)
        assert [(c.module, c.kind, c.rate) for c in found.calls] == expected
        assert not found.findings, found
        call(model, inputs)
        set_keep_prob(model, {"encoder.layer.0.attention.self.attention:0": 0.25})
        calls = torchdrop.audit(model, inputs).calls
        assert [c.rate for c in calls if c.kind == "attention"] == [0.75, 0.1]


def small_bert(**changes: Any) -> Any:
    config = {
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**{**config, **changes})).train()


def words() -> dict[str, Tensor]:
    ids = torch.randint(1, 20, (4, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}


class TestBert:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointed_equals_not_checkpointed(self, attention: str, reentrant: bool) -> None:
        model = small_bert(attn_implementation=attention)
        replace(model)
        kind = "attention" if attention == "sdpa" else "dropout"
        set_keep_prob(model, {f"bert.encoder.layer.1.attention.self.{kind}:0": 0.5})

        def step() -> tuple[Tensor, dict[str, Tensor]]:
            model.zero_grad()
            loss = seeded(3, lambda: model(**words()).loss)
            loss.backward()
            return loss.detach(), gradients(model)

        plain = step()
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert same(step(), plain)
        assert not same((plain[0] + 1, plain[1]), plain)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_gradients_under_frozen_masks_are_finite_differences(self, attention: str) -> None:
        model = small_bert(attn_implementation=attention, num_hidden_layers=1).double()
        replace(model)
        weights = [p for name, p in model.named_parameters() if "query" in name or "value" in name or "output" in name]
        with torchdrop.frozen_masks(model, seed=1):
            model(**words()).loss.backward()
            for weight in weights:
                assert weight.grad is not None
                slope, index = weight.grad.flatten(), int(weight.grad.abs().argmax())
                values = []
                for change in (1e-5, -1e-5):
                    with torch.no_grad():
                        weight.view(-1)[index] += change
                        values.append(float(model(**words()).loss))
                        weight.view(-1)[index] -= change
                assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(slope[index]), rel=1e-5, abs=1e-9)

    def test_accumulated_gradients(self) -> None:
        """Those of two forwards, each with masks of its own, are the sum of both."""
        model = small_bert()
        replace(model)
        parts = []
        for seed in (3, 4):
            model.zero_grad()
            seeded(seed, lambda: model(**words()).loss).backward()
            parts.append(gradients(model))
        model.zero_grad()
        for seed in (3, 4):
            seeded(seed, lambda: model(**words()).loss).backward()
        for name, slope in gradients(model).items():
            torch.testing.assert_close(slope, parts[0][name] + parts[1][name])

    def test_a_resumed_run_is_the_uninterrupted_one(self) -> None:
        rate = schedules.linear(1.0, 0.5, 10)
        names = [f"bert.encoder.layer.{i}.attention.self.attention:0" for i in range(2)]

        def start() -> tuple[Any, ...]:
            model = small_bert()
            replace(model)
            scheduler = torchdrop.KeepProbScheduler(model, {"*dropout": 0.75, names[0]: rate, names[1]: 0.25})
            return model, torch.optim.AdamW(model.parameters(), 1e-2), scheduler

        def steps(count: int, model: Any, optimizer: Any, scheduler: Any) -> list[float]:
            losses = []
            for _ in range(count):
                optimizer.zero_grad()
                loss = model(**words()).loss
                loss.backward()
                optimizer.step()
                scheduler.step()
                losses.append(float(loss.detach()))
            return losses

        run = start()
        torch.manual_seed(1)
        expected = steps(6, *run)
        first = start()
        torch.manual_seed(1)
        begun = steps(3, *first)
        saved = io.BytesIO()
        torch.save([part.state_dict() for part in first], saved)
        generator = torch.get_rng_state()
        saved.seek(0)
        torch.manual_seed(99)
        second = start()
        for part, state in zip(second, torch.load(saved), strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(generator)
        assert begun + steps(3, *second) == expected
        for a, b in zip(run[0].parameters(), second[0].parameters(), strict=True):
            assert torch.equal(a, b)
        assert keep_probs(second[0])[names[0]] == rate(6)

    def test_saved_and_loaded_without_torchdrop(self, tmp_path: Path) -> None:
        """The class names and keys are those of the model that was not replaced; so is the loaded model."""
        model = small_bert()
        replace(model)
        model(**words()).loss.backward()
        model.save_pretrained(tmp_path)
        logits = model.eval()(**words()).logits
        torch.save(model.state_dict(), tmp_path / "state.pt")
        code = f"""
            import sys
            sys.modules["torchdrop"] = None
            import torch, transformers
            model = transformers.BertForSequenceClassification.from_pretrained({str(tmp_path)!r}).eval()
            assert model.config.architectures == ["BertForSequenceClassification"], model.config.architectures
            ids = torch.randint(1, 20, (4, 6), generator=torch.Generator().manual_seed(1))
            torch.save(model(input_ids=ids).logits.detach(), {str(tmp_path / "logits.pt")!r})
            model.load_state_dict(torch.load({str(tmp_path / "state.pt")!r}))
        """
        alone(code)
        assert torch.equal(torch.load(tmp_path / "logits.pt"), logits.detach())
        loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
        replace(loaded.train())
        assert torch.equal(*(seeded(3, m.train(), **words()).logits for m in (model, loaded)))


def alone(code: str) -> None:
    """Runs code in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_model_whose_own_class_is_reached_is_loaded_without_torchdrop(tmp_path: Path) -> None:
    """Then the saved class is not the one that `replace` made, and `from_pretrained` of that class works, too."""
    model = transformers.OPTModel(opt().config)
    replace(model)
    decoder = model.decoder
    assert torchdrop.configure.reach.is_reached(decoder)
    decoder.save_pretrained(tmp_path)
    alone(f"""
        import sys
        sys.modules["torchdrop"] = None
        from transformers.models.opt.modeling_opt import OPTDecoder
        OPTDecoder.from_pretrained({str(tmp_path)!r})
    """)
    again = type(decoder).from_pretrained(tmp_path).train()
    assert call(again, models.tokens()).last_hidden_state.shape == (5, 12, 32)

"""`export`: programs whose masks are those of `mc_predict`, and that need no torchdrop."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.family import VARIANTS, built
from tests.family import inputs as inputs_of
from torchdrop.monte_carlo import MCExport, export, exported
from torchdrop.monte_carlo.activate import Activation
from torchdrop.monte_carlo.inputs import Inputs
from torchdrop.monte_carlo.outputs import Picker
from torchdrop.monte_carlo.sample import Sampler
from torchdrop.monte_carlo.strategy import Choice

ROWS = (1, 7, 64)
TASKS = {"out": None, "mask": None}


class Masked(nn.Module):
    """A network that also returns a mask of its dropout, scaled, at a rate at which a threshold has lower bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 20), nn.Linear(20, 3)
        self.drop = torchdrop.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.drop(self.first(x).relu())
        return self.head(h), F.dropout(torch.ones_like(h).repeat(1, 100), 0.3, self.training)


def parts(returned: Any) -> dict[str, Tensor]:
    return dict(zip(TASKS, returned, strict=True))


def data(rows: int) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def one() -> tuple[nn.Module, MCExport]:
    model = Masked().eval()
    return model, export(model, data(5), seed=3, select_output=parts)


def check_pass(
    model: nn.Module, call: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]], program: MCExport
) -> None:
    """Compares a program of one pass with samples of `mc_predict`: masks bit for bit, and outputs up to rounding."""
    for rows in ROWS:
        for seed, sample in ((3, 0), (-7, 4)):
            x = data(rows)
            expected = torchdrop.mc_predict(
                model,
                x,
                sample + 2,
                seed=seed,
                select_output=parts,
                keep_samples=True,
                task=dict.fromkeys(program.outputs),
            )
            found = call(x, program.keys(seed), torch.tensor(sample))
            assert torch.equal(found["mask"], expected["mask"].samples[sample])
            assert torch.allclose(found["out"], expected["out"].samples[sample], rtol=0, atol=1e-5)


class TestPass:
    def test_is_that_of_mc_predict(self, one: tuple[nn.Module, MCExport]) -> None:
        model, program = one
        run = program.program.module()
        with torch.no_grad():
            check_pass(model, lambda x, keys, sample: run(x, mask_keys=keys, sample=sample), program)

    def test_has_operators_of_pytorch_only_and_names_for_all(self, one: tuple[nn.Module, MCExport]) -> None:
        _, program = one
        calls = [node for node in program.program.graph.nodes if node.op == "call_function"]
        targets = {str(node.target) for node in calls}
        assert all(target.startswith(("aten.", "<built-in function")) for target in targets)
        assert not any("rand" in target or "dropout" in target for target in targets)
        assert any("nonzero" in target for target in targets)  # the elements that lower bits decide
        assert program.outputs == ("out", "mask")
        assert list(program.masks) == [("drop", "torchdrop", 0), ("", "dropout", 0)]
        assert list(program.program.module().state_dict()) == [f"model.{name}" for name in one[0].state_dict()]

    def test_runs_where_there_is_no_torchdrop(self, one: tuple[nn.Module, MCExport], tmp_path: Path) -> None:
        model, program = one
        program.save(tmp_path / "pass.pt2")
        torch.save(data(7), tmp_path / "data.pt")
        script = tmp_path / "plain.py"
        script.write_text(PLAIN)
        subprocess.run([sys.executable, "-I", str(script), str(tmp_path)], check=True, timeout=300)
        found = torch.load(tmp_path / "found.pt")
        expected = torchdrop.mc_predict(model, data(7), 6, seed=11, select_output=parts, keep_samples=True, task=TASKS)
        assert torch.equal(found["mask"], expected["mask"].samples[5])
        assert torch.allclose(found["out"], expected["out"].samples[5], rtol=0, atol=1e-5)

    def test_runs_in_onnx_runtime(self, one: tuple[nn.Module, MCExport], tmp_path: Path) -> None:
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        model, program = one
        program.onnx(tmp_path / "pass.onnx")
        session = runtime.InferenceSession(tmp_path / "pass.onnx", providers=["CPUExecutionProvider"])
        assert [given.name for given in session.get_inputs()] == ["x", "mask_keys", "sample"]
        kept = json.loads(session.get_modelmeta().custom_metadata_map["torchdrop"])
        assert torch.equal(torch.tensor(kept["keys"]), program.keys())

        def call(x: Tensor, keys: Tensor, sample: Tensor) -> dict[str, Tensor]:
            given = {"x": x.numpy(), "mask_keys": keys.numpy(), "sample": sample.numpy()}
            return dict(
                zip(program.outputs, map(torch.from_numpy, session.run(list(program.outputs), given)), strict=True)
            )

        check_pass(model, call, program)

    @pytest.mark.slow
    def test_runs_in_aotinductor(self, one: tuple[nn.Module, MCExport], tmp_path: Path) -> None:
        model, program = one
        package = torch._inductor.aoti_compile_and_package(program.program, package_path=str(tmp_path / "pass.pt2"))
        run = torch._inductor.aoti_load_package(package)
        check_pass(model, lambda x, keys, sample: run(x, mask_keys=keys, sample=sample), program)


PLAIN = """
import hashlib, json, pathlib, sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchdrop":
            raise ImportError("there is no torchdrop")


sys.meta_path.insert(0, Refuse())
import torch

folder = pathlib.Path(sys.argv[1])
extra = {"torchdrop.json": ""}
program = torch.export.load(folder / "pass.pt2", extra_files=extra).module()
keys = []
for name in json.loads(extra["torchdrop.json"])["masks"]:
    text = "/".join(map(str, [11, *name]))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    keys.append([int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")])
x = torch.load(folder / "data.pt")
with torch.no_grad():
    found = program(x, mask_keys=torch.tensor(keys), sample=torch.tensor(5))
torch.save(found, folder / "found.pt")
assert not any(name.partition(".")[0] == "torchdrop" for name in sys.modules)
"""


class TestSeveral:
    def test_statistics_are_those_of_mc_predict(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3))
        program = export(model, data(3), 6, task="classification", seed=2)
        assert (program.samples, len(program.outputs)) == (6, 7)
        run = program.program.module()
        for rows in ROWS:
            expected = torchdrop.mc_predict(model, data(rows), 6, task="classification", seed=9)
            found = run(data(rows), mask_keys=program.keys(9))
            for name in program.outputs:
                assert torch.allclose(found[name], getattr(expected, name), rtol=0, atol=1e-5)
        assert model.training

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["convolution", "recurrent", "transformer"])
    def test_of_other_models(self, kind: str) -> None:
        model, inputs = MODELS[kind]()
        program = export(model, inputs(3), 4, task="classification", scores="logits", masks="shared", seed=2)
        run = program.program.module()
        for rows in ROWS:
            given = inputs(rows)
            expected = torchdrop.mc_predict(
                model, given, 4, task="classification", scores="logits", masks="shared", seed=9
            )
            args, named = ((given,), {}) if isinstance(given, Tensor) else ((), given)
            found = run(*args, mask_keys=program.keys(9), **named)
            for name in ("mean", "variance", "mutual_information"):
                assert torch.allclose(found[name], getattr(expected, name), rtol=0, atol=1e-5)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout2d(0.5)
        self.second, self.head = nn.Conv2d(8, 4, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(x)).relu())
        return self.head(F.dropout(self.second(x).flatten(1), 0.2, self.training))


def convolution() -> tuple[nn.Module, Callable[[int], Tensor]]:
    torch.manual_seed(0)
    model = Convolution().eval()
    model.norm.running_mean.normal_()
    return model, lambda rows: torch.randn(rows, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(4, 8, 3, dropout=0.5, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def recurrent() -> tuple[nn.Module, Callable[[int], Tensor]]:
    torch.manual_seed(0)
    return Recurrent().eval(), lambda rows: torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(1))


def transformer() -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    models = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = models.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.25, num_labels=3, attn_implementation="sdpa",
    )  # fmt: skip
    model = models.BertForSequenceClassification(config).eval()

    def inputs(rows: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(2, 7, (rows, 1), generator=generator)
        return {
            "input_ids": torch.randint(50, (rows, 6), generator=generator),
            "attention_mask": (torch.arange(6) < lengths).long(),
        }

    return model, inputs


MODELS: dict[str, Callable[[], tuple[nn.Module, Callable[[int], Any]]]] = {
    "convolution": convolution,
    "recurrent": recurrent,
    "transformer": transformer,
}


def ways(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The passes that are traced, run as they are, by the way in which several samples are run. `_passes` yields them
    if they equal the sampler's for two samples; here they are compared with `mc_predict` for three."""
    activation, pick = Activation(model, None, 0), Picker()
    sampler, rows = Sampler(activation, pick, 5, False, None), Inputs((x,), {}, 0)
    with torch.no_grad():
        Choice(activation, sampler, "auto", 3).survey(rows)
        found = {}
        for one in exported._passes(activation, sampler, pick, False, rows):
            (found[one.strategy],) = one.several(rows, one.names.keys(5), 3)
    expected = torchdrop.mc_predict(model, x, 3, seed=5, keep_samples=True).samples
    assert expected is not None
    assert all(torch.allclose(one, expected, rtol=1e-5, atol=1e-5) for one in found.values())
    return found


@pytest.mark.parametrize(
    "name", [name for name, one in VARIANTS.items() if one.draws and one.own_rows and not one.skips]
)
def test_passes_of_all_variants_are_those_of_mc_predict(name: str) -> None:
    model = built(name, torch.device("cpu")).eval()
    found = ways(model, inputs_of(VARIANTS[name], torch.device("cpu")))
    assert "loop" in found
    assert name != "dropout" or list(found) == ["vectorized", "repeated", "loop"]


def test_passes_of_several_masks_in_one_call_are_those_of_mc_predict() -> None:
    model, inputs = recurrent()
    assert list(ways(model, inputs(5))) == ["repeated", "loop"]


class Noisy(nn.Module):
    """A linear layer with dropout, and a random number of another kind."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.drop, self.noise = nn.Linear(4, 8), nn.Dropout(0.5), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.body(x)) + self.noise(x)


def of_numpy(x: Tensor) -> Tensor:
    import numpy as np

    return torch.full_like(x[:, :1], float(np.random.rand()))


def branching(x: Tensor) -> Tensor:
    return x[:, :1] if float(x.sum()) > 0 else -x[:, :1]


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        (
            lambda x: torch.randint(3, (len(x), 1)),
            ValueError,
            r"not replayable.*\(model\): randint, torch's own numbers",
        ),
        (of_numpy, ValueError, "numpy or Python"),
        (branching, RuntimeError, r"torch\.export does not take this model .*data-dependent"),
    ],
    ids=["randint", "numpy", "branching"],
)
def test_models_that_no_program_can_repeat_are_refused(noise: Any, error: type[Exception], message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(error, match=message):
        export(Noisy(noise).eval(), data(5), seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"masks": "own"}, "masks must be 'independent' or 'shared', got 'own'"),
        ({"task": "ranking"}, "task must be"),
        ({"sources": "nowhere"}, "sources must name modules of the model, but 'nowhere' matches none"),
    ],
    ids=["samples", "masks", "task", "sources"],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(Masked(), data(5), **arguments)


def test_outputs_of_onnx_get_their_names_though_others_have_them() -> None:
    ir = pytest.importorskip("onnx_ir", reason="onnx is not installed")
    first = ir.Node("", "Neg", [ir.Value(name="x")], name="first", outputs=[ir.Value(name="mean")])
    second = ir.Node("", "Neg", first.outputs, name="second", outputs=[ir.Value(name="out")])
    graph = ir.Graph(first.inputs, second.outputs, nodes=[first, second])
    exported._name_outputs(graph, ["mean"])
    assert (first.outputs[0].name, second.outputs[0].name, graph.outputs[0].name) == ("mean_of_first", "mean", "mean")


def test_a_model_without_anything_random_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing random is active in the model"):
        export(nn.Linear(4, 2), data(5))


def test_an_argument_with_the_name_of_the_keys_is_refused() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor, sample: Tensor) -> Tensor:
            return F.dropout(x + sample, 0.5, self.training)

    with pytest.raises(ValueError, match="the program has an argument 'sample' of its own"):
        export(Own(), (data(5), data(5)))


def test_an_old_pytorch_is_refused() -> None:
    with mock.patch.object(exported, "VERSION", (2, 6)), pytest.raises(RuntimeError, match="export needs PyTorch 2"):
        export(Masked(), data(5))


def test_an_old_opset_and_missing_packages_are_refused() -> None:
    program = MCExport(mock.Mock(), mock.Mock(), 0, None, (), mock.Mock())
    with pytest.raises(ValueError, match=r"opset must be at least 18, .* got 17"):
        program.onnx(opset=17)
    with (
        mock.patch.dict(sys.modules, {"onnx": None}),
        pytest.raises(ImportError, match=r"this needs onnx: pip install 'torchdrop\[onnx\]'"),
    ):
        program.onnx()

"""`insert`: dropout in a model that has none, and the way back."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests import TORCH
from tests.configure.surgery import drawn, real, refused, shape_of
from tests.mc_models import Of, call, equal, tensors
from torchdrop import Dropout, GaussianDropout, insert, keep_probs


class Two(NamedTuple):
    value: Tensor
    extra: str


class Blocks(nn.ModuleList):
    """A container with a forward that runs what is in it."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class Steps(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Children(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


def net() -> nn.Sequential:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return nn.Sequential(nn.Linear(4, 4), block, nn.Sequential(nn.Linear(4, 4), nn.ReLU()), block)


def dropped(y: Tensor) -> float:
    return float((y == 0).float().mean())


class TestInsert:
    @pytest.mark.parametrize("where", ["after", "before"])
    @pytest.mark.parametrize("name", ["0", "1", "2.0"])
    def test_where_it_acts_and_the_way_back(self, name: str, where: str) -> None:
        """A linear layer, a Sequential and a part of one, against the same model with the layer written out."""
        model, x = net(), torch.randn(6, 4)
        before, keys = shape_of(model), list(model.state_dict())
        order = [name for name, _ in model.named_modules(remove_duplicate=False)]
        put = insert(model, {name: Dropout(0.5)}, where)
        assert put.done == [f"{name}.inserted.{where}"]
        assert str(put) == f"inserted 1 dropout layer: {name}.inserted.{where}"
        assert dict(keep_probs(model)) == {put.done[0]: 0.5}
        assert list(model.state_dict()) == keys
        model.load_state_dict(net().state_dict())
        written = copy.deepcopy(model)
        layer = written.get_submodule(put.done[0])
        plain = net()
        plain.load_state_dict(model.state_dict())
        parent, _, last = name.rpartition(".")
        own = plain.get_submodule(name)
        own_pair = [own, layer] if where == "after" else [layer, own]
        for slot in [last, "3"] if name == "1" else [last]:
            plain.get_submodule(parent)._modules[slot] = nn.Sequential(*own_pair)
        assert equal(drawn(model, (x,)), drawn(plain, (x,)))
        assert equal(drawn(copy.deepcopy(model), (x,)), drawn(plain, (x,)))
        assert equal(model.eval()(x), plain.eval()(x))
        model.train()
        put.undo()
        assert [name for name, _ in model.named_modules(remove_duplicate=False)] == order
        assert list(model.state_dict()) == before[1]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        with refused(model, RuntimeError, "insertion has been undone already: undo() works once"):
            put.undo()

    def test_patterns(self) -> None:
        """One part of a name each; the most specific wins; each place has a layer of its own, shared ones one."""
        model, layer = net(), Dropout(0.5)
        put = insert(model, {"*": layer, "0": GaussianDropout(0.25), "?.0": Dropout(0.125)})
        assert dict(keep_probs(model)) == {
            "0.inserted.after": 0.75, "1.0.inserted.after": 0.875, "1.inserted.after": 0.5, "2.0.inserted.after": 0.875,
            "2.inserted.after": 0.5,
        }  # fmt: skip
        assert model[1].inserted.after is layer is not model[2].inserted.after
        assert set(put.done) == set(keep_probs(model))

    def test_modes_generators_and_files(self) -> None:
        generator = torch.Generator()
        model = net()
        model[0].eval()
        insert(model, {"0": Dropout(0.5), "?.0": Dropout(0.5, generator=generator)})
        assert [model[0].inserted.after.training, model[1][0].inserted.after.training] == [False, True]
        assert model[1][0].inserted.after.generator is model[2][0].inserted.after.generator is generator
        model = net()
        insert(model, {"0": Dropout(0.5)})
        x = torch.randn(5, 4)
        assert equal(drawn(pickle.loads(pickle.dumps(model)), (x,)), drawn(model, (x,)))

    def test_hooks_around_it(self) -> None:
        model, seen = net(), []
        early = model[0].register_forward_hook(lambda *args: seen.append(dropped(args[2])))
        put = insert(model, {"0": Dropout(0.5)})
        late = model[0].register_forward_hook(lambda *args: seen.append(dropped(args[2])))
        model[0].register_full_backward_hook(lambda *_: seen.append(-1.0))
        model(torch.randn(50, 4, requires_grad=True)).sum().backward()
        assert seen[0] == 0.0 < seen[1] < 1.0 == -seen[2]
        early.remove()
        put.undo()
        model(torch.randn(50, 4))
        assert len(seen) == 4
        assert seen[3] == 0.0
        late.remove()
        assert not model[0]._forward_hooks

    def test_several_outputs(self) -> None:
        model, x = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "two": Of(lambda self, x: Two(x, "kept"))}), torch.ones(90, 4)
        expected = model["lstm"](x)[1]
        insert(model, {"*": Dropout(0.5)})
        y, state = model["lstm"](x)
        assert 0.3 < dropped(y) < 0.7
        assert equal(state, expected)
        two = model["two"](x)
        assert isinstance(two, Two)
        assert 0.3 < dropped(two.value) < 0.7
        assert two.extra == "kept"

    @pytest.mark.parametrize("make", [lambda: Blocks([nn.Identity()]), lambda: Steps(nn.Identity()), Children])
    def test_modules_that_run_their_children(self, make: Callable[[], nn.Module]) -> None:
        """It runs once, or it is refused: the child must not be run by the module and by the hook."""
        model = nn.ModuleDict({"part": make()})
        with contextlib.suppress(ValueError):
            insert(model, {"part": Dropout(0.5)})
        assert dropped(model["part"](torch.ones(10_000))) == pytest.approx(0.5 * len(keep_probs(model)), abs=0.05)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["bert", "wav2vec2", "encoder"])
    def test_in_real_models(self, name: str) -> None:
        built, inputs = real(name)
        model, path = built().eval(), "layers" if name == "encoder" else "encoder.layer" + "s" * (name != "bert")
        before, expected, training = shape_of(model), call(model, inputs), drawn(model.train(), inputs)
        put = insert(model.eval(), {f"{path}.*": Dropout(0.5), f"{path}.0": Dropout(0.25)})
        assert list(model.state_dict()) == before[1]
        torch.testing.assert_close(tensors(call(model, inputs))[0], tensors(expected)[0])
        assert not equal(drawn(model.train(), inputs), training)
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert (
                float(
                    torchdrop.mc_predict(model, inputs, samples=3, select_output=lambda out: tensors(out)[0]).std.max()
                )
                > 0
            )
        put.undo()
        assert shape_of(model) == before
        assert equal(call(model, inputs), expected)

    def test_with_monte_carlo_and_schedules(self) -> None:
        model, x = net().eval(), torch.randn(5, 4)
        put = insert(model, {"0": Dropout(0.5)})
        with torchdrop.frozen_masks(model.train()):
            assert torch.equal(model(x), model(x))
        assert float(torchdrop.mc_predict(model.eval(), x, samples=4).std.max()) > 0
        torchdrop.set_keep_prob(model, {"0": 0.0})
        assert torch.equal(model.train()[0](x), torch.zeros(5, 4))
        with torchdrop.disabled(model):
            assert torch.equal(model[0](x), F.linear(x, model[0].weight, model[0].bias))
        put.undo()

    @pytest.mark.parametrize(
        ("layers", "where", "error", "message"),
        [
            ({"0": Dropout()}, "inside", ValueError, "where must be 'after' or 'before', got 'inside'"),
            ([Dropout()], "after", TypeError, "give patterns and layers as a mapping, {'fc*': Dropout(0.5)}, got list"),
            ({}, "after", ValueError, "give at least one pattern for the names of modules, got none"),
            ({"7": Dropout()}, "after", ValueError, "the pattern '7' matches none of the modules: "),
            ({"": Dropout()}, "after", ValueError, "the pattern '' matches none of the modules: "),
            ({"1": 0.5}, "after", TypeError, "give '1' a dropout layer, such as torchdrop.Dropout(keep_prob=0.9), "),
            ({"1": nn.Linear(2, 2)}, "after", TypeError, "give '1' a dropout layer, such as torchdrop.Dropout(keep_"),
            ({"fc": Dropout()}, "after", ValueError, "'fc' has a layer after it already: undo the first insertion"),
            ({"d*": Dropout()}, "before", ValueError, "'drop' is a dropout layer itself: set_keep_prob sets its ra"),
            ({"?ist": Dropout()}, "before", ValueError, "'list' is a ModuleList, a container without a call of its"),
            ({"attention.out*": Dropout()}, "after", ValueError, "'attention.out_proj' is never called, nn.Multihead"),
            ({"f*": Dropout(), "*c": Dropout()}, "before", ValueError, "the patterns '*c' and 'f*' both match 'fc'"),
            ({"taken": Dropout()}, "after", ValueError, "'taken' has "),
        ],
    )
    def test_refused(self, layers: Any, where: str, error: type[Exception], message: str) -> None:
        model = nn.ModuleDict({"0": nn.Linear(2, 2), "drop": Dropout(), "fc": nn.Linear(2, 2), "list": nn.ModuleList()})
        model["attention"], model["taken"] = nn.MultiheadAttention(2, 1), nn.Linear(2, 2)
        model["taken"].inserted = 0.5  # an attribute of the model's own, behind which the child would not be found
        insert(model, {"fc": Dropout()})
        with refused(model, error, message):
            insert(model, {"0": Dropout(), **layers} if layers and isinstance(layers, dict) else layers, where)

    def test_a_layer_with_a_state(self) -> None:
        layer = Dropout()
        layer.register_buffer("count", torch.zeros(1))
        with pytest.raises(
            ValueError, match=r"^the layer of '0' has a state \(count\), which would change the model's$"
        ):
            insert(net(), {"0": layer})
        with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got int$"):
            insert(3, {"0": Dropout()})  # type: ignore[arg-type]

    def test_no_tensor_to_drop_from(self) -> None:
        model = nn.ModuleDict({"a": Of(lambda self, x: {"x": x}), "b": nn.Linear(2, 2)})
        insert(model, {"a": Dropout()})
        with pytest.raises(
            TypeError, match=r"^dropout was inserted at a Of that returned no tensor but a dict: insert it"
        ):
            model["a"](torch.ones(2))
        insert(model, {"b": Dropout()}, where="before")
        with pytest.raises(
            TypeError, match=r"^dropout was inserted at a Linear that was given, as its first argument w.*"
        ):
            model["b"](input=torch.ones(2))

    @pytest.mark.slow
    @pytest.mark.parametrize("first", ["nothing", "the model", "another", "another, and the model later"])
    def test_a_compiled_model(self, first: str) -> None:
        """Code compiled before, for it or another model of its class, must not be run on, without dropout."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x)

        torch.compiler.reset()
        model, x = Net(), torch.randn(50, 4)
        compiled = torch.compile(model, backend="aot_eager")
        if first != "nothing":
            (compiled if first == "the model" else torch.compile(Net(), backend="aot_eager"))(x)
        if TORCH < (2, 9) and first != "nothing":
            with pytest.raises(RuntimeError, match=r"before anything compiled is called, or use PyTorch 2\.9"):
                insert(model, {"fc": Dropout(0.5)})
            assert dropped(model(x)) == 0.0
            return
        put = insert(model if first.endswith("later") else compiled, {"fc": Dropout(0.5)})
        assert 0.3 < dropped(compiled(x)) < 0.7
        if TORCH < (2, 9):
            with pytest.raises(RuntimeError, match=r"PyTorch 2\.9"):
                put.undo()
            return
        put.undo()
        assert dropped(compiled(x)) == 0.0

    @pytest.mark.slow
    def test_at_a_compiled_part(self) -> None:
        torch.compiler.reset()
        model = nn.ModuleDict({"part": torch.compile(nn.Linear(4, 4), backend="aot_eager")})
        insert(model, {"part": Dropout(0.5)})
        assert dropped(model["part"](torch.randn(2000, 4))) == pytest.approx(0.5, abs=0.05)

"""Surgery on models: torchdrop's layers in the place of torch.nn's, dropout where there was none, and the way back."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import functional

import torchdrop
from torchdrop import Dropout, GaussianDropout, insert, keep_probs, replace

from .mc_models import Draws, Of, call, equal, state, tensors

STOCK = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
OURS = [getattr(torchdrop, kind.__name__) for kind in STOCK]

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def vit(transformers: Any) -> nn.Module:
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SMALL, **rates))


def bart(transformers: Any) -> nn.Module:
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    return transformers.BartModel(transformers.BartConfig(vocab_size=99, d_model=32, **sizes))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, 0.3, batch_first=True), 2)


def pairs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 8), torch.randn(2, 3, 8)


REAL: dict[str, tuple[Callable[[Any], nn.Module], Callable[[Any], Any], int]] = {
    "bert": (lambda models: models.bert("sdpa"), lambda models: models.tokens(), 7),
    "bert-eager": (lambda models: models.bert("eager"), lambda models: models.tokens(), 7),
    "gpt2": (lambda models: models.gpt2("eager"), lambda models: models.tokens(), 7),
    "t5": (lambda models: models.t5(), lambda models: models.tokens(), 7),
    "vit": (lambda models: vit(models.transformers), lambda _: {"pixel_values": torch.randn(2, 3, 16, 16)}, 3),
    "wav2vec2": (lambda models: models.wav2vec2(), lambda models: models.sound(), 11),
    "transformer": (lambda _: nn.Transformer(8, 2, 1, 1, 8, batch_first=True), lambda _: pairs(), 7),
    "encoder": (lambda _: encoder(), lambda _: (pairs()[0],), 6),
}


def real(name: str) -> tuple[Callable[[], nn.Module], Any]:
    """What builds it, always with the same weights, and inputs."""
    models: Any = None
    if name not in ("transformer", "encoder"):
        pytest.importorskip("transformers")
        models = importlib.import_module("tests.test_mc_models")
    make, inputs, _ = REAL[name]

    def built() -> nn.Module:
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(models)

    return built, inputs(models)


def seeded(model: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(7)
    np.random.seed(7)  # SpecAugment
    return call(model, inputs)


def layers(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]


def shape_of(model: nn.Module) -> list[Any]:
    """Which modules there are, under which names, with which hooks, flags and parameters."""
    found = [(name, id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)]
    return [found, list(model.state_dict()), state(model)]


@contextmanager
def refused(model: nn.Module, error: type[Exception], message: str) -> Iterator[None]:
    """Asserts the message, from its start, and that nothing is changed."""
    before = shape_of(model)
    with pytest.raises(error, match="^" + re.escape(message)):
        yield
    assert shape_of(model) == before


class TestReplaceInRealModels:
    @pytest.mark.parametrize("name", REAL)
    def test_keys_and_eval_outputs_stay(self, name: str) -> None:
        built, inputs = real(name)
        model = built().eval()
        before, expected = shape_of(model), call(model, inputs)
        swap = replace(model)
        assert len(swap.done) == REAL[name][2]
        assert list(model.state_dict()) == before[1]
        assert equal(call(model, inputs), expected)
        with Draws() as draws:
            call(model, inputs)
        assert draws.operators == []
        swap.undo()
        assert shape_of(model) == before
        assert equal(call(model, inputs), expected)

    @pytest.mark.parametrize("name", REAL)
    def test_masks_are_those_of_a_model_built_with_our_layers(self, name: str) -> None:
        built, inputs = real(name)
        with mock.patch.object(nn, "Dropout", Dropout), mock.patch.object(nn.modules.transformer, "Dropout", Dropout):
            expected = built().train()
        model = built().train()
        stock = seeded(model, inputs)
        swap = replace(model)
        assert layers(model) == layers(expected) == [Dropout] * REAL[name][2]
        assert equal(seeded(model, inputs), seeded(expected, inputs))
        assert not equal(seeded(model, inputs), stock)
        swap.undo()
        assert equal(seeded(model, inputs), stock)

    @pytest.mark.parametrize("name", ["bart", "bert", "vit"])
    def test_functional_calls_are_listed(self, name: str) -> None:
        """Each module that calls a dropout function itself, which the calls in a forward tell."""
        if name == "bart":
            model, inputs = bart(pytest.importorskip("transformers")), {"input_ids": torch.ones(2, 5, dtype=torch.long)}
        else:
            built, inputs = real(name)
            model = built()
        running: list[str] = []
        calling: set[str] = set()
        for label, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, label=label: running.append(label))
            module.register_forward_hook(lambda *_: running.pop() and None)

        def seen(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *args, **kwargs: (calling.add(running[-1]), function(*args, **kwargs))[1]  # type: ignore[func-returns-value]

        patches = [mock.patch.object(F, f.__name__, seen(f)) for f in (F.dropout, F.scaled_dot_product_attention)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            swap = replace(model)
        with patches[0], patches[1]:
            call(model.train(), inputs)
        assert calling
        assert calling == {entry.name for entry in swap.unreached if "calls" in entry.what}


class Calls(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(helper(x), 0.5, self.training)


def helper(x: Tensor) -> Tensor:
    return torch.alpha_dropout(x, 0.5, False)


class Own(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return input


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout_rate = 0.25


class TestReplace:
    @pytest.mark.parametrize(("stock", "ours"), list(zip(STOCK, OURS, strict=True)))
    @pytest.mark.parametrize("inplace", [False, True])
    def test_every_kind_both_ways(self, stock: Any, ours: Any, inplace: bool) -> None:
        model, built = nn.Sequential(stock(0.3, inplace)), nn.Sequential(ours(0.3, inplace))
        x = torch.randn(3, 4, 5, 6, 7) if stock is nn.Dropout3d else torch.randn(3, 4, 5, 6)
        x = x[..., 0] if stock is nn.Dropout1d else x
        there = replace(model)
        assert vars(model[0]).keys() == vars(built[0]).keys()
        assert (type(model[0]), model[0].p, model[0].inplace) == (ours, 0.3, inplace)
        assert equal(seeded(model, (x.clone(),)), seeded(built, (x.clone(),)))
        back = replace(model, to="torch")
        assert (type(model[0]), vars(model[0]).keys()) == (stock, vars(stock()).keys())
        assert (model[0].p, model[0].inplace) == (0.3, inplace)
        back.undo()
        assert type(model[0]) is ours
        there.undo()
        assert type(model[0]) is stock

    def test_aliases_references_hooks_and_flags(self) -> None:
        layer, seen = nn.Dropout(0.5), []
        model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.Linear(2, 2), layer)})
        model["b"][1].held = [layer]
        layer.own = "kept"  # type: ignore[assignment]
        layer.eval()
        early = [
            layer.register_forward_hook(lambda *_: seen.append("forward")),
            layer.register_forward_pre_hook(lambda *_: seen.append("pre")),
            layer.register_full_backward_hook(lambda *_: seen.append("backward")),
        ]
        swap = replace(model)
        assert swap.done == ["a"]
        assert model["a"] is model["b"][0] is model["b"][2] is model["b"][1].held[0] is layer
        assert (type(layer), layer.own, layer.training, model["b"].training) == (Dropout, "kept", False, True)
        late = layer.register_forward_hook(lambda *_: seen.append("late"))
        layer.train()
        model["b"](torch.ones(3, 2)).sum().backward()
        assert seen == ["pre", "forward", "late"] * 2 + ["backward"]
        swap.undo()
        for handle in (*early, late):
            handle.remove()
        assert not any(map(len, (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)))
        assert (layer.own, layer.training, layer.p) == ("kept", True, 0.5)

    def test_rates_set_meanwhile_stay(self) -> None:
        model = nn.Sequential(nn.Dropout(1 / 3), nn.Dropout(0.5))
        swap = replace(model)
        model[1].keep_prob = 0.875
        swap.undo()
        assert [model[0].p, model[1].p] == [1 / 3, 0.125]

    def test_what_it_could_not_reach(self) -> None:
        model = nn.ModuleDict(
            {
                "dropout": nn.Dropout(0.5), "calls": Calls(), "own": Own(0.5), "number": Named(),
                "lstm": nn.LSTM(2, 2, 2, dropout=0.5), "attention": nn.MultiheadAttention(2, 1, dropout=0.25),
                "gaussian": GaussianDropout(0.5),
            }
        )  # fmt: skip
        swap = replace(model)
        entries = {(entry.name, entry.kind): str(entry) for entry in swap.unreached}
        assert list(entries) == [
            ("own", "Own"), ("number.dropout_rate", "Named"), ("lstm", "LSTM"), ("attention", "MultiheadAttention"),
            ("calls", "Calls"),
        ]  # fmt: skip
        assert (
            "calls functional.dropout, torch.alpha_dropout in its forward; its masks stay" in entries["calls", "Calls"]
        )
        assert "in .dropout (keep_prob 0.75)" in entries["attention", "MultiheadAttention"]
        for name, _ in list(entries)[:-1]:
            assert f"torchdrop.set_keep_prob(model, {{{name!r}: ...}}) sets it" in str(swap)
            torchdrop.set_keep_prob(model, {name: 0.125})
        assert (model["own"].p, model["number"].dropout_rate, model["lstm"].dropout) == (0.875,) * 3
        assert str(swap).startswith("replaced 1 dropout layer: dropout\nnot reached: 5\n  own (Own): ")

    def test_models_that_are_a_layer_or_hold_none(self) -> None:
        model = nn.Dropout(0.5)
        assert str(replace(model)) == "replaced 1 dropout layer: (model)"
        assert type(model) is Dropout
        for empty in (nn.Sequential(), model):
            with pytest.warns(UserWarning, match=r"^replace: the model has no dropout layers of torch\.nn to replace$"):
                swap = replace(empty)
            swap.undo()
        assert type(model) is Dropout
        with pytest.warns(UserWarning, match=r"^replace: the model has no dropout layers of torchdrop to replace$"):
            replace(nn.Dropout(), to="torch")

    def test_copies_and_files(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        swap = replace(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        x = torch.ones(8, 4)
        for other in copies:
            assert equal(seeded(other, (x,)), seeded(model, (x,)))
        swap.undo()
        assert [type(other[1]) for other in copies] == [Dropout] * 3

    def test_a_traced_model(self) -> None:
        """Its forward is made at run time and belongs to no Python module."""
        model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
        assert replace(model).done == ["1"]
        assert insert(model, {"0": Dropout(0.5)}).done == ["0.inserted.after"]

    def test_with_frozen_masks_and_autocast(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        replace(nn.DataParallel(model))
        x = torch.randn(4, 8)
        with torchdrop.frozen_masks(model), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), model(x))
            assert (model(x) == 0).any()

    @pytest.mark.parametrize(
        ("layer", "reason"),
        [
            (Dropout(keep_prob=torch.tensor(0.5)), "a tensor as keep_prob, which torch.nn's Dropout cannot express"),
            (Dropout(generator=torch.Generator()), "a generator"),
            (Dropout(shared_axes=0), "shared_axes"),
            (Dropout(noise_shape=(1, None)), "noise_shape"),
            (torchdrop.Dropout2d(inverted=False), "inverted=False"),
        ],
    )
    def test_what_torch_cannot_express(self, layer: nn.Module, reason: str) -> None:
        model = nn.Sequential(Dropout(), layer)
        with refused(model, ValueError, f"'1' has {reason}"):
            replace(model, to="torch")

    @pytest.mark.parametrize("layer", [GaussianDropout(0.5), type("Mine", (Dropout,), {})(0.5)])
    def test_what_torch_has_no_layer_for(self, layer: nn.Module) -> None:
        """It is neither left in silence nor made something else."""
        model = nn.Sequential(Dropout(), layer)
        with refused(model, ValueError, "'1' "):
            replace(model, to="torch")

    def test_undoing(self) -> None:
        model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.25))
        swap = replace(model)
        model[1].keep_prob = torch.tensor(0.5)
        with refused(model, ValueError, "'1' has a tensor as keep_prob, which torch.nn's Dropout cannot express"):
            swap.undo()
        model[1].keep_prob = 0.5
        swap.undo()
        with refused(model, RuntimeError, "replacement has been undone already: undo() works once"):
            swap.undo()

    def test_undoing_what_has_been_swapped_back_otherwise(self) -> None:
        model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
        swap = replace(model)
        replace(model[0], to="torch")
        with refused(model, ValueError, "'0' is no longer the layer that was put there, but torch's Dropout:"):
            swap.undo()

    def test_arguments(self) -> None:
        model = nn.Sequential(nn.Dropout())
        with refused(model, ValueError, "to must be 'torchdrop' or 'torch', got 'nn'"):
            replace(model, to="nn")
        with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got type$"):
            replace(nn.Dropout)  # type: ignore[arg-type]

    @pytest.mark.slow
    def test_a_compiled_model(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(9, 4)
        compiled(x)
        swap = replace(compiled)
        assert swap.done == ["1"]
        assert equal(seeded(compiled, (x,)), seeded(model, (x,)))
        swap.undo()
        assert type(model[1]) is nn.Dropout


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
        assert equal(seeded(model, (x,)), seeded(plain, (x,)))
        assert equal(seeded(copy.deepcopy(model), (x,)), seeded(plain, (x,)))
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
        assert equal(seeded(pickle.loads(pickle.dumps(model)), (x,)), seeded(model, (x,)))

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
        before, expected, training = shape_of(model), call(model, inputs), seeded(model.train(), inputs)
        put = insert(model.eval(), {f"{path}.*": Dropout(0.5), f"{path}.0": Dropout(0.25)})
        assert list(model.state_dict()) == before[1]
        torch.testing.assert_close(tensors(call(model, inputs))[0], tensors(expected)[0])
        assert not equal(seeded(model.train(), inputs), training)
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert (
                float(torchdrop.mc_predict(model, inputs, samples=3, output=lambda out: tensors(out)[0]).std.max()) > 0
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

        model, x = Net(), torch.randn(50, 4)
        compiled = torch.compile(model, backend="aot_eager")
        if first != "nothing":
            (compiled if first == "the model" else torch.compile(Net(), backend="aot_eager"))(x)
        put = insert(model if first.endswith("later") else compiled, {"fc": Dropout(0.5)})
        assert 0.3 < dropped(compiled(x)) < 0.7
        put.undo()
        assert dropped(compiled(x)) == 0.0

    @pytest.mark.slow
    def test_at_a_compiled_part(self) -> None:
        model = nn.ModuleDict({"part": torch.compile(nn.Linear(4, 4), backend="aot_eager")})
        insert(model, {"part": Dropout(0.5)})
        assert dropped(model["part"](torch.randn(2000, 4))) == pytest.approx(0.5, abs=0.05)

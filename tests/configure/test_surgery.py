"""`replace`: torchdrop's layers in the place of torch.nn's, and the way back."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import functional

import torchdrop
from tests.configure.surgery import REAL, bart, drawn, layers, real, refused, shape_of
from tests.mc_models import Draws, call, equal
from torchdrop import Dropout, GaussianDropout, insert, replace

STOCK = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
OURS = [getattr(torchdrop, kind.__name__) for kind in STOCK]


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
        stock = drawn(model, inputs)
        swap = replace(model, sites=False)
        assert layers(model) == layers(expected) == [Dropout] * REAL[name][2]
        assert equal(drawn(model, inputs), drawn(expected, inputs))
        assert not equal(drawn(model, inputs), stock)
        swap.undo()
        assert equal(drawn(model, inputs), stock)

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
            swap = replace(model, sites=False)
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
        assert equal(drawn(model, (x.clone(),)), drawn(built, (x.clone(),)))
        back = replace(model, to="torch")
        assert (type(model[0]), vars(model[0]).keys()) == (stock, vars(stock()).keys())
        assert (model[0].p, model[0].inplace) == (0.3, inplace)
        back.undo()
        assert type(model[0]) is ours
        there.undo()
        assert type(model[0]) is stock

    def test_a_forward_of_the_instance_is_not_reached(self) -> None:
        model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
        model[0].forward = lambda x, old=model[0].forward: old(x) * 3  # type: ignore[method-assign]
        swap = replace(model)
        assert (swap.done, type(model[0])) == (["1"], nn.Dropout)
        assert "0 (Dropout): its instance has a forward of its own" in str(swap)
        with pytest.warns(UserWarning, match="save those whose instance has a forward of its own"):
            assert replace(model).done == []
        ours = nn.Sequential(torchdrop.Dropout(0.5))
        ours[0].forward = lambda x, old=ours[0].forward: old(x) * 3  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="'0' has a forward of its own on its instance"):
            replace(ours, to="torch")

    def test_a_forward_under_accelerates_hooks_is_followed(self) -> None:
        hooks, x = pytest.importorskip("accelerate.hooks"), torch.ones(100)
        model, ours = nn.Sequential(nn.Dropout(0.5)), nn.Sequential(torchdrop.Dropout(0.5))

        class Tripled(hooks.ModelHook):  # type: ignore[name-defined, misc]
            def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
                return output * 3

        hooks.add_hook_to_module(model[0], Tripled())
        stock = drawn(model, (x,))
        swap = replace(model)
        assert swap.done == ["0"]
        assert torch.equal(drawn(model, (x,)), drawn(ours, (x,)) * 3)
        swap.undo()
        assert torch.equal(drawn(model, (x,)), stock)
        swap = replace(model)
        hooks.remove_hook_from_module(model[0])
        assert torch.equal(drawn(model, (x,)), drawn(ours, (x,)))
        swap.undo()  # the hook has left the class's forward on the instance
        assert torch.equal(drawn(model, (x,)) * 3, stock)

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
        swap = replace(model, sites=False)
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
            assert equal(drawn(other, (x,)), drawn(model, (x,)))
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
            (Dropout(shard=torchdrop.Shard(0, 0, 4)), "a shard"),
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
        assert equal(drawn(compiled, (x,)), drawn(model, (x,)))
        swap.undo()
        assert type(model[1]) is nn.Dropout

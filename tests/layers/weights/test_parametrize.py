"""Registering, removing, copying, saving and loading parametrizations that drop, and what is refused."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import torchdrop
from torchdrop.aids.max_norm import MaxNorm
from torchdrop.layers.weights.mixout import apply_mixout
from torchdrop.layers.weights.weight import WeightDropout, apply_weight_dropout, remove_weight_dropout, weight_dropout


def raw(module: Any, name: str = "weight") -> Tensor:
    return module.parametrizations[name].original


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.LayerNorm(40), nn.Linear(40, 3))


class TestRegistering:
    def test_names_and_classes_choose(self) -> None:
        model = apply_weight_dropout(mlp(), ["0.*", "3.weight"], 0.5)
        assert list(torchdrop.keep_probs(model)) == [
            "0.parametrizations.weight.0", "0.parametrizations.bias.0", "3.parametrizations.weight.0",
        ]  # fmt: skip
        model = apply_weight_dropout(mlp(), "*.weight", layers=(nn.Linear, nn.Conv2d))
        assert list(torchdrop.keep_probs(model)) == [
            "0.parametrizations.weight.0", "3.parametrizations.weight.0",
        ]  # fmt: skip

    def test_shared_layers_are_parametrized_once(self) -> None:
        layer = nn.Linear(4, 4)
        model = apply_weight_dropout(nn.Sequential(layer, layer), "*weight", 0.5)
        assert len(layer.parametrizations.weight) == 1
        assert model(torch.ones(1, 4)).shape == (1, 4)

    def test_assignment_sets_the_raw_weight(self) -> None:
        layer = apply_weight_dropout(nn.Linear(4, 3), p=0.5)
        value = torch.randn(3, 4)
        layer.weight = value
        assert torch.equal(raw(layer), value)

    def test_stands_beside_other_parametrizations(self) -> None:
        layer = parametrizations.weight_norm(nn.Linear(30, 3))
        norm = layer.weight.detach()
        apply_weight_dropout(layer, p=0.5)
        drawn = layer.weight
        assert torch.allclose(drawn[drawn != 0], 2 * norm[drawn != 0])
        remove_weight_dropout(layer)
        assert torch.equal(layer.weight, norm)
        layer = torchdrop.max_norm(apply_weight_dropout(nn.Linear(30, 3), p=0.5), 0.1)
        remove_weight_dropout(layer)
        assert [type(one) for one in layer.parametrizations.weight] == [MaxNorm]
        assert "_load_from_state_dict" not in vars(type(layer))

    def test_registering_draws_nothing(self) -> None:
        torch.manual_seed(1)
        expected = torch.rand(1)
        layer = nn.Linear(3, 3)
        torch.manual_seed(1)
        apply_weight_dropout(layer, p=0.5)
        assert torch.equal(torch.rand(1), expected)


class TestState:
    def test_state_dict_keys(self) -> None:
        layer = apply_weight_dropout(nn.Linear(4, 3), p=0.5)
        assert list(layer.state_dict()) == ["bias", "parametrizations.weight.original"]
        assert torch.equal(layer.state_dict()["parametrizations.weight.original"], raw(layer))

    @pytest.mark.parametrize("assign", [False, True])
    def test_plain_checkpoints_load(self, assign: bool) -> None:
        plain, model = mlp(), apply_weight_dropout(mlp(), ["0.*", "3.weight"], 0.5)
        given = plain.state_dict()
        keys = list(given)
        model.load_state_dict(given, assign=assign)
        assert list(given) == keys
        x = torch.randn(2, 6)
        assert torch.equal(model.eval()(x), plain.eval()(x))
        other = apply_weight_dropout(mlp(), ["0.*", "3.weight"], 0.1)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.eval()(x), plain(x))
        with pytest.raises(RuntimeError, match=r"Missing key.*0\.parametrizations\.weight\.original"):
            model.load_state_dict({name: value for name, value in given.items() if name != "0.weight"})

    def test_removal_gives_the_same_objects_back(self) -> None:
        model = mlp()
        before = dict(model.named_parameters())
        keys = set(model.state_dict())
        apply_weight_dropout(model, "*")
        remove_weight_dropout(model, ["0.*"])
        assert type(model[0]) is nn.Linear
        assert "parametrizations.weight.original" in model[3].state_dict()
        remove_weight_dropout(model)
        assert set(model.state_dict()) == keys
        assert all(before[name] is parameter for name, parameter in model.named_parameters())

    @pytest.mark.parametrize("applied", [["weight", "bias"], ["bias", "weight"]])
    @pytest.mark.parametrize("removed", [["weight", "bias"], ["bias", "weight"], ["*"]])
    def test_removal_gives_the_order_back_that_optimizers_number_by(
        self, applied: list[str], removed: list[str]
    ) -> None:
        layer, given = nn.Linear(4, 3), torch.optim.Adam(nn.Linear(4, 3).parameters())
        for name in applied:
            apply_weight_dropout(layer, name)
        layer = copy.deepcopy(layer)
        for name in removed:
            remove_weight_dropout(layer, name)
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
        torch.optim.Adam(layer.parameters()).load_state_dict(given.state_dict())

    def test_copies_are_independent(self) -> None:
        """parametrize's copies share a class: what is removed from one would be gone from the other."""
        layer = apply_weight_dropout(nn.Linear(40, 3), p=0.5)
        other = copy.deepcopy(layer)
        assert torch.equal(raw(other), raw(layer))
        assert raw(other) is not raw(layer)
        apply_weight_dropout(other, "bias", 0.5)
        assert layer.bias is layer._parameters["bias"]
        remove_weight_dropout(other)
        assert type(other) is nn.Linear
        assert (layer.weight == 0).any()
        assert torch.equal(layer.eval().weight, other.weight)

    def test_pickling_is_refused_by_torch_with_what_to_do(self) -> None:
        with pytest.raises(RuntimeError, match=r"only supported through state_dict"):
            pickle.dumps(apply_weight_dropout(nn.Linear(4, 3)))
        assert pickle.loads(pickle.dumps(WeightDropout(0.3))).p == 0.3

    def test_moving_to_another_type(self) -> None:
        layer = apply_weight_dropout(nn.Linear(40, 3), p=0.5).to(torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16
        assert layer(torch.ones(2, 40, dtype=torch.bfloat16)).isfinite().all()


class TestErrors:
    @pytest.mark.parametrize(
        ("names", "options", "error", "message"),
        [
            ("wieght", {}, ValueError, "'wieght' names no parameter of the Sequential: near misses: 3.weight, 2."),
            ("relu", {}, ValueError, "'relu' names no parameter of the Sequential: there are 0.weight, 0.bias, 2.w"),
            ("2.*", {"layers": nn.Linear}, ValueError, "'2.*' names no parameter in a layer of the given classes of"),
            ([], {}, ValueError, "names must hold at least one name of a parameter, got none"),
            (3, {}, TypeError, "names must be a string such as 'weight_hh_*', or several, got 3"),
            ("0.*", {"layers": "Linear"}, TypeError, "layers must be a class such as torch.nn.Linear, or a tuple"),
            ("0.*", {"p": 1.5}, ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
            ("0.*", {"keep_prob": torch.ones(7)}, ValueError, "keep_prob of shape (7,) does not broadcast"),
            ("0.*", {"shared_axes": 1}, ValueError, "shared_axes must be in [-1, 1) for a 1-D input, got 1, for '0.b"),
            ("0.*", {"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
        ],
    )
    def test_wrong_arguments_change_nothing(
        self, names: Any, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        model = mlp()
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            apply_weight_dropout(model, names, **options)
        assert not any(parametrize.is_parametrized(module) for module in model.modules())

    def test_no_module(self) -> None:
        with pytest.raises(TypeError, match=r"^module must be a torch.nn.Module, got Tensor$"):
            apply_weight_dropout(torch.ones(3))  # type: ignore[type-var]

    def test_parametrizing_twice(self) -> None:
        model = apply_weight_dropout(mlp(), "3.weight")
        message = r"^3\.weight is under WeightDropout already: change its rate with torchdrop\.set_keep_prob, or undo "
        for again in (apply_weight_dropout, apply_mixout):
            with pytest.raises(ValueError, match=message):
                again(model, "*.weight")
        assert not parametrize.is_parametrized(model[0])

    def test_removing_what_is_not_there(self) -> None:
        model = apply_weight_dropout(mlp(), "3.weight")
        message = "'0.weight' names no parameter under WeightDropout of the Sequential: near misses: 3.weight"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            remove_weight_dropout(model, ["3.weight", "0.weight"])
        assert parametrize.is_parametrized(model[3])
        with pytest.raises(ValueError, match=r"^'nothing' names no parameter of the Sequential"):
            remove_weight_dropout(model, "nothing")
        with pytest.raises(
            ValueError, match=r"^'\*' names no parameter under WeightDropout of the Linear: there are n"
        ):
            remove_weight_dropout(nn.Linear(2, 2))

    def test_integers_and_lazy_layers(self) -> None:
        layer = nn.Linear(3, 3)
        layer.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
        with pytest.raises(
            ValueError, match=r"^weight must be a float16, bfloat16, float32, float64 tensor, got torch.i"
        ):
            apply_weight_dropout(layer)
        with pytest.raises(RuntimeError, match=r"^result type Float can't be cast to the desired output type Long"):
            weight_dropout(torch.ones(3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"^weight has no shape yet, its layer is lazy: run the model once first$"):
            apply_weight_dropout(nn.LazyLinear(3))

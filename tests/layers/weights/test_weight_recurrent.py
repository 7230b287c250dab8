"""Weight dropout and mixout on nn.LSTM, nn.GRU and nn.RNN, which hold their weights in a list of their own."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torchdrop
from torchdrop.layers.weights import parametrize as _parametrize
from torchdrop.layers.weights.mixout import apply_mixout, remove_mixout
from torchdrop.layers.weights.weight import apply_weight_dropout, remove_weight_dropout

CLASSES = (nn.LSTM, nn.GRU, nn.RNN)
every_class = pytest.mark.parametrize("cls", CLASSES)

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 3},
    "bidirectional": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "without bias": {"bias": False},
}


def first_of(out: Any) -> Tensor:
    return out[0].data if isinstance(out[0], PackedSequence) else out[0]


def recurrent(model: nn.Module) -> list[str]:
    """Names of the recurrent matrices."""
    return [name for name in model._flat_weights_names if name.startswith("weight_hh")]  # type: ignore[union-attr]


class Listed(nn.Module):
    """An LSTM as the only part of a model whose head reads its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class TestForward:
    @every_class
    @pytest.mark.parametrize("form", FORMS)
    def test_computes_with_the_drawn_weights(self, cls: Any, form: str) -> None:
        """What a plain layer with the same dropped matrices computes, gradients too."""
        rnn = apply_weight_dropout(cls(5, 8, **FORMS[form]), "weight_hh_*", 0.5)
        assert list(torchdrop.keep_probs(rnn))[1:] == [f"parametrizations.{name}.0" for name in recurrent(rnn)]
        plain, x = cls(5, 8, **FORMS[form]), torch.randn(4, 3, 5)
        with parametrize.cached():
            out = rnn(x)[0]
            with torch.no_grad():
                for name in plain._flat_weights_names:
                    getattr(plain, name).copy_(getattr(rnn, name))
            drawn = {name: getattr(rnn, name).detach() for name in recurrent(rnn)}
        expected = plain(x)[0]
        assert torch.equal(out, expected)
        assert all(0.2 < (weight == 0).float().mean() < 0.8 for weight in drawn.values())
        out.square().sum().backward()
        expected.square().sum().backward()
        for name in plain._flat_weights_names:
            if name in drawn:
                factor = torch.where(drawn[name] == 0, 0.0, 2.0)
                found, wanted = rnn.parametrizations[name].original.grad, getattr(plain, name).grad * factor
            else:
                found, wanted = getattr(rnn, name).grad, getattr(plain, name).grad
            assert torch.allclose(found, wanted, atol=1e-6)

    @every_class
    def test_one_mask_for_all_time_steps_and_a_new_one_each_forward(self, cls: Any) -> None:
        """A forward over six time steps evaluates the parametrization once."""
        rnn = apply_weight_dropout(cls(5, 8), "weight_hh_l0", 0.5)
        x = torch.randn(1, 1, 5).expand(6, 1, 5)
        drawn: list[Tensor] = []
        rnn.parametrizations.weight_hh_l0[0].register_forward_hook(lambda *call: drawn.append(call[-1]))
        first, second = rnn(x)[0], rnn(x)[0]
        assert len(drawn) == 2
        assert not torch.equal(*drawn)
        assert not torch.equal(first, second)

    @every_class
    def test_eval_is_the_layer_itself(self, cls: Any) -> None:
        plain = cls(5, 8, 2, dropout=0.3).eval()
        rnn, x = apply_weight_dropout(copy.deepcopy(plain), "weight_hh_*", 0.5), torch.randn(4, 3, 5)
        assert torch.equal(rnn(x)[0], plain(x)[0])
        assert rnn.weight_hh_l0 is rnn.parametrizations.weight_hh_l0.original

    def test_packed_sequences_projections_and_states(self) -> None:
        rnn = apply_weight_dropout(nn.LSTM(5, 8, proj_size=3), ["weight_hh_l0", "weight_hr_*"], 0.5)
        packed = pack_padded_sequence(torch.randn(6, 3, 5), torch.tensor([6, 4, 1]))
        state = (torch.zeros(1, 3, 3), torch.zeros(1, 3, 8))
        torch.manual_seed(1)
        out = first_of(rnn(packed))
        torch.manual_seed(1)
        assert torch.equal(first_of(rnn(packed, state)), out)
        assert not torch.equal(first_of(rnn(packed)), out)
        with pytest.raises(RuntimeError, match=r"input\.size\(-1\) must be equal to input_size"):
            rnn(torch.randn(6, 3, 4))
        assert all(weight.is_leaf for weight in rnn._flat_weights)

    def test_all_weights_may_be_dropped(self) -> None:
        rnn, x = apply_weight_dropout(nn.GRU(5, 8), "*", 1.0), torch.randn(4, 3, 5)
        assert torch.equal(rnn(x)[0], torch.zeros(4, 3, 8))

    def test_mixout_starts_as_the_layer_and_keeps_its_start(self) -> None:
        rnn, x = nn.LSTM(5, 8), torch.randn(4, 3, 5)
        plain = rnn(x)[0]
        apply_mixout(rnn, "weight_*", 0.7)
        assert torch.equal(rnn(x)[0], plain)
        with torch.no_grad():
            rnn.parametrizations.weight_hh_l0.original.add_(1.0)
        assert not torch.equal(rnn(x)[0], rnn(x)[0])
        remove_mixout(rnn)
        assert type(rnn) is nn.LSTM
        assert torch.equal(rnn(x)[0], rnn(x)[0])


class TestWeights:
    @every_class
    def test_are_trained_and_unharmed(self, cls: Any) -> None:
        rnn = cls(5, 8)
        parameters = dict(rnn.named_parameters())
        apply_weight_dropout(rnn, "weight_hh_*", 0.5)
        before = {name: value.detach().clone() for name, value in parameters.items()}
        optimizer = torch.optim.SGD(rnn.parameters(), 0.1)
        for _ in range(10):
            rnn(torch.randn(4, 3, 5))[0].square().sum().backward()
        assert all(torch.equal(parameters[name], value) for name, value in before.items())
        optimizer.step()
        assert all((parameters[name] != value).float().mean() > 0.9 for name, value in before.items())
        held = [rnn.parametrizations.weight_hh_l0.original, *(p for n, p in parameters.items() if "hh_l0" not in n)]
        assert {id(p) for p in held} <= {id(p) for p in rnn._flat_weights}

    def test_list_is_the_parameters_between_forwards(self) -> None:
        """What a forward drew is not held, so that copying works and memory is freed."""
        rnn, x = apply_weight_dropout(nn.LSTM(5, 8), "weight_hh_*", 0.5), torch.randn(4, 3, 5)
        drawn: list[weakref.ref[Tensor]] = []
        rnn.parametrizations.weight_hh_l0[0].register_forward_hook(lambda *call: drawn.append(weakref.ref(call[-1])))
        rnn(x)
        gc.collect()
        assert drawn[0]() is None
        assert rnn._flat_weights[1] is rnn.parametrizations.weight_hh_l0.original
        with pytest.raises(RuntimeError):
            rnn(torch.randn(4, 3, 6))
        assert rnn._flat_weights[1] is rnn.parametrizations.weight_hh_l0.original

    def test_copies(self) -> None:
        rnn, x = apply_weight_dropout(nn.LSTM(5, 8), "weight_hh_*", 0.5), torch.randn(4, 3, 5)
        rnn(x)
        other = copy.deepcopy(rnn)
        torch.manual_seed(1)
        out = rnn(x)[0]
        torch.manual_seed(1)
        assert torch.equal(other(x)[0], out)
        with torch.no_grad():
            other.parametrizations.weight_hh_l0.original.zero_()
            other.bias_hh_l0.zero_()
        torch.manual_seed(1)
        assert torch.equal(rnn(x)[0], out)
        remove_weight_dropout(other)
        assert type(other) is nn.LSTM
        other(x)
        assert not torch.equal(rnn(x)[0], rnn(x)[0])

    def test_moving_flattening_and_loading(self) -> None:
        plain = nn.LSTM(5, 8)
        rnn = apply_weight_dropout(nn.LSTM(5, 8), "weight_hh_*", 0.5)
        rnn.load_state_dict(plain.state_dict())
        x = torch.randn(4, 3, 5)
        assert torch.equal(rnn.eval()(x)[0], plain(x)[0])
        torch.manual_seed(1)
        rnn.train().double()
        rnn.flatten_parameters()
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(1)))  # nothing drawn
        assert all(isinstance(weight, nn.Parameter) for weight in rnn._flat_weights)
        assert rnn(x.double())[0].dtype == torch.float64
        rnn.load_state_dict(plain.double().state_dict(), assign=True)
        assert torch.equal(rnn.eval()(x.double())[0], plain(x.double())[0])

    def test_functional_call(self) -> None:
        rnn, x = apply_weight_dropout(nn.LSTM(5, 8), "weight_hh_*", 0.5), torch.randn(4, 3, 5)
        values = {name: torch.zeros_like(p, requires_grad=True) for name, p in rnn.named_parameters()}
        out = functional_call(rnn, values, (x,))[0]
        assert torch.equal(out, torch.zeros(4, 3, 8))
        assert rnn(x)[0].abs().max() > 0

    def test_copies_after_functional_gradients(self) -> None:
        """Parameters that were lent for one call are not held."""
        rnn, x = apply_weight_dropout(nn.LSTM(5, 8), "weight_hh_*", 0.5), torch.randn(4, 3, 5)
        values = {name: p.detach() for name, p in rnn.named_parameters()}
        slopes = torch.func.grad(lambda values: functional_call(rnn, values, (x,))[0].sum())(values)
        assert (slopes["parametrizations.weight_hh_l0.original"] == 0).any()
        assert all(isinstance(weight, nn.Parameter) for weight in rnn._flat_weights)
        assert torch.equal(copy.deepcopy(rnn).eval()(x)[0], rnn.eval()(x)[0])

    @pytest.mark.parametrize("by_torch", [False, True])
    def test_removal_after_a_move(self, by_torch: bool) -> None:
        rnn, x = apply_weight_dropout(nn.LSTM(5, 8), "weight_hh_*", 0.5).double(), torch.randn(4, 3, 5).double()
        expected = rnn.eval()(x)[0]
        if by_torch:
            parametrize.remove_parametrizations(rnn, "weight_hh_l0")
        else:
            remove_weight_dropout(rnn)
        assert torch.equal(rnn(x)[0], expected)
        assert torch.equal(copy.deepcopy(rnn)(x)[0], expected)
        rnn.load_state_dict(nn.LSTM(5, 8).double().state_dict(), assign=True)
        assert not torch.equal(rnn(x)[0], expected)

    def test_removal_gives_the_class_and_the_objects_back(self) -> None:
        rnn = nn.LSTM(5, 8, 2)
        before = dict(rnn.named_parameters())
        apply_weight_dropout(rnn, "weight_hh_*", 0.5)
        remove_weight_dropout(rnn, "weight_hh_l1")
        assert [name for name in torchdrop.keep_probs(rnn) if "hh" in name] == ["parametrizations.weight_hh_l0.0"]
        remove_weight_dropout(rnn)
        assert type(rnn) is nn.LSTM
        assert all(getattr(rnn, name) is value for name, value in before.items())
        assert torch.equal(rnn(torch.ones(1, 1, 5))[0], rnn(torch.ones(1, 1, 5))[0])

    def test_beside_another_parametrization(self) -> None:
        rnn, x = parametrizations.weight_norm(nn.LSTM(5, 8), "weight_ih_l0"), torch.randn(4, 3, 5)
        plain = rnn(x)[0]
        apply_weight_dropout(rnn, "weight_hh_l0", 0.5)
        assert not torch.equal(rnn(x)[0], plain)
        assert torch.equal(rnn.eval()(x)[0], plain)
        copy.deepcopy(rnn)
        remove_weight_dropout(rnn)
        assert torch.equal(rnn(x)[0], plain)
        assert "forward" not in vars(type(rnn))

    def test_dropped_weights_get_memory_of_their_own_on_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a GPU: what would be handed to cuDNN's flattening are never the parameters."""
        seen: list[list[Tensor]] = []
        monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda self: seen.append(list(self._flat_weights)))
        monkeypatch.setattr(_parametrize, "_on_cuda", lambda weight: True)
        rnn, x = apply_weight_dropout(nn.LSTM(5, 8), "weight_hh_*", 0.5), torch.randn(4, 3, 5)
        seen.clear()
        rnn(x)[0].sum().backward()
        assert len(seen) == 1
        addresses = {parameter.data_ptr() for parameter in rnn.parameters()}
        assert not any(weight.data_ptr() in addresses for weight in seen[0])
        assert all(parameter.grad is not None for parameter in rnn.parameters())
        rnn.eval()(x)
        assert len(seen) == 1

    def test_wrong_names(self) -> None:
        with pytest.raises(ValueError, match=r"^'weight' names no parameter of the LSTM: near misses: weight_"):
            apply_weight_dropout(nn.LSTM(5, 8))


class TestPackage:
    def test_rates_by_name(self) -> None:
        model, x = Listed(), torch.randn(4, 6, 5)
        apply_weight_dropout(model, "rnn.weight_hh_*", 0.5)
        torchdrop.set_keep_prob(model, {"rnn.parametrizations": 0.25})
        assert dict(torchdrop.keep_probs(model)) == {"rnn": 1.0, "rnn.parametrizations.weight_hh_l0.0": 0.25}
        with torchdrop.disabled(model):
            off = model(x)
        assert torch.equal(model.eval()(x), off)

    @pytest.mark.parametrize("outermost", [False, True])
    def test_frozen_masks_hold_them(self, outermost: bool) -> None:
        model = nn.LSTM(5, 8) if outermost else Listed()
        apply_weight_dropout(model, "*weight_hh_*", 0.5)
        x = torch.randn(4, 6, 5)
        with torchdrop.frozen_masks(model):
            first, second = model(x), model(x)
        assert torch.equal(first[0], second[0])

    def test_monte_carlo_fires_it_beside_dropout_between_layers(self) -> None:
        model = Listed()
        model.rnn = nn.LSTM(5, 8, 2, dropout=0.4, batch_first=True)
        apply_weight_dropout(model, "rnn.weight_hh_*", 0.5).eval()
        x = torch.randn(4, 6, 5)
        plain = model(x)
        with torchdrop.mc_dropout(model, seed=1) as report:
            first, second = model(x), model(x)
        assert len(report.active) == 3
        assert not torch.equal(first, second)
        with torchdrop.mc_dropout(model, seed=1):
            assert torch.allclose(model(x[:2]), first[:2], atol=1e-6)
        result = torchdrop.mc_predict(model, x, samples=4, seed=2, task="regression")
        assert (result.std > 0).all()
        assert torch.equal(model(x), plain)

    @pytest.mark.slow
    def test_compiled_model_runs_with_the_masks_of_eager_code(self) -> None:
        """nn.LSTM itself is left to eager code by torch.compile."""
        model, x = Listed(), torch.randn(4, 6, 5)
        apply_weight_dropout(model, "rnn.weight_hh_*", 0.5)
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            torch.manual_seed(3)
            expected = model(x)
            torch.manual_seed(3)
            assert torch.allclose(compiled(x), expected, atol=1e-6)

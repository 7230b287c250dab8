"""Modules that `replace` reaches: their classes, copies, pickles and hooks, and undoing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import torchdrop
from tests.configure.reached import NAMES, Block, blocks, data
from tests.configure.surgery import refused
from tests.mc_models import Draws, equal
from tests.seeding import seeded
from torchdrop import keep_probs, replace, set_keep_prob
from torchdrop.configure.reach import is_reached

pytestmark = pytest.mark.usefixtures("one_thread")


class TestClasses:
    def test_it_looks_like_its_own_class(self) -> None:
        model = blocks()
        replace(model)
        kind = type(model[0])
        assert (kind.__name__, kind.__qualname__, kind.__module__) == ("Block", "Block", Block.__module__)
        assert isinstance(model[0], Block)
        assert kind is type(model[1])
        assert repr(model) == repr(blocks()).replace("Dropout(p=0.5, inplace=False)", repr(model[0].drop))
        lstm = nn.LSTM(4, 4, 2, dropout=0.5)
        keys = list(lstm.state_dict())
        replace(lstm)
        lstm.flatten_parameters()
        assert isinstance(lstm, nn.RNNBase)
        assert list(lstm.state_dict()) == keys

    def test_another_one_like_it(self) -> None:
        """Code that calls the class of a module gets one whose calls are served, too."""
        model = blocks()
        replace(model)
        other = type(model[0])(p=0.5)
        other.fc = nn.Identity()
        other.drop = nn.Identity()
        expected = seeded(3, torchdrop.functional.dropout, data(), 0.5)
        assert torch.equal(seeded(3, other, data()) - data(), expected + data() - data())
        assert dict(keep_probs(other)) == {"dropout:0": 0.5}

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickles(self, protocol: int) -> None:
        model = blocks()
        replace(model)
        set_keep_prob(model, {"0.dropout:0": 0.5})
        other = pickle.loads(pickle.dumps(model, protocol))
        assert torch.equal(*(seeded(3, m, data()) for m in (model, other)))
        assert keep_probs(other)["0.dropout:0"] == 0.5
        assert type(other[0]) is type(model[0])

    def test_copies_have_rates_of_their_own(self) -> None:
        model = blocks()
        swap = replace(model)
        model(data())
        other = copy.deepcopy(model)
        set_keep_prob(other, {"*.dropout:0": 0.5})
        assert dict(keep_probs(model)) == NAMES
        swap.undo()
        assert is_reached(other[0])
        assert not is_reached(model[0])
        replace(other, to="torch")
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]

    def test_a_class_made_of_a_reached_one(self) -> None:
        """A copy of such a module has its class, as FSDP's and others that change the class again."""
        model = blocks(1)
        replace(model)
        model[0].__class__ = type("Wrapped", (type(model[0]),), {})
        other = copy.deepcopy(model)
        assert type(other[0]) is type(model[0])
        assert torch.equal(*(seeded(3, m, data()) for m in (model, other)))

    def test_a_state_is_loaded_either_way(self) -> None:
        model, other = blocks(), blocks()
        replace(model)
        for parameter in model.parameters():
            parameter.data.add_(1.0)
        other.load_state_dict(model.state_dict())
        assert equal(*(m.eval()(data()) for m in (model, other)))
        model.load_state_dict(other.state_dict(), strict=True)

    def test_hooks(self) -> None:
        """They see what they saw: also those that were there before, and full backward hooks."""
        model, seen = blocks(1), []
        model[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
        model[0].register_forward_hook(lambda *_: seen.append("forward"))
        model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
        swap = replace(model)
        model(data().requires_grad_()).sum().backward()
        swap.undo()
        model(data().requires_grad_()).sum().backward()
        assert seen == ["pre", "forward", "backward"] * 2

    def test_shared_modules(self) -> None:
        model = blocks(1)
        model.append(model[0])
        swap = replace(model)
        assert swap.reached == ["0"]
        model(data())
        assert dict(keep_probs(model)) == {"0.drop": 0.5, "0.dropout:0": 0.75}
        set_keep_prob(model, {"1.dropout:0": 1.0, "1.drop": 1.0})
        assert torch.equal(model(data()), model.eval()(data()))
        swap.undo()
        assert type(model[1]) is Block

    def test_a_forward_of_the_instance(self) -> None:
        """It is listed and left alone; under accelerate's hooks, which call the class's, it is reached."""
        model = blocks()
        model[0].forward = lambda x, old=model[0].forward: old(x) * 3
        swap = replace(model)
        assert swap.reached == ["1"]
        assert "0 (Block): calls F.dropout in its forward" in str(swap)
        hooks = pytest.importorskip("accelerate.hooks")
        hooked = blocks(1)
        hooks.add_hook_to_module(hooked[0], hooks.ModelHook())
        swap = replace(hooked)
        assert swap.reached == ["0"]
        with Draws() as draws:
            hooked(data())
        assert draws.sizes == [2, 2]
        swap.undo()
        assert type(hooked[0]) is Block

    def test_pieces_of_a_whole(self) -> None:
        """A part that is called by itself; a module in eval mode within one in train mode, and the reverse."""
        model = blocks()
        replace(model)
        with Draws() as draws:
            model[0](data())
            model[0].eval()
            model[0](data())
        assert draws.sizes == [2, 2]  # `drop` is in eval mode, too
        model.eval()
        model[0].training = True
        with Draws() as draws:
            model(data())
        assert draws.sizes == [2]

    def test_a_weight_that_is_parametrized(self) -> None:
        model = blocks(1)
        replace(model)
        nn.utils.parametrizations.weight_norm(model[0].fc)
        expected = seeded(3, model, data())
        model.register_buffer("scale", torch.ones(()))
        assert torch.equal(seeded(3, model, data()), expected)
        lstm = nn.LSTM(4, 4, 2, dropout=0.5)
        swap = replace(lstm)
        nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
        x = torch.randn(3, 2, 4)
        with Draws() as draws:
            lstm(x)
        assert draws.sizes == [2]
        with pytest.warns(UserWarning, match="no dropout layers"):
            assert replace(lstm).reached == []
        assert not torchdrop.configure.unreached.unreached(lstm)
        with pytest.raises(ValueError, match=r"'' is no longer the layer that was put there, but .*ParametrizedLSTM"):
            swap.undo()
        message = "'' has the class ParametrizedLSTM, made of the one that replace gave it: undo first what was done"
        with refused(lstm, ValueError, message):
            replace(lstm, to="torch")
        nn.utils.parametrize.remove_parametrizations(lstm, "weight_hh_l0")
        swap.undo()
        assert type(lstm) is nn.LSTM


def test_saved_whole() -> None:
    model = blocks()
    replace(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(*(seeded(3, m, data()) for m in (model, other)))


class TestUndoing:
    def test_two_replacements(self) -> None:
        """The second has nothing left to do, and undoing it changes nothing."""
        model = blocks()
        first = replace(model)
        with pytest.warns(UserWarning, match="no dropout layers of torch"):
            second = replace(model)
        second.undo()
        assert is_reached(model[0])
        first.undo()
        assert type(model[0]) is Block

    def test_layers_first_and_calls_later(self) -> None:
        model = blocks()
        layers = replace(model, sites=False)
        calls = replace(model)
        assert (layers.reached, calls.done, calls.reached) == ([], [], ["0", "1"])
        layers.undo()
        assert type(model[0].drop) is nn.Dropout
        assert is_reached(model[0])
        calls.undo()
        assert type(model[0]) is Block

    def test_in_the_wrong_order(self) -> None:
        model = blocks()
        first = replace(model)
        back = replace(model, to="torch")
        message = "'0.drop' is no longer the layer that was put there, but torch's Dropout: undo first what was done"
        with refused(model, ValueError, message):
            first.undo()
        replaced = replace(model)
        replace(model[1], to="torch")
        with refused(model, ValueError, "'1.drop' is no longer the layer that was put there, but torch's Dropout"):
            replaced.undo()
        assert back.reached == []

    def test_a_call_alone_that_was_left(self) -> None:
        model = nn.Sequential(nn.LSTM(4, 4, 2, dropout=0.5))
        swap = replace(model)
        replace(model, to="torch")
        message = "'0' is no longer the layer that was put there, but torch's LSTM: undo first what was done after that"
        with refused(model, ValueError, message):
            swap.undo()

    def test_a_scripted_module(self) -> None:
        """Its code cannot be changed, so it is listed, once; and a module whose calls are served is not scripted."""
        scripted = torch.jit.script(blocks())
        model = nn.ModuleDict({"first": scripted, "second": blocks()})
        swap = replace(model)
        assert swap.reached == ["second.0", "second.1"]
        assert [(entry.name, entry.kind) for entry in swap.unreached] == [("first", "RecursiveScriptModule")]
        assert "is made by TorchScript, and its code calls aten::dropout" in str(swap)
        with refused(model, ValueError, "the pattern 'first.0.dropout:0' matches none of the layers with a rate"):
            set_keep_prob(model, {"first.0.dropout:0": 0.5})
        traced = torch.jit.trace(blocks().eval(), data())
        assert not torchdrop.configure.unreached.unreached(traced)[0].what.endswith("rand")
        with pytest.raises(RuntimeError, match=r"^torch\.jit\.script cannot compile Block, whose calls torchdrop\.rep"):
            torch.jit.script(model["second"])
        replace(model["second"], to="torch")
        torch.jit.script(model["second"])

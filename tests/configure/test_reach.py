"""Modules that `replace` reaches for the random calls in their own code: what works on them."""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.configure.surgery import refused
from tests.mc_models import Draws, equal
from tests.seeding import seeded
from torchdrop import KeepProbScheduler, keep_probs, replace, schedules, set_keep_prob
from torchdrop.configure.drawing import random_calls
from torchdrop.configure.reach import is_reached

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """Drops in its own code, beside a layer that does."""

    def __init__(self, p: float = 0.25) -> None:
        super().__init__()
        self.fc, self.drop, self.p = nn.Linear(4, 4), nn.Dropout(0.5), p

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.dropout(self.fc(x), self.p, self.training)) + x


def blocks(count: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count)))


def data(rows: int = 9) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def made(forward: Callable[..., Any], **children: nn.Module) -> nn.Module:
    """A module of a class of its own."""
    module: nn.Module = type("Made", (nn.Module,), {"forward": forward, "__module__": __name__})()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def of(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda self, x: function(x)


NAMES = {"0.drop": 0.5, "0.dropout:0": 0.75, "1.drop": 0.5, "1.dropout:0": 0.75}


def alpha(x: Tensor) -> Tensor:
    return torch.alpha_dropout(x, 0.5, True)


class Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).bernoulli_(0.5)


class OtherName(nn.Module):
    def forward(this, x: Tensor) -> Tensor:  # noqa: N805
        return this.helper(x)

    def helper(this, x: Tensor) -> Tensor:  # noqa: N805
        return F.dropout(x, 0.5, this.training)


class Inherits(OtherName):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2

    def helper(self, x: Tensor) -> Tensor:
        return x


class CallsItsBase(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OfFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return alpha(x)


class OfAutograd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Inverse.apply(x)  # type: ignore[no-any-return]


class OfMethod(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(x.shape).uniform_()


class Quiet(nn.Module):
    """What is random is not in its forward, or is a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.start = torch.rand(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x).dropout if False else torchdrop.functional.dropout(self.drop(x))


class TestSearch:
    @pytest.mark.parametrize(
        ("kind", "calls"),
        [
            (Block, ["F.dropout"]), (CallsItsBase, ["F.dropout"]), (OtherName, ["F.dropout"]), (Inherits, []),
            (OfFunction, ["torch.alpha_dropout"]),
            (OfAutograd, ["Tensor.bernoulli_"]), (OfMethod, ["Tensor.uniform_"]), (Quiet, []),
            (nn.LSTM, ["torch.lstm"]), (nn.GRUCell, []), (nn.Transformer, []), (nn.RReLU, ["F.rrelu"]),
            (nn.Sequential, []), (nn.Module, []),
        ],
    )  # fmt: skip
    def test_what_a_class_calls(self, kind: type[nn.Module], calls: list[str]) -> None:
        assert random_calls(kind) == calls

    def test_functions_of_other_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are found by their names in the module, as `torchvision.ops.stochastic_depth` is."""
        other = types.ModuleType("other_package")
        exec("def noisy(x):\n    return x", vars(other))
        monkeypatch.setattr(alpha, "__module__", "other_package")
        monkeypatch.setitem(sys.modules, "other_package", other)
        own = type("Own", (nn.Module,), {"forward": OfFunction.forward})
        assert random_calls(own) == ["torch.alpha_dropout"]


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


class TestRates:
    def test_they_are_listed_once_the_model_has_run(self) -> None:
        model = blocks()
        replace(model)
        assert dict(keep_probs(model)) == {"0.drop": 0.5, "1.drop": 0.5}
        model.eval()(data())
        assert len(keep_probs(model)) == 2
        model.train()(data())
        assert dict(keep_probs(model)) == NAMES
        rows = {row["name"]: row for row in keep_probs(model).rows}
        assert rows["0.dropout:0"] == {
            "name": "0.dropout:0", "kind": "Block", "keep_prob": 0.75, "p": 0.25, "training": True,
            "attribute": "dropout:0", "note": "call, at the rate that the code passes",
        }  # fmt: skip
        set_keep_prob(model, keep_probs(model))
        assert [row["note"] for row in keep_probs(model).rows] == [row["note"] for row in rows.values()]

    def test_without_one_of_their_own_they_follow_the_code(self) -> None:
        model = blocks()
        replace(model)
        model[1].p = 0.125
        model(data())
        assert keep_probs(model)["1.dropout:0"] == 0.875
        model[1].p = 1.0
        assert torch.equal(model[1](data()), data())
        set_keep_prob(model, {"1.dropout:0": 1.0, "1.drop": 1.0})
        model[1].p = 0.9
        torch.testing.assert_close(model[1](data()), model[1].fc(data()) + data())

    def test_patterns(self) -> None:
        model = blocks()
        replace(model)
        model(data())
        set_keep_prob(model, {"*": 0.9, "*.dropout:0": 0.8, "1": 0.7, "1.dropout:0": 0.5})
        assert dict(keep_probs(model)) == {"0.dropout:0": 0.8, "0.drop": 0.9, "1.dropout:0": 0.5, "1.drop": 0.7}
        assert "1.dropout:0  Block    0.5        train  call, set by name\n" in str(keep_probs(model))

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            (
                {"0.dropout:1": 0.5},
                ValueError,
                "the pattern '0.dropout:1' matches none of the layers with a rate: ne",
            ),
            ({"0.attention:0": 0.5}, ValueError, "the pattern '0.attention:0' matches none of the layers with a rate"),
            ({"0.dropout:0": 1.5}, ValueError, "keep_prob must be in [0, 1], got 1.5, for '0.dropout:0'"),
            ({"0.dropout:0": "a"}, TypeError, "keep_prob must be a number or a tensor, got str, for '0.dropout:0'"),
            (
                {"0.dropout:0": torch.tensor(0.5)},
                TypeError,
                "'0.dropout:0' is a call of Block: keep_prob must be a num",
            ),
            ({"2.dropout:0": 0.5}, ValueError, "the pattern '2.dropout:0' matches none of the layers with a rate"),
        ],
    )
    def test_refused(self, given: Any, error: type[Exception], message: str) -> None:
        model = blocks()
        replace(model)
        model(data())
        with refused(model, error, message):
            set_keep_prob(model, given)
        assert dict(keep_probs(model)) == NAMES

    def test_before_the_first_forward_a_full_name_is_enough(self) -> None:
        model = blocks()
        replace(model)
        with refused(model, ValueError, "the pattern '*.dropout:0' matches none of the layers with a rate"):
            set_keep_prob(model, {"*.dropout:0": 0.5})
        with pytest.raises(ValueError, match=r"; calls are listed once the model has run in train mode$"):
            set_keep_prob(model, {"*.dropout:0": 0.5})
        set_keep_prob(model, {"0.dropout:0": 0.5, "0.dropout:9": 0.5})
        model(data())
        assert keep_probs(model)["0.dropout:0"] == 0.5
        notes = {row["name"]: row["note"] for row in keep_probs(model).rows}
        assert notes["0.dropout:0"] == "call, set by name"
        assert notes["0.dropout:9"] == "call, set by name, not made"

    def test_a_call_that_is_gone(self) -> None:
        model = blocks()
        swap = replace(model)
        scheduler = KeepProbScheduler(model, {"0.dropout:0": schedules.linear(1.0, 0.5, 5)})
        swap.undo()
        with pytest.raises(
            ValueError, match=r"^the layer '0\.dropout:0', scheduled by '0\.dropout:0', is no longer in"
        ):
            scheduler.step()
        with refused(model, ValueError, "the pattern '0.dropout:0' matches none of the layers with a rate"):
            set_keep_prob(model, {"0.dropout:0": 0.5})


class TestScheduler:
    def test_calls_follow_schedules(self) -> None:
        model = blocks()
        replace(model)
        model(data())
        down = schedules.linear(1.0, 0.0, 4)
        scheduler = KeepProbScheduler(model, {"0.dropout:0": down, "1.dropout:0": schedules.scale(down), "*.drop": 1.0})
        for step in range(4):
            assert keep_probs(model)["0.dropout:0"] == down(step)
            assert keep_probs(model)["1.dropout:0"] == pytest.approx(1 - 0.25 * down(step))
            model(data())
            scheduler.step()
        assert torch.equal(model[0](data()), data())

    def test_resuming_before_the_first_forward(self) -> None:
        """The state of a run whose model had run, and of one whose model had not."""
        down = schedules.linear(1.0, 0.0, 4)
        states = []
        for ran in (True, False):
            model = blocks()
            replace(model)
            if ran:
                model(data())
            scheduler = KeepProbScheduler(model, {"0.dropout:0": down})
            scheduler.step()
            states.append(scheduler.state_dict())
        assert [state["layers"] for state in states] == [{"0.dropout:0": 0.75}, {"0.dropout:0": None}]
        for state in states:
            model = blocks()
            replace(model)
            KeepProbScheduler(model, {"0.dropout:0": down}).load_state_dict(state)
            assert keep_probs(model)["0.dropout:0"] == 0.75

    def test_what_is_not_known_yet_cannot_be_scaled(self) -> None:
        model = blocks()
        replace(model)
        message = r"cannot scale the rate of '0\.dropout:0', which the model's code has not passed yet: run the model"
        with pytest.raises(ValueError, match=message):
            KeepProbScheduler(model, {"0.dropout:0": schedules.scale(schedules.linear(1.0, 0.0, 4))})


class TestDisabledAndFrozen:
    def test_disabled(self) -> None:
        model = blocks()
        replace(model)
        expected = model.eval()(data())
        model.train()
        for _ in range(2):  # with the calls unknown, and known
            with torchdrop.disabled(model), torchdrop.disabled(model[0]):
                assert torch.equal(model(data()), expected)
            assert not torch.equal(model(data()), expected)
            assert dict(keep_probs(model)) == NAMES
        set_keep_prob(model, {"0.dropout:0": 0.5})
        with torchdrop.disabled(model):
            set_keep_prob(model, {"0.dropout:0": 0.25})
            assert torch.equal(model(data()), expected)
        assert keep_probs(model)["0.dropout:0"] == 0.25

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_disabled_under_checkpointing(self, reentrant: bool) -> None:
        """A call that is not listed yet is refused, as a function is; one that is has a rate of 0, as a layer has."""
        model, x = blocks(1), data().requires_grad_()
        replace(model)
        with torchdrop.disabled(model), pytest.raises(RuntimeError, match="again in backward, where it cannot be"):
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        model(x)
        with torchdrop.disabled(model):
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        expected = torch.autograd.grad(model.eval()(x).square().sum(), x)[0]
        torch.testing.assert_close(x.grad, expected)

    def test_frozen(self) -> None:
        model = blocks()
        replace(model)
        with torchdrop.frozen_masks(model, seed=1):
            y = model(data())
            assert torch.equal(model(data()), y)
            torch.rand(3)
            assert torch.equal(model(data()[:5]), y[:5])
            assert torch.equal(torch.func.vmap(model, randomness="same")(data().unsqueeze(0))[0], y)
        with torchdrop.frozen_masks(model, seed=2):
            assert not torch.equal(model(data()), y)

    def test_frozen_gradients_are_finite_differences(self) -> None:
        model = blocks().double()
        replace(model)
        with torchdrop.frozen_masks(model, seed=1):
            assert torch.autograd.gradcheck(model, data(3).double().requires_grad_())


@pytest.mark.slow
class TestCompiled:
    """With Dynamo's own backends; masks are those of eager mode under one seed."""

    @staticmethod
    def both(model: nn.Module, compiled: Any, x: Tensor) -> list[list[Tensor]]:
        results = []
        for call in (model, compiled):
            x = x.detach().clone().requires_grad_()
            y = seeded(3, call, x)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, torch.rand(2)])
        return results  # type: ignore[return-value]

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_rates(self, backend: str) -> None:
        """A rate that was set by name is an input of the compiled code."""
        model, x = blocks(1), data()
        replace(model)
        counter = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend(backend)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        counts = []
        for rate in (0.5, 0.75, 0.25):
            set_keep_prob(compiled, {"0.dropout:0": rate})
            for eager, own in zip(*self.both(model, compiled, x), strict=True):
                torch.testing.assert_close(own, eager)
            counts.append(counter.frame_count)
        assert counts == [counts[0]] * 3

    def test_disabled(self) -> None:
        model, x = blocks(), data()
        replace(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        set_keep_prob(model, {"0.dropout:0": 0.5})
        compiled(x)
        with torchdrop.disabled(compiled):
            silent = compiled(x)
        for eager, own in zip(*self.both(model, compiled, x), strict=True):
            torch.testing.assert_close(own, eager)
        torch.testing.assert_close(silent, model.eval()(x))

    def test_disabled_where_no_rate_was_set(self) -> None:
        model, x = blocks(), data()
        replace(model)
        set_keep_prob(model, {"*.drop": 1.0})
        compiled = torch.compile(model, backend="aot_eager")
        assert not torch.equal(compiled(x), compiled(x))
        with torchdrop.disabled(compiled):
            torch.testing.assert_close(compiled(x), compiled(x))
        assert not torch.equal(compiled(x), compiled(x))

    def test_kinds(self) -> None:
        calls: list[tuple[Callable[..., Any], dict[str, Any]]] = [
            (lambda self, x: F.dropout1d(x.unsqueeze(-1), 0.5, self.training).squeeze(-1), {}),
            (lambda self, x: F.alpha_dropout(x, 0.5, self.training), {}),
            (lambda self, x: F.alpha_dropout(F.feature_alpha_dropout(x, 0.5), 0.5), {}),  # off, by their defaults
            (lambda self, x: x * torch.rand(x.shape[0], 1) + x.new_empty(x.shape).bernoulli_(0.4), {}),
            (lambda self, x: F.gumbel_softmax(x), {}),
            (lambda self, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0), {}),
            (lambda self, x: self.inner(x, x, x)[0], {"inner": nn.MultiheadAttention(4, 2, dropout=0.5)}),
            (lambda self, x: self.inner(x, x, x)[0], {"inner": nn.MultiheadAttention(4, 2, dropout=0.5).eval()}),
        ]
        for forward, children in calls:
            torch.compiler.reset()
            model = made(forward, **children)
            replace(model)
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            for eager, own in zip(*self.both(model, compiled, data()), strict=True):
                torch.testing.assert_close(own, eager)

    def test_what_dynamo_does_not_show(self) -> None:
        """torch.rand_like, torch.randn_like and torch.normal keep PyTorch's numbers in compiled code, where Dynamo
        shows them to no function mode."""
        for function in (torch.rand_like, torch.randn_like):
            torch.compiler.reset()
            model = made(of(function))
            replace(model)
            compiled = torch.compile(model, backend="aot_eager")
            assert torch.equal(seeded(3, compiled, data()), seeded(3, function, data()))
            assert not torch.equal(seeded(3, model, data()), seeded(3, function, data()))

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
    def test_recurrent_layers_break_the_graph(self, kind: Any) -> None:
        torch.compiler.reset()
        model = nn.Sequential(nn.Linear(4, 4), kind(4, 4, 3, dropout=0.5))
        replace(model)
        wrapped = made(lambda self, x: self.inner(x)[0] * 2, inner=model)
        compiled = torch.compile(wrapped, backend="aot_eager")
        for eager, own in zip(*self.both(wrapped, compiled, data()), strict=True):
            torch.testing.assert_close(own, eager)


def test_the_name_of_a_call() -> None:
    assert re.fullmatch(torchdrop.configure.rate_sites._CALL, "dropout:0")


def test_saved_whole() -> None:
    model = blocks()
    replace(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(*(seeded(3, m, data()) for m in (model, other)))


class TestAids:
    def test_audit(self) -> None:
        """Calls that are served have names, also before the model has run."""
        model, other = blocks(), blocks()
        replace(model)
        replace(other, sites=False)
        for _ in range(2):
            found, expected = (torchdrop.audit(m, data()) for m in (model, other))
            assert {f.code for f in found.findings} == {"two in a row"}
            assert {f.code for f in expected.findings} == {"two in a row", "rate captured elsewhere"}
            assert [str(c) for c in found.calls] == [str(c) for c in expected.calls]
            model(data())
        set_keep_prob(model, {"0.dropout:0": 0.5})
        assert [call.rate for call in torchdrop.audit(model, data()).calls if call.kind == "dropout"] == [0.5, 0.25]

    def test_feature_statistics(self) -> None:
        model, other = blocks(), blocks()
        replace(model)
        found, expected = (str(torchdrop.feature_statistics(m, data(), layers="*.fc")) for m in (model, other))
        assert found == expected

    def test_cost_check(self) -> None:
        """The cost under frozen masks is a function of the parameters; rates that were set are those that it has."""
        model = blocks()
        replace(model)
        set_keep_prob(model, {"0.dropout:0": 1.0, "1.dropout:0": 1.0, "*.drop": 1.0})
        optimizer = torch.optim.SGD(model.parameters(), 0.01)

        def cost() -> Tensor:
            return model(data()).square().mean()

        def step() -> None:
            optimizer.zero_grad()
            cost().backward()
            optimizer.step()

        assert torchdrop.check_cost_decreases(model, cost, step, iterations=2).frozen is None
        set_keep_prob(model, {"1.dropout:0": 0.5})
        check = torchdrop.check_cost_decreases(model, cost, step, iterations=2)
        assert check.frozen is not None
        assert not check.frozen.problem
        assert check.frozen.costs[0] != check.off.costs[0]
        with torchdrop.frozen_masks(model, seed=0):
            assert float(cost().detach()) == check.frozen.costs[0]

    def test_inserted_layers(self) -> None:
        model = blocks()
        swap = replace(model)
        put = torchdrop.insert(model, {"0.fc": torchdrop.Dropout(keep_prob=0.0), "0": torchdrop.Dropout(0.0)})
        torch.testing.assert_close(model[0](data()), data())
        put.undo()
        swap.undo()
        assert type(model[0]) is Block

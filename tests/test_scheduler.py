"""`KeepProbScheduler`: rates that follow schedules, resumed, compiled, and refused with nothing changed."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchdrop
from tests import ROOT
from tests.ops.test_operators import Net, same_masks
from torchdrop import KeepProbScheduler, keep_probs, rules, schedules
from torchdrop.configure import rate_sites as rate_sites

DOWN = schedules.linear(1.0, 0.0, 10)


class Attention(nn.Module):
    """Rates as other packages hold them: numbers in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_dropout, self.keep_prob = 0.1, 0.7


def net() -> Any:
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(4, 8), drop1=torchdrop.Dropout(0.2), fc2=nn.Linear(8, 8), drop2=torchdrop.Dropout(0.4),
            stock=nn.Dropout(0.1),
        )
    )  # fmt: skip


@contextmanager
def nothing_changed(model: nn.Module, scheduler: KeepProbScheduler | None = None) -> Iterator[None]:
    before = dict(keep_probs(model)), scheduler and (scheduler.last_step, scheduler.state_dict())
    yield
    assert (dict(keep_probs(model)), scheduler and (scheduler.last_step, scheduler.state_dict())) == before


class TestSteps:
    def test_creating_sets_step_0_and_each_step_the_next(self) -> None:
        model = net()
        scheduler = KeepProbScheduler(model, {"drop1": DOWN, "stock": lambda step: 0.5 + 0.05 * step, "drop2": 0.3})
        for step in range(5):
            expected = {"drop1": 1 - step / 10, "drop2": 0.3, "stock": 0.5 + 0.05 * step}
            assert scheduler.last_step == step
            assert scheduler.get_last_keep_prob() == dict(keep_probs(model)) == pytest.approx(expected, abs=1e-15)
            assert model.stock.p == pytest.approx(0.5 - 0.05 * step, abs=1e-15)
            assert scheduler.step() is None

    @given(st.lists(st.integers(0, 60), min_size=1, max_size=5))
    def test_seeking_knows_no_past(self, steps: list[int]) -> None:
        given = {"*": schedules.cyclic(1.0, 0.2, 13), "drop2": schedules.scale(schedules.linear(0.0, 1.0, 40))}
        sought, stepped = KeepProbScheduler(net(), given), KeepProbScheduler(net(), given)
        for step in steps:
            sought.seek(step)
        for _ in range(steps[-1]):
            stepped.step()
        assert sought.get_last_keep_prob() == stepped.get_last_keep_prob()
        assert sought.state_dict() == stepped.state_dict()
        assert sought.get_last_keep_prob()["drop1"] == schedules.cyclic(1.0, 0.2, 13)(steps[-1])

    @pytest.mark.parametrize("per", ["step", "epoch"])
    def test_the_loop_of_learning_rates(self, per: str) -> None:
        """Forward i sees the rate of step i, with a learning-rate scheduler beside it, in either order."""
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = KeepProbScheduler(model, {"drop*": DOWN})
        of_lr = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        seen = []
        for _ in range(3):
            for _ in range(2):
                seen.append((model.drop1.keep_prob, model.drop2.keep_prob, of_lr.get_last_lr()[0]))
                optimizer.zero_grad()
                model(torch.randn(3, 4)).square().mean().backward()
                optimizer.step()
                if per == "step":
                    scheduler.step()
                    of_lr.step()
            if per == "epoch":
                of_lr.step()
                scheduler.step()
        at = range(6) if per == "step" else [0, 0, 1, 1, 2, 2]
        assert seen == [(DOWN(i), DOWN(i), pytest.approx(0.9**i)) for i in at]

    def test_every_kind_of_holder(self) -> None:
        model = nn.ModuleDict(
            {"lstm": nn.LSTM(3, 3, 2, dropout=0.5), "mha": nn.MultiheadAttention(4, 2, 0.5), "own": Attention(),
             "stock": nn.Dropout(0.5), "ours": torchdrop.Dropout(0.5)}
        )  # fmt: skip
        scheduler = KeepProbScheduler(model, {"*": DOWN})
        scheduler.seek(3)
        names = ["lstm", "mha", "own.attention_dropout", "own.keep_prob", "stock", "ours"]
        assert scheduler.get_last_keep_prob() == dict.fromkeys(names, 0.7)
        lstm, mha, own, stock, ours = model.values()
        assert [lstm.dropout, mha.dropout, own.attention_dropout, own.keep_prob] == [0.3, 0.3, 0.3, 0.7]
        x = torch.randn(9, 5, 3)
        fresh = nn.LSTM(3, 3, 2, dropout=0.3)
        fresh.load_state_dict(lstm.state_dict())
        outputs: list[Tensor] = []
        for layer in (lstm, fresh):
            torch.manual_seed(3)
            outputs.append(layer(x)[0])
        assert torch.equal(*outputs)
        for layer in (stock, ours):
            assert set(layer(torch.full((999,), 0.7)).unique().tolist()) == {0.0, 1.0}

    def test_scaling_keeps_ratios_of_what_the_rates_were(self) -> None:
        model = net()
        scheduler = KeepProbScheduler(model, {"*": schedules.scale(schedules.linear(0.0, 1.0, 4))})
        for step in range(6):
            dropped = [1 - k for k in scheduler.get_last_keep_prob().values()]
            assert dropped == pytest.approx([p * min(1, step / 4) for p in (0.2, 0.4, 0.1)], abs=1e-15)
            scheduler.step()
        assert dict(keep_probs(model)) == dict(keep_probs(net()))

    def test_a_tensor_becomes_a_number(self) -> None:
        model = nn.Sequential(torchdrop.Dropout(keep_prob=torch.tensor([0.5, 0.6])))
        with pytest.raises(TypeError, match=r"cannot scale the rate of '0', a tensor: give the layer a number first"):
            KeepProbScheduler(model, {"0": schedules.scale(0.5)})
        assert isinstance(model[0].keep_prob, Tensor)
        scheduler = KeepProbScheduler(model, {"0": torch.tensor(0.25)})
        assert scheduler.get_last_keep_prob() == {"0": 0.25}
        torch.save(scheduler.state_dict(), file := io.BytesIO())
        file.seek(0)
        scheduler.load_state_dict(torch.load(file, weights_only=True))

    def test_monte_carlo_draws_at_the_rate_of_the_step_and_leaves_it(self) -> None:
        model, at_half, x = net().eval(), net().eval(), torch.randn(5, 4)
        at_half.load_state_dict(model.state_dict())
        torchdrop.set_keep_prob(at_half, {"*": 0.5})
        scheduler = KeepProbScheduler(model, {"*": DOWN})
        scheduler.seek(5)
        with nothing_changed(model, scheduler):
            mean = torchdrop.mc_predict(model, x, 8, seed=1).mean
        assert torch.equal(mean, torchdrop.mc_predict(at_half, x, 8, seed=1).mean)
        scheduler.seek(2)
        assert not torch.equal(torchdrop.mc_predict(model, x, 8, seed=1).mean, mean)

    def test_a_step_while_disabled_leaves_dropout_off_and_counts(self) -> None:
        """A usual training loop, with the noise off to debug it: the context promises keep_prob 1 everywhere."""
        model = net()
        scheduler = KeepProbScheduler(model, {"drop*": DOWN})
        with torchdrop.disabled(model):
            scheduler.step()
            scheduler.step()
            inside = dict(keep_probs(model))
        assert inside == {"drop1": 1.0, "drop2": 1.0, "stock": 1.0}
        assert scheduler.last_step == 2
        assert dict(keep_probs(model)) == {"drop1": 0.8, "drop2": 0.8, "stock": 0.9}

    @pytest.mark.parametrize("step", [1.0, True, "3", None, float("nan")])
    def test_a_step_is_an_integer(self, step: Any) -> None:
        scheduler = KeepProbScheduler(model := net(), {"*": DOWN})
        message = f"step must be an integer, got {type(step).__name__}"
        with nothing_changed(model, scheduler), pytest.raises(TypeError, match=message):
            scheduler.seek(step)

    def test_a_step_is_not_negative_and_may_be_of_numpy(self) -> None:
        scheduler = KeepProbScheduler(model := net(), {"*": DOWN})
        with nothing_changed(model, scheduler), pytest.raises(ValueError, match="step must not be negative, got -1"):
            scheduler.seek(-1)
        scheduler.seek(np.int64(3))
        assert (scheduler.last_step, type(scheduler.last_step)) == (3, int)


class TestPatterns:
    def test_the_most_specific_wins(self) -> None:
        scheduler = KeepProbScheduler(net(), {"*": 0.9, "drop*": DOWN, "drop2": 0.5})
        scheduler.step()
        assert scheduler.get_last_keep_prob() == {"drop1": 0.9, "drop2": 0.5, "stock": 0.9}
        scheduler.step()
        assert scheduler.get_last_keep_prob()["drop1"] == 0.8

    @pytest.mark.parametrize(
        ("rates", "kind", "message"),
        [
            ({"dorp1": 0.5}, ValueError, r"'dorp1' matches none of the layers with a rate: near misses: drop1"),
            ({"*": 0.5, "head": 0.9}, ValueError, r"'head' matches none of the layers with a rate"),
            ({"fc*": 0.5}, ValueError, r"'fc\*' matches only fc1, fc2, and none of the layers with a rate"),
            ({"drop?": 0.5, "*rop1": 0.5}, ValueError, r"both match 'drop1' and neither is more specific"),
            ({}, ValueError, r"give at least one pattern for the names of layers with a rate, got none"),
            ([("drop1", 0.5)], TypeError, r"give patterns and values as a mapping.*got list"),
            ({1: 0.5}, TypeError, r"a pattern must be a string, got int"),
            ({"*": rules.uniform(0.5)}, TypeError, r"'\*' has a rule over layers, uniform\(0.5\), and no schedule"),
            ({"*": rules.by_weight_size()}, TypeError, r"'\*' has a rule over layers.*set_keep_prob"),
            (
                {"drop1": schedules.linear},
                TypeError,
                r"'drop1' has linear\(start.*called with a step.*linear\(1.0",
            ),
            ({"drop1": lambda: 0.5}, TypeError, r"'drop1' has <lambda>\(\), which cannot be called with a step alone"),
            ({"drop1": "0.5"}, TypeError, r"must be a number, got '0.5', for the pattern 'drop1'"),
            ({"drop1": True}, TypeError, r"must be a number, got True, for the pattern 'drop1'"),
            ({"drop1": None}, TypeError, r"must be a number, got None, for the pattern 'drop1'"),
            ({"drop1": torch.ones(3)}, TypeError, r"must be a number, got tensor.*for the pattern 'drop1'"),
            ({"drop1": 1.5}, ValueError, r"keep_prob must be in \[0, 1\], got 1.5, for the pattern 'drop1'"),
            ({"drop1": math.nan}, ValueError, r"keep_prob must be in \[0, 1\], got nan, for the pattern 'drop1'"),
            ({"drop2": 0.1, "*": schedules.scale(6.0)}, ValueError, r"at most 5 for .* got 6.0.*'drop1'"),
            ({"drop2": schedules.scale(lambda _: 9)}, ValueError, r"got 9.0 at step 0 from the schedule of 'drop2'"),
        ],
    )
    def test_refused(self, rates: Any, kind: type[Exception], message: str) -> None:
        with nothing_changed(model := net()), pytest.raises(kind, match=message):
            KeepProbScheduler(model, rates)

    def test_refused_models(self) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
            KeepProbScheduler([torchdrop.Dropout()], {"*": 0.5})
        with pytest.raises(ValueError, match=r"matches only .* none of the layers with a rate: there are none"):
            KeepProbScheduler(nn.Sequential(nn.Linear(2, 2)), {"*": 0.5})

    def test_shared_layers_go_by_any_name_and_are_set_once(self) -> None:
        shared = torchdrop.Dropout()
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": shared})
        scheduler = KeepProbScheduler(model, {"b.0": schedules.scale(0.5)})
        assert scheduler.get_last_keep_prob() == {"a": 0.75}
        del model["a"]
        scheduler.step()
        assert shared.keep_prob == 0.75
        model["d"] = shared
        with pytest.raises(ValueError, match="neither is more specific"):
            KeepProbScheduler(model, {"c": 0.5, "d": 0.6})


class TestBadSteps:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (1.2, r"keep_prob must be in \[0, 1\], got 1.2"),
            (-1e-9, r"keep_prob must be in \[0, 1\], got -1e-09"),
            (math.nan, r"keep_prob must be in \[0, 1\], got nan"),
            (torch.tensor(1.25), r"keep_prob must be in \[0, 1\], got 1.25"),
            ("0.5", r"keep_prob must be a number, got '0.5'"),
            (True, r"keep_prob must be a number, got True"),
            (None, r"keep_prob must be a number, got None"),
            (torch.tensor([0.5]), r"keep_prob must be a number, got tensor\(\[0.5"),
        ],
    )
    @pytest.mark.parametrize("at", [0, 2])
    def test_name_step_and_layer_and_change_nothing(self, value: Any, message: str, at: int) -> None:
        rates = {"*": DOWN, "stock": lambda step: value if step == at else torch.tensor(0.25)}  # the last is bad
        kind = TypeError if "number" in message else ValueError
        refused = pytest.raises(kind, match=f"{message}.* at step {at} from the schedule of 'stock'")
        if at == 0:
            with nothing_changed(model := net()), refused:
                KeepProbScheduler(model, rates)
            return
        scheduler = KeepProbScheduler(model := net(), rates)
        scheduler.step()
        for _ in range(2):
            with nothing_changed(model, scheduler), refused:
                scheduler.step()
        scheduler.seek(3)
        assert scheduler.get_last_keep_prob() == {"drop1": 0.7, "drop2": 0.7, "stock": 0.25}

    def test_what_a_layer_demands_beyond_is_named_too(self) -> None:
        """Gaussian dropout takes no keep_prob of 0."""
        model = nn.Sequential(torchdrop.Dropout(), torchdrop.GaussianDropout(0.5))
        scheduler = KeepProbScheduler(model, {"*": schedules.linear(0.5, 0.0, 1)})
        message = r"keep_prob must be in \(0, 1\] for Gaussian dropout, got 0.0.*step 1.*'1'"
        with nothing_changed(model, scheduler), pytest.raises(ValueError, match=message):
            scheduler.step()


class TestChangedModels:
    def test_swapped_layers_go_on(self) -> None:
        model = net()
        stock = model.stock
        scheduler = KeepProbScheduler(model, {"*": schedules.scale(DOWN)})
        swap = torchdrop.replace(model)
        scheduler.seek(5)
        assert model.stock is stock
        assert isinstance(stock, torchdrop.Dropout)
        assert stock.keep_prob == scheduler.get_last_keep_prob()["stock"] == pytest.approx(0.95, abs=1e-15)
        swap.undo()
        scheduler.seek(0)
        assert type(stock) is nn.Dropout
        assert stock.p == 0.1

    @pytest.mark.parametrize("change", ["deleted", "exchanged parent", "undone insertion"])
    def test_a_layer_that_is_gone(self, change: str) -> None:
        model = nn.ModuleDict({"body": net(), "drop": torchdrop.Dropout()})
        put = torchdrop.insert(model, {"body.fc1": torchdrop.Dropout()})
        scheduler = KeepProbScheduler(model, {"body.*": DOWN, "drop": DOWN})
        gone, near = "body.drop1", "body.drop2"
        if change == "deleted":
            del model["body"].drop1
        elif change == "undone insertion":
            put.undo()
            gone, near = "body.fc1.inserted.after", "body.fc1"
        else:
            model["body"] = nn.Sequential(OrderedDict(fc1=nn.Linear(4, 4), drop9=torchdrop.Dropout()))
            gone, near = "body.fc1.inserted.after", "body.drop9|body.fc1"
        message = rf"layer '{gone}', scheduled by 'body.\*', is no longer in the model \(near misses: .*({near})"
        state = scheduler.state_dict()
        for act in (scheduler.step, lambda: scheduler.seek(0), lambda: scheduler.load_state_dict(state)):
            with nothing_changed(model, scheduler), pytest.raises(ValueError, match=message):
                act()

    def test_a_layer_that_another_one_stands_for(self) -> None:
        """Here no other name is a near miss: the message says that the name now stands for another layer."""
        model = net()
        scheduler = KeepProbScheduler(model, {"drop1": DOWN})
        model.drop1 = torchdrop.Dropout(0.3)
        with nothing_changed(model), pytest.raises(ValueError, match="layer 'drop1', scheduled by 'drop1'") as caught:
            scheduler.step()
        assert "near misses: drop1" not in str(caught.value)

    def test_a_number_that_is_gone(self) -> None:
        model = nn.ModuleDict({"own": Attention()})
        scheduler = KeepProbScheduler(model, {"own.attention_dropout": DOWN})
        del model["own"].attention_dropout
        with pytest.raises(ValueError, match=r"'own.attention_dropout'.* is no longer in the model"):
            scheduler.step()
        assert not hasattr(model["own"], "attention_dropout")

    def test_a_layer_that_has_moved_goes_on(self) -> None:
        model = net()
        scheduler = KeepProbScheduler(model, {"drop1": DOWN})
        layer = model.drop1
        del model.drop1
        model.fc2.moved = layer
        scheduler.step()
        assert layer.keep_prob == 0.9


class TestState:
    def test_goes_on_in_the_middle_of_another_run_and_twice(self) -> None:
        given = {"*": schedules.scale(schedules.early(0.0, 9)), "drop1": schedules.cosine(1.0, 0.1, 7)}
        whole, other = KeepProbScheduler(net(), given), KeepProbScheduler(model := net(), given)
        whole.seek(3)
        saved = copy.deepcopy(state := whole.state_dict())
        other.seek(8)
        for _ in range(2):
            other.load_state_dict(state)
            assert (other.last_step, other.get_last_keep_prob()) == (3, whole.get_last_keep_prob())
            assert other.get_last_keep_prob() == dict(keep_probs(model))
            other.step()
        assert state == saved
        whole.step()
        assert other.get_last_keep_prob() == whole.get_last_keep_prob()

    def test_brings_the_rates_that_scaling_multiplies(self) -> None:
        torchdrop.set_keep_prob(model := net(), {"drop1": 0.1})
        state = KeepProbScheduler(model, {"*": schedules.scale(0.5)}).state_dict()
        scheduler = KeepProbScheduler(net(), {"*": schedules.scale(0.5)})
        scheduler.load_state_dict(state)
        assert scheduler.get_last_keep_prob() == dict(keep_probs(model))
        assert scheduler.get_last_keep_prob()["drop1"] == pytest.approx(0.55)

    @pytest.mark.parametrize(
        ("patterns", "lacks", "has"),
        [
            (["drop1", "stock"], r"\['drop2'\]", r"\['stock'\]"),
            (["drop1"], r"\['drop2'\]", "nothing"),
            (["*"], "nothing", r"\['stock'\]"),
        ],
    )
    def test_of_another_model(self, patterns: list[str], lacks: str, has: str) -> None:
        scheduler = KeepProbScheduler(model := net(), {"drop*": schedules.scale(DOWN)})
        other = KeepProbScheduler(net(), dict.fromkeys(patterns, DOWN))
        other.step()
        message = rf"another model's scheduler.*lacks {lacks} and has {has} that is not scheduled here"
        with nothing_changed(model, scheduler), pytest.raises(ValueError, match=message):
            scheduler.load_state_dict(other.state_dict())

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (None, "what KeepProbScheduler.state_dict"),
            ({}, "what KeepProbScheduler.state_dict"),
            ({"step": 3}, "what KeepProbScheduler.state_dict"),
            ({"step": 3, "layers": {"drop1": 0.5}, "lr": 1}, "what KeepProbScheduler.state_dict"),
            ({"last_epoch": 3, "base_lrs": [0.1]}, "what KeepProbScheduler.state_dict"),
            ({"step": 3, "layers": None}, "state"),
            ({"step": 3, "layers": ["drop1"]}, "state"),
            ({"step": 3, "layers": {"drop1": 1.9}}, r"keep_prob must be in \[0, 1\], got 1.9"),
            ({"step": -3, "layers": {"drop1": 0.9}}, "step must not be negative, got -3"),
            ({"step": 11, "layers": {"drop1": 0.9}}, "at step 11 from the schedule of 'drop1'"),
        ],
    )
    @pytest.mark.parametrize("scaled", [True, False])
    def test_refused(self, state: Any, message: str, scaled: bool) -> None:
        given: Any = schedules.scale(lambda step: 1 - step / 10) if scaled else lambda step: 1 - step / 10
        scheduler = KeepProbScheduler(model := net(), {"drop1": given})
        scheduler.step()
        with nothing_changed(model, scheduler), pytest.raises(ValueError, match=message):
            scheduler.load_state_dict(state)

    def test_copies_and_pickles_go_with_their_model(self) -> None:
        model = net()
        scheduler = KeepProbScheduler(model, {"*": schedules.scale(DOWN), "drop1": DOWN})
        scheduler.seek(2)
        for copies in (copy.deepcopy((model, scheduler)), pickle.loads(pickle.dumps((model, scheduler)))):
            other, going_on = copies
            with nothing_changed(model, scheduler):
                going_on.step()
            assert going_on.last_step == 3
            assert going_on.get_last_keep_prob() == dict(keep_probs(other))
            assert other.drop1.keep_prob == 0.7 != model.drop1.keep_prob


def train(given: str, path: Path | None, start: int, stop: int, load: bool = True) -> dict[str, Tensor]:
    """Trains from `start` to `stop`, from what `path` holds if that is not 0; saves there else. With dropout on."""
    torch.set_num_threads(1)
    torch.manual_seed(start)
    model = nn.Sequential(net(), nn.Tanh(), torchdrop.GaussianDropout(0.3), torchdrop.AlphaDropout(0.1))
    if start == 0 and given == "scale":
        torchdrop.set_keep_prob(model, {"0.drop1": 0.6})  # which a resumed run does not know
    drop = schedules.scale(schedules.triangular(0.1, 1.0, 8)) if given == "scale" else schedules.cosine(1.0, 0.2, 20)
    scheduler = KeepProbScheduler(model, {"*": drop})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if start and path:
        saved = torch.load(path, weights_only=True)
        for name, part in parts.items():
            if load or name != "scheduler":
                part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
    for step in range(start, stop):
        x = torch.linspace(-1, 1, 40).reshape(10, 4) * (1 + step)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        scheduler.step()
    if start == 0 and path:
        saved = {name: part.state_dict() for name, part in parts.items()}
        torch.save(saved | {"random": torch.get_rng_state()}, path)
    return dict(model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("given", ["schedule", "scale"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(given: str, tmp_path: Path) -> None:
    path, result = tmp_path / "saved.pt", tmp_path / "result.pt"
    whole = train(given, None, 0, 12)
    train(given, path, 0, 5)
    script = (
        "import sys, torch; from pathlib import Path; from tests.test_scheduler import train;"
        "torch.save(train(sys.argv[1], Path(sys.argv[2]), 5, 12), sys.argv[3])"
    )
    run = [sys.executable, "-c", script, given, str(path), str(result)]
    subprocess.run(run, cwd=ROOT, check=True, timeout=240)
    resumed, forgotten = torch.load(result, weights_only=True), train(given, path, 5, 12, load=False)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not all(torch.equal(forgotten[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("original", [True, False])
def test_100_steps_take_one_compilation_and_masks_are_those_of_eager(original: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if original else "aot_eager")
    model = Net()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    given = {"*": schedules.cosine(1.0, 0.4, 99), "drops.2": schedules.scale(DOWN)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torchdrop's layers alone: nothing to warn of
        scheduler = KeepProbScheduler(model if original else compiled, given)
    assert sorted(scheduler.get_last_keep_prob()) == [f"drops.{i}" for i in range(6)]
    x, dropped = torch.randn(9, 20, requires_grad=True), set()
    for step in range(100):
        if step % 9 == 0:
            same_masks(compiled, model, step, x)
        else:
            (y := compiled(x)).sum().backward()
            dropped.add(int((y == 0).sum()))
        scheduler.step()
    assert counter.frame_count == 1
    assert len(dropped) > 1
    assert scheduler.get_last_keep_prob()["drops.5"] == pytest.approx(0.4)


class TestCompiled:
    @pytest.mark.parametrize("how", ["compiled", "in place", "part"])
    def test_stock_layers_are_warned_of(self, how: str) -> None:
        model = nn.ModuleDict({"body": net()})
        if how == "in place":
            model.compile()
        else:
            model["body"] = torch.compile(model["body"])
        given = torch.compile(model) if how == "compiled" else model
        with pytest.warns(UserWarning, match=r"new rate of body.stock recompiles it.*torchdrop.replace\(model\)") as w:
            scheduler = KeepProbScheduler(given, {"body.*": DOWN})
        assert w[0].filename == __file__
        scheduler.step()
        assert scheduler.get_last_keep_prob() == dict.fromkeys(["body.drop1", "body.drop2", "body.stock"], 0.9)
        torchdrop.replace(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            KeepProbScheduler(given, {"*": DOWN})

    def test_stock_layers_beside_the_compiled_part_are_not(self) -> None:
        model = nn.Sequential(torch.compile(nn.Sequential(torchdrop.Dropout())), nn.Dropout())
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            KeepProbScheduler(model, {"1": DOWN})

    def test_the_warning_is_true(self) -> None:
        from torch._dynamo.testing import CompileCounter

        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(nn.Sequential(nn.Dropout()), backend=counter)
        with pytest.warns(UserWarning, match="recompiles"):
            scheduler = KeepProbScheduler(compiled, {"*": DOWN})
        for _ in range(3):
            scheduler.step()
            compiled(torch.ones(3))
        assert counter.frame_count == 3

    def test_a_step_looks_for_names_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a model of compiled blocks no layer is where its name says; a search for each takes quadratic time."""
        calls = []

        def counted(model: nn.Module) -> Any:
            calls.append(model)
            return rate_sites.names_of(model)

        model = nn.ModuleList(torch.compile(nn.Sequential(torchdrop.Dropout())) for _ in range(20))
        scheduler = KeepProbScheduler(model, {"*": DOWN})
        monkeypatch.setattr("torchdrop.scheduler.names_of", counted)
        scheduler.step()
        assert scheduler.get_last_keep_prob() == {f"{i}.0": 0.9 for i in range(20)}
        assert len(calls) <= 1
        KeepProbScheduler(torch.compile(nn.Sequential(torchdrop.Dropout())), {"*": DOWN}).step()
        assert len(calls) <= 1  # in a model that is compiled as a whole they all are


class TestShown:
    def test_as_a_table(self) -> None:
        scheduler = KeepProbScheduler(net(), {"drop*": schedules.linear(1.0, 0.5, 6), "stock": 0.3})
        scheduler.step()
        assert repr(scheduler).splitlines() == [
            "KeepProbScheduler at step 1",
            "  drop1  0.9167    linear(1.0, 0.5, 6)",
            "  drop2  0.9167    linear(1.0, 0.5, 6)",
            "  stock  0.3       constant(0.3)",
        ]
        assert "(model)  0.5" in repr(KeepProbScheduler(torchdrop.Dropout(), {"*": 0.5}))

    @pytest.mark.parametrize("steps", [1, 7, 500, 501, 10_000])
    def test_as_a_plot(self, steps: int) -> None:
        pytest.importorskip("matplotlib")
        model, tent = net(), schedules.triangular(1.0, 0.5, 40)
        scheduler = KeepProbScheduler(model, {"drop*": tent, "stock": schedules.scale(DOWN)})
        scheduler.seek(3)
        with nothing_changed(model, scheduler):
            ax = scheduler.plot(steps)
        assert scheduler.plot(steps, ax) is ax
        lines = {line.get_label(): line for line in ax.get_lines()[:2]}
        assert list(lines) == ["drop1, drop2", "stock"]
        x, y = lines["drop1, drop2"].get_data()
        assert (x[0], x[-1], len(x)) == (0, steps, min(steps, 500) + 1)
        assert all(np.diff(x) > 0)
        assert list(y) == [tent(int(step)) for step in x]
        assert lines["stock"].get_ydata()[-1] == pytest.approx(1 - 0.1 * DOWN(steps), abs=1e-15)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "keep_prob")

    def test_labels(self) -> None:
        pytest.importorskip("matplotlib")
        many = nn.ModuleList(torchdrop.Dropout() for _ in range(5))
        (text,) = KeepProbScheduler(many, {"*": DOWN}).plot(5).get_legend().get_texts()
        assert text.get_text() == "0, 1, 2 and 2 more"
        (text,) = KeepProbScheduler(torchdrop.Dropout(), {"*": DOWN}).plot(5).get_legend().get_texts()
        assert text.get_text() == "(model)"
        private = nn.ModuleDict({"_drop": torchdrop.Dropout()})  # matplotlib hides labels that begin so
        (text,) = KeepProbScheduler(private, {"*": DOWN}).plot(5).get_legend().get_texts()
        assert "_drop" in text.get_text()

    @pytest.mark.parametrize("steps", [0, -1, 2.0, True, "5"])
    def test_refused(self, steps: Any) -> None:
        pytest.importorskip("matplotlib")
        scheduler = KeepProbScheduler(net(), {"drop1": lambda step: 1 - step / 10})
        with pytest.raises(ValueError, match="steps must be an integer of at least 1, got"):
            scheduler.plot(steps)
        with pytest.raises(ValueError, match=r"got -0.1.* at step 11 from the schedule of 'drop1'"):
            scheduler.plot(20)

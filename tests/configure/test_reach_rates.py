"""Modules that `replace` reaches: the rates of their calls, schedules, frozen masks, and what else looks at calls."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import torchdrop
from tests.configure.reached import NAMES, Block, blocks, data
from tests.configure.surgery import refused
from torchdrop import KeepProbScheduler, keep_probs, replace, schedules, set_keep_prob

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_name_of_a_call() -> None:
    assert re.fullmatch(torchdrop.configure.rate_sites._CALL, "dropout:0")


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

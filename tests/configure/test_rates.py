"""Keep probabilities by name: patterns, the table, setting them, rules by weights, and switching all of them off."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.mc_models import Draws, Of, unchanged
from torchdrop import Dropout, GaussianDropout, disabled, keep_probs, rules, set_keep_prob
from torchdrop.core.names import matches, matches_itself, parts_of, winner

identifiers = st.text("ab._0[]*?!-", min_size=1, max_size=8)


class DropPath(nn.Module):
    """As other packages write it: a rate as a number."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.drop_count = 3
        self.dropping = True
        self._drop_cache = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop_prob, self.training)


class StochasticDepth(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.mode = p, "row"


class Old(nn.Module):
    """A keep probability held as a number, beside numbers that are no rates."""

    def __init__(self) -> None:
        super().__init__()
        self.keep_prob, self.eps, self.p, self.drop_limit = 0.8, 0.1, 0.5, 1.5


NEAR = "the layers with a rate: near misses: "
AND = f", and none of {NEAR}"
LATER = "0.9, 3), which changes with the step: use torchdrop.KeepProbScheduler(model, rates)"


def many() -> nn.Module:
    shared = Dropout(0.4)
    return nn.ModuleDict(
        {
            "features": nn.Sequential(nn.Linear(3, 4), Dropout(0.1), nn.Linear(4, 4), nn.Dropout(0.2)),
            "path": DropPath(0.3),
            "depth": StochasticDepth(0.35),
            "lstm": nn.LSTM(4, 4, 2, dropout=0.25),
            "attention": nn.MultiheadAttention(4, 2, dropout=0.125),
            "old": Old(),
            "first": nn.Sequential(shared),
            "second": nn.Sequential(shared),
        }
    )


EXPECTED = {
    "features.1": 0.9, "features.3": 0.8, "path.drop_prob": 0.7, "depth.p": 0.65, "lstm": 0.75, "attention": 0.875,
    "old.keep_prob": 0.8, "first.0": 0.6,
}  # fmt: skip


@contextmanager
def refused(model: nn.Module, error: type[Exception], message: str) -> Iterator[None]:
    """Asserts the message, in full from its start, and that nothing is changed."""
    before = keep_probs(model).rows
    with unchanged(model), pytest.raises(error, match="^" + re.escape(message)):
        yield
    assert keep_probs(model).rows == before


class TestNames:
    @given(identifiers)
    @example("a[0]")
    @example("*?[!]")
    def test_a_name_matches_itself(self, name: str) -> None:
        """Also one with a glob's characters in it: ModuleDict takes any."""
        assert matches(name, name)
        assert matches_itself(name, name)

    @given(st.lists(st.sampled_from("abc"), min_size=1, max_size=5))
    def test_parts(self, parts: list[str]) -> None:
        name = ".".join(parts)
        assert parts_of(name) == [name[: 2 * n - 1] for n in range(1, len(parts) + 1)]
        assert all(matches(part, name) for part in parts_of(name))

    def test_part_by_part(self) -> None:
        assert matches("a.*", "a.b.c")
        assert matches("a.*.c", "a.b.x.c")
        assert not matches_itself("a.*", "a.b.c")
        assert matches_itself("a.*.c", "a.b.c")
        assert not matches("A", "a")

    @pytest.mark.parametrize(
        ("patterns", "name", "best"),
        [
            (["*", "fc*", "fc1"], "fc1", "fc1"),
            (["*", "features", "features.*"], "features.2", "features.*"),
            (["*", "features.?", "features.2"], "features.2", "features.2"),
            (["*.drop", "body.*.drop"], "body.2.drop", "body.*.drop"),
            (["body.[0-9].*", "body.3.*"], "body.3.drop", "body.3.*"),
            (["body.[0123456789].drop", "body.3"], "body.3.drop", "body.[0123456789].drop"),
            (["fc1*", "fc1"], "fc1", "fc1"),
            (["a", "b"], "c", None),
        ],
    )
    def test_the_most_specific_wins(self, patterns: list[str], name: str, best: str | None) -> None:
        assert winner(patterns, [name]) == best
        assert winner(patterns[::-1], [name]) == best

    def test_of_several_names_the_one_that_fits_best_counts(self) -> None:
        assert winner(["a*", "a"], ["a", "a.b"]) == winner(["a*", "a"], ["a.b", "a"]) == "a"

    def test_a_tie_below_the_winner_is_none(self) -> None:
        assert winner(["*1", "f*", "fc1"], ["fc1"]) == "fc1"


class TestTable:
    def test_every_place(self) -> None:
        assert dict(keep_probs(many())) == EXPECTED
        assert list(keep_probs(many())) == list(EXPECTED)

    def test_rows(self) -> None:
        model = many()
        model["features"].eval()
        rows = {row["name"]: row for row in keep_probs(model).rows}
        assert rows["features.3"] == {
            "name": "features.3", "kind": "Dropout", "keep_prob": 0.8, "p": 0.2, "training": False, "attribute": "",
            "note": "",
        }  # fmt: skip
        assert rows["lstm"] == {
            "name": "lstm", "kind": "LSTM", "keep_prob": 0.75, "p": 0.25, "training": True, "attribute": "dropout",
            "note": "number in .dropout",
        }  # fmt: skip
        assert rows["old.keep_prob"]["p"] == pytest.approx(0.2)

    @pytest.mark.parametrize(
        "model", [nn.Dropout(0.1), nn.Sequential(Dropout(keep_prob=torch.rand(2, 3, 4)), nn.GRU(2, 2)), many()]
    )
    def test_columns_are_aligned(self, model: nn.Module) -> None:
        head, *lines = str(keep_probs(model)).split("\n")
        for line, row in zip(lines, keep_probs(model).rows, strict=True):
            assert line.startswith(row["name"] or "(model)")
            assert line[head.index("kind") :].startswith(row["kind"])
            assert re.match(r"train|eval", line[head.index("mode") :]), line

    def test_without_layers(self) -> None:
        assert len(keep_probs(nn.Sequential())) == 0
        assert str(keep_probs(nn.Linear(2, 2))) == "no layer has a rate"

    def test_a_model_that_is_a_layer(self) -> None:
        model = Dropout(0.5)
        set_keep_prob(model, keep_probs(model))
        set_keep_prob(model, {"*": 0.25})
        assert model.keep_prob == 0.25

    def test_a_model_that_holds_a_number(self) -> None:
        model = DropPath(0.5)
        assert dict(keep_probs(model)) == {"drop_prob": 0.5}
        set_keep_prob(model, {"drop_prob": 0.75})
        assert model.drop_prob == 0.25

    @given(st.floats(0, 1))
    @example(1 / 3)
    @example(1e-20)
    def test_setting_what_is_there_changes_nothing(self, p: float) -> None:
        """To the bit, for thirds and other numbers that are no decimals too."""
        model = nn.ModuleDict({"a[0]*": Dropout(p), "b": nn.Dropout(p), "c": nn.LSTM(2, 2, 2, dropout=p)})
        model["d"], model["e"] = DropPath(p), Dropout(keep_prob=p)
        before = [model["a[0]*"].p, model["b"].p, model["c"].dropout, model["d"].drop_prob, model["e"].keep_prob]
        set_keep_prob(model, keep_probs(model))
        assert before == [
            model["a[0]*"].p, model["b"].p, model["c"].dropout, model["d"].drop_prob, model["e"].keep_prob
        ]  # fmt: skip

    def test_attention_whose_dropout_is_a_module(self) -> None:
        """Subclasses of nn.MultiheadAttention put what they like in its place."""
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, dropout=0.5)})
        model["attention"].dropout = nn.Dropout(0.25)
        assert dict(keep_probs(model)) == {"attention.dropout": 0.75}

    def test_more_rates_of_recurrent_and_dropout_layers(self) -> None:
        model = nn.ModuleDict({"lstm": nn.LSTM(2, 2, 2, dropout=0.5), "drop": type("Own", (nn.Dropout,), {})(0.5)})
        model["lstm"].weight_drop = model["drop"].path_drop_rate = 0.25
        expected = {"lstm": 0.5, "lstm.weight_drop": 0.75, "drop": 0.5, "drop.path_drop_rate": 0.75}
        assert dict(keep_probs(model)) == expected

    def test_wrapped_models_and_no_module(self) -> None:
        assert list(keep_probs(nn.DataParallel(nn.Sequential(Dropout())))) == ["module.0"]
        with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got dict$"):
            keep_probs({})  # type: ignore[arg-type]


class TestSet:
    def test_by_pattern(self) -> None:
        model = many()
        set_keep_prob(model, {"*": 0.5, "features": 0.9, "features.3": 0.25, "attention": 1, "second": 0.125})
        expected = {**dict.fromkeys(EXPECTED, 0.5), "features.1": 0.9, "features.3": 0.25, "attention": 1.0}
        assert dict(keep_probs(model)) == {**expected, "first.0": 0.125}
        assert (model["lstm"].dropout, model["path"].drop_prob, model["old"].keep_prob) == (0.5, 0.5, 0.5)
        assert (model["old"].p, model["old"].eps, model["path"]._drop_cache) == (0.5, 0.1, 0.5)

    def test_an_attribute_is_set_as_a_plain_number(self) -> None:
        model = many()
        set_keep_prob(model, {"*": np.float64(0.9)})
        for value in (model["lstm"].dropout, model["path"].drop_prob, model["features"][3].p):
            assert type(value) is float
            assert value == 0.1

    def test_it_acts(self) -> None:
        model = many()
        set_keep_prob(model, {"features.1": 0.0, "features.3": 1.0, "path": 0.0})
        x = torch.ones(7)
        assert torch.equal(model["features"][1](x), torch.zeros(7))
        assert torch.equal(model["features"][3](x), x)
        assert torch.equal(model["path"](x), torch.zeros(7))

    def test_tensors(self) -> None:
        model, rate = nn.Sequential(Dropout(), nn.Linear(2, 2), Dropout()), torch.tensor([0.0, 1.0])
        set_keep_prob(model, {"0": rate})
        assert keep_probs(model)["0"] is rate
        assert torch.equal(model[0](torch.ones(3, 2)), torch.tensor([[0.0, 1.0]]).expand(3, 2))

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({}, ValueError, "give at least one pattern for the names of layers with a rate, got none"),
            ([("*", 0.5)], TypeError, "give patterns and values as a mapping, {'features.*': 0.9}, got list"),
            ({3: 0.5}, TypeError, "a pattern must be a string, got int"),
            ({"*": 0.5, "featurs.1": 0.9}, ValueError, f"the pattern 'featurs.1' matches none of {NEAR}features.1"),
            ({"*": 0.5, "features.0": 0.9}, ValueError, f"the pattern 'features.0' matches only features.0{AND}"),
            ({"first": 0.5, "*rst.0": 0.25}, ValueError, "the patterns '*rst.0' and 'first' both match 'first.0' and"),
            ({"lstm": 0.5, "path": 1.5}, ValueError, "keep_prob must be in [0, 1], got 1.5, for 'path.drop_prob'"),
            ({"lstm": 0.5, "path": float("nan")}, ValueError, "keep_prob must be in [0, 1], got nan, for 'path.d"),
            ({"features.1": "0.5"}, TypeError, "keep_prob must be a number or a tensor, got str, for 'features.1'"),
            ({"features.1": None}, TypeError, "keep_prob must be a number or a tensor, got NoneType, for 'features.1'"),
            ({"features.1": True}, TypeError, "keep_prob must be a number or a tensor, got bool, for 'features.1'"),
            ({"features.1": torch.tensor([0.5, 2])}, ValueError, "keep_prob must be in [0, 1], got 2.0, for 'features"),
            ({"lstm": torch.tensor(0.5)}, TypeError, "'lstm' (LSTM) holds its rate as a number, so keep_prob must be"),
            ({"features.3": torch.tensor(0.5)}, TypeError, "'features.3' (Dropout) holds its rate as a number"),
            (
                {"path": torchdrop.schedules.linear(0.5, 0.9, 3)},
                TypeError,
                f"'path' has a schedule, linear(0.5, {LATER}",
            ),
            ({"lstm": 0.5, "path": lambda layers: []}, ValueError, "the rule of 'path' must give a keep_prob for each"),
            ({"lstm": 0.5, "path": lambda step: 0.5}, TypeError, "the rule of 'path' must give a keep_prob for each"),
            ({"lstm": 0.5, "path": Dropout(0.5)}, TypeError, "keep_prob must be a number or a tensor, got Dropout, f"),
            ({"*": 1.5, **EXPECTED}, ValueError, "keep_prob must be in [0, 1], got 1.5"),
        ],
    )
    def test_refused(self, given: Any, error: type[Exception], message: str) -> None:
        model = many()
        with refused(model, error, message):
            set_keep_prob(model, given)

    def test_names_under_which_one_layer_is_shared_tie(self) -> None:
        model = nn.ModuleDict({"a": Dropout()})
        model["b"] = model["a"]
        with refused(model, ValueError, "the patterns 'a' and 'b' both match 'a' and neither is more specific: name"):
            set_keep_prob(model, {"a": 0.5, "b": 0.25})

    def test_a_layer_that_demands_more_is_named(self) -> None:
        model = nn.Sequential(Dropout(), GaussianDropout())
        message = "keep_prob must be in (0, 1] for Gaussian dropout, got 0.0: its noise would be infinite, for '1'"
        with refused(model, ValueError, message):
            set_keep_prob(model, {"*": 0.0})

    def test_no_layers_at_all(self) -> None:
        with pytest.raises(
            ValueError, match=r"^the pattern '\*' matches only 0, and none of the layers .*: there are none$"
        ):
            set_keep_prob(nn.Sequential(nn.Linear(2, 2)), {"*": 0.5})
        with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got NoneType$"):
            set_keep_prob(None, {"*": 0.5})  # type: ignore[arg-type]


def ng() -> nn.Sequential:
    """His network 3-7-7-3-2-1, with dropout on the input, every hidden layer and the output."""
    layers: list[nn.Module] = [Dropout()]
    for before, after in [(3, 7), (7, 7), (7, 3), (3, 2), (2, 1)]:
        layers += [nn.Linear(before, after), nn.ReLU(), Dropout()]
    return nn.Sequential(*layers)


class TestRules:
    def test_by_weight_size(self) -> None:
        model = ng()
        set_keep_prob(model, {"*": rules.by_weight_size()})
        expected = [0.9, 1 - 0.5 * 21 / 49, 0.5, 1 - 0.5 * 21 / 49, 1 - 0.5 * 6 / 49, 1.0]
        assert list(keep_probs(model).values()) == pytest.approx(expected)

    def test_each_pattern_has_its_own_layers(self) -> None:
        """The largest matrix is that of the layers that the pattern won."""
        model = nn.ModuleDict({"a": ng(), "b": ng(), "c": Dropout()})
        set_keep_prob(model, {"a.*": rules.linear_in_depth(0.4), "b": rules.uniform(0.25), "b.15": 0.75, "c": 0.5})
        values = list(keep_probs(model).values())
        assert values == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, *[0.25] * 5, 0.75, 0.5])

    def test_convolutions_recurrent_layers_and_embeddings(self) -> None:
        model = nn.Sequential(
            nn.Embedding(999, 4), Dropout(), nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), Dropout(),
            nn.LSTM(8, 8, 2, dropout=0.1), nn.Linear(8, 2),
        )  # fmt: skip
        set_keep_prob(model, {"*": rules.by_weight_size(0.5)})
        lstm = 4 * 4 * 8 * 8
        assert dict(keep_probs(model)) == pytest.approx({"1": 0.9, "4": 1 - 0.5 * 96 / lstm, "5": 0.5})

    def test_a_rate_inside_the_last_weights_acts_on_the_output(self) -> None:
        model = nn.Sequential(nn.Linear(3, 4), Dropout(), nn.LSTM(4, 4, 2, dropout=0.5))
        set_keep_prob(model, {"*": rules.by_weight_size(0.5)})
        assert dict(keep_probs(model)) == {"1": 0.5, "2": 1.0}

    def test_parametrized_weights_count_as_the_matrix_they_make(self) -> None:
        model = nn.Sequential(nn.Linear(3, 7), Dropout(), nn.Linear(7, 7), Dropout(), nn.Linear(7, 1))
        expected = copy.deepcopy(model)
        set_keep_prob(expected, {"*": rules.by_weight_size()})
        nn.utils.parametrizations.weight_norm(model[0])
        nn.utils.parametrizations.spectral_norm(model[2])
        set_keep_prob(model, {"*": rules.by_weight_size()})
        assert dict(keep_probs(model)) == dict(keep_probs(expected))

    def test_a_rule_that_fails_changes_nothing(self) -> None:
        model = many()
        with refused(model, ValueError, "the rule of 'features' must give a keep_prob for each of 2 layers, got 3"):
            set_keep_prob(model, {"lstm": 0.5, "features": lambda layers: [0.5] * 3})
        with refused(model, ValueError, "keep_prob must be in [0, 1], got 2.0, for 'features.3'"):
            set_keep_prob(model, {"lstm": 0.5, "features": lambda layers: [0.5, 2.0]})


def attend(self: nn.Module, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)


def multi_head(self: nn.Module, x: Tensor) -> Tensor:
    """As some models call it, with a rate of their own."""
    eye, none = torch.eye(4), torch.zeros(12)
    rate, training = 0.5, self.training
    project = (torch.cat([eye] * 3), none, None, None, False, rate, eye, none[:4])
    return F.multi_head_attention_forward(x, x, x, 4, 2, *project, training=training)[0]


def functional(self: nn.Module, x: Tensor) -> Tensor:
    return torch.dropout(F.dropout(x, 0.5, self.training), 0.5, self.training)


def ours(self: nn.Module, x: Tensor) -> Tensor:
    return torchdrop.functional.dropout(torchdrop.functional.alpha_dropout(x, 0.5, self.training), 0.5, self.training)


def recompute(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda h: F.dropout(self.drop(h), 0.5, self.training) * h, x, use_reentrant=reentrant)  # type: ignore[operator]

    return forward


SILENT: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(Dropout(), nn.Dropout(), nn.Dropout1d(), GaussianDropout(), nn.AlphaDropout()),
    "functions": lambda: Of(functional),
    "our functions": lambda: Of(ours),
    "attention": lambda: Of(attend),
    "multi-head function": lambda: Of(multi_head),
    "numbers": lambda: nn.Sequential(DropPath(0.5), nn.TransformerEncoderLayer(4, 2, 8, 0.5)),
    "multi-head": lambda: Of(lambda self, x: self.inner(x, x, x), inner=nn.MultiheadAttention(4, 2, dropout=0.5)),
    "recurrent": lambda: Of(lambda self, x: self.inner(x[0])[0], inner=nn.LSTM(4, 4, 2, dropout=0.5)),
    "not inverted": lambda: nn.Sequential(Dropout(inverted=False)),
    "a tensor": lambda: nn.Sequential(Dropout(keep_prob=torch.full((4,), 0.5))),
    "a generator": lambda: nn.Sequential(Dropout(generator=torch.Generator())),
    "data parallel": lambda: nn.DataParallel(nn.Sequential(Dropout(), Of(functional))),
}


def inputs() -> Tensor:
    return torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(1))


def with_gradient(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = inputs().requires_grad_()
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


class TestDisabled:
    @pytest.mark.parametrize("name", SILENT)
    def test_nothing_is_dropped_forward_or_backward(self, name: str) -> None:
        """In train mode: the same output and gradients as in eval mode, although most of these drop otherwise."""
        model = SILENT[name]().train()
        with disabled(model):
            silent = with_gradient(model)
        if name == "not inverted":
            set_keep_prob(model, {"*": 1.0})
        for value, expected in zip(silent, with_gradient(model.eval()), strict=True):
            torch.testing.assert_close(value, expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_what_checkpointing_would_run_again_is_refused(self, reentrant: bool) -> None:
        """Function modes are off in backward, where the recomputation would drop: gradients would be wrong."""
        model = Of(recompute(reentrant), drop=Dropout())
        with pytest.raises(RuntimeError, match="again in backward, where it cannot be disabled"), disabled(model):
            with_gradient(model)
        assert keep_probs(model)["drop"] == 0.5

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_layers_under_checkpointing(self, reentrant: bool) -> None:
        model = Of(lambda m, x: checkpoint(lambda h: m.drop(h) * h, x, use_reentrant=reentrant), drop=Dropout())
        with disabled(model):
            silent = with_gradient(model)
        for value, expected in zip(silent, with_gradient(model.eval()), strict=True):
            torch.testing.assert_close(value, expected)

    def test_layers_in_a_list(self) -> None:
        """They are no part of the model for PyTorch, but run in its forward."""
        layers = [nn.Dropout(0.5), Dropout(0.5)]
        model, x = Of(lambda self, x: layers[0](layers[1](x))), torch.ones(64)
        with disabled(model):
            assert torch.equal(model(x), x)
        assert not torch.equal(model(x), x)

    def test_all_is_put_back(self) -> None:
        model = many()
        model["tensor"], model["third"] = Dropout(keep_prob=torch.tensor([0.5, 0.25])), nn.Dropout(1 / 3)
        model["features"].eval()
        rows = keep_probs(model).rows
        with unchanged(model):
            with disabled(model):
                assert set(keep_probs(model).values()) == {1.0}
                assert (model["lstm"].dropout, model["old"].keep_prob, model["path"].drop_prob) == (0.0, 1.0, 0.0)
                assert (model["features"].training, model["lstm"].training) == (False, True)
                with disabled(model["first"]), pytest.raises(KeyError), disabled(model):
                    raise KeyError
                assert set(keep_probs(model).values()) == {1.0}
            with pytest.raises(ZeroDivisionError), disabled(model):
                raise ZeroDivisionError
        after = keep_probs(model).rows
        assert all(a["keep_prob"] is b["keep_prob"] or a == b for a, b in zip(after, rows, strict=True))

    def test_it_drops_again_afterwards(self) -> None:
        model = nn.Sequential(Dropout(), Of(functional))
        with disabled(model):
            model(torch.ones(5))
        assert (model(torch.ones(4000)) == 0).float().mean() == pytest.approx(1 - 0.5**3, abs=0.05)

    def test_an_error_inside_a_forward(self) -> None:
        """Also one of a hook that runs before the context's own."""

        def fails(*_: Any) -> None:
            raise KeyError

        model, x = Of(functional), torch.ones(64)
        with disabled(model):
            for early in (False, True):
                handle = model.register_forward_pre_hook(fails, prepend=early)
                with pytest.raises(KeyError):
                    model(x)
                handle.remove()
                assert torch.equal(model(x), x)

    def test_a_module_that_takes_no_hooks(self) -> None:
        """Such as one of TorchScript: an error leaves nothing behind."""
        model = many()
        model["refusing"] = nn.Identity()
        model["refusing"].register_forward_pre_hook = mock.Mock(side_effect=RuntimeError("no hooks"))
        with unchanged(model), pytest.raises(RuntimeError, match=r"^no hooks$"), disabled(model):
            pass

    def test_only_the_model_is_silenced(self) -> None:
        model = Of(lambda self, x: F.dropout(x, 0.5) @ x)
        with disabled(model):
            with pytest.raises(RuntimeError):
                model(torch.ones(2, 3))  # fails in its forward, which is over then
            assert (F.dropout(torch.ones(1000), 0.5) == 0).any()
            assert (Of(functional)(torch.ones(1000)) == 0).any()

    def test_batch_norm_stays_in_train_mode(self) -> None:
        model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4))
        with disabled(model):
            y = model(torch.randn(50, 4) + 3)
        assert y.mean(0).abs().max() < 1e-5
        assert model[1].running_mean.min() > 0.2

    def test_other_noise_goes_on_and_does_not_depend_on_it(self) -> None:
        """A layer with keep_prob 1 draws its key all the same: what comes after it draws what it always does."""
        model = Of(lambda self, x: self.drop(x) * 0 + torch.randn_like(x) + torch.rand(5), drop=Dropout())
        torch.manual_seed(0)
        expected = model(torch.ones(5))
        torch.manual_seed(0)
        with disabled(model):
            assert torch.equal(model(torch.ones(5)), expected)

    def test_layers_replaced_inside(self) -> None:
        model = nn.Sequential(nn.Dropout(0.25), nn.Dropout(0.5))
        with disabled(model):
            torchdrop.replace(model)
        assert list(keep_probs(model).values()) == [0.75, 0.5]

    def test_autocast_and_func(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), Dropout(), Of(functional))
        x = torch.randn(3, 4)
        with disabled(model), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), model[0](x))
        with disabled(model):
            rows = torch.func.vmap(lambda row: torch.func.functional_call(model, dict(model.named_parameters()), row))(
                x
            )
        torch.testing.assert_close(rows, model[0](x))

    def test_nothing_is_drawn_by_torch(self) -> None:
        model = nn.Transformer(8, 2, 1, 1, 8, 0.5, batch_first=True)
        x = torch.randn(2, 3, 8)
        with disabled(model), Draws() as draws:
            model(x, x)
        assert draws.operators == []
        with Draws() as draws:
            model(x, x)
        assert draws.operators

    def test_no_module(self) -> None:
        with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got str$"), disabled("model"):  # type: ignore[arg-type]
            pass

    @pytest.mark.slow
    def test_a_compiled_model(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), Dropout(), nn.Dropout())
        compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(20, 4)
        assert list(keep_probs(compiled)) == ["1", "2"]
        assert (compiled(x) == 0).any()
        with disabled(compiled):
            assert torch.equal(compiled(x), model[0](x))
        assert (compiled(x) == 0).any()
        assert list(keep_probs(nn.ModuleDict({"part": compiled}))) == ["part.1", "part.2"]


@pytest.mark.parametrize(
    "drop", [torchdrop.functional.dropout, torchdrop.functional.drop_path], ids=lambda drop: drop.__name__
)
def test_disabled_refuses_functions_of_torchdrop_that_a_checkpoint_would_run_again(drop: Any) -> None:
    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: drop(x, 0.5, training=True), x, use_reentrant=False)  # type: ignore[return-value]

    model = nn.Sequential(Checkpointed(), torchdrop.Dropout(0.5))
    with (
        torchdrop.disabled(model),
        pytest.raises(RuntimeError, match="checkpointing runs a functional dropout of torch"),
    ):
        model(torch.ones(2, 3, 8, 8, requires_grad=True))

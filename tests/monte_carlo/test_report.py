"""Which sources are active, what is said about them, and what is refused."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.mc_models import Of, apart, data, equal, network, passes, timm_path, train_draws, unchanged
from torchdrop.handlers.sources import DRAWN
from torchdrop.monte_carlo.report import Report

pytestmark = pytest.mark.usefixtures("one_thread")


class TestSources:
    def test_patterns(self) -> None:
        model, x = network(), data()
        for patterns, active in (("2", ["2"]), ("3*", ["3.1"]), (["3.?", "2"], ["2", "3.1"]), ("*", ["2", "3.1"])):
            with torchdrop.mc_dropout(model, seed=0, sources=patterns) as report:
                outputs = [model(x), model(x)]
            assert [source.module for source in report.active] == active
            assert [source.module for source in report.inactive] == [m for m in ("2", "3.1") if m not in active]
            assert {source.reason for source in report.inactive} <= {"not chosen by the patterns of `sources`"}
            assert (report.draws, report.expected) == (len(active), 2)
            assert not equal(*outputs)

    def test_a_source_has_its_masks_whatever_else_is_chosen(self) -> None:
        model, x = network(), data()
        model[3][1].p = 1e-9
        assert apart(passes(model, x, seed=0, sources="2")[0], passes(model, x, seed=0)[0]) < 1e-6

    def test_dead_patterns(self) -> None:
        model = nn.ModuleDict({"encoder": network(), "head": nn.Dropout(0.5)})
        for predict in (lambda m, **o: passes(m, data(), **o), lambda m, **o: torchdrop.mc_predict(m, data(), **o)):
            with pytest.raises(ValueError, match=r"'haed' matches none: near misses: head"):
                predict(model, sources=["encoder*", "haed"])

    def test_part_that_is_called(self) -> None:
        """A model need not be called as a whole."""
        model, x = nn.ModuleDict({"encoder": network(), "head": nn.Dropout(0.2)}).eval(), data()
        with unchanged(model), torchdrop.mc_dropout(model, seed=0) as report:
            first, second = model["encoder"](x), model["encoder"](x)
            assert report.draws == report.expected == 2
            head = model["head"](x)
            assert (report.draws, report.expected) == (1, 3)
        assert not equal(first, second)
        assert not equal(head, x)
        assert [source.module for source in report.active] == ["encoder.2", "encoder.3.1", "head"]

    def test_auxiliary_outputs(self) -> None:
        """Outputs that train mode alone has, and losses, stay off, in a module that draws too."""

        def forward(self: Any, x: Tensor) -> Any:
            hidden = F.dropout(self.drop(self.body(x)), 0.3, self.training)
            hidden = timm_path(self, hidden) if self.paths else hidden
            if self.training and self.losing:
                return hidden.square().mean()
            return (hidden, self.auxiliary(hidden)) if self.training else hidden

        parts = {"body": nn.Linear(8, 8), "drop": nn.Dropout(0.5), "auxiliary": nn.Linear(8, 2)}
        model, x = Of(forward, **parts).eval(), data()
        for model.paths in (False, True):
            for model.losing in (False, True):
                assert len(train_draws(model, x)) == 2 + model.paths
                said = "1 of 3 sources of randomness stay off .*: bernoulli, its module's training flag changes"
                warned = pytest.warns(UserWarning, match=said) if model.paths else nullcontext()
                with warned, unchanged(model), torchdrop.mc_dropout(model, seed=0) as report:
                    out = model(x)
                assert isinstance(out, Tensor)
                assert out.shape == (5, 8)
                assert (report.draws, report.expected, len(report.active)) == (2, 2 + model.paths, 2)
                assert [(s.kind, s.reason) for s in report.inactive] == [
                    ("bernoulli", "its module's training flag changes what the model returns")
                ] * model.paths
                assert all(not source.reason for source in report.active)


class TestReport:
    def test_contents(self) -> None:
        model, x = nn.Sequential(network(), nn.LSTM(8, 4, 3, dropout=0.25)).eval(), torch.randn(5, 8)
        with torchdrop.mc_dropout(model, seed=0, sources="0*", batch_dim=None) as report:
            assert str(report) == "Sources of randomness: none found yet (the model has not been called)"
            model(x)
        assert isinstance(report, Report)
        rows = report.rows_of()
        assert [(r["module"], r["kind"], r["number"], r["rate"], r["active"], r["draws"]) for r in rows] == [
            ("0.2", "dropout", 0, 0.5, True, 1),
            ("0.3.1", "dropout", 0, 0.4, True, 1),
            ("1", "lstm", 0, 0.25, False, 2),
        ]
        assert {r["known"] for r in rows} == {DRAWN}
        assert [r["reason"] for r in rows] == ["", "", "not chosen by the patterns of `sources`"]
        first, *lines = str(report).splitlines()
        assert first == "Sources of randomness: 2 of 3 active, 2 draws a forward (train mode: 4)"
        assert [line.split()[:4] for line in lines] == [
            ["0.2", "dropout", "p=0.5", "active"],
            ["0.3.1", "dropout", "p=0.4", "active"],
            ["1", "lstm", "p=0.25", "off"],
        ]

    def test_model_that_fails_in_train_mode(self) -> None:
        """It is said that there was nothing to compare with."""

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            if self.training:
                raise KeyError("targets")
            return self.drop(x)

        model, x = Of(forward, drop=nn.Dropout(0.5)).eval(), data()
        with unchanged(model), torchdrop.mc_dropout(model, seed=0) as report:
            outputs = [model(x), model(x)]
        assert not equal(*outputs)
        assert (
            "fails with the model in train mode (KeyError: 'targets'), so its own flag was left off" in report.notes[0]
        )
        assert "KeyError: 'targets'" in str(report)
        assert [source.known for source in report.active] == [DRAWN]

    def test_no_source(self) -> None:
        for model in (nn.Linear(8, 8), nn.Sequential(nn.Dropout(0.0), Of(lambda self, x: F.dropout(x, 0.5, False)))):
            model.eval()
            with (
                unchanged(model),
                pytest.warns(UserWarning, match=r"nothing random is active in the model.*rate above"),
            ):
                assert all(map(equal, passes(model, data(), seed=0), [model(data())] * 3))
            with pytest.raises(ValueError, match=r"nothing random is active .* all samples would be equal.*patterns"):
                torchdrop.mc_predict(model, data(), samples=3)

    def test_model_that_is_not_called(self) -> None:
        with (
            pytest.warns(UserWarning, match=r"mc_dropout: the model was not called.*the one that was given"),
            torchdrop.mc_dropout(network()) as report,
        ):
            nn.Dropout(0.5)(data())
        assert not report.sources


class TestArguments:
    @pytest.mark.parametrize("inner", [False, True], ids=["model", "part"])
    @pytest.mark.parametrize("predict", [False, True])
    def test_scripted(self, inner: bool, predict: bool) -> None:
        """Random calls in it cannot be seen, so it is refused with advice, and hooks are gone."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            scripted = torch.jit.script(nn.Dropout(0.5))
        first = nn.Dropout(0.5)
        model = nn.Sequential(first, scripted) if inner else scripted
        run = torchdrop.mc_predict if predict else passes
        with unchanged(first), pytest.raises(TypeError, match="TorchScript"):
            run(model, data(), 2)

    def test_values(self) -> None:
        model = network()
        for options, error, message in (
            ({"masks": "common"}, ValueError, "masks must be 'independent' or 'shared', got 'common'"),
            ({"seed": 1.5}, TypeError, "seed must be an integer, got float"),
            ({"seed": True}, TypeError, "seed must be an integer, got bool"),
        ):
            with unchanged(model), pytest.raises(error, match=message):
                passes(model, data(), **options)
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
            passes(lambda x: x, data())

    def test_shared_masks(self) -> None:
        model, x = network(), torch.ones(5, 8)
        (shared, *_), (own, *_) = passes(model, x, seed=0, masks="shared"), passes(model, x, seed=0)
        torch.testing.assert_close(shared, shared[:1].expand(5, 8))
        torch.testing.assert_close(shared[0], own[0])
        assert len(own.unique(dim=0)) == 5

    def test_batch_size_that_is_fixed(self) -> None:
        """Two or three rows are too few for some models: the inputs as one whole are not, and an error says so."""
        table = torch.randn(5, 8)
        model, x = Of(lambda self, x: self.drop(x + table), drop=nn.Dropout(0.5)).eval(), data()
        assert not equal(*passes(model, x, 2, seed=0, batch_dim=None))
        try:
            outputs = passes(model, x, 2, seed=0)
        except Exception as error:
            text = "\n".join([str(error), *getattr(error, "__notes__", [])])
            assert "batch_dim=None" in text, text
        else:
            assert not equal(*outputs)

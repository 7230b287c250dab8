"""What fires although it is hard to reach, and what is said where it cannot be reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchdrop
from tests.mc_models import (
    Of,
    apart,
    check_draws,
    check_each_source,
    data,
    equal,
    network,
    passes,
    timm_path,
    unchanged,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class TestCodeAroundThatDecides:
    def test_the_module_around_asks_its_own_flag(self) -> None:
        """As an adapter does that has another path for eval mode: dropout in it is called in train mode alone."""
        adapter = Of(lambda self, x: self.drop(x) if self.training else x, drop=nn.Dropout(0.5))
        beside = nn.Dropout(0.3)
        for model in (nn.Sequential(adapter), nn.Sequential(beside, adapter), nn.Sequential(adapter, nn.Linear(8, 4))):
            report = check_draws(model, data())
            assert len(report.active) == len(model) - isinstance(model[-1], nn.Linear)
            check_each_source(model.eval(), data())

    def test_two_modules_up(self) -> None:
        inner = Of(lambda self, x: self.path(x), path=Of(timm_path))
        check_draws(nn.Sequential(Of(lambda self, x: self.inner(x) if self.training else x, inner=inner)), data())

    def test_no_flag_beyond_those_that_help(self) -> None:
        seen = []

        def outer(self: Any, x: Tensor) -> Tensor:
            seen.append(self.training)
            return self.adapter(x)

        adapter = Of(lambda self, x: self.drop(x) if self.training else x, drop=nn.Dropout(0.5))
        model = Of(outer, adapter=adapter).eval()
        with torchdrop.mc_dropout(model, seed=0):
            model(data())
            seen.clear()
            model(data())
        assert seen == [False]

    def test_what_cannot_be_reached_is_warned_of(self) -> None:
        """Code that asks the flag of another module."""
        model = Of(
            lambda self, x: self.first(self.drop(x) if self.norm.training else x),
            drop=nn.Dropout(0.5), norm=nn.LayerNorm(8), first=nn.Dropout(0.3),
        ).eval()  # fmt: skip
        said = r"1 of 2 sources of randomness stay off \(drop: dropout, not reached with the model in eval mode\)"
        with pytest.warns(UserWarning, match=said):
            passes(model, data(), seed=0)
        with pytest.warns(UserWarning, match=said):
            torchdrop.mc_predict(model, data(), 3, seed=0)

    def test_augmentation_stays_off_without_a_warning(self) -> None:
        class RandomMasking(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return timm_path(self, x)

        model = nn.Sequential(RandomMasking(), nn.Dropout(0.5)).eval()
        with torchdrop.mc_dropout(model, seed=0) as report:
            model(data())
        assert [(s.module, s.reason) for s in report.inactive] == [("0", "augmentation, which stays off")]


class TestLayersSkippedAtRandom:
    @pytest.mark.parametrize("rate", [0.5, 0.9])
    def test_dropout_in_a_layer_that_the_survey_skipped(self, rate: float) -> None:
        """Whatever the seed: layers by function, by flag, and of torch.nn."""

        def forward(self: Any, x: Tensor) -> Tensor:
            for layer in self.layers:
                if not self.training or torch.rand([]) >= rate:
                    x = layer(x)
            return x

        def block() -> nn.Module:
            return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), Of(timm_path))

        for seed in range(5):
            torch.manual_seed(seed)
            model = Of(forward, layers=nn.ModuleList(block() for _ in range(4))).eval()
            with unchanged(model), torchdrop.mc_dropout(model, seed=seed) as report:
                for _ in range(3):
                    model(data())
            assert len([s for s in report.active if s.kind == "uniform"]) == 4
            assert {s.module for s in report.active} == {
                "",
                *(f"layers.{i}.{j}" for i in range(4) for j in (1, 2)),
            }
            assert not report.inactive


class Detector(nn.Module):
    """In train mode it and its head want targets; its backbone draws by its own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8), Of(timm_path), nn.Dropout(0.5))
        self.head = Of(self._head, drop=nn.Dropout(0.3))

    @staticmethod
    def _head(self: Any, x: Tensor, targets: Any) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets should not be None")
        return self.drop(x)

    def forward(self, x: Tensor, targets: Any = None) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        return self.head(self.backbone(x), targets)


class TestForwardsThatFailInTrainMode:
    def test_the_rest_is_surveyed(self) -> None:
        model = Detector().eval()
        with unchanged(model), torchdrop.mc_dropout(model, seed=0) as report:
            first, second = model(data()), model(data())
        assert not equal(first, second)
        assert [source.module for source in report.active] == ["backbone.1", "backbone.2", "head.drop"]
        for name in ("the model", "head"):
            assert f"The forward fails with {name} in train mode (ValueError: targets should not be" in str(report)
        check_each_source(model, data())

    def test_a_model_without_anything_random_says_that_it_failed(self) -> None:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("targets should not be none")
            return x

        model = Of(forward).eval()
        with pytest.warns(UserWarning, match=r"nothing random is active(.|\n)*ValueError: targets"):
            passes(model, data(), seed=0)
        with pytest.raises(ValueError, match=r"nothing random is active(.|\n)*ValueError: targets"):
            torchdrop.mc_predict(model, data(), 3)
        with pytest.warns(UserWarning, match="nothing random"), torchdrop.mc_dropout(model) as report:
            model(data())
        assert str(report).startswith("Sources of randomness: none found\nThe forward fails with the model")


class AutoEncoder(nn.Module):
    """Used by its methods, as graph auto-encoders are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.5)

    def encode(self, x: Tensor) -> Tensor:
        return F.dropout(self.drop(self.first(x)), 0.25, self.training)

    def decode(self, z: Tensor) -> Tensor:
        return self.second(torchdrop.functional.dropout(z, 0.5, self.training))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class TestOtherMethods:
    def test_methods_are_served(self) -> None:
        model, x, z = AutoEncoder().eval(), data(), torch.ones(5, 16)
        with unchanged(model), torchdrop.mc_dropout(model, seed=0) as report:
            one, other = model.encode(x), model.encode(x)
            assert report.draws == 2
            decoded = model.decode(z), model.decode(z)
        assert not equal(one, other)
        assert not equal(*decoded)
        assert not equal(decoded[0], model.decode(z))
        kept = (one != 0).float().mean()
        assert 0.1 < kept < 0.7, "both of encode's dropouts fire"
        assert sorted((s.module, s.kind) for s in report.active) == [
            ("", "dropout"), ("", "torchdrop"), ("drop", "dropout"),
        ]  # fmt: skip
        with torchdrop.mc_dropout(model, seed=0):
            assert equal(one, model.encode(x))
            assert equal(other, model.encode(x))

    def test_forward_by_its_name_is_a_call(self) -> None:
        model, x = AutoEncoder().eval(), data()
        with torchdrop.mc_dropout(model, seed=0) as report:
            first = model.forward(x), model.forward(x)
        assert (report.draws, report.expected) == (3, 3)
        with torchdrop.mc_dropout(model, seed=0):
            assert equal(first, (model(x), model(x)))

    def test_forward_of_a_part_by_its_name(self) -> None:
        model = Of(lambda self, x: self.path.forward(self.drop.forward(x)), path=Of(timm_path), drop=nn.Dropout(0.5))
        report = check_draws(model, data())
        assert [s.module for s in report.active] == ["drop", "path"]

    def test_prediction_by_a_method(self) -> None:
        model, x = AutoEncoder().eval(), data()
        with unchanged(model):
            result = torchdrop.mc_predict(model, x, 400, method="encode", seed=0, masks="independent")
        assert result.mean.shape == (5, 16)
        assert [s.kind for s in result.report.active] == ["dropout", "dropout"]
        assert apart(result.mean, model.encode(x).detach()) < 0.5
        loop = torchdrop.mc_predict(model, x, 5, method="encode", seed=0, strategy="loop")
        assert apart(torchdrop.mc_predict(model, x, 5, method="encode", seed=0).mean, loop.mean) < 1e-5

    def test_other_names_are_refused(self) -> None:
        for method, error in (("first", None), ("encoder", ValueError), (3, TypeError), ("training", ValueError)):
            if error is not None:
                with pytest.raises(error, match="method must"):
                    torchdrop.mc_predict(AutoEncoder(), data(), 3, method=method)

    def test_dropout_that_belongs_to_no_forward_is_counted_and_warned_of(self) -> None:
        model, x = network(), data()

        def around(on: bool, model: nn.Module = model) -> Tensor:
            return F.dropout(model(x), 0.5, on)

        with (
            pytest.warns(
                UserWarning, match="2 calls of dropout that is off, with a rate above 0, belong to no forward"
            ),
            torchdrop.mc_dropout(model, seed=0) as report,
        ):
            around(False), around(False), around(True), F.dropout(x, 0.0, False)
        assert report.outside == 2
        assert "2 calls of dropout that is off belong to no forward" in str(report)


def test_what_a_function_draws_that_is_given_the_model_is_its_own() -> None:
    def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.rand(3), model(x)

    torch.manual_seed(0)
    expected = torch.rand(3)
    model = network()
    torch.manual_seed(0)
    with torchdrop.mc_dropout(model, seed=0) as report:
        drawn, _ = step(model, data())
    assert equal(drawn, expected)
    assert len(report.active) == 2


@torch.jit.script
def scripted(x: Tensor, training: bool) -> Tensor:
    return torch.nn.functional.dropout(x, 0.5, training)


def test_draws_that_cannot_be_seen_are_warned_of() -> None:
    model = Of(lambda self, x: scripted(self.drop(x), self.training), drop=nn.Dropout(0.5)).eval()
    said = "1 random draws of a forward in train mode stay as they are in eval mode.*TorchScript"
    with pytest.warns(UserWarning, match=said), torchdrop.mc_dropout(model, seed=0) as report:
        model(data())
    assert report.unseen == 1
    with pytest.warns(UserWarning, match=said):
        torchdrop.mc_predict(model, data(), 3, seed=0)


def test_the_rate_of_a_random_tensor_is_not_guessed() -> None:
    """A Bernoulli call's parameter may be that of dropping, of keeping, or of where a block begins."""
    model = Of(timm_path).eval()
    with torchdrop.mc_dropout(model, seed=0) as report:
        model(data())
    assert [source.rate for source in report.active] == [None]


def test_masks_go_by_the_names_within_wrappers() -> None:
    model, x = network(), data()
    expected = torchdrop.mc_predict(model, x, 3, seed=0).mean
    averaged = torch.optim.swa_utils.AveragedModel(model).eval()
    assert apart(torchdrop.mc_predict(averaged, x, 3, seed=0).mean, expected) < 1e-6
    parallel = nn.DataParallel(model)
    assert apart(torchdrop.mc_predict(parallel, x, 3, seed=0).mean, expected) < 1e-6
    named = nn.Sequential(model)
    assert apart(torchdrop.mc_predict(named, x, 3, seed=0).mean, expected) > 1e-3

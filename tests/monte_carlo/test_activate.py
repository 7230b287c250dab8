"""The context manager: what it changes and what it does not, its seeds, sources and report."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import torchdrop
from tests.mc_models import Of, apart, check_draws, data, equal, network, passes, state, timm_path, unchanged
from tests.statistical import deviation

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting(nn.Module):
    """Dropout that keeps what a careless module keeps in train mode."""

    def __init__(self, drop: Callable[..., Tensor]) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("rebound", torch.zeros(1))
        self.register_buffer("late", None)
        self.calls, self.last, self._drop = 0, "none", drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.rebound = self.rebound + 1
            self.late = torch.ones(1)
            self.calls, self.last = self.calls + 1, "train"
        return self._drop(self, x)


class TestNothingElseChanges:
    @pytest.mark.parametrize("training", [False, True])
    def test_normalization(self, training: bool) -> None:
        """Running statistics are used and left alone, whatever mode the model is in."""
        model, x = network(), data()
        model.train()(x)
        expected = passes(model.eval(), x, seed=0)
        model.train(training)
        with unchanged(model):
            assert all(map(equal, passes(model, x, seed=0), expected))
            result = torchdrop.mc_predict(model, x, samples=3, seed=0)
        assert apart(result.mean, torch.stack(expected).mean(0)) < 1e-5
        assert int(model[1].num_batches_tracked) == 1

    def test_mixed_flags(self) -> None:
        model = network().train()
        model[2].eval()
        model[3][0].eval()
        with unchanged(model):
            first, second, _ = passes(model, data(), seed=0)
        assert not equal(first, second)
        assert [m.training for m in model.modules()] == [True, True, True, False, True, False, True]

    @pytest.mark.parametrize("norm", [nn.utils.spectral_norm, parametrizations.spectral_norm])
    def test_spectral_norm(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        with torch.no_grad():
            model = nn.Sequential(norm(nn.Linear(8, 8)), nn.Dropout(0.5)).eval()
            x = data()
            check_draws(model, x)
            with pytest.raises(AssertionError), unchanged(model):
                model.train()(x)

    @pytest.mark.parametrize(
        "drop",
        [lambda self, x: F.dropout(x, 0.5, self.training), lambda self, x: timm_path(self, x)],
        ids=["by function", "by flag"],
    )
    def test_what_modules_keep(self, drop: Callable[..., Tensor]) -> None:
        """Buffers, changed in place, bound again or new, and counters, also of a module that needs its flag."""
        model, x = nn.Sequential(nn.Linear(8, 8), Counting(drop)).eval(), data()
        with pytest.raises(AssertionError), unchanged(model):
            model.train()(x)
        model[1].late = None
        model.eval()
        with unchanged(model):
            first, second, _ = passes(model, x, seed=0)
            torchdrop.mc_predict(model, x, samples=4, seed=0)
        assert not equal(first, second)

    def test_random_states(self) -> None:
        """Only a seed is drawn from PyTorch's generator, if none is given."""
        model, x = network(), data()
        torch.manual_seed(1)
        first = passes(model, x)
        torch.manual_seed(1)
        assert all(map(equal, passes(model, x), first))
        assert not equal(passes(model, x)[0], first[0])
        with unchanged(model):
            passes(model, x, seed=1)

    def test_generators_that_layers_hold(self) -> None:
        generator = torch.Generator().manual_seed(3)
        model, before = nn.Sequential(torchdrop.Dropout(0.5, generator=generator)).eval(), generator.get_state()
        passes(model, data(), seed=0)
        torchdrop.mc_predict(model, data(), samples=3, seed=0)
        assert torch.equal(generator.get_state(), before)

    def test_calls_outside_of_the_model(self) -> None:
        """What is drawn in the block beside the model, and other models, are as ever."""
        model, other, x = network(), nn.Dropout(0.5), data()
        torch.manual_seed(0)
        expected = torch.rand(3), F.dropout(x, 0.5), other(x), other.eval()(x)
        torch.manual_seed(0)
        other.train()
        with torchdrop.mc_dropout(model, seed=0) as report:
            model(x)
            assert equal(expected, (torch.rand(3), F.dropout(x, 0.5), other(x), other.eval()(x)))
        assert report.draws == 2

    def test_inputs_of_a_model_that_writes_to_them(self) -> None:
        """In-place dropout comes first: each sample is one of the inputs as given."""
        model, other = (nn.Sequential(nn.Dropout(0.5, inplace=i), nn.Linear(8, 3)).eval() for i in (True, False))
        other.load_state_dict(model.state_dict())
        for options in ({}, {"strategy": "loop"}, {"batch_dim": None}):
            x = torch.ones(5, 8)
            expected = torchdrop.mc_predict(other, x, samples=6, seed=0, **options).mean
            assert apart(torchdrop.mc_predict(model, x.clone(), samples=6, seed=0, **options).mean, expected) < 1e-5


class TestExceptions:
    @pytest.mark.parametrize("when", ["first call", "later call"])
    def test_in_forward(self, when: str) -> None:
        broken = False

        def maybe(self: nn.Module, x: Tensor) -> Tensor:
            if broken:
                raise KeyError("broken")
            return timm_path(self, x)

        model, x = nn.Sequential(network(), Of(maybe), nn.Dropout(0.1)).eval(), data()
        expected = passes(model, x, 4, seed=0)
        with unchanged(model), torchdrop.mc_dropout(model, seed=0) as report:
            before = state(model)
            if when == "later call":
                assert equal(model(x), expected[0])
            broken = True
            with pytest.raises((KeyError, RuntimeError), match="broken"):
                model(x)
            assert state(model) == before | {k: v for k, v in state(model).items() if "hooks" in k}
            broken = False
            after = [model(x), model(x)]
        assert report.draws == 4
        known = [any(equal(a, b) for b in expected) for a in after]
        assert known == [True, True], "samples go on"
        assert not equal(*after)

    def test_in_the_block(self) -> None:
        model = network()

        def interrupted() -> None:
            with torchdrop.mc_dropout(model, seed=0):
                model(data())
                raise KeyError

        with unchanged(model), pytest.raises(KeyError):
            interrupted()
        assert equal(model(torch.ones(2, 8)), model(torch.ones(2, 8)))

    def test_in_mc_predict(self) -> None:
        def fail(output: Tensor) -> Tensor:
            raise KeyError

        model = network()
        with unchanged(model), pytest.raises(KeyError):
            torchdrop.mc_predict(model, data(), samples=3, seed=0, select_output=fail)


class TestNesting:
    def test_same_model(self) -> None:
        model, x = network(), data()
        expected, inner = passes(model, x, seed=0), passes(model, x, seed=5, sources="2")
        with unchanged(model), torchdrop.mc_dropout(model, seed=0) as report:
            first = model(x)
            with torchdrop.mc_dropout(model, seed=5, sources="2") as other:
                assert equal(model(x), inner[0])
            second = model(x)
        assert equal((first, second), tuple(expected[:2]))
        assert (len(report.active), len(other.active)) == (2, 1)

    def test_part_within_the_whole(self) -> None:
        """The inner context has its part, and the outer one the rest."""
        model, x = network(), data()
        reached: list[Tensor] = []
        handle = model[3].register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0]))
        expected = passes(model, x, seed=0)
        handle.remove()
        with torchdrop.mc_dropout(model[3], seed=5):
            mixture = model[3](reached[-2]), model[3](x)
        with unchanged(model), torchdrop.mc_dropout(model, seed=0):
            first = model(x)
            with torchdrop.mc_dropout(model[3], seed=5) as inner:
                found = model(x), model[3](x)
            third = model(x)
        assert equal((first, third), (expected[0], expected[2]))
        assert equal(found, mixture)
        assert [source.module for source in inner.active] == ["1"]

    def test_whole_within_the_part(self) -> None:
        model, x = network(), data()
        part, whole = passes(model[3], x, seed=0), passes(model, x, seed=5)
        with unchanged(model), torchdrop.mc_dropout(model[3], seed=0):
            first = model[3](x)
            with torchdrop.mc_dropout(model, seed=5):
                assert equal(model(x), whole[0])
            assert equal((first, model[3](x)), tuple(part[:2]))

    def test_prediction_within(self) -> None:
        model, x = network(), data()
        expected, mean = passes(model, x, seed=0), torchdrop.mc_predict(model, x, samples=4, seed=3).mean
        with unchanged(model), torchdrop.mc_dropout(model, seed=0):
            first = model(x)
            assert equal(torchdrop.mc_predict(model, x, samples=4, seed=3).mean, mean)
            assert equal((first, model(x)), tuple(expected[:2]))


class TestAttributes:
    def test_what_a_forward_binds_is_there_after_a_call_in_a_context(self) -> None:
        """And not after a prediction, whose passes all begin with what the model holds."""

        def forward(self: Any, x: Tensor) -> Tensor:
            self.last, self.calls, self.count = self.drop(x), self.calls + 1, self.count + 1
            return self.last

        model, x = Of(forward, drop=nn.Dropout(0.5)).eval(), data()
        model.calls, model.last = 0, None
        model.register_buffer("count", torch.zeros(()))
        with torchdrop.mc_dropout(model, seed=0):
            for number in (1, 2):
                out = model(x)
                assert model.last is out
                assert (model.calls, int(model.count)) == (number, number)
        with unchanged(model):
            torchdrop.mc_predict(model, x, 4, seed=0)
        assert model.last is out


class TestCopies:
    def test_copies_made_in_a_context_are_in_none(self) -> None:
        model, x = network(), data()
        plain = model(x)
        with torchdrop.mc_dropout(model, seed=0):
            first = model(x)
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
            for other in copies:
                assert equal(other(x), plain)
                assert equal(other.forward(x), plain)
            second = model(x)
        assert equal((first, second), tuple(passes(model, x, 2, seed=0)))
        for other in copies:
            assert all(map(equal, passes(other, x, seed=0), passes(model, x, seed=0)))

    def test_a_signature_is_that_of_the_forward(self) -> None:
        model = nn.LSTM(8, 4, 2, dropout=0.5)
        expected = inspect.signature(model.forward)
        with torchdrop.mc_dropout(model, seed=0):
            assert inspect.signature(model.forward) == expected
            assert inspect.getfullargspec(model.forward).args[-2:] == ["input", "hx"]
            model(torch.randn(3, 2, 8))


class TestThreads:
    def test_of_their_own(self) -> None:
        """Two threads at once, each with a model and a context."""
        models, x, barrier = [network(), network()], data(), threading.Barrier(2)
        found: dict[int, list[Tensor]] = {}

        def work(number: int) -> None:
            with torchdrop.mc_dropout(models[number], seed=number):
                barrier.wait(60)
                found[number] = [models[number](x) for _ in range(20)]
                barrier.wait(60)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, model in enumerate(models):
            assert all(map(equal, found[number], passes(model, x, 20, seed=number)))

    def test_without_a_context(self) -> None:
        model, x, found = network(), data(), []
        expected, plain = passes(model, x, seed=0), model(x)
        with torchdrop.mc_dropout(model, seed=0):
            first = model(x)
            thread = threading.Thread(target=lambda: found.append(model(x)))
            thread.start()
            thread.join()
            assert equal((first, model(x)), tuple(expected[:2]))
        assert equal(found[0], plain)


class TestGradients:
    def test_modes(self) -> None:
        model, x = network(), data()
        expected = passes(model, x, seed=0)
        assert expected[0].requires_grad
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = passes(model, x, seed=0)
                mean = torchdrop.mc_predict(model, x, samples=3, seed=0).mean
            assert not found[0].requires_grad
            assert all(apart(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))
            assert apart(mean, torch.stack(expected).mean(0)) < 1e-5

    @pytest.mark.parametrize(
        "model",
        [network(), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.LSTM(8, 4, 2, dropout=0.5)],
        ids=["network", "encoder", "lstm"],
    )
    def test_gradcheck(self, model: nn.Module) -> None:
        model = model.double().eval()
        x = torch.randn(3, 2, 8, dtype=torch.float64) if len(list(model.children())) != 4 else data().double()

        def one(x: Tensor) -> Tensor:
            out = passes(model, x, 1, seed=0)[0]
            return out[0] if isinstance(out, tuple) else out

        assert not equal(one(x), model(x))
        assert torch.autograd.gradcheck(one, x.requires_grad_())

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    @pytest.mark.parametrize("inside", [True, False])
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpoint(self, inside: bool, reentrant: bool) -> None:
        """Activation checkpointing runs a part again in the backward pass: with the same masks, or not silently."""
        body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8))
        model = Of(
            lambda self, x: checkpoint(self.body, x, use_reentrant=reentrant) if self.saving else self.body(x),
            body=body,
        ).eval()  # fmt: skip
        x, grads = data().requires_grad_(), list[Any]()
        for model.saving in (False, True):
            x.grad = None
            try:
                with torchdrop.mc_dropout(model, seed=0):
                    out = model(x).sum()
                    if inside:
                        out.backward()
                if not inside:
                    out.backward()
            except RuntimeError as error:
                if "checkpoint" in str(error):
                    return
                raise
            grads.append(x.grad)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("masks", ["independent", "shared"])
def test_expectation(masks: str) -> None:
    """After dropout, a linear layer's mean over passes is its deterministic output; a scale off by 2 % would show."""
    model, count, keep = nn.Sequential(nn.Dropout(0.25), nn.Linear(8, 4, bias=False)).double().eval(), 40_000, 0.75
    x = torch.rand(1, 8, dtype=torch.float64) + 0.5
    model[1].weight.data.abs_().add_(0.5)
    rows = 400 if masks == "independent" else 1
    with torch.no_grad():
        deterministic = model(x)[0]
        result = torchdrop.mc_predict(model, x.expand(rows, 8), samples=count // rows, seed=0, masks=masks)
    terms = (model[1].weight * x).detach()
    bound = terms.sum(1)  # of a sample's distance from the mean, since (1 - keep) / keep < 1
    variance = (terms.square().sum(1) * (1 - keep) / keep / bound.square()).tolist()
    for mean, exact, size, spread in zip(result.mean.mean(0), deterministic, bound, variance, strict=True):
        error = deviation(count, spread, 1e-9) / count * float(size)
        assert abs(float(mean - exact)) <= error
        assert error + deviation(count, spread, 1e-6) / count * float(size) < 0.02 * float(exact)

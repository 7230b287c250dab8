"""`MCPredictor(compile=True)`: samples and statistics are those without compilation, or a warning says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.monte_carlo import compiled
from torchdrop.monte_carlo.sample import Sampler
from torchdrop.monte_carlo.statistics import Collector


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, outputs)).eval()


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(8, 4, 3))
    model = nn.Sequential(body, nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3))
    model(torch.randn(8, 1, 8, 8))
    return model.eval()


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)).eval()


class Centered(nn.Module):
    """A model whose rows depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x - x.mean(0))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(4, 8, 2, batch_first=True, dropout=0.4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Runs recordings as they are, which Inductor would take seconds to compile, and tells how many were made."""
    compile_graph = mock.Mock(side_effect=lambda graph, inputs: graph)
    monkeypatch.setattr(compiled, "compile_graph", compile_graph)
    return compile_graph


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.Mock]:
    """Tells how often samples are run without a recording."""
    with mock.patch.object(Sampler, "run", autospec=True, side_effect=Sampler.run) as run:
        yield run


def assert_close(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    for name, value in expected.statistics.items():
        torch.testing.assert_close(got.statistics[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert got.standard_errors.keys() == expected.standard_errors.keys()
    for name, value in expected.standard_errors.items():
        torch.testing.assert_close(got.standard_errors[name], value, rtol=1e-3, atol=1e-6, msg=name)
    assert (got.num_samples, got.seed, got.strategy) == (expected.num_samples, expected.seed, expected.strategy)
    assert (got.samples is None) == (expected.samples is None)
    if expected.samples is not None:
        torch.testing.assert_close(got.samples, expected.samples, rtol=1e-4, atol=1e-6)


class TestAnswers:
    @pytest.mark.parametrize(
        ("make", "shape", "options"),
        [
            (network, (6, 4), {"task": "classification"}),
            (network, (6, 4), {"task": "multilabel", "masks": "shared"}),
            (network, (6, 4), {"task": "regression", "tau": 2.0, "keep_samples": True}),
            (lambda: network(4), (6, 4), {"task": "regression", "noise": "log_variance"}),
            (network, (6, 4), {"weight_scaling": True, "standard_errors": False}),
            (network, (6, 4), {"tolerance": 0.5}),
            (network, (6, 4), {"chunk": 5, "strategy": "vectorized"}),
            (lambda: nn.Sequential(network(), nn.Softmax(1)), (6, 4), {"task": "classification"}),
            (convolutional, (6, 1, 8, 8), {"task": "classification"}),
            (encoder, (6, 5, 8), {"task": "classification", "class_dim": -1}),
            (Recurrent, (6, 5, 4), {"task": "classification"}),
        ],
        ids=lambda value: getattr(value, "__name__", None),
    )
    def test_are_those_without(
        self, make: Callable[[], nn.Module], shape: tuple[int, ...], options: dict[str, Any], made: mock.Mock
    ) -> None:
        model, x = make(), data(*shape)
        options = {"seed": 3, **options}
        predictor = torchdrop.MCPredictor(model, 20, compile=True, **options)
        plain = torchdrop.MCPredictor(model, 20, **options)
        for rows in (6, 6, 1, 5):
            got = predictor(x[:rows])
            assert_close(got, plain(x[:rows]))
        assert made.call_count >= 2
        assert "compiled" in str(got.report)

    def test_several_outputs(self, made: mock.Mock) -> None:
        options: dict[str, Any] = {
            "select_output": lambda y: {"kind": y[:, :2], "size": y[:, 2:]},
            "task": {"kind": "classification", "size": "regression"},
            "seed": 1,
        }
        predictor, plain = (
            torchdrop.MCPredictor(network(), 20, compile=compile, **options) for compile in (True, False)
        )
        for rows in (3, 3, 2):
            got, expected = predictor(data(rows, 4)), plain(data(rows, 4))
            for name in expected:
                assert_close(got[name], expected[name])
        assert made.call_count == 2

    def test_masks_of_batches_are_those_of_their_rows(self, made: mock.Mock) -> None:
        predictor = torchdrop.MCPredictor(network(), 20, compile=True, seed=2)
        x = data(10, 4)
        whole = torchdrop.mc_predict(network(), x, 20, seed=2)
        assert_close(predictor(iter(x.split(4))), whole)
        assert_close(predictor(iter(x.split(4))), whole)
        assert made.call_count == 2  # four rows and two, for rows that begin anywhere

    def test_of_requests_that_are_laid_out_otherwise(self, made: mock.Mock) -> None:
        predictor = torchdrop.MCPredictor(network(), 20, compile=True, seed=2, example=data(4, 4))
        expected = predictor(data(4, 4)).mean
        for other in (data(4, 4).t().contiguous().t(), torch.cat([data(4, 4)] * 2, 1)[:, :4], data(4, 4).double()):
            torch.testing.assert_close(predictor(other.float()).mean, expected)
        assert made.call_count == 1

    def test_after_an_example_of_one_row(self, made: mock.Mock) -> None:
        predictor = torchdrop.MCPredictor(network(), 20, compile=True, seed=2, example=data(1, 4))
        for rows in (7, 8, 6, 5, 1):
            assert_close(predictor(data(9, 4)[:rows]), torchdrop.mc_predict(network(), data(9, 4)[:rows], 20, seed=2))
        assert made.call_count == 2

    def test_where_rows_depend_on_each_other(self, made: mock.Mock) -> None:
        model = Centered()
        predictor = torchdrop.MCPredictor(model, 20, compile=True, seed=2, example=data(1, 4))
        with pytest.warns(UserWarning, match="A row's outputs depend on the other rows of its batch"):
            predictor(data(3, 4))
        got = predictor(data(3, 4))
        with pytest.warns(UserWarning, match="A row's outputs depend on the other rows of its batch"):
            assert_close(got, torchdrop.mc_predict(model, data(3, 4), 20, seed=2))

    def test_follow_weights_that_change(self, made: mock.Mock) -> None:
        model, x = convolutional(), data(4, 1, 8, 8)
        predictor = torchdrop.MCPredictor(model, 10, compile=True, seed=2, example=x)
        before = predictor(x).mean
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.5)
        after = predictor(x)
        assert not torch.allclose(after.mean, before)
        assert_close(after, torchdrop.mc_predict(model, x, 10, seed=2))
        assert made.call_count == 1

    def test_follow_rates_that_change(self, made: mock.Mock) -> None:
        model, x = network(), data(4, 4)
        predictor = torchdrop.MCPredictor(model, 10, compile=True, seed=2, example=x)
        predictor(x)
        model[1].p = 0.1
        assert_close(predictor(x), torchdrop.mc_predict(model, x, 10, seed=2))
        assert made.call_count == 2

    def test_under_autocast(self, made: mock.Mock) -> None:
        predictor = torchdrop.MCPredictor(network(), 10, compile=True, seed=2, example=data(4, 4))
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = predictor(data(4, 4)), torchdrop.mc_predict(network(), data(4, 4), 10, seed=2)
        torch.testing.assert_close(got.mean, expected.mean, rtol=1e-2, atol=1e-2)
        assert not torch.equal(got.mean, predictor(data(4, 4)).mean)

    def test_run_nothing_but_the_recording(self, made: mock.Mock, eager: mock.Mock) -> None:
        predictor = torchdrop.MCPredictor(network(), 10, compile=True, task="classification", example=data(4, 4))
        eager.reset_mock()
        with mock.patch.object(Collector, "add", side_effect=AssertionError):
            predictor(data(4, 4))
            predictor(data(3, 4))  # with one row more
        assert eager.call_count == 0
        assert made.call_count == 1

    def test_tell_where_an_output_is_not_finite(self, made: mock.Mock) -> None:
        predictor = torchdrop.MCPredictor(network(), 10, compile=True, task="classification", example=data(3, 4))
        x = data(3, 4)
        x[1] = torch.nan
        with pytest.raises(ValueError, match="sample 0 is not finite in row 1 of its batch"):
            predictor(x)
        assert predictor(data(3, 4)).mean.isfinite().all()

    def test_tell_that_samples_are_identical(self, made: mock.Mock) -> None:
        model = network()
        predictor = torchdrop.MCPredictor(model, 10, compile=True, example=data(3, 4))
        nn.init.zeros_(model[3].weight)
        with pytest.warns(UserWarning, match="^MCPredictor: all samples are identical"):
            predictor(data(3, 4))


class Doubled(nn.Module):
    """A model that looks at a value, and takes an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor, how: Any = None) -> Tensor:
        return self.body(x) * (2 if x.sum() > 0 else 3)


class Counting(nn.Module):
    """A model with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = network(), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1.0)
        return self.body(x) + 0.0 * self.seen


class TestFallback:
    """One warning, a note in the report, and the samples of a predictor that does not compile."""

    def check(self, model: nn.Module, x: Any, match: str, **options: Any) -> None:
        with pytest.warns(UserWarning, match=f"^MCPredictor: samples are run without compilation, because .*{match}"):
            predictor = torchdrop.MCPredictor(model, 20, compile=True, seed=1, example=x, **options)
        got = predictor(x)  # which warns no more
        assert_close(got, torchdrop.mc_predict(copy.deepcopy(model), x, 20, seed=1, **options))
        assert "Not compiled: " in str(got.report)

    def test_a_value_decides(self, made: mock.Mock) -> None:
        self.check(Doubled(), data(3, 4), "data-dependent")

    def test_an_argument_is_an_object(self, made: mock.Mock) -> None:
        self.check(Doubled(), (data(3, 4), slice(3)), "an argument is a slice, which is not compiled")

    def test_requests_after_one_with_an_object_are_compiled(self, made: mock.Mock) -> None:
        class Optional(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = network()

            def forward(self, x: Tensor, how: Any = None) -> Tensor:
                return self.body(x)

        with pytest.warns(UserWarning, match="because an argument is a slice"):
            predictor = torchdrop.MCPredictor(Optional(), 10, compile=True, seed=1, example=(data(3, 4), slice(3)))
        predictor((data(3, 4), slice(3)))
        assert made.call_count == 0
        predictor(data(3, 4))
        assert made.call_count == 1

    def test_the_model_has_a_state(self, made: mock.Mock) -> None:
        self.check(Counting(), data(3, 4), "the model writes to its inputs, or to buffers or tensors of its own")

    def test_one_after_another(self, made: mock.Mock) -> None:
        self.check(network(), data(3, 4), "they are run one after another", strategy="loop")

    def test_latin(self, made: mock.Mock) -> None:
        self.check(network(), data(3, 4), "the masks of a Latin hypercube are made outside", sampling="latin")

    def test_hooks(self, made: mock.Mock) -> None:
        model = network()
        model[0].register_forward_hook(lambda module, args, out: None)
        self.check(model, data(3, 4), "the model has hooks of the user")

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiled, "compile_graph", mock.Mock(side_effect=RuntimeError("no C++ compiler\nat all")))
        self.check(network(), data(3, 4), "RuntimeError: no C\\+\\+ compiler$")

    def test_other_outputs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(graph: Any, inputs: Any) -> Callable[..., list[Tensor]]:
            return lambda *arguments: [out * 1.01 if out.is_floating_point() else out for out in graph(*arguments)]

        monkeypatch.setattr(compiled, "compile_graph", wrong)
        self.check(network(), data(3, 4), "the compiled outputs differ from those that are not compiled")

    def test_too_many_shapes(self, made: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiled, "MOST", 1)
        predictor = torchdrop.MCPredictor(network(), 10, compile=True, seed=1, example=data(3, 4))
        with pytest.warns(UserWarning, match="because 1 shapes of inputs have been compiled, and no more are"):
            predictor(data(8, 4))
        assert made.call_count == 1
        with mock.patch.object(Sampler, "run", side_effect=AssertionError):
            predictor(data(4, 4))


@pytest.mark.slow
def test_inductor(recwarn: pytest.WarningsRecorder) -> None:
    model, x = convolutional(), data(3, 1, 8, 8)
    predictor = torchdrop.MCPredictor(model, 20, compile=True, task="classification", seed=1, example=x)
    assert predictor(x).report.compiled
    assert_close(predictor(x), torchdrop.mc_predict(model, x, 20, task="classification", seed=1))

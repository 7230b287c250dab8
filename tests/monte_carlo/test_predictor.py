"""`MCPredictor`: the answers of `mc_predict`, with one survey for many calls."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.monte_carlo.survey import Survey


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)).eval()


def data(rows: int = 7) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def surveys() -> Iterator[mock.Mock]:
    with mock.patch.object(Survey, "run", autospec=True, side_effect=Survey.run) as run:
        yield run


class TestAnswers:
    def test_are_those_of_mc_predict(self) -> None:
        model = network()
        predictor = torchdrop.MCPredictor(model, 20, task="classification", seed=3, standard_errors=True)
        for rows in (7, 1, 7):
            got, expected = (
                predictor(data(rows)),
                torchdrop.mc_predict(model, data(rows), 20, task="classification", seed=3, standard_errors=True),
            )
            assert torch.allclose(got.mean, expected.mean, atol=1e-6)
            assert got.standard_errors.keys() == expected.standard_errors.keys()
            assert (got.num_samples, got.seed) == (20, 3)
        assert torch.equal(predictor(data()).mean, predictor(data()).mean)

    def test_do_not_depend_on_who_asks_and_when(self) -> None:
        predictor = torchdrop.MCPredictor(network(), 20, example=data(3))
        rows = [predictor(data()[:n]).mean for n in (1, 3, 7)]
        for some in rows:
            assert torch.allclose(some, rows[-1][: len(some)], atol=1e-6)

    def test_where_the_first_had_one_row_and_rows_depend_on_each_other(self) -> None:
        class Centered(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = network()

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x - x.mean(0))

        model = Centered()
        predictor = torchdrop.MCPredictor(model, 20, seed=3, example=data(1))
        with pytest.warns(UserWarning, match="^mc_predict: A row's outputs depend on the other rows of its batch"):
            expected = torchdrop.mc_predict(model, data(), 20, seed=3)
        with pytest.warns(UserWarning, match="^MCPredictor: A row's outputs depend on the other rows of its batch"):
            got = predictor(data())
        assert torch.allclose(got.mean, expected.mean, atol=1e-6)
        assert torch.equal(got.mean, predictor(data()).mean)  # which warns no more
        assert got.strategy == expected.strategy != "repeated"

    def test_in_threads(self) -> None:
        predictor, found = torchdrop.MCPredictor(network(), 20), {}
        expected = predictor(data()).mean

        def ask(number: int) -> None:
            found[number] = all(torch.equal(predictor(data()).mean, expected) for _ in range(5))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == dict.fromkeys(range(4), True)

    def test_of_several_batches(self) -> None:
        predictor = torchdrop.MCPredictor(network(), 20)
        whole = predictor(data()).mean
        assert torch.allclose(predictor(iter([data()[:4], data()[4:]])).mean, whole, atol=1e-6)

    def test_tolerance_is_reported_for_each_call(self) -> None:
        predictor = torchdrop.MCPredictor(network(), 40, tolerance=1e-6, example=None)
        for _ in range(2):
            with pytest.warns(UserWarning, match=r"^MCPredictor: tolerance=1e-06 was not met after 40 samples"):
                predictor(data())


class TestSurveys:
    def test_one_for_all_calls(self, surveys: mock.Mock) -> None:
        predictor = torchdrop.MCPredictor(network(), 10)
        assert surveys.call_count == 0
        for rows in (7, 1, 64):
            predictor(data(rows))
        assert surveys.call_count == 1

    def test_an_example_takes_the_first_call(self, surveys: mock.Mock) -> None:
        predictor = torchdrop.MCPredictor(network(), 10, example=data(2))
        assert surveys.call_count == 1
        predictor(data())
        assert surveys.call_count == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: setattr(model[1], "p", 0.25),
            lambda model: model[1].train(),
            lambda model: model.insert(2, nn.Dropout(0.5)),
            lambda model: model[0].register_forward_hook(lambda *_: None),
            lambda model: model.double(),
            lambda model: torchdrop.replace(model),
        ],
        ids=["rate", "flag", "module", "hook", "dtype", "class"],
    )
    def test_another_one_after_a_change(self, change: Callable[[nn.Sequential], object], surveys: mock.Mock) -> None:
        model = network()
        predictor = torchdrop.MCPredictor(model, 10, seed=0)
        predictor(data())
        change(model)
        x = data().to(model[0].weight.dtype)
        got = predictor(x)
        assert surveys.call_count == 2
        assert torch.allclose(got.mean, torchdrop.mc_predict(model, x, 10, seed=0).mean, atol=1e-6)

    def test_weights_may_change(self, surveys: mock.Mock) -> None:
        model = network()
        predictor = torchdrop.MCPredictor(model, 10, seed=0)
        before = predictor(data()).mean
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        after = predictor(data()).mean
        assert surveys.call_count == 1
        assert not torch.allclose(before, after)
        assert torch.allclose(after, torchdrop.mc_predict(model, data(), 10, seed=0).mean, atol=1e-6)

    def test_after_an_error(self, surveys: mock.Mock) -> None:
        predictor = torchdrop.MCPredictor(network(), 10, seed=0)
        expected = predictor(data()).mean
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            predictor(torch.randn(3, 5))
        assert torch.allclose(predictor(data()).mean, expected, atol=1e-6)

    def test_its_decisions_are_told_once(self) -> None:
        class Centered(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x - x.mean(0)

        predictor = torchdrop.MCPredictor(nn.Sequential(network(), Centered()), 10)
        with pytest.warns(UserWarning, match=r"^MCPredictor: A row's outputs depend on the other rows of its batch"):
            predictor(data())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            predictor(data())


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
            (
                {"strategy": "quick"},
                ValueError,
                "strategy must be 'auto', 'vectorized', 'repeated', 'loop', got 'quick'",
            ),
            ({"sources": "nothing"}, ValueError, "sources must name modules of the model, but 'nothing' matches none"),
            ({"masks": "own"}, ValueError, "masks must be 'independent' or 'shared', got 'own'"),
        ],
    )
    def test_are_refused_at_once(self, arguments: dict[str, object], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match="^" + re.escape(message)):
            torchdrop.MCPredictor(network(), **arguments)  # type: ignore[arg-type]

    def test_a_model_without_randomness(self) -> None:
        predictor = torchdrop.MCPredictor(nn.Linear(4, 2), 10)
        with pytest.raises(ValueError, match=r"^nothing random is active in the model"):
            predictor(data())

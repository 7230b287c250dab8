"""What `mc_predict` takes from a model's outputs: several by name, and those of batches of different sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchdrop
from torchdrop.monte_carlo import ClassificationPrediction, Prediction, Predictions, RegressionPrediction
from torchdrop.monte_carlo.sample import STRATEGIES

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))


class Named(NamedTuple):
    kind: Tensor
    size: Tensor


@dataclasses.dataclass
class Record:
    kind: Tensor
    size: Tensor


class Heads(nn.Module):
    """Returns two outputs in a container."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any] = lambda kind, size: (kind, size)) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5))
        self.kind, self.size, self.container = nn.Linear(16, 3), nn.Linear(16, 2), container
        self.eval()

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return self.container(self.kind(y), self.size(y))


def both(y: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"kind": y[0], "size": y[1]}


TASKS = {"kind": "classification", "size": "regression"}


def predict(model: nn.Module, inputs: Any, **options: Any) -> Any:
    return torchdrop.mc_predict(model, inputs, 24, **{"seed": 5, "keep_samples": True, **options})


def check_each(result: Any, **options: Any) -> None:
    """Checks that each output has what a call of its own gives."""
    assert isinstance(result, Predictions)
    for place, (name, task) in enumerate(TASKS.items()):
        alone = predict(Heads(), X, task=task, select_output=lambda y, place=place: y[place], **options)
        assert type(result[name]) is type(alone)
        assert alone.std.max() > 0
        for field in (*alone.standard_errors, "samples"):
            assert torch.allclose(getattr(result[name], field), getattr(alone, field), atol=1e-5), field


class TestHeads:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_each_has_its_own_task(self, strategy: str) -> None:
        result = predict(Heads(), X, task=TASKS, select_output=both, strategy=strategy)
        check_each(result)
        assert isinstance(result["kind"], ClassificationPrediction)
        assert isinstance(result["size"], RegressionPrediction)

    @pytest.mark.parametrize(
        "container", [lambda kind, size: {"size": size, "kind": kind, "more": None}, Named, Record]
    )
    def test_names_in_what_the_model_returns(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        check_each(predict(Heads(container), X, task=TASKS))

    def test_batches(self) -> None:
        loader = DataLoader(TensorDataset(X), batch_size=4)
        check_each(predict(Heads(), loader, task=TASKS, select_output=both))

    def test_one_set_of_passes(self) -> None:
        model, calls = Heads(), []
        model.size.register_forward_hook(lambda *_: calls.append(1))
        predict(model, X, select_output=lambda y: y[0], strategy="loop")
        alone = len(calls)
        predict(model, X, task=TASKS, select_output=both, strategy="loop")
        assert len(calls) == 2 * alone

    def test_one_task_for_all(self) -> None:
        result = predict(Heads(), X, select_output=both)
        assert {type(one) for one in result.values()} == {Prediction}
        assert {type(one) for one in predict(Heads(), X, select_output=both, task="classification").values()} == {
            ClassificationPrediction
        }

    def test_options_go_to_the_outputs_of_their_task(self) -> None:
        options: dict[str, Any] = {"scores": "logits", "tau": 4.0, "weight_scaling": True, "sampling": "latin"}
        result = predict(Heads(), X, task=TASKS, select_output=both, **options)
        assert torch.allclose(result["size"].aleatoric_variance, torch.tensor(0.25))
        assert torch.allclose(result["size"].weight_scaling, Heads()(X)[1])
        assert torch.allclose(result["kind"].weight_scaling, Heads()(X)[0].softmax(1))

    def test_a_pair_with_the_models_noise(self) -> None:
        def chosen(y: tuple[Tensor, Tensor]) -> dict[str, Any]:
            return {"kind": y[0], "size": (y[1][:, :1], y[1][:, 1:])}

        result = predict(Heads(), X, task=TASKS, noise="log_variance", select_output=chosen)
        alone = predict(Heads(), X, task="regression", noise="log_variance", select_output=lambda y: chosen(y)["size"])
        assert torch.allclose(result["size"].aleatoric_variance, alone.aleatoric_variance)
        assert result["kind"].mean.shape == (9, 3)

    def test_tolerance_holds_for_all(self) -> None:
        result = torchdrop.mc_predict(Heads(), X, 4000, task=TASKS, select_output=both, tolerance=0.02, seed=1)
        assert isinstance(result, Predictions)
        assert {one.num_samples for one in result.values()} == {result["kind"].num_samples}
        assert max(float(one.standard_error.max()) for one in result.values()) <= 0.02

    def test_summary_and_conversion(self) -> None:
        result = predict(Heads(), X, task=TASKS, select_output=both)
        text = str(result)
        assert text.count("1 of 1 active") == 1
        assert "kind: ClassificationPrediction of shape (9, 3)" in text
        assert "size: RegressionPrediction of shape (9, 2)" in text
        assert result.to(torch.float64)["size"].mean.dtype == torch.float64
        assert len(result) == 2

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({}, TypeError, r"one tensor, got Tensor, Tensor: give select_output=.*\{'mean': y\[0\], 'other': "),
            ({"task": TASKS}, TypeError, r"task names the output 'kind', which the model's tuple does not have: give"),
            ({"task": {}}, ValueError, "task must name one output at least"),
            ({"task": {"kind": "ranking"}}, ValueError, "task must be None, 'classification', 'multilabel'"),
            ({"task": {"kind": "regression"}, "scores": "logits"}, ValueError, "scores='logits' is for task='class"),
            ({"task": {"kind": "regression"}, "select_output": both}, TypeError, "with 'kind', got 'kind', 'size'"),
            ({"task": TASKS, "select_output": lambda y: y[0]}, TypeError, "with 'kind', 'size', got Tensor"),
            ({"select_output": lambda _: {}}, TypeError, "must be a mapping"),
            ({"select_output": lambda y: {"kind": y}}, TypeError, "output 'kind' must be one tensor, got Tensor, T"),
            ({"task": "classification", "select_output": lambda y: {"kind": y[0][:, :1]}}, ValueError,
             "output 'kind': outputs must have a column"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_taken(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            predict(Heads(), X, **options)


class Tokens(nn.Module):
    """An output for each token of each row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.drop, self.last = nn.Embedding(7, 16), nn.Dropout(0.3), nn.Linear(16, 3)
        self.calls = 0
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.drop(self.embedding(ids)))


IDS = [torch.arange(rows * length).reshape(rows, length) % 7 for rows, length in ((4, 5), (2, 8), (1, 3))]


class TestBatchesOfDifferentSizes:
    def test_are_an_error_at_the_second(self) -> None:
        taken: list[int] = []
        with pytest.raises(
            ValueError, match=r"batch 2 has outputs of shape \(2, 8, 3\) and batch 1 of \(4, 5, 3\), so"
        ):
            predict(Tokens(), (taken.append(len(ids)) or ids for ids in IDS))  # type: ignore[func-returns-value]
        assert taken == [4, 2]

    @pytest.mark.parametrize("task", [None, "classification"])
    def test_are_padded(self, task: str | None) -> None:
        options: dict[str, Any] = {"task": task, "weight_scaling": True}
        options["select_output"] = lambda y: y.movedim(-1, 1)
        options |= {"class_dim": 1} if task else {}
        result = predict(Tokens(), iter(IDS), batches="padded", **options)
        assert result.mean.shape == (7, 3, 8)
        places = ~result.mean[:, 0].isnan()
        assert torch.equal(result.valid, places if task else places[:, None].expand(7, 3, 8))
        assert result.samples.shape == (24, 7, 3, 8)
        assert places.sum(1).tolist() == [5] * 4 + [8] * 2 + [3]
        first = predict(Tokens(), IDS[0], **options)
        for part, alone in ((result.batches()[0], first),):
            assert part.valid is None
            for name in (*alone.standard_errors, "samples", "weight_scaling"):
                assert torch.allclose(getattr(part, name), getattr(alone, name), atol=1e-6), name
                padded = getattr(result, name)
                filled = padded[:, :4] if name == "samples" else padded[:4]
                assert torch.allclose(filled[..., :5], getattr(alone, name), atol=1e-6), name
                assert filled[..., 5:].isnan().all()
            for name, error in alone.standard_errors.items():
                assert torch.allclose(part.standard_errors[name], error, atol=1e-6)
        assert [tuple(part.mean.shape) for part in result.batches()] == [(4, 3, 5), (2, 3, 8), (1, 3, 3)]

    def test_summary_and_conversion(self) -> None:
        result = predict(Tokens(), iter(IDS), batches="padded")
        assert "nan" not in str(result).partition("\nSources")[0]
        half = result.to(torch.float64)
        assert half.valid.dtype == torch.bool
        assert result.numpy()["valid"].dtype == bool
        assert half.batches()[1].mean.dtype == torch.float64

    def test_joined_results_by_batch(self) -> None:
        loader = DataLoader(TensorDataset(X), batch_size=4)
        result = predict(Heads(), loader, select_output=lambda y: y[0])
        assert result.valid is None
        assert [len(part) for part in result.batches()] == [4, 4, 1]
        assert torch.equal(torch.cat([part.mean for part in result.batches()]), result.mean)
        whole = predict(Heads(), X, select_output=lambda y: y[0])
        assert [len(part) for part in whole.batches()] == [9]

    def test_one_batch_has_a_mask_too(self) -> None:
        assert predict(Tokens(), IDS[0], batches="padded").valid.all()

    def test_several_outputs(self) -> None:
        result = predict(Tokens(), iter(IDS), batches="padded", select_output=lambda y: {"a": y, "b": y[:, 0]})
        assert result["a"].mean.shape == (7, 8, 3)
        assert result["b"].mean.shape == (7, 3)
        assert result["b"].valid.all()

    def test_of_other_dimensions(self) -> None:
        with pytest.raises(ValueError, match=r"batch 2 has outputs of shape \(2, 3\) and .*give select_output="):
            predict(
                Tokens(),
                iter(IDS),
                batches="padded",
                select_output=lambda y: y[:, 0] if y.shape[1] == 8 else y,
                strategy="loop",
            )

    def test_other_words(self) -> None:
        with pytest.raises(ValueError, match="batches must be 'joined' or 'padded', got 'list'"):
            predict(Tokens(), IDS[0], batches="list")


class Squeezed(nn.Module):
    def __init__(self, outputs: int, dim: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.shape = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, outputs)), (1,) * dim
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y.reshape(*y.shape, *self.shape).squeeze()


class TestSqueeze:
    """A batch of one row loses its rows' dimension in `squeeze()`."""

    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("chunk", [None, 1, 23])
    @pytest.mark.parametrize("outputs", [1, 3])
    def test_is_put_back(self, strategy: str, chunk: int | None, outputs: int) -> None:
        model = Squeezed(outputs)
        whole = predict(model, X, strategy=strategy, weight_scaling=True)
        assert whole.mean.shape == ((9,) if outputs == 1 else (9, 3))
        for size in (4, 1):
            loader = DataLoader(TensorDataset(X), batch_size=size)
            parts = predict(model, loader, strategy=strategy, chunk=chunk, weight_scaling=True)
            assert torch.allclose(parts.samples, whole.samples, atol=1e-5)
            assert torch.allclose(parts.weight_scaling, whole.weight_scaling, atol=1e-5)

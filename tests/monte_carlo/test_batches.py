"""What `mc_predict` takes from a batch as the model's arguments, and what it says where that is not certain."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchdrop
from torchdrop.monte_carlo import Prediction
from torchdrop.monte_carlo.batches import Signature

X, SHIFT = torch.randn(10, 6, generator=torch.Generator().manual_seed(3)), torch.arange(10.0)[:, None]


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.eval()


class Plain(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Both(Body):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.body(x + shift)


class Optional(Body):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.body(x if shift is None else x + shift)


class Many(Body):
    def forward(self, *tensors: Tensor) -> Tensor:
        return self.body(sum(tensors))


class WithLabels(Body):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is None
        return self.body(x)


class WithFlags(Body):
    def forward(self, x: Tensor, flag: bool = False, name: str | None = None) -> Tensor:
        assert not flag
        return self.body(x)


class OfBatch(Body):
    """Its one argument is the whole batch."""

    def forward(self, batch: Any) -> Tensor:
        x, shift = (batch["x"], batch["shift"]) if isinstance(batch, dict) else batch
        return self.body(x + shift)


class Pair(NamedTuple):
    x: Tensor
    shift: Tensor


def predict(model: nn.Module, inputs: Any, **options: Any) -> Prediction:
    return torchdrop.mc_predict(model, inputs, 8, **{"seed": 5, **options})


def loader(*items: Any) -> DataLoader[Any]:
    return DataLoader(list(zip(*items, strict=True)), batch_size=4)  # type: ignore[arg-type]


@pytest.fixture
def shifted() -> Tensor:
    return predict(Plain(), X + SHIFT).mean


def agrees(result: Prediction, expected: Tensor) -> bool:
    return torch.allclose(result.mean, expected, atol=1e-5)


class TestSeveralArguments:
    @pytest.mark.parametrize("model", [Both, Optional, Many, OfBatch])
    def test_pairs_of_inputs_and_targets(self, model: Callable[[], nn.Module], shifted: Tensor) -> None:
        """default_collate makes [[x1, x2], y] of samples ((x1, x2), y)."""
        data = loader(list(zip(X, SHIFT, strict=True)), torch.zeros(10))
        assert isinstance(next(iter(data))[0], list)
        assert agrees(predict(model(), data, select=lambda batch: batch[0]), shifted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if model is Many else "error")
            assert agrees(predict(model(), data), shifted)

    def test_a_mapping_is_the_one_argument_of_a_model_without_its_names(self, shifted: Tensor) -> None:
        data = [{"x": x, "shift": shift} for x, shift in zip(X, SHIFT, strict=True)]
        assert agrees(predict(OfBatch(), DataLoader(data, batch_size=4)), shifted)  # type: ignore[arg-type]
        assert agrees(predict(OfBatch(), {"x": X, "shift": SHIFT}), shifted)
        assert agrees(predict(Both(), DataLoader(data, batch_size=4)), shifted)  # type: ignore[arg-type]

    def test_a_mapping_with_more_than_the_model_takes(self) -> None:
        with pytest.raises(TypeError, match=r"'x', 'shift', 'id', and the model's forward\(x, shift\) does not take"):
            predict(Both(), {"x": X, "shift": SHIFT, "id": SHIFT})
        with pytest.raises(TypeError, match=r"mapping with 0, 1, and .* give select="):
            predict(Both(), {0: X, 1: SHIFT})

    def test_namedtuples(self, shifted: Tensor) -> None:
        assert agrees(predict(Both(), Pair(X, SHIFT)), shifted)
        assert agrees(predict(OfBatch(), Pair(X, SHIFT)), shifted)

    def test_tuples_are_never_one_argument(self, shifted: Tensor) -> None:
        assert agrees(predict(Both(), (X, SHIFT)), shifted)
        assert agrees(predict(OfBatch(), ((X, SHIFT),)), shifted)
        with pytest.raises(
            TypeError, match=r"tuple of 2, .* forward\(x\) does not take this many: pass the inputs with"
        ):
            predict(Plain(), (X, SHIFT))

    def test_methods(self, shifted: Tensor) -> None:
        class Encoding(Body):
            def encode(self, x: Tensor, shift: Tensor) -> Tensor:
                return self.body(x + shift)

        data = loader(X, SHIFT)
        assert agrees(predict(Encoding(), data, method="encode", select=tuple), shifted)
        with pytest.raises(TypeError, match=r"encode\(x, shift\) needs 2 arguments: give select=tuple"):
            predict(Encoding(), data, method="encode")


class TestPairs:
    """The second of a pair is the targets, unless the model could take it: nothing is left out in silence."""

    def test_a_model_that_needs_both(self, shifted: Tensor) -> None:
        data = DataLoader(TensorDataset(X, SHIFT), batch_size=4)
        with pytest.raises(TypeError, match=r"forward\(x, shift\) needs 2 arguments: give select=tuple to pass both"):
            predict(Both(), data)
        assert agrees(predict(Both(), data, select=tuple), shifted)

    @pytest.mark.parametrize(("model", "name"), [(Optional, "shift"), (Many, r"\*tensors")])
    def test_a_model_that_could_take_both(self, model: Callable[[], nn.Module], name: str, shifted: Tensor) -> None:
        data = DataLoader(TensorDataset(X, SHIFT), batch_size=4)
        with pytest.warns(
            UserWarning, match=f"could take it as {name}: give select=tuple to pass both.*batch"
        ) as caught:
            result = predict(model(), data)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert agrees(predict(model(), data, select=lambda batch: batch[0]), result.mean)
            assert agrees(predict(model(), data, select=tuple), shifted)

    @pytest.mark.parametrize("model", [Plain, WithLabels, WithFlags])
    def test_a_model_that_could_not(self, model: Callable[[], nn.Module]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = predict(model(), DataLoader(TensorDataset(X, SHIFT), batch_size=4))
        assert agrees(result, predict(Plain(), X).mean)

    def test_hooks_may_change_the_arguments(self, shifted: Tensor) -> None:
        model = Both()
        model.register_forward_pre_hook(lambda _, args: (args[0], SHIFT[: len(args[0])]))
        assert agrees(predict(model, X), shifted)


def test_signature_of_a_wrapped_model() -> None:
    assert repr(Signature(nn.DataParallel(Optional()))) == "forward(x, shift=None)"


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, X, X), r"got a tuple of 3: give select=.*such as lambda batch: batch\[:2\]"),
        ((3, X), r"the inputs in a batch must be .* got a int: give select="),
        (3, r"got a int: give select="),
    ],
)
def test_batches_of_another_structure(batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        predict(Plain(), iter([batch]))


def test_a_list_could_be_arguments_or_batches() -> None:
    with pytest.raises(
        TypeError, match=r"got list: pass tuple\(inputs\) if they are arguments, iter\(inputs\) if they"
    ):
        predict(Plain(), [X])


class TestArrays:
    """Arrays of numpy and frames of pandas, which users of scikit-learn and skorch have."""

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f8"])
    def test_get_the_models_dtype(self, dtype: str) -> None:
        array, before = X.numpy().astype(dtype), X.numpy().astype(dtype)
        expected = torch.from_numpy(array.astype("float32"))
        assert agrees(predict(Plain(), array), predict(Plain(), expected).mean)
        assert predict(Plain().double(), array).mean.dtype == torch.float64
        assert predict(Plain().bfloat16(), array).mean.dtype == torch.float32
        assert (array == before).all()

    def test_order_in_memory(self) -> None:
        array = X.numpy()[::-1]
        frozen = X.numpy().copy()
        frozen.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert agrees(predict(Plain(), array), predict(Plain(), X.flip(0)).mean)
            assert agrees(predict(Plain(), frozen), predict(Plain(), X).mean)

    def test_integers_stay_integers(self) -> None:
        class Embedded(Body):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(9, 6)

            def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
                assert keep.dtype == torch.bool
                return self.body(self.embedding(ids) * keep[:, None])

        ids, keep = torch.arange(9), torch.arange(9) > 3
        model = Embedded()
        expected = predict(model, (ids, keep)).mean
        assert agrees(predict(model, (ids.numpy(), keep.numpy())), expected)
        assert agrees(predict(model, {"ids": ids.int().numpy(), "keep": keep.numpy()}), expected)

    def test_frames(self) -> None:
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(X.double().numpy()).astype({5: "float32"})
        series = pandas.Series(SHIFT[:, 0].numpy())
        assert agrees(predict(Plain(), frame), predict(Plain(), X).mean)
        result = predict(Plain(), (frame,), select=lambda inputs: inputs[0] + series.mean())
        assert agrees(result, predict(Plain(), X + SHIFT.mean()).mean)
        with pytest.raises(TypeError, match=r"must be numbers, got a DataFrame of dtype object: .*astype\('float32'\)"):
            predict(Plain(), frame.astype({0: str}))

    def test_batches(self, shifted: Tensor) -> None:
        parts = [(X[:4].numpy(), SHIFT[:4].numpy()), (X[4:].numpy(), SHIFT[4:].numpy())]
        assert agrees(predict(Plain(), iter(parts)), predict(Plain(), X).mean)
        assert agrees(predict(Plain(), (x for x, _ in parts)), predict(Plain(), X).mean)
        assert agrees(predict(Both(), iter(parts), select=tuple), shifted)
        assert agrees(predict(Both(), iter([(part, 0) for part in parts])), shifted)
        with pytest.warns(UserWarning, match="could take it as shift"):
            predict(Optional(), iter(parts))

    def test_numpy_and_pandas_are_not_imported(self) -> None:
        code = "import sys; from torchdrop.monte_carlo import batches; print('pandas' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

"""Classes along any dimension, found where they can be, and places that are not reported."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import torchdrop
from torchdrop.monte_carlo import ClassificationPrediction, RegressionPrediction, metrics
from torchdrop.monte_carlo.classes import Classification, class_numbers
from torchdrop.monte_carlo.plain import Plain
from torchdrop.monte_carlo.statistics import Collector
from torchdrop.monte_carlo.task_predictions import predict_from

ROWS, TOKENS, LABELS = 6, 5, 4


class Tagger(nn.Module):
    """Labels for each token, (rows, tokens, labels), in a mapping as transformers return them."""

    def __init__(self, **config: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.drop, self.head = nn.Embedding(20, 8), nn.Dropout(0.4), nn.Linear(8, LABELS)
        if config:
            self.config = SimpleNamespace(**config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.drop(self.embed(input_ids)))
        if attention_mask is not None:  # as softmax over nothing gives
            logits = logits.masked_fill(attention_mask.unsqueeze(-1) == 0, math.nan)
        return {"logits": logits}


def batch() -> dict[str, Tensor]:
    ids = torch.randint(20, (ROWS, TOKENS), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([5, 3, 1, 4, 5, 2])
    return {"input_ids": ids, "attention_mask": (torch.arange(TOKENS) < lengths[:, None]).long()}


def ids() -> dict[str, Tensor]:
    return {"input_ids": batch()["input_ids"]}


def predict(model: nn.Module, inputs: Any, **options: Any) -> Any:
    return torchdrop.mc_predict(
        model, inputs, 12, **{"task": "classification", "seed": 3, "keep_samples": True, **options}
    )


def same(one: Any, other: Any) -> None:
    for name, value in one.statistics.items():
        torch.testing.assert_close(other.statistics[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(
            other.standard_errors[name], one.standard_errors[name], rtol=1e-4, atol=1e-6, equal_nan=True
        )


class TestDimension:
    @pytest.mark.parametrize("dim", [1, 2, 3, -1, -2, -3])
    @pytest.mark.parametrize("scores", ["logits", "probabilities"])
    def test_any_is_as_if_it_were_the_first(self, dim: int, scores: str) -> None:
        outputs = torch.randn(7, 3, 4, 5, 6)
        outputs = outputs if scores == "logits" else outputs.softmax(2)
        first, other = (
            Collector(Classification(scores, one), groups=3, keep_samples=True) for one in (1, dim)
        )  # fmt: skip
        first.add(outputs, range(7))
        place = dim if dim > 0 else 4 + dim
        moved = outputs.movedim(2, place + 1)
        other.add(moved, range(7))
        one = predict_from(first, weight_scaling=outputs[0])
        two = predict_from(other, weight_scaling=moved[0])
        assert isinstance(one, ClassificationPrediction)
        assert isinstance(two, ClassificationPrediction)
        assert (one.class_dim, two.class_dim) == (1, place)
        assert two.mean.shape == moved.shape[1:]
        for name in ("mean", "variance", "std", "weight_scaling"):
            torch.testing.assert_close(getattr(two, name), getattr(one, name).movedim(1, place))
        for name in ("mean", "variance", "std"):
            torch.testing.assert_close(two.standard_errors[name], one.standard_errors[name].movedim(1, place))
        assert one.samples is not None
        torch.testing.assert_close(two.samples, one.samples.movedim(2, place + 1))
        for name in ("predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio"):
            torch.testing.assert_close(getattr(two, name), getattr(one, name))
        assert torch.equal(one.predicted, two.predicted)
        targets = torch.randint(4, (3, 5, 6))
        torch.testing.assert_close(one.log_likelihood(targets), two.log_likelihood(targets))
        assert metrics.brier(one, targets) == pytest.approx(metrics.brier(two, targets))
        assert two.to(torch.float64).class_dim == place  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("dim", "message"),
        [
            (0, "class_dim must be 'auto' or a dimension after the rows, which are 0, got 0"),
            (True, "class_dim must be 'auto' or a dimension after the rows, which are 0, got True"),
            ("last", "class_dim must be 'auto' or a dimension after the rows, which are 0, got 'last'"),
            (3, r"in \[1, 2\] or negative, got 3 for outputs of shape \(6, 5, 4\)"),
            (-3, r"in \[1, 2\] or negative, got -3 for outputs of shape \(6, 5, 4\)"),
        ],
    )
    def test_one_that_is_none(self, dim: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            predict(Tagger(), ids(), class_dim=dim)

    def test_the_models_configuration_tells(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = predict(Tagger(num_labels=LABELS), ids())
            words = predict(Tagger(vocab_size=LABELS, num_labels=2), ids())
        assert found.class_dim == 2
        torch.testing.assert_close(found.mean.sum(2), torch.ones(ROWS, TOKENS))
        assert found.predictive_entropy.shape == (ROWS, TOKENS)
        same(found, words)
        same(found, predict(Tagger(), ids(), class_dim=-1))

    def test_without_it_the_first_is_taken_with_a_warning(self) -> None:
        message = r"classes are taken from dimension 1 of outputs of shape \(6, 5, 4\), and dimension 2 .* class_dim=2"
        for model in (Tagger(), Tagger(num_labels=7)):
            with pytest.warns(UserWarning, match=message):
                found = predict(model, ids())
            assert found.class_dim == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(found, predict(Tagger(), ids(), class_dim=1))

    def test_two_dimensions_that_the_configuration_names(self) -> None:
        with pytest.warns(UserWarning, match=r"taken from dimension 2 .* and dimension 1 could be meant"):
            assert predict(Tagger(num_labels=LABELS, vocab_size=TOKENS), ids()).class_dim == 2

    @pytest.mark.parametrize("dim", [2, 3])
    def test_probabilities_tell(self, dim: int) -> None:
        outputs = torch.randn(5, 3, 4, 5).softmax(dim)
        placed = Classification("auto", "auto").placed(outputs)
        assert (placed.class_dim, placed.doubt) == (dim - 1, "")

    @pytest.mark.parametrize(
        ("shape", "numbers", "dim", "doubted"),
        [
            ((8, 3), (), 1, False),
            ((8, 21, 64, 64), (), 1, False),
            ((8, 64, 64, 5), (), 1, True),
            ((8, 64, 64, 5), (5,), 3, False),
            ((8, 150, 16, 16), (150,), 1, False),
            ((8, 5, 9), (), 1, True),
            ((8, 2, 50), (50, 2), 2, True),
            ((8, 5, 1), (), 1, False),
        ],
    )
    def test_shapes(self, shape: tuple[int, ...], numbers: tuple[int, ...], dim: int, doubted: bool) -> None:
        placed = Classification("auto", "auto", numbers).placed(torch.randn(2, *shape))
        assert placed.class_dim == dim
        assert bool(placed.doubt) is doubted

    def test_it_is_decided_once(self) -> None:
        """The first batch has tokens in another number than labels, the second has as many."""
        model = Tagger(num_labels=LABELS)
        found = [ids()["input_ids"][:3], ids()["input_ids"][3:, :LABELS]]
        first = predict(model, {"input_ids": found[0]})
        task = Classification("auto", "auto", (LABELS,)).placed(torch.randn(1, 3, TOKENS, LABELS))
        assert task.placed(torch.randn(1, 3, LABELS, LABELS)).class_dim == first.class_dim == 2

    def test_class_numbers(self) -> None:
        assert class_numbers(Tagger(num_labels=3, vocab_size=50)) == (3, 50)
        assert class_numbers(Tagger()) == ()
        model = Tagger()
        model.config = {"num_labels": 3}  # type: ignore[assignment]
        assert class_numbers(model) == ()

    def test_transformers(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=3,
        )
        torch.manual_seed(1)
        model = transformers.BertForTokenClassification(config).eval()
        inputs = {**ids(), "attention_mask": batch()["attention_mask"]}
        result = predict(model, inputs, valid="attention_mask")
        assert result.class_dim == 2
        assert torch.equal(result.mean.isnan().any(2), inputs["attention_mask"] == 0)


class TestPlaces:
    """Tokens of padding, where the model gives NaN, are left out."""

    def test_fields_are_nan_there_and_as_they_were_elsewhere(self) -> None:
        model, inputs = Tagger(num_labels=LABELS), batch()
        valid = inputs["attention_mask"].bool()
        with pytest.raises(ValueError, match="is not finite in row 1"):
            predict(model, inputs)
        some = predict(model, inputs, valid="attention_mask", weight_scaling=True)
        every = predict(model, ids(), weight_scaling=True)
        assert torch.equal(some.valid, valid)
        assert every.valid is None
        assert some.samples.isnan().any(3).sum(0).unique().tolist() == [0, 12]
        torch.testing.assert_close(some.samples[:, valid], every.samples[:, valid])
        torch.testing.assert_close(some.weight_scaling[valid], every.weight_scaling[valid])
        for several, expected in ((some.statistics, every.statistics), (some.standard_errors, every.standard_errors)):
            assert several.keys() == expected.keys()
            for name, value in several.items():
                assert value[~valid].isnan().all()
                torch.testing.assert_close(value[valid], expected[name][valid])
        assert (some.predicted[~valid] == -100).all()
        assert torch.equal(some.predicted[valid], every.predicted[valid])

    def test_every_way_of_saying_it(self) -> None:
        model, inputs = Tagger(num_labels=LABELS), batch()
        mask = inputs["attention_mask"]
        named = predict(model, inputs, valid="attention_mask")
        same(named, predict(model, inputs, valid=mask))
        same(named, predict(model, (inputs["input_ids"], mask), valid=mask.bool()))
        rows = [{name: value[row] for name, value in inputs.items()} for row in range(ROWS)]
        loader = DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
        same(named, predict(model, loader, valid="attention_mask"))
        same(named, predict(model, loader, valid=mask))
        same(named, predict(model, inputs, valid="attention_mask", memory=1))

    def test_conversions(self) -> None:
        result = predict(Tagger(num_labels=LABELS), batch(), valid="attention_mask")
        text = str(result)
        assert "20 of 30 places valid" in text
        assert "nan" not in text
        assert result.to(torch.float64).valid.dtype == torch.bool
        assert len(result.rows()) == ROWS
        assert result.pandas().shape[0] == ROWS
        both = type(result).concatenated([result, result])
        assert both.valid.shape == (2 * ROWS, TOKENS)

    def test_metrics_leave_them_out(self) -> None:
        inputs = batch()
        valid = inputs["attention_mask"].bool()
        result = predict(Tagger(num_labels=LABELS), inputs, valid="attention_mask")
        targets = torch.randint(LABELS, (ROWS, TOKENS))
        expected = metrics.scores(result.mean[valid], targets[valid])
        assert metrics.scores(result, targets.masked_fill(~valid, -100)) == pytest.approx(expected)
        found = metrics.misclassification_auroc(result, targets, result.mutual_information)
        assert found == metrics.misclassification_auroc(
            result.mean[valid], targets[valid], result.mutual_information[valid]
        )
        likelihood = result.log_likelihood(targets.masked_fill(~valid, -100))
        assert torch.equal(likelihood.isnan(), ~valid)
        assert likelihood[valid].mean().item() == pytest.approx(-expected["negative_log_likelihood"], rel=1e-5)
        with pytest.raises(ValueError, match="targets must be in"):
            result.log_likelihood(targets.masked_fill(valid, -100))

    def test_of_probabilities_and_other_tasks(self) -> None:
        outputs, valid = torch.randn(4, 3, 5, 2), torch.rand(3, 5) < 0.5
        valid[0] = True
        broken = outputs.softmax(3).masked_fill(~valid[..., None], math.inf)
        collector = Collector(Classification("auto", 2), valid=valid)
        collector.add(broken, range(4))
        assert collector.task == Classification("probabilities", 2)
        torch.testing.assert_close(predict_from(collector).mean[valid], outputs.softmax(3).mean(0)[valid])
        collector = Collector(Plain(), valid=valid)
        collector.add(outputs.masked_fill(~valid[..., None], math.nan), range(4))
        plain = predict_from(collector)
        torch.testing.assert_close(plain.variance[valid], outputs.var(0)[valid])
        assert plain.mean[~valid].isnan().all()

    def test_a_tolerance_and_a_regression(self) -> None:
        inputs = batch()
        result = torchdrop.mc_predict(
            Tagger(), inputs, 400, valid="attention_mask", task="regression", tau=1.0, tolerance=0.3, keep_samples=True
        )
        assert isinstance(result, RegressionPrediction)
        assert result.num_samples < 400
        with pytest.raises(ValueError, match="log-likelihoods of rows are not defined where places were left out"):
            result.log_likelihood(torch.zeros(ROWS, TOKENS, LABELS))

    @pytest.mark.parametrize(
        ("valid", "error", "message"),
        [
            ("mask", ValueError, r"named arguments \(input_ids, attention_mask\), got 'mask'"),
            (torch.ones(ROWS - 1, TOKENS), ValueError, r"a row for each .* got shape \(5, 5\) for row 5"),
            (torch.ones(ROWS, TOKENS + 1), ValueError, r"the shape \(6, 5\), or a beginning of it, got \(6, 6\)"),
            (3, TypeError, "valid must be the name of an argument, a tensor or None, got int"),
        ],
    )  # fmt: skip
    def test_what_it_cannot_be(self, valid: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            predict(Tagger(num_labels=LABELS), batch(), valid=valid)

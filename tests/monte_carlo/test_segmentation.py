"""Scores of segmentations against their definitions, pixel by pixel."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.monte_carlo import ClassificationPrediction, RegionScores, region_scores
from torchdrop.monte_carlo.classes import Classification
from torchdrop.monte_carlo.plain import Plain
from torchdrop.monte_carlo.segmentation import _ELEMENTS
from torchdrop.monte_carlo.statistics import Collector
from torchdrop.monte_carlo.task_predictions import predict_from

STATISTICS = ("predictive_entropy", "mutual_information", "expected_entropy", "variation_ratio")


def logits(labels: Tensor, classes: int) -> Tensor:
    """Logits of these label maps (T, B, ...), a little different so that no two classes have one mean probability."""
    scores = 3.0 * nn.functional.one_hot(labels, classes).movedim(-1, 2).double()
    return scores + 0.1 * torch.randn(scores.shape).clamp(-5, 5)


def predicted(labels: Tensor, classes: int) -> ClassificationPrediction:
    """A prediction whose samples have these label maps."""
    return prediction_of(logits(labels, classes))


def prediction_of(scores: Tensor) -> ClassificationPrediction:
    collector = Collector(Classification("logits"), keep_samples=True)
    collector.add(scores, range(len(scores)))
    prediction = predict_from(collector)
    assert isinstance(prediction, ClassificationPrediction)
    return prediction


def maps(samples: int = 7, images: int = 3, classes: int = 3, shape: tuple[int, ...] = (5, 4)) -> Tensor:
    """Label maps that are alike in all samples, and differ in some pixels."""
    base = torch.randint(classes, (images, *shape))
    noise = torch.randint(classes, (samples, images, *shape))
    return torch.where(torch.rand(noise.shape) < 0.4, noise, base)


def brute(labels: Tensor, c: int, image: int) -> dict[str, float]:
    """The scores of one region from sets of pixels."""
    sets = [set(map(tuple, (one[image] == c).nonzero().tolist())) for one in labels]
    volumes = torch.tensor([len(one) for one in sets]).double()
    dice = [
        2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0 for a, b in itertools.combinations(sets, 2)
    ]  # fmt: skip
    union = set.union(*sets)
    return {
        "volume": volumes.mean().item(),
        "volume_std": volumes.std().item(),
        "coefficient_of_variation": (volumes.std() / volumes.mean()).item(),
        "pairwise_dice": sum(dice) / len(dice) if union else float("nan"),
        "iou": len(set.intersection(*sets)) / len(union) if union else float("nan"),
    }


def same(a: RegionScores, b: RegionScores) -> None:
    for name, value in vars(a).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, getattr(b, name), equal_nan=True)


@pytest.mark.parametrize("shape", [(5, 4), (3, 2, 4), (9,)])
def test_scores_are_their_definitions(shape: tuple[int, ...]) -> None:
    labels = maps(shape=shape)
    labels[:, 0][labels[:, 0] == 2] = 1  # a class that the first image has not
    labels[0, 1] = 0  # and one that a sample of the second has not
    scores = region_scores(predicted(labels, 3))
    assert scores.volume.shape == (3, 3)
    assert scores.pairwise_dice[0, 2].isnan()
    assert scores.iou[0, 2].isnan()
    for image, c in itertools.product(range(3), range(3)):
        for name, value in brute(labels, c, image).items():
            assert float(getattr(scores, name)[image, c]) == pytest.approx(value, nan_ok=True, abs=1e-9), name


@pytest.mark.parametrize("statistic", STATISTICS)
def test_uncertainty_of_regions(statistic: str) -> None:
    prediction = predicted(maps(), 3)
    scores, values = region_scores(prediction, uncertainty=statistic), getattr(prediction, statistic)
    for image in range(3):
        chosen = prediction.predicted[image]
        for c in range(3):
            torch.testing.assert_close(scores.region_uncertainty[image, c], values[image][chosen == c].mean())
        torch.testing.assert_close(scores.uncertainty[image], values[image].mean())
        torch.testing.assert_close(scores.foreground_uncertainty[image], values[image][chosen != 0].mean())
    other = region_scores(prediction, uncertainty=statistic, background=2)
    torch.testing.assert_close(other.foreground_uncertainty[0], values[0][prediction.predicted[0] != 2].mean())
    assert region_scores(prediction, background=None).foreground_uncertainty.isnan().all()


def test_known_answers() -> None:
    """Two samples of one row of four pixels: class 1 is at places 0, 1, 2 and at 1, 2, 3."""
    labels = torch.tensor([[[[1, 1, 1, 0]]], [[[0, 1, 1, 1]]]])
    scores = region_scores(predicted(labels, 2))
    assert scores.volume.tolist() == [[1.0, 3.0]]
    assert scores.volume_std.tolist() == [[0.0, 0.0]]
    assert scores.pairwise_dice[0].tolist() == pytest.approx([0.0, 2 / 3])
    assert scores.iou[0].tolist() == pytest.approx([0.0, 0.5])
    assert "0.667" in repr(scores)
    assert "0 b" in repr(scores)


def test_samples_that_agree() -> None:
    scores = region_scores(predicted(maps(samples=1).expand(4, -1, -1, -1), 3))
    assert (scores.pairwise_dice == 1).all()
    assert (scores.iou == 1).all()
    assert (scores.coefficient_of_variation == 0).all()


def test_one_sample_has_no_spread() -> None:
    scores = region_scores(predicted(maps(samples=1), 3))
    assert scores.volume_std.isnan().all()
    assert scores.pairwise_dice.isnan().all()
    assert (scores.iou == 1).all()


def test_the_order_of_samples_and_images_does_not_matter() -> None:
    given = logits(maps(), 3)
    scores = region_scores(prediction_of(given))
    same(scores, region_scores(prediction_of(given[torch.randperm(7)])))
    alone = region_scores(prediction_of(given[:, 1:2]))
    torch.testing.assert_close(alone.pairwise_dice[0], scores.pairwise_dice[1])


def test_large_images_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = predicted(maps(shape=(11, 13)), 3)
    whole = region_scores(made)
    assert _ELEMENTS > 7 * 3 * 11 * 13
    monkeypatch.setattr("torchdrop.monte_carlo.segmentation._ELEMENTS", 100)
    same(whole, region_scores(made))


def test_places_that_are_not_reported_do_not_count() -> None:
    given, valid = logits(maps(images=1), 3), torch.ones(1, 5, 4, dtype=torch.bool)
    valid[:, 3:] = False
    whole = prediction_of(given)
    parts = {name: getattr(whole, name) for name in ("mean", *STATISTICS)}
    hidden: Any = {
        name: value.where(valid.unsqueeze(1) if name == "mean" else valid, torch.nan) for name, value in parts.items()
    }
    assert whole.samples is not None
    hidden["samples"] = whole.samples.where(valid.unsqueeze(1), torch.nan)
    same(region_scores(replace(whole, valid=valid, **hidden)), region_scores(prediction_of(given[:, :, :, :3])))


def test_a_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Dropout2d(0.5), nn.Conv2d(8, 3, 1)).eval()
    images = torch.randn(2, 1, 8, 8)
    result = torchdrop.mc_predict(model, images, 10, task="classification", keep_samples=True, seed=0)
    assert result.mean.shape == (2, 3, 8, 8)
    assert result.mutual_information.shape == (2, 8, 8)  # type: ignore[attr-defined]
    scores = region_scores(result)  # type: ignore[arg-type]
    assert scores.volume.sum(1).tolist() == pytest.approx([64.0, 64.0])
    assert scores.volume.dtype == torch.float32
    last = torchdrop.mc_predict(
        model, images, 10, task="classification", keep_samples=True, seed=0,
        class_dim=-1, select_output=lambda y: y.movedim(1, -1),
    )  # fmt: skip
    same(scores, region_scores(last))  # type: ignore[arg-type]


class TestBadInput:
    def test_samples_that_were_not_kept(self) -> None:
        with pytest.raises(ValueError, match=r"scores of regions need the samples.*keep_samples=True"):
            region_scores(replace(predicted(maps(), 3), samples=None))

    def test_another_kind(self) -> None:
        collector = Collector(Plain())
        collector.add(torch.rand(3, 2, 4, 4), range(3))
        with pytest.raises(TypeError, match="must be a ClassificationPrediction, got Prediction: say task="):
            region_scores(predict_from(collector))  # type: ignore[arg-type]

    def test_no_pixels(self) -> None:
        with pytest.raises(ValueError, match=r"must be of pixels or voxels, \(B, C, ...\), got shape \(2, 3\)"):
            region_scores(predicted(torch.randint(3, (4, 2)), 3))

    def test_another_statistic(self) -> None:
        with pytest.raises(ValueError, match=r"uncertainty must be one of 'predictive_entropy'.*got 'std'"):
            region_scores(predicted(maps(), 3), uncertainty="std")

    @pytest.mark.parametrize("background", [3, -1])
    def test_no_such_background(self, background: int) -> None:
        with pytest.raises(ValueError, match=rf"background must be a class in \[0, 3\) or None, got {background}"):
            region_scores(predicted(maps(), 3), background=background)

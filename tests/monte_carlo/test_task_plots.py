"""Pictures of segmentations, tokens and boxes: they show the numbers that they are given."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchdrop.monte_carlo import GeneratedPrediction, Items, merge_items, task_plots
from torchdrop.monte_carlo.classes import Classification
from torchdrop.monte_carlo.statistics import Collector
from torchdrop.monte_carlo.task_predictions import ClassificationPrediction, predict_from

pytest.importorskip("matplotlib")


def maps(valid: Tensor | None = None) -> ClassificationPrediction:
    """A prediction of two images (6, 7) and three classes."""
    collector = Collector(Classification("logits"))
    collector.add(torch.randn(5, 2, 3, 6, 7), range(5))
    made = predict_from(collector)
    assert isinstance(made, ClassificationPrediction)
    return made if valid is None else replace(made, valid=valid)


def tokens() -> GeneratedPrediction:
    """A sequence of three tokens, and one of two."""
    expected, information = torch.rand(2, 3), torch.rand(2, 3)
    return GeneratedPrediction(
        sequences=torch.ones(1, 2, 3), lengths=torch.tensor([[3, 2]]), reference=torch.tensor([[5, 6, 7], [8, 9, 0]]),
        valid=torch.tensor([[True, True, True], [True, True, False]]), log_probs=-torch.rand(1, 2, 3),
        predictive_entropy=expected + information, expected_entropy=expected, mutual_information=information,
        num_samples=1, seed=0,
    )  # fmt: skip


def found() -> Any:
    one = Items(torch.tensor([[1.0, 1, 5, 4], [6, 5, 8, 8]]), torch.tensor([[0.9, 0.1], [0.4, 0.6]]))
    two = Items(torch.tensor([[1.0, 2, 5, 4]]), torch.tensor([[0.7, 0.3]]))
    return merge_items([one, two])


def drawn(ax: Any) -> Any:
    """The Axes after they were really drawn, off the screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(ax.figure).draw()
    return ax


class TestUncertaintyMap:
    def test_three_panels(self) -> None:
        made, image = maps(), torch.rand(2, 1, 6, 7)
        axes = task_plots.uncertainty_map(image, made, row=1)
        drawn(axes[0])
        shown = [ax.images[0].get_array() for ax in axes]
        low, high = image[1].aminmax()
        np.testing.assert_allclose(shown[0], ((image[1, 0] - low) / (high - low)).double(), atol=1e-6)
        np.testing.assert_allclose(shown[2], made.predictive_entropy[1], atol=1e-6)
        colors = {tuple(shown[1][place]): int(made.predicted[1][place]) for place in np.ndindex(6, 7)}
        assert len(colors) == len(set(colors.values())) == int(made.predicted[1].unique().numel())
        assert axes[2].images[0].get_clim()[0] == 0
        assert [text.get_text() for text in axes[1].get_legend().get_texts()] == [
            str(one) for one in made.predicted[1].unique().tolist()
        ]

    def test_with_a_truth(self) -> None:
        made = maps()
        truth = made.predicted.clone()
        truth[0, 2, 3] = (truth[0, 2, 3] + 1) % 3
        truth[0, 0, 0] = -100
        names = ["sky", "road", "car"]
        axes = task_plots.uncertainty_map(
            torch.rand(3, 12, 14), made, truth=truth, uncertainty="mutual_information", names=names
        )
        drawn(axes[0])
        titles = [ax.get_title() for ax in axes]
        assert titles == ["image", "segmentation", "truth", "mutual information\n(lines: around wrong pixels)"]
        np.testing.assert_allclose(axes[3].images[0].get_array(), made.mutual_information[0], atol=1e-6)
        (lines,) = axes[3].collections  # around the one pixel, at its edges
        vertices = lines.get_paths()[0].vertices
        np.testing.assert_allclose(vertices.min(0), [2.5, 1.5], atol=0.07)
        np.testing.assert_allclose(vertices.max(0), [3.5, 2.5], atol=0.07)
        assert set(names) >= {text.get_text() for text in axes[2].get_legend().get_texts()}
        right = task_plots.uncertainty_map(torch.rand(6, 7), made, truth=made.predicted[0])
        assert len(right[3].collections) == 0

    def test_places_that_are_not_reported_are_gray(self) -> None:
        valid = torch.ones(2, 6, 7, dtype=torch.bool)
        valid[0, 1, 1] = False
        axes = task_plots.uncertainty_map(torch.rand(6, 7), maps(valid))
        np.testing.assert_allclose(axes[1].images[0].get_array()[1, 1], [0.6] * 3, atol=1e-6)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"row": 2}, "row must be one of 2, got 2"),
            ({"truth": torch.zeros(6, 6)}, r"truth must be of shape \(6, 7\), got \(6, 6\)"),
            ({"names": ["a"]}, "names must be 3, one for each class, got 1"),
            ({"uncertainty": "std"}, "uncertainty must be one of"),
            ({"image": torch.rand(5, 6, 7)}, r"image must be of shape \(H, W\).*got \(5, 6, 7\)"),
            ({"axes": [None]}, "axes must be 3, got 1"),
        ],
    )
    def test_bad_input(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            task_plots.uncertainty_map(**{"image": torch.rand(6, 7), "prediction": maps(), **changes})

    def test_volumes(self) -> None:
        collector = Collector(Classification("logits"))
        collector.add(torch.randn(2, 1, 3, 4, 4, 4), range(2))
        with pytest.raises(ValueError, match=r"prediction must be of pixels, \(B, C, H, W\), got shape"):
            task_plots.uncertainty_map(torch.rand(4, 4), predict_from(collector))  # type: ignore[arg-type]


class TestTokens:
    def test_bars(self) -> None:
        made = tokens()
        ax = drawn(task_plots.token_uncertainty(made, row=1))
        bars = np.array([[bar.get_y(), bar.get_height()] for bar in ax.patches]).reshape(2, 2, 2)
        np.testing.assert_allclose(bars[0, :, 1], made.expected_entropy[1, :2], rtol=1e-6)
        np.testing.assert_allclose(bars[1, :, 0], made.expected_entropy[1, :2], rtol=1e-6)
        np.testing.assert_allclose(bars[1].sum(1), made.predictive_entropy[1, :2], rtol=1e-6)
        assert [text.get_text() for text in ax.get_xticklabels()] == ["8", "9"]

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="tokens must be 3, one for each of the sequence, got 2"):
            task_plots.token_uncertainty(tokens(), ["a", "b"])


class TestBoxes:
    def test_boxes(self) -> None:
        ax = drawn(task_plots.boxes(found(), torch.rand(1, 10, 10), names=["cat", "dog"]))
        assert [text.get_text() for text in ax.texts] == ["cat 0.80, seen 100 %", "dog 0.60, seen 50 %"]
        outlines = [patch for patch in ax.patches if not patch.get_fill()]
        assert [patch.get_bbox().extents.tolist() for patch in outlines] == [[1, 1.5, 5, 4], [6, 5, 8, 8]]
        assert outlines[0].get_linewidth() > outlines[1].get_linewidth()
        upper = [patch for patch in ax.patches if patch.get_fill()][2]
        assert upper.get_height() == pytest.approx(2 * 0.5**0.5)  # two deviations: one to each side
        assert upper.get_y() + upper.get_height() / 2 == pytest.approx(1.5)

    def test_without_an_image_the_origin_is_above(self) -> None:
        ax = drawn(task_plots.boxes(found(), least=0.6))
        assert len(ax.texts) == 1
        assert ax.get_ylim()[0] > ax.get_ylim()[1]

    def test_bad_input(self) -> None:
        points = merge_items([Items(torch.zeros(1, 2), torch.ones(1, 1))], affinity=lambda a, b: torch.ones(1, 1))
        with pytest.raises(ValueError, match=r"observations must be of boxes \(x1, y1, x2, y2\), got 2 values"):
            task_plots.boxes(points)
        with pytest.raises(ValueError, match="names must be of all classes, up to 1, got 1"):
            task_plots.boxes(found(), names=["cat"])


def test_the_axes_given_are_drawn_on_and_pyplot_knows_of_none() -> None:
    from matplotlib import _pylab_helpers
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, 5)
    assert task_plots.uncertainty_map(torch.rand(6, 7), maps(), axes=axes[:3]) == list(axes[:3])
    assert task_plots.token_uncertainty(tokens(), ax=axes[3]) is axes[3]
    assert task_plots.boxes(found(), ax=axes[4]) is axes[4]
    assert _pylab_helpers.Gcf.figs == {}


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (
        lambda: task_plots.uncertainty_map(torch.rand(6, 7), maps()),
        lambda: task_plots.token_uncertainty(tokens()),
        lambda: task_plots.boxes(found()),
    ):
        with pytest.raises(ImportError, match=r"this needs matplotlib.figure: pip install 'torchdrop\[uncertainty\]'"):
            draw()

"""Pictures of segmentations, generated sequences and detected objects (``pip install 'torchdrop[uncertainty]'``).

Each function draws on the Axes that it is given, or on a Figure of its own (no pyplot, no global state), and returns
the Axes: ``uncertainty_map(image, prediction)[0].figure.savefig("map.png")``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._extras import ORANGE, VERMILION, axes_or_new, optional
from .generation import GeneratedPrediction
from .merging import Observations
from .plots import INNER
from .segmentation import checked_uncertainty
from .task_predictions import IGNORED, ClassificationPrediction

_FINE = 8
"""The number of points of a pixel's side, for lines that follow the edges of pixels."""


def uncertainty_map(
    image: Tensor,
    prediction: ClassificationPrediction,
    *,
    row: int = 0,
    truth: Tensor | None = None,
    uncertainty: str = "predictive_entropy",
    names: Sequence[str] | None = None,
    axes: Any = None,
) -> Any:
    """Draws an image, its segmentation, the uncertainty of each pixel, and the true segmentation if there is one.

    All maps of classes have the same colors. The uncertainty is shown from 0 on; with a truth, lines surround the
    pixels whose class is wrong, so that one sees if they are the uncertain ones. Pixels that are not reported are
    gray.

    Args:
        image: the image, of shape (H', W'), (1, H', W') or (3, H', W'), or a batch of them, of which `row` is drawn.
            Its values are stretched to the range that is shown.
        prediction: classes of pixels, of shape (B, C, H, W).
        row: the row of the prediction.
        truth: the true classes, of shape (H, W) or (B, H, W). Where they are -100 no pixel is wrong.
        uncertainty: the statistic that is shown: see `segmentation.region_scores`.
        names: the names of the classes.
        axes: three Axes to draw on, or four with a truth; new ones if None.

    Returns:
        The Axes.

    Raises:
        ValueError: shapes that do not fit, or too few names or Axes.

    Example:
        >>> import torchdrop
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 1), torch.nn.Dropout2d(0.5), torch.nn.Conv2d(8, 2, 1))
        >>> images = torch.randn(2, 1, 8, 8)
        >>> maps = torchdrop.mc_predict(model, images, 10, task="classification", seed=0)
        >>> [ax.get_title() for ax in uncertainty_map(images, maps, row=1)]
        ['image', 'segmentation', 'predictive entropy']
    """
    values, shape = checked_uncertainty(prediction, uncertainty), prediction.predicted.shape
    if len(shape) != 3:
        raise ValueError(f"prediction must be of pixels, (B, C, H, W), got shape {tuple(prediction.mean.shape)}")
    if not -len(prediction) <= row < len(prediction):
        raise ValueError(f"row must be one of {len(prediction)}, got {row}")
    classes = prediction.mean.shape[prediction.class_dim]
    names = [str(number) for number in range(classes)] if names is None else list(names)
    if len(names) != classes:
        raise ValueError(f"names must be {classes}, one for each class, got {len(names)}")
    predicted = prediction.predicted[row].cpu()
    shown = {"segmentation": predicted}
    if truth is not None:
        shown["truth"] = (truth[row] if truth.dim() == 3 else truth).detach().cpu()
        if shown["truth"].shape != predicted.shape:
            raise ValueError(f"truth must be of shape {tuple(predicted.shape)}, got {tuple(truth.shape)}")
    count = 2 + len(shown)
    if axes is None:
        figure = optional("matplotlib.figure").Figure(figsize=(3.2 * count + 0.6, 3.7), layout="compressed")
        axes = figure.subplots(1, count)
    axes = list(axes)
    if len(axes) != count:
        raise ValueError(f"axes must be {count}, got {len(axes)}")
    axes[0].imshow(_pixels(image, row), cmap="gray")
    present = torch.cat([labels.flatten() for labels in shown.values()]).unique().tolist()
    for ax, (name, labels) in zip(axes[1:], shown.items(), strict=False):
        _classes(ax, labels, names, present if name == list(shown)[-1] else ())
    heat = axes[-1].imshow(values[row].view(predicted.shape).cpu().numpy(), cmap="magma", vmin=0)
    unit = "share of samples" if uncertainty == "variation_ratio" else "nats"
    axes[-1].figure.colorbar(heat, ax=axes[-1], label=unit, fraction=0.046, pad=0.03)
    title = uncertainty.replace("_", " ")
    if truth is not None:
        wrong = (predicted != shown["truth"]) & (predicted != IGNORED) & (shown["truth"] != IGNORED)
        if wrong.any():
            _outline(axes[-1], wrong)
        title += "\n(lines: around wrong pixels)"
    for ax, text in zip(axes, ("image", *shown, title), strict=True):
        ax.set_title(text, fontsize=11)
        ax.set(xticks=[], yticks=[])
        ax.set_facecolor("0.6")
    return axes


def token_uncertainty(
    prediction: GeneratedPrediction, tokens: Sequence[str] | None = None, *, row: int = 0, ax: Any = None
) -> Any:
    """Draws the entropy of each token of a scored sequence: that of the data, and on it the mutual information.

    Args:
        prediction: what `mc_generate` returns.
        tokens: the tokens as text, for the axis; their numbers if None.
        row: the row.
        ax: the Axes to draw on; new ones if None.

    Returns:
        The Axes.

    Raises:
        ValueError: another number of tokens than the sequence has.

    Example:
        >>> one = torch.tensor([[0.5, 0.25]])
        >>> entropies = {"predictive_entropy": 2 * one, "expected_entropy": one, "mutual_information": one}
        >>> tokens = {"sequences": torch.ones(1, 1, 2), "lengths": torch.full((1, 1), 2)}
        >>> scored = {"reference": torch.tensor([[5, 7]]), "valid": one > 0, "log_probs": one.log().unsqueeze(0)}
        >>> result = GeneratedPrediction(**tokens, **entropies, **scored, num_samples=1, seed=0)
        >>> ax = token_uncertainty(result, ["a", "b"])
        >>> [text.get_text() for text in ax.get_xticklabels()]
        ['a', 'b']
    """
    valid = prediction.valid[row]
    count = int(valid.sum())
    tokens = [str(token) for token in prediction.reference[row][valid].tolist()] if tokens is None else list(tokens)
    if len(tokens) != count:
        raise ValueError(f"tokens must be {count}, one for each of the sequence, got {len(tokens)}")
    expected, information = (
        values[row][valid].detach().cpu().double().numpy()
        for values in (prediction.expected_entropy, prediction.mutual_information)
    )
    ax = axes_or_new(ax)
    places = list(range(count))
    ax.bar(places, expected, color=INNER, label="expected entropy (data)")
    ax.bar(places, information, bottom=expected, color=VERMILION, label="mutual information (model)")
    ax.set_xticks(places, tokens, rotation=90 if max(map(len, tokens), default=0) > 3 or count > 20 else 0, fontsize=8)
    ax.set(ylabel="nats", xlim=(-0.6, count - 0.4))
    ax.grid(visible=False, axis="x")
    ax.set_ylim(0, 1.25 * ax.get_ylim()[1])  # room for the legend
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    return ax


def boxes(
    found: Observations,
    image: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    least: float = 0.0,
    ax: Any = None,
) -> Any:
    """Draws the mean boxes of observations, with the spread of each side, the class, and the share that has seen it.

    Lines are thicker the more often a box was seen. Each side has a band of one standard deviation to both sides.

    Args:
        found: observations whose values are corners (x1, y1, x2, y2), in pixels.
        image: the image below them, of shape (H, W), (1, H, W) or (3, H, W).
        names: the names of the classes.
        least: the least share of samples of a box that is drawn.
        ax: the Axes to draw on; new ones if None.

    Returns:
        The Axes.

    Raises:
        ValueError: values that are no corners, or too few names.

    Example:
        >>> from torchdrop.monte_carlo.merging import Items, merge_items
        >>> one = Items(torch.tensor([[1.0, 1.0, 5.0, 4.0]]), torch.tensor([[0.9, 0.1]]))
        >>> ax = boxes(merge_items([one, one]), torch.rand(8, 8), names=["cat", "dog"])
        >>> [text.get_text() for text in ax.texts]
        ['cat 0.90, seen 100 %']
    """
    if found.mean.shape[1] != 4:
        raise ValueError(f"observations must be of boxes (x1, y1, x2, y2), got {found.mean.shape[1]} values")
    if names is not None and len(found) and int(found.label.max()) >= len(names):
        raise ValueError(f"names must be of all classes, up to {int(found.label.max())}, got {len(names)}")
    patches = optional("matplotlib.patches")
    ax = axes_or_new(ax)
    ax.grid(visible=False)
    if image is not None:
        pixels = _pixels(image, 0)
        ax.imshow(pixels, cmap="gray", extent=(0, pixels.shape[1], pixels.shape[0], 0))
    for number in range(len(found)):
        share, label = float(found.frequency[number]), int(found.label[number])
        if share < least:
            continue
        left, top, right, bottom = found.mean[number].tolist()
        spread = found.std[number].nan_to_num(0.0).tolist()
        bands = [
            ((left - spread[0], top), 2 * spread[0], bottom - top),
            ((right - spread[2], top), 2 * spread[2], bottom - top),
            ((left, top - spread[1]), right - left, 2 * spread[1]),
            ((left, bottom - spread[3]), right - left, 2 * spread[3]),
        ]
        for corner, width, height in bands:
            ax.add_patch(patches.Rectangle(corner, width, height, color=ORANGE, alpha=0.3, linewidth=0))
        style = {"fill": False, "edgecolor": ORANGE, "linewidth": 0.5 + 2 * share}
        ax.add_patch(patches.Rectangle((left, top), right - left, bottom - top, **style))
        name = str(label) if names is None else names[label]
        p = float(found.probabilities[number, label]) if found.probabilities.shape[1] else 1.0
        text = f"{name} {p:.2f}, seen {100 * share:.0f} %"
        ax.text(left, top - spread[1], text, fontsize=8, va="bottom", bbox={"color": "white", "alpha": 0.7, "pad": 1})
    ax.set(xlabel="x", ylabel="y", aspect="equal")
    if image is None:
        ax.autoscale_view()
        ax.invert_yaxis()
    return ax


def _pixels(image: Tensor, row: int) -> Any:
    """Returns an image as matplotlib shows it, (H, W) or (H, W, 3), with values in [0, 1]."""
    image = image.detach().cpu().double()
    image = image[row] if image.dim() == 4 else image
    image = image.squeeze(0) if image.dim() == 3 and len(image) == 1 else image
    if (image.dim() == 3 and len(image) != 3) or image.dim() not in (2, 3):
        raise ValueError(
            f"image must be of shape (H, W), (1, H, W) or (3, H, W), or a batch of them, got {tuple(image.shape)}"
        )
    low, high = image.aminmax()
    scaled = (image - low) / (high - low) if high > low else image * 0
    return (scaled if image.dim() == 2 else scaled.movedim(0, -1)).numpy()


def _outline(ax: Any, chosen: Tensor) -> None:
    """Draws lines around pixels, along their edges."""
    fine = (
        torch.nn.functional.pad(chosen, (1, 1, 1, 1)).repeat_interleave(_FINE, 0).repeat_interleave(_FINE, 1).double()
    )
    rows, columns = ((torch.arange(size) + 0.5) / _FINE - 1.5 for size in fine.shape)
    ax.contour(columns.numpy(), rows.numpy(), fine.numpy(), levels=[0.5], colors="cyan", linewidths=1)
    ax.set(xlim=(-0.5, chosen.shape[1] - 0.5), ylim=(chosen.shape[0] - 0.5, -0.5))


def _classes(ax: Any, labels: Tensor, names: Sequence[str], legend: Sequence[int]) -> None:
    """Draws a map of classes, each with its color, and a legend of some."""
    colormap = optional("matplotlib").colormaps[
        "tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "nipy_spectral"
    ]
    colors = [colormap(number / max(len(names) - 1, 1) if len(names) > 20 else number) for number in range(len(names))]
    table = torch.tensor([*(color[:3] for color in colors), (0.6, 0.6, 0.6)])
    known = torch.where((labels >= 0) & (labels < len(names)), labels, len(names))
    ax.imshow(table[known].numpy())
    if legend:
        patches = optional("matplotlib.patches")
        handles = [patches.Patch(color=colors[n], label=names[n]) for n in legend if 0 <= n < len(names)]
        ax.legend(handles=handles, fontsize=7, loc="upper left", framealpha=0.8, handlelength=1, borderpad=0.3)

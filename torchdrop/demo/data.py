"""The handwritten digits that come with scikit-learn, split once and for all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor

TRAIN_SIZE = 300
"""Few of the 1797, so that a network without dropout overfits and the test set is large."""

_SPLIT = 0


class Digits(NamedTuple):
    """Images as rows of 64 pixels, float32; labels 0 to 9, int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    test_pictures: Any
    """The original test images: a NumPy array of shape (tests, 8, 8), values 0 to 16."""


def load(device: torch.device) -> Digits:
    """Loads one stratified split for all seeds, pixels scaled to [0, 1] and centered on the training set's mean image.

    A dropped pixel is 0, so it has the value of the pixel's mean. Pixels are not divided by their own deviation: some
    are blank in nearly every image.
    """
    digits = load_digits()
    train, test, train_labels, test_labels = train_test_split(
        digits.images, digits.target, train_size=TRAIN_SIZE, stratify=digits.target, random_state=_SPLIT
    )
    mean = (train / 16).mean(axis=0)

    def images(pictures: Any) -> Tensor:
        return torch.as_tensor(pictures / 16 - mean, dtype=torch.float32).flatten(1).to(device)

    def labels(targets: Any) -> Tensor:
        return torch.as_tensor(targets, dtype=torch.int64).to(device)

    return Digits(images(train), labels(train_labels), images(test), labels(test_labels), test)

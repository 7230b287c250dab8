"""Thresholds and scales: the expectation is preserved by integers, not by sampling."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import keep_probs
from torchdrop.kernels.mask_params import (
    ALPHA,
    ONE,
    MaskParams,
    alpha,
    gaussian,
    inverted,
    linear,
    mask_params,
    original,
    params_tensor,
    threshold,
)

inner = keep_probs.filter(lambda k: 0 < k < 1)


@given(keep_probs)
@example(5e-324)
@example(1 - 2**-53)
def test_threshold_honours_the_rate_to_one_part_in_2_to_the_32(k: float) -> None:
    below = threshold(k)
    assert abs(Fraction(below, ONE) - Fraction(k)) <= Fraction(1, ONE)
    assert (below == 0) == (k == 0)
    assert (below == ONE) == (k == 1)


@given(keep_probs.filter(lambda k: k > 0))
def test_scale_times_realized_keep_probability_is_one(k: float) -> None:
    drawn = mask_params(k)
    assert abs(drawn.scale * (drawn.threshold / ONE) - 1) <= 1e-12
    kernels_own = torch.tensor(drawn.scale, dtype=torch.float32).item()
    assert abs(Fraction(kernels_own) * Fraction(drawn.threshold, ONE) - 1) <= Fraction(1, 2**24)


@given(keep_probs)
def test_original_formulation_keeps_unscaled(k: float) -> None:
    drawn = mask_params(k, original)
    assert (drawn.threshold, drawn.scale, drawn.shift, drawn.fill) == (threshold(k), 1.0, 0.0, 0.0)


@given(inner)
def test_alpha_keeps_mean_zero_and_variance_one(k: float) -> None:
    drawn = mask_params(k, alpha)
    q = drawn.threshold / ONE
    mean = q * drawn.shift + (1 - q) * drawn.fill
    second = q * (drawn.scale**2 + drawn.shift**2) + (1 - q) * drawn.fill**2
    assert abs(mean) <= 1e-12 * max(1.0, abs(drawn.shift))
    assert second - mean**2 == pytest.approx(1.0, rel=1e-9)
    assert drawn.fill == pytest.approx(drawn.scale * -ALPHA + drawn.shift, rel=1e-9, abs=1e-4)


@given(inner)
def test_gaussian_has_the_variance_of_inverted_dropout(k: float) -> None:
    q = threshold(k) / ONE
    assert mask_params(k, gaussian).scale ** 2 == pytest.approx((1 - q) / q, rel=1e-12)


@pytest.mark.parametrize("formula", [inverted, original, alpha, gaussian])
@given(st.lists(keep_probs, min_size=1, max_size=5))
def test_tensor_and_number_give_the_same_law(formula: object, ks: list[float]) -> None:
    together = params_tensor(torch.tensor(ks, dtype=torch.float64), formula)  # type: ignore[arg-type]
    for row, k in zip(together.tolist(), ks, strict=True):
        one = mask_params(k, formula)  # type: ignore[arg-type]
        assert row[0] == one.threshold
        assert row[1:] == pytest.approx([one.scale, one.shift, one.fill], rel=1e-15)


def test_a_float32_rate_is_taken_as_the_double_that_it_is() -> None:
    k = torch.tensor(0.1, dtype=torch.float32)
    assert params_tensor(k)[0].item() == threshold(k.item()) != threshold(0.1)


def test_linear_part_has_the_mask_and_scale_only() -> None:
    assert linear(MaskParams(7, 2.0)).scale == 2.0  # type: ignore[union-attr]
    whole = mask_params(0.5, alpha)
    part = linear(whole)
    assert isinstance(part, MaskParams)
    assert (part.threshold, part.scale, part.shift, part.fill) == (whole.threshold, whole.scale, 0.0, 0.0)
    assert torch.equal(linear(whole.tensor()), part.tensor())  # type: ignore[arg-type]


def test_law_survives_pickling_and_inference_mode() -> None:
    again = pickle.loads(pickle.dumps(mask_params(0.3)))
    assert repr(again) == repr(mask_params(0.3))
    with torch.inference_mode():
        assert not again.tensor().is_inference()
    assert math.isclose(again.tensor()[1].item(), 1 / 0.3, rel_tol=1e-9)

"""The statistical helpers, on right and on wrong samplers."""

from __future__ import annotations

import pytest
import torch

from tests.statistical import FALSE_ALARM, MISS, band, check_rate, draws_for


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.01, 0.5, 0.8, 0.999])
def test_a_right_sampler_passes_and_a_wrong_one_fails(rate: float) -> None:
    error = 0.2 * min(rate, 1 - rate)
    n = draws_for(rate, error)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        check_rate(int((torch.rand(n, generator=generator) < rate).sum()), n, rate, error)
        for wrong in (rate - error, rate + error):
            with pytest.raises(AssertionError):
                check_rate(int((torch.rand(n, generator=generator) < wrong).sum()), n, rate, error)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.5, 0.9])
def test_both_bounds_hold_by_the_exact_binomial(rate: float) -> None:
    binom = pytest.importorskip("scipy.stats").binom
    error = 0.25 * min(rate, 1 - rate)
    n = draws_for(rate, error)
    low, high = n * (rate - band(n, rate)), n * (rate + band(n, rate))
    assert binom.cdf(low - 1e-9, n, rate) + binom.sf(high, n, rate) <= FALSE_ALARM
    for wrong in (rate - error, rate + error):
        assert binom.cdf(high, n, wrong) - binom.cdf(low - 1, n, wrong) <= MISS


def test_too_few_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="10 draws do not suffice"):
        check_rate(5, 10, 0.5, 0.01)

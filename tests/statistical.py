"""Tests of random numbers with both errors bounded.

A check of a rate p against n draws accepts an observed count within a band around n p. Bernstein's inequality bounds
the probability that a correct sampler leaves the band (`FALSE_ALARM`) and that a sampler whose rate is off by `error`
stays in it (`MISS`); `draws_for` gives an n that suffices for both.
"""

from __future__ import annotations

import math

FALSE_ALARM = 1e-9
MISS = 1e-6


def deviation(n: int, variance: float, probability: float) -> float:
    """t such that P(|sum of n independent, centered variables within [-1, 1]| > t) <= probability (Bernstein)."""
    log = math.log(2 / probability)
    return log / 3 + math.sqrt(log**2 / 9 + 2 * n * variance * log)


def band(n: int, rate: float) -> float:
    """The half-width, as a rate, of the band that a correct sampler leaves with probability FALSE_ALARM at most."""
    return deviation(n, rate * (1 - rate), FALSE_ALARM) / n


def draws_for(rate: float, error: float) -> int:
    """Enough draws that a rate off by `error` is missed with probability MISS at most."""
    n = 1
    worst = min(0.25, max(r * (1 - r) for r in (rate, rate - error, rate + error)) if rate not in (0, 1) else 0.25)
    while band(n, rate) + deviation(n, worst, MISS) / n > error:
        n *= 2
    return n


def check_rate(count: int, n: int, rate: float, error: float) -> None:
    """Asserts that `count` of n draws agree with the rate; a sampler off by `error` would be caught.

    Raises:
        AssertionError: they do not agree.
        ValueError: n is too small for the promise.
    """
    if n < draws_for(rate, error):
        raise ValueError(
            f"{n} draws do not suffice for an error of {error} at rate {rate}: take {draws_for(rate, error)}"
        )
    assert abs(count / n - rate) <= band(n, rate), f"rate {count / n} of {n} draws, expected {rate} +- {band(n, rate)}"

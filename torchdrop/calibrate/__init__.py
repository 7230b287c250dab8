"""Uncertainty that can be relied on: conformal sets and intervals with a guaranteed coverage."""

from .conformal import coverage_bounds
from .intervals import ConformalIntervals, Intervals, conformal_intervals
from .sets import ConformalSets, PredictionSets, conformal_sets

__all__ = [
    "ConformalIntervals",
    "ConformalSets",
    "Intervals",
    "PredictionSets",
    "conformal_intervals",
    "conformal_sets",
    "coverage_bounds",
]

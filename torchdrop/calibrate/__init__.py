"""Uncertainty to rely on: calibrated on rows that the model was not trained on, or with a guaranteed coverage.

`temperature`, `deviation_scale` and `inference_rates` make predictions as certain as they should be; `conformal_sets`
and `conformal_intervals` hold a coverage whatever the model.
"""

from .conformal import coverage_bounds
from .deviation import DeviationScale, deviation_scale
from .inference_rates import InferenceRates, inference_rates
from .intervals import ConformalIntervals, Intervals, conformal_intervals
from .scores import Comparison, scores
from .sets import ConformalSets, PredictionSets, conformal_sets
from .temperature import Temperature, temperature

__all__ = [
    "Comparison",
    "ConformalIntervals",
    "ConformalSets",
    "DeviationScale",
    "InferenceRates",
    "Intervals",
    "PredictionSets",
    "Temperature",
    "conformal_intervals",
    "conformal_sets",
    "coverage_bounds",
    "deviation_scale",
    "inference_rates",
    "scores",
    "temperature",
]

"""Monte Carlo dropout inference: what in a model is random, samples of its outputs, and what they say.

`mc_dropout` makes a model's randomness fire; `mc_predict` runs samples and gives their statistics.
"""

from ..handlers.sources import Source
from .activate import mc_dropout
from .gal import predictive_log_likelihood, tau_from_weight_decay, weight_decay_from_tau
from .predict import mc_predict
from .prediction import ClassificationPrediction, Prediction, RegressionPrediction
from .report import Report

__all__ = [
    "ClassificationPrediction",
    "Prediction",
    "RegressionPrediction",
    "Report",
    "Source",
    "mc_dropout",
    "mc_predict",
    "predictive_log_likelihood",
    "tau_from_weight_decay",
    "weight_decay_from_tau",
]

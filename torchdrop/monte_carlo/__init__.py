"""Monte Carlo dropout inference: the randomness in a model, samples of its outputs, and statistics of them.

`mc_dropout` turns a model's randomness on; `mc_predict` runs samples and returns their statistics, and
`MCPredictor` does so again and again.
"""

from ..handlers.sources import Source
from .context import mc_dropout
from .exported import MCExport, export
from .gal import predictive_log_likelihood, tau_from_weight_decay, weight_decay_from_tau
from .heads import Predictions
from .predict import mc_predict
from .prediction import Prediction
from .predictor import MCPredictor
from .report import Report
from .task_predictions import ClassificationPrediction, MultiLabelPrediction, RegressionPrediction

__all__ = [
    "ClassificationPrediction",
    "MCExport",
    "MCPredictor",
    "MultiLabelPrediction",
    "Prediction",
    "Predictions",
    "RegressionPrediction",
    "Report",
    "Source",
    "export",
    "mc_dropout",
    "mc_predict",
    "predictive_log_likelihood",
    "tau_from_weight_decay",
    "weight_decay_from_tau",
]

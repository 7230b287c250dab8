"""Monte Carlo dropout inference: the randomness in a model, samples of its outputs, and statistics of them.

`mc_dropout` turns a model's randomness on; `mc_predict` runs samples and returns their statistics, and
`MCPredictor` does so again and again. `mc_generate` is for sequences, `mc_items` for outputs whose number varies,
`region_scores` for segmentations, and `find_entities` for labels of tokens. `export` makes programs for other runtimes,
and `from_samples` takes outputs that come from elsewhere.
"""

from ..handlers.sources import Source
from .context import mc_dropout
from .entities import Entity, find_entities
from .exported import MCExport, export
from .from_samples import from_samples
from .gal import predictive_log_likelihood, tau_from_weight_decay, weight_decay_from_tau
from .generation import GeneratedPrediction, mc_generate
from .heads import Predictions
from .items import from_scores, mc_items
from .merging import Items, Observations, iou, merge_items
from .predict import mc_predict
from .prediction import Prediction
from .predictor import MCPredictor
from .report import Report
from .segmentation import RegionScores, region_scores
from .task_predictions import ClassificationPrediction, MultiLabelPrediction, RegressionPrediction

__all__ = [
    "ClassificationPrediction",
    "Entity",
    "GeneratedPrediction",
    "Items",
    "MCExport",
    "MCPredictor",
    "MultiLabelPrediction",
    "Observations",
    "Prediction",
    "Predictions",
    "RegionScores",
    "RegressionPrediction",
    "Report",
    "Source",
    "export",
    "find_entities",
    "from_samples",
    "from_scores",
    "iou",
    "mc_dropout",
    "mc_generate",
    "mc_items",
    "mc_predict",
    "merge_items",
    "predictive_log_likelihood",
    "region_scores",
    "tau_from_weight_decay",
    "weight_decay_from_tau",
]

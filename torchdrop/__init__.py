"""torchdrop: dropout for PyTorch, exact, replayable and fast."""

from . import functional, monte_carlo, rules, schedules, tune
from ._version import __version__ as __version__
from .aids import audit, check_cost_decreases, equivalent_l2, feature_statistics, max_norm, max_norm_
from .configure import disabled, insert, keep_probs, replace, set_keep_prob
from .kernels import available_backends, use_backend
from .layers.alpha import AlphaDropout, FeatureAlphaDropout
from .layers.bernoulli import Dropout
from .layers.channel import Dropout1d, Dropout2d, Dropout3d
from .layers.gaussian import GaussianDropout
from .monte_carlo import mc_dropout, mc_predict
from .random import frozen_masks
from .scheduler import KeepProbScheduler
from .schedules import linear

__all__ = [
    "AlphaDropout",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "KeepProbScheduler",
    "audit",
    "available_backends",
    "check_cost_decreases",
    "disabled",
    "equivalent_l2",
    "feature_statistics",
    "frozen_masks",
    "functional",
    "insert",
    "keep_probs",
    "linear",
    "max_norm",
    "max_norm_",
    "mc_dropout",
    "mc_predict",
    "monte_carlo",
    "replace",
    "rules",
    "schedules",
    "set_keep_prob",
    "tune",
    "use_backend",
]

"""torchdrop: dropout for PyTorch, exact, replayable and fast."""

from . import functional, monte_carlo
from ._version import __version__ as __version__
from .kernels import available_backends, use_backend
from .layers.alpha import AlphaDropout, FeatureAlphaDropout
from .layers.bernoulli import Dropout
from .layers.channel import Dropout1d, Dropout2d, Dropout3d
from .layers.gaussian import GaussianDropout
from .monte_carlo import mc_dropout, mc_predict
from .random import frozen_masks

__all__ = [
    "AlphaDropout",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "available_backends",
    "frozen_masks",
    "functional",
    "mc_dropout",
    "mc_predict",
    "monte_carlo",
    "use_backend",
]

"""Every function of the package, in the argument order of its twin in torch.nn.functional where there is one."""

from .layers.alpha import alpha_dropout, feature_alpha_dropout
from .layers.bernoulli import dropout
from .layers.channel import dropout1d, dropout2d, dropout3d
from .layers.gaussian import gaussian_dropout

__all__ = [
    "alpha_dropout",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "gaussian_dropout",
]

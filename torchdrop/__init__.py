"""torchdrop: dropout for PyTorch, exact, replayable and fast."""

from . import acquisition, calibrate, functional, losses, monte_carlo, rules, schedules, tune
from ._version import __version__ as __version__
from .aids import audit, check_cost_decreases, equivalent_l2, feature_statistics, max_norm, max_norm_
from .configure import disabled, insert, keep_probs, replace, set_keep_prob
from .core.regularization import regularization
from .core.shard import Shard
from .handlers.freeze import frozen_masks
from .kernels import available_backends, use_backend
from .layers.activated import GELUDropout, ReLUDropout
from .layers.alpha import AlphaDropout, FeatureAlphaDropout
from .layers.channel import Dropout1d, Dropout2d, Dropout3d
from .layers.compact.sequential import CompactSequential, compact
from .layers.concrete.concrete import ConcreteDropout
from .layers.concrete.layer import ConcreteLayer, concrete_regularizers
from .layers.drop_block.drop_block import DropBlock1d, DropBlock2d, DropBlock3d
from .layers.drop_head import DropHead
from .layers.drop_key import DropKey
from .layers.drop_path import DropPath, StochasticDepth
from .layers.dropout import Dropout
from .layers.dropout_add import BiasDropoutAdd, DropoutAdd
from .layers.efficient_path import EfficientStochasticDepth
from .layers.embedding import EmbeddingDropout
from .layers.gaussian import GaussianDropout
from .layers.graph.graph import DropEdge, DropMessage, DropNode
from .layers.layer_drop import LayerDrop
from .layers.locked import LockedDropout
from .layers.masksembles import Masksembles
from .layers.multi_sample import MultiSampleDropout
from .layers.patch import PatchDropout
from .layers.recurrent.lstm_gru import RecurrentDropoutGRU, RecurrentDropoutLSTM, ZoneoutGRU, ZoneoutLSTM
from .layers.recurrent.zoneout import Zoneout
from .layers.standout import Standout
from .layers.variational.sparse import (
    SparseVariationalConv1d,
    SparseVariationalConv2d,
    SparseVariationalConv3d,
    SparseVariationalLinear,
)
from .layers.variational.sparsity import sparsity
from .layers.variational.variational import VariationalConv1d, VariationalConv2d, VariationalConv3d, VariationalLinear
from .layers.weights.mixout import Mixout, apply_mixout, remove_mixout
from .layers.weights.targeted import (
    TargetedDropout,
    apply_targeted_dropout,
    prune_targeted_dropout,
    remove_targeted_dropout,
)
from .layers.weights.weight import WeightDropout, apply_weight_dropout, remove_weight_dropout
from .layers.word import WordDropout
from .monte_carlo import MCPredictor, mc_dropout, mc_predict
from .scheduler import KeepProbScheduler
from .seeding import seeded

__all__ = [
    "AlphaDropout",
    "BiasDropoutAdd",
    "CompactSequential",
    "ConcreteDropout",
    "ConcreteLayer",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropEdge",
    "DropHead",
    "DropKey",
    "DropMessage",
    "DropNode",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "EfficientStochasticDepth",
    "EmbeddingDropout",
    "FeatureAlphaDropout",
    "GELUDropout",
    "GaussianDropout",
    "KeepProbScheduler",
    "LayerDrop",
    "LockedDropout",
    "MCPredictor",
    "Masksembles",
    "Mixout",
    "MultiSampleDropout",
    "PatchDropout",
    "ReLUDropout",
    "RecurrentDropoutGRU",
    "RecurrentDropoutLSTM",
    "Shard",
    "SparseVariationalConv1d",
    "SparseVariationalConv2d",
    "SparseVariationalConv3d",
    "SparseVariationalLinear",
    "Standout",
    "StochasticDepth",
    "TargetedDropout",
    "VariationalConv1d",
    "VariationalConv2d",
    "VariationalConv3d",
    "VariationalLinear",
    "WeightDropout",
    "WordDropout",
    "Zoneout",
    "ZoneoutGRU",
    "ZoneoutLSTM",
    "acquisition",
    "apply_mixout",
    "apply_targeted_dropout",
    "apply_weight_dropout",
    "audit",
    "available_backends",
    "calibrate",
    "check_cost_decreases",
    "compact",
    "concrete_regularizers",
    "disabled",
    "equivalent_l2",
    "feature_statistics",
    "frozen_masks",
    "functional",
    "insert",
    "keep_probs",
    "losses",
    "max_norm",
    "max_norm_",
    "mc_dropout",
    "mc_predict",
    "monte_carlo",
    "prune_targeted_dropout",
    "regularization",
    "remove_mixout",
    "remove_targeted_dropout",
    "remove_weight_dropout",
    "replace",
    "rules",
    "schedules",
    "seeded",
    "set_keep_prob",
    "sparsity",
    "tune",
    "use_backend",
]

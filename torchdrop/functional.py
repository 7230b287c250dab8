"""Every function of the package. Its arguments have the order of its twin in torch.nn.functional if there is one."""

from .layers.activated import gelu_dropout, relu_dropout
from .layers.alpha import alpha_dropout, feature_alpha_dropout
from .layers.attention import scaled_dot_product_attention
from .layers.channel import dropout1d, dropout2d, dropout3d
from .layers.concrete.concrete import concrete_dropout
from .layers.drop_block.drop_block import drop_block1d, drop_block2d, drop_block3d
from .layers.drop_head import drop_head
from .layers.drop_key import drop_key, drop_key_mask
from .layers.drop_path import drop_path, stochastic_depth
from .layers.dropout import dropout
from .layers.dropout_add import bias_dropout_add, dropout_add
from .layers.efficient_path import efficient_stochastic_depth
from .layers.embedding import embedding_dropout
from .layers.gaussian import gaussian_dropout
from .layers.graph.graph import drop_edge, drop_edge_weight, drop_message, drop_node
from .layers.locked import locked_dropout
from .layers.masksembles import masksembles, masksembles_masks, masksembles_predict
from .layers.multi_sample import multi_sample_dropout, multi_sample_loss
from .layers.patch import patch_dropout, patch_dropout_indices
from .layers.recurrent.zoneout import zoneout
from .layers.standout import standout
from .layers.variational.base import local_reparameterization
from .layers.variational.sparse import sparse_variational_kl
from .layers.variational.variational import variational_kl
from .layers.weights.mixout import mixout
from .layers.weights.targeted import targeted_dropout
from .layers.weights.weight import weight_dropout
from .layers.word import word_dropout

__all__ = [
    "alpha_dropout",
    "bias_dropout_add",
    "concrete_dropout",
    "drop_block1d",
    "drop_block2d",
    "drop_block3d",
    "drop_edge",
    "drop_edge_weight",
    "drop_head",
    "drop_key",
    "drop_key_mask",
    "drop_message",
    "drop_node",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "efficient_stochastic_depth",
    "embedding_dropout",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "gelu_dropout",
    "local_reparameterization",
    "locked_dropout",
    "masksembles",
    "masksembles_masks",
    "masksembles_predict",
    "mixout",
    "multi_sample_dropout",
    "multi_sample_loss",
    "patch_dropout",
    "patch_dropout_indices",
    "relu_dropout",
    "scaled_dot_product_attention",
    "sparse_variational_kl",
    "standout",
    "stochastic_depth",
    "targeted_dropout",
    "variational_kl",
    "weight_dropout",
    "word_dropout",
    "zoneout",
]

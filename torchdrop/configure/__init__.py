"""Keep probabilities by layer name, and surgery: dropout put into a model, or replaced, and taken out again."""

from .insertion import insert
from .rates import KeepProbs, disabled, keep_probs, set_keep_prob
from .surgery import replace

__all__ = ["KeepProbs", "disabled", "insert", "keep_probs", "replace", "set_keep_prob"]

"""Keep probabilities by layer name, and surgery: dropout put into a model, or replaced, and taken out again."""

from .rates import KeepProbs, disabled, keep_probs, set_keep_prob
from .surgery import insert, replace

__all__ = ["KeepProbs", "disabled", "insert", "keep_probs", "replace", "set_keep_prob"]

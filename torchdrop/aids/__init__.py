"""Aids that make dropout debuggable: what is wrong with it, whether training works, what it does."""

from .audit import Audit, Finding, audit
from .cost import CostCheck, check_cost_decreases
from .diagnostics import FeatureStatistics, feature_statistics
from .max_norm import MaxNorm, max_norm, max_norm_
from .penalty import EquivalentL2, equivalent_l2

__all__ = [
    "Audit",
    "CostCheck",
    "EquivalentL2",
    "FeatureStatistics",
    "Finding",
    "MaxNorm",
    "audit",
    "check_cost_decreases",
    "equivalent_l2",
    "feature_statistics",
    "max_norm",
    "max_norm_",
]

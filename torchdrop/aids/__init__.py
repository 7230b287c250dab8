"""Aids that make dropout debuggable: mistakes in its use, a check that training works, measures of its effect."""

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

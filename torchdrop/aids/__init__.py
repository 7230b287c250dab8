"""Aids that make dropout debuggable: what is wrong with it, whether training works, what it amounts to."""

from .audit import Audit, Finding, audit
from .cost import CostCheck, check_cost_decreases

__all__ = ["Audit", "CostCheck", "Finding", "audit", "check_cost_decreases"]

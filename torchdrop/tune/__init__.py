"""Cross-validation of keep probabilities: `cross_validate` trains all folds and settings of a small network at once."""

from .driver import optuna_search
from .result import SearchResult
from .search import cross_validate
from .settings import draws, grid

__all__ = ["SearchResult", "cross_validate", "draws", "grid", "optuna_search"]

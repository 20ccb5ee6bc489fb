"""Is item text read by a language model as good as item IDs? One evaluator for every recommender.

The public names below are imported when first used: ``import llmrec`` alone imports neither torch
nor anything else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmrec.data.interactions import Cases, Catalog, Dataset, Interactions
    from llmrec.data.readers import DataConfig, load_dataset
    from llmrec.evaluation.metrics import Measure, Ranking

__all__ = [
    "Cases",
    "Catalog",
    "DataConfig",
    "Dataset",
    "Interactions",
    "Measure",
    "Ranking",
    "__version__",
    "load_dataset",
]

_HOME = {
    "Cases": "llmrec.data.interactions",
    "Catalog": "llmrec.data.interactions",
    "DataConfig": "llmrec.data.readers",
    "Dataset": "llmrec.data.interactions",
    "Interactions": "llmrec.data.interactions",
    "Measure": "llmrec.evaluation.metrics",
    "Ranking": "llmrec.evaluation.metrics",
    "load_dataset": "llmrec.data.readers",
}


def __getattr__(name: str) -> Any:
    """The public name from the module it lives in, imported on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'llmrec' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

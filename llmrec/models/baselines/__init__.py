"""Rows that every table needs and that learn nothing by gradients: they count, or read, and rank.

Each says how the items score for some cases, and is ranked as any other recommender is. Item 0 is
padding; its score means nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from llmrec.evaluation.products import Scores
from llmrec.models.baselines import counting, ease, neighbours, texts
from llmrec.models.baselines.known import Known

__all__ = ["BASELINES", "READ_VECTORS", "Known"]

BASELINES: dict[str, Callable[[Known], Scores]] = {
    "popularity": counting.popularity,
    "recent_popularity": counting.recent_popularity,
    "random": counting.random,
    "repeat_history": counting.repeat_history,
    "item_knn": neighbours.item_knn,
    "markov": neighbours.markov,
    "ease": ease.ease,
    "embedding": texts.embedding,
    "bm25": texts.bm25,
}
READ_VECTORS = frozenset({"embedding"})
"""Of these, the ones that need the items' texts as vectors."""

"""Rows that every table needs and that learn nothing by gradients: they count, or read, and rank.

Each says how the items score for some cases, and is ranked as any other recommender is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmrec.data.interactions import Cases, Dataset, Float32, Int32, Int64
from llmrec.data.tfidf import TOKEN
from llmrec.errors import UsageError
from llmrec.evaluation.products import Scores, dot_products

K1, B = 1.5, 0.75
"""BM25's parameters: how soon repeats of a word stop to count, how much a long text pays."""


@dataclass(frozen=True)
class Known:
    """What a baseline may look at."""

    dataset: Dataset
    cases: Cases
    """The questions it is asked."""
    counts: Int64
    """Training interactions of the items, (N + 1,)."""
    vectors: Float32
    """Of the items' texts, (N, H), rows of zeros where there is none; (N, 0) where none are
    read."""
    max_length: int
    """Most recent items of a history that are read."""

    def recent(self, case: int) -> Int32:
        """The last items of a case's visible history, (L,)."""
        interactions, end = self.dataset.interactions, int(self.cases.end[case])
        start = max(int(interactions.offsets[self.cases.user[case]]), end - self.max_length)
        return interactions.items[start:end]


def popularity(known: Known) -> Scores:
    """An item's score is its training count, the same for everybody."""
    return _alike(torch.from_numpy(known.counts).float())


def random(known: Known) -> Scores:
    """Every item scores the same.

    Ties are averaged, so this is the exact mean over all random orders.
    """
    return _alike(torch.zeros(len(known.counts)))


def _alike(values: Tensor) -> Scores:
    """An item's score is its own single number, (N + 1,)."""
    return dot_products(lambda block: torch.ones(len(block), 1), values[:, None])


def embedding(known: Known) -> Scores:
    """An item's score is the mean cosine of its text's vector with those of the history.

    Vectors of length 1, averaged over the last items, so that a dot product is that mean; an item
    without text has cosine 0 with all.
    """
    lengths = np.linalg.norm(known.vectors, axis=1, keepdims=True)
    units = known.vectors / np.where(lengths > 0, lengths, 1)
    items = torch.from_numpy(np.concatenate([np.zeros_like(units[:1]), units]))  # (N + 1, H)

    def users(block: Int64) -> Tensor:
        recent = (torch.from_numpy(known.recent(case).astype(np.int64)) for case in block)
        return torch.stack([items[places].mean(dim=0) for places in recent])  # (B, H)

    return dot_products(users, items)


def bm25(known: Known) -> Scores:
    """An item's score is BM25 of its text, asked for with the texts of the history.

    Robertson's BM25 as Lucene computes it (k1 1.5, b .75), over the tokens of `data.tfidf`; a word
    that the history holds twice counts twice.
    """
    texts, name = known.dataset.catalog.texts, known.dataset.name
    documents = [TOKEN.findall(text.lower()) for text in texts]
    if not any(documents):
        raise UsageError(
            f"model.name=bm25 reads item texts, and {name} has none. Give an items file or a text "
            "column and name it in a data.item_text template, or use another model.name."
        )
    from bm25s import BM25  # here, for it takes as long to import as a baseline to run

    index = BM25(k1=K1, b=B, method="lucene")
    index.index(documents, show_progress=False)
    words = [
        np.array([index.vocab_dict[token] for token in document], np.int64)
        for document in documents
    ]

    def scores(block: Int64) -> Tensor:
        found = np.zeros((len(block), len(texts) + 1), dtype=np.float32)
        for row, case in enumerate(block):
            query = [words[item - 1] for item in known.recent(case)]
            found[row, 1:] = index.get_scores_from_ids(np.concatenate(query))
        return torch.from_numpy(found)

    return scores


BASELINES: dict[str, Callable[[Known], Scores]] = {
    "popularity": popularity,
    "random": random,
    "embedding": embedding,
    "bm25": bm25,
}
READ_VECTORS = frozenset({"embedding"})
"""Of these, the ones that need the items' texts as vectors."""

"""Rows that read item texts and learn nothing: cosine of vectors, and BM25."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmrec.data.interactions import Int64
from llmrec.data.tfidf import TOKEN
from llmrec.errors import UsageError
from llmrec.evaluation.products import Scores, dot_products
from llmrec.models.baselines.known import Known

K1, B = 1.5, 0.75
"""BM25's parameters: how soon repeats of a word stop to count, how much a long text pays."""


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

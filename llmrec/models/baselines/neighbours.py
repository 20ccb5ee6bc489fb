"""Rows that ask which items go together: neighbours by cosine, and what followed the last item."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from llmrec.data.interactions import Int32, Int64
from llmrec.data.tfidf import Float64
from llmrec.evaluation.products import Scores
from llmrec.models.baselines.known import Known, together


def item_knn(known: Known) -> Scores:
    """An item's score is its summed likeness to the items of the history that count it as near.

    Item-based top-N of Deshpande and Karypis (2004, TOIS 22): each of the distinct items among the
    last `max_length` of the visible history names its `neighbours` most similar items, and these
    get its likeness to them. Sums are taken in double precision and rounded to single, so that
    equal sums tie in whatever order they were added. An item never trained on scores 0.
    """
    config = known.config
    likeness = similar_items(known.training_matrix(), config.neighbours, config.shrinkage)

    def scores(block: Int64) -> Tensor:
        histories = known.histories(block, config.max_length)  # (B, N + 1)
        return _single(histories @ likeness)

    return scores


def similar_items(
    matrix: csr_array, neighbours: int | Literal["all"], shrinkage: float
) -> csr_array:
    """Each item's most similar items, by the cosine of who had them.

    Users who had both / (sqrt(users of one x users of the other) + shrinkage), in double precision.

    Args:
        matrix: (U, N + 1) of ones.
        neighbours: items kept of each item, itself not among them; of equally similar ones those
            with the lower ids.
        shrinkage: users added to the denominator.

    Returns:
        (N + 1, N + 1): row i holds the neighbours of item i, and 0 for all others.
    """
    users = matrix.sum(axis=0)  # (N + 1,)
    found = []
    for items, counts in together(matrix):
        both = counts.tocoo()
        ones, others = items[both.row], both.col
        values = both.data / (np.sqrt(users[ones] * users[others]) + shrinkage)
        kept = np.flatnonzero(ones != others)
        if neighbours != "all":
            kept = kept[_nearest(ones[kept], values[kept], others[kept], neighbours)]
        found.append((values[kept], ones[kept], others[kept]))
    values, ones, others = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return csr_array((values, (ones, others)), shape=(matrix.shape[1], matrix.shape[1]))


def _nearest(items: Int64, values: Float64, others: Int32, count: int) -> Int64:
    """Where the `count` greatest values of each item stand, ties by the lower id of the other.

    Args:
        items: ascending, (E,).
        values: (E,).
        others: (E,).
        count: most that are kept of an item.
    """
    bounds = np.flatnonzero(np.diff(items, prepend=-1, append=-1))
    reach = np.ones(len(items), dtype=np.bool_)
    # Only what reaches the count-th value is sorted: on ML-1M that is .6 CPU-s instead of 5.
    for first, end in pairwise(bounds):
        if end - first > count:
            own = values[first:end]
            reach[first:end] = own >= np.partition(own, -count)[-count]
    kept = np.flatnonzero(reach)
    kept = kept[np.lexsort((others[kept], -values[kept], items[kept]))]
    starts = np.flatnonzero(np.diff(items[kept], prepend=-1))
    place = np.arange(len(kept)) - np.repeat(starts, np.diff(starts, append=len(kept)))
    nearest: Int64 = kept[place < count]
    return nearest


def markov(known: Known) -> Scores:
    """An item's score is its share of what followed the history's last item in training.

    A first-order chain by maximum likelihood, as the unfactorised one of Rendle et al. (2010,
    FPMC): a count of neighbouring training interactions, repeats included, over the number of
    those that anything followed. Neither smoothed nor filled up by popularity, as the Markov rules
    of Ludewig and Jannach (2018) are not: all items that never followed tie at 0, so after an item
    without a follower everything does.
    """
    pairs = known.pairs()
    same = pairs.users[1:] == pairs.users[:-1]
    before, after = pairs.items[:-1][same], pairs.items[1:][same]
    width = known.dataset.item_count + 1
    # Adds up what followed more than once.
    follows = csr_array((np.ones(len(before)), (before, after)), shape=(width, width))
    follows.data /= np.repeat(follows.sum(axis=1), np.diff(follows.indptr))
    interactions, cases = known.dataset.interactions, known.cases

    def scores(block: Int64) -> Tensor:
        return _single(follows[interactions.items[cases.end[block] - 1]])

    return scores


def _single(scores: csr_array) -> Tensor:
    """(B, N + 1), dense and in single precision."""
    return torch.from_numpy(scores.astype(np.float32).toarray())

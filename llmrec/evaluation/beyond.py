"""What is recommended, beyond whether it was right: coverage, Gini, popularity, novelty, likeness.

Everything is computed from the first K items of each case's list, so it holds for any recommender,
trained or prompted. Numpy only. A position that holds 0 recommends nothing: short lists are judged
by the items they have, empty ones have no per-case value. What is undefined is absent (NaN in
arrays, None in records), never 0.

Lists are taken as they are, and so is the order that the ranker gave to ties: one of each user's
own, so that a constant scorer's lists are random ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.data.interactions import Bool, Cases, Catalog, Float32, Int32, Int64, Interactions
from llmrec.data.tfidf import BLOCK_BYTES, TextSpace, tfidf_space
from llmrec.evaluation.significance import Float64, bootstrap

CUTOFF = 10
"""K, places counted from the top."""
UNTRAINED = 0.5
"""Interactions that an item never trained on counts as in novelty. It has no self-information of
its own (log 0); half of one makes it one bit more novel than an item seen once, and leaves all
others at exactly -log2(count / total), which adding a constant to every count would not."""


def reference_space(catalog: Catalog) -> TextSpace | None:
    """The space in which every row's lists are compared; None where items have no text at all.

    `tfidf_space` of all raw fields: rows that read another text, a shuffled one or none share it.
    """
    if not catalog.fields:
        return None
    return tfidf_space([" ".join(values) for values in zip(*catalog.fields.values(), strict=True)])


def recommendation_counts(top_items: Int32, item_count: int) -> Int64:
    """How many lists hold each item, (C, K) -> (N + 1,); entry 0 (padding) is 0."""
    counts = np.bincount(top_items.ravel(), minlength=item_count + 1).astype(np.int64)
    counts[0] = 0
    return counts


def coverage(counts: Int64) -> float | None:
    """The share of candidates that somebody is recommended, 0..1; None without candidates.

    Grows with the number of cases and K: comparable over the same cases, candidates and K.

    Args:
        counts: Recommendations of each candidate, zeros included.
    """
    return float((counts > 0).mean()) if len(counts) else None


def gini(counts: Int64) -> float | None:
    """How unequally recommendations fall on the candidates, from 0 (equally) to below 1.

    With the n counts in ascending order c_1 .. c_n: sum_i (2i - n - 1) c_i / (n * sum_i c_i), zeros
    included. The same K items for everybody give 1 - K / n. Even random lists are above 0, the more
    so the fewer recommendations fall on a candidate: comparable over the same cases, candidates and
    K. None where nothing is recommended.

    Args:
        counts: Recommendations of each candidate, zeros included.
    """
    total, n = int(counts.sum()), len(counts)
    if total == 0:
        return None
    places = 2 * np.arange(1, n + 1) - n - 1
    return int(places @ np.sort(counts)) / (n * total)  # whole numbers, so equal counts give 0


def mean_popularity(top_items: Int32, train_counts: Int64) -> Float64:
    """Mean training count of each list's items, (C, K) -> (C,)."""
    return _list_means(train_counts.astype(np.float64), top_items)


def history_popularity(train_counts: Int64, interactions: Interactions, cases: Cases) -> Float64:
    """Mean training count of each case's visible interactions, (C,); NaN where there is none.

    An item met twice counts twice.
    """
    total = np.concatenate([[0], np.cumsum(train_counts[interactions.items])])
    starts = interactions.offsets[cases.user]
    return _ratio(total[cases.end] - total[starts], cases.end - starts)


def novelty(top_items: Int32, train_counts: Int64) -> Float64:
    """Mean self-information of each list's items in bits, (C, K) -> (C,).

    An item's is -log2(count / total), its share of all training interactions; one never trained on
    counts as `UNTRAINED` interactions. NaN everywhere where nothing was trained on.
    """
    total = int(train_counts.sum())
    if total == 0:
        return np.full(len(top_items), np.nan)
    return _list_means(-np.log2(np.maximum(train_counts, UNTRAINED) / total), top_items)


def intra_list_similarity(top_items: Int32, space: TextSpace | Float32) -> Float64:
    """Mean cosine over the pairs of each list, (C, K) -> (C,); higher is less varied.

    Items with an empty or zero row have no direction and are left out; fewer than two others leave
    no pair, hence NaN. Comparable in the same space alone.

    Args:
        top_items: (C, K).
        space: Fixed vectors of the items: `tfidf_space` of their texts, or dense, (N + 1, D).
    """
    directed = _has_direction(space)
    valid = directed[top_items] & (top_items > 0)  # (C, K)
    size = valid.sum(axis=1)
    # Of unit vectors: |sum|^2 holds every ordered pair's cosine and each vector's own 1.
    squares = np.empty(len(top_items))
    step = _lists_at_once(space, top_items.shape[1])
    for start in range(0, len(top_items), step):
        block = slice(start, start + step)
        squares[block] = _squared_sums(space, np.where(valid[block], top_items[block], 0))
    return _ratio(squares - size, size * (size - 1))


def _has_direction(space: TextSpace | Float32) -> Bool:
    """Items with a vector other than 0, (N + 1,)."""
    if isinstance(space, TextSpace):
        return np.diff(space.offsets) > 0
    return np.asarray((space != 0).any(axis=1))


def _lists_at_once(space: TextSpace | Float32, places: int) -> int:
    """Lists whose item vectors fill a block."""
    if isinstance(space, TextSpace):
        row = 32 * int(np.diff(space.offsets).max(initial=1))  # keys, order and weights of an entry
    else:
        row = 8 * space.shape[1]
    return max(1, BLOCK_BYTES // max(1, row * places))


def _squared_sums(space: TextSpace | Float32, lists: Int32) -> Float64:
    """The squared length of each list's summed unit vectors, 0 adding nothing: (B, K) -> (B,)."""
    if not isinstance(space, TextSpace):
        vectors = space[lists].astype(np.float64)  # (B, K, D)
        norms = np.linalg.norm(vectors, axis=2, keepdims=True)
        summed = (vectors / np.where((norms > 0) & (lists > 0)[:, :, None], norms, np.inf)).sum(1)
        return np.asarray((summed**2).sum(axis=1))
    items = lists.ravel()
    starts, lengths = space.offsets[items], np.diff(space.offsets)[items]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    entries = np.repeat(starts, lengths) + within
    rows = np.repeat(np.arange(len(items)) // lists.shape[1], lengths)
    keys = rows * np.int64(space.width) + space.terms[entries]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))  # one per list and token
    sums = np.add.reduceat(space.weights[entries][order], firsts) if len(keys) else np.empty(0)
    return np.bincount(keys[firsts] // space.width, sums**2, len(lists)).astype(np.float64)


def beyond_accuracy(
    top_items: Int32,
    train_counts: Int64,
    candidates: Bool,
    interactions: Interactions,
    cases: Cases,
    space: TextSpace | Float32 | None,
    cutoff: int = CUTOFF,
) -> dict[str, Any]:
    """Every measure of one row as a JSON-ready record.

    Catalogue measures are single values over the candidates: ``coverage`` and ``gini`` (an item
    that is no candidate does not count). The others are means over the cases where they are
    defined, with a 95 % bootstrap interval and the number of those ``cases``:
    ``mean_popularity``, ``novelty``, ``intra_list_similarity``, and ``popularity_lift``: mean
    popularity of the lists / mean popularity of the histories - 1, each a mean over the same cases
    (Abdollahpouri et al., 2019). A ratio of means, for a single history of rare items would rule a
    mean of ratios; its interval is that of the ratio linearised around the means. Histories hold
    their own users' interactions, which count once each.

    Args:
        top_items: Item ids, best first, 0 where a list ends, (C, K') with K' >= K.
        train_counts: How often each item was trained on, (N + 1,).
        candidates: Items that may be recommended, (N + 1,).
        interactions: What the cases index into.
        cases: The questions, C of them.
        space: See `intra_list_similarity`; None leaves that measure out.
        cutoff: K.

    Raises:
        ValueError: The lists hold fewer than K places, or belong to other cases.
    """
    if len(top_items) != len(cases) or top_items.shape[1] < cutoff:
        raise ValueError(
            f"lists {top_items.shape} are not ({len(cases)}, {cutoff} or more): keep as many items "
            "per case as are to be judged."
        )
    lists = top_items[:, :cutoff]
    counts = recommendation_counts(lists, len(train_counts) - 1)[candidates]
    popularity = mean_popularity(lists, train_counts)
    before = history_popularity(train_counts, interactions, cases)
    per_case = {
        "mean_popularity": popularity,
        "popularity_lift": _linearised_lift(popularity, before),
        "novelty": novelty(lists, train_counts),
    }
    if space is not None:
        per_case["intra_list_similarity"] = intra_list_similarity(lists, space)
    listed = (lists > 0).sum(axis=1)
    return {
        "cutoff": cutoff,
        "cases": len(lists),
        "cases_with_short_list": int(((listed > 0) & (listed < cutoff)).sum()),
        "cases_with_empty_list": int((listed == 0).sum()),
        "coverage": coverage(counts),
        "gini": gini(counts),
        **_summaries(per_case),
    }


def _linearised_lift(popularity: Float64, before: Float64) -> Float64:
    """Values whose mean is the lift and whose spread is its sampling error to first order, (C,).

    With r and h of a case, their means R and H over the cases that have both, and the lift
    L = R / H - 1: L + (r - (1 + L) h) / H.
    """
    both = ~np.isnan(popularity) & ~np.isnan(before)
    top, bottom = (float(x[both].sum()) / max(1, int(both.sum())) for x in (popularity, before))
    if bottom == 0:
        return np.full(len(popularity), np.nan)
    lift = top / bottom - 1
    return lift + (popularity - (1 + lift) * before) / bottom


def _summaries(per_case: dict[str, Float64]) -> dict[str, dict[str, float | int] | None]:
    """Mean, interval and count of each measure over the cases where it is defined."""
    groups: dict[bytes, list[str]] = {}  # measures with the same cases share their resamples
    for name, values in per_case.items():
        groups.setdefault(np.isnan(values).tobytes(), []).append(name)
    found: dict[str, dict[str, float | int] | None] = {}
    for names in groups.values():
        values = np.stack([per_case[name] for name in names], axis=1)  # (C, M)
        values = values[~np.isnan(values[:, 0])]
        if not len(values):
            found |= dict.fromkeys(names)
            continue
        for name, i in zip(names, bootstrap(values[None]), strict=True):
            found[name] = {"mean": i.mean, "low": i.low, "high": i.high, "cases": len(values)}
    return {name: found[name] for name in per_case}


def _list_means(values: Float64, lists: Int32) -> Float64:
    """The mean of an item value over each list, padding aside: (N + 1,), (C, K) -> (C,)."""
    held = lists > 0
    return _ratio(np.where(held, values[lists], 0.0).sum(axis=1), held.sum(axis=1))


def _ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> Float64:
    """Element by element; NaN where the denominator is 0."""
    empty = np.full(len(numerator), np.nan)
    return np.asarray(np.divide(numerator, denominator, out=empty, where=denominator != 0))

"""Rankings as values and measures as values: HR@K, NDCG@K, MRR@K and AUC with exact ties.

A case stores how many candidates score above its target and how many others score the same; a
measure is its expectation over random orders of the tied, so a constant scorer gets exactly what a
random one expects. Numpy only: the numbers can be checked anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmrec.errors import UsageError, nearest

Int32: TypeAlias = NDArray[np.int32]
Int64: TypeAlias = NDArray[np.int64]
Float64: TypeAlias = NDArray[np.float64]
Bool: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Ranking:
    """Where each case's target came out. Everything that recommends ends here."""

    greater: Int64
    """Candidates that score above the target, (C,)."""
    equal: Int64
    """Other candidates that score exactly the same, (C,)."""
    candidates: Int64
    """Candidates of the case, the target included, (C,)."""
    reachable: Bool
    """False where the target could not be found (taken out by ``filter_seen: papers``, or absent
    from a produced list): a miss with gain 0, (C,)."""
    top_items: Int32
    """The best K items, best first, ties in an order of the user's own, padded with 0, (C, K)."""

    def __len__(self) -> int:
        """C."""
        return len(self.greater)

    @classmethod
    def from_lists(cls, lists: Int32, targets: Int32, candidates: int | Int64) -> Ranking:
        """Rank by produced lists (beams, chat answers): listed items in their order, no ties.

        Args:
            lists: Item ids, best first, padded with 0 at the end, (C, K).
            targets: The true item of each case, (C,).
            candidates: How many items each list was chosen from, one number or (C,).

        Raises:
            ValueError: The shapes differ, a target is 0, or padding comes before an item.
        """
        if lists.ndim != 2 or targets.shape != (len(lists),):
            raise ValueError(
                f"lists {lists.shape} and targets {targets.shape} are not (C, K) and (C,)."
            )
        if (targets < 1).any():
            raise ValueError("A target is 0, which is padding; items are 1..N.")
        if ((lists[:, :-1] == 0) & (lists[:, 1:] != 0)).any():
            raise ValueError(
                "A list has padding before an item; drop invalid answers and pad at the end."
            )
        found = lists == targets[:, None]  # (C, K)
        reachable = found.any(axis=1)
        sizes = np.broadcast_to(np.asarray(candidates, dtype=np.int64), targets.shape).copy()
        place = found.argmax(axis=1) if lists.shape[1] else np.zeros(len(lists), dtype=np.int64)
        return cls(
            greater=np.where(reachable, place, sizes).astype(np.int64),
            equal=np.zeros(len(lists), dtype=np.int64),
            candidates=sizes,
            reachable=reachable,
            top_items=lists.astype(np.int32),
        )

    @classmethod
    def from_scores(
        cls, scores: Float64, items: Int32, targets: Int32, users: Int64, top_k: int
    ) -> Ranking:
        """Rank by scores of each case's own candidates, ties averaged.

        Args:
            scores: Of the candidates, (C, K); NaN where a candidate got none. Such a one comes
                after all others and is never listed; if it is the target, the case is a miss.
            items: The candidates, padded with 0, (C, K); distinct within a row. A target that is
                not among them is a miss.
            targets: The true item of each case, (C,).
            users: Their numbers, (C,); they decide the order in which tied items are listed.
            top_k: Best items kept per case.

        Raises:
            ValueError: The shapes differ, a target is 0, or a row names an item twice.
        """
        if scores.shape != items.shape or {targets.shape, users.shape} != {(len(items),)}:
            raise ValueError(
                f"scores {scores.shape}, items {items.shape}, targets {targets.shape} and users "
                f"{users.shape} are not (C, K), (C, K), (C,) and (C,)."
            )
        if (targets < 1).any():
            raise ValueError("A target is 0, which is padding; items are 1..N.")
        ordered = np.sort(items, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)).any():
            raise ValueError("A case names a candidate twice.")
        scored = (items > 0) & ~np.isnan(scores)  # (C, K)
        truth = scored & (items == targets[:, None])
        reachable = truth.any(axis=1)
        target_scores = np.where(truth, scores, 0.0).sum(axis=1)[:, None]  # (C, 1)
        greater = (scored & (scores > target_scores)).sum(axis=1)
        equal = (scored & ~truth & (scores == target_scores)).sum(axis=1)
        sizes = (items > 0).sum(axis=1)
        order = np.lexsort((tie_keys(users[:, None], items), -scores, ~scored), axis=1)[:, :top_k]
        listed = np.where(scored, items, 0)[np.arange(len(items))[:, None], order]
        top_items: Int32 = np.zeros((len(items), top_k), dtype=np.int32)
        top_items[:, : listed.shape[1]] = listed
        return cls(
            greater=np.where(reachable, greater, sizes).astype(np.int64),
            equal=np.where(reachable, equal, 0).astype(np.int64),
            candidates=sizes.astype(np.int64),
            reachable=reachable,
            top_items=top_items,
        )


def tie_keys(users: Int32 | Int64, items: Int32 | Int64) -> Int64:
    """What tied items are listed by: a hash of user and item (splitmix64), the same in any run.

    By lowest id a constant scorer would show everybody the same K items. This way its lists are
    what they say, drawn at random for each user, whatever the block or process.
    """
    key = (np.asarray(users).astype(np.uint64) << np.uint64(32)) + items.astype(np.uint64)
    key += np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((key ^ (key >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def merge(parts: Sequence[tuple[Int64, Ranking]], case_count: int) -> Ranking:
    """Put parts that several processes ranked back into case order.

    Args:
        parts: For each process the case indices it ranked and their ranking.
        case_count: C.

    Raises:
        ValueError: A case is missing or was ranked twice.
    """
    indices = np.concatenate([np.empty(0, dtype=np.int64), *(index for index, _ in parts)])
    if not np.array_equal(np.sort(indices), np.arange(case_count)):
        raise ValueError(
            f"{len(indices)} ranked cases, {len(np.unique(indices))} of them distinct, do not make "
            f"up the {case_count} cases 0..{case_count - 1}, each exactly once."
        )
    order = np.argsort(indices)

    def whole(name: str) -> NDArray[np.generic]:
        return np.asarray(np.concatenate([getattr(ranking, name) for _, ranking in parts])[order])

    return Ranking(
        greater=whole("greater").astype(np.int64),
        equal=whole("equal").astype(np.int64),
        candidates=whole("candidates").astype(np.int64),
        reachable=whole("reachable").astype(np.bool_),
        top_items=whole("top_items").astype(np.int32),
    )


@dataclass(frozen=True)
class Measure:
    """A measure as a value, named as in tables: ``NDCG@10``, ``AUC``."""

    name: str
    """HR, NDCG, MRR or AUC."""
    cutoff: int = 0
    """K, places counted from the top; 0 for AUC, which reads the full ranking."""

    @classmethod
    def parse(cls, text: str) -> Measure:
        """Read a name such as ``NDCG@10``; upper or lower case.

        Raises:
            UsageError: No such measure; the sentence names the nearest.
        """
        match = re.fullmatch(r"(HR|NDCG|MRR)@([1-9][0-9]{0,8})", text.strip().upper())
        if match:
            return cls(match[1], int(match[2]))
        if text.strip().upper() == "AUC":
            return cls("AUC")
        raise UsageError(
            f"Unknown measure {text!r}: {nearest(text.upper(), map(str, MEASURES))} "
            "Use HR@K, NDCG@K, MRR@K (K a positive whole number) or AUC."
        )

    def __str__(self) -> str:
        """The name used in tables and files."""
        return f"{self.name}@{self.cutoff}" if self.cutoff else self.name

    def per_case(self, ranking: Ranking) -> Float64:
        """The measure of every case, (C,) in [0, 1].

        Two numbers are comparable when cases, candidates and the seen filter are the same; ties are
        averaged exactly and an unreachable target counts 0 here.
        """
        values = _FORMULAS[self.name](ranking, self.cutoff)
        return np.where(ranking.reachable, values, 0.0)


def _hit_rate(ranking: Ranking, cutoff: int) -> Float64:
    """The share of orders of the tied with the target in the first K: clip((K-g) / (e+1), 0, 1).

    Comparable over equal candidate sets and seen filters; ties averaged; mean over users.
    """
    return np.asarray(np.clip((cutoff - ranking.greater) / (ranking.equal + 1), 0.0, 1.0))


def _ndcg(ranking: Ranking, cutoff: int) -> Float64:
    """Mean over places g+1 .. g+e+1 of 1 / log2(place + 1), 0 beyond K.

    One item is relevant, so the ideal gain is 1.
    Comparable over equal candidate sets and seen filters; ties averaged; mean over users.
    """
    return _mean_gain(ranking, 1.0 / np.log2(np.arange(2, _deepest(ranking, cutoff) + 2)))


def _mrr(ranking: Ranking, cutoff: int) -> Float64:
    """Mean over places g+1 .. g+e+1 of 1 / place, 0 beyond K.

    Comparable over equal candidate sets and seen filters; ties averaged; mean over users.
    """
    return _mean_gain(ranking, 1.0 / np.arange(1, _deepest(ranking, cutoff) + 1))


def _auc(ranking: Ranking, _: int) -> Float64:
    """The share of rivals the target beats, ties one half: 1 - (g + e/2) / (candidates - 1).

    Comparable over equal candidate sets and seen filters; mean over users. A target without rivals
    gets 1.
    """
    rivals = np.maximum(ranking.candidates - 1, 1)
    return np.asarray(1.0 - (ranking.greater + ranking.equal / 2) / rivals)


def _deepest(ranking: Ranking, cutoff: int) -> int:
    """Places worth a gain: K, or fewer where no ranking is that long."""
    return int(min(cutoff, max(1, ranking.candidates.max(initial=1))))


def _mean_gain(ranking: Ranking, gains: Float64) -> Float64:
    """The mean gain of places g+1 .. g+e+1; place p earns gains[p - 1], deeper ones 0."""
    total = np.concatenate([[0.0], np.cumsum(gains)])  # total[p] = gain of the first p places
    first = np.minimum(ranking.greater, len(gains))
    last = np.minimum(ranking.greater + ranking.equal + 1, len(gains))
    # Without ties the gain itself, not a difference of sums, so that a first place is worth exactly
    # 1.
    alone = np.append(gains, 0.0)[first]
    averaged = (total[last] - total[first]) / (ranking.equal + 1)
    return np.where(ranking.equal == 0, alone, averaged)


_FORMULAS = {"HR": _hit_rate, "NDCG": _ndcg, "MRR": _mrr, "AUC": _auc}

MEASURES: tuple[Measure, ...] = (
    *(Measure(name, cutoff) for name in ("HR", "NDCG", "MRR") for cutoff in (1, 5, 10, 20)),
    Measure("AUC"),
)
"""Reported for every run: HR, NDCG and MRR at 1, 5, 10, 20, and AUC."""


def measure_matrix(ranking: Ranking, measures: Sequence[Measure] = MEASURES) -> Float64:
    """Every measure of every case, (C, M), columns in the order of `measures`."""
    columns = [measure.per_case(ranking) for measure in measures]
    return np.stack(columns, axis=1) if columns else np.empty((len(ranking), 0))

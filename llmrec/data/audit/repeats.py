"""What occurs twice: items of a user, rows, users."""

from __future__ import annotations

from collections import Counter

import numpy as np

from llmrec.data.audit.findings import Finding, Verdict, counted, grade
from llmrec.data.interactions import Dataset, Int64, Split


def repeats(data: Dataset, cut: Split) -> Finding:
    """Interactions with an item that the user has met before, and those that follow directly."""
    pairs = _pairs(data)
    count = len(pairs) - len(np.unique(pairs))
    at_once = np.flatnonzero(pairs[1:] == pairs[:-1]) + 1
    what = f"interactions repeat an item of the same user, {len(at_once):,} of them at once"
    verdict: Verdict = "note" if count else "ok"
    if len(at_once) >= 0.05 * len(pairs):
        verdict = "warning"
    example = data.user_ids[data.interactions.users()[at_once[0]]] if len(at_once) else None
    remedy = (
        "merge visits that repeat at once, or the last item predicts the next"
        if verdict == "warning"
        else "say in reports that repeats are kept"
    )
    return counted("repeats", verdict, count, len(pairs), what, remedy, example)


def repeated_targets(data: Dataset, cut: Split) -> Finding:
    """Test targets that the user has met before: they can be recalled rather than predicted."""
    count, of = cut.counts["test_targets_repeated"], len(cut.test)
    remedy = "compare with a baseline that repeats the history, or judge new items alone"
    what = "test targets were met before by the same user"
    return counted("repeated targets", grade(count, of, 0.25), count, of, what, remedy)


def duplicate_rows(data: Dataset, cut: Split) -> Finding:
    """Interactions that agree with another in user, item and time.

    With positions: as the reader counted them over all rows. Without either, a doubled row cannot
    be told from a repeat.
    """
    times = data.interactions.timestamps
    if data.order == "file":
        return Finding("duplicate rows", "skipped", "needs timestamps or positions; see repeats")
    example = None
    if times is None:
        count, of = data.counts["interactions_repeated_exactly"], data.counts["interactions_read"]
    else:
        pairs = _pairs(data)
        rows = np.lexsort((times, pairs))
        same = (np.diff(pairs[rows]) == 0) & (np.diff(times[rows]) == 0)
        count, of = int(same.sum()), len(pairs)
        if count:
            example = data.user_ids[data.interactions.users()[rows[int(same.argmax())]]]
    what = f"interactions agree with another in user, item and {data.order}"
    remedy = "remove doubled rows from the source"
    verdict = grade(count, of, 0.001)
    return counted("duplicate rows", verdict, count, of, what, remedy, example)


def duplicate_users(data: Dataset, cut: Split) -> Finding:
    """Users with the very sequence of another, among those with 5 different items or more.

    Shorter ones coincide by accident.
    """
    distinct = np.bincount(np.unique(_pairs(data)) // (data.item_count + 1))  # (U,)
    judged = np.flatnonzero(distinct >= 5)
    sequences = [data.interactions.history(int(user)).tobytes() for user in judged]
    times_seen = Counter(sequences)
    same = [
        user for user, sequence in zip(judged, sequences, strict=True) if times_seen[sequence] > 1
    ]
    what = "users with 5 items or more have the very sequence of another"
    remedy = "look for bots or a double export; keep one of each"
    verdict = grade(len(same), len(judged), 0.01)
    example = data.user_ids[same[0]] if same else None
    return counted("duplicate users", verdict, len(same), len(judged), what, remedy, example)


def _pairs(data: Dataset) -> Int64:
    """One number for each interaction's user and item, (T,)."""
    users = data.interactions.users().astype(np.int64)
    return users * (data.item_count + 1) + data.interactions.items

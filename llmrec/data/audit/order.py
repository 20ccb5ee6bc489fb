"""Whether the order of interactions is real: ties, and sequences that stand in the order of ids."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llmrec.data.audit.findings import NO_TIMES, Finding, Verdict, beyond_chance, counted, grade
from llmrec.data.audit.ids import id_orders, ids_grow_with_time
from llmrec.data.interactions import Dataset, Int64, Split


def ties(data: Dataset, cut: Split) -> Finding:
    """Interactions whose place in the sequence only the file's order gives.

    Counted by the reader over all rows, before filters and before times were cut to whole seconds.
    """
    if data.order == "file":
        return Finding("ties", "skipped", "nothing but the file's order says who came first")
    tied, rows = data.counts["interactions_tied_in_order"], data.counts["interactions_read"]
    what = f"interactions share user and {data.order} with another: the file's order decides"
    remedy = "finer timestamps or a position column; or make sure that the file's order is real"
    return counted("ties", grade(tied, rows, 0.1), tied, rows, what, remedy)


def sorted_sequences(data: Dataset, cut: Split) -> Finding:
    """Users whose whole sequence stands in the order of the item ids, against chance.

    Judged are users whose sequence would be sorted by accident in at most 1 of 100 cases, which is
    5 different items. Where timestamps without many ties say that this is the order, and items with
    larger ids were first met later, ids grow with time, and that is a note. Elsewhere an order was
    lost, or ids grow with time here too: the data alone cannot tell.
    """
    users = data.interactions.users().astype(np.int64)
    found = _most_sorted(data, users, 0.01)
    example = data.user_ids[found.groups[0]] if len(found.groups) else None
    timed = data.order == "timestamp"
    few_ties = data.counts["interactions_tied_in_order"] < 0.5 * data.counts["interactions_read"]
    if timed and few_ties and ids_grow_with_time(data):
        remedy = "ids grow with time: let no model read them as numbers"
        finding = _sortedness("sorted sequences", found, "users' sequences", remedy, example)
        return finding if finding.verdict == "ok" else replace(finding, verdict="note")
    remedy = (
        "bring the real order (a timestamp or position column); if visits of one day were sorted "
        "by item id, shuffle those of a day"
    )
    return _sortedness("sorted sequences", found, "users' sequences", remedy, example)


def sorted_ties(data: Dataset, cut: Split) -> Finding:
    """Runs of one user at one second that stand in the order of the item ids, against chance.

    Judged are runs that would be sorted by accident in at most 1 of 6 cases: 3 different items.
    """
    times = data.interactions.timestamps
    if times is None:
        return Finding("sorted ties", "skipped", NO_TIMES)
    users = data.interactions.users()
    breaks = (np.diff(users) != 0) | (np.diff(times) != 0)  # (T - 1,)
    runs = np.concatenate([[0], np.cumsum(breaks)]).astype(np.int64)
    found = _most_sorted(data, runs, 0.17)
    first = np.searchsorted(runs, found.groups[:1])
    example = data.user_ids[users[first[0]]] if len(first) else None
    remedy = "shuffle ties, for their order tells the next item; or bring finer timestamps"
    return _sortedness("sorted ties", found, "tied runs", remedy, example)


@dataclass(frozen=True)
class _Sorted:
    """The order of ids that most groups of interactions stand in."""

    order: str
    groups: Int64
    """Sorted ones among the judged, by number."""
    judged: int
    expected: float
    """How many of the judged chance would sort."""


def _most_sorted(data: Dataset, group: Int64, likely: float) -> _Sorted:
    """Try every order of the ids, both ways, on groups of consecutive interactions.

    Args:
        data: The data.
        group: Number of the group of each interaction, non-decreasing from 0, (T,).
        likely: Groups that are sorted by accident more often than this are not judged.
    """
    items = data.interactions.items.astype(np.int64)
    # A group of n is in order by accident in prod(m!) of n! cases; m: how often each item is there.
    longest = int(np.bincount(group).max())
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, longest + 1)))])
    pairs, again = np.unique(group * (data.item_count + 1) + items, return_counts=True)
    orders_lost = np.bincount(pairs // (data.item_count + 1), log_factorial[again])
    chance = np.exp(orders_lost - log_factorial[np.bincount(group)])  # (groups,)
    judged = chance <= likely
    inside = group[1:] == group[:-1]
    best = _Sorted("", np.empty(0, np.int64), int(judged.sum()), float(chance[judged].sum()))
    for name, ranks in id_orders(data.catalog.ids).items():
        steps = np.diff(ranks[items])
        for way, against in (("ascending", steps < 0), ("descending", steps > 0)):
            broken = np.bincount(group[1:][inside & against], minlength=len(chance)) > 0
            groups = np.flatnonzero(judged & ~broken)
            if len(groups) > len(best.groups):
                best = _Sorted(f"{way} by {name}", groups, best.judged, best.expected)
    return best


def _sortedness(check: str, found: _Sorted, what: str, remedy: str, example: str | None) -> Finding:
    count = len(found.groups)
    excess = (count - found.expected) / max(found.judged, 1)
    verdict: Verdict = "ok"
    if beyond_chance(count, found.expected) and excess >= 0.01:
        verdict = "fault" if excess >= 0.8 else "warning" if excess >= 0.05 else "note"
    order = found.order or "in the order of the ids"
    what = f"{what} stand {order}; chance gives {found.expected:,.1f}"
    return counted(check, verdict, count, found.judged, what, remedy, example)

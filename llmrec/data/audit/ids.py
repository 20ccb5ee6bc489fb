"""Ids that tell what they should not: in texts, of the next item, of users, of time."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from llmrec.data.audit.findings import NO_TIMES, Finding, Verdict, beyond_chance, counted
from llmrec.data.interactions import Cases, Dataset, Int64, Split


def id_orders(ids: list[str]) -> dict[str, Int64]:
    """Orders that ids suggest: name -> (N + 1,) place of each item from 1; padding has 0.

    By number where ids are whole numbers, or one prefix and digits ("i_12"); and by text.
    """
    by_text = sorted(range(len(ids)), key=ids.__getitem__)
    orders = {"item id as text": by_text}
    parts = [re.fullmatch(r"(\D*)([0-9]+)", name) for name in ids]
    if all(parts) and len({part[1] for part in parts if part}) == 1:
        numbers = [int(part[2]) for part in parts if part]
        by_number = sorted(by_text, key=numbers.__getitem__)
        orders = {"item number": by_number} | orders
    result = {}
    for name, rows in orders.items():
        places = np.zeros(len(ids) + 1, dtype=np.int64)
        places[np.array(rows) + 1] = np.arange(1, len(ids) + 1)
        result[name] = places
    return result


def ids_in_texts(data: Dataset, cut: Split) -> Finding:
    """Items whose own external id stands in their text as a word.

    Chance is what dealing the texts out anew among the items would give: item 1995 and a film of
    1995 may meet.
    """
    catalog = data.catalog
    judged = [row for row, name in enumerate(catalog.ids) if name and catalog.texts[row]]
    if not judged:
        return Finding("ids in texts", "skipped", "no item has a text")
    rows = [
        row
        for row in judged
        if catalog.ids[row] in catalog.texts[row]
        and re.search(rf"(?<!\w){re.escape(catalog.ids[row])}(?!\w)", catalog.texts[row])
    ]
    texts_with = Counter(word for text in catalog.texts for word in _words(text))
    expected = sum(texts_with[catalog.ids[row]] for row in judged) / max(len(catalog), 1)
    verdict: Verdict = "ok"
    if beyond_chance(len(rows), expected):
        verdict = "fault" if len(rows) >= 0.01 * len(judged) else "warning"
    what = f"texts hold their own item's id; chance gives {expected:.2g}"
    remedy = "take the id out of the text: a text tower would read identity, not meaning"
    example = catalog.ids[rows[0]] if rows else None
    return counted("ids in texts", verdict, len(rows), len(judged), what, remedy, example)


def _words(text: str) -> set[str]:
    """What an id could be in a text: runs of letters and digits, and runs with marks inside."""
    return {*re.findall(r"\w+", text), *re.findall(r"\w\S*\w", text)}


def next_number(data: Dataset, cut: Split) -> Finding:
    """The rule "the item after the largest of the visible history" on the test cases.

    Items numbered along whole sequences, test targets included, let it find targets (4.4 % of the
    users of one published Beauty set) and with it every model that reads item numbers. "After" is
    the next existing item, by number where ids have one, and by text. Chance is what dealing the
    test targets out anew among the cases would give; products of one kind with neighbouring ids
    exceed it a little too.
    """
    name, hits, expected = _next_in_order(data, cut.test)
    verdict: Verdict = "ok"
    if beyond_chance(len(hits), expected):
        share = len(hits) / len(cut.test)
        verdict = "fault" if share >= 0.03 else "warning" if share >= 0.01 else "note"
    what = f"test targets come right after the largest {name} of the history; "
    what += f"chance gives {expected:.2g}"
    remedy = "number items at random before any model reads ids as numbers or words"
    example = data.user_ids[cut.test.user[hits[0]]] if len(hits) else None
    return counted("next number", verdict, len(hits), len(cut.test), what, remedy, example)


def _next_in_order(data: Dataset, cases: Cases) -> tuple[str, Int64, float]:
    """The order of ids whose rule hits most; the cases hit; and how many chance would hit."""
    interactions = data.interactions
    users = interactions.users().astype(np.int64)
    best: tuple[str, Int64, float] = ("item id", np.empty(0, np.int64), 0.0)
    for name, ranks in id_orders(data.catalog.ids).items():
        places = ranks[interactions.items]
        # Made larger from user to user, the running maximum starts anew with each.
        lift = users * (data.item_count + 1)
        largest = np.maximum.accumulate(places + lift) - lift  # (T,)
        guesses = largest[cases.end - 1] + 1  # (C,)
        targets = places[cases.target]
        hits = np.flatnonzero(guesses == targets)
        how_often = np.bincount(targets, minlength=data.item_count + 2)
        expected = float(how_often[guesses].sum() / len(cases))
        if not best[2] or len(hits) > len(best[1]):
            best = (name, hits, expected)
    return best


def numbered_along_users(data: Dataset, cut: Split) -> Finding:
    """Whether items are numbered as they first appear, user by user in the order of user ids.

    A fault where this fits whole sequences better than their training parts: then the targets were
    numbered along, and a number tells who met it. An order of users that their ids do not tell is
    lost; `next_number` needs none.
    """
    interactions, size = data.interactions, data.item_count
    rows = np.arange(len(interactions.items)) < np.repeat(cut.train_end, interactions.lengths)
    best, best_train, order = 0, 0, "item id"
    for name, ranks in id_orders(data.catalog.ids).items():
        places = ranks[interactions.items]
        whole, train = _appears_in_order(places), _appears_in_order(places[rows])
        if whole + train > best + best_train:
            best, best_train, order = whole, train, name
    verdict: Verdict = "ok"
    if max(best, best_train) >= 0.5 * size and size >= 20:
        verdict = "fault" if best > best_train else "note"
    what = (
        f"items follow, by {order}, the item that first appeared just before them (in training "
        f"parts alone {best_train:,})"
    )
    remedy = "number items at random: their order repeats the sequences, targets included"
    if verdict == "note":
        remedy = "the numbers follow training alone, which leaks no target; keep it so"
    return counted("numbered along users", verdict, best, size, what, remedy)


def _appears_in_order(places: Int64) -> int:
    """How many first appearances come right after the place that appeared first before them."""
    _, first = np.unique(places, return_index=True)
    appeared = places[np.sort(first)]
    return int((np.diff(appeared) == 1).sum())


def _first_met(data: Dataset, times: Int64) -> Int64:
    """When each item was first met, (N,)."""
    first = np.full(data.item_count + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, data.interactions.items, times)
    return first[1:]


def ids_grow_with_time(data: Dataset) -> bool:
    """Whether items with larger ids were, by and large, first met later."""
    times = data.interactions.timestamps
    return times is not None and _rank_correlation(_first_met(data, times)) > 0.95


def numbered_in_time(data: Dataset, cut: Split) -> Finding:
    """Rank correlation of the order of ids with first appearance in time, of users and items."""
    name, times = "numbered in time", data.interactions.timestamps
    if times is None:
        return Finding(name, "skipped", NO_TIMES)
    of_users = _rank_correlation(times[data.interactions.offsets[:-1]])
    of_items = _rank_correlation(_first_met(data, times))
    found = f"the order of ids correlates with time: users {of_users:+.2f}, items {of_items:+.2f}"
    known = min(data.item_count, data.interactions.user_count) >= 20
    if not known or max(abs(of_users), abs(of_items)) < 0.5:
        return Finding(name, "ok", found)
    remedy = "do not let a model read ids as numbers: they tell what is new"
    return Finding(name, "note", found, remedy=remedy)


def _rank_correlation(values: Int64) -> float:
    """Spearman's, of values with their own index; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(counts) == 1:
        return 0.0
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])

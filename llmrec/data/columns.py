"""What every reader hands over, and how it becomes a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.data.interactions import Catalog, Dataset, Float32, Int32, Int64, Interactions, Strings
from llmrec.data.item_text import Template, render
from llmrec.data.splits import filter_users, tied_rows

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """Interactions in file order and the items' fields, before any ordering or filtering."""

    users: Int64
    """A row of ``user_ids`` per interaction, (T,)."""
    items: Int64
    """A row of ``item_ids`` per interaction, (T,)."""
    user_ids: list[str]
    """Distinct external ids, in any order."""
    item_ids: list[str]
    """Distinct external ids of all items, met or not, in any order."""
    fields: dict[str, list[str]] = field(default_factory=dict)
    """Text fields by name, each aligned with ``item_ids``; an absent value is the empty string."""
    timestamps: Float64 | None = None
    """Unix seconds, (T,); None where the order comes from elsewhere."""
    positions: Float64 | None = None
    """Places in each user's sequence, (T,); used where there are no timestamps."""
    ratings: Float32 | None = None
    """(T,); NaN where a rating is missing."""
    reviews: Mapping[str, pl.Series] = field(default_factory=dict)
    """What users wrote, by its name in `REVIEW_TEXTS`: strings, (T,), an absent one empty."""
    counts: dict[str, int] = field(default_factory=dict)
    """What the reader found or repaired."""


def sorted_ids(ids: list[str]) -> tuple[list[str], Int64]:
    """External ids in the order of their internal numbers, and the new place of each old row.

    Sorted, by value where all are whole numbers. Not by first appearance: files are often written
    user by user or in time order, and then the number alone would say who met an item first, which
    a model, a tie-break or a slice of the catalogue could turn into a peek at the future.
    """
    if all(name.isascii() and name.isdecimal() and len(name) <= 18 for name in ids):
        order = sorted(range(len(ids)), key=lambda row: (int(ids[row]), ids[row]))
    else:
        order = sorted(range(len(ids)), key=ids.__getitem__)
    places = np.empty(len(ids), dtype=np.int64)
    places[order] = np.arange(len(ids))
    return [ids[row] for row in order], places


def _sequences(
    columns: Columns, user_places: Int64, item_places: Int64
) -> tuple[Interactions, Int64 | None, int]:
    """All interactions as CSR, users by number, each oldest first, items 1..N.

    Also the row of ``columns`` that each came from, (T,), where something is yet to be taken from
    there; and the ties.
    """
    users = user_places[columns.users]
    key = columns.timestamps if columns.timestamps is not None else columns.positions
    # lexsort is stable, so ties keep the order of the file. ML-100K has 76 % tied rows, and
    # sorting ties by item id lifts NDCG@10 by a fifth on ML-1M.
    order = np.argsort(users, kind="stable") if key is None else np.lexsort((key, users))
    offsets = np.zeros(len(columns.user_ids) + 1, dtype=np.int64)
    np.cumsum(np.bincount(users, minlength=len(columns.user_ids)), out=offsets[1:])
    times = columns.timestamps
    result = Interactions(
        items=(item_places[columns.items][order] + 1).astype(np.int32),
        offsets=offsets,
        timestamps=None if times is None else np.floor(times[order]).astype(np.int64),
        ratings=None if columns.ratings is None else columns.ratings[order],
    )
    tied = 0 if key is None else tied_rows(result, key[order])
    return result, order if columns.reviews else None, tied


def _used_items(interactions: Interactions, item_count: int) -> tuple[Interactions, Int64]:
    """Renumber to the items that occur; also their old rows, (N,)."""
    used = np.bincount(interactions.items, minlength=item_count + 1) > 0  # (old N + 1,)
    numbers = np.cumsum(used).astype(np.int32)  # a used item's new number
    items: Int32 = numbers[interactions.items]
    kept = Interactions(items, interactions.offsets, interactions.timestamps, interactions.ratings)
    return kept, np.flatnonzero(used) - 1


def _reviews(
    columns: Columns,
    order: Int64 | None,
    everything: Interactions,
    kept: Interactions,
    users: Int64,
) -> dict[str, Strings]:
    """What was written of the interactions that `filter_users` left, beside them."""
    if order is None:
        return {}
    # Of each user left it kept the last interactions: as many as the user has now.
    gone = everything.offsets[users + 1] - kept.offsets[1:]  # (U,): places before, places now
    places = np.repeat(gone, kept.lengths) + np.arange(len(kept.items))  # (T,) in `everything`
    rows = pl.Series(order[places])
    return {name: texts.gather(rows).to_numpy() for name, texts in columns.reviews.items()}


def assemble(
    name: str,
    columns: Columns,
    template: Template,
    minimum: int,
    maximum: int | None,
    sample: int | None = None,
    sample_seed: int = 0,
) -> Dataset:
    """Order, number, filter and render: a reader's columns become a data set.

    Args:
        name: Of the data set.
        columns: What the reader found.
        template: Renders the items' text; unused where the data has no fields at all.
        minimum: Users with fewer interactions are dropped.
        maximum: The most recent interactions kept per user; None keeps all.
        sample: Users drawn at random from those with enough interactions; None keeps all.
        sample_seed: Seed of that draw.

    Raises:
        UsageError: If no user survives, fewer than `sample` do, or the template reads a field that
            is not there.
    """
    user_ids, user_places = sorted_ids(columns.user_ids)
    item_ids, item_places = sorted_ids(columns.item_ids)
    everything, order, tied = _sequences(columns, user_places, item_places)
    filtered, users, filter_counts = filter_users(everything, minimum, maximum, sample, sample_seed)
    reviews = _reviews(columns, order, everything, filtered, users)
    interactions, rows = _used_items(filtered, len(item_ids))
    old_row = np.argsort(item_places)[rows]  # where each kept item stood in `columns`
    fields = {key: [values[row] for row in old_row] for key, values in columns.fields.items()}
    ids = [item_ids[row] for row in rows]
    texts = render(template, fields, len(ids)) if fields else [""] * len(ids)
    catalog = Catalog(ids, fields, texts, template.sha256 if fields else "")
    pairs = interactions.users().astype(np.int64) * (len(ids) + 1) + interactions.items  # (T,)
    counts = {
        "interactions_read": len(columns.users),
        "users_read": len(user_ids),
        "items_read": len(item_ids),
        "interactions_tied_in_order": tied,
        **columns.counts,
        **filter_counts,
        "items_dropped_without_interactions": len(item_ids) - len(ids),
        "interactions": len(interactions.items),
        "users": len(users),
        "items": len(ids),
        "items_with_empty_text": texts.count(""),
        "items_sharing_their_text": _sharing(texts),
        "repeat_interactions": len(pairs) - len(np.unique(pairs)),
    }
    kept_ids = [user_ids[user] for user in users]
    return Dataset(name, interactions, catalog, kept_ids, counts, _order(columns), reviews)


def _order(columns: Columns) -> Literal["timestamp", "position", "file"]:
    if columns.timestamps is not None:
        return "timestamp"
    return "file" if columns.positions is None else "position"


def _sharing(texts: list[str]) -> int:
    """Items whose non-empty text another item has too."""
    present = [text for text in texts if text]
    _, sizes = np.unique(np.array(present, dtype=object), return_counts=True)
    return int(sizes[sizes > 1].sum())

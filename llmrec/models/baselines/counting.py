"""Rows that only count: how often an item was met, or when a user met it last."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrec.data.interactions import Int64
from llmrec.errors import UsageError
from llmrec.evaluation.products import Scores, dot_products
from llmrec.models.baselines.known import Known


def popularity(known: Known) -> Scores:
    """An item's score is its training count, the same for everybody."""
    return _counts(known.pairs().items, known.dataset.item_count)


def recent_popularity(known: Known) -> Scores:
    """An item's score is its count among the newest training interactions.

    The newest `recent_share` of them by timestamp, rounded up; those as old as the oldest of these
    count as well. All items that are not among them tie.

    Raises:
        UsageError: The data has no timestamps.
    """
    interactions, share = known.dataset.interactions, known.config.recent_share
    if interactions.timestamps is None:
        raise UsageError(
            "model.name=recent_popularity counts the newest interactions by time, and "
            f"{known.dataset.name} has no timestamps. Name their column in data.timestamp_column, "
            "or use model.name=popularity."
        )
    trained = np.arange(len(interactions.items)) < np.repeat(
        known.train_end, interactions.lengths
    )  # (T,)
    times = interactions.timestamps[trained]
    newest = math.ceil(round(len(times) * share, 6))  # rounded first: 30 * .1 is above 3
    recent = times >= np.sort(times)[-max(1, newest)]
    return _counts(interactions.items[trained][recent], known.dataset.item_count)


def random(known: Known) -> Scores:
    """Every item scores the same.

    Ties are averaged, so this is the exact mean over all random orders.
    """
    return _alike(torch.zeros(known.dataset.item_count + 1))


def repeat_history(known: Known) -> Scores:
    """An item's score is the place of its last occurrence in the visible history.

    Histories are read whole, whatever `max_length`: their items stand first, the latest on top, and
    all others tie below them. With `evaluation.filter_seen` true this says whether a target is a
    repeat and no more: of the history nothing but a repeated target is then a candidate, so that
    one comes first, and any other target does as well as at random.
    """

    def scores(block: Int64) -> Tensor:
        rows, items, places = known.entries(block, "all")
        found = np.zeros((len(block), known.dataset.item_count + 1), dtype=np.float32)
        np.maximum.at(found, (rows, items), places.astype(np.float32))
        return torch.from_numpy(found)

    return scores


def _counts(items: NDArray[np.integer], item_count: int) -> Scores:
    """An item's score is how often it occurs here."""
    return _alike(torch.from_numpy(np.bincount(items, minlength=item_count + 1)))


def _alike(values: Tensor) -> Scores:
    """An item's score is its own single number, (N + 1,)."""
    return dot_products(lambda block: torch.ones(len(block), 1), values[:, None])

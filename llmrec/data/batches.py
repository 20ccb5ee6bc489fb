"""Training windows, batches of similar length, negatives: flat arrays, no Python per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmrec.data.interactions import Int32, Int64, Interactions

POOL_BATCHES = 32
"""Batches sorted by length together: wide enough to trim, narrow enough to stay random."""


def windows(
    interactions: Interactions, users: NDArray[np.integer], ends: Int64, max_length: int
) -> Int64:
    """The most recent items of some users before their `ends`, left padded with 0.

    Args:
        interactions: all sequences.
        users: (B,).
        ends: (B,), one past each user's last visible position in ``interactions.items``.
        max_length: most items a row may hold.

    Returns:
        (B, W) int64 item ids, W the longest of these histories or `max_length`.
    """
    starts = np.maximum(interactions.offsets[users], ends - max_length)
    width = max(1, int((ends - starts).max(initial=1)))
    places = ends[:, None] - width + np.arange(width)  # (B, W)
    real = places >= starts[:, None]
    return np.where(real, interactions.items[np.where(real, places, 0)], 0).astype(np.int64)


@dataclass(frozen=True)
class TrainingRows:
    """The users to train on, one window each: the last (input, target) pairs to learn from."""

    interactions: Interactions
    users: NDArray[np.int64]
    """Users with at least two training interactions, (R,)."""
    ends: Int64
    """One past each one's training part, (R,)."""
    lengths: Int64
    """Pairs in each window, (R,)."""
    max_length: int
    """Most pairs of a window."""

    @classmethod
    def of(cls, interactions: Interactions, train_end: Int64, max_length: int) -> TrainingRows:
        """The rows of a split's training part; `train_end` (U,)."""
        pairs = train_end - interactions.offsets[:-1] - 1
        users = np.flatnonzero(pairs > 0)
        return cls(
            interactions, users, train_end[users], np.minimum(pairs[users], max_length), max_length
        )

    def __len__(self) -> int:
        """R."""
        return len(self.users)

    def batches(self, size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """One epoch: all rows in shuffled batches of similar length.

        Rows are shuffled, sorted by length within pools of `POOL_BATCHES` batches, and cut; then
        the batches are shuffled.

        Args:
            size: rows of a batch.
            rng: decides both shuffles.

        Returns:
            Row numbers, each batch (<= size,).
        """
        order = rng.permutation(len(self))
        pool = np.arange(len(self)) // (size * POOL_BATCHES)
        order = order[np.lexsort((self.lengths[order], pool))]
        batches = np.split(order, np.arange(size, len(self), size))
        return [batches[number] for number in rng.permutation(len(batches))]

    def pairs(self, rows: NDArray[np.int64]) -> tuple[Int64, Int64]:
        """Inputs and targets of some rows, each (B, L), left padded, trimmed to the longest."""
        both = windows(self.interactions, self.users[rows], self.ends[rows], self.max_length + 1)
        return both[:, :-1], np.where(both[:, :-1] > 0, both[:, 1:], 0)


@dataclass(frozen=True)
class SharedNegatives:
    """Draws, with replacement, the items that serve as negatives for all positions of a step."""

    pool: Int32
    """Every item as often as its weight: 1..N once each, or all training interactions."""

    @classmethod
    def of(
        cls,
        interactions: Interactions,
        train_end: Int64,
        item_count: int,
        sampler: Literal["uniform", "popularity"],
    ) -> SharedNegatives:
        """uniform: any item; popularity: by its number of training interactions."""
        if sampler == "uniform":
            return cls(np.arange(1, item_count + 1, dtype=np.int32))
        rows = np.arange(len(interactions.items)) < np.repeat(train_end, interactions.lengths)
        return cls(interactions.items[rows])

    def draw(self, count: int, rng: np.random.Generator) -> Int64:
        """(K,) item ids."""
        return self.pool[rng.integers(0, len(self.pool), size=count)].astype(np.int64)


class NegativeSampler:
    """Uniform negatives that are not in the user's own training part (SASRec's sampler)."""

    def __init__(self, interactions: Interactions, train_end: Int64, item_count: int) -> None:
        """Index which user has which item, as sorted packed keys (T,)."""
        self.item_count = item_count
        users = interactions.users().astype(np.int64)
        trained = np.arange(len(users)) < train_end[users]
        self.keys = np.unique(users[trained] * (item_count + 1) + interactions.items[trained])

    def draw(
        self, users: NDArray[np.int64], shape: tuple[int, int], rng: np.random.Generator
    ) -> Int64:
        """(B, *shape) item ids; a hit in the user's own items is drawn again, at most 50 times."""
        negatives = rng.integers(1, self.item_count + 1, size=(len(users), *shape))
        owners = np.broadcast_to(users[:, None, None], negatives.shape)
        again = np.nonzero(np.ones(negatives.shape, bool))
        for _ in range(50):  # a user who has nearly every item must not stop the epoch
            keys = owners[again] * (self.item_count + 1) + negatives[again]
            found = (
                self.keys[np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)] == keys
            )
            if not found.any():
                break
            again = tuple(axis[found] for axis in again)
            negatives[again] = rng.integers(1, self.item_count + 1, size=len(again[0]))
        return negatives

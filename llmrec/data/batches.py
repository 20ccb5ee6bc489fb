"""Training windows, batches of similar length, negatives: flat arrays, no Python per row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmrec.data.interactions import Bool, Int32, Int64, Interactions

Objective: TypeAlias = Literal["next", "masked", "user"]
"""What a training row asks for: next: the item after each one; masked: items hidden behind a mask,
from those before and after them; user: each of a user's items, from the user alone."""

POOL_BATCHES = 32
"""Batches sorted by length together: wide enough to trim, narrow enough to stay random."""
MARKS = 1 << 22
"""Bytes of the bitmap that tells negatives from a user's own items; a row of it at least."""


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
class Examples:
    """What some training rows ask, as left-padded item ids; 0 where there is none."""

    users: Int64
    """(B,), from 0 on."""
    inputs: Int64
    """(B, L) what is read; 0 behind a mask."""
    targets: Int64
    """(B, L) what is asked for at each place."""
    masked: Bool
    """(B, L) where a mask stands."""
    sequences: Int64
    """(B, S) each row's items, once for each time they occur: S is L, or L + 1 where the last
    target is no input; column i is that of the inputs."""

    def __len__(self) -> int:
        """B."""
        return len(self.users)

    @classmethod
    def following(cls, users: Int64, sequences: Int64) -> Examples:
        """Every item asks for the next one; `sequences` (B, L + 1)."""
        inputs = sequences[:, :-1]
        targets = np.where(inputs > 0, sequences[:, 1:], 0)
        return cls(users, inputs, targets, np.zeros(inputs.shape, np.bool_), sequences)

    def take(self, rows: NDArray[np.integer]) -> Examples:
        """Some of the rows, trimmed to the longest of them."""
        start = int((self.sequences[rows] > 0).any(axis=0).argmax())
        return Examples(
            self.users[rows],
            self.inputs[rows, start:],
            self.targets[rows, start:],
            self.masked[rows, start:],
            self.sequences[rows, start:],
        )


@dataclass(frozen=True)
class TrainingRows:
    """The users to train on, one window each: their most recent training interactions."""

    interactions: Interactions
    users: NDArray[np.int64]
    """Users with enough training interactions to ask for one, (R,)."""
    ends: Int64
    """One past each one's training part, (R,)."""
    lengths: Int64
    """Inputs in each window, (R,)."""
    max_length: int
    """Most inputs of a window."""
    objective: Objective = "next"
    last_only: bool = False
    """Whether the last target of a row is its only one."""
    mask_share: float = 0.2
    """Share of a row that is masked, where the objective says so: an exact number of items, as in
    BERT4Rec, so that a step's number of targets is known before it is drawn."""

    @classmethod
    def of(
        cls,
        interactions: Interactions,
        train_end: Int64,
        max_length: int,
        objective: Objective = "next",
        last_only: bool = False,
        mask_share: float = 0.2,
    ) -> TrainingRows:
        """The rows of a split's training part; `train_end` (U,)."""
        items = train_end - interactions.offsets[:-1]
        users = np.flatnonzero(items > (objective != "user"))  # of one item alone, none is asked
        inputs = items[users] - (objective == "next")
        return cls(
            interactions, users, train_end[users], np.minimum(inputs, max_length), max_length,
            objective, last_only, mask_share,
        )  # fmt: skip

    def __len__(self) -> int:
        """R."""
        return len(self.users)

    @property
    def targets(self) -> Int64:
        """How many targets each row has, (R,)."""
        if self.last_only:
            return np.ones(len(self), np.int64)
        if self.objective == "masked":
            share: Int64 = np.rint(self.mask_share * self.lengths).astype(np.int64)
            return np.maximum(1, share)
        return self.lengths

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

    def examples(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Examples:
        """What some rows ask, trimmed to the longest of them; `rng` decides what is masked."""
        following = self.objective == "next"
        users = self.users[rows]
        sequences = windows(
            self.interactions, users, self.ends[rows], self.max_length + following
        )  # (B, S)
        if following:
            found = Examples.following(users, sequences)
        else:
            nothing = np.zeros(sequences.shape, np.bool_)
            found = Examples(users, sequences, sequences, nothing, sequences)
        if self.last_only:
            last = np.arange(found.targets.shape[1]) == found.targets.shape[1] - 1
            found = replace(found, targets=np.where(last, found.targets, 0))
        elif self.objective == "masked":
            drawn = self._drawn(sequences > 0, self.targets[rows], rng)
            found = replace(found, targets=np.where(drawn, sequences, 0))
        if self.objective == "masked":
            masked = found.targets > 0
            found = replace(found, masked=masked, inputs=np.where(masked, 0, sequences))
        return found

    @staticmethod
    def _drawn(real: Bool, counts: Int64, rng: np.random.Generator) -> Bool:
        """So many places of each row, all real ones equally likely: (B, L)."""
        noise = np.where(real, rng.random(real.shape), np.inf)
        drawn: Bool = noise.argsort(axis=1).argsort(axis=1) < counts[:, None]
        return drawn


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
        """List the distinct items of each user, (T,) in all."""
        self.item_count = item_count
        users = interactions.users().astype(np.int64)
        trained = np.arange(len(users)) < train_end[users]
        keys = np.unique(users[trained] * (item_count + 1) + interactions.items[trained])
        owners = np.arange(interactions.user_count + 1)
        self.starts = np.searchsorted(keys, owners * (item_count + 1))  # (U + 1,)
        self.items = (keys % (item_count + 1)).astype(np.int32)
        self.marks = np.zeros(max(MARKS, item_count + 1), bool)
        """A row of items for each of some users; all False between draws."""

    def draw(
        self, users: NDArray[np.int64], shape: tuple[int, int], rng: np.random.Generator
    ) -> Int64:
        """(B, *shape) item ids; a hit in the user's own items is drawn again, at most 50 times."""
        negatives = rng.integers(1, self.item_count + 1, size=(len(users), *shape))
        drawn = flat = negatives.reshape(-1)
        places = np.arange(negatives.size)
        rows = np.repeat(np.arange(len(users)), shape[0] * shape[1])
        for _ in range(50):  # a user who has nearly every item must not stop the epoch
            again = np.flatnonzero(self._owned(users, rows, drawn))
            if not len(again):
                break
            places, rows = places[again], rows[again]
            drawn = rng.integers(1, self.item_count + 1, size=len(again))
            flat[places] = drawn
        return negatives

    def _owned(
        self, users: NDArray[np.int64], rows: NDArray[np.int64], drawn: Int64
    ) -> NDArray[np.bool_]:
        """Whether drawn items (n,) are own ones of the users (B,) in these rows, ascending (n,).

        Looked up in a bitmap of as many users at a time as it holds: 1.6 million draws of 32 users
        of MovieLens-1M take a seventh of the time of a binary search among all pairs.
        """
        width = self.item_count + 1
        held = max(1, MARKS // width)
        owned = np.empty(len(drawn), bool)
        for first in range(0, len(users), held):
            block = users[first : first + held]
            counts = self.starts[block + 1] - self.starts[block]
            before = np.cumsum(counts) - counts
            sources = np.arange(counts.sum()) + np.repeat(self.starts[block] - before, counts)
            own = np.repeat(np.arange(len(block)) * width, counts) + self.items[sources]
            low, high = np.searchsorted(rows, [first, first + held])
            self.marks[own] = True
            owned[low:high] = self.marks[(rows[low:high] - first) * width + drawn[low:high]]
            self.marks[own] = False
        return owned

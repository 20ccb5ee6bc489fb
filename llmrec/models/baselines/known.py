"""What rows that learn nothing by gradients may look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_array

from llmrec.data.interactions import Cases, Dataset, Float32, Int32, Int64
from llmrec.models.config import UserModelConfig
from llmrec.models.user_model import TrainingPairs

BLOCK_ENTRIES = 1 << 21
"""Pairs of items that are counted at once: some 100 MB with what is computed of them."""


@dataclass(frozen=True)
class Known:
    """What a baseline may look at."""

    dataset: Dataset
    cases: Cases
    """The questions it is asked."""
    train_end: Int64
    """One past each user's training part, (U,)."""
    vectors: Float32
    """Of the items' texts, (N, H), rows of zeros where there is none; (N, 0) where none are
    read."""
    config: UserModelConfig

    def pairs(self) -> TrainingPairs:
        """The training interactions."""
        return TrainingPairs.of(self.dataset.interactions, self.train_end, self.dataset.item_count)

    def training_matrix(self) -> csr_array:
        """Who had what in training: (U, N + 1) of ones, a repeat counted once."""
        pairs = self.pairs()
        return _binary(pairs.users, pairs.items, pairs.user_count, pairs.item_count)

    def recent(self, case: int) -> Int32:
        """The last items of a case's visible history, at most `max_length`, (L,)."""
        interactions, end = self.dataset.interactions, int(self.cases.end[case])
        first = int(interactions.offsets[self.cases.user[case]])
        return interactions.items[max(first, end - self.config.max_length) : end]

    def entries(self, block: Int64, most: int | Literal["all"]) -> tuple[Int64, Int64, Int64]:
        """The last items of some cases' visible histories, flat and oldest first.

        Args:
            block: case indices, (B,).
            most: items that are read of each history.

        Returns:
            Row of the block, item, and place in its history from 1 on, each (E,).
        """
        interactions, ends = self.dataset.interactions, self.cases.end[block]
        starts = interactions.offsets[self.cases.user[block]]
        if most != "all":
            starts = np.maximum(starts, ends - most)
        lengths = ends - starts
        rows = np.repeat(np.arange(len(block)), lengths)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return rows, interactions.items[starts[rows] + within].astype(np.int64), within + 1

    def histories(self, block: Int64, most: int | Literal["all"]) -> csr_array:
        """The same as a matrix: (B, N + 1) of ones, a repeat counted once."""
        rows, items, _ = self.entries(block, most)
        return _binary(rows, items, len(block), self.dataset.item_count)


def _binary(rows: Int64, items: Int64, row_count: int, item_count: int) -> csr_array:
    """Ones where a row has an item, (R, N + 1)."""
    matrix = csr_array(
        (np.ones(len(rows)), (rows, items)), shape=(row_count, item_count + 1)
    )  # adds up what stands there twice
    matrix.data[:] = 1
    return matrix


def together(matrix: csr_array) -> Iterator[tuple[Int64, csr_array]]:
    """How many users had both of two items, a block of items at a time.

    Args:
        matrix: (U, N + 1) of ones.

    Yields:
        Items (I,), consecutive, and their counts with every item, (I, N + 1).
    """
    columns = matrix.T.tocsr()  # (N + 1, U)
    # An item meets at most all items, and no more than stand in the rows of those who had it.
    most = np.minimum(columns @ matrix.sum(axis=1), matrix.shape[1])  # (N + 1,)
    block = np.cumsum(most).astype(np.int64) // BLOCK_ENTRIES
    for items in np.split(np.arange(len(block)), np.flatnonzero(np.diff(block)) + 1):
        yield items, columns[items] @ matrix

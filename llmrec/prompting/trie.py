"""All answers that name an item, as a prefix tree over token ids in a few flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from llmrec.data.interactions import Bool, Int32, Int64
from llmrec.errors import UsageError


@dataclass(frozen=True)
class Trie:
    """Prefix tree of N token sequences; M nodes, node 0 is the root.

    Nodes are numbered level by level and, within one, in the order of their sequences. So a node's
    children are neighbours, sorted by token, and need no list of their own; and as leaves are the
    sequences in sorted order, the items below a node are one range of leaves.
    """

    tokens: Int32
    """(M,): the token that leads into a node; 0 for the root."""
    first: Int32
    """(M + 1,): node n's children are the nodes ``first[n]..first[n + 1] - 1``; a leaf has none."""
    low: Int32
    """(M,): the first leaf below a node (its own, where it is one)."""
    high: Int32
    """(M,): one past the last leaf below it."""
    items: Int32
    """(N,): the item, 1..N, of every leaf."""
    keys: Int64
    """(M - 1,): ``parent * width + token`` of the nodes from 1 on, ascending: finds a child."""
    width: int
    """One more than the largest token."""

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Trie:
        """Build the tree.

        Args:
            sequences: (N, any): the token ids of item i + 1, end token included.

        Raises:
            UsageError: A sequence is empty, or it begins another one (or equals it): no answer
                could then tell the two items apart.
        """
        rows = _padded(sequences)  # (N, T)
        order = np.lexsort(rows.T[::-1])
        rows = rows[order]
        lengths = (rows >= 0).sum(axis=1)
        shared = _shared_with_previous(rows, lengths, order)  # (N,)
        tokens, low, high = [np.zeros(1, np.int32)], [np.zeros(1, np.int32)], []
        high.append(np.array([len(rows)], np.int32))
        children, parents = [], []
        for depth in range(rows.shape[1]):
            bounds = np.flatnonzero(shared <= depth)  # where another node of this depth may begin
            ends = np.append(bounds[1:], len(rows))
            deep = lengths[bounds] > depth
            starts, ends = bounds[deep], ends[deep]
            parent = np.searchsorted(low[-1], starts, side="right") - 1  # within the level above
            children.append(np.bincount(parent, minlength=len(low[-1])))
            parents.append(parent + sum(map(len, low[:-1])))
            tokens.append(rows[starts, depth])
            low.append(starts.astype(np.int32))
            high.append(ends.astype(np.int32))
        children.append(np.zeros(len(low[-1]), np.int64))
        all_tokens = np.concatenate(tokens)
        width = int(all_tokens.max()) + 1
        return cls(
            tokens=all_tokens,
            first=(1 + np.append(0, np.cumsum(np.concatenate(children)))).astype(np.int32),
            low=np.concatenate(low),
            high=np.concatenate(high),
            items=(order + 1).astype(np.int32),
            keys=np.concatenate(parents).astype(np.int64) * width + all_tokens[1:],
            width=width,
        )

    def __len__(self) -> int:
        """N."""
        return len(self.items)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.tokens, self.first, self.low, self.high, self.items, self.keys)
        return sum(array.nbytes for array in arrays)

    @property
    def leaves(self) -> Bool:
        """(M,): which nodes end an answer."""
        return self.first[1:] == self.first[:-1]

    def item(self, sequence: Sequence[int]) -> int:
        """The item that a whole answer names; 0 where it names none."""
        node = 0
        for token in sequence:
            key = node * self.width + token
            place = int(np.searchsorted(self.keys, key))
            if not 0 <= token < self.width or place == len(self.keys) or self.keys[place] != key:
                return 0
            node = place + 1
        return int(self.items[self.low[node]]) if self.first[node] == self.first[node + 1] else 0

    def leaf_of(self) -> Int32:
        """(N + 1,): the leaf of every item; entry 0 (padding) is -1."""
        leaves = np.full(len(self.items) + 1, -1, np.int32)
        leaves[self.items] = np.arange(len(self.items), dtype=np.int32)
        return leaves


def _padded(sequences: Sequence[Sequence[int]]) -> Int32:
    """(N, T), -1 after the end of each."""
    if not len(sequences):
        raise UsageError("there are no items to answer with: the catalogue is empty.")
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    if not lengths.min():
        raise UsageError(
            f"item {int(lengths.argmin()) + 1} has no tokens: its name says nothing to the "
            "tokenizer; choose another indexing.name."
        )
    rows = np.full((len(sequences), int(lengths.max())), -1, np.int32)
    flat = np.fromiter(chain.from_iterable(sequences), np.int32, int(lengths.sum()))
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = flat
    if flat.min() < 0:
        raise ValueError("a token id is negative.")
    return rows


def _shared_with_previous(rows: Int32, lengths: Int64, order: Int64) -> Int64:
    """How many leading tokens each of the sorted rows has in common with the one before it."""
    same = rows[1:] == rows[:-1]
    same &= rows[1:] >= 0
    shared = np.append(0, np.where(same.all(axis=1), rows.shape[1], same.argmin(axis=1)))
    swallowed = np.flatnonzero(shared[1:] == lengths[:-1])  # the row before is wholly its beginning
    if len(swallowed):
        one, other = sorted(order[swallowed[0] : swallowed[0] + 2] + 1)
        raise UsageError(
            f"items {one} and {other} read the same to the tokenizer, or one's name begins the "
            f"other's ({len(swallowed)} such pairs): choose another indexing.name, or another "
            "tokenizer."
        )
    return shared

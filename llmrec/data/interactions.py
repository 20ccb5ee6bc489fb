"""The core objects: who met what in which order, what each item says, and which cases are judged.

Frozen dataclasses over numpy arrays; no torch and no DataFrames here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
Strings = NDArray[np.object_]
REVIEW_TEXTS = ("review", "headline", "explanation", "feature")
"""The texts that a user may have written of an interaction: the keys of `Dataset.reviews`."""


@dataclass(frozen=True)
class Interactions:
    """All users' sequences in compressed sparse rows, each oldest first.

    User u's items are ``items[offsets[u]:offsets[u + 1]]``. Item 0 is padding and never occurs;
    items are 1..N.
    """

    items: Int32
    """Internal item ids, (T,)."""
    offsets: Int64
    """Row bounds, (U + 1,); ``offsets[0] == 0`` and ``offsets[-1] == T``."""
    timestamps: Int64 | None = None
    """Unix seconds, (T,), non-decreasing within a user; None where the data has no clock."""
    ratings: Float32 | None = None
    """(T,); None where the data has none."""

    @property
    def user_count(self) -> int:
        """U."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64:
        """Interactions per user, (U,)."""
        return np.diff(self.offsets)

    def history(self, user: int) -> Int32:
        """One user's items, oldest first, (length,); a view."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def users(self) -> Int32:
        """The user of every interaction, (T,)."""
        return np.repeat(np.arange(self.user_count, dtype=np.int32), self.lengths)


@dataclass(frozen=True)
class Catalog:
    """The items: external ids, raw text fields, rendered text. Row i describes item i + 1."""

    ids: list[str]
    """External ids, (N,)."""
    fields: dict[str, list[str]]
    """Raw text fields by name, each (N,); an absent value is the empty string."""
    texts: list[str]
    """The text an encoder reads, (N,); may be empty."""
    template_sha256: str = ""
    """Hash of the template that rendered ``texts``; empty where the data has no text fields."""

    def __len__(self) -> int:
        """N."""
        return len(self.ids)


@dataclass(frozen=True)
class Cases:
    """Questions asked of a recommender: given this history, where does it rank that target?

    Index arrays into one `Interactions`; histories are never copied. The visible history of case c
    is ``items[offsets[user[c]]:end[c]]`` and its target ``items[target[c]]``.
    """

    user: Int32
    """(C,)."""
    end: Int64
    """One past the last visible interaction, as a position in ``Interactions.items``, (C,)."""
    target: Int64
    """The position of the target in ``Interactions.items``, (C,); never before ``end``."""

    def __len__(self) -> int:
        """C."""
        return len(self.user)

    def take(self, indices: Int64) -> Cases:
        """Some of the cases, in the order named."""
        return Cases(self.user[indices], self.end[indices], self.target[indices])


@dataclass(frozen=True)
class Split:
    """One data set cut into what may be learned from and what is judged."""

    train_end: Int64
    """(U,): user u's training part is ``items[offsets[u]:train_end[u]]``."""
    valid: Cases
    test: Cases
    valid_candidates: Bool
    """(N + 1,): items that may be recommended in ``valid``; entry 0 (padding) is False."""
    test_candidates: Bool
    """(N + 1,): the same for ``test``."""
    counts: dict[str, int] = field(default_factory=dict)
    """What the split kept, dropped and leaks, for the result: name -> number."""


@dataclass(frozen=True)
class Dataset:
    """Interactions and catalogue with the maps to external ids."""

    name: str
    interactions: Interactions
    catalog: Catalog
    user_ids: list[str]
    """External user ids, (U,)."""
    counts: dict[str, int] = field(default_factory=dict)
    """What reading and filtering did, for the result: name -> number."""
    order: Literal["timestamp", "position", "file"] = "file"
    """What sorted each user's interactions; ties stand in the order of the file."""
    reviews: Mapping[str, Strings] = field(default_factory=dict, compare=False)
    """What users wrote: the name, one of `REVIEW_TEXTS`, -> (T,) strings that stand beside
    ``interactions.items``; an absent text is the empty string, and a name that the data has no
    column for is no key."""
    prepared_with: dict[str, Any] | None = field(default=None, compare=False)
    """The options it was once read with, where it comes from a prepared folder."""
    _known_fingerprint: str = field(default="", init=False, repr=False, compare=False)

    @property
    def item_count(self) -> int:
        """N."""
        return len(self.catalog)

    def fingerprint(self) -> str:
        """sha256 over sequences, external ids and item texts: equal only for equal data."""
        if self._known_fingerprint:
            return self._known_fingerprint
        digest = hashlib.sha256()
        for array in (
            self.interactions.items,
            self.interactions.offsets,
            self.interactions.timestamps,
        ):
            digest.update(b"none" if array is None else array.tobytes())
            digest.update(b"|")
        for strings in (self.user_ids, self.catalog.ids, self.catalog.texts):
            _digest_strings(digest, strings)
        return digest.hexdigest()

    def told_fingerprint(self) -> str:
        """sha256 over what users told of what they met: ratings and `reviews`.

        `fingerprint` leaves both out, as most recommenders never see them.
        """
        ratings = self.interactions.ratings
        digest = hashlib.sha256(b"none" if ratings is None else ratings.tobytes())
        for name in sorted(self.reviews):
            digest.update(f"|{name}|".encode())
            _digest_strings(digest, self.reviews[name])
        return digest.hexdigest()

    def with_fingerprint(self, fingerprint: str) -> Dataset:
        """The same data, its fingerprint known from when it was written: not computed again.

        `dataclasses.replace` makes a data set that computes its own: the field is no part of
        ``__init__``, so a changed copy never carries the old one.
        """
        known = replace(self)
        object.__setattr__(known, "_known_fingerprint", fingerprint)
        return known


def _digest_strings(digest: hashlib._Hash, strings: Iterable[str]) -> None:
    for string in strings:
        encoded = string.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    digest.update(b"|")

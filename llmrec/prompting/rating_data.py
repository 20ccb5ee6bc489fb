"""Ratings to predict, each with those before it, and how far users and items lie off the mean.

Numpy only. Interactions without a rating are left out: they are neither asked for nor shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmrec.data.interactions import Cases, Float32, Int32, Int64, Interactions
from llmrec.errors import UsageError
from llmrec.evaluation.metrics import Float64

FOLDS = 20
"""Groups of users; an item's offset as one user sees it is learned from the other groups."""
RECENT = 5
"""Ratings whose mean distance from what was expected tells a user's present mood."""
MOST_LEVELS = 20
"""Distinct ratings up to which each is a level of its own."""


@dataclass(frozen=True)
class Pairs:
    """Ratings to predict: of which item, and which rows of `Rated` were given before."""

    target: Int64
    """(P,): the rating's position in ``Interactions.items``, which tells pairs apart."""
    user: Int32
    """(P,)."""
    item: Int32
    """(P,): 1..N."""
    stars: Float64
    """(P,): the truth."""
    first: Int64
    """(P,): the row of the user's first rating."""
    stop: Int64
    """(P,): one past the row of the last rating before this one; ``first`` where there is none."""

    def __len__(self) -> int:
        """P."""
        return len(self.item)

    def take(self, indices: Int64) -> Pairs:
        """Some of the pairs, in the order named."""
        return Pairs(
            self.target[indices],
            self.user[indices],
            self.item[indices],
            self.stars[indices],
            self.first[indices],
            self.stop[indices],
        )


@dataclass(frozen=True)
class Rated:
    """Every rating there is, by user and oldest first."""

    interactions: Interactions
    rows: Int64
    """(R,): positions in ``Interactions.items``."""
    items: Int32
    """(R,)."""
    stars: Float64
    """(R,)."""
    before: Int64
    """(T + 1,): ratings before each position."""

    @classmethod
    def of(cls, interactions: Interactions, source: str) -> Rated:
        """The ratings of a data set.

        Raises:
            UsageError: It has none, or one that is infinite; `source` is its name.
        """
        ratings = interactions.ratings
        if ratings is None or np.isnan(ratings).all():
            raise UsageError(
                f"data.source={source} has no ratings to predict. Name their column with "
                "data.rating_column."
            )
        known = ~np.isnan(ratings)
        if np.isinf(ratings).any():
            raise UsageError(
                f"data.source={source} holds infinite ratings. Correct the column "
                "data.rating_column."
            )
        rows = np.flatnonzero(known)
        before = np.concatenate([[0], np.cumsum(known)]).astype(np.int64)
        return cls(
            interactions, rows, interactions.items[rows], ratings[rows].astype(np.float64), before
        )

    def rated(self, cases: Cases) -> Cases:
        """Those of the cases whose target has a rating."""
        assert self.interactions.ratings is not None
        return cases.take(np.flatnonzero(~np.isnan(self.interactions.ratings[cases.target])))

    def pairs(self, cases: Cases) -> Pairs:
        """The questions of cases, all of which have ratings."""
        interactions = self.interactions
        assert interactions.ratings is not None
        return Pairs(
            target=cases.target,
            user=cases.user,
            item=interactions.items[cases.target],
            stars=interactions.ratings[cases.target].astype(np.float64),
            first=self.before[interactions.offsets[:-1][cases.user]],
            stop=self.before[cases.end],
        )

    def training(self, train_end: Int64) -> Pairs:
        """Every rating of the training part, (U,) ends; a user's first has an empty history."""
        users = self.interactions.users()[self.rows]
        learned = self.rows < train_end[users]
        places = self.rows[learned]
        return self.pairs(Cases(users[learned], places, places))

    def windows(self, pairs: Pairs, longest: int) -> tuple[Int64, Int64]:
        """The most recent ratings before each pair as rows, left padded: (P, L) and their lengths.

        Rows of the padding are 0; L is the longest of the lengths and at most `longest`.
        """
        lengths = np.minimum(pairs.stop - pairs.first, longest)
        width = int(lengths.max(initial=0))
        places = np.arange(width) - width  # -1 is the last rating
        rows = pairs.stop[:, None] + places  # (P, L)
        return np.where(-places <= lengths[:, None], rows, 0), lengths


@dataclass(frozen=True)
class Offsets:
    """Overall mean + the item's offset + the user's, each shrunk towards 0 by how few it is of.

    Items' offsets are of the training part; a user's is of all ratings before the one asked for.
    What an item's offset says to a user is learned from other groups of users, so that a rating
    never helps to predict itself: features of training and of test then mean the same.
    """

    rated: Rated
    overall: float
    """Mean of the training ratings."""
    low: float
    """The lowest training rating: no prediction lies below it, nor above `high`."""
    high: float
    item_shrinkage: float
    user_shrinkage: float
    items: Float64
    """(FOLDS, N + 1): offset of each item as users of a group see it."""
    counts: Int64
    """(FOLDS, N + 1): ratings that it is the mean of."""
    surprises: Float64
    """(R + 1,): running sum over all ratings of what overall mean and item leave unexplained."""

    @classmethod
    def of(
        cls,
        rated: Rated,
        training: Pairs,
        item_count: int,
        item_shrinkage: float,
        user_shrinkage: float,
    ) -> Offsets:
        """Learn the items' offsets.

        Args:
            rated: All ratings.
            training: Those to learn from.
            item_count: N.
            item_shrinkage: Imagined ratings at the mean, beside those of an item.
            user_shrinkage: The same for a user.
        """
        overall = float(training.stars.mean())
        cells = (training.user % FOLDS).astype(np.int64) * (item_count + 1) + training.item
        shape = (FOLDS, item_count + 1)
        counts = np.bincount(cells, minlength=FOLDS * (item_count + 1)).reshape(shape)
        sums = np.bincount(
            cells, weights=training.stars - overall, minlength=FOLDS * (item_count + 1)
        ).reshape(shape)
        counts, sums = counts.sum(0) - counts, sums.sum(0) - sums
        items = sums / np.maximum(counts + item_shrinkage, 1e-9)
        users = rated.interactions.users()[rated.rows]
        surprises = rated.stars - overall - items[users % FOLDS, rated.items]
        return cls(
            rated=rated,
            overall=overall,
            low=float(training.stars.min()),
            high=float(training.stars.max()),
            item_shrinkage=item_shrinkage,
            user_shrinkage=user_shrinkage,
            items=items,
            counts=counts,
            surprises=np.concatenate([[0.0], np.cumsum(surprises)]),
        )

    def expected(self, pairs: Pairs) -> Float64:
        """What offsets alone predict, (P,), not clipped."""
        return self.overall + self.item(pairs) + self.user(pairs)

    def item(self, pairs: Pairs) -> Float64:
        """(P,)."""
        return self.items[pairs.user % FOLDS, pairs.item]

    def user(self, pairs: Pairs) -> Float64:
        """(P,)."""
        return self._since(pairs, pairs.first) / np.maximum(
            pairs.stop - pairs.first + self.user_shrinkage, 1e-9
        )

    def features(self, pairs: Pairs) -> Float32:
        """What a network is told of a pair, (P, 5).

        Both offsets, the user's over the last few ratings alone, and the counts behind the first
        two on a scale of about 0 to 2.
        """
        start = np.maximum(pairs.first, pairs.stop - RECENT)
        recent = self._since(pairs, start) / np.maximum(pairs.stop - start, 1)
        numbers = (pairs.stop - pairs.first, self.counts[pairs.user % FOLDS, pairs.item])
        logs = [np.log1p(number) / 4 for number in numbers]
        columns = [self.item(pairs), self.user(pairs), recent, *logs]
        return np.stack(columns, axis=1).astype(np.float32)

    def clip(self, predicted: Float64) -> Float64:
        """Predictions inside the scale seen in training, its ends included."""
        return np.clip(predicted, self.low, self.high)

    def _since(self, pairs: Pairs, start: Int64) -> Float64:
        return self.surprises[pairs.stop] - self.surprises[start]


def levels_of(stars: Float64) -> Float64:
    """The distinct ratings, ascending, (K,); of a finer scale a few quantiles stand for them."""
    levels = np.unique(stars)
    if len(levels) > MOST_LEVELS:
        levels = np.unique(np.quantile(stars, np.linspace(0, 1, MOST_LEVELS)))
    return levels


def nearest_level(levels: Float64, stars: Float64) -> Int64:
    """The index of each rating's nearest level, (R,); half-way the lower one."""
    middles = (levels[1:] + levels[:-1]) / 2
    return np.searchsorted(middles, stars, side="left").astype(np.int64)

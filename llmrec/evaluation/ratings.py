"""Predicted ratings against true ones: RMSE, MAE and AUC, and the means that any model must beat.

Numpy only. Two numbers are comparable over the same cases; every case counts, for one without a
prediction gets the middle of the scale, and how many those are is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmrec.data.interactions import Cases, Int32, Int64, Interactions
from llmrec.evaluation.metrics import Float64

STARS = (0.5, 5.0)
"""Lowest and highest of the scale on which `LIKED` and `MIDDLE` mean something."""
MIDDLE = 3.0
"""Stands in for a prediction that is missing; of the scale 1..5."""
LIKED = 4.0
"""Stars from which a rating is a positive of the AUC."""
RATING_MEASURES = ("RMSE", "MAE", "AUC")


@dataclass(frozen=True)
class RatingInterval:
    """A measure with its 95 % bootstrap interval over cases."""

    mean: float
    low: float
    high: float


def in_stars(truth: Float64) -> bool:
    """Whether all true ratings lie on the scale of half a star to five."""
    return bool(truth.min() >= STARS[0] and truth.max() <= STARS[1])


def middle_of(truth: Float64) -> float:
    """What stands in for a missing prediction: 3 stars, or half-way between the ends of a scale.

    Of any other scale only the true ratings of the cases are known.
    """
    return MIDDLE if in_stars(truth) else float(truth.min() + truth.max()) / 2


def rating_values(truth: Float64, predicted: Float64) -> dict[str, float]:
    """RMSE and MAE in stars, and AUC: the chance that a liked item is predicted above another one.

    Ties of the AUC count one half; it is NaN where all or none of the items are liked, and where
    ratings are not stars, so that nobody says what is liked. A missing prediction (NaN) counts as
    the middle of the scale.
    """
    told = np.where(np.isnan(predicted), middle_of(truth), predicted)
    return _values(truth, told, in_stars(truth))


def _values(truth: Float64, told: Float64, liking: bool) -> dict[str, float]:
    """Every measure; `liking`: whether `LIKED` tells what is liked."""
    errors = told - truth
    return {
        "RMSE": float(np.sqrt(np.mean(errors**2))),
        "MAE": float(np.mean(np.abs(errors))),
        "AUC": area_under_curve(truth >= LIKED, told) if liking else float("nan"),
    }


def rating_intervals(
    truth: Float64, predicted: Float64, resamples: int = 2000, seed: int = 0
) -> dict[str, RatingInterval]:
    """Every measure with its interval: cases are drawn anew, with replacement."""
    return seed_intervals(truth, predicted[None], resamples, seed)


def seed_intervals(
    truth: Float64, predicted: Float64, resamples: int = 2000, seed: int = 0
) -> dict[str, RatingInterval]:
    """Every measure's mean over training seeds, with an interval that covers cases and seeds.

    Cases are drawn anew, the same ones for all seeds. What a mean over S seeds strays by is added
    as for rankings (`significance.bootstrap`): S of the centred measures, drawn with replacement,
    averaged and scaled by sqrt(S / (S - 1)). Of one seed no such noise can be seen.

    Args:
        truth: (C,).
        predicted: (S, C), NaN where there is no prediction.
        resamples: Bootstrap draws.
        seed: Of the random numbers.
    """
    told = np.where(np.isnan(predicted), middle_of(truth), predicted)
    rng, liking = np.random.default_rng(seed), in_stars(truth)
    single = [_values(truth, run, liking) for run in told]
    draws: dict[str, list[float]] = {name: [] for name in single[0]}
    for _ in range(resamples):
        rows = rng.integers(len(truth), size=len(truth))
        runs = [_values(truth[rows], run[rows], liking) for run in told]
        for name, found in draws.items():
            found.append(float(np.mean([values[name] for values in runs])))
    picks = rng.integers(len(told), size=(resamples, len(told)))
    intervals = {}
    for name, found in draws.items():
        means = np.array([values[name] for values in single])
        noise = (means - means.mean())[picks].mean(axis=1)
        noise *= np.sqrt(len(told) / max(1, len(told) - 1))
        known = np.array(found) + noise
        known = known[~np.isnan(known)]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        intervals[name] = RatingInterval(float(means.mean()), float(low), float(high))
    return intervals


def mean_baselines(
    interactions: Interactions, learned_end: Int64, cases: Cases, item_count: int
) -> dict[str, Float64]:
    """What means over the learned part predict for each case: global, the user's, the item's.

    Users and items without a learned rating get the global mean; so do missing ratings.

    Args:
        interactions: With ratings.
        learned_end: (U,), where each user's learned part ends.
        cases: The questions.
        item_count: N.
    """
    assert interactions.ratings is not None
    learned = np.arange(len(interactions.items)) < np.repeat(learned_end, interactions.lengths)
    learned &= ~np.isnan(interactions.ratings)
    ratings = interactions.ratings[learned].astype(np.float64)
    known = interactions.ratings[~np.isnan(interactions.ratings)].astype(np.float64)
    overall = float(ratings.mean()) if len(ratings) else middle_of(known)
    targets = interactions.items[cases.target]
    by_user = _means(interactions.users()[learned], ratings, interactions.user_count, overall)
    by_item = _means(interactions.items[learned], ratings, item_count + 1, overall)
    return {
        "global mean": np.full(len(cases), overall),
        "user mean": by_user[cases.user],
        "item mean": by_item[targets],
    }


def _means(groups: Int32 | Int64, values: Float64, count: int, absent: float) -> Float64:
    """The mean value of each group, (count,)."""
    sizes = np.bincount(groups, minlength=count)
    sums = np.bincount(groups, weights=values, minlength=count)
    return np.where(sizes > 0, sums / np.maximum(sizes, 1), absent)


def area_under_curve(liked: np.ndarray, predicted: Float64) -> float:
    """Mann and Whitney's statistic by mean ranks; NaN without two classes."""
    positives = int(liked.sum())
    negatives = len(liked) - positives
    if not positives or not negatives:
        return float("nan")
    order = np.sort(predicted)
    below = np.searchsorted(order, predicted, side="left")
    upto = np.searchsorted(order, predicted, side="right")
    ranks = (below + upto + 1) / 2  # the mean of ranks below + 1 .. upto
    return float((ranks[liked].sum() - positives * (positives + 1) / 2) / (positives * negatives))

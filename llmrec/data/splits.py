"""Who is kept, what is learned from, what is judged: filters and splits, no loop per user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmrec.data.interactions import Bool, Cases, Dataset, Int64, Interactions, Split
from llmrec.errors import UsageError

FitOn = Literal["train", "train+valid"]

REPAIRS = {
    "interactions_absent_from_items_file": "interactions with items absent from the items file",
    "interactions_repeated_exactly": "exact duplicate interactions (kept)",
    "ratings_missing": "ratings missing",
    "timestamps_scaled_to_seconds": "timestamps scaled to seconds",
    "ids_with_spaces_trimmed": "ids with spaces trimmed",
    "ids_written_as_floats": "ids written as 7.0 read as 7",
    "headers_with_spaces_trimmed": "headers trimmed",
    "blank_lines_dropped": "blank lines dropped",
    "lines_inside_quoted_values": "lines inside quoted values",
    "columns_that_are_no_text_dropped": "columns dropped (no text)",
    "item_descriptions_beyond_the_first": "item descriptions beyond the first",
}
"""What readers repair or notice and count, in words."""


@dataclass(frozen=True)
class SplitConfig:
    """How interactions are cut into training, validation and test."""

    method: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """leave_one_out: a user's last interaction is the test target, the second last the validation
    target. temporal: two cuts in time for everyone; a target is a user's first interaction at or
    after the cut."""
    valid_share: float = 0.1
    """Share of all interactions between the two cuts, 0..1; temporal only."""
    test_share: float = 0.1
    """Share of all interactions from the test cut on, 0..1; temporal only."""
    cold: Literal["exclude", "include"] = "exclude"
    """Whether items not seen before the cut are candidates; temporal only. Where they are excluded,
    a case whose target is such an item is dropped and counted. leave_one_out ranks all items."""


def filter_users(
    interactions: Interactions,
    minimum: int,
    maximum: int | None,
    sample: int | None = None,
    sample_seed: int = 0,
) -> tuple[Interactions, Int64, dict[str, int]]:
    """Drop users with few interactions, draw some of the others, keep their most recent ones.

    Args:
        interactions: Everything read.
        minimum: Users with fewer interactions are dropped.
        maximum: Interactions kept per user, the last ones; None keeps all.
        sample: Users drawn from those that are left; None keeps all.
        sample_seed: Seed of the draw, over users by number: equal however the file was sorted.

    Returns:
        What is left, the old rows of the users left (U,), and what was dropped.

    Raises:
        UsageError: If nobody is left, a bound is below 1 or more are drawn than are there.
    """
    if minimum < 1:
        raise UsageError(f"data.min_user_interactions={minimum}: use 1 or more.")
    if maximum is not None and maximum < 1:
        raise UsageError(f"data.max_user_interactions={maximum}: use 1 or more, or all.")
    lengths = interactions.lengths
    enough = lengths >= minimum  # (U,)
    if not enough.any():
        raise UsageError(_nobody_left(lengths, minimum))
    kept = enough if sample is None else _drawn(enough, sample, sample_seed)
    left = lengths[kept] if maximum is None else np.minimum(lengths[kept], maximum)
    ends = np.repeat(interactions.offsets[1:], lengths)  # (T,) end of the row's user
    places_from_end = ends - np.arange(len(interactions.items))  # 1 is the last interaction
    rows = np.repeat(kept, lengths)  # (T,)
    if maximum is not None:
        rows &= places_from_end <= maximum
    times, ratings = interactions.timestamps, interactions.ratings
    result = Interactions(
        items=interactions.items[rows],
        offsets=np.concatenate([[0], np.cumsum(left)]).astype(np.int64),
        timestamps=None if times is None else times[rows],
        ratings=None if ratings is None else ratings[rows],
    )
    counts = {
        "users_dropped_too_few_interactions": int((~enough).sum()),
        "interactions_dropped_with_their_user": int(lengths[~enough].sum()),
        "users_dropped_outside_sample": int((enough & ~kept).sum()),
        "interactions_dropped_outside_sample": int(lengths[enough & ~kept].sum()),
        "interactions_dropped_beyond_most_recent": int((lengths[kept] - left).sum()),
    }
    return result, np.flatnonzero(kept), counts


def _drawn(eligible: Bool, size: int, seed: int) -> Bool:
    """Which of the eligible users, (U,), are among `size` drawn ones, (U,)."""
    rows = np.flatnonzero(eligible)
    if not 1 <= size <= len(rows):
        raise UsageError(
            f"data.sample_users={size}: use 1 to {len(rows):,}, the users with enough "
            "interactions, or all."
        )
    if seed < 0:
        raise UsageError(f"data.sample_seed={seed} must not be negative.")
    # The lowest of one number per user: a larger sample holds the smaller ones of its seed, and
    # the stream of random() has not changed since the generator was introduced.
    lowest = np.argsort(np.random.default_rng(seed).random(len(rows)), kind="stable")[:size]
    drawn = np.zeros(len(eligible), dtype=np.bool_)
    drawn[rows[lowest]] = True
    return drawn


def _nobody_left(lengths: Int64, minimum: int) -> str:
    sizes = np.bincount(lengths)
    most = sorted(np.flatnonzero(sizes), reverse=True)[:3]
    found = ", ".join(f"{sizes[size]:,} with {size}" for size in most)
    return (
        f"data.min_user_interactions={minimum} leaves nobody: the longest histories of the "
        f"{len(lengths):,} users are {found}; lower it to {most[0] if most else 1} or less."
    )


def tied_rows(interactions: Interactions, key: NDArray[np.generic]) -> int:
    """Interactions that share their user and their `key`, (T,), with a neighbour.

    Their order is the file's: the clock (or the position) does not say which came first.
    """
    users = interactions.users()
    same = (key[1:] == key[:-1]) & (users[1:] == users[:-1])  # (T - 1,)
    tied = np.zeros(len(users), dtype=np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    return int(tied.sum())


def fit_ends(interactions: Interactions, config: SplitConfig, fit_on: FitOn = "train") -> Int64:
    """Where each user's part to learn from ends, (U,): ``items[offsets[u]:ends[u]]``.

    `train` is what validation may be predicted from; `train+valid` is for a refit once validation
    has chosen. leave_one_out: all but the last two, or all but the last; users with fewer than 3
    interactions are not judged, so all of theirs is learned from. temporal: everything
    before the validation cut, or before the test cut.

    Raises:
        UsageError: If a temporal cut is asked of data without timestamps, or there is no such cut.
    """
    if config.method == "temporal":
        valid_cut, test_cut = temporal_cuts(interactions, config)
        return _ends_before(interactions, valid_cut if fit_on == "train" else test_cut)
    held_out = 2 if fit_on == "train" else 1
    return interactions.offsets[1:] - np.where(interactions.lengths >= 3, held_out, 0)


def training_counts(interactions: Interactions, ends: Int64, item_count: int) -> Int64:
    """How often each item occurs in the part learned from, (N + 1,); entry 0 (padding) is 0."""
    rows = np.arange(len(interactions.items)) < np.repeat(ends, interactions.lengths)  # (T,)
    return np.bincount(interactions.items[rows], minlength=item_count + 1).astype(np.int64)


def split(dataset: Dataset, config: SplitConfig) -> Split:
    """Cut a data set into what may be learned from and what is judged (PROTOCOL 3 and 4).

    Raises:
        UsageError: If the data cannot be split this way; the message says which way it can.
    """
    if config.method == "temporal":
        return _temporal(dataset, config)
    return _leave_one_out(dataset, config)


def _leave_one_out(dataset: Dataset, config: SplitConfig) -> Split:
    interactions = dataset.interactions
    judged = np.flatnonzero(interactions.lengths >= 3)
    if len(judged) == 0:
        raise UsageError(
            "split.method=leave_one_out needs users with 3 interactions or more, one each to learn "
            "from, to validate and to test; this data has none, so raise data.max_user_interactions"
            " or bring longer histories."
        )
    users = judged.astype(np.int32)
    last = interactions.offsets[1:][judged] - 1  # (C,)
    valid, test = Cases(users, last - 1, last - 1), Cases(users, last, last)
    candidates = np.ones(dataset.item_count + 1, dtype=np.bool_)
    candidates[0] = False
    train_end = fit_ends(interactions, config)
    result = Split(train_end, valid, test, candidates, candidates)
    result.counts.update(_counts(dataset, result))
    result.counts["users_too_short_to_judge"] = interactions.user_count - len(judged)
    if interactions.timestamps is not None:
        # The earliest test interaction decides. Comparing with one's own never counts, for training
        # precedes one's own test, so "of another user" needs no further condition.
        train = np.arange(len(interactions.items)) < np.repeat(train_end, interactions.lengths)
        first_test = interactions.timestamps[last].min()
        leaked = interactions.timestamps[train] > first_test
        result.counts["train_interactions_after_a_test_target"] = int(leaked.sum())
    return result


def temporal_cuts(interactions: Interactions, config: SplitConfig) -> tuple[int, int]:
    """The validation and the test cut, in Unix seconds; what happens at a cut is after it.

    Each is the smallest timestamp that leaves at most the wanted share of interactions before it.

    Raises:
        UsageError: If there are no timestamps, or too few distinct ones for two cuts.
    """
    if interactions.timestamps is None:
        raise UsageError(
            "split.method=temporal needs timestamps and this data has none (data.timestamp_column, "
            "data.order); use split.method=leave_one_out."
        )
    shares = (config.valid_share, config.test_share)
    if min(shares) <= 0 or sum(shares) >= 1:
        raise UsageError(
            f"split.valid_share={shares[0]} and split.test_share={shares[1]} must both be above 0 "
            "and together below 1."
        )
    times = np.sort(interactions.timestamps)
    last = len(times) - 1
    # Rounded first: 1 - .1 - .1 is not .8 in floating point.
    valid_cut = int(times[min(last, int(round(len(times) * (1 - sum(shares)), 6)))])
    test_cut = int(times[min(last, int(round(len(times) * (1 - shares[1]), 6)))])
    if not times[0] < valid_cut < test_cut:
        raise UsageError(
            f"split.method=temporal finds no two cuts with interactions before, between and after "
            f"them among {len(np.unique(times)):,} distinct timestamps; change split.valid_share "
            "and split.test_share or use split.method=leave_one_out."
        )
    return valid_cut, test_cut


def _ends_before(interactions: Interactions, cut: int) -> Int64:
    """One past each user's last interaction before the cut, as positions, (U,)."""
    assert interactions.timestamps is not None
    before = interactions.users()[interactions.timestamps < cut]
    counts = np.bincount(before, minlength=interactions.user_count)
    return (interactions.offsets[:-1] + counts).astype(np.int64)


def _temporal(dataset: Dataset, config: SplitConfig) -> Split:
    interactions = dataset.interactions
    valid_cut, test_cut = temporal_cuts(interactions, config)
    train_end, test_start = (_ends_before(interactions, cut) for cut in (valid_cut, test_cut))
    seen = [
        training_counts(interactions, ends, dataset.item_count) > 0
        for ends in (train_end, test_start)
    ]
    # A validation target at or after the test cut would be validated on the test period.
    in_test = test_start < interactions.offsets[1:]
    targets = (train_end, train_end < test_start), (test_start, in_test)
    counts = {"valid_cut": valid_cut, "test_cut": test_cut}
    cases = []
    for part, (target, exists), warm in zip(("valid", "test"), targets, seen, strict=True):
        has_history = target > interactions.offsets[:-1]
        users = np.flatnonzero(exists & has_history)
        counts[f"{part}_dropped_empty_history"] = int((exists & ~has_history).sum())
        is_cold = ~warm[interactions.items[target[users]]]
        dropped = is_cold if config.cold == "exclude" else np.zeros_like(is_cold)
        counts[f"{part}_dropped_cold"] = int(dropped.sum())
        users = users[~dropped]
        if len(users) == 0:
            raise UsageError(
                f"split.method=temporal leaves no {part} case: of {int(exists.sum()):,} targets "
                f"{counts[f'{part}_dropped_empty_history']:,} have no history and "
                f"{counts[f'{part}_dropped_cold']:,} are cold; raise split.{part}_share, set "
                "split.cold=include or use split.method=leave_one_out."
            )
        cases.append(Cases(users.astype(np.int32), target[users], target[users]))
    everything = np.arange(dataset.item_count + 1) > 0
    candidates: list[Bool] = [everything, everything] if config.cold == "include" else seen
    result = Split(train_end, cases[0], cases[1], candidates[0], candidates[1], counts)
    counts.update(_counts(dataset, result))
    return result


def _counts(dataset: Dataset, result: Split) -> dict[str, int]:
    """What both methods report: sizes, cold and repeated targets, tied rows."""
    interactions = dataset.interactions
    popularity = training_counts(interactions, result.train_end, dataset.item_count)
    first = _first_positions(interactions, dataset.item_count)
    counts = {"train_interactions": int(popularity.sum())}
    if interactions.timestamps is not None:
        counts["interactions_tied_in_time"] = tied_rows(interactions, interactions.timestamps)
    for part, cases in (("valid", result.valid), ("test", result.test)):
        counts[f"{part}_cases"] = len(cases)
        trained_on = popularity[interactions.items[cases.target]]  # (C,)
        counts[f"{part}_targets_cold"] = int((trained_on == 0).sum())
        # First met before the end of the visible history: the target is a repeat visit.
        counts[f"{part}_targets_repeated"] = int((first[cases.target] < cases.end).sum())
    return counts


def summary(dataset: Dataset, cut: Split) -> str:
    """What reading, filtering and splitting dropped or found, in one line."""
    counts = dataset.counts | cut.counts
    shown = REPAIRS | {
        "users_dropped_too_few_interactions": "users dropped (too few interactions)",
        "users_dropped_outside_sample": "users dropped (outside the sample)",
        "interactions_dropped_beyond_most_recent": "interactions dropped (beyond the most recent)",
        "items_with_empty_text": "items without text",
        "interactions_tied_in_order": "interactions tied in their order",
        "test_targets_repeated": "test targets met before",
        "test_targets_cold": "test targets never trained on",
        "train_interactions_after_a_test_target": "training interactions after some test target",
    }
    found = [f"{counts[name]} {words}" for name, words in shown.items() if counts.get(name)]
    return "; ".join([f"ordered by {dataset.order}", *found])


def _first_positions(interactions: Interactions, item_count: int) -> Int64:
    """For every interaction, where the same user met the same item first, (T,)."""
    pairs = interactions.users().astype(np.int64) * (item_count + 1) + interactions.items  # (T,)
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    positions: Int64 = first[inverse].astype(np.int64)
    return positions

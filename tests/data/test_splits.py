"""Splits on tables small enough to check by eye, and against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.interactions import Catalog, Dataset, Interactions
from llmrec.data.splits import SplitConfig, filter_users, fit_ends, split, training_counts
from llmrec.errors import UsageError


def dataset(histories: list[list[int]], times: list[list[int]] | None = None) -> Dataset:
    items = np.array([item for history in histories for item in history], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, histories)]).astype(np.int64)
    flat = None if times is None else np.array([t for row in times for t in row], dtype=np.int64)
    names = [str(item) for item in range(1, int(items.max()) + 1)]
    return Dataset(
        "tiny",
        Interactions(items, offsets, flat),
        Catalog(names, {}, [""] * len(names)),
        [str(user) for user in range(len(histories))],
    )


def test_leave_one_out_takes_the_last_two() -> None:
    # positions:      0  1  2  3   4  5  6
    data = dataset([[1, 2, 3, 4], [2, 1, 2]])
    parts = split(data, SplitConfig())
    assert parts.train_end.tolist() == [2, 5]
    assert parts.valid.target.tolist() == [2, 5]
    assert parts.valid.end.tolist() == [2, 5]  # sees the training part
    assert parts.test.target.tolist() == [3, 6]
    assert parts.test.end.tolist() == [3, 6]  # sees training and validation
    assert parts.test_candidates.tolist() == [False, True, True, True, True]
    assert parts.counts == {
        "train_interactions": 3,
        "valid_cases": 2,
        "valid_targets_cold": 1,  # 3; learned from are 1, 2 and 2
        "valid_targets_repeated": 0,
        "test_cases": 2,
        "test_targets_cold": 1,  # 4
        "test_targets_repeated": 1,  # the second user meets 2 again
        "users_too_short_to_judge": 0,
    }


def test_users_with_fewer_than_three_are_learned_from_and_counted() -> None:
    data = dataset([[1, 2], [1, 2, 3], [3]])
    parts = split(data, SplitConfig())
    assert parts.train_end.tolist() == [2, 3, 6]
    assert parts.test.user.tolist() == [1]
    assert parts.counts["users_too_short_to_judge"] == 2


def test_nobody_long_enough_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"split\.method=leave_one_out needs users with 3"):
        split(dataset([[1, 2], [1]]), SplitConfig())


def test_leave_one_out_counts_training_after_another_users_test() -> None:
    data = dataset([[1, 2, 3], [1, 2, 3, 1]], [[1, 2, 3], [3, 4, 5, 6]])
    # The earliest test target is at 3. Training: at 1; at 3 and 4. Only 4 comes after 3.
    counts = split(data, SplitConfig()).counts
    assert counts["train_interactions_after_a_test_target"] == 1
    assert counts["interactions_tied_in_time"] == 0


def test_tied_rows_share_user_and_second() -> None:
    data = dataset([[1, 2, 3], [1, 2, 3]], [[1, 1, 2], [2, 7, 7]])
    assert split(data, SplitConfig()).counts["interactions_tied_in_time"] == 4


#     time:  0 1 2 3 4 5 6 7 8 9, one interaction each; cuts at 6 (valid) and 8 (test)
#     user:  0 0 1 1 0 2 0 1 0 3
#     item:  1 2 1 3 2 3 3 4 1 1
TEN = ([[1, 2, 2, 3, 1], [1, 3, 4], [3], [1]], [[0, 1, 4, 6, 8], [2, 3, 7], [5], [9]])
FIFTHS = {"valid_share": 0.2, "test_share": 0.2}


def test_temporal_targets_are_the_first_after_each_cut() -> None:
    parts = split(dataset(*TEN), SplitConfig(method="temporal", **FIFTHS))
    assert (parts.counts["valid_cut"], parts.counts["test_cut"]) == (6, 8)
    assert parts.train_end.tolist() == [3, 7, 9, 9]
    # valid: user 0 meets 3 at 6; user 1 meets 4 at 7, unseen before 6, so cold and dropped.
    assert parts.valid.user.tolist() == [0]
    assert parts.valid.target.tolist() == [3]
    assert parts.counts["valid_dropped_cold"] == 1
    # test: user 0 meets 1 at 8; user 3 has no history.
    assert parts.test.user.tolist() == [0]
    assert parts.test.target.tolist() == [4]
    assert parts.test.end.tolist() == [4]  # sees the validation target too
    assert parts.counts["test_dropped_empty_history"] == 1
    assert parts.counts["test_targets_repeated"] == 1
    assert parts.valid_candidates.tolist() == [False, True, True, True, False]
    assert parts.test_candidates.tolist() == [False, True, True, True, True]  # 4 seen at 7


def test_temporal_with_cold_items_keeps_the_case_and_all_candidates() -> None:
    parts = split(dataset(*TEN), SplitConfig(method="temporal", cold="include", **FIFTHS))
    assert parts.valid.user.tolist() == [0, 1]
    assert parts.valid_candidates.tolist() == [False, True, True, True, True]
    assert parts.counts["valid_targets_cold"] == 1
    assert parts.counts["valid_dropped_cold"] == 0


def test_a_validation_target_never_lies_in_the_test_period() -> None:
    data = dataset([[1, 1, 1, 1], [1, 1], [1, 1, 1, 1]], [[0, 1, 2, 3], [0, 9], [4, 6, 7, 9]])
    # Ten interactions at 0 0 1 2 3 4 6 7 9 9: cuts at 6 and 9.
    parts = split(data, SplitConfig(method="temporal", **FIFTHS))
    assert parts.valid.user.tolist() == [2]  # user 1's next is at 9, which is test
    assert parts.test.user.tolist() == [1, 2]


def test_a_repeated_target_counts_only_what_was_visible() -> None:
    data = dataset([[1, 2, 3, 1]])
    counts = split(data, SplitConfig()).counts
    assert (counts["valid_targets_repeated"], counts["test_targets_repeated"]) == (0, 1)


def test_temporal_is_refused_by_name_without_timestamps() -> None:
    with pytest.raises(UsageError, match=r"temporal needs timestamps.*method=leave_one_out"):
        split(dataset([[1, 2, 3]]), SplitConfig(method="temporal"))


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        ([[5] * 10], {}, "no two cuts"),
        ([list(range(10))], {"valid_share": 0.5, "test_share": 0.5}, "together below 1"),
        ([list(range(10))], {"valid_share": 0.0}, "above 0"),
    ],
)
def test_cuts_that_cannot_be_made_are_refused(
    times: list[list[int]], options: dict[str, float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        split(dataset([[1] * 10], times), SplitConfig(method="temporal", **options))


def test_no_case_left_says_why_and_what_to_change() -> None:
    data = dataset([[user % 2 + 1] for user in range(10)], [[user] for user in range(10)])
    with pytest.raises(UsageError, match="leaves no valid case: of 1 targets 1 have no history"):
        split(data, SplitConfig(method="temporal"))


def test_refits_learn_up_to_the_test_target_or_the_test_cut() -> None:
    data = dataset(*TEN)
    temporal = SplitConfig(method="temporal", **FIFTHS)
    assert fit_ends(data.interactions, SplitConfig(), "train").tolist() == [3, 6, 9, 10]
    assert fit_ends(data.interactions, SplitConfig(), "train+valid").tolist() == [4, 7, 9, 10]
    assert fit_ends(data.interactions, temporal, "train").tolist() == [3, 7, 9, 9]
    assert fit_ends(data.interactions, temporal, "train+valid").tolist() == [4, 8, 9, 9]


def test_training_counts_stop_at_each_users_end() -> None:
    data = dataset([[1, 1, 2], [3, 1]])
    ends = np.array([2, 4], dtype=np.int64)
    assert training_counts(data.interactions, ends, 3).tolist() == [0, 2, 0, 1]


def test_filter_keeps_times_and_ratings_beside_their_items() -> None:
    interactions = Interactions(
        np.array([1, 2, 3, 4], dtype=np.int32),
        np.array([0, 3, 4], dtype=np.int64),
        np.array([10, 20, 30, 40], dtype=np.int64),
        np.array([1, 2, 3, 4], dtype=np.float32),
    )
    kept, users, counts = filter_users(interactions, 2, 2)
    assert kept.timestamps is not None and kept.ratings is not None
    assert kept.items.tolist() == [2, 3]
    assert kept.timestamps.tolist() == [20, 30]
    assert kept.ratings.tolist() == [2, 3]
    assert kept.offsets.tolist() == [0, 2]
    assert users.tolist() == [0]
    assert sum(counts.values()) == 1 + 1 + 1


rows = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=60
)


def grouped(table: list[tuple[int, int, int]]) -> Dataset:
    """(user, item, time) rows as a data set."""
    users = sorted({user for user, _, _ in table})
    mine = [sorted((r for r in table if r[0] == u), key=lambda r: r[2]) for u in users]
    return dataset([[r[1] for r in h] for h in mine], [[r[2] for r in h] for h in mine])


@given(rows, st.integers(1, 4), st.none() | st.integers(1, 4))
def test_filter_agrees_with_a_plain_loop(
    table: list[tuple[int, int, int]], minimum: int, maximum: int | None
) -> None:
    interactions = grouped(table).interactions
    histories = [interactions.history(user).tolist() for user in range(interactions.user_count)]
    expected = [h[-maximum:] if maximum else h for h in histories if len(h) >= minimum]
    if not expected:
        with pytest.raises(UsageError):
            filter_users(interactions, minimum, maximum)
        return
    kept, users, counts = filter_users(interactions, minimum, maximum)
    assert [kept.history(user).tolist() for user in range(kept.user_count)] == expected
    assert len(users) == len(expected)
    dropped = [number for name, number in counts.items() if name.startswith("interactions")]
    assert len(kept.items) + sum(dropped) == len(interactions.items)


def test_a_sample_is_drawn_from_those_with_enough_and_a_larger_one_holds_it() -> None:
    histories = [[1] * (1 + user % 3) for user in range(60)]  # 20 users each with 1, 2, 3
    interactions = dataset(histories).interactions
    drawn = {}
    for size in (1, 10, 25, 40):
        kept, users, counts = filter_users(interactions, 2, None, size)
        assert len(users) == kept.user_count == size
        assert all(user % 3 for user in users)  # the others have 1 interaction
        assert kept.lengths.tolist() == [1 + user % 3 for user in users]
        assert counts == {
            "users_dropped_too_few_interactions": 20,
            "interactions_dropped_with_their_user": 20,
            "users_dropped_outside_sample": 40 - size,
            "interactions_dropped_outside_sample": 20 * 2 + 20 * 3 - len(kept.items),
            "interactions_dropped_beyond_most_recent": 0,
        }
        drawn[size] = set(users.tolist())
    assert drawn[1] < drawn[10] < drawn[25] < drawn[40]
    _, others, _ = filter_users(interactions, 2, None, 10, sample_seed=1)
    assert set(others.tolist()) != drawn[10]


def test_everybody_is_drawn_about_equally_often() -> None:
    interactions = dataset([[1, 2]] * 10).interactions
    often = np.zeros(10)
    for seed in range(400):
        often[filter_users(interactions, 1, None, 3, seed)[1]] += 1
    assert often.sum() == 1200
    # 120 expected, standard deviation sqrt(400 * .3 * .7) = 9.2; 5 of them are 46
    assert abs(often - 120).max() < 46


@given(rows, st.sampled_from(["exclude", "include"]))
def test_temporal_agrees_with_a_plain_loop(table: list[tuple[int, int, int]], cold: str) -> None:
    data = grouped(table)
    config = SplitConfig("temporal", 0.25, 0.25, cold)  # type: ignore[arg-type]
    try:
        parts = split(data, config)
    except UsageError:
        return
    x = data.interactions
    assert x.timestamps is not None
    first, second = parts.counts["valid_cut"], parts.counts["test_cut"]
    for cases, cut, until, allowed in (
        (parts.valid, first, second, parts.valid_candidates),
        (parts.test, second, 10**9, parts.test_candidates),
    ):
        seen = {int(x.items[p]) for p in range(len(x.items)) if x.timestamps[p] < cut}
        expected = []
        for user in range(x.user_count):
            positions = range(x.offsets[user], x.offsets[user + 1])
            after = [p for p in positions if x.timestamps[p] >= cut]
            if not after or after[0] == x.offsets[user] or x.timestamps[after[0]] >= until:
                continue
            if cold == "include" or int(x.items[after[0]]) in seen:
                expected.append((user, after[0]))
        assert list(zip(cases.user.tolist(), cases.target.tolist(), strict=True)) == expected
        assert cases.end.tolist() == cases.target.tolist()
        everything = set(range(1, data.item_count + 1))
        assert set(np.flatnonzero(allowed)) == (everything if cold == "include" else seen)


@given(rows)
def test_leave_one_out_never_learns_from_what_it_judges(table: list[tuple[int, int, int]]) -> None:
    data = grouped(table)
    try:
        parts = split(data, SplitConfig())
    except UsageError:
        assert data.interactions.lengths.max() < 3
        return
    assert (parts.train_end[parts.valid.user] == parts.valid.target).all()
    assert (parts.valid.target + 1 == parts.test.target).all()
    assert (parts.test.target + 1 == data.interactions.offsets[1:][parts.test.user]).all()

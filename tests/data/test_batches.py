"""Windows, batches, pairs and negatives as small tables."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.batches import NegativeSampler, SharedNegatives, TrainingRows, windows
from llmrec.data.interactions import Interactions


def sequences(*users):
    """Interactions of some users, each a list of items."""
    return Interactions(
        np.array([item for items in users for item in items], np.int32),
        np.concatenate([[0], np.cumsum([len(items) for items in users])]).astype(np.int64),
    )


def rows_of(interactions, max_length=50, held_out=0, **asked):
    """Training rows of all but the last `held_out` interactions."""
    ends = np.maximum(interactions.offsets[1:] - held_out, interactions.offsets[:-1])
    return TrainingRows.of(interactions, ends, max_length, **asked)


def lengths_of(lengths):
    """Training rows with so many pairs each."""
    return rows_of(sequences(*([1] * (length + 1) for length in lengths)))


def pairs(rows, chosen):
    """Inputs and targets of some rows."""
    found = rows.examples(np.array(chosen), np.random.default_rng(0))
    return found.inputs, found.targets


TWO = sequences([1, 2, 3, 4], [5, 6])


@pytest.mark.parametrize(
    ("users", "ends", "max_length", "expected"),
    [
        ([0, 1], [4, 6], 50, [[1, 2, 3, 4], [0, 0, 5, 6]]),  # left padded
        ([1], [6], 50, [[5, 6]]),  # trimmed to the longest
        ([0, 1], [4, 6], 3, [[2, 3, 4], [0, 5, 6]]),  # capped to the most recent
        ([0, 1], [2, 5], 50, [[1, 2], [0, 5]]),  # nothing at or after the end
        ([0, 1], [4, 4], 2, [[3, 4], [0, 0]]),  # no history yet: padding alone
        ([1], [4], 50, [[0]]),  # one column at least
        ([1, 0, 1], [6, 1, 5], 1, [[6], [1], [5]]),  # any order, any user twice
    ],
)
def test_a_window_is_the_recent_history_left_padded(users, ends, max_length, expected):
    found = windows(TWO, np.array(users), np.array(ends), max_length)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


def test_no_users_have_no_windows():
    assert windows(TWO, np.array([], np.int64), np.array([], np.int64), 5).shape[0] == 0


histories = st.lists(st.lists(st.integers(1, 9), max_size=8), min_size=1, max_size=8).filter(any)


@given(histories, st.integers(1, 10))
def test_windows_are_the_ends_of_the_histories(users, max_length):
    interactions = sequences(*users)
    found = windows(interactions, np.arange(len(users)), interactions.offsets[1:], max_length)
    for row, items in zip(found, users, strict=True):
        recent = items[-max_length:]
        assert row.tolist() == [0] * (len(row) - len(recent)) + recent


def test_targets_are_the_inputs_moved_by_one():
    inputs, targets = pairs(rows_of(TWO), [0, 1])
    np.testing.assert_array_equal(inputs, [[1, 2, 3], [0, 0, 5]])
    np.testing.assert_array_equal(targets, [[2, 3, 4], [0, 0, 6]])


def test_a_capped_row_keeps_its_most_recent_pairs():
    inputs, targets = pairs(rows_of(TWO, max_length=2), [0, 1])
    np.testing.assert_array_equal(inputs, [[2, 3], [0, 5]])
    np.testing.assert_array_equal(targets, [[3, 4], [0, 6]])


def test_held_out_items_are_in_no_pair():
    inputs, targets = pairs(rows_of(TWO, held_out=1), [0])
    np.testing.assert_array_equal((inputs, targets), [[[1, 2]], [[2, 3]]])


def test_a_user_without_a_pair_is_no_row():
    rows = rows_of(sequences([1], [2, 3], [], [4, 5, 6]))
    assert (rows.users.tolist(), rows.lengths.tolist()) == ([1, 3], [1, 2])


def test_the_last_position_alone_may_be_asked_for():
    rows = rows_of(TWO, last_only=True)
    inputs, targets = pairs(rows, [0, 1])
    np.testing.assert_array_equal(inputs, [[1, 2, 3], [0, 0, 5]])  # the whole history is read
    np.testing.assert_array_equal(targets, [[0, 0, 4], [0, 0, 6]])
    assert rows.targets.tolist() == [1, 1]


def test_a_user_of_one_item_asks_for_it_where_no_history_is_read():
    rows = rows_of(sequences([1], [2, 3], []), objective="user")
    found = rows.examples(np.array([0, 1]), np.random.default_rng(0))
    assert (found.users.tolist(), rows.targets.tolist()) == ([0, 1], [1, 2])
    np.testing.assert_array_equal(found.targets, [[0, 1], [2, 3]])


ten = sequences(list(range(1, 11)), [11, 12, 13], [14, 15])


def test_so_many_of_a_row_are_masked():
    """A share of .4: 4 of 10; 1.2 of 3, so 1; .8 of 2, so 1."""
    rows = rows_of(ten, objective="masked", mask_share=0.4)
    found = rows.examples(np.array([0, 1, 2]), np.random.default_rng(0))
    assert found.masked.sum(1).tolist() == rows.targets.tolist() == [4, 1, 1]


@given(histories, st.integers(1, 10), st.floats(0.01, 1), st.integers(0, 3))
def test_an_item_is_read_or_asked_for_and_never_both(users, max_length, share, seed):
    rows = rows_of(sequences(*users), max_length, objective="masked", mask_share=share)
    if not len(rows):
        return
    found = rows.examples(np.arange(len(rows)), np.random.default_rng(seed))
    np.testing.assert_array_equal(
        np.where(found.masked, found.targets, found.inputs), found.sequences
    )
    assert not (found.inputs[found.masked].any() or found.targets[~found.masked].any())
    assert found.masked.sum(1).tolist() == rows.targets.tolist()
    recent = [items[-max_length:] for items in users if len(items) > 1]
    assert [row[row > 0].tolist() for row in found.sequences] == recent


def test_every_item_of_a_row_is_masked_about_equally_often():
    rows = rows_of(ten, objective="masked", mask_share=0.4)
    rng = np.random.default_rng(0)
    counts = sum(rows.examples(np.array([0]), rng).masked[0].astype(int) for _ in range(2000))
    # 800 of 2,000 draws; standard deviation sqrt(2000 x .4 x .6) = 22.
    assert abs(counts - 800).max() < 4 * 22


def test_the_last_item_alone_may_be_masked():
    rows = rows_of(ten, objective="masked", last_only=True)
    found = rows.examples(np.array([1, 2]), np.random.default_rng(0))
    np.testing.assert_array_equal(found.inputs, [[11, 12, 0], [0, 14, 0]])
    np.testing.assert_array_equal(found.targets, [[0, 0, 13], [0, 0, 15]])


@pytest.mark.parametrize("objective", ["next", "masked", "user"])
def test_some_rows_are_those_of_all_trimmed_to_their_longest(objective):
    rows = rows_of(ten, objective=objective)
    found = rows.examples(np.array([0, 1, 2]), np.random.default_rng(0))
    some, width = found.take(np.array([2, 1])), 3 - (objective == "next")
    for whole, part in (
        (found.inputs, some.inputs), (found.targets, some.targets), (found.masked, some.masked)
    ):  # fmt: skip
        np.testing.assert_array_equal(part, whole[[2, 1], -width:])
    np.testing.assert_array_equal(some.sequences, [[0, 14, 15], [11, 12, 13]])


@given(histories, st.integers(1, 10))
def test_lengths_count_the_pairs(users, max_length):
    rows = rows_of(sequences(*users), max_length)
    if len(rows):
        _, targets = pairs(rows, np.arange(len(rows)))
        assert (targets > 0).sum(1).tolist() == rows.lengths.tolist()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_has_every_row_exactly_once_in_batches_of_the_size_but_for_one(
    lengths, size, seed
):
    batches = lengths_of(lengths).batches(size, np.random.default_rng(seed))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    full, rest = divmod(len(lengths), size)
    assert sorted(map(len, batches)) == [rest] * (rest > 0) + [size] * full


def test_rows_of_similar_length_are_together():
    lengths = np.random.default_rng(0).integers(1, 50, size=320)
    rows = lengths_of(lengths)
    batches = rows.batches(10, np.random.default_rng(1))
    padded = sum(len(batch) * rows.lengths[batch].max() for batch in batches)
    at_random = sum(10 * part.max() for part in np.split(lengths, 32))
    # One pool of 32 batches, sorted: ten rows span about 49 / 32 lengths instead of all.
    assert padded < 1.06 * lengths.sum() < 1.5 * lengths.sum() < at_random


def test_batches_do_not_come_sorted_by_length():
    rows = lengths_of(list(range(1, 101)))
    batches = rows.batches(10, np.random.default_rng(0))
    means = [rows.lengths[batch].mean() for batch in batches]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_the_same_seed_gives_the_same_batches_and_another_one_others():
    rows = lengths_of([1, 2, 3] * 20)
    first, again, other = (rows.batches(7, np.random.default_rng(s)) for s in (0, 0, 1))
    assert [batch.tolist() for batch in first] == [batch.tolist() for batch in again]
    assert [batch.tolist() for batch in first] != [batch.tolist() for batch in other]


def sampler(interactions, item_count, held_out=0):
    """Negatives for the part without the last `held_out`."""
    return NegativeSampler(interactions, interactions.offsets[1:] - held_out, item_count)


@given(st.integers(0, 99))
def test_a_negative_is_an_item_the_user_was_not_trained_on(seed):
    drawn = sampler(sequences([1, 2, 3], [4]), 6).draw(
        np.array([0, 1]), (20, 3), np.random.default_rng(seed)
    )
    assert drawn.shape == (2, 20, 3)
    assert set(drawn[0].flat) <= {4, 5, 6} and set(drawn[1].flat) <= {1, 2, 3, 5, 6}


def test_held_out_items_may_be_negatives():
    drawn = sampler(sequences([1, 2, 3]), 3, held_out=1).draw(
        np.array([0]), (50, 1), np.random.default_rng(0)
    )
    assert set(drawn.flat) == {3}


def test_negatives_are_uniform_over_the_items_that_are_left():
    drawn = sampler(sequences([1, 3]), 6).draw(np.array([0]), (4000, 1), np.random.default_rng(0))
    counts = np.bincount(drawn.ravel(), minlength=7)
    assert counts[[0, 1, 3]].tolist() == [0, 0, 0]
    # 4000 draws over 4 items: 1000 each, standard deviation sqrt(4000 x 1/4 x 3/4) = 27.
    assert np.abs(counts[[2, 4, 5, 6]] - 1000).max() < 4 * 27


def test_drawing_stops_for_a_user_who_has_everything():
    drawn = sampler(sequences([1, 2, 3], [1]), 3).draw(
        np.array([0, 1]), (5, 2), np.random.default_rng(0)
    )
    assert ((drawn >= 1) & (drawn <= 3)).all()
    assert set(drawn[1].flat) <= {2, 3}


def drawn_by_search(interactions, item_count, users, shape, rng):
    """The same draws the plain way: every one is looked for among all pairs of users and items."""
    pairs = set(zip(interactions.users().tolist(), interactions.items.tolist(), strict=True))
    negatives = rng.integers(1, item_count + 1, size=(len(users), *shape))
    flat = negatives.reshape(len(users), -1)
    places = [(row, column) for row in range(len(users)) for column in range(flat.shape[1])]
    for _ in range(50):
        places = [place for place in places if (users[place[0]], flat[place]) in pairs]
        if not places:
            break
        for place, item in zip(places, rng.integers(1, item_count + 1, len(places)), strict=True):
            flat[place] = item
    return negatives


@pytest.mark.parametrize("marks", [1, 25, 1 << 22])  # one user at a time, two of them, all
def test_draws_are_those_of_a_plain_search(marks, monkeypatch):
    monkeypatch.setattr("llmrec.data.batches.MARKS", marks)
    rng = np.random.default_rng(0)
    lists = [rng.integers(1, 12, size=length).tolist() for length in (0, 3, 9, 30, 1, 0, 20)]
    interactions, users = sequences(*lists, list(range(1, 12))), np.array([6, 7, 3, 3, 0, 2])
    ours, plain = np.random.default_rng(1), np.random.default_rng(1)
    negatives = sampler(interactions, 11)
    for shape in ((4, 5), (1, 1), (20, 2)):  # one after the other: nothing is left behind
        found = negatives.draw(users, shape, ours)
        wanted = drawn_by_search(interactions, 11, users, shape, plain)
        np.testing.assert_array_equal(found, wanted)
    assert ours.integers(1 << 30) == plain.integers(1 << 30)


def shared(name, held_out):
    """One draw of 6000 for items 1..4, of which the users met 1 three times, 2 and 3 once."""
    interactions = sequences([1, 2, 1], [1, 3])
    ends = interactions.offsets[1:] - held_out
    drawn = SharedNegatives.of(interactions, ends, 4, name).draw(6000, np.random.default_rng(0))
    return np.bincount(drawn, minlength=5).tolist()


def test_shared_negatives_are_uniform_over_all_items():
    counts = shared("uniform", 0)
    # 6000 draws over 4 items: 1500 each, standard deviation sqrt(6000 x 1/4 x 3/4) = 34.
    assert counts[0] == 0 and max(abs(count - 1500) for count in counts[1:]) < 4 * 34


def test_shared_negatives_by_popularity_follow_the_training_part_alone():
    counts = shared("popularity", 1)  # learned from: 1, 2 and 1
    # 1 is two thirds, 2 a third, 3 and 4 never; standard deviation sqrt(6000 x 2/9) = 37.
    assert counts[0] == counts[3] == counts[4] == 0 and abs(counts[1] - 4000) < 4 * 37

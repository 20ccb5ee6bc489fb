"""Which ratings are asked for, what stood before them, and offsets counted by hand."""

import numpy as np
import pytest

from llmrec.data.interactions import Cases, Interactions
from llmrec.errors import UsageError
from llmrec.prompting.rating_data import FOLDS, Offsets, Rated, levels_of, nearest_level

NAN = np.nan


def interactions(ratings, items=(1, 2, 3, 1, 2)):
    """Two users: three interactions of the first, two of the second."""
    return Interactions(
        items=np.array(items, np.int32),
        offsets=np.array([0, 3, 5], np.int64),
        ratings=None if ratings is None else np.array(ratings, np.float32),
    )


def cases(*rows):
    """(user, target) pairs, each asked with all that stands before."""
    users, targets = zip(*rows, strict=True)
    places = np.array(targets, np.int64)
    return Cases(np.array(users, np.int32), places, places)


def learned(rated, ends=(3, 5), **shrinkage):
    training = rated.training(np.array(ends, np.int64))
    shrinkages = {"item_shrinkage": 1.0, "user_shrinkage": 1.0} | shrinkage
    return training, Offsets.of(rated, training, 3, **shrinkages)


def test_every_training_rating_is_asked_with_those_before_it_and_the_first_with_none():
    pairs = Rated.of(interactions([5, 3, 1, 4, 2]), "made").training(np.array([2, 5]))
    assert pairs.item.tolist() == [1, 2, 1, 2]
    assert pairs.stars.tolist() == [5, 3, 4, 2]
    assert (pairs.stop - pairs.first).tolist() == [0, 1, 0, 1]


def test_a_missing_rating_is_neither_asked_for_nor_shown():
    rated = Rated.of(interactions([5, NAN, 1, NAN, 2]), "made")
    assert rated.items.tolist() == [1, 3, 2]
    pairs = rated.training(np.array([3, 5]))
    assert pairs.item.tolist() == [1, 3, 2]
    assert (pairs.stop - pairs.first).tolist() == [0, 1, 0]  # nothing known of the second user
    kept = rated.rated(cases((0, 1), (0, 2), (1, 4)))
    assert kept.target.tolist() == [2, 4]


@pytest.mark.parametrize("ratings", [None, [NAN] * 5])
def test_data_without_ratings_is_refused_with_the_option_that_names_them(ratings):
    with pytest.raises(UsageError, match=r"data\.source=made .* data\.rating_column"):
        Rated.of(interactions(ratings), "made")


def test_an_infinite_rating_is_refused():
    with pytest.raises(UsageError, match="infinite"):
        Rated.of(interactions([5, np.inf, 1, 4, 2]), "made")


def test_the_window_holds_the_latest_ratings_left_padded():
    rated = Rated.of(interactions([5, 3, 1, 4, 2]), "made")
    pairs = rated.pairs(cases((0, 0), (0, 2), (1, 4)))
    rows, lengths = rated.windows(pairs, 50)
    assert lengths.tolist() == [0, 2, 1]
    assert rows.tolist() == [[0, 0], [0, 1], [0, 3]]
    rows, lengths = rated.windows(pairs, 1)
    assert rows.tolist() == [[0], [1], [3]]


def test_without_any_history_the_window_is_empty():
    rated = Rated.of(interactions([5, 3, 1, 4, 2]), "made")
    rows, lengths = rated.windows(rated.pairs(cases((0, 0), (1, 3))), 50)
    assert rows.shape == (2, 0)
    assert lengths.tolist() == [0, 0]


def test_offsets_are_shrunk_means_of_what_is_left():
    # Mean of 5 3 1 4 2 is 3. User 0 sees item 1 as user 1 rated it: +1, shrunk to 1 / (1 + 1); item
    # 2: -1 / 2; item 3: nobody else rated it, 0. User 0 gave 5 and 3, so surprises of
    # 5 - 3 - 0.5 = 1.5 and 3 - 3 + 0.5 = 0.5; before item 3 they give 2 / (2 + 1).
    rated = Rated.of(interactions([5, 3, 1, 4, 2]), "made")
    _, offsets = learned(rated)
    pairs = rated.pairs(cases((0, 0), (0, 1), (0, 2)))
    assert offsets.overall == 3
    assert offsets.item(pairs) == pytest.approx([0.5, -0.5, 0.0])
    assert offsets.user(pairs) == pytest.approx([0.0, 1.5 / 2, 2.0 / 3])
    assert offsets.expected(pairs) == pytest.approx([3.5, 3 - 0.5 + 0.75, 3 + 2 / 3])


def test_without_shrinkage_an_offset_is_the_plain_mean_and_none_where_there_is_nothing():
    rated = Rated.of(interactions([5, 3, 1, 4, 2]), "made")
    _, offsets = learned(rated, item_shrinkage=0.0, user_shrinkage=0.0)
    pairs = rated.pairs(cases((0, 0), (0, 2)))
    assert offsets.item(pairs) == pytest.approx([1.0, 0.0])
    assert offsets.user(pairs) == pytest.approx([0.0, (5 - 3 - 1 + 3 - 3 + 1) / 2])


def test_a_user_s_own_ratings_teach_nothing_about_an_item_as_that_user_sees_it():
    told = []
    for ratings in ([5, 3, 1, 4, 2], [1, 3, 5, 4, 2]):  # the same mean; user 0 has changed sides
        rated = Rated.of(interactions(ratings), "made")
        training, offsets = learned(rated)
        told.append(offsets.item(training)[:3].tolist())
    assert told[0] == told[1] == [0.5, -0.5, 0.0]


def test_ratings_after_the_training_part_teach_no_item_s_offset_but_show_the_user_s():
    # Learned from: 5 3 | 4, mean 4. The rating of item 2 by user 1 is outside.
    rated = Rated.of(interactions([5, 3, 1, 4, 2]), "made")
    _, offsets = learned(rated, ends=(2, 4))
    assert offsets.overall == 4
    assert (offsets.low, offsets.high) == (3, 5)
    assert offsets.items[0].tolist() == [0, 0, 0, 0]  # item 1 by user 1: 4 - 4
    last = rated.pairs(cases((0, 2)))
    assert offsets.user(last) == pytest.approx([((5 - 4) + (3 - 4)) / 3])


def test_users_of_one_group_do_not_teach_each_other():
    # Users 0 and FOLDS share a group, so item 1 as one of them sees it is of the user between.
    count = FOLDS + 1
    ratings = np.full(count, 3.0, np.float32)
    ratings[[0, 1, FOLDS]] = [5, 4, 1]
    data = Interactions(
        items=np.ones(count, np.int32),
        offsets=np.arange(count + 1, dtype=np.int64),
        ratings=ratings,
    )
    rated = Rated.of(data, "made")
    training = rated.training(data.offsets[1:])
    offsets = Offsets.of(rated, training, 1, 0.0, 0.0)
    mean = ratings.mean()
    others = (ratings.sum() - 5 - 1) / (count - 2)
    assert offsets.item(training)[[0, FOLDS]] == pytest.approx([others - mean] * 2, abs=1e-6)


def test_features_are_both_offsets_the_recent_one_and_the_counts():
    rated = Rated.of(interactions([5, 3, 1, 4, 2]), "made")
    _, offsets = learned(rated)
    told = offsets.features(rated.pairs(cases((0, 0), (0, 2))))
    assert told[0] == pytest.approx([0.5, 0, 0, 0, np.log(2) / 4])
    assert told[1] == pytest.approx([0, 2 / 3, 1.0, np.log(3) / 4, 0])


def test_predictions_stay_inside_the_scale_its_ends_included():
    _, offsets = learned(Rated.of(interactions([5, 3, 1, 4, 2]), "made"))
    assert offsets.clip(np.array([0.2, 1.0, 3.3, 5.0, 7.0])).tolist() == [1, 1, 3.3, 5, 5]


def test_levels_are_the_distinct_ratings_and_each_rating_has_its_nearest():
    levels = levels_of(np.array([4.0, 1.0, 2.0, 4.0]))
    assert levels.tolist() == [1, 2, 4]
    # Half-way between 2 and 4 the lower one; outside the scale its end.
    assert nearest_level(levels, np.array([0.0, 1.4, 1.6, 3.0, 3.1, 9.0])).tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


def test_a_scale_without_steps_has_a_few_levels():
    levels = levels_of(np.linspace(0, 10, 1001))
    assert len(levels) == 20
    assert (levels[0], levels[-1]) == (0, 10)


def test_a_single_level_takes_every_rating():
    assert nearest_level(np.array([3.0]), np.array([1.0, 5.0])).tolist() == [0, 0]

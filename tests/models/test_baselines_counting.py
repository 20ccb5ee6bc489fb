"""Popularity, recent popularity, chance and repeats on small tables."""

import numpy as np
import pytest
from small_shops import known, scores

from llmrec.errors import UsageError
from llmrec.evaluation.config import EvaluationConfig
from llmrec.evaluation.ranking import rank_scores
from llmrec.models.baselines import BASELINES


def test_popularity_counts_training_interactions_with_their_repeats():
    # Targets 3 and 6 and, of the second user, the item before are not trained on.
    found = scores("popularity", [[1, 2, 2, 3], [2, 1, 5, 6]], untrained=[1, 2])
    assert found.tolist() == [[2, 3, 0, 0, 0, 0]] * 2


def test_chance_scores_all_items_alike():
    assert scores("random", [[1, 2], [3, 4, 1]]).tolist() == [[0] * 6] * 2


def test_recent_popularity_counts_the_newest_share_of_the_training_interactions():
    # Trained: 1 at 10, 2 at 20, 1 at 30, 4 at 12, 3 at 25, 1 at 28. The newest half: 30, 28, 25.
    histories, times = [[1, 2, 1, 5], [4, 3, 1, 6]], [[10, 20, 30, 99], [12, 25, 28, 98]]
    found = scores("recent_popularity", histories, timestamps=times, recent_share=0.5)
    assert found.tolist() == [[2, 0, 1, 0, 0, 0]] * 2


def test_interactions_as_old_as_the_oldest_counted_one_count_too():
    # A third of 6 is the two newest, at 30 and one of three at 20.
    histories, times = [[1, 2, 1, 5], [4, 3, 2, 6]], [[10, 20, 30, 99], [12, 20, 20, 98]]
    found = scores("recent_popularity", histories, timestamps=times, recent_share=1 / 3)
    assert found.tolist() == [[1, 2, 1, 0, 0, 0]] * 2


@pytest.mark.parametrize(("share", "counted"), [(0.1, 3), (0.11, 4), (0.001, 1), (1.0, 30)])
def test_a_share_is_rounded_up_but_not_by_a_rounding_error(share, counted):
    # 30 * .1 is 3.0000000000000004 in floating point.
    histories, times = [[1] * 30 + [2]], [list(range(31))]
    found = scores("recent_popularity", histories, timestamps=times, recent_share=share)
    assert found[0, 0] == counted


def test_recent_popularity_of_everything_is_popularity():
    histories, times = [[1, 2, 2, 3], [2, 1, 5, 6]], [[1, 2, 3, 4], [1, 2, 3, 4]]
    whole = scores("recent_popularity", histories, timestamps=times, recent_share=1.0)
    assert np.array_equal(whole, scores("popularity", histories))


def test_recent_popularity_without_timestamps_names_the_way_out():
    with pytest.raises(
        UsageError, match=r"shop has no timestamps\. Name their column in data\.tim"
    ):
        scores("recent_popularity", [[1, 2]])


def test_repeat_history_puts_the_history_first_and_the_latest_on_top():
    # Of a repeated item the last time counts; the target is no history.
    found = scores("repeat_history", [[4, 2, 4, 1, 6], [3, 5]])
    assert found.tolist() == [[4, 2, 0, 3, 0, 0], [0, 0, 1, 0, 0, 0]]


def test_repeat_history_reads_what_training_did_not():
    found = scores("repeat_history", [[4, 2, 1, 6]], untrained=[3], max_length=1)
    assert found.tolist() == [[3, 2, 0, 1, 0, 0]]


def test_with_seen_items_filtered_only_a_repeated_target_is_found():
    asked = known("repeat_history", [[1, 2, 1], [1, 2, 3]])
    order, ranking = rank_scores(
        BASELINES["repeat_history"](asked), 6, asked.dataset.interactions, asked.cases,
        np.arange(7) > 0, EvaluationConfig(),
    )  # fmt: skip
    repeated, new = np.argsort(order)
    # Candidates of the first: 1 and the four that it never met; of the second: 3 to 6.
    assert (ranking.greater[repeated], ranking.equal[repeated]) == (0, 0)
    assert (ranking.greater[new], ranking.equal[new]) == (0, 3)

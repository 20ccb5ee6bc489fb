import numpy as np
import pytest

from llmrec.data.interactions import Cases, Interactions
from llmrec.evaluation.ratings import mean_baselines, rating_intervals, rating_values

NAN = np.nan


def test_errors_are_in_stars_and_auc_counts_pairs() -> None:
    truth = np.array([5.0, 4.0, 2.0, 1.0])
    predicted = np.array([5.0, 2.0, 2.0, 3.0])
    found = rating_values(truth, predicted)
    assert found["RMSE"] == pytest.approx(np.sqrt((0 + 4 + 0 + 4) / 4))
    assert found["MAE"] == pytest.approx((0 + 2 + 0 + 2) / 4)
    # liked 5, 4 against the others 2, 1: 5>2, 5>3, 2=2 (half), 2<3
    assert found["AUC"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)


def test_a_prediction_of_five_stars_counts() -> None:
    assert rating_values(np.array([1.0, 5.0]), np.array([5.0, 5.0]))["MAE"] == 2.0


def test_a_missing_prediction_is_the_middle_of_the_scale_and_stays_in() -> None:
    assert rating_values(np.array([5.0, 3.0]), np.array([NAN, NAN]))["MAE"] == 1.0


def test_auc_needs_both_classes() -> None:
    assert np.isnan(rating_values(np.array([5.0, 4.0]), np.array([1.0, 2.0]))["AUC"])


def test_a_constant_prediction_has_an_auc_of_one_half() -> None:
    assert rating_values(np.array([5.0, 4.0, 1.0]), np.full(3, 3.3))["AUC"] == 0.5


def test_an_interval_holds_the_value_and_follows_from_the_seed() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(1, 6, 200).astype(float)
    predicted = truth + rng.normal(0, 1, 200)
    first, again = rating_intervals(truth, predicted), rating_intervals(truth, predicted)
    assert first == again
    for name, value in rating_values(truth, predicted).items():
        assert first[name].low < value < first[name].high


def test_means_are_taken_over_the_learned_part_alone() -> None:
    # user 0: items 1, 2, 3 with 5, 3, 1 stars; user 1: items 1, 3, 2 with 1, NaN, 4
    interactions = Interactions(
        items=np.array([1, 2, 3, 1, 3, 2], np.int32),
        offsets=np.array([0, 3, 6]),
        ratings=np.array([5, 3, 1, 1, NAN, 4], np.float32),
    )
    cases = Cases(np.array([0, 1], np.int32), np.array([2, 5]), np.array([2, 5]))
    found = mean_baselines(interactions, np.array([2, 5]), cases, item_count=3)
    assert found["global mean"].tolist() == [3.0, 3.0]  # (5 + 3 + 1) / 3
    assert found["user mean"].tolist() == [4.0, 1.0]  # (5 + 3) / 2; 1
    assert found["item mean"].tolist() == [3.0, 3.0]  # item 3: nothing learned; item 2: 3

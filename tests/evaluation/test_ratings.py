import numpy as np
import pytest

from llmrec.data.interactions import Cases, Interactions
from llmrec.evaluation.ratings import (
    mean_baselines,
    rating_intervals,
    rating_values,
    seed_intervals,
)

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


@pytest.mark.parametrize(
    ("truth", "middle"),
    [
        ([1.0, 5.0], 3.0),
        ([0.5, 2.0], 3.0),
        ([0.0, 5.0], 2.5),
        ([2.0, 10.0], 6.0),
        ([0.0, 1.0], 0.5),
    ],
)
def test_the_middle_is_that_of_the_scale_the_ratings_are_on(
    truth: list[float], middle: float
) -> None:
    found = rating_values(np.array(truth), np.array([NAN, NAN]))
    assert found["MAE"] == pytest.approx(np.mean([abs(stars - middle) for stars in truth]))


def test_what_is_liked_is_not_known_of_ratings_that_are_no_stars() -> None:
    assert np.isnan(rating_values(np.array([9.0, 2.0]), np.array([9.0, 2.0]))["AUC"])
    assert rating_values(np.array([4.5, 2.0]), np.array([9.0, 2.0]))["AUC"] == 1.0


def test_a_resample_without_the_highest_ratings_is_still_on_the_scale_of_all() -> None:
    truth = np.array([2.0, 3.0, 4.0, 5.0, 10.0])  # a third of the draws hold no 10
    assert np.isnan(rating_intervals(truth, truth)["AUC"].low)
    assert rating_intervals(truth, np.full(5, NAN))["MAE"].high <= 4.0  # from 6, of all draws


def test_seeds_are_averaged_and_widen_the_interval_by_what_they_differ_in() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(1, 6, 300).astype(float)
    off = rng.normal(0, 1, 300)
    same = np.stack([truth + off] * 3)
    apart = np.stack([truth + off, truth + 2 * off, truth + 3 * off])
    alone, again, wide = (
        rating_intervals(truth, truth + off), seed_intervals(truth, same),
        seed_intervals(truth, apart),
    )  # fmt: skip
    for name in ("RMSE", "MAE", "AUC"):
        for end in ("mean", "low", "high"):
            assert vars(again[name])[end] == pytest.approx(vars(alone[name])[end])
    errors = [np.sqrt(np.mean((run - truth) ** 2)) for run in apart]
    assert wide["RMSE"].mean == pytest.approx(np.mean(errors))  # and not the root of the mean
    # the errors are 1, 2 and 3 times the first's: their mean strays by sd / sqrt(3) over seeds
    spread = np.std(errors, ddof=1) / np.sqrt(3)
    assert wide["RMSE"].high - wide["RMSE"].low > 2 * 1.5 * spread


def test_where_nothing_is_learned_the_means_are_the_middle_of_the_scale() -> None:
    for ratings, middle in (([2, 10], 6.0), ([2, 5], 3.0)):
        interactions = Interactions(
            items=np.array([1, 2], np.int32),
            offsets=np.array([0, 2]),
            ratings=np.array(ratings, np.float32),
        )
        cases = Cases(np.array([0], np.int32), np.array([1]), np.array([1]))
        found = mean_baselines(interactions, np.array([0]), cases, item_count=2)
        assert found["global mean"].tolist() == found["item mean"].tolist() == [middle]


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

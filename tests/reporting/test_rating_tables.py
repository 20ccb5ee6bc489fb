"""Runs that predict ratings in tables: one row per label, comparable ones only."""

import numpy as np
import polars as pl
import pytest
from made_runs import QUESTION, run, text

from llmrec.errors import UsageError
from llmrec.evaluation.metrics import Measure
from llmrec.evaluation.ratings import rating_intervals
from llmrec.evaluation.result import Result
from llmrec.reporting.published import Published
from llmrec.reporting.record import Question, build_table

TRUTH = np.array([1, 2, 3, 4, 5] * 8, float)
ALONE = Question()
"""What is asked of ratings: no measure of rankings but those by default."""


def measures(predicted, truth=TRUTH):
    """As a result keeps them; null where one is not defined."""
    return {
        name: {key: None if np.isnan(value) else value for key, value in vars(interval).items()}
        for name, interval in rating_intervals(truth, predicted, resamples=20).items()
    }


def rater(label="bias", seed=0, off=1.0, truth=TRUTH, **changes):
    """A finished run whose predictions are `off` stars too high."""
    made = run(label, seed, users=len(truth), **changes)
    predicted = truth + off
    record = made.record | {
        "kind": "rating",
        "metrics": {"test": measures(predicted, truth)},
        "means": {"global mean": measures(np.full(len(truth), truth.mean()), truth)},
        "unpredicted": int(np.isnan(predicted).sum()),
    }
    for ranked in ("candidates", "filter_seen", "ties"):
        del record["protocol"][ranked]
    columns = {"stars": truth, "predicted": predicted}
    per_user = made.per_user.select("user_id", "target_item_id")
    return Result(record, per_user.with_columns(pl.Series(k, v) for k, v in columns.items()))


def refusal(results, question=ALONE):
    with pytest.raises(UsageError) as caught:
        build_table(results, question)
    return str(caught.value)


def test_seeds_of_a_label_are_one_row_of_their_means():
    runs = [rater("net", seed, off) for seed, off in enumerate((1.0, 2.0, 3.0))]
    record = build_table([rater("bias", off=1.0), *runs], ALONE)
    bias, net, mean = record["ratings"]
    assert (bias["label"], net["label"], mean["label"]) == ("bias", "net", "global mean")
    assert net["seeds"] == [0, 1, 2]
    assert net["metrics"]["RMSE"]["mean"] == pytest.approx((1 + 2 + 3) / 3)
    # Errors are the same for all cases, so only seeds stray: by -1, 0 and 1. One draw in 27 is
    # thrice the same, more than 2.5 %, and sqrt(3 / 2) makes up for there being but three.
    assert net["metrics"]["RMSE"]["low"] == pytest.approx(2 - 1.5**0.5)
    assert net["metrics"]["RMSE"]["high"] == pytest.approx(2 + 1.5**0.5)
    assert net["difference"]["difference"] == pytest.approx((1 + 4 + 9) / 3 - 1)
    assert bias["difference"] is mean["difference"] is None
    assert net["cost"]["train_seconds"] == pytest.approx(12.34)
    shown = text(record, 140)
    assert shown.count("global mean") == 1 and "3 seeds" in shown and "one seed" in shown
    assert "intervals and p cover users and seeds" in shown


def test_a_single_seed_keeps_the_interval_of_its_result():
    found = rater()
    record = build_table([found], ALONE)
    assert record["ratings"][0]["metrics"] == found.record["metrics"]["test"]
    assert "the interval covers users only" in text(record, 140)


def test_missing_answers_are_counted_where_there_are_any():
    off = np.where(np.arange(40) < 3, np.nan, 0.0)
    assert "no answer" not in text(build_table([rater()], ALONE), 140)
    record = build_table([rater(), rater("chat", off=off)], ALONE)
    assert record["ratings"][1]["unpredicted"] == 3
    # of 1, 2 and 3 stars, each 3 instead: 4 + 1 + 0, over 40 cases
    assert record["ratings"][1]["difference"]["difference"] == pytest.approx(5 / 40 - 1)
    assert "no answer" in text(record, 140)


def test_on_another_scale_a_missing_answer_is_its_middle_and_there_is_no_auc():
    ten = 2 * TRUTH  # 2..10: the middle is 6
    nothing = rater("chat", off=np.full(40, np.nan), truth=ten)
    record = build_table([rater(truth=ten, off=0.0), nothing], ALONE)
    squares = np.mean((ten - 6) ** 2)
    assert record["ratings"][1]["difference"]["difference"] == pytest.approx(squares)
    assert record["ratings"][0]["metrics"]["AUC"]["mean"] is None
    assert "No AUC" in text(record, 140)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fit_on": "train+valid"}, "differ in fit_on (train and train+valid)"),
        ({"split": "temporal"}, "differ in the split (leave_one_out and temporal)"),
        ({"interactions": 8000}, "the number of interactions (9000 and 8000)"),
        ({"cases": "other"}, "the test users and targets"),
        ({"data": "f" * 16}, "The data changed between bias and net"),
        ({"truth": TRUTH[::-1].copy()}, "predict other ratings of the same cases"),
    ],
)
def test_ratings_that_answer_another_question_share_no_table(changes, words):
    assert words in refusal([rater(), rater("net", **changes)])


def test_a_rule_may_be_varied_on_purpose_and_is_shown():
    runs = [rater(), rater("net", fit_on="train+valid")]
    record = build_table(runs, Question(varies=["fit_on", "split"]))
    assert record["varies"] == ["fit_on"]
    shown = text(record, 140)
    assert "fit_on varies" in shown and "train+valid" in shown


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        ({"measures": [Measure("HR", 10)]}, "measures"),
        ({"contrasts": [("bias", "net")]}, "contrasts"),
        ({"slices": True}, "slices"),
        ({"beyond_accuracy": True}, "beyond_accuracy"),
        ({"published": [Published("made", {}, {}, "", ())]}, "expected"),
    ],
)
def test_what_is_asked_of_rankings_is_refused_of_ratings_alone(asked, option):
    said = refusal([rater(), rater("net")], Question(**asked))
    assert said.startswith(f"{option} is about rows that rank")


def test_ratings_of_other_data_do_not_stand_beside_rankings():
    said = refusal([run("ID"), rater(data="f" * 16)], QUESTION)
    assert "ID (tiny, fingerprint 0123456789ab) and bias (tiny, fingerprint ffffffffffff)" in said


def test_ratings_under_other_rules_do_not_stand_beside_rankings():
    said = refusal([run("ID"), rater(fit_on="train+valid")], QUESTION)
    assert "ID and bias differ in fit_on" in said


def test_ratings_of_fewer_cases_may_stand_beside_rankings():
    record = build_table([run("ID"), rater(cases="fewer")], QUESTION)
    assert [row["label"] for row in record["rows"]] == ["ID"]
    assert [row["label"] for row in record["ratings"]] == ["bias", "global mean"]
    assert record["ratings"][0]["cases"] == 40


def test_ratings_beside_rankings_keep_their_own_rules_out_of_what_varies():
    runs = [run("ID"), run("text", filter_seen="false"), rater()]
    record = build_table(
        runs, Question(QUESTION.baseline, QUESTION.measures, varies=["filter_seen"])
    )
    assert record["varies"] == ["filter_seen"]
    assert record["ratings"][0]["protocol"] == {"filter_seen": None}
    assert text(record, 140).split("HR@10")[0].count("bias") == 0  # not among the rules


def test_two_runs_of_a_label_must_differ_in_seed():
    assert "both bias with seed 0" in refusal([rater(), rater()])

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.interactions import Cases, Catalog, Dataset, Interactions
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.splits import SplitConfig, split, training_counts
from llmrec.evaluation.significance import bootstrap, compare, holm
from llmrec.evaluation.slices import FAMILIES, MIN_CASES, assign, case_facts, slice_table

COUNTS = st.lists(st.integers(0, 300), min_size=1, max_size=40)


def facts(popularity):
    """Cases that differ in popularity alone; the other facts are made of it."""
    counts = np.asarray(popularity, dtype=np.int64)
    return {
        "target_train_count": counts,
        "history_length": counts // 2,
        "target_repeated": counts % 2 == 1,
        "target_has_text": counts % 3 > 0,
    }


def landed(column, values):
    """The label that each value of one column gets."""
    (found,) = assign({column: np.asarray(values)}).values()
    labels, index = found
    return [labels[i] for i in index]


def test_popularity_bins_have_these_edges():
    assert landed("target_train_count", [0, 1, 4, 5, 19, 20, 99, 100, 10**9]) == [
        "0 (cold)", "1-4", "1-4", "5-19", "5-19", "20-99", "20-99", "100+", "100+",
    ]  # fmt: skip


def test_history_bins_have_these_edges():
    assert landed("history_length", [0, 1, 4, 5, 9, 10, 19, 20, 49, 50, 9999]) == [
        "0-4", "0-4", "0-4", "5-9", "5-9", "10-19", "10-19", "20-49", "20-49", "50+", "50+",
    ]  # fmt: skip


def test_yes_and_no_have_a_slice_each():
    assert landed("target_repeated", [False, True]) == ["new", "repeat"]
    assert landed("target_has_text", [False, True]) == ["empty", "present"]


def test_a_count_below_zero_is_an_error():
    with pytest.raises(ValueError, match="history_length holds a value below 0"):
        assign({"history_length": np.array([-1])})


def test_a_family_without_its_column_is_left_out():
    assert list(assign({"history_length": np.array([3])})) == ["history length"]


@given(COUNTS)
def test_every_case_is_in_exactly_one_slice_of_each_family(popularity):
    values = np.ones((1, len(popularity), 1))
    table = slice_table(facts(popularity), values, None, ["HR@10"])
    assert list(table) == list(FAMILIES)
    for name, records in table.items():
        assert [record["slice"] for record in records] == list(FAMILIES[name].labels)
        assert sum(record["cases"] for record in records) == len(popularity)


@given(COUNTS, st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_slice_means_weighted_by_their_counts_give_the_overall_mean(popularity, seed, seeds):
    values = np.random.default_rng(seed).random((seeds, len(popularity), 2))
    whole = values.mean(axis=(0, 1))
    for records in slice_table(facts(popularity), values, None, ["HR@10", "AUC"]).values():
        for column, measure in enumerate(["HR@10", "AUC"]):
            found = sum(r["cases"] * r["metrics"][measure]["mean"] for r in records if r["cases"])
            assert abs(found / len(popularity) - whole[column]) <= 1e-12


def two_slices(first, second):
    """Cold targets, then targets with 1-4; a row that is better among the former alone."""
    popularity = np.repeat([0, 3], [first, second])
    rng = np.random.default_rng(0)
    baseline = rng.random((2, first + second, 1))
    row = baseline[:1] + 0.2 * (popularity == 0)[None, :, None] * rng.random(
        (1, len(popularity), 1)
    )
    return {"target_train_count": popularity}, row, baseline


def test_a_slice_is_judged_as_its_cases_alone_would_be():
    given_facts, row, baseline = two_slices(40, 50)
    cold, rare = slice_table(given_facts, row, baseline, ["AUC"])["target popularity"][:2]
    alone = [compare(row[:, part], baseline[:, part])[0] for part in (slice(40), slice(40, 90))]
    adjusted = holm(np.array([c.p for c in alone]))
    for record, c, p in zip((cold, rare), alone, adjusted, strict=True):
        assert record["tested"]
        assert record["difference"]["AUC"] == {
            "difference": c.difference, "low": c.low, "high": c.high, "p": c.p, "p_holm": p,
        }  # fmt: skip
    (interval,) = bootstrap(row[:, :40])
    assert cold["metrics"]["AUC"] == vars(interval)


def test_holm_counts_the_tested_slices_of_the_family_alone():
    given_facts, row, baseline = two_slices(MIN_CASES, MIN_CASES - 1)
    cold, rare = slice_table(given_facts, row, baseline, ["AUC"])["target popularity"][:2]
    assert cold["difference"]["AUC"]["p_holm"] == cold["difference"]["AUC"]["p"]
    assert (cold["tested"], rare["tested"]) == (True, False)


def test_a_small_slice_is_shown_but_not_tested():
    # Three cases: 1, 0, 0 against 0, 0, 1/2.
    row, baseline = np.array([[[1.0], [0.0], [0.0]]]), np.array([[[0.0], [0.0], [0.5]]])
    given_facts = {"target_repeated": np.array([True, True, True])}
    new, repeat = slice_table(given_facts, row, baseline, ["MRR@10"])["target"]
    assert (repeat["cases"], repeat["tested"]) == (3, False)
    assert repeat["metrics"] == {"MRR@10": {"mean": 1 / 3, "low": None, "high": None}}
    assert repeat["difference"] == {
        "MRR@10": {
            "difference": pytest.approx(1 / 6), "low": None, "high": None, "p": None, "p_holm": None
        }
    }  # fmt: skip
    # Nobody met a new target: the slice stays, and its mean is unknown rather than 0.
    assert (new["cases"], new["tested"]) == (0, False)
    assert new["metrics"]["MRR@10"]["mean"] is None
    assert new["difference"]["MRR@10"]["difference"] is None


def test_rows_and_baselines_may_have_different_numbers_of_seeds():
    row, baseline = np.full((3, 2, 1), 0.75), np.full((1, 2, 1), 0.5)
    given_facts = {"target_repeated": np.array([False, True])}
    new, repeat = slice_table(given_facts, row, baseline, ["AUC"])["target"]
    assert new["difference"]["AUC"]["difference"] == 0.25
    assert repeat["metrics"]["AUC"]["mean"] == 0.75


def test_the_baseline_itself_has_no_difference_and_records_are_json():
    table = slice_table(facts([0, 5, 100]), np.ones((1, 3, 1)), None, ["AUC"])
    assert all(r["difference"] is None for records in table.values() for r in records)
    given_facts, row, baseline = two_slices(40, 3)
    table = slice_table(given_facts, row, baseline, ["AUC"])
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_facts_are_read_from_the_visible_history():
    # User 0: 1 2 1 | 2 | target 1 (a repeat). User 1: 3 3 | 1 | target 2 (met only by user 0).
    # Item 2 has no text. User 1's own later interaction with 3 is no history of an earlier case.
    items = np.array([1, 2, 1, 2, 1, 3, 3, 1, 2], dtype=np.int32)
    interactions = Interactions(items, np.array([0, 5, 9], dtype=np.int64))
    catalog = Catalog(["a", "b", "c"], {}, ["soap", "", "comb"])
    dataset = Dataset("tiny", interactions, catalog, ["u", "v"])
    cut = split(dataset, SplitConfig())
    counts = training_counts(interactions, cut.train_end, 3)
    assert counts.tolist() == [0, 2, 1, 2]
    found = case_facts(dataset, cut.test, counts)
    assert {name: column.tolist() for name, column in found.items()} == {
        "history_length": [4, 3],
        "target_train_count": [2, 1],
        "target_repeated": [True, False],
        "target_has_text": [True, False],
    }
    validation = case_facts(dataset, cut.valid, counts)
    assert validation["target_repeated"].tolist() == [True, False]
    none = Cases(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64))
    assert all(len(column) == 0 for column in case_facts(dataset, none, counts).values())


def test_facts_agree_with_what_the_split_counted():
    dataset = load_dataset(DataConfig(source="simulated"))
    cut = split(dataset, SplitConfig())
    counts = training_counts(dataset.interactions, cut.train_end, dataset.item_count)
    found = case_facts(dataset, cut.test, counts)
    assert found["target_repeated"].sum() == cut.counts["test_targets_repeated"] > 0
    assert (found["target_train_count"] == 0).sum() == cut.counts["test_targets_cold"] > 0

import json

import numpy as np
import pytest

from llmrec.data.interactions import Cases, Catalog, Dataset, Interactions, Split
from llmrec.errors import UsageError
from llmrec.evaluation.metrics import Measure, Ranking
from llmrec.evaluation.pools import PoolConfig, Pools
from llmrec.evaluation.result import (
    RunFacts,
    build_result,
    differing,
    flatten,
    identity,
    read_result,
    write_result,
)

MEASURES = (Measure("HR", 1), Measure("NDCG", 2))


def facts(**changes):
    values = {
        "name": "tiny", "label": "SASRec-ID", "seed": 3, "config": {"run": {"seed": 3}},
        "data_source": "hand-made", "split": "leave_one_out", "filter_seen": "true",
        "fit_on": "train", "selection": "NDCG@10", "cost": {"train_seconds": 1.5},
    }  # fmt: skip
    return RunFacts(**{**values, **changes})


def tiny():
    """Two users over three items: u 1 2 3, v 1 1 2; the last is the test, the one before valid."""
    interactions = Interactions(
        np.array([1, 2, 3, 1, 1, 2], np.int32), np.array([0, 3, 6], np.int64)
    )
    catalog = Catalog(["a", "b", "c"], {}, ["A", "B", ""], "hash")
    dataset = Dataset("tiny", interactions, catalog, ["u", "v"], {"read": 6})
    users = np.arange(2, dtype=np.int32)
    candidates = np.array([False, True, True, True])
    test = Cases(users, np.array([2, 5]), np.array([2, 5]))
    valid = Cases(users, np.array([1, 4]), np.array([1, 4]))
    split = Split(np.array([1, 4]), valid, test, candidates, candidates, {"repeat_targets": 1})
    ranking = Ranking(
        np.array([0, 1]), np.array([0, 0]), np.array([1, 2]), np.array([True, True]),
        np.zeros((2, 1), np.int32),
    )  # fmt: skip
    return dataset, split, {"test": ranking, "valid": ranking}


def test_a_result_is_read_back_as_it_was_written(tmp_path):
    result = build_result(facts(), *tiny(), MEASURES)
    write_result(tmp_path, result)
    again = read_result(tmp_path)
    assert again.per_user.equals(result.per_user)
    assert {k: v for k, v in again.record.items() if k != "per_user_sha256"} == result.record
    assert (again.label, again.seed, again.folder) == ("SASRec-ID", 3, tmp_path)


def test_per_user_values_and_their_means_agree():
    result = build_result(facts(), *tiny(), MEASURES)
    rows = result.per_user.to_dict(as_series=False)
    assert rows["user_id"] == ["u", "v"]
    assert rows["target_item_id"] == ["c", "b"]
    assert rows["history_length"] == [2, 2]
    assert rows["target_train_count"] == [0, 0]  # trained on: item a twice
    assert rows["HR@1"] == [1, 0]
    assert rows["NDCG@2"] == [1, 1 / np.log2(3)]
    assert result.record["metrics"]["test"]["HR@1"]["mean"] == 0.5
    assert set(result.record["metrics"]) == {"test", "valid"}


def test_any_cutoff_can_be_asked_of_a_finished_run():
    result = build_result(facts(), *tiny(), MEASURES)
    assert result.values([Measure("MRR", 7)]).tolist() == [[1], [1 / 2]]


def test_the_record_names_data_protocol_and_versions():
    record = build_result(facts(), *tiny()).record
    assert record["data"]["users"] == 2
    assert record["data"]["counts"] == {"read": 6, "repeat_targets": 1}
    assert record["protocol"]["candidates"] == 3
    assert record["protocol"]["filter_seen"] == "true"
    assert record["cases"]["count"] == 2
    assert record["versions"]["numpy"] == np.__version__
    assert len(record["metrics"]["test"]) == 13


def test_nested_and_dotted_options_are_the_same():
    assert flatten({"tower": {"name": "id"}, "optim.lr": 1}) == {"tower.name": "id", "optim.lr": 1}


@pytest.mark.parametrize(
    ("changes", "differ"),
    [
        ({"run": {"seed": 3, "folder": "b", "store": "s", "tensorboard": True}}, []),
        ({"loss": {"chunk_megabytes": 64}, "encoder": {"batch_tokens": 9}}, []),
        ({"evaluation": {"block_megabytes": 1}}, []),
        ({"run": {"seed": 4}}, ["run.seed"]),
        ({"run": {"seed": 3, "precision": "bf16"}}, ["run.precision"]),
        ({"evaluation": {"top_k": 5}}, ["evaluation.top_k"]),
    ],
)
def test_runs_differ_in_what_moves_numbers_alone(changes, differ):
    base = {"run": {"seed": 3, "folder": "a", "overwrite": False}}
    assert differing(identity(base, "data"), identity({**base, **changes}, "data")) == differ


def test_data_and_encoder_belong_to_what_a_run_is():
    cost = {"encoder": {"weights": "w1"}}
    held = build_result(facts(cost=cost), *tiny()).identity()
    dataset = tiny()[0]
    config = facts().config
    assert differing(held, identity(config, dataset.fingerprint(), "w1")) == []
    assert differing(held, identity(config, "other", "w2")) == [
        "data fingerprint", "encoder weights",
    ]  # fmt: skip


def test_other_targets_have_another_fingerprint():
    dataset, split, rankings = tiny()
    moved = Split(
        split.train_end, split.valid, split.valid, split.valid_candidates, split.test_candidates
    )
    one, other = (build_result(facts(), dataset, s, rankings).record for s in (split, moved))
    assert one["cases"]["fingerprint"] != other["cases"]["fingerprint"]


def test_a_ranking_of_other_cases_is_an_error():
    dataset, split, rankings = tiny()
    none = Ranking(*(np.empty(0, np.int64),) * 3, np.empty(0, bool), np.empty((0, 1), np.int32))
    with pytest.raises(ValueError, match="0 ranked test cases"):
        build_result(facts(), dataset, split, {**rankings, "test": none})


def test_no_test_case_at_all_is_a_sentence():
    dataset, split, _ = tiny()
    empty = Cases(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64))
    bare = Split(split.train_end, empty, empty, split.valid_candidates, split.test_candidates)
    none = Ranking(*(np.empty(0, np.int64),) * 3, np.empty(0, bool), np.empty((0, 1), np.int32))
    with pytest.raises(UsageError, match="no test case"):
        build_result(facts(), dataset, bare, {"test": none})


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no finished run \(result\.json is missing\)"):
        read_result(tmp_path)
    with pytest.raises(UsageError, match="no finished run"):
        read_result(tmp_path / "nowhere")


def test_a_missing_per_user_file_is_named(tmp_path):
    write_result(tmp_path, build_result(facts(), *tiny(), MEASURES))
    (tmp_path / "per_user.parquet").unlink()
    with pytest.raises(UsageError, match=r"per_user\.parquet is missing"):
        read_result(tmp_path)


@pytest.mark.parametrize("name", ["result.json", "per_user.parquet"])
def test_every_truncation_is_detected(tmp_path, name):
    write_result(tmp_path, build_result(facts(), *tiny(), MEASURES))
    whole = (tmp_path / name).read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 50)):  # the last byte is a newline
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(UsageError, match=f"{name} (is damaged|lacks)"):
            read_result(tmp_path)


def test_a_record_of_another_layout_is_refused(tmp_path):
    write_result(tmp_path, build_result(facts(), *tiny(), MEASURES))
    record = json.loads((tmp_path / "result.json").read_text())
    del record["cases"]
    (tmp_path / "result.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="lacks cases"):
        read_result(tmp_path)
    for other in ("[]", "3", "null"):
        (tmp_path / "result.json").write_text(other)
        with pytest.raises(UsageError, match=r"damaged|lacks"):
            read_result(tmp_path)


def test_the_same_numbers_are_the_same_bytes(tmp_path):
    for name in "ab":
        write_result(tmp_path / name, build_result(facts(), *tiny()))
    for file in ("result.json", "per_user.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def pooled(**pool):
    """The identity of a run with these options of its candidate lists."""
    return identity({"evaluation": {"top_k": 20, "pool": pool}}, "data")


def test_a_full_ranking_is_the_one_of_versions_that_knew_no_lists():
    old = identity({"evaluation": {"top_k": 20}}, "data")
    assert pooled(size="all", source="random", users=1024, seed=0) == old
    assert pooled(size="all", source="popularity", users=7, seed=5) == old


@pytest.mark.parametrize(
    "other", [{"size": 4}, {"source": "popularity"}, {"users": 9}, {"seed": 1}, {"size": "all"}]
)
def test_other_lists_make_another_run(other):
    pool = {"size": 100, "source": "random", "users": 1024, "seed": 0}
    changed = f"evaluation.pool.{next(iter(other))}"
    assert changed in differing(pooled(**pool), pooled(**(pool | other)))


def test_the_protocol_tells_which_lists_were_ranked_and_how_many_candidates_they_hold():
    lists = Pools(
        np.array([[3, 1], [2, 3]], np.int32), "abc", {"cases_sampled": 2}, PoolConfig(size=2)
    )
    protocol = build_result(facts(), *tiny(), MEASURES, pools=lists).record["protocol"]
    assert protocol["candidates"] == 2
    assert protocol["pool"] == {
        "size": 2, "source": "random", "users": 1024, "seed": 0, "sha256": "abc",
        "counts": {"cases_sampled": 2},
    }  # fmt: skip
    full = build_result(facts(), *tiny(), MEASURES).record["protocol"]
    assert full["candidates"] == 3 and "pool" not in full

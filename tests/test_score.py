"""A finished run is scored again on candidate lists: the same as one trained with them."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml
from small_runs import mean, per_user, record, refusal, train

from llmrec import assembly
from llmrec.data.readers import load_dataset
from llmrec.data.splits import fit_ends, split, training_counts
from llmrec.evaluation.pools import PoolConfig, draw_pools
from llmrec.options import parse
from llmrec.reporting.tables import main as compare
from llmrec.score import main

POOL = {"evaluation__pool__size": 20, "evaluation__pool__users": 40}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run that ranked all items."""
    return train(tmp_path_factory.mktemp("score") / "full")


def score(run, folder, *words):
    """The folder of a run scored again."""
    assert main(["--run", str(run), "--run.folder", str(folder), *words]) == 0
    return folder


def refused(*words):
    """The one sentence a scoring is refused with."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert main(list(words)) == 2
    return stderr.getvalue()


def test_scoring_again_gives_what_training_with_the_lists_gives(full, tmp_path):
    trained = train(tmp_path / "trained", **POOL)
    again = score(full, tmp_path / "again", "--pool.size=20", "--pool.users=40")
    for file in ("per_user.parquet", "candidates.parquet"):
        assert (trained / file).read_bytes() == (again / file).read_bytes()
    one, other = record(trained), record(again)
    for key in ("metrics", "protocol", "cases", "beyond_accuracy", "seed", "label"):
        assert one[key] == other[key], key
    assert other["cost"] == record(full)["cost"]
    assert len(per_user(again)) == 40
    written = yaml.safe_load((again / "config.yaml").read_text())
    assert written["evaluation"]["pool"]["size"] == 20
    assert (again / "card.md").exists()


@pytest.mark.parametrize("tune", ["frozen", "lora", "top:1"])
def test_readers_of_text_are_scored_again_as_they_were_trained(tmp_path, tiny_models, tune):
    options = {
        "tower__name": "text", "tower__whiten": False, "encoder__tune": tune,
        "encoder__model": str(tiny_models["bert"]), "run__store": str(tmp_path / "store"),
    }  # fmt: skip
    trained = train(tmp_path / "trained", **options, **POOL)
    again = score(trained, tmp_path / "again", "--pool.size=20", "--pool.users=40")
    assert per_user(trained).equals(per_user(again))
    assert record(trained)["protocol"] == record(again)["protocol"]


def test_validation_stays_a_full_ranking(full, tmp_path):
    trained = train(tmp_path / "trained", **POOL)
    assert record(trained)["metrics"]["valid"] == record(full)["metrics"]["valid"]
    assert record(trained)["protocol"]["valid_candidates"] == 187


def test_all_programs_draw_the_same_lists(full, tmp_path):
    again = score(full, tmp_path / "again", "--pool.size=20", "--pool.users=40")
    baseline = train(tmp_path / "random", model__name="random", **POOL)
    config, _ = parse(assembly.TrainConfig, ["--config", str(full / "config.yaml")], "", "")
    dataset = load_dataset(config.data)
    cut, ends = split(dataset, config.split), fit_ends(dataset.interactions, config.split)
    counts = training_counts(dataset.interactions, ends, dataset.item_count)
    kept, pools = draw_pools(
        dataset, cut.test, cut.test_candidates, counts, PoolConfig(size=20, users=40)
    )
    table = pl.read_parquet(again / "candidates.parquet")
    assert table["user_id"].to_list() == [dataset.user_ids[u] for u in cut.test.user[kept]]
    assert table["candidate_item_ids"].to_list() == [
        [dataset.catalog.ids[item - 1] for item in row] for row in pools.items
    ]
    shas = {record(folder)["protocol"]["pool"]["sha256"] for folder in (again, baseline)}
    assert shas == {pools.sha256}
    assert mean(baseline, "HR@5") == pytest.approx(5 / 20)


@pytest.mark.parametrize("source", ["random", "popularity"])
def test_the_part_that_is_learned_from_does_not_move_the_lists(tmp_path, source):
    one, both = (
        train(
            tmp_path / part, model__name="popularity", run__fit_on=part,
            evaluation__pool__source=source, **POOL,
        )
        for part in ("train", "train+valid")
    )  # fmt: skip
    lists = [(folder / "candidates.parquet").read_bytes() for folder in (one, both)]
    assert lists[0] == lists[1]


def test_a_run_as_source_gives_its_top_items_and_targets_beyond_them_are_misses(full, tmp_path):
    options = {"evaluation__pool__size": 10, "evaluation__pool__source": str(full)}
    ranked = train(tmp_path / "random", model__name="random", **options)
    theirs = {row["user_id"]: row for row in per_user(full).to_dicts()}
    lists = pl.read_parquet(ranked / "candidates.parquet").to_dicts()
    counts = record(ranked)["protocol"]["pool"]["counts"]
    assert len(lists) == counts["cases_sampled"] > 50
    missed = 0
    for row in lists:
        top = theirs[row["user_id"]]["top_item_ids"]  # the best ten, as they were kept
        assert len(set(row["candidate_item_ids"]) & set(top)) >= 9  # one may share a text
        missed += row["target_item_id"] not in row["candidate_item_ids"]
    assert counts["targets_outside_pool"] == missed > 0
    again = score(full, tmp_path / "again", "--pool.size=10", f"--pool.source={full}")
    found = per_user(again)
    assert found["reachable"].sum() == len(lists) - missed
    assert mean(ranked, "HR@10") == pytest.approx(mean(again, "HR@10"))
    shown = [row["candidate_item_ids"] for row in lists]
    best = [theirs[row["user_id"]]["top_item_ids"][0] for row in lists]
    first = sum(row[0] == item for row, item in zip(shown, best, strict=True))
    assert first < len(lists) / 3  # shuffled: a tenth is expected


def test_a_run_of_other_data_is_no_source(full, tmp_path):
    other = {"data__simulated__seed": 5} | POOL
    said = refusal(
        tmp_path / "run", model__name="random", evaluation__pool__source=str(full), **other
    )
    assert f"evaluation.pool.source={full} was trained on other data or another split" in said
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_split_is_no_source(full, tmp_path):
    said = refusal(
        tmp_path / "run", model__name="random", split__method="temporal",
        evaluation__pool__source=str(full), **POOL,
    )  # fmt: skip
    assert "was trained on other data or another split" in said


def test_a_misspelt_source_is_refused(tmp_path):
    said = refusal(tmp_path / "run", evaluation__pool__source="randm", **POOL)
    assert "evaluation.pool.source=randm is no folder of a finished run" in said


def test_a_table_takes_runs_of_the_same_lists_alone(full, tmp_path, capsys):
    again = score(full, tmp_path / "again", "--pool.size=20", "--pool.users=40")
    baseline = train(tmp_path / "random", model__name="random", **POOL)
    assert compare([str(again), str(baseline)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "40 test cases, 20 candidates per case (random, seed 0, 40 users)" in shown
    other = score(
        full, tmp_path / "other", "--pool.size=20", "--pool.users=40", "--pool.source=popularity"
    )
    assert compare([str(baseline), str(other)]) == 2
    assert "differ in the candidates (20 per case: random" in capsys.readouterr().err
    assert compare([str(full), str(again)]) == 2


def test_a_finished_folder_is_replaced_only_when_asked_to(full, tmp_path):
    words = ["--run", str(full), "--run.folder", str(tmp_path / "again"), "--pool.size=5"]
    assert main(words) == 0
    assert "holds a finished run" in refused(*words)
    assert main([*words, "--run.overwrite=true"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--run is missing"),
        (["--run", "nowhere"], "nowhere is no run folder: it has no config.yaml"),
        (["--run=nowhere"], "nowhere is no run folder"),
        (["--pool.sise=4"], "unknown option --pool.sise"),
        (["--pool.size=1"], "pool.size=1 must be at least 2"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(words, said):
    assert said in refused(*words)


def test_a_run_that_trained_nothing_is_refused(tmp_path):
    baseline = train(tmp_path / "random", model__name="random")
    said = refused("--run", str(baseline), "--run.folder", str(tmp_path / "again"))
    assert "has no trained weights" in said and not (tmp_path / "again").exists()


def test_an_unfinished_run_is_refused(full, tmp_path):
    begun = Path(shutil.copytree(full, tmp_path / "begun"))
    (begun / "result.json").unlink()
    assert "holds no finished run" in refused("--run", str(begun))


def test_too_large_lists_leave_no_folder_behind(full, tmp_path):
    words = ["--run", str(full), "--run.folder", str(tmp_path / "again"), "--pool.size=5000"]
    assert "Lower evaluation.pool.size" in refused(*words)
    assert not (tmp_path / "again" / "config.yaml").exists()


def test_label_and_folder_follow_the_trained_run(full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--run", str(full), "--pool.size=5", "--pool.source=popularity"]) == 0
    found = json.loads((tmp_path / "runs/full-5-popularity/result.json").read_text())
    assert found["label"] == record(full)["label"]
    named = score(full, tmp_path / "named", "--pool.size=5", "--run.label=other")
    assert record(named)["label"] == "other"

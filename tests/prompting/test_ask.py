"""A trained model asked again: in other words, free, on candidate lists."""

import polars as pl
import pytest
from small_p5 import train
from small_runs import record
from small_runs import train as train_tcf

from llmrec.prompting.ask import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run that asked by a held-out prompt as well."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(folder, decoding__others="2-13")


def ask(trained, folder, *words):
    """What result.json holds after asking again."""
    assert main(["--run", str(trained), "--run.folder", str(folder), *words]) == 0
    return record(folder)


def test_the_same_question_gets_the_same_answers(trained, tmp_path):
    again = ask(trained, tmp_path / "again")
    known = record(trained)
    assert again["metrics"] == known["metrics"] and again["p5"] == known["p5"]
    assert again["cost"]["train_seconds"] == known["cost"]["train_seconds"]


def test_another_prompt_gets_what_it_got_after_training(trained, tmp_path):
    other = ask(trained, tmp_path / "other", "--decoding.template", "2-13")
    known = record(trained)["p5"]["prompts"]["2-13"]["measures"]
    assert {name: other["metrics"]["test"][name] for name in known} == known
    assert other["label"].endswith("asked by 2-13")


def test_free_answers_are_counted(trained, tmp_path):
    free = ask(trained, tmp_path / "free", "--decoding.constrained", "false")
    assert free["p5"]["answers"]["answers"] == 61 * 20
    assert free["p5"]["answers"]["invalid"] > 0


def test_candidate_lists_bound_the_answers(trained, tmp_path):
    ask(trained, tmp_path / "lists", "--pool.size", "30")
    lists = pl.read_parquet(tmp_path / "lists" / "per_user.parquet")["top_item_ids"]
    pools = pl.read_parquet(tmp_path / "lists" / "candidates.parquet")
    names = [name for name in pools.columns if "item" in name and "target" not in name]
    for listed, pool in zip(lists, pools[names[0]], strict=True):
        assert set(listed) <= set(pool)


def test_a_refitted_run_is_asked_with_its_last_weights(tmp_path):
    refitted = train(tmp_path / "run", run__fit_on="train+valid")
    assert ask(refitted, tmp_path / "again")["metrics"] == record(refitted)["metrics"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--run is missing"),
        (["--run", "nowhere"], "nowhere"),
        (["--decoding.template", "5-8"], "decoding.template=5-8"),
        (["--decoding.tempalte", "2-3"], "decoding.template"),
    ],
)
def test_a_mistake_is_one_sentence(trained, tmp_path, capsys, words, told):
    named = [] if not words or "--run" in words else ["--run", str(trained)]
    assert main([*named, *words, "--run.folder", str(tmp_path / "x")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_run_that_was_not_trained_on_prompts_is_refused(tmp_path, capsys):
    folder = train_tcf(tmp_path / "tcf", model__name="popularity")
    assert main(["--run", str(folder)]) == 2
    assert "was not trained on prompts" in capsys.readouterr().err

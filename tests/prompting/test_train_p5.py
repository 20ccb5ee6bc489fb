"""Training on prompts from start to finish: what a run leaves, refuses and resumes."""

import numpy as np
import polars as pl
import pytest
import tiny_models
import torch
from faults import KILLED, Fault, run
from small_p5 import PROGRAM, command, refusal, train
from small_runs import journal, per_user, record
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.simulated import SimulatedConfig
from llmrec.prompting.indexing import load_indexing
from llmrec.runs import sha256_of


def small_shop():
    """The data of all these runs."""
    return load_dataset(DataConfig(simulated=SimulatedConfig(users=61, items=240)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run with every family asked for at the end."""
    return train(
        tmp_path_factory.mktemp("p5") / "run",
        data__simulated__reviews=True,
        prompts__families="auto",
        prompts__candidates=5,
        decoding__others="auto",
        decoding__other_cases=20,
        optim__epochs=1,
    )


def test_a_run_leaves_a_result_that_tables_and_readers_know(finished):
    found = record(finished)
    assert found["metrics"]["test"]["HR@10"]["mean"] >= 0
    assert found["protocol"]["candidates"] == found["data"]["counts"]["items"]
    assert found["cost"]["prompts"] > 0 and found["cost"]["flops"] > 0
    assert (finished / "card.md").read_text().count("| held out |") == 5
    indexing = load_indexing(finished / "indexing.json", small_shop())
    assert indexing.fingerprint == found["p5"]["indexing"]
    assert len(indexing.mentions) == found["data"]["counts"]["items"]


def test_every_family_is_asked_by_a_seen_and_a_held_out_prompt(finished):
    asked = record(finished)["p5"]["prompts"]
    parts = {}
    for about in asked.values():
        parts.setdefault(about["family"], set()).add(about["held out"])
    families = ("sequential", "rating", "explanation", "review", "direct")
    assert parts == {family: {False, True} for family in families}
    kinds = {"item": "HR@10", "stars": "RMSE", "explanation": "BLEU-4", "headline": "ROUGE-L"}
    for about in asked.values():
        assert kinds[about["asks for"]] in about["measures"]
        assert about["cases"] <= (61 if about["family"] == "sequential" else 20)


def test_every_answer_is_an_unseen_item_and_lists_have_no_item_twice(finished):
    answers = record(finished)["p5"]["answers"]
    assert answers == {"answers": 61 * 20, "invalid": 0, "barred": 0, "prompts_cut": 0}
    lists = pl.read_parquet(finished / "per_user.parquet")["top_item_ids"].to_list()
    assert all(len(items) == len(set(items)) == 10 for items in lists)  # as many as are kept


def test_unconstrained_answers_are_counted_by_what_is_wrong_with_them(tmp_path):
    folder = train(tmp_path / "run", decoding__constrained=False, optim__epochs=1)
    answers = record(folder)["p5"]["answers"]
    assert answers["invalid"] > 0 and answers["answers"] == 61 * 20


@pytest.mark.parametrize("indexing", ["sequential", "collaborative", "title"])
def test_every_indexing_trains(tmp_path, indexing):
    folder = train(
        tmp_path / "run", indexing__name=indexing, optim__epochs=1,
        prompts__mention="id" if indexing == "title" else "both",
    )  # fmt: skip
    assert record(folder)["p5"]["answers"]["invalid"] == 0


def test_a_decoder_only_model_trains(tmp_path):
    folder = train(tmp_path / "run", model__name="scratch:llama", optim__epochs=1)
    assert record(folder)["p5"]["answers"]["invalid"] == 0


@pytest.mark.parametrize(("name", "tune"), [("t5", "full"), ("t5", "lora"), ("qwen3", "lora")])
def test_a_pretrained_model_is_tuned(tmp_path, name, tune):
    family = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    config = tiny_models.ARCHITECTURES[name]
    config.vocab_size = 400
    torch.manual_seed(0)
    family.from_config(config).save_pretrained(tmp_path / "model")
    numbers = [str(n) for n in range(300)]
    tiny_models.tokenizer([*tiny_models.WORDS, "item", "user", "_", *numbers]).save_pretrained(
        tmp_path / "model"
    )
    options = {
        f"model__scratch__{size}": default
        for size, default in (("width", 64), ("layers", 2), ("heads", 4), ("vocabulary", 4000))
    }
    folder = train(
        tmp_path / "run", model__name=str(tmp_path / "model"), model__tune=tune,
        indexing__name="collaborative", optim__epochs=1, **options,
    )  # fmt: skip
    found = record(folder)
    assert found["cost"]["encoder"]["files"] != "none"
    assert found["p5"]["answers"]["invalid"] == 0


def test_refitting_on_validation_keeps_the_selected_number_of_epochs(tmp_path):
    folder = train(tmp_path / "run", run__fit_on="train+valid", indexing__name="sequential")
    found = record(folder)
    names = load_indexing(folder / "indexing.json", small_shop())
    assert names.fingerprint == found["p5"]["indexing"]
    assert len(journal(folder, "refit")) == found["cost"]["selected_epoch"]
    assert found["protocol"]["fit_on"] == "train+valid"


def test_candidate_lists_bound_the_answers(tmp_path):
    folder = train(
        tmp_path / "run", evaluation__pool__size=30, evaluation__pool__users=20, optim__epochs=1
    )
    lists = pl.read_parquet(folder / "per_user.parquet")
    pools = pl.read_parquet(folder / "candidates.parquet")
    names = [column for column in pools.columns if "item" in column and "target" not in column]
    assert len(lists) == 20
    for listed, pool in zip(lists["top_item_ids"], pools[names[0]], strict=True):
        assert set(listed) <= set(pool)


def without_times(folder):
    found = record(folder)
    for where in (found["cost"], found["config"]["run"]):
        for name in [name for name in where if "seconds" in name or "memory" in name]:
            del where[name]
    del found["config"]["run"]["folder"], found["name"], found["per_user_sha256"]
    weights = {
        path.parent.name: sha256_of(path) for path in folder.glob("checkpoints/*/*.safetensors")
    }
    return found, weights, per_user(folder).rows()


def test_a_held_out_prompt_is_held_against_the_ranked_one_case_by_case(tmp_path):
    folder = train(tmp_path / "run", decoding__others="2-13", optim__epochs=1)
    asked = record(folder)["p5"]["prompts"]
    means = [asked[name]["measures"]["NDCG@10"]["mean"] for name in ("2-13", "2-3")]
    found = asked["2-13"]["less the ranked prompt"]["NDCG@10"]
    assert found["difference"] == pytest.approx(means[0] - means[1])
    assert 0 < found["p"] <= 1 and "AUC" not in asked["2-3"]["measures"]


def test_a_split_in_time_trains(tmp_path):
    folder = train(tmp_path / "run", split__method="temporal", optim__epochs=1)
    found = record(folder)
    assert found["protocol"]["split"] == "temporal"
    assert found["p5"]["answers"]["invalid"] == 0 < found["cases"]["count"]


def test_prompts_that_are_cut_are_counted(tmp_path):
    folder = train(tmp_path / "run", model__max_input_tokens=16, optim__epochs=1)
    assert 0 < record(folder)["p5"]["answers"]["prompts_cut"] <= 61


STEPS = {"optim__accumulate": 2, "run__checkpoint_steps": 2, "optim__epochs": 2}


@pytest.mark.parametrize("n", [1, 5, 8, 14])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, n):
    whole = tmp_path / "whole"
    assert run(command(whole, **STEPS), program=PROGRAM)[0] == [0]
    argv = command(tmp_path / "run", **STEPS)
    assert run(argv, Fault("forward", n), program=PROGRAM)[0] == [KILLED]
    assert not (tmp_path / "run" / "result.json").exists()
    assert run(argv, program=PROGRAM)[0] == [0]
    assert without_times(tmp_path / "run") == without_times(whole)


@pytest.mark.slow
def test_two_processes_answer_like_one(tmp_path, figure):
    options = STEPS | {"model__scratch__dropout": 0.0, "optim__batch_size": 31}
    for processes in (1, 2):
        argv = command(tmp_path / str(processes), **options)
        assert run(argv, processes=processes, program=PROGRAM)[0] == [0] * processes
    one, two = (journal(tmp_path / str(processes)) for processes in (1, 2))
    losses = [[entry["loss"] for entry in entries] for entries in (one, two)]
    figure("loss of two processes against one", f"{losses}")
    assert np.allclose(*losses, rtol=1e-4)
    users = [len(per_user(tmp_path / str(processes))) for processes in (1, 2)]
    assert users == [61, 61]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoding__template": "2-7"}, "decoding.template=2-7"),
        ({"decoding__template": "9-9"}, "decoding.template=9-9"),
        ({"decoding__others": "2-99"}, "decoding.others names 2-99"),
        ({"decoding__others": "3-1"}, "explanation"),
        ({"decoding__beams": 10}, "decoding.beams=10"),
        ({"prompts__families": "rating"}, "rating"),
        ({"prompts__families": "sequenc"}, "sequential"),
        ({"model__max_target_tokens": 2}, "model.max_target_tokens=2"),
        ({"model__tune": "lora"}, "model.tune=lora"),
        ({"run__select": "HR@0"}, "HR@0"),
        ({"run__select": "AUC"}, "run.select=AUC"),
        ({"evaluation__block_megabytes": 1}, "evaluation.block_megabytes"),
        ({"model__max_input_tokens": 1}, "model.max_input_tokens"),
    ],
)
def test_a_mistake_is_one_sentence_before_a_folder_is_made(tmp_path, changes, words):
    told = refusal(tmp_path / "run", **changes)
    assert words in told and told.count("\n") <= 3
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_of_other_options_is_not_resumed(tmp_path):
    argv = command(tmp_path / "run", **STEPS)
    assert run(argv, Fault("forward", 9), program=PROGRAM)[0] == [KILLED]
    told = refusal(tmp_path / "run", **STEPS | {"optim__lr": 0.5})
    assert "optim.lr" in told


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    assert "not finite" in refusal(tmp_path / "run", optim__lr=1e30, optim__clip="off")

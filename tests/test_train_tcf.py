"""The loop from command line to run folder: what it writes, what it repeats, what it selects."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import SMALL, command, journal, mean, per_user, record, train, words

from llmrec import train_tcf
from llmrec.evaluation.metrics import Ranking
from llmrec.options import as_dict
from llmrec.runs import check_folder

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "llmrec" / "train_tcf.py")


def resolve(argv):
    """The config of a command line as plain values."""
    return as_dict(train_tcf.configure(argv))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run of IDs, shared by the tests that only read it."""
    return train(tmp_path_factory.mktemp("runs") / "id")


def checkpoint(folder, stage="fit"):
    """The folder of the stage's only checkpoint."""
    (path,) = (folder / "checkpoints").glob(f"{stage}-epoch-*")
    return path


def process(*argv, cwd, timeout=240):
    """A program of its own, on one thread, without the tests' import path."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_a_run_leaves_config_result_per_user_values_and_one_whole_checkpoint(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml", "fit-journal.jsonl", "checkpoints", "per_user.parquet", "result.json",
        "card.md",
    }  # fmt: skip
    check_folder(checkpoint(finished), "")
    assert len(per_user(finished)) == record(finished)["cases"]["count"] == 61
    assert record(finished)["cost"]["epochs"] == len(journal(finished)) == 2


def test_the_written_config_gives_the_same_config(finished):
    resolved = resolve(["--config", str(finished / "config.yaml")])
    assert resolved == yaml.safe_load((finished / "config.yaml").read_text())
    assert resolved == record(finished)["config"]
    assert resolved == resolve(command(finished))


def test_no_options_mean_the_quick_starts_text_model():
    shipped = resolve(["--config=configs/tcf/quickstart.yaml"])
    assert resolve([]) == shipped
    assert shipped["tower"]["name"] == "text" and shipped["data"]["source"] == "simulated"


def test_a_run_says_what_reading_and_splitting_dropped(tmp_path, capsys):
    train(tmp_path / "run", model__name="popularity", data__min_user_interactions=8)
    said = capsys.readouterr().err
    assert "ordered by timestamp" in said and "users dropped (too few interactions)" in said
    assert "training interactions after some test target" in said


def test_clipping_changes_the_steps_unless_it_is_off(tmp_path):
    losses = {
        clip: journal(train(tmp_path / str(clip), optim__clip=clip))[1]["loss"]
        for clip in ("off", 1e6, 1e-9)
    }
    assert losses["off"] == losses[1e6] != losses[1e-9]


def test_ctrl_c_is_one_line_and_exit_code_130(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmrec.train_tcf.train_epoch", interrupted)
    assert train_tcf.main(command(tmp_path / "run")) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("llmrec: interrupted")


def test_label_and_folder_are_named_after_data_model_tower_and_control():
    named = resolve(words({"tower.name": "text", "tower.control": "shuffled"}))["run"]
    assert named["label"] == "sasrec-text-shuffled"
    assert named["folder"] == "runs/simulated-sasrec-text-shuffled-s0"
    assert resolve(words({"model.name": "random"}))["run"]["label"] == "random"


def test_the_same_seed_twice_gives_the_same_run(finished, tmp_path):
    again = train(tmp_path / "again")
    assert per_user(again).equals(per_user(finished))
    assert record(again)["metrics"] == record(finished)["metrics"]
    assert [e["loss"] for e in journal(again)] == [e["loss"] for e in journal(finished)]
    weights = checkpoint(again) / "model.safetensors"
    assert weights.read_bytes() == (checkpoint(finished) / "model.safetensors").read_bytes()


def test_another_seed_gives_another_run(finished, tmp_path):
    other = train(tmp_path / "other", run__seed=1)
    assert journal(other)[0]["loss"] != journal(finished)[0]["loss"]
    assert record(other)["cases"] == record(finished)["cases"]


def test_cutting_a_step_into_pieces_changes_no_weight(tmp_path):
    whole = train(tmp_path / "whole", model__dropout=0)
    pieces = train(tmp_path / "pieces", model__dropout=0, optim__accumulate=3)
    one, three = (load_file(checkpoint(f) / "model.safetensors") for f in (whole, pieces))
    assert one.keys() == three.keys()
    for name, weight in one.items():
        # Moving all keys together changes no attention, so the gradient of the keys' bias is 0 but
        # for rounding, which Adam scales up: that half of the bias is noise.
        real = slice(16, None) if name.endswith("key_value.bias") else slice(None)
        torch.testing.assert_close(three[name][real], weight[real], atol=1e-5, rtol=0)


def test_two_processes_give_the_losses_and_metrics_of_one(tmp_path):
    one = train(tmp_path / "one", model__dropout=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process(
        "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", SCRIPT,
        *command(tmp_path / "two", model__dropout=0), cwd=tmp_path,
    )  # fmt: skip
    two = tmp_path / "two"
    assert record(two)["cases"] == record(one)["cases"]
    assert per_user(two)["user_id"].to_list() == per_user(one)["user_id"].to_list()
    losses = [[entry["loss"] for entry in journal(folder)] for folder in (one, two)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    for part, measures in record(one)["metrics"].items():
        for name, value in measures.items():
            assert mean(two, name, part) == pytest.approx(value["mean"], abs=1e-3), (part, name)


def test_accelerate_launches_the_script_by_path_from_anywhere(tmp_path):
    process(
        "-m", "accelerate.commands.launch", "--cpu", SCRIPT, *words(SMALL), cwd=tmp_path
    )  # fmt: skip
    assert (tmp_path / "runs/simulated-sasrec-id-s0/result.json").is_file()


def test_refitting_trains_on_validation_too_for_the_selected_epochs(finished, tmp_path):
    refitted = train(tmp_path / "refit", run__fit_on="train+valid")
    assert record(refitted)["protocol"]["fit_on"] == "train+valid"
    assert record(finished)["protocol"]["fit_on"] == "train"
    selected = record(refitted)["cost"]["selected_epoch"]
    assert len(journal(refitted, "refit")) == record(refitted)["cost"]["refit_epochs"] == selected
    assert record(refitted)["metrics"]["valid"] == record(finished)["metrics"]["valid"]
    assert record(refitted)["metrics"]["test"] != record(finished)["metrics"]["test"]
    cost, first = record(refitted)["cost"], record(finished)["cost"]
    assert cost["flops"] == first["flops"] + cost["refit_flops"]  # the table's figure covers both
    assert cost["train_seconds"] > cost["refit_train_seconds"] > 0
    check_folder(checkpoint(refitted, "refit"), "")


def test_slices_of_a_refit_count_what_it_learned_from(finished, tmp_path):
    refitted = train(tmp_path / "refit", run__fit_on="train+valid")
    before, after = (per_user(f)["target_train_count"].sum() for f in (finished, refitted))
    assert after > before  # some validation targets are others' test targets


def test_a_refit_has_no_validation_score_in_its_journal(tmp_path):
    refitted = train(tmp_path / "refit", run__fit_on="train+valid")
    assert all("NDCG@10" in entry for entry in journal(refitted))
    assert all("NDCG@10" not in entry for entry in journal(refitted, "refit"))


@pytest.mark.parametrize("measure", ["HR@10", "NDCG@10"])
def test_random_is_the_exact_mean_over_random_orders(tmp_path, measure):
    folder = train(tmp_path / "random", model__name="random")
    candidates = per_user(folder)["candidates"].to_numpy()
    gain = {"HR@10": 10, "NDCG@10": (1 / np.log2(np.arange(2, 12))).sum()}[measure]
    assert mean(folder, measure) == pytest.approx((gain / candidates).mean(), abs=1e-12)
    assert record(folder)["protocol"]["selection"] == "none"


def test_popularity_counts_the_part_it_may_learn_from(tmp_path):
    """Four users, items a to e; all but the last of each: a 4, b 3, c 3, d 1, e 1."""
    data = tmp_path / "tiny.csv"
    sequences = {"1": "abcd", "2": "abce", "3": "abca", "4": "adeb"}
    rows = [f"{user},{item}" for user, items in sequences.items() for item in items]
    data.write_text("\n".join(["user_id,item_id", *rows]) + "\n")
    options = {"data__source": str(data), "data__min_user_interactions": 3}
    both = train(tmp_path / "both", model__name="popularity", run__fit_on="train+valid", **options)
    # Seen items are no candidates: 1 ranks d, e (tied at 2); 2 the same; 3's target a is a repeat
    # and the most popular of a, d, e; 4 ranks b and c, tied at 3.
    shown = per_user(both).select("user_id", "greater", "equal", "candidates").rows()
    assert shown == [("1", 0, 1, 2), ("2", 0, 1, 2), ("3", 0, 0, 3), ("4", 0, 1, 2)]
    assert mean(both, "HR@1") == pytest.approx((0.5 + 0.5 + 1 + 0.5) / 4)
    train_only = train(tmp_path / "train", model__name="popularity", **options)
    # Without validation items: a 4, b 3, c 0, d 1, e 0, so that d now beats e, and b beats c.
    shown = per_user(train_only).select("user_id", "greater", "equal").rows()
    assert shown == [("1", 0, 0), ("2", 1, 0), ("3", 0, 0), ("4", 0, 0)]


def scripted(monkeypatch, places):
    """Validation puts every target at the given place, call by call; returns the parts judged.

    Its last call judges the selected epoch's weights once more, for the result.
    """
    real, parts = train_tcf.evaluate, []

    def evaluate(task, model, part):
        ranking = real(task, model, part)
        parts.append(part)
        if part == "test":
            return ranking
        greater = np.full_like(ranking.greater, places[parts.count("valid") - 1] - 1)
        return Ranking(
            greater, ranking.equal * 0, ranking.candidates, ranking.reachable, ranking.top_items
        )

    monkeypatch.setattr(train_tcf, "evaluate", evaluate)
    return parts


def test_early_stopping_keeps_the_best_epoch_and_scores_the_test_set_once(monkeypatch, tmp_path):
    parts = scripted(monkeypatch, [5, 3, 8, 3, 9, 3])
    folder = train(tmp_path / "run", optim__epochs=6, optim__patience=3)
    # Epoch 2 is the best; 3, 4 (equal is not better) and 5 are not, so epoch 6 never comes.
    assert parts == ["valid"] * (5 + 1) + ["test"]
    assert record(folder)["cost"]["epochs"] == 5
    assert record(folder)["cost"]["selected_epoch"] == 2
    assert mean(folder, "MRR@10", "valid") == pytest.approx(1 / 3)
    assert checkpoint(folder).name == "fit-epoch-002"


def test_a_refit_scores_the_test_set_once_as_well(monkeypatch, tmp_path):
    parts = scripted(monkeypatch, [5, 3, 3])
    train(tmp_path / "run", run__fit_on="train+valid")
    assert parts == ["valid", "valid", "valid", "test"]


def test_the_tested_weights_are_the_selected_epochs(monkeypatch, tmp_path):
    same = {"optim__schedule": "constant", "optim__warmup_share": 0}  # whatever optim.epochs is
    one = train(tmp_path / "one", optim__epochs=1, **same)
    scripted(monkeypatch, [1, 2, 2, 1])
    three = train(tmp_path / "three", optim__epochs=3, **same)
    assert len(journal(three)) == 3
    assert checkpoint(three).name == "fit-epoch-001"
    assert per_user(three).equals(per_user(one))


SAMPLED = {"loss__negatives": 50}
LOSSES = {
    "in_batch": {},
    "bce": SAMPLED,
    "bce shared": SAMPLED | {"loss__share_negatives": True},
    "gbce": SAMPLED,
    "gbce shared": SAMPLED | {"loss__share_negatives": True},
    "sampled_softmax": SAMPLED,
    "sampled_softmax by popularity": SAMPLED
    | {"loss__sampler": "popularity", "loss__correct_positive": True},
}


@pytest.mark.parametrize("case", LOSSES)
def test_every_loss_trains(tmp_path, case):
    named = {"loss__name": case.split()[0], "optim__epochs": 4}
    folder = train(tmp_path / "run", **named, **LOSSES[case])
    losses = [entry["loss"] for entry in journal(folder)]
    assert losses[-1] < losses[0]


def test_tf_idf_needs_no_language_model(tmp_path):
    options = {"tower__name": "text", "tower__control": "tfidf", "encoder__model": "no/such-model"}
    folder = train(tmp_path / "run", **options)
    assert record(folder)["cost"]["encoder"] == {"model": "TF-IDF", "weights": "TF-IDF"}
    shuffled = record(train(tmp_path / "id"))["metrics"]["test"]
    assert record(folder)["metrics"]["test"] != shuffled


def test_a_run_says_what_it_recommends_and_to_whom(finished):
    users = per_user(finished)
    lists = users["top_item_ids"].to_list()
    assert all(len(items) == len(set(items)) == 10 for items in lists)
    hits = [target in items for target, items in zip(users["target_item_id"], lists, strict=True)]
    assert hits == [value == 1 for value in users["HR@10"]]  # no ties among these scores
    assert users["target_repeated"].any() and not users["target_repeated"].all()
    assert users["target_has_text"].any()
    beyond = record(finished)["beyond_accuracy"]
    shown = {item for items in lists for item in items}
    assert beyond["coverage"] == len(shown) / record(finished)["protocol"]["candidates"]


def test_a_temporal_split_runs_and_its_candidates_are_those_seen_before(tmp_path):
    folder = train(tmp_path / "temporal", split__method="temporal")
    protocol = record(folder)["protocol"]
    assert protocol["split"] == "temporal"
    assert protocol["valid_candidates"] <= protocol["candidates"] < record(folder)["data"]["items"]


def test_text_and_its_controls_run_from_one_store(tiny_models, tmp_path):
    options = {"encoder__model": str(tiny_models["bert"]), "run__store": str(tmp_path / "store")}
    text = train(tmp_path / "text", tower__name="text", **options)
    both = train(tmp_path / "both", tower__name="id_text", **options)
    shuffled = train(
        tmp_path / "shuffled", tower__name="text", tower__control="shuffled", **options
    )
    costs = [record(folder)["cost"] for folder in (text, both, shuffled)]
    assert [cost["encode_encoded_now"] > 0 for cost in costs] == [True, False, False]
    assert costs[0]["encode_tokens"] == costs[2]["encode_tokens"] > 0
    assert costs[0]["encoder"]["layers_run"] == 3
    assert len({str(per_user(folder)["greater"].to_list()) for folder in (text, shuffled)}) == 2
    assert record(text)["cases"] == record(shuffled)["cases"]


def test_curves_are_written_for_tensorboard_when_asked_for(finished, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert not list(finished.glob("events.*"))
    folder = train(tmp_path / "run", run__tensorboard=True)
    events = accumulator.EventAccumulator(str(folder)).Reload()
    values = [point.value for point in events.Scalars("fit/loss")]
    np.testing.assert_allclose(values, [entry["loss"] for entry in journal(folder)], rtol=1e-6)
    assert len(events.Scalars("fit/NDCG@10")) == 2


def test_runs_of_one_process_may_differ_in_precision(tmp_path):
    train(tmp_path / "fp32", run__precision="fp32")
    train(tmp_path / "bf16", run__precision="bf16")


def test_an_unfinished_run_is_replaced_with_all_it_left(finished, tmp_path):
    folder = train(tmp_path / "run", run__fit_on="train+valid", run__tensorboard=True)
    (folder / "result.json").unlink()  # as if it had been killed
    train(folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished.iterdir()}
    assert per_user(folder).equals(per_user(finished))


def test_a_finished_run_is_replaced_only_on_request(finished, tmp_path):
    folder = train(tmp_path / "run", run__seed=3)
    train(folder, run__overwrite=True)
    assert per_user(folder).equals(per_user(finished))


REAL = {  # HR@10 and NDCG@10, popularity counted on all but the last item
    "ml-1m": (0.0363, 0.0178),
    "amazon-beauty-2014": (0.0136, 0.0061),
    "amazon-games-2018": (0.0123, 0.0065),
}


@pytest.mark.real_data
@pytest.mark.parametrize("name", REAL)
def test_popularity_on_real_data_is_the_protocols(data_root, tmp_path, name):
    if not (data_root / name).is_dir():
        pytest.skip(f"no real data: {data_root} holds no {name}")
    options = {
        "model.name": "popularity", "run.fit_on": "train+valid", "run.folder": str(tmp_path / name),
        "data.source": str(data_root / name),
    }  # fmt: skip
    assert train_tcf.main(words(options)) == 0
    found = tuple(round(mean(tmp_path / name, measure), 4) for measure in ("HR@10", "NDCG@10"))
    assert found == REAL[name]


@pytest.mark.real_data
@pytest.mark.parametrize("model", ["popularity", "sasrec"])
def test_ml_100k_runs_through_the_recbole_reader_split_in_time(data_root, tmp_path, model):
    if not (data_root / "ml-100k").is_dir():
        pytest.skip(f"no real data: {data_root} holds no ml-100k")
    folder = train(
        tmp_path / model, model__name=model, data__source=str(data_root / "ml-100k"),
        data__item_text="movielens_atomic", split__method="temporal", optim__epochs=1,
        optim__batch_size=128,
    )  # fmt: skip
    kept = record(folder)
    assert kept["data"]["counts"]["interactions_read"] == 100_000
    assert 0 < kept["cases"]["count"] == len(per_user(folder)) < 943
    assert 0 < mean(folder, "HR@10") < 1

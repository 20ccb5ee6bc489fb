"""One process or two: the same losses, the same users, and never fewer than were asked for."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faults import run
from small_runs import command, journal, per_user, record

SCRIPT = str(Path(__file__).resolve().parents[1] / "llmrec" / "train_tcf.py")
SAMPLED = {"loss__negatives": 8}
LOSSES = {
    "full_softmax": {},
    "bce": SAMPLED,
    "gbce": SAMPLED | {"loss__share_negatives": True},
    "sampled_softmax": SAMPLED | {"loss__sampler": "popularity"},
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_curve_of_two_processes_is_that_of_one(tmp_path, name, accumulate, figure):
    options = {"loss__name": name, "optim__epochs": 3, "model__dropout": 0, **LOSSES[name]}
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(command(one, **options))[0] == [0]
    cut = command(two, optim__accumulate=accumulate, **options)
    assert run(cut, processes=2)[0] == [0, 0]
    losses = [np.array([entry["loss"] for entry in journal(folder)]) for folder in (one, two)]
    furthest = float(np.abs(losses[1] / losses[0] - 1).max())
    figure(
        f"relative loss difference, {name}, 2 processes x {accumulate} pieces", f"{furthest:.1e}"
    )
    assert furthest < 1e-5
    assert per_user(one).equals(per_user(two))


def test_a_last_batch_with_fewer_users_than_processes_and_pieces_moves_no_loss(tmp_path, figure):
    # 61 users in batches of 20: the last step has 1 user for 2 processes of 3 pieces.
    options = {"optim__epochs": 3, "optim__batch_size": 20, "model__dropout": 0}
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(command(one, **options))[0] == [0]
    assert run(command(two, optim__accumulate=3, **options), processes=2)[0] == [0, 0]
    losses = [np.array([entry["loss"] for entry in journal(folder)]) for folder in (one, two)]
    furthest = float(np.abs(losses[1] / losses[0] - 1).max())
    figure("relative loss difference where the last step has 1 user", f"{furthest:.1e}")
    assert furthest < 1e-5


@pytest.mark.parametrize("name", ["sasrec", "popularity", "random"])
def test_an_odd_number_of_users_is_judged_alike_by_one_and_two_processes(tmp_path, name, figure):
    # A rate too small to move a weight: both judge the very same model.
    options = {"model__name": name, "optim__lr": 1e-30, "evaluation__block_megabytes": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(command(one, **options))[0] == [0]
    assert run(command(two, **options), processes=2)[0] == [0, 0]
    assert len(per_user(one)) == per_user(one)["user_id"].n_unique() == 61
    same = [a == b for a, b in zip(per_user(one).rows(), per_user(two).rows(), strict=True)]
    figure(f"users of {name} judged alike by 1 and 2 processes", f"{sum(same)} of {len(same)}")
    assert all(same)
    assert record(one)["metrics"] == record(two)["metrics"]


@pytest.mark.parametrize("name", ["sasrec", "bm25"])
def test_candidate_lists_are_judged_alike_by_one_and_two_processes(tmp_path, name):
    options = {"model__name": name, "optim__lr": 1e-30, "evaluation__pool__size": 20}
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(command(one, **options))[0] == [0]
    assert run(command(two, **options), processes=2)[0] == [0, 0]
    assert per_user(one).equals(per_user(two))
    lists = [(folder / "candidates.parquet").read_bytes() for folder in (one, two)]
    assert lists[0] == lists[1]
    assert record(one)["protocol"] == record(two)["protocol"]


def launched(*words, **environment):
    """A program of its own, from the shell's environment."""
    named = {**os.environ, **environment}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            named.pop(name, None)
    return subprocess.run(
        [sys.executable, *words], env=named, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip


def test_a_launcher_that_starts_fewer_processes_than_asked_for_is_refused(tmp_path, figure):
    folder = tmp_path / "run"
    done = launched(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", SCRIPT, *command(folder)
    )  # fmt: skip
    figure("exit code of accelerate launch --cpu --num_processes 2", done.returncode)
    assert done.returncode != 0 and not folder.exists()
    assert "asked for several processes but started one" in done.stderr
    assert "torchrun --nproc_per_node" in done.stderr


def test_a_world_size_that_did_not_come_about_is_refused(tmp_path, monkeypatch, capsys):
    from llmrec import train_tcf

    monkeypatch.setenv("WORLD_SIZE", "3")  # without RANK nobody joins
    assert train_tcf.main(command(tmp_path / "run")) == 2
    assert "WORLD_SIZE=3 is set but this process has no RANK" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

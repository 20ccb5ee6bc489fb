"""Every user model through the whole of a run: it learns a planted rule, and goes with the rest."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from faults import KILLED, Fault, run
from small_runs import command, journal, mean, per_user, record, refusal, train

CHAIN, GROUPS, GROUP = 40, 12, 8
READS_ORDER = ("sasrec", "bert4rec", "gru4rec", "nextitnet")
READS_NO_ORDER = ("dssm_history", "dssm", "mf", "lightgcn")
LEARNING = {
    "model__width": 32,
    "model__dropout": 0.0,
    "optim__epochs": 8,
    "optim__lr": 1e-2,
    "optim__patience": 8,
    "optim__batch_size": 32,
    "data__min_user_interactions": 2,
}


def write(path: Path, histories: list[list[int]]) -> Path:
    """Histories as a table, in the order of its rows."""
    rows = [f"u{user},i{item}" for user, items in enumerate(histories) for item in items]
    path.write_text("\n".join(["user_id,item_id", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Each item has one successor, all in a ring of 40; users enter it anywhere, for 5 to 12."""
    rng = np.random.default_rng(0)
    ring = rng.permutation(CHAIN)
    starts, lengths = rng.integers(0, CHAIN, 600), rng.integers(5, 13, 600)
    histories = [
        [int(ring[(start + step) % CHAIN]) for step in range(length)]
        for start, length in zip(starts, lengths, strict=True)
    ]
    return write(tmp_path_factory.mktemp("chain") / "chain.csv", histories)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Each user takes all 8 items of one of 12 groups, in any order; so the last one is clear."""
    rng = np.random.default_rng(0)
    histories = [
        [GROUP * group + int(item) for item in rng.permutation(GROUP)]
        for group in np.arange(600) % GROUPS
    ]
    return write(tmp_path_factory.mktemp("groups") / "groups.csv", histories)


@pytest.mark.parametrize("name", READS_ORDER)
def test_a_model_that_reads_order_learns_what_follows_what(name, chain, tmp_path):
    masked = {"optim__epochs": 16} if name == "bert4rec" else {}  # a fifth of the targets an epoch
    options = LEARNING | masked
    folder = train(tmp_path / "run", data__source=str(chain), model__name=name, **options)
    assert mean(folder, "HR@1") >= 0.95
    assert journal(folder)[-1]["loss"] < journal(folder)[0]["loss"]


@pytest.mark.parametrize("name", READS_NO_ORDER)
def test_a_model_learns_what_goes_together(name, groups, tmp_path):
    folder = train(tmp_path / "run", data__source=str(groups), model__name=name, **LEARNING)
    assert mean(folder, "HR@1") >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", READS_NO_ORDER)
def test_a_model_without_order_cannot_learn_what_follows_what(name, chain, tmp_path):
    """The control: else the rule would tell nothing of order."""
    folder = train(tmp_path / "run", data__source=str(chain), model__name=name, **LEARNING)
    assert mean(folder, "HR@1") < 0.95


def test_an_option_of_another_model_is_refused(tmp_path):
    said = refusal(tmp_path / "run", model__name="gru4rec", model__norm="pre")
    assert "model.norm=pre means nothing to model.name=gru4rec" in said
    assert not (tmp_path / "run").exists()


OTHERS = {  # what of two processes must be equal: negatives of both, masks, the graph
    "bert4rec": "in_batch",
    "gru4rec": "full_softmax",
    "nextitnet": "bce",
    "dssm_history": "sampled_softmax",
    "dssm": "in_batch",
    "mf": "bpr",
    "lightgcn": "in_batch",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_learn_as_one(name, tmp_path, figure):
    one, two = tmp_path / "one", tmp_path / "two"
    options = {"model__name": name, "loss__name": OTHERS[name], "model__dropout": 0.0}
    assert run(command(one, **options))[0] == [0]
    assert run(command(two, **options), processes=2)[0] == [0, 0]
    losses = [np.array([entry["loss"] for entry in journal(folder)]) for folder in (one, two)]
    furthest = float(np.abs(losses[1] / losses[0] - 1).max())
    figure(f"relative loss difference of two processes, {name}", f"{furthest:.1e}")
    assert furthest < 1e-5
    assert per_user(one).equals(per_user(two))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(name, tmp_path):
    options = {
        "model__name": name, "loss__name": OTHERS[name], "run__checkpoint_steps": 1,
        "run__fit_on": "train+valid",
    }  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, **options)
    assert run(command(killed, **options), Fault("forward", 6))[0] == [KILLED]  # of 4 an epoch
    train(killed, **options)
    for stage in ("fit", "refit"):
        losses = [[e["loss"] for e in journal(folder, stage)] for folder in (whole, killed)]
        assert losses[0] == losses[1]
    assert per_user(whole).equals(per_user(killed))
    assert record(whole)["cost"]["flops"] == record(killed)["cost"]["flops"]


@pytest.mark.parametrize(
    "name", ["lightgcn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dssm", "mf"))]
)
def test_a_user_never_trained_on_does_as_well_as_at_random_and_is_counted(name, tmp_path):
    """Of 40 users, two begin after the cut: their test cases have all items tied."""
    rows = ["user_id,item_id,timestamp"]
    for user in range(40):
        start = 100 if user < 38 else 950
        rows += [f"u{user},i{(user + step) % 12},{start + 20 * step + user}" for step in range(8)]
        rows += [f"u{user},i{(user + 9) % 12},{start + 2000 + user}"]
    (tmp_path / "late.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    folder = train(
        tmp_path / "run", data__source=str(tmp_path / "late.csv"), model__name=name,
        split__method="temporal", data__min_user_interactions=2,
    )  # fmt: skip
    late = per_user(folder).filter(pl.col("user_id").is_in(["u38", "u39"]))
    assert record(folder)["cost"]["unknown_test_users"] == len(late) == 2
    assert (late["greater"] == 0).all() and (late["equal"] > 2).all()
    others = per_user(folder).filter(~pl.col("user_id").is_in(["u38", "u39"]))
    assert (others["equal"] == 0).all()

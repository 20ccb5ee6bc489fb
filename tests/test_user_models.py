"""Every user model through the whole of a run: it learns a planted rule, and goes with the rest."""

from pathlib import Path

import numpy as np
import pytest
from small_runs import journal, mean, refusal, train

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


@pytest.mark.parametrize("name", READS_NO_ORDER)
def test_a_model_without_order_cannot_learn_what_follows_what(name, chain, tmp_path):
    """The control: else the rule would tell nothing of order."""
    folder = train(tmp_path / "run", data__source=str(chain), model__name=name, **LEARNING)
    assert mean(folder, "HR@1") < 0.95


def test_an_option_of_another_model_is_refused(tmp_path):
    said = refusal(tmp_path / "run", model__name="gru4rec", model__norm="pre")
    assert "model.norm=pre means nothing to model.name=gru4rec" in said
    assert not (tmp_path / "run").exists()

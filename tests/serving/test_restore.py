"""A finished run's folder gives back the recommender that its figures come from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from exports import CPU, train
from rich.console import Console
from small_runs import per_user
from tiny_models import save_tiny_model

from llmrec.assembly import Restored, restore
from llmrec.data.splits import split
from llmrec.errors import UsageError
from llmrec.launch import start
from llmrec.train_tcf import Task, evaluate


def ranks(restored: Restored) -> list[int]:
    """For each test user, how many candidates score above the target."""
    cut = split(restored.dataset, restored.config.split)
    task = Task(restored.config, restored.dataset, cut, {}, start("fp32"), Console(quiet=True))
    return [int(count) for count in evaluate(task, restored.recommender, "test").greater]


@pytest.mark.parametrize(
    "kind", ["ids", "ids, trained again on both parts", "frozen beside ids", "lora", "top:1"]
)
def test_a_restored_run_ranks_every_test_user_as_the_run_did(
    kind: str, run_of: Callable[[str], Path]
) -> None:
    restored = restore(run_of(kind), CPU)
    assert ranks(restored) == per_user(run_of(kind))["greater"].to_list()
    assert not restored.recommender.training


def test_other_weights_would_rank_otherwise(run_of: Callable[[str], Path]) -> None:
    restored = restore(run_of("ids"), CPU)
    restored.recommender.tower.get_parameter("table.weight").data.neg_()
    assert ranks(restored) != per_user(run_of("ids"))["greater"].to_list()


def change_data(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("users: 61", "users: 62"))


def change_model(run: Path) -> None:
    model = Path(json.loads((run / "result.json").read_text())["config"]["encoder"]["model"])
    (model / "more.txt").write_text("another vocabulary")


def lose_weights(run: Path) -> None:
    next((run / "checkpoints").glob("*/model.safetensors")).unlink()


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model is its own."""
    folder = tmp_path_factory.mktemp("restore")
    model = save_tiny_model("bert", folder / "model")
    return train(folder / "run", tower__name="text", encoder__model=str(model))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (change_data, r"data\.source=simulated no longer holds the data that"),
        (lose_weights, r"model\.safetensors is missing"),
        (lambda run: (run / "result.json").unlink(), "holds no finished run"),
        (lambda run: (run / "config.yaml").unlink(), r"config\.yaml cannot be read"),
        (change_model, "no longer holds the files that"),  # last: for good
    ],
)
def test_a_run_whose_parts_have_changed_is_refused_in_one_sentence(
    damage: Callable[[Path], object], sentence: str, text_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(text_run, tmp_path / "run"))
    damage(run)
    with pytest.raises(UsageError, match=sentence):
        restore(run, CPU)


def test_a_baseline_has_nothing_to_restore(run_of: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=r"model\.name=popularity, which has no trained weights"):
        restore(run_of("popularity"), CPU)

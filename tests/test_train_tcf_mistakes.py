"""Each mistake: one sentence on stderr that names the way out, exit code 2, no run folder."""

import re
import sys

import pytest
import torch
import yaml
from small_runs import command, refusal, train

from llmrec import launch, train_tcf, training
from llmrec.encoders import store

ROWS = [f"u{user},i{(user + step) % 7},{step}" for user in range(6) for step in range(6)]


def table(folder, header="user_id,item_id,position", rows=ROWS):
    """A csv of six users with six interactions each, or other content."""
    path = folder / "small.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def check(said, *expected):
    """One line of `llmrec: ...` behind what the run said of itself before."""
    line = said.rstrip("\n").splitlines()[-1]
    assert line.startswith("llmrec: ") and line.endswith((".", "?", ")"))
    assert said.count("llmrec: ") == 1 and "Traceback" not in said
    for words in expected:
        assert words in line, line


MISTAKES = {
    "a missing file": ({"data__source": "nowhere.csv"}, ["nowhere.csv", "LLMREC_DATA"]),
    "an unknown option": ({"tower__nme": "id"}, ["--tower.nme", "did you mean tower.name?"]),
    "a negative seed": ({"run__seed": -1}, ["run.seed=-1"]),
    "negative weight decay": ({"optim__weight_decay": -1}, ["optim.weight_decay=-1"]),
    "no heads": ({"model__heads": 0}, ["model.heads=0 must be at least 1"]),
    "a control of text without text": ({"tower__control": "shuffled"}, ["tower.name=id does not"]),
    "a group instead of an option": ({"tower": "id"}, ["--tower is a group"]),
    "a wrong type": ({"optim__epochs": "many"}, ["--optim.epochs got many", "int"]),
    "an unknown choice": ({"loss__name": "hinge"}, ["--loss.name got hinge", "full_softmax"]),
    "an unknown measure": ({"run__select": "NDGC@10"}, ["NDGC@10", "did you mean NDCG@10?"]),
    "an unknown template": ({"data__item_text": "titel"}, ["titel", "did you mean title?"]),
    "no survivor": ({"data__min_user_interactions": 500}, ["=500 leaves nobody", "lower it"]),
    "heads that do not divide": ({"model__heads": 3}, ["model.width=16", "model.heads=3"]),
    "no epoch": ({"optim__epochs": 0}, ["optim.epochs=0 must be at least 1"]),
    "pieces without a user": (
        {"optim__accumulate": 4, "optim__batch_size": 3},
        ["optim.accumulate=4", "Lower optim.accumulate"],
    ),
    "an encoder that is nowhere": (
        {"tower__name": "text", "encoder__model": "no-such/model"},
        ["no-such/model", "no local folder", "without a network"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path, mistake):
    changes, expected = MISTAKES[mistake]
    said = refusal(tmp_path / "run", run__store=str(tmp_path / "store"), **changes)
    check(said, *expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"header": "user_id,film,position"}, ["item_id", "data.item_column"]),
        ({"header": "visitor,item_id,position"}, ["user_id", "data.user_column"]),
        ({"rows": []}, ["small.csv"]),
        ({"header": "", "rows": []}, ["small.csv"]),
    ],
    ids=["no item column", "no user column", "an empty catalogue", "an empty file"],
)
def test_data_that_cannot_be_used_leaves_nothing(tmp_path, content, expected):
    source = table(tmp_path, **content)
    check(refusal(tmp_path / "run", data__source=source), *expected)
    assert not (tmp_path / "run").exists()


def test_users_with_one_training_interaction_each_leave_nothing_to_learn(tmp_path):
    source = table(tmp_path, rows=[row for row in ROWS if row[-1] in "012"])
    changes = {"data__source": source, "data__min_user_interactions": 3}
    check(refusal(tmp_path / "run", **changes), "no user has two interactions to train on")
    assert not (tmp_path / "run").exists()


def test_a_catalogue_without_text_has_no_text_tower(tmp_path):
    changes = {"data__source": table(tmp_path), "tower__name": "text"}
    check(refusal(tmp_path / "run", **changes), "none of the 7 items has a text", "tower.name=id")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layers", [0, 4])
def test_a_layer_out_of_range_leaves_nothing(tiny_models, tmp_path, layers):
    said = refusal(
        tmp_path / "run", tower__name="text", run__store=str(tmp_path / "store"),
        encoder__model=str(tiny_models["bert"]), encoder__layers=layers,
    )  # fmt: skip
    check(said, f"encoder.layers={layers}", "has 3. Use 1..3")
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_leaves_no_result_and_no_checkpoint(tmp_path):
    check(refusal(tmp_path / "run", optim__lr="1e30"), "not finite in epoch 1", "optim.lr=1e+30")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.yaml", "fit-journal.jsonl"}


def test_a_finished_run_is_not_overwritten(tmp_path):
    folder = train(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = refusal(folder, run__seed=1)
    check(said, "holds a finished run", "--run.folder", "--run.overwrite true")
    assert said.count("\n") == 1  # before any work
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_failure_while_preparing_keeps_the_run_that_was_to_be_replaced(tmp_path):
    folder = train(tmp_path / "run")
    changes = {"tower__name": "text", "encoder__model": "no-such/model", "run__overwrite": True}
    check(refusal(folder, **changes), "no-such/model")
    assert (folder / "result.json").is_file()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    check(refusal(tmp_path / "run", run__overwrite=True), "not empty and holds no run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_misspelt_option_in_a_file_names_the_file_and_the_nearest(tmp_path, capsys):
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump({"tower": {"nam": "id"}}))
    assert train_tcf.main(["--config", str(file), "--run.folder", str(tmp_path / "run")]) == 2
    check(capsys.readouterr().err, str(file), "tower.nam", "did you mean tower.name?")


def test_curves_without_tensorboard_name_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    check(refusal(tmp_path / "run", run__tensorboard=True), "pip install 'llmrec[report]'")
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_join_are_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(
        launch, "Accelerator", lambda **options: type("One", (), {"num_processes": 1})
    )
    check(refusal(tmp_path / "run"), "2 processes were launched but 1 joined")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_said_before_anything_is_encoded(tiny_models, tmp_path, capsys):
    words = ["--device=cuda", f"--store={tmp_path / 'store'}", "--data.simulated.items=240"]
    assert store.main([*words, f"--encoder.model={tiny_models['bert']}"]) == 2
    check(capsys.readouterr().err, "device=cuda is not usable here. Use auto or cpu")
    assert not list(tmp_path.iterdir())


def test_help_lists_every_option_and_is_no_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        train_tcf.main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for word in command(tmp_path):
        assert re.match(r"--[\w.]+", word)[0] in shown
    assert "Traceback" not in shown and sys.exc_info()[0] is None

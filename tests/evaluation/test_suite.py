import json
from pathlib import Path

import numpy as np
import pytest
import small_runs
import yaml
from test_result import facts, tiny

from llmrec import train_tcf
from llmrec.data import readers
from llmrec.encoders import loading as encoders
from llmrec.evaluation.result import build_result, write_result
from llmrec.evaluation.suite import main, read_suite
from llmrec.options import as_dict

WEIGHTS = "0" * 64


@pytest.fixture
def trained(monkeypatch):
    """A train entry point that writes a made-up result; gives the list of its calls."""
    calls = []

    def train(argv):
        named = dict(word.removeprefix("--").split("=", 1) for word in argv)
        calls.append(named)
        if named["run.label"] == "breaks":
            raise RuntimeError("out of memory")
        if named["run.label"] == "refuses":
            return 2
        cost = {"encoder": {"weights": WEIGHTS}} if named["tower.name"] == "text" else {}
        label, seed, config = (
            named["run.label"],
            int(named["run.seed"]),
            as_dict(train_tcf.configure(argv)),
        )
        result = build_result(facts(label=label, seed=seed, config=config, cost=cost), *tiny())
        write_result(Path(named["run.folder"]), result)
        return 0

    monkeypatch.setattr(train_tcf, "run", train)
    monkeypatch.setattr(readers, "load_dataset", lambda config: tiny()[0])
    place = encoders.Location("made-up", "", WEIGHTS)
    monkeypatch.setattr(encoders, "locate", lambda config: place)
    return calls


@pytest.fixture
def suite(tmp_path):
    """Writes a suite of the given content beside an out folder; gives its path."""

    def write(**changes):
        content = {
            "title": "tiny", "baseline": "ID", "measures": ["HR@10"], "seeds": [0, 1],
            "base": {"optim": {"epochs": 2}}, "out": str(tmp_path / "out"),
            "rows": {"ID": {"tower.name": "id"}, "text": {"tower": {"name": "text"}}},
            "contrasts": [["text", "ID"]],
        }  # fmt: skip
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return str(path)

    return write


def test_every_row_is_trained_at_every_seed_and_the_table_is_written(suite, trained, tmp_path):
    assert main([suite()]) == 0
    assert [(c["run.label"], c["run.seed"]) for c in trained] == [
        ("ID", "0"), ("ID", "1"), ("text", "0"), ("text", "1"),
    ]  # fmt: skip
    assert trained[2]["optim.epochs"] == "2"
    assert trained[2]["tower.name"] == "text"
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["seeds"] for row in table["rows"]] == [[0, 1], [0, 1]]
    assert "| text - ID |" in (tmp_path / "out" / "table.md").read_text()


def test_finished_cells_are_kept(suite, trained):
    path = suite()
    main([path])
    assert main([path]) == 0
    assert len(trained) == 4


def test_cells_are_kept_when_no_number_can_have_changed(suite, trained, tmp_path):
    path = suite()
    main([path])
    words = [
        "--run.store", "elsewhere", "--run.tensorboard", "true", "--loss.chunk_megabytes", "64",
        "--evaluation.block_megabytes", "4", "--encoder.batch_tokens", "9",
    ]  # fmt: skip
    (tmp_path / "out").rename(tmp_path / "moved")
    assert main([path, *words, "--out", str(tmp_path / "moved")]) == 0
    assert len(trained) == 4


def test_finished_runs_of_another_config_are_refused_before_any_training(suite, trained, capsys):
    main([suite(seeds=[0])])
    capsys.readouterr()
    assert main([suite(), "--optim.epochs", "3"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("llmrec: 2 runs come from another config or data in ")
    assert "(first difference: optim.epochs 2 -> 3). Give other runs another --out" in shown
    assert shown.endswith("or replace these with --overwrite.\n")
    assert len(trained) == 2


def test_with_overwrite_those_alone_are_replaced(suite, trained):
    rows = {"ID": {"tower.name": "id"}, "text": {"tower.name": "text"}}
    main([suite(rows=rows)])
    rows["text"]["optim.lr"] = 0.1
    assert main([suite(rows=rows), "--overwrite"]) == 0
    assert [call["run.label"] for call in trained[4:]] == ["text", "text"]
    assert all(call["run.overwrite"] == "true" for call in trained[4:])


def test_an_unfinished_cell_is_trained_again_without_asking(suite, trained, tmp_path):
    path = suite()
    main([path])
    (tmp_path / "out" / "ID-0" / "result.json").unlink()
    assert main([path, "--optim.clip", "1.0"]) == 0  # the default, so the same config
    assert len(trained) == 5
    assert "run.overwrite" not in trained[-1]


@pytest.mark.parametrize(
    ("changed", "runs", "difference"),
    [
        ("data", "4 runs come", "data fingerprint {old:.12} -> {new:.12})"),
        ("encoder", "2 runs come", "encoder weights 000000000000 -> 111111111111)"),
    ],
)
def test_finished_runs_on_other_data_or_another_encoder_are_refused(
    suite, trained, capsys, monkeypatch, changed, runs, difference
):
    main([suite()])
    dataset = tiny()[0]
    old = dataset.fingerprint()
    if changed == "data":
        dataset.user_ids[0] = "another"
        monkeypatch.setattr(readers, "load_dataset", lambda config: dataset)
    else:
        place = encoders.Location("made-up", "", "1" * 64)
        monkeypatch.setattr(encoders, "locate", lambda config: place)
    capsys.readouterr()
    assert main([suite()]) == 2
    shown = capsys.readouterr().err
    assert runs in shown
    assert difference.format(old=old, new=dataset.fingerprint()) in shown
    assert len(trained) == 4


def test_each_data_set_is_read_once(suite, trained, monkeypatch):
    read = []
    monkeypatch.setattr(readers, "load_dataset", lambda c: read.append(c.source) or tiny()[0])
    rows = {"ID": {"tower.name": "id"}, "text": {"tower.name": "text", "data.source": "b"}}
    assert main([suite(rows=rows)]) == 0
    assert read == ["simulated", "b"]


def write_csv(path, seed):
    """20 users with 6 of 30 items each, in an order that `seed` decides."""
    rng = np.random.default_rng(seed)
    met = [(f"u{user}", f"i{item}") for user in range(20) for item in rng.permutation(30)[:6]]
    path.write_text("user_id,item_id\n" + "".join(f"{user},{item}\n" for user, item in met))


def test_real_runs_are_kept_until_their_csv_changes(suite, tmp_path, capsys):
    source = tmp_path / "mine.csv"
    write_csv(source, seed=0)
    base = small_runs.SMALL | {"data.source": str(source), "optim.epochs": 1}
    rows = {"random": {"model.name": "random"}, "popularity": {"model.name": "popularity"}}
    path = suite(base=base, rows=rows | {"ID": {}}, contrasts=[], seeds=[0])
    folders = [tmp_path / "out" / f"{label}-0" for label in (*rows, "ID")]

    def written():
        return [(folder / "result.json").stat().st_mtime_ns for folder in folders]

    assert main([path]) == 0
    first, data = written(), small_runs.record(folders[0])["data"]["fingerprint"]
    assert main([path]) == 0
    assert written() == first

    write_csv(source, seed=1)
    capsys.readouterr()
    assert main([path]) == 2
    shown = capsys.readouterr().err
    assert f"3 runs come from another config or data in {tmp_path / 'out'} (" in shown
    assert f"data fingerprint {data[:12]} -> " in shown
    assert written() == first

    assert main([path, "--overwrite"]) == 0
    assert all(new > old for new, old in zip(written(), first, strict=True))
    found = {small_runs.record(folder)["data"]["fingerprint"] for folder in folders}
    assert len(found) == 1
    assert data not in found


def test_missing_data_is_one_sentence_before_any_training(repository, tmp_path, capsys):
    words = ["--data.source", "nope.csv", "--out", str(tmp_path / "out")]
    assert main([str(repository / "eval" / "quickstart.yaml"), *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("llmrec: data.source=nope.csv is neither in the working dir")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_a_damaged_cell_is_trained_again(suite, trained, tmp_path):
    path = suite()
    main([path])
    (tmp_path / "out" / "ID-0" / "result.json").write_text("{")
    assert main([path]) == 0
    assert len(trained) == 5


def test_the_command_line_wins_over_every_row_and_moves_the_runs(suite, trained, tmp_path):
    other = tmp_path / "mine"
    options = ["--data.source", "my.csv", "--out", str(other), "--seeds=7", "--tower.name=id"]
    assert main([suite(), *options]) == 0
    assert {call["data.source"] for call in trained} == {"my.csv"}
    assert {call["tower.name"] for call in trained} == {"id"}
    assert sorted(p.name for p in other.iterdir()) == ["ID-7", "table.json", "table.md", "text-7"]


@pytest.mark.parametrize("bad", ["breaks", "refuses"])
def test_a_failed_cell_is_shown_and_the_rest_goes_on(suite, trained, capsys, tmp_path, bad):
    rows = {label: {"tower.name": "id"} for label in (bad, "ID")}
    assert main([suite(rows=rows | {"text": {"tower.name": "text"}}, seeds=[0])]) == 1
    shown = capsys.readouterr().out
    assert f"{bad}, seed 0 failed" in shown
    assert f"Failed and not in the table: {bad}, seed 0" in shown
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())["rows"]) == 2
    written = (tmp_path / "out" / "table.md").read_text()
    assert f"Failed and not in the table: {bad}, seed 0" in written


def test_without_its_baseline_there_is_no_table(suite, trained, capsys):
    rows = {label: {"tower.name": "id"} for label in ("breaks", "ID")}
    assert main([suite(rows=rows, baseline="breaks", contrasts=[])]) == 1
    assert "the baseline breaks failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words", "sentence"),
    [
        ({"titel": "x"}, [], "unknown key titel: did you mean title?"),
        ({"baseline": "IDD"}, [], "did you mean ID?"),
        ({"rows": None}, [], "has no rows"),
        ({"rows": {}}, [], "has no rows"),
        ({"rows": {"ID": 3}}, [], "rows.ID must be options of a command, not 3"),
        ({"base": ["x"]}, [], "base must be options of a command"),
        ({"measures": "HR@10"}, [], "measures must be a list of names"),
        ({"measures": []}, [], "measures must be a list of names"),
        ({"rows": {"ID": {}, "a b": {}, "a/b": {}}, "contrasts": []}, [], "share the folder"),
        ({"seeds": [0, 0]}, [], "distinct whole numbers"),
        ({"seeds": 3}, [], "distinct whole numbers"),
        ({"contrasts": ["text"]}, [], "pairs of labels"),
        ({"measures": ["HR"]}, [], "Unknown measure"),
        ({}, ["--seed", "3"], "Unknown option --seed: did you mean seeds?"),
        ({"seeds": [-1, 0]}, [], "distinct whole numbers from 0 on"),
        ({}, ["--seeds", "0,-1"], "distinct whole numbers from 0 on"),
        ({}, ["--seeds", "one"], "distinct whole numbers from 0 on"),
        ({}, ["--run.seed", "3"], "The command line sets run.seed"),
        ({}, ["--run.seed=3"], "use --seeds"),
        ({}, ["--run.label", "mine"], "use the labels of the suite's rows"),
        ({}, ["--run.folder", "mine"], "use --out"),
        ({}, ["--run.overwrite=true"], "use --overwrite"),
        ({"base": {"run": {"seed": 3}}}, [], "suite.yaml sets run.seed"),
        ({"rows": {"ID": {}, "text": {"run.label": "x"}}}, [], "suite.yaml sets run.label"),
        ({}, ["--overwrite=yes"], "Unknown option --overwrite=yes: did you mean overwrite?"),
        ({}, ["--optim.epoch", "3"], "unknown option --optim.epoch: did you mean optim.epochs?"),
        ({}, ["--optim.lr"], "--optim.lr needs a value"),
        ({}, ["oops"], "Unexpected 'oops'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_trained(
    suite, trained, capsys, changes, words, sentence
):
    assert main([suite(**changes), *words]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert not trained


def test_a_missing_suite_and_a_broken_one_are_named(tmp_path, capsys):
    assert main([str(tmp_path / "none.yaml")]) == 2
    (tmp_path / "broken.yaml").write_text("rows: [")
    assert main([str(tmp_path / "broken.yaml")]) == 2
    shown = capsys.readouterr().err
    assert "none.yaml cannot be read" in shown
    assert "is not YAML" in shown


def test_a_shipped_suite_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_suite(Path("eval/quickstart.yaml")) == read_suite(Path("quickstart.yaml"))


def test_the_shipped_quick_start_asks_for_text_against_ids_and_shuffled_text(repository):
    suite = read_suite(repository / "eval" / "quickstart.yaml")
    assert list(suite.rows) == [
        "random", "popularity", "SASRec-ID", "SASRec-text", "SASRec-ID+text",
        "SASRec-shuffled-text",
    ]  # fmt: skip
    assert suite.contrasts == [("SASRec-text", "SASRec-shuffled-text")]

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from test_result import facts, tiny

from llmrec.evaluation.result import build_result, write_result
from llmrec.evaluation.suite import flatten, main, read_suite


@pytest.fixture
def trained(monkeypatch):
    """A train entry point that writes a made-up result; gives the list of its calls."""
    calls = []

    def options(argv):
        return dict(word.removeprefix("--").split("=", 1) for word in argv)

    def resolve(argv):
        config = {"run": {}}
        for name, value in options(argv).items():
            group, _, key = name.partition(".")
            config.setdefault(group, {})[key] = value
        return config

    def train(argv):
        calls.append(options(argv))
        named = calls[-1]
        if named.get("model.name") == "breaks":
            raise RuntimeError("out of memory")
        if named.get("model.name") == "refuses":
            return 2
        label, seed = named["run.label"], int(named["run.seed"])
        result = build_result(facts(label=label, seed=seed, config=resolve(argv)), *tiny())
        write_result(Path(named["run.folder"]), result)
        return 0

    module = ModuleType("llmrec.train_tcf")
    module.main, module.resolve = train, resolve
    monkeypatch.setitem(sys.modules, "llmrec.train_tcf", module)
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


def test_a_cell_whose_config_changed_is_trained_again_and_replaced(suite, trained):
    main([suite()])
    assert main([suite(), "--optim.epochs", "3"]) == 0
    assert len(trained) == 8
    assert all(call["optim.epochs"] == "3" for call in trained[4:])
    assert all(call["run.overwrite"] == "true" for call in trained[4:])


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


@pytest.mark.parametrize("model", ["breaks", "refuses"])
def test_a_failed_cell_is_shown_and_the_rest_goes_on(suite, trained, capsys, tmp_path, model):
    rows = {"bad": {"model.name": model}, "ID": {}, "text": {"tower.name": "text"}}
    assert main([suite(rows=rows, seeds=[0])]) == 1
    shown = capsys.readouterr().out
    assert "bad, seed 0 failed" in shown
    assert "Failed and not in the table: bad, seed 0" in shown
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())["rows"]) == 2


def test_without_its_baseline_there_is_no_table(suite, trained, capsys):
    assert main([suite(rows={"ID": {"model.name": "breaks"}, "text": {}})]) == 1
    assert "the baseline ID failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words", "sentence"),
    [
        ({"titel": "x"}, [], "unknown key titel: did you mean title?"),
        ({"baseline": "IDD"}, [], "did you mean ID?"),
        ({"rows": None}, [], "has no rows"),
        ({"rows": {"ID": {}, "a b": {}, "a/b": {}}, "contrasts": []}, [], "share the folder"),
        ({"seeds": [0, 0]}, [], "distinct whole numbers"),
        ({"seeds": 3}, [], "distinct whole numbers"),
        ({"contrasts": ["text"]}, [], "pairs of labels"),
        ({"measures": ["HR"]}, [], "Unknown measure"),
        ({}, ["--seed", "3"], "Unknown option --seed: did you mean seeds?"),
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


def test_nested_and_dotted_options_are_the_same():
    assert flatten({"tower": {"name": "id"}, "optim.lr": 1}) == {"tower.name": "id", "optim.lr": 1}


def test_the_shipped_quick_start_asks_for_text_against_ids_and_shuffled_text(repository):
    suite = read_suite(repository / "eval" / "quickstart.yaml")
    assert list(suite.rows) == [
        "random", "popularity", "SASRec-ID", "SASRec-text", "SASRec-ID+text",
        "SASRec-shuffled-text",
    ]  # fmt: skip
    assert suite.contrasts == [("SASRec-text", "SASRec-shuffled-text")]

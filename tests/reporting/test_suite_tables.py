"""What a suite's keys ask of its tables."""

import json

import pytest
import yaml
from small_runs import SMALL

from llmrec.evaluation.suite import main

ROWS = {"random": {"model.name": "random"}, "popularity": {"model.name": "popularity"}}


@pytest.fixture
def suite(tmp_path):
    """Writes a suite whose rows take no training; gives its path."""

    def write(name="suite", **changes):
        content = {"base": SMALL, "rows": ROWS, "out": str(tmp_path / "out"), **changes}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    return write


def test_suites_that_share_an_out_folder_keep_runs_and_write_their_own_tables(
    suite, tmp_path, capsys
):
    assert main([suite()]) == 0
    results = sorted((tmp_path / "out").glob("*/result.json"))
    first = [path.stat().st_mtime_ns for path in results]
    some = dict(list(ROWS.items())[1:])
    assert main([suite("b", rows=some, table="sliced", slices=True, beyond_accuracy=True)]) == 0
    assert [path.stat().st_mtime_ns for path in results] == first
    shown = capsys.readouterr().out
    assert "finished before, kept" in shown
    assert "by target popularity" in shown
    files = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert files == {"table.md", "table.json", "sliced.md", "sliced.json"}
    assert "slices" not in json.loads((tmp_path / "out" / "table.json").read_text())
    record = json.loads((tmp_path / "out" / "sliced.json").read_text())
    assert [row["label"] for row in record["rows"]] == ["popularity"]
    parts = record["rows"][0]["slices"]
    assert {name: sum(p["cases"] for p in part) for name, part in parts.items()} == dict.fromkeys(
        ("target popularity", "history length", "target", "target text"), 61
    )
    assert 0 < record["rows"][0]["beyond_accuracy"]["coverage"]["mean"] < 1


def test_a_suite_may_vary_in_a_rule_only_where_it_says_so(suite, capsys):
    rows = ROWS | {"papers": {"model.name": "popularity", "evaluation.filter_seen": "papers"}}
    assert main([suite(rows=rows)]) == 2
    assert "never mixed within one table" in capsys.readouterr().err
    assert main([suite(rows=rows, varies=["filter_seen"])]) == 0
    assert "differ in filter_seen on purpose" in capsys.readouterr().out


def test_published_numbers_of_other_data_are_left_out_of_a_suite(suite, capsys):
    assert main([suite(expected=["amazon-beauty-2014"])]) == 0
    assert "users 22,363 there, 61 here" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"slices": "no"}, "slices must be true or false, not 'no'"),
        ({"beyond_accuracy": 1}, "beyond_accuracy must be true or false, not 1"),
        ({"expected": "ml-1m"}, "expected must be a list of names, such as [amazon-beauty-2014]"),
        ({"expected": ["ml-1n"]}, "No published results named ml-1n: did you mean ml-1m?"),
        ({"varies": "filter_seen"}, "varies must be a list of names, such as [filter_seen]"),
        ({"varies": ["filter-seen"]}, "did you mean filter_seen?"),
        ({"table": "../x"}, "table must be a file name without folder or ending"),
    ],
)
def test_a_mistake_in_them_is_one_line_before_anything_is_run(
    suite, capsys, tmp_path, changes, sentence
):
    assert main([suite(**changes)]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()

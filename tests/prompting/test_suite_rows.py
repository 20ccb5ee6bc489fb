"""P5 and rating rows in suites: run once, kept when asked again, tabled beside the others."""

import json

import pytest
import yaml
from small_p5 import SMALL

from llmrec.evaluation.suite import main

DATA = {"data.simulated.users": 61, "data.simulated.items": 240, "data.simulated.reviews": True}
P5 = {name: value for name, value in SMALL.items() if not name.startswith("data.")}
RANKING = {
    "rows": {
        "popularity": {"model.name": "popularity", "tower.name": "id"},
        "P5": {"program": "p5", **P5, "optim.epochs": 1},
    },
    "base": DATA,
    "baseline": "popularity",
}
RATING = {
    "rows": {
        "item mean": {"program": "rating", "model.name": "item_mean"},
        "bias": {"program": "rating", "model.name": "bias"},
        "network": {
            "program": "rating", "model.name": "transformer_mlp", "model.width": 8,
            "model.heads": 1, "model.blocks": 1, "optim.epochs": 1,
        },
    },
    "base": DATA,
    "baseline": "item mean",
}  # fmt: skip


def suite(folder, content):
    """The path of a suite's file, whose runs lie beside it."""
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(content | {"out": str(folder / "runs")}, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """A finished suite with a P5 row."""
    folder = tmp_path_factory.mktemp("ranked")
    path = suite(folder, RANKING)
    assert main([path]) == 0
    return folder, path


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """A finished suite of rating rows alone."""
    folder = tmp_path_factory.mktemp("rated")
    path = suite(folder, RATING)
    assert main([path]) == 0
    return folder, path


def test_a_p5_row_stands_beside_the_others(ranked):
    table = json.loads((ranked[0] / "runs" / "table.json").read_text())
    assert [row["label"] for row in table["rows"]] == ["popularity", "P5"]
    assert table["rows"][1]["difference"]["HR@10"]["p"] <= 1


@pytest.mark.parametrize("which", ["ranked", "rated"])
def test_finished_rows_are_kept(request, which):
    folder, path = request.getfixturevalue(which)
    before = {run: run.stat().st_mtime_ns for run in folder.glob("runs/*/result.json")}
    assert len(before) >= 2
    assert main([path]) == 0
    assert before == {run: run.stat().st_mtime_ns for run in folder.glob("runs/*/result.json")}


def test_a_p5_row_of_other_options_is_refused(ranked, capsys):
    assert main([ranked[1], "--optim.lr", "0.5"]) == 2
    assert "optim.lr" in capsys.readouterr().err


def test_rating_rows_alone_make_a_table_with_paired_errors(rated):
    folder, _ = rated
    table = json.loads((folder / "runs" / "table.json").read_text())
    told = {row["label"]: row for row in table["ratings"]}
    assert list(told) == ["item mean", "bias", "network", "global mean", "user mean"]
    assert told["item mean"]["difference"] is None
    for label in ("bias", "network"):
        found = told[label]["metrics"]["RMSE"]["mean"] ** 2
        base = told["item mean"]["metrics"]["RMSE"]["mean"] ** 2
        assert told[label]["difference"]["difference"] == pytest.approx(found - base, abs=1e-9)
    written = (folder / "runs" / "table.md").read_text()
    assert "mean squared error" in written and "less item mean's" in written
    assert "filter_seen" not in written


def test_contrasts_between_rating_rows_are_refused(tmp_path, rated, capsys):
    content = RATING | {"contrasts": [["bias", "network"]]}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(content | {"out": str(rated[0] / "runs")}))
    assert main([str(path)]) == 2
    assert "contrasts" in capsys.readouterr().err

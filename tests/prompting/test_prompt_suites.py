"""P5 and rating rows in suites: run once, kept when asked again, tabled beside the others."""

import json

import pytest
import yaml
from small_p5 import SMALL

from llmrec.evaluation.suite import main
from llmrec.reporting.tables import main as compare
from llmrec.score import main as score

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


def test_seeds_of_a_rating_row_are_one_row(rated):
    folder, path = rated
    assert main([path, "--seeds", "0,1"]) == 0
    table = json.loads((folder / "runs" / "table.json").read_text())
    told = {row["label"]: row for row in table["ratings"]}
    assert len(told) == len(table["ratings"]) == 5
    assert told["network"]["seeds"] == [0, 1] and told["bias"]["seeds"] == [0]
    found = [
        json.loads((folder / "runs" / f"network-{seed}" / "result.json").read_text())["metrics"]
        for seed in (0, 1)
    ]
    errors = [metrics["test"]["RMSE"]["mean"] for metrics in found]
    assert told["network"]["metrics"]["RMSE"]["mean"] == pytest.approx(sum(errors) / 2)


def test_measures_of_rankings_are_refused_of_rating_runs(rated, capsys):
    folders = [str(rated[0] / "runs" / name) for name in ("bias-0", "item_mean-0")]
    assert compare(folders) == 0
    assert compare([*folders, "--measures", "HR@10"]) == 2
    assert "measures is about rows that rank" in capsys.readouterr().err


def test_scoring_again_points_a_p5_run_to_its_own_command(ranked, capsys):
    run = ranked[0] / "runs" / "P5-0"
    assert score(["--run", str(run), "--pool.size", "20"]) == 2
    assert f"Use llmrec p5 ask --run {run} --pool.size 20." in capsys.readouterr().err


def test_a_rating_run_is_not_scored_as_a_ranking(rated, capsys):
    assert score(["--run", str(rated[0] / "runs" / "network-0")]) == 2
    assert "predicts ratings and ranks nothing" in capsys.readouterr().err

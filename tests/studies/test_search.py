"""``llmrec search``: the plan first, equal trials, their best on all seeds, test counted."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import SMALL, record

from llmrec import train_tcf
from llmrec.errors import UsageError
from llmrec.evaluation import suite as suites
from llmrec.studies import search as command
from llmrec.studies.plan import changed, commit_of
from llmrec.studies.search import main

LR = {"low": 1e-3, "high": 1e-1, "log": True}
ROWS = {"narrow": {"model.width": 8, "space": {"model.dropout": [0.1, 0.2]}}, "wide": {}}


@functools.cache
def configured(words):
    """Configs by command line: parsing one takes longer than all else here."""
    return CONFIGURE(list(words))


CONFIGURE = train_tcf.configure


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Writes a suite with a search, with some keys changed; gives its path."""
    monkeypatch.chdir(tmp_path)  # so that command lines are the same in all tests
    monkeypatch.setattr(train_tcf, "configure", lambda argv: configured(tuple(argv)))

    def write(**changes):
        content = {
            "title": "tiny", "baseline": "narrow", "measures": ["NDCG@10"], "seeds": [0],
            "base": SMALL | {"data.source": "simulated"}, "out": "out",
            "rows": ROWS, "search": {"trials": 3, "seed": 0}, "space": {"optim.lr": LR},
        }  # fmt: skip
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def tried(monkeypatch):
    """Trials that take no time, the best at a learning rate of 0.01; gives their options.

    The suite is then not run: `finals` gets its rows.
    """
    calls, finals = [], []

    def validate(argv):
        named = dict(word.removeprefix("--").split("=", 1) for word in argv)
        assert (Path(named["run.folder"]).parents[2] / "search.json").exists()
        calls.append(named)
        return 1 / (1 + abs(float(named["optim.lr"]) - 0.01))

    monkeypatch.setattr(train_tcf, "validate", validate)
    monkeypatch.setattr(command, "run_suite", lambda suite, out: finals.append(suite.rows) or 0)
    return calls, finals


def trials(tmp_path, row="narrow"):
    lines = (tmp_path / "out" / "search" / row / "trials.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def drawn(tmp_path, row="narrow"):
    return [trial["options"] for trial in trials(tmp_path, row)]


def test_every_row_is_tried_equally_often_and_goes_on_with_its_best(search, tried, tmp_path):
    calls, finals = tried
    assert main([search()]) == 0
    assert [call["run.label"] for call in calls] == ["narrow"] * 3 + ["wide"] * 3
    assert [Path(call["run.folder"]).name for call in calls] == ["0", "1", "2"] * 2
    assert all({"optim.lr", "model.dropout"} == options.keys() for options in drawn(tmp_path))
    assert all({"optim.lr"} == options.keys() for options in drawn(tmp_path, "wide"))
    for row in ("narrow", "wide"):
        top = max(trials(tmp_path, row), key=lambda trial: trial["value"])
        assert finals[0][row].items() >= top["options"].items()
    assert finals[0]["narrow"]["model.width"] == 8
    assert "| wide | 3 | 0 | 0 | 0 |" in (tmp_path / "out" / "search.md").read_text()


def test_the_plan_says_all_that_is_drawn_and_all_that_is_not(search, tried, tmp_path):
    main([search()])
    plan = json.loads((tmp_path / "out" / "search.json").read_text())
    assert (plan["trials"], plan["seed"], plan["git"]) == (3, 0, None)
    assert plan["rows"]["wide"]["space"] == {"optim.lr": LR | {"step": "any"}}
    assert plan["rows"]["narrow"]["space"]["model.dropout"] == [0.1, 0.2]
    assert plan["rows"]["narrow"]["fixed"]["model.width"] == 8
    assert "optim.lr" not in plan["rows"]["narrow"]["fixed"]
    assert len(plan["space_sha256"]) == 64


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_killed_search_goes_on_with_the_trials_of_an_undisturbed_one(
    search, tried, tmp_path, monkeypatch, at
):
    calls, _ = tried
    path = search()
    assert main([path, "--out", "undisturbed"]) == 0
    calls.clear()
    steady = train_tcf.validate

    def killed(argv):
        if len(calls) == at:
            raise KeyboardInterrupt
        return steady(argv)

    monkeypatch.setattr(train_tcf, "validate", killed)
    assert main([path]) == 130
    monkeypatch.setattr(train_tcf, "validate", steady)
    assert main([path]) == 0
    assert len(calls) == 6  # none twice
    undisturbed = [
        json.loads(line)["options"]
        for row in ("narrow", "wide")
        for line in (tmp_path / "undisturbed/search" / row / "trials.jsonl").read_text().split("\n")
        if line
    ]
    assert drawn(tmp_path) + drawn(tmp_path, "wide") == undisturbed


def test_a_trial_cut_short_in_its_line_is_run_again_alone(search, tried, tmp_path):
    calls, _ = tried
    path = search()
    main([path])
    before, file = drawn(tmp_path), tmp_path / "out" / "search" / "narrow" / "trials.jsonl"
    file.write_text(file.read_text()[:-9])
    calls.clear()
    assert main([path]) == 0
    assert [call["run.folder"] for call in calls] == ["out/search/narrow/2"]
    assert drawn(tmp_path) == before


def test_a_failed_trial_is_kept_with_its_sentence_and_counts(search, tried, tmp_path, monkeypatch):
    steady, values = train_tcf.validate, iter([None, float("nan"), 0.5] * 2)

    def validate(argv):
        steady(argv)
        if (value := next(values)) is None:
            raise UsageError("the loss is not finite in epoch 1.")
        return value

    monkeypatch.setattr(train_tcf, "validate", validate)
    assert main([search()]) == 0
    told = [(trial["state"], trial["value"], trial["problem"]) for trial in trials(tmp_path)]
    assert told == [
        ("failed", None, "the loss is not finite in epoch 1."),
        ("failed", None, "the validation value is nan."),
        ("done", 0.5, ""),
    ]
    assert (
        "| narrow | 3 | 2 | 0 | 0 | 2 | NDCG@10 0.5000 |"
        in (tmp_path / "out" / "search.md").read_text()
    )


def test_where_every_trial_of_a_row_failed_nothing_is_scored(
    search, tried, tmp_path, monkeypatch, capsys
):
    def validate(argv):
        raise UsageError("the loss is not finite.")

    monkeypatch.setattr(train_tcf, "validate", validate)
    assert main([search()]) == 2
    assert "every trial of row narrow failed, the last with: the loss is not finite. Nothing" in (
        capsys.readouterr().err
    )
    assert not tried[1] and len(trials(tmp_path)) == 3


def test_a_full_disk_ends_the_search_and_is_no_failed_trial(
    search, tried, tmp_path, monkeypatch, capsys
):
    def validate(argv):
        raise UsageError("out cannot be written (No space left).") from OSError(28, "No space left")

    monkeypatch.setattr(train_tcf, "validate", validate)
    assert main([search()]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert trials(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "words", "difference"),
    [
        ({"space": {"optim.lr": LR | {"high": 0.2}}}, [],
         "rows.narrow.space.optim.lr.high 0.1 -> 0.2"),
        ({}, ["--optim.epochs", "3"], "rows.narrow.fixed.optim.epochs 2 -> 3"),
    ],
)  # fmt: skip
def test_another_search_in_the_same_folder_is_refused_or_begun_anew(
    search, tried, tmp_path, capsys, changes, words, difference
):
    calls, _ = tried
    main([search()])
    calls.clear()
    assert main([search(**changes), *words]) == 2
    shown = capsys.readouterr().err
    assert f"search.json holds another search (first difference: {difference}" in shown
    assert "begin it anew with --overwrite" in shown and not calls
    (tmp_path / "out" / "search" / "wide" / "from-before").mkdir()
    assert main([search(**changes), *words, "--overwrite"]) == 0
    assert len(calls) == len(trials(tmp_path)) * len({call["run.label"] for call in calls})
    assert not (tmp_path / "out" / "search" / "wide" / "from-before").exists()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({}, ""),
        ({"git": None, "versions": {"optuna": "4.0.0"}}, ""),  # told, and no other search
        ({"trials": 4}, "trials 3 -> 4"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"rows": {"a": {"space": {"x": [1, 2]}}}}, "rows.a.fixed.y 5 -> None"),
        ({"rows": {"a": {"space": {"x": [1, 2]}, "fixed": {"y": 6}}}}, "rows.a.fixed.y 5 -> 6"),
        ({"rows": {"a": {"space": {"x": [2, 1]}, "fixed": {"y": 5}}}},
         "rows.a.space.x [1, 2] -> [2, 1]"),
    ],
)  # fmt: skip
def test_what_makes_another_search(change, difference):
    held = {"trials": 3, "seed": 0, "rows": {"a": {"space": {"x": [1, 2]}, "fixed": {"y": 5}}}}
    assert changed(held | {"git": {"commit": "1"}}, held | change) == difference


def test_more_seeds_and_the_order_of_keys_leave_the_trials_as_they_are(search, tried):
    calls, finals = tried
    main([search()])
    calls.clear()
    space = {"optim": {"lr": dict(reversed(LR.items()))}}
    assert main([search(space=space), "--seeds", "0,1", "--overwrite"]) == 0
    assert not calls and len(finals) == 2


def test_runs_scored_before_the_space_was_written_down_are_refused(search, tried, tmp_path, capsys):
    (tmp_path / "out" / "wide-0").mkdir(parents=True)
    (tmp_path / "out" / "wide-0" / "result.json").write_text("{}")
    assert main([search()]) == 2
    assert "wide-0 was scored on test before the space was written down" in capsys.readouterr().err
    assert not tried[0]


@pytest.mark.parametrize(
    ("changes", "words", "sentence"),
    [
        ({"search": None}, [], "has no search: {trials: 20}. Add it, or"),
        ({"search": {"seed": 0}}, [], "has no search: {trials: 20}. Add it, or"),
        ({"search": {"trials": 0}}, [], "search.trials must be a whole number from 1 on."),
        ({"search": {"trials": True}}, [], "search.trials must be a whole number from 1 on."),
        ({"search": {"trials": 1, "seed": -1}}, [], "search.seed must be a whole number"),
        ({"search": {"trials": 1, "sede": 1}}, [], "unknown key sede: did you mean seed?"),
        ({"search": {"trials": 1, "rows": []}}, [], "search.rows must list labels of rows"),
        ({"search": {"trials": 1, "rows": ["wid"]}}, [], "no row: did you mean wide?"),
        ({"search": {"trials": 1, "rows": ["wide"]}}, [], "rows.narrow has a space, but search."),
        ({"search": {"trials": 1, "rows": ["wide"]}, "rows": {"narrow": {}, "wide": {}}},
         ["--without", "wide"], "--without leaves no row to search"),
        ({"space": {}}, [], "row wide has an empty space."),
        ({"space": {"optim.lr": {"low": 1, "high": 1}}}, [], "low=1 must be below high=1."),
        ({"space": {"optim.rl": LR}}, [], "unknown option optim.rl: did you mean optim.lr?"),
        ({"space": {"optim": [1, 2]}}, [], "unknown option optim: did you mean optim."),
        ({"space": {"run.seed": [1, 2]}}, [], "options of data, split, evaluation and run"),
        ({"space": {"data.item_text": ["title", "all"]}}, [], "Set it under base."),
        ({"space": {"loss.chunk_megabytes": [1, 2]}}, [], "which moves no number."),
        ({"space": {"model.width": [8, 16]}}, [], "space draws model.width, which the row sets"),
        ({}, ["--optim.lr", "0.1"], "draws optim.lr, which the command line sets too"),
        ({"space": {"optim.lr": [0.1, "fast"]}}, [], "row narrow: --optim.lr got fast"),
        ({"space": {"model.width": {"low": 8, "high": 12.5}}, "rows": {"narrow": {}}}, [],
         "row narrow: --model.width got 12.5"),
        ({"base": SMALL | {"optim.epoch": 2}}, [], "row narrow: unknown option --optim.epoch"),
        ({"rows": ROWS | {"wide": {"program": "p5"}}}, [],
         "row wide is filled by program: p5, and only train is searched."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_before_anything_is_run(
    search, tried, tmp_path, capsys, changes, words, sentence
):
    assert main([search(**changes), *words]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown and shown.count("\n") == 1
    assert not tried[0] and not (tmp_path / "out").exists()


def test_a_missing_optuna_is_named(search, tried, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main([search()]) == 2
    assert "needs an extra: pip install 'llmrec[search]'." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(search, tried, monkeypatch, capsys):
    class Two:
        num_processes = 2

    monkeypatch.setattr("llmrec.launch.start", lambda precision: Two())
    assert main([search()]) == 2
    assert "A search runs in one process." in capsys.readouterr().err


def test_evaluate_sends_a_suite_with_a_search_to_this_command(search, capsys):
    assert suites.main([search()]) == 2
    assert "asks for a search of options. Run it with llmrec search" in capsys.readouterr().err


def test_help_is_shown_without_a_suite(capsys):
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert capsys.readouterr().out.count("usage: llmrec search SUITE.yaml") == 2


def test_the_commit_is_told_and_whether_it_holds_the_space(tmp_path):
    def git(*words):
        named = ("-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *named, *words], check=True)

    def told():
        where = commit_of(suite)
        assert len(where.pop("commit")) == 40
        return where

    suite, other = tmp_path / "suite.yaml", tmp_path / "other"
    suite.write_text("trials: 3\n")
    other.write_text("1")
    git("init", "-q")
    assert commit_of(suite) is None  # no commit yet
    git("add", "other")
    git("commit", "-qm", "other")
    assert told() == {"dirty": False, "suite_committed": False}
    git("add", "suite.yaml")
    git("commit", "-qm", "suite")
    assert told() == {"dirty": False, "suite_committed": True}
    other.write_text("2")
    assert told() == {"dirty": True, "suite_committed": True}
    suite.write_text("trials: 4\n")
    assert told() == {"dirty": True, "suite_committed": False}
    assert commit_of(tmp_path / "nowhere" / "suite.yaml") is None


@pytest.fixture
def scored(monkeypatch):
    """What is ranked: (whether within a trial, valid or test); test within a trial raises."""
    ranked, within = [], []
    rank, validate = train_tcf.rank_cases, train_tcf.validate

    def watched(task, scores, part):
        ranked.append((bool(within), part))
        if within and part == "test":
            raise AssertionError("a trial looked at the test cases")
        return rank(task, scores, part)

    def trial(argv):
        within.append(argv)
        try:
            return validate(argv)
        finally:
            within.pop()

    monkeypatch.setattr(train_tcf, "rank_cases", watched)
    monkeypatch.setattr(train_tcf, "validate", trial)
    return ranked


def test_end_to_end_test_is_scored_once_a_run_with_the_best_on_validation(search, scored, tmp_path):
    base = {**SMALL, "data.source": "simulated", "optim.epochs": 1}
    assert main([search(base=base)]) == 0
    assert scored.count((False, "test")) == 2 and (True, "test") not in scored
    for row in ("narrow", "wide"):
        found, result = trials(tmp_path, row), record(tmp_path / "out" / f"{row}-0")
        values = [trial["value"] for trial in found]
        assert len(set(values)) == 3 and [trial["epochs"] for trial in found] == [1, 1, 1]
        chosen = values.index(max(values))
        assert result["search"].pop("seconds") > 0
        assert result["search"] == {
            "trials": 3, "failed": 0, "epochs": 3, "best_trial": chosen,
            "validation": values[chosen], "test_evaluations": 1,
            "space_sha256": json.loads((tmp_path / "out" / "search.json").read_text())[
                "space_sha256"],
        }  # fmt: skip
        # The final run with the trials' seed is that trial, scored on test this time.
        assert result["metrics"]["valid"]["NDCG@10"]["mean"] == pytest.approx(max(values), abs=1e-9)
        assert result["config"]["optim"]["lr"] == found[chosen]["options"]["optim.lr"]
    assert not list((tmp_path / "out" / "search").rglob("checkpoints"))
    results = [tmp_path / "out" / f"{row}-0" / "result.json" for row in ("narrow", "wide")]
    before = [path.read_bytes() for path in results]
    assert main([search(base=base)]) == 0  # all is there already
    assert scored.count((False, "test")) == 2
    assert [path.read_bytes() for path in results] == before


@pytest.mark.slow
def test_tests_scored_before_overwrite_still_count(search, scored, tmp_path):
    assert main([search()]) == 0
    assert main([search(search={"trials": 2}, seeds=[0, 1]), "--overwrite"]) == 0
    told = [record(tmp_path / "out" / f"wide-{seed}")["search"] for seed in (0, 1)]
    runs_scored = scored.count((False, "test")) / 2  # per row
    assert [entry["test_evaluations"] for entry in told] == [runs_scored, runs_scored]
    assert {entry["trials"] for entry in told} == {2}


@pytest.mark.slow
def test_a_trial_killed_in_its_training_is_resumed(search, scored, tmp_path, monkeypatch):
    step, steps = train_tcf.train_step, []

    def killed(*arguments):
        steps.append(arguments)
        if len(steps) == 6:  # 4 steps an epoch: in the second one
            raise KeyboardInterrupt
        return step(*arguments)

    rows = {"narrow": ROWS["narrow"]}
    path = search(rows=rows)
    assert main([path, "--out", "undisturbed"]) == 0
    monkeypatch.setattr(train_tcf, "train_step", killed)
    assert main([path]) == 130
    taken = len(steps)
    assert main([path]) == 0
    wanted = (tmp_path / "undisturbed/search/narrow/trials.jsonl").read_text().splitlines()
    assert [(t["options"], t["value"]) for t in trials(tmp_path)] == [
        (t["options"], t["value"]) for t in map(json.loads, wanted)
    ]
    assert len(steps) - taken == 4 + 2 * 8 + 8  # no epoch of the first trial twice; then the final

import json
from dataclasses import replace

import pytest
from made_runs import QUESTION, run, text

from llmrec.errors import UsageError
from llmrec.evaluation.result import write_result
from llmrec.reporting.published import Published
from llmrec.reporting.record import Question, build_table
from llmrec.reporting.render import to_markdown
from llmrec.reporting.tables import main


def test_a_clear_difference_is_starred_and_bold_and_the_baseline_says_so():
    record = build_table([run("ID"), run("text", mean_place=20)], QUESTION)
    assert record["baseline"] == "ID"
    assert record["rows"][0]["difference"] is None
    difference = record["rows"][1]["difference"]["HR@10"]
    means = [row["metrics"]["HR@10"]["mean"] for row in record["rows"]]
    assert difference["difference"] == pytest.approx(means[1] - means[0])
    assert difference["p_holm"] < 0.05
    shown = to_markdown(record)
    assert f"**{means[1]:.4f} [" in shown
    assert "baseline" in shown
    assert f"{difference['p_holm']:.4f} \\*" in shown


def test_a_best_row_that_is_not_significantly_better_is_not_bold():
    shown = to_markdown(build_table([run("a"), run("b"), run("c")], QUESTION))
    assert "**" not in shown


def test_a_row_significantly_below_the_baseline_is_not_bold():
    shown = to_markdown(build_table([run("ID", mean_place=20), run("text")], QUESTION))
    assert "**" not in shown
    assert "\\*" in shown


def test_p_values_are_corrected_over_the_rows():
    runs = [run("ID"), run("x", mean_place=50), run("y", mean_place=45), run("z", mean_place=40)]
    family = [row["difference"]["HR@10"] for row in build_table(runs, QUESTION)["rows"][1:]]
    smallest = min(family, key=lambda d: d["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, 3 * smallest["p"]))


def test_contrasts_are_a_family_of_their_own():
    question = Question(baseline="ID", measures=QUESTION.measures, contrasts=[("text", "shuffled")])
    runs = [run("ID"), run("text", mean_place=20), run("shuffled")]
    record = build_table(runs, question)
    (contrast,) = record["contrasts"]
    values = contrast["difference"]["NDCG@10"]
    assert values["p"] == values["p_holm"] < 0.05
    assert "text - shuffled" in text(record)


def test_seeds_of_one_label_are_one_row():
    record = build_table([run("ID", 0), run("ID", 1), run("text", 0)], QUESTION)
    assert [row["seeds"] for row in record["rows"]] == [[0, 1], [0]]
    shown = text(record)
    assert "2 seeds" in shown
    assert "one seed" in shown
    assert "cover users and seeds" in shown


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cases": "other"}, "test users"),
        ({"candidates": 100}, r"candidates \(1000 and 100\)"),
        ({"filter_seen": "papers"}, r"filter_seen \(true and papers\)"),
        ({"split": "temporal"}, r"split \(leave_one_out and temporal\)"),
        ({"interactions": 8999}, r"interactions \(9000 and 8999\)"),
        ({"fit_on": "train+valid"}, r"fit_on \(train and train\+valid\)"),
    ],
)
def test_runs_that_answer_different_questions_are_never_mixed(change, named):
    with pytest.raises(UsageError, match=f"{named}.*never mixed within one table"):
        build_table([run("ID"), run("text", **change)], QUESTION)


def test_one_label_and_seed_twice_is_refused():
    with pytest.raises(UsageError, match="both ID with seed 0"):
        build_table([run("ID"), run("ID")], QUESTION)


def test_runs_on_data_that_changed_in_between_are_refused():
    runs = [
        run("ID"),
        run("text", template="plain", data="a"),
        run("both", data="fedcba9876543210"),
    ]
    build_table(runs[:2], QUESTION)  # another text of the same data
    with pytest.raises(
        UsageError, match=r"data changed between ID and both .*0123456789ab and fedc"
    ):
        build_table(runs, QUESTION)
    again = run("other", template="plain", data="b")
    with pytest.raises(UsageError, match="data changed between text and other"):
        build_table([*runs[:2], again], QUESTION)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config": {"run": {"seed": 1}, "optim": {"lr": 0.1}}}, r"optim\.lr"),
        ({"config": {"run": {"seed": 1, "precision": "bf16"}}}, r"run\.precision"),
        ({"config": {"run": {"seed": 1, "select": "HR@10"}}}, r"run\.select"),
        ({"template": "plain", "data": "a"}, "data fingerprint"),
        ({"cost": {"encoder": {"weights": "w"}}}, "encoder weights"),
    ],
)
def test_one_label_over_different_runs_is_refused(changes, named):
    with pytest.raises(UsageError, match=f"both labelled ID but differ in {named}"):
        build_table([run("ID"), run("ID", 1, **changes)], QUESTION)


def test_seeds_in_other_folders_and_with_other_memory_are_one_row():
    config = {
        "run": {"seed": 1, "folder": "b", "overwrite": True, "store": "s", "tensorboard": True},
        "loss": {"chunk_megabytes": 64},
    }
    table = build_table([run("ID"), run("ID", 1, config=config)], QUESTION)
    assert table["rows"][0]["seeds"] == [0, 1]


def test_an_unknown_baseline_names_the_nearest_row():
    with pytest.raises(UsageError, match=r"did you mean SASRec-ID\?"):
        build_table([run("SASRec-ID")], Question("SASRec-Id", QUESTION.measures))


def test_the_terminal_table_fits_a_hundred_columns_without_colour():
    record = build_table([run("ID"), run("SASRec-shuffled-text", mean_place=20)], QUESTION)
    shown = text(record)
    assert max(map(len, shown.splitlines())) <= 100
    assert "…" not in shown
    value = record["rows"][1]["metrics"]["HR@10"]
    assert f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]" in shown
    assert "12.3" in shown
    assert "1,234,567" in shown
    assert "2.50e+12" in shown
    assert "filter_seen true" in shown
    assert "tiny (simulated), 400 users, 1,000 items" in " ".join(shown.split())


def test_a_label_in_brackets_is_shown_as_it_is():
    record = build_table([run("[bold]ID"), run("a[/b]", mean_place=20)], QUESTION)
    assert "[bold]ID" in text(record)
    assert "a[/b]" in text(record)


def test_a_label_with_colons_is_no_picture():
    assert "a:x:b" in text(build_table([run("a:x:b")], QUESTION))


def test_numbers_stay_whole_beside_a_long_label():
    question = Question("ID", QUESTION.measures, [("SASRec-" + "text-" * 8 + "x", "ID")])
    record = build_table([run("ID"), run("SASRec-" + "text-" * 8 + "x", mean_place=20)], question)
    shown = text(record)
    assert max(map(len, shown.splitlines())) <= 100
    value = record["rows"][1]["difference"]["NDCG@10"]
    cell = f"{value['difference']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"
    assert shown.count(cell) == 2  # as a row and as a contrast


def test_what_was_dropped_and_what_is_odd_is_said_where_there_is_any():
    counts = {
        "users_dropped_too_few_interactions": 1050, "interactions_dropped_with_their_user": 99,
        "interactions_dropped_beyond_most_recent": 0, "items_with_empty_text": 7,
        "repeat_interactions": 3, "interactions_tied_in_order": 12,
        "train_interactions_after_a_test_target": 1234,
    }  # fmt: skip
    shown = to_markdown(build_table([run("ID", counts=counts)], QUESTION))
    assert (
        "- Read: 450 users, 9,100 interactions. Dropped: 1,050 users with too few interactions, "
        "99 interactions with them. Includes: 7 items without text, 3 repeat interactions, "
        "12 interactions tied in order, 1,234 training interactions after a test target "
        "(leave-one-out's leak). Ordered by timestamp.\n"
    ) in shown
    nothing = to_markdown(build_table([run("ID")], QUESTION))
    assert "- Read: 450 users, 9,100 interactions. Ordered by timestamp.\n" in nothing


def test_compare_reads_folders_and_writes_the_same_numbers_twice(tmp_path, capsys):
    write_result(tmp_path / "runs" / "a-0", run("ID"))
    write_result(tmp_path / "runs" / "b-0", run("text", mean_place=20))
    files = ["--markdown", str(tmp_path / "t.md"), "--json", str(tmp_path / "t.json")]
    assert main([str(tmp_path / "runs"), "--baseline", "ID", *files]) == 0
    record = json.loads((tmp_path / "t.json").read_text())
    mean = f"{record['rows'][1]['metrics']['NDCG@10']['mean']:.4f}"
    assert mean in (tmp_path / "t.md").read_text()
    assert mean in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--measures", "NDGC@10"], "did you mean NDCG@10"),
        (["--baseline", "IDD"], "did you mean ID?"),
        (["--contrast", "ID", "none"], "No run is labelled 'none'"),
        (["--basline", "ID"], "unrecognized arguments"),
        (["nowhere"], "no finished run"),
        (["--expected", "amazon-beauty"], "did you mean amazon-beauty-2014?"),
        (["--varies", "filter_sen"], "did you mean filter_seen?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, options, sentence):
    write_result(tmp_path / "a", run("ID"))
    assert main([str(tmp_path / "a"), *options]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    "change",
    [
        {"pool": {"sha256": "b" * 64}},
        {"pool": {"seed": 1, "sha256": "b" * 64}},
        {"candidates": 100},  # all of another catalogue, by chance as many
    ],
)
def test_runs_on_other_candidate_lists_are_never_mixed(change):
    with pytest.raises(
        UsageError, match=r"candidates \(100 per case: random, seed 0, lists aaaaaaaaaaaa and 100"
    ):
        build_table([run("ID", pool={}), run("chat", **change)], QUESTION)


def test_runs_on_the_same_candidate_lists_share_a_table_which_tells_of_them():
    record = build_table([run("ID", pool={}), run("chat", pool={})], QUESTION)
    said = " ".join(text(record).split())
    assert "400 test cases, 100 candidates per case (random, seed 0, 1,024 users), filter" in said
    lists = {"source": "/some/where/SASRec-ID-0", "users": "all"}
    record = build_table([run("ID", pool=lists), run("chat", pool=lists)], QUESTION)
    said = " ".join(text(record).split())
    assert "100 candidates per case (SASRec-ID-0, seed 0, all users)" in said
    assert "/some/where" not in said


def test_rows_may_differ_in_their_lists_where_that_is_the_question():
    other = run("chat", pool={"sha256": "b" * 64, "source": "popularity"})
    question = replace(QUESTION, varies=["candidates"])
    said = text(build_table([run("ID", pool={}), other], question))
    assert "100 per case: random, seed 0, lists aaaaaaaaaaaa" in said
    assert "100 per case: popularity, seed 0, lists bbbbbbbbbbbb" in said
    assert "varying candidates" in " ".join(said.split())


def test_published_full_rankings_never_stand_beside_candidate_lists():
    file = Published("paper", {"users": 400, "items": 1000, "interactions": 9000}, {}, "", ())
    ours = run("ID", pool={}).record
    assert file.refusal(ours["data"], ours["protocol"]) == "all candidates there, 100 per case here"
    ours = run("ID").record
    assert file.refusal(ours["data"], ours["protocol"]) == ""

import json

import pytest
from made_runs import QUESTION, run, text

from llmrec.errors import UsageError
from llmrec.evaluation.metrics import Measure
from llmrec.reporting.published import read_published
from llmrec.reporting.record import Question, build_table
from llmrec.reporting.render import to_markdown

HR10 = [Measure("HR", 10)]
HIT, MISS = 0, 10
"""Candidates before the target: none, so it is in the top 10; ten, so it is not."""
# 40 cold targets, 50 trained on 7 times, 5 trained on 200 times.
FACTS = {"target_train_count": [0] * 40 + [7] * 50 + [200] * 5}
FACTS_OF_400 = {"target_train_count": [7] * 200 + [200] * 200}
IDS = run("ID", places=[MISS] * 40 + [HIT] * 20 + [MISS] * 30 + [HIT] * 4 + [MISS], facts=FACTS)
TEXT = run("text", places=[HIT] * 20 + [MISS] * 20 + [HIT] * 20 + [MISS] * 30 + [HIT] + [MISS] * 4)


def sliced(record, label):
    """The slices of one row by target popularity, by name."""
    row = next(row for row in record["rows"] if row["label"] == label)
    return {part["slice"]: part for part in row["slices"]["target popularity"]}


def test_slices_are_corrected_over_all_rows_and_slices_of_a_table():
    other = run("other", places=[row % 40 for row in range(400)], facts=FACTS_OF_400)
    ids = run("ID", places=[(row * 7) % 40 for row in range(400)], facts=FACTS_OF_400)
    third = run("third", places=[(row * 3) % 60 for row in range(400)], facts=FACTS_OF_400)
    record = build_table([ids, other, third], Question("ID", HR10, slices=True))
    cells = [
        part["difference"]["HR@10"]
        for row in record["rows"][1:]
        for part in row["slices"]["target popularity"]
        if part["tested"]
    ]
    assert len(cells) == 2 * 2  # two rows, two slices of 200 cases
    smallest = min(cells, key=lambda cell: cell["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, 4 * smallest["p"]))


def test_slices_hold_the_means_that_counting_gives():
    record = build_table([IDS, TEXT], Question(measures=HR10, slices=True))
    ids, text_row = sliced(record, "ID"), sliced(record, "text")
    assert {name: part["cases"] for name, part in ids.items()} == {
        "0 (cold)": 40, "1-4": 0, "5-19": 50, "20-99": 0, "100+": 5,
    }  # fmt: skip
    means = {name: part["metrics"]["HR@10"]["mean"] for name, part in text_row.items()}
    assert means == {"0 (cold)": 20 / 40, "1-4": None, "5-19": 20 / 50, "20-99": None, "100+": 0.2}
    cold = text_row["0 (cold)"]["difference"]["HR@10"]
    assert cold["difference"] == 20 / 40 - 0
    assert cold["p_holm"] < 0.05
    assert text_row["5-19"]["difference"]["HR@10"]["p_holm"] == 1
    assert ids["0 (cold)"]["difference"] is None
    whole = record["rows"][1]["metrics"]["HR@10"]["mean"]
    assert whole == pytest.approx((0.5 * 40 + 0.4 * 50 + 0.2 * 5) / 95)


def test_a_slice_table_stars_and_stresses_brackets_and_dashes():
    shown = to_markdown(build_table([IDS, TEXT], Question(measures=HR10, slices=True)))
    heading = (
        "| HR@10, by target popularity | 0 (cold), 40 cases | 1-4, 0 cases | 5-19, 50 cases | "
        "20-99, 0 cases | 100+, 5 cases |\n"
    )
    assert heading in shown
    assert "| ID | 0.0000 | - | 0.4000 | - | (0.8000) |\n" in shown
    assert "| text | **0.5000 \\*** | - | 0.4000 | - | (0.2000) |\n" in shown
    assert "Not cut by history length, target, target text: ID was run by an older" in shown


def test_the_best_of_a_slice_is_not_bold_where_it_is_the_baseline():
    shown = to_markdown(build_table([TEXT, IDS], Question("ID", HR10, slices=True)))
    assert "**0.5000 \\***" in shown
    run_again = run("text", places=TEXT.per_user["greater"].to_list(), facts=FACTS)
    worse = to_markdown(build_table([run_again, IDS], Question("text", HR10, slices=True)))
    assert "| ID | 0.0000 \\* |" in worse
    assert "**0" not in worse


def test_a_family_that_cuts_nothing_is_a_note():
    facts = FACTS | {"target_repeated": [False] * 95}
    ids = run("ID", places=IDS.per_user["greater"].to_list(), facts=facts)
    record = build_table([ids, TEXT], Question(measures=HR10, slices=True))
    shown = to_markdown(record)
    assert "- By target: all 95 cases are new.\n" in shown
    assert "by target |" not in shown
    assert len(record["rows"][0]["slices"]["target"]) == 2  # the record has it all the same


def test_a_terminal_of_a_hundred_columns_holds_slices_whose_numbers_end_in_one_line():
    shown = text(build_table([IDS, TEXT], Question(measures=HR10, slices=True)))
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 100
    place = next(n for n, line in enumerate(lines) if "by target popularity" in line)
    ids, starred = lines[place + 2], lines[place + 3]
    assert starred.index("0.5000 *") == ids.index("0.0000")


def beyond(coverage, novelty, cutoff=10):
    """What a run keeps of its lists."""
    return {
        "cutoff": cutoff, "coverage": coverage, "gini": 0.25, "mean_popularity": {"mean": 1234.5},
        "popularity_lift": {"mean": -0.5}, "novelty": {"mean": novelty},
        "intra_list_similarity": None,
    }  # fmt: skip


def test_beyond_accuracy_is_the_mean_over_seeds_and_their_standard_deviation():
    runs = [run("ID", 0, beyond=beyond(0.5, 9.0)), run("ID", 1, beyond=beyond(0.7, 11.0))]
    other = run("text", beyond=beyond(1.0, 12.345))
    record = build_table([*runs, other], Question(measures=HR10, beyond_accuracy=True))
    ids, text_row = (row["beyond_accuracy"] for row in record["rows"])
    # mean of .5 and .7; standard deviation sqrt((.1^2 + .1^2) / (2 - 1))
    assert ids["coverage"] == {"mean": pytest.approx(0.6), "sd": pytest.approx(0.02**0.5)}
    assert ids["intra_list_similarity"] is None
    assert text_row["novelty"] == {"mean": 12.345, "sd": None}
    shown = to_markdown(record)
    assert "| beyond accuracy, top 10 | coverage, % of items | Gini, 0 to 1 |" in shown
    ids_cells = "60.0 ±14.1 | 0.250 ±.000 | 1,234.5 ±.0 | -50 ±0 | 10.00 ±1.41 | -"
    assert f"| ID | {ids_cells} |\n" in shown
    assert "| text | 100.0 | 0.250 | 1,234.5 | -50 | 12.35 | - |\n" in shown
    assert "± is the standard deviation over seeds" in shown


def test_runs_without_beyond_accuracy_are_told():
    seeds = [run("ID", 0), run("ID", 1, beyond=beyond(0.5, 9.0))]  # one of them has it
    runs = [*seeds, run("text", beyond=beyond(1.0, 12.3))]
    shown = to_markdown(build_table(runs, Question(measures=HR10, beyond_accuracy=True)))
    assert "| ID | - | - | - | - | - | - |\n" in shown
    assert "Beyond accuracy lacks ID: run by an older version" in shown
    none = to_markdown(build_table([run("ID")], Question(measures=HR10, beyond_accuracy=True)))
    assert "coverage" not in none


def test_lists_of_different_lengths_are_not_compared():
    runs = [run("ID", beyond=beyond(0.5, 9.0)), run("text", beyond=beyond(0.5, 9.0, cutoff=5))]
    build_table(runs, Question(measures=HR10))
    with pytest.raises(UsageError, match=r"ID keeps 10 items per user and text 5.*top_k"):
        build_table(runs, Question(measures=HR10, beyond_accuracy=True))


def test_what_was_not_asked_for_is_not_in_the_record():
    record = build_table([IDS, TEXT], Question(measures=HR10))
    assert not {"slices", "beyond_accuracy", "published", "varies"} & record.keys()
    assert not {"slices", "beyond_accuracy", "protocol"} & record["rows"][0].keys()


@pytest.fixture
def published(tmp_path):
    """Writes a file of published results; gives its path."""

    def write(**changes):
        content = {
            "counts": {"users": 400, "items": 1000, "interactions": 9000},
            "protocol": {"split": "leave_one_out"},
            "note": "As printed.",
            "rows": [
                {"name": "Net|1", "metrics": {"HR@10": 0.0605, "MRR@10": 0.5},
                 "source": "A paper, 2020", "differences": "Another loss."},
            ],
        }  # fmt: skip
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({**content, **changes}))
        return str(path)

    return write


def test_published_rows_stand_beside_ours_and_are_never_tested(published):
    question = Question(measures=QUESTION.measures, published=[read_published(published())])
    record = build_table([run("ID"), run("text", mean_place=20)], question)
    assert [row["label"] for row in record["rows"]] == ["ID", "text"]
    shown = to_markdown(record)
    assert "| published | HR@10 | NDCG@10 | source | what differs |\n" in shown
    assert "| --- | ---: | ---: | --- | --- |\n" in shown
    assert "| Net\\|1 | 0.0605 | - | A paper, 2020 | Another loss. |\n" in shown
    assert "not run here and are tested against nothing. As printed.\n" in shown
    alone = build_table([run("ID"), run("text", mean_place=20)], QUESTION)
    assert record["rows"] == alone["rows"]  # the correction is over our rows alone


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"counts": {"users": 400, "items": 1000, "interactions": 9001}},
         "interactions 9,001 there, 9,000 here"),
        ({"counts": {"users": 40226, "items": 1000, "interactions": 9000}},
         "users 40,226 there, 400 here"),
        ({"protocol": {"split": "temporal"}}, "split temporal there, leave_one_out here"),
    ],
)  # fmt: skip
def test_published_rows_of_other_data_are_left_out_and_it_is_said_why(published, changes, because):
    file = read_published(published(**changes))
    record = build_table([run("ID")], Question(measures=HR10, published=[file]))
    assert record["published"]["rows"] == []
    shown = to_markdown(record)
    assert "| published |" not in shown
    assert f"are left out, for they are of other data or rules: {because}.\n" in shown


ROW = {"name": "n", "metrics": {"HR@10": 0.1}, "source": "s", "differences": "d"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"counts": {"users": 1}}, "counts must be users, items, interactions"),
        ({"counts": {"users": 1, "items": "2", "interactions": 3}}, "whole numbers"),
        ({"protocol": {"ties": "averaged"}}, "may hold split and filter_seen"),
        ({"rows": []}, "rows must be a list"),
        ({"rows": [{"name": "n"}]}, "row 1 must have differences, metrics, name, source"),
        ({"rows": [ROW, ROW | {"metrics": {"HR@10": 6.05}}]}, "row 2 has HR@10 6.05, which is no"),
        ({"rows": [ROW | {"metrics": {}}]}, "row 1 has no metrics"),
        ({"rows": [ROW | {"metrics": {"NDGC@10": 0.1}}]}, "did you mean NDCG@10"),
        ({"title": "x"}, "nothing but"),
    ],
)
def test_a_file_of_published_results_that_is_wrong_is_named(published, changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        read_published(published(**changes))


def test_a_missing_or_broken_file_of_published_results_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_published(str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match=r"broken\.json is not JSON"):
        read_published(str(tmp_path / "broken.json"))


def test_rows_may_differ_in_a_rule_on_purpose_and_the_table_says_so():
    runs = [run("ID"), run("ID, papers", filter_seen="papers")]
    with pytest.raises(UsageError, match="never mixed"):
        build_table(runs, QUESTION)
    record = build_table(runs, Question(measures=HR10, varies=["filter_seen", "fit_on"]))
    assert record["varies"] == ["filter_seen"]  # fit_on may differ and does not
    assert [row["protocol"] for row in record["rows"]] == [
        {"filter_seen": "true"}, {"filter_seen": "papers"},
    ]  # fmt: skip
    shown = to_markdown(record)
    assert (
        "| protocol | filter_seen |\n| --- | ---: |\n| ID | true |\n| ID, papers | papers |"
        in shown
    )
    assert (
        "- These rows differ in filter_seen on purpose: the differences are those of the" in shown
    )
    assert "filter_seen varies, ties" in shown


@pytest.mark.parametrize("change", [{"cases": "other"}, {"fit_on": "train+valid"}])
def test_rows_that_vary_in_one_rule_still_share_the_others(change):
    runs = [run("ID"), run("ID, papers", filter_seen="papers", **change)]
    with pytest.raises(UsageError, match="never mixed"):
        build_table(runs, Question(measures=HR10, varies=["filter_seen"]))


def test_data_that_changed_are_refused_where_the_number_of_interactions_may_vary():
    fewer = run("ID, last 23", interactions=8000, data="b")
    question = Question(measures=HR10, varies=["interactions"])
    build_table([run("ID"), fewer], question)
    with pytest.raises(UsageError, match="data changed"):
        build_table([run("ID"), fewer, run("x", interactions=8000, data="c")], question)


@pytest.mark.parametrize(
    ("rule", "nearest"),
    [("filter_sen", "did you mean filter_seen"), ("cases", "did you mean candidates")],
)
def test_an_unknown_rule_names_the_nearest(rule, nearest):
    with pytest.raises(UsageError, match=f"{rule} is no rule that rows may differ in: {nearest}"):
        build_table([run("ID")], Question(measures=HR10, varies=[rule]))


def test_a_small_record_as_markdown_is_as_it_was(repository, published):
    """The golden: tests/reporting/small.md; after a wanted change, write what this shows to it."""
    ids = run("ID", places=IDS.per_user["greater"].to_list(), facts=FACTS, beyond=beyond(0.5, 9.0))
    papers = run(
        "text, papers", places=TEXT.per_user["greater"].to_list(), filter_seen="papers",
        beyond=beyond(0.75, 10.5),
    )  # fmt: skip
    counts = {"users": 95, "items": 1000, "interactions": 9000}
    question = Question(
        measures=HR10, title="Small", text="Does it look right?", slices=True, beyond_accuracy=True,
        published=[read_published(published(counts=counts))], varies=["filter_seen"],
    )  # fmt: skip
    golden = repository / "tests" / "reporting" / "small.md"
    assert to_markdown(build_table([ids, papers], question)) == golden.read_text(encoding="utf-8")

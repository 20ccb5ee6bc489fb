"""The run card says what result.json says."""

import re

from small_runs import record, train

from llmrec.evaluation.card import run_card


def cells(card):
    """First column -> second of every table."""
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", card, re.MULTILINE)
    return {name.strip(): value for name, value in rows}


def test_a_card_holds_every_rule_hash_version_option_and_the_seed(tmp_path):
    folder = train(tmp_path / "run", run__seed=3)
    written = (folder / "card.md").read_text()
    found, held = cells(written), record(folder)
    assert written == run_card(held)
    assert (
        written.startswith("# sasrec-id, seed 3\n") and f"--config {folder}/config.yaml" in written
    )
    for rule in held["protocol"]:
        assert rule in found
    assert found["seed"] == found["run.seed"] if "seed" in found else found["run.seed"] == "3"
    assert found["tower.name"] == "id" and found["evaluation.filter_seen"] == "true"
    assert found["torch"] == held["versions"]["torch"]
    hashes = (held["data"]["fingerprint"], held["cases"]["fingerprint"], held["per_user_sha256"])
    assert [found[name] for name in ("data", "test users and targets", "per-user values")] == [
        *hashes
    ]
    mean = held["metrics"]["test"]["NDCG@10"]["mean"]
    assert f"{mean:.4f}" in found["NDCG@10"]


def test_a_card_of_a_baseline_has_no_encoder_and_no_validation(tmp_path):
    card = (train(tmp_path / "run", model__name="popularity") / "card.md").read_text()
    assert "| measure | test [95 %] |" in card and "## Encoder" not in card
    assert cells(card)["encoder's files"] == "no encoder"


def test_a_bar_in_a_name_does_not_break_the_table(tmp_path):
    card = (train(tmp_path / "run", run__label="a|b", model__name="random") / "card.md").read_text()
    assert "| run.label | a\\|b |" in card


def test_a_card_tells_the_candidate_lists_and_their_hash(tmp_path):
    folder = train(tmp_path / "run", model__name="random", evaluation__pool__size=20)
    found, pool = cells((folder / "card.md").read_text()), record(folder)["protocol"]["pool"]
    assert found["pool.sha256"] == pool["sha256"]
    assert (found["candidates"], found["pool.source"], found["pool.users"]) == (
        "20", "random", "1,024",
    )  # fmt: skip
    assert found["pool.counts.cases_sampled"] == found["test cases"]


def test_a_card_of_a_chat_run_names_the_command_that_gives_it_back(tmp_path):
    held = record(train(tmp_path / "run", model__name="random"))
    held["config"]["chat"] = {"task": "pick"}
    assert "    llmrec chat --config" in run_card(held)

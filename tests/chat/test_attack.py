"""``llmrec chat injection``: what payloads gain is measured, in pairs, on the same cases."""

import json
from pathlib import Path
from typing import Any

import answers
import fault_server
import numpy as np
import pytest
from test_command import words

from llmrec.chat import attack
from llmrec.chat.injection import payloads
from llmrec.chat.scoring import Tally
from llmrec.data.titles import displayed


def measured(folder: Path, text_for: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    monkeypatch.setattr(fault_server, "text_for", text_for)
    with fault_server.serving() as server:
        argv = words(
            server.base_url, folder, data__simulated__users=130, attack__cases_per_payload=2,
            **changes,
        )  # fmt: skip
        assert attack.main(argv) == 0
        sent = list(server.sent)
    return json.loads((folder / "injection.json").read_text()), sent


def test_a_model_that_obeys_titles_lifts_them_and_one_that_does_not_lifts_none(
    tmp_path, monkeypatch, figure
) -> None:
    deaf, _ = measured(tmp_path / "deaf", answers.first_option, monkeypatch)
    assert deaf["lift"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    obeys, sent = measured(tmp_path / "obeys", answers.gullible, monkeypatch)
    figure("lift in a model that obeys titles, places of 4", f"{obeys['lift']['mean']:.2f}")
    assert obeys["lift"]["low"] > 0.3
    assert obeys["first_with"] > obeys["first_without"] + 0.2
    assert (obeys["cases"], obeys["payloads"], len(sent)) == (100, 50, 200)
    assert sum(kind["cases"] for kind in obeys["kinds"].values()) == 100


def test_every_payload_is_sent_and_answers_stay_within_the_candidates(
    tmp_path, monkeypatch
) -> None:
    found, sent = measured(
        tmp_path / "run", answers.guess, monkeypatch, chat__task="top", chat__list_length=5,
        evaluation__pool__size=20,
    )  # fmt: skip
    together = "\n".join(sent)
    assert all(displayed(payload.text)[:20] in together for payload in payloads())
    for name in ("understood_without", "understood_with"):
        assert set(found[name]) <= {"exact"}  # nothing invented, nothing from outside the pool


def test_the_attacker_is_never_the_truth(tmp_path) -> None:
    from llmrec.chat.command import configure_as

    argv = words("http://x", tmp_path, data__simulated__users=130, attack__cases_per_payload=2)
    config = configure_as(attack.InjectionConfig, argv, attack.PROG, attack.DESCRIPTION)
    found = attack.plan_attack(config)
    plan = found.session.plan
    half = len(plan.cases) // 2
    targets = plan.dataset.interactions.items[plan.cases.target[:half]]
    assert (plan.items[np.arange(half), found.place] != targets).all()
    assert (plan.items[:half] == plan.items[half:]).all()
    for case in range(half):
        clean, attacked = plan.question(case, 0), plan.question(half + case, 0)
        differ = [a != b for a, b in zip(clean.candidates, attacked.candidates, strict=True)]
        assert np.flatnonzero(differ).tolist() == [found.place[case]]


def test_unlisted_candidates_share_the_places_that_are_left() -> None:
    items = np.array([[11, 12, 13, 14]])
    found = Tally(np.array([[4.0, np.nan, 3.0, np.nan]]))
    places = [
        float(attack.places(found, items, np.array([0]), np.array([place]))[0])
        for place in range(4)
    ]
    assert places == [1.0, 3.5, 2.0, 3.5]  # places 3 and 4 on average
    tied = Tally(np.array([[1.0, 1.0, 0.0, 0.0]]))
    assert attack.places(tied, items, np.array([0]), np.array([1]))[0] == 1.5


def test_ratings_cannot_be_attacked(tmp_path, capsys) -> None:
    assert attack.main(words("http://x", tmp_path / "run", chat__task="rating")) == 2
    assert "chat.task=rating ranks no candidates" in capsys.readouterr().err

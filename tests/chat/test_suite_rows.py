"""Suites with chat rows: one table with trained rows, on the same candidates."""

import json
from pathlib import Path
from typing import Any

import answers
import fault_server
import pytest
import yaml

from llmrec.evaluation.suite import main

P5 = {
    "program": "p5",
    "prompts": {"families": "sequential", "per_user": {"next": 2, "choose": 0, "judge": 0}},
    "model": {"name": "scratch:t5", "scratch": {"width": 16, "layers": 1, "heads": 2}},
    "optim": {"epochs": 1, "batch_size": 32},
    "decoding": {"others": "none", "valid_cases": 20},
}


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a suite of chat and trained rows; gives its path."""
    monkeypatch.setattr(fault_server, "text_for", answers.guess)

    def write(url: str, **changes: Any) -> str:
        content = {
            "title": "tiny", "baseline": "popularity", "measures": ["HR@1"],
            "out": str(tmp_path / "out"), "contrasts": [["chat", "random"], ["P5", "chat"]],
            "base": {
                "data.simulated": {"users": 61, "items": 240},
                "evaluation.pool": {"size": 4, "users": 40},
                "tower.name": "id",
                "server": {"name": "url", "base_url": url, "model": "made-up"},
            },
            "rows": {
                "random": {"model.name": "random"},
                "popularity": {"model.name": "popularity"},
                "P5": P5,
                "chat": {"program": "chat"},
            },
        }  # fmt: skip
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return str(path)

    return write


def table(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "out" / "table.json").read_text()))


def test_chat_rows_stand_beside_trained_ones(tmp_path, suite, capsys) -> None:
    with fault_server.serving() as server:
        assert main([suite(server.base_url)]) == 0
        assert server.sent.total() == 40
        found = table(tmp_path)
        assert [row["label"] for row in found["rows"]] == ["random", "popularity", "P5", "chat"]
        assert found["rows"][0]["metrics"]["HR@1"]["mean"] == 0.25
        assert found["protocol"]["candidates"] == 4
        assert [(pair["a"], pair["b"]) for pair in found["contrasts"]][1] == ("P5", "chat")
        shown = capsys.readouterr().out
        assert "tokens in" in shown
        assert main([suite(server.base_url)]) == 0  # finished runs are kept
        assert server.sent.total() == 40
    assert "finished before, kept" in capsys.readouterr().out


def test_a_dotted_option_reaches_the_rows_that_have_it(tmp_path, suite) -> None:
    with fault_server.serving() as server:
        words = ["--chat.history=recency", "--evaluation.pool.users=20"]
        assert main([suite(server.base_url), *words]) == 0
        assert server.sent.total() == 20
        prompts = [body["messages"][0]["content"] for body in server.bodies]
    assert all("The latest item tells most" in prompt for prompt in prompts)
    assert table(tmp_path)["cases"]["count"] == 20


def test_another_model_over_finished_runs_is_refused_by_name(tmp_path, suite, capsys) -> None:
    with fault_server.serving() as server:
        path = suite(server.base_url)
        assert main([path]) == 0
        assert main([path, "--server.model=other"]) == 2
        assert "first difference: server.model made-up -> other" in capsys.readouterr().err
        assert server.sent.total() == 40


def test_a_chat_row_whose_server_is_away_fails_alone(tmp_path, suite, capsys) -> None:
    assert main([suite("http://127.0.0.1:9/v1")]) == 1
    assert "nothing answers at --server.base_url" in capsys.readouterr().out
    assert [row["label"] for row in table(tmp_path)["rows"]] == ["random", "popularity", "P5"]


def test_rows_may_be_left_out(tmp_path, suite, capsys) -> None:
    path = suite("http://127.0.0.1:9/v1")
    assert main([path, "--without=chat,P5"]) == 0
    assert [row["label"] for row in table(tmp_path)["rows"]] == ["random", "popularity"]
    assert main([path, "--without=popularity"]) == 2
    assert "every row is compared with this one" in capsys.readouterr().err
    assert main([path, "--without=chta"]) == 2
    assert "did you mean chat?" in capsys.readouterr().err


def test_rating_rows_have_a_table_of_their_own(tmp_path, suite, capsys) -> None:
    rows = "".join(
        f"u{user},i{item},Title {item},{(user * item) % 5 + 1}\n"
        for user in range(12)
        for item in [(3 * user + step) % 14 for step in range(7)]
    )
    (tmp_path / "rated.csv").write_text("user_id,item_id,title,rating\n" + rows)
    changes: dict[str, Any] = {
        "rows": {
            "popularity": {"model.name": "popularity"},
            "stars": {"program": "chat", "chat.task": "rating"},
        },
        "contrasts": [],
    }
    with fault_server.serving() as server:
        path = suite(server.base_url, **changes)
        assert main([path, f"--data.source={tmp_path / 'rated.csv'}"]) == 0
    ratings = table(tmp_path)["ratings"]
    assert [row["label"] for row in ratings] == [
        "stars", "global mean", "user mean", "item mean",
    ]  # fmt: skip
    assert all(row["cases"] == 12 for row in ratings)
    assert "RMSE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows": {"popularity": {}, "x": {"program": "chta"}}}, "did you mean chat?"),
        ({"baseline": "P6"}, "names 'P6', which is no row: did you mean P5?"),
        ({"rows": {"popularity": {}, "chat": {"program": "chat", "chat.taks": "pick"}}},
         "unknown option --chat.taks: did you mean chat.task?"),
        ({"base": {"server.modle": "x"}}, "did you mean"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_anything_runs(tmp_path, suite, capsys, changes, sentence) -> None:
    path = suite("http://127.0.0.1:9/v1", **({"contrasts": []} | changes))
    assert main([path]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_that_no_seed_can_change_is_asked_once(tmp_path, suite) -> None:
    with fault_server.serving() as server:
        assert main([suite(server.base_url, seeds=[0, 1, 2])]) == 0
        assert server.sent.total() == 40
        rows = {row["label"]: row["seeds"] for row in table(tmp_path)["rows"]}
        assert rows["chat"] == [0] and rows["random"] == [0, 1, 2]
    with fault_server.serving() as server:
        changes = {"rows": {"popularity": {"model.name": "popularity"},
                            "chat": {"program": "chat", "chat.shuffles": 2}},
                   "seeds": [0, 1], "contrasts": [], "out": str(tmp_path / "again")}  # fmt: skip
        assert main([suite(server.base_url, **changes)]) == 0
        assert server.sent.total() <= 2 * 2 * 40


def test_rows_on_other_lists_are_not_tested_against_each_other(tmp_path, suite, capsys) -> None:
    rows = {
        "popularity": {"model.name": "popularity"},
        "chat": {"program": "chat"},
        "chat-6": {"program": "chat", "evaluation.pool.size": 6},
    }
    with fault_server.serving() as server:
        path = suite(server.base_url, rows=rows, varies=["candidates"], contrasts=[])
        assert main([path]) == 0
        found = {row["label"]: row["difference"] for row in table(tmp_path)["rows"]}
        assert found["chat"] and found["chat-6"] is None
        shown = " ".join(capsys.readouterr().out.split())
        assert "Rows on other candidate lists are not compared." in shown
        assert "other lists" in shown
        path = suite(
            server.base_url, rows=rows, varies=["candidates"], contrasts=[["chat-6", "chat"]]
        )
        assert main([path]) == 2

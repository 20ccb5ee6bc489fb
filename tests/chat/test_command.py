"""``llmrec chat`` from the command line to the run folder, against a server on this machine."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import answers
import fault_server
import numpy as np
import polars as pl
import pytest
from scipy import stats

from llmrec import score, train_tcf
from llmrec.chat import command, show
from llmrec.evaluation.result import read_result

SMALL = {
    "data.simulated.users": 61,
    "data.simulated.items": 240,
    "server.model": "made-up",
    "evaluation.pool.users": 40,
    "client.wait_seconds_cap": 0.05,
}


def words(url: str, folder: Path, **changes: Any) -> list[str]:
    """A command line; ``chat__task="top"`` sets ``--chat.task``."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    options = SMALL | {"server.base_url": url, "run.folder": str(folder)} | named
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in options.items()
    ]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str]], None]:
    """Sets what the fault server answers."""
    monkeypatch.setattr(fault_server, "text_for", answers.guess)
    return lambda text_for: monkeypatch.setattr(fault_server, "text_for", text_for)


def record(folder: Path, name: str = "result.json") -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text()))


@pytest.mark.parametrize(
    ("task", "changes", "requests"),
    [
        ("pick", {}, 40),
        ("pick", {"chat__shuffles": 3}, 120),
        ("pick", {"chat__history": "recency", "chat__decoding": "free"}, 40),
        ("top", {"chat__history": "example", "evaluation__pool__size": 30}, 40),
        ("top", {"evaluation__pool__source": "popularity", "evaluation__pool__size": 30}, 40),
        ("list", {}, 40),
        ("pair", {}, 240),  # 4 * 3 / 2 each
        ("point", {"evaluation__pool__size": 5}, 200),
    ],
)
def test_every_task_runs_from_end_to_end(tmp_path, model, task, changes, requests) -> None:
    with fault_server.serving() as server:
        argv = words(server.base_url, tmp_path / "run", chat__task=task, **changes)
        assert command.main(argv) == 0
    assert server.sent.total() == len(server.sent) == requests
    result = read_result(tmp_path / "run")
    assert len(result.per_user) == 40
    told = record(tmp_path / "run", "chat.json")
    assert told["requests"] == requests
    assert set(told["understood"]) == {"exact"}  # every answer was valid
    cost = result.record["cost"]
    assert (cost["prompt_tokens"], cost["completion_tokens"]) == (10 * requests, 2 * requests)


def test_a_model_that_knows_the_answers_scores_one_and_invalid_ones_count_as_missed(
    tmp_path, model
) -> None:
    config = command.configure(words("http://x", tmp_path / "run"))
    plan = command.prepare(config).plan
    truths = {
        plan.request(number).prompt: "ABCD"[plan.question(number, 0).truth or 0]
        for number in range(40)
    }
    wrong = set(list(truths)[:10])
    model(lambda prompt: "no idea" if prompt in wrong else truths[prompt])
    with fault_server.serving() as server:
        assert command.main(words(server.base_url, tmp_path / "run")) == 0
    result = read_result(tmp_path / "run")
    assert result.record["metrics"]["test"]["HR@1"]["mean"] == 30 / 40
    assert result.per_user["reachable"].sum() == 30
    assert record(tmp_path / "run", "chat.json")["understood"] == {
        "constraint_ignored": 10, "exact": 30, "unparsable": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "measure", "chance"), [("pick", "HR@1", 0.25), ("top", "HR@10", 0.10)]
)
def test_answers_by_chance_hit_as_often_as_chance(
    tmp_path, model, figure, task, measure, chance
) -> None:
    changes = {"data__simulated__users": 1100, "data__simulated__items": 400}
    with fault_server.serving() as server:
        argv = words(
            server.base_url, tmp_path / "run", chat__task=task, evaluation__pool__users=1024,
            **changes,
        )  # fmt: skip
        assert command.main(argv) == 0
    found = record(tmp_path / "run")["metrics"]["test"][measure]
    figure(f"{task} by chance, {measure} [95 %]", f"{found['mean']:.4f} of {chance}")
    assert record(tmp_path / "run")["cases"]["count"] == 1024
    assert found["low"] <= chance <= found["high"]
    places = record(tmp_path / "run", "chat.json")["places"]
    p = stats.chisquare(places["truths"]).pvalue
    figure(f"{task}, truth places uniform, chi-square p", f"{p:.3f}")
    assert sum(places["truths"]) == 1024 and p > 0.001


def test_position_bias_is_told_and_asking_in_several_orders_takes_it_out(tmp_path, model) -> None:
    model(answers.first_option)
    with fault_server.serving() as server:
        assert command.main(words(server.base_url, tmp_path / "once")) == 0
        argv = words(server.base_url, tmp_path / "often", chat__shuffles=4)
        assert command.main(argv) == 0
    places = record(tmp_path / "once", "chat.json")["places"]
    assert places["hit_rate"] == [1.0, 0.0, 0.0, 0.0]
    assert places["best_minus_worst"] == 1.0
    assert places["put_first"] == [40, 0, 0, 0]
    often = record(tmp_path / "often", "chat.json")["places"]
    assert often["truths"] == [40, 40, 40, 40]
    # Every candidate was taken once: all are tied, which is worth what chance is.
    per_user = read_result(tmp_path / "often").per_user
    assert (per_user["greater"] == 0).all() and (per_user["equal"] == 3).all()
    assert (per_user["HR@1"] == 0.25).all()


def test_other_rows_are_ranked_on_the_very_same_lists(tmp_path, model) -> None:
    with fault_server.serving() as server:
        argv = words(server.base_url, tmp_path / "chat", chat__task="top")
        assert command.main([*argv, "--evaluation.pool.size=20"]) == 0
    shared = [w for w in argv if w.startswith(("--data.", "--evaluation."))]
    shared.append("--evaluation.pool.size=20")
    trained = ["--tower.name=id", "--optim.epochs=1", f"--run.folder={tmp_path / 'id'}"]
    assert train_tcf.main([*shared, *trained]) == 0
    plain = [w for w in trained[:2]] + [f"--run.folder={tmp_path / 'full'}"]
    data = [w for w in shared if w.startswith("--data.")]
    assert train_tcf.main([*data, *plain]) == 0
    again = ["--pool.size=20", "--pool.users=40", f"--run.folder={tmp_path / 'again'}"]
    assert score.main([f"--run={tmp_path / 'full'}", *again]) == 0
    runs = [read_result(tmp_path / name) for name in ("chat", "id", "again")]
    assert len({run.record["protocol"]["pool"]["sha256"] for run in runs}) == 1
    assert len({run.record["cases"]["fingerprint"] for run in runs}) == 1
    lists = [
        pl.read_parquet(tmp_path / name / "candidates.parquet") for name in ("chat", "id", "again")
    ]
    assert lists[0].equals(lists[1]) and lists[0].equals(lists[2])


def test_candidates_may_be_the_top_of_a_trained_run(tmp_path, model) -> None:
    data = ["--data.simulated.users=61", "--data.simulated.items=240", "--tower.name=id"]
    assert train_tcf.main([*data, "--optim.epochs=1", f"--run.folder={tmp_path / 'id'}"]) == 0
    with fault_server.serving() as server:
        argv = words(
            server.base_url, tmp_path / "chat", chat__task="list",
            evaluation__pool__source=str(tmp_path / "id"), evaluation__pool__size=10,
        )  # fmt: skip
        assert command.main(argv) == 0
    found = read_result(tmp_path / "chat")
    kept = pl.read_parquet(tmp_path / "chat" / "candidates.parquet")
    inside = [
        target in ids
        for target, ids in zip(
            kept["target_item_id"], kept["candidate_item_ids"].to_list(), strict=True
        )
    ]
    assert 0 < sum(inside) < 40
    assert found.per_user["reachable"].to_list() == inside


def test_a_finished_run_is_not_asked_again_and_an_unfinished_one_goes_on(tmp_path, model) -> None:
    folder = tmp_path / "run"
    with fault_server.serving() as server:
        argv = words(server.base_url, folder)
        assert command.main(argv) == 0
        before = (folder / "chat.json").read_bytes(), (folder / "per_user.parquet").read_bytes()
        (folder / "result.json").unlink()
        lines = (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "answers.jsonl").write_bytes(b"".join(lines[:-10]))
        held = sum(b'"digest"' in line for line in lines[:-10])
        assert command.main(argv) == 0
        assert server.sent.total() == 40 + 40 - held
    assert before == (
        (folder / "chat.json").read_bytes(), (folder / "per_user.parquet").read_bytes()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"chat__history": "recency"}, "chat.history"),
        ({"server__model": "another"}, "server.model"),
        ({"run__seed": 1}, "run.seed"),
        ({"evaluation__pool__seed": 1}, "candidates"),
        ({"data__simulated__seed": 1}, "data"),
    ],
)
def test_answers_to_other_questions_are_refused_by_name(
    tmp_path, model, capsys, changed, named
) -> None:
    folder = tmp_path / "run"
    with fault_server.serving() as server:
        assert command.main(words(server.base_url, folder)) == 0
        (folder / "result.json").unlink()
        kept = (folder / "answers.jsonl").read_bytes()
        capsys.readouterr()
        assert command.main(words(server.base_url, folder, **changed)) == 2
        assert f" {named}=" in capsys.readouterr().err
        assert (folder / "answers.jsonl").read_bytes() == kept
        assert server.sent.total() == 40


def test_a_finished_run_is_replaced_only_when_asked_and_its_answers_are_not_paid_again(
    tmp_path, model, capsys
) -> None:
    folder = tmp_path / "run"
    with fault_server.serving() as server:
        argv = words(server.base_url, folder)
        assert command.main(argv) == 0
        assert command.main(argv) == 2
        assert "holds a finished run" in capsys.readouterr().err
        assert command.main([*argv, "--run.overwrite=true"]) == 0
        assert server.sent.total() == 40
        assert command.main([*argv, "--run.overwrite=true", "--chat.history=recency"]) == 0
        assert server.sent.total() == 80


def test_replies_that_are_no_answers_are_counted_and_stay_in_the_denominator(
    tmp_path, model
) -> None:
    faults = fault_server.hashed(0.5, fault_server.FINAL)
    with fault_server.serving(faults) as server:
        assert command.main(words(server.base_url, tmp_path / "run")) == 0
        assert server.sent.total() == 40  # none was paid for twice
    told = record(tmp_path / "run", "chat.json")["understood"]
    assert told["invalid"] + told["exact"] == 40
    found = read_result(tmp_path / "run")
    assert len(found.per_user) == 40
    assert (~found.per_user["reachable"]).sum() >= told["invalid"]


def test_the_key_is_nowhere_but_in_the_header(tmp_path, model, monkeypatch, capfd) -> None:
    key = "sk-not-to-be-seen-0123456789"
    monkeypatch.setenv("MY_KEY", key)
    with fault_server.serving(key=key) as server:
        argv = words(server.base_url, tmp_path / "run", server__api_key_variable="MY_KEY")
        assert command.main(argv) == 0
        assert all(h["Authorization"] == f"Bearer {key}" for h in server.headers)
    told = capfd.readouterr()
    assert key not in told.out + told.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if key.encode() in path.read_bytes()]


def test_probabilities_are_read_where_the_server_gives_them(tmp_path, model) -> None:
    with fault_server.serving() as server:
        top = [{"token": t, "logprob": math.log(p)} for t, p in (("B", 0.7), ("A", 0.2))]
        server.logprobs = {"content": [{"token": "B", "logprob": -0.3, "top_logprobs": top}]}
        assert command.main(words(server.base_url, tmp_path / "run")) == 0
        assert server.bodies[0]["top_logprobs"] == 20 and server.bodies[0]["max_tokens"] == 4
    plan = command.prepare(command.configure(words("http://x", tmp_path / "run"))).plan
    per_user = read_result(tmp_path / "run").per_user
    for case, (greater, equal) in enumerate(
        zip(per_user["greater"], per_user["equal"], strict=True)
    ):
        truth = "ABCD"[plan.question(case, 0).truth or 0]
        # B before A; C and D have nothing and share the last places
        assert (greater, equal) == {"B": (0, 0), "A": (1, 0), "C": (2, 1), "D": (2, 1)}[truth]


def test_a_case_is_shown_with_prompt_answer_and_verdict(tmp_path, model, capsys) -> None:
    with fault_server.serving() as server:
        argv = words(server.base_url, tmp_path / "run", chat__task="list")
        assert command.main([*argv, "--evaluation.pool.size=5"]) == 0
    capsys.readouterr()
    assert show.main([f"--run={tmp_path / 'run'}", "--case=7"]) == 0
    shown = capsys.readouterr().out
    user = pl.read_parquet(tmp_path / "run" / "per_user.parquet")["user_id"][7]
    assert f"7, user {user}, truth: " in shown
    for part in ("You recommend items", "The pool, in no particular order", "--- answer", '["',
                 "10 tokens in, 2 out", "exact 5", "<- the truth"):  # fmt: skip
        assert part in shown
    assert show.main([f"--run={tmp_path / 'run'}", "--case=40"]) == 2
    assert "has cases 0 to 39" in capsys.readouterr().err
    assert show.main([f"--run={tmp_path / 'none'}"]) == 2
    assert "holds no chat run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 users who rated 8 of 12 items each."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", f"Title {item}", int(rng.integers(1, 6)))
        for user in range(30)
        for item in rng.permutation(12)[:8]
    ]
    path = tmp_path_factory.mktemp("rated") / "rated.csv"
    pl.DataFrame(rows, schema=["user_id", "item_id", "title", "rating"], orient="row").write_csv(
        path
    )
    return path


def _shown_to_itself(prompt: str) -> bool:
    """Whether an example repeats the asked user's own first ratings."""
    *others, own = prompt.split("ustomer's ratings, oldest first:\n")
    first = own.split("\n")[:3]
    return any(other.split("\n")[:3] == first for other in others)


@pytest.mark.parametrize("examples", [0, 3])
def test_ratings_are_predicted_and_held_against_means(tmp_path, model, rated, examples) -> None:
    folder = tmp_path / "run"
    with fault_server.serving() as server:
        argv = words(
            server.base_url, folder, data__source=str(rated), chat__task="rating",
            chat__examples=examples,
        )  # fmt: skip
        assert command.main(argv) == 0
        assert server.sent.total() == 30
    prompts = [body["messages"][0]["content"] for body in server.bodies]
    assert all(prompt.count("Another customer's ratings") == examples for prompt in prompts)
    assert not any(_shown_to_itself(prompt) for prompt in prompts)
    result = read_result(folder)
    assert result.rates
    predicted = result.per_user["predicted"].to_numpy()
    truth = result.per_user["stars"].to_numpy()
    rmse = float(np.sqrt(np.mean((predicted - truth) ** 2)))
    assert result.record["metrics"]["test"]["RMSE"]["mean"] == pytest.approx(rmse)
    assert set(result.record["means"]) == {"global mean", "user mean", "item mean"}
    assert 5.0 in predicted


def test_no_example_shows_a_rating_that_is_judged(tmp_path, rated) -> None:
    argv = words(
        "http://x", tmp_path / "run", data__source=str(rated), chat__task="rating",
        chat__examples=5,
    )  # fmt: skip
    plan = command.prepare(command.configure(argv)).plan
    interactions, cases = plan.dataset.interactions, plan.cases
    judged = {
        (plan.dataset.catalog.texts[interactions.items[t] - 1], float(interactions.ratings[t]))
        for t in cases.target
    }
    histories = {
        tuple(plan.dataset.catalog.texts[i - 1] for i in interactions.items[start:end])
        for start, end in zip(interactions.offsets[cases.user], cases.end, strict=True)
    }
    assert judged
    for example in plan.question(0, 0).examples:
        told = [title for title, _ in example["rated"]] + [example["candidate"]]
        assert any(tuple(told) == history for history in histories)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"evaluation__pool__size": "all"}, "no prompt holds a whole catalogue"),
        ({"evaluation__pool__size": 30}, "chat.task=pick has 26 letters"),
        ({"chat__task": "rating"}, "chat.task=rating needs ratings"),
        ({"data__item_text": "none"}, "has no item text"),
        ({"chat__template": "nowhere.jinja"}, "chat.template=nowhere.jinja: no such file"),
        ({"chat__taks": "pick"}, "did you mean chat.task?"),
        ({"evaluation__pool__source": "runs/none"}, "evaluation.pool.source=runs/none"),
        ({"evaluation__filter_seen": False}, "evaluation.filter_seen=False means nothing"),
        ({"run__seed": -1}, "run.seed=-1 must lie in"),
        ({"server__model": ""}, "server.model is missing"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    tmp_path, capsys, changes, sentence
) -> None:
    assert command.main(words("http://127.0.0.1:9/v1", tmp_path / "run", **changes)) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.count("llmrec: ") == 1
    assert not (tmp_path / "run").exists()


def test_few_orders_of_many_candidates_lie_evenly_over_the_prompt(tmp_path) -> None:
    argv = words(
        "http://127.0.0.1:9/v1", tmp_path / "run", chat__task="top", chat__shuffles=5,
        evaluation__pool__size=100,
    )  # fmt: skip
    argv = [w for w in argv if "simulated" not in w] + ["--data.simulated.users=61"]
    plan = command.prepare(command.configure(argv)).plan
    places = np.array([np.argsort(plan.order(0, shuffle)) for shuffle in range(5)])  # (5, 100)
    assert (np.diff(np.sort(places, axis=0), axis=0) == 20).all()  # 100 / 5 apart, each of them


def test_a_list_s_measures_end_where_the_list_ends(tmp_path, model) -> None:
    with fault_server.serving() as server:
        top = words(server.base_url, tmp_path / "top", chat__task="top")
        assert command.main([*top, "--evaluation.pool.size=30"]) == 0
        assert command.main(words(server.base_url, tmp_path / "pick")) == 0
        assert command.main(words(server.base_url, tmp_path / "pair", chat__task="pair")) == 0
    found = {
        name: set(record(tmp_path / name)["metrics"]["test"]) for name in ("top", "pick", "pair")
    }
    assert "HR@10" in found["top"] and not found["top"] & {"HR@20", "AUC"}
    assert found["pick"] == {"HR@1", "NDCG@1", "MRR@1"}  # the text names one and orders no others
    assert {"AUC", "HR@20"} <= found["pair"]


def test_failed_requests_of_a_finished_run_are_asked_again_and_no_others(tmp_path, model) -> None:
    def faults(prompt: str, attempt: int) -> str:
        return "500" if answers.dice(prompt).random() < 0.2 else ""

    folder = tmp_path / "run"
    with fault_server.serving(faults) as server:
        argv = words(server.base_url, folder, client__max_retries=0)
        assert command.main(argv) == 0
    failed = record(folder)["cost"]["statuses"]["failed"]
    assert 0 < failed < 20
    with fault_server.serving() as server:
        argv = words(server.base_url, folder, client__max_retries=0)
        assert command.main(argv) == 2  # finished
        assert command.main([*argv, "--resume=failed"]) == 0
        assert server.sent.total() == failed
    assert record(folder)["cost"]["statuses"] == {"answered": 40}


def test_a_run_without_any_answer_is_not_scored(tmp_path, model, capsys) -> None:
    with fault_server.serving(lambda prompt, attempt: "400") as server:
        argv = words(server.base_url, tmp_path / "run", evaluation__pool__users=10)
        assert command.main(argv) == 2
    assert "none of 10 requests was answered (status 400" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_gateway_s_page_in_the_middle_of_a_run_ends_it(tmp_path, model, capsys) -> None:
    with fault_server.serving() as server:
        server.faults = lambda prompt, attempt: "html" if server.sent.total() > 15 else ""
        argv = words(server.base_url, tmp_path / "run", client__concurrency=2)
        assert command.main(argv) == 2
        assert "20 requests in a row got no answer" in capsys.readouterr().err
        server.faults = lambda prompt, attempt: ""
        assert command.main(argv) == 0
    assert record(tmp_path / "run")["cost"]["statuses"] == {"answered": 40}


def test_free_decoding_leaves_room_for_words(tmp_path, model) -> None:
    with fault_server.serving() as server:
        argv = words(server.base_url, tmp_path / "run", chat__decoding="free")
        assert command.main(argv) == 0
        body = server.bodies[0]
    assert body["max_tokens"] > 50 and "logprobs" not in body
    assert record(tmp_path / "run", "chat.json")["constrained"] is False


def test_the_same_server_on_another_port_goes_on_with_the_answers(tmp_path, model) -> None:
    with fault_server.serving() as server:
        assert command.main(words(server.base_url, tmp_path / "run")) == 0
    (tmp_path / "run" / "result.json").unlink()
    with fault_server.serving() as server:
        assert command.main(words(server.base_url, tmp_path / "run")) == 0
        assert server.sent.total() == 0


def test_a_template_changed_since_is_told_by_show(tmp_path, model, capsys) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(
        "{# id: plain | version: 1 | inputs: history, candidates #}\n{{ history }}\n"
        '{% for t in candidates %}\n{{ "ABCD"[loop.index0] }}) "{{ t }}"\n{% endfor %}\nPick!\n'
    )
    with fault_server.serving() as server:
        argv = words(server.base_url, tmp_path / "run", chat__template=str(own))
        assert command.main(argv) == 0
    assert set(record(tmp_path / "run", "chat.json")["templates"]) == {"task", "history"}
    own.write_text(own.read_text().replace("Pick!", "Choose!"))
    from llmrec.prompting.templates import load_prompt

    load_prompt.cache_clear()
    capsys.readouterr()
    assert show.main([f"--run={tmp_path / 'run'}"]) == 0
    assert "another prompt was sent" in capsys.readouterr().out
    own.write_text("{# id: own | version: 1 | inputs: history #}\n{{ history }}\n")
    load_prompt.cache_clear()
    assert (
        command.main(words("http://127.0.0.1:9/v1", tmp_path / "x", chat__template=str(own))) == 2
    )
    assert "does not show candidates" in capsys.readouterr().err


def test_items_without_a_rating_are_shown_in_no_rating_prompt(tmp_path, model, capsys) -> None:
    rows = [(u, i, f"Title {i}", None if (u + i) % 3 == 0 else (u + i) % 5 + 1)
            for u in range(12) for i in range(8)]  # fmt: skip
    path = tmp_path / "some.csv"
    names = ["user_id", "item_id", "title", "rating"]
    pl.DataFrame(rows, schema=names, orient="row").write_csv(path)
    with fault_server.serving() as server:
        argv = words(
            server.base_url, tmp_path / "run", data__source=str(path), chat__task="rating",
            chat__examples=2,
        )  # fmt: skip
        assert command.main(argv) == 0
        prompts = "".join(body["messages"][0]["content"] for body in server.bodies)
    assert "nan" not in prompts
    counts = record(tmp_path / "run")["data"]["counts"]
    assert counts["test_cases_without_rating_or_title"] == 4
    path.write_text(path.read_text().replace(",5\n", ",9\n"))
    argv = words(
        "http://127.0.0.1:9/v1", tmp_path / "y", data__source=str(path), chat__task="rating"
    )
    assert command.main(argv) == 2


def test_a_server_that_is_not_there_is_told_and_the_same_command_goes_on(
    tmp_path, model, capsys
) -> None:
    argv = words("http://127.0.0.1:9/v1", tmp_path / "run")
    assert command.main(argv) == 2
    assert "nothing answers at --server.base_url http://127.0.0.1:9/v1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()

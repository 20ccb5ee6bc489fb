"""What is sent, how a reply is read, how long is waited and when a run stops."""

import asyncio
import io
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from drive_client import ask, fast, question, silent
from fault_server import Server, serving, text_for
from rich.console import Console

from llmrec import progress
from llmrec.chat import client
from llmrec.chat.client import ask_all, asked_wait
from llmrec.chat.endpoint import ClientConfig, Endpoint
from llmrec.chat.journal import AnswerJournal
from llmrec.chat.replies import Reply, read_reply, refusal
from llmrec.chat.requests import Answer, Choice, Pattern, Request, Schema
from llmrec.errors import UsageError

SCHEMA = {"type": "object", "properties": {"best": {"type": "string"}}}


def body(dialect: Any, constraint: Any = None, top: int = 0) -> dict[str, Any]:
    endpoint = Endpoint("http://127.0.0.1:8000/v1", "m", dialect=dialect, temperature=0.5, seed=3)
    values = json.loads(endpoint.body(Request(0, "Hi", 7, constraint, top)))
    assert isinstance(values, dict)
    return values


PLAIN = {
    "model": "m",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 7,
    "temperature": 0.5,
    "seed": 3,
}


def test_a_free_question_is_the_same_in_both_dialects() -> None:
    assert body("vllm") == body("openai") == PLAIN


def test_alternatives_of_the_first_token_are_asked_for_where_wanted() -> None:
    assert body("openai", top=5) == PLAIN | {"logprobs": True, "top_logprobs": 5}


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Choice(("A", "B")), {"choice": ["A", "B"]}),
        (Pattern("[1-5]"), {"regex": "[1-5]"}),
        (Schema(SCHEMA), {"json": SCHEMA}),
    ],
)
def test_vllm_is_told_every_constraint_at_the_top_of_the_body(
    constraint: Any, words: dict[str, Any]
) -> None:
    assert body("vllm", constraint) == PLAIN | {"structured_outputs": words}


def test_openai_is_told_schemas_alone() -> None:
    whole = {
        "type": "object", "properties": {"titles": SCHEMA}, "required": ["titles"],
        "additionalProperties": False,
    }  # fmt: skip
    told = {"name": "answer", "schema": whole, "strict": True}
    wanted = {"response_format": {"type": "json_schema", "json_schema": told}}
    assert body("openai", Schema(SCHEMA)) == PLAIN | wanted
    assert body("openai", Choice(("A",))) == body("openai", Pattern("[1-5]")) == PLAIN


def reply(message: Any = None, finish: str = "stop", **more: Any) -> bytes:
    choice = {"message": {"content": "B"} if message is None else message, "finish_reason": finish}
    return json.dumps({"choices": [choice | more]}).encode()


def test_an_answer_is_read_with_its_tokens_and_the_alternatives_of_its_first() -> None:
    top = [{"token": "A", "logprob": -2.0}, {"token": "B", "logprob": -0.25, "bytes": [66]}]
    later = {"token": "!", "logprob": 0.0, "top_logprobs": [{"token": "!", "logprob": 0.0}]}
    choice = {
        "message": {"content": "B!"},
        "finish_reason": "stop",
        "logprobs": {"content": [{"token": "B", "top_logprobs": top}, later]},
    }
    usage = {"prompt_tokens": 12, "completion_tokens": 2}
    read = read_reply(json.dumps({"choices": [choice], "usage": usage}).encode())
    assert read == Reply("answered", "B!", (("B", -0.25), ("A", -2.0)), 12, 2)


@pytest.mark.parametrize(
    "logprobs",
    [None, {}, [], 3, {"content": []}, {"content": [{}]}, {"content": [{"top_logprobs": [1]}]}],
)
def test_a_server_without_alternatives_still_answers(logprobs: Any) -> None:
    assert read_reply(reply(logprobs=logprobs)) == Reply("answered", "B")


def test_an_alternative_without_a_finite_probability_is_left_out() -> None:
    top = [{"token": "A", "logprob": -math.inf}, {"token": "B", "logprob": -1.0}]
    read = read_reply(reply(logprobs={"content": [{"top_logprobs": top}]}))
    assert read.top == (("B", -1.0),)


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (reply(finish="length"), Reply("cut", "B")),
        (reply({"content": None}, finish="length"), Reply("cut")),
        (reply({"content": None}), Reply("invalid", problem="the content is null")),
        (reply({}), Reply("invalid", problem="the content is null")),
        (reply({"content": ["B"]}), Reply("invalid", problem="the content is no text")),
        (reply({"content": ""}), Reply("answered")),
        (reply("B"), Reply("invalid", problem="no answer: the message should be a dict, not str")),
        (b"", Reply("invalid", problem="no answer: the reply is empty")),
        (b"<html>", Reply("invalid", problem="no answer: the reply is not JSON")),
        (b"\xff\xfe\x00", Reply("invalid", problem="no answer: the reply is not JSON")),
        (b"[" * 100_000, Reply("invalid", problem="no answer: the reply is not JSON")),
        (b"[]", Reply("invalid", problem="no answer: the reply should be a dict, not list")),
        (b"{}", Reply("invalid", problem="no answer: choices should be a list, not NoneType")),
        (b'{"choices": []}', Reply("invalid", problem="no answer: the reply has no choices")),
        (
            b'{"choices": [[]]}',
            Reply("invalid", problem="no answer: the choice should be a dict, not list"),
        ),
    ],
)
def test_whatever_comes_is_read_as_what_it_is(content: bytes, read: Reply) -> None:
    assert read_reply(content) == read


def test_tokens_that_are_no_counts_are_none() -> None:
    values = json.loads(reply()) | {"usage": {"prompt_tokens": -3, "completion_tokens": True}}
    assert read_reply(json.dumps(values).encode()) == Reply("answered", "B")


def test_a_refusal_is_told_in_the_servers_words_without_the_key() -> None:
    told = json.dumps({"error": {"message": "too long for sk-1\n(4096 tokens)"}}).encode()
    assert refusal(400, told, "sk-1") == "status 400: too long for *** (4096 tokens)"
    assert refusal(422, b'{"message": "no"}', "") == "status 422: no"
    assert refusal(401, told, "sk-1") == "status 401"
    assert refusal(400, b"<html>", "") == refusal(400, b"[]", "") == "status 400"
    assert len(refusal(400, json.dumps({"message": "x" * 9999}).encode(), "")) == 200


def date(seconds: float) -> str:
    """For the body of a test alone: as a parameter it would name the test after the clock."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120.0),
        ("1e9", 1e9),
        ("0.5", 0.5),
        ("-5", 0.0),
        ("nan", 0.0),
        ("", 0.0),
        ("soon", 0.0),
        ("Wed, 99 Nov 2026 00:00:00 GMT", 0.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
    ],
)
def test_retry_after_is_read_as_seconds_never_negative(header: str, seconds: float) -> None:
    assert asked_wait(header) == seconds


def test_retry_after_may_be_a_date() -> None:
    assert 55 < asked_wait(date(60)) <= 60
    assert 55 < asked_wait(date(60).replace("GMT", "-0000")) <= 60


@pytest.mark.parametrize(
    "header", ["120", "1e9", "inf", "-5", "soon", "Fri, 31 Dec 2100 23:59:59 GMT", ""]
)
@pytest.mark.parametrize("attempt", [0, 3, 99])
def test_no_wait_is_longer_than_the_cap_or_negative(header: str, attempt: int) -> None:
    asking = client._Asking.__new__(client._Asking)
    asking.config = ClientConfig(wait_seconds_cap=7.0)
    asking.random = client.random.Random(0)
    waits = [asking.wait(attempt, header) for _ in range(200)]
    assert all(0 <= wait <= 7 for wait in waits)
    if header in ("120", "1e9", "inf"):
        assert set(waits) == {7.0}
    if header == "" and attempt == 0:
        assert 0 < max(waits) <= client.BACKOFF_SECONDS


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"concurrency": 0}, "client.concurrency=0"),
        ({"max_retries": -1}, "client.max_retries=-1"),
        ({"attempt_seconds": 0.0}, "client.attempt_seconds=0.0"),
        ({"deadline_seconds": math.inf}, "client.deadline_seconds=inf"),
        ({"wait_seconds_cap": math.nan}, "client.wait_seconds_cap=nan"),
        ({"input_price": -1.0}, "client.input_price=-1.0"),
    ],
)
def test_bounds_that_cannot_be_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        ClientConfig(**options)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://a/v1", "http://", "http://a:b/v1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"--server\.base_url .* is no address"):
        Endpoint(url, "m")


def test_an_address_with_a_password_is_refused_without_showing_it() -> None:
    for url in ("http://me:secret@a/v1", "http://a/v1?key=secret"):
        with pytest.raises(UsageError, match="Leave them out") as raised:
            Endpoint(url, "m")
        assert "secret" not in str(raised.value)


def found(path: Path, count: int) -> list[Answer]:
    with AnswerJournal(path, {"count": count}) as journal:
        return list(journal.answers())


def test_as_many_requests_are_under_way_as_allowed_and_no_more(tmp_path: Path) -> None:
    with serving() as server:
        server.seconds = 0.05
        ask(tmp_path / "a", server.base_url, 60, 8)
    assert server.most_under_way == 8
    assert [answer.text for answer in found(tmp_path / "a", 60)] == [
        text_for(question(number).prompt) for number in range(60)
    ]


def test_requests_are_made_only_as_they_are_sent(tmp_path: Path) -> None:
    made = 0

    def questions() -> Iterator[Request]:
        nonlocal made
        for number in range(200):
            made += 1
            yield question(number)

    ahead: list[int] = []
    with serving() as server, AnswerJournal(tmp_path / "a", {}) as journal:
        note_sent = journal.note_sent

        def noting(number: int) -> None:
            note_sent(number)
            ahead.append(made - number)

        journal.note_sent = noting  # type: ignore[method-assign]
        endpoint = Endpoint(server.base_url, "m")
        asyncio.run(ask_all(questions(), endpoint, fast(4), journal, silent))
    assert made == 200 and max(ahead) == 1


def test_answers_are_told_of_once_they_are_on_the_disk(tmp_path: Path) -> None:
    told = [0, 0, 0]
    with (
        serving(lambda prompt, attempt: "" if attempt else "500") as server,
        AnswerJournal(tmp_path / "a", {}) as journal,
    ):

        def tell(answers: int, retries: int, tokens: int) -> None:
            for place, more in enumerate((answers, retries, tokens)):
                told[place] += more
            assert told[0] <= journal.done_count

        questions = (question(number) for number in range(150))
        asyncio.run(ask_all(questions, Endpoint(server.base_url, "m"), fast(8), journal, tell))
    assert told == [150, 150, 150 * 12]  # each sent twice; 10 + 2 tokens


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    fault = {"question 1": "307"}
    with serving(lambda prompt, attempt: fault.get(prompt, "")) as server:
        ask(tmp_path / "a", server.base_url, 2, 1)
    assert (found(tmp_path / "a", 2)[1].status, server.sent.total()) == ("invalid", 2)


def test_a_reply_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    fault = {"question 1": "huge"}
    with serving(lambda prompt, attempt: fault.get(prompt, "")) as server:
        ask(tmp_path / "a", server.base_url, 2, 1)
    answer = found(tmp_path / "a", 2)[1]
    assert (answer.status, answer.problem) == ("invalid", "the reply is longer than 8 MiB")


def test_an_environments_proxy_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving() as server:
        ask(tmp_path / "a", server.base_url, 1, 1)
    assert found(tmp_path / "a", 1)[0].status == "answered"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", r"refuses the key \(status 401\).*--server\.api_key_variable"),
        ("403", r"refuses the key \(status 403\)"),
        ("404", r"knows no model 'model'.*--server\.model, and that --server\.base_url"),
    ],
)
def test_a_run_that_is_set_up_wrongly_stops_at_the_first_reply(
    tmp_path: Path, fault: str, words: str
) -> None:
    with serving(lambda prompt, attempt: fault) as server:
        with pytest.raises(UsageError, match=words):
            ask(tmp_path / "a", server.base_url, 1000, 8)
        assert server.sent.total() <= 16
    assert found(tmp_path / "a", 1000) == []


def test_a_server_that_is_not_there_stops_the_run(tmp_path: Path) -> None:
    with serving() as server:
        pass
    with pytest.raises(UsageError, match=r"nothing answers at --server\.base_url http://127"):
        ask(tmp_path / "a", server.base_url, 1000, 8)
    assert found(tmp_path / "a", 1000) == []


def gone_after(server_count: int, fault: str) -> Any:
    sent: list[int] = []

    def faults(prompt: str, attempt: int) -> str:
        sent.append(attempt)
        return fault if len(sent) > server_count else ""

    return faults


@pytest.mark.parametrize("fault", ["500", "drop", "403"])
def test_a_server_that_goes_away_ends_the_run_and_unanswered_requests_are_asked_again(
    tmp_path: Path, fault: str
) -> None:
    with serving(gone_after(30, fault)) as server:
        with pytest.raises(UsageError, match="20 requests in a row got no answer"):
            ask(tmp_path / "a", server.base_url, 1000, 4)
    assert [answer.status for answer in found(tmp_path / "a", 1000)] == ["answered"] * 30
    with serving() as server:
        ask(tmp_path / "a", server.base_url, 1000, 16)
        assert server.sent.total() == 970
    assert [answer.status for answer in found(tmp_path / "a", 1000)] == ["answered"] * 1000


def test_requests_that_one_server_refuses_and_others_not_are_recorded(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "" if prompt == "question 0" else "400") as server:
        ask(tmp_path / "a", server.base_url, 50, 1)
    statuses = [answer.status for answer in found(tmp_path / "a", 50)]
    assert statuses == ["answered"] + ["invalid"] * 49


def test_a_server_that_refuses_everything_ends_the_run(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "400") as server:
        with pytest.raises(UsageError, match="the last: status 400: refused; you sent None"):
            ask(tmp_path / "a", server.base_url, 1000, 1)
        assert server.sent.total() == 20


def test_failures_between_answers_are_recorded_once(tmp_path: Path) -> None:
    bad = ("question 1", "question 2", "question 4")
    with serving(lambda prompt, attempt: "500" if prompt in bad else "") as server:
        ask(tmp_path / "a", server.base_url, 6, 1)
    statuses = [answer.status for answer in found(tmp_path / "a", 6)]
    assert statuses == ["answered", "failed", "failed", "answered", "failed", "answered"]


def test_failures_at_the_end_of_a_run_are_recorded(tmp_path: Path) -> None:
    with serving(gone_after(5, "500")) as server:
        ask(tmp_path / "a", server.base_url, 10, 1)
    statuses = [answer.status for answer in found(tmp_path / "a", 10)]
    assert statuses == ["answered"] * 5 + ["failed"] * 5


def test_a_journal_that_cannot_be_forced_to_the_disk_ends_the_run(tmp_path: Path) -> None:
    def broken() -> list[int]:
        raise UsageError("a full disk")

    with serving() as server, pytest.raises(UsageError, match="a full disk"):
        run_with(server, tmp_path / "a", commit=broken)
    assert server.sent.total() < 5000


def test_an_error_in_making_a_request_is_raised_as_it_is(tmp_path: Path) -> None:
    def questions() -> Iterator[Request]:
        yield question(0)
        raise UsageError("no such title")

    with serving() as server, AnswerJournal(tmp_path / "a", {}) as journal:
        with pytest.raises(UsageError, match="no such title"):
            endpoint = Endpoint(server.base_url, "m")
            asyncio.run(ask_all(questions(), endpoint, fast(2), journal, silent))


def test_a_log_gets_a_line_with_rate_retries_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress.time, "monotonic", iter([100.0, 110.0, 120.0]).__next__)
    log = io.StringIO()
    with progress.rate_bar(Console(file=log, width=200), total=100, done=40) as tell:
        tell(0, 0, 0)
        tell(20, 3, 1200)  # 20 answers in 20 s; 100 - 40 - 20 are left
    assert log.getvalue().splitlines() == [
        "  asked 40 of 100, 0.0/s, 0 retries, 0 tokens",
        "  asked 60 of 100, 1.0/s, 3 retries, 1,200 tokens, 40 s left",
    ]


def test_a_log_gets_no_line_before_its_time() -> None:
    log = io.StringIO()
    with progress.rate_bar(Console(file=log), total=100, done=0) as tell:
        for _ in range(10):
            tell(1, 0, 10)
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar_of_done_and_total() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    with progress.rate_bar(console, total=100, done=40) as tell:
        tell(20, 3, 1200)
    assert "60/100" in screen.getvalue() and "3 retries, 1,200 tokens" in screen.getvalue()


def run_with(server: Server, path: Path, commit: Any) -> None:
    with AnswerJournal(path, {}) as journal:
        before, journal.commit = journal.commit, commit  # type: ignore[method-assign]
        questions = (question(number) for number in range(5000))
        try:
            endpoint = Endpoint(server.base_url, "m")
            asyncio.run(ask_all(questions, endpoint, fast(8), journal, silent))
        finally:
            journal.commit = before  # type: ignore[method-assign]

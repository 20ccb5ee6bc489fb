"""Promises under faults, over real sockets: attempts, deadlines, kills, secrets."""

import asyncio
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from drive_client import ask, fast, question, silent
from fault_server import AGAIN, FINAL, TEXTS, Faults, Server, hashed, serving, text_for

from llmrec.chat.client import ask_all
from llmrec.chat.endpoint import ClientConfig, Endpoint
from llmrec.chat.journal import AnswerJournal
from llmrec.chat.requests import Answer
from llmrec.errors import UsageError

Figure = Callable[[str, object], None]
KEY = "sk-never-to-be-seen-7c1f"
EVERY = (*AGAIN, *FINAL, *TEXTS)
QUICK = tuple(fault for fault in AGAIN if fault != "hang")
HERE = Path(__file__).parent


def expected(faults: Faults, prompt: str, most: int = 5) -> tuple[str, int]:
    """Status and number of sendings that a prompt's faults make."""
    for attempt in range(most):
        fault = faults(prompt, attempt)
        if fault in FINAL:
            return "invalid", attempt + 1
        if fault not in AGAIN:
            return ("cut" if fault == "cut" else "answered"), attempt + 1
    return "failed", most


def answers_in(path: Path, count: int) -> list[Answer]:
    with AnswerJournal(path, {"count": count}) as journal:
        return list(journal.answers())


def without_times(answers: list[Answer]) -> list[dict[str, object]]:
    dropped = ("seconds", "attempts")
    return [{k: v for k, v in vars(a).items() if k not in dropped} for a in answers]


@pytest.mark.parametrize(
    ("share", "kinds", "least"),
    [
        (0.3, EVERY, {"answered": 700, "invalid": 50, "cut": 1}),
        (0.6, QUICK, {"answered": 700, "failed": 40}),  # .6^5 = .08 fail
    ],
)
def test_every_request_of_a_thousand_under_faults_is_recorded_as_its_faults_decide(
    tmp_path: Path, figure: Figure, share: float, kinds: tuple[str, ...], least: dict[str, int]
) -> None:
    faults, path = hashed(share, kinds), tmp_path / "answers.jsonl"
    with serving(faults) as server:
        began = time.monotonic()
        ask(path, server.base_url, 1000, 64)
        took = time.monotonic() - began
        before = server.sent.total()
        ask(path, server.base_url, 1000, 64)  # resumed: nothing is left
    assert server.sent.total() == before
    answers = answers_in(path, 1000)
    assert [answer.number for answer in answers] == list(range(1000))
    for answer in answers:
        prompt = question(answer.number).prompt
        status, attempts = expected(faults, prompt)
        assert (answer.status, answer.attempts) == (status, attempts), answer
        assert server.sent[prompt] == attempts <= 5
        assert answer.seconds <= fast(64).deadline_seconds
        assert (answer.problem == "") == (status in ("answered", "cut")), answer
    assert max(server.sent.values()) <= 5
    counts = Counter(answer.status for answer in answers)
    assert all(counts[status] >= number for status, number in least.items())
    with AnswerJournal(path, {"count": 1000}) as journal:
        spent = journal.spent(fast(64))
    assert spent.attempts == before == 1000 + sum(spent.retries.values())
    under = f"1,000 requests under {share:.0%} faults of {len(kinds)} kinds"
    figure(f"{under}: statuses", dict(counts))
    figure(f"{under}: sendings", before)
    figure(f"{under}: seconds", f"{took:.1f}")
    figure(f"{under}: retries by reason", spent.retries)


@pytest.mark.parametrize("fault", AGAIN)
def test_a_request_that_always_fails_is_sent_five_times_within_its_deadline(
    tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "answers.jsonl"
    with serving(lambda prompt, attempt: fault if prompt == "question 1" else "") as server:
        began = time.monotonic()
        ask(path, server.base_url, 2, 2)
        assert time.monotonic() - began < 20
    good, bad = answers_in(path, 2)
    assert (good.status, good.text, good.attempts) == ("answered", text_for("question 0"), 1)
    assert (bad.status, bad.attempts, server.sent["question 1"]) == ("failed", 5, 5)
    assert bad.seconds < 20 and bad.problem.startswith("no answer in 5 attempts: ")


@pytest.mark.parametrize("fault", FINAL)
def test_a_reply_that_is_no_answer_is_recorded_and_not_paid_for_again(
    tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "answers.jsonl"
    with serving(lambda prompt, attempt: fault if prompt == "question 1" else "") as server:
        ask(path, server.base_url, 2, 1)
    bad = answers_in(path, 2)[1]
    assert (bad.status, bad.attempts, server.sent["question 1"]) == ("invalid", 1, 1)
    assert bad.problem


def test_the_deadline_ends_a_request_before_its_attempts_are_used_up(tmp_path: Path) -> None:
    config = ClientConfig(concurrency=1, attempt_seconds=0.4, deadline_seconds=1.0)
    with serving(lambda prompt, attempt: "hang") as server:
        with AnswerJournal(tmp_path / "answers.jsonl", {}) as journal:
            endpoint = Endpoint(server.base_url, "model")
            asyncio.run(ask_all([question(0)], endpoint, config, journal, silent))
            (answer,) = journal.answers()
    assert answer.status == "failed" and answer.attempts < 5
    assert answer.seconds <= 1.5


def start(path: Path, server: Server, count: int, concurrency: int) -> subprocess.Popen[str]:
    words = [HERE / "drive_client.py", path, server.base_url, count, concurrency]
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENAI_API_KEY": KEY},
    )


def killed_and_resumed(folder: Path, kills: int, count: int, figure: Figure) -> None:
    """Kill the client `kills` times at places spread over the run; compare with an unkilled one."""
    concurrency, path = 16, folder / "killed.jsonl"
    faults = hashed(0.7, (*QUICK, *FINAL, *TEXTS))
    with serving(faults, key=KEY) as server:
        ask(folder / "whole.jsonl", server.base_url, count, concurrency, KEY)
    whole = answers_in(folder / "whole.jsonl", count)
    failed = sum(answer.status == "failed" for answer in whole)
    assert failed
    repeats, again, kept = [], 0, Counter[int]()
    with serving(faults, key=KEY) as server:
        server.seconds = 0.005
        for kill in range(1, kills + 1):
            process = start(path, server, count, concurrency)
            wanted = round(server.sent.total() + (kill % 3 + 1) / 2 * count / kills)
            until = time.monotonic() + 60
            while server.sent.total() < wanted and process.poll() is None:
                assert time.monotonic() < until
                time.sleep(0.002)
            process.kill()
            process.communicate()
            with AnswerJournal(path, {"count": count}) as journal:
                done = {n for n in range(count) if journal.is_done(n)}
                repeats.append(journal.in_flight_count)
            again += sum(server.sent[question(n).prompt] - times for n, times in kept.items())
            kept = Counter({n: server.sent[question(n).prompt] for n in done})
        last = start(path, server, count, concurrency)
        told, errors = last.communicate(timeout=120)
        assert last.returncode == 0, errors
        assert told == f"in flight {repeats[-1]}\n"
        again += sum(server.sent[question(n).prompt] - times for n, times in kept.items())
    assert 0 < len(kept) < count
    assert again == 0
    # Each request under way, and each that waits for another's answer before it is called failed.
    assert 0 < max(repeats) <= concurrency + failed
    assert without_times(answers_in(path, count)) == without_times(whole)
    with AnswerJournal(path, {"count": count}) as journal:
        assert journal.spent(fast(1)).sent_again == sum(repeats)
    figure(f"kills of the client over {count} requests", kills)
    figure("requests in flight at each kill", repeats)
    figure("completed requests sent again after kills", again)


def test_a_client_that_is_interrupted_keeps_what_was_answered(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with serving(key=KEY) as server:
        server.seconds = 0.01
        process = start(path, server, 5000, 8)
        until = time.monotonic() + 60
        while server.sent.total() < 100:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        sent = server.sent.total()
    assert errors.rstrip().endswith("KeyboardInterrupt") and process.returncode
    with AnswerJournal(path, {"count": 5000}) as journal:
        assert journal.in_flight_count <= 8
        assert journal.done_count == sent - journal.in_flight_count >= 92


def test_a_client_killed_at_ten_points_ends_with_the_answers_of_an_unkilled_one(
    tmp_path: Path, figure: Figure
) -> None:
    killed_and_resumed(tmp_path, 10, 600, figure)


def test_a_key_is_seen_by_the_server_alone(tmp_path: Path, figure: Figure) -> None:
    places: dict[str, str] = {}
    endpoint = Endpoint("http://127.0.0.1:1/v1", "model", api_key=KEY)
    places["repr"] = f"{endpoint!r} {endpoint}"
    with serving(hashed(0.5, ("400", "422", "html", "500")), key=KEY) as server:
        process = start(tmp_path / "answers.jsonl", server, 40, 4)
        arguments = Path(f"/proc/{process.pid}/cmdline")
        places["arguments"] = arguments.read_text() if arguments.exists() else ""
        places["output"] = "".join(process.communicate(timeout=60))
        assert process.returncode == 0
        assert {h["Authorization"] for h in server.headers} == {f"Bearer {KEY}"}
    places["journal"] = (tmp_path / "answers.jsonl").read_text()
    assert '"status 400: refused; you sent Bearer ***"' in places["journal"]
    for fault in ("401", "403", "404", "500", "drop"):
        with serving(lambda prompt, attempt, fault=fault: fault) as server:
            try:
                ask(tmp_path / f"{fault}.jsonl", server.base_url, 50, 4, KEY)
            except UsageError as error:
                places[f"traceback of {fault}"] = "".join(traceback.format_exception(error))
        places[f"journal of {fault}"] = (tmp_path / f"{fault}.jsonl").read_text()
        assert f"traceback of {fault}" in places
    with pytest.raises(UsageError) as raised:
        Endpoint("http://127.0.0.1:1/v1", "model", api_key=f"{KEY}\n")
    places["a bad key"] = "".join(traceback.format_exception(raised.value))
    hits = [place for place, text in places.items() if KEY in text]
    assert hits == []
    figure("places searched for the key", len(places))
    figure("places that show the key", len(hits))


def test_a_web_page_at_the_address_ends_the_run_before_it_is_taken_for_answers(
    tmp_path: Path,
) -> None:
    with serving(lambda prompt, attempt: "html") as server:
        with pytest.raises(UsageError, match="20 requests in a row got no answer"):
            ask(tmp_path / "answers.jsonl", server.base_url, 500, 4)
        sent = server.sent.total()
    assert 20 <= sent <= 30  # with those under way
    with serving() as server:  # the right address: all are asked, none is recorded as invalid
        ask(tmp_path / "answers.jsonl", server.base_url, 500, 4)
        assert server.sent.total() == 500

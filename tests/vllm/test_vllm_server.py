"""The real engine behind a server of ours: what it is asked for is what it does."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from served import HELD, Stage

from llmrec.chat.client import ask_all
from llmrec.chat.endpoint import ClientConfig, Endpoint
from llmrec.chat.journal import AnswerJournal
from llmrec.chat.requests import Answer, Choice, Constraint, Pattern, Request, Schema

pytestmark = pytest.mark.vllm

PROMPT = "Which of these would you take: Blue Tent, Red Kettle, Fly Rod?"
TITLES = ["Blue Tent", "Red Kettle", "Fly Rod", "Guitar Capo"]
LIST = {
    "type": "array",
    "items": {"type": "string", "enum": TITLES},
    "minItems": 3,
    "maxItems": 3,
}


def ask(endpoint: Endpoint, folder: Path, *requests: Request) -> list[Answer]:
    """What the client journals, in order."""
    with AnswerJournal(folder / "answers.jsonl", {"model": endpoint.model}) as journal:
        asyncio.run(ask_all(requests, endpoint, ClientConfig(), journal, lambda *told: None))
        return list(journal.answers())


def one(endpoint: Endpoint, folder: Path, constraint: Constraint | None, **options: int) -> Answer:
    values = {"max_tokens": 64, "top_logprobs": 0} | options
    request = Request(0, PROMPT, values["max_tokens"], constraint, values["top_logprobs"])
    return ask(endpoint, folder, request)[0]


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def group(pid: int) -> list[int]:
    """The running processes of a process group."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getpgid(int(folder.name)) == pid:
                found.append(int(folder.name))
        except ProcessLookupError:
            pass
    return [number for number in found if alive(number)]


def test_a_choice_is_one_of_the_options(stage: Stage, tmp_path: Path) -> None:
    answer = one(stage.endpoint, tmp_path, Choice(tuple(TITLES)))
    assert answer.status == "answered" and answer.text in TITLES


def test_a_pattern_is_matched_whole(stage: Stage, tmp_path: Path) -> None:
    answer = one(stage.endpoint, tmp_path, Pattern("[1-5] stars"))
    assert answer.text in {f"{number} stars" for number in range(1, 6)}


def test_a_schema_gives_json_of_its_shape(stage: Stage, tmp_path: Path) -> None:
    answer = one(stage.endpoint, tmp_path, Schema(LIST), max_tokens=200)
    found = json.loads(answer.text)
    assert len(found) == 3 and set(found) <= set(TITLES)


def test_a_free_answer_is_cut_at_its_tokens(stage: Stage, tmp_path: Path) -> None:
    answer = one(stage.endpoint, tmp_path, None, max_tokens=5)
    assert answer.status in ("answered", "cut")
    assert 0 < answer.completion_tokens <= 5 and answer.prompt_tokens > 10


def test_log_probabilities_are_shared_out_among_what_the_constraint_allows(
    stage: Stage, tmp_path: Path
) -> None:
    letters = Choice(("A", "B", "C", "D"))
    answer = one(stage.endpoint, tmp_path, letters, max_tokens=1, top_logprobs=20)
    shares = {token: math.exp(value) for token, value in answer.top}
    assert sum(shares.get(letter, 0.0) for letter in letters.options) == pytest.approx(1)
    assert answer.text == answer.top[0][0] == max(shares, key=lambda token: shares[token])


def test_equal_requests_at_temperature_0_get_equal_answers(stage: Stage, tmp_path: Path) -> None:
    requests = [Request(number, PROMPT, 16) for number in range(8)]
    assert len({answer.text for answer in ask(stage.endpoint, tmp_path, *requests)}) == 1


def test_above_temperature_0_another_seed_draws_another_answer(
    stage: Stage, tmp_path: Path
) -> None:
    texts = []
    for number, seed in enumerate((1, 1, 2)):
        (tmp_path / str(number)).mkdir()
        drawn = replace(stage.endpoint, temperature=2.0, seed=seed)
        texts.append(one(drawn, tmp_path / str(number), None, max_tokens=16).text)
    assert texts[0] == texts[1] != texts[2]


def test_an_adapter_named_as_the_model_answers_otherwise(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "adapted").mkdir()
    plain = one(stage.endpoint, tmp_path, None, max_tokens=16, top_logprobs=5)
    adapted = one(stage.adapted, tmp_path / "adapted", None, max_tokens=16, top_logprobs=5)
    assert adapted.status in ("answered", "cut")
    assert plain.top != adapted.top


def test_a_prompt_too_long_is_told_and_costs_no_other_its_answer(
    stage: Stage, tmp_path: Path
) -> None:
    requests = [Request(0, PROMPT, 4), Request(1, "tent " * 5000, 4), Request(2, PROMPT, 4)]
    answers = ask(stage.endpoint, tmp_path, *requests)
    assert [answer.status == "invalid" for answer in answers] == [False, True, False]
    assert "maximum context length" in answers[1].problem
    assert answers[1].attempts == 1


def test_without_the_key_nobody_is_answered_and_the_key_is_not_in_the_log(stage: Stage) -> None:
    for key in ("", "wrong"):
        headers = {"Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{stage.endpoint.base_url}/models", headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 401
    assert len(stage.endpoint.api_key) >= 32
    assert stage.endpoint.api_key not in stage.log.read_text()
    shown = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(stage.endpoint.api_key.encode() in words for words in shown)


def test_runs_of_equal_settings_share_the_server(stage: Stage) -> None:
    again = stage.servers.endpoint(replace(stage.config), 7, 0.5, stage.log)
    assert (again.base_url, again.model) == (stage.endpoint.base_url, "loud")
    assert (again.seed, again.temperature) == (7, 0.5)


DRIVER = """
import json, sys, time
from pathlib import Path
from llmrec.chat.server import ServerConfig, Servers

config = ServerConfig(**json.loads(sys.argv[1]))
with Servers() as servers:
    endpoint = servers.endpoint(config, 0, 0.0, Path(sys.argv[2]))
    print(servers._running.process.pid, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["the block ends", "kill -9"])
def test_no_process_of_the_server_outlives_the_one_that_started_it(
    model: Path, tmp_path: Path, figure, end: str
) -> None:
    options = json.dumps({"model": str(model), **HELD})
    words = [sys.executable, "-c", DRIVER, options, str(tmp_path / "server.log")]
    driver = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdin is not None and driver.stdout is not None
    leader = int(driver.stdout.readline())
    started = group(leader)
    assert len(started) >= 3  # the keeper, the server, its engine
    if end == "kill -9":
        driver.send_signal(signal.SIGKILL)
    else:
        driver.stdin.write("\n")
        driver.stdin.flush()
    began = time.monotonic()
    assert driver.wait(60) == (-signal.SIGKILL if end == "kill -9" else 0)
    while group(leader) and time.monotonic() - began < 60:
        time.sleep(0.1)
    assert not group(leader)
    figure(f"{end}: seconds until none of {len(started)} processes is left",
           f"{time.monotonic() - began:.1f}")  # fmt: skip

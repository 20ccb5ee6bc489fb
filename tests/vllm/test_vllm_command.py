"""``llmrec chat`` end to end on the real engine: every task, constrained and free."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats
from served import DATA, HELD, HISTORY, Stage

from llmrec.chat import command
from llmrec.evaluation.result import read_result

pytestmark = pytest.mark.vllm

TASKS = {"pick": {}, "top": {"size": 30}, "list": {"size": 6}, "pair": {}, "point": {"size": 3}}
USERS = 6
KEY = "LLMREC_TEST_KEY"


def words(folder: Path, **changes: Any) -> list[str]:
    """A command line; ``chat__task="top"`` sets ``--chat.task``."""
    options = {"run.folder": str(folder), "evaluation.pool.users": USERS}
    options |= {name.replace("__", "."): value for name, value in changes.items()}
    return [
        *DATA,
        *(
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in options.items()
        ),
    ]


def of_task(task: str, rated: Path) -> dict[str, Any]:
    """Options of a small run of a task."""
    if task == "rating":
        return {"chat__task": task, "chat__examples": 1, "data__source": str(rated)}
    sizes = {f"evaluation__pool__{name}": value for name, value in TASKS[task].items()}
    return {"chat__task": task, **sizes}


def record(folder: Path, name: str = "result.json") -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text()))


def statuses(folder: Path) -> set[str]:
    return set(record(folder)["cost"]["statuses"])


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 users who rated 8 of 12 items each."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", f"Title {item}", int(rng.integers(1, 6)))
        for user in range(20)
        for item in rng.permutation(12)[:8]
    ]
    path = tmp_path_factory.mktemp("rated") / "rated.csv"
    schema = ["user_id", "item_id", "title", "rating"]
    pl.DataFrame(rows, schema=schema, orient="row").write_csv(path)
    return path


@pytest.fixture
def address(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Options that ask the running vLLM by its address, without the adapter."""
    monkeypatch.setenv(KEY, stage.endpoint.api_key)
    return {
        "server__name": "url",
        "server__base_url": stage.endpoint.base_url,
        "server__model": stage.endpoint.model,
        "server__dialect": "vllm",
        "server__api_key_variable": KEY,
    }


@pytest.mark.parametrize("decoding", ["constrained", "free"])
@pytest.mark.parametrize("task", [*TASKS, "rating"])
def test_every_task_runs_on_the_real_engine(
    address: dict[str, str], rated: Path, tmp_path: Path, task: str, decoding: str
) -> None:
    folder = tmp_path / "run"
    argv = words(folder, chat__decoding=decoding, **of_task(task, rated), **address)
    assert command.main(argv) == 0
    assert len(read_result(folder).per_user) == USERS
    told = record(folder, "chat.json")
    assert record(folder)["cost"]["requests"] == told["requests"]
    assert statuses(folder) <= {"answered", "cut"}
    if decoding == "constrained":  # whatever the model thinks, every answer is a valid one
        assert set(told["understood"]) <= {"exact", "token", "duplicate"}
    else:
        assert sum(told["understood"].values()) >= told["requests"]


@pytest.mark.parametrize("task", ["pick", "point", "rating"])
def test_an_answer_of_one_token_is_read_as_text_where_probabilities_are_off(
    address: dict[str, str], rated: Path, tmp_path: Path, task: str
) -> None:
    folder = tmp_path / "run"
    argv = words(folder, chat__logprobs="off", **of_task(task, rated), **address)
    assert command.main(argv) == 0
    assert set(record(folder, "chat.json")["understood"]) == {"exact"}


def test_the_command_shares_a_running_server_and_its_adapter_answers_by_name(
    stage: Stage, address: dict[str, str], tmp_path: Path
) -> None:
    options = {
        "server__name": "vllm",
        "server__model": stage.config.model,
        "server__lora": stage.config.lora,
        "server__dtype": HELD["dtype"],
        "server__arguments": HELD["arguments"],
    }
    assert command.run(words(tmp_path / "adapted", **options), stage.servers) == 0
    assert not (tmp_path / "adapted" / "server.log").exists()  # nothing was started
    assert command.run(words(tmp_path / "plain", **address)) == 0
    answers = [
        [json.loads(line).get("top") for line in (folder / "answers.jsonl").open()]
        for folder in (tmp_path / "adapted", tmp_path / "plain")
    ]
    assert answers[0] != answers[1]


def test_the_command_starts_a_server_and_stops_it(model: Path, tmp_path: Path) -> None:
    options = {
        "server__model": str(model),
        "server__dtype": HELD["dtype"],
        "server__arguments": HELD["arguments"],
    }
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "llmrec", "chat", *words(folder, **options)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_result(folder).record["cost"]["requests"] == USERS
    assert (folder / "server.log").stat().st_size > 0
    shown = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(str(folder).encode() in words for words in shown)


@pytest.fixture(scope="module")
def transformers_serve(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """A server that is not vLLM: no constraints, no log-probabilities."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    log = tmp_path_factory.mktemp("second") / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [program, "serve", str(model), "--device", "cpu", "--port", str(port),
             "--host", "127.0.0.1"],
            stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            until = time.monotonic() + 180
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < until, log.read_text()
                    time.sleep(0.5)
            yield {
                "server__base_url": f"http://127.0.0.1:{port}/v1",
                "server__model": str(model),
                "client__concurrency": "4",
            }
        finally:
            server.terminate()
            server.wait(60)


@pytest.mark.parametrize("decoding", ["constrained", "free"])
@pytest.mark.parametrize("task", [*TASKS, "rating"])
def test_every_task_runs_on_a_second_server(
    transformers_serve: dict[str, str], rated: Path, tmp_path: Path, task: str, decoding: str
) -> None:
    folder = tmp_path / "run"
    argv = words(folder, chat__decoding=decoding, **of_task(task, rated), **transformers_serve)
    assert command.main(argv) == 0
    assert len(read_result(folder).per_user) == USERS
    told = record(folder, "chat.json")
    assert sum(told["understood"].values()) >= told["requests"]
    assert statuses(folder) <= {"answered", "cut"}


def test_a_trained_model_picks_better_than_chance_through_the_real_server(
    address: dict[str, str], tmp_path: Path, figure
) -> None:
    folder = tmp_path / "run"
    changes = {"evaluation__pool__users": 600, "chat__history_items": HISTORY}
    assert command.main(words(folder, **changes, **address)) == 0
    per_user = read_result(folder).per_user
    # A tie for the first place is no hit here.
    hits = int(((per_user["greater"] == 0) & (per_user["equal"] == 0)).sum())
    p = stats.binomtest(hits, len(per_user), 0.25, alternative="greater").pvalue
    figure("trained model, pick 1 of 4 through vLLM", f"HR@1 {hits / len(per_user):.3f} of "
           f"{len(per_user)} test cases, p = {p:.1e} against .25")  # fmt: skip
    assert len(per_user) >= 400
    assert p < 0.01

"""Servers are started, shared and stopped; the stand-in has vLLM's command line and paths."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.chat.server import COMPACT, LORA_RANKS, ServerConfig, Servers, engine_words, identity
from llmrec.chat.vllm_server import why
from llmrec.errors import UsageError

STAND_IN = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

words = sys.argv[1:]
named = dict(zip(words, words[1:]))
mode = os.environ.get("STAND_IN", "serves")
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
Path(os.environ["STAND_IN_PIDS"]).open("a").write(f"{os.getpid()} {engine.pid}\\n")
print("words:", json.dumps(words), flush=True)
if mode == "fails":
    engine.kill()
    sys.exit("no such architecture: 'Fantasy'")
if mode == "hangs":
    time.sleep(300)
models = [named["--served-model-name"]]
if "--lora-modules" in named:
    models.append(named["--lora-modules"].partition("=")[0])

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        key = f"Bearer {os.environ['VLLM_API_KEY']}"
        allowed = self.path == "/health" or self.headers.get("Authorization") == key
        body = json.dumps({"data": [{"id": name} for name in models]}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

ThreadingHTTPServer((named["--host"], int(named["--port"])), Handler).serve_forever()
"""


class Stage:
    """A model's folder, an interpreter with the stand-in, and what was started with it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        package = folder / "site" / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        for parent in (package, *list(package.parents)[:2]):
            (parent / "__init__.py").touch()
        (package / "api_server.py").write_text(STAND_IN)
        self.python = folder / "python"
        self.python.write_text(
            f'#!/bin/sh\nPYTHONPATH="{folder / "site"}" exec "{sys.executable}" "$@"\n'
        )
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        (self.model / "model.safetensors").write_bytes(b"weights")
        self.log = folder / "server.log"
        self.pid_file = folder / "pids"
        patch.setenv("STAND_IN_PIDS", str(self.pid_file))

    def config(self, **changes: Any) -> ServerConfig:
        values: dict[str, Any] = {"model": str(self.model), "python": str(self.python)}
        return ServerConfig(**(values | {"start_seconds": 60} | changes))

    def adapter(self, name: str = "adapter", **about: Any) -> Path:
        folder = self.folder / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": 12} | about))
        (folder / "adapter_model.safetensors").write_bytes(b"small weights")
        return folder

    def pids(self) -> list[int]:
        """Of every server that was started, and of the engine that each started."""
        text = self.pid_file.read_text() if self.pid_file.exists() else ""
        return [int(word) for word in text.split()]

    def words(self) -> list[str]:
        first = self.log.read_text().splitlines()[0]
        words: list[str] = json.loads(first.removeprefix("words: "))
        return words


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(shown.stdout.strip()) and not shown.stdout.strip().startswith("Z")


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def status(url: str, key: str) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "url", "base_url": "ftp://h/v1"}, "is no address"),
        ({"name": "url", "base_url": "http://me:pass@h/v1"}, "holds a name"),
        ({"name": "url", "base_url": "http://h/v1", "lora": "a=b"}, r"server\.lora means nothing"),
        (
            {"name": "url", "base_url": "http://h/v1", "python": "p"},
            r"server\.python means nothing",
        ),
        (
            {"name": "url", "base_url": "http://h/v1", "arguments": ["x"]},
            r"server\.arguments means",
        ),
        ({"name": "url", "base_url": "http://h/v1", "dtype": "float32"}, r"server\.dtype means"),
        ({"name": "url", "base_url": "http://h/v1", "revision": "x"}, r"server\.revision means"),
        ({"base_url": "http://me:pass@h/v1"}, r"server\.base_url means nothing"),
        ({"dialect": "openai"}, r"server\.dialect=openai means nothing"),
        ({"name": "offline", "dialect": "vllm"}, r"server\.dialect=vllm means nothing"),
        ({"name": "offline", "python": "p"}, r"server\.python=p means nothing"),
        ({"lora": "folder"}, "NAME=FOLDER"),
        ({"lora": "=folder"}, "NAME=FOLDER"),
        ({"lora": "m=folder", "model": "m"}, "names the adapter like the model"),
        ({"arguments": ["--api-key", "secret"]}, "--api-key, which llmrec sets itself"),
        ({"arguments": ["--api_key=secret"]}, "--api_key, which llmrec sets itself"),
        ({"arguments": ["--port=1"]}, "--port, which llmrec sets itself"),
        ({"start_seconds": 0}, "server.start_seconds=0"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_option(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        ServerConfig(**options)
    assert "secret" not in str(caught.value) and "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"server\.model is missing"),
        ({"name": "url", "base_url": "http://h/v1"}, r"server\.model is missing"),
        ({"name": "url", "model": "m"}, "needs an address"),
    ],
)
def test_a_config_that_does_not_say_whom_to_ask_is_refused_once_it_is_used(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = ServerConfig(**options)
    with pytest.raises(UsageError, match=said):
        identity(config)
    with Servers() as servers, pytest.raises(UsageError, match=said):
        servers.endpoint(config, 0, 0.0, tmp_path / "log")


def test_a_running_server_is_asked_with_the_key_of_the_named_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = ServerConfig(
        "url", "my-model", base_url="http://127.0.0.1:9/v1", api_key_variable="MY_KEY"
    )
    with Servers() as servers:
        monkeypatch.delenv("MY_KEY", raising=False)
        assert servers.endpoint(config, 1, 0.0, tmp_path / "log").api_key == ""
        monkeypatch.setenv("MY_KEY", "sk-1")
        endpoint = servers.endpoint(config, 1, 0.5, tmp_path / "log")
    assert (endpoint.api_key, endpoint.dialect, endpoint.model) == ("sk-1", "openai", "my-model")
    assert (endpoint.seed, endpoint.temperature) == (1, 0.5)
    assert not (tmp_path / "log").exists()
    vllm = ServerConfig("url", "m", base_url="http://127.0.0.1:9/v1", dialect="vllm")
    assert Servers().endpoint(vllm, 0, 0.0, tmp_path / "log").dialect == "vllm"


def test_a_server_is_ready_guarded_by_a_secret_key_and_gone_afterwards(stage: Stage) -> None:
    with Servers() as servers:
        endpoint = servers.endpoint(stage.config(dtype="float32"), 3, 0.0, stage.log)
        server, engine = stage.pids()
        assert runs(server) and runs(engine)
        assert (endpoint.dialect, endpoint.model) == ("vllm", str(stage.model))
        assert status(f"{endpoint.base_url}/models", endpoint.api_key) == 200
        assert status(f"{endpoint.base_url}/models", "") == 401
        shown = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True).stdout
        assert str(stage.model) in shown
        assert endpoint.api_key not in shown + stage.log.read_text()
        assert len(endpoint.api_key) >= 32
    assert not runs(server) and not runs(engine)


def test_the_model_and_further_words_reach_the_command_line(stage: Stage) -> None:
    config = stage.config(dtype="float32", arguments=["--max-model-len", 4096])
    with Servers() as servers:
        servers.endpoint(config, 0, 0.0, stage.log)
    words = stage.words()
    assert words[words.index("--host") + 1] == "127.0.0.1"
    told = engine_words(config)
    assert any(words[place : place + len(told)] == told for place in range(len(words)))
    assert words[words.index("--served-model-name") + 1] == str(stage.model)
    assert engine_words(config) == [
        *("--model", str(stage.model), "--dtype", "float32", "--generation-config", "vllm"),
        *("--structured-outputs-config", COMPACT, "--max-model-len", "4096"),
    ]


def test_an_adapter_answers_by_its_name_and_its_rank_is_made_room_for(stage: Stage) -> None:
    config = stage.config(lora=f"games={stage.adapter()}")
    with Servers() as servers:
        assert servers.endpoint(config, 0, 0.0, stage.log).model == "games"
    words = stage.words()
    assert words[words.index("--lora-modules") + 1] == f"games={stage.folder / 'adapter'}"
    assert words[words.index("--max-lora-rank") + 1] == "16"  # the least that vLLM has above 12


@pytest.mark.parametrize(
    ("about", "held"), [({"r": 8}, "8"), ({"r": 8, "rank_pattern": {"q_proj": 65}}, "128")]
)
def test_the_largest_rank_of_an_adapter_counts(
    stage: Stage, about: dict[str, Any], held: str
) -> None:
    words = engine_words(stage.config(lora=f"a={stage.adapter(**about)}"))
    assert words[words.index("--max-lora-rank") + 1] == held


@pytest.mark.parametrize(
    ("about", "said"), [({"r": LORA_RANKS[-1] + 1}, "rank 513"), ({"r": "many"}, "is damaged")]
)
def test_an_adapter_that_vllm_cannot_hold_is_refused(
    stage: Stage, about: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        engine_words(stage.config(lora=f"a={stage.adapter(**about)}"))
    with pytest.raises(UsageError, match=r"no adapter_config\.json"):
        identity(stage.config(lora=f"a={stage.model}"))


def test_runs_with_equal_settings_share_a_server_and_others_replace_it(stage: Stage) -> None:
    with Servers() as servers:
        first = servers.endpoint(stage.config(), 0, 0.0, stage.log)
        again = servers.endpoint(stage.config(), 1, 0.5, stage.folder / "unused.log")
        assert (again.base_url, again.api_key) == (first.base_url, first.api_key)
        assert (again.seed, again.temperature) == (1, 0.5)
        assert len(stage.pids()) == 2 and not (stage.folder / "unused.log").exists()
        servers.endpoint(stage.config(dtype="float32"), 0, 0.0, stage.log)
        before, now = stage.pids()[:2], stage.pids()[2:]
        assert not any(map(runs, before)) and all(map(runs, now))
    assert not any(map(runs, stage.pids()))


def test_a_server_that_died_is_started_anew(stage: Stage) -> None:
    with Servers() as servers:
        servers.endpoint(stage.config(), 0, 0.0, stage.log)
        server, engine = stage.pids()
        os.kill(server, signal.SIGKILL)
        assert within(10, lambda: not runs(engine))  # nothing of it is left to hold memory
        assert within(10, lambda: servers._running is None or servers._running.has_ended)
        endpoint = servers.endpoint(stage.config(), 0, 0.0, stage.log)
        assert status(f"{endpoint.base_url}/models", endpoint.api_key) == 200


def test_a_server_that_ends_while_starting_is_told_with_its_last_words(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "fails")
    began = time.monotonic()
    with Servers() as servers, pytest.raises(UsageError, match="no such architecture: 'Fantasy'"):
        servers.endpoint(stage.config(), 0, 0.0, stage.log)
    assert time.monotonic() - began < 30  # not start_seconds


def test_a_server_that_is_not_ready_in_time_is_stopped(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "hangs")
    with Servers() as servers:
        with pytest.raises(UsageError, match=r"server\.start_seconds=3"):
            servers.endpoint(stage.config(start_seconds=3), 0, 0.0, stage.log)
        assert stage.pids() and not any(map(runs, stage.pids()))


@pytest.mark.parametrize("python", ["/nowhere/python", "plain"])
def test_an_interpreter_without_vllm_is_refused_with_the_way_out(stage: Stage, python: str) -> None:
    (stage.folder / "plain").write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    (stage.folder / "plain").chmod(0o755)
    config = stage.config(python=str(stage.folder / python))
    with Servers() as servers, pytest.raises(UsageError, match=r"server\.python"):
        servers.endpoint(config, 0, 0.0, stage.log)


ASKS = """
    import sys, time
    from pathlib import Path
    from llmrec.chat.server import ServerConfig, Servers

    model, python, log = sys.argv[1:]
    with Servers() as servers:
        servers.endpoint(ServerConfig(model=model, python=python), 0, 0.0, Path(log))
        print("ready", flush=True)
        time.sleep(300)
"""


@pytest.mark.parametrize("mode", ["serves", "hangs"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_server_is_gone_however_the_process_that_started_it_ends(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, mode: str
) -> None:
    monkeypatch.setenv("STAND_IN", mode)
    words = [str(stage.model), str(stage.python), str(stage.log)]
    asking = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ASKS), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with asking:
        assert asking.stdout is not None
        if mode == "serves":
            assert asking.stdout.readline() == b"ready\n"
        assert within(60, lambda: len(stage.pids()) == 2)
        assert all(map(runs, stage.pids()))
        asking.send_signal(number)
        asking.wait(30)
        assert within(30, lambda: not any(map(runs, stage.pids())))


def test_a_model_is_told_by_its_files_and_its_adapters_files(stage: Stage) -> None:
    plain = identity(stage.config())
    assert identity(stage.config(dtype="float32", python="")) == plain
    adapter = stage.adapter()
    adapted = identity(stage.config(lora=f"a={adapter}"))
    (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    retrained = identity(stage.config(lora=f"a={adapter}"))
    (stage.model / "model.safetensors").write_bytes(b"other weights")
    assert len({plain, adapted, retrained, identity(stage.config())}) == 4


def test_a_running_servers_model_is_told_by_address_and_name() -> None:
    config = ServerConfig("url", "m", base_url="https://host/v1/")
    assert identity(config) == "m at host"
    here = ServerConfig("url", "m", base_url="http://127.0.0.1:8001/v1")
    assert identity(here) == "m"  # ports of this machine come and go


def test_a_model_that_is_not_there_is_named_by_the_servers_option(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"^server\.model=.*has no config\.json"):
        identity(ServerConfig(model=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("usage: ...\nx.py: error: unrecognized arguments: --b", "x.py: error: unrecognized"),
        (
            "pydantic: 1 problem\n  Value error, max_model_len is too great [..]\n  see https",
            "too great",
        ),
        ("OSError: no weights\nRuntimeError: it failed, see above\nbye", "OSError: no weights\n"),
        (
            "WARNING 11-21 [x] errors like `OSError: files`\nSegmentation fault",
            "Segmentation fault$",
        ),
        ("", "^nothing$"),
    ],
)
def test_what_went_wrong_is_picked_from_a_log(tmp_path: Path, log: str, said: str) -> None:
    (tmp_path / "log").write_text(f"INFO loading\n{log}" if log else "")
    assert re.search(said, why(tmp_path / "log"))

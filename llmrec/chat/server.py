"""Where answers come from: a vLLM that is started and stopped here, or any server's address."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

from llmrec.chat import keeper
from llmrec.chat.endpoint import Endpoint
from llmrec.encoders.loading import EncoderConfig, locate
from llmrec.errors import UsageError
from llmrec.runs import sha256_of

OURS = ("--api-key", "--host", "--port", "--model", "--served-model-name", "--uds")
"""Words of vLLM's command line that are set here and nowhere else."""
POLL_SECONDS = 0.5
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


@dataclass(frozen=True)
class ServerConfig:
    """The model that answers, and who runs it."""

    name: Literal["vllm", "offline", "url"] = "vllm"
    """vllm: a server that is started for the run and stopped after it; offline: vLLM's engine in
    this process; url: any OpenAI-compatible server, at server.base_url."""
    model: str = ""
    """Hugging Face id or local folder; for url, the name under which the server knows it."""
    revision: str = "main"
    """Branch, tag or commit of a hub model; a local folder and a url have none."""
    base_url: str = ""
    """Up to the version, such as http://127.0.0.1:8000/v1; url only."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the server's key; url only. Unset: no key."""
    lora: str = ""
    """NAME=FOLDER of a LoRA adapter that answers in the model's place; not for url, where an
    adapter's name is given as server.model."""
    dialect: Literal["auto", "vllm", "openai"] = "auto"
    """How constraints are put. vllm: choices and JSON schemas; openai: JSON schemas alone. auto:
    openai for url, vllm for what is started here."""
    dtype: str = "auto"
    """Number format of weights and states, in vLLM's words; not for url."""
    arguments: list[str | int | float] = field(default_factory=list)
    """Further words for vLLM's own command line, such as [--max-model-len, 4096]; not for url."""
    python: str = ""
    """Interpreter of the environment that holds vLLM. Empty: the one that runs llmrec."""
    start_seconds: int = 900
    """Seconds that vLLM may take to load the model and to answer."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.name == "url":
            self._check_url()
        elif self.base_url:
            raise UsageError(
                f"server.base_url={self.base_url} means nothing to server.name={self.name}, which "
                "starts vLLM itself. Leave it out, or use server.name=url."
            )
        if self.lora and not all(self.lora_parts):
            raise UsageError(
                f"server.lora={self.lora} must be NAME=FOLDER, such as shop=runs/adapter."
            )
        if self.name == "offline" and self.python:
            raise UsageError(
                f"server.python={self.python} means nothing to server.name=offline, whose engine "
                "runs in this process. Leave it out, or start llmrec with that interpreter."
            )
        if self.name == "offline" and self.dialect != "auto":
            raise UsageError(
                f"server.dialect={self.dialect} means nothing to server.name=offline. Leave it out."
            )
        for word in map(str, self.arguments):
            if word.split("=")[0].replace("_", "-") in OURS:
                raise UsageError(
                    f"server.arguments holds {word.split('=')[0]}, which llmrec sets itself. "
                    "Leave it out."
                )
        if self.start_seconds < 1:
            raise UsageError(f"server.start_seconds={self.start_seconds} must be at least 1.")

    def _check_url(self) -> None:
        if self.base_url and urlsplit(self.base_url).scheme not in ("http", "https"):
            raise UsageError(
                f"server.base_url={self.base_url} must begin with http:// or https://, such as "
                "http://127.0.0.1:8000/v1."
            )
        given = {
            "lora": self.lora,
            "arguments": self.arguments,
            "python": self.python,
            "revision": self.revision != "main",
            "dtype": self.dtype != "auto",
        }
        for name, value in given.items():
            if value:
                raise UsageError(
                    f"server.{name} means nothing to server.name=url, whose server runs already. "
                    "Leave it out; an adapter's name is given as server.model."
                )

    @property
    def lora_parts(self) -> tuple[str, Path]:
        """Name and folder of the adapter; an empty name where there is none."""
        name, _, folder = self.lora.partition("=")
        return (name, Path(folder)) if folder else ("", Path())

    @property
    def spoken(self) -> Literal["vllm", "openai"]:
        """The dialect, decided."""
        if self.dialect == "auto":
            return "openai" if self.name == "url" else "vllm"
        return self.dialect


def check_complete(config: ServerConfig) -> None:
    """Refuse a config that does not say whom to ask.

    Not part of the config's own checks: its defaults, which name no model, must be printable.

    Raises:
        UsageError: The model or the address is missing.
    """
    if config.name == "url" and not config.base_url:
        raise UsageError(
            "server.name=url needs an address. Give --base-url, such as http://127.0.0.1:8000/v1."
        )
    if not config.model:
        what = "the name under which the server knows it" if config.name == "url" else "a model"
        raise UsageError(f"server.model is missing: name {what} with --model.")


def identity(config: ServerConfig) -> str:
    """What tells the model that answers from any other: of its files, where these can be seen.

    Raises:
        UsageError: The model cannot be found.
    """
    check_complete(config)
    if config.name == "url":
        return f"{config.model} at {config.base_url.rstrip('/')}"
    folder = Path(config.model)
    told = _files(folder) if folder.is_dir() else f"{config.model}@{_commit(config)}"
    return f"{told} + {_files(_adapter(config))}" if config.lora else told


def _commit(config: ServerConfig) -> str:
    """The commit that a hub model's revision stands for."""
    try:
        return locate(EncoderConfig(config.model, config.revision)).revision
    except UsageError as error:
        raise UsageError(
            f"server.model={config.model} (revision {config.revision}) is no local folder and "
            "cannot be reached on the Hugging Face hub. Check the name; without a network, "
            "download it elsewhere and give its folder."
        ) from error


def _adapter(config: ServerConfig) -> Path:
    folder = config.lora_parts[1]
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"server.lora={config.lora}: {folder} has no adapter_config.json. Give the folder that "
            "PEFT's save_pretrained wrote."
        )
    return folder


def _files(folder: Path) -> str:
    """sha256 over a folder's files, notes aside."""
    # All others: tokenisers and chat templates come in too many formats for a list.
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".") and file.suffix != ".md"
    ]
    stats = [file.stat() for file in files]
    return _digest(tuple(files), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


@lru_cache(maxsize=8)  # asked for more than once in a run, and weights are large
def _digest(files: Sequence[Path], stamps: Sequence[tuple[int, int]]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{sha256_of(file)};".encode())
    return digest.hexdigest()


def lora_rank(config: ServerConfig) -> int:
    """The rank that vLLM must allow for the adapter.

    Raises:
        UsageError: The folder holds no adapter, or one of a rank that vLLM does not take.
    """
    file = _adapter(config) / "adapter_config.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        rank = max([int(about["r"]), *map(int, (about.get("rank_pattern") or {}).values())])
        return next(allowed for allowed in LORA_RANKS if allowed >= rank)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"server.lora={config.lora}: {file} is damaged. Save it again.") from error
    except StopIteration:
        raise UsageError(
            f"server.lora={config.lora} has rank {rank}, but vLLM takes at most {LORA_RANKS[-1]}."
        ) from None


def engine_words(config: ServerConfig) -> list[str]:
    """What vLLM's command line says of the model, for its server and its engine alike."""
    words = ["--model", config.model, "--dtype", config.dtype]
    # Else the model's own generation_config.json changes answers behind the temperature's back.
    words += ["--generation-config", "vllm"]
    if not Path(config.model).is_dir():
        words += ["--revision", _commit(config)]
    if config.lora:
        words += ["--enable-lora", "--max-lora-rank", str(lora_rank(config))]
    return words + [str(word) for word in config.arguments]


class Servers:
    """Starts what a config asks for, and stops it on leaving the block.

    One server runs at a time. It is used again while configs are equal; another config stops it.
    """

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._running: _Vllm | None = None

    def __enter__(self) -> Servers:
        """The holder itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop what runs."""
        self._stop()

    def endpoint(self, config: ServerConfig, seed: int, temperature: float, log: Path) -> Endpoint:
        """Whom to ask, up and answering.

        Args:
            config: Not of the offline engine.
            seed: Of the server's drawing above temperature 0.
            temperature: Of every answer.
            log: Takes the output of a server that is started.

        Raises:
            UsageError: The model is missing, or vLLM is not installed or does not come up.
        """
        check_complete(config)
        model = config.lora_parts[0] or config.model
        if config.name == "url":
            key = os.environ.get(config.api_key_variable, "")
            return Endpoint(config.base_url, model, key, config.spoken, temperature, seed)
        if self._running is None or self._running.config != config or self._running.has_ended:
            self._stop()
            self._running = _Vllm(config, log)
            try:
                self._running.wait_until_it_answers(model)
            except BaseException:
                self._stop()
                raise
        base_url, key = f"{self._running.address}/v1", self._running.key
        return Endpoint(base_url, model, key, config.spoken, temperature, seed)

    def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.stop()


@contextlib.contextmanager
def serving(config: ServerConfig, seed: int, temperature: float, log: Path) -> Iterator[Endpoint]:
    """A server for the time of the block; see `Servers.endpoint`."""
    with Servers() as servers:
        yield servers.endpoint(config, seed, temperature, log)


class _Vllm:
    """A vLLM server of ours, from its start on."""

    def __init__(self, config: ServerConfig, log: Path) -> None:
        self.config, self.log = config, log
        python = config.python or sys.executable
        _check_installed(python)
        self.key = secrets.token_urlsafe(32)
        port = _free_port()
        self.address = f"http://127.0.0.1:{port}"
        words = [python, "-m", "vllm.entrypoints.openai.api_server"]
        words += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
        words += ["--served-model-name", config.model, *engine_words(config)]
        name, folder = config.lora_parts
        if config.lora:
            words += ["--lora-modules", f"{name}={folder}"]
        environment = os.environ | {"VLLM_API_KEY": self.key, "VLLM_NO_USAGE_STATS": "1"}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(keeper.__file__)), *words],
                stdin=subprocess.PIPE,  # held until we end, by whatever end
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to handle
            )

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def wait_until_it_answers(self, model: str) -> None:
        until = time.monotonic() + self.config.start_seconds
        while time.monotonic() < until:
            if self.has_ended:
                raise UsageError(
                    f"vLLM ended before server.model={self.config.model} could answer; {self.log} "
                    f"says:\n{_why(self.log)}"
                )
            # Only a server of ours knows the key, so that none on the same port is mistaken for it.
            if self._says("/health", key="") is not None:
                listed = self._says("/v1/models", self.key)
                if self._says("/v1/models", key="") is None and _lists(listed, model):
                    return
            time.sleep(POLL_SECONDS)
        raise UsageError(
            f"vLLM did not answer for server.model={self.config.model} within "
            f"server.start_seconds={self.config.start_seconds}; see {self.log}. Raise it, or serve "
            "a smaller model."
        )

    def _says(self, path: str, key: str) -> bytes | None:
        """The body of a reply with status 200, None where there is none."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(f"{self.address}{path}", headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as reply:
                body: bytes = reply.read()
                return body
        except (OSError, urllib.error.URLError, ValueError):  # not up yet
            return None

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(keeper.GRACE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()


def _check_installed(python: str) -> None:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, check=False).returncode
    except OSError as error:
        raise UsageError(
            f"server.python={python} cannot be run ({error.strerror}). Name the interpreter of the "
            "environment that holds vLLM."
        ) from error
    if found != 0:
        raise UsageError(
            f"server.name=vllm: {python} has no vLLM. Run pip install 'llmrec[vllm]', or name the "
            "interpreter of the environment that holds it with server.python."
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _lists(body: bytes | None, model: str) -> bool:
    try:
        values: Any = json.loads(body or b"")
        return any(entry["id"] == model for entry in values["data"])
    except (ValueError, LookupError, TypeError):
        return False


def _why(log: Path, lines: int = 3) -> str:
    """The last errors that a log names, else its last lines."""
    text = log.read_text(encoding="utf-8", errors="replace")
    said = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in said if re.search(r"\b\w*(Error|Exception|error): ", line)]
    distinct = list(dict.fromkeys(errors or said))
    return "\n".join(distinct[-lines:]) or "nothing"

"""Where answers come from: a vLLM that is started and stopped here, or any server's address."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

from llmrec.chat.endpoint import Endpoint
from llmrec.chat.vllm_server import VllmServer
from llmrec.encoders.loading import EncoderConfig, Location, locate
from llmrec.errors import UsageError
from llmrec.runs import sha256_of

OURS = ("--api-key", "--host", "--port", "--model", "--served-model-name", "--uds")
"""Words of vLLM's command line that are set here and nowhere else."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""
COMPACT = '{"backend": "xgrammar", "disable_any_whitespace": true}'
"""JSON without the blanks between entries with which a weak model fills all its tokens."""


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
                f"server.base_url means nothing to server.name={self.name}, which "
                "starts vLLM itself. Leave it out, or use server.name=url."
            )
        if self.lora and not all(self.lora_parts):
            raise UsageError(
                f"server.lora={self.lora} must be NAME=FOLDER, such as shop=runs/adapter."
            )
        if self.lora and self.lora_parts[0] == self.model:
            raise UsageError(
                f"server.lora={self.lora} names the adapter like the model, which would answer in "
                "its place. Name it otherwise."
            )
        if self.name == "offline" and self.python:
            raise UsageError(
                f"server.python={self.python} means nothing to server.name=offline, whose engine "
                "runs in this process. Leave it out, or start llmrec with that interpreter."
            )
        if self.name != "url" and self.dialect != "auto":
            raise UsageError(
                f"server.dialect={self.dialect} means nothing to server.name={self.name}, which is "
                "vLLM. Leave it out."
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
        if self.base_url:
            Endpoint(self.base_url, self.model)  # refuses what is no address, or holds a secret
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
        what = "as the server calls it" if config.name == "url" else "a hub id or a local folder"
        raise UsageError(f"server.model is missing: give --model, {what}.")


def identity(config: ServerConfig) -> str:
    """What tells the model that answers from any other: of its files, where these can be seen.

    Raises:
        UsageError: The model cannot be found.
    """
    check_complete(config)
    if config.name == "url":
        host = urlsplit(config.base_url).hostname or ""
        local = host == "localhost" or host.startswith("127.")
        return config.model if local else f"{config.model} at {host}"  # ports here come and go
    folder = Path(config.model)
    if not folder.is_dir():
        told = f"{config.model}@{_on_the_hub(config).identity}"
    elif (folder / "config.json").is_file():
        told = _files(folder)
    else:
        raise UsageError(
            f"server.model={folder} has no config.json. Give the folder that save_pretrained wrote."
        )
    return f"{told} + {_files(_adapter(config))}" if config.lora else told


def _on_the_hub(config: ServerConfig) -> Location:
    """Where a hub model is, and the commit that its revision stands for."""
    try:
        return locate(EncoderConfig(config.model, config.revision))
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
    check_complete(config)
    if Path(config.model).is_dir():
        words = ["--model", config.model]
    else:
        place = _on_the_hub(config)
        words = ["--model", place.source]
        if place.source == config.model:  # else the folder of that commit in the hub's cache
            words += ["--revision", place.revision]
    # Else the model's own generation_config.json changes answers behind the temperature's back.
    words += ["--dtype", config.dtype, "--generation-config", "vllm"]
    words += ["--structured-outputs-config", COMPACT]
    if config.lora:
        words += ["--enable-lora", "--max-lora-rank", str(lora_rank(config))]
    return words + [str(word) for word in config.arguments]


class Servers:
    """Starts what a config asks for, and stops it on leaving the block.

    One server runs at a time. It is used again while configs are equal; another config stops it.
    """

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._running: VllmServer | None = None
        self._config = ServerConfig()

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
        self.stop()

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
        if self._running is None or self._config != config or self._running.has_ended:
            self.stop()
            words = ["--served-model-name", config.model, *engine_words(config)]
            if config.lora:
                words += ["--lora-modules", config.lora]
            self._running = VllmServer(config.python or sys.executable, words, log)
            self._config = config
            try:
                self._running.wait_until_it_answers(model, config.start_seconds)
            except BaseException:
                self.stop()
                raise
        base_url, key = f"{self._running.address}/v1", self._running.key
        return Endpoint(base_url, model, key, config.spoken, temperature, seed)

    def stop(self) -> None:
        """Stop the server that runs, if any; returns once it is gone."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()

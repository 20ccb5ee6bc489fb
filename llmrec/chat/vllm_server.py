"""A vLLM server in a process of its own, from its start to its end."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrec.chat import keeper
from llmrec.errors import UsageError

POLL_SECONDS = 0.5
"""Between two looks at a server that is starting."""


class VllmServer:
    """Listens on a free port of this machine alone, behind a key of its own.

    It ends with `stop`, and with this process, however that ends: see ``keeper.py``.
    """

    def __init__(self, python: str, words: Sequence[str], log: Path) -> None:
        """Start it; `wait_until_it_answers` comes next.

        Args:
            python: Interpreter of an environment that holds vLLM.
            words: Its command line, without address and key.
            log: Takes its output.

        Raises:
            UsageError: There is no vLLM.
        """
        _check_installed(python)
        self.log, self.key = log, secrets.token_urlsafe(32)
        port = _free_port()
        self.address = f"http://127.0.0.1:{port}"
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--disable-uvicorn-access-log", *words]
        # The key goes through the environment: everyone on the machine sees arguments.
        environment = os.environ | {"VLLM_API_KEY": self.key, "VLLM_NO_USAGE_STATS": "1"}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-I", keeper.__file__, *command],
                stdin=subprocess.PIPE,  # held until this process ends, by whatever end
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is handled here, by stopping it
            )

    @property
    def has_ended(self) -> bool:
        """Whether it ended by itself, or was stopped."""
        return self.process.poll() is not None

    def wait_until_it_answers(self, model: str, seconds: float) -> None:
        """Return once it is healthy and lists the model.

        Raises:
            UsageError: It ended, or takes longer than `seconds`.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.has_ended:
                raise UsageError(
                    f"vLLM ended before server.model={model} could answer; {self.log} says:\n"
                    f"{why(self.log)}"
                )
            # Nobody else knows the key: a server that wants it and lists the model is this one.
            if self._says("/health") is not None and self._says("/v1/models") is None:
                if _lists(self._says("/v1/models", self.key), model):
                    return
            time.sleep(POLL_SECONDS)
        raise UsageError(
            f"vLLM did not answer for server.model={model} within server.start_seconds={seconds}; "
            f"see {self.log}. Raise it, or serve a smaller model."
        )

    def _says(self, path: str, key: str = "") -> bytes | None:
        """The body of a reply with status 200, None where there is none."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(f"{self.address}{path}", headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as reply:
                body: bytes = reply.read()
                return body
        except (OSError, http.client.HTTPException):  # not up yet, or the key is wanted
            return None

    def stop(self) -> None:
        """End it and every process that it has started."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(keeper.GRACE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
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
        raise no_vllm(python)


def no_vllm(python: str) -> UsageError:
    """What to say where an interpreter has no vLLM."""
    return UsageError(
        f"{python} has no vLLM. Run pip install 'llmrec[vllm]', or name the interpreter of an "
        "environment that holds it with server.python (server.name=vllm)."
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


def why(log: Path, lines: int = 3) -> str:
    """The last errors that a log names, else its last lines."""
    text = log.read_text(encoding="utf-8", errors="replace")
    said = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in said if "WARNING " not in line] or said
    errors = [line for line in said if re.search(r"\b\w*([Ee]rror|Exception)[:,] ", line)]
    distinct = list(dict.fromkeys(errors or said))
    return "\n".join(distinct[-lines:]) or "nothing"

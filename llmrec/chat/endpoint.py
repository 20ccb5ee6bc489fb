"""Whom a client asks, how hard, and in which words."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from llmrec.chat.requests import WRAPPED, Choice, Pattern, Request, Schema
from llmrec.errors import UsageError


@dataclass(frozen=True)
class ClientConfig:
    """How hard a server is asked, and what it costs."""

    concurrency: int = 64
    """Requests under way at once."""
    max_retries: int = 4
    """Further attempts after the first: on 429, 5xx, a timeout, a lost connection, half a reply."""
    attempt_seconds: float = 120.0
    """Seconds that one attempt may take, from connecting to the last byte."""
    deadline_seconds: float = 600.0
    """Seconds that a request may take with all its attempts and waits."""
    wait_seconds_cap: float = 30.0
    """Seconds that the longest wait between two attempts may take, whatever Retry-After says."""
    input_price: float = 0.0
    """Money per million tokens of prompts; 0 leaves the run unpriced."""
    output_price: float = 0.0
    """Money per million tokens of answers; 0 leaves the run unpriced."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 1 <= self.concurrency <= 4096:
            raise UsageError(f"client.concurrency={self.concurrency}: use 1 to 4096.")
        if not 0 <= self.max_retries <= 100:
            raise UsageError(
                f"client.max_retries={self.max_retries}: use 0 (each request is sent once) to 100."
            )
        for name in ("attempt_seconds", "deadline_seconds"):
            if not 0 < vars(self)[name] < float("inf"):
                raise UsageError(f"client.{name}={vars(self)[name]}: use seconds above 0.")
        for name in ("wait_seconds_cap", "input_price", "output_price"):
            if not 0 <= vars(self)[name] < float("inf"):
                raise UsageError(f"client.{name}={vars(self)[name]}: use 0 or more.")


@dataclass(frozen=True)
class Endpoint:
    """A server's chat completions, and the model that answers."""

    base_url: str
    """Up to the version, such as http://127.0.0.1:8000/v1."""
    model: str
    """As the server names it."""
    api_key: str = field(default="", repr=False)
    """Sent as Authorization header and shown nowhere; empty sends none."""
    dialect: Literal["vllm", "openai"] = "openai"
    """How constraints are put. vllm: all of them. openai: schemas alone; it knows no choices and
    patterns of plain text, so that these answers are free and only judged."""
    temperature: float = 0.0
    seed: int = 0
    """Of the server's drawing above temperature 0, and of the waits between attempts."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked, without repeating a secret."""
        try:
            parts = urlsplit(self.base_url)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname)
            secret = bool(parts.username or parts.password or parts.query)
            whole = whole and (parts.port is None or parts.port > 0)
        except ValueError:
            whole = secret = False
        if secret:
            raise UsageError(
                "--server.base_url holds a name, a password or a query. Leave them out; a key "
                "belongs into the environment variable that --server.api_key_variable names."
            )
        if not whole:
            raise UsageError(
                f"--server.base_url {self.base_url!r} is no address. Name one such as "
                "http://127.0.0.1:8000/v1."
            )
        if not (self.api_key.isascii() and self.api_key.isprintable()) or " " in self.api_key:
            raise UsageError(
                "the key in the environment variable that --server.api_key_variable names holds "
                "blanks, line ends or letters that no key has. Set it anew."
            )

    def headers(self) -> dict[str, str]:
        """What every request carries."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json", **key}

    def body(self, request: Request) -> bytes:
        """A request as the JSON of the chat completions protocol."""
        values: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": request.prompt}],
            "max_tokens": request.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        if request.top_logprobs:
            values |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return json.dumps(values | self._constraint(request)).encode("ascii")

    def _constraint(self, request: Request) -> dict[str, Any]:
        constraint, vllm = request.constraint, self.dialect == "vllm"
        if isinstance(constraint, Schema) and not vllm:
            whole = {
                "type": "object",
                "properties": {WRAPPED: constraint.schema},
                "required": [WRAPPED],
                "additionalProperties": False,
            }
            schema = {"name": "answer", "schema": whole, "strict": True}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        if constraint is None or not vllm:
            return {}
        match constraint:
            case Choice(options):
                return {"structured_outputs": {"choice": list(options)}}
            case Pattern(regex):
                return {"structured_outputs": {"regex": regex}}
            case Schema():
                return {"structured_outputs": {"json": constraint.schema}}

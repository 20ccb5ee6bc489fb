"""What a server's reply to one chat request says, whatever it may be."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from llmrec.chat.requests import Status

UNREADABLE = "no answer: "
"""How the problem of a reply begins that is none of the protocol's."""
SHOWN = 200
"""Characters of a server's own words that are kept."""
_REFUSALS = (400, 404, 413, 422)
"""A server says in these why; what it says of a key (401, 403) is not repeated."""


@dataclass(frozen=True)
class Reply:
    """An HTTP reply, read as an answer."""

    status: Status
    text: str = ""
    top: tuple[tuple[str, float], ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problem: str = ""


class _Unreadable(Exception):
    """The reply is no answer; says why."""


def read_reply(body: bytes) -> Reply:
    """The answer in the body of a reply with HTTP status 200; invalid where it holds none."""
    try:
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            raise _Unreadable("the reply is not JSON" if body else "the reply is empty") from None
        return _read(_of_type(values, dict, "the reply"))
    except _Unreadable as error:
        return Reply("invalid", problem=f"{UNREADABLE}{error}")


def refusal(http_status: int, body: bytes, secret: str) -> str:
    """Why a server refused a request, in a few words that hold no secret."""
    words = ""
    if http_status in _REFUSALS:
        try:
            values = json.loads(body)
            error = values.get("error", values)
            words = error["message"]
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            words = ""
    if not isinstance(words, str) or not words:
        return f"status {http_status}"
    words = " ".join(words.split())
    return f"status {http_status}: {words.replace(secret, '***') if secret else words}"[:SHOWN]


def _read(values: dict[str, Any]) -> Reply:
    choices = _of_type(values.get("choices"), list, "choices")
    if not choices:
        raise _Unreadable("the reply has no choices")
    choice = _of_type(choices[0], dict, "the choice")
    message = _of_type(choice.get("message"), dict, "the message")
    content, finish = message.get("content"), choice.get("finish_reason")
    usage = values.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    tokens = (_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
    top = _top(choice.get("logprobs"))
    cut = finish == "length"
    if content is None and cut:  # a model that spends all its tokens on thinking
        return Reply("cut", "", top, *tokens)
    if content is None:
        return Reply("invalid", "", top, *tokens, "the content is null")
    if not isinstance(content, str):
        return Reply("invalid", "", top, *tokens, "the content is no text")
    if finish == "content_filter":
        return Reply("invalid", content, top, *tokens, "stopped by the server's content filter")
    return Reply("cut" if cut else "answered", content, top, *tokens)


def _of_type(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise _Unreadable(f"{name} should be a {kind.__name__}, not {type(value).__name__}")
    return value


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value < 1 << 30 else 0


def _top(logprobs: Any) -> tuple[tuple[str, float], ...]:
    """Alternatives of the first token, likeliest first; empty where the server gives none."""
    try:
        found = [
            (entry["token"], float(entry["logprob"]))
            for entry in logprobs["content"][0]["top_logprobs"]
            if isinstance(entry["token"], str) and math.isfinite(float(entry["logprob"]))
        ]
    except (LookupError, TypeError, ValueError):
        return ()
    return tuple(sorted(found, key=lambda pair: -pair[1]))

"""What is asked of a language model and what came back: shared by every way of asking."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True)
class Choice:
    """The answer is one of these strings."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class Pattern:
    """The answer matches this regular expression, whole."""

    regex: str


@dataclass(frozen=True)
class Schema:
    """The answer is JSON of this JSON Schema."""

    schema: Mapping[str, Any]


WRAPPED = "titles"
"""Where a server takes no schema but an object's, the answer stands under this name."""

Constraint: TypeAlias = Choice | Pattern | Schema
"""What constrained decoding holds an answer to."""


@dataclass(frozen=True)
class Request:
    """One question."""

    number: int
    """Its place in the run, from 0."""
    prompt: str
    """The user's message, whole."""
    max_tokens: int
    """Tokens that an answer may have; a longer one is cut."""
    constraint: Constraint | None = None
    """None decodes freely."""
    top_logprobs: int = 0
    """Alternatives of the answer's first token that are wanted with their log-probabilities."""

    def digest(self) -> str:
        """Tells this question from any other, by all but its number; 32 hex digits."""
        constraint = None if self.constraint is None else vars(self.constraint)
        parts = (self.prompt, self.max_tokens, constraint, self.top_logprobs)
        encoded = json.dumps(parts, sort_keys=True, default=dict).encode()
        return hashlib.sha256(encoded).hexdigest()[:32]


Status: TypeAlias = Literal["answered", "cut", "invalid", "failed"]


@dataclass(frozen=True)
class Answer:
    """What became of one request; journalled before it counts."""

    number: int
    """The request's."""
    digest: str
    """The request's."""
    status: Status
    """answered: a whole text; cut: max_tokens came first; invalid: the server replied, but not with
    an answer (HTML, `{}`, no choices, null content, a refusal with a status other than 429 or 5xx);
    failed: no reply within the attempts or the deadline."""
    text: str = ""
    """As it came; also of a cut answer."""
    top: tuple[tuple[str, float], ...] = ()
    """Alternatives of the first token with log-probabilities (natural), likeliest first; empty
    where none were wanted or the server gives none."""
    prompt_tokens: int = 0
    """As the server counts; 0 where it does not say."""
    completion_tokens: int = 0
    """As the server counts; 0 where it does not say."""
    attempts: int = 1
    """Times it was sent."""
    seconds: float = 0.0
    """From the first sending to the end, waits included."""
    problem: str = ""
    """Why it is invalid or failed, in a few words, without what the server said of secrets."""

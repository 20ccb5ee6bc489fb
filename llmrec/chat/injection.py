"""Titles that try to talk a language model into recommending them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmrec.resources import shipped

FILE = "chat/injections.tsv"
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")


@dataclass(frozen=True)
class Payload:
    """What is written behind a title."""

    kind: str
    """What it tries, such as order, role or exfiltration."""
    text: str
    """As a seller would enter it; not cleaned yet."""


def payloads() -> list[Payload]:
    r"""The shipped payloads, in file order; \u and four hex digits there stand for a character."""
    lines = shipped("prompts", FILE).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("\t") for line in lines if line)
    return [
        Payload(kind, _ESCAPE.sub(lambda code: chr(int(code[1], 16)), text)) for kind, text in pairs
    ]

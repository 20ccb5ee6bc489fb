# ruff: noqa: RUF001, RUF002
"""Titles are data: how one is shown inside a prompt, and when two mean the same.

A title comes from whoever sold the item. Inside a prompt it must stay one line between quotation
marks, and no part of it may become a special token of the model that reads it.
"""

from __future__ import annotations

import re
import unicodedata

LIMIT = 200
"""Characters of a title that are shown."""

# Special tokens stand between angle or square brackets; prompts put titles between double quotes.
# Brackets are so few in titles that all of them go, not those of known tokens alone. Also what
# a tokenizer that normalises its input (NFKC, or NFKD without accents) turns into one of these.
_SIGNS = str.maketrans(
    {
        "<": "‹", "﹤": "‹", "＜": "‹", "≮": "‹",
        ">": "›", "﹥": "›", "＞": "›", "≯": "›",
        '"': "'", "＂": "'", "`": "'", "｀": "'", "\u1fef": "'",
        "[": "(", "［": "(", "﹇": "(", "]": ")", "］": ")", "﹈": ")",
    }
)  # fmt: skip
_NO_WORD = re.compile(r"[\W_]+")


def displayed(text: str, limit: int = LIMIT) -> str:
    """A title as it stands in a prompt: one line, without what is not for reading.

    Control and format characters (zero width, direction), lone surrogates and unassigned ones go,
    white space becomes one space, angle brackets become ‹ ›, double quotes and backticks single
    quotes, square brackets round ones. A longer title is clipped at a word and ends in an
    ellipsis.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text)
    text = unicodedata.normalize("NFC", text).translate(_SIGNS)
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    kept = text[: limit - 1]
    at_word = kept.rfind(" ")
    return f"{kept[:at_word] if at_word > limit // 2 else kept}…"


def matching_key(text: str) -> str:
    """Equal for titles that a reader would take for the same: letters and digits as they sound.

    Case, punctuation, spacing and typographic variants do not count; a title of nothing but
    punctuation is its own key.
    """
    shown = displayed(text)
    folded = unicodedata.normalize("NFKC", shown).casefold()
    return _NO_WORD.sub(" ", folded).strip() or folded or shown

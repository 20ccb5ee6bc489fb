"""Item texts that say nothing, say it of several items, or are damaged."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from llmrec.data.audit.findings import Finding, counted, grade
from llmrec.data.interactions import Dataset, Split
from llmrec.data.readers.files import clip

_CODE = re.compile(
    r"https?://\S+|www\.\S+"
    r"|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{16,}"  # UUIDs, hashes
    r"|B0[0-9A-Z]{8}|[A-Za-z]{0,8}[_#:-]?[0-9]{5,}|[A-Za-z]{1,8}[_#:][0-9]+"  # B000123456, item_7
)
_MARKUP = re.compile(
    r"&(amp|lt|gt|quot|apos|nbsp|[a-z]+(acute|grave|uml|circ|tilde|cedil)|[lr][sd]quo|[mn]dash"
    r"|hellip|trade|reg|copy|deg|szlig|#[0-9]{1,7}|#x[0-9a-f]{1,6});"
    r"|</?(a|b|br|div|em|font|h[1-6]|i|img|li|ol|p|span|strong|sub|sup|table|td|tr|u|ul)\b[^<>]*>",
    re.IGNORECASE,
)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]{2,}")
_CP1252 = {
    bytes([code]).decode("cp1252", "ignore"): code for code in range(128, 256)
}  # its five unused codes are control characters in a wrongly read text
_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u2060\ufeff]")


def empty_texts(data: Dataset, cut: Split) -> Finding:
    """Items without a text."""
    empty = {row: "" for row, text in enumerate(data.catalog.texts) if not text}
    remedy = "fill them, or read the numbers for items without text apart"
    if len(empty) == data.item_count:  # nothing was asked for, or nothing is there
        remedy = "name text fields in a data.item_text template, or keep to ID towers"
        what = "items have no text"
        return counted("empty texts", "note", len(empty), len(empty), what, remedy)
    return _of_texts("empty texts", data, empty, "items have no text", remedy, 0.05)


def short_texts(data: Dataset, cut: Split) -> Finding:
    """Texts below 3 characters."""
    rows = {row: text for row, text in enumerate(data.catalog.texts) if 0 < len(text) < 3}
    remedy = "add fields to the data.item_text template"
    return _of_texts("short texts", data, rows, "texts have fewer than 3 characters", remedy)


def shared_texts(data: Dataset, cut: Split) -> Finding:
    """Items whose text another item has too: no text tower can tell them apart."""
    texts = data.catalog.texts
    items = Counter(text for text in texts if text)
    often = [row for row, text in enumerate(texts) if items[text] > 1]
    often.sort(key=lambda row: -items[texts[row]])
    rows = {row: texts[row] for row in often}
    most = f", one text by {items[texts[often[0]]]:,}" if often else ""
    remedy = "add fields to the data.item_text template, or merge items that are one"
    what = f"items with a text share it with others{most}"
    return _of_texts("shared texts", data, rows, what, remedy, 0.05)


def codes_as_texts(data: Dataset, cut: Split) -> Finding:
    """Texts that are an id, a number of 5 digits or more, a hash or an address, and nothing else.

    Four digits may be a title: 1984, 2001.
    """
    rows = {row: text for row, text in enumerate(data.catalog.texts) if _CODE.fullmatch(text)}
    remedy = "choose a field that says something in words"
    return _of_texts("codes as texts", data, rows, "texts are a mere id or address", remedy)


def markup(data: Dataset, cut: Split) -> Finding:
    """Texts with HTML entities or tags."""
    remedy = "unescape entities (html.unescape) and strip tags in the source"
    what = "texts hold HTML entities or tags"
    return _of_texts("markup", data, _holding(_MARKUP, data), what, remedy)


def encoding(data: Dataset, cut: Split) -> Finding:
    """Texts that were decoded wrongly: UTF-8 read as Latin-1 or Windows-1252, or characters lost.

    Where the damage holds a no-break space, the template took that for white space, and a text with
    no other damage is missed.
    """
    damage = {row: _misread(text) for row, text in enumerate(data.catalog.texts)}
    rows = {row: shown for row, shown in damage.items() if shown}
    remedy = "read the source in its true encoding, most often UTF-8, and export it again"
    return _of_texts("encoding", data, rows, "texts were decoded wrongly", remedy)


def control_characters(data: Dataset, cut: Split) -> Finding:
    """Texts with control characters or zero-width spaces; joiners, which scripts need, are fine."""
    remedy = "remove them in the source: encoders read them as words"
    what = "texts hold control characters or zero-width spaces"
    return _of_texts("control characters", data, _holding(_INVISIBLE, data), what, remedy)


def _misread(text: str) -> str:
    """What of a text was decoded wrongly and a little around it; empty where nothing was."""
    if text.isascii():
        return ""
    for run in _NOT_ASCII.finditer(text):
        codes = [_CP1252.get(character, ord(character)) for character in run[0]]
        if max(codes) < 256:
            try:
                bytes(codes).decode("utf-8")
            except UnicodeDecodeError:
                continue
            return _around(text, run.start())
    lost = text.find("\ufffd")
    return "" if lost < 0 else _around(text, lost)


def _holding(pattern: re.Pattern[str], data: Dataset) -> dict[int, str]:
    """Rows of the catalogue whose text holds the pattern -> where it does."""
    matches = ((row, text, pattern.search(text)) for row, text in enumerate(data.catalog.texts))
    return {row: _around(text, match.start()) for row, text, match in matches if match}


def _around(text: str, place: int) -> str:
    return text[max(place - 20, 0) : place + 20]


def _of_texts(
    check: str, data: Dataset, rows: dict[int, str], what: str, remedy: str, warning: float = 0.01
) -> Finding:
    """A finding about texts: row of the catalogue -> what to show of it; the first is shown."""
    texts, ids = data.catalog.texts, data.catalog.ids
    of = len(texts) if check == "empty texts" else sum(map(bool, texts))
    verdict = grade(len(rows), of, warning)
    if not rows:
        return counted(check, verdict, 0, of, what)
    first = next(iter(rows))
    what += f"; such as {clip(ids[first])}" + (f": {clip(rows[first])}" if rows[first] else "")
    return replace(counted(check, verdict, len(rows), of, what, remedy), example=ids[first])

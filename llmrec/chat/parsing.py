"""From an answer's text to places among the candidates; what cannot be understood is counted."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from llmrec.chat.matching import Kind, TitleMatcher
from llmrec.chat.requests import WRAPPED, Choice, Constraint, Pattern

PARTS = 4
"""Quoted parts, and separators after which an explanation may begin, that are tried in a line."""

_RANK = {"exact": 0, "normalised": 1, "fuzzy": 2, "seen": 3, "invented": 4}


@dataclass(frozen=True)
class Parsed:
    """What an answer says."""

    places: tuple[int, ...] = ()
    """Of candidates, distinct, best first."""
    kinds: Mapping[str, int] = field(default_factory=dict)
    """How its parts were understood: a `Kind`, duplicate, or contradiction."""
    problem: Literal["", "unparsable"] = ""
    """unparsable: nothing in it is an answer, or several are."""


_UNPARSABLE = Parsed(problem="unparsable")


def _spoken(text: str) -> str:
    """An answer without what was thought aloud before it."""
    said = text.rpartition("</think>")[2]
    return said.partition("<think>")[0].strip()


# Quotation marks, emphasis and the like around a title.
_WRAP = " \t\r\n\"'*_`“”„«»‘’"  # noqa: RUF001
_QUOTED = re.compile(r"[\"“„«]([^\"“”«»]+)[\"”“»]|\*\*([^*]+)\*\*")
_SEPARATOR = re.compile(r"\s[-–—|]\s|:\s|\s\(")  # noqa: RUF001


def _guesses(line: str) -> Iterator[str]:
    """Parts of a line that may be its title, the likeliest first."""
    yield line
    yield line.strip(_WRAP)
    yield line.rstrip(",.;").strip(_WRAP)
    for found in islice(_QUOTED.finditer(line), PARTS):
        yield (found[1] or found[2]).strip()
    for found in islice(_SEPARATOR.finditer(line), PARTS):
        yield line[: found.start()].strip(_WRAP)


def _best(guesses: Iterable[str], matcher: TitleMatcher) -> tuple[int | None, Kind, str]:
    """The guess that is understood best: place, kind, text."""
    best: tuple[int | None, Kind, str] = (None, "invented", "")
    for guess in dict.fromkeys(filter(None, guesses)):
        place, kind = matcher.match(guess)
        if _RANK[kind] < _RANK[best[1]]:
            best = (place, kind, guess)
        if kind == "exact":
            break
    return best


# Read leniently: an array may be cut, lack commas or have one too many, hold Python's quotes or
# objects, and stand anywhere in the text. A last string that is not closed is no title.
_ARRAY = re.compile(r"\[(?=\s*[\"'{])")
_ENTRY = re.compile(
    r"[\s,]*(?:(?P<json>\"(?:[^\"\\]|\\.)*\")|'(?P<python>(?:[^'\\\n]|\\.|'(?!\s*[,\]]))*)'"
    r"|(?P<object>\{[^{}]*\}))",
    re.DOTALL,
)
_JSON = json.JSONDecoder(strict=False)
_OPENING = re.compile(r"\[(?=\s*[\"{\[])|\{(?=\s*\"\d)")
ARRAYS = 20
"""Places where valid JSON is looked for."""
_TITLE_FIELD = re.compile(r"\"(?:title|name|item)\"\s*:\s*(\"(?:[^\"\\]|\\.)*\")", re.IGNORECASE)
_NUMBERED = re.compile(
    r"^\s*(?:\*\*|__)?(?:\(?#?\d{1,3}\s*(?:[.):]|[-–](?=\s))|[-*•–·]+(?=\s))\s*"  # noqa: RUF001
)


def parse_list(text: str, matcher: TitleMatcher, count: int) -> Parsed:
    """The first `count` distinct candidates of a list, best first; all its entries are counted.

    A JSON array wherever it stands (the longest, the last of equals), else numbered or bulleted
    lines, else those lines that are candidates.
    """
    text = _spoken(text)
    found = [matcher.match(title) for title in _array(text)]
    if all(place is None for place, _ in found):  # a title may hold what looks like an array
        found = _lines(text, matcher) or found
    kinds: Counter[str] = Counter()
    places: dict[int, None] = {}
    for place, kind in found:
        if place is None:
            kinds[kind] += 1
        elif place in places:
            kinds["duplicate"] += 1
        else:
            kinds[kind] += 1
            places[place] = None
    return Parsed(tuple(places)[:count], dict(kinds)) if kinds else _UNPARSABLE


def _lines(text: str, matcher: TitleMatcher) -> list[tuple[int | None, Kind]]:
    lines = [line for line in text.splitlines() if line.strip(" `")]
    marked = [line for line in lines if _NUMBERED.match(line)]
    understood = [_line(line.strip(), matcher) for line in marked or lines]
    return [entry for entry in understood if marked or entry[1] != "invented"]


def _line(line: str, matcher: TitleMatcher) -> tuple[int | None, Kind]:
    """A line of a list. Its number belongs to a title only where that is one as it stands."""
    whole = matcher.match(line)
    best = _best(_guesses(_NUMBERED.sub("", line)), matcher)[:2]
    as_it_stands = whole[1] in ("exact", "normalised") and _RANK[whole[1]] <= _RANK[best[1]]
    return whole if as_it_stands else best


def _array(text: str) -> list[str]:
    best: list[str] = []
    for opening in islice(_OPENING.finditer(text), ARRAYS):
        best = max(_whole_array(text, opening.start()), best, key=len)
    end = 0
    while start := _ARRAY.search(text, end):
        end, titles = start.end(), []
        while entry := _ENTRY.match(text, end):
            end = entry.end()
            if entry["json"] is not None:
                titles.append(_string(entry["json"]))
            elif entry["python"] is not None:
                titles.append(re.sub(r"\\(.)", r"\1", entry["python"]))
            elif named := _TITLE_FIELD.search(entry["object"]):
                titles.append(_string(named[1]))
        best = max(titles, best, key=len)  # of equals the first given, which stands later
    return best


def _whole_array(text: str, start: int) -> list[str]:
    """The entries of valid JSON; one that names nothing is an empty title, which is counted."""
    try:
        entries = _JSON.raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return []
    if isinstance(entries, dict):  # {"1": "title", ...}
        entries = [entry for entry in entries.values() if isinstance(entry, str)]
        return entries if len(entries) > 1 else []
    return [_title_of(entry) for entry in entries]


def _title_of(entry: Any) -> str:
    if isinstance(entry, list) and len(entry) == 1:
        entry = entry[0]
    if isinstance(entry, dict):
        named = (value for key, value in entry.items() if key.lower() in ("title", "name", "item"))
        entry = next(named, "")
    return entry if isinstance(entry, str) else ""


def _string(quoted: str) -> str:
    try:
        return str(json.loads(quoted, strict=False))
    except ValueError:  # an escape that JSON does not know
        return quoted[1:-1]


_ONLY_LETTER = re.compile(
    r"^[\W_]*(?:(?i:the|my|final|best|correct|answer|option|choice|letter|is)[\W_]+)*"
    r"([A-Za-z])[\W_]*$"
)
_ASKED = r"\b(?i:answer|option|choice|letter|pick|choose|select)\b(?:\s+is\b)?[\s:*\"'(]*"
_LEAD = re.compile(rf"^[\W_]*(?:(?i:the|my|final|best|i)\s+)*(?:{_ASKED})?[A-Z][).:\]*,\s-]+")
_LOWER = re.compile(r"^[\W_]*[a-z](?=[):])")
_LETTER = re.compile(rf"({_ASKED})?(?<![\w'’&])([A-Z])(?![\w'’&])(\s+[\w]+)?")  # noqa: RUF001
_VERBS = frozenset("is or and because since as for seems fits looks over".split())
_REFUSES = re.compile(r"\b(?:neither|none|nor)\b", re.IGNORECASE)


def parse_pick(text: str, matcher: TitleMatcher, letters: Sequence[str]) -> Parsed:
    """The one option that an answer names, by its letter, its title or both.

    Where they contradict each other the title wins, and the answer counts as a contradiction: a
    title takes reading, a letter may slip. Several letters, or several titles without one letter
    that belongs to one of them, are unparsable.
    """
    text = _LOWER.sub(lambda lead: lead[0].upper(), _spoken(text))
    only = _ONLY_LETTER.match(text) or _ONLY_LETTER.match(text.partition("\n")[0])
    if only and only[1].upper() in letters:
        return Parsed((letters.index(only[1].upper()),), {"exact": 1})
    titles, rest = _titles_in(text, matcher)
    if not titles and _REFUSES.search(rest):
        return _UNPARSABLE
    named = {letters.index(letter) for letter in _letters_in(rest) if letter in letters}
    if len(named) > 1 or (len(titles) > 1 and not named & titles.keys()):
        return _UNPARSABLE
    if len(titles) == 1:
        (place, kind), *_ = titles.items()
        return Parsed((place,), {kind if named <= {place} else "contradiction": 1})
    quoted = _QUOTED.match(_LEAD.sub("", text))  # a title where it was asked for
    other = matcher.match(quoted[1] or quoted[2])[1] if quoted and not titles else None
    if named:
        place = min(named)
        return Parsed((place,), {titles.get(place) or other or "exact": 1})
    other = other or ("seen" if _best(_guesses(text), matcher)[1] == "seen" else None)
    return Parsed((), {other: 1}) if other else _UNPARSABLE


def _titles_in(text: str, matcher: TitleMatcher) -> tuple[dict[int, Kind], str]:
    """Candidates that a text names, and the text without their titles."""
    titles: dict[int, Kind] = {}
    rest = []
    for line in text.splitlines():
        place, kind, guess = _best((line, *_guesses(_LEAD.sub("", line))), matcher)
        if place is not None:
            titles[place] = kind
            line = " ".join(line.rsplit(guess, 1))  # the last: a title "A" may follow its letter
        rest.append(line)
    places, without = matcher.mentioned("\n".join(rest))
    return titles | dict.fromkeys(places, "exact"), without


def _letters_in(text: str) -> set[str]:
    """Capitals by themselves that are no part of a name ("A tent", "Vitamin C cream")."""
    letters = set()
    for found in _LETTER.finditer(text):
        asked, letter, word = found.groups()
        leads = letter not in "AI" and not text[: found.start()].strip(_WRAP + "([")
        if asked or leads or not word or word.strip() in _VERBS:
            letters.add(letter)
    return letters


_ANSWER_IS = r"^[\W_]*(?:(?:the|my|final)\s+)*(?:answer\s*(?:is|:)?[\W_]*)?"
_YES_NO = re.compile(
    rf"{_ANSWER_IS}(yes|no)\b(?!\s*(?:/|or\b)|\s+(?:idea|clue|way)\b)", re.IGNORECASE
)
_LAST = re.compile(r"\banswer(?:\s+is|\s*:)[\W_]*(yes|no)[\W_]*$", re.IGNORECASE)


def parse_yes_no(text: str) -> bool | None:
    """Whether an answer begins with yes or no, or ends in saying that it is one; else None."""
    text = _spoken(text)
    found = _YES_NO.match(text) or _LAST.search(text)
    return found[1].lower() == "yes" if found else None


_WORDS = {"one": 1.0, "two": 2.0, "three": 3.0, "four": 4.0, "five": 5.0}
_SCALE = re.compile(
    r"\b(?:from\s+)?1\s*(?:to|-|–)\s*5\b|(?:/|\bout\s+of\b)\s*(?:5|five)\b"  # noqa: RUF001
    r"|\"[^\"]*\"",
    re.IGNORECASE,
)
_OTHER_SCALE = re.compile(r"(?:/|\bout\s+of\b)\s*\d+", re.IGNORECASE)
_NUMBER = r"(?<!\d)[-−]?\d{1,9}(?!\d)(?:[.,]\d{1,9})?"  # noqa: RUF001
_STARS = re.compile(rf"({_NUMBER}|\b(?:{'|'.join(_WORDS)})\b)[\s-]*(?:stars?\b|★)", re.IGNORECASE)
_FIRST = re.compile(rf"{_NUMBER}|\b(?:{'|'.join(_WORDS)})\b(?!\s+of\b)", re.IGNORECASE)


def parse_rating(text: str) -> float | None:
    """The stars that an answer gives: what is called stars, else its first number.

    None where that does not lie in 1..5 or is out of another number than 5. Numbers between double
    quotes belong to titles.
    """
    text = _SCALE.sub(" ", _spoken(text))
    if _OTHER_SCALE.search(text):
        return None
    stars, named = _STARS.search(text), _FIRST.findall(text)
    leads = _FIRST.match(text.lstrip(_WRAP))
    if not named or (not stars and not leads and len(set(named)) > 1):
        return None
    if leads and re.match(r"\s*(?:or|to|-|–)\s*\d", text.lstrip(_WRAP)[leads.end() :]):  # noqa: RUF001
        return None
    said = (stars[1] if stars else named[0]).lower()
    value = _WORDS.get(said) or float(said.replace(",", ".").replace("−", "-"))  # noqa: RUF001
    return value if 1 <= value <= 5 else None


def pick_scores(top: Sequence[tuple[str, float]], options: Sequence[str]) -> dict[str, float]:
    """Probability of each option by the alternatives of the first token; absent ones are missing.

    Args:
        top: Tokens with natural log-probabilities. Tokens that differ in case and leading space
            are one option, their probabilities added.
        options: What may be answered; case counts only where two differ in nothing else.
    """
    folded = Counter(option.casefold() for option in options)
    known = {option: option for option in options}
    known |= {option.casefold(): option for option in options if folded[option.casefold()] == 1}
    mass: dict[str, float] = {}
    for token, logprob in top:
        bare = token.strip(" \t\r\n▁ĠĊ")  # as SentencePiece and byte-level BPE write space
        option = known.get(bare) or known.get(bare.casefold())
        if option is not None and not math.isnan(logprob):
            mass[option] = mass.get(option, 0.0) + math.exp(min(logprob, 0.0))
    return mass


def obeys(text: str, constraint: Constraint) -> bool:
    """Whether an answer is what was asked for; servers may ignore it. White space around is free.

    Raises:
        ValueError: The schema uses what is not checked here.
    """
    text = text.strip()
    if isinstance(constraint, Choice):
        return text in constraint.options
    if isinstance(constraint, Pattern):
        return re.fullmatch(constraint.regex, text) is not None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if isinstance(value, dict) and value.keys() == {WRAPPED}:
        value = value[WRAPPED]
    return _fits(value, constraint.schema)


_CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "type": lambda value, name: type(value) is {"array": list, "string": str, "integer": int}[name],
    "enum": lambda value, options: value in options,
    "minItems": lambda value, least: len(value) >= least,
    "maxItems": lambda value, most: len(value) <= most,
    "minimum": lambda value, least: value >= least,
    "maximum": lambda value, most: value <= most,
    "items": lambda value, schema: all(_fits(item, schema) for item in value),
}


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    if unknown := schema.keys() - _CHECKS.keys():
        raise ValueError(f"answers are not checked against {', '.join(sorted(unknown))}")
    # In this table's order: the type comes first, so that what follows can rely on it.
    return all(check(value, schema[name]) for name, check in _CHECKS.items() if name in schema)

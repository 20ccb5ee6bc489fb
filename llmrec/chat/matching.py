"""Which candidate a text means: titles as language models write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

from rapidfuzz import fuzz, process

from llmrec.data.titles import matching_key

Kind: TypeAlias = Literal["exact", "normalised", "fuzzy", "seen", "invented"]
"""exact: letter by letter. normalised: but for case, punctuation and spacing. fuzzy: misspelt or
shortened. seen: a title of the history. invented: no title that was shown, or two equally well."""
FUZZY = 90
"""Least similarity (0..100) of a misspelt title: one letter in ten. Lower, sequels meet."""
MARGIN = 5
"""What a misspelt title must be ahead of the next one by."""
SHORTENED = 12
"""Least characters of a title that breaks off: fewer begin too many titles outside the pool."""
MENTIONED = 5
"""Least characters of a title that is looked for inside a sentence."""

_NUMBERS = re.compile(r"\d+|\b[ivx]+\b")


class TitleMatcher:
    """Finds the candidate that a text means."""

    def __init__(self, candidates: Sequence[str], history: Sequence[str]) -> None:
        """Of titles as displayed, the candidates in the order shown."""
        self.candidates = tuple(candidates)
        self._shown = (*self.candidates, *history)
        self._keys = [matching_key(title) for title in self._shown]
        self._sorted = [_in_order(key) for key in self._keys]
        self._exact = _places(self.candidates)
        self._by_key = _places(self._keys)
        lengths = {i: len(title) for i, title in enumerate(self._shown) if len(title) >= MENTIONED}
        self._longest_first = sorted(lengths, key=lambda i: -lengths[i])  # "Tent" in "Blue Tent"

    def match(self, text: str) -> tuple[int | None, Kind]:
        """The place of the candidate that a text means, and how it was found.

        A misspelt title has the same numbers as the candidate, Roman ones too: they tell volumes,
        sizes and years apart. Words in another order count as misspelt ("Matrix, The").
        """
        text = text.strip()
        if places := self._exact.get(text):
            return places[0], "exact"
        key = matching_key(text)
        if places := self._by_key.get(key):
            return self._settle(places, "normalised")
        if len(key) >= SHORTENED:
            longer = [i for i, known in enumerate(self._keys) if known.startswith(f"{key} ")]
            if longer:
                return self._settle(longer, "fuzzy")
        return self._settle(self._similar(key), "fuzzy")

    def _similar(self, key: str) -> list[int]:
        """Titles like the key: the best one and those that are not clearly behind it."""
        scores: dict[int, float] = {}
        for query, choices in ((key, self._keys), (_in_order(key), self._sorted)):
            found = process.extract(
                query, choices, scorer=fuzz.ratio, limit=None, score_cutoff=FUZZY - MARGIN
            )
            for _, score, place in found:
                scores[place] = max(score, scores.get(place, 0.0))
        numbers = _numbers(key)
        scores = {p: score for p, score in scores.items() if _numbers(self._keys[p]) == numbers}
        best = max(scores.values(), default=0.0)
        return [p for p, score in scores.items() if score > best - MARGIN] if best >= FUZZY else []

    def mentioned(self, text: str) -> tuple[set[int], str]:
        """Candidates whose titles stand in a text letter by letter, and the text without titles.

        Titles of less than `MENTIONED` characters are not looked for: they are words, too.
        """
        places = set()
        for place in self._longest_first:
            title = self._shown[place]
            without = (
                re.sub(rf"(?<!\w){re.escape(title)}(?!\w)", " ", text) if title in text else text
            )
            if without != text and place < len(self.candidates):
                places.add(place)
            text = without
        return places, text

    def _settle(self, places: Sequence[int], kind: Kind) -> tuple[int | None, Kind]:
        """One candidate, or titles of the history alone, or nothing certain."""
        if places and min(places) >= len(self.candidates):
            return None, "seen"
        # A candidate may be in the history too where users buy again: it is a candidate.
        keys = {self._keys[place] for place in places}
        own = [place for place in places if place < len(self.candidates)]
        return (own[0], kind) if len(keys) == len(own) == 1 else (None, "invented")


def _numbers(key: str) -> list[str]:
    return sorted(_NUMBERS.findall(key))


def _in_order(key: str) -> str:
    return " ".join(sorted(key.split()))


def _places(titles: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, title in enumerate(titles):
        places.setdefault(title, []).append(place)
    return places

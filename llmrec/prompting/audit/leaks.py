"""Whether a training prompt's text tells what its user is tested on."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import jinja2

from llmrec.data.interactions import Dataset, Int64
from llmrec.data.titles import displayed
from llmrec.prompting.families import P5Template
from llmrec.prompting.indexing import Indexing
from llmrec.prompting.p5 import Example
from llmrec.prompting.p5.words import shown_text

LEAST = 20
"""Characters from which on a user's text is taken for this user's and no accident."""


@dataclass(frozen=True)
class Held:
    """What one user is held out on."""

    fresh: frozenset[int]
    """Items that this user never met in training."""
    repeated: frozenset[int]
    """Those that were met in training too: naming them there tells nothing."""
    texts: tuple[str, ...]
    """What was written of them, where it does not stand in a text of the training part."""
    own: tuple[str, ...]
    """The texts of the training part, longest first."""


class Names:
    """Finds names in texts as whole names.

    Neither `item_12` in `item_123`, nor *Batman* in *Batman Returns* where that is a name as well.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Take all names that there are."""
        self._all = tuple(dict.fromkeys(name for name in names if name))
        self.longer = functools.lru_cache(maxsize=1 << 14)(self._longer)

    def stands_in(self, name: str, text: str) -> bool:
        """Whether a text holds a name otherwise than inside a longer one."""
        if not name or name not in text or not _whole(name).search(text):
            return False
        return bool(_whole(name).search(_without(text, self.longer(name))))

    def _longer(self, name: str) -> tuple[str, ...]:
        """The names that hold this one whole, longest first."""
        found = [one for one in self._all if name in one and one != name]
        return tuple(sorted((one for one in found if _whole(name).search(one)), key=len)[::-1])


@functools.lru_cache(maxsize=1 << 14)
def _whole(name: str) -> re.Pattern[str]:
    # Cluster tokens stand side by side: <c1_7><c2_3> is not inside <c1_7><c2_3><c3_1>.
    return re.compile(rf"(?<![\w>]){re.escape(name)}(?![\w<])")


def _without(text: str, passages: Iterable[str]) -> str:
    for passage in passages:
        text = text.replace(passage, "\n")
    return text


class Leaks:
    """Looks into training prompts for the held-out items of their users.

    Held out is whatever comes after a user's training part: the validation and test items, and in a
    temporal split what follows them.
    """

    def __init__(
        self,
        dataset: Dataset,
        train_end: Int64,
        indexing: Indexing,
        templates: Sequence[P5Template],
    ) -> None:
        """Take the data and what its items are called."""
        self._dataset, self._train_end = dataset, train_end
        self._index = ["", *indexing.mentions]
        self._titles = ["", *map(displayed, dataset.catalog.texts)]
        shared: dict[str, int] = {}
        for title in self._titles:
            shared[title] = shared.get(title, 0) + 1
        self._shared = {title for title, count in shared.items() if count > 1}
        self._names = Names(self._index), Names(self._titles)
        self._wordings = {template.id: _wording(template) for template in templates}
        self.held = functools.lru_cache(maxsize=1 << 13)(self._held)

    def look(self, example: Example) -> str:
        """What a training prompt tells: nothing (empty), a kind of leak, or why it is none.

        Returns:
            "item", "name", "title" or "text" for a leak; "repeated item", "shared title" or
            "own words" where the training part holds the same.
        """
        held = self.held(example.user)
        text = f"{example.input}\n{example.target}"
        if example.item in held.fresh:
            return "item"
        if any(passage in text for passage in held.texts):
            return "text"
        doubts = ""
        for item in held.fresh:
            for kind, names, name in zip(
                ("name", "title"),
                self._names,
                (self._index[item], self._titles[item]),
                strict=True,
            ):
                if names.stands_in(name, text):
                    verdict = self._weighed(kind, names, name, example, held)
                    if verdict == kind:
                        return kind
                    doubts = doubts or verdict
        if not doubts and any(
            self._names[0].stands_in(self._index[item], text) for item in held.repeated
        ):
            return "repeated item"
        return doubts

    def values(self, example: Example) -> str:
        """A prompt without its template's own words: what was put in, a line each."""
        return _values(example.input, self._wordings.get(example.template, ()))

    def tells(self, question: Example, values: str, met: Collection[int]) -> bool:
        """Whether what a question was given holds the item that it asks for.

        Args:
            question: One that is answered by an item.
            values: What was put into it, without the candidates.
            met: The items that its user met before: naming these tells nothing.
        """
        title = self._titles[question.item]
        if question.item in met:
            return False
        if self._names[0].stands_in(self._index[question.item], values):
            return True
        # A title that another item bears too may be that other one's.
        return title not in self._shared and self._names[1].stands_in(title, values)

    def _weighed(self, kind: str, names: Names, name: str, example: Example, held: Held) -> str:
        """A name that was found may be a word of the question, or of the user's earlier texts."""
        text = f"{self.values(example)}\n{example.target}"
        if not names.stands_in(name, text):
            return ""
        if name in self._shared:
            return "shared title"
        own = [passage for passage in held.own if names.stands_in(name, passage)]
        return kind if names.stands_in(name, _without(text, own)) else "own words"

    def _held(self, user: int) -> Held:
        interactions = self._dataset.interactions
        start, stop = (int(bound) for bound in interactions.offsets[user : user + 2])
        end = int(self._train_end[user])
        trained = frozenset(interactions.items[start:end].tolist())
        later = frozenset(interactions.items[end:stop].tolist())
        own = sorted(self._texts(start, end), key=len, reverse=True)
        told = "\n".join(own)
        texts = tuple(
            text for text in self._texts(end, stop) if len(text) >= LEAST and text not in told
        )
        return Held(later - trained, later & trained, texts, tuple(own))

    def _texts(self, start: int, stop: int) -> set[str]:
        """What was written of some interactions, as prompts show it; without the empty ones."""
        reviews = self._dataset.reviews
        shown = (shown_text(text, name) for name in reviews for text in reviews[name][start:stop])
        return {text for text in shown if text}


def _wording(template: P5Template) -> tuple[str, ...]:
    """What a template says itself, in order, between what is put in."""
    parsed = jinja2.Environment().parse(template.source)
    words = (" ".join(node.data.split()) for node in parsed.find_all(jinja2.nodes.TemplateData))
    return tuple(word for word in words if word)


def _values(text: str, wording: Sequence[str]) -> str:
    """A prompt without its template's own words."""
    values, place = [], 0
    for words in wording:
        found = text.find(words, place)
        if found >= 0:
            values.append(text[place:found])
            place = found + len(words)
    return "\n".join([*values, text[place:]])

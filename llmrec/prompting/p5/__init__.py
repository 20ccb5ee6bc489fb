"""Prompts of the P5 kind: every task on a data set as a question and an answer in words.

One split for all families. A training prompt is built from the positions before a user's
``train_end`` and nothing else, whatever its family: the items it names, the stars and the texts. So
no family can tell what another one is tested on. Numpy, no torch; nothing is held but the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator

from llmrec.data.interactions import Bool, Dataset, Int32, Int64, Split
from llmrec.errors import UsageError
from llmrec.prompting.families import FAMILIES, P5Template
from llmrec.prompting.indexing import Indexing
from llmrec.prompting.p5.config import PerUser, PromptConfig
from llmrec.prompting.p5.draws import Draw, Part, Shelves
from llmrec.prompting.p5.kinds import (
    TOLD,
    WAYS_OUT,
    Kind,
    asks_about_another,
    fitting,
    kinds,
    needs,
)
from llmrec.prompting.p5.words import LIKED, MOST_STARS, STAR_RANGE, Words

__all__ = ["Example", "PerUser", "PromptConfig", "PromptGenerator", "Words"]

USERS_AT_ONCE = 128
"""Users whose prompts are shuffled among each other: the memory of a stream."""
_PARTS: tuple[Part, ...] = ("train", "valid", "test")


class Example(NamedTuple):
    """One question with its answer."""

    input: str
    target: str
    family: str
    template: str
    """The template's id."""
    user: int
    """Internal number, from 0."""
    item: int
    """Internal number, from 1: the item asked about; a wrong one where the answer is no."""
    split: str
    """train, valid or test."""


class PromptGenerator:
    """Makes the prompts of one data set under one split."""

    def __init__(
        self,
        dataset: Dataset,
        cut: Split,
        indexing: Indexing,
        templates: Sequence[P5Template],
        config: PromptConfig,
        train_end: Int64 | None = None,
    ) -> None:
        """Look what the data has.

        Args:
            dataset: Sequences, titles, ratings, reviews.
            cut: The split; its candidates bound what wrong answers are drawn from.
            indexing: What items are called.
            templates: Of all families; those of the chosen ones are asked in training.
            config: Which prompts.
            train_end: (U,) where it is not the split's own: what is trained on ends there.

        Raises:
            UsageError: A family asked for by name needs what the data lacks, no family can be
                asked about, there are fewer items than candidates, or items that are called by
                titles are to be mentioned by titles besides.
        """
        if indexing.name == "title" and config.mention != "id":
            raise UsageError(
                f"prompts.mention={config.mention} with indexing.name=title: items are called by "
                "their titles already; leave prompts.mention out or use another indexing.name."
            )
        self.dataset, self.cut, self.config = dataset, cut, config
        self.train_end = cut.train_end if train_end is None else train_end
        wanted = {name for template in templates for name in needs(template)}
        self.words = Words(dataset, indexing, config, self.train_end, wanted)
        self._interactions, self._present = dataset.interactions, self.words.present
        self._shelves = Shelves(cut, self.words.titled, config.candidates, config.seed)
        self.left_out: dict[str, str] = {}
        """Family -> why the data cannot feed it, where the data decides."""
        self.kinds = self._chosen(templates)
        self.users = {one.name: self._users_of(one) for one in self.kinds}
        """Users who have what a kind of prompt asks about; the others are skipped."""
        self.crowded = self._crowded()
        """Users who never met fewer than twice the wrong answers of a prompt: more than half of
        these items are called wrong to them, so the held-out ones stand out by never being named.
        0 where no training prompt names candidates."""

    def count(self) -> int:
        """Prompts of an epoch."""
        return sum(one.count * self.users[one.name] for one in self.kinds)

    def train(self, seed: int, epoch: int = 1) -> Iterator[Example]:
        """One epoch: users in a seeded order, the prompts of `USERS_AT_ONCE` of them shuffled.

        Only templates that are not held out; the same seed and epoch give the same prompts.

        Raises:
            UsageError: The seed is negative.
        """
        if seed < 0:
            raise UsageError(f"seed={seed} must not be negative.")
        rng = np.random.default_rng((seed, epoch))
        users = rng.permutation(self._interactions.user_count)
        for first in range(0, len(users), USERS_AT_ONCE):
            block = [
                example
                for user in users[first : first + USERS_AT_ONCE].tolist()
                for example in self._of_user(user, rng)
            ]
            for place in rng.permutation(len(block)).tolist():
                yield block[place]

    def questions(self, template: P5Template, part: Literal["valid", "test"]) -> Iterator[Example]:
        """One question per case of the split, in its order; the same whenever it is asked.

        Templates that read candidates get the same ones for a case, and yes/no questions the same
        answer. Cases that lack what the template asks for (stars, a text) are left out.

        Raises:
            UsageError: No case has it.
        """
        if reason := self.cannot_ask(template, part):
            raise UsageError(reason)
        cases = self.cut.valid if part == "valid" else self.cut.test
        usable = _usable(template)[self._present[cases.target]]  # (C,)
        columns = (column[usable].tolist() for column in (cases.user, cases.end, cases.target))
        for user, end, row in zip(*columns, strict=True):
            yield self._render(template, user, end, row, self._draw_one(template, user, part))

    def candidates(self, template: P5Template, question: Example) -> Int32:
        """The items that a question which was made for a case names, its answer first, (K,)."""
        part: Part = "valid" if question.split == "valid" else "test"
        drawn = self._draw_one(template, question.user, part)
        return np.array([question.item, *drawn.rivals], dtype=np.int32)

    def cannot_ask(self, template: P5Template, part: Literal["valid", "test"]) -> str:
        """Why no case of a part can be asked with a template; empty where one can."""
        cases = self.cut.valid if part == "valid" else self.cut.test
        if _usable(template)[self._present[cases.target]].any():
            return self._too_few((template,), part)
        return self._lack(template.family, (template,), f"no {part} case has")

    def can_ask(self, template: P5Template, row: int) -> bool:
        """Whether the interaction at a position has what a template asks for."""
        return bool(fitting((template,), int(self._present[row])))

    def text_of(self, template: P5Template, user: int, end: int, target: int) -> Example:
        """One question about the interaction at `target`, with what the user met before `end`.

        Args:
            template: What is asked.
            user: Internal number.
            end: One past the last visible interaction, a position in ``Interactions.items``.
            target: Position of the interaction asked about.

        Raises:
            UsageError: The interaction lacks what the template asks for.
        """
        if not self.can_ask(template, target):
            raise UsageError(self._lack(template.family, (template,), "this interaction lacks"))
        part: Part = "train"
        if target >= self.train_end[user]:
            part = "valid" if target in self.cut.valid.target else "test"
        if reason := self._too_few((template,), part):
            raise UsageError(reason)
        return self._render(template, user, end, target, self._draw_one(template, user, part))

    def _chosen(self, templates: Sequence[P5Template]) -> tuple[Kind, ...]:
        """The kinds of training prompts of the families asked for, and why others are left out."""
        found: list[Kind] = []
        for family in self.config.named or FAMILIES[:5]:
            seen = [one for one in templates if one.family == family and not one.held_out]
            fed = [one for one in kinds(seen, self.config.per_user) if self._users_of(one)]
            if not fed:
                reason = self._lack(family, seen, "no training interaction has")
                if self.config.named:
                    raise UsageError(reason)
                self.left_out[family] = reason
            found += fed
        if not found:
            raise UsageError(f"prompts.families=auto: {' '.join(self.left_out.values())}")
        asked = [template for kind in found for template in kind.templates]
        if reason := self._too_few(asked, "train"):
            raise UsageError(reason)
        return tuple(found)

    def _too_few(self, templates: Sequence[P5Template], part: Part) -> str:
        """Why candidates cannot be named, in one sentence; empty where none are or there are."""
        available = len(self._shelves.all[part].items)
        if available >= self.config.candidates or not _choose(templates):
            return ""
        return (
            f"prompts.candidates={self.config.candidates}, but there are {available:,} items to "
            "choose from. Use fewer."
        )

    def _crowded(self) -> int:
        if not any(_choose(kind.templates) for kind in self.kinds):
            return 0
        unmet = len(self._shelves.all["train"].items) - self._interactions.lengths  # (U,)
        return int((unmet < 2 * (self.config.candidates - 1)).sum())

    def _lack(self, family: str, templates: Sequence[P5Template], who: str) -> str:
        """Why nothing can be asked, and the way out, in one sentence."""
        if not templates:
            return f"prompts.templates: {family} has no template that is not held out; write one."
        if not list(kinds(templates, self.config.per_user)):
            return f"prompts.per_user: no prompts of the {family} family are wanted; leave it out."
        wanted = [name for name in TOLD if any(name in needs(one) for one in templates)]
        missing = [
            WAYS_OUT[name] for name in wanted if not (self._present >> TOLD.index(name) & 1).any()
        ]
        if WAYS_OUT["stars"] in missing and self.words.unlike_stars:
            return (
                f"prompts.families: {family} needs ratings of {STAR_RANGE[0]:g} to "
                f"{STAR_RANGE[1]:g} stars, at most {MOST_STARS} different ones, and those of this "
                f"data are {self.words.unlike_stars}; rescale them or leave the family out."
            )
        if missing:
            return (
                f"prompts.families: {family} needs {', '.join(missing)}, which this data does not "
                "have; name the option or leave the family out."
            )
        words = ", ".join(WAYS_OUT[name] for name in wanted)
        return f"prompts.families: {who} what {family} asks about: {words}; leave it out."

    def _users_of(self, one: Kind) -> int:
        """Users with a training interaction that a kind can be asked about."""
        before = np.concatenate([[0], np.cumsum(one.usable[self._present])])  # (T + 1,)
        return int((before[self.train_end] > before[self._interactions.offsets[:-1]]).sum())

    def _of_user(self, user: int, rng: Generator) -> Iterator[Example]:
        """One user's training prompts of one epoch."""
        start = int(self._interactions.offsets[user])
        present = self._present[start : int(self.train_end[user])]
        met = self._interactions.history(user)
        for one in self.kinds:
            places = np.flatnonzero(one.usable[present])
            if not len(places):
                continue
            # Every interaction once before one comes twice, and then with another template.
            order = np.resize(rng.permutation(len(places)), one.count).tolist()
            turns = rng.integers(1 << 30, size=len(places)).tolist()
            draws = self._shelves.draws(rng, one.templates, "train", user, met, one.count)
            for number, (chosen, draw) in enumerate(zip(order, draws, strict=True)):
                suited = one.fitting[present[places[chosen]]]
                template = suited[(turns[chosen] + number // len(places)) % len(suited)]
                row = start + int(places[chosen])
                yield self._render(template, user, row, row, draw)

    def _draw_one(self, template: P5Template, user: int, part: Part) -> Draw:
        """The same for every template that asks for the same, whatever else is asked."""
        rng = np.random.default_rng((self.config.seed, _PARTS.index(part), user))
        met = self._interactions.history(user)
        return self._shelves.draws(rng, (template,), part, user, met, 1)[0]

    def _render(self, template: P5Template, user: int, end: int, row: int, draw: Draw) -> Example:
        """The prompt about the interaction at `row`, with what the user met before `end`."""
        words, item, truly = self.words, int(self._interactions.items[row]), draw.truly
        if asks_about_another(template):
            other = draw.titled if "title" in template.inputs else draw.other
            truly = truly or not other
            item = item if truly else other
        values: dict[str, str | float] = {}
        for name in template.inputs:
            if name == "user":
                values[name] = f"user_{user + 1}"
            elif name == "history":
                values[name] = words.history(user, end)
            elif name == "item":
                values[name] = words.told[item]
            elif name == "title":
                values[name] = words.titles[item]
            elif name == "candidates":
                values[name] = words.choice(item, draw.rivals, draw.seat)
            elif name == "stars":
                values[name] = stars = words.stars_of(row)
                if template.target == "yes_no" and not truly:
                    values[name] = words.stars_but(stars, draw.luck)
                    truly = values[name] == stars
            else:
                values[name] = words.text_of(row, name)
        answer = self._answer(template.target, item, row, truly)
        text = template.render(values)
        return Example(text, answer, template.family, template.id, user, item, draw.part)

    def _answer(self, target: str, item: int, row: int, truly: bool) -> str:
        if target == "item":
            return self.words.index[item]
        if target == "yes_no":
            return "yes" if truly else "no"
        if target == "stars":
            return self.words.stars_of(row)
        if target == "like_dislike":
            return "like" if float(self.words.stars_of(row)) >= LIKED else "dislike"
        return self.words.text_of(row, target)


def _choose(templates: Sequence[P5Template]) -> bool:
    """Whether any of them names candidates."""
    return any("candidates" in template.inputs for template in templates)


def _usable(template: P5Template) -> Bool:
    """By the bits that an interaction has: whether the template can be asked about it, (128,)."""
    return np.array([bool(fitting((template,), bits)) for bits in range(1 << len(TOLD))])

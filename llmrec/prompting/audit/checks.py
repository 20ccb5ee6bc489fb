"""What prompts are checked for: leaks, telling numbers, repeats, templates, answers."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from llmrec.data.audit.findings import Finding, Verdict, beyond_chance, counted
from llmrec.data.interactions import Cases, Dataset, Int32, Int64, Split
from llmrec.prompting.audit.absence import Absence
from llmrec.prompting.audit.leaks import Leaks, Names
from llmrec.prompting.families import P5Template
from llmrec.prompting.indexing import Indexing
from llmrec.prompting.p5 import Example
from llmrec.prompting.p5.words import BETWEEN_CANDIDATES

TELLING = 0.01
"""HR@1 of a rule on numbers from which on it competes with what is learned. Below that it may also
be beyond chance where nothing is wrong: users who stand side by side in a file bought alike."""
MANY_REPEATS = 0.5
"""Share of repeated prompts from which on an epoch is mostly the same again."""
LEAKS = {
    "item": "asked about",
    "name": "named",
    "title": "named by its title",
    "text": "shown by what the user wrote of it",
}
NO_LEAKS = {
    "repeated item": "name a held-out item that the user met in training too",
    "shared title": "hold a title of a held-out item that another item has too",
    "own words": "hold a held-out item's title only in what the user wrote before",
}


def largest_plus_one(histories: Sequence[Int32], targets: Int32, numbers: Int64) -> float:
    """HR@1 of the rule "the item numbered one above the largest number of the history".

    Items numbered along whole sequences, test items included, make it right for every user whose
    test item nobody before has met (4.4 % of a published Beauty set).

    Args:
        histories: Items from 1, of each case.
        targets: The item to find, (C,).
        numbers: The number of each item, (N + 1,); entry 0 (padding) is not read.

    Returns:
        Share of cases whose target it names.
    """
    return float((numbers[targets] == _largest(histories, numbers) + 1).mean())


def _largest(histories: Sequence[Int32], numbers: Int64) -> Int64:
    """The largest number of each history, (C,)."""
    return np.array([numbers[history].max() for history in histories])


def numbers_of(indexing: Indexing) -> Int64 | None:
    """The number in each item's name, (N + 1,); None where names are not one prefix and digits."""
    parts = [re.fullmatch(r"(\D*)([0-9]+)", mention) for mention in indexing.mentions]
    if not all(parts) or len({part[1] for part in parts if part}) != 1:
        return None
    return np.array([0, *(int(part[2]) for part in parts if part)], dtype=np.int64)


class PromptAudit:
    """Takes prompts one by one and holds eight bytes of each, and a bit per user and item."""

    def __init__(
        self,
        dataset: Dataset,
        cut: Split,
        indexing: Indexing,
        templates: Sequence[P5Template],
    ) -> None:
        """Take what the prompts are said to be made of."""
        self._dataset, self._cut, self._indexing = dataset, cut, indexing
        self._templates = {template.id: template for template in templates}
        self._leaks = Leaks(dataset, cut.train_end, indexing, templates)
        self._index = ["", *indexing.mentions]
        self._names = Names(self._index)
        self._absence = Absence(dataset, cut, indexing)
        self._ends: dict[str, Int64] = {}
        """One past what a user's question may tell, by part, (U,); the user's first place where
        there is no such question."""
        for part, cases in (("valid", cut.valid), ("test", cut.test)):
            self._ends[part] = dataset.interactions.offsets[:-1].copy()
            self._ends[part][cases.user] = cases.end
        self._parts: Counter[str] = Counter()
        self._found: Counter[str] = Counter()
        self._leaky: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._asked: dict[str, set[str]] = {}
        self._digests = array("q")

    def take(self, prompt: Example) -> None:
        """Look at one prompt."""
        self._parts[prompt.split] += 1
        self._asked.setdefault(prompt.split, set()).add(prompt.template)
        text = f"{prompt.input}\n{prompt.target}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        self._digests.append(int.from_bytes(digest, signed=True))
        template = self._templates.get(prompt.template)
        values = self._leaks.values(prompt)
        if prompt.split == "train":
            self._absence.take(prompt, values)
            if verdict := self._leaks.look(prompt):
                self._found[verdict] += 1
                if verdict in LEAKS:
                    self._leaky[prompt.family] += 1
                self._examples.setdefault(verdict, self._told(prompt))
            if template is not None and template.held_out:
                self._count("held-out template", prompt)
        if template is not None and template.target == "item":
            self._found["item answers"] += 1
            if prompt.target != self._index[prompt.item]:
                self._count("another name", prompt)
            if prompt.split != "train":
                self._question(prompt, values, "candidates" in template.inputs)
            if "candidates" in template.inputs:
                self._found["choices"] += 1
                if not self._names.stands_in(prompt.target, prompt.input):
                    self._count("no candidate", prompt)

    def _question(self, prompt: Example, values: str, chooses: bool) -> None:
        """Look whether what a question was given, but for its candidates, tells the answer."""
        self._found["item questions"] += 1
        given = values.split("\n")
        if chooses:
            given.remove(max(given, key=lambda value: value.count(BETWEEN_CANDIDATES)))
        interactions, end = self._dataset.interactions, self._ends[prompt.split][prompt.user]
        met = interactions.items[interactions.offsets[prompt.user] : end].tolist()
        if self._leaks.tells(prompt, "\n".join(given), met):
            self._count("told", prompt)

    def findings(self) -> list[Finding]:
        """What was found, in the order of the table."""
        return [
            self._leak_finding(),
            *(self._doubt(kind, words) for kind, words in NO_LEAKS.items() if self._found[kind]),
            *self._number_findings(),
            self._absence.finding(),
            self._answers("questions tell no answer", "told", "item questions"),
            self._repeats(),
            self._template_finding(),
            self._answers("answers among candidates", "no candidate", "choices"),
            self._answers("answers name items", "another name", "item answers"),
        ]

    def _count(self, what: str, prompt: Example) -> None:
        self._found[what] += 1
        self._examples.setdefault(what, self._told(prompt))

    def _told(self, prompt: Example) -> str:
        user = self._dataset.user_ids[prompt.user]
        return f"template {prompt.template}, user {user}: {prompt.input}"

    def _leak_finding(self) -> Finding:
        check, trained = "held-out items in training", self._parts["train"]
        if not trained:
            return Finding(check, "skipped", "there are no training prompts")
        total = sum(self._found[kind] for kind in LEAKS)
        kinds = ", ".join(f"{words}: {self._found[kind]:,}" for kind, words in LEAKS.items())
        families = ", ".join(f"{name} {count:,}" for name, count in self._leaky.most_common())
        what = "training prompts tell of an item that their user is validated or tested on"
        if total:
            what += f" ({kinds}; by family: {families})"
        example = next((self._examples[kind] for kind in LEAKS if kind in self._examples), None)
        remedy = "build all families from the training part of one split"
        return counted(check, "fault" if total else "ok", total, trained, what, remedy, example)

    def _doubt(self, kind: str, words: str) -> Finding:
        return counted(
            kind, "note", self._found[kind], self._parts["train"], f"training prompts {words}"
        )

    def _number_findings(self) -> list[Finding]:
        numbers = numbers_of(self._indexing)
        check = "largest number + 1"
        if numbers is None:
            return [Finding(check, "skipped", "items are not called by numbers")]
        items, cases = self._dataset.interactions.items, self._cut.test
        largest = _largest(self._histories(cases), numbers)
        last = numbers[items[cases.end - 1]]
        return [
            _rule(check, "largest of the history", largest, numbers[items[cases.target]]),
            _rule("last number + 1", "last of the history", last, numbers[items[cases.target]]),
        ]

    def _histories(self, cases: Cases) -> list[Int32]:
        interactions = self._dataset.interactions
        starts = interactions.offsets[cases.user].tolist()
        bounds = zip(starts, cases.end.tolist(), strict=True)
        return [interactions.items[start:end] for start, end in bounds]

    def _repeats(self) -> Finding:
        total = self._parts.total()
        repeats = total - len(np.unique(np.frombuffer(self._digests, dtype=np.int64)))
        verdict: Verdict = "ok" if not repeats else "note"
        if repeats > MANY_REPEATS * total:
            verdict = "warning"
        what = "prompts stand there a second time or more, question and answer"
        return counted("repeated prompts", verdict, repeats, total, what)

    def _template_finding(self) -> Finding:
        mixes, unknown = [], set()
        for part, asked in sorted(self._asked.items()):
            known = [self._templates[name] for name in asked if name in self._templates]
            held_out = sum(template.held_out for template in known)
            mixes.append(f"{part}: {len(known) - held_out} seen, {held_out} held out")
            unknown |= asked - self._templates.keys()
        count, words = self._found["held-out template"], "; ".join(mixes)
        if unknown:
            words += f"; unknown: {', '.join(sorted(unknown)[:5])}"
        if count:
            return counted(
                "templates",
                "fault",
                count,
                self._parts["train"],
                f"training prompts are asked by held-out templates ({words})",
                "train on seen templates only, or the held-out ones test nothing",
                self._examples["held-out template"],
            )
        return Finding("templates", "note" if unknown else "ok", words)

    def _answers(self, check: str, fault: str, all_of: str) -> Finding:
        of, count = self._found[all_of], self._found[fault]
        if not of:
            return Finding(check, "skipped", "no such prompt")
        what = {
            "no candidate": "answers are not among the candidates shown",
            "another name": "answers are not the name of the prompt's item",
            "told": "validation and test questions name their answer outside the candidates",
        }[fault]
        remedy = "write the prompts anew from this data and this indexing"
        example = self._examples.get(fault)
        return counted(check, "fault" if count else "ok", count, of, what, remedy, example)


def _rule(check: str, of: str, numbers: Int64, targets: Int64) -> Finding:
    """How often the number after `numbers` is the target's, both (C,).

    Chance is what dealing the targets out anew among the cases would give.
    """
    hits, cases = int((targets == numbers + 1).sum()), len(targets)
    frequency = np.bincount(targets, minlength=int(numbers.max()) + 2)
    expected = float(frequency[numbers + 1].sum() / cases)
    verdict: Verdict = "ok"
    if beyond_chance(hits, expected):
        verdict = "fault" if hits >= TELLING * cases else "note"
    what = (
        f"test items are numbered one above the {of}: HR@1 {hits / cases:.4f}, by chance "
        f"{expected / cases:.4f}"
    )
    remedy = "number the items at random, or along the training parts alone"
    return counted(check, verdict, hits, cases, what, remedy if verdict == "fault" else "")


def audit(
    prompts: Iterable[Example],
    dataset: Dataset,
    cut: Split,
    indexing: Indexing,
    templates: Sequence[P5Template],
) -> list[Finding]:
    """Look at prompts one by one.

    Args:
        prompts: Of any part.
        dataset: What they are made of.
        cut: The split that they must keep to.
        indexing: What they call the items.
        templates: Those that may have been asked.
    """
    checked = PromptAudit(dataset, cut, indexing, templates)
    for prompt in prompts:
        checked.take(prompt)
    return checked.findings()

"""Whether training prompts tell the held-out items by never naming them."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from llmrec.data.audit.findings import Finding, Verdict
from llmrec.data.interactions import Cases, Dataset, Split
from llmrec.prompting.indexing import Indexing
from llmrec.prompting.p5 import Example
from llmrec.prompting.p5.words import BETWEEN_CANDIDATES

CHECK = "items never named"
FAR = 3.0
"""Times chance from which on absence tells an item. A shelf of half the items ends at 2."""
MOST_BITS = 1 << 28
"""Users times items that are kept in mind, one bit each: 32 MiB."""


class Absence:
    """The rule "an item that no training prompt of this user names", as a guess at the test item.

    Its wrong answers drawn from all items but the user's own, a user's prompts name in the end
    every item but the held-out ones, and the rule is right.
    """

    def __init__(self, dataset: Dataset, cut: Split, indexing: Indexing) -> None:
        """Take the test cases whose item their user did not meet in training."""
        self._interactions, self._allowed = dataset.interactions, cut.test_candidates
        self._item_of = {name: item for item, name in enumerate(indexing.mentions, start=1)}
        self._in_words = any(re.search(r"[^\w<>]", name) for name in indexing.mentions)
        cases = self._fresh(cut)
        width = (dataset.item_count + 8) // 8  # bytes that hold bits 0..N
        cases = cases.take(np.arange(min(len(cases), max(1, MOST_BITS // (8 * width)))))
        self._cases, self._train_end = cases, cut.train_end
        self._row = {user: row for row, user in enumerate(cases.user.tolist())}
        self._named: NDArray[np.uint8] = np.zeros((len(cases), width), dtype=np.uint8)

    def take(self, prompt: Example, values: str) -> None:
        """Note what a training prompt names; `values` is its text without its template's words."""
        row = self._row.get(prompt.user)
        if row is None:
            return
        text = f"{values}\n{prompt.target}"
        if self._in_words:
            parts = [part.strip() for part in re.split(rf"{BETWEEN_CANDIDATES}|\n", text)]
        else:
            parts = re.findall(r"[\w<>]+", text)
        known = self._item_of
        items = np.array([prompt.item, *(known[part] for part in parts if part in known)])
        np.bitwise_or.at(self._named[row], items >> 3, (1 << (items & 7)).astype(np.uint8))

    def finding(self) -> Finding:
        """How often the rule is right, against picking among all items that the user never met.

        Chance is what the rule would come to if the test item were never named as rarely as the
        others. Training interactions count as named, whether a prompt names them or not.
        """
        hits, chance, cases = 0.0, 0.0, 0
        items, allowed = self._interactions.items, self._allowed
        for user, row in self._row.items():
            if not self._named[row].any():
                continue  # a user of whom there is no training prompt
            target = int(items[self._cases.target[row]])
            start, end = int(self._interactions.offsets[user]), int(self._train_end[user])
            unmet = allowed.copy()
            unmet[items[start:end]] = False
            bits = np.unpackbits(self._named[row], bitorder="little")[: len(unmet)]
            silent = unmet & (bits == 0)
            cases += 1
            chance += 1 / max(1, int(unmet.sum()))
            hits += 1 / int(silent.sum()) if silent[target] else 0.0
        if not cases:
            return Finding(CHECK, "skipped", "no training prompt of a user with a new test item")
        fault = hits >= FAR * chance
        found = (
            f"of {cases:,} users a guess among the items that none of their training prompts "
            f"names finds the test item with HR@1 {hits / cases:.4f}, by chance "
            f"{chance / cases:.4f} ({hits / chance:.1f} times)"
        )
        remedy = (
            "draw wrong answers of a user from a fixed part of the items only, or fewer of them "
            "(prompts.candidates)"
        )
        verdict: Verdict = "fault" if fault else "ok"
        return Finding(CHECK, verdict, found, round(hits), cases, remedy=remedy if fault else "")

    def _fresh(self, cut: Split) -> Cases:
        items, offsets = self._interactions.items, self._interactions.offsets
        columns = zip(cut.test.user.tolist(), cut.test.target.tolist(), strict=True)
        fresh = [
            items[target] not in items[offsets[user] : cut.train_end[user]]
            for user, target in columns
        ]
        return cut.test.take(np.flatnonzero(fresh))

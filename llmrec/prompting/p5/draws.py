"""What chance decides of a prompt: wrong answers, their order, and whether the truth is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator

from llmrec.data.interactions import Bool, Int32, Int64, Split
from llmrec.prompting.families import P5Template
from llmrec.prompting.p5.kinds import asks_about_another

Part = Literal["train", "valid", "test"]


class Draw(NamedTuple):
    """What chance decides of one prompt."""

    part: Part
    truly: bool
    """Whether a yes/no question is asked about what is true."""
    luck: float
    """In 0..1: picks the untrue stars."""
    seat: float
    """In 0..1: where the answer stands among the candidates."""
    rivals: list[int]
    """The other candidates; empty where no template reads them."""
    other: int
    """The item that a false yes/no question names; 0 where none is left."""
    titled: int
    """The same for a template that names it by its title: one that has a title."""


class Shelf:
    """Items that wrong answers are drawn from."""

    def __init__(self, candidates: Bool) -> None:
        """Take the items that may be drawn: (N + 1,), entry 0 (padding) is False."""
        self.items: Int64 = np.flatnonzero(candidates)  # (E,)
        self._taken: Bool = np.zeros(len(candidates), dtype=np.bool_)

    def draw(self, rng: Generator, blocked: Int32, rows: int, wanted: int) -> Int64:
        """Distinct items a row, none of them blocked, (rows, wanted); fewer where no more are."""
        self._taken[blocked] = True
        try:
            if len(self.items) < 4 * (wanted + len(blocked)):
                return self._exact(rng, rows, wanted)
            # Some more than wanted: at least three of four are neither blocked nor repeated.
            width = wanted + wanted // 2 + 16
            drawn = self.items[rng.integers(len(self.items), size=(rows, width))]
            bad = self._taken[drawn]
            if wanted > 1:
                order = np.argsort(drawn, axis=1, kind="stable")
                ranked = np.take_along_axis(drawn, order, axis=1)
                row, column = np.nonzero(ranked[:, 1:] == ranked[:, :-1])
                bad[row, order[row, column + 1]] = True
            first = np.argsort(bad, axis=1, kind="stable")[:, :wanted]
            found = np.take_along_axis(drawn, first, axis=1)
            for short in np.flatnonzero(width - bad.sum(axis=1) < wanted):
                found[short] = self._exact(rng, 1, wanted)[0]
            return found
        finally:
            self._taken[blocked] = False

    def _exact(self, rng: Generator, rows: int, wanted: int) -> Int64:
        free = self.items[~self._taken[self.items]]  # (F,)
        order = np.argsort(rng.random((rows, len(free))), axis=1)[:, :wanted]
        found: Int64 = free[order]
        return found


class Shelves:
    """The shelves of training, validation and test, and what is drawn from them."""

    def __init__(self, cut: Split, titled: Bool, candidates: int) -> None:
        """Take the candidates of each part of the split.

        Args:
            cut: The split. Training draws from the items of validation: in a temporal split those
                that training has seen.
            titled: Items that have a title, (N + 1,).
            candidates: Items to choose from, the answer included.
        """
        self._rivals = candidates - 1
        parts: dict[Part, Bool] = {
            "train": cut.valid_candidates,
            "valid": cut.valid_candidates,
            "test": cut.test_candidates,
        }
        self.all = {part: Shelf(allowed) for part, allowed in parts.items()}
        self._titled = {part: Shelf(allowed & titled) for part, allowed in parts.items()}

    def draws(
        self,
        rng: Generator,
        templates: Sequence[P5Template],
        part: Part,
        met: Int32,
        count: int,
    ) -> list[Draw]:
        """What chance decides of `count` prompts about one user.

        Args:
            rng: The chance.
            templates: Those that may be asked.
            part: Where the prompts belong.
            met: The user's *whole* sequence, which no wrong answer is from, the held-out part
                included: as a wrong answer in training a held-out item would be taught to be one,
                and a test that offers an item of the user's as wrong has two right answers.
            count: Prompts.
        """
        truly = (rng.random(count) < 0.5).tolist()
        luck, seats = rng.random(count).tolist(), rng.random(count).tolist()
        rivals: list[list[int]] = [[]] * count
        others = titled = [0] * count
        if any("candidates" in template.inputs for template in templates):
            rivals = self.all[part].draw(rng, met, count, self._rivals).tolist()
        if any(asks_about_another(template) for template in templates):
            others = _one_each(self.all[part], rng, met, count)
            titled = _one_each(self._titled[part], rng, met, count)
        columns = zip(truly, luck, seats, rivals, others, titled, strict=True)
        return [Draw(part, *values) for values in columns]


def _one_each(shelf: Shelf, rng: Generator, met: Int32, count: int) -> list[int]:
    drawn = shelf.draw(rng, met, count, 1)  # (count, 1), or (count, 0) where none is left
    return drawn[:, 0].tolist() if drawn.shape[1] else [0] * count

"""What chance decides of a prompt: wrong answers, their order, and whether the truth is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from llmrec.data.interactions import Bool, Int32, Int64, Split
from llmrec.prompting.families import P5Template
from llmrec.prompting.p5.kinds import asks_about_another

Part = Literal["train", "valid", "test"]
Salt = np.uint64
HALF = np.uint64(1 << 63)
"""Hashes below are on a user's shelf of wrong answers."""


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
    """Items that wrong answers are drawn from.

    With a salt, only from the half of them that a hash of salt and item picks: if every item but
    those held out were called wrong sooner or later, a model would learn which are held out.
    """

    def __init__(self, candidates: Bool) -> None:
        """Take the items that may be drawn: (N + 1,), entry 0 (padding) is False."""
        self.items: Int64 = np.flatnonzero(candidates)  # (E,)
        self._taken: Bool = np.zeros(len(candidates), dtype=np.bool_)

    def draw(
        self,
        rng: Generator,
        blocked: Int32,
        rows: int,
        wanted: int,
        salt: Salt | None = None,
        other_half: bool = False,
    ) -> Int64:
        """Distinct items a row, none of them blocked, (rows, wanted); fewer where no more are.

        Where the salt's half (or the other one) holds fewer than are wanted, the next by hash are
        added to it.
        """
        self._taken[blocked] = True
        try:
            if len(self.items) < 4 * (wanted + len(blocked)):
                return self._exact(rng, rows, wanted, salt, other_half)
            # Some more than wanted: at least three of four are neither blocked nor repeated, and
            # with a salt half of these are on the shelf.
            width = (wanted + wanted // 2 if salt is None else 3 * wanted) + 16
            drawn = self.items[rng.integers(len(self.items), size=(rows, width))]
            bad = self._taken[drawn]
            if salt is not None:
                bad |= _hashes(drawn, salt, other_half) >= HALF
            if wanted > 1:
                order = np.argsort(drawn, axis=1, kind="stable")
                ranked = np.take_along_axis(drawn, order, axis=1)
                row, column = np.nonzero(ranked[:, 1:] == ranked[:, :-1])
                bad[row, order[row, column + 1]] = True
            first = np.argsort(bad, axis=1, kind="stable")[:, :wanted]
            found = np.take_along_axis(drawn, first, axis=1)
            for short in np.flatnonzero(width - bad.sum(axis=1) < wanted):
                found[short] = self._exact(rng, 1, wanted, salt, other_half)[0]
            return found
        finally:
            self._taken[blocked] = False

    def _exact(
        self, rng: Generator, rows: int, wanted: int, salt: Salt | None, other_half: bool
    ) -> Int64:
        free = self.items[~self._taken[self.items]]  # (F,)
        if salt is not None:
            hashes = _hashes(free, salt, other_half)
            on = max(wanted, int((hashes < HALF).sum()))
            free = free[np.argsort(hashes, kind="stable")[:on]]
        order = np.argsort(rng.random((rows, len(free))), axis=1)[:, :wanted]
        found: Int64 = free[order]
        return found


def salt_of(seed: int, user: int) -> Salt:
    """What picks a user's half of the items: the same in every epoch and whatever is trained."""
    salt: Salt = np.random.SeedSequence((seed, user)).generate_state(1, np.uint64)[0]
    return salt


def _hashes(items: Int64, salt: Salt, other_half: bool) -> NDArray[np.uint64]:
    """A number of all 64 bits for each item: SplitMix64 (Steele, Lea and Flood 2014).

    For the other half the same from above: what was below the middle is above it.
    """
    mixed = items.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += salt
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return ~mixed if other_half else mixed


class Shelves:
    """The shelves of training, validation and test, and what is drawn from them."""

    def __init__(self, cut: Split, titled: Bool, candidates: int, seed: int) -> None:
        """Take the candidates of each part of the split.

        Args:
            cut: The split. Training draws from the items of validation: in a temporal split those
                that training has seen.
            titled: Items that have a title, (N + 1,).
            candidates: Items to choose from, the answer included.
            seed: Of the halves that the users' wrong answers in training come from.
        """
        self._rivals, self._seed = candidates - 1, seed
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
        user: int,
        met: Int32,
        count: int,
    ) -> list[Draw]:
        """What chance decides of `count` prompts about one user.

        In training, wrong answers come from a half of the items that is the user's own and never
        changes. So after any number of epochs an item that the user was never told is wrong is
        held out about as rarely as any other: of the rest of the items, half were never told. The
        questions of validation and test draw from the other half: a rival that the user was told
        is wrong could be ruled out by memory.

        Args:
            rng: The chance.
            templates: Those that may be asked.
            part: Where the prompts belong.
            user: Internal number.
            met: The user's *whole* sequence, which no wrong answer is from, the held-out part
                included: as a wrong answer in training a held-out item would be taught to be one,
                and a test that offers an item of the user's as wrong has two right answers.
            count: Prompts.
        """
        half = salt_of(self._seed, user), part != "train"
        truly = (rng.random(count) < 0.5).tolist()
        luck, seats = rng.random(count).tolist(), rng.random(count).tolist()
        rivals: list[list[int]] = [[]] * count
        others = titled = [0] * count
        if any("candidates" in template.inputs for template in templates):
            rivals = self.all[part].draw(rng, met, count, self._rivals, *half).tolist()
        if any(asks_about_another(template) for template in templates):
            others = _one_each(self.all[part], rng, met, count, half)
            titled = _one_each(self._titled[part], rng, met, count, half)
        columns = zip(truly, luck, seats, rivals, others, titled, strict=True)
        return [Draw(part, *values) for values in columns]


def _one_each(
    shelf: Shelf, rng: Generator, met: Int32, count: int, half: tuple[Salt | None, bool]
) -> list[int]:
    drawn = shelf.draw(rng, met, count, 1, *half)  # (count, 1), or (count, 0) where none is left
    return drawn[:, 0].tolist() if drawn.shape[1] else [0] * count

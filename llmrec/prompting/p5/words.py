"""What the data says of an interaction, in the words that prompts show."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from llmrec.data.interactions import Bool, Dataset, Int64
from llmrec.data.titles import LIMIT, displayed
from llmrec.prompting.indexing import Indexing
from llmrec.prompting.p5.config import PromptConfig
from llmrec.prompting.p5.kinds import TOLD

BODY_LIMIT = 1500
"""Characters of a review that are shown: about what an input of 512 tokens holds."""
LIKED = 4
"""Stars from which on an item is liked."""
STAR_RANGE, MOST_STARS = (0.5, 5.0), 10
"""Ratings are stars where they lie in this range and are so few different ones (half stars)."""
BETWEEN_CANDIDATES = " , "


class Words:
    """Items, histories, stars and texts as prompts show them.

    Titles and what users wrote are shown through `displayed`: no item or review can smuggle a
    line, a quotation mark or a special token into a prompt.
    """

    def __init__(
        self,
        dataset: Dataset,
        indexing: Indexing,
        config: PromptConfig,
        train_end: Int64,
        wanted: Collection[str],
    ) -> None:
        """Look what the data has.

        Args:
            dataset: The data.
            indexing: What items are called.
            config: How items are mentioned, and how much of a history is shown.
            train_end: One past each user's last training interaction, (U,).
            wanted: What of `TOLD` any template needs.
        """
        self._interactions, self._reviews = dataset.interactions, dataset.reviews
        self._shown = config.history_items
        self.index = ["", *indexing.mentions]
        """What item i is answered by, (N + 1,)."""
        self.titles = ["", *map(displayed, dataset.catalog.texts)]
        """(N + 1,); empty where it has none."""
        self.titled: Bool = np.array([bool(title) for title in self.titles])
        self.told = self._as_told(config.mention)
        """What item i is mentioned by, (N + 1,)."""
        # A title may hold commas, but never a ">".
        numbers = config.mention == "id" and indexing.name != "title"
        self.between = ", " if numbers else " -> "
        self.unlike_stars = ""
        """What the ratings are, where there are some and they are no stars."""
        self.stars = self._star_values(train_end)
        """The ratings of the training part, ascending; none where they are no stars."""
        self.present = self._bits(wanted)
        """What of `TOLD` each interaction has, as bits, (T,)."""

    def history(self, user: int, end: int) -> str:
        """What a user met before position `end`, oldest first, on one line."""
        first = max(int(self._interactions.offsets[user]), end - self._shown)
        told = self.told
        return self.between.join(
            [told[item] for item in self._interactions.items[first:end].tolist()]
        )

    def choice(self, item: int, rivals: list[int], seat: float) -> str:
        """An item among others, where `seat` in 0..1 says."""
        index = self.index
        shown = [index[rival] for rival in rivals]
        shown.insert(int(seat * (len(shown) + 1)), index[item])
        return BETWEEN_CANDIDATES.join(shown)

    def stars_of(self, row: int) -> str:
        """The stars of the interaction at `row`, which has some."""
        assert self._interactions.ratings is not None
        return f"{self._interactions.ratings[row]:g}"

    def stars_but(self, stars: str, luck: float) -> str:
        """Other stars that were given in training; the same where there are no others."""
        others = [one for one in self.stars if one != stars] or [stars]
        return others[int(luck * len(others))]

    def text_of(self, row: int, name: str) -> str:
        """What a user wrote of the interaction at `row`: review, headline, explanation, feature."""
        return shown_text(self._reviews[name][row], name)

    def _as_told(self, mention: str) -> list[str]:
        if mention == "id":
            return self.index
        pairs = zip(self.index, self.titles, strict=True)
        if mention == "title":
            return [title or index for index, title in pairs]
        return [f"{index} ({title})" if title else index for index, title in pairs]

    def _star_values(self, train_end: Int64) -> tuple[str, ...]:
        ratings = self._interactions.ratings
        if ratings is None:
            return ()
        known = ratings[~np.isnan(ratings)]
        if not len(known):
            return ()
        trained = np.arange(len(ratings)) < np.repeat(train_end, self._interactions.lengths)
        values = np.unique(ratings[trained & ~np.isnan(ratings)])
        low, high = known.min(), known.max()
        if low < STAR_RANGE[0] or high > STAR_RANGE[1] or len(values) > MOST_STARS:
            self.unlike_stars = f"{low:g} to {high:g}, {len(values):,} different ones in training"
            return ()
        return tuple(f"{value:g}" for value in values)

    def _bits(self, wanted: Collection[str]) -> NDArray[np.uint8]:
        bits = np.zeros(len(self._interactions.items), dtype=np.uint8)
        for place, name in enumerate(TOLD):
            if name in wanted:
                bits |= self._has(name).astype(np.uint8) << place
        return bits

    def _has(self, name: str) -> Bool:
        """Which interactions have one of `TOLD`, (T,)."""
        interactions, ratings = self._interactions, self._interactions.ratings
        has: Bool = np.zeros(len(interactions.items), dtype=np.bool_)
        if name == "history":
            has[:] = True
            has[interactions.offsets[:-1][interactions.lengths > 0]] = False
        elif name == "title":
            has = self.titled[interactions.items]
        elif name == "stars":
            if ratings is not None and self.stars:
                has = ~np.isnan(ratings)
        elif name in self._reviews:
            has[:] = [_says_something(text) for text in self._reviews[name]]
        return has


def shown_text(text: str, name: str) -> str:
    """What a user wrote, as prompts show it; `name` is a key of `Dataset.reviews`."""
    return displayed(text, LIMIT if name in ("headline", "feature") else BODY_LIMIT)


def _says_something(text: str) -> bool:
    """Whether anything of a text is shown."""
    return bool(text.strip()) and (text.isprintable() or displayed(text) != "")

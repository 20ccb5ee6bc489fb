"""Which prompts are made of a data set, and how many of each kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmrec.errors import UsageError, nearest
from llmrec.prompting.families import FAMILIES


@dataclass(frozen=True)
class PerUser:
    """Prompts of one user in one epoch, by family and kind of question."""

    rating: int = 1
    """About the stars of one item."""
    next: int = 5
    """sequential: the next item after a history."""
    choose: int = 5
    """sequential: the next item among candidates."""
    judge: int = 10
    """sequential: is this the next item? Yes and no equally often."""
    explanation: int = 1
    """Why the user thought so of an item, in a sentence."""
    review: int = 1
    """A headline or stars for a review."""
    direct_judge: int = 10
    """direct: is this item for the user? Yes and no equally often."""
    direct_choose: int = 5
    """direct: the user's item among candidates."""
    zero_shot: int = 1
    """Questions that name titles only; asked in training only where prompts.families names them."""


@dataclass(frozen=True)
class PromptConfig:
    """Which prompts are made of a data set."""

    families: str = "auto"
    """Families, comma-separated: rating, sequential, explanation, review, direct, zero_shot. auto:
    those of the first five that the data has what is needed for."""
    templates: str = ""
    """Folder of own templates, FAMILY/ID.jinja, used instead of the shipped ones; empty: these."""
    mention: Literal["id", "title", "both"] = "id"
    """How items stand in histories and questions; candidates and answers are always the index.
    An item without a title is mentioned by its index. title and both are for items that are not
    called by their titles already (indexing.name)."""
    history_items: int = 20
    """Items of a history that are shown, the last ones."""
    candidates: int = 100
    """Items to choose from, the answer included. In training the wrong ones of a user come from a
    half of the items that never changes, so that what is never named is not the held-out ones
    alone; more than half where that is too few."""
    per_user: PerUser = field(default_factory=PerUser)
    """Prompts of one user in one epoch."""
    seed: int = 0
    """Of the candidates and the yes/no questions of validation and test, and of the half of the
    items that a user's wrong answers in training come from."""

    def __post_init__(self) -> None:
        """Refuse sizes and names that make no prompt."""
        for name, value, least in (
            ("history_items", self.history_items, 1),
            ("candidates", self.candidates, 2),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise UsageError(f"prompts.{name}={value}: use {least} or more.")
        for name, count in vars(self.per_user).items():
            if count < 0:
                raise UsageError(f"prompts.per_user.{name}={count}: use 0 (none) or more.")
        if not self.named and self.families != "auto":
            raise UsageError(
                f"prompts.families={self.families!r} names none; use auto or some of "
                f"{', '.join(FAMILIES)}."
            )
        for family in self.named:
            if family not in FAMILIES:
                raise UsageError(f"prompts.families has {family!r}: {nearest(family, FAMILIES)}")

    @property
    def named(self) -> tuple[str, ...]:
        """The families asked for by name, each once; none where the data decides."""
        if self.families == "auto":
            return ()
        names = (name.strip() for name in self.families.split(","))
        return tuple(dict.fromkeys(name for name in names if name))

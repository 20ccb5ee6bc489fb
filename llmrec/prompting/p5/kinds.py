"""What templates ask for, and which of them an interaction can be asked about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmrec.data.interactions import Bool
from llmrec.prompting.families import P5Template
from llmrec.prompting.p5.config import PerUser

TOLD = ("stars", "title", "review", "headline", "explanation", "feature", "history")
"""What an interaction may lack: one bit each, in this order."""
WAYS_OUT = {
    "stars": "ratings of 0.5 to 5 stars (data.rating_column)",
    "title": "item titles (data.item_text)",
    "review": "reviews (data.review_column)",
    "headline": "headlines (data.headline_column)",
    "explanation": "explanations (data.explanation_column)",
    "feature": "feature words (data.feature_column)",
    "history": "two training interactions of a user (data.max_user_interactions)",
}
"""In words, with the option that brings it."""


def needs(template: P5Template) -> frozenset[str]:
    """What of `TOLD` an interaction must have for this template to be asked about it."""
    wanted = {*template.inputs, template.target}
    if template.target == "like_dislike":
        wanted.add("stars")
    return frozenset(wanted & set(TOLD))


def asks_about_another(template: P5Template) -> bool:
    """Whether its no is about another item; the other yes/no questions name other stars."""
    return template.target == "yes_no" and "stars" not in template.inputs


def fitting(templates: Sequence[P5Template], bits: int) -> tuple[P5Template, ...]:
    """The templates that need no more of `TOLD` than these bits."""
    has = {name for place, name in enumerate(TOLD) if bits >> place & 1}
    return tuple(template for template in templates if needs(template) <= has)


@dataclass(frozen=True)
class Kind:
    """The training templates that share a count."""

    family: str
    name: str
    """A field of `PerUser`."""
    count: int
    """Prompts of a user in an epoch."""
    templates: tuple[P5Template, ...]
    fitting: tuple[tuple[P5Template, ...], ...]
    """By the bits that an interaction has: the templates that can be asked about it, (128,)."""
    usable: Bool
    """By the same: whether there is one, (128,)."""


def kinds(templates: Sequence[P5Template], per_user: PerUser) -> Iterator[Kind]:
    """A family's templates by what counts their prompts, without those whose count is 0."""
    names = [_count_of(template) for template in templates]
    for name in dict.fromkeys(names):
        count = vars(per_user)[name]
        members = tuple(
            template for template, its in zip(templates, names, strict=True) if its == name
        )
        if count:
            by_bits = tuple(fitting(members, bits) for bits in range(1 << len(TOLD)))
            usable = np.array([bool(some) for some in by_bits])
            yield Kind(members[0].family, name, count, members, by_bits, usable)


def _count_of(template: P5Template) -> str:
    """The field of `PerUser` that counts its prompts."""
    if template.family == "sequential":
        return template.group  # next, choose or judge
    if template.family == "direct":
        return f"direct_{template.group}"
    return template.family

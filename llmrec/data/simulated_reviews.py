"""What the visitors of the simulated shop tell of what they met: stars and a few words.

The stars are learnable: an item is good or not, a visitor generous or not, and things of their own
interests please them more; the rest is noise. So an item's mean beats the mean of all, and visitor
and item together beat both. The words follow from the stars and from a feature, which is mostly the
item's own; the sentences are put together from parts. Frozen by a hash like the shop itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.random import Generator

from llmrec.data.interactions import REVIEW_TEXTS, Float32, Int64

# Topic: what its reviews speak of.
FEATURES = {
    topic: words.split(", ")
    for topic, words in {
        "camping": "weight, warmth, zips, stitching, size, price",
        "cycling": "fit, grip, weight, padding, brightness, price",
        "kitchen knives": "edge, balance, handle, weight, steel, price",
        "coffee": "taste, pressure, noise, finish, cleaning, price",
        "yoga": "grip, cushioning, smell, fabric, length, price",
        "fishing": "casting, drag, hooks, finish, pockets, price",
        "painting": "pigment, bristles, texture, coverage, colours, price",
        "guitar": "tone, tuning, action, finish, sound, price",
        "gardening": "germination, blades, handles, drainage, sturdiness, price",
        "baby care": "safety, comfort, straps, lining, softness, price",
        "space opera": "plot, pacing, worldbuilding, ending, dialogue, characters",
        "crime": "plot, clues, ending, pacing, detective, characters",
        "romance": "chemistry, dialogue, ending, humour, heroine, pacing",
        "cooking": "recipes, photographs, instructions, ingredients, index, layout",
        "history": "maps, sources, detail, prose, index, photographs",
        "horror": "tension, effects, ending, acting, soundtrack, scares",
        "family animation": "songs, humour, animation, message, voices, story",
        "martial arts": "choreography, acting, soundtrack, story, stunts, editing",
        "racing games": "handling, graphics, tracks, controls, soundtrack, difficulty",
        "role-playing games": "story, combat, quests, graphics, interface, balance",
    }.items()
}
_FEATURE_COUNT = 6  # of each topic

_BEGUN = "Bought, Ordered, Picked, Chose, Found, Tried, Got".split(", ")
_OCCASIONS = (
    "for my brother, for the holidays, on a whim, with high hopes, as a present, for a long "
    "weekend, on the advice of a friend, for my own shelf, after weeks of looking, in a sale, "
    "for a birthday, without much thought"
).split(", ")
_LEADS = (
    "Above all; Right away; In the end; From the first day; More than anything; To my surprise; "
    "As far as I can tell; After a month"
).split("; ")
# What the feature did, without a verb that tells one from many; for 1 to 5 stars.
_VERDICTS = [
    part.split("; ")
    for part in (
        "ruined everything; failed me completely; turned out dreadful; put me off for good",
        "let me down; fell short; disappointed me; needed far more care",
        "stayed ordinary; could have gone either way; met half of my hopes; left me undecided",
        "pleased me; did well; proved a good choice; made up for small flaws",
        "won me over; surpassed all my hopes; delighted me; could not have been better",
    )
]
_CLOSINGS = [
    part.split("; ")
    for part in (
        "Never again.; Save your money.; It went straight back.; I regret the purchase.",
        "I expected more.; Look elsewhere first.; Not worth the wait.; Others do this better.",
        "It does the job.; Neither good nor bad.; Fine for now.; I might try another.",
        "Happy with it.; I would choose it again.; Good value.; Nearly perfect.",
        "I recommend it to everyone.; Flawless.; My new favourite.; I would buy it twice.",
    )
]
_ADJECTIVES = [
    words.split(", ")
    for words in (
        "Awful, Useless, Terrible, Dreadful",
        "Weak, Poor, Disappointing, Lacking",
        "Average, Ordinary, Passable, Middling",
        "Good, Solid, Pleasing, Fine",
        "Superb, Excellent, Wonderful, Perfect",
    )
]

# In percent.
_SILENT = 4  # stars without a word
_GENERAL = 8  # words that speak of no feature, so that nothing explains the stars
_ITEMS_FEATURE, _VISITORS_FEATURE = 60, 20  # the remaining 20: any of the topic's


def tell(
    seed: int,
    users: Int64,
    items: Int64,
    topics: Sequence[str],
    things: Sequence[str],
    liking: Int64,
) -> tuple[Float32, dict[str, pl.Series]]:
    """Stars and texts of every interaction.

    Args:
        seed: Of the shop; the draws here are a stream of their own, so that nothing else changes.
        users: Visitor of each interaction, (T,).
        items: Row of the item of each, (T,).
        topics: Topic of each item, (N,).
        things: What each item is called in a sentence, such as `tent`, (N,).
        liking: 0, 1 or 2 for each interaction, (T,): an item of no topic that the visitor came
            for, of such a topic, or of the very kind.

    Returns:
        Whole stars from 1 to 5, (T,), and each of `REVIEW_TEXTS`, (T,).
    """
    rng = np.random.default_rng([seed, 2])
    stars = _stars(rng, users, items, len(things), liking)
    features = _features(rng, users, items, len(things))
    silent, general = (rng.random((2, len(items))) * 100).astype(np.int64)
    choices = (rng.random((len(items), 8)) * 1_000_000).astype(np.int64).tolist()  # (T, parts)
    rows: list[tuple[str, str, str, str]] = []
    for row, item in enumerate(items.tolist()):
        feature = FEATURES[topics[item]][features[row]] if general[row] >= _GENERAL else ""
        told = _texts(int(stars[row]), things[item], feature, choices[row])
        rows.append(("", "", "", "") if silent[row] < _SILENT else told)
    return stars.astype(np.float32), {
        name: pl.Series(name, [told[place] for told in rows])
        for place, name in enumerate(REVIEW_TEXTS)
    }


def _spread(rng: Generator, count: int, width: int, draws: int) -> Int64:
    """(count,) whole numbers around 0: sums of draws from -width to width."""
    drawn = (rng.random((draws, count)) * (2 * width + 1)).astype(np.int64) - width
    total: Int64 = drawn.sum(axis=0)
    return total


def _stars(rng: Generator, users: Int64, items: Int64, item_count: int, liking: Int64) -> Int64:
    quality = _spread(rng, item_count, 80, 2)  # hundredths of a star, like all that follows
    generosity = _spread(rng, int(users.max()) + 1, 60, 2)
    noise = _spread(rng, len(items), 50, 3)
    pleased = np.array([-50, 20, 50])[liking]
    exact = 380 + quality[items] + generosity[users] + pleased + noise  # (T,)
    stars: Int64 = ((exact + 50) // 100).clip(1, 5)  # rounded
    return stars


def _features(rng: Generator, users: Int64, items: Int64, item_count: int) -> Int64:
    """Which of its topic's features each interaction is about, (T,)."""
    of_items, of_users, any_of_topic = (
        (rng.random(count) * _FEATURE_COUNT).astype(np.int64)
        for count in (item_count, int(users.max()) + 1, len(items))
    )
    source = (rng.random(len(items)) * 100).astype(np.int64)
    features = np.where(source < _ITEMS_FEATURE + _VISITORS_FEATURE, of_users[users], any_of_topic)
    return np.where(source < _ITEMS_FEATURE, of_items[items], features)


def _texts(stars: int, thing: str, feature: str, choices: list[int]) -> tuple[str, str, str, str]:
    """Review, headline, explanation and feature; the last two empty where no feature is given."""

    def pick(place: int, words: Sequence[str]) -> str:
        return words[choices[place] % len(words)]

    opening = f"{pick(0, _BEGUN)} the {thing} {pick(1, _OCCASIONS)}."
    verdict, closing = pick(2, _VERDICTS[stars - 1]), pick(3, _CLOSINGS[stars - 1])
    adjective = pick(4, _ADJECTIVES[stars - 1])
    if not feature:
        return f"{opening} {closing}", f"{adjective} {thing}", "", ""
    explanation = f"{pick(5, _LEADS)} the {feature} of the {thing} {verdict}."
    # Two or three sentences; the explanation is one of them, as where it is taken from reviews.
    review = pick(6, (f"{opening} {explanation}", f"{opening} {explanation} {closing}"))
    headlines = (f"{adjective} {thing}", f"{adjective} {feature}", f"The {feature} {verdict}")
    return review, pick(7, headlines), explanation, feature

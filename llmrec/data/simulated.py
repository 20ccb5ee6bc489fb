"""A simulated shop: a second's worth of made-up items and visitors for first steps and tests.

It is not data, and nothing found on it is a finding; every report says `simulated`. Three things
decide a visitor's next item: the kind of thing recent items were, which their titles tell; links
from an item to two fixed others, which no title tells; and popularity. So reading titles and
knowing items by their number each see something the other does not.

The output is frozen by a hash in the tests. Nobody tunes it to the models. One option leaves that
rule on purpose: `distractors` plants a case where a sentence vector as it comes is a muddle, and
the encoder must learn which words count. It shows that tuning can help, never how often it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import capwords

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from llmrec.data.columns import Columns
from llmrec.data.interactions import Int64
from llmrec.data.simulated_reviews import tell
from llmrec.data.simulated_words import ADJECTIVES, BRANDS, DETAILS, TOPICS
from llmrec.errors import UsageError

_KINDS_PER_TOPIC = 3
_KIND_COUNT = _KINDS_PER_TOPIC * len(TOPICS)

_LONGEST, _SHORTEST = 40, 5  # interactions per visitor
_START, _YEARS = 1_577_836_800, 2  # 2020-01-01 in Unix seconds
_DAY = 86_400  # seconds

# Where the next item comes from, in percent.
_REPEAT, _LINK, _POPULAR = 4, 20, 12  # the remaining 64: the current kind of thing, or its topic
_SAME_KIND = 80  # of those 64: the very kind; else any kind of the topic
_DRIFT = 12  # percent of steps at which the visitor turns to another of their interests
_LATE = 6  # percent of last steps that meet an item nobody met before as anything but a last one


@dataclass(frozen=True)
class SimulatedConfig:
    """Size and seed of the simulated data."""

    seed: int = 0
    """Another seed, another shop."""
    users: int = 3000
    """Visitors."""
    items: int = 1500
    """Items on offer, at least 240; those that nobody meets are dropped."""
    distractors: int = 0
    """Things of other topics that each title also names, as what the item is not: `not Fly Reel,
    only Tent, not Inner Tube`. A small word tells which counts. Nothing but titles changes."""
    reviews: bool = False
    """Stars from 1 to 5 for every interaction, and in most a review, its headline, a sentence that
    explains the stars and the feature that it names. Nothing else changes."""

    def __post_init__(self) -> None:
        """Refuse a seed or a number of distractors that the generator does not take."""
        if self.seed < 0:
            raise UsageError(f"data.simulated.seed={self.seed} must not be negative.")
        if not 0 <= self.distractors < len(TOPICS):
            raise UsageError(
                f"data.simulated.distractors={self.distractors}: use 0 to {len(TOPICS) - 1}, each "
                "of another topic."
            )


@dataclass(frozen=True)
class _Shop:
    """The items, sorted by kind; row numbers stand for items throughout."""

    kind_start: Int64
    """First row of each kind, (kinds + 1,)."""
    weight_sum: Int64
    """Sum of the popularity weights before each row, (N + 1,). Whole numbers, so that no platform
    rounds a draw differently."""
    successors: Int64
    """(N, 2): the two items that often follow."""
    late: NDArray[np.bool_]
    """(N,): items met only at the end of a visitor's sequence."""


def simulate(config: SimulatedConfig) -> Columns:
    """The simulated interactions and items.

    Raises:
        UsageError: If there are too few items or users for the shop to make sense.
    """
    if config.items < 4 * _KIND_COUNT or config.users < 1:
        raise UsageError(
            f"data.simulated.items={config.items} and data.simulated.users={config.users}: use at "
            f"least {4 * _KIND_COUNT} items and 1 user."
        )
    rng = np.random.default_rng(config.seed)
    shop = _shop(rng, config.items)
    titles, genres, nouns = _titles(rng, shop, _frames(config, shop))
    lengths = _lengths(rng, config.users)
    visited, interests = _visits(rng, shop, lengths)  # (U, _LONGEST), (U, 3)
    times = _times(rng, config.users)  # (U, _LONGEST)
    happened = np.arange(_LONGEST) < lengths[:, None]
    # Ids are shuffled: neither the topic nor the popularity of an item can be read off its id.
    item_numbers, user_numbers = rng.permutation(config.items), rng.permutation(config.users)
    users, items = np.repeat(np.arange(config.users), lengths), visited[happened]  # (T,)
    told = None
    if config.reviews:
        liking = _liking(shop, items, interests[users])
        topics = [topic for topic in TOPICS for _ in range(_KINDS_PER_TOPIC)]  # of each kind
        of_items = [topics[kind] for kind in _kind_of(shop)]
        told = tell(config.seed, users, items, of_items, nouns, liking)
    return Columns(
        users=users,
        items=items,
        user_ids=[f"u{number:05d}" for number in user_numbers],
        item_ids=[f"i{number:05d}" for number in item_numbers],
        fields={"title": titles, "genres": genres},
        timestamps=times[happened].astype(np.float64),
        ratings=told[0] if told else None,
        reviews=told[1] if told else {},
    )


def _draw(rng: Generator, low: Int64, high: Int64) -> Int64:
    """One whole number per row, low <= number < high."""
    # Through random() rather than integers(): its stream has not changed since the generator was
    # introduced, and the product is exact enough to be the same everywhere.
    return low + (rng.random(len(low)) * (high - low)).astype(np.int64)


def _percent(rng: Generator, count: int) -> Int64:
    return (rng.random(count) * 100).astype(np.int64)


def _shop(rng: Generator, items: int) -> _Shop:
    kind = np.sort(np.arange(items) % _KIND_COUNT)
    kind_start = np.searchsorted(kind, np.arange(_KIND_COUNT + 1)).astype(np.int64)
    rank = rng.permutation(items)  # 0 is the most popular
    weight = 1_000_000 // (rank + 30)  # Zipf, with a flattened head
    late = (_percent(rng, items) < 3) & (rank > 10)
    late[kind_start[:-1]] = False  # so that every kind has something else
    weight[late] = 0
    by_rank = np.argsort(rank)
    successors = np.empty((items, 2), dtype=np.int64)
    for column in range(2):
        # Nearby in popularity, whatever the topic: a link is neither a title nor a best-seller.
        step = _draw(rng, np.full(items, 1), np.full(items, 31))
        step *= np.where(rng.random(items) < 0.5, -1, 1)
        step = np.where((rank + step < 0) | (rank + step >= items), -step, step)
        successors[:, column] = by_rank[rank + step]
    # Late items are nobody's successor: the link goes on to that item's own kind's first item.
    kind_first = kind_start[kind]
    successors = np.where(late[successors], kind_first[successors], successors)
    weight_sum = np.concatenate([[0], np.cumsum(weight)]).astype(np.int64)
    return _Shop(kind_start, weight_sum, successors, late)


def _kinds() -> list[tuple[str, list[str]]]:
    """Genres and nouns of each kind, topic by topic."""
    kinds: list[tuple[str, list[str]]] = []
    for topic, words in TOPICS.items():
        department, *groups = words.split("; ")
        kinds += [(f"{department}|{topic}", group.split(", ")) for group in groups]
    return kinds


def _kind_of(shop: _Shop) -> Int64:
    """The kind of each item, (N,)."""
    rows = np.arange(len(shop.late))
    return (np.searchsorted(shop.kind_start, rows, side="right") - 1).astype(np.int64)


def _liking(shop: _Shop, items: Int64, interests: Int64) -> Int64:
    """(T,): 2 where an item is of a kind that its visitor came for (T, 3), 1 where near one."""
    met = _kind_of(shop)[items][:, None]  # (T, 1)
    near = (interests // _KINDS_PER_TOPIC == met // _KINDS_PER_TOPIC).any(axis=1)
    return np.where((interests == met).any(axis=1), 2, near).astype(np.int64)


def _frames(config: SimulatedConfig, shop: _Shop) -> list[str]:
    """(N,): what a title says around its noun, which goes where the braces are."""
    items, count = len(shop.late), config.distractors
    if not count:
        return ["{}"] * items
    rng = np.random.default_rng([config.seed, 1])  # its own, so that only titles change
    nouns = [nouns for _, nouns in _kinds()]
    kind = _kind_of(shop)  # (N,)
    order = rng.random((items, len(TOPICS)))
    order[np.arange(items), kind // _KINDS_PER_TOPIC] = 2  # its own topic comes last
    topics = np.argsort(order, axis=1)[:, :count]  # (N, count)
    within = (rng.random((items, count)) * _KINDS_PER_TOPIC).astype(np.int64)
    kinds = topics * _KINDS_PER_TOPIC + within
    words = (rng.random((items, count)) * 1_000_000).astype(np.int64)
    places = (rng.random(items) * (count + 1)).astype(np.int64)
    frames = []
    for row in range(items):
        pairs = zip(kinds[row], words[row], strict=True)
        named = [f"not {capwords(nouns[other][word % len(nouns[other])])}" for other, word in pairs]
        named.insert(places[row], "only {}")
        frames.append(", ".join(named))
    return frames


def _titles(
    rng: Generator, shop: _Shop, frames: list[str]
) -> tuple[list[str], list[str], list[str]]:
    """(N,) titles, genres and nouns; about 1 in 100 titles empty, 1 in 100 its neighbour's."""
    items, kinds = len(shop.late), _kinds()
    titles: list[str] = []
    genres: list[str] = []
    nouns: list[str] = []
    choices = (rng.random((items, 5)) * 1_000_000).astype(np.int64).tolist()
    fate = _percent(rng, items)  # 0: no text; 1: the text of the item before
    for row in range(items):
        kind = int(np.searchsorted(shop.kind_start, row, side="right")) - 1
        genre, of_kind = kinds[kind]
        noun, brand, adjective, detail = (
            words[choice % len(words)]
            for words, choice in zip(
                (of_kind, BRANDS, ADJECTIVES, DETAILS), choices[row], strict=False
            )
        )
        named = frames[row].format(capwords(noun))
        title = (
            f"{brand} {adjective} {named}, {detail}",
            f"{adjective} {named} ({detail}) by {brand}",
            f"{named}: {brand} {detail}",
            f"{brand} {named} - {adjective}",
        )[choices[row][4] % 4]
        if fate[row] == 1 and row > shop.kind_start[kind] and titles[-1]:
            title, noun = titles[-1], nouns[-1]
        titles.append("" if fate[row] == 0 else title)
        genres.append("" if fate[row] == 0 else genre)
        nouns.append(noun)
    return titles, genres, nouns


def _lengths(rng: Generator, users: int) -> Int64:
    """(U,): 5 to 40 interactions, geometric, about 10 on average."""
    weights = [1_000_000]
    while len(weights) <= _LONGEST - _SHORTEST:
        weights.append(weights[-1] * 84 // 100)
    sums = np.cumsum(weights)
    places = _draw(rng, np.zeros(users, dtype=np.int64), np.full(users, sums[-1]))
    return _SHORTEST + np.searchsorted(sums, places, side="right").astype(np.int64)


def _popular_in(rng: Generator, shop: _Shop, first: Int64, last: Int64) -> Int64:
    """An item of each range of rows, first <= item < last, by popularity."""
    place = _draw(rng, shop.weight_sum[first], shop.weight_sum[last])
    return (np.searchsorted(shop.weight_sum, place, side="right") - 1).astype(np.int64)


def _visits(rng: Generator, shop: _Shop, lengths: Int64) -> tuple[Int64, Int64]:
    """Item rows met, (U, _LONGEST), and the kinds of thing that each visitor came for, (U, 3).

    Items beyond a visitor's length are never used; who has fewer interests has the first again.
    """
    users, items = len(lengths), len(shop.late)
    rows = np.arange(users)
    nothing, kinds = np.zeros(users, dtype=np.int64), np.full(users, _KIND_COUNT)
    interests = np.stack([_draw(rng, nothing, kinds) for _ in range(3)], axis=1)  # (U, 3)
    interest_count = _draw(rng, nothing + 1, nothing + 4)  # 1, 2 or 3 of them
    current = interests[:, 0]
    visited = np.zeros((users, _LONGEST), dtype=np.int64)
    late_rows = np.flatnonzero(shop.late)
    for step in range(_LONGEST):
        turned = interests[rows, _draw(rng, nothing, interest_count)]
        current = np.where(_percent(rng, users) < _DRIFT, turned, current)
        same_kind = _percent(rng, users) < _SAME_KIND
        topic = current - current % _KINDS_PER_TOPIC
        low = np.where(same_kind, current, topic)
        high = np.where(same_kind, current + 1, topic + _KINDS_PER_TOPIC)
        source = _percent(rng, users)
        popular = (source >= _REPEAT + _LINK) & (source < _REPEAT + _LINK + _POPULAR)
        first_row = np.where(popular, 0, shop.kind_start[low])
        last_row = np.where(popular, items, shop.kind_start[high])
        chosen = _popular_in(rng, shop, first_row, last_row)
        met = (visited[:, :step] == chosen[:, None]).any(axis=1)
        # A second look round, so that best-sellers do not come back at every other step.
        chosen = np.where(met, _popular_in(rng, shop, first_row, last_row), chosen)
        earlier = visited[rows, _draw(rng, nothing, nothing + max(step, 1))]
        link = shop.successors[visited[:, step - 1], (_percent(rng, users) >= 60).astype(np.int64)]
        if step > 0:
            chosen = np.where(source < _REPEAT, earlier, chosen)
            chosen = np.where((source >= _REPEAT) & (source < _REPEAT + _LINK), link, chosen)
        new = late_rows[_draw(rng, nothing, nothing + len(late_rows))] if len(late_rows) else chosen
        at_end = (step == lengths - 1) & (_percent(rng, users) < _LATE)
        visited[:, step] = np.where(at_end, new, chosen)
    had = np.arange(3) < interest_count[:, None]  # (U, 3)
    return visited, np.where(had, interests, interests[:, :1])


def _times(rng: Generator, users: int) -> Int64:
    """Unix seconds, (U, _LONGEST): visits days apart, and now and then two in one basket."""
    start = _draw(rng, np.zeros(users, dtype=np.int64), np.full(users, _YEARS * 365 * _DAY))
    gap = (rng.random((users, _LONGEST)) * 45 * _DAY).astype(np.int64)
    gap[rng.random((users, _LONGEST)) < 0.05] = 0  # bought together: the same second
    return _START + start[:, None] + np.cumsum(gap, axis=1)

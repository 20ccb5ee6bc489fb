"""The simulated data is frozen, and carries the signals it says it carries."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from llmrec.data.interactions import Dataset
from llmrec.data.readers import DataConfig, load_dataset
from llmrec.data.simulated import SimulatedConfig
from llmrec.data.simulated_reviews import FEATURES
from llmrec.data.simulated_words import TOPICS
from llmrec.data.splits import SplitConfig, split, training_counts
from llmrec.errors import UsageError


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset(DataConfig())


def test_the_output_is_frozen(data: Dataset) -> None:
    # Never change this to suit a model. A change of the generator moves every quick-start number
    # and belongs in the changelog.
    assert data.fingerprint() == "ecf5b5c66035138e1bb1c9fbc850620761df201d8fd03fe3e3e80d1bcb712693"


def test_another_seed_gives_another_shop(data: Dataset) -> None:
    other = load_dataset(DataConfig(simulated=SimulatedConfig(seed=1)))
    assert other.fingerprint() != data.fingerprint()


def test_sizes_are_those_asked_for(data: Dataset) -> None:
    lengths = data.interactions.lengths
    assert len(lengths) == 3000
    assert 1450 < data.item_count <= 1500
    assert lengths.min() == 5
    assert lengths.max() <= 40
    assert 9 < lengths.mean() < 11
    small = load_dataset(DataConfig(simulated=SimulatedConfig(users=50, items=240)))
    assert small.interactions.user_count == 50


def test_too_few_items_are_refused() -> None:
    with pytest.raises(UsageError, match=r"data\.simulated\.items=10"):
        load_dataset(DataConfig(simulated=SimulatedConfig(items=10)))


def test_it_has_the_blemishes_of_real_data(data: Dataset) -> None:
    parts = split(data, SplitConfig())
    share = {name: number / 3000 for name, number in parts.counts.items()}
    assert 0.02 < share["test_targets_cold"] < 0.1
    assert 0.05 < share["test_targets_repeated"] < 0.2
    assert parts.counts["interactions_tied_in_time"] > 0
    assert 5 <= data.counts["items_with_empty_text"] <= 30
    assert data.counts["items_sharing_their_text"] > 10


def test_ids_tell_neither_topic_nor_popularity(data: Dataset) -> None:
    popularity = np.bincount(data.interactions.items, minlength=data.item_count + 1)[1:]
    assert abs(np.corrcoef(np.arange(data.item_count), popularity)[0, 1]) < 0.1


def test_titles_tell_the_topic_and_topics_persist(data: Dataset) -> None:
    genres = np.array(["", *data.catalog.fields["genres"]])
    items, users = data.interactions.items, data.interactions.users()
    together = users[1:] == users[:-1]
    same = (genres[items[1:]] == genres[items[:-1]])[together].mean()
    shares = np.unique(genres[items], return_counts=True)[1] / len(items)
    assert same > 5 * (shares**2).sum()  # chance: both of the same topic
    nouns = {re.sub(r"\W+", " ", title).split()[1] for title in data.catalog.texts if title}
    assert len(nouns) > 30


def test_links_that_no_title_tells_beat_popularity(data: Dataset) -> None:
    """What most often followed the last item in training: an untrained first-order Markov chain."""
    x, parts = data.interactions, split(data, SplitConfig())
    trained = np.arange(len(x.items)) < np.repeat(parts.train_end, x.lengths)
    users = x.users()
    pairs = trained[1:] & (users[1:] == users[:-1])
    follows = np.zeros((data.item_count + 1, data.item_count + 1))
    np.add.at(follows, (x.items[:-1][pairs], x.items[1:][pairs]), 1)
    popularity = training_counts(x, parts.train_end, data.item_count)

    def hits(scores: np.ndarray) -> float:  # (C, N + 1); HR@10, ties in random order
        target = np.take_along_axis(scores, x.items[parts.test.target][:, None].astype(int), axis=1)
        greater, equal = (scores > target).sum(axis=1), (scores == target).sum(axis=1) - 1
        return float(np.clip((10 - greater) / (equal + 1), 0, 1).mean())

    last = x.items[parts.test.end - 1]
    best_sellers = hits(np.tile(popularity, (len(last), 1)))
    assert hits(follows[last] + 1e-6 * popularity) > 3 * best_sellers


SMALL = SimulatedConfig(users=200, items=600)
TOPIC_OF = {  # noun, in lower case -> its topic
    noun.lower(): topic
    for topic, words in TOPICS.items()
    for group in words.split("; ")[1:]
    for noun in group.split(", ")
}


def named(title: str, marker: str) -> list[str]:
    """The topics of what stands behind each `marker` of a title."""
    rests = title.lower().split(f"{marker} ")[1:]
    found = [max((n for n in TOPIC_OF if rest.startswith(n)), key=len) for rest in rests]
    return [TOPIC_OF[noun] for noun in found]


def test_distractors_change_nothing_but_titles() -> None:
    plain = load_dataset(DataConfig(simulated=SMALL))
    muddled = load_dataset(DataConfig(simulated=replace(SMALL, distractors=2)))
    assert plain.interactions.items.tolist() == muddled.interactions.items.tolist()
    assert plain.user_ids == muddled.user_ids and plain.catalog.ids == muddled.catalog.ids
    assert plain.catalog.fields["genres"] == muddled.catalog.fields["genres"]
    pairs = list(zip(plain.catalog.texts, muddled.catalog.texts, strict=True))
    assert all((a == b) == (a == "") for a, b in pairs)


def test_one_small_word_tells_the_item_from_what_it_is_not() -> None:
    catalog = load_dataset(DataConfig(simulated=replace(SMALL, distractors=2))).catalog
    places = []
    for title, genres in zip(catalog.texts, catalog.fields["genres"], strict=True):
        if title:
            own, others = named(title, "only"), named(title, "not")
            assert own == [genres.split("|")[1]]
            assert len(set(others)) == 2 and own[0] not in others
            before = title.split("only ")[0]
            places.append(before.count("not "))
    shares = np.bincount(places, minlength=3) / len(places)
    assert np.abs(shares - 1 / 3).max() < 0.1  # 600 items: five standard deviations


def test_titles_with_distractors_are_frozen_too() -> None:
    data = load_dataset(DataConfig(simulated=replace(SMALL, distractors=2)))
    assert data.fingerprint() == "6ff4344ecec5cdf9da64b5d12ba68ee8d501f6499ae3efe2b0c64b6c2520dff5"


@pytest.mark.parametrize("count", [-1, 20])
def test_as_many_distractors_as_there_are_other_topics_at_most(count: int) -> None:
    with pytest.raises(UsageError, match=rf"distractors={count}: use 0 to 19"):
        SimulatedConfig(distractors=count)
    titles = load_dataset(DataConfig(simulated=replace(SMALL, distractors=19))).catalog.texts
    assert {title.count("not ") for title in titles if title} == {19}


@pytest.fixture(scope="module")
def told() -> Dataset:
    return load_dataset(DataConfig(simulated=SimulatedConfig(reviews=True)))


def test_reviews_change_nothing_else(data: Dataset, told: Dataset) -> None:
    assert told.fingerprint() == data.fingerprint()
    assert told.catalog == data.catalog
    assert data.interactions.ratings is None and dict(data.reviews) == {}


def test_stars_and_texts_are_frozen_too(told: Dataset) -> None:
    assert (
        told.told_fingerprint()
        == "cfb982c44688db53a1ea68c92228f4f73d5bcefed6b0b4a7f954773bf6d262b1"
    )


def test_item_means_beat_the_mean_and_users_beside_them_beat_both(
    told: Dataset, figure: Callable[[str, object], None]
) -> None:
    x, cut = told.interactions, split(told, SplitConfig())
    stars, users = x.ratings, x.users()
    assert stars is not None and set(stars) == {1, 2, 3, 4, 5}
    trained = np.flatnonzero(np.arange(len(stars)) < np.repeat(cut.train_end, x.lengths))

    def shrunk(groups: np.ndarray, rest: np.ndarray) -> np.ndarray:  # means, drawn to 0
        sums = np.bincount(groups[trained], rest[trained], groups.max() + 1)
        return sums / (np.bincount(groups[trained], minlength=groups.max() + 1) + 3)

    mean = stars[trained].mean()
    of_item = shrunk(x.items, stars - mean)[x.items]
    of_user = shrunk(users, stars - mean - of_item)[users]

    def error(guess: np.ndarray) -> float:  # RMSE on the targets of the test
        return float(np.sqrt(((guess - stars)[cut.test.target] ** 2).mean()))

    plain, items = error(np.full(len(stars), mean)), error(mean + of_item)
    both = error(mean + of_item + of_user)
    figure("RMSE of mean, item, item and user", f"{plain:.2f}, {items:.2f}, {both:.2f}")
    assert items < 0.92 * plain  # they remove an eighth, and a tenth again
    assert both < 0.95 * items


def test_texts_name_the_thing_the_feature_and_how_it_pleased(told: Dataset) -> None:
    x, texts = told.interactions, told.reviews
    genres = ["", *told.catalog.fields["genres"]]
    spoken = np.flatnonzero(texts["feature"] != "")
    assert 0.85 < len(spoken) / len(x.items) < 0.91  # 96 % say something, 92 % of them why
    for row in spoken[::37]:
        feature, explanation = texts["feature"][row], texts["explanation"][row]
        noun = max((noun for noun in TOPIC_OF if noun in explanation.lower()), key=len)
        if genres[x.items[row]]:
            topic = genres[x.items[row]].split("|")[1]
            assert TOPIC_OF[noun] == topic and feature in FEATURES[topic]
        assert f"the {feature} of the " in explanation
        assert explanation in texts["review"][row] and texts["headline"][row]
    silent = texts["review"] == ""
    assert 0.03 < silent.mean() < 0.05
    assert set(texts["headline"][silent]) == set(texts["feature"][silent]) == {""}
    assert len(set(texts["explanation"])) > 10_000
    bad, good = ({t for t in texts["headline"][x.ratings == stars] if t} for stars in (1, 5))
    assert len(bad) > 100 and not bad & good


def test_what_an_item_is_praised_for_is_mostly_its_own(told: Dataset) -> None:
    items, features = told.interactions.items, told.reviews["feature"]
    most = [  # the share of the commonest word among an item's
        np.unique(words, return_counts=True)[1].max() / len(words)
        for item in range(1, told.item_count + 1, 10)
        if len(words := features[(items == item) & (features != "")]) >= 20
    ]
    assert len(most) > 20
    assert 0.55 < np.mean(most) < 0.8  # 60 % its own, and 1 in 6 of the others


def test_another_seed_says_other_things(told: Dataset) -> None:
    config = SimulatedConfig(users=50, items=240, reviews=True)
    one, other = (
        load_dataset(DataConfig(simulated=replace(config, seed=seed))).told_fingerprint()
        for seed in (0, 1)
    )
    assert one != other

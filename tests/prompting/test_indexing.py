# ruff: noqa: RUF001
"""What items are called: distinct names that only training parts decide."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmrec.data.interactions import Catalog, Dataset, Interactions
from llmrec.errors import UsageError
from llmrec.prompting.indexing import (
    Indexing,
    IndexingConfig,
    build_indexing,
    co_occurrence,
    load_indexing,
    save_indexing,
)

NAMES = ("random", "sequential", "collaborative", "title")


def shop(histories: Sequence[Sequence[int]], titles: Sequence[str]) -> Dataset:
    """Users' items and items' titles."""
    lengths = [len(history) for history in histories]
    items = np.concatenate([np.array(history, np.int32) for history in histories])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    catalog = Catalog([f"id {n}" for n in range(len(titles))], {}, list(titles))
    users = [f"u{n}" for n in range(len(histories))]
    return Dataset("shop", Interactions(items, offsets), catalog, users)


def leave_two(dataset: Dataset) -> np.ndarray:
    """Training ends before the last two interactions."""
    return dataset.interactions.offsets[1:] - 2


def communities(items: int, users: int, count: int, length: int = 12, *, seed: int = 0) -> Dataset:
    """Users meet the items of one community, but for every tenth one; community = item % count."""
    rng = np.random.default_rng(seed)
    home = rng.integers(count, size=(users, 1))
    own = home + count * rng.integers(items // count, size=(users, length))
    any_item = rng.integers(items, size=(users, length))
    met = np.where(rng.random((users, length)) < 0.1, any_item, own) + 1
    return shop(met.tolist(), [f"thing {n}" for n in range(items)])


def test_sequential_numbers_follow_the_training_parts_alone() -> None:
    dataset = shop([[4, 2, 5, 1], [2, 6, 4, 3, 5]], "abcdef")
    # trained on: 4 2 | 2 6 4 -> 4, 2, 6 are 1, 2, 3; 1, 3 and 5 follow in any order
    found = build_indexing(IndexingConfig(name="sequential"), dataset, leave_two(dataset))
    numbers = [int(mention.removeprefix("item_")) for mention in found.mentions]
    assert [numbers[item - 1] for item in (4, 2, 6)] == [1, 2, 3]
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]


def test_sequential_numbers_of_items_never_trained_on_say_nothing_of_their_order() -> None:
    histories = [[1, user + 10, user + 11] for user in range(0, 400, 2)]  # 10.. only as targets
    dataset = shop(histories, ["t"] * 500)
    found = build_indexing(IndexingConfig(name="sequential"), dataset, leave_two(dataset))
    numbers = np.array([int(mention.removeprefix("item_")) for mention in found.mentions])
    assert abs(np.corrcoef(np.arange(400), numbers[9:409])[0, 1]) < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_the_items_of_validation_and_test_move_no_name(name: str) -> None:
    dataset = communities(300, 200, 5)
    ends = leave_two(dataset)
    items = dataset.interactions.items.copy()
    rng = np.random.default_rng(9)
    for end in ends:
        items[end : end + 2] = rng.integers(1, 301, size=2)
    other = replace(dataset, interactions=replace(dataset.interactions, items=items))
    config = IndexingConfig(name=name)
    if name == "collaborative":
        config = replace(config, leaf=8, clusters=5)
    assert build_indexing(config, other, ends) == build_indexing(config, dataset, ends)


@pytest.mark.parametrize("name", ["random", "sequential", "collaborative"])
def test_a_seed_gives_the_same_names_and_another_one_others(name: str) -> None:
    dataset = communities(300, 100, 5)
    config = IndexingConfig(name=name)
    ends = dataset.interactions.offsets[:-1] + 2  # most items are never trained on
    found = build_indexing(config, dataset, ends)
    assert build_indexing(config, dataset, ends).fingerprint == found.fingerprint
    assert build_indexing(replace(config, seed=1), dataset, ends).fingerprint != found.fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_a_catalogue_of_one_item_has_a_name(name: str) -> None:
    dataset = shop([[1, 1, 1]], ["only"])
    found = build_indexing(IndexingConfig(name=name), dataset, leave_two(dataset))
    assert found.mentions == {
        "random": ("item_1",), "sequential": ("item_1",), "collaborative": ("<c1_0>",),
        "title": ("only",),
    }[name]  # fmt: skip


def test_repeated_and_empty_titles_get_numbers_that_no_other_title_has() -> None:
    titles = ["Alien", "alien!", "Alien (2)", "", "Alien", "  ", "<b>Up</b>"]
    found = build_indexing(IndexingConfig(name="title"), shop([[1, 2]], titles), np.array([0]))
    assert found.mentions == (
        "Alien", "alien! (3)", "Alien (2)", "untitled", "Alien (4)", "untitled (2)", "‹b›Up‹/b›",
    )  # fmt: skip


def test_ten_thousand_equal_titles_are_numbered_in_one_pass() -> None:
    dataset = shop([[1, 2]], ["same"] * 10_000)
    found = build_indexing(IndexingConfig(name="title"), dataset, np.array([0]))
    assert found.mentions[0] == "same"
    assert found.mentions[-1] == "same (10000)"


def test_titles_are_refused_where_there_are_none() -> None:
    with pytest.raises(UsageError, match=r"indexing\.name=title"):
        build_indexing(IndexingConfig(name="title"), shop([[1, 2]], ["", ""]), np.array([0]))


def test_co_occurrence_counts_users_once_and_recent_items_only() -> None:
    dataset = shop([[4, 2, 2, 1, 4, 4], [3, 1, 2, 4, 4], [2, 3, 4, 4]], "abcd")
    # of training parts 4 2 2 1 | 3 1 2 | 2 3 the last 3 count: {1, 2} {1, 2, 3} {2, 3}
    found = co_occurrence(dataset.interactions, leave_two(dataset), 4, history=3)
    assert found.toarray().tolist() == [[0, 2, 1, 0], [2, 0, 2, 0], [1, 2, 0, 0], [0, 0, 0, 0]]


def test_clusters_follow_planted_communities() -> None:
    dataset = communities(400, 2000, 10)
    config = IndexingConfig(name="collaborative", clusters=10, leaf=40)
    found = build_indexing(config, dataset, leave_two(dataset))
    first = [mention.split(">")[0] for mention in found.mentions]
    planted = np.arange(400) % 10
    alike = np.array(first)[:, None] == np.array(first)
    same = planted[:, None] == planted
    assert alike[same].mean() > 0.8  # items of one community share the first token
    assert alike[~same].mean() < 0.05
    assert found.counts["groups_cut_by_spectrum"] >= 1


def test_a_mention_is_made_of_the_tokens_to_add_and_each_of_them_occurs() -> None:
    dataset = communities(500, 500, 7)
    found = build_indexing(IndexingConfig(name="collaborative"), dataset, leave_two(dataset))
    parts = [[f"{part}>" for part in mention.split(">")[:-1]] for mention in found.mentions]
    assert {token for mention in parts for token in mention} == set(found.tokens)
    assert len(set(found.mentions)) == 500
    for mention in parts:
        assert [part[: part.index("_")] for part in mention] == [
            f"<c{level}" for level in range(1, len(mention) + 1)
        ]


def test_items_nobody_met_are_spread_evenly() -> None:
    dataset = communities(200, 400, 5)
    titles = [f"thing {n}" for n in range(400)]  # 201..400 are cold
    dataset = replace(dataset, catalog=Catalog([str(n) for n in range(400)], {}, titles))
    config = IndexingConfig(name="collaborative", clusters=5, leaf=10)
    found = build_indexing(config, dataset, leave_two(dataset))
    cold = [mention.split(">")[0] for mention in found.mentions[200:]]
    assert np.bincount([int(token[-1]) for token in cold]).tolist() == [40] * 5
    assert found.counts["items_never_met_with_another"] == 200
    assert len(set(found.mentions)) == 400


def test_items_without_any_history_still_get_distinct_names() -> None:
    dataset = shop([[n, n, n] for n in range(1, 101)], ["t"] * 100)
    config = IndexingConfig(name="collaborative", clusters=3, leaf=4)
    found = build_indexing(config, dataset, leave_two(dataset))
    assert len(set(found.mentions)) == 100


def test_items_that_all_go_together_are_cut_evenly_and_counted() -> None:
    star = shop([[1, n, 1, 1] for n in range(2, 602)], ["t"] * 601)  # nothing to cut along
    clique = shop([list(range(1, 41))] * 5, ["t"] * 40)
    for dataset, leaf in ((star, 20), (clique, 2)):
        config = IndexingConfig(name="collaborative", leaf=leaf)
        found = build_indexing(config, dataset, dataset.interactions.offsets[1:])
        assert len(set(found.mentions)) == dataset.item_count
        assert found.counts["groups_cut_evenly"] >= 1
        assert max(mention.count("<") for mention in found.mentions) <= 3


def test_an_eigensolver_that_does_not_converge_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.prompting.indexing.MAX_ITERATIONS", 1)
    monkeypatch.setattr("llmrec.prompting.indexing.DENSE", 0)
    dataset = communities(600, 600, 30)
    found = build_indexing(IndexingConfig(name="collaborative"), dataset, leave_two(dataset))
    assert found.counts["eigensolver_stopped_early"] > 0
    assert len(set(found.mentions)) == 600


@pytest.mark.slow
def test_a_hundred_thousand_items_get_distinct_short_clusters() -> None:
    dataset = communities(100_000, 100_000, 1000)
    found = build_indexing(IndexingConfig(name="collaborative"), dataset, leave_two(dataset))
    assert len(set(found.mentions)) == 100_000
    assert len(found.tokens) < 300
    assert max(mention.count("<") for mention in found.mentions) <= 8


@pytest.mark.parametrize("option", ["clusters", "leaf", "history"])
def test_an_option_of_clusters_is_refused_where_items_are_called_otherwise(option: str) -> None:
    IndexingConfig(name="collaborative", **{option: 50})
    for name in ("random", "sequential", "title"):
        with pytest.raises(UsageError, match=rf"indexing\.{option}=50 is read by .*collaborative"):
            IndexingConfig(name=name, **{option: 50})


@pytest.mark.parametrize("option", ["seed", "clusters", "leaf", "history"])
def test_a_number_out_of_range_is_refused_by_name(option: str) -> None:
    with pytest.raises(UsageError, match=rf"indexing\.{option}=-1"):
        IndexingConfig(**{option: -1})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_read_back(name: str, tmp_path: Path) -> None:
    dataset = communities(100, 50, 5)
    found = build_indexing(IndexingConfig(name=name), dataset, leave_two(dataset))
    save_indexing(tmp_path / "indexing.json", found, dataset)
    assert load_indexing(tmp_path / "indexing.json", dataset) == found


def _change(content: dict[str, object]) -> None:
    content["mentions"][0] = "item_9"  # type: ignore[index]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_change, "damaged"),
        (lambda content: content.pop("tokens"), "damaged"),
        (lambda content: content.update(mentions=7), "damaged"),
        (lambda content: content.update(version=99), "version 99"),
        (dict.clear, "no indexing"),
    ],
)
def test_a_damaged_file_is_refused(
    damage: Callable[[dict[str, object]], object], told: str, tmp_path: Path
) -> None:
    path, dataset = tmp_path / "indexing.json", shop([[1, 2]], "ab")
    save_indexing(path, Indexing("random", ("item_1", "item_2")), dataset)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=told):
        load_indexing(path, dataset)


def test_a_missing_file_a_torn_one_and_one_of_other_items_are_refused(tmp_path: Path) -> None:
    path, dataset = tmp_path / "indexing.json", shop([[1, 2]], "ab")
    with pytest.raises(UsageError, match="cannot be read"):
        load_indexing(path, dataset)
    save_indexing(path, Indexing("random", ("item_1", "item_2")), dataset)
    with pytest.raises(UsageError, match="other items"):
        load_indexing(path, shop([[1, 2]], "abc"))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UsageError, match="damaged"):
        load_indexing(path, dataset)

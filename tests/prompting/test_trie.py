"""The prefix tree over answers: every item is found, ranges are right, ambiguity is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.errors import UsageError
from llmrec.prompting.trie import Trie

END = 1
FOUR = [[5, 6, END], [5, 7, END], [3, END], [5, 6, 2, END]]


def test_a_small_tree_by_hand() -> None:
    trie = Trie.of(FOUR)
    # level 1: 3 5; level 2: 3.1 5.6 5.7; level 3: 5.6.1 5.6.2 5.7.1; level 4: 5.6.2.1
    assert trie.tokens.tolist() == [0, 3, 5, 1, 6, 7, 1, 2, 1, 1]
    assert trie.first.tolist() == [1, 3, 4, 6, 6, 8, 9, 9, 10, 10, 10]
    assert trie.items.tolist() == [3, 1, 4, 2]  # the leaves, in the order of their sequences
    assert trie.low.tolist() == [0, 0, 1, 0, 1, 3, 1, 2, 3, 2]
    assert trie.high.tolist() == [4, 1, 4, 1, 3, 4, 2, 3, 4, 3]
    assert trie.leaf_of().tolist() == [-1, 1, 3, 0, 2]


def test_only_whole_answers_name_an_item() -> None:
    trie = Trie.of(FOUR)
    assert [trie.item(answer) for answer in FOUR] == [1, 2, 3, 4]
    others = [[], [5], [5, 6], [3, END, END], [5, 8, END], [4, END], [900, END], [-3]]
    assert [trie.item(answer) for answer in others] == [0] * len(others)


def test_one_item_makes_a_tree() -> None:
    trie = Trie.of([[4, END]])
    assert trie.item([4, END]) == 1
    assert len(trie) == 1


@given(
    st.lists(
        st.lists(st.integers(2, 5), min_size=1, max_size=6).map(tuple),
        min_size=1,
        max_size=40,
        unique=True,
    )
)
def test_every_item_is_below_the_nodes_on_its_path_and_nowhere_else(
    bodies: list[tuple[int, ...]],
) -> None:
    answers = [[*body, END] for body in bodies]
    trie = Trie.of(answers)
    below: dict[tuple[int, ...], set[int]] = {}
    for item, answer in enumerate(answers, 1):
        for length in range(len(answer) + 1):
            below.setdefault(tuple(answer[:length]), set()).add(item)
    found, paths = {}, [()]
    for node in range(len(trie.tokens)):
        path: tuple[int, ...] = paths[node]
        found[path] = set(trie.items[trie.low[node] : trie.high[node]].tolist())
        children = trie.tokens[trie.first[node] : trie.first[node + 1]].tolist()
        assert children == sorted(children)
        assert (not children) == trie.leaves[node]
        paths.extend((*path, token) for token in children)
    assert found == below


@pytest.mark.parametrize(
    ("answers", "named"),
    [
        ([[2, 3], [4, 1], [2, 3, 1]], "items 1 and 3"),  # one begins the other
        ([[2, 1], [4, 1], [4, 1]], "items 2 and 3"),  # equal, and of the greatest length
        ([[2, 1], [2, 1], [4, 4, 1]], "items 1 and 2"),
        ([[4, 1], []], "item 2"),
        ([], "empty"),
    ],
)
def test_what_would_be_ambiguous_is_refused_by_item(answers: list[list[int]], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Trie.of(answers)


def test_a_hundred_thousand_items_take_a_few_megabytes() -> None:
    answers = [[2, 100 + n // 317, 1100 + n % 317, END] for n in range(100_000)]
    trie = Trie.of(answers)
    assert trie.nbytes < 10_000_000
    rng = np.random.default_rng(0)
    for item in rng.integers(1, 100_001, size=100).tolist():
        assert trie.item(answers[item - 1]) == item

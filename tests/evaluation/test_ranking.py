import numpy as np
import pytest
import torch

from llmrec.data.interactions import Cases, Interactions
from llmrec.errors import UsageError
from llmrec.evaluation.config import EvaluationConfig
from llmrec.evaluation.metrics import Measure, merge
from llmrec.evaluation.ranking import case_blocks, rank


def world(users=83, items=137, width=16, seed=0):
    """Random histories with repeats, leave-one-out cases, random vectors, all items candidates."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(2, 30, users))]).astype(np.int64)
    interactions = Interactions(rng.integers(1, items + 1, offsets[-1]).astype(np.int32), offsets)
    last = offsets[1:] - 1
    cases = Cases(np.arange(users, dtype=np.int32), last, last)
    vectors = torch.from_numpy(rng.standard_normal((users, width)).astype(np.float32))
    item_vectors = torch.from_numpy(rng.standard_normal((items + 1, width)).astype(np.float32))
    candidates = np.ones(items + 1, dtype=np.bool_)
    candidates[0] = False
    return vectors, item_vectors, interactions, cases, candidates


def ranked(world, processes=1, **config):
    vectors, *rest = world
    arguments = (lambda block: vectors[torch.from_numpy(block)], *rest, EvaluationConfig(**config))
    parts = [rank(*arguments, index, processes) for index in range(processes)]
    return merge(parts, len(world[3]))


def sequences(*histories, candidates=None, items=5):
    """Hand-written histories; the last item is the target. User vectors are 1, item i scores -i."""
    offsets = np.cumsum([0, *map(len, histories)]).astype(np.int64)
    interactions = Interactions(np.concatenate(histories).astype(np.int32), offsets)
    last = offsets[1:] - 1
    cases = Cases(np.arange(len(histories), dtype=np.int32), last, last)
    allowed = np.zeros(items + 1, dtype=np.bool_)
    allowed[candidates or slice(1, None)] = True
    scores = -torch.arange(items + 1.0)[:, None]
    return torch.ones(len(histories), 1), scores, interactions, cases, allowed


def brute_force(world, filter_seen):
    """One case at a time: mask, argsort, look the target up. Float64, no ties."""
    vectors, item_vectors, interactions, cases, candidates = world
    for case in range(len(cases)):
        scores = item_vectors.double().numpy() @ vectors[case].double().numpy()
        target = int(interactions.items[cases.target[case]])
        seen = interactions.items[interactions.offsets[cases.user[case]] : cases.end[case]]
        allowed = candidates.copy()
        if filter_seen:
            allowed[seen] = False
        if filter_seen != "papers" or target not in seen:
            allowed[target] = True
        order = [i for i in np.argsort(-scores, kind="stable") if allowed[i]]
        yield target, order


@pytest.mark.parametrize("filter_seen", [True, False, "papers"])
@pytest.mark.parametrize("items", [5, 64, 137])
def test_ranks_agree_with_a_plain_argsort_evaluator(filter_seen, items):
    some = world(items=items)
    some[-1][1:3] = False  # two items are no candidates
    ours = ranked(some, filter_seen=filter_seen, top_k=20)
    for case, (target, order) in enumerate(brute_force(some, filter_seen)):
        assert ours.candidates[case] == len(order)
        assert ours.top_items[case].tolist() == (order + [0] * 20)[:20]
        assert ours.reachable[case] == (target in order)
        if target in order:
            assert ours.greater[case] == order.index(target)
            assert ours.equal[case] == 0


def test_seen_items_are_no_candidates():
    found = ranked(sequences([1, 2, 5]))  # 1 and 2 score above 5 but were seen; 3 and 4 remain
    assert (found.greater[0], found.candidates[0]) == (2, 3)
    assert found.top_items[0, :4].tolist() == [3, 4, 5, 0]


def test_a_repeated_target_stays_a_candidate():
    found = ranked(sequences([1, 2, 2]))
    assert (found.greater[0], found.candidates[0], found.reachable[0]) == (0, 4, True)


def test_papers_makes_a_repeated_target_a_miss_and_touches_nothing_else():
    found = ranked(sequences([1, 2, 2], [1, 3, 2]), filter_seen="papers")
    assert found.reachable.tolist() == [False, True]
    assert found.candidates.tolist() == [3, 3]
    assert Measure("HR", 5).per_case(found).tolist() == [0, 1]
    assert 2 not in found.top_items[0]


def test_without_the_filter_everything_is_a_candidate():
    found = ranked(sequences([1, 2, 2]), filter_seen=False)
    assert (found.greater[0], found.candidates[0]) == (1, 5)


def test_a_history_item_seen_twice_is_taken_away_once():
    assert ranked(sequences([1, 1, 1, 4])).candidates.tolist() == [4]


def test_an_item_outside_the_candidates_is_never_listed_nor_counted():
    found = ranked(sequences([1, 5], candidates=[1, 4, 5]))
    assert (found.greater[0], found.candidates[0]) == (1, 2)
    assert found.top_items[0, :3].tolist() == [4, 5, 0]


def test_a_target_outside_the_candidates_is_one_nevertheless():
    found = ranked(sequences([1, 5], candidates=[2, 3]))
    assert (found.greater[0], found.candidates[0], found.reachable[0]) == (2, 3, True)


def test_the_padding_item_is_never_a_candidate_even_when_it_is_marked_as_one():
    some = sequences([1, 5])
    some[-1][0] = True
    some[1][0] = 100.0
    assert ranked(some).top_items[0, :4].tolist() == [2, 3, 4, 5]


def test_a_constant_scorer_gets_what_a_random_one_expects():
    vectors, item_vectors, interactions, cases, candidates = world(items=1000)
    found = ranked(
        (torch.zeros_like(vectors), item_vectors, interactions, cases, candidates),
        filter_seen=False,
    )
    assert Measure("HR", 10).per_case(found).tolist() == pytest.approx([10 / 1000] * len(cases))
    assert Measure("AUC").per_case(found).tolist() == [0.5] * len(cases)
    shown = np.bincount(found.top_items.ravel(), minlength=1001)[1:]  # 83 lists of 20 of 1,000
    assert shown.sum() == 83 * 20
    assert abs((shown > 0).mean() - (1 - (1 - 20 / 1000) ** 83)) < 0.05  # as independent draws
    assert all(len(set(row)) == 20 for row in found.top_items.tolist())


@pytest.mark.parametrize("users", [1, 2, 3, 7, 8, 83])
@pytest.mark.parametrize("items", [4, 16, 62, 63, 64, 65, 126, 999, 8191, 8192, 12101])
def test_items_with_identical_vectors_tie_exactly(items, users):
    vectors, item_vectors, *rest = world(users, items, width=50)
    same = item_vectors[1].expand(items + 1, -1).clone()
    found = ranked((vectors, same, *rest), filter_seen=False)
    assert found.equal.tolist() == [items - 1] * users


def test_tied_items_are_listed_in_an_order_of_each_users_own():
    scores = torch.zeros(31, 1)
    scores[[21, 22]] = 1.0
    vectors, _, *rest = sequences(*[[30, 7]] * 60, items=30)
    long = ranked((vectors, scores, *rest), top_k=5).top_items
    assert all(set(row[:2]) == {21, 22} for row in long.tolist())  # the best first
    assert 10 < (long[:, 0] == 21).sum() < 50
    assert np.isin(np.arange(1, 30), long).all()  # everything but the seen item 30
    # The same order whatever K is.
    for top_k in (1, 2, 3):
        shorter = ranked((vectors, scores, *rest), top_k=top_k).top_items
        assert np.array_equal(shorter, long[:, :top_k])


def test_one_process_and_three_give_the_same_values():
    some = world(users=2001, items=5000)
    alone, three = (ranked(some, processes=p, block_megabytes=1) for p in (1, 3))
    assert len(case_blocks(some[2], some[3], 5000, EvaluationConfig(block_megabytes=1))) > 9
    for name in ("greater", "equal", "candidates", "reachable", "top_items"):
        assert np.array_equal(getattr(alone, name), getattr(three, name))


def test_more_processes_than_blocks_leave_some_with_nothing():
    some = world(users=5)
    assert np.array_equal(ranked(some, processes=4).greater, ranked(some).greater)


def test_blocks_hold_every_case_once_and_grow_in_history_length():
    _, _, interactions, cases, _ = world(users=500, items=50_000)
    blocks = case_blocks(interactions, cases, 50_000, EvaluationConfig(block_megabytes=8))
    order = np.concatenate(blocks)
    assert sorted(order.tolist()) == list(range(500))
    lengths = (cases.end - interactions.offsets[cases.user])[order]
    assert (np.diff(lengths) >= 0).all()
    assert max(map(len, blocks)) * 50_000 * 4 <= 8 << 20


def test_no_cases_are_ranked_to_an_empty_ranking():
    vectors, item_vectors, interactions, _, candidates = world()
    none = Cases(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64))
    found = ranked((vectors, item_vectors, interactions, none, candidates))
    assert len(found) == 0
    assert found.top_items.shape == (0, 20)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_item_or_user_vector_is_an_error(broken):
    for place in (0, 1):
        some = world()
        some[place][5] = broken
        with pytest.raises(UsageError, match="NaN or infinite"):
            ranked(some)


def test_a_broken_vector_of_an_item_that_is_no_candidate_does_no_harm():
    some = sequences([1, 5], candidates=[1, 4, 5])
    some[1][3] = torch.nan
    assert ranked(some).greater.tolist() == [1]


def test_half_precision_vectors_are_scored_in_float32():
    vectors, item_vectors, *rest = world()
    half = (vectors.half(), item_vectors.half(), *rest)
    full = (vectors.half().float(), item_vectors.half().float(), *rest)
    assert np.array_equal(ranked(half).greater, ranked(full).greater)


@pytest.mark.parametrize("option", [{"top_k": 0}, {"block_megabytes": 0}, {"filter_seen": "no"}])
def test_a_meaningless_setting_names_its_option(option):
    with pytest.raises(UsageError, match=f"evaluation.{next(iter(option))}"):
        EvaluationConfig(**option)

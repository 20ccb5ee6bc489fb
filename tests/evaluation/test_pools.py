import itertools

import numpy as np
import polars as pl
import pytest
import torch
from made_pools import draw, everything, random_shop, shop

from llmrec.errors import UsageError
from llmrec.evaluation.config import EvaluationConfig
from llmrec.evaluation.metrics import Measure, Ranking, merge
from llmrec.evaluation.pools import (
    PoolConfig,
    eligible_sample,
    pools_from_lists,
    sample_cases,
    text_groups,
    write_pools,
)
from llmrec.evaluation.ranking import rank, rank_scores


def targets_of(dataset, cases):
    return dataset.interactions.items[cases.target]


def test_a_list_holds_the_target_and_items_that_the_user_has_not_met():
    dataset, cases = random_shop()
    kept, pools = draw(dataset, cases, size=20)
    assert kept.tolist() == list(range(300))
    assert pools.items.shape == (300, 20)
    for case, (row, target) in enumerate(zip(pools.items, targets_of(dataset, cases), strict=True)):
        seen = dataset.interactions.history(case)[:-1]
        assert len(set(row.tolist())) == 20
        assert target in row
        assert not (set(row.tolist()) - {int(target)}) & set(seen.tolist())


def test_a_repeated_target_is_in_its_list_nevertheless():
    dataset, cases = shop([[1, 2, 1]], "abcdef")
    assert 1 in draw(dataset, cases, size=3)[1].items[0]
    assert 2 not in draw(dataset, cases, size=5)[1].items[0]


@pytest.mark.parametrize(("size", "limit"), [(4, 16.27), (20, 43.82)])
def test_over_10000_cases_the_truth_stands_everywhere_equally_often(size, limit, figure):
    dataset, cases = random_shop(users=10_000, items=60)
    _, pools = draw(dataset, cases, size=size)
    places = (pools.items == targets_of(dataset, cases)[:, None]).argmax(axis=1)
    counts = np.bincount(places, minlength=size)
    chi_square = float(((counts - 10_000 / size) ** 2 / (10_000 / size)).sum())
    figure(f"chi-square of the truth's place, 1 of {size}", f"{chi_square:.1f}, .1 %: {limit}")
    assert chi_square < limit  # exceeded once in a thousand seeds, with size - 1 degrees of freedom


def test_random_rivals_are_all_items_equally_often():
    dataset, cases = shop([[1, 2]] * 6000, "abcdefg")
    _, pools = draw(dataset, cases, size=3)  # 2 of the 5 items 3..7
    counts = np.bincount(pools.items.ravel(), minlength=8)
    assert counts[1] == 0 and counts[2] == 6000
    # Binomial with p = 2/5: 2400, standard deviation sqrt(6000 * .4 * .6) = 38.
    assert np.abs(counts[3:] - 2400).max() < 4 * 38


def test_popular_rivals_are_drawn_one_after_another_in_proportion_to_their_counts():
    dataset, cases = shop([[1, 2]] * 6000, "abcdef")
    popularity = np.array([0, 50, 50, 1, 2, 3, 0])  # rivals: item 3, 4, 5; 6 was never trained on
    _, pools = draw(dataset, cases, popularity, size=3, source="popularity")
    pairs = [frozenset(row) - {2} for row in pools.items.tolist()]
    chance = {
        frozenset({3, 4}): 1 / 6 * 2 / 5 + 2 / 6 * 1 / 4,
        frozenset({3, 5}): 1 / 6 * 3 / 5 + 3 / 6 * 1 / 3,
        frozenset({4, 5}): 2 / 6 * 3 / 4 + 3 / 6 * 2 / 3,
    }
    assert sum(chance.values()) == pytest.approx(1)
    assert set(pairs) == set(chance)
    for pair, p in chance.items():
        assert abs(pairs.count(pair) - 6000 * p) < 4 * np.sqrt(6000 * p * (1 - p))


def test_rivals_that_are_hard_to_hit_are_drawn_by_the_same_chances():
    # Item 3 takes nearly all draws, so the others come from what repeated drawing leaves open.
    dataset, cases = shop([[1, 2]] * 6000, "abcdef")
    popularity = np.array([0, 0, 0, 10**9, 1, 2, 3])
    _, pools = draw(dataset, cases, popularity, size=3, source="popularity")
    assert all(3 in row for row in pools.items.tolist())
    for item, p in {4: 1 / 6, 5: 2 / 6, 6: 3 / 6}.items():
        found = int((pools.items == item).sum())
        assert abs(found - 6000 * p) < 4 * np.sqrt(6000 * p * (1 - p))


def test_no_two_texts_of_a_list_are_the_same_to_a_reader_and_none_is_one_of_the_history():
    titles = ["Lamp", "Chair", " lamp ", "CHAIR", "Desk", "desk", "Bed", "Sofa"]
    dataset, cases = shop([[2, 1]] * 200, titles)  # has a Chair, wants a Lamp
    _, pools = draw(dataset, cases, size=4)
    assert pools.counts["items_sharing_a_text"] == 6
    seen = {frozenset(titles[i - 1].strip().casefold() for i in row) for row in pools.items}
    assert seen == {frozenset({"lamp", "desk", "bed", "sofa"})}
    assert {5, 6} <= set(pools.items.ravel().tolist())  # either of the desks
    assert not {2, 3, 4} & set(pools.items.ravel().tolist())


def test_items_without_text_are_no_candidates_and_targets_without_one_are_dropped_and_counted():
    dataset, cases = shop([[1, 2], [1, 3], [2, 1]], ["a", "b", "", " ", "c"])
    kept, pools = draw(dataset, cases, size=2)
    assert kept.tolist() == [0, 2]  # user 1 wants item 3
    assert [set(row) for row in pools.items.tolist()] == [{2, 5}, {1, 5}]
    assert pools.counts == {
        "cases": 3,
        "cases_dropped_target_without_text": 1,
        "cases_sampled": 2,
        "items_without_text_left_out": 2,
        "items_sharing_a_text": 0,
    }


def test_where_nothing_has_a_text_items_are_told_apart_by_their_ids():
    dataset, cases = shop([[1, 2]], [""] * 4)
    kept, pools = draw(dataset, cases, size=3)
    assert kept.tolist() == [0] and set(pools.items[0].tolist()) == {2, 3, 4}


def test_data_whose_targets_all_lack_a_text_is_refused():
    with pytest.raises(UsageError, match="no test case has a target with a text"):
        draw(*shop([[1, 2]], ["a", ""]), size=2)


def test_items_outside_the_candidates_are_never_drawn_but_the_target_is():
    dataset, cases = shop([[1, 2]] * 50, "abcdef")
    allowed = np.array([0, 1, 0, 1, 0, 1, 0], bool)
    items = draw(dataset, cases, size=3, candidates=allowed)[1].items
    assert [set(row) for row in items.tolist()] == [{2, 3, 5}] * 50


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"size": 5}, "needs 4 items that user 'u0' has not met, but the data has 3 of distinct"),
        ({"size": 3, "source": "popularity"}, "has 1 of distinct text that were trained on"),
    ],
)
def test_too_few_items_are_refused_by_name(config, said):
    dataset, cases = shop([[1, 2]], ["a", "b", "c", "c", "d", "e"])
    popularity = np.array([0, 3, 3, 1, 1, 0, 0])  # c and c are one text
    with pytest.raises(UsageError, match=f"{said}.*Lower evaluation.pool.size"):
        draw(dataset, cases, popularity, **config)


def test_no_item_that_was_trained_on_at_all_is_refused():
    dataset, cases = shop([[1, 2]], "abc")
    with pytest.raises(UsageError, match="has 0 of distinct text"):
        draw(dataset, cases, np.zeros(4, np.int64), size=2, source="popularity")


def test_more_users_include_the_fewer_with_the_same_lists():
    dataset, cases = random_shop()
    few, their = draw(dataset, cases, size=9, users=40)
    many, all_lists = draw(dataset, cases, size=9, users=120)
    assert len(few) == 40 and len(many) == 120
    assert set(few.tolist()) < set(many.tolist())
    assert np.array_equal(all_lists.items[np.isin(many, few)], their.items)
    assert np.array_equal(np.sort(many), many)


def test_a_case_gets_the_same_list_whichever_other_cases_there_are():
    dataset, cases = random_shop()
    _, whole = draw(dataset, cases, size=9)
    _, half = draw(dataset, cases.take(np.arange(0, 300, 2)), size=9)
    assert np.array_equal(half.items, whole.items[::2])


def test_fewer_cases_than_asked_for_are_all_taken_and_counted():
    dataset, cases = random_shop(users=30)
    kept, pools = draw(dataset, cases, size=4, users=1024)
    assert kept.tolist() == list(range(30)) and pools.counts["cases_sampled"] == 30


def test_a_sample_is_drawn_from_the_eligible_alone():
    dataset, cases = random_shop()
    eligible = np.arange(5, 300, 3)
    kept = sample_cases(dataset, cases, eligible, PoolConfig(users=20))
    assert len(kept) == 20 and np.isin(kept, eligible).all()


def test_another_seed_asks_other_users_and_shows_other_items():
    dataset, cases = random_shop()
    (one, ours), (two, others) = (
        draw(dataset, cases, size=9, users=40, seed=seed) for seed in (0, 1)
    )
    assert set(one.tolist()) != set(two.tolist())
    whole = [draw(dataset, cases, size=9, seed=seed)[1].items for seed in (0, 1)]
    assert (np.sort(whole[0], axis=1) != np.sort(whole[1], axis=1)).any(axis=1).mean() > 0.9
    assert ours.sha256 != others.sha256


def test_the_lists_of_a_seed_are_the_same_in_every_version():
    # A new hash means new lists: say so in the changelog, for kept results then have other ones.
    dataset, cases = random_shop()
    found = [
        draw(dataset, cases, np.arange(151), size=9, users=40, source=source)[1].sha256[:16]
        for source in ("random", "popularity")
    ]
    assert found == ["ea805d2a0f2bdb3f", "ec3302a5d69abe27"]


def test_the_hash_tells_users_targets_items_and_their_order():
    def of(histories=((1, 2), (3, 4)), rows=((2, 5), (4, 6)), titles="abcdef"):
        dataset, cases = shop(list(map(list, histories)), titles)
        config, groups = PoolConfig(size=2), text_groups(dataset.catalog)
        kept, counts = eligible_sample(dataset, cases, everything(dataset), groups, config)
        return pools_from_lists(dataset, cases, kept, np.array(rows, np.int32), counts, config)

    same = of()
    assert of().sha256 == same.sha256
    others = [of(histories=((1, 5), (3, 4))), of(rows=((2, 3), (4, 6))), of(rows=((2, 0), (4, 6)))]
    assert len({same.sha256, *(other.sha256 for other in others)}) == 4


def test_lists_of_another_recommender_are_shuffled_without_texts_that_occur_twice():
    dataset, cases = shop([[1, 2]] * 40, ["a", "b", "c", "C ", "d", "", "e"])
    config, groups = PoolConfig(size=3, source="runs/x"), text_groups(dataset.catalog)
    kept, counts = eligible_sample(dataset, cases, everything(dataset), groups, config)
    lists = np.array(
        [[4, 3, 6, 2, 5, 7], [5, 3, 4, 7, 0, 0], [3, 0, 0, 0, 0, 0]] + [[5, 2, 3, 0, 0, 0]] * 37
    )
    pools = pools_from_lists(dataset, cases, kept, lists.astype(np.int32), counts, config)
    assert set(pools.items[0].tolist()) == {4, 2, 5}  # 3 reads like 4, 6 has no text, 7 is beyond
    assert set(pools.items[1].tolist()) == {5, 3, 7}
    assert pools.items[2].tolist() == [3, 0, 0]
    assert pools.counts["targets_outside_pool"] == 2  # rows 1 and 2 lack item 2
    orders = {tuple(row) for row in pools.items[3:].tolist()}
    assert orders == set(itertools.permutations((2, 3, 5)))


def test_the_lists_are_kept_with_their_ids(tmp_path):
    dataset, cases = random_shop()
    kept, pools = draw(dataset, cases, size=4, users=10)
    pools.items[3, 3] = 0
    write_pools(tmp_path, dataset, cases.take(kept), pools)
    table = pl.read_parquet(tmp_path / "candidates.parquet")
    assert table["user_id"].to_list() == [f"u{case}" for case in kept]
    targets = targets_of(dataset, cases.take(kept))
    assert table["target_item_id"].to_list() == [f"i{item}" for item in targets]
    assert table["candidate_item_ids"].to_list() == [
        [f"i{item}" for item in row if item] for row in pools.items
    ]


@pytest.mark.parametrize(
    "option", [{"size": 1}, {"users": 0}, {"seed": -1}, {"seed": 2**32}, {"source": ""}]
)
def test_a_meaningless_setting_names_its_option(option):
    with pytest.raises(UsageError, match=f"evaluation.pool.{next(iter(option))}"):
        PoolConfig(**option)


def test_papers_and_lists_exclude_each_other():
    with pytest.raises(UsageError, match=r"evaluation.filter_seen=papers.*evaluation.pool.size=4"):
        EvaluationConfig(filter_seen="papers", pool=PoolConfig(size=4))


def ranked(dataset, cases, pools, user_vectors, item_vectors, processes=1, **config):
    """Rank lists by dot product, by so many processes one after another."""
    arguments = (
        lambda block: user_vectors[torch.from_numpy(block)], item_vectors, dataset.interactions,
        cases, pools, EvaluationConfig(**config),
    )  # fmt: skip
    parts = [rank(*arguments, index, processes) for index in range(processes)]
    return merge(parts, len(cases))


@pytest.mark.parametrize(("size", "measure", "chance"), [(4, "HR@1", 1 / 4), (100, "HR@10", 0.1)])
def test_a_constant_scorer_gets_exactly_the_chance_of_a_list(size, measure, chance):
    dataset, cases = random_shop()
    _, pools = draw(dataset, cases, size=size)
    found = ranked(dataset, cases, pools, torch.ones(300, 1), torch.ones(151, 1))
    assert Measure.parse(measure).per_case(found).tolist() == pytest.approx([chance] * 300)
    assert found.candidates.tolist() == [size] * 300
    assert Measure("AUC").per_case(found).tolist() == [0.5] * 300


@pytest.mark.parametrize(("size", "measure", "named"), [(4, "HR@1", 1), (100, "HR@10", 10)])
def test_random_answers_hit_as_often_as_chance_says(size, measure, named, figure):
    dataset, cases = random_shop(users=4000, items=200)
    _, pools = draw(dataset, cases, size=size)
    rng = np.random.default_rng(7)
    scores = np.full(pools.items.shape, np.nan)
    for row in scores:  # an answer names so many candidates, best first
        row[rng.choice(size, named, replace=False)] = -np.arange(named)
    found = Ranking.from_scores(
        scores, pools.items, targets_of(dataset, cases), cases.user.astype(np.int64), 10
    )
    mean, chance = float(Measure.parse(measure).per_case(found).mean()), named / size
    figure(f"{measure} of random answers, {named} of {size}", f"{mean:.4f}")
    assert abs(mean - chance) < 3.3 * np.sqrt(chance * (1 - chance) / 4000)


def test_lists_are_ranked_as_the_full_ranking_ranks_these_items():
    dataset, cases = random_shop()
    _, pools = draw(dataset, cases, size=30)
    generator = torch.Generator().manual_seed(3)
    users, items = (torch.randn(n, 8, generator=generator) for n in (300, 151))
    found = ranked(dataset, cases, pools, users, items, top_k=20)
    for case, target in enumerate(targets_of(dataset, cases)):
        scores = items.double() @ users[case].double()
        order = sorted(pools.items[case].tolist(), key=lambda item: -scores[item])
        assert found.greater[case] == order.index(target)
        assert found.top_items[case].tolist() == order[:20]
    assert found.equal.sum() == 0 and found.reachable.all()


@pytest.mark.parametrize("items", [62, 63, 64, 65, 999])
def test_candidates_with_equal_vectors_tie_exactly(items):
    dataset, cases = random_shop(users=83, items=items)
    _, pools = draw(dataset, cases, size=20)
    generator = torch.Generator().manual_seed(3)
    users = torch.randn(83, 50, generator=generator)
    same = torch.randn(50, generator=generator).expand(items + 1, -1).clone()
    assert ranked(dataset, cases, pools, users, same).equal.tolist() == [19] * 83


def test_two_processes_rank_lists_as_one_does():
    dataset, cases = random_shop(users=2001, items=5000)
    _, pools = draw(dataset, cases, size=20)
    generator = torch.Generator().manual_seed(3)
    users, items = (torch.randn(n, 8, generator=generator) for n in (2001, 5001))
    one, two = (
        ranked(dataset, cases, pools, users, items, processes, block_megabytes=1)
        for processes in (1, 2)
    )
    for name in ("greater", "equal", "candidates", "reachable", "top_items"):
        assert np.array_equal(getattr(one, name), getattr(two, name))


def test_a_target_outside_its_list_is_a_miss():
    dataset, cases = shop([[1, 2], [1, 2]], "abcd")
    config, groups = PoolConfig(size=2, source="runs/x"), text_groups(dataset.catalog)
    kept, counts = eligible_sample(dataset, cases, everything(dataset), groups, config)
    lists = np.array([[3, 4], [2, 4]], np.int32)
    pools = pools_from_lists(dataset, cases, kept, lists, counts, config)
    found = ranked(dataset, cases, pools, torch.ones(2, 1), torch.arange(5.0)[:, None])
    assert found.reachable.tolist() == [False, True]
    assert Measure("HR", 2).per_case(found).tolist() == [0, 1]
    assert found.top_items[0, :3].tolist() == [4, 3, 0]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_score_in_a_list_is_an_error(broken):
    dataset, cases = shop([[1, 2]], "abc")
    _, pools = draw(dataset, cases, size=2)  # items 2 and 3
    items = torch.ones(4, 1)
    items[3] = broken
    with pytest.raises(UsageError, match="NaN or infinite"):
        ranked(dataset, cases, pools, torch.ones(1, 1), items)


def test_lists_of_other_cases_are_refused():
    dataset, cases = random_shop()
    _, pools = draw(dataset, cases, size=4, users=10)
    with pytest.raises(ValueError, match="10 lists for 300 cases"):
        ranked(dataset, cases, pools, torch.ones(300, 1), torch.ones(151, 1))


def test_scores_that_are_no_dot_product_are_ranked_the_same_way():
    dataset, cases = random_shop()
    _, pools = draw(dataset, cases, size=20)
    scores = torch.rand(300, 151, generator=torch.Generator().manual_seed(3))
    vectors = torch.eye(151)[:, :151]
    for candidates in (pools, everything(dataset)):
        arguments = (dataset.interactions, cases, candidates, EvaluationConfig())
        direct = rank_scores(lambda block: scores[torch.from_numpy(block)].clone(), 150, *arguments)
        product = rank(lambda block: scores[torch.from_numpy(block)], vectors, *arguments)
        for name in ("greater", "equal", "candidates", "reachable", "top_items"):
            found = (getattr(merge([part], 300), name) for part in (direct, product))
            assert np.array_equal(*found)

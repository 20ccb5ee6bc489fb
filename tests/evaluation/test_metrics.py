from itertools import pairwise, permutations
from math import log2

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.errors import UsageError
from llmrec.evaluation.metrics import MEASURES, Measure, Ranking, measure_matrix, merge


def ranking(greater, equal=0, candidates=100, reachable=True):
    greater = np.atleast_1d(np.asarray(greater, dtype=np.int64))
    return Ranking(
        greater,
        np.broadcast_to(np.int64(equal), greater.shape).copy(),
        np.broadcast_to(np.int64(candidates), greater.shape).copy(),
        np.broadcast_to(np.bool_(reachable), greater.shape).copy(),
        np.zeros((len(greater), 0), dtype=np.int32),
    )


def value(measure, *args, **kwargs):
    return Measure.parse(measure).per_case(ranking(*args, **kwargs)).tolist()


def test_places_one_two_and_three_have_their_gains():
    assert value("NDCG@2", [0, 1, 2]) == [1, 1 / log2(3), 0]
    assert value("MRR@2", [0, 1, 2]) == [1, 1 / 2, 0]
    assert value("HR@2", [0, 1, 2]) == [1, 1, 0]


def test_a_tie_across_the_cut_counts_in_part():
    # One above, two tied with the target: places 2, 3, 4, of which two lie within K = 3.
    assert value("HR@3", 1, equal=2) == [2 / 3]
    assert value("NDCG@3", 1, equal=2) == pytest.approx([(1 / log2(3) + 1 / log2(4)) / 3])
    assert value("MRR@3", 1, equal=2) == pytest.approx([(1 / 2 + 1 / 3) / 3])


def test_auc_counts_a_tied_rival_one_half():
    # Ten rivals: two above, four tied, four below.
    assert value("AUC", 2, equal=4, candidates=11) == [(4 + 4 / 2) / 10]


def test_auc_of_a_target_without_rivals_is_one():
    assert value("AUC", 0, candidates=1) == [1]


def test_an_unreachable_target_is_worth_nothing_to_any_measure():
    assert all(value(str(m), 0, reachable=False) == [0] for m in MEASURES)


def test_a_cutoff_beyond_the_candidates_finds_every_target():
    assert value("HR@1000000", 4, candidates=5) == [1]
    assert value("MRR@1000000", 4, candidates=5) == [1 / 5]


def test_a_constant_scorer_gets_k_over_candidates():
    assert value("HR@10", 0, equal=3415, candidates=3416) == [10 / 3416]
    assert value("AUC", 0, equal=3415, candidates=3416) == [0.5]


def test_no_cases_give_no_values():
    assert all(value(str(m), []) == [] for m in MEASURES)
    assert measure_matrix(ranking([])).shape == (0, 13)


def test_the_default_measures_are_thirteen():
    assert " ".join(map(str, MEASURES)) == (
        "HR@1 HR@5 HR@10 HR@20 NDCG@1 NDCG@5 NDCG@10 NDCG@20 MRR@1 MRR@5 MRR@10 MRR@20 AUC"
    )


def test_names_are_read_in_any_case_and_written_in_one():
    assert str(Measure.parse("ndcg@7")) == "NDCG@7"
    assert Measure.parse("auc") == Measure("AUC")


@pytest.mark.parametrize("name", ["NDGC@10", "HR@0", "HR@-1", "HR", "AUC@10", ""])
def test_an_unknown_measure_is_refused_with_the_way_out(name):
    with pytest.raises(UsageError, match="Use HR@K"):
        Measure.parse(name)


def test_the_nearest_measure_is_named():
    with pytest.raises(UsageError, match=r"did you mean NDCG@10\?"):
        Measure.parse("NDGC@10")


def brute_force(measure, greater, equal, candidates):
    """The mean over every order of the tied, counted place by place."""
    above, tied, below = ["a"] * greater, ["t", *"e" * equal], candidates - greater - equal - 1
    orders = list(permutations(range(equal + 1)))
    total = 0.0
    for order in orders:
        places = [*above, *(tied[i] for i in order), *["b"] * below]
        place = places.index("t") + 1
        inside = place <= measure.cutoff
        total += {
            "HR": float(inside),
            "NDCG": inside / log2(place + 1),
            "MRR": inside / place,
            "AUC": (candidates - place) / (candidates - 1) if candidates > 1 else 1.0,
        }[measure.name]
    return total / len(orders)


def test_a_thousand_random_cases_agree_with_brute_force_over_all_orders_of_the_tied(figure):
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(1000):
        candidates = int(rng.integers(1, 30))
        equal = int(rng.integers(0, min(5, candidates - 1) + 1))
        greater = int(rng.integers(0, candidates - equal))
        name = rng.choice(["HR", "NDCG", "MRR", "AUC"])
        measure = Measure(str(name), 0 if name == "AUC" else int(rng.integers(1, 40)))
        (ours,) = measure.per_case(ranking(greater, equal, candidates))
        worst = max(worst, abs(ours - brute_force(measure, greater, equal, candidates)))
    figure("largest difference to brute force over 1,000 cases", f"{worst:.1e}")
    assert worst <= 1e-12


def test_a_thousand_tie_free_rankings_agree_with_ir_measures(figure):
    rng = np.random.default_rng(1)
    size, cases = 50, 1000
    greater = rng.integers(0, size, cases)
    run = [
        ir_measures.ScoredDoc(str(q), str(place), float(size - place))
        for q in range(cases)
        for place in range(size)
    ]
    qrels = [ir_measures.Qrel(str(q), str(g), 1) for q, g in enumerate(greater)]
    worst = 0.0
    for cutoff in (1, 5, 10, 20, 60):
        pairs = {"HR": "Success", "NDCG": "nDCG", "MRR": "RR"}
        for name, theirs in pairs.items():
            found = ir_measures.parse_measure(f"{theirs}@{cutoff}").iter_calc(qrels, run)
            expected = {int(metric.query_id): metric.value for metric in found}
            ours = Measure(name, cutoff).per_case(ranking(greater, candidates=size))
            worst = max(worst, *(abs(ours[q] - expected[q]) for q in range(cases)))
    figure("largest difference to ir-measures over 1,000 cases", f"{worst:.1e}")
    assert worst <= 1e-12


@st.composite
def places(draw):
    candidates = draw(st.integers(1, 500))
    equal = draw(st.integers(0, candidates - 1))
    return draw(st.integers(0, candidates - 1 - equal)), equal, candidates


@given(places(), st.integers(1, 600))
def test_values_lie_between_0_and_1_and_grow_with_k(place, cutoff):
    for name in ("HR", "NDCG", "MRR"):
        small = value(f"{name}@{cutoff}", *place)[0]
        large = value(f"{name}@{cutoff + 1}", *place)[0]
        assert -1e-12 <= small <= large + 1e-12 <= 1 + 2e-12


@given(places(), st.integers(1, 600))
def test_a_rival_passing_the_target_never_helps_it(place, cutoff):
    greater, equal, candidates = place
    for name in (f"HR@{cutoff}", f"NDCG@{cutoff}", f"MRR@{cutoff}", "AUC"):
        before = value(name, greater, equal, candidates + 1)[0]
        assert value(name, greater + 1, equal, candidates + 1)[0] <= before + 1e-12


def test_a_produced_list_ranks_its_items_in_order():
    lists = np.array([[7, 3, 0], [3, 7, 9], [1, 2, 4]], dtype=np.int32)
    found = Ranking.from_lists(lists, np.array([7, 9, 7], dtype=np.int32), 100)
    assert found.greater[:2].tolist() == [0, 2]
    assert found.reachable.tolist() == [True, True, False]
    assert Measure("MRR", 3).per_case(found).tolist() == [1, 1 / 3, 0]


def test_a_target_absent_from_an_empty_list_is_a_miss_not_a_tie():
    empty = Ranking.from_lists(np.zeros((1, 5), np.int32), np.array([3], dtype=np.int32), 10)
    assert all(m.per_case(empty).tolist() == [0] for m in MEASURES)
    none = Ranking.from_lists(np.zeros((1, 0), np.int32), np.array([3], dtype=np.int32), 10)
    assert none.reachable.tolist() == [False]


def test_padding_inside_a_list_or_a_padded_target_is_an_error():
    with pytest.raises(ValueError, match="padding before an item"):
        Ranking.from_lists(np.array([[0, 3]], np.int32), np.array([3], np.int32), 10)
    with pytest.raises(ValueError, match="target is 0"):
        Ranking.from_lists(np.array([[3, 0]], np.int32), np.array([0], np.int32), 10)


def test_parts_are_merged_into_case_order():
    merged = merge([(np.array([2, 0]), ranking([12, 10])), (np.array([1]), ranking([11]))], 3)
    assert merged.greater.tolist() == [10, 11, 12]


@pytest.mark.parametrize("second", [[0], [3], []])
def test_a_case_that_is_missing_or_ranked_twice_is_an_error(second):
    parts = [(np.array([2, 0]), ranking([1, 1])), (np.array(second, np.int64), ranking(second))]
    with pytest.raises(ValueError, match="exactly once"):
        merge(parts, 3)


NAN = np.nan


def scored(scores, items, targets, users=(7,), top_k=3):
    """Rankings of some cases by scores of their own candidates."""
    arrays = (np.array(scores, float), np.array(items, np.int32), np.array(targets, np.int32))
    return Ranking.from_scores(*arrays, np.broadcast_to(users, len(items)).astype(np.int64), top_k)


def test_scores_of_a_list_place_the_target_and_ties_are_equal():
    found = scored(
        [[3.0, 1.0, 2.0, 0.0], [2.0, 2.0, 5.0, 2.0], [1.0, 9.0, 8.0, 7.0]],
        [[11, 12, 13, 14], [11, 12, 13, 14], [14, 12, 13, 11]],
        [13, 12, 14],
    )
    assert found.greater.tolist() == [1, 1, 3]
    assert found.equal.tolist() == [0, 2, 0]
    assert found.candidates.tolist() == [4, 4, 4]
    assert found.reachable.all()
    assert found.top_items[0].tolist() == [11, 13, 12]
    assert found.top_items[2].tolist() == [12, 13, 11]


def test_a_candidate_that_got_no_score_comes_last_and_is_never_listed():
    found = scored([[NAN, 1.0, 2.0, NAN]], [[11, 12, 13, 14]], [12], top_k=4)
    assert (found.greater[0], found.equal[0], found.candidates[0]) == (1, 0, 4)
    assert found.top_items[0].tolist() == [13, 12, 0, 0]


@pytest.mark.parametrize(
    ("scores", "items", "target"),
    [
        ([NAN, 1.0, 2.0], [11, 12, 13], 11),  # in the list, but no answer names it
        ([0.0, 1.0, 2.0], [11, 12, 13], 14),  # not in the list
        ([NAN, NAN, NAN], [11, 12, 13], 11),  # no answer at all
        ([0.0, 1.0, NAN], [11, 12, 0], 14),  # a short list
    ],
)
def test_a_target_without_a_score_is_a_miss_and_never_a_tie(scores, items, target):
    found = scored([scores], [items], [target])
    assert not found.reachable[0]
    assert (found.greater[0], found.equal[0]) == (np.count_nonzero(items), 0)
    assert measure_matrix(found).sum() == 0


def test_minus_infinity_is_a_score():
    found = scored([[-np.inf, -np.inf, 0.0]], [[11, 12, 13]], [12])
    assert (found.greater[0], found.equal[0], bool(found.reachable[0])) == (1, 1, True)


def test_padding_is_no_candidate():
    found = scored([[1.0, 5.0, 9.0, 9.0]], [[11, 12, 0, 0]], [11], top_k=4)
    assert (found.greater[0], found.candidates[0]) == (1, 2)
    assert found.top_items[0].tolist() == [12, 11, 0, 0]


def test_tied_candidates_are_listed_in_an_order_of_each_users_own_wherever_they_stand():
    items = np.tile(np.arange(1, 9, dtype=np.int32), (200, 1))
    users = np.arange(200)
    one = scored(np.zeros((200, 8)), items, [1] * 200, users, top_k=8).top_items
    other = scored(np.zeros((200, 8)), items[:, ::-1], [1] * 200, users, top_k=8).top_items
    assert np.array_equal(one, other)
    first = np.bincount(one[:, 0], minlength=9)[1:]
    assert first.min() > 8 and first.sum() == 200  # 25 each, standard deviation 4.7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([[1.0]], [[11, 12]], [11]), "are not"),
        (([[1.0, 2.0]], [[11, 12]], [11, 12]), "are not"),
        (([[1.0, 2.0]], [[11, 12]], [0]), "A target is 0"),
        (([[1.0, 2.0, 3.0]], [[11, 12, 11]], [11]), "names a candidate twice"),
    ],
)
def test_scores_that_do_not_fit_their_candidates_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        scored(*arguments)


@given(st.data())
def test_scores_rank_as_counting_one_by_one_does(data):
    size = data.draw(st.integers(1, 9))
    number = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.just(NAN))
    row = data.draw(st.lists(number, min_size=size, max_size=size))
    target = data.draw(st.integers(1, size + 1))
    found = scored([row], [list(range(1, size + 1))], [target], top_k=size)
    if target > size or np.isnan(row[target - 1]):
        assert not found.reachable[0]
        return
    assert found.greater[0] == sum(other > row[target - 1] for other in row)
    assert found.equal[0] == sum(other == row[target - 1] for other in row) - 1
    listed = [item for item in found.top_items[0].tolist() if item]
    assert sorted(listed) == [n for n in range(1, size + 1) if not np.isnan(row[n - 1])]
    assert all(row[a - 1] >= row[b - 1] for a, b in pairwise(listed))

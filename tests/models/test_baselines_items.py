"""Neighbours, Markov chain and EASE against brute force and small tables."""

import math

import numpy as np
import pytest
from small_runs import mean, record, refusal, train
from small_shops import scores

from llmrec.errors import UsageError
from llmrec.models.baselines import ease as ease_module
from llmrec.models.baselines import known as known_module

ITEM_ROWS = ["item_knn", "markov", "ease"]
USERS = [[1, 2, 3, 6], [1, 2, 6], [2, 3, 6], [1, 4, 6]]
"""Item 6 is every target. Users 0, 1 and 3 had 1; 0, 1, 2 had 2; 0, 2 had 3; 3 had 4; none 5."""


def random_shop(seed, users=40, items=12):
    """Histories with repeats, and the binary training matrix without their last two items."""
    rng = np.random.default_rng(seed)
    histories = [rng.integers(1, items + 1, rng.integers(3, 9)).tolist() for _ in range(users)]
    matrix = np.zeros((users, items))
    for user, history in enumerate(histories):
        matrix[user, np.array(history[:-2]) - 1] = 1
    return histories, matrix, {"titles": [""] * items, "untrained": [2] * users}


def read(histories, items, most=None):
    """Ones where an item stands in a visible history's last places, (B, N)."""
    found = np.zeros((len(histories), items))
    for row, history in enumerate(histories):
        found[row, np.array(history[:-1][-most:] if most else history[:-1]) - 1] = 1
    return found


def test_neighbours_are_summed_cosines_of_who_had_both():
    found = scores("item_knn", USERS)
    # Users of both over the root of users times users.
    with_2, with_3, with_4 = 2 / 3, 1 / math.sqrt(6), 1 / math.sqrt(3)  # of item 1
    of_2_and_3 = 2 / math.sqrt(6)
    # History 1, 2, 3: an item is no neighbour of its own, and 4 is like 1 alone.
    expected = [with_2 + with_3, with_2 + of_2_and_3, with_3 + of_2_and_3, with_4, 0, 0]
    assert found[0] == pytest.approx(expected)
    # History 1, 4.
    assert found[3] == pytest.approx([with_4, with_2, with_3, with_4, 0, 0])


def test_shrinkage_adds_users_to_the_denominator():
    found = scores("item_knn", [*USERS, [4, 6]], shrinkage=2.0)
    # 4 is now two users' (3 and 4): with 1, had by three, it shares user 3.
    assert found[4] == pytest.approx([1 / (math.sqrt(6) + 2), 0, 0, 0, 0, 0])


def test_a_history_item_names_its_nearest_and_of_tied_ones_the_lower_id():
    found = scores("item_knn", [[1, 3, 4, 2, 6], [5, 6]], neighbours=2)
    # All four likenesses are 1: 1 names 2 and 3; 2, 3 and 4 name the two lowest of the others.
    assert found[0].tolist() == [3, 3, 2, 0, 0, 0]
    assert found[1].tolist() == [0] * 6


def test_a_repeated_history_item_counts_once_and_old_ones_not_at_all():
    once, twice = scores("item_knn", [*USERS, [4, 2, 6], [2, 4, 2, 6]], untrained=[1] * 4 + [3, 4])[
        4:
    ]
    assert np.array_equal(once, twice)
    late = scores("item_knn", [*USERS, [4, 2, 6]], untrained=[1] * 4 + [3], max_length=1)[4]
    assert late == pytest.approx([2 / 3, 0, 2 / math.sqrt(6), 0, 0, 0])


@pytest.mark.parametrize("block_entries", [1, 30, 1 << 21])
@pytest.mark.parametrize(
    "options", [{}, {"neighbours": 3, "shrinkage": 1.5}, {"neighbours": "all"}]
)
def test_neighbours_are_those_of_brute_force(monkeypatch, block_entries, options):
    monkeypatch.setattr(known_module, "BLOCK_ENTRIES", block_entries)
    histories, matrix, shop = random_shop(0)
    counts, both = matrix.sum(axis=0), matrix.T @ matrix
    cosine = both / (np.sqrt(np.outer(counts, counts)) + options.get("shrinkage", 0))
    np.fill_diagonal(cosine, 0)
    for row in cosine:
        order = sorted(range(12), key=lambda item: (-row[item], item))
        row[
            order[12 if options.get("neighbours") == "all" else options.get("neighbours", 100) :]
        ] = 0
    found = scores("item_knn", histories, **shop, **options, max_length=4)
    assert found == pytest.approx(read(histories, 12, most=4) @ cosine, rel=1e-6)


def test_markov_is_the_share_of_what_followed_the_last_item():
    histories = [[1, 2, 1, 3, 5], [3, 1, 2, 6], [2, 2, 4, 1]]
    found = scores("markov", histories)
    # Followers of 1: 2, 3, 2; of 2: 1, 2, 4; of 3: 1. From one user to the next nothing follows,
    # and targets are not trained on.
    assert found[0].tolist() == [1, 0, 0, 0, 0, 0]  # after 3
    assert found[1] == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3, 0, 0])  # after 2
    assert found[2].tolist() == [0] * 6  # nothing ever followed 4
    assert scores("markov", [*histories, [1, 6]])[3] == pytest.approx([0, 2 / 3, 1 / 3, 0, 0, 0])


def test_markov_learns_from_the_training_part_and_starts_from_the_visible_one():
    found = scores("markov", [[1, 2, 3, 1, 6], [4, 1, 6]], untrained=[2, 3])
    # Trained: 1, 2, 3. Both histories end with 1, the second user's unseen in training.
    assert found.tolist() == [[0, 1, 0, 0, 0, 0]] * 2


def test_ease_predicts_every_item_from_the_others_by_ridge_regression(monkeypatch, figure):
    monkeypatch.setattr(ease_module, "COLUMNS", 5)  # less than the items, and no divisor of them
    histories, matrix, shop = random_shop(1)
    weights = np.zeros((12, 12))
    for item in range(12):  # least squares of each column on the others, not Steck's formula
        rest = np.arange(12) != item
        others = matrix[:, rest]
        weights[rest, item] = np.linalg.solve(
            others.T @ others + 3 * np.eye(11), others.T @ matrix[:, item]
        )
    found, expected = scores("ease", histories, **shop, l2=3.0), read(histories, 12) @ weights
    figure("largest difference to ridge regressions", f"{np.abs(found - expected).max():.1e}")
    assert found == pytest.approx(expected, abs=1e-6)


def test_ease_of_two_items_is_one_division():
    # Three users had 1, two 2, one both: a weight of 1 / (users of the known item + l2).
    histories = [[1, 2, 6], [1, 6], [1, 6], [2, 6]]
    found = scores("ease", histories, l2=2.0)
    assert found[1] == pytest.approx([0, 1 / 5, 0, 0, 0, 0])
    assert found[3] == pytest.approx([1 / 4, 0, 0, 0, 0, 0])
    assert found[0] == pytest.approx([1 / 4, 1 / 5, 0, 0, 0, 0])


def test_ease_reads_the_whole_history_and_a_repeat_once():
    trained = [[1, 2, 6], [1, 6], [1, 6], [2, 6]]
    asked = scores("ease", [*trained, [1, 2, 1, 6]], untrained=[1] * 4 + [4], l2=2.0, max_length=1)
    assert asked[4] == pytest.approx([1 / 4, 1 / 5, 0, 0, 0, 0])


def test_ease_that_does_not_fit_says_how_much_it_needs(monkeypatch):
    monkeypatch.setattr(ease_module, "available_bytes", lambda group: 8 * 101**2 - 1)
    with pytest.raises(UsageError, match=r"100 x 100 items, .* Use model\.name=item_knn"):
        scores("ease", USERS, titles=[""] * 100)
    monkeypatch.setattr(ease_module, "available_bytes", lambda group: 8 * 101**2)
    assert scores("ease", USERS, titles=[""] * 100).shape == (4, 100)


def test_ease_with_too_small_a_weight_names_the_way_out():
    with pytest.raises(UsageError, match=r"model\.l2=1e-15 is too small .* Raise it, to 1e-14"):
        scores("ease", [[1, 2, 6], [1, 2, 6]], l2=1e-15)  # 1 and 2 tell the same
    assert np.isfinite(scores("ease", [[1, 2, 6], [1, 2, 6]], l2=1e-14)).all()


def test_a_container_may_use_what_its_limit_leaves(tmp_path):
    machine = ease_module.available_bytes(tmp_path / "absent")
    assert machine > 10_000
    for name, content in {
        "memory.max": "10000\n", "memory.current": "7000\n",
        "memory.stat": "anon 6000\ninactive_file 900\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    assert ease_module.available_bytes(tmp_path) == 10_000 - 7000 + 900
    (tmp_path / "memory.max").write_text("max\n")
    assert ease_module.available_bytes(tmp_path) > 10_000


@pytest.mark.parametrize("name", ITEM_ROWS)
def test_items_and_users_that_were_never_trained_on(name):
    # Item 5 is met in visible histories alone; the last two users have no training part.
    histories = [*USERS, [1, 5, 6], [5, 6]]
    found = scores(name, histories, untrained=[1] * 4 + [3, 2])
    assert (found[:, 4] == 0).all() and (found[:, 5] == 0).all()
    assert (found[5] == 0).all()
    if name != "markov":  # which reads the last item alone
        assert np.array_equal(found[4], scores(name, [*USERS, [1, 6]], untrained=[1] * 4 + [2])[4])


@pytest.mark.parametrize(("name", "options"), [("item_knn", {"neighbours": "all"}), ("ease", {})])
def test_items_that_the_same_users_had_tie_exactly(name, options):
    rng = np.random.default_rng(2)  # whoever had an item of 1..20 also had the one 20 above it
    drawn = [rng.integers(1, 21, rng.integers(3, 9)) for _ in range(60)]
    histories = [[*np.stack([items, items + 20], axis=1).ravel(), 41] for items in drawn]
    found = scores(name, histories, titles=[""] * 41, **options)
    assert np.array_equal(found[:, :20], found[:, 20:40])
    assert len(np.unique(found)) > 100


@pytest.mark.parametrize("name", ITEM_ROWS)
def test_a_row_finds_more_than_chance_in_a_run_of_its_own(tmp_path, name, figure):
    folder = train(tmp_path / "run", model__name=name)
    figure(f"HR@10 of {name}", f"{mean(folder, 'HR@10'):.3f}")
    assert mean(folder, "HR@10") > 2 * 10 / 187  # twice chance among the items met
    assert record(folder)["cost"]["trainable_parameters"] == 0


@pytest.mark.parametrize("name", ["recent_popularity", "repeat_history"])
def test_the_other_rows_run_too(tmp_path, name):
    assert 0 <= mean(train(tmp_path / "run", model__name=name), "HR@10") < 1


def test_an_option_of_another_row_is_refused(tmp_path):
    said = refusal(tmp_path / "run", model__name="markov", model__l2=3.0)
    assert "model.l2=3.0 means nothing to model.name=markov" in said

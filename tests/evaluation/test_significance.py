import numpy as np
import pytest

from llmrec.evaluation.significance import bootstrap, compare, holm


def normal(rng, seeds, users=200, seed_sd=0.0, mean=0.0):
    """Per-user values of some seeds: (S, U, 1)."""
    users_part = rng.normal(mean, 0.3, (seeds, users, 1))
    return users_part + rng.normal(0, seed_sd, (seeds, 1, 1))


def test_holm_multiplies_the_smallest_by_the_size_of_the_family_and_keeps_the_order():
    # Sorted .01, .02, .04: x3 = .03, x2 = .04, x1 = .04.
    assert holm(np.array([0.04, 0.01, 0.02])) == pytest.approx([0.04, 0.03, 0.04])


def test_holm_stops_at_one_and_leaves_a_family_of_one_alone():
    assert holm(np.array([0.6, 0.9])).tolist() == [1, 1]
    assert holm(np.array([0.03])).tolist() == [0.03]


def test_an_interval_is_about_two_standard_errors_either_way():
    values = np.random.default_rng(0).normal(1, 0.5, (1, 2500, 1))
    (interval,) = bootstrap(values)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.mean == pytest.approx(1.96 * 0.5 / 50, rel=0.1)
    assert interval.mean - interval.low == pytest.approx(1.96 * 0.5 / 50, rel=0.1)


def test_seed_noise_widens_the_interval():
    rng = np.random.default_rng(0)
    users = rng.normal(0, 0.3, (1, 400, 1))
    calm = bootstrap(np.repeat(users, 3, axis=0))[0]
    noisy = bootstrap(users + np.array([-0.1, 0.0, 0.1])[:, None, None])[0]
    # Seed means -.1, 0, .1: s^2 = .01, so the error grows from .015 to sqrt(.015^2 + .01/3).
    assert noisy.high - noisy.low > 3 * (calm.high - calm.low)


def test_the_same_random_seed_gives_the_same_numbers():
    rng = np.random.default_rng(0)
    a, b = normal(rng, 2), normal(rng, 3)
    assert compare(a, b) == compare(a, b)
    assert bootstrap(a, seed=1) != bootstrap(a, seed=2)


def test_equal_rows_have_p_one_and_no_difference():
    a = np.random.default_rng(0).random((1, 50, 2))
    assert [(c.difference, c.low, c.high, c.p) for c in compare(a, a)] == [(0, 0, 0, 1)] * 2


def test_the_smallest_p_is_one_over_one_more_than_the_flips():
    (found,) = compare(np.ones((1, 100, 1)), np.zeros((1, 100, 1)), flips=999)
    assert found.p == 1 / 1000


def test_few_users_agree_with_all_sign_flips_counted_by_hand():
    # Differences 1, 1, 1: two of the eight sign patterns reach |3|, so p is near 1/4.
    (found,) = compare(np.ones((1, 3, 1)), np.zeros((1, 3, 1)))
    assert found.p == pytest.approx(0.25, abs=0.02)


def test_a_planted_difference_is_found_with_its_interval():
    rng = np.random.default_rng(0)
    shared = rng.random((1, 1000, 1))
    (found,) = compare(shared + normal(rng, 3, 1000, 0.005, 0.06), shared + normal(rng, 3, 1000))
    assert found.p < 0.01
    assert found.low < 0.06 < found.high
    assert found.low > 0


def test_rows_over_different_users_are_refused():
    with pytest.raises(ValueError, match="share users"):
        compare(np.zeros((1, 3, 1)), np.zeros((1, 4, 1)))

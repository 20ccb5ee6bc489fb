"""Can a table be trusted? Rows that differ in nothing, and differences whose size is known."""

import contextlib
import dataclasses
import io
import json
import math
from statistics import NormalDist

import numpy as np
import polars as pl
import pytest
from small_runs import train

from llmrec.evaluation.metrics import Measure
from llmrec.evaluation.result import read_result, write_result
from llmrec.evaluation.significance import compare, holm
from llmrec.reporting.tables import main as compare_runs

ALPHA = 0.05
USERS = 100
NOISE = 0.3
"""Standard deviation of a user's value from seed to seed."""
NORMAL = NormalDist()


def bounds(trials, share, level=0.99):
    """The counts that a share is found with in so many trials, but for 1 % of the time."""
    chances = [
        math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(trials + 1)
    ]
    summed = np.cumsum(chances)
    low, high = np.searchsorted(summed, [(1 - level) / 2, (1 + level) / 2])
    return int(low), int(high)


def test_the_bounds_of_a_fair_coin_are_those_of_the_table():
    # Of 10 throws 0 or 10 heads come up 1 time in 512, 1 or 9 heads 20 times in 1024.
    assert bounds(10, 0.5) == (1, 9)
    assert bounds(200, ALPHA) == (3, 19)


def draw(rng, seeds, ratio, mean=0.0):
    """A row's values, (S, U, 1); its seeds stray `ratio` times as far as their users make them."""
    strays = rng.normal(0, ratio * NOISE / math.sqrt(USERS), (seeds, 1, 1))
    return rng.normal(mean, NOISE, (seeds, USERS, 1)) + strays


def p_of(a, b, seed):
    (found,) = compare(a, b, flips=499, resamples=2, seed=seed)
    return found.p


def flagged(seeds, ratio, pairs=200):
    """How many of the pairs that differ in nothing but seed are called different."""
    rng, hits = np.random.default_rng((seeds, int(10 * ratio))), 0
    for pair in range(pairs):
        taste = rng.random((1, USERS, 1))  # some users are easy, for either row
        rows = [taste + draw(rng, seeds, ratio) for _ in "ab"]
        hits += p_of(*rows, pair) < ALPHA
    return hits


@pytest.mark.parametrize("ratio", [0, 0.5, 1, 1.5])
def test_drawn_rows_of_3_seeds_that_differ_in_nothing_are_flagged_no_more_than_nominal(
    ratio, figure
):
    hits = flagged(3, ratio)
    figure(f"drawn A/A pairs flagged, 3 seeds, seed noise {ratio} x", f"{hits} of 200")
    assert hits <= bounds(200, ALPHA)[1]


def test_drawn_rows_of_one_seed_are_flagged_at_the_nominal_level_where_seeds_add_nothing(figure):
    hits = flagged(1, 0)
    figure("drawn A/A pairs flagged, 1 seed, no seed noise", f"{hits} of 200")
    low, high = bounds(200, ALPHA)
    assert low <= hits <= high


def test_one_seed_cannot_see_seed_noise_which_is_why_a_table_says_one_seed(figure):
    # By arithmetic: noise of sqrt(1 + 1.5^2) = 1.80 judged as 1: P(|N| > 1.96 / 1.80) = .28.
    hits = flagged(1, 1.5)
    figure("drawn A/A pairs flagged, 1 seed, seed noise 1.5 x", f"{hits} of 200")
    low, high = bounds(200, 2 * NORMAL.cdf(-1.96 / math.sqrt(1 + 1.5**2)))
    assert low <= hits <= high


def power(delta, seeds, ratio):
    """The chance that `compare` calls a true difference of `delta` significant.

    With v = NOISE^2 / U the difference of two rows has variance 2 v (1 + ratio^2) / S. The test
    holds it against 2 v / S (what flipping users shows) and, with several seeds, the seeds' own
    variance over S, as found from S values a row: a chi^2 of 2 (S - 1) degrees of freedom, over
    which the chance is averaged.
    """
    v = NOISE**2 / USERS
    true, tested = 2 * v * (1 + ratio**2) / seeds, np.array([2 * v / seeds])
    if seeds > 1:
        shape = seeds - 1  # chi^2 / degrees of freedom = Gamma(shape) / shape
        tested = tested + true * np.random.default_rng(0).gamma(shape, 1 / shape, 4000)
    reach = NORMAL.inv_cdf(1 - ALPHA / 2) * np.sqrt(tested)
    return float(
        np.mean(
            [
                NORMAL.cdf((delta - r) / math.sqrt(true)) + NORMAL.cdf((-delta - r) / true**0.5)
                for r in reach
            ]
        )
    )


def difference_of(wanted, seeds, ratio):
    """The true difference that is found with the wanted power, by halving."""
    low, high = 0.0, 10 * NOISE / math.sqrt(USERS)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, seeds, ratio) < wanted else (low, middle)
    return low


@pytest.mark.parametrize(("seeds", "ratio"), [(1, 0), (3, 0.5)])
@pytest.mark.parametrize("wanted", [0.2, 0.5, 0.9])
def test_a_planted_difference_is_found_as_often_as_computed_beforehand(
    wanted, seeds, ratio, figure
):
    delta = difference_of(wanted, seeds, ratio)
    rng, found = np.random.default_rng((seeds, int(100 * wanted))), 0
    for number in range(300):
        taste = rng.random((1, USERS, 1))
        a, b = taste + draw(rng, seeds, ratio, delta), taste + draw(rng, seeds, ratio)
        found += p_of(a, b, number) < ALPHA
    low, high = bounds(300, wanted)
    figure(
        f"planted {delta:.4f} found, {seeds} seeds, computed power {wanted}",
        f"{found} of 300 ({low} to {high})",
    )
    assert low <= found <= high


def test_holm_keeps_the_chance_of_any_false_finding_among_5_rows_at_the_nominal_level(figure):
    rng, families = np.random.default_rng(0), 300
    wrong, uncorrected = 0, 0
    for family in range(families):
        baseline = draw(rng, 1, 0)
        p = np.array([p_of(draw(rng, 1, 0), baseline, 5 * family + row) for row in range(5)])
        wrong += bool((holm(p) < ALPHA).any())
        uncorrected += bool((p < ALPHA).any())
    figure("families of 5 equal rows with a false finding, Holm", f"{wrong} of {families}")
    figure("the same, uncorrected", f"{uncorrected} of {families}")
    assert wrong <= bounds(families, ALPHA)[1] < uncorrected


def gain(place):
    """NDCG@10 of one user."""
    return 1 / math.log2(place + 1) if place <= 10 else 0.0


def test_the_table_shows_exactly_the_difference_that_was_planted_in_per_user_ranks(tmp_path):
    first = read_result(train(tmp_path / "first"))
    ahead = first.per_user["greater"].to_list()
    assert first.per_user["equal"].sum() == 0  # nobody is tied
    # The target of every user goes up by 20 places, or to the top.
    up = [max(0, g - 20) for g in ahead]
    second = dataclasses.replace(
        first,
        record=first.record | {"label": "moved"},
        per_user=first.per_user.with_columns(
            pl.Series("greater", up, dtype=first.per_user["greater"].dtype)
        ),
    )
    write_result(tmp_path / "second", second)
    out = tmp_path / "table.json"
    folders = [str(tmp_path / name) for name in ("first", "second")]
    assert compare_runs([*folders, "--json", str(out)]) == 0
    shown = json.loads(out.read_text())["rows"][1]["difference"]
    hits = sum((b < 10) - (a < 10) for a, b in zip(ahead, up, strict=True))
    gains = sum(gain(b + 1) - gain(a + 1) for a, b in zip(ahead, up, strict=True))
    assert hits > 0
    assert shown["HR@10"]["difference"] == pytest.approx(hits / 61, abs=1e-12)
    assert shown["NDCG@10"]["difference"] == pytest.approx(gains / 61, abs=1e-12)


MEASURES = (Measure.parse("HR@10"), Measure.parse("NDCG@10"))


def trained(folder, seed):
    """Per-user values of one real run of half a second, (U, M)."""
    with contextlib.redirect_stderr(io.StringIO()):
        run = train(
            folder, run__seed=seed, data__simulated__users=600, model__width=32, optim__lr=0.003,
            optim__epochs=6, optim__batch_size=64,
        )  # fmt: skip
    return read_result(run).values(MEASURES)


@pytest.mark.slow
def test_of_20_pairs_of_real_rows_that_differ_only_in_seed_at_most_2_are_flagged(tmp_path, figure):
    """120 runs, none used twice; flagged: p < .05 for NDCG@10, uncorrected."""
    values = np.stack([trained(tmp_path / str(seed), seed) for seed in range(120)])  # (120, U, M)
    rows = values.reshape(40, 3, *values.shape[1:])  # 40 rows of 3 seeds

    def flags(a, b):
        return np.array([[c.p < ALPHA for c in compare(*pair)] for pair in zip(a, b, strict=True)])

    several = flags(rows[::2], rows[1::2]).sum(axis=0)  # (M,)
    alone = flags(values[::2, None], values[1::2, None]).sum(axis=0)
    # How far a seed's mean strays, and how far its users alone would make it.
    means = values.mean(axis=1).var(axis=0, ddof=1)
    users = values.var(axis=0, ddof=1).mean(axis=0) / values.shape[1]
    for m, measure in enumerate(MEASURES):
        figure(f"real A/A pairs flagged on {measure}, 3 seeds", f"{several[m]} of 20")
        figure(f"real A/A pairs flagged on {measure}, 1 seed", f"{alone[m]} of 60")
        ratio = math.sqrt(max(0.0, means[m] / users[m] - 1))
        figure(f"real seed noise of {measure}, times the users'", f"{ratio:.2f}")
    assert values.shape[1] > 500 and several[1] <= 2

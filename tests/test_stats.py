"""Accuracies, intervals and comparisons: agreement with scipy where it has them, coverage by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmark.stats import (
    _beyond,
    accuracy,
    compare,
    majority_rule,
    mean_rule,
    pairwise,
    ranks,
    sign_flips,
    worst_rule,
)  # fmt: skip

DRAWS, N = 9, 64


@pytest.mark.parametrize("n", [1, 2, 32, 256])
def test_one_draw_gives_wilsons_interval(n):
    for right in sorted({0, 1, n // 3, n - 1, n}):
        interval = accuracy(np.r_[np.ones(right), np.zeros(n - right)], 1)
        expected = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
        assert interval.mean == right / n
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.lists(st.integers(0, DRAWS), min_size=1, max_size=80))
def test_an_interval_lies_between_n_and_n_times_draws_worth_of_images(right):
    """Never narrower than if all draws were images, never wider than if each image had one draw."""
    shares = np.array(right) / DRAWS
    n, m = len(shares), shares.mean()
    interval = accuracy(shares, DRAWS)

    def wilson(k):
        z = stats.norm.ppf(0.975)
        half = z / (1 + z * z / k) * np.sqrt(m * (1 - m) / k + z * z / (4 * k * k))
        return 2 * half

    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    width = interval.high - interval.low
    assert wilson(n * DRAWS) - 1e-9 <= width <= wilson(n) + 1e-9


def test_draws_that_agree_are_worth_one_and_independent_draws_are_worth_all():
    agreeing = np.repeat([0.0, 1.0], N // 2)
    assert accuracy(agreeing, DRAWS) == accuracy(agreeing, 1)
    equal = np.full(N, 1 / 3)
    assert accuracy(equal, DRAWS) == accuracy(equal, 1)  # no variance measured: nothing is claimed
    mixed = np.random.default_rng(0).binomial(DRAWS, 0.5, N) / DRAWS
    narrow, wide = accuracy(mixed, DRAWS), accuracy(mixed, 1)
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)


def test_no_images_no_accuracy():
    with pytest.raises(ValueError, match="at least one image"):
        accuracy(np.array([]), DRAWS)


def coverage(m: float, concentration: float, n: int, studies: int = 500) -> float:
    """How often the interval of a study of n images, p_i ~ Beta of mean m, 9 draws each, holds m."""
    rng = np.random.default_rng(round(1000 * m) + round(10 * concentration))
    p = rng.beta(m * concentration, (1 - m) * concentration, (studies, n))
    intervals = [accuracy(shares, DRAWS) for shares in rng.binomial(DRAWS, p) / DRAWS]
    return float(np.mean([i.low <= m <= i.high for i in intervals]))


@pytest.mark.parametrize("concentration", [0.1, 1.0, 10.0, 100.0], ids=lambda c: f"concentration={c}")
@pytest.mark.parametrize("m", [0.05, 0.2, 0.5, 0.8, 0.95])
def test_coverage(m, concentration):
    """At least 92 % of studies of 64 images, give or take 500 studies' own error, draws alike or independent.

    Near 0 and 1 the interval is wider than it need be where draws are independent: it errs on that side.
    """
    assert 0.91 <= coverage(m, concentration, N) <= (0.985 if 0.1 < m < 0.9 else 1)


@pytest.mark.parametrize("concentration", [0.1, 1.0, 10.0], ids=lambda c: f"concentration={c}")
@pytest.mark.parametrize("m, n, least", [(0.01, 64, 0.92), (0.99, 64, 0.92), (0.01, 256, 0.92), (0.99, 256, 0.92)])
def test_coverage_where_less_than_three_images_decide(m, n, least, concentration):
    """Where n·min(m, 1 - m) is below 3 the spread of so few images is hardly measured; two added images steady it."""
    assert coverage(m, concentration, n) >= least


def test_the_interval_that_ignores_clusters_would_fail_the_same_simulation():
    rng = np.random.default_rng(0)
    p = rng.beta(0.05, 0.05, (500, N))
    shares = rng.binomial(DRAWS, p) / DRAWS
    pooled = [stats.binomtest(round(s.sum() * DRAWS), N * DRAWS).proportion_ci(0.95, "wilson") for s in shares]
    assert np.mean([i.low <= 0.5 <= i.high for i in pooled]) < 0.7


PREDICTED = np.array([[1, 1, 2], [1, 2, 2], [1, 2, 3], [2, 2, 2], [1, 1, 1], [-1, -1, 1], [1, 1, -1], [-1, -1, -1]])
LABEL = np.ones(len(PREDICTED), dtype=int)


def test_majority_rule():
    """Strictly more votes than any other class; a tie is wrong; draws that weren't finite vote for no class."""
    assert majority_rule(PREDICTED, LABEL).tolist() == [1, 0, 0, 0, 1, 0, 1, 0]
    assert majority_rule(np.array([[0, 0, 1, 1]]), np.array([0])).tolist() == [0]
    assert majority_rule(np.array([[0, 0, 1, 1]]), np.array([1])).tolist() == [0]
    assert majority_rule(np.array([[0, 0]]), np.array([7])).tolist() == [0]


def test_mean_and_worst_rules():
    correct = PREDICTED == LABEL[:, None]
    assert mean_rule(correct) == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0, 1, 1 / 3, 2 / 3, 0])
    assert worst_rule(correct).tolist() == [0, 0, 0, 0, 1, 0, 0, 0]


@given(
    st.lists(st.lists(st.integers(-1, 4), min_size=7, max_size=7), min_size=1, max_size=20),
    st.integers(0, 4),
    st.permutations(range(7)),
)
def test_laws_of_the_rules(predicted, label, order):
    predicted = np.array(predicted)
    labels = np.full(len(predicted), label)
    correct = predicted == labels[:, None]
    mean, majority, worst = mean_rule(correct), majority_rule(predicted, labels), worst_rule(correct)
    assert (worst <= mean).all() and (worst <= majority).all()
    assert (majority[mean > 0.5] == 1).all() and (majority[mean <= 1 / 7] == 0)[mean[mean <= 1 / 7] == 0].all()
    shuffled = predicted[:, order]
    assert (majority_rule(shuffled, labels) == majority).all()
    assert (majority_rule(predicted[:, :1], labels) == correct[:, 0]).all()


def test_compare_is_zero_for_equals_and_antisymmetric():
    rng = np.random.default_rng(0)
    a, b = rng.binomial(DRAWS, 0.5, (2, N)) / DRAWS
    same = compare(a, a)
    assert same.difference == 0 and same.p == 1 and same.low == -same.high < 0, "an image not seen may differ"
    forward, backward = compare(a, b), compare(b, a)
    assert forward.difference == pytest.approx(a.mean() - b.mean())
    assert forward.difference == -backward.difference and forward.low == pytest.approx(-backward.high, abs=0.02)
    assert forward.p == pytest.approx(backward.p, abs=0.02)
    assert compare(a, b) == forward


def test_compare_agrees_with_all_sign_flips():
    d = np.array([0.5, 0.25, -0.125, 0.375, 0.0625, -0.25, 0.75, 0.1])
    flips = np.array([np.mean(np.array(s) * d) for s in itertools.product((-1, 1), repeat=len(d))])
    exact = (abs(flips) >= d.mean() - 1e-12).mean()
    assert compare(d, np.zeros(8)).p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 10_000))


def test_p_under_the_null_falls_below_a_level_as_often_as_the_level_says():
    rng = np.random.default_rng(1)
    p = rng.beta(1, 1, (400, 48))
    a, b = rng.binomial(DRAWS, p) / DRAWS, rng.binomial(DRAWS, p) / DRAWS
    values = np.array([compare(x, y, flips=400, seed=i).p for i, (x, y) in enumerate(zip(a, b, strict=True))])
    for level in (0.05, 0.1, 0.25, 0.5):
        assert abs((values <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / len(values))


def test_compare_detects_a_shift_and_its_interval_holds_it():
    rng = np.random.default_rng(2)
    p = rng.uniform(0.1, 0.8, 256)
    result = compare(rng.binomial(DRAWS, p + 0.1) / DRAWS, rng.binomial(DRAWS, p) / DRAWS)
    assert result.p < 0.001 and 0 < result.low < 0.1 < result.high < 0.2


RARE = {  # of n images, by draws, how often only A is right, and only B
    "n64-2%": (64, 1, 0.02, 0.0), "n256-1%": (256, 1, 0.01, 0.0), "n32-10%": (32, 1, 0.1, 0.03),
    "n64-30%": (64, 1, 0.3, 0.1), "n64-3%-draws": (64, 9, 0.03, 0.0), "n256-3%-draws": (256, 9, 0.03, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("n, draws, up, down", RARE.values(), ids=RARE)
def test_the_interval_of_a_difference_covers_it_where_few_images_differ(n, draws, up, down):
    rng, tries = np.random.default_rng(3), 400
    covered = 0
    for _ in range(tries):
        p = rng.beta(0.05, 0.05, n)
        base = rng.binomial(draws, p) / draws if draws > 1 else np.full(n, 0.5)
        again = rng.binomial(draws, p) / draws if draws > 1 else base
        d = rng.choice((1.0, -1.0, 0.0), n, p=(up, down, 1 - up - down)) * (p if draws > 1 else 1)
        found = compare(again + d, base, flips=1)
        covered += found.low <= (up - down) * (0.5 if draws > 1 else 1) <= found.high
    assert covered / tries >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / tries)


def test_p_goes_below_what_flips_can_count_and_never_below_what_all_of_them_give():
    rng = np.random.default_rng(4)
    for _ in range(50):
        d = rng.choice((-0.5, 0.25, 0.5, 1.0), 10) * rng.random(10)
        flips = np.array(list(itertools.product((-1, 1), repeat=10))) @ d
        assert (abs(flips) >= abs(d.sum()) - 1e-9).mean() <= _beyond(d[None])[0] + 1e-12
        assert (flips >= d.sum() - 1e-9).mean() <= _beyond(d[None], one_sided=True)[0] + 1e-12
    assert compare(np.ones(64), np.zeros(64), flips=100).p < 1e-12
    assert sign_flips(np.ones((1, 64)), flips=100)[0] < 1e-12
    assert pairwise(np.stack([np.ones(64), np.zeros(64)]), flips=100)[0, 1] < 1e-12


@pytest.mark.parametrize("k", [2, 6])
def test_equal_defenses_are_seldom_ranked_apart(k):
    rng, tries = np.random.default_rng(5), 150
    apart = 0
    for _ in range(tries):
        p = rng.beta(0.3, 0.3, 64)
        apart += max(ranks(rng.binomial(DRAWS, p, (k, 64)) / DRAWS)) > 1
    assert apart <= 15, "of 150 with probability 0.05 each, more than 15 has probability 0.003"


def test_a_pair_that_differs_is_told_apart_among_many_that_dont():
    rng = np.random.default_rng(6)
    p = rng.uniform(0.1, 0.8, 256)
    scores = rng.binomial(DRAWS, np.stack([p, p, p + 0.15, p, p])) / DRAWS
    found = pairwise(scores)
    assert np.array_equal(found, found.T) and (np.diag(found) == 1).all()
    assert (np.delete(found[2], 2) < 0.001).all() and np.delete(np.delete(found, 2, 0), 2, 1).min() > 0.05
    assert ranks(scores) == [2, 2, 1, 2, 2]


def test_compare_needs_the_same_images():
    with pytest.raises(ValueError, match="the same images, got 3 and 4"):
        compare(np.zeros(3), np.zeros(4))

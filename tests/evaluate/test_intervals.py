"""Intervals over examples: against SciPy and their definitions, and how often they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from jaxmoo.evaluate.intervals import (
    SMALLEST,
    Differences,
    mean_proportion_difference,
    proportion,
    proportion_difference,
    studentised_mean,
)


@pytest.mark.parametrize(("k", "n"), [(0, 16), (5, 16), (50, 50), (163, 200)])
def test_shares_have_the_score_interval_of_scipy(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert proportion(k, n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(0, 0, 16), (3, 0, 16), (1, 9, 16), (5, 5, 50), (16, 0, 16)]
)
def test_differences_of_shares_are_what_a_score_test_does_not_reject(gained, lost, n):
    """The test's variance is that of the likeliest shares, found here by a search."""

    def rejected(difference):
        def surprise(both):  # minus the log-likelihood; `both`: share of `gained` and of `lost`
            parts = (both + difference) / 2, (both - difference) / 2, 1 - both
            counts = gained, lost, n - gained - lost
            return -sum(c * math.log(max(p, 1e-300)) for c, p in zip(counts, parts, strict=True))

        both = optimize.minimize_scalar(
            surprise, bounds=(abs(difference), 1), method="bounded", options={"xatol": 1e-12}
        ).x
        z = (gained - lost - n * difference) / math.sqrt(n * (both - difference**2))
        return abs(z) - stats.norm.ppf(0.975)

    low, high = proportion_difference(gained, lost, n)
    assert low <= (gained - lost) / n <= high
    for end in (low, high):
        if abs(end) < 1:
            assert rejected(end) == pytest.approx(0, abs=1e-3)
    flipped = proportion_difference(lost, gained, n)
    assert flipped == pytest.approx((-high, -low))


def shares(rng, n, gained=0.2, lost=0.1, units=None):
    values = rng.choice([1.0, -1.0, 0.0], n, p=[gained, lost, 1 - gained - lost])
    return Differences(values, np.ones(n), units or [f"{rng.integers(1 << 60)}" for _ in range(n)])


def test_means_of_shares_put_languages_together():
    rng = np.random.default_rng(0)
    one = shares(rng, 60)
    alone = mean_proportion_difference([one])
    # Twice the same of the same examples tells no more; of others, as much more as there are.
    assert mean_proportion_difference([one, one]) == pytest.approx(alone)
    other = one._replace(units=list(range(60)))
    low, high = mean_proportion_difference([one, other])
    assert high - low == pytest.approx((alone[1] - alone[0]) / math.sqrt(2))
    # Copies that are drawn together are no further examples.
    copied = Differences(*(np.repeat(np.array(part), 3) for part in one))
    low, high = mean_proportion_difference([copied])
    assert high - low == pytest.approx(alone[1] - alone[0], rel=0.03)
    assert math.isnan(mean_proportion_difference([one._replace(units=["a"] * 60)])[0])


def test_the_bootstrap_is_that_of_scipy():
    """Of the same distances from the mean in standard errors, by SciPy's resampling."""
    rng = np.random.default_rng(1)
    below = rng.integers(2, 40, 50).astype(float)
    values = below * rng.exponential(0.5, 50)
    mean = values.sum() / below.sum()

    def distance(values, below, axis=-1):
        total = below.sum(axis, keepdims=True)
        found = values.sum(axis, keepdims=True) / total
        error = np.sqrt(((values - found * below) ** 2).sum(axis, keepdims=True) * 50 / 49) / total
        return ((found - mean) / error).squeeze(axis)

    distances = stats.bootstrap(
        (values, below), distance, paired=True, n_resamples=20_000, method="percentile",
        rng=np.random.default_rng(0),
    ).bootstrap_distribution  # fmt: skip
    error = np.sqrt(((values - mean * below) ** 2).sum() * 50 / 49) / below.sum()
    low, high = studentised_mean([Differences(values, below, range(50))], resamples=20_000)
    t = stats.t.ppf(0.975, 49)
    assert low == pytest.approx(mean - error * max(np.quantile(distances, 0.975), t), rel=0.02)
    assert high == pytest.approx(mean - error * min(np.quantile(distances, 0.025), -t), rel=0.02)


def test_blocks_of_resamples_leave_no_trace(monkeypatch):
    rng = np.random.default_rng(2)
    one = Differences(rng.normal(size=30), np.ones(30), range(30))
    other = one._replace(units=[f"x{i}" for i in range(30)])
    whole = studentised_mean([one, other], resamples=500)
    monkeypatch.setattr("jaxmoo.evaluate.intervals._BLOCK", 30 * 7)
    assert studentised_mean([one, other], resamples=500) == pytest.approx(whole)


def test_too_few_examples_have_no_interval():
    def of(n):
        return Differences(np.arange(n, dtype=float), np.ones(n), range(n))

    assert math.isnan(studentised_mean([of(SMALLEST - 1)])[0])
    assert math.isnan(studentised_mean([of(40), of(SMALLEST - 1)])[1])
    assert math.isfinite(studentised_mean([of(SMALLEST)])[0])


@pytest.mark.parametrize("n", [16, 50])
def test_intervals_hold(n):
    """As often as they say, on few and unequal examples; benchmarks/intervals.py has it at length.

    The bounds leave room for chance: with 200 trials the standard error is 0.015.
    """
    rng = np.random.default_rng(n)
    held = {"share": 0, "likelihood": 0}
    for _ in range(200):
        low, high = mean_proportion_difference([shares(rng, n)])
        held["share"] += low <= 0.1 <= high
        below = rng.integers(2, 40, n).astype(float)
        values = below * (rng.gamma(1, 1, n) - 1)
        low, high = studentised_mean([Differences(values, below, range(n))], resamples=300)
        held["likelihood"] += low <= 0 <= high
    assert held["share"] >= 0.92 * 200 and held["likelihood"] >= 0.9 * 200

"""Intervals, tests and the choice of learning rates, against SciPy and by definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from jaxmoo.config.study_config import StudyConfig
from jaxmoo.study.grid import Key
from jaxmoo.study.outcome import outcomes
from jaxmoo.study.statistics import (
    Influence,
    components,
    estimate,
    holm,
    mean_interval,
    variance_terms,
)


@pytest.mark.parametrize("n", [3, 10])
def test_intervals_and_p_values_are_those_of_scipy(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(1.0, 0.3, n), rng.normal(1.2, 0.3, n)
    found = mean_interval(list(a))
    expected = stats.t.interval(0.95, n - 1, loc=a.mean(), scale=stats.sem(a))
    np.testing.assert_allclose([found.low, found.high], expected)
    paired = mean_interval(list(b - a))
    assert paired.p == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert paired.mean == pytest.approx((b - a).mean())
    for bound in (0.1, 0.5):
        above = stats.ttest_1samp(b - a, bound, alternative="less").pvalue
        below = stats.ttest_1samp(b - a, -bound, alternative="greater").pvalue
        assert paired.p_equivalent(bound) == pytest.approx(max(above, below))
        assert paired.p_below(bound) == pytest.approx(above)


def test_too_few_values_have_no_interval_and_no_test():
    assert mean_interval([2.0]).half == math.inf
    two = mean_interval([1.0, 1.5])
    assert math.isfinite(two.half) and math.isnan(two.p) and math.isnan(two.p_equivalent(9.0))
    assert mean_interval([0.0] * 3).p == 1 and mean_interval([1.0] * 3).p == 0
    assert mean_interval([1.0] * 3).p_equivalent(2.0) == 0


def mean_squares(scores):
    """Of a balanced crossed design, by sets of its axes: sums of squares of what they add."""
    found, left = {}, {(): np.full_like(scores, scores.mean())}
    axes = range(scores.ndim)
    for order in range(1, scores.ndim + 1):
        for which in itertools.combinations(axes, order):
            others = tuple(axis for axis in axes if axis not in which)
            part = scores.mean(others, keepdims=True) + np.zeros_like(scores)
            part = part - sum(one for key, one in left.items() if set(key) < set(which))
            left[which] = part
            freedom = math.prod(scores.shape[axis] - 1 for axis in which)
            found[which] = float(np.sum(part**2)) / freedom
    return found


def study(rng, seeds=4, languages=6, units=30, parts=(0.3, 0.3, 0.2, 1.0, 0.7, 0.5, 1.0)):
    """Differences [seeds, languages, units]; deviations of s, l, sl, u, lu, su, slu."""
    shapes = [
        (seeds, 1, 1), (1, languages, 1), (seeds, languages, 1), (1, 1, units),
        (1, languages, units), (seeds, 1, units), (seeds, languages, units),
    ]  # fmt: skip
    return sum(d * rng.normal(size=shape) for d, shape in zip(parts, shapes, strict=True))


def parts_of(scores, parallel=True):
    differences = scores.mean(2)
    values = (scores - differences[:, :, None]) / scores.shape[2]
    units = range(scores.shape[2])
    return differences, [
        Influence(values[:, i], units if parallel else [(i, unit) for unit in units])
        for i in range(scores.shape[1])
    ]


def test_parallel_examples_have_the_variance_of_a_crossed_design():
    """Seeds, languages and examples crossed: the mean squares in turns, over the number."""
    scores = study(np.random.default_rng(0))
    squares = mean_squares(scores)
    variance = sum((-1) ** (len(key) + 1) * square for key, square in squares.items())
    parts = components(*parts_of(scores))
    terms = variance_terms(parts, other_languages=True)
    assert len(terms) == 4, "seeds, languages, both, examples that languages share"
    assert sum(term for term, _ in terms) == pytest.approx(variance / scores.size)
    # Of given languages, their mean is what varies, over seeds and examples.
    squares = mean_squares(scores.mean(1))
    variance = squares[0,] + squares[1,] - squares[0, 1]
    terms = variance_terms(parts, other_languages=False)
    assert sum(term for term, _ in terms) == pytest.approx(variance / scores[:, 0].size)


def test_the_variance_is_that_of_a_mixed_model():
    """With effects of seeds and languages, by restricted maximum likelihood (examples nested)."""
    differences, influences = parts_of(study(np.random.default_rng(1)), parallel=False)
    rows, columns = (one.ravel() for one in np.indices(differences.shape))
    y, ones = differences.ravel(), np.ones(differences.size)

    def covariance(logs):
        a, b, c = np.exp(logs)
        same = (a * (rows[:, None] == rows), b * (columns[:, None] == columns))
        return same[0] + same[1] + c * np.eye(len(y))

    def likelihood(logs):
        inverse = np.linalg.inv(covariance(logs))
        precision = ones @ inverse @ ones
        left = y - ones @ inverse @ y / precision
        return np.linalg.slogdet(covariance(logs))[1] + np.log(precision) + left @ inverse @ left

    best = optimize.minimize(likelihood, np.full(3, -2.0), method="Nelder-Mead", tol=1e-9).x
    expected = 1 / math.sqrt(ones @ np.linalg.inv(covariance(best)) @ ones)
    found = estimate(differences, influences)
    assert found.error == pytest.approx(expected, rel=1e-4)
    assert found.mean == pytest.approx(y.mean())


def test_other_languages_are_never_surer_than_these():
    rng = np.random.default_rng(2)
    for _ in range(20):
        parts = parts_of(study(rng, seeds=3, parts=rng.random(7)))
        assert estimate(*parts).half >= estimate(*parts, other_languages=False).half
    few = parts_of(study(rng, languages=2))
    assert estimate(*few) == estimate(*few, other_languages=False), "two tell nothing of others"


@pytest.mark.parametrize("parallel", [True, False])
def test_intervals_of_studies_hold(parallel):
    """As often as they say; benchmarks/intervals.py has it at length.

    Each counts what varies: leaving out examples, or languages, would hold in 30 to 80 %.
    """
    rng = np.random.default_rng(int(parallel))
    held = given = 0
    for _ in range(400):
        languages = 0.1 * rng.normal(size=5)
        scores = study(rng, 3, 5, 20, (0.05, 0, 0.05, 0.5 * parallel, 0.5, 0.1, 0.3))
        parts = parts_of(scores + languages[:, None], parallel)
        held += abs(estimate(*parts).mean) <= estimate(*parts).half
        here = estimate(*parts, other_languages=False)
        given += abs(here.mean - languages.mean()) <= here.half
    assert held >= 0.92 * 400 and given >= 0.92 * 400


def test_holm_against_its_definition():
    """Reject in order of p while p <= alpha / (number left); an adjusted p is the least alpha."""
    p = {"a": 0.012, "b": 0.2, "c": 0.011, "d": 0.03}
    adjusted = holm(p)
    assert list(adjusted) == list(p)
    for alpha in np.linspace(0.001, 0.999, 500):
        rejected = set()
        for left, name in zip(range(len(p), 0, -1), sorted(p, key=p.get), strict=True):
            if p[name] > alpha / left:
                break
            rejected.add(name)
        assert {name for name in p if adjusted[name] <= alpha} == rejected


def row(arm, seed, rate, tune, report):
    """A row whose seen language has these likelihoods, and whose unseen one says the opposite."""
    seen = {"tune": {"nll": tune}, "report": {"nll": report}, "all": {"nll": 99.0}}
    unseen = {"tune": {"nll": -tune}, "report": {"nll": 7.0}, "all": {"nll": 99.0}}
    languages = {"en": seen, "fi": unseen}
    return {
        "arm": arm, "seed": seed, "learning_rate": rate,
        "seen": ["en"], "unseen": ["fi"], "languages": languages,
    }  # fmt: skip


def test_learning_rates_are_chosen_on_other_examples_than_are_reported():
    study = StudyConfig(
        output="", base="", arms={"a": [], "b": []}, baseline="a", seeds=[1, 2],
        learning_rates=[0.1, 0.2],
    )  # fmt: skip
    rows = [
        row("a", 1, 0.1, tune=1.0, report=5.0),
        row("a", 1, 0.2, tune=2.0, report=3.0),
        row("a", 2, 0.1, tune=1.5, report=6.0),
        row("a", 2, 0.2, tune=0.6, report=4.0),
        # Seed 2 lacks a learning rate: it is neither chosen by nor reported.
        row("b", 1, 0.1, tune=2.0, report=1.0),
        row("b", 1, 0.2, tune=1.0, report=2.0),
        row("b", 2, 0.1, tune=0.0, report=0.0),
    ]
    stored = {Key(r["arm"], r["seed"], r["learning_rate"]): r for r in rows}
    found = outcomes(study, stored)
    assert found["a"].tuned == {0.1: 1.25, 0.2: 1.3}
    assert found["a"].learning_rate == 0.1
    assert found["a"].scores("nll", "seen") == {1: 5.0, 2: 6.0}
    assert found["a"].scores("nll", "worst") == {1: 7.0, 2: 7.0}
    assert found["b"].learning_rate == 0.2
    assert found["b"].scores("nll", "seen") == {1: 2.0}

    one = StudyConfig(
        output="", base="", arms={"a": [], "b": []}, baseline="a", seeds=[1], learning_rates=[0.1]
    )
    assert outcomes(one, stored)["a"].scores("nll", "seen") == {1: 99.0}  # nothing was chosen

"""Intervals, tests and the choice of learning rates, against SciPy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxmoo.config.study_config import StudyConfig
from jaxmoo.study.grid import Key
from jaxmoo.study.outcome import outcomes
from jaxmoo.study.statistics import holm, mean_interval, paired_difference


@pytest.mark.parametrize("n", [2, 3, 10])
def test_intervals_and_p_values_are_those_of_scipy(n):
    from scipy import stats

    rng = np.random.default_rng(n)
    a, b = rng.normal(1.0, 0.3, n), rng.normal(1.2, 0.3, n)
    found = mean_interval(list(a))
    low, high = stats.t.interval(0.95, n - 1, loc=a.mean(), scale=stats.sem(a))
    np.testing.assert_allclose([found.mean - found.half, found.mean + found.half], [low, high])
    paired = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    assert paired.p == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert paired.mean == pytest.approx((b - a).mean())


def test_too_few_values_have_no_interval():
    assert mean_interval([2.0]) == (2.0, math.inf, 1.0, (2.0,))
    assert mean_interval([0.0, 0.0]).p == 1 and mean_interval([1.0, 1.0]).p == 0
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


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

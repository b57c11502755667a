"""Mixtures: k different languages a step, each as often as its share says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoo.data.batches import LanguageBatches
from jaxmoo.data.mixture import Mixture, inclusion_probabilities, shares
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.errors import ConfigError


@settings(max_examples=30, deadline=None)
@given(st.data(), st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.integers(0, 2**31))
def test_a_step_has_k_different_languages_and_counting_them_agrees(data, weights, seed):
    k = data.draw(st.integers(1, len(weights)))
    mixture = Mixture(weights, k, seed)
    taken = np.zeros(len(weights), int)
    for step in range(1020, 1030):  # across the border of a block
        before = mixture.taken(step)
        if step > 1020:
            assert (before == taken).all()
        here = mixture.languages(step)
        assert len(set(here.tolist())) == k and (np.diff(here) > 0).all()
        taken = before
        taken[here] += 1
    assert mixture.probabilities.sum() == pytest.approx(k) and (mixture.probabilities <= 1).all()


@pytest.mark.parametrize(("weights", "k"), [([4, 2, 1, 1], 2), ([20, 3, 2, 1, 1], 3), ([1, 1], 1)])
def test_languages_are_taken_as_often_as_their_shares_say(weights, k):
    mixture, steps = Mixture(weights, k, seed=3), 20_000
    expected = inclusion_probabilities(weights, k)
    # Four standard deviations of independent draws.
    error = 4 * np.sqrt(np.maximum(expected * (1 - expected), 1e-12) / steps)
    assert (np.abs(mixture.taken(steps) / steps - expected) <= error).all()


def test_below_the_ceiling_probabilities_are_in_proportion():
    assert inclusion_probabilities([4, 2, 1, 1], 2).tolist() == [1, 0.5, 0.25, 0.25]
    assert inclusion_probabilities([8, 4, 1, 1], 2).tolist() == [1, 2 / 3, 1 / 6, 1 / 6]


def test_temperature_evens_shares_out():
    sizes = {"en": 1000, "fa": 10}
    assert shares(sizes, 1.0)["en"] == pytest.approx(1000 / 1010)
    assert shares(sizes, 3.0)["en"] == pytest.approx(10 / (10 + 10 ** (1 / 3)))
    assert shares(sizes, 1e9)["en"] == pytest.approx(0.5)


def test_all_of_all_is_every_language_in_every_step():
    mixture = Mixture([5, 1, 1], 3, seed=0)
    assert all(mixture.languages(step).tolist() == [0, 1, 2] for step in range(50))


def test_bad_mixtures_are_refused():
    with pytest.raises(ConfigError, match=r"expected 1 to 2.*found 3"):
        Mixture([1, 1], 3, 0)
    with pytest.raises(ConfigError, match="above 0"):
        Mixture([1, 0], 1, 0)


def numbered(count):
    return [Tokenized(np.full(3, i, np.int32), np.arange(3) > 0, 3, 3) for i in range(count)]


def test_a_sampled_language_goes_on_where_it_stopped():
    """Every language shows its examples in the order it has when it takes part in all steps."""
    data = {"en": numbered(9), "fa": numbered(5), "zh": numbered(30)}
    codes = list(data)
    options = {"per_step": 2, "shares": {"en": 3.0, "fa": 1.0, "zh": 1.0}}
    some = LanguageBatches(data, codes, 2, 4, 0, **options)
    every = LanguageBatches(data, codes, 2, 4, 0)
    taken = dict.fromkeys(codes, 0)
    for step in range(40):
        batch = some.batch(step)
        here = some.in_step(step)
        assert batch["tokens"].shape == (2, 2, 4)
        assert (batch["language"] == np.array([[codes.index(c)] for c in here])).all()
        for k, code in enumerate(here):
            expected = every.batch(taken[code])["tokens"][codes.index(code)]
            assert batch["tokens"][k].tolist() == expected.tolist()
            taken[code] += 1
    assert some.epochs(40) == {c: 2 * taken[c] / len(data[c]) for c in codes}
    fresh = LanguageBatches(data, codes, 2, 4, 0, **options)
    assert (fresh.batch(39)["tokens"] == some.batch(39)["tokens"]).all()

"""Silhouettes equal scikit-learn's; intervals and retrieval mean what they say."""

import numpy as np
import pytest

from jaxmoo.analysis.separability import METRICS, distances, retrieval, separability, silhouettes


def points(languages: int, count: int, *, apart: float, seed: int = 0) -> np.ndarray:
    """Sentences that share a meaning, plus what is the language's own."""
    rng = np.random.default_rng(seed)
    meaning, own = rng.normal(size=(1, count, 12)), rng.normal(size=(languages, 1, 12))
    return meaning + apart * own + 0.3 * rng.normal(size=(languages, count, 12)) + 1.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("apart", [0.0, 0.7, 3.0])
def test_the_silhouette_is_that_of_scikit_learn(metric, apart):
    from sklearn.metrics import silhouette_score

    x = points(4, 15, apart=apart)
    labels = np.repeat(np.arange(4), 15)
    expected = silhouette_score(x.reshape(60, -1), labels, metric=metric)
    found = silhouettes(distances(x, metric), np.ones((15, 1)))
    assert found[0] == pytest.approx(expected, abs=1e-10)


def test_drawing_a_part_of_the_sentences_is_measuring_that_part():
    x = points(3, 12, apart=1.0)
    counts = np.array([1, 0] * 6)[:, None]
    expected = silhouettes(distances(x[:, ::2], "cosine"), np.ones((6, 1)))
    assert silhouettes(distances(x, "cosine"), counts) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_bootstrap_samples_are_not_better_or_worse_separated_than_the_data(metric):
    from sklearn.metrics import silhouette_score

    count, samples = 15, 400
    x = points(4, count, apart=0.7)
    rng = np.random.default_rng(1)
    draws = rng.integers(0, count, (count, samples))
    counts = np.stack([np.bincount(d, minlength=count) for d in draws.T], axis=1)
    apart = distances(x, metric)
    value = silhouettes(apart, np.ones((count, 1)))[0]
    found = silhouettes(apart, counts)
    assert abs(found.mean() - value) < 0.5 * found.std()
    # Scored as if copies were other sentences, samples look much better separated.
    labels = np.repeat(np.arange(4), count)
    plain = [
        silhouette_score(x[:, d].reshape(-1, x.shape[-1]), labels, metric=metric)
        for d in draws.T[:40]
    ]
    assert np.mean(plain) - value > 0.5 * found.std()


def test_intervals_hold_the_value_and_shrink_with_more_sentences():
    wide, narrow = (separability(points(4, n, apart=0.7), samples=100) for n in (30, 150))
    for found in (wide, narrow):
        for interval in (*found.silhouette.values(), found.retrieval):
            assert interval.low <= interval.value <= interval.high
    a, b = (f.silhouette["euclidean"] for f in (wide, narrow))
    assert b.high - b.low < 0.7 * (a.high - a.low)


def test_languages_that_share_all_directions_are_not_separable_and_translations_are_found():
    near, far = (separability(points(4, 30, apart=a), samples=10) for a in (0.0, 3.0))
    for metric in METRICS:
        assert near.silhouette[metric].value < 0.05 < 0.5 < far.silhouette[metric].value
    assert near.retrieval.value == 1 and far.retrieval.value < 0.5
    assert near.retrieval_pairs[0, 1] == 1 and np.isnan(near.retrieval_pairs[1, 1])


def test_retrieval_finds_the_nearest_by_cosine():
    x = np.array([[[1.0, 0], [0, 1]], [[9, 1], [1, 8]], [[0, 3], [3, 0]]])  # the last: exchanged
    assert retrieval(x).mean(-1).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]

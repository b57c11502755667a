"""How far a model keeps languages apart, and how far it matches what they say.

The sentences are parallel, so that languages differ in language only. *Separability* is the
silhouette of mean-pooled hidden states labelled by language: near 1, every language is a cluster
of its own; near 0, they lie in one another. *Retrieval* is how often the nearest sentence of
another language (by cosine) is the translation.

Reference: Rousseeuw, *Silhouettes: a graphical aid to the interpretation and validation of cluster
analysis*, J. Comput. Appl. Math. 1987.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["METRICS", "Interval", "Separability", "distances", "retrieval", "separability"]

METRICS = ("euclidean", "cosine")


class Interval(NamedTuple):
    """A value and its bootstrap interval."""

    value: float
    low: float
    high: float


class Separability(NamedTuple):
    """Of one layer's representations."""

    silhouette: dict[str, Interval]  # by metric
    retrieval: Interval  # accuracy, mean over all ordered pairs of languages
    retrieval_pairs: np.ndarray  # [K, K] accuracy, from row to column; nan on the diagonal


def distances(points: np.ndarray, metric: str) -> np.ndarray:
    """Distances between all points.

    Args:
      points: [K, N, D]: N sentences in K languages.
      metric: "euclidean", or "cosine": one minus the cosine.

    Returns:
      float64 [K N, K, N].
    """
    languages, count, _ = points.shape
    flat = np.asarray(points, np.float64).reshape(languages * count, -1)
    if metric == "cosine":
        flat = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-300)
    products = flat @ flat.T
    squares = np.diagonal(products)
    found = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0)
    found = np.sqrt(found) if metric == "euclidean" else found / 2
    np.fill_diagonal(found, 0)
    return found.reshape(languages * count, languages, count)


def silhouettes(apart: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean silhouette of resampled sentences.

    A sentence drawn several times counts several times, but its copies are not its neighbours,
    and it sees every translation of itself once: in the data, too, each is there once. Otherwise
    every bootstrap sample would look more (copies) or less (translations) separated than the data.

    Args:
      apart: distances [K N, K, N].
      counts: [N, S] how often each sentence is drawn in each of S samples; all 1 is the data.

    Returns:
      [S].
    """
    _, languages, count = apart.shape
    counts = np.asarray(counts, np.float64)
    drawn = counts.sum(0)
    copies = np.maximum(counts - 1, 0)  # [N, S]
    sums = (apart.reshape(-1, count) @ counts).reshape(languages, count, languages, -1)
    own = sums[np.arange(languages), :, np.arange(languages)]  # [K, N, S]
    neighbours = drawn - counts
    inside = own / np.maximum(neighbours, 1)
    translation = np.diagonal(
        apart.reshape(languages, count, languages, count), axis1=1, axis2=3
    ).swapaxes(1, 2)  # [K, N, K]
    sums -= translation[..., None] * copies[None, :, None]
    sums[np.arange(languages), :, np.arange(languages)] = np.inf
    outside = sums.min(2) / (drawn - copies)  # the nearest of the other languages
    larger = np.maximum(inside, outside)
    value = np.where(larger > 0, (outside - inside) / np.where(larger > 0, larger, 1), 0)
    value = np.where(neighbours > 0, value, 0)
    return (value * counts).sum((0, 1)) / (drawn * languages)


def retrieval(points: np.ndarray) -> np.ndarray:
    """Whether a sentence's nearest neighbour in another language, by cosine, is its translation.

    Args:
      points: [K, N, D].

    Returns:
      bool [K, K, N]: from a language (first axis) to another; false from a language to itself.
    """
    points = np.asarray(points, np.float64)
    unit = points / np.maximum(np.linalg.norm(points, axis=-1, keepdims=True), 1e-300)
    count = points.shape[1]
    found = np.zeros((len(points), len(points), count), bool)
    for i, queries in enumerate(unit):
        for j, candidates in enumerate(unit):
            if i != j:
                found[i, j] = (queries @ candidates.T).argmax(1) == np.arange(count)
    return found


def separability(points: np.ndarray, *, samples: int = 200, seed: int = 0) -> Separability:
    """Measure one layer.

    Args:
      points: [K, N, D]: mean-pooled hidden states of N sentences in K languages.
      samples: bootstrap samples of sentences, each with all its translations.
      seed: of the bootstrap.

    Returns:
      Values with 95 % percentile intervals. Candidates of the retrieval stay the whole N; its
      interval resamples queries only.
    """
    languages, count, _ = points.shape
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(count, np.full(count, 1 / count), samples).T
    found = {}
    for metric in METRICS:
        apart = distances(points, metric)
        value = float(silhouettes(apart, np.ones((count, 1)))[0])
        # In parts: the sums take K N x K x S numbers.
        parts = np.array_split(counts, max(1, samples // 25), axis=1)
        resampled = np.concatenate([silhouettes(apart, part) for part in parts])
        found[metric] = _interval(value, resampled)
    hits = retrieval(points)
    others = ~np.eye(languages, dtype=bool)
    per_sentence = hits[others].mean(0)
    pairs = np.where(others, hits.mean(-1), np.nan)
    return Separability(
        found, _interval(float(per_sentence.mean()), per_sentence @ counts / count), pairs
    )


def _interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))

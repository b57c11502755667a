"""Confidence intervals over held-out examples, of shares, of differences and of likelihoods.

Coverage of each, by simulation, is in docs/evaluation.md (`benchmarks/intervals.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

__all__ = [
    "SMALLEST",
    "Differences",
    "mean_proportion_difference",
    "proportion",
    "proportion_difference",
    "studentised_mean",
]

# With fewer units, intervals of likelihoods cover 85 % and less of skewed differences.
SMALLEST = 12
_LEVEL = 0.95
_BLOCK = 4_000_000  # numbers at a time

Interval = tuple[float, float]


class Differences(NamedTuple):
    """What two models differ by on the examples of one language.

    Attributes:
      values: per example the second model's number minus the first one's.
      below: per example what sums of values are divided by the sum of.
      units: per example what it is drawn with: examples of one unit come together, in all
        languages.
    """

    values: np.ndarray
    below: np.ndarray
    units: Sequence[Hashable]


def proportion(successes: float, number: float) -> Interval:
    """Return Wilson's 95 % score interval of a share (Wilson 1927).

    Args:
      successes: how many examples are right.
      number: of how many.

    Returns:
      Its ends, between 0 and 1.

    Example:
      >>> low, high = proportion(4, 16)
      >>> round(low, 3), round(high, 3)
      (0.102, 0.495)
    """
    z = float(special.ndtri((1 + _LEVEL) / 2)) ** 2
    middle = (successes + z / 2) / (number + z)
    half = math.sqrt(z * (successes * (1 - successes / number) + z / 4)) / (number + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def proportion_difference(gained: float, lost: float, number: float) -> Interval:
    """Return Tango's 95 % score interval of the difference of two paired shares.

    It holds all differences that a score test does not reject (Tango 1998, *Equivalence test and
    confidence interval for the difference in proportions for the paired-sample design*). It has a
    width even where no example differs.

    Args:
      gained: on how many examples only the second model is right.
      lost: on how many only the first is.
      number: of examples.

    Returns:
      Its ends, between -1 and 1.

    Example:
      >>> low, high = proportion_difference(0, 0, 16)
      >>> round(low, 3), round(high, 3)
      (-0.194, 0.194)
    """
    z = float(special.ndtri((1 + _LEVEL) / 2))

    def score(difference: float) -> float:
        # The share of `lost` that is the likeliest at this difference.
        b = (2 * number - gained + lost) * difference - gained - lost
        c = lost * difference * (difference - 1)
        share = (math.sqrt(max(b * b - 8 * number * c, 0.0)) - b) / (4 * number)
        variance = number * (2 * share + difference * (1 - difference))
        above = gained - lost - number * difference
        if abs(above) < 1e-9 * number:  # at what was found, where the variance may be 0
            return 0.0
        return above / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, above)

    from scipy import optimize  # whose import takes half a second

    found = (gained - lost) / number
    ends = []
    for side in (-1.0, 1.0):
        bound = side * (1 - 1e-12)
        if abs(found) >= 1 and found * side > 0:
            ends.append(side)
            continue
        # Positive below the end, negative above it.
        end: Any = optimize.brentq(lambda x, away=side * z: score(x) + away, found, bound)
        ends.append(float(end))
    return ends[0], ends[1]


def mean_proportion_difference(languages: Sequence[Differences]) -> Interval:
    """Return a 95 % interval of the mean over languages of differences of paired shares.

    The languages' score intervals are put together by the distances of their ends, and by the
    correlations of languages that share units (MOVER: Zou 2007, *Toward using confidence intervals
    to compare correlations*). Where several examples of a language are drawn together, it counts as
    so many fewer as their differences agree (the design effect of Rao and Scott 1992).

    Args:
      languages: each one's differences, of -1, 0 and 1.

    Returns:
      Its ends; not numbers when a language has fewer than two units.

    Example:
      >>> one = Differences(np.array([1, 0, 0, 0, 1, 0]), np.ones(6), list("abcdef"))
      >>> bool(np.allclose(mean_proportion_difference([one]), proportion_difference(2, 0, 6)))
      True
    """
    found, ends, sums = [], [], []
    for values, _, units in languages:
        number, mean = len(values), float(np.mean(values))
        names, sizes = _numbered(units)
        if len(sizes) < 2:
            return math.nan, math.nan
        apart = np.bincount(names, values - mean)
        effect = 1.0
        if len(sizes) < number:
            spread = float(np.sum((values - mean) ** 2))
            # Without any difference nothing tells how alike examples of one unit are: all alike.
            effect = float(apart @ apart) / spread if spread else number / len(sizes)
            effect *= len(sizes) / (len(sizes) - 1)
        effect = max(effect, 1.0)
        gained, lost = float(np.sum(values > 0)), float(np.sum(values < 0))
        low, high = proportion_difference(gained / effect, lost / effect, number / effect)
        found.append(mean)
        ends.append((mean - low, high - mean))
        sums.append(dict(zip(dict.fromkeys(units), apart.tolist(), strict=True)))
    likeness = np.array([[_correlation(one, other) for other in sums] for one in sums])
    below, above = (
        math.sqrt(max(float(part @ likeness @ part), 0.0)) / len(found) for part in np.array(ends).T
    )
    mean = float(np.mean(found))
    return mean - below, mean + above


def _numbered(units: Sequence[Hashable]) -> tuple[np.ndarray, list[int]]:
    """Per example the number of its unit, in order of their first examples; sizes of units."""
    numbers = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    names = np.array([numbers[unit] for unit in units])
    return names, np.bincount(names).tolist()


def _correlation(one: dict[Hashable, float], other: dict[Hashable, float]) -> float:
    """Of two languages' means, as far as they share units."""
    if one is other:
        return 1.0
    shared = math.fsum(value * other[unit] for unit, value in one.items() if unit in other)
    sizes = [math.fsum(value * value for value in part.values()) for part in (one, other)]
    return shared / math.sqrt(sizes[0] * sizes[1]) if min(sizes) > 0 else 0.0


def studentised_mean(
    languages: Sequence[Differences], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return a 95 % interval of the mean over languages of differences of ratios.

    A language's difference is the sum of its values over the sum of what is below them. Units are
    drawn again with replacement, the same ones in all languages that have the same units, and each
    draw's distance from the mean is measured in its own standard error (the studentised bootstrap,
    Efron and Tibshirani 1993, chapter 12). Either end is that or the one of Student's t, whichever
    is further out: with few examples the one covers too little where tails are heavy, the other
    where they are skewed.

    Args:
      languages: each one's differences.
      resamples: how often units are drawn.
      seed: of the draws.

    Returns:
      Its ends; not numbers with fewer than `SMALLEST` units in a language.

    Example:
      >>> values = np.random.default_rng(0).normal(0.1, 0.3, 200)
      >>> one = Differences(values, np.ones(200), range(200))
      >>> [round(end, 2) for end in studentised_mean([one])]
      [0.06, 0.14]
    """
    groups: dict[tuple[Hashable, ...], list[Differences]] = {}
    for one in languages:
        groups.setdefault(tuple(sorted(set(one.units), key=str)), []).append(one)
    if min(map(len, groups)) < SMALLEST:
        return math.nan, math.nan
    mean = float(np.mean([one.values.sum() / one.below.sum() for one in languages]))
    means, squares = np.zeros(resamples), np.zeros(resamples)
    variances = []
    for units, group in groups.items():
        sums = [_sums(one, units) for one in group]
        variances.append(_spread(np.ones((1, len(units))), sums, len(languages))[1][0])
        # The same units are drawn alike, whatever else is compared; others independently.
        named = hashlib.sha256("\x1e".join(map(str, units)).encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(named[:8], "big")])
        step = max(1, _BLOCK // len(units))
        for start in range(0, resamples, step):
            block = slice(start, min(start + step, resamples))
            number = block.stop - block.start
            drawn = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), number)
            one_mean, one_square = _spread(drawn.astype(np.float64), sums, len(languages))
            means[block] += one_mean
            squares[block] += one_square
    error = math.sqrt(math.fsum(variances))
    if error == 0:
        return mean, mean
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = (means - mean) / np.sqrt(squares)
    distances = distances[np.isfinite(distances)]
    freedom = error**4 / math.fsum(
        v * v / (len(units) - 1) for v, units in zip(variances, groups, strict=True)
    )
    student = float(special.stdtrit(freedom, (1 + _LEVEL) / 2))
    lowest, highest = np.quantile(distances, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return (
        mean - error * max(float(highest), student),
        mean + error * max(-float(lowest), student),
    )


def _sums(one: Differences, units: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Values and what is below them, summed by unit."""
    number = {unit: i for i, unit in enumerate(units)}
    names = [number[unit] for unit in one.units]
    values, below = (np.bincount(names, part, len(units)) for part in (one.values, one.below))
    return values, below


def _spread(
    weights: np.ndarray, sums: Sequence[tuple[np.ndarray, np.ndarray]], languages: int
) -> tuple[np.ndarray, np.ndarray]:
    """Parts of a mean over languages, and of its squared standard error, by resample [R, U]."""
    mean, influence = np.zeros(len(weights)), np.zeros_like(weights)
    for values, below in sums:
        total = weights @ below
        found = (weights @ values) / total
        mean += found / languages
        influence += (values - found[:, None] * below) / (languages * total[:, None])
    units = weights.shape[1]
    return mean, (weights * influence**2).sum(1) * units / (units - 1)

"""Means and paired differences, with intervals that count what varies.

A difference between two arms would come out otherwise with other seeds, other languages and other
held-out examples. All three are drawn, and crossed: every seed trains on the same languages and is
measured on the same examples. The variance of the mean is put together from mean squares, as in the
analysis of variance of a balanced crossed design (Searle, Casella and McCulloch, *Variance
Components*, 1992), and Student's t has the degrees of freedom of Satterthwaite (1946). What was
compared with it, and how often the intervals hold, is in docs/study.md (`benchmarks/intervals.py`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special  # scipy.stats takes seconds to import

__all__ = [
    "LEAST",
    "Components",
    "Estimate",
    "Influence",
    "components",
    "estimate",
    "holm",
    "mean_interval",
    "satterthwaite",
    "variance_terms",
]

# No test from fewer seeds, and no claim about other languages from fewer languages.
LEAST = 3


class Estimate(NamedTuple):
    """A mean with its uncertainty.

    Attributes:
      mean: the estimate.
      error: its standard error; infinite where nothing tells it.
      freedom: degrees of freedom of the error.
      values: one per seed.
    """

    mean: float
    error: float
    freedom: float
    values: tuple[float, ...]

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval; infinite with fewer than two seeds."""
        if not math.isfinite(self.error):
            return math.inf
        return float(special.stdtrit(self.freedom, 0.975)) * self.error

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end of the 95 % interval."""
        return self.mean + self.half

    @property
    def p(self) -> float:
        """Of the two-sided t-test that the mean is 0; not a number from fewer than three seeds."""
        return 2 * self._tail(abs(self.mean))

    def p_below(self, bound: float) -> float:
        """Return p of the one-sided t-test that the mean is `bound` or above.

        Small where the mean surely lies below it. Not a number from fewer than three seeds.
        """
        return self._tail(bound - self.mean)

    def p_equivalent(self, bound: float) -> float:
        """Return p of the two one-sided t-tests that the mean is `bound` or more from 0.

        Small where the mean surely lies within the bound (TOST: Schuirmann 1987). Not a number
        from fewer than three seeds.
        """
        return self._tail(bound - abs(self.mean))

    def _tail(self, distance: float) -> float:
        """How often a mean is off by more than this to one side."""
        if len(self.values) < LEAST or not math.isfinite(self.error):
            return math.nan
        if self.error == 0:
            return 0.5 * (1 - np.sign(distance))
        return float(special.stdtr(self.freedom, -distance / self.error))


def mean_interval(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values with its t-interval.

    Example:
      >>> found = mean_interval([1.0, 2.0, 3.0])
      >>> round(found.mean, 3), round(found.half, 3)
      (2.0, 2.484)
    """
    mean, n = math.fsum(values) / len(values), len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(mean, error, n - 1, tuple(values))


class Influence(NamedTuple):
    """How much single examples move the difference of one language.

    Attributes:
      values: [seeds, examples], what the difference has from each example above their mean; the sum
        over examples is 0.
      units: per example what it is drawn with. Examples of one unit are drawn together, in all
        languages.
    """

    values: np.ndarray
    units: Sequence[Hashable]


class Components(NamedTuple):
    """What the variance of a mean over seeds and languages consists of.

    Attributes:
      seeds, languages: how many there are.
      by_seed, by_language, by_both: mean squares of the differences [seeds, languages]; not a
        number with a single seed or language.
      examples: variance of the mean that the choice of examples adds, the same one in all seeds, if
        the languages are given.
      shared: what two languages' examples have in common of it, because they are parallel: what
        mean squares of languages do not show.
      by_run: variance of a single seed's mean that examples add in this seed alone.
      units: how many examples are drawn independently.
    """

    seeds: int
    languages: int
    by_seed: float
    by_language: float
    by_both: float
    examples: float
    shared: float
    by_run: float
    units: int


def components(differences: np.ndarray, influences: Sequence[Influence] = ()) -> Components:
    """Take the variance of paired differences apart.

    Args:
      differences: [seeds, languages].
      influences: per language its examples' influences; empty where single examples are unknown.

    Returns:
      The parts.
    """
    seeds, languages = differences.shape
    mean, rows, columns = differences.mean(), differences.mean(1), differences.mean(0)
    both = differences - rows[:, None] - columns + mean
    with np.errstate(divide="ignore", invalid="ignore"):
        by_seed = float(languages * np.sum((rows - mean) ** 2) / (seeds - 1))
        by_language = float(seeds * np.sum((columns - mean) ** 2) / np.float64(languages - 1))
        by_both = float(np.sum(both**2) / np.float64((seeds - 1) * (languages - 1)))
    if not influences or seeds < 2:
        return Components(seeds, languages, by_seed, by_language, by_both, 0.0, 0.0, 0.0, 0)
    numbers: dict[Hashable, int] = {}
    for one in influences:
        for unit in one.units:
            numbers.setdefault(unit, len(numbers))
    whole = np.zeros((seeds, len(numbers)))
    own = 0.0
    for one in influences:
        within = np.zeros_like(whole)
        np.add.at(within.T, [numbers[unit] for unit in one.units], one.values.T)
        drawn = len(set(one.units))
        within *= math.sqrt(drawn / max(drawn - 1, 1)) / languages
        whole += within
        own += _across(within)
    examples = _across(whole)
    by_run = max(float(np.sum(whole**2)) / seeds - examples, 0.0)
    # Of the pairs of languages, that many are of two: the mean over those.
    shared = (examples - own) * languages / (languages - 1) if languages > 1 else 0.0
    return Components(
        seeds, languages, by_seed, by_language, by_both,
        max(examples, 0.0), max(shared, 0.0), by_run, len(numbers),
    )  # fmt: skip


def _across(influences: np.ndarray) -> float:
    """Sum over units of the mean product of two different seeds' influences."""
    seeds = len(influences)
    products = np.sum(influences.sum(0) ** 2) - np.sum(influences**2)
    return float(products) / (seeds * (seeds - 1))


def estimate(
    differences: np.ndarray, influences: Sequence[Influence] = (), *, other_languages: bool = True
) -> Estimate:
    """Return the mean of paired differences with its uncertainty.

    Args:
      differences: [seeds, languages].
      influences: per language its examples' influences; empty where single examples are unknown.
      other_languages: count languages as drawn, for claims about others. With fewer than three it
        is not done.

    Returns:
      The mean, its error from seeds and examples, and from languages if wanted.

    Example:
      >>> differences = np.array([[0.1, 0.5, 0.3], [0.2, 0.5, 0.2], [0.3, 0.6, 0.3]])
      >>> given = estimate(differences, other_languages=False)
      >>> round(given.mean, 3), round(given.half, 3), round(estimate(differences).half, 3)
      (0.333, 0.143, 0.406)
    """
    values = tuple(float(value) for value in differences.mean(1))
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, math.inf, 0, values)
    parts = components(differences, influences)
    given = _of_terms(mean, values, variance_terms(parts, other_languages=False))
    if not other_languages or parts.languages < LEAST:
        return given
    # What holds for other languages is never surer than what holds for these. It may seem so where
    # few seeds are helped by many languages to more degrees of freedom.
    drawn = _of_terms(mean, values, variance_terms(parts, other_languages=True))
    return max(given, drawn, key=lambda one: one.half)


def _of_terms(
    mean: float, values: tuple[float, ...], terms: Sequence[tuple[float, float]]
) -> Estimate:
    variance, freedom = satterthwaite(terms)
    if variance <= 0:  # nothing varies, so nothing tells by how much it might
        return Estimate(mean, math.inf, 0, values)
    return Estimate(mean, math.sqrt(variance), freedom, values)


def satterthwaite(terms: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return a variance and its degrees of freedom (Satterthwaite 1946).

    Args:
      terms: what adds up to it, each with its degrees of freedom.

    Returns:
      The sum, and how many degrees of freedom its uncertainty is like; 0 where it is all 0.

    Example:
      >>> satterthwaite([(1.0, 4.0), (1.0, 4.0)])
      (2.0, 8.0)
    """
    variance = math.fsum(term for term, _ in terms)
    spread = math.fsum(term * term / free for term, free in terms if term)
    return variance, variance**2 / spread if spread else 0.0


def variance_terms(parts: Components, other_languages: bool) -> list[tuple[float, float]]:
    """Return what adds up to the variance of a mean, each term with its degrees of freedom.

    With languages as drawn, the mean squares of seeds and of languages both hold that of both, so
    it is taken off once. A mean square below that of both shows nothing of its own and is left out.

    Args:
      parts: what the variance consists of.
      other_languages: count languages as drawn.
    """
    runs = parts.seeds * parts.languages
    free = parts.seeds - 1
    if not other_languages:
        terms = [(parts.by_seed / runs, free), (parts.examples, parts.units - 1)]
    else:
        known = [(parts.by_seed, free), (parts.by_language, parts.languages - 1)]
        above = [(square / runs, f) for square, f in known if square > parts.by_both]
        both = (parts.by_both / runs, free * (parts.languages - 1))
        if len(above) == 2:
            above.append((-both[0], both[1]))
        terms = [*(above or [both]), (parts.shared, parts.units - 1)]
    return [(term, float(f)) for term, f in terms if term != 0]


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for testing several hypotheses at once (Holm 1979).

    What is not a number was not tested: it stays, and does not count.

    Example:
      >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
      {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    tested = {name: value for name, value in p.items() if not math.isnan(value)}
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(tested, key=tested.__getitem__)):
        largest = max(largest, min(1.0, (len(tested) - rank) * tested[name]))
        adjusted[name] = largest
    return {name: adjusted.get(name, math.nan) for name in p}

"""Means and differences with intervals, over few paired seeds.

Intervals are Student's: with three seeds, plus or minus 4.3 standard errors. They tell how much the
outcome varies with the order of the data and other random choices of training; the examples asked
are the same in every run, so they say nothing about other examples or languages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special  # scipy.stats takes seconds to import

__all__ = ["Estimate", "holm", "mean_interval", "paired_difference"]


class Estimate(NamedTuple):
    """A mean with its uncertainty.

    Attributes:
      mean: over seeds.
      half: half the width of the 95 % interval; infinite with fewer than two seeds.
      p: of the two-sided t-test that the mean is 0; 1 with fewer than two seeds.
      values: one per seed.
    """

    mean: float
    half: float
    p: float
    values: tuple[float, ...]


def mean_interval(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values with its 95 % t-interval.

    Example:
      >>> found = mean_interval([1.0, 2.0, 3.0])
      >>> round(found.mean, 3), round(found.half, 3)
      (2.0, 2.484)
    """
    mean, n = math.fsum(values) / len(values), len(values)
    if n < 2:
        return Estimate(mean, math.inf, 1.0, tuple(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(special.stdtrit(n - 1, 0.975)) * error
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = float(2 * special.stdtr(n - 1, -abs(mean) / error))
    return Estimate(mean, half, p, tuple(values))


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Estimate | None:
    """Return the mean of ``b - a`` over the seeds that both have, with its 95 % t-interval.

    Args:
      a: by seed, the baseline.
      b: by seed.

    Returns:
      The estimate; None when there is no common seed.

    Example:
      >>> paired_difference({1: 2.0, 2: 3.0}, {1: 2.5, 2: 3.5, 3: 9.0}).values
      (0.5, 0.5)
    """
    common = [seed for seed in a if seed in b]
    return mean_interval([b[seed] - a[seed] for seed in common]) if common else None


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for testing several hypotheses at once (Holm 1979).

    Example:
      >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
      {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}

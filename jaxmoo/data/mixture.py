"""Which languages take part in a step, where not all of them do, and sources in an epoch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from jaxmoo.errors import ConfigError

T = TypeVar("T")

_BLOCK = 1024  # steps drawn at a time


def shares(sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Return languages' shares under temperature sampling.

    Args:
      sizes: per language its amount of data.
      temperature: 1 gives shares in proportion to the sizes; the higher, the more alike they are.

    Returns:
      Per language ``size ** (1 / temperature)``, normalised.

    Example:
      >>> shares({"en": 900, "fa": 100}, temperature=2.0)
      {'en': 0.75, 'fa': 0.25}
    """
    powers = {language: size ** (1 / temperature) for language, size in sizes.items()}
    return {language: power / sum(powers.values()) for language, power in powers.items()}


def in_shares(items: Sequence[T], sources: Sequence[int], weights: Sequence[float]) -> list[T]:
    """Repeat items so that every source has its share, and no item is left out.

    The source that has most items for its weight occurs as it is. Of another all items are repeated
    as often as fits, and its first ones once more.

    Args:
      items: in any order.
      sources: the number of each item's source.
      weights: of the sources, above 0; those without items do not count.

    Returns:
      The items, then their repetitions; shares are exact but for rounding to whole items.

    Example:
      >>> "".join(in_shares("aaabb", [0, 0, 0, 1, 1], [1, 2]))
      'aaabbbbbb'
    """
    sizes = Counter(sources)
    most = max((sizes[number] / weights[number] for number in sizes), default=0.0)
    repeated = []
    for number, size in sorted(sizes.items()):
        own = [item for item, source in zip(items, sources, strict=True) if source == number]
        wanted = max(math.floor(most * weights[number] + 0.5), size)
        repeated += [own[place % size] for place in range(size, wanted)]
    return [*items, *repeated]


class Mixture:
    """Chooses k of K languages for every step, a pure function of the seed and the step.

    Systematic sampling (Madow 1949): the languages are laid out in a new random order along a line,
    each as long as its probability, and one random offset takes every unit's language. So exactly
    k different languages are taken, and each with exactly its probability: k times its share, at
    most 1 (what is above goes to the others in proportion). The mean over a step's languages is
    then, in expectation, the mean over all languages weighted by their shares.

    Args:
      weights: shares of the K languages, above 0, of any scale.
      k: languages per step.
      seed: any integer.

    Raises:
      ConfigError: k is not between 1 and K, or a weight is not a positive number.

    References:
      Madow, *On the Theory of Systematic Sampling, II*, Annals of Mathematical Statistics 20, 1949.

    Example:
      >>> mixture = Mixture([0.75, 0.25, 0.5, 0.5], k=2, seed=0)
      >>> mixture.languages(0).tolist(), mixture.taken(1).tolist()
      ([0, 3], [1, 0, 0, 1])
    """

    def __init__(self, weights: Sequence[float], k: int, seed: int):
        if not 1 <= k <= len(weights):
            raise ConfigError(
                f"languages per step: expected 1 to {len(weights)}, the number of languages; "
                f"found {k}."
            )
        if not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise ConfigError(f"Shares of languages are numbers above 0, found {list(weights)}.")
        self.k = k
        self.probabilities = inclusion_probabilities(weights, k)
        self._seed = seed
        self._blocks: list[np.ndarray] = []  # [_BLOCK, k] each
        self._taken = [np.zeros(len(weights), np.int64)]  # before each block

    def languages(self, step: int) -> np.ndarray:
        """Return the languages of a step.

        Args:
          step: from 0.

        Returns:
          int [k], different numbers below K, ascending.
        """
        block, row = divmod(step, _BLOCK)
        self._draw(block)
        return self._blocks[block][row]

    def taken(self, step: int) -> np.ndarray:
        """Return in how many of the steps before one each language took part.

        Args:
          step: from 0.

        Returns:
          int [K].
        """
        block, row = divmod(step, _BLOCK)
        self._draw(block)
        here = np.bincount(self._blocks[block][:row].ravel(), minlength=len(self.probabilities))
        return self._taken[block] + here

    def _draw(self, last: int) -> None:
        num = len(self.probabilities)
        for block in range(len(self._blocks), last + 1):
            bits = np.random.Philox(key=self._seed, counter=[0, 0, 0, block])
            random = np.random.Generator(bits).random((_BLOCK, num + 1))
            orders = np.argsort(random[:, :num], axis=1)
            ends = np.cumsum(self.probabilities[orders], axis=1)
            # The last end is k but for rounding.
            ends = ends * (self.k / ends[:, -1:])
            marks = random[:, num:] + np.arange(self.k)
            places = (ends[:, None, :] <= marks[:, :, None]).sum(-1)  # [_BLOCK, k]
            chosen = np.sort(np.take_along_axis(orders, places, axis=1), axis=1)
            self._blocks.append(chosen)
            self._taken.append(self._taken[-1] + np.bincount(chosen.ravel(), minlength=num))


def inclusion_probabilities(weights: Sequence[float], k: int) -> np.ndarray:
    """Return probabilities in proportion to weights that sum to k, none above 1.

    Args:
      weights: positive numbers [K].
      k: at most K.

    Returns:
      float64 [K].

    Example:
      >>> inclusion_probabilities([8.0, 1.0, 1.0], 2).tolist()
      [1.0, 0.5, 0.5]
    """
    given = np.asarray(weights, np.float64)
    certain = np.zeros(len(given), bool)
    while True:
        rest = given[~certain]
        scaled = np.where(certain, 1.0, given * ((k - certain.sum()) / max(rest.sum(), 1e-300)))
        above = ~certain & (scaled >= 1)
        if not above.any():
            return scaled
        certain |= above

"""Language-specific neurons, by the entropy of their activation over languages (LAPE).

A neuron of an MLP is active in a token where its gate is positive. For every neuron and language,
p is the share of the language's tokens in which it is. A neuron is language-specific when it is
active often enough in some language, and its probabilities, normalised over languages, have a low
entropy.

Reference: Tang et al., *Language-Specific Neurons: The Key to Multilingual Capabilities in Large
Language Models*, ACL 2024, `arXiv:2402.16438 <https://arxiv.org/abs/2402.16438>`_.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxmoo.errors import DataError

__all__ = ["Thresholds", "entropy", "overlap", "specific", "thresholds"]


class Thresholds(NamedTuple):
    """What makes a neuron language-specific; taken from the base model and kept.

    Attributes:
      probability: a neuron must be active more often than this in some language; it is specific
        to the languages in which it is.
      entropy: the highest entropy, in nats, of the neurons that are chosen.
    """

    probability: float
    entropy: float


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """LAPE: entropy of activation probabilities, normalised over languages.

    Args:
      probabilities: [K, ...] of K languages.

    Returns:
      [...] in nats, from 0 (one language alone) to log K (all alike); infinite for a neuron that
      is never active.

    Example:
      >>> entropy(np.array([[0.5, 0.2, 0.0], [0.0, 0.2, 0.0]])).round(3).tolist()
      [0.0, 0.693, inf]
    """
    p = np.asarray(probabilities, np.float64)
    total = p.sum(0)
    share = p / np.where(total > 0, total, 1)
    terms = share * np.log(np.where(share > 0, share, 1))
    return np.where(total > 0, np.abs(terms.sum(0)), np.inf)


def thresholds(
    probabilities: np.ndarray, *, percentile: float = 95.0, share: float = 0.01
) -> Thresholds:
    """Choose a model's language-specific neurons, and return what they have in common.

    Neurons are kept that are active in some language more often than ``percentile`` per cent of
    all probabilities; of all neurons, the ``share`` with the lowest entropy among these are
    chosen. So their number is fixed by construction: compare models at one model's thresholds.

    Args:
      probabilities: [K, L, F] of K languages.
      percentile: of all K L F probabilities.
      share: of all L F neurons.

    Raises:
      DataError: so few neurons pass the first threshold that the share cannot be taken.
    """
    p = np.asarray(probabilities, np.float64)
    ordered = np.sort(p, axis=None)
    # The reference implementation's kthvalue, which counts from 1.
    level = float(ordered[max(round(ordered.size * percentile / 100), 1) - 1])
    often = (p > level).any(0)
    values = np.sort(entropy(p)[often])
    wanted = max(round(share * often.size), 1)
    if len(values) < wanted:
        raise DataError(
            f"only {len(values)} of {often.size} neurons are active in more than {level:.3f} of "
            f"some language's tokens; {wanted} were to be chosen"
        )
    return Thresholds(level, float(values[wanted - 1]))


def specific(probabilities: np.ndarray, at: Thresholds) -> np.ndarray:
    """Tell which neurons are specific to which languages.

    Args:
      probabilities: [K, L, F].
      at: the thresholds.

    Returns:
      bool [K, L, F]; a neuron may be specific to several languages.
    """
    p = np.asarray(probabilities, np.float64)
    return (p > at.probability) & (entropy(p) <= at.entropy)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Per language, the neurons in both sets over those in either (Jaccard); nan where none is.

    Args:
      a: bool [K, L, F].
      b: the same.
    """
    both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)

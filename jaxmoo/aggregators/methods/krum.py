"""Krum: the mean of the gradients nearest to their neighbours."""

from __future__ import annotations

import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.parameters import check_number


@register
def krum(n_byzantine: int = 1, n_selected: int = 1) -> Aggregator:
    """Krum and multi-Krum, robust selection of gradients.

    The score of a gradient is the sum of its squared distances to its ``K - n_byzantine - 2``
    nearest others; the ``n_selected`` gradients of lowest score are averaged with their
    preferences.

    Keeps: degree 1 in the gradients; permutation equivariance, apart from ties, which go to the
    first. Resists ``n_byzantine`` corrupt rows when ``2 n_byzantine + 2 < K``. Promises no
    non-conflict.

    Departures: at least one neighbour is counted, and no more gradients are selected than are
    present, so that it is defined for every K.

    Args:
      n_byzantine: corrupt gradients to withstand, at least 0.
      n_selected: gradients to average, at least 1; more than 1 is multi-Krum.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if a number is not an integer in range.

    References:
      Blanchard et al., *Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent*,
      NeurIPS 2017, `arXiv:1703.02757 <https://arxiv.org/abs/1703.02757>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[1.0, 0.0], [1.1, 0.0], [0.9, 0.0], [-50.0, 9.0]])
      >>> aggregate(krum(n_byzantine=1, n_selected=1), J).tolist()
      [1.0, 0.0]
    """
    check_number("krum", "n_byzantine", n_byzantine, low=0, whole=True)
    check_number("krum", "n_selected", n_selected, low=1, whole=True)

    def weigh(gram, active, preference, state, key):
        k = active.shape[0]
        square = jnp.diagonal(gram)
        distance = jnp.maximum(square[:, None] + square[None, :] - 2 * gram, 0.0)
        others = active[:, None] & active[None, :] & ~jnp.eye(k, dtype=bool)
        nearest = jnp.sort(jnp.where(others, distance, jnp.inf), axis=1)
        count = jnp.sum(active)
        neighbours = jnp.clip(count - n_byzantine - 2, 1, jnp.maximum(count - 1, 1))
        score = jnp.sum(jnp.where(jnp.arange(k) < neighbours, nearest, 0.0), axis=1)
        rank = jnp.argsort(jnp.argsort(jnp.where(active, score, jnp.inf)))
        weights = jnp.where(active & (rank < n_selected), preference, 0.0)
        total = jnp.sum(weights)
        return weights / jnp.where(total > 0, total, 1.0), state

    return Aggregator("krum", weigh)

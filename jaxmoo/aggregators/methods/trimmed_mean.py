"""Trimmed mean: per coordinate, leave out the extremes."""

from __future__ import annotations

import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.parameters import check_number


@register
def trimmed_mean(trim_number: int = 1) -> Aggregator:
    """Coordinate-wise mean without the largest and smallest values.

    At every coordinate the ``trim_number`` largest and as many smallest entries are left out, and
    the others averaged with their preferences. A robust mean, meant against corrupt rows.

    Acts on coordinates: it is no function of the Gram matrix, and needs nothing but the rows of
    any piece of the gradients.

    Keeps: degree 1 in the gradients; permutation equivariance. Promises no non-conflict.

    Departures: with too few objectives for the number (``K <= 2 trim_number``, also when some are
    absent), as many are trimmed as leave one or two, the median.

    Args:
      trim_number: entries left out at either end, at least 0.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if the number is not a non-negative integer.

    References:
      Yin et al., *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*,
      ICML 2018, `arXiv:1803.01498 <https://arxiv.org/abs/1803.01498>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[1.0, 9.0], [2.0, 1.0], [30.0, 2.0]])
      >>> aggregate(trimmed_mean(1), J).tolist()
      [2.0, 2.0]
    """
    check_number("trimmed_mean", "trim_number", trim_number, low=0, whole=True)

    def combine(jacobian, active, preference, uniform):
        order = jnp.argsort(jnp.where(active[:, None], jacobian, jnp.inf), axis=0)
        values = jnp.take_along_axis(jacobian, order, axis=0)
        weights = preference[order]
        count = jnp.sum(active)
        trim = jnp.clip(trim_number, 0, jnp.maximum(count - 1, 0) // 2)
        rank = jnp.arange(active.shape[0])[:, None]
        weights = jnp.where((rank >= trim) & (rank < count - trim), weights, 0.0)
        total = jnp.sum(weights, axis=0)
        return jnp.sum(weights * values, axis=0) / jnp.where(total > 0, total, 1.0)

    def weigh(gram, active, preference, state, key):
        return preference, state

    return Aggregator("trimmed_mean", weigh, combine=combine)

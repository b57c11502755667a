"""Gradient normalisation without conflict resolution, a control."""

from __future__ import annotations

import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.kernels.linear import diagonal


@register
def unit_mean() -> Aggregator:
    """Average of the gradients' directions, at their mean length.

    ``w_i = p_i m / |g_i|`` with ``m = sum_j p_j |g_j|``. A control: it balances objectives of
    different scale as most methods do, and does nothing about conflict.

    Keeps: permutation equivariance; degree 1 in the gradients; the direction does not change when
    one gradient is scaled. Does not keep non-conflict.

    Returns:
      The aggregator.

    References:
      Chen et al., *GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
      Networks*, ICML 2018, `arXiv:1711.02257 <https://arxiv.org/abs/1711.02257>`_, learns weights
      towards such a balance; here it is reached at once, in every block.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> aggregate(unit_mean(), jnp.array([[1.0, 0.0], [0.0, 3.0]])).tolist()
      [1.0, 1.0]
    """

    def weigh(gram, active, preference, state, key):
        norm = jnp.where(active, jnp.sqrt(diagonal(gram)), 1.0)
        length = jnp.sum(preference * jnp.where(active, norm, 0.0))
        return preference * length / norm, state

    return Aggregator("unit_mean", weigh, elementary=True)

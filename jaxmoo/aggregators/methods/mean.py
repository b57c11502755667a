"""Mean and sum: no conflict resolution, the baselines."""

from __future__ import annotations

from jaxmoo.aggregators.aggregator import Aggregator, register


@register
def mean() -> Aggregator:
    """Average of the gradients: ordinary training on the mean loss.

    ``w = p``, which is ``1/K`` unless preferences are given.

    Keeps: permutation equivariance; degree 1 in the gradients; the mean of a block is the block of
    the mean, so blocks make no difference. Does not keep non-conflict.

    Returns:
      The aggregator.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> aggregate(mean(), jnp.array([[2.0, 0.0], [0.0, 4.0]])).tolist()
      [1.0, 2.0]
    """

    def weigh(gram, active, preference, state, key):
        return preference, state

    return Aggregator("mean", weigh, reads_gram=False, elementary=True)


@register
def sum() -> Aggregator:
    """Sum of the gradients: ordinary training on the summed loss.

    ``w = 1``, or ``w_i = p_i`` times the number of objectives present if preferences are given.

    Keeps what :func:`mean` keeps, except that K equal gradients g give K g.

    Returns:
      The aggregator.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> aggregate(sum(), jnp.array([[2.0, 0.0], [0.0, 4.0]])).tolist()
      [2.0, 4.0]
    """

    def weigh(gram, active, preference, state, key):
        return preference, state

    return Aggregator("sum", weigh, reads_gram=False, summed=True, elementary=True)

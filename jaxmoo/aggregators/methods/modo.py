"""MoDo: multi-objective gradients from two independent batches."""

from __future__ import annotations

import jax

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import simplex_step
from jaxmoo.parameters import check_number


@register
def modo(*, gamma: float | jax.Array = 0.1, rho: float | jax.Array = 0.0) -> Aggregator:
    """Multi-objective gradient with double sampling: its weights.

    One projected gradient step on the weights per step, ``w <- P(w - gamma (G12 + rho I) w)`` with
    ``G12 = J1 J2^T``, then the update ``J^T w``. **It needs gradients of two independent batches**
    ``J1``, ``J2``: products of one batch with itself overestimate norms by its noise. Give
    :func:`weigh_block` or :func:`weigh_blocks` the Grams of :func:`cross_gram`, or
    :func:`aggregate` ``second=``; and combine the gradients of the first batch, or, as in the
    paper, of a third.

    Keeps: degree 1 in the gradients; permutation equivariance (with the state permuted). Converges
    to MGDA's weights while the gradients stay the same and ``rho = 0``. Promises no non-conflict
    at any one step.

    Departures: gamma and rho are relative to the block's largest entry of ``G12``. Preferences,
    which the paper does not have, weight the losses: the steps see ``p_i g_i``.

    Args:
      gamma: step size of the weights, at least 0. May be traced.
      rho: regularisation towards equal weights, at least 0. May be traced.

    Returns:
      The aggregator. It keeps K weights per block.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Chen et al., *Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization
      and Conflict-Avoidance*, NeurIPS 2023, `arXiv:2305.20057 <https://arxiv.org/abs/2305.20057>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import cross_gram, weigh_block
      >>> J1 = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> J2 = jnp.array([[-4.1, 1.1, 0.9], [5.9, 0.9, 1.1]])
      >>> w, state = weigh_block(modo(), cross_gram(J1, J2))
      >>> [round(float(x), 3) for x in w]
      [0.512, 0.488]
    """
    check_number("modo", "gamma", gamma, low=0)
    check_number("modo", "rho", rho, low=0)

    return Aggregator(
        "modo", simplex_step.tracked_weights(gamma, rho), init=simplex_step.start, cross_gram=True
    )

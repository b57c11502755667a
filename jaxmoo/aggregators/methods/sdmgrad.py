"""SDMGrad: a common direction regularised towards the mean, from two independent batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import simplex_step
from jaxmoo.kernels.linear import matvec
from jaxmoo.parameters import check_number


@register
def sdmgrad(
    lambda_: float | jax.Array = 0.3,
    *,
    gamma: float | jax.Array = 0.1,
    iterations: int = 20,
    momentum: float | jax.Array = 0.0,
) -> Aggregator:
    """Stochastic direction-oriented multi-objective gradient descent.

    Weights ``w = argmin 1/2 |g_w + lambda g_0|^2`` over the simplex, ``g_0 = J^T p``, approached
    by projected gradient steps ``w <- P(w - gamma G12 (w + lambda p))`` with ``G12 = J1 J2^T`` from
    the previous step's w; update ``(g_w + lambda g_0) / (1 + lambda)``. **It needs gradients of two
    independent batches** ``J1``, ``J2``: give :func:`weigh_block` or :func:`weigh_blocks` the Grams
    of :func:`cross_gram`, or :func:`aggregate` ``second=``; and combine the gradients of the first
    batch, or, as in the paper, of a third.

    Keeps: degree 1 in the gradients; permutation equivariance (with the state permuted).
    ``lambda = 0`` tends to MGDA, a large lambda to the mean. Promises no non-conflict at any one
    step.

    Departures: gamma is relative to the block's largest entry of ``G12``; the paper draws new
    batches for every inner step, here the inner steps share ``G12``; the division by ``1 + lambda``
    makes K equal gradients g give g.

    Args:
      lambda_: pull towards the mean, at least 0. May be traced.
      gamma: step size of the weights, at least 0. May be traced.
      iterations: inner steps.
      momentum: of the inner steps, from 0 to 1 (the authors' code has 0.5); each resolution starts
        anew. May be traced.

    Returns:
      The aggregator. It keeps K weights per block.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      Xiao, Ban and Ji, *Direction-oriented Multi-objective Learning: Simple and Provable
      Stochastic Algorithms*, NeurIPS 2023, `arXiv:2305.18409 <https://arxiv.org/abs/2305.18409>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import cross_gram, weigh_block
      >>> J1 = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> J2 = jnp.array([[-4.1, 1.1, 0.9], [5.9, 0.9, 1.1]])
      >>> w, state = weigh_block(sdmgrad(), cross_gram(J1, J2))
      >>> round(float(w.sum()), 4)
      1.0
    """
    check_number("sdmgrad", "lambda_", lambda_, low=0)
    check_number("sdmgrad", "gamma", gamma, low=0)
    check_number("sdmgrad", "momentum", momentum, low=0, high=1, open_high=True)
    check_number("sdmgrad", "iterations", iterations, low=1, whole=True)

    def weigh(gram, active, preference, state, key):
        def step(_, carry):
            weights, velocity = carry
            velocity = keeps * velocity + matvec(products, weights + pull * preference)
            return simplex_step.project(weights - rate * velocity, active), velocity

        products = simplex_step.relative(gram)
        pull, rate, keeps = (jnp.asarray(x, gram.dtype) for x in (lambda_, gamma, momentum))
        start = simplex_step.restrict(state, active)
        weights, _ = lax.fori_loop(0, iterations, step, (start, jnp.zeros_like(start)))
        state = simplex_step.merge(state, weights, active)
        return (weights + pull * preference) / (1 + pull), state

    return Aggregator("sdmgrad", weigh, init=simplex_step.start, cross_gram=True)

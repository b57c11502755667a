"""ExcessMTL: weight moves to the objectives that are furthest from their own optimum."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import simplex_step
from jaxmoo.parameters import check_number


class ExcessMtlState(NamedTuple):
    """State of one block, every array ``[K]``."""

    log_weights: jax.Array  # up to a constant
    squares: jax.Array  # sum of the squared gradient norms so far
    baseline: jax.Array  # sum of the excess risks of the first steps
    seen: jax.Array  # steps in which the objective had a gradient


@register
def excess_mtl(*, eta: float | jax.Array = 1.0, warmup: int = 1) -> Aggregator:
    """Robust multi-task learning with excess risks.

    How far objective i is above its own optimum is estimated from its gradient and a curvature as
    in AdaGrad, ``E_i = g_i^T H_i^-1 g_i`` with ``H_i = (sum over steps of |g_i|^2)^1/2``, relative
    to the mean of the first ``warmup`` steps. Its weight grows exponentially with that:
    ``w_i <- w_i exp(eta E_i)``, then they are divided by their sum.

    Keeps: permutation equivariance (with the state permuted); degree 1 in the gradients. Weights
    are positive and sum to one. Promises no non-conflict.

    Departures: the paper's curvature is diagonal, one number per objective and parameter, which
    would cost K copies of the parameters; here it is one number per objective and block, so the
    method is a function of Gram matrices. An objective's steps of warm-up leave its weight as it
    is. Published code takes the first step's excess risks as they are, which makes the weights
    depend on the scale of the losses. Preferences, which the paper does not have, multiply the
    weights.

    Args:
      eta: rate of the weights, at least 0. May be traced.
      warmup: steps that a relative excess risk is relative to, at least 1; the paper takes three
        epochs.

    Returns:
      The aggregator. It keeps 4 K numbers per block.

    Raises:
      ConfigError: if a parameter is out of range.

    References:
      He et al., *Robust Multi-Task Learning with Excess Risks*, ICML 2024,
      `arXiv:2402.02009 <https://arxiv.org/abs/2402.02009>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import gram, weigh_block
      >>> method, state = excess_mtl(), None
      >>> for lengths in ([1.0, 1.0], [1.0, 0.1]):  # the second objective is nearly learnt
      ...     w, state = weigh_block(method, gram(jnp.diag(jnp.array(lengths))), state=state)
      >>> [round(float(x), 3) for x in w]
      [0.668, 0.332]
    """
    check_number("excess_mtl", "eta", eta, low=0)
    check_number("excess_mtl", "warmup", warmup, low=1, whole=True)

    def init(num_objectives):
        return ExcessMtlState(*(jnp.zeros(num_objectives) for _ in ExcessMtlState._fields))

    def weigh(gram, active, preference, state, key):
        square = jnp.where(active, jnp.diagonal(gram), 0.0)
        squares = state.squares + square
        excess = square / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
        warm = active & (state.seen < warmup)
        baseline = state.baseline + jnp.where(warm, excess, 0.0)
        moves = active & ~warm
        mean = baseline / warmup
        grown = state.log_weights + eta * excess / jnp.where(moves, mean, 1.0)
        logs = jnp.where(moves, grown, state.log_weights)
        logs = logs - jnp.max(logs)
        # Of the weights of the objectives at hand, lest all of them be too small for numbers.
        here = jnp.where(active, logs, -jnp.inf)
        weights = preference * jnp.exp(here - jnp.where(jnp.any(active), jnp.max(here), 0.0))
        seen = state.seen + active
        return simplex_step.restrict(weights, active), ExcessMtlState(
            logs.astype(gram.dtype), squares, baseline, seen
        )

    return Aggregator("excess_mtl", weigh, init=init, compares_steps=True)

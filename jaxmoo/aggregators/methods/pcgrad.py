"""PCGrad: every gradient projected on the normal planes of those it conflicts with."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import equilibrate
from jaxmoo.kernels.linear import column, identity, matmul, one_hot, vecmat
from jaxmoo.parameters import check_choice
from jaxmoo.sharding import varying


def random_orders(key: jax.Array, num_objectives: int) -> jax.Array:
    """One uniformly random order of the objectives for every objective.

    Args:
      key: a key.
      num_objectives: K.

    Returns:
      ``[K, K]`` int; row i is a permutation, independent of the other rows.
    """
    return jnp.argsort(jax.random.bits(key, (num_objectives, num_objectives)), axis=1)


def project_conflicts(cosine: jax.Array, orders: jax.Array) -> jax.Array:
    """PCGrad's projections for given orders.

    Row i starts as the unit gradient i. In its order it meets the *original* gradients j; when
    its product with j is negative at that moment, its component along j is removed. It skips
    itself.

    Args:
      cosine: ``[K, K]`` cosines between the gradients.
      orders: ``[K, K]``; row i is the order in which gradient i meets the others; -1 is nobody.

    Returns:
      ``[K, K]``: row i holds the coefficients of the projected unit gradient i.
    """
    k = cosine.shape[0]
    itself = identity(k, cosine.dtype)

    def meet(t, carry):
        coefficients, products = carry  # products[i, j] = <projected g_i, g_j>
        other = one_hot(column(orders, t), cosine.dtype)
        along = jnp.sum(products * other * (1 - itself), axis=1)
        remove = jnp.minimum(along, 0.0)[:, None] * other
        return coefficients - remove, products - matmul(remove, cosine)

    return lax.fori_loop(0, k, meet, varying((itself, cosine), orders))[0]


@register
def pcgrad(*, reduction: Literal["mean", "sum"] = "mean") -> Aggregator:
    """Projecting conflicting gradients (gradient surgery).

    Each gradient is projected on the normal plane of each original gradient it conflicts with, in
    a random order of its own, and the results are averaged:
    ``g_i <- g_i - min(0, <g_i, g_j>) / |g_j|^2 g_j`` for j in order, ``d = sum_i p_i g_i``.

    Keeps: degree 1 in the gradients; non-conflict for two objectives; permutation equivariance in
    distribution. Without conflicts it is the mean. With more than two objectives a later
    projection can reopen an earlier conflict, as in the paper.

    Departures: the paper and most code sum; ``reduction="sum"`` is theirs. Some published code
    projects gradients on themselves, never shuffles, or shares one order; here every gradient has
    its own uniformly random order, as in the paper's Algorithm 1. Preferences, which the paper
    does not have, weight the projected gradients.

    Args:
      reduction: ``"mean"``, or ``"sum"`` for the published scale.

    Returns:
      The aggregator. It draws the orders, so it needs a key.

    Raises:
      ConfigError: if the reduction is unknown.

    References:
      Yu et al., *Gradient Surgery for Multi-Task Learning*, NeurIPS 2020,
      `arXiv:2001.06782 <https://arxiv.org/abs/2001.06782>`_.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> d = aggregate(pcgrad(), J, key=jax.random.key(0))
      >>> [round(float(x), 4) for x in d]
      [0.2924, 1.9006, 1.9006]
    """
    check_choice("pcgrad", "reduction", reduction, ("mean", "sum"))

    def weigh(gram, active, preference, state, orders):
        cosine, norm = equilibrate(gram, active)
        weights = vecmat(preference * norm, project_conflicts(cosine, orders)) / norm
        return weights, state

    return Aggregator(
        "pcgrad",
        weigh,
        stochastic=True,
        draw=random_orders,
        summed=reduction == "sum",
        elementary=True,
    )

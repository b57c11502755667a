"""IMTL-G: the same projection on every gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import equilibrate, pseudo_solve
from jaxmoo.parameters import check_number


@register
def imtl_g(*, bound: float | jax.Array = 10.0) -> Aggregator:
    """Impartial multi-task learning, gradient balance.

    The update whose projections on all gradients are equal: ``w`` proportional to ``G^+ sqrt(D)``
    with ``D = diag(G)``, divided by its sum.

    Keeps: equal positive projections, hence non-conflict and descent, while the gradients are
    independent; permutation equivariance; degree 1 in the gradients.

    Departures: the published sum may pass through zero or below, where the update explodes or
    turns into ascent; the divisor is kept above the absolute sum over ``bound``. The
    pseudo-inverse is that of the cosines, ``D^-1/2 C^+ 1``, which differs for dependent gradients
    only, by a factor when they can have equal projections; when they cannot (opposed gradients),
    the update is the best compromise in the least-squares sense and may vanish. Preferences, which
    the paper does not have, are what the projections are proportional to.

    Args:
      bound: largest absolute sum of the weights, at least 1. May be traced.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if the bound is below 1.

    References:
      Liu et al., *Towards Impartial Multi-task Learning*, ICLR 2021,
      `OpenReview <https://openreview.net/forum?id=IMPnRXEWpvr>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> [round(float(x), 4) for x in aggregate(imtl_g(), J)]
      [0.0767, 1.0, 1.0]
    """
    check_number("imtl_g", "bound", bound, low=1)

    def weigh(gram, active, preference, state, key):
        cosine, norm = equilibrate(gram, active)
        weights = pseudo_solve(cosine, preference) / norm
        total = jnp.maximum(jnp.sum(weights), jnp.sum(jnp.abs(weights)) / bound)
        return weights / jnp.where(total > 0, total, 1.0), state

    return Aggregator("imtl_g", weigh, elementary=isinstance(bound, int | float))

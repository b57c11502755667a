"""MGDA: the shortest convex combination of the gradients."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import equilibrate, min_norm
from jaxmoo.parameters import check_choice


@register
def mgda(*, normalisation: Literal["none", "l2"] = "none") -> Aggregator:
    """Multiple-gradient descent algorithm.

    ``w = argmin w^T G w`` over the simplex, solved exactly. The update d satisfies
    ``<g_i, d> >= |d|^2`` for every i: it opposes no objective, and is zero exactly where no
    common descent direction exists.

    Keeps: non-conflict; descent; permutation equivariance; degree 1 in the gradients. The shortest
    gradient dominates; the update shrinks as the number of objectives grows.

    Departures: published implementations run Frank-Wolfe for a fixed number of iterations, which
    is far from the solution when the norms differ. ``normalisation="l2"`` solves for unit
    gradients, and applies the weights to these (rescaled to sum to one over the raw gradients);
    published code applies them to the raw gradients, which loses non-conflict. Preferences, which
    the paper does not have, weight the losses: the solve sees ``p_i g_i``.

    Args:
      normalisation: ``"none"``, or ``"l2"`` to make the choice of direction blind to the norms.

    Returns:
      The aggregator.

    Raises:
      ConfigError: if the normalisation is unknown.

    References:
      Désidéri, *Multiple-gradient descent algorithm (MGDA) for multiobjective optimization*,
      C. R. Acad. Sci. 2012. Sener and Koltun, *Multi-Task Learning as Multi-Objective
      Optimization*, `arXiv:1810.04650 <https://arxiv.org/abs/1810.04650>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> [abs(round(float(x), 4)) for x in aggregate(mgda(), J)]
      [0.0, 1.0, 1.0]
    """
    check_choice("mgda", "normalisation", normalisation, ("none", "l2"))

    def weigh(gram, active, preference, state, key):
        scale = preference * jnp.sum(active)
        if normalisation == "l2":
            scale = scale / equilibrate(gram, active).norm
        scale = scale / jnp.maximum(jnp.max(scale), 1e-30)
        heard = active & (scale > 0)
        weights = scale * min_norm(gram * scale[:, None] * scale[None, :], heard)
        return weights / jnp.maximum(jnp.sum(weights), 1e-30), state

    return Aggregator("mgda", weigh, elementary=True)

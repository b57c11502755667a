"""UPGrad: every gradient projected on the cone that opposes no objective, then averaged."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator, register
from jaxmoo.aggregators.solvers import equilibrate, project_on_dual_cone


@register
def upgrad() -> Aggregator:
    """Unconflicting projection of gradients.

    Projects every gradient on the dual cone ``{d : <g_i, d> >= 0 for all i}`` and averages:
    ``w = sum_i argmin {v^T G v : v >= e_i p_i}``. All K problems are solved exactly, as one batch.

    Keeps: non-conflict; linearity under scaling of any single gradient (each objective's pull is
    proportional to its own gradient's norm); permutation equivariance; degree 1 in the gradients.
    Without conflicts it is the mean.

    Departures: published code adds a ridge to G, which opposes the weakest objective when the
    norms differ; here the cosines are used, so the norms do not matter to the solve.

    Returns:
      The aggregator.

    References:
      Quinton and Rey, *Jacobian Descent for Multi-Objective Optimization*,
      `arXiv:2406.16232 <https://arxiv.org/abs/2406.16232>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmoo.aggregators import aggregate
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> [round(float(x), 4) for x in aggregate(upgrad(), J)]
      [0.2924, 1.9006, 1.9006]
    """

    def weigh(gram, active, preference, state, key):
        cosine, norm = equilibrate(gram, active)
        # Projection commutes with positive scaling: project the unit gradients, scale afterwards.
        units = jnp.eye(active.shape[0], dtype=gram.dtype)
        added = jax.vmap(lambda unit: project_on_dual_cone(cosine, active, unit))(units)
        pull = preference * norm
        weights = (pull + jnp.matmul(pull, added, precision=jax.lax.Precision.HIGHEST)) / norm
        return weights, state

    return Aggregator("upgrad", weigh)
